//! Guest RAM as the host holds it: one reservation of private anonymous memory for each VM.
//!
//! The engine replaces parts of the reservation by mappings of its frame store while guests run,
//! so the reservation is addressed by page index, never through references.

#![expect(unsafe_code, reason = "reserves and releases address space")]

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::memory::loss::{self, Loss, Watch};

/// Size of a page and of a frame, in bytes.
pub const PAGE_SIZE: usize = 4096;

/// Size of a huge page, in bytes.
pub const HUGE_BYTES: usize = 2 << 20;
/// Pages of a huge page.
pub const HUGE_PAGES: u32 = (HUGE_BYTES / PAGE_SIZE) as u32;

/// Address space that is left without access behind each VM's RAM: the kernel cannot make one mapping
/// of two VMs' RAM, and an access beyond the end reaches nobody's.
const GUARD_BYTES: usize = PAGE_SIZE;

/// What stays of the shadow in front of the pages that were moved.
const SHADOW_LEAD: usize = PAGE_SIZE;

/// Pages that are discarded by one call: 4 MiB, in less than a millisecond.
const DISCARD_PAGES: u32 = 1024;

/// So much is unmapped by one call.
const UNMAP_BYTES: usize = 8 << 20;

/// Address space without access that is unmapped unless it is kept.
struct Reservation(NonNull<u8>, usize);

impl Reservation {
    fn new(bytes: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, RESERVED, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self(base, bytes))
    }

    /// A reservation of which the part from `offset` on starts at a multiple of a power of two.
    fn aligned(bytes: usize, offset: usize, alignment: usize) -> io::Result<Self> {
        let mut reservation = Self::new(bytes + alignment - PAGE_SIZE)?;
        let spare = reservation.1 - bytes;
        let lead = reservation.0.as_ptr().wrapping_add(offset).align_offset(alignment);
        reservation.trim(lead, spare - lead);
        Ok(reservation)
    }

    /// Gives up what lies before and behind the part that is needed.
    fn trim(&mut self, lead: usize, tail: usize) {
        let bytes = self.1 - lead - tail;
        let kept = NonNull::new(self.at(lead, bytes).cast()).expect("it lies above the start");
        if tail > 0 {
            drop(Self(NonNull::new(self.at(lead + bytes, tail).cast()).expect("as above"), tail));
        }
        let before = std::mem::replace(self, Self(kept, bytes));
        if lead > 0 {
            drop(Self(before.0, lead));
        }
        std::mem::forget(before);
    }

    fn at(&self, offset: usize, bytes: usize) -> *mut libc::c_void {
        assert!(offset + bytes <= self.1);
        self.0.as_ptr().wrapping_add(offset).cast()
    }

    fn protect(&self, offset: usize, bytes: usize, access: libc::c_int) -> io::Result<()> {
        // SAFETY: the range is this reservation's own, and nobody has addresses into it.
        succeeded(unsafe { libc::mprotect(self.at(offset, bytes), bytes, access) } == 0)
    }

    /// Moves what is in a part to the start of another reservation. The part stays reserved.
    fn move_to(&self, offset: usize, target: &Self, bytes: usize) -> io::Result<()> {
        // SAFETY: both ranges belong to reservations into which nobody has addresses.
        unsafe { move_pages(self.at(offset, bytes), target.at(0, bytes), bytes) }
    }

    fn keep(self) -> NonNull<u8> {
        let base = self.0;
        std::mem::forget(self);
        base
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // All of it in one call would hold a lock of the process for 100 ms a GiB. From the front on, so that no
        // call makes two mappings of one.
        for offset in (0..self.1).step_by(UNMAP_BYTES) {
            let bytes = UNMAP_BYTES.min(self.1 - offset);
            // SAFETY: the range is this reservation's own, and nobody has addresses into it.
            unsafe { libc::munmap(self.at(offset, bytes), bytes) };
        }
    }
}

/// How address space is reserved.
const RESERVED: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

