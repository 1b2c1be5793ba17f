//! The memory hole of one VM: memory outside RAM in which the guest says what its pages are for.
//!
//! It is anonymous memory in a KVM slot of its own, without a dirty log: what the guest writes there makes
//! it leave for nothing, and the engine never shares it. Untouched it costs address space, and one page for
//! the header; a guest that fills it makes the host hold a thousandth of its RAM besides. Devices cannot
//! reach it, since it is no part of [`GuestMemory`](samepage_devices::GuestMemory).

#![expect(unsafe_code, reason = "maps memory, looks at it as words, and hands its address to KVM")]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use samepage_devices::virtio::console::PortHole;
use samepage_hole::{FrameRange, Hole, HostHeader, MAX_RANGES};
use samepage_sharing::claims::ClaimSource;
use samepage_sharing::loss::{self, Loss, Watch};
use samepage_sharing::service::Bell;
use vmm_sys_util::eventfd::EventFd;

use crate::x86::layout::{HoleRange, frame_ranges};

/// Memory of a hole. Whoever gives its address to others drops it after them.
#[derive(Debug)]
pub(super) struct HoleMemory {
    base: NonNull<AtomicU32>,
    range: HoleRange,
    frames: Vec<FrameRange>,
    /// Written when the host has something new to say, where the guest does not see it by itself.
    news: Option<EventFd>,
    /// None once the memory goes. Zeros in the place of what was lost say nothing of any page.
    watch: Option<Watch>,
}

// SAFETY: the struct is an address and a length; what lies there is reached as atomic words alone.
unsafe impl Send for HoleMemory {}
// SAFETY: as above.
unsafe impl Sync for HoleMemory {}

impl HoleMemory {
    /// The hole of a guest with RAM of the given length, described in its header.
    ///
    /// # Errors
    /// What mmap said: address space, the commit limit or mappings ran out.
    pub(super) fn reserve(ram_bytes: u64, range: HoleRange) -> io::Result<Self> {
        let bytes = range.bytes as usize;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mut memory = Self { base, range, frames: frame_ranges(ram_bytes), news: None, watch: None };
        // SAFETY: the range is this value's own. Of a huge page the guest would fill one word, and the host
        // hold all; a kernel without huge pages has none to refuse.
        unsafe { libc::madvise(base.as_ptr().cast(), bytes, libc::MADV_NOHUGEPAGE) };
        // SAFETY: the range was just mapped for this value alone, which ends the watch before it unmaps it.
        memory.watch = Some(unsafe { loss::watch(base.as_ptr().addr(), bytes) }?);
        memory.describe();
        Ok(memory)
    }

    /// Has `tell` called, once, from another thread, when the host cannot supply a part of it.
    ///
    /// # Errors
    /// Where that thread cannot be had.
    pub(super) fn on_loss(&self, tell: impl FnOnce(Loss) + Send + 'static) -> io::Result<()> {
        self.watch.as_ref().map_or(Ok(()), |watch| watch.on_loss(tell))
    }

    /// A hole for a guest that reaches it by a port alone. `news` is written when there is something new in
    /// the host's header.
    ///
    /// # Errors
    /// As for [`HoleMemory::reserve`].
    pub(super) fn behind_port(ram_bytes: u64, news: EventFd) -> io::Result<Self> {
        let mut memory = Self::reserve(ram_bytes, HoleRange::of(ram_bytes))?;
        memory.news = Some(news);
        Ok(memory)
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

    /// Guest physical address of the page behind the hole, a write to which says that there is news in it.
    pub(super) fn doorbell(&self) -> u64 {
        self.range.doorbell()
    }

    /// Gives the hole to KVM as the memory slot of this number.
    pub(super) fn register(&self, vm: &VmFd, slot: u32) -> Result<(), kvm_ioctls::Error> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: self.range.start,
            memory_size: self.range.bytes,
            userspace_addr: self.base.as_ptr() as u64,
        };
        // SAFETY: the memory outlives the vCPUs, which alone reach it through the slot: `Vm` drops it after
        // KVM's file. It lies where no RAM is, so slots do not overlap.
        unsafe { vm.set_user_memory_region(region) }
    }
}

impl ClaimSource for HoleMemory {
    fn hole(&self) -> Hole<'_> {
        // SAFETY: the mapping is of so many bytes, begins at a page and lives as long as `self`. The guest
        // writes there at any time, which is what atomics are for; any bits are a valid word.
        let words = unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.range.bytes as usize / 4) };
        Hole::new(words, self.frame_count()).expect("it is as long as its page frames need")
    }

    fn ranges(&self) -> &[FrameRange] {
        &self.frames
    }

    fn request(&self, number: u32) {
        self.hole().set_requested(number);
        if let Some(news) = &self.news {
            // A full event counter is readable, which is all that whoever waits for it wants.
            let _ = news.write(1);
        }
    }
}

/// A hole behind a port, and who listens to it.
pub(super) struct HeardHole {
    pub(super) memory: Arc<HoleMemory>,
    pub(super) bell: Bell,
}

impl PortHole for HeardHole {
    fn hole(&self) -> Hole<'_> {
        self.memory.hole()
    }

    fn ring(&self) {
        self.bell.ring();
    }
}

impl Drop for HoleMemory {
    fn drop(&mut self) {
        self.watch = None;
        // SAFETY: the mapping is this value's own, and what borrowed it is gone.
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
    fn a_hole_that_the_host_cannot_supply_says_nothing_and_is_told_of() {
        let memory = reserve(GIB);
        let (sender, told) = mpsc::channel();
        memory.on_loss(move |loss| sender.send(loss).unwrap_or_default()).unwrap();
        memory.hole().flags()[77_777].store(1, Ordering::Relaxed);
        // SAFETY: the mapping is of this length; the watch answers for whoever touches it.
        unsafe { libc::munmap(memory.base.as_ptr().cast(), memory.range.bytes as usize) };
        assert_eq!(memory.hole().flags()[77_777].load(Ordering::Relaxed), 0);
        assert!(memory.hole().guest_header().is_err());
        assert_eq!(told.recv_timeout(Duration::from_secs(120)).unwrap().cause, Cause::Unmapped);
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
        let memory = HoleMemory::behind_port(GIB, news.try_clone().unwrap()).unwrap();
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
