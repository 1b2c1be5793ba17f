//! A guest that boots, reads and receives, and the counters at each of its lines.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::TcpListener;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use samepage_devices::disk::CachePolicy;
use samepage_devices::net::passt::{GATEWAY, GUEST};
use samepage_devices::virtio::block::BlockStats;
use samepage_devices::virtio::net::NetStats;
use samepage_machine::config::{NetworkSpec, VirtioBus};
use samepage_machine::exits::Counters;
use samepage_machine::{ConsoleConfig, DiskSpec, Hypervisor, Size, Vm, VmConfig};
use samepage_resources::guest_kernel::COMMAND_LINE;

use super::super::{GUEST_MIB, LinuxGuest};

/// The buses, by the names that `--bus` has for them.
pub(super) const BUSES: [(&str, VirtioBus); 2] = [("mmio", VirtioBus::Mmio), ("pci", VirtioBus::Pci)];
/// Time limit for each line of a guest.
const TIME_LIMIT: Duration = Duration::from_secs(300);
/// Requests of one block, each alone.
const SMALL_READS: usize = 32;
/// Bytes that are read in large requests, and bytes of the stream.
const READ_BYTES: usize = 4 << 20;
const STREAM_BYTES: usize = 256 << 10;
/// The longest packet, in bytes: that of Ethernet, which most networks have.
const MTU: u16 = 1500;
/// KVM's counter of accesses to ports.
const PORTS: &str = "io_exits";

/// What a guest did, and what it took.
#[derive(Debug, Clone)]
pub(super) struct Phase {
    pub(super) bus: &'static str,
    pub(super) what: &'static str,
    /// Requests, or frames.
    pub(super) requests: u64,
    pub(super) elapsed: Duration,
    /// KVM's counters, by name.
    pub(super) counts: BTreeMap<String, u64>,
}

/// What is read at each line.
struct Sources {
    counters: Counters,
    disk: Arc<BlockStats>,
    network: Arc<NetStats>,
}

/// A line of the guest's, and the counters at its end.
#[derive(Debug, Clone)]
struct Mark {
    line: String,
    at: Instant,
    counts: BTreeMap<String, u64>,
    reads: u64,
    frames: u64,
}

/// A console. The vCPU's thread writes to it, so nothing is counted meanwhile.
struct Watch {
    sources: Arc<OnceLock<Sources>>,
    line: Vec<u8>,
    marks: Sender<Mark>,
}

impl Write for Watch {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).trim().to_owned();
            if let Some(Sources { counters, disk, network }) = self.sources.get() {
                let counts = counters.all().into_iter().map(|(name, count)| (name.to_owned(), count));
                let frames = &[&network.received_frames, &network.sent_frames];
                // The receiver is gone after the last line that counts.
                let _ = self.marks.send(Mark {
                    line,
                    at: Instant::now(),
                    counts: counts.collect(),
                    reads: disk.reads.load(Relaxed),
                    frames: frames.iter().map(|frames| frames.load(Relaxed)).sum(),
                });
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs a guest on this bus.
pub(super) fn run(
    hypervisor: &Hypervisor,
    guest: &LinuxGuest,
    (name, bus): (&'static str, VirtioBus),
) -> Result<Vec<Phase>> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listening for the guest")?;
    let port = listener.local_addr().context("listening for the guest")?.port();
    let server = thread::spawn(move || listener.accept()?.0.write_all(&vec![7; STREAM_BYTES]));
    let small = "read:/dev/vda:4K,".repeat(SMALL_READS);
    let mut config = VmConfig::new(format!("requests-{name}"), guest.kernel.clone().into());
    config.spec.initrd = Some(guest.initrd.clone());
    config.spec.cmdline = format!(
        "{COMMAND_LINE} ip={GUEST}::{GATEWAY}:255.255.255.0::eth0:off agent=read:/dev/vda:4K,print:a,{small}print:b,\
         read:/dev/vda:{READ_BYTES},print:c,get:{GATEWAY}:{port},print:d,poweroff"
    );
    config.spec.memory = Size(u64::from(GUEST_MIB) << 20);
    config.spec.bus = bus;
    // Without a cache, no request is answered by another way than the others.
    let disk = DiskSpec {
        path: guest.disk.clone(),
        readonly: true,
        cache: Some(CachePolicy::Buffered),
        ..DiskSpec::default()
    };
    config.spec.disks = vec![disk];
    config.spec.networks =
        vec![NetworkSpec { user: true, host_loopback: true, mtu: Some(MTU), ..NetworkSpec::default() }];
    let sources = Arc::<OnceLock<Sources>>::default();
    let (sender, marks) = mpsc::channel();
    let watch = Watch { sources: sources.clone(), line: Vec::new(), marks: sender };
    config.console = ConsoleConfig::Sink(Box::new(watch));
    let vm = Vm::build(config, hypervisor).context("starting a guest")?;
    let counters = Counters::of_the_vcpu().context("this host's KVM does not count exits")?;
    let of_disk = vm.disks().first().context("the VM has no disk")?.stats.clone();
    let network = vm.networks().first().context("the VM has no network")?.stats.clone();
    let _ = sources.set(Sources { counters, disk: of_disk, network });
    let started = Instant::now();
    vm.start();
    let ready = wait(&marks, &vm, "ready ")?;
    let nothing = Mark { at: started, counts: BTreeMap::new(), reads: 0, frames: 0, line: String::new() };
    let mut phases = vec![phase(name, "start to init", &nothing, &ready, 1)];
    let mut before = wait(&marks, &vm, "print ok a")?;
    for (what, end) in
        [("read of 4 KiB", "print ok b"), ("read of 128 KiB and more", "print ok c"), ("frame", "print ok d")]
    {
        let after = wait(&marks, &vm, end)?;
        let requests =
            if what == "frame" { after.frames - before.frames } else { after.reads - before.reads };
        phases.push(phase(name, what, &before, &after, requests));
        before = after;
    }
    vm.wait();
    match server.join() {
        Ok(sent) => sent.context("sending a stream to the guest")?,
        Err(_) => bail!("sending a stream to the guest failed"),
    }
    Ok(phases)
}

fn phase(bus: &'static str, what: &'static str, before: &Mark, after: &Mark, requests: u64) -> Phase {
    let counts = after.counts.iter().map(|(name, count)| {
        let earlier = before.counts.get(name).copied().unwrap_or(0);
        (name.clone(), count.saturating_sub(earlier))
    });
    let mut counts: BTreeMap<_, _> = counts.collect();
    // The console's own.
    let ports = counts.get(PORTS).copied().unwrap_or(0);
    if let Some(exits) = counts.get_mut("exits") {
        *exits = exits.saturating_sub(ports);
    }
    Phase { bus, what, requests, elapsed: after.at - before.at, counts }
}

/// Waits for a line of the agent that begins so.
fn wait(marks: &Receiver<Mark>, vm: &Vm, text: &str) -> Result<Mark> {
    loop {
        let Ok(mark) = marks.recv_timeout(TIME_LIMIT) else {
            bail!("the guest does not get to {text:?}; its end: {:?}", vm.end());
        };
        let said = mark.line.split_once("samepage-agent: ").map_or("", |(_, said)| said);
        if said.starts_with(text) {
            return Ok(mark);
        }
        if said.contains(" failed ") {
            bail!("a command of the guest's agent fails: {said}");
        }
    }
}
