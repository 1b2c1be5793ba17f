//! Page contents: copies, comparisons and keyed digests.
//!
//! Guests write to their pages while these functions read them. A copy, a digest or a comparison
//! taken then is a hint and may mix old and new bytes; only a comparison under write protection
//! decides anything.

#![expect(unsafe_code, reason = "guest pages are read through raw addresses")]

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::ops::Deref;

use twox_hash::xxhash3_64;

use crate::memory::ram::PAGE_SIZE;
use crate::numbers::Digest;

/// The bytes of one page, owned by the host.
pub type Page = [u8; PAGE_SIZE];

static ZEROS: Page = [0; PAGE_SIZE];

/// Bytes of key material: the secret that XXH3 takes.
const KEY_BYTES: usize = 192;

/// Digests of pages under a key of this process, so that no guest can prepare pages that collide.
/// Equal digests are a hint to compare, never more.
#[derive(Debug)]
pub struct Digester {
    key: [u8; KEY_BYTES],
}

impl Digester {
    /// A digester with a fresh random key.
    ///
    /// # Errors
    /// Fails if the kernel's random numbers cannot be read.
    pub fn new() -> io::Result<Self> {
        let mut key = [0; KEY_BYTES];
        File::open("/dev/urandom")?.read_exact(&mut key)?;
        Ok(Self { key })
    }

    /// A digester with a key that another process has drawn. `None` where the key is too short or too long.
    pub(crate) fn with_key(key: &[u8]) -> Option<Self> {
        key.try_into().ok().map(|key| Self { key })
    }

    /// The key, for a process that is to have the same digests.
    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }

    /// The digest of a page.
    #[must_use]
    pub fn digest(&self, page: &Page) -> Digest {
        let digest = xxhash3_64::Hasher::oneshot_with_secret(&self.key, page)
            .expect("the key is longer than the 136 bytes XXH3 asks for");
        Digest::new((digest >> 32) as u32 ^ digest as u32)
    }
}

/// Copies a guest page into the host's hands.
///
/// # Safety
/// `page` is the address of a mapped, readable page. Others may write to it meanwhile.
pub unsafe fn copy(page: *const u8, into: &mut Page) {
    // SAFETY: the source is readable as promised and the target is ours.
    unsafe { copy_bytes(page, into.as_mut_ptr()) }
}

/// A copy of a page in the host's hands, which nobody else writes to.
#[repr(C, align(64))]
pub struct Snapshot(Page);

impl Snapshot {
    /// Copies a guest page.
    ///
    /// # Safety
    /// As for [`copy`].
    pub(crate) unsafe fn take(page: *const u8) -> Self {
        let mut snapshot = MaybeUninit::<Self>::uninit();
        // SAFETY: the source is readable as promised. The copy fills all of the snapshot.
        unsafe {
            copy_bytes(page, snapshot.as_mut_ptr().cast());
            snapshot.assume_init()
        }
    }

    /// Copies a guest page over what is in it.
    ///
    /// # Safety
    /// As for [`copy`].
    pub(crate) unsafe fn retake(&mut self, page: *const u8) {
        // SAFETY: promised by the caller.
        unsafe { copy(page, &mut self.0) }
    }

    /// The bytes, to be written.
    pub(crate) fn bytes_mut(&mut self) -> &mut Page {
        &mut self.0
    }

    /// Whether it holds zeros alone.
    pub(crate) fn is_zero(&self) -> bool {
        // SAFETY: the page is ours.
        unsafe { zero(self.0.as_ptr()) }
    }
}

impl Default for Snapshot {
    fn default() -> Self {
        Self([0; PAGE_SIZE])
    }
}

impl Deref for Snapshot {
    type Target = Page;

    fn deref(&self) -> &Page {
        &self.0
    }
}

/// Copies a page to another.
///
/// # Safety
/// `page` is as for [`copy`]; `into` is the address of a mapped, writable page of the caller's.
pub(crate) unsafe fn copy_bytes(page: *const u8, into: *mut u8) {
    // SAFETY: promised by the caller. The copy is made by one instruction that the compiler cannot
    // look into, so racing writes tear bytes and no more.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") PAGE_SIZE => _,
            inout("rsi") page => _,
            inout("rdi") into => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Compares two pages.
///
/// # Safety
/// Both are addresses of mapped, readable pages. The answer holds only for pages that nobody can
/// write to meanwhile.
#[must_use]
pub unsafe fn equal(one: *const u8, other: *const u8) -> bool {
    // SAFETY: promised by the caller; memcmp reads bytes and keeps none.
    unsafe { libc::memcmp(one.cast(), other.cast(), PAGE_SIZE) == 0 }
}

/// Whether two pages are equal in a few places, so that they probably are in all: 16 times faster.
///
/// # Safety
/// As [`equal`].
#[must_use]
pub unsafe fn probably_equal(one: *const u8, other: *const u8) -> bool {
    const LINE: usize = 64;
    [0, PAGE_SIZE / 3 / LINE * LINE, PAGE_SIZE * 2 / 3 / LINE * LINE, PAGE_SIZE - LINE].into_iter().all(
        |at| {
            // SAFETY: promised by the caller; each place is a line within the page.
            unsafe { libc::memcmp(one.wrapping_add(at).cast(), other.wrapping_add(at).cast(), LINE) == 0 }
        },
    )
}

/// How two pages compare, byte by byte.
///
/// # Safety
/// As [`equal`].
#[must_use]
pub unsafe fn order(one: *const u8, other: *const u8) -> std::cmp::Ordering {
    // SAFETY: as in `equal`.
    unsafe { libc::memcmp(one.cast(), other.cast(), PAGE_SIZE) }.cmp(&0)
}

/// Whether a page holds zeros alone.
///
/// # Safety
/// As [`equal`].
#[must_use]
pub unsafe fn zero(page: *const u8) -> bool {
    // SAFETY: promised by the caller.
    unsafe { equal(page, ZEROS.as_ptr()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_compares_and_digests() {
        let mut page = [7; PAGE_SIZE];
        page[PAGE_SIZE - 1] = 1;
        let mut twin = [0; PAGE_SIZE];
        // SAFETY: all are arrays of this test.
        unsafe {
            assert!(zero(twin.as_ptr()) && !zero(page.as_ptr()));
            copy(page.as_ptr(), &mut twin);
            assert!(equal(page.as_ptr(), twin.as_ptr()));
        }
        let digester = Digester::new().unwrap();
        assert_eq!(digester.digest(&page), digester.digest(&twin));
        twin[100] ^= 1;
        assert_ne!(digester.digest(&page), digester.digest(&twin));
        // SAFETY: as above.
        assert!(unsafe { !equal(page.as_ptr(), twin.as_ptr()) });
    }

    #[test]
    fn every_process_has_its_own_key() {
        let page = [3; PAGE_SIZE];
        let digests: Vec<_> = (0..4).map(|_| Digester::new().unwrap().digest(&page)).collect();
        assert!(digests.iter().any(|digest| *digest != digests[0]), "{digests:?}");
    }
}
