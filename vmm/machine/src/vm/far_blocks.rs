//! Connects a VM's disks to the blocks that its sharing group holds in another process, by a line for each queue. Guest
//! addresses become page numbers. Copies are written through the VM's view of its memory, so that its change log records
//! them.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use samepage_devices::GuestMemory;
use samepage_devices::disk::CachePolicy;
use samepage_devices::disk::cache::{BLOCK_SIZE, BlockCache, BlockRead, Fetch, ImageId, ReadPlan, Served};
use samepage_devices::disk::image::Layer;
use samepage_devices::disk::line::{Answer, CacheLine};
use samepage_sharing::blocks::Keep;
use samepage_sharing::blocks::admission::{Admission, Readers, Sample};
use samepage_sharing::content::Page;
use samepage_sharing::remote::serve::Vms;
use samepage_sharing::remote::worker::VmIndex;
use samepage_sharing::service::line::asking::{Line, Slot};
use samepage_sharing::service::line::messages::{FileId, Outcome, SampleOf, Wanted};
use vm_memory::{Bytes, GuestAddress};

use super::blocks::keep;
use super::memory::MemorySlot;
use super::provenance::page_of;

/// The access of one disk to the block cache of its VM's group in another process.
pub(super) struct FarBlocks(Arc<State>);

struct State {
    /// The VM, among those whose memory the engine maps.
    vms: Arc<Vms>,
    index: VmIndex,
    /// Number of the disk in its VM.
    disk: usize,
    policy: Mutex<CachePolicy>,
    /// The first image of the disk's chain whose blocks go through the cache: nobody writes to it.
    first_layer: usize,
    /// Decides which reads go through the cache. Made when the disk is connected.
    admission: OnceLock<Admission>,
    memory: GuestMemory,
    slots: Vec<MemorySlot>,
    /// Lines that no queue uses.
    lines: Mutex<Vec<Line>>,
    /// The engine is gone, or has stopped: nothing goes through the cache any more.
    is_gone: AtomicBool,
}

impl FarBlocks {
    /// Returns the access for the disk with this number in its VM. It is to be [connected](Self::connect).
    pub(super) fn new(
        (vms, index): (Arc<Vms>, VmIndex),
        (disk, first_layer): (usize, usize),
        policy: CachePolicy,
        memory: GuestMemory,
        slots: Vec<MemorySlot>,
    ) -> Self {
        let (admission, lines, is_gone) = Default::default();
        let policy = Mutex::new(policy);
        Self(Arc::new(State {
            vms,
            index,
            disk,
            policy,
            first_layer,
            admission,
            memory,
            slots,
            lines,
            is_gone,
        }))
    }

    /// Connects one more queue. To be called before the guest runs.
    ///
    /// # Errors
    /// Fails if the other end is gone, or says what makes no sense.
    pub(super) fn connect(&self, socket: OwnedFd) -> io::Result<()> {
        let (line, sampler) = Line::accept(socket)?;
        // Others may read these images as well.
        self.0.admission.get_or_init(|| Admission::new(sampler, Readers::Many, self.0.disk));
        self.0.lines.lock().push(line);
        Ok(())
    }

    /// Returns the cache for the disk.
    pub(super) fn cache(&self) -> Arc<dyn BlockCache> {
        Arc::new(Self(Arc::clone(&self.0)))
    }

    /// Returns the policy for new reads.
    pub(super) fn policy(&self) -> CachePolicy {
        *self.0.policy.lock()
    }

    /// Changes the policy for new reads. Cached blocks stay until they are evicted.
    pub(super) fn set_policy(&self, policy: CachePolicy) {
        *self.0.policy.lock() = policy;
    }
}

impl State {
    fn keep(&self) -> Option<Keep> {
        keep(*self.policy.lock()).filter(|_| !self.is_gone.load(Ordering::Relaxed))
    }

    /// Returns the page that begins at an address, or `None` if the address is not aligned.
    fn page(&self, address: GuestAddress) -> Option<u32> {
        address.0.is_multiple_of(BLOCK_SIZE).then(|| page_of(&self.slots, address.0, 1)).flatten()
    }

    /// Before blocks are read directly that the engine may still order to map.
    fn leave(&self) {
        self.is_gone.store(true, Ordering::Relaxed);
        self.vms.seal(self.index);
    }
}

