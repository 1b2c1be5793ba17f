//! Linux guests on a network of the host and with sockets of its programs, while their memory is merged, and taps of
//! all kinds.

#[path = "network/published.rs"]
mod published;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::RawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, recv, sendto, socket};
use rustix::process::{Pid, Signal, kill_process};
use samepage_agent::checksum::Fnv1a;
use samepage_agent::content;
use samepage_devices::net::passt::{GATEWAY, GUEST};
use samepage_devices::net::{HEADER_BYTES, Link, Sent, Tap, TapError, TapOptions};
use samepage_machine::config::{NetworkSpec, VsockSpec};
use samepage_machine::{Hypervisor, Size, VmConfig, VmEnd};
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::Plan;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use samepage_tests::agent::{figure, said};
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::guests::{Guest, hypervisor, sharing};
use samepage_tests::harness::{self, Need};
use samepage_tests::program;
use samepage_tests::shared::audit;
use xtask::artifacts::{Artifacts, COMMAND_LINE};

fn main() -> ExitCode {
    harness::run_all(&[
        (
            "two_linux_vms_talk_over_a_bridge_while_they_are_merged",
            &[Need::Kvm, Need::LinuxGuest, Need::Taps],
            talk_over_a_bridge,
        ),
        (
            "linux_talks_to_programs_of_the_host_over_sockets",
            &[Need::Kvm, Need::LinuxGuest],
            talk_over_sockets,
        ),
        (
            "two_linux_vms_talk_over_passt_and_one_loses_it",
            &[Need::Kvm, Need::LinuxGuest, Need::Passt],
            talk_over_passt,
        ),
        (
            "a_network_of_the_user_that_cannot_be_had_is_told",
            &[Need::Kvm, Need::Passt],
            refuse_networks_of_the_user,
        ),
        ("published_ports_of_udp_and_ipv6_lead_to_the_guest", &[Need::Passt], published::lead_to_the_guest),
        ("published_ports_belong_to_one_vm_each", &[Need::Kvm, Need::Passt], published::belong_to_one_vm),
        ("a_tap_with_two_queues_uses_those_that_the_guest_does", &[Need::Taps], use_two_queues),
        ("a_tap_serves_one_vm_at_a_time", &[Need::Taps], use_one_tap_twice),
        (
            "a_tap_of_root_needs_a_privilege_and_a_users_own_does_not",
            &[Need::Kvm, Need::Taps],
            use_taps_without_privileges,
        ),
    ])
}

/// The kernel divides memory into sections of 32 MiB.
const MEMORY: u64 = 64 << 20;
/// Identical pages that both guests fill.
const FILLED_PAGES: u64 = 2048;
/// MiB that each guest sends to the other one.
const MIB: &str = "SAMEPAGE_TEST_NET_MIB";
/// Ten seconds or so where KVM interprets the guest's kernel.
const DEFAULT_MIB: usize = 1;
/// There a packet takes some milliseconds, however long it is.
const MTU: u16 = 9000;
/// The port of a guest.
const PORT: u16 = 5000;

/// Runs `ip` of iproute2.
fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    let output = output.expect("ip of iproute2 can be run");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// Returns the name of an interface of this process.
fn interface(what: &str) -> String {
    format!("sp{}{what}", std::process::id() % 1_000_000)
}

/// A network interface that is deleted in the end.
struct Interface(String);

impl Interface {
    fn add(name: String, kind: &str) -> Self {
        ip(&kind.replace("NAME", &name));
        Self(name)
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = Command::new("ip").args(["link", "del", &self.0]).output();
    }
}

/// Sends echo requests until one is answered. Returns how long its answer took.
fn ping(guest: Ipv4Addr) -> Duration {
    let socket = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).expect("a raw socket");
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(1))).expect("a time limit");
    // Type, code, checksum, identifier, number; and data, whose sum with the rest is all ones.
    let mut request = [8, 0, 0, 0, 0x12, 0x34, 0, 1, 0xab, 0xcd];
    let sum = request.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    request[2..4].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    let first = Instant::now();
    while first.elapsed() < TIME_LIMIT {
        let start = Instant::now();
        // Before the guest has its address, the kernel may know that nobody has it.
        let _ = sendto(&socket, &request, SendFlags::empty(), &SocketAddrV4::new(guest, 0));
        let mut answer = [0; 128];
        // Others' answers arrive here as well.
        while let Ok((length, _)) = recv(&socket, &mut answer, RecvFlags::empty()) {
            let header = usize::from(answer[0] & 15) * 4;
            let is_answer = answer[12..16] == guest.octets() && answer[header] == 0;
            if is_answer && answer[header + 4..length] == request[4..] {
                return start.elapsed();
            }
        }
    }
    panic!("{guest} does not answer");
}

