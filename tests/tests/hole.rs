//! Guests that publish page types in the memory hole: Linux guests with the agent, honest demo guests, and
//! hostile ones.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use samepage_machine::exits::Counters;
use samepage_machine::{ConsoleConfig, Hypervisor, Size, Vm, VmConfig, VmEnd};
use samepage_resources::demo::plan::{HoleMode, Plan};
use samepage_resources::demo::report::Report;
use samepage_sharing::by_type::Claimed;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use samepage_tests::agent::{figure, said};
use samepage_tests::console::TIME_LIMIT;
use samepage_tests::guests::{Guest, hypervisor, sharing};
use samepage_tests::harness::{self, Need};
use samepage_tests::process::Holdings;
use samepage_tests::program::{self, Running};
use samepage_tests::shared::{MEMORY, audit, churn, start_all, wait_ready, wait_until};
use xtask::artifacts::{Artifacts, COMMAND_LINE};

fn main() -> ExitCode {
    harness::run_all(&[
        ("free_memory_comes_back_and_used_memory_stays", &[Need::Kvm], honest),
        ("a_hostile_guest_harms_nobody", &[Need::Kvm], hostile),
        ("a_guest_that_gives_itself_away_harms_nobody", &[Need::Kvm], ruin),
        ("telling_costs_no_exits_but_the_doorbell", &[Need::Kvm], exits),
        ("linux_tells_what_its_kernel_says", &[Need::Kvm, Need::LinuxGuest], linux_tells),
        ("memory_that_linux_frees_comes_back", &[Need::Kvm, Need::LinuxGuest], linux_frees),
        ("without_a_hole_the_agent_says_so", &[Need::Kvm, Need::LinuxGuest], no_hole),
    ])
}

/// The variable with the duration of the hostile guest's games, in seconds.
const HOSTILE_SECONDS: &str = "SAMEPAGE_TEST_HOSTILE_SECONDS";

/// Pages of a demo guest's arena.
const PAGES: u64 = 2048;

fn settings() -> Settings {
    Settings { cpu_percent: 100.0, rest_ms: 20, ..Settings::default() }
}

fn plan(mode: HoleMode, vm: u32) -> Plan {
    Plan {
        hole_mode: Some(mode),
        rounds: 0,
        every_ms: 500,
        pages: Some(PAGES),
        run: 8,
        vm,
        ..Plan::default()
    }
}

fn start(hypervisor: &Hypervisor, sharing: &Arc<Sharing>, name: &str, plan: &Plan) -> Guest {
    Guest::start(hypervisor, Guest::config(name, plan, MEMORY, Some(sharing)))
}

fn claimed(vm: &Vm) -> Claimed {
    vm.membership().expect("the VM shares memory").claimed().expect("the page map can be read")
}

/// Returns the number of pages that a demo guest found freed when it used them again.
fn returned(guest: &Guest) -> u64 {
    let returned = |line: &String| match Report::parse(line) {
        Ok(Report::Hole { returned, .. }) => Some(returned),
        _ => None,
    };
    guest.console.lines().iter().rev().find_map(returned).unwrap_or(0)
}

fn honest() {
    let hypervisor = hypervisor();
    let sharing = sharing(settings());
    let guests =
        [0, 1].map(|vm| start(&hypervisor, &sharing, &format!("h{vm}"), &plan(HoleMode::Honest, vm)));
    guests.iter().for_each(wait_ready);
    for guest in &guests {
        wait_until(&sharing, "free pages that the host has freed", || returned(guest) >= PAGES);
        let claimed = claimed(&guest.vm);
        assert!(claimed.publishing && claimed.given_back >= PAGES, "{claimed:?}");
        println!("{claimed:?}");
    }
    audit(&sharing);
    // Each round verifies the used pages.
    for guest in &guests {
        guest.console.wait_for_round(guest.console.round() + 2);
    }
    guests.into_iter().for_each(Guest::finish);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes, statistics.refusals), (0, 0, 0), "{statistics:?}");
}