impl BlockCache for FarBlocks {
    fn admits(&self, blocks: Range<u64>) -> bool {
        let Some(admission) = self.0.admission.get() else { return false };
        match self.0.keep() {
            None => false,
            Some(Keep::Exclusive) => admission.admits(blocks.start, blocks.end.saturating_sub(blocks.start)),
            Some(_) => true,
        }
    }

    fn line(&self) -> Option<Box<dyn CacheLine>> {
        let line = self.0.lines.lock().pop()?;
        let (state, reads, answers) = (Arc::clone(&self.0), HashMap::new(), Vec::new());
        Some(Box::new(FarLine { state, event: line.event(), line: Some(line), reads, answers }))
    }

    /// A queue without a line reads directly.
    fn begin_read(&self, read: &BlockRead<'_>) -> ReadPlan {
        let blocks = read.first..read.first.saturating_add(read.targets.len() as u64);
        ReadPlan { past: vec![blocks], ..ReadPlan::default() }
    }

    fn end_fetch(&self, _: Fetch, _: Result<(), ()>) -> io::Result<()> {
        Err(io::Error::other("the cache of another process has no fetches"))
    }

    /// Images that are written to do not go through the cache.
    fn begin_write(&self, _: ImageId, _: Range<u64>) {}

    fn end_write(&self, _: ImageId, _: Range<u64>) {}
}

/// A read that is in progress.
struct UnderWay {
    id: usize,
    first: u64,
    targets: Vec<GuestAddress>,
    keep: Keep,
    sample: Option<Sample>,
}

/// The line of one queue.
struct FarLine {
    state: Arc<State>,
    /// `None` once the other end is gone.
    line: Option<Line>,
    reads: HashMap<Slot, UnderWay>,
    /// Answers that need nobody else.
    answers: Vec<Answer>,
    /// The line's, which is closed with it.
    event: RawFd,
}

impl FarLine {
    /// The other end is gone: the disk reads the rest itself.
    fn close(&mut self) {
        self.line = None;
        self.state.leave();
        let reads = self.reads.drain().map(|(_, read)| read);
        self.answers.extend(reads.map(|read| past(read.id, read.first, read.targets.len())));
    }

    /// Copies what is to be copied.
    fn finish(&mut self, slot: Slot, outcome: Outcome) {
        let (Some(line), Some(read)) = (&mut self.line, self.reads.remove(&slot)) else { return };
        let UnderWay { id, first, targets, keep, sample } = read;
        if outcome.is_stopped {
            self.state.leave();
        }
        let has = |bits: u32, index: usize| bits & 1 << index != 0;
        let mut page: Page = [0; BLOCK_SIZE as usize];
        let mut past = Vec::new();
        for (index, &target) in targets.iter().enumerate() {
            let mut is_past = has(outcome.past, index);
            if !is_past && has(outcome.copied, index) {
                line.take(slot, index, &mut page);
                // The disk finds out why the memory cannot be written.
                is_past = self.state.memory.write_slice(&page, target).is_err();
            }
            if is_past {
                past.push(first + index as u64..first + index as u64 + 1);
            }
        }
        line.give_back(slot);
        let served = Served { from_guests: outcome.from_guests.into(), from_host: outcome.from_host.into() };
        let (blocks, hits) = (targets.len() as u64, served.from_guests + served.from_host);
        if let Some(admission) = self.state.admission.get() {
            match sample {
                Some(sample) if admission.note_sampled(first, blocks, hits, sample, outcome.room) => {
                    // If the other end is gone, the next answer says so.
                    let _ = line.end_sampling();
                }
                None if keep == Keep::Exclusive => admission.note(first, blocks, hits),
                _ => {}
            }
        }
        self.answers.push(Answer { id, served, fetched: outcome.fetched.into(), past });
    }
}

/// The disk reads all of it itself.
fn past(id: usize, first: u64, blocks: usize) -> Answer {
    let all = first..first + blocks as u64;
    Answer { id, served: Served::default(), fetched: 0, past: vec![all] }
}

impl CacheLine for FarLine {
    fn knows(&self, layer: Layer) -> bool {
        self.line.is_some() && layer.0 >= self.state.first_layer
    }

