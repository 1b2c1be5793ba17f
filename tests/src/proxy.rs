//! A TCP port that forwards to a Unix socket, for programs without support for these.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

/// A port on the loopback interface, open as long as the process lives.
#[derive(Debug)]
pub struct Proxy(SocketAddr);

impl Proxy {
    /// Opens a port that forwards to this socket.
    ///
    /// # Panics
    /// Panics if no port can be opened.
    #[must_use]
    pub fn to(socket: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("open a port");
        let address = listener.local_addr().expect("a port has an address");
        let socket = socket.to_owned();
        thread::spawn(move || accept(&listener, &socket));
        Self(address)
    }

    /// Returns the URL of a path.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.0)
    }
}

fn accept(listener: &TcpListener, socket: &PathBuf) {
    for client in listener.incoming().flatten() {
        // If the server refuses, the client sees the connection close.
        if let Ok(server) = UnixStream::connect(socket) {
            let _ = join(client, server);
        }
    }
}

fn join(client: TcpStream, server: UnixStream) -> io::Result<()> {
    let (mut from_client, mut to_client) = (client.try_clone()?, client);
    let (mut from_server, mut to_server) = (server.try_clone()?, server);
    thread::spawn(move || {
        // An error also ends the connection.
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Both);
    });
    Ok(())
}