/// A guest on the bridge.
struct Talker {
    guest: Guest,
    address: Ipv4Addr,
}

impl Talker {
    fn start(
        hypervisor: &Hypervisor,
        sharing: &Arc<Sharing>,
        number: u8,
        address: Ipv4Addr,
        network: NetworkSpec,
        commands: &str,
    ) -> Self {
        let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
        let mut config = VmConfig::new(format!("talker{number}"), artifacts.kernel.clone().into());
        config.spec.initrd = Some(artifacts.initramfs.clone());
        let fill = FILLED_PAGES * 4;
        config.spec.cmdline = format!(
            "{COMMAND_LINE} ip={address}:::255.255.255.248::eth0:off agent=fill:{fill}K:7,{commands},\
             verify:8:250,poweroff"
        );
        config.spec.memory = Size(MEMORY);
        config.spec.networks = vec![network];
        config.sharing = Some(Arc::clone(sharing));
        let guest = Guest::start(hypervisor, config);
        assert_eq!(guest.vm.networks()[0].notices, [""; 0]);
        Self { guest, address }
    }

    /// Waits until the guest has got the whole stream of this seed.
    fn wait_for_stream(&self, seed: u64, bytes: usize) {
        let got = said(&self.guest, "get ok");
        let rate = bytes as f64 / figure(&got, "ms") / 1000.0;
        println!("{} got{got}: {rate:.1} MB/s", self.address);
        let sum = Fnv1a::of(&content::bytes(seed, bytes));
        assert!(got.contains(&format!(" bytes={bytes} fnv1a={sum}")), "{got}, not {sum}");
    }
}

fn talk_over_a_bridge() {
    let mib = std::env::var(MIB).map_or(DEFAULT_MIB, |mib| mib.parse().expect("a number of MiB"));
    let bytes = mib << 20;
    // A network for each process, from the range for tests of networks (RFC 2544).
    let [high, low] = ((std::process::id() % 8192) as u16 * 8).to_be_bytes();
    let [host, first, second] = [1, 2, 3].map(|number| Ipv4Addr::new(198, 18, high, low | number));
    let bridge = Interface::add(interface("b"), "link add NAME type bridge");
    ip(&format!("address add {host}/29 dev {}", bridge.0));
    ip(&format!("link set {} up", bridge.0));
    let hypervisor = hypervisor();
    let sharing = sharing(Settings { cpu_percent: 50.0, ..Settings::default() });
    // The kernel makes the first guest's tap for the VM. The second guest's comes as an open file.
    let names = ["t0", "t1"].map(interface);
    let network = NetworkSpec { tap: Some(names[0].clone()), mtu: Some(MTU), ..NetworkSpec::default() };
    let commands = format!("get:listen:{PORT},put:{second}:{PORT}:{mib}M:2");
    let mut talkers = vec![Talker::start(&hypervisor, &sharing, 2, first, network, &commands)];
    let mut tap = Tap::open(&options(&names[1], 1)).expect("a tap");
    let fd: RawFd = tap.queues[0].file();
    let network = NetworkSpec { fd: Some(fd), mtu: Some(MTU), ..NetworkSpec::default() };
    let commands = format!("put:{first}:{PORT}:{mib}M:3,get:listen:{PORT}");
    talkers.push(Talker::start(&hypervisor, &sharing, 3, second, network, &commands));
    // The VM has a file of its own for it.
    tap.queues.clear();
    for name in &names {
        ip(&format!("link set {name} master {}", bridge.0));
    }
    for talker in &talkers {
        println!("{} answers a ping after {:?}", talker.address, ping(talker.address));
    }
    talkers[0].wait_for_stream(3, bytes);
    audit(&sharing);
    talkers[1].wait_for_stream(2, bytes);
    for talker in &talkers {
        said(&talker.guest, "put ok");
        said(&talker.guest, "verify ok");
    }
    audit(&sharing);
    let statistics = sharing.statistics();
    assert!(statistics.merges >= FILLED_PAGES, "{statistics:?}");
    for talker in talkers {
        assert!(said(&talker.guest, "done").ends_with(" failed=0"));
        assert_eq!(talker.guest.vm.wait(), VmEnd::Reset);
        let stats = &talker.guest.vm.networks()[0].stats;
        let (received, sent) = (stats.received_bytes.load(Relaxed), stats.sent_bytes.load(Relaxed));
        println!("{stats:?}");
        assert!(received > bytes as u64 && sent > bytes as u64 && stats.errors.load(Relaxed) == 0);
    }
}

