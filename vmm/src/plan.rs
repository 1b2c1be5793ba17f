//! From the arguments of `samepage run` to the configurations of its VMs.

use std::path::PathBuf;

use samepage::{ConsoleConfig, DiskConfig, HugePages, ImageSource, VmConfig};
use samepage_sharing::engine::Mode;
use samepage_sharing::service::Participation;

use crate::cli::{ConsoleArg, HugePagesArg, RunArgs, SharingArg};

/// Replaces `{index}` and `{name}`.
fn expand(text: &str, index: u32, name: &str) -> String {
    // In one pass, so that a name that contains "{index}" would not be expanded again.
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('{') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("{index}") {
            expanded.push_str(&index.to_string());
            rest = after;
        } else if let Some(after) = rest.strip_prefix("{name}") {
            expanded.push_str(name);
            rest = after;
        } else {
            expanded.push('{');
            rest = &rest[1..];
        }
    }
    expanded.push_str(rest);
    expanded
}

/// The configurations of all VMs, in order.
pub(crate) fn configurations(args: &RunArgs) -> Vec<VmConfig> {
    (0..args.count).map(|index| configuration(args, index)).collect()
}

fn configuration(args: &RunArgs, index: u32) -> VmConfig {
    let name = if args.count == 1 { args.name.clone() } else { format!("{}-{index}", args.name) };
    let expand = |text: &str| expand(text, index, &name);
    let disks = args.disks.iter().enumerate().map(|(number, disk)| DiskConfig {
        path: expand(&disk.path).into(),
        read_only: disk.read_only,
        id: disk.id.clone().unwrap_or_else(|| format!("disk{number}")),
    });
    VmConfig {
        kernel: ImageSource::Path(args.kernel.clone()),
        initrd: args.initrd.clone().map(ImageSource::Path),
        cmdline: expand(&args.cmdline),
        memory_bytes: args.memory,
        hugepages: match args.hugepages {
            HugePagesArg::Off => HugePages::Off,
            HugePagesArg::Thp => HugePages::Thp,
        },
        disks: disks.collect(),
        console: match &args.console {
            ConsoleArg::Stdio if args.count == 1 => ConsoleConfig::Stdio,
            ConsoleArg::Stdio => ConsoleConfig::PrefixedStdio,
            ConsoleArg::File(path) => ConsoleConfig::File(PathBuf::from(expand(path))),
            ConsoleArg::Off => ConsoleConfig::Off,
        },
        participation: Participation {
            group: expand(&args.share_group),
            mode: match args.sharing {
                SharingArg::Full => Mode::Full,
                SharingArg::Zero => Mode::Zero,
                SharingArg::Off => Mode::Off,
            },
        },
        ..VmConfig::new(name.clone(), ImageSource::Path(args.kernel.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn plan(arguments: &[&str]) -> Vec<VmConfig> {
        let cli = Cli::parse_from([&["samepage", "run", "--kernel", "k"], arguments].concat());
        let Command::Run(args) = cli.command else { panic!("another command") };
        configurations(&args)
    }

    #[test]
    fn templates_are_replaced_once() {
        assert_eq!(expand("{name}/{index}.img", 3, "vm-3"), "vm-3/3.img");
        assert_eq!(expand("{name}", 1, "{index}"), "{index}");
        assert_eq!(expand("a{b}{{index}}{", 7, "n"), "a{b}{7}{");
    }

    #[test]
    fn one_vm_has_the_plain_name_and_the_terminal() {
        let configs = plan(&["--name", "web"]);
        assert_eq!(configs.len(), 1);
        assert_eq!(configs[0].name, "web");
        assert!(matches!(configs[0].console, ConsoleConfig::Stdio));
    }

    #[test]
    fn huge_pages_are_asked_for() {
        assert_eq!(plan(&[])[0].hugepages, HugePages::Off);
        assert_eq!(plan(&["--hugepages=off"])[0].hugepages, HugePages::Off);
        let both = plan(&["--count=2", "--hugepages", "thp"]);
        assert!(both.iter().all(|config| config.hugepages == HugePages::Thp));
        assert!(Cli::try_parse_from(["samepage", "run", "--kernel", "k", "--hugepages=1G"]).is_err());
    }

    #[test]
    fn several_vms_are_numbered() {
        let configs = plan(&[
            "--count=2",
            "--cmdline=id={index} host={name}",
            "--disk=path=d{index},id=root",
            "--disk=path=common,readonly",
            "--console=file={name}.log",
        ]);
        let second = &configs[1];
        assert_eq!((second.name.as_str(), second.cmdline.as_str()), ("vm-1", "id=1 host=vm-1"));
        assert_eq!(second.disks[0], DiskConfig { path: "d1".into(), read_only: false, id: "root".into() });
        assert_eq!(second.disks[1].id, "disk1");
        assert!(matches!(&second.console, ConsoleConfig::File(path) if path.as_os_str() == "vm-1.log"));
        let alone = plan(&["--count=2", "--share-group={name}", "--sharing=zero"]);
        assert_eq!(alone[1].participation, Participation { group: "vm-1".into(), mode: Mode::Zero });
        assert_eq!(configs[0].participation, Participation::default());
        assert!(matches!(plan(&["--count=2"])[0].console, ConsoleConfig::PrefixedStdio));
    }
}
