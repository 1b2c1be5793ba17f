//! The control socket when nobody names one: of root, of another user, and of clients.

use std::process::Command;

use samepage_tests::program::{self, Finished, Running};

use crate::scratch::Scratch;

/// A user without rights.
const NOBODY: &str = "--reuid=65534 --regid=65534 --clear-groups";
/// The folders of a host, which only the program and its children see. Users may use KVM, and have runtime folders.
const HOST: &str = "mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /dev; mknod -m 666 /dev/kvm c 10 232
    mkdir -m 755 /run/user; mkdir -m 700 /run/user/65534; chown 65534:65534 /run/user/65534
    touch /dev/samepage; mount --bind \"$1\" /dev/samepage; shift; exec /dev/samepage \"$@\"";

/// Returns a command without variables that name sockets.
fn bare(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_remove("SAMEPAGE_SOCKET").env_remove("XDG_RUNTIME_DIR");
    command
}

/// Starts a server of root on a host of its own.
fn serve(scratch: &Scratch, arguments: &[&str]) -> Running {
    let mut serve = bare("unshare");
    serve.args(["--mount", "sh", "-ec", HOST, "sh"]).arg(program::path()).args(arguments);
    serve.current_dir(scratch.folder());
    Running::start(serve)
}

/// Returns a command of the program on the host of a server, as root or as somebody else.
fn beside(server: &Running, user: &str, arguments: &[&str]) -> Command {
    let mut command = bare("nsenter");
    command.args(["--mount", "--target", &server.pid().as_raw_nonzero().to_string(), "setpriv"]);
    command.args(user.split_whitespace()).arg("/dev/samepage").args(arguments);
    command
}

fn done(command: Command) -> Finished {
    Running::start(command).wait()
}

pub(crate) fn of_users() {
    let scratch = Scratch::new();
    let server = serve(&scratch, &["serve"]);
    server.stderr().wait_for_line("the control socket is /run/samepage/samepage.sock");
    let list = |user: &str| done(beside(&server, user, &["ps", "--json"]));
    let of_root = list("--reuid=0");
    of_root.assert_code(0);
    assert_eq!(of_root.stdout.trim(), "[]");

    // The user has no socket yet, and may not use root's.
    let refused = list(NOBODY);
    refused.assert_code(1);
    for part in ["/run/samepage/samepage.sock", "denied", "usermod -aG"] {
        assert!(refused.stderr.contains(part), "{part} is missing in {}", refused.stderr);
    }
    let own = Running::start(beside(&server, NOBODY, &["serve", "--no-sharing"]));
    own.stderr().wait_for_line("the control socket is /run/user/65534/samepage.sock");
    list(NOBODY).assert_code(0);
    // The system's socket can still be named.
    let named = beside(&server, NOBODY, &["ps", "--socket", "/run/samepage/samepage.sock"]);
    assert!(done(named).stderr.contains("denied"));
    let second = done(beside(&server, NOBODY, &["serve", "--no-sharing"]));
    second.assert_code(1);
    assert!(second.stderr.contains("is the socket of a running process"), "{}", second.stderr);

    // A killed server leaves its socket. Nobody else's VMs answer in its place, and the next server replaces it.
    own.signal(rustix::process::Signal::KILL);
    let _ = own.wait();
    let left = list(NOBODY);
    left.assert_code(1);
    for part in ["/run/user/65534/samepage.sock", "has ended", "`samepage serve`"] {
        assert!(left.stderr.contains(part), "{part} is missing in {}", left.stderr);
    }
    let again = Running::start(beside(&server, NOBODY, &["serve", "--no-sharing"]));
    again.stderr().wait_for_line("the control socket is /run/user/65534/samepage.sock");
    list(NOBODY).assert_code(0);

    // Another user has no runtime folder.
    let stranger = "--reuid=65533 --regid=65533 --clear-groups";
    let refused = done(beside(&server, stranger, &["serve"]));
    refused.assert_code(1);
    for part in ["/run/user/65533", "XDG_RUNTIME_DIR", "--socket"] {
        assert!(refused.stderr.contains(part), "{part} is missing in {}", refused.stderr);
    }
}

pub(crate) fn of_run() {
    let scratch = Scratch::new();
    let arguments = ["run", "--socket", "--kernel", "demo.elf", "--cmdline", "rounds=0 every=20 pages=256"];
    let server = serve(&scratch, &[&arguments[..], &["--memory", "16M", "--name", "a"]].concat());
    server.stdout().wait_for_line("start ram=");
    let kill = done(beside(&server, "--reuid=0", &["kill", "a"]));
    kill.assert_code(0);
    server.wait().assert_code(0);
}
