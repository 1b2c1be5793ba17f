//! `samepage demo`: VMs of the embedded guest with partly identical memory. The engine merges the memory while the
//! guests run and verify every word of it.
//!
//! The guests fill their memory while the engine is paused, so that the demo can measure their memory without
//! sharing. Then the engine starts. Identical pages and pages of zeros are never rewritten, so the savings are known
//! exactly. A guest's own pages are rewritten all the time.

mod display;
mod patience;
mod summary;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::content::Class;
use samepage_resources::demo::layout::Arena;
use samepage_resources::demo::plan::{Classes, Plan, Rate};
use samepage_resources::demo::report::Report;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

use crate::cli::DemoArgs;
use display::{Display, mebibytes};
use patience::{PATIENCE, Patience};
use samepage_host::host_limits::HostMemory;
use samepage_host::statistics::{Sample, Sampler, rss_anon};
use samepage_machine::boot::ImageSource;
use samepage_machine::config::{ConsoleConfig, Size, VmConfig};
use samepage_machine::hypervisor::Hypervisor;
use samepage_machine::vm::{Vm, VmEnd};
use samepage_worker::machine::Machine;
use summary::Summary;

/// Memory of each VM, in bytes, and the part of it that the guest fills, in pages.
const MEMORY_BYTES: u64 = 128 << 20;
const ARENA_PAGES: u64 = 96 << 20 >> 12;
/// Rounds that each guest verifies after everything has been merged.
const ROUNDS_AFTER: u64 = 3;
/// How often the screen is drawn.
const REFRESH: Duration = Duration::from_millis(200);

/// The progress of a VM.
#[derive(Clone, Debug, Default)]
struct Progress {
    ready: bool,
    /// The vCPUs of a guest in which not all of them started, so that the first one works alone.
    alone_of: Option<u64>,
    rounds: u64,
    verified: u64,
    writes: u64,
    corrupt: u64,
    /// Wrong pages in all verifications, after the guest has reported its end.
    done: Option<u64>,
}

