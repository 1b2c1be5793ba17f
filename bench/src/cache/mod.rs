//! `samepage bench cache`: compares the policies for disk blocks at equal memory. Guests read a disk through
//! their own page caches, verify every block, and report their hits. The host reports the rest.

mod cell;
mod copies;
mod page_cache;
mod report;
mod workload;

use std::fs;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::PossibleValuesParser;
use samepage_devices::disk::CachePolicy;
use samepage_machine::Hypervisor;
use samepage_resources::demo::client::ClientPlan;
use samepage_resources::demo::plan::Plan;

use super::context::{Bench, Interrupted};
use super::disk::default_folder;
use super::disk::image::Image;
use super::replay::{self, ReplayArgs};
use super::report::{Goal, Measurement, Section};
use cell::{Cell, Setting};
pub(super) use report::Report;
use workload::Workload;

/// Sizes of the host's cache, in halves of the guest's.
const HOSTS: [u32; 3] = [1, 2, 4];
/// The policies in the order of measurement.
const POLICIES: [CachePolicy; 5] = [
    CachePolicy::Exclusive,
    CachePolicy::Scrub,
    CachePolicy::Inclusive,
    CachePolicy::None,
    CachePolicy::Buffered,
];
/// The workload for variants and goals.
const USUAL: Workload = Workload::Zipf(90);
/// Blocks that a guest with readahead reads at once.
const READAHEAD: u32 = 32;

const EXAMPLES: &str = "\
Examples:
  Everything, in about a quarter of an hour:
    samepage bench cache

  One workload, on the file system that disk images will be on:
    samepage bench cache --only zipf-0.9 --folder /var/lib/images

  A first impression:
    samepage bench cache --quick --json";

/// The arguments of `samepage bench cache`.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CacheArgs {
    /// Measure only this workload; may be repeated
    #[arg(long = "only", value_name = "NAME", value_parser = PossibleValuesParser::new(Workload::ALL.map(Workload::word)))]
    pub(super) only: Vec<String>,

    /// Size of a guest's page cache [default: 4096, or 512 with --quick]
    #[arg(long, value_name = "BLOCKS", value_parser = clap::value_parser!(u32).range(256..=1 << 18))]
    pub(super) guest: Option<u32>,

    /// Folder for disk images of at most a few hundred MiB, which are removed at the end [default: the folder
    /// for temporary files]
    #[arg(long, value_name = "DIR")]
    pub(super) folder: Option<PathBuf>,

    /// Use small sizes, for a first impression
    #[arg(long)]
    pub(super) quick: bool,

    /// Skip the simulation
    #[arg(long)]
    pub(super) no_simulation: bool,

    /// Print the results as JSON, and nothing else
    #[arg(long)]
    pub(super) json: bool,

    /// Draw the reads that reach the disk into this file, as SVG, by policy and size of the host's cache; for
    /// the first workload
    #[arg(long, value_name = "FILE")]
    pub(super) svg: Option<PathBuf>,
}

/// Measures everything.
///
/// # Errors
/// Fails if VMs cannot be built, or if the run is interrupted. A policy that this host cannot measure is
/// skipped with a note.
pub(super) fn measure(args: &CacheArgs) -> Result<Report> {
    let started = Instant::now();
    let hypervisor = Hypervisor::open()?;
    samepage_host::host_limits::raise_open_files();
    let mut run = Run {
        bench: Bench::without_ksm(args.quick, 1)?,
        hypervisor,
        folder: args.folder.clone().unwrap_or_else(default_folder),
        policies: POLICIES.to_vec(),
        notes: Vec::new(),
    };
    let guest = args.guest.unwrap_or(run.bench.size(4096, 512));
    let chosen: Vec<_> = Workload::ALL
        .into_iter()
        .filter(|workload| args.only.is_empty() || args.only.iter().any(|name| name == workload.word()))
        .collect();
    let mut cells = Vec::new();
    let mut goals = Section::new("Goals", "exclusive", "inclusive");
    for halves in HOSTS {
        let host = guest * halves / 2;
        let data = 2 * (guest + host);
        let image = run.image(data)?;
        for &workload in &chosen {
            let setting = Setting {
                workload,
                policy: CachePolicy::Exclusive,
                guest,
                host,
                data,
                vms: 1,
                client: ClientPlan::default(),
                depth: 1,
            };
            let row = run.row(&setting, &image)?;
            run.judge(&setting, halves, &row, &image, &mut goals)?;
            cells.extend(row);
        }
    }
    let (mut two_vms, mut variants) = (Vec::new(), Vec::new());
    if chosen.contains(&USUAL) {
        two_vms = run.two_vms(guest)?;
        variants = run.variants(guest)?;
    }
    run.bench.end();
    let simulation = (!args.no_simulation)
        .then(|| {
            let reads = run.bench.size(1_000_000, 50_000);
            replay::measure(&ReplayArgs {
                traces: Vec::new(),
                guest,
                reads,
                seed: NonZeroU32::MIN,
                json: false,
            })
        })
        .transpose()?;
    let report = Report {
        kernel: super::report::kernel(),
        kvm: super::vms::kvm::kind(),
        processors: std::thread::available_parallelism().map_or(1, Into::into),
        quick: args.quick,
        seconds: started.elapsed().as_secs_f64(),
        guest_blocks: guest,
        cells,
        two_vms,
        variants,
        goals,
        notes: run.notes,
        simulation,
    };
    if let Some(path) = &args.svg {
        fs::write(path, report.draw()?).with_context(|| format!("write the picture {}", path.display()))?;
    }
    Ok(report)
}

