//! The cost of the first write to a merged page, by the number of VMs in the process. It is compared with the
//! same write to a plain private mapping of a file. In both cases the kernel copies the page, and notifies
//! every VM of the process that a page is about to change.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use samepage_machine::Hypervisor;
use samepage_resources::demo::content::mix;
use samepage_resources::demo::plan::Plan;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;

use super::guests::{Guest, MEMORY, halting};
use super::mapping::Mapping;
use crate::context::Bench;
use crate::cpu::{self, micros_each};
use crate::report::{Goal, Measurement, Section};

/// Number of VMs in the process.
const VMS: [u32; 4] = [1, 8, 32, 64];
/// Memory of the VMs whose memory does not change.
const SMALL: u64 = 16 << 20;
/// The guest-physical addresses of the first VM's two halves with alike pages.
const HALVES: [u64; 2] = [32 << 20, 64 << 20];
/// Pages in a run.
const RUN: u64 = 64;
/// Time limit for merging.
const LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);
const TITLE: &str = "A write to a merged page, beside the kernel's own copy on write";
const UNIT: &str = "µs";

pub(crate) fn measure(bench: &Bench) -> Result<Vec<Section>> {
    super::on_vms(bench, TITLE, on)
}

fn on(bench: &Bench, hypervisor: &Hypervisor) -> Result<Vec<Section>> {
    let pages = bench.size(4096, 512);
    let mut section = Section::new(TITLE, "merged page", "plain private mapping");
    let plain = rounds(bench, || plain(pages))?;
    section.push(Measurement::new("no VM", UNIT, &[], &plain));
    for vms in VMS.into_iter().take(bench.size(VMS.len(), 2)) {
        let name = format!("{vms} VM{}", if vms == 1 { "" } else { "s" });
        bench.say(&name);
        let host = Host::new(bench, hypervisor, vms, pages)?;
        let mut number = 0;
        let (ours, others) = bench.in_turns(
            &name,
            || {
                number += 1;
                host.breaks(bench, number).map(Some)
            },
            || self::plain(pages).map(Some),
        )?;
        let measurement = Measurement::new(name, UNIT, &ours, &others);
        section.push(if vms == 1 { measurement.goal(Goal::RatioAtMost(1.3)) } else { measurement });
    }
    section.note("CPU time of a thread of the host that writes to each page once, after it has read each");
    section.note("the pages lie in runs of 64; the engine does nothing meanwhile");
    Ok(vec![section])
}

fn rounds(bench: &Bench, mut measure: impl FnMut() -> Result<f64>) -> Result<Vec<f64>> {
    (0..bench.rounds).map(|_| bench.check().and_then(|()| measure())).collect()
}

/// Returns the time for each first write to a private mapping of a file in memory, in microseconds.
fn plain(pages: u64) -> Result<f64> {
    let mut file: File = memfd_create("plain", MemfdFlags::CLOEXEC).context("make a memory file")?.into();
    (0..pages).try_for_each(|page| file.write_all(&content(0, page))).context("fill a memory file")?;
    let mut mapping = Mapping::of_file(&file, pages as usize).context("map a memory file")?;
    let zeros = (0..mapping.pages()).filter(|&page| mapping.read(page) == 0).count();
    let ((), time) = cpu::of(|| (0..mapping.pages()).for_each(|page| mapping.write(page)));
    ensure!(zeros < pages as usize, "a file shows nothing but zeros");
    Ok(micros_each(time, pages))
}

fn content(seed: u64, page: u64) -> Vec<u8> {
    let words = (0..PAGE_SIZE as u64 / 8).map(|word| mix(seed << 40 | page << 9 | word));
    words.flat_map(u64::to_le_bytes).collect()
}

/// A process with VMs whose guests halt. The first one's memory holds each page twice.
struct Host {
    sharing: Arc<Sharing>,
    guests: Vec<Guest>,
    pages: u64,
}

impl Host {
    fn new(bench: &Bench, hypervisor: &Hypervisor, vms: u32, pages: u64) -> Result<Self> {
        let settings = Settings { cpu_percent: 100.0, ..Settings::default() };
        let sharing = Arc::new(Sharing::start(settings)?);
        let plan = Plan { pages: Some(1), ..halting() };
        let mut guests = Guest::start_all(hypervisor, &plan, 1, MEMORY, Some(&sharing))?;
        let others = Plan { vm: 1, ..plan };
        guests.extend(Guest::start_all(hypervisor, &others, vms - 1, SMALL, Some(&sharing))?);
        guests.iter().try_for_each(|guest| guest.wait_filled(bench))?;
        Ok(Self { sharing, guests, pages })
    }

    /// Returns the time for each write to a merged page, in microseconds.
    fn breaks(&self, bench: &Bench, number: u64) -> Result<f64> {
        let guest = &self.guests[0];
        // Pages without memory between runs keep the runs separate.
        let addresses =
            |half: u64| (0..self.pages).map(move |page| half + (page + page / RUN) * PAGE_SIZE as u64);
        let before = self.sharing.statistics().merges;
        for half in HALVES {
            for (page, address) in (0..).zip(addresses(half)) {
                guest.write(address, &content(number, page))?;
            }
        }
        self.until(bench, before + 2 * self.pages)?;
        self.sharing.pause();
        for address in addresses(HALVES[1]) {
            guest.read(address)?;
        }
        let (written, time) =
            cpu::of(|| addresses(HALVES[1]).try_for_each(|address| guest.write(address, &[1])));
        written?;
        self.sharing.resume();
        Ok(micros_each(time, self.pages))
    }

    /// Waits for this number of merges since the start.
    fn until(&self, bench: &Bench, merges: u64) -> Result<()> {
        let started = Instant::now();
        loop {
            let now = self.sharing.statistics();
            if now.merges >= merges {
                return Ok(());
            }
            ensure!(started.elapsed() < LIMIT, "not everything is merged: {now:?}");
            bench.rest(POLL)?;
        }
    }
}
