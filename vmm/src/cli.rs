//! The command line of `samepage`: its arguments, and their values before validation.

mod balloon;
mod cloud_init;
mod disk;
mod engine;
mod fields;
mod net;
mod rng;
mod vsock;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand};
use samepage_host::stats_writer::StatsTarget;
use samepage_machine::config;
use samepage_process::control_socket;
use samepage_sharing::blocks::CacheSize;
use samepage_sharing::service::DEFAULT_GROUP;
use samepage_spec::{
    BalloonSpec, CloudInitSpec, Cpu, DiskSpec, HugePages, MemoryHole, MemoryWeight, NetworkSpec, RngSpec,
    SharingMode, VirtioBus, VsockSpec,
};
use samepage_text::names;
use samepage_text::size::parse_size;

use balloon::parse_balloon;
use cloud_init::parse_cloud_init;
use disk::parse_disk;
pub(crate) use engine::EngineArg;
use engine::parse_engine;
use net::parse_net;
use rng::parse_rng;
use samepage_analyze::args::AnalyzeArgs;
use samepage_client::args::{ClientCommand, Connection};
use samepage_firecracker::args::FirecrackerArgs;
use vsock::parse_vsock;

const EXAMPLES: &str = "\
Examples:
  Boot one Linux guest on this terminal (Ctrl-A x ends it, Ctrl-A h helps):
    samepage run --kernel vmlinux --initrd initramfs.cpio --cmdline 'console=ttyS0 reboot=k panic=-1'

  Four guests that share memory, each with a disk of its own and one in common:
    samepage run --kernel bzImage --count 4 --memory 512M --name web \\
        --disk path=root-{index}.img --disk path=data.img,readonly \\
        --cmdline 'console=ttyS0 root=/dev/vda hostname={name}' --console file={name}.log

Exit status:
  0  all guests powered off or reset, or were stopped from outside
  1  samepage could not start or keep running a VM
  2  the command line is wrong
  3  a guest crashed";

const CREATE_EXAMPLES: &str = "\
Examples:
  Ten VMs with a disk each:
    samepage create web --kernel vmlinuz --initrd initrd.img --count 10 --memory 1G \\
        --disk path=web-{index}.img --cmdline 'console=ttyS0 root=/dev/vda'

  The VMs of a configuration file, without starting them:
    samepage create vms.toml --hold";

const ANALYZE_USAGE: &str = "samepage analyze [OPTIONS] FILE...\n       samepage analyze [OPTIONS] --pid PID";

const ANALYZE_EXAMPLES: &str = "\
Examples:
  Two VMs of libvirt, from dumps of their memory:
    virsh dump --memory-only --live web-1 web-1.core
    virsh dump --memory-only --live web-2 web-2.core
    samepage analyze web-1.core web-2.core --svg web.svg

  Two running QEMU processes:
    samepage analyze --pid 1234 --pid 1235";

/// Hosts many KVM virtual machines in one process and shares their identical memory.
#[derive(Debug, Parser)]
#[command(name = "samepage", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run one or more VMs until all of them have ended
    #[command(after_help = EXAMPLES)]
    Run(Box<RunArgs>),
    /// Host VMs that clients of a control socket create, until told to end (SIGTERM)
    Serve(Box<ServeArgs>),
    /// Create VMs in a process with a control socket: of options, or of a configuration file
    #[command(after_help = CREATE_EXAMPLES)]
    Create(Box<CreateArgs>),
    /// Run one VM behind the API of Firecracker, for clients of Firecracker
    #[command(disable_version_flag = true)]
    Firecracker(Box<FirecrackerArgs>),
    /// Show what sharing memory saves, with an embedded guest: boot VMs with partly identical memory,
    /// merge it while they run, and let the guests verify every word of it
    Demo(DemoArgs),
    /// Estimate what sharing would save in memory images, or in running VMs of any monitor
    #[command(after_help = ANALYZE_EXAMPLES, override_usage = ANALYZE_USAGE)]
    Analyze(AnalyzeArgs),
    /// Compare samepage with other programs. Needs samepage-bench
    #[command(disable_help_flag = true)]
    Bench {
        /// The benchmark and its arguments; --help lists them
        #[arg(value_name = "ARGUMENT", trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    #[command(flatten)]
    Client(ClientCommand),
    /// Hold VMs for another process
    #[command(hide = true)]
    Worker,
    /// Check configuration files
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages
    Man {
        /// The folder for the pages
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// List all mistakes of a configuration file, with line numbers
    Check {
        /// The file (TOML, or JSON if its name ends in .json)
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print the JSON Schema of configuration files
    Schema,
}

/// The arguments of `samepage demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Number of VMs, of 128 MiB each
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=256))]
    pub(crate) vms: u32,

    /// Number of vCPUs of each VM. All of them work
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) vcpus: u32,

    /// CPU time for the search for identical pages, in percent of one core
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0, value_parser = parse_percent)]
    pub(crate) cpu: f64,

    /// Print only the summary, as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// The VMs of `samepage run` and `samepage create`. In arguments that say so, `{index}` and `{name}` are replaced by each
