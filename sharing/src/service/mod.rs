//! The sharing engine of a process at work: VMs join and leave, threads of its own look for what is
//! identical, under a ceiling of CPU time, and sleep while there is nothing to do.

#![expect(unsafe_code, reason = "asks for the size of memory")]

pub mod elsewhere;
pub(crate) mod group;
pub mod line;
pub(crate) mod pace;
pub(crate) mod worker;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub use samepage_spec::{DEFAULT_GROUP, SharingSpec};

use crate::blocks::admission::{Sample, Sampler};
use crate::blocks::statistics::CacheStatistics;
use crate::blocks::working_set::Curve;
use crate::blocks::{BlockRead, CacheSize, CopyOut, Image, ReadPlan, VmNumber};
use crate::changes::ChangeLog;
pub use crate::engine::discard::Discarded;
use crate::engine::trust::Stopped;
use crate::engine::{Engine, Mode, Settings};
use crate::frames::space::LostHandler;
use crate::frames::store::FrameStore;
use crate::inspect::audit::AuditReport;
use crate::inspect::by_type::{ClaimCount, Claimed};
use crate::inspect::map::{MapCell, Picture};
use crate::inspect::pairs::FrameSample;
use crate::inspect::statistics::{EngineStatistics, VmStatistics};
use crate::inspect::survey::{PageCount, Survey, VmCount};
use crate::memory::calls::MemoryCalls;
use crate::memory::content::Page;
use crate::memory::ram::{PAGE_SIZE, Ram};
use crate::memory::uffd::UffdError;
use crate::numbers::Slot;
use crate::policy::claims::ClaimSource;
use crate::policy::hints::{Hint, Hints};
use crate::service::group::{Group, Groups};
use crate::service::worker::Crew;
pub use crate::service::worker::Notice;

/// The slot of a VM that joined a group for which sharing had stopped.
const NO_SLOT: Slot = Slot::NONE;

/// Stack of a sharing thread, in bytes: no deep calls, no large locals.
const STACK_BYTES: usize = 256 << 10;

