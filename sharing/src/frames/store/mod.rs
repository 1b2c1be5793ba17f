//! The frame store: a sealed memory file whose pages hold the contents that guests share.
//!
//! A frame has *owners*: guest pages that refer to it, the disk block that it holds (it is *kept* then), and
//! whoever has a [`Hold`] on it. A frame lives as long as it has one. So who keeps the number of a frame from
//! one step to the next is one of its owners, or must find it through one: a number never comes to stand for
//! another's frame.
//!
//! A frame is filled once, by who was given a hold on it, before anybody can map it. A frame without owners
//! gives its memory back with one of the next [`FrameStore::reclaim`]s. What a guest has mapped is never
//! filled in place again: the kernel may still read from it for a disk. Free frames are never touched through
//! a mapping, since reading a hole would allocate it.

#![expect(unsafe_code, reason = "creates and maps the memory file")]

mod extents;
mod reclaim;
mod records;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::memory::calls::MemoryCalls;
use crate::memory::frame_view::{Access, FrameView};
use crate::memory::local::Host;
use crate::memory::ram::PAGE_SIZE;
use crate::numbers::Digest;
pub use crate::numbers::Frame;
use extents::Extents;
use records::{Records, State};

/// Ownership of consecutive frames: they stay until it is [given up](FrameStore::release). A frame is in one
/// hold at most, and a hold cannot be copied.
#[derive(Debug)]
#[must_use = "the frames stay for ever unless this is given up"]
pub struct Hold {
    first: Frame,
    count: u32,
}