/// VM's number and name.
#[derive(Debug, PartialEq, Eq, Args)]
pub(crate) struct VmOptions {
    /// Kernel to boot: a vmlinux (x86-64 ELF, with or without PVH entry) or a bzImage
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,

    /// Initial RAM disk (initramfs)
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,

    /// The kernel's command line; {index} and {name} are replaced for each VM
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 reboot=k panic=-1")]
    pub(crate) cmdline: String,

    /// Memory of each VM, in bytes or with K, M, G or T (KiB, MiB, GiB or TiB)
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_memory)]
    pub(crate) memory: u64,

    /// Number of vCPUs of each VM
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=254))]
    pub(crate) vcpus: u32,

    /// Show guests each two vCPUs as the threads of one core, rather than each as a core
    #[arg(long)]
    pub(crate) smt: bool,

    /// Processor features that guests are told of: the host's, or those of a level that other hosts have too
    #[arg(long, value_enum, value_name = "host|PROFILE", default_value_t = Cpu::Host)]
    pub(crate) cpu: Cpu,

    /// Number of VMs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) count: u32,

    /// Add a disk: an image file or a block device. Repeat the option for more disks. {index} and {name} are
    /// replaced; write a comma in the path twice. Further fields are readonly (or readonly=on|off), id=NAME,
    /// format=raw|qcow2, backing=FILE (the image that holds what the guest has not written), create (create a missing
    /// qcow2 image), size=BYTES and backing-format=raw|qcow2 (of an image that is created), cache=exclusive|scrub|inclusive|none|buffered (the cache in host memory),
    /// rate=BYTES (per second), iops=N and queues=N
    #[arg(long = "disk", value_name = "path=FILE[,FIELD...]", value_parser = parse_disk)]
    pub(crate) disks: Vec<DiskSpec>,

    /// Add a disk with files for cloud-init, after the other disks: user-data=FILE, meta-data=FILE,
    /// network-config=FILE and ssh-key=FILE (public keys). Without meta data, the guest gets the VM's name and the
    /// keys. {index} and {name} are replaced
    #[arg(long, value_name = "FIELD=FILE,...", value_parser = parse_cloud_init)]
    pub(crate) cloud_init: Option<CloudInitSpec>,

    /// Add a network device on a tap: tap=NAME ({index} and {name} are replaced), which is made if the host has
    /// none and the user may do so, or fd=N, an open file. Or add one without privileges, through passt: user, with
    /// publish=HOST:GUEST for ports of the guest ({index} in HOST is replaced). Repeat the option for more devices.
    /// Further fields are id=NAME, mac=ADDRESS, mtu=BYTES, queues=N, and limits per second: rx-rate=BYTES,
    /// rx-iops=FRAMES, tx-rate=BYTES and tx-iops=FRAMES
    #[arg(long = "net", value_name = "tap=NAME|user[,FIELD...]", value_parser = parse_net)]
    pub(crate) networks: Vec<NetworkSpec>,

    /// Connect programs of guest and host by sockets (vsock). A program of the host connects to this Unix socket
    /// and writes `CONNECT PORT`; one of the guest connects to a port P of the host, whose socket is PATH_P.
    /// {index} and {name} are replaced; cid=N is the guest's address
    #[arg(long, value_name = "uds=PATH[,cid=N]", value_parser = parse_vsock)]
    pub(crate) vsock: Option<VsockSpec>,

    /// Whether each guest gets random bytes of the host from a virtio device. rate=BYTES and iops=N limit them
    /// per second
    #[arg(long, value_name = "on|off|LIMIT,...", default_value = "on", value_parser = parse_rng)]
    pub(crate) rng: RngSpec,

    /// Whether each guest can give memory back to the host by a virtio balloon. Fields are size=BYTES (asked for at the
    /// start), deflate-on-oom, reporting=on|off (of free memory; on by default), hinting and stats-interval=SECONDS
    #[arg(long, value_name = "on|off|FIELD,...", value_parser = parse_balloon)]
    pub(crate) balloon: Option<BalloonSpec>,

    /// Back hot guest memory with huge pages of 2 MiB (thp). Cold huge pages with enough identical pages in
    /// them are split, so that the engine can share these
    #[arg(long, value_enum, value_name = "off|thp", default_value_t = HugePages::Off)]
    pub(crate) hugepages: HugePages,

    /// Prefer memory of this NUMA node of the host
    #[arg(long, value_name = "N")]
    pub(crate) host_numa_node: Option<u32>,

    /// The weight against other VMs when memory is short and VMs take turns, from 1 to 10000
    #[arg(long, value_name = "N", default_value = "100", value_parser = parse_weight)]
    pub(crate) memory_weight: MemoryWeight,

    /// How virtio devices are attached: each at registers of its own, or on a PCI bus with MSI-X
    #[arg(long, value_enum, value_name = "mmio|pci", default_value_t = VirtioBus::Mmio)]
    pub(crate) bus: VirtioBus,

    /// Which pages of the VMs' memory are shared
    #[arg(long, value_enum, value_name = "full|zero|off", default_value_t = SharingMode::Full)]
    pub(crate) sharing: SharingMode,

    /// How an agent in a guest publishes what the guest's pages are used for
    #[arg(long, value_enum, value_name = "on|off|port", default_value_t = MemoryHole::On)]
    pub(crate) memory_hole: MemoryHole,

    /// Share memory only with VMs of the same group. {index} and {name} are replaced, so {name} gives each VM
    /// a group of its own
    #[arg(long, value_name = "NAME", default_value = DEFAULT_GROUP)]
    pub(crate) share_group: String,
}