/// Why memory cannot be shared on this host. VMs run all the same.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Pages cannot be write-protected.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The memory file of the frames was refused.
    #[error("creating the frame store, a memory file: {0}")]
    Store(#[source] io::Error),
    /// Something else that the engine needs was refused.
    #[error("starting the sharing engine: {0}")]
    Engine(#[source] io::Error),
}

/// The sharing engine of a process, running.
#[derive(Debug)]
pub struct Sharing {
    crew: Arc<Crew>,
    threads: Vec<JoinHandle<()>>,
}

impl Sharing {
    /// Starts the engine with the running kernel's calls.
    ///
    /// # Errors
    /// Where this host cannot share memory; the error says how to enable it.
    pub fn start(settings: Settings) -> Result<Self, StartError> {
        let frames = settings.frames.unwrap_or_else(default_frames);
        let store = FrameStore::create(frames).map_err(StartError::Store)?;
        let groups = Groups::new(settings, frames);
        let calls = groups.calls(&store)?;
        Self::start_groups(groups, store, Box::new(calls))
    }

    /// Starts the engine with calls of the caller's, for a store of the caller's, which the default
    /// group uses.
    ///
    /// # Errors
    /// As [`Sharing::start`].
    pub fn start_with(
        settings: Settings,
        store: FrameStore,
        calls: Box<dyn MemoryCalls>,
    ) -> Result<Self, StartError> {
        let frames = settings.frames.unwrap_or_else(default_frames);
        Self::start_groups(Groups::new(settings, frames), store, calls)
    }

    fn start_groups(
        groups: Groups,
        store: FrameStore,
        calls: Box<dyn MemoryCalls>,
    ) -> Result<Self, StartError> {
        let cpu_percent = groups.settings().cpu_percent;
        groups.found(DEFAULT_GROUP, store, calls).map_err(StartError::Engine)?;
        let crew = Arc::new(Crew::new(groups, cpu_percent));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut sharing = Self { crew, threads: Vec::new() };
        for index in 0..threads(cpu_percent, cores) {
            let crew = Arc::clone(&sharing.crew);
            let thread = std::thread::Builder::new()
                .name(format!("sharing-{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || if index == 0 { crew.lead() } else { crew.help(index) })
                .map_err(StartError::Engine)?;
            sharing.threads.push(thread);
        }
        Ok(sharing)
    }

    /// Takes a VM's RAM in: it is shared until the membership ends. With a change log, effort follows
    /// the VM's changes; without one, all of its memory is scanned again and again. `on_lost` is
    /// called, from a sharing thread, when a part of it could not be kept: the VM must be stopped then.
    ///
    /// The RAM must be small pages ([`Ram::use_small_pages`]), and nothing may pin it for writing.
    ///
    /// # Errors
    /// Fails if the group cannot be put up or the RAM not be registered; it is not shared then and
    /// otherwise as before.
    pub fn add(
        &self,
        ram: Arc<Ram>,
        log: Option<Box<dyn ChangeLog>>,
        participation: &SharingSpec,
        on_lost: LostHandler,
    ) -> Result<Membership, StartError> {
        let group = self.crew.groups.join(&participation.group)?;
        let Some(mut engine) = group.engine.working() else {
            // It runs all the same; who asks is told that its group has stopped.
            return Ok(Membership {
                crew: Arc::clone(&self.crew),
                group,
                slot: NO_SLOT,
                hints: Arc::default(),
            });
        };
        let slot = match engine.add(ram, log, on_lost) {
            Ok(slot) => slot,
            Err(error) => {
                drop(engine);
                self.crew.groups.leave(&group);
                return Err(StartError::Engine(error));
            }
        };
        engine.set_mode(slot, participation.mode);
        let hints = engine.hints(slot).unwrap_or_default();
        drop(engine);
        self.crew.refresh();
        Ok(Membership { crew: Arc::clone(&self.crew), group, slot, hints })
    }

    /// Looks for nothing any more. What is shared stays so, and VMs come and go as before. A step
    /// that is under way ends first.
    pub fn pause(&self) {
        self.crew.pause();
    }

    /// Goes on after a [`pause`](Self::pause).
    pub fn resume(&self) {
        self.crew.resume();
    }

    /// The statistics of all groups together.
    #[must_use]
    pub fn statistics(&self) -> EngineStatistics {
        let (mut all, _) = self.crew.groups.statistics();
        all.cpu_seconds = self.crew.cpu().as_secs_f64();
        all
    }

    /// CPU time of the sharing threads. Waits for nothing.
    #[must_use]
    pub fn cpu_time(&self) -> Duration {
        self.crew.cpu()
    }

    /// The statistics of each group, by name. CPU time is not told apart.
    #[must_use]
    pub fn groups(&self) -> Vec<(String, EngineStatistics)> {
        self.crew.groups.statistics().1
    }

    /// Recounts everything and compares it with the metadata. Takes about a second for each 4 GiB of
    /// guest memory, in which nothing is merged; guests run on.
    ///
    /// # Errors
    /// Fails if the page maps cannot be read.
    pub fn audit(&self) -> io::Result<AuditReport> {
        let mut report = AuditReport::default();
        for group in self.crew.groups.all() {
            // The metadata of an engine that has stopped is known to be wrong.
            if let Some(audit) = group.engine.work(|engine| engine.audit()) {
                report.add(audit?);
            }
        }
        Ok(report)
    }

    /// The statistics of the caches of all groups together.
    #[must_use]
    pub fn cache(&self) -> CacheStatistics {
        let mut all = CacheStatistics::default();
        for group in self.crew.groups.all() {
            all.add(&group.engine.ask(|engine| engine.cache_statistics()).unwrap_or_default());
        }
        all
    }

    /// Changes how much memory disk blocks may take that no guest holds.
    pub fn set_cache_size(&self, size: CacheSize) {
        self.crew.groups.cache_limit().set_size(size);
        for group in self.crew.groups.all() {
            // A group without VMs takes no steps.
            while group.engine.work(|engine| engine.shrink_cache()) == Some(true) {}
        }
        self.crew.refresh();
    }

    /// Has `handler` told what users should know, each thing once, from a sharing thread.
    pub fn on_notice(&self, handler: impl Fn(Notice) + Send + 'static) {
        self.crew.on_notice(Box::new(handler));
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        self.crew.stop();
        for thread in self.threads.drain(..) {
            // A panic of the thread has been reported by itself.
            let _ = thread.join();
        }
    }
}

/// A VM's part in sharing. Dropping it, once the VM no longer runs, gives its frames up; its RAM
/// is empty then.
#[derive(Debug)]
pub struct Membership {
    crew: Arc<Crew>,
    group: Arc<Group>,
    slot: Slot,
    hints: Arc<Hints>,
}

impl Membership {
    /// The VM's statistics.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    pub fn statistics(&self) -> io::Result<VmStatistics> {
        Ok(self.survey(VmCount::default())?.unwrap_or_default())
    }

    /// Why sharing has stopped for the VM's group, if it has.
    #[must_use]
    pub fn stopped(&self) -> Option<Stopped> {
        self.group.engine.stopped()
    }

    /// How the VM takes part.
    #[must_use]
    pub fn participation(&self) -> SharingSpec {
        let mode = self.group.engine.ask(|engine| engine.mode(self.slot)).flatten().unwrap_or_default();
        SharingSpec { group: self.group.name.clone(), mode }
    }

    /// Changes what of the VM's memory is shared, while it runs. When this returns nothing more of it is merged
    /// that is not to be. What is shared, and is not to be any more, gets memory of its own step by step; a writer
    /// waits for less than 0.1 ms.
    pub fn set_mode(&self, mode: Mode) {
        self.group.engine.work(|engine| engine.set_mode(self.slot, mode));
        self.crew.refresh();
    }

    /// The frames of a sample that the VM refers to, for [`pairs`](crate::inspect::pairs::pairs) with others of its
    /// group.
    #[must_use]
    pub fn frames(&self) -> FrameSample {
        let mut sample = FrameSample::default();
        let mut from = 0;
        let engine = &self.group.engine;
        while let Some(next) =
            engine.ask(|engine| engine.sample_frames(self.slot, from, &mut sample)).flatten()
        {
            from = next;
        }
        sample
    }

    /// What more memory would bring the VM, as its disks' reads tell: which part of them it would have
    /// been spared. `None` before the first.
    #[must_use]
    pub fn working_set(&self) -> Option<Curve> {
        self.group.engine.ask(|engine| engine.working_set(self.slot)).flatten()
    }

    /// Has the engine listen to what the guest says of its pages. The bell is to be rung when the guest
    /// says that a pass is over.
    ///
    /// # Panics
    /// Where the ranges of the source are not the VM's RAM, or the hole has no words for them.
    #[must_use]
    pub fn listen(&self, source: Arc<dyn ClaimSource>) -> Bell {
        let rung = Arc::new(AtomicBool::new(false));
        let bell = Arc::clone(&rung);
        self.group.engine.work(|engine| engine.listen(self.slot, source, bell));
        Bell { crew: Arc::clone(&self.crew), rung }
    }

    /// What the guest says of its pages, and what sharing comes to by that. Takes time in proportion to the
    /// VM's memory where it says anything.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    pub fn claimed(&self) -> io::Result<Claimed> {
        Ok(self.survey(ClaimCount::default())?.unwrap_or_default())
    }

    /// A picture of the VM's memory: runs of pages of the same size, `cells` at most. Takes time in
    /// proportion to the VM's memory.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    pub fn map(&self, cells: u32) -> io::Result<Vec<MapCell>> {
        Ok(self.survey(Picture::new(cells))?.unwrap_or_default())
    }

    /// Counts the VM's pages, while others get at the engine.
    fn survey<C: PageCount>(&self, count: C) -> io::Result<Option<C::Sum>> {
        let mut survey = Survey::new(self.slot, count);
        while self.group.engine.ask(|engine| survey.go_on(engine)).transpose()?.unwrap_or(false) {}
        Ok(self.group.engine.ask(|engine| survey.end(engine)).flatten())
    }

    /// Where disks ask for blocks.
    #[must_use]
    pub fn blocks(&self) -> BlockClient {
        let vm = self.group.engine.lock().vm_number(self.slot);
        BlockClient { crew: Arc::clone(&self.crew), group: Arc::clone(&self.group), vm }
    }

    /// Where a device frees pages that the VM's guest gives back.
    #[must_use]
    pub fn pages(&self) -> PagesClient {
        let vm = self.group.engine.lock().vm_number(self.slot);
        PagesClient { crew: Arc::clone(&self.crew), group: Arc::clone(&self.group), vm }
    }

    /// Where devices say what they know about the VM's pages.
    #[must_use]
    pub fn hints(&self) -> HintSender {
        HintSender { crew: Arc::clone(&self.crew), hints: Arc::clone(&self.hints) }
    }
}