fn options(name: &str, queues: usize) -> TapOptions {
    TapOptions { source: Ok(name.to_owned()), queues, mtu: None }
}

/// Sends a stream through a guest's echo, and reads it at the same time.
fn echo(mut stream: UnixStream, seed: u64, bytes: usize) {
    let mut writer = stream.try_clone().expect("a second handle");
    let said = content::bytes(seed, bytes);
    let writing = thread::spawn({
        let said = said.clone();
        move || {
            writer.write_all(&said).expect("the guest reads");
            writer.shutdown(Shutdown::Write).expect("the end of it");
        }
    });
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).expect("the echo");
    writing.join().expect("all was written");
    assert!(heard == said, "{} bytes of an echo differ", heard.len());
}

/// Connects to a port of a guest.
fn call(uds: &PathBuf, port: u16) -> UnixStream {
    let mut stream = UnixStream::connect(uds).expect("the device listens");
    writeln!(stream, "CONNECT {port}").expect("the device reads");
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("an answer");
        answer.extend(byte);
    }
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    stream
}

fn talk_over_sockets() {
    const BYTES: usize = 1 << 20;
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (hypervisor, sharing) =
        (hypervisor(), sharing(Settings { cpu_percent: 50.0, ..Settings::default() }));
    let guests = [40, 50].map(|seed| {
        let uds = dir.path().join(format!("v{seed}"));
        let listener = UnixListener::bind(dir.path().join(format!("v{seed}_7000"))).expect("a socket");
        let server = thread::spawn(move || {
            let mut received = Vec::new();
            listener.accept().expect("the guest connects").0.read_to_end(&mut received).expect("its stream");
            let mut stream = listener.accept().expect("the guest connects again").0;
            stream.write_all(&content::bytes(seed + 1, BYTES)).expect("the guest reads");
            received
        });
        let mut config = VmConfig::new(format!("sockets{seed}"), artifacts.kernel.clone().into());
        config.spec.initrd = Some(artifacts.initramfs.clone());
        let fill = FILLED_PAGES * 4;
        config.spec.cmdline = format!(
            "{COMMAND_LINE} agent=fill:{fill}K:7,put:vsock:7000:{BYTES}:{seed},get:vsock:7000,echo:{PORT},\
             verify:4:250,poweroff"
        );
        config.spec.memory = Size(MEMORY);
        config.spec.vsock = Some(VsockSpec { uds: uds.clone(), cid: None });
        config.sharing = Some(Arc::clone(&sharing));
        (Guest::start(&hypervisor, config), uds, seed, server)
    });
    for (guest, uds, seed, server) in guests {
        println!("put{}", said(&guest, "put ok"));
        let got = said(&guest, "get ok");
        println!("get{got}");
        let sum = Fnv1a::of(&content::bytes(seed + 1, BYTES));
        assert!(got.contains(&format!(" bytes={BYTES} fnv1a={sum}")), "{got}, not {sum}");
        assert!(server.join().expect("the program of the host") == content::bytes(seed, BYTES));
        said(&guest, "echo listens");
        // A port on which nobody listens.
        let mut stream = UnixStream::connect(&uds).expect("the device listens");
        stream.write_all(b"CONNECT 9\n").expect("the device reads");
        assert_eq!(stream.read(&mut [0]).expect("the end"), 0);
        echo(call(&uds, PORT), seed + 2, BYTES);
        println!("echo{}", said(&guest, "echo ok"));
        audit(&sharing);
        said(&guest, "verify ok");
        assert!(said(&guest, "done").ends_with(" failed=0"));
        assert_eq!(guest.vm.wait(), VmEnd::Reset);
        let stats = guest.vm.vsock_stats().expect("the VM has the device");
        println!("{stats:?}");
        assert_eq!((stats.connections.load(Relaxed), stats.errors.load(Relaxed)), (3, 0));
        drop(guest);
        assert!(!uds.exists());
    }
    let statistics = sharing.statistics();
    assert!(statistics.merges >= FILLED_PAGES, "{statistics:?}");
}