/// The arguments of `samepage run`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("vms").args(["kernel", "config"]).required(true).multiple(true)))]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) vm: VmOptions,

    /// Name of the VM; with --count, VMs are named NAME-0, NAME-1 and so on
    #[arg(long, value_name = "NAME", default_value = "vm", value_parser = parse_name)]
    pub(crate) name: String,

    /// Where the guests' consoles go: stdio, file=PATH ({index} and {name} are replaced) or off. With several
    /// VMs on stdio, each line begins with the VM's name
    #[arg(long, value_name = "stdio|file=PATH|off", default_value = "stdio", value_parser = parse_console)]
    pub(crate) console: ConsoleArg,

    /// Open a control socket, at this path or at the one that `serve` has by default
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<Option<PathBuf>>,

    #[command(flatten)]
    pub(crate) socket_access: SocketAccess,

    #[command(flatten)]
    pub(crate) process: ProcessArgs,
}

/// The arguments of `samepage create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// With --kernel, the VM's name; with --count, VMs are named NAME-0, NAME-1 and so on. Otherwise a
    /// configuration file: JSON if its name ends in .json, otherwise TOML
    #[arg(value_name = "NAME|FILE")]
    pub(crate) what: PathBuf,

    #[command(flatten)]
    pub(crate) vm: VmOptions,

    /// File for a copy of the console; {index} and {name} are replaced. `samepage console` shows the console
    /// in any case
    #[arg(long, value_name = "off|file=PATH", default_value = "off", value_parser = parse_console_file)]
    pub(crate) console: ConsoleArg,

    /// Create the VMs without starting them
    #[arg(long)]
    pub(crate) hold: bool,

    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// The arguments of `samepage serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Path of the control socket. By default samepage.sock in the user's runtime folder (XDG_RUNTIME_DIR), and for
    /// root /run/samepage/samepage.sock
    #[arg(long, value_name = "PATH", env = control_socket::VARIABLE)]
    pub(crate) socket: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) socket_access: SocketAccess,

    /// Share no memory between VMs
    #[arg(long)]
    pub(crate) no_sharing: bool,

    /// Folder in which worker processes wait if this process is killed: their VMs go on, and the next `samepage serve`
    /// with the same folder adopts them. Needs --vms-per-worker. Only the owner may write to the folder
    #[arg(long, value_name = "DIR", env = "SAMEPAGE_STATE")]
    pub(crate) state: Option<PathBuf>,

    /// How long a worker process whose VMs have all ended waits to be adopted, in seconds. Then it leaves a report in
    /// the folder
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "state")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=31_536_000))]
    pub(crate) adoption_timeout: u32,

    #[command(flatten)]
    pub(crate) process: ProcessArgs,
}

