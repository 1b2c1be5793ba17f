//! Hosts that lack something, as other mounts and users show them.

use std::fs;
use std::process::Command;

use samepage_tests::program::{self, Running};

use crate::scratch::{Scratch, assert_verified, short};

/// The program after `prepare`, which may change mounts: nobody else sees them, and they are gone
/// when it ends. `$0` is a folder for devices, `"$@"` the program with its arguments.
fn on_another_host(scratch: &Scratch, prepare: &str) -> Command {
    let mut command = Command::new("unshare");
    let program = scratch.run(short(), &[]);
    fs::create_dir(scratch.path("dev")).expect("make a folder");
    command.args(["--mount", "sh", "-ec", prepare]).arg(scratch.path("dev"));
    command.arg(program.get_program()).args(program.get_args()).current_dir(scratch.folder());
    command
}

fn refused(prepare: &str, parts: &[&str]) {
    let scratch = Scratch::new();
    let end = Running::start(on_another_host(&scratch, prepare)).wait();
    end.assert_code(1);
    assert_eq!((end.stdout.as_str(), end.stderr.lines().count()), ("", 1), "{}", end.stderr);
    assert!(end.stderr.starts_with("samepage: "), "{}", end.stderr);
    for part in parts {
        assert!(end.stderr.contains(part), "{part:?} is missing in:\n{}", end.stderr);
    }
}

pub(crate) fn without_kvm() {
    // An empty /dev has no kvm.
    refused(r#"mount -t tmpfs tmpfs /dev; exec "$@""#, &["/dev/kvm does not exist", "modprobe kvm_intel"]);
}

pub(crate) fn not_kvm() {
    // As container engines hide devices.
    refused(r#"mount --bind /dev/null /dev/kvm; exec "$@""#, &["/dev/kvm is not KVM's device", "--device"]);
}

/// Gives up being root, for the rest of `prepare`.
const AS_NOBODY: &str = "exec setpriv --reuid=65534 --regid=65534 --clear-groups";

/// Puts a device called kvm with this mode at its place, and the program where everybody may run it.
fn with_kvm_of_mode(mode: &str) -> String {
    let program = program::path().display();
    format!(
        "mount -t tmpfs tmpfs $0; mknod -m {mode} $0/kvm c 10 232; touch $0/samepage
         mount --bind '{program}' $0/samepage; mount --bind $0/kvm /dev/kvm
         shift; {AS_NOBODY} $0/samepage \"$@\""
    )
}

pub(crate) fn kvm_not_permitted() {
    refused(&with_kvm_of_mode("600"), &["no permission to open /dev/kvm", "usermod -aG kvm", "run as root"]);
}

pub(crate) fn too_few_files() {
    let scratch = Scratch::new();
    let program = scratch.run(short(), &["--count=8"]);
    let mut command = Command::new("sh");
    command.args(["-ec", r#"ulimit -n 30; exec "$@""#, "sh"]).arg(program.get_program());
    command.args(program.get_args()).current_dir(scratch.folder());
    let end = Running::start(command).wait();
    end.assert_code(1);
    assert_eq!((end.stdout.as_str(), end.stderr.lines().count()), ("", 1), "{}", end.stderr);
    for part in ["samepage: VM vm-", "Too many open files", "ulimit -n"] {
        assert!(end.stderr.contains(part), "{part:?} is missing in:\n{}", end.stderr);
    }
}

pub(crate) fn userfaultfd_not_permitted() {
    let permitted = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    if permitted.trim() == "1" {
        println!("this host permits userfaultfd to everybody: nothing to see");
        return;
    }
    let scratch = Scratch::new();
    let end = Running::start(on_another_host(&scratch, &with_kvm_of_mode("666"))).wait();
    end.assert_code(0);
    assert_verified(&end.stdout);
    let (first, rest) = end.stderr.split_once('\n').expect("a line");
    for part in
        ["run without sharing memory", "--sharing off", "userfaultfd is not permitted", "CAP_SYS_PTRACE"]
    {
        assert!(first.contains(part), "{part:?} is missing in:\n{first}");
    }
    assert_eq!(rest, "samepage: VM vm: the guest reset the machine\n");
}