impl Hold {
    /// The first of the frames.
    #[must_use]
    pub fn first(&self) -> Frame {
        self.first
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// All of them.
    #[must_use]
    pub fn frames(&self) -> impl DoubleEndedIterator<Item = Frame> + ExactSizeIterator + Clone + use<> {
        self.first.run(self.count)
    }

    /// The frames one by one.
    pub(crate) fn each(self) -> impl Iterator<Item = Self> {
        self.first.run(self.count).map(|first| Self { first, count: 1 })
    }
}

/// All frames of one engine.
#[derive(Debug)]
pub struct FrameStore {
    file: Arc<OwnedFd>,
    io: File,
    view: Arc<FrameView>,
    /// The same memory, to be written.
    landing: FrameView,
    capacity: u32,
    records: Records,
    /// Free frames below the high-water mark.
    free: Extents,
    /// Frames that are free as well, but for their memory, which was not freed. No guest has mapped it.
    spare: Extents,
    /// Frames without owners whose memory is not freed yet.
    dead: Extents,
    /// Of those, the ones that no guest has mapped.
    unseen: Extents,
    /// Where giving back goes on.
    reclaimed: u32,
    /// Where the search goes on for memory that free frames have taken again.
    searched: u32,
    /// Bytes beyond those of known frames that the last search has left.
    unexplained: u64,
    /// Kept frames that their last sharers left, until they are asked for.
    left: BTreeSet<Frame>,
    live: u32,
    held: u32,
    idle: u32,
    shared: u32,
    sharing: u64,
}

impl FrameStore {
    /// Creates a store for up to `capacity` frames. It occupies nothing until frames are written.
    ///
    /// # Errors
    /// Fails if the kernel refuses the memory file, its seals or its mapping.
    pub fn create(capacity: u32) -> io::Result<Self> {
        let bytes = capacity as usize * PAGE_SIZE;
        // SAFETY: the name is a C string; the call returns a new descriptor.
        let fd = unsafe {
            libc::memfd_create(c"samepage-frames".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        let io = File::from(file.try_clone()?);
        io.set_len(bytes as u64)?;
        // A store that shrank would take mapped frames from under guests.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: sealing changes no memory.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let view = Arc::new(FrameView::map(&file, capacity, Access::Read)?);
        let landing = FrameView::map(&file, capacity, Access::Write)?;
        Ok(Self {
            file,
            io,
            view,
            landing,
            capacity,
            records: Records::default(),
            free: Extents::default(),
            spare: Extents::default(),
            dead: Extents::default(),
            unseen: Extents::default(),
            reclaimed: 0,
            searched: 0,
            unexplained: 0,
            left: BTreeSet::new(),
            live: 0,
            held: 0,
            idle: 0,
            shared: 0,
            sharing: 0,
        })
    }

    /// The memory file, to be mapped into guests.
    #[must_use]
    pub fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// The memory file, to be read and mapped privately by another process.
    ///
    /// # Errors
    /// Fails if the kernel refuses to open it again.
    pub(crate) fn readable(&self) -> io::Result<OwnedFd> {
        Ok(File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?.into())
    }

    /// How many frames it has room for.
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Takes `count` consecutive frames, the ones from `preferred` on where they are free. They read as zeros
    /// and are to be [filled](Self::fill). `None` where the store has no such extent left.
    pub fn allocate(&mut self, count: u32, preferred: Option<Frame>) -> Option<Hold> {
        let first = preferred
            .filter(|&frame| self.take_at(frame, count))
            .map(Frame::number)
            .or_else(|| self.free.room_for(count).filter(|&first| self.free.take(first, count)))
            .or_else(|| self.take_fresh(count))?;
        Some(self.begin(first, count))
    }

    /// Takes `count` consecutive frames that were [recycled](Self::recycle): they have memory, with what was
    /// in it before, all of which is to be overwritten. `None` where there is no such extent.
    pub fn allocate_spare(&mut self, count: u32) -> Option<Hold> {
        let first = self.spare.room_for(count)?;
        self.spare.take(first, count).then(|| self.begin(first, count))
    }

    /// Takes up to `count` consecutive frames before frame `end`, as [`allocate`](Self::allocate) does:
    /// all of them where there is such an extent, of the longest otherwise, as far as is easily found. `None`
    /// where all frames before `end` are in use.
    pub fn allocate_before(&mut self, end: Frame, count: u32) -> Option<Hold> {
        let end = end.number();
        let fits = self.free.within(end, count).map(|first| (first, count));
        let (first, count) = fits
            .or_else(|| self.free.longest_within(end).map(|(first, longest)| (first, longest.min(count))))?;
        self.free.take(first, count).then(|| self.begin(first, count))
    }

    /// Frames are in use from now on.
    fn begin(&mut self, first: u32, count: u32) -> Hold {
        let first = Frame::new(first);
        for frame in first.run(count) {
            let state = self.records.state_mut(frame);
            debug_assert!(!state.has(State::LIVE), "frame {frame} is in use");
            *state = State::default();
            state.set(State::LIVE);
            state.set(State::HELD);
            self.records.set_digest(frame, Digest::default());
        }
        self.live += count;
        self.held += count;
        Hold { first, count }
    }

    fn take_at(&mut self, frame: Frame, count: u32) -> bool {
        if frame.number() == self.records.len() {
            return self.take_fresh(count).is_some();
        }
        self.free.take(frame.number(), count)
    }

    fn take_fresh(&mut self, count: u32) -> Option<u32> {
        let first = self.records.len();
        let end = first.checked_add(count).filter(|&end| end <= self.capacity)?;
        self.records.grow(end);
        Some(first)
    }

    /// Writes to frames that are not filled yet the content of consecutive pages at `source`. The kernel
    /// copies, so the pages may change meanwhile: what the frames hold then is some mix of their contents,
    /// which a comparison will tell.
    ///
    /// # Errors
    /// Fails if the memory for the frames is not to be had, or the source is not mapped.
    pub fn write(&self, hold: &Hold, source: *const u8) -> io::Result<()> {
        self.assert_unfilled(hold);
        let mut done = 0;
        let bytes = hold.count as usize * PAGE_SIZE;
        while done < bytes {
            // SAFETY: the kernel checks that the source is readable and reports EFAULT otherwise.
            let written = unsafe {
                libc::pwrite(
                    self.io.as_raw_fd(),
                    source.wrapping_add(done).cast(),
                    bytes - done,
                    i64::from(hold.first.number()) * PAGE_SIZE as i64 + done as i64,
                )
            };
            match written {
                1.. => done += written as usize,
                0 => return Err(io::ErrorKind::WriteZero.into()),
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Where the content of frames can be written that are not filled yet.
    #[must_use]
    pub fn landing(&self, hold: &Hold) -> NonNull<u8> {
        self.assert_unfilled(hold);
        NonNull::new(self.landing.frame(hold.first)).expect("frames lie within the mapping")
    }

    fn assert_unfilled(&self, hold: &Hold) {
        let filled = |frame| self.records.state(frame).has(State::FILLED);
        assert!(!hold.frames().any(filled), "{hold:?} is filled already");
    }

    /// The content of frames is there, and no longer changes: from now on they can be mapped.
    pub fn fill(&mut self, hold: &Hold) {
        hold.frames().for_each(|frame| self.records.state_mut(frame).set(State::FILLED));
    }

    /// Holds on to a frame that is filled. `None` where it is not, or somebody holds it.
    pub fn hold(&mut self, frame: Frame) -> Option<Hold> {
        let free = self.is_filled(frame) && !self.records.state(frame).has(State::HELD);
        free.then(|| {
            self.records.state_mut(frame).set(State::HELD);
            self.held += 1;
            Hold { first: frame, count: 1 }
        })
    }

    /// Gives up a hold. Returns the frames that have no owner left: they are dead, and the caller forgets them.
    #[must_use]
    pub fn release(&mut self, hold: Hold) -> Vec<Frame> {
        let mut dead = Vec::new();
        for frame in hold.frames() {
            let held = self.records.state_mut(frame).clear(State::HELD);
            assert!(held, "frame {frame} is not held");
            self.held -= 1;
            if self.bury(frame) {
                dead.push(frame);
            }
        }
        dead
    }

    /// Where the content of a frame that is filled can be read in this process.
    #[must_use]
    pub fn content(&self, frame: Frame) -> *const u8 {
        debug_assert!(self.is_filled(frame), "frame {frame} is not filled");
        self.view.frame(frame)
    }

    /// What this process has in common for VMs whose pages go on these frames. `batch` pages are read at once at
    /// most.
    ///
    /// # Errors
    /// Fails if the page map or random numbers cannot be read.
    pub fn host(&self, calls: Arc<dyn MemoryCalls>, batch: u32) -> io::Result<Host> {
        Host::new(calls, Arc::clone(&self.view), batch)
    }

    /// Whether the host could not supply a frame. What was read from frames may be zeros then, which are
    /// nobody's content: see [`loss`](crate::memory::loss) for when to ask.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.view.lost() || self.landing.lost()
    }

    /// Whether a frame is in use.
    #[must_use]
    pub fn is_live(&self, frame: Frame) -> bool {
        self.records.state(frame).has(State::LIVE)
    }

    /// Whether a frame is in use and has its content.
    #[must_use]
    pub fn is_filled(&self, frame: Frame) -> bool {
        self.records.state(frame).has(State::FILLED)
    }

    /// Notes the digest of a frame's content.
    pub fn set_digest(&mut self, frame: Frame, digest: Digest) {
        self.records.set_digest(frame, digest);
    }

    /// The digest of a frame's content.
    #[must_use]
    pub fn digest(&self, frame: Frame) -> Digest {
        self.records.digest(frame)
    }

    /// Notes whether a frame is in the index of frames. Returns whether it was.
    pub(crate) fn set_indexed(&mut self, frame: Frame, indexed: bool) -> bool {
        let state = self.records.state_mut(frame);
        let was = state.clear(State::INDEXED);
        if indexed {
            assert!(state.has(State::FILLED), "frame {frame} is not filled");
            state.set(State::INDEXED);
        }
        was
    }

    /// Whether a frame is in the index of frames.
    pub(crate) fn indexed(&self, frame: Frame) -> bool {
        self.records.state(frame).has(State::INDEXED)
    }

    /// How many guest pages refer to a frame.
    #[must_use]
    pub fn sharers(&self, frame: Frame) -> u32 {
        self.records.sharers(frame)
    }

    /// One more guest page refers to the frame.
    pub fn attach(&mut self, frame: Frame) {
        let state = self.records.state_mut(frame);
        assert!(state.has(State::FILLED), "frame {frame} is mapped by a guest and has no content");
        state.set(State::MAPPED);
        let kept = state.has(State::KEPT);
        let sharers = self.records.sharers_mut(frame);
        *sharers += 1;
        match *sharers {
            1 if kept => {
                self.idle -= 1;
                self.left.remove(&frame);
            }
            1 => {}
            2 => {
                self.shared += 1;
                self.sharing += 1;
            }
            _ => self.sharing += 1,
        }
    }

    /// One guest page less refers to the frame; comes after proof that it does not. Returns whether the
    /// frame is dead, and the caller forgets it: this page was its last owner.
    pub fn detach(&mut self, frame: Frame) -> bool {
        let sharers = self.records.sharers_mut(frame);
        assert!(*sharers > 0, "frame {frame} left by more pages than came");
        *sharers -= 1;
        let left = *sharers;
        match left {
            0 if self.kept(frame) => {
                self.idle += 1;
                self.left.insert(frame);
                false
            }
            0 => self.bury(frame),
            1 => {
                self.shared -= 1;
                self.sharing -= 1;
                false
            }
            _ => {
                self.sharing -= 1;
                false
            }
        }
    }

    /// The frame is to stay when nobody refers to it any more.
    pub fn keep(&mut self, frame: Frame) {
        let idle = self.sharers(frame) == 0;
        let state = self.records.state_mut(frame);
        assert!(state.has(State::FILLED), "frame {frame} is kept and has no content");
        if !state.has(State::KEPT) {
            state.set(State::KEPT);
            self.idle += u32::from(idle);
        }
    }

    /// Whether the frame is kept.
    #[must_use]
    pub fn kept(&self, frame: Frame) -> bool {
        self.records.state(frame).has(State::KEPT)
    }

    /// A kept frame need not stay any more. Returns whether it is dead, since that was its last owner; the
    /// caller forgets it then.
    pub fn let_go(&mut self, frame: Frame) -> bool {
        let kept = self.records.state_mut(frame).clear(State::KEPT);
        assert!(kept, "frame {frame} was not kept");
        self.left.remove(&frame);
        self.idle -= u32::from(self.sharers(frame) == 0);
        self.bury(frame)
    }

    /// The block that a frame holds is on another from now on. Returns whether the frame is dead, since that was
    /// its last owner; the caller forgets it then.
    pub(crate) fn hand_over(&mut self, from: Frame, to: Frame) -> bool {
        let left = self.left.contains(&from);
        self.keep(to);
        if left && self.sharers(to) == 0 {
            self.left.insert(to);
        }
        self.let_go(from)
    }

    /// Notes that the last sharers of what a kept frame holds have left, where no page of its own has.
    pub(crate) fn note_left(&mut self, frame: Frame) {
        debug_assert!(self.kept(frame) && self.sharers(frame) == 0);
        self.left.insert(frame);
    }

    /// Takes the kept frames that their last sharers left since the last call, and to which none has come
    /// back.
    pub fn take_left(&mut self) -> BTreeSet<Frame> {
        std::mem::take(&mut self.left)
    }

    /// Whether there are frames to be [taken](Self::take_left).
    #[must_use]
    pub fn any_left(&self) -> bool {
        !self.left.is_empty()
    }

    /// Kept frames to which nobody refers.
    #[must_use]
    pub fn idle(&self) -> u32 {
        self.idle
    }

    /// A frame that has no owner is dead. Returns whether it has none.
    fn bury(&mut self, frame: Frame) -> bool {
        let state = self.records.state(frame);
        if self.sharers(frame) > 0 || state.has(State::KEPT) || state.has(State::HELD) {
            return false;
        }
        assert!(state.has(State::LIVE), "frame {frame} dies twice");
        let state = self.records.state_mut(frame);
        state.clear(State::LIVE);
        state.clear(State::FILLED);
        if state.clear(State::MAPPED) { &mut self.dead } else { &mut self.unseen }.add(frame.number(), 1);
        self.live -= 1;
        true
    }

    /// Frames in use.
    #[must_use]
    pub fn live(&self) -> u32 {
        self.live
    }

    /// Frames on which somebody has a hold.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.held
    }

    /// Places for frames up to the last in use: more than are live where the store has holes.
    #[must_use]
    pub fn places(&self) -> u32 {
        self.records.len()
    }

    /// Frames without owners whose memory is not freed yet.
    #[must_use]
    pub fn dead(&self) -> u32 {
        self.dead.frames() + self.unseen.frames()
    }

    /// Frames that two or more guest pages refer to.
    #[must_use]
    pub fn shared(&self) -> u32 {
        self.shared
    }

    /// Guest pages beyond the first on those frames.
    #[must_use]
    pub fn sharing(&self) -> u64 {
        self.sharing
    }

    /// Bytes that the kernel charges for the store.
    ///
    /// # Errors
    /// Fails if `fstat` does.
    pub fn charged_bytes(&self) -> io::Result<u64> {
        Ok(self.io.metadata()?.blocks() * 512)
    }

    /// Where the kernel finds data, or a hole, from a byte of the memory file on.
    pub(crate) fn seek(&self, from: u64, whence: libc::c_int) -> Option<u64> {
        // SAFETY: moves the position of the file, which nobody uses.
        let at = unsafe { libc::lseek(self.io.as_raw_fd(), i64::try_from(from).ok()?, whence) };
        u64::try_from(at).ok()
    }

    /// Bytes of this process that the metadata of the frames takes.
    #[must_use]
    pub fn metadata_bytes(&self) -> usize {
        let extents = [&self.free, &self.spare, &self.dead, &self.unseen];
        self.records.bytes()
            + extents.into_iter().map(Extents::bytes).sum::<usize>()
            + self.left.len() * size_of::<Frame>()
    }

    /// Bytes of page tables that the view of the frames takes: one page for each 512 frames.
    #[must_use]
    pub fn page_table_bytes(&self) -> u64 {
        ((self.records.len() as usize).div_ceil(512) * PAGE_SIZE) as u64
    }

    /// The numbers of all frames in use.
    pub fn live_frames(&self) -> impl Iterator<Item = Frame> + '_ {
        Frame::default().run(self.records.len()).filter(|&frame| self.is_live(frame))
    }

    /// Reads a frame through the file.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn read(&self, frame: Frame, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.io.read_exact_at(into, u64::from(frame.number()) * PAGE_SIZE as u64)
    }
}

#[cfg(test)]
mod tests;