fn succeeded(success: bool) -> io::Result<()> {
    if success { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Address space of one VM's RAM: `pages` pages of private anonymous memory, filled with zeros,
/// that occupy nothing until they are touched. Unmapped when dropped.
///
/// It has a *shadow*: address space of the same length that the RAM was moved from. What is made there,
/// without access until then, and moved over the same pages of the RAM becomes one mapping with the
/// anonymous memory around it, which is how a run can be taken off its frames while the guest runs.
#[derive(Debug)]
pub struct Ram {
    base: NonNull<u8>,
    shadow: NonNull<u8>,
    pages: u32,
    /// Huge pages are wanted, rather than small ones.
    huge: AtomicBool,
    /// Notes what of it the host cannot supply.
    watch: Watch,
    /// A part was unmapped and may be somebody else's by now: the address space is not ours to
    /// unmap as a whole.
    torn: AtomicBool,
}

// SAFETY: the struct is an address and a length; who reads or writes the memory behind it answers
// for that access.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// Reserves `bytes` of RAM, a multiple of [`PAGE_SIZE`]. It starts at a multiple of
    /// [`HUGE_BYTES`], if it is as long as that.
    ///
    /// # Errors
    /// What mmap said: `ENOMEM` where address space, the commit limit or mappings ran out;
    /// `EINVAL` for a length of zero, one that is no multiple of the page size, or 16 TiB and more.
    pub fn reserve(bytes: usize) -> io::Result<Self> {
        let pages = match u32::try_from(bytes / PAGE_SIZE) {
            Ok(pages) if pages > 0 && bytes.is_multiple_of(PAGE_SIZE) => pages,
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        let alignment = if bytes < HUGE_BYTES { PAGE_SIZE } else { HUGE_BYTES };
        // What is moved has no page table in common with the page that is touched: the table would be made
        // for the RAM as well, and where there is one the kernel makes no huge page.
        let shadow = Reservation::aligned(SHADOW_LEAD + bytes, SHADOW_LEAD, alignment)?;
        let target = Reservation::aligned(bytes + GUARD_BYTES, 0, alignment)?;
        // The kernel joins anonymous mappings only if they belong together from their first page on: one
        // page of the shadow is touched before the rest is moved away.
        shadow.protect(0, SHADOW_LEAD, libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: the first page of the shadow was just made writable, and nobody else knows of it.
        unsafe { shadow.0.as_ptr().write_volatile(1) };
        shadow.protect(0, SHADOW_LEAD, libc::PROT_NONE)?;
        shadow.move_to(SHADOW_LEAD, &target, bytes)?;
        // The move has set the two parts of the shadow apart; a change of access joins them again.
        shadow.protect(0, SHADOW_LEAD, libc::PROT_READ)?;
        shadow.protect(0, SHADOW_LEAD, libc::PROT_NONE)?;
        target.protect(0, bytes, libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: the range is the reservation's, which outlives the watch; what is in it is reached by
        // address alone, as memory that changes at any time.
        let watch = unsafe { loss::watch(target.0.as_ptr().addr(), bytes) }?;
        Ok(Self {
            base: target.keep(),
            shadow: shadow.keep(),
            pages,
            huge: AtomicBool::new(false),
            watch,
            torn: AtomicBool::new(false),
        })
    }

    /// Keeps the kernel from backing this RAM with huge pages: of a huge page that is partly
    /// replaced by frames nothing becomes free. To be called before the memory is first touched.
    ///
    /// # Errors
    /// What madvise said. A kernel without huge pages has nothing to switch off: no error.
    pub fn use_small_pages(&self) -> io::Result<()> {
        self.use_pages(false)
    }

    /// Has the kernel back this RAM with huge pages where it can; see [`Ram::huge`]. To be called before
    /// the memory is first touched.
    ///
    /// # Errors
    /// What madvise said. A kernel without huge pages goes on with small ones: no error.
    pub fn use_huge_pages(&self) -> io::Result<()> {
        self.use_pages(true)
    }

    /// Whether huge pages are wanted for this RAM; the kernel may have none to give.
    #[must_use]
    pub fn huge(&self) -> bool {
        self.huge.load(Ordering::Relaxed)
    }

    fn use_pages(&self, huge: bool) -> io::Result<()> {
        self.huge.store(huge, Ordering::Relaxed);
        // SAFETY: the range is the shadow's own. The lead as well, so that it stays one mapping.
        unsafe { advise(self.shadow.as_ptr(), SHADOW_LEAD + self.bytes(), huge) }?;
        self.range(0, self.pages()).advise()
    }

    /// Has the kernel take memory for this RAM from a NUMA node of the host, as long as the node has some. To be called
    /// before the memory is first touched. Frames that are mapped over it are where they are; what the guest makes
    /// private again, and memory of the shadow, follow this or the thread that touches them.
    ///
    /// # Errors
    /// What mbind said: `EINVAL` for a node that is not there, `ENOSYS` for a kernel without nodes.
    pub fn prefer_node(&self, node: u32) -> io::Result<()> {
        let mut nodes = [0_u64; 16];
        let word = nodes.get_mut(node as usize / 64);
        *word.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))? = 1 << (node % 64);
        // The kernel reads one bit less than it is told of.
        let bits = 64 * nodes.len() + 1;
        let policy = libc::c_long::from(libc::MPOL_PREFERRED);
        const NO_FLAGS: libc::c_long = 0;
        // Both in the same way, so that the kernel still makes one mapping of them, and the lead as well.
        for (address, bytes) in [(self.shadow, SHADOW_LEAD + self.bytes()), (self.base, self.bytes())] {
            // SAFETY: the ranges are this RAM's own. The call changes no content, and reads the mask, which is as long
            // as it is told.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_mbind,
                    address.as_ptr(),
                    bytes,
                    policy,
                    nodes.as_ptr(),
                    bits,
                    NO_FLAGS,
                )
            };
            succeeded(result == 0)?;
        }
        Ok(())
    }

    /// Frees the memory of pages that no engine shares; they read as zeros then. Returns the page to go on with, for
    /// one call frees 4 MiB at most, and how many pages had memory.
    ///
    /// # Errors
    /// What madvise said; the pages are as they were.
    pub fn discard(&self, first: u32, count: u32) -> io::Result<(u32, u32)> {
        let pages = self.range(first, count.min(DISCARD_PAGES));
        let mut present = vec![0_u8; pages.count() as usize];
        // SAFETY: the range is this RAM's, and there is a byte for each of its pages.
        let known = unsafe {
            libc::mincore(pages.address() as *mut libc::c_void, pages.bytes(), present.as_mut_ptr())
        };
        succeeded(known == 0)?;
        // SAFETY: the range is this RAM's, which is anonymous memory where no engine has it, and is addressed by
        // page index alone.
        let freed = unsafe {
            libc::madvise(pages.address() as *mut libc::c_void, pages.bytes(), libc::MADV_DONTNEED)
        };
        succeeded(freed == 0)?;
        let freed = present.iter().filter(|&&page| page & 1 != 0).count() as u32;
        Ok((first + pages.count(), freed))
    }

    /// From now on the address space is left to the process when this value goes: a failed call
    /// tore a hole into it, where the kernel may have placed another mapping since.
    pub(crate) fn tear(&self) {
        self.watch.tear();
        self.torn.store(true, Ordering::Release);
    }

    /// Notes that a page is lost, or that the VM cannot use one. The engine leaves a RAM alone that has lost
    /// memory. The caller tells the VM.
    pub fn lose(&self, page: u32) {
        self.watch.lose(page as usize * PAGE_SIZE);
    }

    /// Puts untouched memory where a failed call left nothing, so that the address space stays this RAM's.
    /// Returns whether it could: not where anything is mapped there by now.
    pub(crate) fn fill_hole(&self, first: u32, count: u32) -> bool {
        let pages = self.range(first, count);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = RESERVED | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: nothing is replaced, and the addresses were this RAM's.
        let mapped =
            unsafe { libc::mmap(pages.address() as *mut libc::c_void, pages.bytes(), access, flags, -1, 0) };
        mapped != libc::MAP_FAILED
    }

    /// Whether the host could not supply a part of it: the VM must not run on, and what is read from it is
    /// nobody's content. See [`loss`] for when to ask.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.watch.lost()
    }

    /// The same, for devices that may outlive this value.
    #[must_use]
    pub fn loss_flag(&self) -> Arc<AtomicBool> {
        self.watch.flag()
    }

    /// What of it the host could not supply first.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.watch.loss()
    }

    /// Has `tell` called, once, from another thread, when the host cannot supply a part of it.
    ///
    /// # Errors
    /// Fails if that thread cannot be had.
    pub fn on_loss(&self, tell: impl FnOnce(Loss) + Send + 'static) -> io::Result<()> {
        self.watch.on_loss(tell)
    }

    /// The pages `first..first + count`.
    ///
    /// # Panics
    /// Where the RAM has no such pages: page numbers come from the host, never from a guest.
    #[must_use]
    pub fn range(&self, first: u32, count: u32) -> RamRange<'_> {
        assert!(
            first.checked_add(count).is_some_and(|end| end <= self.pages),
            "pages {first}+{count} of {}",
            self.pages
        );
        RamRange { ram: self, first, count }
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.pages as usize * PAGE_SIZE
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        self.watch.end();
        if *self.torn.get_mut() {
            return;
        }
        // Both were reserved by `reserve` and belong to this value alone; whoever held addresses into
        // the RAM has given them up with their share of ownership.
        drop((
            Reservation(self.base, self.bytes() + GUARD_BYTES),
            Reservation(self.shadow, SHADOW_LEAD + self.bytes()),
        ));
    }
}

