//! Hosts that lack a resource, simulated with other devices and users.

use std::fs;
use std::process::Command;

use samepage_client::socket::Client;
use samepage_tests::program::{self, Running};
use serde_json::{Value, json};

use crate::scratch::{KERNEL, Scratch, assert_verified, short};

/// Returns a command of the program with a `/dev` that contains what `prepare` puts there. No other process
/// sees that `/dev`, and it disappears with the program. `"$@"` is the program with its arguments.
fn on_another_host(scratch: &Scratch, prepare: &str) -> Command {
    let program = scratch.run(short(), &[]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &format!("mount -t tmpfs tmpfs /dev; {prepare}"), "sh"]);
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
    refused(r#"exec "$@""#, &["/dev/kvm does not exist", "modprobe kvm_intel"]);
}

pub(crate) fn not_kvm() {
    // Container engines hide devices in this way: the file is /dev/null.
    refused(r#"mknod /dev/kvm c 1 3; exec "$@""#, &["/dev/kvm has the name of KVM's device", "--device"]);
}

/// Runs the program as the user nobody, with a KVM device of this mode.
fn as_nobody_with_kvm_of_mode(mode: &str) -> String {
    // The user nobody may lack access to the program's folder.
    let program = program::path().display();
    format!(
        "mknod -m {mode} /dev/kvm c 10 232; touch /dev/samepage; mount --bind '{program}' /dev/samepage
         shift; exec setpriv --reuid=65534 --regid=65534 --clear-groups /dev/samepage \"$@\""
    )
}

pub(crate) fn kvm_not_permitted() {
    refused(
        &as_nobody_with_kvm_of_mode("600"),
        &["no permission to open /dev/kvm", "usermod -aG kvm", "run as root"],
    );
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
    let end = Running::start(on_another_host(&scratch, &as_nobody_with_kvm_of_mode("666"))).wait();
    end.assert_code(0);
    assert_verified(&end.stdout);
    let (first, rest) = end.stderr.split_once('\n').expect("a line");
    for part in
        ["run without sharing memory", "--sharing off", "userfaultfd is not permitted", "CAP_SYS_PTRACE"]
    {
        assert!(first.contains(part), "{part:?} is missing in:\n{first}");
    }
    assert_eq!(rest, "samepage: VM vm: the guest reset the machine\n");

    // A server has another option for that, and its message fits its own VMs.
    let run = on_another_host(&scratch, &as_nobody_with_kvm_of_mode("666"));
    let mut serve = Command::new(run.get_program());
    serve.args(run.get_args().take_while(|argument| *argument != "run"));
    serve.args(["serve", "--socket", "/dev/socket"]).current_dir(scratch.folder());
    let serve = Running::start(serve);
    let told = serve.stderr().wait_for_line("without sharing memory");
    assert!(
        told.contains("(use --no-sharing to omit this message)") && !told.contains("--sharing off"),
        "{told}"
    );
    serve.stderr().wait_for_line("the control socket is");
    let socket = format!("/proc/{}/root/dev/socket", serve.pid().as_raw_nonzero());
    let client = Client::new(socket);
    let vm = json!({ "name": "a", "kernel": scratch.folder().join(KERNEL), "memory": "16M" });
    let created: Value = client.send("POST".parse().unwrap(), "/vms", &vm).unwrap();
    assert_eq!((&created["mode"], &created["config"]["sharing"]["mode"]), (&json!("off"), &json!("full")));
}
