//! The command lines of the commands that talk to a control socket.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use samepage_api_types::lifecycle::State;

/// A command that talks to a control socket.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// List the VMs of a control socket
    Ps(PsArgs),
    /// Show a VM
    Show(VmArgs),
    /// Create the VMs of a configuration file
    Create(CreateArgs),
    /// Start VMs that were never started, or boot those anew that have ended
    Start(VmsArgs),
    /// Hold VMs' guests
    Pause(VmsArgs),
    /// Let paused guests go on
    Resume(VmsArgs),
    /// Boot VMs anew. Guests are not asked
    Reset(VmsArgs),
    /// Ask VMs' guests to end, by Ctrl-Alt-Del, and kill those that do not in time; the VMs stay and can
    /// be started again
    Stop(StopArgs),
    /// End VMs. Guests are not asked; the VMs stay and can be started again
    Kill(VmsArgs),
    /// End VMs, and forget them
    Rm(VmsArgs),
    /// Have a guest see that the image of a disk has grown or shrunk
    Resize(ResizeArgs),
    /// Show what VMs' memory consists of
    Stats(ListArgs),
    /// Show what is shared, or change what a VM shares
    Sharing(SharingArgs),
    /// Tell what happens
    Events(EventsArgs),
    /// Attach to a VM's console; Ctrl-A x leaves it
    Console(ConsoleArgs),
    /// Show the cache of disk blocks
    Cache(ListArgs),
    /// Watch VMs and what they share on this terminal
    Top(TopArgs),
    /// Write a file of HTML that shows a run, or tell what pages are used for
    Report(ReportArgs),
}

/// Where to ask, and how to answer.
#[derive(Debug, Args)]
pub struct Connection {
    /// The control socket
    #[arg(long, value_name = "PATH", env = "SAMEPAGE_SOCKET")]
    pub(crate) socket: PathBuf,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The arguments of commands about everything.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// List those in this state alone: created, running, paused, stopped, crashed or failed
    #[arg(long, value_name = "STATE", value_parser = parse_state)]
    pub(crate) state: Option<State>,

    /// List those of this group alone; * stands for any letters
    #[arg(long, value_name = "GROUP", value_parser = parse_pattern)]
    pub(crate) group: Option<String>,

    /// List those of this name alone; * stands for any letters, as in 'web-*'
    #[arg(long, value_name = "NAME", value_parser = parse_pattern)]
    pub(crate) name: Option<String>,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

fn parse_state(text: &str) -> Result<State, String> {
    State::ALL.into_iter().find(|state| state.name() == text).ok_or_else(|| {
        let names: Vec<_> = State::ALL.map(State::name).into();
        format!("VMs are in one of these states: {}", names.join(", "))
    })
}

fn parse_pattern(text: &str) -> Result<String, String> {
    let letter = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_' | '-' | '*');
    if !text.is_empty() && text.chars().all(letter) {
        Ok(text.to_owned())
    } else {
        Err("names are of letters, digits, '.', '_' and '-'; * stands for any of them".to_owned())
    }
}

/// The arguments of commands about one VM.
#[derive(Debug, Args)]
pub struct VmArgs {
    /// Its name
    #[arg(value_name = "VM")]
    pub(crate) vm: String,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of commands about some VMs.
#[derive(Debug, Args)]
pub struct VmsArgs {
    /// Their names
    #[arg(value_name = "VM", required_unless_present = "all")]
    pub(crate) vms: Vec<String>,

    /// All VMs
    #[arg(long, conflicts_with = "vms")]
    pub(crate) all: bool,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// How long guests may take before they are killed, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub(crate) timeout: u32,

    #[command(flatten)]
    pub(crate) vms: VmsArgs,
}

/// The arguments of `samepage resize`.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) vm: String,

    /// The disk's name
    #[arg(value_name = "DISK")]
    pub(crate) disk: String,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The configuration file (TOML, or JSON where it is named so)
    #[arg(value_name = "FILE")]
    pub(crate) config: PathBuf,

    /// Start none of them
    #[arg(long)]
    pub(crate) hold: bool,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage sharing`.
#[derive(Debug, Args)]
pub struct SharingArgs {
    /// A VM; the whole process where none is named
    #[arg(value_name = "VM")]
    pub(crate) vm: Option<String>,

    /// What of its memory is shared from now on
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
    /// Begin behind the event of this number, as far as they are kept; 0 for all
    #[arg(long, value_name = "N")]
    pub(crate) since: Option<u64>,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// How often figures are asked for, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    pub(crate) interval: Duration,

    /// The control socket
    #[arg(long, value_name = "PATH", env = "SAMEPAGE_SOCKET")]
    pub(crate) socket: PathBuf,
}

/// The arguments of `samepage report`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ReportArgs {
    #[command(subcommand)]
    pub(crate) of: Option<ReportCommand>,

    /// A file of statistics that --stats wrote
    #[arg(long, value_name = "FILE")]
    pub(crate) stats: Option<PathBuf>,

    /// The control socket of a process that runs, where no file is given
    #[arg(long, value_name = "PATH", env = "SAMEPAGE_SOCKET")]
    pub(crate) socket: Option<PathBuf>,

    /// How long to watch a process that runs
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) seconds: u32,

    /// The file that is written; - is standard output
    #[arg(short, long, value_name = "FILE", required = true)]
    pub(crate) output: Option<PathBuf>,
}

/// A report of something else than the run as a whole.
#[derive(Debug, Subcommand)]
pub enum ReportCommand {
    /// Tell what guests use their pages for, and what of each use is shared
    Types(TypesArgs),
}

/// The arguments of `samepage report types`.
#[derive(Debug, Args)]
pub struct TypesArgs {
    /// A file of statistics that --stats wrote
    #[arg(long, value_name = "FILE")]
    pub(crate) stats: Option<PathBuf>,

    /// The control socket of a process that runs, where no file is given
    #[arg(long, value_name = "PATH", env = "SAMEPAGE_SOCKET")]
    pub(crate) socket: Option<PathBuf>,

    /// How long to watch a process that runs; a picture takes 10 where this is not given
    #[arg(long, value_name = "SECONDS")]
    pub(crate) seconds: Option<u32>,

    /// Tell of this VM alone
    #[arg(long, value_name = "VM")]
    pub(crate) vm: Option<String>,

    /// A picture that is written: pages by type over time, as SVG
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
    /// The VM's name
    #[arg(value_name = "VM")]
    pub(crate) vm: String,

    /// Print what the guest wrote last, and end
    #[arg(long)]
    pub(crate) backlog: bool,

    /// The control socket
    #[arg(long, value_name = "PATH", env = "SAMEPAGE_SOCKET")]
    pub(crate) socket: PathBuf,
}