/// Some consecutive pages of a [`Ram`]: what the calls that rearrange guest memory work on, so
/// that they can reach no other memory.
#[derive(Clone, Copy, Debug)]
pub struct RamRange<'a> {
    ram: &'a Ram,
    first: u32,
    count: u32,
}

impl<'a> RamRange<'a> {
    /// Index of the first page in its RAM.
    #[must_use]
    pub fn first(&self) -> u32 {
        self.first
    }

    /// Number of pages.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn address(&self) -> usize {
        self.page(0).addr()
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.count as usize * PAGE_SIZE
    }

    /// Where page `index` of this range is. Guests and devices may write to it at any time unless
    /// it is write-protected, so it must not become a reference.
    #[must_use]
    pub fn page(&self, index: u32) -> *const u8 {
        debug_assert!(index <= self.count);
        self.ram.base.as_ptr().wrapping_add((self.first as usize + index as usize) * PAGE_SIZE)
    }

    /// Where page `index` of this range is made before it is moved over the RAM.
    pub(crate) fn shadow(&self, index: u32) -> *mut u8 {
        let offset = SHADOW_LEAD + (self.first as usize + index as usize) * PAGE_SIZE;
        self.ram.shadow.as_ptr().wrapping_add(offset)
    }

    /// The part from page `from` of this range on, of `count` pages.
    #[must_use]
    pub fn part(&self, from: u32, count: u32) -> RamRange<'a> {
        assert!(from + count <= self.count, "pages {from}+{count} of {}", self.count);
        RamRange { ram: self.ram, first: self.first + from, count }
    }

    /// Gives the range the advice about the size of pages that all of its RAM has: mappings whose advice
    /// differs cannot become one.
    pub(crate) fn advise(&self) -> io::Result<()> {
        // SAFETY: the range is RAM's own.
        unsafe { advise(self.page(0).cast_mut(), self.bytes(), self.ram.huge()) }
    }
}

