//! The memory hole of one VM: memory outside RAM in which the guest publishes what its pages are for.
//!
//! The hole is memory of its own in its own KVM slot, without a dirty log. So a guest's writes cause no VM
//! exits, and the engine never shares this memory. An untouched hole costs address space, and one page for
//! the header. A full hole costs a thousandth of the guest's RAM. Devices cannot access it, because it is not
//! part of [`GuestMemory`](samepage_devices::GuestMemory).

#![expect(unsafe_code, reason = "maps memory, looks at it as words, and hands its address to KVM")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use samepage_devices::virtio::console::PortHole;
use samepage_hole::{FrameRange, Hole, HostHeader, MAX_RANGES};
use samepage_sharing::claims::ClaimSource;
use samepage_sharing::loss::{self, Loss, Watch};
use vmm_sys_util::eventfd::EventFd;

use crate::x86::layout::{HoleRange, frame_ranges};

/// A file of a hole keeps its length, so that nobody loses memory by another process.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Memory of a hole. Users of its address must be dropped before it.
#[derive(Debug)]
pub struct HoleMemory {
    base: NonNull<AtomicU32>,
    range: HoleRange,
    frames: Vec<FrameRange>,
    /// The memory as a file, where an engine of another process reads it.
    file: Option<Arc<OwnedFd>>,
    /// Written when the host's header has changed, if the guest cannot see the change itself.
    news: Option<EventFd>,
    /// `None` while the memory is being unmapped. Lost memory reads as zeros, which say nothing about any
    /// page.
    watch: Option<Watch>,
}

// SAFETY: the struct is an address and a length. The memory there is accessed only as atomic words.
unsafe impl Send for HoleMemory {}
// SAFETY: as above.
unsafe impl Sync for HoleMemory {}

impl HoleMemory {
    /// Returns the hole of a guest with RAM of this length, with a header that describes it.
    ///
    /// # Errors
    /// Fails with the error of mmap if address space, the commit limit or mappings run out.
    pub(super) fn reserve(ram_bytes: u64, range: HoleRange) -> io::Result<Self> {
        let memory = Self::map(ram_bytes, range, None)?;
        memory.describe();
        Ok(memory)
    }

    /// Returns the same in a file, which another process can map.
    ///
    /// # Errors
    /// Fails like [`HoleMemory::reserve`].
    pub(super) fn in_file(ram_bytes: u64, range: HoleRange) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("samepage-hole", flags)?;
        ftruncate(&file, range.bytes)?;
        fcntl_add_seals(&file, SEALS)?;
        let memory = Self::map(ram_bytes, range, Some(Arc::new(file)))?;
        memory.describe();
        Ok(memory)
    }

    /// Maps the hole of a guest in another process, which has RAM of this length.
    ///
    /// # Errors
    /// Fails if the file is none that [`HoleMemory::in_file`] has made, or like [`HoleMemory::reserve`].
    pub fn open(file: OwnedFd, ram_bytes: u64) -> io::Result<Self> {
        let range = HoleRange::of(ram_bytes);
        if !fcntl_get_seals(&file)?.contains(SEALS) || fstat(&file)?.st_size as u64 != range.bytes {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is no memory hole of this VM"));
        }
        Self::map(ram_bytes, range, Some(Arc::new(file)))
    }

    /// Returns the memory as a file, if it is one.
    pub(super) fn file(&self) -> Option<&Arc<OwnedFd>> {
        self.file.as_ref()
    }

    fn map(ram_bytes: u64, range: HoleRange, file: Option<Arc<OwnedFd>>) -> io::Result<Self> {
        let bytes = range.bytes as usize;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let (kind, fd) = match &file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
        };
        let flags = kind | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mut memory = Self { base, range, frames: frame_ranges(ram_bytes), file, news: None, watch: None };
        // SAFETY: the range belongs to this value. With huge pages, a guest could fill one word and make the
        // host hold a whole huge page. A kernel without huge pages returns an error, which does not matter.
        unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_NOHUGEPAGE) };
        // SAFETY: the range was just mapped for this value, which ends the watch before it unmaps the range.
        memory.watch = Some(unsafe { loss::watch(base.as_ptr().addr(), bytes) }?);
        Ok(memory)
    }

    /// Sets a function for the case that the host cannot supply a part of the memory. Another thread calls
    /// it, once.
    ///
    /// # Errors
    /// Fails if that thread cannot be created.
    pub(super) fn on_loss(&self, tell: impl FnOnce(Loss) + Send + 'static) -> io::Result<()> {
        self.watch.as_ref().map_or(Ok(()), |watch| watch.on_loss(tell))
    }

    /// The guest accesses the hole only through a port. `news` is written when the host's header changes.
    pub(super) fn behind_port(mut self, news: EventFd) -> Self {
        self.news = Some(news);
        self
    }

    /// Tells a guest behind a port that the host's header has changed.
    pub(super) fn tell_news(&self) {
        if let Some(news) = &self.news {
            // A full event counter is readable, and the waiting thread needs no more than that.
            let _ = news.write(1);
        }
    }

    fn describe(&self) {
        let mut ranges = [FrameRange::default(); MAX_RANGES];
        ranges.iter_mut().zip(&self.frames).for_each(|(to, from)| *to = *from);
        self.hole().set_host_header(&HostHeader {
            frames: self.frame_count(),
            doorbell: self.doorbell(),
            ranges,
            ..HostHeader::default()
        });
    }

    fn frame_count(&self) -> u32 {
        self.frames.last().map_or(0, |range| range.first + range.count)
    }

    /// Returns the guest physical address of the doorbell, the page after the hole.
    pub(super) fn doorbell(&self) -> u64 {
        self.range.doorbell()
    }

    /// Registers the hole with KVM as the memory slot with this number.
    pub(super) fn register(&self, vm: &VmFd, slot: u32) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: self.range.start,
            memory_size: self.range.bytes,
            userspace_addr: self.base.as_ptr() as u64,
        };
        // SAFETY: the memory outlives the vCPUs, the only users of the slot: `Vm` drops it after KVM's file.
        // It lies outside RAM, so slots do not overlap.
        unsafe { vm.set_user_memory_region(region) }
    }
}

