//! The units for systemd: they are valid, and the program works under its unit's restrictions.
//!
//! No systemd runs here. The restrictions are read from the unit and applied in other ways: capabilities and
//! groups with setpriv, address families with a seccomp filter, devices with a cgroup, and folders with
//! mounts.

#![expect(unsafe_code, reason = "installs a seccomp filter in a process before it starts the program")]

use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use rustix::process::Signal;
use samepage_client::socket::Client;
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::Plan;
use samepage_tests::harness::Need::{Kvm, Mounts, Systemd};
use samepage_tests::harness::run_all;
use samepage_tests::program::{self, Running, TIME_LIMIT, command};
use serde_json::{Value, json};
use tempfile::TempDir;

fn main() -> ExitCode {
    run_all(&[
        ("systemd_finds_nothing_wrong_with_the_units", &[Systemd], verified),
        ("the_program_does_its_work_as_the_unit_has_it", &[Kvm, Mounts], at_work),
        ("vms_outlive_the_main_process_with_the_settings_for_it", &[Kvm, Mounts], adopted),
        ("who_may_not_give_the_socket_away_is_told_what_to_set", &[Kvm, Mounts], outside_of_the_group),
    ])
}

const RESOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources");
/// The number of the unit's group in these tests.
const GROUP: u32 = 54_321;
/// Another user than the service's.
const SOMEBODY: u32 = 54_322;

/// The settings of a unit in order.
struct Unit(Vec<(String, String)>);

impl Unit {
    fn read(name: &str) -> Self {
        let text = fs::read_to_string(Path::new(RESOURCES).join(name)).expect("read the unit");
        let text = text.replace("\\\n", " ");
        let settings = text.lines().filter(|line| !line.starts_with(['#', ';']));
        let settings = settings.filter_map(|line| line.split_once('='));
        Self(settings.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect())
    }

    fn all(&self, key: &str) -> Vec<&str> {
        self.0.iter().filter(|(one, _)| one == key).map(|(_, value)| value.as_str()).collect()
    }

    fn words(&self, key: &str) -> Vec<&str> {
        self.all(key).into_iter().flat_map(str::split_whitespace).collect()
    }

    fn is(&self, key: &str, value: &str) -> bool {
        self.all(key).last() == Some(&value)
    }
}

fn verified() {
    let folder = tempfile::tempdir().expect("make a folder");
    for name in ["samepage.service", "samepage-agent.service"] {
        let text = fs::read_to_string(Path::new(RESOURCES).join(name)).expect("read the unit");
        // Programs are installed in other places than here.
        let program = program::path().to_str().expect("a path in UTF-8");
        let text =
            text.replace("/usr/bin/samepage", program).replace("/usr/local/bin/samepage-agent", program);
        let unit = folder.path().join(name);
        fs::write(&unit, text).expect("write the unit");
        if name == "samepage.service" {
            let settings = folder.path().join("samepage.service.d");
            fs::create_dir(&settings).expect("make a folder");
            let from = Path::new(RESOURCES).join("samepage-adoption.conf");
            fs::copy(from, settings.join("adoption.conf")).expect("copy the settings");
        }
        let verify = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output();
        let verify = verify.expect("start systemd-analyze");
        let said = String::from_utf8_lossy(&verify.stderr);
        let ours: Vec<_> = said.lines().filter(|line| line.contains("samepage")).collect();
        assert!(verify.status.success() && ours.is_empty(), "{name}: {said}");
    }
}

/// The resources of the host that a unit needs, while the test runs.
struct Service {
    folder: TempDir,
    unit: Unit,
    cgroup: Option<Cgroup>,
}

impl Service {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("make a folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("open the folder");
        let unit = Unit::read("samepage.service");
        let cgroup = Cgroup::new(&unit);
        Self { folder, unit, cgroup }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns the arguments of the program, with the paths of this test in place of the unit's.
    fn arguments(&self) -> Vec<String> {
        let start = self.unit.words("ExecStart");
        assert_eq!(start[0], "/usr/bin/samepage");
        let here = |name: &str| self.path(name).to_str().expect("a path in UTF-8").to_owned();
        let argument = |word: &&str| match *word {
            "/run/samepage/samepage.sock" => here("samepage.sock"),
            "/etc/samepage/vms.toml" => here("vms.toml"),
            "samepage" => GROUP.to_string(),
            other => other.to_owned(),
        };
        start[1..].iter().map(argument).collect()
    }

    /// Returns a command of the program under the unit's restrictions, as a member of these groups.
    fn command(&self, groups: &str, more: &[&str]) -> Command {
        let unit = &self.unit;
        assert!(unit.all("User").is_empty() && unit.all("AmbientCapabilities").is_empty(), "it runs as root");
        let capabilities: Vec<_> = unit.words("CapabilityBoundingSet");
        let capabilities = capabilities.iter().map(|name| {
            let name = name.strip_prefix("CAP_").expect("a capability");
            format!(",+{}", name.to_lowercase())
        });
        let mut prepare = String::new();
        if unit.is("ProtectSystem", "full") {
            for folder in ["/usr", "/boot", "/etc"] {
                prepare += &format!("mount --bind {folder} {folder}; mount -o remount,bind,ro {folder}; ");
            }
        }
        if let Some(Cgroup(folder)) = &self.cgroup {
            prepare = format!("echo $$ > {}/cgroup.procs; {prepare}", folder.display());
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", &format!("{prepare} exec \"$@\""), "sh", "setpriv"]);
        command.args(["--bounding-set", &format!("-all{}", capabilities.collect::<String>())]);
        command.args(["--inh-caps=-all", groups]);
        if unit.is("NoNewPrivileges", "true") {
            command.arg("--no-new-privs");
        }
        command.arg(program::path()).args(self.arguments()).args(more).current_dir("/");
        let filter = filter(&unit.words("RestrictAddressFamilies"));
        // SAFETY: between fork and exec, only system calls pass the filter, which the closure owns, to the
        // kernel.
        unsafe { command.pre_exec(move || restrict(&filter)) };
        command
    }
}

