//! From the arguments of `samepage run` to its VMs.

use samepage_host::translate::Translate;
use std::path::{Path, PathBuf};

use samepage_api_types::disk_spec::DiskSpec;
use samepage_api_types::spec::{
    ConsoleSpec, HoleSpec, HugePagesSpec, SharingMode, SharingSpec, Size, VmSpec,
};
use samepage_host::config_file::expand;
use samepage_machine::ConsoleConfig;

use crate::cli::{ConsoleArg, HoleArg, HugePagesArg, RunArgs, SharingArg};

/// The VMs, in order, and where their consoles go.
pub(crate) fn vms(args: &RunArgs) -> Vec<(VmSpec, ConsoleConfig)> {
    let Some(kernel) = &args.kernel else { return Vec::new() };
    (0..args.count).map(|index| vm(args, kernel, index)).collect()
}

fn vm(args: &RunArgs, kernel: &Path, index: u32) -> (VmSpec, ConsoleConfig) {
    let name = if args.count == 1 { args.name.clone() } else { format!("{}-{index}", args.name) };
    let expand = |text: &str| expand(text, index, &name);
    let disks = args.disks.iter().map(|disk| DiskSpec {
        path: expand(&disk.path).into(),
        readonly: disk.read_only,
        id: disk.id.clone(),
        format: disk.format.map(Translate::translate),
        cache: Some(disk.cache.translate()),
        limits: disk.limits.translate(),
        queues: Some(disk.queues),
    });
    let console = match &args.console {
        ConsoleArg::Stdio if args.count == 1 => ConsoleConfig::Stdio,
        ConsoleArg::Stdio => ConsoleConfig::PrefixedStdio,
        ConsoleArg::File(path) => ConsoleConfig::File(PathBuf::from(expand(path))),
        ConsoleArg::Off => ConsoleConfig::Off,
    };
    let spec = VmSpec {
        initrd: args.initrd.clone(),
        cmdline: expand(&args.cmdline),
        memory: Size(args.memory),
        hugepages: match args.hugepages {
            HugePagesArg::Off => HugePagesSpec::Off,
            HugePagesArg::Thp => HugePagesSpec::Thp,
        },
        disks: disks.collect(),
        console: ConsoleSpec { file: console.file().map(Path::to_owned) },
        sharing: SharingSpec {
            group: expand(&args.share_group),
            mode: match args.sharing {
                SharingArg::Full => SharingMode::Full,
                SharingArg::Zero => SharingMode::Zero,
                SharingArg::Off => SharingMode::Off,
            },
        },
        memory_hole: match args.memory_hole {
            HoleArg::On => HoleSpec::On,
            HoleArg::Off => HoleSpec::Off,
            HoleArg::Port => HoleSpec::Port,
        },
        ..VmSpec::new(name.clone(), kernel)
    };
    (spec, console)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use samepage_host::translate::ToConfig;
    use samepage_machine::{DiskConfig, HugePages, MemoryHole, VmConfig};
    use samepage_sharing::engine::Mode;
    use samepage_sharing::service::Participation;

    fn plan(arguments: &[&str]) -> Vec<VmConfig> {
        let with_console = |(spec, console): (VmSpec, _)| VmConfig { console, ..spec.to_config() };
        let cli = Cli::parse_from([&["samepage", "run", "--kernel", "k"], arguments].concat());
        let Command::Run(args) = cli.command else { panic!("another command") };
        vms(&args).into_iter().map(with_console).collect()
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
    fn there_is_a_memory_hole_unless_it_is_refused() {
        let hole = |arguments: &[&str]| plan(arguments)[0].memory_hole;
        assert_eq!([hole(&[]), hole(&["--memory-hole=on"])], [MemoryHole::On; 2]);
        assert_eq!(hole(&["--memory-hole", "off"]), MemoryHole::Off);
        assert_eq!(hole(&["--memory-hole", "port"]), MemoryHole::Port);
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
        assert_eq!(
            second.disks[0],
            DiskConfig { path: "d1".into(), id: "root".into(), ..DiskConfig::default() }
        );
        assert_eq!(second.disks[1].id, "disk1");
        assert!(matches!(&second.console, ConsoleConfig::File(path) if path.as_os_str() == "vm-1.log"));
        let alone = plan(&["--count=2", "--share-group={name}", "--sharing=zero"]);
        assert_eq!(alone[1].participation, Participation { group: "vm-1".into(), mode: Mode::Zero });
        assert_eq!(configs[0].participation, Participation::default());
        assert!(matches!(plan(&["--count=2"])[0].console, ConsoleConfig::PrefixedStdio));
    }
}
