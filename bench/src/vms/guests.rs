//! Demo guests under the benchmark's control.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use samepage_analyze::oracle::{self, Oracle};
use samepage_host::host_limits::HostMemory;
use samepage_machine::{ConsoleConfig, DiskSpec, Hypervisor, ImageSource, Size, Vm, VmConfig};
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::{Crash, Plan};
use samepage_resources::demo::report::Report;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::pagemap::Pagemap;
use samepage_sharing::service::Sharing;
use samepage_sharing::statistics::EngineStatistics;
use vm_memory::{Bytes, GuestAddress};

use crate::context::Bench;
use crate::cpu;

/// Default memory of a VM, in bytes.
pub(crate) const MEMORY: u64 = 128 << 20;
/// Time limit for any step of a guest.
const TIME_LIMIT: Duration = Duration::from_secs(120);
/// The engine retries failed merges after 16 intervals, which are 4 s.
const STILL: Duration = Duration::from_millis(4500);
/// Interval of checking for signals while the benchmark waits.
const SLICE: Duration = Duration::from_millis(50);
/// A pause between rounds that is longer than any benchmark.
const FOREVER_MS: u64 = 1 << 30;

/// Returns a plan for a guest that fills its memory, verifies it once and is then idle until it is asked to
/// finish.
pub(crate) fn resting() -> Plan {
    Plan { alike: 50, own: 50, zero: 0, rounds: 0, every_ms: FOREVER_MS, ..Plan::default() }
}

/// Returns a plan for a guest that fills its memory and then halts for good.
pub(crate) fn halting() -> Plan {
    Plan { crash: Some(Crash::Sleep), every_ms: 0, ..resting() }
}

/// Returns the CPU time of this process so far, without that of the guests' vCPUs.
///
/// # Errors
/// Fails like [`Guest::cpu`].
pub(crate) fn cpu_beside(guests: &[Guest]) -> Result<Duration> {
    let vcpus = guests.iter().map(Guest::cpu).sum::<Result<Duration>>()?;
    Ok(cpu::of_this_process().saturating_sub(vcpus))
}

/// A running VM with the demo guest.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) vm: Vm,
    reports: Receiver<Report>,
}

impl Guest {
    /// Starts a guest.
    ///
    /// # Errors
    /// Fails if the VM cannot be built.
    pub(crate) fn start(
        hypervisor: &Hypervisor,
        plan: &Plan,
        memory_bytes: u64,
        sharing: Option<&Arc<Sharing>>,
    ) -> Result<Self> {
        Self::start_with_disks(hypervisor, plan, memory_bytes, sharing, Vec::new())
    }

    /// Starts a guest with disks.
    ///
    /// # Errors
    /// Fails if the VM cannot be built.
    pub(crate) fn start_with_disks(
        hypervisor: &Hypervisor,
        plan: &Plan,
        memory_bytes: u64,
        sharing: Option<&Arc<Sharing>>,
        disks: Vec<DiskSpec>,
    ) -> Result<Self> {
        let (sender, reports) = mpsc::channel();
        let kernel = ImageSource::Bytes { name: "embedded guest", bytes: DEMO_GUEST.into() };
        let name = format!("bench-{}", plan.vm);
        let mut config = VmConfig::new(name.clone(), kernel);
        config.spec.cmdline = plan.to_string();
        config.spec.memory = Size(memory_bytes);
        config.spec.disks = disks;
        config.sharing = sharing.cloned();
        config.console = ConsoleConfig::Sink(Box::new(Lines { line: Vec::new(), reports: sender }));
        let vm = Vm::build(config, hypervisor).with_context(|| format!("start VM {name}"))?;
        vm.start();
        Ok(Self { vm, reports })
    }

    /// Starts several guests with the same plan and different numbers.
    ///
    /// # Errors
    /// Fails like [`Guest::start`], and if the host has too little memory for them.
    pub(crate) fn start_all(
        hypervisor: &Hypervisor,
        plan: &Plan,
        vms: u32,
        memory_bytes: u64,
        sharing: Option<&Arc<Sharing>>,
    ) -> Result<Vec<Self>> {
        if let Some(memory) = HostMemory::measure() {
            memory.check(u64::from(vms) * memory_bytes, 1.0)?;
        }
        let plans = (0..vms).map(|vm| Plan { vm: plan.vm + vm, ..plan.clone() });
        plans.map(|plan| Self::start(hypervisor, &plan, memory_bytes, sharing)).collect()
    }