/// Access to the control socket.
#[derive(Debug, Args)]
pub(crate) struct SocketAccess {
    /// Permissions of the control socket, in octal. Users with write permission can do anything that this
    /// process can
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = parse_mode)]
    pub(crate) socket_mode: u32,

    /// Group of the control socket, by name or number
    #[arg(long, value_name = "GROUP")]
    pub(crate) socket_group: Option<String>,
}

/// The options that all VMs of a process have in common.
#[derive(Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Start the VMs of this configuration file (TOML, or JSON if its name ends in .json)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Hold the VMs in worker processes, so many VMs in each at most. If a worker ends, its VMs end, and others go on.
    /// 0 holds all VMs in this process. Disks of VMs in workers have no block cache yet
    #[arg(long, value_name = "COUNT", env = "SAMEPAGE_VMS_PER_WORKER", default_value_t = 0)]
    #[arg(value_parser = clap::value_parser!(u32).range(..=1024))]
    pub(crate) vms_per_worker: u32,

    /// Serve disks of VMs in workers from the block cache
    #[arg(long, hide = true)]
    pub(crate) worker_block_cache: bool,

    /// Average CPU time for the search for identical pages, in percent of one core. Above 100, several
    /// threads search
    #[arg(long, value_name = "PERCENT", default_value_t = 10.0, value_parser = parse_cpu)]
    pub(crate) sharing_cpu: f64,

    /// Upper limit for cached disk blocks that no guest holds: a size, or a percentage of free memory and
    /// these blocks together
    #[arg(long, value_name = "SIZE|PERCENT", default_value = "25%", value_parser = parse_cache_size)]
    pub(crate) block_cache: CacheSize,

    /// Change how the engine works, for comparisons. As in KSM, lookahead=off searches for every page,
    /// order=content uses search trees by content, and scan=full scans all memory in a loop. By the types that
    /// guests publish, types=not-file shares no pages of files, and types=file shares only these
    #[arg(long, value_name = "KEY=VALUE,...", default_value = "", value_parser = parse_engine)]
    pub(crate) sharing_engine: EngineArg,

    /// Serve the web page and the API for browsers at this address, as in 127.0.0.1:8080. Without a token,
    /// only this host can connect, and only to watch VMs
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) http: Option<SocketAddr>,

    /// Require the token in this file for requests to the --http port. Only the file's owner may be able to
    /// read the file
    #[arg(long, value_name = "FILE", requires = "http")]
    pub(crate) http_token: Option<PathBuf>,

    /// Append statistics to this file once a second, as JSON Lines; - is standard output
    #[arg(long, value_name = "PATH|-")]
    pub(crate) stats: Option<StatsTarget>,

    /// Compare the engine's metadata with the kernel's page maps whenever a VM has ended
    #[arg(long)]
    pub(crate) audit: bool,

    /// How long guests may take to shut down after SIGTERM or SIGINT, in seconds. Then their VMs are killed. A
    /// second signal, or 0, kills them at once
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=86_400))]
    pub(crate) stop_timeout: u32,

    /// Hold VMs that need more memory when the host runs short, and run them in turns, so that no VM is killed; off
    /// leaves that to the kernel, which kills
    #[arg(long, value_enum, value_name = "auto|off", default_value_t = GovernorArg::Auto)]
    pub(crate) governor: GovernorArg,

    /// Allow the VMs' memory to exceed the host's available memory by this factor
    #[arg(long, value_name = "RATIO", default_value_t = 1.0, value_parser = parse_ratio)]
    pub(crate) overcommit: f64,
}

/// `--governor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum GovernorArg {
    Auto,
    Off,
}

/// `--console`, before `{index}` and `{name}` are replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ConsoleArg {
    Stdio,
    File(String),
    Off,
}

