//! Firecracker's command line.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgAction, Args, Parser};

use super::VERSION;

/// The name under which the program acts as Firecracker.
const NAME: &str = "firecracker";
/// Firecracker's exit status for wrong arguments.
const WRONG_ARGUMENTS: u8 = 153;

/// Run one VM behind the API of Firecracker. If a link with the name `firecracker` starts the program, it is
/// this command.
#[derive(Debug, Args)]
pub struct FirecrackerArgs {
    /// Path of the API's socket
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    pub(crate) api_sock: PathBuf,

    /// Name of the VM
    #[arg(long, value_name = "ID", default_value = "anonymous-instance", value_parser = parse_id)]
    pub(crate) id: String,

    /// Configure the VM from this file (Firecracker's JSON) and start it
    #[arg(long, value_name = "FILE")]
    pub(crate) config_file: Option<PathBuf>,

    /// Open no socket
    #[arg(long, requires = "config_file")]
    pub(crate) no_api: bool,

    /// Run the VM in the process of `samepage serve` with this control socket, so that it shares memory with
    /// other VMs. The VM ends when this process ends
    #[arg(long, value_name = "SOCKET", env = "SAMEPAGE_HOST")]
    pub(crate) host: Option<PathBuf>,

    /// Append the log to this file or FIFO instead of standard error
    #[arg(long, value_name = "PATH")]
    pub(crate) log_path: Option<PathBuf>,

    /// Lowest level that is logged: Error, Warning, Info, Debug, Trace, or Off for nothing
    #[arg(long, value_name = "LEVEL")]
    pub(crate) level: Option<String>,

    /// Write the level of each line of the log
    #[arg(long)]
    pub(crate) show_level: bool,

    /// Write metrics to this file or FIFO, as JSON, on request (FlushMetrics)
    #[arg(long, value_name = "PATH")]
    pub(crate) metrics_path: Option<PathBuf>,

    /// Longest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 51_200)]
    pub(crate) http_api_max_payload_size: usize,

    /// Print the supported version of Firecracker's API
    #[arg(long)]
    pub(crate) version: bool,

    /// Refused: there are no snapshots
    #[arg(long)]
    pub(crate) snapshot_version: bool,

    /// Refused: there are no snapshots
    #[arg(long, value_name = "FILE")]
    pub(crate) describe_snapshot: Option<PathBuf>,

    /// Attach devices to a PCI bus
    #[arg(long)]
    pub(crate) enable_pci: bool,

    /// Give the guest the metadata (MMDS) of this JSON file
    #[arg(long, value_name = "FILE", conflicts_with = "host")]
    pub(crate) metadata: Option<PathBuf>,

    /// Upper limit for the metadata, in bytes of JSON. The default is the longest body of a request
    #[arg(long, value_name = "BYTES")]
    pub(crate) mmds_size_limit: Option<usize>,

    #[command(flatten)]
    pub(crate) accepted: AcceptedArgs,
}

/// Arguments that are accepted without effect.
#[derive(Debug, Args)]
#[command(next_help_heading = "Accepted without effect")]
pub struct AcceptedArgs {
    /// There is no seccomp filter
    #[arg(long, conflicts_with = "seccomp_filter")]
    no_seccomp: bool,

    /// There is no seccomp filter
    #[arg(long, value_name = "FILE")]
    seccomp_filter: Option<PathBuf>,

    /// The log has no modules
    #[arg(long, value_name = "MODULE")]
    module: Option<String>,

    /// The log has no places in the source
    #[arg(long)]
    show_log_origin: bool,

    /// The guest reports the time of its boot itself
    #[arg(long)]
    boot_timer: bool,

    /// The time of the process's start is not reported
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_us: Option<u64>,

    /// The time of the process's start is not reported
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_cpu_us: Option<u64>,

    /// The time of the process's start is not reported
    #[arg(long, value_name = "MICROSECONDS")]
    parent_cpu_time_us: Option<u64>,

    /// More arguments, which a jailer passes on
    #[arg(last = true, action = ArgAction::Append, hide = true)]
    more: Vec<String>,
}

/// The command line of a program with Firecracker's name.
#[derive(Debug, Parser)]
#[command(name = NAME, disable_version_flag = true, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    args: FirecrackerArgs,
}

/// Returns the arguments if the program was called by Firecracker's name. `Err` contains the exit status if
/// the arguments are wrong, or if they only ask for help.
pub fn of_process() -> Option<Result<FirecrackerArgs, ExitCode>> {
    let program = std::env::args_os().next()?;
    (Path::new(&program).file_name() == Some(OsStr::new(NAME))).then(|| {
        Cli::try_parse().map(|cli| cli.args).map_err(|error| {
            // If the output is closed, nobody needs the message.
            let _ = error.print();
            ExitCode::from(if error.use_stderr() { WRONG_ARGUMENTS } else { 0 })
        })
    })
}

/// Prints the version in the form that clients expect.
pub(super) fn print_version() {
    use std::io::Write;
    // If the output is closed, nobody needs the version.
    let _ = writeln!(
        std::io::stdout(),
        "Firecracker v{VERSION}\n\nThis is samepage {}, which speaks Firecracker's API.",
        env!("CARGO_PKG_VERSION")
    );
}

fn parse_id(id: &str) -> Result<String, String> {
    let letter = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if (1..=64).contains(&id.len()) && id.chars().all(letter) {
        Ok(id.to_owned())
    } else {
        Err("use 1 to 64 letters, digits or -".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(arguments: &[&str]) -> Result<FirecrackerArgs, clap::Error> {
        Cli::try_parse_from([&[NAME], arguments].concat()).map(|cli| cli.args)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_usual_arguments_are_taken() {
        let args = parse(&["--api-sock", "/tmp/s", "--id", "a-1", "--no-seccomp", "--boot-timer"]).unwrap();
        assert_eq!((args.api_sock.as_path(), args.id.as_str()), (Path::new("/tmp/s"), "a-1"));
        assert!(args.accepted.no_seccomp && args.accepted.boot_timer);
        let all = [
            "--seccomp-filter=f",
            "--level=Debug",
            "--log-path=l",
            "--metrics-path=m",
            "--module=api",
            "--show-level",
            "--show-log-origin",
            "--start-time-us=1",
            "--start-time-cpu-us=1",
            "--parent-cpu-time-us=1",
            "--http-api-max-payload-size=100",
            "--mmds-size-limit=100",
            "--config-file=c",
            "--no-api",
            "--",
            "--whatever",
        ];
        assert_eq!(parse(&all).unwrap().http_api_max_payload_size, 100);
        assert!(parse(&["--version"]).unwrap().version);
    }

    #[test]
    fn wrong_arguments_are_refused() {
        for wrong in [
            &["--no-api"][..],
            &["--id", "a_b"],
            &["--id", ""],
            &["--no-seccomp", "--seccomp-filter=f"],
            &["--nothing"],
            &["--metadata", "m", "--host", "s"],
        ] {
            assert!(parse(wrong).unwrap_err().use_stderr(), "{wrong:?}");
        }
    }
}