    fn divide(&mut self, blocks: Range<u64>) -> (u64, bool) {
        let all = blocks.end.saturating_sub(blocks.start);
        let Some(admission) = self.state.admission.get() else { return (all, false) };
        match self.state.keep() {
            None => (all, false),
            Some(Keep::Exclusive) if admission.samples() => {
                let is_taken = admission.takes(blocks.start);
                let same = blocks.take_while(|&block| admission.takes(block) == is_taken).count() as u64;
                if !is_taken {
                    admission.pass(same);
                }
                (same.max(1), is_taken)
            }
            Some(_) => (all, true),
        }
    }

    fn has_room(&self) -> bool {
        self.line.as_ref().is_none_or(Line::has_room)
    }

    fn begin(&mut self, id: usize, read: &BlockRead<'_>) {
        let (state, count) = (&self.state, read.targets.len());
        let (Some(admission), Some(keep), Some(line)) = (state.admission.get(), state.keep(), &mut self.line)
        else {
            self.answers.push(past(id, read.first, count));
            return;
        };
        let sample = (keep == Keep::Exclusive && admission.samples()).then(|| admission.sample());
        let [device, inode, _, format] = read.image.parts();
        let wanted = Wanted {
            file: FileId { device, inode, format },
            keep,
            first: read.first,
            targets: read.targets.iter().map(|&address| state.page(address)).collect(),
            sample: sample.map(|Sample { passed, limit, .. }| SampleOf { passed, limit }),
        };
        match line.ask(wanted) {
            Ok(slot) => {
                let targets = read.targets.to_vec();
                self.reads.insert(slot, UnderWay { id, first: read.first, targets, keep, sample });
            }
            Err(_) => {
                self.answers.push(past(id, read.first, count));
                self.close();
            }
        }
    }

    fn reap(&mut self, answers: &mut Vec<Answer>) {
        while let Some(line) = &mut self.line {
            match line.receive() {
                Ok(Some((slot, outcome))) => self.finish(slot, outcome),
                Ok(None) => break,
                Err(_) => self.close(),
            }
        }
        answers.append(&mut self.answers);
    }

    fn in_flight(&self) -> usize {
        self.reads.len() + self.answers.len()
    }

    fn wait(&mut self) {
        let is_idle = self.reads.is_empty() || !self.answers.is_empty();
        if let Some(line) = self.line.as_ref().filter(|_| !is_idle)
            && line.wait().is_err()
        {
            self.close();
        }
    }

    fn event(&self) -> RawFd {
        self.event
    }
}

