//! `samepage create`: VMs in another process, of options or of a configuration file.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use samepage_host::config_file;
use samepage_machine::Validated;
use samepage_spec::VmSpec;
use samepage_text::names::check_name;

use crate::cli::{CreateArgs, VmOptions};
use crate::plan;

pub(crate) fn main(args: &CreateArgs) -> anyhow::Result<ExitCode> {
    samepage_client::create(&args.connection, specs(args)?, args.hold)
}

/// Returns the descriptions of the VMs.
fn specs(args: &CreateArgs) -> anyhow::Result<Vec<VmSpec>> {
    if args.vm.kernel.is_some() {
        let name = args.what.to_string_lossy();
        check_name(&name)?;
        let vms = plan::vms(&args.vm, &name, &args.console);
        return Ok(vms.into_iter().map(|(spec, _)| spec).collect());
    }
    if args.vm != nothing() {
        bail!(
            "create {}: options of a VM need --kernel, and none of them goes with a file",
            args.what.display()
        );
    }
    if !args.what.exists() {
        let what = args.what.display();
        bail!("create {what}: there is no such file; a VM of this name needs --kernel");
    }
    load(&args.what)
}

/// Returns the options of a command line that has none.
fn nothing() -> VmOptions {
    #[derive(Parser)]
    struct Bare {
        #[command(flatten)]
        vm: VmOptions,
    }
    Bare::parse_from(["samepage"]).vm
}

fn load(path: &Path) -> anyhow::Result<Vec<VmSpec>> {
    let vms = config_file::load(path).with_context(|| format!("create the VMs of {}", path.display()))?;
    Ok(vms.into_iter().map(Validated::into_spec).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};

    fn parsed(arguments: &[&str]) -> Result<Vec<VmSpec>, String> {
        let cli = Cli::try_parse_from([&["samepage", "create"], arguments].concat());
        let Command::Create(args) = cli.map_err(|error| error.to_string())?.command else {
            panic!("another command")
        };
        specs(&args).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn options_describe_vms_as_for_run() {
        let vms = parsed(&[
            "web",
            "--kernel=k",
            "--count=2",
            "--memory=512M",
            "--disk=path=d{index}",
            "--console=file={name}.log",
        ])
        .unwrap();
        assert_eq!(vms.len(), 2);
        assert_eq!((vms[1].name.as_str(), vms[1].memory.0), ("web-1", 512 << 20));
        assert_eq!(vms[1].disks[0].path, Path::new("d1"));
        assert_eq!(vms[1].console.file.as_deref(), Some(Path::new("web-1.log")));
        let one = parsed(&["web", "--kernel", "k"]).unwrap();
        assert_eq!((one[0].name.as_str(), &one[0].console.file), ("web", &None));
    }

    #[test]
    fn what_is_neither_a_file_nor_a_vm_is_told() {
        assert!(parsed(&["no such file"]).unwrap_err().contains("needs --kernel"));
        assert!(parsed(&["Cargo.toml", "--memory=512M"]).unwrap_err().contains("need --kernel"));
        assert!(parsed(&["a b", "--kernel=k"]).unwrap_err().contains("a b"));
        assert!(parsed(&["web", "--kernel=k", "--console=stdio"]).unwrap_err().contains("file=PATH or off"));
        assert!(parsed(&[]).unwrap_err().contains("NAME|FILE"));
    }
}
