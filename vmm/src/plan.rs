//! Turns the options of `samepage run` and `samepage create` into descriptions of VMs.

use std::path::{Path, PathBuf};

use samepage_host::config_file::expand;
use samepage_machine::ConsoleConfig;
use samepage_spec::{ConsoleSpec, DiskSpec, NetworkSpec, SharingSpec, Size, VmSpec, VsockSpec};

use crate::cli::{ConsoleArg, VmOptions};

/// Returns the VMs in order, and the targets of their consoles.
pub(crate) fn vms(options: &VmOptions, name: &str, console: &ConsoleArg) -> Vec<(VmSpec, ConsoleConfig)> {
    let Some(kernel) = &options.kernel else { return Vec::new() };
    (0..options.count).map(|index| vm(options, kernel, name, console, index)).collect()
}

fn vm(
    options: &VmOptions,
    kernel: &Path,
    name: &str,
    console: &ConsoleArg,
    index: u32,
) -> (VmSpec, ConsoleConfig) {
    let name = if options.count == 1 { name.to_owned() } else { format!("{name}-{index}") };
    let expand = |text: &str| expand(text, index, &name);
    // Arguments are text, so the paths in them are too.
    let path = |path: &Path| PathBuf::from(expand(&path.to_string_lossy()));
    let disk = |disk: &DiskSpec| DiskSpec {
        path: path(&disk.path),
        backing: disk.backing.as_deref().map(path),
        ..disk.clone()
    };
    let network = |network: &NetworkSpec| network.for_vm(index, expand);
    let vsock = |vsock: &VsockSpec| VsockSpec { uds: path(&vsock.uds), ..vsock.clone() };
    let console = match console {
        ConsoleArg::Stdio if options.count == 1 => ConsoleConfig::Stdio,
        ConsoleArg::Stdio => ConsoleConfig::PrefixedStdio,
        ConsoleArg::File(path) => ConsoleConfig::File(PathBuf::from(expand(path))),
        ConsoleArg::Off => ConsoleConfig::Off,
    };
    let spec = VmSpec {
        initrd: options.initrd.clone(),
        cmdline: expand(&options.cmdline),
        memory: Size(options.memory),
        vcpus: options.vcpus,
        smt: options.smt,
        cpu: options.cpu,
        hugepages: options.hugepages,
        host_numa_node: options.host_numa_node,
        memory_weight: options.memory_weight,
        bus: options.bus,
        disks: options.disks.iter().map(disk).collect(),
        cloud_init: options.cloud_init.as_ref().map(|files| files.with_paths(path)),
        console: ConsoleSpec { file: console.file().map(Path::to_owned) },
        sharing: SharingSpec { group: expand(&options.share_group), mode: options.sharing },
        memory_hole: options.memory_hole,
        networks: options.networks.iter().map(network).collect(),
        vsock: options.vsock.as_ref().map(vsock),
        rng: options.rng.clone(),
        balloon: options.balloon,
        ..VmSpec::new(name, kernel)
    };
    (spec, console)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use samepage_spec::{CachePolicy, Cpu, HugePages, MemoryHole, SharingMode};

    fn plan(arguments: &[&str]) -> Vec<(VmSpec, ConsoleConfig)> {
        let cli = Cli::parse_from([&["samepage", "run", "--kernel", "k"], arguments].concat());
        let Command::Run(args) = cli.command else { panic!("another command") };
        vms(&args.vm, &args.name, &args.console)
    }

    fn specs(arguments: &[&str]) -> Vec<VmSpec> {
        plan(arguments).into_iter().map(|(spec, _)| spec).collect()
    }

    #[test]
    fn each_vm_prefers_the_node_that_is_named() {
        assert_eq!(specs(&[])[0].host_numa_node, None);
        let both = specs(&["--count=2", "--host-numa-node", "1"]);
        assert!(both.iter().all(|spec| spec.host_numa_node == Some(1)));
    }

    fn consoles(arguments: &[&str]) -> Vec<ConsoleConfig> {
        plan(arguments).into_iter().map(|(_, console)| console).collect()
    }

    #[test]
    fn one_vm_has_the_plain_name_and_the_terminal() {
        let specs = specs(&["--name", "web"]);
        assert_eq!(specs.len(), 1);
        assert_eq!(specs[0].name, "web");
        assert!(matches!(consoles(&["--name", "web"])[0], ConsoleConfig::Stdio));
    }

    #[test]
    fn huge_pages_are_an_option() {
        assert_eq!(specs(&[])[0].hugepages, HugePages::Off);
        assert_eq!(specs(&["--hugepages=off"])[0].hugepages, HugePages::Off);
        let both = specs(&["--count=2", "--hugepages", "thp"]);
        assert!(both.iter().all(|spec| spec.hugepages == HugePages::Thp));
        assert!(Cli::try_parse_from(["samepage", "run", "--kernel", "k", "--hugepages=1G"]).is_err());
    }

    #[test]
    fn vms_have_one_vcpu_unless_there_are_more() {
        let cpus = |arguments: &[&str]| (specs(arguments)[0].vcpus, specs(arguments)[0].smt);
        assert_eq!([cpus(&[]), cpus(&["--vcpus=4"])], [(1, false), (4, false)]);
        assert_eq!(cpus(&["--vcpus", "254", "--smt"]), (254, true));
        assert_eq!([specs(&[])[0].cpu, specs(&["--cpu=x86-64-v3"])[0].cpu], [Cpu::Host, Cpu::V3]);
        assert!(Cli::try_parse_from(["samepage", "run", "--kernel", "k", "--cpu=pentium"]).is_err());
        for wrong in ["0", "255", "-1", "two"] {
            let vcpus = format!("--vcpus={wrong}");
            assert!(Cli::try_parse_from(["samepage", "run", "--kernel", "k", &vcpus]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn there_is_a_memory_hole_unless_it_is_off() {
        let hole = |arguments: &[&str]| specs(arguments)[0].memory_hole;
        assert_eq!([hole(&[]), hole(&["--memory-hole=on"])], [MemoryHole::On; 2]);
        assert_eq!(hole(&["--memory-hole", "off"]), MemoryHole::Off);
        assert_eq!(hole(&["--memory-hole", "port"]), MemoryHole::Port);
    }

    #[test]
    fn each_vm_has_a_tap_of_its_own() {
        let both = specs(&["--count=2", "--net=tap={name}-t{index},mtu=1400", "--net", "tap=lan{index}"]);
        let taps = both[1].networks.iter().map(|network| network.tap.as_deref());
        assert_eq!(taps.collect::<Vec<_>>(), [Some("vm-1-t1"), Some("lan1")]);
        assert_eq!(both[1].networks[0].mtu, Some(1400));
    }

    #[test]
    fn several_vms_are_numbered() {
        let arguments = [
            "--count=2",
            "--cmdline=id={index} host={name}",
            "--disk=path=d{index},id=root",
            "--disk=path=common,readonly",
            "--console=file={name}.log",
        ];
        let specs = specs(&arguments);
        let second = &specs[1];
        assert_eq!((second.name.as_str(), second.cmdline.as_str()), ("vm-1", "id=1 host=vm-1"));
        assert_eq!(
            second.disks[0],
            DiskSpec {
                path: "d1".into(),
                id: Some("root".into()),
                cache: Some(CachePolicy::Exclusive),
                queues: Some(1),
                ..DiskSpec::default()
            }
        );
        assert!(second.disks[1].id.is_none() && second.disks[1].readonly);
        assert!(
            matches!(&consoles(&arguments)[1], ConsoleConfig::File(path) if path.as_os_str() == "vm-1.log")
        );
        assert_eq!(second.console.file.as_deref(), Some(Path::new("vm-1.log")));
        assert_eq!(second.sharing, SharingSpec::default());
        let alone = plan(&["--count=2", "--share-group={name}", "--sharing=zero"]);
        assert_eq!(alone[1].0.sharing, SharingSpec { group: "vm-1".into(), mode: SharingMode::Zero });
        assert!(matches!(consoles(&["--count=2"])[0], ConsoleConfig::PrefixedStdio));
    }
}