fn parse_weight(text: &str) -> Result<MemoryWeight, String> {
    text.parse::<u32>().map_err(|error| error.to_string())?.try_into()
}

fn parse_memory(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    config::check_memory(bytes).map(|()| bytes).map_err(|error| {
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        if is_number && (1..1 << 20).contains(&bytes) {
            format!("the unit is missing, and {text} bytes are too little for a VM; write {text}M for MiB")
        } else {
            error.to_string()
        }
    })
}

fn parse_cache_size(text: &str) -> Result<CacheSize, String> {
    let Some(percent) = text.strip_suffix('%') else { return parse_size(text).map(CacheSize::Bytes) };
    match percent.parse() {
        Ok(percent @ 0..=100) => Ok(CacheSize::Percent(percent)),
        _ => Err(format!("{text:?} is no percentage: give 0% to 100%, or a size as in 512M")),
    }
}

fn parse_name(text: &str) -> Result<String, String> {
    names::check_name(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

fn parse_console(text: &str) -> Result<ConsoleArg, String> {
    match text.split_once('=') {
        None if text == "stdio" => Ok(ConsoleArg::Stdio),
        None if text == "off" => Ok(ConsoleArg::Off),
        Some(("file", path)) if !path.is_empty() => Ok(ConsoleArg::File(path.to_owned())),
        _ => Err("use stdio, file=PATH or off".to_owned()),
    }
}

fn parse_console_file(text: &str) -> Result<ConsoleArg, String> {
    match parse_console(text) {
        Ok(ConsoleArg::Stdio) | Err(_) => Err("use file=PATH or off; `samepage console` shows it".to_owned()),
        console => console,
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && mode & 0o600 == 0o600 => Ok(mode),
        _ => Err("use permissions in octal that let the owner read and write, as in 600 or 660".to_owned()),
    }
}

fn parse_percent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(percent) if percent.is_finite() && percent > 0.0 && percent <= 100.0 => Ok(percent),
        _ => Err("use a number above 0, up to 100".to_owned()),
    }
}

fn parse_cpu(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(percent) if percent.is_finite() && percent > 0.0 && percent <= 6400.0 => Ok(percent),
        _ => Err("use a number above 0, up to 6400: 100 is one core".to_owned()),
    }
}

fn parse_ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if ratio.is_finite() && ratio > 0.0 => Ok(ratio),
        _ => Err("use a number above 0, as in 1.5".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn memory_without_a_unit_is_refused_with_a_hint() {
        assert_eq!(parse_memory("512M"), Ok(512 << 20));
        assert_eq!((parse_memory("2Gi"), parse_memory("67108864")), (Ok(2 << 30), Ok(64 << 20)));
        let said = parse_memory("512").unwrap_err();
        assert!(said.contains("unit is missing") && said.contains("512M"), "{said}");
        assert!(parse_memory("512K").unwrap_err().contains("2M at least"));
    }

    #[test]
    fn commands_print_json_where_the_readme_says_so() {
        let readme = include_str!("../../README.md");
        let (_, promised) = readme.split_once("People use").unwrap();
        let (promised, rest) = promised.split_once("each with `--json`").unwrap();
        let cli = Cli::command();
        let has_json = |name: &str| {
            let command = cli.find_subcommand(name).unwrap_or_else(|| panic!("there is no {name}"));
            command.get_arguments().any(|argument| argument.get_long() == Some("json"))
        };
        let names: Vec<_> = promised.split('`').skip(1).step_by(2).collect();
        assert!(names.len() > 10, "{names:?}");
        for name in names {
            assert!(has_json(name.trim_start_matches("samepage ")), "{name}");
        }
        assert!(
            rest.trim_start().starts_with("for programs, and `console`") && !has_json("console"),
            "{rest}"
        );
    }

    #[test]
    fn consoles_and_ratios_are_checked() {
        assert_eq!(parse_console("file=x.log"), Ok(ConsoleArg::File("x.log".into())));
        assert!(parse_console("file=").is_err() && parse_console("tty").is_err());
        assert!(parse_ratio("2.5").is_ok());
        assert!(parse_cpu("250").is_ok() && parse_cpu("0").is_err() && parse_cpu("7000").is_err());
        assert!(["0", "-1", "inf", "NaN", "x"].iter().all(|text| parse_ratio(text).is_err()));
    }
}
