//! A process with a control socket, and VMs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyper::Method;
use samepage_client::socket::Client;
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::Plan;
use serde_json::{Value, json};

/// Time limit for the start of the process.
const TIME_LIMIT: Duration = Duration::from_secs(30);
/// Memory of each guest, in bytes.
pub(super) const MEMORY: u64 = 16 << 20;

/// The process and its folder. Dropping it ends the process.
pub(super) struct Server {
    process: Child,
    folder: PathBuf,
    socket: PathBuf,
    client: Client,
}

impl Server {
    /// Starts the process.
    pub(super) fn start() -> Result<Self> {
        let folder = env::temp_dir().join(format!("samepage-bench-api-{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
        let socket = folder.join("socket");
        let started =
            fs::write(folder.join("guest.elf"), DEMO_GUEST).context("write the guest").and_then(|()| {
                let mut command = Command::new(crate::program::path()?);
                command.args(["serve", "--socket"]).arg(&socket).stdin(Stdio::null()).stderr(Stdio::null());
                command.spawn().context("start the server")
            });
        let process = started.inspect_err(|_| drop(fs::remove_dir_all(&folder)))?;
        let client = Client::new(&socket);
        let server = Self { process, folder, socket, client };
        let deadline = Instant::now() + TIME_LIMIT;
        while server.client.get::<Value>("/version").is_err() {
            ensure!(Instant::now() < deadline, "the server does not come up");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the path of the guest's image.
    pub(super) fn guest(&self) -> PathBuf {
        self.folder.join("guest.elf")
    }

    /// Returns the body of a request that creates and starts a VM.
    pub(super) fn vm(&self, name: &str, plan: &Plan) -> Value {
        json!({
            "name": name, "kernel": self.guest(), "memory": MEMORY, "cmdline": plan.to_string(), "start": true,
        })
    }

    /// Starts VMs that run for ever.
    pub(super) fn create_vms(&self, count: u32) -> Result<()> {
        for vm in 0..count {
            let plan = Plan { vm, rounds: 0, every_ms: 1000, pages: Some(256), ..Plan::default() };
            let vm = self.vm(&format!("vm-{vm}"), &plan);
            self.client.send::<Value>(Method::POST, "/vms", &vm).context("create a VM")?;
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The process ends in any case.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
