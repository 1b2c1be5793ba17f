//! Memory that host I/O reads from and writes to.
//!
//! An operation owns its buffer until the kernel has finished, so the buffer cannot be freed or reused
//! before. Reads go to memory that only the host accesses ([`Bounce`], [`Fetch`]). A read into guest memory
//! would pin pages that the engine may be remapping. Writes may come directly from guest memory
//! ([`GuestSlices`]): the kernel only reads there, and a remapped page keeps its content.

#![expect(unsafe_code, reason = "buffers are shared with the kernel by address")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use super::cache::Fetch;
use crate::GuestMemory;

/// Alignment of bounce buffers, in bytes: sufficient for direct I/O on any device.
pub(crate) const BUFFER_ALIGNMENT: usize = 4096;
/// Sizes of bounce buffers, in bytes. The largest is the limit for one operation through a buffer, and equals
/// the kernel's readahead.
const CLASSES: [usize; 3] = [4 << 10, 32 << 10, MAX_BOUNCE];
const LARGEST: usize = CLASSES.len() - 1;
/// Upper limit for a bounce buffer, in bytes.
pub(crate) const MAX_BOUNCE: usize = 128 << 10;

/// Host memory for bounce buffers, backed by a huge page if the kernel has one. Physically contiguous memory
/// is one segment for the device. Scattered pages are one segment each, and some devices serve each segment
/// as a separate request.
#[derive(Debug)]
struct Slab(NonNull<u8>);

// SAFETY: each buffer that was cut from the slab owns its own part of the memory.
unsafe impl Send for Slab {}
// SAFETY: as above; the slab itself gives access to nothing.
unsafe impl Sync for Slab {}

impl Slab {
    /// The size of a huge page.
    const BYTES: usize = 2 << 20;