fn hostile() {
    let seconds = std::env::var(HOSTILE_SECONDS).ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(6);
    let hypervisor = hypervisor();
    let sharing = sharing(settings());
    let before = Holdings::now();
    let victims = start_all(&hypervisor, &sharing, 2, &churn());
    let honest = start(&hypervisor, &sharing, "honest", &plan(HoleMode::Honest, 2));
    let liar = start(&hypervisor, &sharing, "liar", &plan(HoleMode::Hostile, 3));
    let others = || victims.iter().chain([&honest]);
    others().chain([&liar]).for_each(wait_ready);
    // Arena, image and tables, hole and vCPU for each VM, and 8 MiB for the engine.
    let limit = before.private_bytes + 4 * (PAGES * 4096 + (3 << 20)) + (8 << 20);

    let deadline = Instant::now() + Duration::from_secs(seconds);
    let mut most = 0;
    while Instant::now() < deadline {
        for guest in others() {
            guest.console.wait_for_round(guest.console.round() + 1);
        }
        let taken = Holdings::now().private_bytes + sharing.statistics().store_bytes;
        assert!(taken <= limit, "{taken} bytes, {limit} expected: {:?}", sharing.statistics());
        most = most.max(taken);
        audit(&sharing);
        assert!(liar.vm.end().is_none(), "{:?}", liar.vm.end());
    }
    // The games ran against the host, and again after their effects on each other.
    let mut games: BTreeMap<String, u64> = BTreeMap::new();
    for line in liar.console.lines() {
        if let Ok(Report::Hole { game, .. }) = Report::parse(&line) {
            *games.entry(game.as_str().to_owned()).or_default() += 1;
        }
    }
    assert!(games.len() == 14 && games.values().all(|&played| played >= 2), "{games:?}");
    println!(
        "{games:?}\nliar: {:?}\nhonest: {:?}, {} pages found freed\n{most} bytes at most of {limit}",
        claimed(&liar.vm),
        claimed(&honest.vm),
        returned(&honest)
    );
    assert!(returned(&honest) > 0, "the honest guest is not heard beside the other");

    assert_eq!(liar.vm.serial_input(b"q"), 1);
    assert_eq!(liar.vm.wait(), VmEnd::Reset);
    drop(liar);
    audit(&sharing);
    honest.finish();
    victims.into_iter().for_each(Guest::finish);
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes, statistics.refusals), (0, 0, 0), "{statistics:?}");
    drop(sharing);
    Holdings::assert_back_to(&before, 8 << 20);
}

fn ruin() {
    let hypervisor = hypervisor();
    let sharing = sharing(settings());
    let victims = start_all(&hypervisor, &sharing, 2, &churn());
    victims.iter().for_each(wait_ready);
    let liar = start(&hypervisor, &sharing, "liar", &plan(HoleMode::Ruin, 2));
    wait_ready(&liar);
    // The guest's own program is freed. It reads zeros then, and executes them as instructions.
    wait_until(&sharing, "the end of a guest that calls itself free", || liar.vm.end().is_some());
    let end = liar.vm.end();
    assert!(matches!(end, Some(VmEnd::Crashed(_) | VmEnd::Reset)), "{end:?}");
    println!("{end:?}");
    audit(&sharing);
    drop(liar);
    for guest in &victims {
        guest.console.wait_for_round(guest.console.round() + 2);
    }
    audit(&sharing);
    victims.into_iter().for_each(Guest::finish);
}

/// The values of a vCPU's counters at the start and the end of a line.
struct Line {
    text: String,
    start: (u64, u64),
    end: (u64, u64),
}

/// A console that reads the counters at each line. The vCPU's thread writes to it, so nothing is counted
/// meanwhile.
struct Watch {
    counters: Arc<OnceLock<Counters>>,
    start: (u64, u64),
    line: Vec<u8>,
    lines: Sender<Line>,
}

fn count(counters: &Counters, name: &str) -> u64 {
    counters.get(name).expect("KVM counts exits and accesses to devices")
}

