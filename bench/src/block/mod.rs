//! `samepage bench block`: measures how fast guests read and write disks. The same guest does the same
//! requests with several policies, and under QEMU. No block is read twice, so no cache has any hits: the
//! results show the cost of a policy.

mod qemu;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use samepage_devices::disk::CachePolicy;
use samepage_machine::{DiskSpec, Hypervisor};
use samepage_resources::demo::client::{BLOCK_BYTES, ClientPlan, Pattern};
use samepage_resources::demo::plan::Plan;
use samepage_sharing::blocks::CacheSize;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use serde::Serialize;

use super::context::Bench;
use super::cpu;
use super::disk::client::{self, Work};
use super::disk::default_folder;
use super::disk::image::Image;
use super::report::{Goal, Measurement, Section, kernel};
use super::table;
use super::vms::guests::{self, Guest};
use super::vms::kvm;
use qemu::Qemu;

/// Blocks of a large request.
const LARGE: u32 = 32;
/// Requests in flight, if there are several.
const DEEP: u32 = 32;
/// The disk's size divided by that of the host's cache, so that the cache fills up and evicts.
const CACHE_DIVISOR: u64 = 8;
/// Blocks that a disk for several VMs may read into the cache before the first hit.
const CREDIT: u32 = (64 << 20) / BLOCK_BYTES as u32;
/// A pause after a pass, long enough to read counters.
const PAUSE_MS: u64 = 200;
/// Default number of rounds.
const ROUNDS: u32 = 5;

const EXAMPLES: &str = "\
Examples:
  The file system that disk images will be on:
    samepage bench block --folder /var/lib/images

  A first impression:
    samepage bench block --quick";

/// The arguments of `samepage bench block`.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct BlockArgs {
    /// Folder for two disk images, which are removed at the end [default: the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,

    /// Size of each image, in MiB [default: 512, or 32 with --quick]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    size: Option<u64>,

    /// Rounds of each measurement; medians are printed [default: 5, or 1 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,

    /// Measure only requests whose names contain this, such as "reads" or "sequential reads, 128 KiB"
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Use a small image and one round, for a first impression
    #[arg(long)]
    quick: bool,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(super) json: bool,
}

/// A run's results.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Release of the host's kernel.
    kernel: String,
    /// The kind of KVM.
    kvm: String,
    processors: usize,
    rounds: u32,
    /// Duration of the run, in seconds.
    seconds: f64,
    sections: Vec<Section>,
}

impl Report {
    /// Returns the results as text.
    pub(super) fn format(&self) -> String {
        let mut text = format!(
            "Linux {}, {} processors, {}; medians of {} rounds, with quartiles\n",
            self.kernel, self.processors, self.kvm, self.rounds
        );
        self.sections.iter().for_each(|section| table::add(&mut text, section));
        text + &format!("\ntook {:.0} s\n", self.seconds)
    }
}

/// The work of a guest.
#[derive(Clone, Copy, Debug)]
struct Load {
    writes: bool,
    /// Whether requests are far apart instead of consecutive.
    spread: bool,
    /// Blocks of a request.
    run: u32,
    depth: u32,
}

impl Load {
    fn all() -> impl Iterator<Item = Self> {
        let both = [false, true];
        both.into_iter().flat_map(move |writes| {
            both.into_iter().flat_map(move |spread| {
                [1, LARGE].into_iter().flat_map(move |run| {
                    [1, DEEP].into_iter().map(move |depth| Self { writes, spread, run, depth })
                })
            })
        })
    }

    fn name(self) -> String {
        format!(
            "{} {}, {} KiB, {} in flight",
            if self.spread { "random" } else { "sequential" },
            if self.writes { "writes" } else { "reads" },
            (u64::from(self.run) * BLOCK_BYTES) >> 10,
            self.depth
        )
    }

    fn plan(self, blocks: u32, quick: bool) -> Plan {
        // Small single requests take so long that a part of the disk is enough.
        let part = if self.run == 1 && self.depth == 1 { 16 } else { 1 };
        let part = if quick { part.min(4) } else { part };
        let client = ClientPlan {
            // Room only for the requests in flight, so that the guest's cache has no hits.
            pages: (self.depth + 1) * self.run + 64,
            blocks,
            run: self.run,
            reads: if self.spread { Pattern::Spread } else { Pattern::Scan },
            units: u64::from(blocks / self.run / part),
            writes: if self.writes { 100 } else { 0 },
            check: false,
            ..ClientPlan::default()
        };
        client::plan(client, self.depth, 1, 0)
    }
}

