//! The Debian package: installed, used and purged in a copy of the host's file system that only this test sees.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use rustix::process::Signal;
use samepage_tests::harness::Need::{CargoDeb, Kvm, Mounts};
use samepage_tests::harness::run_all;
use samepage_tests::program::{self, Finished, Running};
use tempfile::TempDir;

fn main() -> ExitCode {
    run_all(&[
        ("the_package_holds_what_users_need", &[CargoDeb], content),
        ("a_host_installs_uses_and_purges_the_package", &[CargoDeb, Kvm, Mounts], installed),
    ])
}

/// Returns a package of the program that the tests use. Tests are processes that run side by side, so each one that
/// asks has a folder of its own.
fn package(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("deb-{test}"));
    xtask::deb::package(program::path(), &folder).expect("a package")
}

fn done(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn content() {
    let (folder, package) = (tempfile::tempdir().expect("make a folder"), package("content"));
    done(Command::new("dpkg-deb").arg("-x").arg(&package).arg(folder.path()));
    let path = |name: &str| folder.path().join(name);
    for name in [
        "usr/bin/samepage",
        "usr/share/man/man1/samepage.1.gz",
        "usr/share/man/man1/samepage-serve.1.gz",
        "usr/share/bash-completion/completions/samepage",
        "usr/share/zsh/vendor-completions/_samepage",
        "usr/share/fish/vendor_completions.d/samepage.fish",
        "usr/lib/systemd/system/samepage.service",
        "usr/lib/sysusers.d/samepage.conf",
        "etc/samepage/vms.toml",
        "usr/share/doc/samepage/copyright",
        "usr/share/doc/samepage/samepage-adoption.conf",
    ] {
        assert!(path(name).is_file(), "{name} is missing");
    }
    let checked = done(
        Command::new(path("usr/bin/samepage")).args(["config", "check"]).arg(path("etc/samepage/vms.toml")),
    );
    assert!(checked.contains("0 VMs, no mistakes"), "{checked}");
    done(Command::new("bash").arg("-n").arg(path("usr/share/bash-completion/completions/samepage")));
    let field = |name: &str| done(Command::new("dpkg-deb").arg("-f").arg(&package).arg(name));
    assert_eq!(field("Package").trim(), "samepage");
    assert!(field("Depends").contains("libc6"), "{}", field("Depends"));
    assert_eq!(
        done(Command::new("dpkg-deb").arg("-I").arg(&package).arg("conffiles")).trim(),
        "/etc/samepage/vms.toml"
    );
}

/// A host like this one, whose changes are lost with the first process on it.
struct Host {
    process: Running,
    _folder: TempDir,
}

/// Mounts the file system of a host: this one's, with changes in memory. `$1` is the package, `$2` an empty
/// folder.
const PREPARE: &str = "
    folder=$2; mount -t tmpfs tmpfs $folder
    mkdir $folder/changes $folder/work $folder/host
    mount -t overlay overlay -o lowerdir=/,upperdir=$folder/changes,workdir=$folder/work $folder/host ||
        { echo host impossible; exit 0; }
    cd $folder/host
    for part in dev proc sys; do mount --rbind /$part $part; done
    mount -t tmpfs tmpfs run; mount -t tmpfs tmpfs tmp; cp \"$1\" tmp/samepage.deb
    exec chroot . sh -c 'echo host ready; exec sleep infinity'";

impl Host {
    /// Returns `None` if the file system does not support this.
    fn new(package: &Path) -> Option<Self> {
        let mut command = Command::new("unshare");
        let folder = tempfile::tempdir().expect("make a folder");
        command.args(["--mount", "sh", "-ec", PREPARE, "sh"]).arg(package).arg(folder.path());
        let process = Running::start(command);
        process.stdout().wait_for_line("host ").contains("ready").then_some(Self { process, _folder: folder })
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        let process = self.process.pid().as_raw_nonzero().to_string();
        command.args(["--mount", "--root", "--wd", "--target", &process, program]).args(arguments);
        command.env_remove("SAMEPAGE_SOCKET").env_remove("XDG_RUNTIME_DIR");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Finished {
        let finished = Running::start(self.command(program, arguments)).wait();
        finished.assert_code(0);
        finished
    }
}

fn installed() {
    let Some(host) = Host::new(&package("installed")) else {
        println!("this host's file system cannot be the lower one of an overlay: nothing to see");
        return;
    };
    let installed = host.run("dpkg", &["-i", "/tmp/samepage.deb"]);
    assert!(installed.stdout.contains("Setting up samepage"), "{}", installed.stdout);
    assert!(host.run("getent", &["group", "samepage"]).stdout.starts_with("samepage:"));
    if Path::new("/usr/bin/systemd-analyze").exists() {
        host.run("systemd-analyze", &["verify", "--man=no", "samepage.service"]);
        assert_eq!(host.run("systemctl", &["--root=/", "is-enabled", "samepage"]).stdout.trim(), "enabled");
    }

    // The service's commands, as systemd would start them.
    let unit = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/samepage.service"));
    let unit = unit.expect("read the unit").replace("\\\n", " ");
    let setting = |name: &str| unit.lines().find_map(|line| line.strip_prefix(name)).expect("a setting");
    let words = |name: &str| setting(name).split_whitespace().collect::<Vec<_>>();
    let check = words("ExecStartPre=");
    host.run(check[0], &check[1..]);
    assert_eq!(setting("RuntimeDirectory="), "samepage");
    host.run("mkdir", &["/run/samepage"]);
    let start = words("ExecStart=");
    let service = Running::start(host.command(start[0], &start[1..]));
    service.stderr().wait_for_line("the control socket is /run/samepage/samepage.sock");
    assert_eq!(host.run("samepage", &["ps", "--json"]).stdout.trim(), "[]");
    service.signal(Signal::TERM);
    service.wait().assert_code(0);

    host.run("dpkg", &["--purge", "samepage"]);
    for path in ["/usr/bin/samepage", "/etc/samepage", "/usr/lib/systemd/system/samepage.service"] {
        host.run("test", &["!", "-e", path]);
    }
    host.process.signal(Signal::KILL);
}
