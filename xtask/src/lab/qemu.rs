//! The emulator: its version, and the machine that it emulates.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Options;
use super::apt::Lists;
use crate::{process, setup};

const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";
/// The oldest version that emulates AMD's virtualisation well: 7.2 corrupts the flags of guests.
const OLDEST: u32 = 9;
const SUITES: [&str; 2] = ["bookworm", "bookworm-backports"];

/// Installs the emulator if it is missing or too old.
///
/// # Errors
/// It cannot be installed. The error says how to do it.
pub(super) fn install() -> Result<()> {
    let version = process::output(Command::new(PROGRAM).arg("--version")).ok();
    let version = version.as_deref().and_then(major);
    if version.is_some_and(|version| version >= OLDEST) {
        return Ok(());
    }
    let what = match version {
        Some(version) => format!("QEMU {version} is too old for the lab, which needs {OLDEST} or newer"),
        None => format!("the lab needs QEMU {OLDEST} or newer"),
    };
    let from = SUITES[1];
    if !setup::is_root()? {
        bail!(
            "{what}; add Debian's suite {from} to the sources of apt, and install it with:\n    \
             sudo apt-get update && sudo apt-get install --no-install-recommends --target-release {from} {PACKAGE}"
        );
    }
    eprintln!("lab: {what}; installing {PACKAGE} from {from}");
    let folder = tempfile::tempdir().context("making a folder for lists of packages")?;
    let lists = Lists::download(folder.path(), &SUITES)?;
    lists.install(PACKAGE).with_context(|| format!("installing {PACKAGE} from Debian's {from}"))
}

/// The first number of a version: `QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)`.
fn major(text: &str) -> Option<u32> {
    let (_, version) = text.split_once("version ")?;
    version.split('.').next()?.parse().ok()
}

/// The command line of a machine that boots this kernel with this file system. An image is its first disk, and read-only.
pub(super) fn command(kernel: &Path, initrd: &Path, image: Option<&Path>, options: &Options) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,+svm,+npt"]);
    command.args(["-smp", &options.cpus.to_string(), "-m", &options.memory.to_string()]);
    command.args(["-display", "none", "-nodefaults", "-serial", "stdio", "-no-reboot"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    // A busy host makes the kernel doubt the time stamp counter. KVM then stops it in guests that do not run, so that
    // they sleep for ever.
    command.args(["-append", "console=ttyS0 panic=-1 mitigations=off tsc=reliable quiet"]);
    let disks = options.disks.iter().map(|disk| (disk.as_path(), "off"));
    for (disk, readonly) in image.map(|image| (image, "on")).into_iter().chain(disks) {
        // A comma in a path is written twice.
        let path = disk.display().to_string().replace(',', ",,");
        let drive = format!("file={path},format=raw,if=virtio,cache=unsafe,readonly={readonly}");
        command.args(["-drive", &drive]);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(major("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some(10));
        assert_eq!(major("QEMU emulator version 7.2.22 (Debian)"), Some(7));
        assert_eq!(major("what"), None);
    }

    #[test]
    fn the_machine_has_the_disks_in_order() {
        let options = Options { disks: vec!["a,b.img".into(), "c.img".into()], ..Options::default() };
        let command = command(Path::new("k"), Path::new("i"), Some(Path::new("debian")), &options);
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        let disks: Vec<_> = arguments.iter().filter(|argument| argument.starts_with("file=")).collect();
        let starts = ["file=debian,", "file=a,,b.img,", "file=c.img,"];
        assert!(disks.iter().zip(starts).all(|(disk, start)| disk.starts_with(start)), "{disks:?}");
        let readonly: Vec<_> = disks.iter().map(|disk| disk.ends_with("readonly=on")).collect();
        assert_eq!(readonly, [true, false, false]);
    }
}
