//! Memory in which some pages are rewritten continuously. Both sides work as usual: the engine on its own
//! thread with its default limit, and KSM in each of its modes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use samepage_sharing::changes::ChangeLog;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::{Sharing, SharingSpec};

use super::context::Bench;
use super::kernels::Kernels;
use super::ksm::Mode;
use super::layout::{Layout, own};
use super::memory::Memory;
use super::report::{Measurement, Section};

/// One page in this many changes continuously.
const CHANGING: u32 = 10;
/// Interval in which each of these is rewritten.
const EVERY: Duration = Duration::from_millis(100);

/// The results of one side after some time.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    /// CPU time per second, in milliseconds.
    cpu: f64,
    /// Pages merged at the end, in percent of the identical idle pages.
    merged: f64,
}

pub(super) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    let layout = Layout::mixed(2, bench.size(16_384, 4096), 50, 16);
    let settle = Duration::from_millis(bench.size(4000, 500));
    let stretch = Duration::from_millis(bench.size(4000, 500));
    bench.say("samepage");
    let ours = engines(bench, &layout, settle, stretch)?;
    let mut sections = Vec::new();
    for mode in Mode::ALL {
        bench.say(mode.name());
        let other = kernels(bench, &layout, mode, settle, stretch)?;
        let title = "2 VMs, half alike, a tenth of all pages rewritten 10 times a second";
        let mut section = Section::new(title, "samepage", mode.name());
        let cpu: Vec<_> = other.iter().map(|other| other.cpu).collect();
        section.push(Measurement::new("CPU time", "ms/s", &[ours.cpu], &cpu));
        let merged: Vec<_> = other.iter().map(|other| other.merged).collect();
        section.push(Measurement::new("merged of what is alike and at rest", "%", &[ours.merged], &merged));
        section.note(format!("measured once, for {stretch:?} after {settle:?}"));
        sections.push(section);
    }
    Ok(sections)
}

/// Returns the number of pages that can be merged while others change.
fn at_rest(layout: &Layout) -> u64 {
    let mut rest = layout.clone();
    for (vm, contents) in rest.vms.iter_mut().enumerate() {
        for page in (0..contents.len()).step_by(CHANGING as usize) {
            contents[page] = Some(own((layout.vms.len() + vm) as u64, page as u64));
        }
    }
    rest.duplicates()
}

/// Rewrites pages until `work` has ended.
fn meanwhile<T>(memory: &[Memory], work: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut due = Instant::now();
            for round in 0_u64.. {
                for vm in memory {
                    for page in (0..vm.pages()).step_by(CHANGING as usize) {
                        vm.write_word(page, 0, round);
                    }
                }
                due += EVERY;
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        });
        let stop = Stop(&stop);
        let result = work();
        drop(stop);
        result
    })
}

/// Ends the writes, also after a panic.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn engines(bench: &Bench, layout: &Layout, settle: Duration, stretch: Duration) -> Result<Outcome> {
    let memory = Memory::filled(layout)?;
    meanwhile(&memory, || {
        let sharing = Sharing::start(Settings::default())?;
        let members = memory.iter().map(|vm| {
            let log: Box<dyn ChangeLog> = Box::new(vm.log());
            sharing.add(vm.ram(), Some(log), &SharingSpec::default(), Box::new(|_| {}))
        });
        let members = members.collect::<Result<Vec<_>, _>>()?;
        bench.rest(settle)?;
        let before = sharing.statistics();
        bench.rest(stretch)?;
        let after = sharing.statistics();
        drop(members);
        let merged = after.pages_shared + after.pages_sharing;
        Ok(Outcome {
            cpu: (after.cpu_seconds - before.cpu_seconds) * 1000.0 / stretch.as_secs_f64(),
            merged: merged as f64 * 100.0 / at_rest(layout) as f64,
        })
    })
}

fn kernels(
    bench: &Bench,
    layout: &Layout,
    mode: Mode,
    settle: Duration,
    stretch: Duration,
) -> Result<Option<Outcome>> {
    let Some(kernels) = Kernels::new(bench, mode, Memory::filled(layout)?)? else { return Ok(None) };
    meanwhile(kernels.vms(), || {
        kernels.work(bench, settle, |_, _| false)?;
        let work = kernels.work(bench, stretch, |_, _| false)?;
        Ok(Some(Outcome {
            cpu: work.cpu.as_secs_f64() * 1000.0 / work.wall.as_secs_f64(),
            merged: work.counts.merged as f64 * 100.0 / at_rest(layout) as f64,
        }))
    })
}