impl Drop for FarLine {
    /// Gives the line to the next queue. This one has waited for its reads.
    fn drop(&mut self) {
        if let Some(line) = self.line.take().filter(|line| line.in_progress() == 0) {
            self.state.lines.lock().push(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::sync::mpsc;
    use std::thread;

    use samepage_devices::disk::Format;
    use samepage_sharing::PAGE_SIZE;
    use samepage_sharing::blocks::Image;
    use samepage_sharing::content::Page;
    use samepage_sharing::engine::{Mode, Settings};
    use samepage_sharing::remote::serve::Server;
    use samepage_sharing::remote::worker::{Process, pair};
    use samepage_sharing::service::line::serving::{Question, Serving};
    use samepage_sharing::service::{Membership, Sharing};

    use super::*;
    use crate::config::HugePages;
    use crate::vm::memory::VmMemory;

    const IMAGE: ImageId = ImageId::new(1, 2, 3, Format::Raw);
    const PAGES: u64 = 1024;

    /// A VM whose memory an engine shares as if that were in another process, and a disk of it.
    struct Far {
        _sharing: Sharing,
        membership: Membership,
        memory: VmMemory,
        blocks: FarBlocks,
        serving: Serving,
        /// Stands for the worker's process.
        child: Child,
    }

    impl Far {
        fn new() -> Self {
            let sharing = Sharing::start(Settings::default()).expect("an engine");
            let memory = VmMemory::reserve(PAGES * PAGE_SIZE as u64, true, HugePages::Off).expect("memory");
            let (ours, theirs) = pair().expect("a connection");
            let ram = Arc::clone(memory.ram());
            let (told, heard) = mpsc::channel();
            thread::spawn(move || {
                let server = Server::accept(theirs).expect("an engine");
                let index = server.vms().add(ram, None).expect("a VM");
                told.send((server.vms(), index)).expect("somebody who waits");
                server.run()
            });
            let child = Command::new("sleep").arg("1000").spawn().expect("a process");
            let place = sharing.place("default").expect("a place");
            let process = Process::of(child.id()).expect("the process");
            let worker = place.connect(ours, process).expect("a connection").expect("a group that works");
            let (vms, index) = heard.recv().expect("a VM");
            let vm = worker.vm(index).expect("its memory");
            let membership = place.share(Some(vm), Mode::Full, Box::new(|_| {})).expect("a member");
            let slots = memory.slots().to_vec();
            let view = memory.view().clone();
            let blocks = FarBlocks::new((vms, index), (0, 0), CachePolicy::Exclusive, view, slots);
            let (serving, theirs) = Serving::create(membership.blocks(), 0).expect("a line");
            blocks.connect(theirs).expect("the line");
            Self { _sharing: sharing, membership, memory, blocks, serving, child }
        }

        fn question(&mut self) -> Question {
            loop {
                if let Some(question) = self.serving.receive().expect("a disk") {
                    return question;
                }
                thread::yield_now();
            }
        }

        /// Whether the engine can still free a page whatever it holds.
        fn is_sealed(&self) -> bool {
            self.memory.view().write_obj(1_u8, GuestAddress(0)).expect("memory");
            let is_sealed = self.membership.pages().free(0..1).freed == 0;
            let byte: u8 = self.memory.view().read_obj(GuestAddress(0)).expect("memory");
            assert_eq!(byte == 1, is_sealed);
            is_sealed
        }
    }

    impl Drop for Far {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    fn targets() -> Vec<GuestAddress> {
        // The last block goes to no whole page.
        [0x8000, 0x9000, 0xa008].map(GuestAddress).to_vec()
    }

    fn reap(line: &mut dyn CacheLine) -> Answer {
        let mut answers = Vec::new();
        while answers.is_empty() {
            line.wait();
            line.reap(&mut answers);
        }
        assert_eq!((answers.len(), line.in_flight()), (1, 0));
        answers.remove(0)
    }

    #[test]
    fn blocks_that_are_copied_come_to_their_places() {
        let mut far = Far::new();
        let mut line = far.blocks.line().expect("a line");
        assert!(far.blocks.admits(7..10) && far.blocks.line().is_none());
        assert_eq!(line.divide(7..10), (3, true));
        line.begin(5, &BlockRead { image: IMAGE, first: 7, targets: &targets() });
        let question = far.question();
        assert_eq!(question.wanted.targets, [Some(8), Some(9), None]);
        let [device, inode, version, format] = IMAGE.parts();
        assert_eq!(question.wanted.file, FileId { device, inode, format });
        for fetch in far.serving.begin(&question, Image([device, inode, version, format])).expect("a disk") {
            for index in 0..fetch.blocks as usize {
                #[expect(unsafe_code, reason = "fills what is fetched")]
                // SAFETY: the memory is the fetch's.
                unsafe {
                    fetch
                        .landing
                        .add(index * PAGE_SIZE)
                        .cast::<Page>()
                        .write([fetch.first as u8 + index as u8; 4096]);
                };
            }
            far.serving.end(&fetch, true).expect("a disk");
        }
        let answer = reap(&mut *line);
        assert_eq!((answer.id, answer.fetched), (5, 3));
        assert!(answer.past.is_empty());
        for (block, &target) in (7..).zip(&targets()) {
            let mut page: Page = [0; 4096];
            far.memory.view().read_slice(&mut page, target).expect("memory");
            assert!(page == [block; 4096], "block {block}");
        }
        assert!(!far.is_sealed());
        // The next queue gets the line.
        drop(line);
        assert!(far.blocks.line().is_some());
    }

    #[test]
    fn what_a_line_that_ends_leaves_is_read_directly_once_the_memory_is_sealed() {
        let mut far = Far::new();
        let mut line = far.blocks.line().expect("a line");
        line.begin(5, &BlockRead { image: IMAGE, first: 7, targets: &targets() });
        drop(far.question());
        let (other, _) = Serving::create(far.membership.blocks(), 1).expect("another line");
        drop(std::mem::replace(&mut far.serving, other));
        let answer = reap(&mut *line);
        assert_eq!((answer.id, answer.past.first(), answer.past.len()), (5, Some(&(7..10)), 1));
        assert!(far.is_sealed());
        assert!(!far.blocks.admits(7..10) && !line.knows(Layer(0)) && line.has_room());
        line.begin(6, &BlockRead { image: IMAGE, first: 0, targets: &targets() });
        assert_eq!(reap(&mut *line).past.first(), Some(&(0..3)));
        drop(line);
        assert!(far.blocks.line().is_none());
    }
}
