//! *Your first ten VMs*: the commands of the page, exactly as they are printed.
//!
//! Stock kernels need hardware virtualisation, and the image is a large download. So a kernel that only waits for
//! Ctrl-Alt-Del stands in for Debian's, and small files for the image and the initial RAM disk. All else is as users
//! have it.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use rustix::process::Signal;
use samepage_machine::boot::test_images::pvh_elf;
use samepage_tests::harness::Need::Kvm;
use samepage_tests::harness::run_all;
use samepage_tests::program::{self, Running};

fn main() -> ExitCode {
    run_all(&[("the_commands_of_the_page_work_as_printed", &[Kvm], as_printed)])
}

/// A kernel that polls the keyboard (port 0x64) and resets the machine at a key, with the controller's command 0xfe.
const KERNEL: &[u8] = b"\xe4\x64\xa8\x01\x74\xfa\xb0\xfe\xe6\x64\xf4";
const PAGE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/first-ten-vms.md"));

/// Returns the blocks of commands in the page.
fn blocks(page: &str) -> Vec<String> {
    let mut blocks = vec![String::new()];
    for line in page.lines() {
        match line.strip_prefix("    ") {
            Some(command) => *blocks.last_mut().expect("a block") += &format!("{command}\n"),
            None if blocks.last().is_some_and(|block| !block.is_empty()) => blocks.push(String::new()),
            None => {}
        }
    }
    blocks.retain(|block| !block.is_empty());
    blocks
}

fn as_printed() {
    let folder = tempfile::tempdir().expect("make a folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("vmlinuz"), pvh_elf(KERNEL)).expect("write the kernel");
    fs::write(path("initrd.img"), "no initial RAM disk\n").expect("write the initial RAM disk");
    fs::write(path("debian.qcow2"), vec![7; 4 << 20]).expect("write the image");
    let shell = |command: &str| {
        let programs = program::path().parent().expect("a program is in a folder").display().to_string();
        let search = format!("{programs}:{}", std::env::var("PATH").unwrap_or_default());
        let mut shell = Command::new("sh");
        // The socket's default place may belong to another process of this host.
        shell.args(["-euc", command]).env("PATH", search).env("SAMEPAGE_SOCKET", path("samepage.sock"));
        shell.current_dir(folder.path());
        shell
    };
    let mut blocks = blocks(PAGE).into_iter();
    assert_eq!(blocks.next().as_deref(), Some("resources/debian-image.sh .\n"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/debian-image.sh");
    let help = Running::start({
        let mut help = Command::new(script);
        help.arg("--help");
        help
    });
    assert!(help.wait().stdout.contains("FOLDER"));

    assert_eq!(blocks.next().as_deref(), Some("samepage serve\n"));
    let server = Running::start(shell("exec samepage serve"));
    server.stderr().wait_for_line("the control socket is");
    let mut printed = String::new();
    let mut overlays = 0;
    for block in blocks {
        let done = Running::start(shell(&block)).wait();
        assert!(done.status.success(), "{block}{}{}", done.stdout, done.stderr);
        printed += &done.stdout;
        let names = fs::read_dir(folder.path()).expect("list the folder");
        overlays = overlays.max(
            names
                .filter(|name| {
                    let name = name.as_ref().expect("an entry").file_name();
                    name.to_string_lossy().starts_with("vm-")
                })
                .count(),
        );
    }
    assert_eq!(overlays, 10);
    assert!(!path("vm-0.qcow2").exists());
    for part in ["vm-9", "running", "stopped", "vm-3.qcow2", "saved"] {
        assert!(printed.contains(part), "{part} is missing in:\n{printed}");
    }
    server.signal(Signal::INT);
    server.wait().assert_code(0);
}