    /// Waits for a report for which `find` returns a value.
    ///
    /// # Errors
    /// Fails if none comes in time, if the guest finds corrupt memory or ends, or if the benchmark is
    /// interrupted.
    pub(crate) fn wait_for<T>(
        &self,
        bench: &Bench,
        what: &str,
        find: impl Fn(&Report) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + TIME_LIMIT;
        loop {
            bench.check()?;
            match self.reports.recv_timeout(SLICE) {
                Ok(report) => {
                    if let Some(found) = find(&sound(self.vm.name(), report)?) {
                        return Ok(found);
                    }
                }
                Err(RecvTimeoutError::Timeout) if self.vm.end().is_none() && Instant::now() < deadline => {}
                Err(_) => bail!("VM {} does not get to {what}; its end: {:?}", self.vm.name(), self.vm.end()),
            }
        }
    }

    /// Waits until the guest has filled its memory.
    ///
    /// # Errors
    /// Fails like [`wait_for`](Self::wait_for).
    pub(crate) fn wait_filled(&self, bench: &Bench) -> Result<()> {
        self.wait_for(bench, "filled memory", |report| matches!(report, Report::Ready { .. }).then_some(()))
    }

    /// Waits until the guest has verified its memory once more. By its plan, it is then idle.
    ///
    /// # Errors
    /// Fails like [`wait_for`](Self::wait_for).
    pub(crate) fn wait_verified(&self, bench: &Bench) -> Result<()> {
        let round = |report: &Report| matches!(report, Report::Round { .. }).then_some(());
        self.wait_for(bench, "the end of a verification", round)
    }

    /// Returns the new reports.
    ///
    /// # Errors
    /// Fails if the guest finds corrupt memory, or if the VM has ended.
    pub(crate) fn take_reports(&self) -> Result<Vec<Report>> {
        if let Some(end) = self.vm.end() {
            bail!("VM {} ended: {end}", self.vm.name());
        }
        self.reports.try_iter().map(|report| sound(self.vm.name(), report)).collect()
    }

    /// Returns the CPU time of the vCPU's thread so far, including the guest's.
    ///
    /// # Errors
    /// Fails if `/proc` does not provide it.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let name = format!("vcpu-{}-0", self.vm.name());
        let threads = fs::read_dir("/proc/self/task").context("list threads")?;
        let is_vcpu = |thread: &PathBuf| {
            fs::read_to_string(thread.join("comm")).is_ok_and(|comm| name.starts_with(comm.trim_end()))
        };
        let mut folders = threads.flatten().map(|thread| thread.path());
        let vcpu = folders.find(is_vcpu).with_context(|| format!("there is no thread {name}"))?;
        let times = fs::read_to_string(vcpu.join("schedstat")).context("read a thread's CPU time")?;
        let nanoseconds = times.split(' ').next().and_then(|time| time.parse().ok());
        Ok(Duration::from_nanos(nanoseconds.context("a thread's CPU time is no number")?))
    }

    /// Returns the pages of RAM that take memory, as runs.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    pub(crate) fn private_pages(&self) -> Result<Vec<std::ops::Range<u32>>> {
        let ram = self.vm.ram();
        let mut runs = Vec::new();
        let pagemap = Pagemap::open().context("open the page map")?;
        pagemap.private(ram.range(0, ram.pages()), &mut runs).context("read the page map")?;
        Ok(runs)
    }

    /// Reads bytes of the guest's memory.
    ///
    /// # Errors
    /// Fails if there is no such memory.
    pub(crate) fn read_bytes(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        let view = self.vm.memory().view();
        view.read_slice(bytes, GuestAddress(address)).with_context(|| format!("read from {address:#x}"))
    }

    /// Reads a byte of the guest's memory.
    ///
    /// # Errors
    /// Fails if there is no such memory.
    pub(crate) fn read(&self, address: u64) -> Result<u8> {
        let view = self.vm.memory().view();
        view.read_obj(GuestAddress(address)).with_context(|| format!("read from {address:#x}"))
    }

    /// Writes to the guest's memory, like a device.
    ///
    /// # Errors
    /// Fails if there is no such memory.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let view = self.vm.memory().view();
        view.write_slice(bytes, GuestAddress(address)).with_context(|| format!("write to {address:#x}"))
    }
}