/// Returns the processes of passt that this process has started.
fn passts() -> Vec<Pid> {
    let own = std::process::id().to_string();
    let processes = fs::read_dir("/proc").expect("/proc").filter_map(|entry| {
        let entry = entry.ok()?;
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // Number, name in brackets, state, and the parent's number. passt's own name may have a suffix.
        let (name, rest) = stat.split_once(" (")?.1.rsplit_once(") ")?;
        let parent = rest.split(' ').nth(1)?;
        (name.starts_with("passt") && parent == own && !rest.starts_with('Z')).then_some(pid)
    });
    processes.collect()
}

/// A guest on a network of the user.
struct User {
    guest: Guest,
    /// The host's ports that lead to the guest's ports from [`PORT`] on.
    ports: [u16; 2],
    seed: u64,
    server: thread::JoinHandle<Vec<u8>>,
}

impl User {
    fn start(hypervisor: &Hypervisor, sharing: &Arc<Sharing>, seed: u64, bytes: usize) -> Self {
        let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("the port").port();
        let server = thread::spawn(move || {
            let mut received = Vec::new();
            listener.accept().expect("the guest connects").0.read_to_end(&mut received).expect("its stream");
            let mut stream = listener.accept().expect("the guest connects again").0;
            stream.write_all(&content::bytes(seed + 1, bytes)).expect("the guest reads");
            received
        });
        // Ports that are free, as the kernel says.
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
        let ports = free.each_ref().map(|socket| socket.local_addr().expect("the port").port());
        drop(free);
        let mut config = VmConfig::new(format!("user{seed}"), artifacts.kernel.clone().into());
        config.spec.initrd = Some(artifacts.initramfs.clone());
        let (fill, second) = (FILLED_PAGES * 4, PORT + 1);
        config.spec.cmdline = format!(
            "{COMMAND_LINE} ip={GUEST}::{GATEWAY}:255.255.255.0::eth0:off agent=fill:{fill}K:7,\
             put:{GATEWAY}:{port}:{bytes}:{seed},get:{GATEWAY}:{port},get:listen:{PORT},verify:4:250,\
             get:listen:{second},poweroff"
        );
        config.spec.memory = Size(MEMORY);
        let publish = [format!("{}:{PORT}", ports[0]), format!("{}:{second}", ports[1])];
        let publish = publish.map(|text| text.parse().expect("a port")).into();
        config.spec.networks =
            vec![NetworkSpec { user: true, publish, host_loopback: true, ..NetworkSpec::default() }];
        config.sharing = Some(Arc::clone(sharing));
        Self { guest: Guest::start(hypervisor, config), ports, seed, server }
    }

    /// Sends the guest a stream through one of its published ports.
    fn send(&self, number: usize, seed: u64, bytes: usize) {
        let guest_port = PORT + number as u16;
        said(&self.guest, &format!("get listens port={guest_port}"));
        let mut stream = TcpStream::connect(("127.0.0.1", self.ports[number])).expect("passt listens");
        stream.write_all(&content::bytes(seed, bytes)).expect("the guest reads");
        drop(stream);
        self.has_got(&format!("listen:{guest_port}"), seed, bytes);
    }

    fn has_got(&self, host: &str, seed: u64, bytes: usize) {
        let got = said(&self.guest, &format!("get ok host={host}"));
        println!("get {host}{got}");
        let sum = Fnv1a::of(&content::bytes(seed, bytes));
        assert!(got.contains(&format!(" bytes={bytes} fnv1a={sum}")), "{got}, not {sum}");
    }

    fn is_up(&self) -> bool {
        self.guest.vm.networks()[0].link.is_up()
    }
}

