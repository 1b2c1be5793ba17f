//! The commands that talk to a control socket.
//!
//! Each command sends requests, prints the response as a table or as JSON, and reports errors on standard
//! error.

pub mod args;
mod completion;
mod console;
mod events;
mod report_file;
mod show;
pub mod socket;
mod table;
mod top;

use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, anyhow, bail};
use hyper::Method;
use samepage_api_types::lifecycle::Action;
use samepage_api_types::views::{DiskView, VmSummary};
use samepage_spec::VmSpec;
use serde::Serialize;
use serde_json::{Value, json};

use args::{ClientCommand, Connection, ResizeArgs, VmsArgs};
use samepage_process::tell::{self, tell};
use socket::Client;

/// Runs a command.
///
/// # Errors
/// Fails with the reason if the command cannot be carried out.
pub fn main(command: &ClientCommand) -> anyhow::Result<ExitCode> {
    match command {
        ClientCommand::Ps(args) => show::list(args)?,
        ClientCommand::Show(args) => show::vm(args)?,
        ClientCommand::Start(args) => return act(args, Action::Start),
        ClientCommand::Pause(args) => return act(args, Action::Pause),
        ClientCommand::Resume(args) => return act(args, Action::Resume),
        ClientCommand::Reset(args) => return act(args, Action::Reset),
        ClientCommand::Stop(args) => {
            let body = json!({ "action": "stop", "timeout_seconds": args.timeout });
            return ask(&args.vms, Action::Stop, &body);
        }
        ClientCommand::Kill(args) => return act(args, Action::Kill),
        ClientCommand::Rm(args) => {
            return each(args, |client, path| Ok(client.delete(path).map(|()| None)?));
        }
        ClientCommand::Resize(args) => resize(args)?,
        ClientCommand::Balloon(args) => show::balloon(args)?,
        ClientCommand::Stats(args) => show::stats(args)?,
        ClientCommand::Sharing(args) => show::sharing(args)?,
        ClientCommand::Events(args) => events::follow(args)?,
        ClientCommand::Console(args) => console::main(args)?,
        ClientCommand::Cache(args) => show::cache(args)?,
        ClientCommand::Top(args) => top::main(args)?,
        ClientCommand::Report(args) => report_file::main(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn client(connection: &Connection) -> Client {
    connection.socket.client()
}

fn act(args: &VmsArgs, action: Action) -> anyhow::Result<ExitCode> {
    ask(args, action, &json!({ "action": action.name() }))
}

/// Requests an action for each named VM. With `--all`, only for VMs whose state allows the action.
fn ask(args: &VmsArgs, action: Action, body: &Value) -> anyhow::Result<ExitCode> {
    let can = |vm: &VmSummary| vm.state.after(action).is_some();
    each_that(args, can, |client, path| {
        let vm: VmSummary = client.send(Method::POST, &format!("{path}/actions"), body)?;
        Ok(Some(vm))
    })
}

/// Number of simultaneous requests.
const AT_ONCE: usize = 128;

/// Runs an operation for each named VM, several at a time. A failure for one VM does not stop the others.
fn each(
    args: &VmsArgs,
    work: impl Fn(&Client, &str) -> anyhow::Result<Option<VmSummary>> + Sync,
) -> anyhow::Result<ExitCode> {
    each_that(args, |_| true, work)
}

/// Like [`each`], but with `--all` only for the VMs for which `can` returns true.
fn each_that(
    args: &VmsArgs,
    can: impl Fn(&VmSummary) -> bool,
    work: impl Fn(&Client, &str) -> anyhow::Result<Option<VmSummary>> + Sync,
) -> anyhow::Result<ExitCode> {
    let client = client(&args.connection);
    let mut names = args.vms.clone();
    if args.all {
        let vms: Vec<VmSummary> = client.get("/vms")?;
        names = vms.into_iter().filter(can).map(|vm| vm.name).collect();
    }
    let mut printed = Vec::new();
    let mut code = ExitCode::SUCCESS;
    let paths = names.iter().map(|name| vm_path(name)).collect::<anyhow::Result<Vec<_>>>()?;
    for paths in paths.chunks(AT_ONCE) {
        let done: Vec<_> = thread::scope(|scope| {
            let (client, work) = (&client, &work);
            let threads: Vec<_> = paths.iter().map(|path| scope.spawn(move || work(client, path))).collect();
            threads.into_iter().map(|thread| thread.join()).collect()
        });
        for result in done {
            match result.unwrap_or_else(|_| Err(anyhow!("a thread of the program panicked"))) {
                Ok(vm) => printed.extend(vm),
                Err(error) => {
                    tell(tell::causes(&error));
                    code = ExitCode::FAILURE;
                }
            }
        }
    }
    if args.connection.json {
        print_json(&printed)?;
    }
    Ok(code)
}

/// Returns the path of a VM. Fails if the name is invalid.
fn vm_path(name: &str) -> anyhow::Result<String> {
    samepage_text::names::check_name(name)?;
    Ok(format!("/vms/{name}"))
}

/// Makes a disk adopt its image's size.
fn resize(args: &ResizeArgs) -> anyhow::Result<()> {
    let path = format!("{}/disks/{}/resize", vm_path(&args.vm)?, args.disk);
    samepage_text::names::check_disk_id(&args.disk)?;
    let disk: DiskView = client(&args.connection).send(Method::POST, &path, &json!({}))?;
    if args.connection.json {
        return print_json(&disk);
    }
    tell(format_args!("disk {} has {} bytes now", disk.id, disk.size_bytes.unwrap_or_default()));
    Ok(())
}

/// Creates VMs one by one, and starts those whose descriptions do not forbid it. With `hold` none is started.
///
/// # Errors
/// Fails with the first VM that cannot be created. Earlier ones stay.
pub fn create(connection: &Connection, specs: Vec<VmSpec>, hold: bool) -> anyhow::Result<ExitCode> {
    let client = client(connection);
    let mut created: Vec<Value> = Vec::new();
    for mut spec in specs {
        // The server has another working directory.
        spec.make_absolute()?;
        let start = spec.start.unwrap_or(true) && !hold;
        let mut body = serde_json::to_value(&spec).context("write the VM as JSON")?;
        body["start"] = start.into();
        match client.send(Method::POST, "/vms", &body) {
            Ok(vm) => created.push(vm),
            Err(error) => {
                if connection.json {
                    print_json(&created)?;
                }
                bail!(error);
            }
        }
    }
    if connection.json {
        print_json(&created)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints JSON.
fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("write JSON")?;
    print(&(text + "\n"))
}

/// Prints text. If the reader closes the output, it has what it needs.
fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("write to standard output"),
    }
}