/// A cgroup whose processes may use the devices that a unit allows.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Returns `None` if the host has no cgroups of version 1.
    fn new(unit: &Unit) -> Option<Self> {
        let folder = PathBuf::from(format!("/sys/fs/cgroup/devices/samepage-tests-{}", std::process::id()));
        let is_there = Path::new("/sys/fs/cgroup/devices/devices.list").exists()
            || Path::new("/sys/fs/cgroup/devices/cgroup.procs").exists();
        if !is_there || fs::create_dir(&folder).is_err() {
            return None;
        }
        let cgroup = Self(folder);
        assert!(unit.is("DevicePolicy", "closed"), "other policies are not known here");
        cgroup.write("devices.deny", "a");
        // Null, zero, full, random and urandom.
        let standard = [3, 5, 7, 8, 9].map(|minor| format!("c 1:{minor} rwm"));
        let allowed = unit.all("DeviceAllow").into_iter().map(|allow| {
            let (device, access) = allow.split_once(' ').expect("a device and how it is used");
            match device {
                "block-*" => format!("b *:* {access}"),
                path => {
                    let metadata = fs::metadata(path).expect("look at a device");
                    let kind = if metadata.file_type().is_block_device() { 'b' } else { 'c' };
                    let device = metadata.rdev();
                    format!("{kind} {}:{} {access}", libc::major(device), libc::minor(device))
                }
            }
        });
        standard.into_iter().chain(allowed).for_each(|line| cgroup.write("devices.allow", &line));
        Some(cgroup)
    }

    fn write(&self, file: &str, line: &str) {
        fs::write(self.0.join(file), line).unwrap_or_else(|error| panic!("{line} to {file}: {error}"));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // An empty cgroup that remains does no harm.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Returns a filter that allows only sockets of these address families, like systemd's own filter.
fn filter(families: &[&str]) -> Vec<libc::sock_filter> {
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const ALLOW: u32 = 0x7fff_0000;
    const FAIL: u32 = 0x0005_0000;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let families: Vec<_> = families
        .iter()
        .map(|family| match *family {
            "AF_UNIX" => libc::AF_UNIX,
            "AF_INET" => libc::AF_INET,
            "AF_INET6" => libc::AF_INET6,
            other => panic!("what number {other} has is not known here"),
        })
        .collect();
    // The number of steps to the last step, which allows the call.
    let to_end = |left: usize| (left + families.len() + 1) as u8;
    let mut steps = vec![
        step(LOAD, 0, 0, 4),
        step(EQUAL, 0, to_end(3), AUDIT_ARCH_X86_64),
        step(LOAD, 0, 0, 0),
        step(EQUAL, 0, to_end(1), libc::SYS_socket as u32),
        step(LOAD, 0, 0, 16),
    ];
    for (index, family) in families.iter().enumerate() {
        steps.push(step(EQUAL, (families.len() - index) as u8, 0, family.cast_unsigned()));
    }
    steps.push(step(RETURN, 0, 0, FAIL | libc::EAFNOSUPPORT.cast_unsigned()));
    steps.push(step(RETURN, 0, 0, ALLOW));
    steps
}

fn restrict(filter: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program points to the number of steps that it states, and the kernel copies them.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A block device that is backed by a file.
struct Loop(String);

impl Loop {
    /// Returns `None` if the host has no such devices.
    fn of(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        output.status.success().then(|| Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

fn at_work() {
    let service = Service::new();
    fs::copy(Path::new(RESOURCES).join("vms.toml"), service.path("vms.toml")).expect("copy the VMs");
    // The checks before the start.
    let check = service.unit.words("ExecStartPre");
    assert_eq!(check, ["/usr/bin/samepage", "config", "check", "/etc/samepage/vms.toml"]);
    let mut check = command(["config", "check"]);
    check.arg(service.path("vms.toml"));
    Running::start(check).wait().assert_code(0);

    assert_eq!(service.unit.words("SupplementaryGroups"), ["samepage"]);
    let running = Running::start(service.command(&format!("--groups={GROUP}"), &["--http", "127.0.0.1:0"]));
    running.stderr().wait_for_line("the control socket is");
    let socket = fs::metadata(service.path("samepage.sock")).expect("look at the socket");
    assert_eq!((socket.gid(), socket.mode() & 0o777), (GROUP, 0o660));

    // Images of another user, which no others may read, and a block device.
    let somebodys = |name: &str, content: &[u8]| {
        let path = service.path(name);
        fs::write(&path, content).expect("write an image");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("close an image");
        chown(&path, Some(SOMEBODY), Some(SOMEBODY)).expect("give an image away");
        path
    };
    let kernel = somebodys("demo.elf", DEMO_GUEST);
    let mut disks = vec![somebodys("root.img", &[0; 1 << 20])];
    let device = Loop::of(&somebodys("device.img", &[0; 1 << 20]));
    disks.extend(device.as_ref().map(|device| PathBuf::from(&device.0)));
    let disks: Vec<_> = disks.iter().map(|path| json!({ "path": path, "format": "raw" })).collect();
    let plan = Plan { rounds: 0, every_ms: 20, pages: Some(256), ..Plan::default() };
    let vm = json!({
        "name": "a", "kernel": kernel, "memory": "16M", "cmdline": plan.to_string(), "disks": disks, "start": true,
        "console": { "file": service.path("console.log") }
    });
    let client = Client::new(service.path("samepage.sock"));
    let created: Value = client.send("POST".parse().expect("a method"), "/vms", &vm).expect("a VM");
    assert_eq!(created["state"], "running");
    let host: Value = client.get("/host").expect("the host");
    assert_eq!(host["features"]["sharing"], true, "{host}");

    let page = running.stderr().wait_for_line("the web page is http://");
    let address = page.split_once("http://").expect("an address").1.trim_end_matches('/').to_owned();
    let mut stream = TcpStream::connect(&address).expect("connect to the port");
    stream.set_read_timeout(Some(TIME_LIMIT)).expect("set a timeout");
    write!(stream, "GET /version HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");

    // The effect of `systemctl reload`.
    assert_eq!(service.unit.words("ExecReload"), ["/bin/kill", "-HUP", "$MAINPID"]);
    fs::rename(service.path("console.log"), service.path("console.log.1")).expect("rename a log");
    running.signal(Signal::HUP);
    running.stderr().wait_for_line("log files were opened again");
    assert!(service.path("console.log").exists(), "the log was not opened again");
    running.signal(Signal::TERM);
    let finished = running.wait();
    finished.assert_code(0);
    for problem in
        ["without sharing memory", "the sharing engine, which does not run", "not permitted", "denied"]
    {
        assert!(!finished.stderr.contains(problem), "{}", finished.stderr);
    }
}

fn adopted() {
    let service = Service::new();
    fs::copy(Path::new(RESOURCES).join("vms.toml"), service.path("vms.toml")).expect("copy the VMs");
    fs::write(service.path("demo.elf"), DEMO_GUEST).expect("write a kernel");
    let settings = Unit::read("samepage-adoption.conf");
    assert!(settings.is("KillMode", "process") && settings.is("RuntimeDirectoryPreserve", "yes"));
    let start = || {
        let mut command = service.command(&format!("--groups={GROUP}"), &[]);
        for variable in settings.all("Environment") {
            let (name, value) = variable.split_once('=').expect("a variable");
            match value.strip_prefix("/run/samepage/") {
                Some(value) => command.env(name, service.path(value)),
                None => command.env(name, value),
            };
        }
        let running = Running::start(command);
        running.stderr().wait_for_line("the control socket is");
        running
    };
    let client = Client::new(service.path("samepage.sock"));
    let running = start();
    let plan = Plan { rounds: 0, every_ms: 20, pages: Some(256), ..Plan::default() };
    let vm = json!({
        "name": "a", "kernel": service.path("demo.elf"), "memory": "16M", "cmdline": plan.to_string(), "start": true
    });
    let created: Value = client.send("POST".parse().expect("a method"), "/vms", &vm).expect("a VM");
    assert_eq!(created["state"], "running");
    let folder = fs::metadata(service.path("state")).expect("look at the folder");
    assert_eq!((folder.uid(), folder.mode() & 0o777), (0, 0o700));
    running.signal(Signal::KILL);
    drop(running);
    let running = start();
    let shown: Value = client.get("/vms/a").expect("the VM");
    assert_eq!(shown["state"], "running", "{shown}");
    running.signal(Signal::TERM);
    running.wait().assert_code(0);
    assert_eq!(fs::read_dir(service.path("state")).expect("list the folder").count(), 0);
}

fn outside_of_the_group() {
    let service = Service::new();
    fs::copy(Path::new(RESOURCES).join("vms.toml"), service.path("vms.toml")).expect("copy the VMs");
    let finished = Running::start(service.command("--clear-groups", &[])).wait();
    finished.assert_code(1);
    for part in [&GROUP.to_string()[..], "SupplementaryGroups", "CAP_CHOWN"] {
        assert!(finished.stderr.contains(part), "{part} is missing in {}", finished.stderr);
    }
    assert!(!service.path("samepage.sock").exists());
}