/// Moves private pages; both ranges stay mapped.
///
/// # Safety
/// Both ranges belong to the caller, who keeps no references into them.
pub(crate) unsafe fn move_pages(
    from: *mut libc::c_void,
    to: *mut libc::c_void,
    bytes: usize,
) -> io::Result<()> {
    // `MREMAP_DONTUNMAP`, since Linux 5.7: a hole could be taken by another thread's mapping.
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    // SAFETY: promised by the caller.
    let moved = unsafe { libc::mremap(from, bytes, bytes, flags, to) };
    succeeded(moved != libc::MAP_FAILED)
}

/// # Safety
/// The range belongs to the caller.
unsafe fn advise(address: *mut u8, bytes: usize, huge: bool) -> io::Result<()> {
    let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: advice about the size of pages changes no content.
    let failed = unsafe { libc::madvise(address.cast(), bytes, advice) } != 0;
    match failed.then(io::Error::last_os_error) {
        Some(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_starts_where_a_huge_page_can() {
        for bytes in [HUGE_BYTES, HUGE_BYTES + PAGE_SIZE, 5 * HUGE_BYTES] {
            let ram = Ram::reserve(bytes).unwrap();
            assert!(ram.base().as_ptr().addr().is_multiple_of(HUGE_BYTES));
            assert_eq!(ram.bytes(), bytes);
        }
        assert!(Ram::reserve(PAGE_SIZE).unwrap().base().as_ptr().addr().is_multiple_of(PAGE_SIZE));
    }
}