/// The server of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// samepage with a policy, without sharing.
    Samepage(CachePolicy),
    /// samepage with a policy and the sharing engine, as usual.
    Shared(CachePolicy),
    /// The same with a disk that several VMs may read.
    ReadOnly(CachePolicy),
    Qemu,
}

const SIDES: [Side; 5] = [
    Side::Samepage(CachePolicy::None),
    Side::Shared(CachePolicy::None),
    Side::Shared(CachePolicy::Exclusive),
    Side::Samepage(CachePolicy::Buffered),
    Side::Qemu,
];

/// The sides of a first pass over a disk that several VMs may read.
const FIRST: [Side; 2] = [Side::ReadOnly(CachePolicy::None), Side::ReadOnly(CachePolicy::Exclusive)];

/// The results of a guest, and their cost.
#[derive(Clone, Copy, Debug)]
struct Done {
    work: Work,
    /// CPU time without the vCPU's, if it is known.
    cpu: Option<Duration>,
}

impl Done {
    /// Returns a time for each request, in microseconds.
    fn each(&self, micros: f64) -> f64 {
        micros / self.work.requests.max(1) as f64
    }
}

struct Run {
    bench: Bench,
    hypervisor: Hypervisor,
    qemu: Result<Qemu, String>,
    /// One image to read and one to write, so that reads get the initial content.
    images: [Image; 2],
    blocks: u32,
    /// A part of the names of the requests to measure.
    only: String,
}

/// Measures everything.
///
/// # Errors
/// Fails if VMs cannot be built, or if the run is interrupted. Without QEMU, there is a note.
pub(super) fn measure(args: &BlockArgs) -> Result<Report> {
    let started = Instant::now();
    let hypervisor = Hypervisor::open()?;
    let rounds = args.runs.unwrap_or(if args.quick { 1 } else { ROUNDS });
    let bench = Bench::without_ksm(args.quick, rounds)?;
    let folder = args.folder.clone().unwrap_or_else(default_folder);
    let bytes = args.size.unwrap_or(bench.size(512, 32)) << 20;
    let blocks = bytes / BLOCK_BYTES;
    let image = |name| Image::create(&folder, name, Plan::default().seed, blocks);
    let images = [image("reads")?, image("writes")?];
    let blocks = u32::try_from(blocks).context("the image has more blocks than can be counted")?;
    let qemu = Qemu::find(&folder);
    let only = args.only.clone().unwrap_or_default();
    if !Load::all().any(|load| load.name().contains(&only)) {
        let names: Vec<_> = Load::all().map(Load::name).collect();
        bail!("find requests called {only:?}: there are {}", names.join("; "));
    }
    let run = Run { bench, hypervisor, qemu, images, blocks, only };
    let sections = run.sections()?;
    run.bench.end();
    Ok(Report {
        kernel: kernel(),
        kvm: kvm::kind(),
        processors: std::thread::available_parallelism().map_or(1, Into::into),
        rounds,
        seconds: started.elapsed().as_secs_f64(),
        sections,
    })
}

impl Run {
    fn sections(&self) -> Result<Vec<Section>> {
        let mut exclusive = Section::new("Cost of a cache that never hits", "exclusive", "none");
        let mut first = Section::new("First 64 MiB of a disk that several VMs may read", "exclusive", "none");
        let mut buffered =
            Section::new("Through the kernel's page cache, emptied before", "buffered", "none");
        let mut beside = Section::new("Past all caches, beside QEMU", "samepage, none", "QEMU");
        beside.note("QEMU: microvm, virtio-blk by virtio-mmio, cache=none, aio=io_uring; the same guest");
        if let Err(reason) = &self.qemu {
            beside.note(reason.clone());
        }
        for load in Load::all().filter(|load| load.name().contains(&self.only)) {
            let [none, shared, ours, cached, qemu] = self.work(load, SIDES, self.blocks)?;
            add(&mut exclusive, load, &ours, &shared, Some(Goal::RatioAtMost(1.05)));
            add(&mut buffered, load, &cached, &none, None);
            add(&mut beside, load, &none, &qemu, None);
            if !load.writes {
                let [none, ours] = self.work(load, FIRST, self.blocks.min(CREDIT))?;
                add(&mut first, load, &ours, &none, None);
            }
        }
        first.note("all of it goes through the cache, so that a second VM finds it there");
        let mut sections = [exclusive, first, buffered, beside];
        for section in &mut sections[..2] {
            section.note("the sharing engine runs beside both");
        }
        for section in &mut sections {
            section.note("time: of the guest's, for each request, with as many in flight as said; p50, p99: of a request");
            section.note("CPU: for each request, all threads of the process but the vCPU's");
        }
        Ok(sections.into())
    }