/// A VM's way to the blocks that its group holds. Of a VM that is gone everything goes past the cache.
#[derive(Clone, Debug)]
pub struct BlockClient {
    crew: Arc<Crew>,
    group: Arc<Group>,
    vm: VmNumber,
}

/// A VM's way to give pages back. Of a VM that is gone nothing is freed.
#[derive(Clone, Debug)]
pub struct PagesClient {
    crew: Arc<Crew>,
    group: Arc<Group>,
    vm: VmNumber,
}

impl PagesClient {
    /// Frees the first of these pages, as many as a millisecond or so is enough for, and one at least. On return, the
    /// pages before the next read as zeros. They keep their content, which is the VM's own, where sharing has
    /// stopped or mappings have run out. Others get at the engine before the next call.
    ///
    /// The guest must leave the pages alone meanwhile, or lose what it writes.
    #[must_use]
    pub fn free(&self, pages: Range<u32>) -> Discarded {
        let end = pages.end;
        let working = self.group.engine.stopped().is_none();
        let discarded = self.group.engine.work_fairly(|engine| engine.discard(self.vm, pages));
        if discarded.is_none() && working {
            // It has just stopped: whoever is to know is told by a sharing thread.
            self.crew.refresh();
        }
        discarded.unwrap_or(Discarded { next: end, freed: 0 })
    }
}