/// Runs the demo and prints its summary. The status is 0 only if every guest verified its memory and sharing saved
/// all identical pages.
pub(crate) fn main(args: &DemoArgs) -> Result<ExitCode> {
    let summary = run(args)?;
    let text =
        if args.json { serde_json::to_string_pretty(&summary)? + "\n" } else { format!("\n{summary}") };
    io::stdout().lock().write_all(text.as_bytes()).context("print the summary")?;
    Ok(if summary.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run(options: &DemoArgs) -> Result<Summary> {
    let hypervisor = Hypervisor::open()?;
    samepage_host::host_limits::raise_open_files();
    check_host(options.vms.into())?;
    let settings = Settings { cpu_percent: options.cpu, ..Settings::default() };
    let sharing = Arc::new(Sharing::start(settings).context("memory cannot be shared on this host")?);
    sharing.pause();
    let plan = Plan { cpus: options.vcpus, ..plan() };
    let counts = Arena::on_map(&plan, std::iter::once(0..MEMORY_BYTES))
        .context("lay out the guests' memory")?
        .counts();
    let can_save = counts.reclaimable(options.vms.into()) * PAGE_SIZE as u64;

    let (sender, reports) = mpsc::channel();
    let vms = (0..options.vms)
        .map(|index| {
            let plan = Plan { vm: index, ..plan.clone() };
            start(&hypervisor, &sharing, index as usize, &plan, sender.clone())
        })
        .collect::<Result<Vec<_>>>()?;
    drop(sender);

    let terminal = io::stdout().is_terminal() && !options.json;
    let mut display = if options.json { Display::off() } else { Display::new(terminal, can_save) };
    let mut demo = Demo {
        sampler: Sampler::new().context("read this process's page map")?,
        progress: vec![Progress::default(); vms.len()],
        sharing,
        vms,
        reports,
        started: Instant::now(),
    };

    display.phase("filling memory, nothing is shared yet");
    let filling = |demo: &Demo, sample: &Sample| Phase {
        finished: demo.progress.iter().all(|vm| vm.ready),
        steps: sample.resident_bytes,
    };
    if demo.until(&mut display, filling)?.is_none() {
        let ready = demo.progress.iter().filter(|vm| vm.ready).count();
        bail!(
            "{ready} of {} guests have filled their memory, and the others filled nothing for {} s",
            demo.vms.len(),
            PATIENCE.as_secs()
        );
    }
    let before_bytes = rss_anon().context("measure memory")?;
    let filled = Instant::now();
    demo.sharing.resume();
    display.phase("guests run, and their memory is merged");
    let merged = demo.until(&mut display, |_, sample| Phase {
        finished: saved_pages(sample) * PAGE_SIZE as u64 >= can_save,
        steps: saved_pages(sample),
    })?;
    let merged_in = (filled.elapsed(), demo.sharing.statistics().cpu_seconds);
    display.phase("all identical pages are shared; guests go on verifying");
    let enough: Vec<_> = demo.progress.iter().map(|vm| vm.rounds + ROUNDS_AFTER).collect();
    let last = match merged {
        Some(_) => demo.until(&mut display, |demo, _| {
            let rounds = || demo.progress.iter().zip(&enough).map(|(vm, enough)| (vm.rounds, *enough));
            Phase {
                finished: rounds().all(|(rounds, enough)| rounds >= enough),
                steps: rounds().map(|(rounds, enough)| rounds.min(enough)).sum(),
            }
        })?,
        None => None,
    };
    let last = match last {
        Some(sample) => sample,
        None => demo.sample()?,
    };
    for vm in &demo.vms {
        vm.serial_input(b"q");
    }
    display.phase("a last verification of every page");
    demo.until(&mut display, |demo, _| {
        let done = demo.progress.iter().filter(|vm| vm.done.is_some()).count();
        Phase { finished: done == demo.progress.len(), steps: done as u64 }
    })?;
    // A guest that is not done would keep the demo waiting for ever.
    let end = |(vm, progress): (&Vm, &Progress)| if progress.done.is_some() { vm.wait() } else { vm.stop() };
    let ends: Vec<_> = demo.vms.iter().zip(&demo.progress).map(end).collect();
    display.finish();
    Ok(Summary::new(&demo.progress, &ends, &last, before_bytes, can_save, merged_in))
}

/// Checks that the host has memory for the guests before any of it is shared.
fn check_host(vms: u64) -> Result<()> {
    let needed = vms * ARENA_PAGES * PAGE_SIZE as u64;
    if let Some(HostMemory { available, limited_by }) = HostMemory::measure() {
        ensure!(
            needed <= available,
            "{vms} guests fill {} before sharing begins, and there are {} ({limited_by}); give fewer --vms",
            mebibytes(needed),
            mebibytes(available)
        );
    }
    Ok(())
}

/// Returns the plan of each guest: pages of all classes in runs of 256 KiB, own pages rewritten until the demo ends.
fn plan() -> Plan {
    Plan {
        pages: Some(ARENA_PAGES),
        rate: Rate::PerSecond(500),
        write: Classes::new(&[Class::Own]),
        rounds: 0,
        every_ms: 100,
        ..Plan::default()
    }
}

fn saved_pages(sample: &Sample) -> u64 {
    sample.engine.pages_sharing + sample.engine.zero_pages
}

fn start(
    hypervisor: &Hypervisor,
    sharing: &Arc<Sharing>,
    index: usize,
    plan: &Plan,
    reports: Sender<(usize, Report)>,
) -> Result<Vm> {
    let kernel = ImageSource::Bytes { name: "embedded guest", bytes: DEMO_GUEST.into() };
    let mut config = VmConfig::new(format!("demo-{index}"), kernel);
    config.spec.memory = Size(MEMORY_BYTES);
    config.spec.vcpus = plan.cpus;
    config.spec.cmdline = plan.to_string();
    config.sharing = Some(Arc::clone(sharing));
    config.console = ConsoleConfig::Sink(Box::new(Lines { index, line: Vec::new(), reports }));
    let vm = Vm::build(config, hypervisor).with_context(|| format!("start VM demo-{index}"))?;
    vm.start();
    Ok(vm)
}

/// The console of one guest. Turns lines into reports.
struct Lines {
    index: usize,
    line: Vec<u8>,
    reports: Sender<(usize, Report)>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            if let Some(report) =
                std::str::from_utf8(&self.line).ok().and_then(|line| Report::parse(line).ok())
            {
                // The receiver is gone when the demo has ended.
                let _ = self.reports.send((self.index, report));
            }
            self.line.clear();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How far a phase of the demo is.
struct Phase {
    finished: bool,
    /// Counts up while the phase moves, in any unit.
    steps: u64,
}

struct Demo {
    sharing: Arc<Sharing>,
    vms: Vec<Vm>,
    reports: Receiver<(usize, Report)>,
    progress: Vec<Progress>,
    sampler: Sampler,
    started: Instant,
}

impl Demo {
    fn sample(&self) -> Result<Sample> {
        self.sampler
            .sample(Some(&self.sharing), self.vms.iter().map(|vm| vm as &dyn Machine))
            .context("take statistics")
    }

    /// Processes reports and draws until the phase is finished. Returns the last sample, or `None` if the phase makes no
    /// progress.
    fn until(
        &mut self,
        display: &mut Display,
        phase: impl Fn(&Self, &Sample) -> Phase,
    ) -> Result<Option<Sample>> {
        let mut patience = Patience::new(Instant::now());
        loop {
            let refresh = Instant::now() + REFRESH;
            loop {
                match self.reports.recv_timeout(refresh.saturating_duration_since(Instant::now())) {
                    Ok((index, report)) => self.progress[index].take(&report),
                    Err(RecvTimeoutError::Timeout) => break,
                    // All consoles are closed: the VMs have ended.
                    Err(RecvTimeoutError::Disconnected) => break,
                }
            }
            let sample = self.sample()?;
            display.draw(self.started.elapsed(), &sample, &self.progress);
            let Phase { finished, steps } = phase(self, &sample);
            if finished {
                return Ok(Some(sample));
            }
            let ends: Vec<_> = self.vms.iter().map(Vm::end).collect();
            // A guest's reports before its end have been sent by now.
            while let Ok((index, report)) = self.reports.try_recv() {
                self.progress[index].take(&report);
            }
            for ((vm, end), progress) in self.vms.iter().zip(ends).zip(&self.progress) {
                match end {
                    Some(VmEnd::Reset) if progress.done.is_some() => {}
                    Some(end) => bail!("VM {} ended too early: {end}", vm.name()),
                    None => {}
                }
            }
            if patience.is_over(steps, Instant::now()) {
                return Ok(None);
            }
        }
    }
}

impl Progress {
    fn take(&mut self, report: &Report) {
        match report {
            Report::Ready { .. } => self.ready = true,
            Report::Processors { asked, working, .. } if working < asked => self.alone_of = Some(*asked),
            Report::Round { round, verified, writes, .. } => {
                self.rounds = *round;
                self.verified += verified;
                self.writes += writes;
            }
            Report::Corrupt { .. } => self.corrupt += 1,
            Report::Done { corrupt, .. } => self.done = Some(*corrupt),
            _ => {}
        }
    }
}