    fn new() -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let mapped = unsafe { libc::mmap(std::ptr::null_mut(), 2 * Self::BYTES, access, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return None;
        }
        let lead = mapped.cast::<u8>().align_offset(Self::BYTES);
        let base = mapped.cast::<u8>().wrapping_add(lead);
        // SAFETY: both parts belong to the new mapping and lie outside the slab. The advice changes no
        // content. An empty part changes nothing, nor does a kernel that ignores the advice.
        unsafe {
            if lead > 0 {
                libc::munmap(mapped, lead);
            }
            if lead < Self::BYTES {
                libc::munmap(base.wrapping_add(Self::BYTES).cast(), Self::BYTES - lead);
            }
            libc::madvise(base.cast(), Self::BYTES, libc::MADV_HUGEPAGE);
        }
        NonNull::new(base).map(Self)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`. Each buffer keeps the slab, so no buffer exists any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), Self::BYTES) };
    }
}

/// Aligned host memory that data passes through between image and guest.
#[derive(Debug)]
pub(crate) struct Bounce {
    memory: NonNull<u8>,
    class: usize,
    len: usize,
    /// Keeps the memory of a large buffer.
    slab: Option<Arc<Slab>>,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Bounce {}

impl Bounce {
    fn new(class: usize) -> Self {
        let layout = Self::layout(class);
        // SAFETY: the layout has a positive size.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(memory) = NonNull::new(memory) else { handle_alloc_error(layout) };
        Self { memory, class, len: CLASSES[class], slab: None }
    }

    fn layout(class: usize) -> Layout {
        Layout::from_size_align(CLASSES[class], BUFFER_ALIGNMENT)
            .expect("sizes are multiples of the alignment")
    }

    /// Returns as many of the largest buffers as a slab holds, or none if there is no memory for a slab.
    fn of_slab() -> Vec<Self> {
        let Some(slab) = Slab::new().map(Arc::new) else { return Vec::new() };
        let cut = |index: usize| {
            // SAFETY: the part is within the slab.
            let memory = unsafe { slab.0.add(index * MAX_BOUNCE) };
            Self { memory, class: LARGEST, len: MAX_BOUNCE, slab: Some(Arc::clone(&slab)) }
        };
        (0..Slab::BYTES / MAX_BOUNCE).map(cut).collect()
    }

    /// Returns the bytes in use.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `len` is at most the size of the allocation, which was initialised with zeros and belongs
        // to this value alone. No I/O is in progress, because I/O would own this value.
        unsafe { slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }

    /// Returns the bytes in use.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and this value is borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        if self.slab.is_none() {
            // SAFETY: allocated in `new` with this layout.
            unsafe { dealloc(self.memory.as_ptr(), Self::layout(self.class)) }
        }
    }
}

/// The bounce buffers of one queue. Their total size is limited, and few free buffers are kept for the next
/// request.
#[derive(Debug)]
pub(crate) struct BouncePool {
    free: [Vec<Bounce>; CLASSES.len()],
    /// Bytes of all buffers, free or in use.
    total: usize,
    limit: usize,
}

impl BouncePool {
    /// Returns a pool of at most `limit` bytes, and at least one buffer.
    pub(crate) fn new(limit: usize) -> Self {
        Self { free: Default::default(), total: 0, limit: limit.max(MAX_BOUNCE) }
    }

    /// Returns a buffer of `len` bytes, at most [`MAX_BOUNCE`], or `None` if too many buffers are in use.
    pub(crate) fn take(&mut self, len: usize) -> Option<Bounce> {
        let class = CLASSES.iter().position(|&size| len <= size)?;
        let mut buffer = match self.free[class].pop() {
            Some(buffer) => buffer,
            None => {
                if self.total + CLASSES[class] > self.limit {
                    self.drop_free();
                }
                if self.total + CLASSES[class] > self.limit {
                    return None;
                }
                if class == LARGEST && self.total + Slab::BYTES <= self.limit {
                    self.free[class] = Bounce::of_slab();
                    self.total += self.free[class].len() * CLASSES[class];
                }
                self.free[class].pop().unwrap_or_else(|| {
                    self.total += CLASSES[class];
                    Bounce::new(class)
                })
            }
        };
        buffer.len = len;
        Some(buffer)
    }

    /// Returns a buffer to the pool.
    pub(crate) fn give(&mut self, buffer: Bounce) {
        self.free[buffer.class].push(buffer);
    }

    /// Frees all unused buffers except one small one, so that an idle disk costs little.
    pub(crate) fn trim(&mut self) {
        let kept = self.free[0].pop();
        self.drop_free();
        self.free[0].extend(kept);
    }

    fn drop_free(&mut self) {
        for buffer in self.free.iter_mut().flat_map(|free| free.drain(..)) {
            self.total -= CLASSES[buffer.class];
        }
    }
}

/// Ranges of guest memory that are written to an image.
pub(crate) struct GuestSlices {
    /// Keeps the addresses below mapped.
    _memory: GuestMemory,
    vectors: Vec<libc::iovec>,
    len: usize,
}

// SAFETY: the addresses are of guest memory, which any thread may read; `_memory` keeps it mapped.
unsafe impl Send for GuestSlices {}

impl GuestSlices {
    /// Returns the ranges `pieces`. Fails with `None` unless each begins at a host address aligned to
    /// `address_alignment`, has a length that is a multiple of `length_alignment`, and lies in guest memory.
    /// Both alignments are powers of two.
    pub(crate) fn new(
        memory: &GuestMemory,
        pieces: &[(GuestAddress, usize)],
        address_alignment: usize,
        length_alignment: usize,
    ) -> Option<Self> {
        let mut vectors = Vec::with_capacity(pieces.len());
        let mut len = 0;
        for &(address, bytes) in pieces {
            for slice in memory.get_slices(address, bytes, Permissions::Read).ok()? {
                let slice = slice.ok()?;
                let base = address_of(&slice);
                let aligned = (base as usize).is_multiple_of(address_alignment)
                    && slice.len().is_multiple_of(length_alignment);
                if !aligned {
                    return None;
                }
                vectors.push(libc::iovec { iov_base: base.cast(), iov_len: slice.len() });
                len += slice.len();
            }
        }
        let fits = vectors.len() <= libc::UIO_MAXIOV as usize;
        fits.then(|| Self { _memory: memory.clone(), vectors, len })
    }
}

impl GuestSlices {
    /// Reads a byte of each page, which reveals pages that the host cannot supply.
    pub(crate) fn touch(&self) {
        const PAGE: usize = 4096;
        for vector in &self.vectors {
            for offset in (0..vector.iov_len).step_by(PAGE) {
                // SAFETY: within guest memory, which `_memory` keeps mapped.
                unsafe { vector.iov_base.cast::<u8>().wrapping_add(offset).read_volatile() };
            }
        }
    }
}

fn address_of<B: Bitmap + BitmapSlice>(slice: &VolatileSlice<'_, B>) -> *mut u8 {
    slice.ptr_guard().as_ptr().cast_mut()
}

/// The source or the target of an operation.
pub(crate) enum Memory {
    /// A bounce buffer.
    Bounce(Bounce),
    /// A buffer of the cache, to read into.
    Fetch(Fetch),
    /// Guest memory, to write from.
    Guest(GuestSlices),
}

impl Memory {
    /// Returns the number of bytes to transfer.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Bounce(bounce) => bounce.len,
            Self::Fetch(fetch) => fetch.bytes(),
            Self::Guest(slices) => slices.len,
        }
    }

    /// Returns the bytes to read into, or `None` for guest memory.
    pub(crate) fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        match self {
            Self::Bounce(bounce) => Some(bounce.bytes_mut()),
            Self::Fetch(fetch) => {
                let (start, len) = (fetch.buffer().as_ptr(), fetch.bytes());
                // SAFETY: the maker of the fetch guarantees that the buffer is writable and that only the
                // fetch's holder accesses it. The fetch is borrowed here.
                Some(unsafe { slice::from_raw_parts_mut(start, len) })
            }
            Self::Guest(_) => None,
        }
    }

    /// Returns the vectors that remain after the first `done` bytes. They are valid while this value lives
    /// and is not borrowed otherwise.
    pub(crate) fn vectors(&self, done: usize) -> Vec<libc::iovec> {
        let whole =
            |base: NonNull<u8>, len| vec![libc::iovec { iov_base: base.as_ptr().cast(), iov_len: len }];
        let vectors = match self {
            Self::Bounce(bounce) => whole(bounce.memory, bounce.len),
            Self::Fetch(fetch) => whole(fetch.buffer(), fetch.bytes()),
            Self::Guest(slices) => slices.vectors.clone(),
        };
        skip(vectors, done)
    }
}

/// Removes the first `done` bytes.
fn skip(mut vectors: Vec<libc::iovec>, mut done: usize) -> Vec<libc::iovec> {
    let whole = vectors
        .iter()
        .take_while(|vector| {
            let is_done = done >= vector.iov_len;
            if is_done {
                done -= vector.iov_len;
            }
            is_done
        })
        .count();
    vectors.drain(..whole);
    if let Some(first) = vectors.first_mut() {
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
        first.iov_len -= done;
    }
    vectors
}

/// Returns the range of whole pieces of `alignment` bytes that overlap `range`.
pub(crate) fn widen(range: &Range<u64>, alignment: u64) -> Range<u64> {
    range.start - range.start % alignment..range.end.next_multiple_of(alignment)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn a_pool_is_bounded_and_gives_memory_back() {
        let mut pool = BouncePool::new(2 * MAX_BOUNCE);
        let large = [pool.take(MAX_BOUNCE).unwrap(), pool.take(MAX_BOUNCE).unwrap()];
        assert!(pool.take(1).is_none());
        for buffer in large {
            assert!((buffer.bytes().as_ptr() as usize).is_multiple_of(BUFFER_ALIGNMENT));
            pool.give(buffer);
        }
        // Free buffers make way for others.
        let small: Vec<_> = (0..64).map(|_| pool.take(512).unwrap()).collect();
        assert!(small.iter().all(|buffer| buffer.bytes().len() == 512));
        assert!(pool.take(MAX_BOUNCE).is_none() && pool.take(MAX_BOUNCE + 1).is_none());
        small.into_iter().for_each(|buffer| pool.give(buffer));
        pool.trim();
        assert_eq!(pool.total, CLASSES[0]);
    }

    #[test]
    fn guest_memory_is_written_from_where_it_is_aligned() {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)];
        let memory = GuestMemory::from_ranges(&ranges).unwrap();
        memory.write_slice(&[7; 0x1000], GuestAddress(0x3800)).unwrap();
        let slices = |address, len| GuestSlices::new(&memory, &[(GuestAddress(address), len)], 512, 512);
        assert!(
            slices(0x201, 512).is_none() && slices(0x200, 511).is_none() && slices(0x7e00, 1024).is_none()
        );
        // Across two regions that are not neighbours in the host.
        let memory = Memory::Guest(slices(0x3800, 0x1000).unwrap());
        assert_eq!((memory.len(), memory.vectors(0).len(), memory.vectors(0x800).len()), (0x1000, 2, 1));
        assert_eq!(memory.vectors(0x900)[0].iov_len, 0x700);
        assert!(memory.vectors(0x1000).is_empty());
    }

    #[test]
    fn ranges_widen_to_whole_pieces() {
        assert_eq!(widen(&(512..1024), 4096), 0..4096);
        assert_eq!(widen(&(4096..8192), 4096), 4096..8192);
        assert_eq!(widen(&(4095..8193), 4096), 0..12288);
    }
}