/// What became of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// It was read, and the VM has it.
    Delivered,
    /// It was read, and is to be copied by the caller from where it was read to: the engine has stopped.
    ToBeCopied,
    /// It was not read, or nobody is there to have it.
    Not,
}

impl BlockClient {
    /// Delivers what the group has of a read, by `copy` what is not mapped, and says what becomes of the
    /// rest. Each fetch is to be [ended](Self::end_fetch), and this client, or a clone of it, to be kept
    /// until then: the memory to be read into belongs to the group.
    pub fn begin_read(&self, read: &BlockRead<'_>, mut copy: impl FnMut(usize, &Page)) -> ReadPlan {
        self.begin(read, &mut copy, |engine, copy| engine.begin_read(self.vm, read, copy))
    }

    /// The same for what is in the sample of a disk of which nothing else goes through the cache.
    pub fn begin_sampled_read(
        &self,
        read: &BlockRead<'_>,
        sample: Sample,
        mut copy: impl FnMut(usize, &Page),
    ) -> ReadPlan {
        self.begin(read, &mut copy, |engine, copy| engine.begin_sampled_read(self.vm, read, sample, copy))
    }

    fn begin(
        &self,
        read: &BlockRead<'_>,
        copy: &mut CopyOut<'_>,
        begin: impl FnOnce(&mut Engine, &mut CopyOut<'_>) -> ReadPlan,
    ) -> ReadPlan {
        let plan = self.urgently(|engine| {
            let plan = begin(engine, copy);
            if !engine.works() {
                // A frame was lost: what was copied may be zeros, and is read from the disk instead.
                plan.fetches.iter().for_each(|fetch| {
                    engine.end_fetch(fetch.token, false, copy);
                });
                return None;
            }
            Some(plan)
        });
        plan.flatten().unwrap_or_else(|| {
            let blocks = read.first..read.first.saturating_add(read.targets.len() as u64);
            ReadPlan { past: vec![blocks], ..ReadPlan::default() }
        })
    }

    /// All reads of one of the VM's disks go through the cache from now on, and not a sample only.
    pub fn end_sampling(&self, disk: usize) {
        self.urgently(|engine| engine.end_sampling(self.vm, disk));
    }

    /// What chooses the samples of the group's disks.
    #[must_use]
    pub fn sampler(&self) -> Sampler {
        self.urgently(|engine| engine.sampler()).unwrap_or_default()
    }

    /// A fetch was read in full, or not: then nothing is kept or delivered.
    pub fn end_fetch(&self, token: u64, read: bool, mut copy: impl FnMut(usize, &Page)) -> Fetched {
        let delivered =
            self.urgently(|engine| engine.end_fetch(token, read, &mut copy) && !engine.store.lost());
        match (delivered, self.group.engine.stopped()) {
            (Some(true), _) => Fetched::Delivered,
            // Where it was read to was set aside before the panic, and nothing was set aside since.
            (None, Some(Stopped::Panicked)) if read => Fetched::ToBeCopied,
            _ => Fetched::Not,
        }
    }

    /// Before blocks are written, discarded or zeroed: nobody has them any more.
    pub fn begin_write(&self, image: Image, blocks: &Range<u64>) {
        let mut rest = self.urgently(|engine| engine.announce_write(image, blocks));
        // Others get at the engine in between.
        while let Some(blocks) = &mut rest {
            if self.urgently(|engine| engine.forget_next(blocks)) != Some(true) {
                return;
            }
        }
    }

    /// After they were, or were not, and before the guest is told.
    pub fn end_write(&self, image: Image, blocks: &Range<u64>) {
        self.urgently(|engine| engine.end_write(image, blocks));
    }

    /// Whether sharing has stopped for the group.
    pub(crate) fn is_stopped(&self) -> bool {
        self.group.engine.stopped().is_some()
    }

    fn urgently<T>(&self, work: impl FnOnce(&mut Engine) -> T) -> Option<T> {
        let working = self.group.engine.stopped().is_none();
        let outcome = self.group.urgently(work);
        if outcome.is_none() && working {
            // It has just stopped: whoever is to know is told by a sharing thread.
            self.crew.refresh();
        }
        outcome
    }
}

/// The devices' end of a VM's hints. Of a VM that is gone they are ignored.
#[derive(Clone, Debug)]
pub struct HintSender {
    crew: Arc<Crew>,
    hints: Arc<Hints>,
}

impl HintSender {
    /// Gives a hint. Never waits for the engine; where too many wait already, it is dropped.
    pub fn give(&self, hint: Hint) {
        if self.hints.give(hint) {
            self.crew.refresh();
        }
    }
}

/// By which a device says that its guest has told what its pages are for. Of a VM that is gone it is
/// ignored.
#[derive(Clone, Debug)]
pub struct Bell {
    crew: Arc<Crew>,
    rung: Arc<AtomicBool>,
}

impl Bell {
    /// Rings. Never waits for the engine; as long as it has not come, further rings do nothing.
    pub fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            self.crew.refresh();
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        match self.group.remove(self.slot) {
            Ok(()) => self.crew.groups.leave(&self.group),
            // The kernel lacks the memory to let memory go; it is tried again.
            Err(_) => self.crew.leave_later(Arc::clone(&self.group), self.slot),
        }
        self.crew.refresh();
    }
}

/// How many threads a ceiling of CPU time is worth.
fn threads(cpu_percent: f64, cores: usize) -> usize {
    ((cpu_percent / 100.0).ceil() as usize).clamp(1, cores.max(1))
}

/// Frames for twice the host's memory: more could not be held, and the reservation is free.
fn default_frames() -> u32 {
    // SAFETY: asks for a number.
    let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
    // SAFETY: as above.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let bytes = u64::try_from(pages).unwrap_or(1 << 20) * u64::try_from(page_bytes).unwrap_or(4096);
    u32::try_from(2 * bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX - 1).min(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::threads;

    #[test]
    fn a_ceiling_above_one_core_is_worth_more_threads() {
        assert_eq!([0.1, 10.0, 100.0].map(|percent| threads(percent, 4)), [1; 3]);
        assert_eq!([101.0, 250.0, 1000.0].map(|percent| threads(percent, 4)), [2, 3, 4]);
    }
}