fn talk_over_passt() {
    const BYTES: usize = 256 << 10;
    let (hypervisor, sharing) =
        (hypervisor(), sharing(Settings { cpu_percent: 50.0, ..Settings::default() }));
    assert_eq!(passts(), []);
    let mut users: Vec<_> =
        [60, 70].into_iter().map(|seed| User::start(&hypervisor, &sharing, seed, BYTES)).collect();
    for user in &users {
        println!("put{}", said(&user.guest, "put ok"));
        user.has_got(&format!("{GATEWAY}:"), user.seed + 1, BYTES);
        user.send(0, user.seed + 2, BYTES);
    }
    audit(&sharing);
    users.iter().for_each(|user| drop(said(&user.guest, "verify ok")));
    // A process that dies takes the network of its VM with it, and nothing else.
    let processes = passts();
    assert_eq!(processes.len(), 2);
    kill_process(processes[0], Signal::KILL).expect("it is this process's");
    let deadline = Instant::now() + TIME_LIMIT;
    // The device notices it in a thread of its own, which tells nobody here.
    while users.iter().all(User::is_up) {
        assert!(Instant::now() < deadline, "nobody notices that passt has died");
        thread::sleep(Duration::from_millis(10));
    }
    let lost = users.remove(users.iter().position(|user| !user.is_up()).expect("one has lost it"));
    let error = lost.guest.vm.networks()[0].stats.last_error().expect("an error");
    assert!(error.contains("passt has ended") && error.contains("SIGKILL"), "{error}");
    let kept = users.remove(0);
    assert!(kept.is_up());
    kept.send(1, kept.seed + 3, BYTES);
    assert!(said(&kept.guest, "done").ends_with(" failed=0"));
    assert_eq!(kept.guest.vm.wait(), VmEnd::Reset);
    for user in [lost, kept] {
        assert!(user.server.join().expect("the program of the host") == content::bytes(user.seed, BYTES));
        println!("{:?}", user.guest.vm.networks()[0].stats);
        drop(user.guest);
    }
    assert_eq!(passts(), []);
    let statistics = sharing.statistics();
    assert!(statistics.merges >= FILLED_PAGES, "{statistics:?}");
}

fn refuse_networks_of_the_user() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let kernel = dir.path().join("demo");
    fs::write(&kernel, DEMO_GUEST).expect("room for a kernel");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let publish = format!("user,publish={}:22", taken.local_addr().expect("the port").port());
    for (path, net, wanted) in [
        (dir.path().as_os_str(), "user", "apt install passt"),
        (&std::env::var_os("PATH").expect("a path"), &publish, "ends at once: Failed to bind"),
    ] {
        let mut command = program::command(["run", "--memory", "16M", "--net", net, "--kernel"]);
        let output = command.arg(&kernel).env("PATH", path).output().expect("the program can be run");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && told.contains(wanted), "{told}");
    }
}

/// Sends a broadcast frame from the host into the tap of this name, whose address is `from`. `port` tells flows
/// apart.
fn broadcast(from: Ipv4Addr, port: u16) {
    let socket = std::net::UdpSocket::bind((from, port)).expect("a socket");
    socket.set_broadcast(true).expect("the right to broadcast");
    socket.send_to(b"hello", (Ipv4Addr::from(u32::from(from) | 7), 9)).expect("a datagram");
}