impl Write for Watch {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let now = || {
            self.counters
                .get()
                .map_or((0, 0), |counters| (count(counters, "exits"), count(counters, "mmio_exits")))
        };
        for &byte in bytes {
            if self.line.is_empty() {
                self.start = now();
            }
            self.line.push(byte);
            if byte == b'\n' {
                let text = String::from_utf8_lossy(&std::mem::take(&mut self.line)).trim_end().to_owned();
                // The receiver is gone after the test.
                let _ = self.lines.send(Line { text, start: self.start, end: now() });
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn exits() {
    let hypervisor = hypervisor();
    let sharing = sharing(settings());
    // The engine protects pages, and the next write to a protected page is an exit.
    sharing.pause();
    let counters = Arc::<OnceLock<Counters>>::default();
    let (sender, lines) = mpsc::channel();
    let watch = Watch { counters: Arc::clone(&counters), start: (0, 0), line: Vec::new(), lines: sender };
    let mut config = Guest::config("teller", &plan(HoleMode::Hostile, 0), MEMORY, Some(&sharing));
    config.console = ConsoleConfig::Sink(Box::new(watch));
    let vm = Vm::build(config, &hypervisor).expect("a VM can be built");
    let Some(found) = Counters::of_the_vcpu() else {
        println!("this KVM does not count exits");
        return;
    };
    counters.set(found).expect("it was not set before");
    vm.start();

    // In the second round of the games, all pages that they use have been touched before.
    let mut before: Option<(u64, (u64, u64))> = None;
    let mut turns = 0;
    loop {
        let line = lines.recv_timeout(TIME_LIMIT).expect("the guest plays");
        let Ok(Report::Hole { game, passes, rings, .. }) = Report::parse(&line.text) else { continue };
        let (rung_before, counted_before) = before.replace((rings, line.end)).unwrap_or_default();
        if game.as_str() != "free-and-used" {
            continue;
        }
        turns += 1;
        if turns < 2 {
            continue;
        }
        let rung = rings - rung_before;
        let exits = line.start.0 - counted_before.0;
        let mmio = line.start.1 - counted_before.1;
        // In half of the passes, all words change.
        let words = passes / 2 * PAGES;
        println!(
            "{passes} passes that changed some {words} words, {rung} rings: {exits} exits, {mmio} for devices"
        );
        assert_eq!((rung, mmio), (passes, passes), "each pass rings once, and does nothing else there");
        // Besides the doorbell, the host's own interrupts and the reads of the serial port are exits.
        assert!(exits >= rung && exits < rung + rung / 4 + 200, "{exits} exits for {rung} rings");
        assert!(words > 100 * exits, "too few words to tell: {words}");
        break;
    }
    assert_eq!(vm.stop(), VmEnd::Stopped);
}

/// Starts a Linux guest whose agent runs these commands. If its kernel is interpreted, publishing one page
/// takes half a millisecond. So the tests use little memory.
fn linux(
    hypervisor: &Hypervisor,
    artifacts: &Artifacts,
    sharing: &Arc<Sharing>,
    name: &str,
    memory_bytes: u64,
    commands: &str,
) -> Guest {
    let mut config = VmConfig::new(name, artifacts.kernel.clone().into());
    config.spec.initrd = Some(artifacts.initramfs.clone());
    config.spec.cmdline = format!("{COMMAND_LINE} agent={commands}");
    config.spec.memory = Size(memory_bytes);
    config.sharing = Some(Arc::clone(sharing));
    Guest::start(hypervisor, config)
}

fn linux_tells() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let hypervisor = hypervisor();
    let sharing = sharing(settings());
    let memory = 32 << 20;
    let commands = "fill:4M:1,check,publish:60000,idle";
    let guest = linux(&hypervisor, &artifacts, &sharing, "teller", memory, commands);
    said(&guest, "fill ok");
    let checked = said(&guest, "check ok");
    println!("check{checked}");
    assert!(figure(&checked, "percent") >= 99.5, "{checked}");
    assert!(figure(&checked, "unexplained") == 0.0, "{checked}");
    assert_eq!(figure(&checked, "pages") as u64, memory / 4096, "{checked}");

    println!("publish{}", said(&guest, "publish ok"));
    wait_until(&sharing, "a pass taken in", || claimed(&guest.vm).passes > 0);
    let claimed = claimed(&guest.vm);
    println!("{claimed:#?}");
    assert!(claimed.publishing && claimed.pass_cpu_us > 0);
    let pages: u64 = claimed.types.iter().map(|kind| kind.pages).sum();
    assert_eq!(pages, memory / 4096, "each page has a type");
    let of = |name| {
        let place = samepage_hole::PageType::ALL.iter().position(|kind| kind.name() == name);
        claimed.types[place.expect("there is this type")].pages
    };
    assert!(of("anonymous") >= 1024, "what the agent filled");
    assert!(of("slab") > 0 && of("page_table") > 0 && of("free") > 1000);
    audit(&sharing);
    assert_eq!(guest.vm.stop(), VmEnd::Stopped);
}

/// Pause between two passes of the agents that free memory: longer than a pass takes.
const PAUSE_MS: u64 = 15_000;
/// Bytes that the agents free.
const FREED: u64 = 20 << 20;

/// Returns the host's memory that this process uses.
fn taken(sharing: &Sharing) -> u64 {
    samepage_host::statistics::rss_anon().expect("the process's memory") + sharing.statistics().store_bytes
}

fn linux_frees() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let hypervisor = hypervisor();
    let sharing = sharing(settings());
    let guests = [1, 2].map(|seed| {
        // The agent reads its console up to the end of input, which Ctrl-D marks.
        let commands = format!(
            "fill:20M:{seed},publish:{PAUSE_MS},verify,release,sum:/dev/ttyS0,fill:20M:7{seed},verify:8:250,poweroff"
        );
        linux(&hypervisor, &artifacts, &sharing, &format!("linux{seed}"), 64 << 20, &commands)
    });
    let before: Vec<_> = std::thread::scope(|scope| {
        let watched = guests.each_ref().map(|guest| scope.spawn(|| watch_release(guest, &sharing)));
        watched.map(|thread| thread.join().expect("memory comes back")).into()
    });
    let most = before.into_iter().max().unwrap_or(0);
    // The last frames of the freed memory are punched in the following steps.
    let released = || taken(&sharing) + 2 * FREED * 95 / 100 <= most;
    wait_until(&sharing, "the freed memory", released);
    println!("the process takes {} bytes, {most} before", taken(&sharing));
    for guest in &guests {
        assert_eq!(guest.vm.serial_input(b"\x04"), 1);
    }
    for guest in &guests {
        println!("used again:{}", said(guest, "fill ok pages=5120 seed=7"));
    }
    audit(&sharing);
    for guest in guests {
        said(&guest, "verify ok pages=5120 rounds=8");
        assert!(said(&guest, "done").ends_with(" failed=0"));
        assert_eq!(guest.vm.wait(), VmEnd::Reset);
    }
    let statistics = sharing.statistics();
    assert_eq!((statistics.frames, statistics.store_bytes), (0, 0), "{statistics:?}");
}

/// Waits until a guest has freed its memory and the host has that memory back. Returns the memory of the
/// process before.
fn watch_release(guest: &Guest, sharing: &Sharing) -> u64 {
    said(guest, "ready");
    said(guest, "fill ok");
    let published = said(guest, "publish ok");
    said(guest, "verify ok");
    let (most, before) = (taken(sharing), claimed(&guest.vm));
    said(guest, "release ok");
    let released = Instant::now();
    let back = |claimed: &Claimed| claimed.given_back - before.given_back;
    let after = loop {
        let after = claimed(&guest.vm);
        if back(&after) >= FREED / 4096 * 95 / 100 {
            break after;
        }
        assert!(released.elapsed() < 2 * TIME_LIMIT, "{after:?} {:?}", sharing.statistics());
        // The host's free memory causes no event, so poll.
        std::thread::sleep(Duration::from_millis(20));
    };
    let took = released.elapsed();
    // A pass takes long if the guest's kernel is interpreted, and longer on a busy host. The agent's own
    // interval is a hundred passes; here it is at least two.
    let pass = (figure(&published, "pass_ms") as u64).max(u64::from(after.pass_cpu_us) / 1000);
    let interval = Duration::from_millis(pass + PAUSE_MS.max(pass + 1000));
    println!(
        "publish{published}\n{} pages came back after {took:.1?} and {} passes, an interval is {interval:.1?}",
        back(&after),
        after.passes - before.passes
    );
    // The pass in progress, the one that publishes the free pages, and the one that answers the host. On a
    // busy host the engine may request the next pass too late, so each of them may take two more.
    assert!(after.passes - before.passes <= 7, "{after:?} after {before:?}, {took:?} of {interval:?}");
    most
}

fn no_hole() {
    let artifacts = Artifacts::locate().expect("the guests were there a moment ago");
    let mut command = program::command(["run", "--memory", "64M", "--memory-hole", "off", "--kernel"]);
    command.arg(&artifacts.kernel).arg("--initrd").arg(&artifacts.initramfs);
    command.args(["--cmdline", &format!("{COMMAND_LINE} agent=publish")]);
    let finished = Running::start(command).wait_for_long();
    finished.assert_code(0);
    let told: BTreeSet<_> = finished.stdout.lines().filter(|line| line.contains("publish")).collect();
    assert!(
        told.iter().any(|line| line.contains("publish failed: the host offers no memory hole")),
        "{told:?}"
    );
    assert!(told.iter().any(|line| line.contains("--memory-hole on")), "{told:?}");
}
