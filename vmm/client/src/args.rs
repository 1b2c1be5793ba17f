//! The command lines of the commands that talk to a control socket.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use samepage_api_types::lifecycle::State;
use samepage_process::control_socket;
use samepage_text::size::parse_size;

use crate::completion;
use crate::socket::Client;

/// A command that talks to a control socket.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// List the VMs of a process
    Ps(PsArgs),
    /// Show a VM
    Show(VmArgs),
    /// Start VMs that were never started or have ended
    Start(VmsArgs),
    /// Pause the guests of VMs
    Pause(VmsArgs),
    /// Resume paused guests
    Resume(VmsArgs),
    /// Boot VMs again, without asking their guests
    Reset(VmsArgs),
    /// Shut guests down with the power button or Ctrl-Alt-Del, and kill guests that do not end in time. The VMs remain
    /// and can be started again
    Stop(StopArgs),
    /// End VMs at once, without asking their guests. The VMs remain and can be started again
    Kill(VmsArgs),
    /// End VMs and delete them
    Rm(VmsArgs),
    /// Tell a guest the new size of a disk, after its image has grown or shrunk
    Resize(ResizeArgs),
    /// Show a VM's memory balloon, or change its size
    Balloon(BalloonArgs),
    /// Show the pages of VMs: private, merged, zero and other pages
    Stats(ListArgs),
    /// Show what VMs share, or change the sharing mode of a VM
    Sharing(SharingArgs),
    /// Print events as they happen
    Events(EventsArgs),
    /// Attach to a VM's console. Ctrl-A x leaves the console
    Console(ConsoleArgs),
    /// Show the cache of disk blocks
    Cache(ListArgs),
    /// Watch VMs live on this terminal
    Top(TopArgs),
    /// Write a report of a run as an HTML file, or print what guests use their pages for
    Report(ReportArgs),
}

/// The socket of a request.
#[derive(Debug, Args)]
pub struct SocketArg {
    /// Path of the control socket. By default samepage.sock in the user's runtime folder, or
    /// /run/samepage/samepage.sock if there is none
    #[arg(long = "socket", id = "socket", value_name = "PATH", env = control_socket::VARIABLE)]
    path: Option<PathBuf>,
}

impl SocketArg {
    /// Returns a client of the socket.
    pub(crate) fn client(&self) -> Client {
        match &self.path {
            Some(path) => Client::new(path),
            None => Client::of_default(control_socket::of_client()),
        }
    }
}

/// The socket of a request, and the form of the output.
#[derive(Debug, Args)]
pub struct Connection {
    #[command(flatten)]
    pub(crate) socket: SocketArg,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The arguments of commands about the whole process.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// List only VMs in this state: created, running, paused, stopped, crashed or failed
    #[arg(long, value_name = "STATE", value_parser = parse_state)]
    pub(crate) state: Option<State>,

    /// List only VMs of this group; * stands for any letters
    #[arg(long, value_name = "GROUP", value_parser = parse_pattern)]
    pub(crate) group: Option<String>,

    /// List only VMs with this name; * stands for any letters, as in 'web-*'
    #[arg(long, value_name = "NAME", value_parser = parse_pattern)]
    pub(crate) name: Option<String>,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

fn parse_state(text: &str) -> Result<State, String> {
    State::ALL.into_iter().find(|state| state.name() == text).ok_or_else(|| {
        let names: Vec<_> = State::ALL.map(State::name).into();
        format!("use one of these states: {}", names.join(", "))
    })
}

fn parse_pattern(text: &str) -> Result<String, String> {
    let letter = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_' | '-' | '*');
    if !text.is_empty() && text.chars().all(letter) {
        Ok(text.to_owned())
    } else {
        Err("use letters, digits, '.', '_' and '-'; * stands for any of them".to_owned())
    }
}

/// The arguments of commands about one VM.
#[derive(Debug, Args)]
pub struct VmArgs {
    /// Name of the VM
    #[arg(value_name = "VM", add = completion::vms())]
    pub(crate) vm: String,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of commands about some VMs.
#[derive(Debug, Args)]
pub struct VmsArgs {
    /// Names of the VMs
    #[arg(value_name = "VM", required_unless_present = "all", add = completion::vms())]
    pub(crate) vms: Vec<String>,