/// Lets guests verify their memory a last time and end.
///
/// # Errors
/// Fails if a page is corrupt: a benchmark of sharing that loses content measures nothing.
pub(crate) fn finish(bench: &Bench, guests: Vec<Guest>) -> Result<()> {
    for Guest { vm, .. } in &guests {
        ensure!(vm.serial_input(b"q") == 1, "VM {} takes no input", vm.name());
    }
    for guest in guests {
        let corrupt = guest.wait_for(bench, "its end", |report| match report {
            Report::Done { corrupt, .. } => Some(*corrupt),
            _ => None,
        })?;
        ensure!(corrupt == 0, "VM {} found {corrupt} corrupt pages", guest.vm.name());
        guest.vm.wait();
    }
    Ok(())
}

/// Fails for reports of errors.
fn sound(vm: &str, report: Report) -> Result<Report> {
    match report {
        Report::Corrupt { .. } | Report::BlkCorrupt { .. } | Report::Error { .. } | Report::Fault { .. } => {
            bail!("the guest of VM {vm} says: {report:?}")
        }
        report => Ok(report),
    }
}

/// Returns the offline oracle's report about the guests' memory. Nothing may be shared yet, and the guests
/// must be idle.
///
/// # Errors
/// Fails if memory cannot be read.
pub(crate) fn ask_oracle(guests: &[Guest]) -> Result<oracle::Report> {
    let mut oracle = Oracle::new().context("make an oracle")?;
    for guest in guests {
        let mut image = oracle.image(guest.vm.name());
        let pages = guest.vm.ram().pages();
        let mut next = 0;
        for run in guest.private_pages()? {
            image.untouched((run.start - next).into());
            next = run.end;
            for page in run {
                let mut content = [0; PAGE_SIZE];
                let view = guest.vm.memory().view();
                view.read_slice(&mut content, address_of(&guest.vm, page)).context("read a guest's page")?;
                image.page(&content)?;
            }
        }
        image.untouched((pages - next).into());
    }
    Ok(oracle.report())
}

/// Returns the guest-physical address of a page of RAM.
fn address_of(vm: &Vm, page: u32) -> GuestAddress {
    let offset = u64::from(page) * PAGE_SIZE as u64;
    let slots = vm.memory().slots().iter().map(|slot| slot.range);
    let range = slots.into_iter().rfind(|range| range.ram_offset <= offset);
    GuestAddress(range.map_or(offset, |range| range.gpa + (offset - range.ram_offset)))
}

/// The console of one guest. Turns lines into reports.
struct Lines {
    line: Vec<u8>,
    reports: Sender<Report>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let report = std::str::from_utf8(&self.line).ok().and_then(|line| Report::parse(line).ok());
            if let Some(report) = report {
                // The receiver is gone when the guest does not matter any more.
                let _ = self.reports.send(report);
            }
            self.line.clear();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until the engine has merged all it can. This is the case when the savings have not grown by a
/// thousandth for longer than the engine's delay before retries.
///
/// # Errors
/// Fails if this takes longer than `limit`, or if the benchmark is interrupted.
pub(crate) fn until_still(bench: &Bench, sharing: &Sharing, limit: Duration) -> Result<EngineStatistics> {
    let started = Instant::now();
    let (mut most, mut since) = (0, started);
    loop {
        let now = sharing.statistics();
        let saved = now.pages_sharing + now.zero_pages;
        if saved > most + most / 1000 {
            (most, since) = (saved, Instant::now());
            ensure!(started.elapsed() < limit, "the engine does not come to rest: {now:?}");
        } else if since.elapsed() > STILL {
            return Ok(now);
        }
        bench.rest(SLICE)?;
    }
}

/// Waits until the engine has spent its saved CPU time, and needs on average no more than its default limit.
///
/// # Errors
/// Fails if the benchmark is interrupted.
pub(crate) fn until_steady(bench: &Bench, sharing: &Sharing) -> Result<()> {
    const STRETCH: Duration = Duration::from_millis(500);
    const CEILING: f64 = 0.1;
    let limit = Duration::from_secs(bench.size(30, 1));
    let started = Instant::now();
    let mut before = sharing.statistics().cpu_seconds;
    while started.elapsed() < limit {
        bench.rest(STRETCH)?;
        let now = sharing.statistics().cpu_seconds;
        if now - before < 1.2 * CEILING * STRETCH.as_secs_f64() {
            break;
        }
        before = now;
    }
    Ok(())
}