    /// Returns the results of each side for this number of blocks, in each round. The sides alternate in
    /// going first.
    fn work<const N: usize>(&self, load: Load, sides: [Side; N], blocks: u32) -> Result<[Vec<Done>; N]> {
        let mut done = sides.map(|_| Vec::new());
        for round in 0..self.bench.rounds {
            self.bench.say(format_args!("{}, round {} of {}", load.name(), round + 1, self.bench.rounds));
            for turn in 0..N {
                let index = (turn + round as usize) % N;
                let image = &self.images[usize::from(load.writes)];
                image.forget()?;
                let plan = load.plan(blocks, self.bench.quick);
                done[index].extend(match (sides[index], &self.qemu) {
                    (Side::Qemu, Ok(qemu)) => {
                        Some(Done { work: qemu.work(&self.bench, image.path(), &plan)?, cpu: None })
                    }
                    (Side::Qemu, Err(_)) => None,
                    (side, _) => Some(self.samepage(side, image.path(), &plan)?),
                });
            }
        }
        Ok(done)
    }

    fn samepage(&self, side: Side, image: &Path, plan: &Plan) -> Result<Done> {
        let (policy, shares, readonly) = match side {
            Side::Samepage(policy) => (policy, false, false),
            // As for disks by default: they are writable, so no other VM can read them.
            Side::Shared(policy) => (policy, true, false),
            Side::ReadOnly(policy) => (policy, true, true),
            Side::Qemu => bail!("QEMU's guests are not samepage's"),
        };
        let sharing = if shares {
            let size = CacheSize::Bytes(u64::from(self.blocks) * BLOCK_BYTES / CACHE_DIVISOR);
            Some(Arc::new(Sharing::start(Settings { block_cache: size, ..Settings::default() })?))
        } else {
            None
        };
        let disks = vec![DiskSpec { readonly, ..client::disk(image, policy, plan) }];
        let memory = client::memory(plan);
        // The guest waits after its pass, so that its vCPU's thread still exists for the measurement.
        let plan = Plan { rounds: 0, every_ms: PAUSE_MS, ..plan.clone() };
        let guests = [Guest::start_with_disks(&self.hypervisor, &plan, memory, sharing.as_ref(), disks)?];
        // The vCPU has done almost nothing, and its thread may not have its name yet.
        let before = cpu::of_this_process();
        let work = client::wait_pass(&self.bench, &guests[0])?;
        let cpu = guests::cpu_beside(&guests)?.saturating_sub(before);
        guests[0].vm.stop();
        Ok(Done { work, cpu: Some(cpu) })
    }
}

fn add(section: &mut Section, load: Load, ours: &[Done], others: &[Done], goal: Option<Goal>) {
    let mut figure = |what: &str, figure: fn(&Done) -> Option<f64>, goal: Option<Goal>| {
        let [ours, others] = [ours, others].map(|done| done.iter().filter_map(figure).collect::<Vec<_>>());
        let measurement = Measurement::new(format!("{}, {what}", load.name()), "µs", &ours, &others);
        section.push(match goal {
            Some(goal) => measurement.goal(goal),
            None => measurement,
        });
    };
    figure("time", |done| Some(done.each(done.work.us as f64)), goal);
    figure("p50", |done| Some(done.work.p50), None);
    figure("p99", |done| Some(done.work.p99), None);
    figure("CPU", |done| done.cpu.map(|cpu| done.each(cpu.as_secs_f64() * 1e6)), None);
}