    /// Apply the command to all VMs whose state allows it
    #[arg(long, conflicts_with = "vms")]
    pub(crate) all: bool,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds after which a guest that has not ended is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub(crate) timeout: u32,

    #[command(flatten)]
    pub(crate) vms: VmsArgs,
}

/// The arguments of `samepage resize`.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// Name of the VM
    #[arg(value_name = "VM", add = completion::vms())]
    pub(crate) vm: String,

    /// Name of the disk
    #[arg(value_name = "DISK")]
    pub(crate) disk: String,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage balloon`.
#[derive(Debug, Args)]
pub struct BalloonArgs {
    /// Name of the VM
    #[arg(value_name = "VM", add = completion::vms())]
    pub(crate) vm: String,

    /// Ask the guest to give up this much memory in all. It gets what is above that back. The command does not wait for
    /// the guest
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub(crate) size: Option<u64>,

    /// Ask the guest for statistics of its memory this often; 0 for not any more
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=65_535))]
    pub(crate) stats_interval: Option<u32>,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage sharing`.
#[derive(Debug, Args)]
pub struct SharingArgs {
    /// Name of the VM. Without it, the command shows the whole process
    #[arg(value_name = "VM", add = completion::vms())]
    pub(crate) vm: Option<String>,

    /// Set the sharing mode: all identical pages (full), only pages of zeros (zero), or nothing (off)
    #[arg(long, value_enum, value_name = "full|zero|off", requires = "vm")]
    pub(crate) mode: Option<ModeArg>,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// `--mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeArg {
    Full,
    Zero,
    Off,
}

/// The arguments of `samepage events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Start after the event with this number; 0 prints all events that are kept
    #[arg(long, value_name = "N")]
    pub(crate) since: Option<u64>,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Seconds between two updates
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    pub(crate) interval: Duration,

    #[command(flatten)]
    pub(crate) socket: SocketArg,
}

/// The arguments of `samepage report`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ReportArgs {
    #[command(subcommand)]
    pub(crate) of: Option<ReportCommand>,

    /// Statistics file that --stats wrote
    #[arg(long, value_name = "FILE")]
    pub(crate) stats: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) socket: SocketArg,

    /// Seconds to watch a running process
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) seconds: u32,

    /// File to write; - is standard output
    #[arg(short, long, value_name = "FILE", required = true)]
    pub(crate) output: Option<PathBuf>,
}

/// Another report than that of the whole run.
#[derive(Debug, Subcommand)]
pub enum ReportCommand {
    /// Print what guests use their pages for, and how much of each use is shared
    Types(TypesArgs),
}

/// The arguments of `samepage report types`.
#[derive(Debug, Args)]
pub struct TypesArgs {
    /// Statistics file that --stats wrote
    #[arg(long, value_name = "FILE")]
    pub(crate) stats: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) socket: SocketArg,

    /// Seconds to watch a running process; a picture takes 10 by default
    #[arg(long, value_name = "SECONDS")]
    pub(crate) seconds: Option<u32>,

    /// Report only this VM
    #[arg(long, value_name = "VM")]
    pub(crate) vm: Option<String>,

    /// SVG file to write: pages by type over time
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "use a number from 0.1 to 3600".to_owned())
}

/// The arguments of `samepage console`.
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// Name of the VM
    #[arg(value_name = "VM", add = completion::vms())]
    pub(crate) vm: String,

    /// Print the guest's last output, and exit
    #[arg(long)]
    pub(crate) backlog: bool,

    #[command(flatten)]
    pub(crate) socket: SocketArg,
}