/// A run in progress.
struct Run {
    bench: Bench,
    hypervisor: Hypervisor,
    folder: PathBuf,
    /// The policies that this host can measure.
    policies: Vec<CachePolicy>,
    notes: Vec<String>,
}

impl Run {
    fn image(&self, blocks: u32) -> Result<Image> {
        Image::create(&self.folder, "cache", Plan::default().seed, blocks.into())
    }

    fn measure(&self, setting: &Setting, image: &Image) -> Result<Cell> {
        let name = setting.workload.name(setting.client, setting.depth);
        self.bench.say(format_args!("{name}, host {}, {}", setting.host, setting.policy));
        setting
            .measure(&self.bench, &self.hypervisor, image)
            .with_context(|| format!("measure {name} with the policy {}", setting.policy))
    }

    /// Measures all policies.
    fn row(&mut self, setting: &Setting, image: &Image) -> Result<Vec<Cell>> {
        let mut row = Vec::new();
        for policy in self.policies.clone() {
            match self.measure(&Setting { policy, ..*setting }, image) {
                Ok(cell) => row.push(cell),
                // Only a cgroup can limit the kernel's page cache, and not every user may create one.
                Err(error) if policy == CachePolicy::Buffered && !error.is::<Interrupted>() => {
                    self.policies.retain(|&policy| policy != CachePolicy::Buffered);
                    self.notes.push(format!("buffered is left out: {error:#}"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(row)
    }

    /// Compares the policies with their goals.
    fn judge(
        &self,
        setting: &Setting,
        halves: u32,
        row: &[Cell],
        image: &Image,
        goals: &mut Section,
    ) -> Result<()> {
        let cell = |policy: CachePolicy| row.iter().find(|cell| cell.policy == policy.to_string());
        let (Some(ours), Some(other)) = (cell(CachePolicy::Exclusive), cell(CachePolicy::Inclusive)) else {
            return Ok(());
        };
        let name = setting.workload.name(setting.client, setting.depth);
        let host = f64::from(halves) / 2.0;
        let percent = |cell: &Cell| [100.0 * cell.host_hit_ratio];
        let compare = |what: String, ours: &Cell, least: f64| {
            Measurement::new(what, "%", &percent(ours), &percent(other)).goal(Goal::RatioAtLeast(least))
        };
        let least = if setting.workload == USUAL && halves <= 2 { 2.0 } else { 1.0 };
        goals.push(compare(format!("host hits, {name}, host {host} x guest"), ours, least));
        if setting.workload == USUAL && halves == 4 {
            let smaller = Setting { host: setting.host * 2 / 3, ..*setting };
            let ours = self.measure(&smaller, image)?;
            goals.push(compare(
                format!("host hits with 2/3 of the memory, {name}, host {host} x guest"),
                &ours,
                1.0,
            ));
        }
        Ok(())
    }

    /// Measures two guests that read the same disk independently.
    fn two_vms(&mut self, guest: u32) -> Result<Vec<Cell>> {
        let data = 2 * (2 * guest + guest);
        let image = self.image(data)?;
        let setting = Setting {
            workload: USUAL,
            policy: CachePolicy::Exclusive,
            guest,
            host: guest,
            data,
            vms: 2,
            client: ClientPlan::default(),
            depth: 1,
        };
        self.row(&setting, &image)
    }

    /// Measures the effect of other ways to read.
    fn variants(&self, guest: u32) -> Result<Vec<Cell>> {
        let data = 4 * guest;
        let image = self.image(data)?;
        let base = ClientPlan::default();
        let ahead = ClientPlan { run: READAHEAD, ..base };
        let variants = [
            (ClientPlan { clear: true, ..base }, 1),
            (base, 8),
            (ahead, 1),
            (ClientPlan { clear: true, ..ahead }, 1),
            (ClientPlan { scatter: true, ..ahead }, 1),
            (ahead, 4),
        ];
        let mut cells = Vec::new();
        for (client, depth) in variants {
            for policy in [CachePolicy::Exclusive, CachePolicy::Inclusive] {
                let setting =
                    Setting { workload: USUAL, policy, guest, host: guest, data, vms: 1, client, depth };
                cells.push(self.measure(&setting, &image)?);
            }
        }
        Ok(cells)
    }
}
