//! The frame store: a sealed memory file whose pages hold the contents that guests share.
//!
//! A frame is written once, before anyone maps it, and counted while guest pages refer to it. A
//! frame that nobody refers to gives its memory back with the next [`FrameStore::reclaim`], unless it is
//! *kept*: it is *idle* then until it is wanted again or [let go](FrameStore::let_go). Free frames are
//! never touched through a mapping, since reading a hole would allocate it.

#![expect(unsafe_code, reason = "creates and maps the memory file")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::calls::MemoryCalls;
use crate::loss::{self, Watch};
use crate::ram::PAGE_SIZE;

/// Number of a frame in its store; its offset in the memory file is that many pages.
pub type Frame = u32;

/// No frame: the page is anonymous memory.
pub const NO_FRAME: Frame = Frame::MAX;

/// How many free extents are looked at before fresh frames are taken.
const EXTENTS_TRIED: usize = 32;

/// How many frames may keep their memory for the next that are filled: 4 MiB.
const SPARE_FRAMES: u32 = 1024;

/// The books of one frame.
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    /// One more than the guest pages that refer to it; 0 for a free place. The highest bit is set while
    /// the frame is kept.
    uses: u32,
    /// Keyed digest of its content.
    digest: u32,
}

const KEPT: u32 = 1 << 31;

impl Record {
    fn live(self) -> bool {
        self.uses > 0
    }

    fn kept(self) -> bool {
        self.uses & KEPT != 0
    }

    fn sharers(self) -> u32 {
        (self.uses & !KEPT).saturating_sub(1)
    }
}

/// All frames of one engine.
#[derive(Debug)]
pub struct FrameStore {
    file: Arc<OwnedFd>,
    io: File,
    view: NonNull<u8>,
    /// The same memory, to be written.
    landing: NonNull<u8>,
    capacity: u32,
    records: Vec<Record>,
    /// Free extents below the high-water mark: start to length.
    free: BTreeMap<Frame, u32>,
    /// Extents that are free as well, but for their memory, which was not given back.
    spare: BTreeMap<Frame, u32>,
    spare_frames: u32,
    /// Frames that nobody refers to, whose memory is not given back yet.
    dead: Vec<Frame>,
    /// Kept frames that their last sharers left, until they are asked for.
    left: Vec<Frame>,
    live: u32,
    idle: u32,
    shared: u32,
    sharing: u64,
    /// Note what of the two mappings the host cannot supply.
    watches: [Watch; 2],
}

// SAFETY: both mappings are memory of the store's own; nothing in them is tied to a thread.
unsafe impl Send for FrameStore {}

