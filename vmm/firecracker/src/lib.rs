//! `samepage firecracker`: one VM behind the API of Firecracker, for clients of Firecracker.
//!
//! - `args` is Firecracker's command line, and `model` has the types of its requests and responses.
//! - `controller` stores the configuration, and `requests` passes each request to it.
//! - `machine` is the interface to the VM: `local` runs the VM in this process, `hosted` in a process of
//!   `samepage serve`, where it shares memory with other VMs.
//! - `server` serves HTTP.
//!
//! Requests for missing features get a fault and are never ignored. Harmless settings without an effect (a
//! log's format, a seccomp filter) are accepted. The table is in `docs/firecracker.md`.

pub mod args;
mod balloon;
mod config;
mod controller;
mod fault;
mod hosted;
mod http10;
mod limits;
mod local;
mod log;
mod machine;
mod metadata;
mod metrics;
mod model;
mod requests;
mod server;

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use parking_lot::Mutex;
use samepage_process::signals::ShutdownSignals;

use args::FirecrackerArgs;
use controller::Controller;
use fault::Fault;
use log::Log;
use machine::Machine;
use samepage_process::tell::{self, tell};
use server::Server;

/// The version of Firecracker's API that is implemented. Clients check for a known version.
pub(crate) const VERSION: &str = "1.16.1";

/// The exit status of the process, the same as Firecracker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    /// The guest reset the machine or powered off, or a signal ended the process.
    Ok = 0,
    /// Any other error.
    Error = 1,
    /// The configuration file or the value of an option is wrong.
    BadConfiguration = 152,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// The VM of the process, which clients configure and control.
type Shared = Arc<Mutex<Controller>>;

/// Runs a VM until it has ended, or a signal ends the process.
pub fn main(args: &FirecrackerArgs) -> anyhow::Result<ExitCode> {
    if args.version {
        args::print_version();
        return Ok(Exit::Ok.into());
    }
    if args.snapshot_version || args.describe_snapshot.is_some() {
        tell("there are no snapshots");
        return Ok(Exit::Error.into());
    }
    let log = match Log::new(args) {
        Ok(log) => Arc::new(log),
        Err(error) => {
            tell(tell::causes(&error));
            return Ok(Exit::BadConfiguration.into());
        }
    };
    log.info(format_args!("samepage {} runs as Firecracker v{VERSION}", env!("CARGO_PKG_VERSION")));
    // Before any thread starts, so that all threads block the signals.
    let signals = ShutdownSignals::catch().context("catch the signals that end the process")?;
    let exit = match &args.host {
        None => {
            let (machine, watch) = local::start(args, log.clone())?;
            run(args, machine, &log, |server| watch.until_the_end(&signals, server))?
        }
        Some(socket) => {
            let (machine, watch) = hosted::start(socket, args, log.clone())?;
            run(args, machine, &log, |server| watch.until_the_end(&signals, server))?
        }
    };
    log.info(format_args!("the process ends with {}", exit as u8));
    Ok(exit.into())
}

/// Configures the machine from a file, if there is one, and serves clients while `watch` waits.
fn run(
    args: &FirecrackerArgs,
    machine: Arc<dyn Machine>,
    log: &Arc<Log>,
    watch: impl FnOnce(Option<Server>) -> anyhow::Result<Exit>,
) -> anyhow::Result<Exit> {
    let mut controller = Controller::new(args, machine, log.clone());
    if let Some(path) = &args.metrics_path
        && let Err(Fault { message, .. }) = controller.set_metrics_path(path)
    {
        tell(message);
        return Ok(Exit::BadConfiguration);
    }
    if let Some(path) = &args.metadata
        && let Err(error) = controller.read_mmds(path)
    {
        tell(tell::causes(&error));
        return Ok(Exit::BadConfiguration);
    }
    if let Some(path) = &args.config_file
        && let Err(error) = config::apply(path, &mut controller)
    {
        tell(tell::causes(&error));
        return Ok(Exit::BadConfiguration);
    }
    let controller = Arc::new(Mutex::new(controller));
    let server = if args.no_api {
        None
    } else {
        let server = Server::start(&args.api_sock, args.http_api_max_payload_size, controller, log.clone());
        Some(server.context("start the server of the API")?)
    };
    watch(server)
}
