//! `samepage console`: a VM's serial console on this terminal.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use crate::socket::{Client, ClientError};
use anyhow::Context;
use hyper::Method;
use samepage_api_types::problem::Kind;
use samepage_api_types::views::{VmSummary, VmView};
use samepage_process::escape::{EscapeFilter, Key};
use samepage_process::poll::wait_readable;
use samepage_process::signals::ShutdownSignals;
use samepage_process::terminal::{self, RawTerminal, StdinKind};

use super::args::ConsoleArgs;
use super::vm_path;
use samepage_process::tell::tell;

/// The text for Ctrl-A h.
const HELP: &str = "\n\
    Ctrl-A x       leave the console; the VM keeps running\n\
    Ctrl-A h       this help\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest\n";

pub(super) fn main(args: &ConsoleArgs) -> anyhow::Result<()> {
    let client = args.socket.client();
    let path = vm_path(&args.vm)? + "/console";
    if args.backlog {
        let answer = client.raw(Method::GET, &path, Vec::new())?;
        if answer.status >= 300 {
            // Repeats the request, to get the server's refusal.
            client.get::<serde_json::Value>(&path)?;
        }
        return show(&answer.body).context("write to standard output");
    }
    let (stream, first) = client.attach(&args.vm)?;
    let signals = ShutdownSignals::catch().context("catch the signals that end the program")?;
    pass_on(&client, &args.vm, &stream, &first, &signals)
}

/// Connects a VM's console to this terminal until the user leaves it or the VM has ended.
pub(super) fn attach(client: &Client, vm: &str, signals: &ShutdownSignals) -> anyhow::Result<()> {
    let (stream, first) = client.attach(vm)?;
    pass_on(client, vm, &stream, &first, signals)
}

fn pass_on(
    client: &Client,
    vm: &str,
    stream: &UnixStream,
    first: &[u8],
    signals: &ShutdownSignals,
) -> anyhow::Result<()> {
    let raw = match terminal::stdin_kind() {
        StdinKind::Terminal => {
            tell(format_args!("console of VM {vm}; Ctrl-A x leaves it, Ctrl-A h shows help"));
            Some(RawTerminal::enter().context("put the terminal into raw mode")?)
        }
        _ => None,
    };
    let left = show(first).and_then(|()| exchange(stream, signals, raw.is_some()));
    drop(raw);
    if left.context("copy data between the terminal and the console")? == Left::ByServer {
        tell(end_of(client, vm));
    }
    Ok(())
}

/// Returns a message about a VM whose console has ended.
fn end_of(client: &Client, vm: &str) -> String {
    match client.get::<VmView>(&format!("/vms/{vm}")) {
        Ok(VmView { summary: VmSummary { reason: Some(reason), .. }, .. }) => format!("VM {vm}: {reason}"),
        Ok(VmView { summary, .. }) => {
            format!("the console of VM {vm} has ended; the VM is {}", summary.state.name())
        }
        Err(ClientError::Problem(problem)) if problem.is(Kind::NoSuchVm) => format!("VM {vm} was deleted"),
        Err(_) => format!("the console of VM {vm} has ended, because the process that hosts it is ending"),
    }
}

/// The side that ended the connection.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    ByUser,
    ByServer,
}

fn show(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush())
}

fn exchange(stream: &UnixStream, signals: &ShutdownSignals, keys: bool) -> io::Result<Left> {
    let stdin = std::fs::File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut filter = EscapeFilter::default();
    // The end of a file or pipe does not end the connection.
    let mut typing = terminal::stdin_kind() != StdinKind::BackgroundTerminal;
    let mut buffer = [0; 4096];
    loop {
        let typed = typing.then(|| stdin.as_raw_fd());
        let [signal, output, typed] =
            wait_readable([Some(signals.as_raw_fd()), Some(stream.as_raw_fd()), typed])?;
        if signal {
            return Ok(Left::ByUser);
        }
        if output {
            match (&*stream).read(&mut buffer) {
                Ok(0) => return Ok(Left::ByServer),
                Ok(count) => show(&buffer[..count])?,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Left::ByServer),
                Err(error) => return Err(error),
            }
        }
        if typed {
            let count = (&stdin).read(&mut buffer)?;
            typing = count > 0;
            let to_guest = if keys {
                let Some(to_guest) = sort(&mut filter, &buffer[..count]) else { return Ok(Left::ByUser) };
                to_guest
            } else {
                buffer[..count].to_vec()
            };
            match (&*stream).write_all(&to_guest) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Left::ByServer),
                other => other?,
            }
        }
    }
}

/// Returns the keys for the guest, or `None` if the user leaves.
fn sort(filter: &mut EscapeFilter, keys: &[u8]) -> Option<Vec<u8>> {
    let mut to_guest = Vec::with_capacity(keys.len());
    for key in keys {
        match filter.feed(*key) {
            Key::Guest(byte) => to_guest.push(byte),
            Key::Quit => return None,
            Key::Help => {
                // Typing works without the help text.
                let _ = io::stderr().write_all(HELP.as_bytes());
            }
            Key::Nothing => {}
        }
    }
    Some(to_guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_to_the_guest_until_the_user_leaves() {
        let mut filter = EscapeFilter::default();
        assert_eq!(sort(&mut filter, b"ls\x01"), Some(b"ls".to_vec()));
        assert_eq!(sort(&mut filter, b"\x01\r"), Some(b"\x01\r".to_vec()));
        assert_eq!(sort(&mut filter, b"a\x01x"), None);
    }
}