fn use_two_queues() {
    let tap = Interface::add(interface("q"), "tuntap add NAME mode tap multi_queue");
    let [high, low] = ((std::process::id() % 8192) as u16 * 8).to_be_bytes();
    let host = Ipv4Addr::new(198, 19, high, low | 1);
    // The host sends nothing of its own accord, as it would over IPv6.
    fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", tap.0), "1").expect("no IPv6 there");
    ip(&format!("address add {host}/29 broadcast {} dev {}", Ipv4Addr::from(u32::from(host) | 7), tap.0));
    let opened = Tap::open(&options(&tap.0, 2)).expect("a tap with two queues");
    assert_eq!((opened.queues.len(), &opened.notices[..], opened.mtu), (2, &[][..], Some(1500)));
    let mut buffer = vec![0; 2000];
    let mut frames = |queue: usize| {
        std::iter::from_fn(|| opened.queues[queue].receive(&mut buffer).expect("the tap is there")).count()
    };
    let ports = 20_000..20_064;
    // A guest that uses both gets frames in both. Which flow goes where is the kernel's choice.
    ports.clone().for_each(|port| broadcast(host, port));
    let both = [frames(0), frames(1)];
    println!("of 64 flows the queues got {both:?}");
    assert!(both.iter().all(|&count| count > 0) && both.iter().sum::<usize>() == 64, "{both:?}");
    // All go to the first one while the guest does not use the second one.
    opened.queues[1].set_enabled(false).expect("it can be detached");
    opened.queues[1].set_enabled(false).expect("it can be detached twice");
    ports.clone().for_each(|port| broadcast(host, port));
    assert_eq!([frames(0), frames(1)], [64, 0]);
    opened.queues[1].set_enabled(true).expect("it can be attached");
    opened.queues[1].set_enabled(true).expect("it can be attached twice");
    ports.for_each(|port| broadcast(host, port));
    let both = [frames(0), frames(1)];
    assert!(both[1] > 0 && both.iter().sum::<usize>() == 64, "{both:?}");
    // Both send.
    let mut frame = vec![0; HEADER_BYTES + 60];
    frame[HEADER_BYTES..][..12].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1]);
    assert!(opened.queues.iter().all(|queue| queue.send(&frame).expect("the tap is there") == Sent::Done));
    let count = fs::read_to_string(format!("/sys/class/net/{}/statistics/rx_packets", tap.0));
    assert_eq!(count.expect("a counter").trim(), "2");
    // A guest with one pair of queues can use a tap that has several.
    drop(opened);
    assert_eq!(Tap::open(&options(&tap.0, 1)).expect("one queue of it").queues.len(), 1);
    // When the interface is deleted, the link is gone.
    let opened = Tap::open(&options(&tap.0, 2)).expect("the tap once more");
    drop(tap);
    assert!(
        opened.queues.iter().all(|queue| queue.send(&frame).is_err() && queue.receive(&mut buffer).is_err())
    );
}

fn use_one_tap_twice() {
    let name = interface("e");
    let first = Tap::open(&options(&name, 1)).expect("a tap that the kernel makes");
    let second = Tap::open(&options(&name, 1)).expect_err("it is in use").to_string();
    assert!(second.contains(&name) && second.contains("another program uses it"), "{second}");
    let several = Tap::open(&options(&name, 2)).expect_err("it has one queue").to_string();
    assert!(several.contains("multi_queue"), "{several}");
    drop(first);
    // It was the VM's own.
    assert!(!fs::exists(format!("/sys/class/net/{name}")).expect("/sys can be read"));
    let bridge = Interface::add(interface("k"), "link add NAME type bridge");
    let other = Tap::open(&options(&bridge.0, 1)).expect_err("it is no tap");
    assert!(
        matches!(other, TapError::Open { .. }) && other.to_string().contains("of another kind"),
        "{other}"
    );
}

fn use_taps_without_privileges() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let kernel = dir.path().join("demo");
    fs::write(&kernel, DEMO_GUEST).expect("room for a kernel");
    let plan = Plan { rounds: 1, ..Plan::default() }.to_string();
    let run = |tap: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(program::path());
        command.args(["run", "--memory", "16M", "--net", &format!("tap={tap}"), "--cmdline", &plan]);
        let output = command.arg("--kernel").arg(&kernel).output().expect("setpriv of util-linux can be run");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, told) = run(&interface("p"));
    assert_eq!(code, Some(1), "{told}");
    let remedy = format!("as root, `ip tuntap add {} mode tap user USER", interface("p"));
    assert!(told.contains("Operation not permitted") && told.contains(&remedy), "{told}");
    let tap = Interface::add(interface("p"), "tuntap add NAME mode tap user root");
    let (code, told) = run(&tap.0);
    assert_eq!(code, Some(0), "{told}");
    assert!(told.contains("is down and cannot be taken up"), "{told}");
    ip(&format!("link set {} up", tap.0));
    let (code, told) = run(&tap.0);
    assert_eq!(code, Some(0), "{told}");
    assert!(!told.contains(&tap.0), "{told}");
}