impl ClaimSource for HoleMemory {
    fn hole(&self) -> Hole<'_> {
        // SAFETY: the mapping has this length, begins at a page and lives as long as `self`. The guest writes
        // there at any time, which atomics allow. Any bits are a valid word.
        let words = unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.range.bytes as usize / 4) };
        Hole::new(words, self.frame_count()).expect("it is as long as its page frames need")
    }

    fn ranges(&self) -> &[FrameRange] {
        &self.frames
    }

    fn request(&self, number: u32) {
        self.hole().set_requested(number);
        self.tell_news();
    }
}

/// Called when the guest says that a pass is over.
pub(super) type Ring = Arc<dyn Fn() + Send + Sync>;

/// A hole behind a port, and what hears its notifications.
pub(super) struct HeardHole {
    pub(super) memory: Arc<HoleMemory>,
    pub(super) ring: Ring,
}

impl PortHole for HeardHole {
    fn hole(&self) -> Hole<'_> {
        self.memory.hole()
    }

    fn ring(&self) {
        (self.ring)();
    }
}

impl Drop for HoleMemory {
    fn drop(&mut self) {
        self.watch = None;
        // SAFETY: the mapping belongs to this value, and no borrow of it is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.range.bytes as usize) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::sync::mpsc;
    use std::time::Duration;

    use samepage_sharing::loss::Cause;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn reserve(ram_bytes: u64) -> HoleMemory {
        HoleMemory::reserve(ram_bytes, HoleRange::of(ram_bytes)).unwrap()
    }

    #[test]
    fn another_process_reads_and_writes_the_same_hole() {
        let here = HoleMemory::in_file(GIB, HoleRange::of(GIB)).unwrap();
        let file = here.file().unwrap().try_clone().unwrap();
        // Whoever has it cannot take memory away.
        assert!(ftruncate(&file, 0).is_err());
        let there = HoleMemory::open(file, GIB).unwrap();
        there.request(7);
        assert_eq!(here.hole().host_header().unwrap().requested, 7);
        assert_eq!(here.hole().host_header(), there.hole().host_header());
        let other = memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&other, HoleRange::of(GIB).bytes).unwrap();
        assert_eq!(HoleMemory::open(other, GIB).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let file = here.file().unwrap().try_clone().unwrap();
        assert_eq!(HoleMemory::open(file, 2 * GIB).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_guest_finds_the_hole_described() {
        let memory = reserve(5 * GIB);
        let hole = memory.hole();
        let header = hole.host_header().unwrap();
        assert_eq!((header.frames, header.doorbell), (6 << 18, HoleRange::of(5 * GIB).doorbell()));
        assert_eq!(&header.ranges[..2], memory.ranges());
        assert_eq!((header.ranges[2], header.requested, header.interval_ms), (FrameRange::default(), 0, 0));
        assert_eq!(hole.flags().len(), 6 << 18);
        assert!(hole.guest_header().is_err());
    }

    #[test]
    fn a_hole_that_the_host_cannot_supply_reads_as_zeros_and_is_reported() {
        let memory = reserve(GIB);
        let (sender, losses) = mpsc::channel();
        memory.on_loss(move |loss| sender.send(loss).unwrap_or_default()).unwrap();
        memory.hole().flags()[77_777].store(1, Ordering::Relaxed);
        // SAFETY: the mapping has this length. The watch handles later accesses.
        unsafe { libc::munmap(memory.base.as_ptr().cast(), memory.range.bytes as usize) };
        assert_eq!(memory.hole().flags()[77_777].load(Ordering::Relaxed), 0);
        assert!(memory.hole().guest_header().is_err());
        assert_eq!(losses.recv_timeout(Duration::from_secs(120)).unwrap().cause, Cause::Unmapped);
    }

    /// Pages of the hole that have memory.
    fn resident(memory: &HoleMemory) -> usize {
        let bytes = memory.range.bytes as usize;
        let mut pages = vec![0_u8; bytes / 4096];
        // SAFETY: the range is mapped, and the vector has a byte for each of its pages.
        let result = unsafe { libc::mincore(memory.base.as_ptr().cast(), bytes, pages.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        pages.iter().filter(|&&page| page & 1 != 0).count()
    }

    #[test]
    fn news_are_told_where_a_guest_does_not_see_them() {
        let news = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let memory =
            HoleMemory::reserve(GIB, HoleRange::of(GIB)).unwrap().behind_port(news.try_clone().unwrap());
        assert!(news.read().is_err());
        memory.request(7);
        assert_eq!((news.read().unwrap(), memory.hole().host_header().unwrap().requested), (1, 7));
        let mapped = reserve(GIB);
        mapped.request(8);
        assert_eq!(mapped.hole().host_header().unwrap().requested, 8);
    }

    #[test]
    fn a_hole_takes_a_page_until_a_guest_writes_there() {
        use std::sync::atomic::Ordering;

        let memory = reserve(100 * GIB);
        assert_eq!(resident(&memory), 1);
        memory.hole().flags()[77_777].store(1, Ordering::Relaxed);
        assert_eq!(resident(&memory), 2);
    }
}