impl FrameStore {
    /// Creates a store for up to `capacity` frames. It occupies nothing until frames are written.
    ///
    /// # Errors
    /// Where the kernel refuses the memory file, its seals or its mapping.
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
        let view = map(&file, bytes, libc::PROT_READ)?;
        let landing = map(&file, bytes, libc::PROT_READ | libc::PROT_WRITE).inspect_err(|_| {
            // SAFETY: the view was just mapped, and nobody knows its address.
            unsafe { libc::munmap(view.as_ptr().cast(), bytes) };
        })?;
        let watched = |at: NonNull<u8>| {
            // SAFETY: the mapping belongs to this value, which ends the watch before it unmaps; frames are
            // reached by address, and whoever has read one asks whether they are lost.
            unsafe { loss::watch(at.as_ptr().addr(), bytes) }
        };
        let watches = [watched(view)?, watched(landing)?];
        Ok(Self {
            watches,
            file,
            io,
            view,
            landing,
            capacity,
            records: Vec::new(),
            free: BTreeMap::new(),
            spare: BTreeMap::new(),
            spare_frames: 0,
            dead: Vec::new(),
            left: Vec::new(),
            live: 0,
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

    /// Takes `count` consecutive frames, the ones from `preferred` on where they are free. Their
    /// content is undefined until [`FrameStore::write`]; nobody may map them before. `None` where
    /// the store has no such extent left.
    pub fn allocate(&mut self, count: u32, preferred: Option<Frame>) -> Option<Frame> {
        let start = preferred
            .and_then(|frame| self.take_free_at(frame, count))
            .or_else(|| self.take_free(count))
            .or_else(|| self.take_fresh(count))?;
        self.begin(start, count);
        Some(start)
    }

    /// Frames have content from now on.
    fn begin(&mut self, start: Frame, count: u32) {
        for record in &mut self.records[start as usize..(start + count) as usize] {
            *record = Record { uses: 1, digest: 0 };
        }
        self.live += count;
    }

    /// Takes `count` consecutive frames that were [recycled](Self::recycle): they have memory, with what was
    /// in it before, all of which is to be overwritten. `None` where there is no such extent.
    pub fn allocate_spare(&mut self, count: u32) -> Option<Frame> {
        let (&start, &len) = self.spare.iter().take(EXTENTS_TRIED).find(|&(_, &len)| len >= count)?;
        self.spare.remove(&start);
        if len > count {
            self.spare.insert(start + count, len - count);
        }
        self.spare_frames -= count;
        self.begin(start, count);
        Some(start)
    }

    /// Takes up to `count` consecutive frames before frame `end`, as [`allocate`](Self::allocate) does:
    /// all of them where there is such an extent, the largest extent otherwise. `None` where all frames
    /// before `end` are in use.
    pub fn allocate_before(&mut self, end: Frame, count: u32) -> Option<(Frame, u32)> {
        let extents = self.free.range(..end).map(|(&start, &len)| (start, len.min(end - start)));
        let fits = extents.clone().find(|&(_, len)| len >= count);
        let (start, len) = fits.or_else(|| extents.max_by_key(|&(_, len)| len))?;
        let count = len.min(count);
        self.allocate(count, Some(start)).map(|frame| (frame, count))
    }

    fn take_free_at(&mut self, frame: Frame, count: u32) -> Option<Frame> {
        if frame as usize == self.records.len() {
            return self.take_fresh(count);
        }
        let (&start, &len) = self.free.range(..=frame).next_back()?;
        let end = start + len;
        (frame.checked_add(count)? <= end).then(|| {
            self.free.remove(&start);
            self.put_free(start, frame - start);
            self.put_free(frame + count, end - frame - count);
            frame
        })
    }

    fn take_free(&mut self, count: u32) -> Option<Frame> {
        let (&start, _) = self.free.iter().take(EXTENTS_TRIED).find(|&(_, &len)| len >= count)?;
        self.take_free_at(start, count)
    }

    fn take_fresh(&mut self, count: u32) -> Option<Frame> {
        let start = self.records.len() as u32;
        let end = start.checked_add(count).filter(|&end| end <= self.capacity)?;
        self.records.resize(end as usize, Record::default());
        Some(start)
    }

    fn put_free(&mut self, start: Frame, len: u32) {
        if len > 0 {
            self.free.insert(start, len);
        }
    }

    /// Fills frames that were just allocated with the content of consecutive pages at `source`.
    /// The kernel copies, so the pages may change meanwhile: what the frames hold then is some mix
    /// of their contents, which a comparison will tell.
    ///
    /// # Errors
    /// Where the memory for the frames is not to be had, or the source is not mapped.
    pub fn write(&self, frame: Frame, source: *const u8, count: u32) -> io::Result<()> {
        let mut done = 0;
        let bytes = count as usize * PAGE_SIZE;
        while done < bytes {
            // SAFETY: the kernel checks that the source is readable and reports EFAULT otherwise.
            let written = unsafe {
                libc::pwrite(
                    self.io.as_raw_fd(),
                    source.wrapping_add(done).cast(),
                    bytes - done,
                    i64::from(frame) * PAGE_SIZE as i64 + done as i64,
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

    /// Where the content of frames that were just allocated can be written, until the first of them is
    /// mapped by a guest or compared.
    #[must_use]
    pub fn landing(&self, frame: Frame) -> NonNull<u8> {
        debug_assert!(self.is_live(frame), "frame {frame} is free");
        // SAFETY: frames are within the mapping.
        unsafe { self.landing.add(frame as usize * PAGE_SIZE) }
    }

    /// Where the content of a live frame can be read in this process.
    #[must_use]
    pub fn content(&self, frame: Frame) -> *const u8 {
        debug_assert!(self.is_live(frame), "frame {frame} is free");
        self.view.as_ptr().wrapping_add(frame as usize * PAGE_SIZE)
    }

    /// Whether the host could not supply a frame. What was read from frames may be zeros then, which are
    /// nobody's content: see [`loss`] for when to ask.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.watches.iter().any(Watch::lost)
    }

    /// Whether a frame has content.
    #[must_use]
    pub fn is_live(&self, frame: Frame) -> bool {
        self.records.get(frame as usize).is_some_and(|record| record.live())
    }

    /// Notes the digest of a frame's content.
    pub fn set_digest(&mut self, frame: Frame, digest: u32) {
        self.records[frame as usize].digest = digest;
    }

    /// The digest of a frame's content.
    #[must_use]
    pub fn digest(&self, frame: Frame) -> u32 {
        self.records[frame as usize].digest
    }

    /// How many guest pages refer to a frame.
    #[must_use]
    pub fn sharers(&self, frame: Frame) -> u32 {
        self.records.get(frame as usize).map_or(0, |record| record.sharers())
    }

    /// One more guest page refers to the frame. Comes before the page maps it.
    pub fn attach(&mut self, frame: Frame) {
        let record = &mut self.records[frame as usize];
        debug_assert!(record.live());
        record.uses += 1;
        match record.sharers() {
            1 => self.idle -= u32::from(record.kept()),
            2 => {
                self.shared += 1;
                self.sharing += 1;
            }
            _ => self.sharing += 1,
        }
    }

    /// One guest page less refers to the frame; comes after proof that it does not. Returns whether the
    /// frame is dead, and the caller forgets it: this page was the last, and it is not kept.
    pub fn detach(&mut self, frame: Frame) -> bool {
        let record = &mut self.records[frame as usize];
        assert!(record.sharers() > 0, "frame {frame} left by more pages than came");
        record.uses -= 1;
        match record.sharers() {
            0 if record.kept() => {
                self.idle += 1;
                self.left.push(frame);
            }
            0 => {
                self.kill(frame);
                return true;
            }
            1 => {
                self.shared -= 1;
                self.sharing -= 1;
            }
            _ => self.sharing -= 1,
        }
        false
    }

    /// The frame is to stay when nobody refers to it any more.
    pub fn keep(&mut self, frame: Frame) {
        let record = &mut self.records[frame as usize];
        debug_assert!(record.live());
        if !record.kept() {
            record.uses |= KEPT;
            self.idle += u32::from(record.sharers() == 0);
        }
    }

    /// Whether the frame is kept.
    #[must_use]
    pub fn kept(&self, frame: Frame) -> bool {
        self.records.get(frame as usize).is_some_and(|record| record.kept())
    }

    /// A kept frame need not stay any more. Returns whether it is dead, since nobody refers to it; the
    /// caller forgets it then.
    pub fn let_go(&mut self, frame: Frame) -> bool {
        let record = &mut self.records[frame as usize];
        assert!(record.kept(), "frame {frame} was not kept");
        record.uses &= !KEPT;
        let idle = record.sharers() == 0;
        if idle {
            self.idle -= 1;
            self.kill(frame);
        }
        idle
    }

    /// Takes the list of kept frames that their last sharers left since the last call. They may have been
    /// let go or wanted again meanwhile.
    pub fn take_left(&mut self) -> Vec<Frame> {
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

    /// Gives up a frame that was allocated and found no sharer.
    pub fn abandon(&mut self, frame: Frame) {
        let record = self.records[frame as usize];
        assert!(record.sharers() == 0 && !record.kept(), "frame {frame} is in use");
        self.kill(frame);
    }

    fn kill(&mut self, frame: Frame) {
        self.records[frame as usize].uses = 0;
        self.live -= 1;
        self.dead.push(frame);
    }

    /// Gives the memory of dead frames back and makes them free. Frames whose memory the kernel
    /// would not take stay dead and are tried again.
    pub fn reclaim(&mut self, calls: &dyn MemoryCalls) {
        if self.dead.is_empty() {
            return;
        }
        let mut dead = std::mem::take(&mut self.dead);
        dead.sort_unstable();
        let runs = dead.chunk_by(|one, next| one + 1 == *next);
        for (start, count) in runs.map(|run| (run[0], run.len() as u32)) {
            if calls.punch(start, count).is_ok() {
                self.release_extent(start, count);
            } else {
                self.dead.extend(start..start + count);
            }
        }
    }

    /// Makes dead frames free that keep their memory, as far as there is room for such: who fills frames
    /// again and again is spared giving memory back and taking it again. The others are
    /// [reclaimed](Self::reclaim).
    pub fn recycle(&mut self, calls: &dyn MemoryCalls) {
        let room = SPARE_FRAMES.saturating_sub(self.spare_frames) as usize;
        if room > 0 && !self.dead.is_empty() {
            let mut kept = self.dead.split_off(self.dead.len().saturating_sub(room));
            kept.sort_unstable();
            for run in kept.chunk_by(|one, next| one + 1 == *next) {
                self.keep_spare(run[0], run.len() as u32);
            }
        }
        self.reclaim(calls);
    }

    fn keep_spare(&mut self, mut start: Frame, count: u32) {
        self.spare_frames += count;
        let mut end = start + count;
        if let Some((&before, &len)) = self.spare.range(..start).next_back()
            && before + len == start
        {
            self.spare.remove(&before);
            start = before;
        }
        if let Some(len) = self.spare.remove(&end) {
            end += len;
        }
        self.spare.insert(start, end - start);
    }

    /// Gives the memory of all free frames back.
    pub fn drop_spare(&mut self, calls: &dyn MemoryCalls) {
        let spare = std::mem::take(&mut self.spare);
        self.spare_frames = 0;
        self.dead.extend(spare.into_iter().flat_map(|(start, len)| start..start + len));
        self.reclaim(calls);
    }

    /// Free frames that have kept their memory.
    #[must_use]
    pub fn spare(&self) -> u32 {
        self.spare_frames
    }

    fn release_extent(&mut self, mut start: Frame, count: u32) {
        let mut end = start + count;
        if let Some((&before, &len)) = self.free.range(..start).next_back()
            && before + len == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(len) = self.free.remove(&end) {
            end += len;
        }
        if end as usize == self.records.len() {
            self.records.truncate(start as usize);
            self.records.shrink_to(2 * self.records.len());
        } else {
            self.free.insert(start, end - start);
        }
    }

    /// Frames with content.
    #[must_use]
    pub fn live(&self) -> u32 {
        self.live
    }

    /// Places for frames up to the last in use: more than are live where the store has holes.
    #[must_use]
    pub fn places(&self) -> u32 {
        self.records.len() as u32
    }

    /// Frames that nobody refers to, whose memory is not given back yet.
    #[must_use]
    pub fn dead(&self) -> usize {
        self.dead.len()
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
    /// What fstat said.
    pub fn charged_bytes(&self) -> io::Result<u64> {
        Ok(self.io.metadata()?.blocks() * 512)
    }

    /// Bytes of this process that the books of the frames take.
    #[must_use]
    pub fn metadata_bytes(&self) -> usize {
        self.records.capacity() * size_of::<Record>()
            + (self.free.len() + self.spare.len()) * 2 * size_of::<(Frame, u32)>()
            + (self.dead.capacity() + self.left.capacity()) * size_of::<Frame>()
    }

    /// Bytes of page tables that the view of the frames takes: one page for each 512 frames.
    #[must_use]
    pub fn page_table_bytes(&self) -> u64 {
        (self.records.len().div_ceil(512) * PAGE_SIZE) as u64
    }

    /// The numbers of all live frames.
    pub fn live_frames(&self) -> impl Iterator<Item = Frame> + '_ {
        self.records.iter().enumerate().filter(|(_, record)| record.live()).map(|(frame, _)| frame as Frame)
    }

    /// Reads a live frame through the file.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn read(&self, frame: Frame, into: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.io.read_exact_at(into, u64::from(frame) * PAGE_SIZE as u64)
    }
}

impl Drop for FrameStore {
    fn drop(&mut self) {
        self.watches.iter_mut().for_each(Watch::end);
        let bytes = self.capacity as usize * PAGE_SIZE;
        // SAFETY: both were mapped by `create` and nobody keeps addresses into them.
        unsafe {
            libc::munmap(self.view.as_ptr().cast(), bytes);
            libc::munmap(self.landing.as_ptr().cast(), bytes);
        }
    }
}

/// Maps all of a memory file, shared, at an address of the kernel's choice.
fn map(file: &OwnedFd, bytes: usize, access: i32) -> io::Result<NonNull<u8>> {
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
    // SAFETY: a new mapping, which replaces nothing.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, file.as_raw_fd(), 0) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(mapped.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calls::Linux;

    fn store() -> (FrameStore, Linux) {
        let store = FrameStore::create(4096).unwrap();
        let calls = Linux::open(store.file().clone()).unwrap();
        (store, calls)
    }

    #[test]
    fn frames_count_their_sharers_and_give_memory_back() {
        let (mut store, calls) = store();
        let pages = vec![5_u8; 8 * PAGE_SIZE];
        let frame = store.allocate(8, None).unwrap();
        store.write(frame, pages.as_ptr(), 8).unwrap();
        assert_eq!(store.charged_bytes().unwrap(), 8 * PAGE_SIZE as u64);
        for _ in 0..3 {
            store.attach(frame + 2);
        }
        assert_eq!((store.live(), store.shared(), store.sharing()), (8, 1, 2));
        for other in (frame..frame + 8).filter(|&other| other != frame + 2) {
            store.abandon(other);
        }
        assert!(!store.detach(frame + 2) && !store.detach(frame + 2));
        assert_eq!((store.shared(), store.sharing()), (0, 0));
        assert!(store.detach(frame + 2));
        store.reclaim(&calls);
        assert_eq!((store.live(), store.charged_bytes().unwrap()), (0, 0));
    }

    #[test]
    fn kept_frames_stay_without_sharers_until_they_are_let_go() {
        let (mut store, calls) = store();
        let frame = store.allocate(2, None).unwrap();
        // SAFETY: the frames are new.
        unsafe { store.landing(frame).write_bytes(7, 2 * PAGE_SIZE) };
        // SAFETY: the frame is live, and was just written.
        assert_eq!(unsafe { store.content(frame + 1).add(PAGE_SIZE - 1).read() }, 7);
        store.keep(frame);
        assert_eq!(store.idle(), 1);
        store.attach(frame);
        store.attach(frame);
        assert_eq!((store.idle(), store.shared(), store.sharing(), store.sharers(frame)), (0, 1, 1, 2));
        assert!(!store.detach(frame) && !store.detach(frame), "it does not die");
        assert_eq!((store.idle(), store.live(), store.take_left()), (1, 2, vec![frame]));
        store.attach(frame);
        assert!(!store.let_go(frame), "it has a sharer");
        assert!(!store.kept(frame) && store.detach(frame));
        store.keep(frame + 1);
        assert!(store.let_go(frame + 1));
        store.reclaim(&calls);
        assert_eq!((store.idle(), store.live(), store.charged_bytes().unwrap()), (0, 0, 0));
    }

    #[test]
    fn extents_are_reused_preferred_and_joined() {
        let (mut store, calls) = store();
        let first = store.allocate(100, None).unwrap();
        assert_eq!(store.allocate(10, Some(first + 100)), Some(100));
        (20..40).for_each(|frame| store.abandon(frame));
        store.reclaim(&calls);
        assert_eq!(store.allocate(5, Some(30)), Some(30));
        assert_eq!(store.allocate(8, None), Some(20));
        assert_eq!(store.allocate(8, None), Some(110), "no extent of 8 is left");
        (30..35).chain(20..28).for_each(|frame| store.abandon(frame));
        store.reclaim(&calls);
        assert_eq!(store.allocate(20, None), Some(20), "neighbours became one extent again");
    }

    #[test]
    fn recycled_frames_keep_their_memory_until_they_are_filled_again_or_dropped() {
        let (mut store, calls) = store();
        let pages = vec![5_u8; 2000 * PAGE_SIZE];
        let first = store.allocate(2000, None).unwrap();
        store.write(first, pages.as_ptr(), 2000).unwrap();
        assert_eq!(store.allocate_spare(1), None);
        (100..164).chain(300..302).for_each(|frame| store.abandon(frame));
        store.recycle(&calls);
        assert_eq!((store.spare(), store.charged_bytes().unwrap()), (66, 2000 * PAGE_SIZE as u64));
        assert_eq!((store.allocate_spare(65), store.allocate_spare(64)), (None, Some(100)));
        assert!(store.is_live(163) && !store.is_live(300));
        assert_eq!(store.allocate(2, Some(300)), Some(2000), "they are not free");
        let live: Vec<_> = (164..1500).filter(|&frame| store.is_live(frame)).collect();
        live.into_iter().for_each(|frame| store.abandon(frame));
        store.recycle(&calls);
        assert_eq!(store.spare(), SPARE_FRAMES, "no more than that");
        let kept = u64::from(store.live() + SPARE_FRAMES) - 2;
        assert_eq!(store.charged_bytes().unwrap(), kept * PAGE_SIZE as u64, "two were not written yet");
        store.drop_spare(&calls);
        assert_eq!(store.charged_bytes().unwrap(), (u64::from(store.live()) - 2) * PAGE_SIZE as u64);
        assert_eq!((store.spare(), store.allocate(64, Some(400))), (0, Some(400)));
    }

    #[test]
    fn a_full_store_says_so() {
        let (mut store, _) = store();
        assert_eq!(store.allocate(4097, None), None);
        assert_eq!(store.allocate(4096, None), Some(0));
        assert_eq!(store.allocate(1, None), None);
    }
}
