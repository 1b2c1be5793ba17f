//! The word of flags for a page frame.
//!
//! The bits are those of Linux' `/proc/kpageflags` (`include/uapi/linux/kernel-page-flags.h`,
//! `Documentation/admin-guide/mm/pagemap.rst`). Linux guarantees that their meaning does not change:
//!
//! | bits of the word | from `/proc/kpageflags` |
//! | --- | --- |
//! | 0 to 26 | the same bits |
//! | 27 | 32, reserved |
//! | 28 | 33, mlocked |
//! | 29 | 34, mapped to disk |
//! | 30 | none; 0 |
//! | 31 | none; [`PUBLISHED`] |
//!
//! Bits 35 and up are for debugging a kernel, so they are omitted.

/// The word was written. A word of 0 says nothing about its page frame.
pub const PUBLISHED: u32 = 1 << 31;

/// Locked, for example during a read from a disk.
pub const LOCKED: u32 = 1 << 0;
/// The content differs from the disk's.
pub const DIRTY: u32 = 1 << 4;
/// On a list of reclaimable pages.
pub const LRU: u32 = 1 << 5;
/// Used by a slab allocator.
pub const SLAB: u32 = 1 << 7;
/// Being written back.
pub const WRITEBACK: u32 = 1 << 8;
/// Free, in the buddy allocator.
pub const BUDDY: u32 = 1 << 10;
/// Mapped by a process.
pub const MMAP: u32 = 1 << 11;
/// Anonymous.
pub const ANON: u32 = 1 << 12;
/// Can be swapped: anonymous or shared memory.
pub const SWAP_BACKED: u32 = 1 << 14;
/// The first of several pages that form a unit.
pub const COMPOUND_HEAD: u32 = 1 << 15;
/// One of the following pages of such a unit.
pub const COMPOUND_TAIL: u32 = 1 << 16;
/// A page of hugetlb.
pub const HUGE: u32 = 1 << 17;
/// There is no page frame with this number.
pub const NOPAGE: u32 = 1 << 20;
/// Merged by the guest's own KSM.
pub const KSM: u32 = 1 << 21;
/// Given to a balloon driver, or offline.
pub const OFFLINE: u32 = 1 << 23;
/// The page of zeros that processes read before they write.
pub const ZERO_PAGE: u32 = 1 << 24;
/// A table of a process's mappings.
pub const PAGE_TABLE: u32 = 1 << 26;
/// Never available to the page allocator, or not to be swapped.
pub const RESERVED: u32 = 1 << 27;
/// Locked into memory.
pub const MLOCKED: u32 = 1 << 28;
/// Has blocks on a disk.
pub const MAPPED_TO_DISK: u32 = 1 << 29;

/// The bits that a word shares with `/proc/kpageflags`.
const SAME: u64 = (1 << 27) - 1;
/// The other bits: source, target.
const MOVED: [(u32, u32); 3] = [(32, RESERVED), (33, MLOCKED), (34, MAPPED_TO_DISK)];

/// Returns the word for a value of `/proc/kpageflags`.
#[must_use]
pub const fn word(kpageflags: u64) -> u32 {
    let mut word = (kpageflags & SAME) as u32 | PUBLISHED;
    let mut index = 0;
    while index < MOVED.len() {
        let (from, to) = MOVED[index];
        if kpageflags & 1 << from != 0 {
            word |= to;
        }
        index += 1;
    }
    word
}

/// The use of a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageType {
    /// Unknown, or used by the kernel in a way without a flag.
    #[default]
    Unknown,
    /// Memory of processes.
    Anonymous,
    /// Content of files, mapped by processes. Shared memory is a file.
    FileMapped,
    /// Content of files that only the page cache holds.
    FileUnmapped,
    /// The kernel's small objects.
    Slab,
    /// Tables of mappings.
    PageTable,
    /// Several pages that form a unit, for none of the other uses.
    Compound,
    /// Free.
    Free,
    /// Given to a balloon.
    Balloon,
}

impl PageType {
    /// All types. The index of a type is its number.
    pub const ALL: [Self; 9] = [
        Self::Unknown,
        Self::Anonymous,
        Self::FileMapped,
        Self::FileUnmapped,
        Self::Slab,
        Self::PageTable,
        Self::Compound,
        Self::Free,
        Self::Balloon,
    ];

    /// Returns the name of the type.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Anonymous => "anonymous",
            Self::FileMapped => "file_mapped",
            Self::FileUnmapped => "file_unmapped",
            Self::Slab => "slab",
            Self::PageTable => "page_table",
            Self::Compound => "compound",
            Self::Free => "free",
            Self::Balloon => "balloon",
        }
    }

    /// Returns whether the type is content of files.
    #[must_use]
    pub const fn is_file(self) -> bool {
        matches!(self, Self::FileMapped | Self::FileUnmapped)
    }
}

/// Returns the page type in a word.
#[must_use]
pub const fn page_type(word: u32) -> PageType {
    if !has(word, PUBLISHED) || has(word, NOPAGE) {
        PageType::Unknown
    } else if has(word, BUDDY) {
        PageType::Free
    } else if has(word, OFFLINE) {
        PageType::Balloon
    } else if has(word, PAGE_TABLE) {
        PageType::PageTable
    } else if has(word, SLAB) {
        PageType::Slab
    } else if has(word, ANON) {
        PageType::Anonymous
    } else if has(word, LRU) || has(word, SWAP_BACKED) || has(word, MAPPED_TO_DISK) {
        if has(word, MMAP) { PageType::FileMapped } else { PageType::FileUnmapped }
    } else if has(word, COMPOUND_HEAD) || has(word, COMPOUND_TAIL) || has(word, HUGE) {
        PageType::Compound
    } else {
        PageType::Unknown
    }
}

/// Returns whether the page's content is about to change or has just changed: it is being read or written
/// back, or waits for that.
#[must_use]
pub const fn in_motion(word: u32) -> bool {
    word & (LOCKED | WRITEBACK | DIRTY) != 0
}

const fn has(word: u32, flags: u32) -> bool {
    word & flags == flags
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn words_hold_the_flags_of_the_kernel() {
        assert_eq!(word(0), PUBLISHED);
        assert_eq!(word(1 << 10), PUBLISHED | BUDDY);
        assert_eq!(word(1 << 26 | 1 << 27), PUBLISHED | PAGE_TABLE);
        assert_eq!(
            word(1 << 32 | 1 << 33 | 1 << 34 | 1 << 40),
            PUBLISHED | RESERVED | MLOCKED | MAPPED_TO_DISK
        );
        assert_eq!(word(u64::MAX), !(1 << 30));
    }

    #[test]
    fn pages_are_told_apart_by_their_flags() {
        let of = |flags| page_type(PUBLISHED | flags);
        assert_eq!(page_type(BUDDY), PageType::Unknown, "nobody wrote this word");
        assert_eq!(of(0), PageType::Unknown);
        assert_eq!(of(RESERVED), PageType::Unknown);
        assert_eq!(of(NOPAGE | BUDDY), PageType::Unknown);
        assert_eq!(of(BUDDY), PageType::Free);
        assert_eq!(of(OFFLINE), PageType::Balloon);
        assert_eq!(of(PAGE_TABLE), PageType::PageTable);
        assert_eq!(of(SLAB | COMPOUND_TAIL), PageType::Slab);
        assert_eq!(of(ANON | MMAP | LRU | SWAP_BACKED | COMPOUND_HEAD), PageType::Anonymous);
        assert_eq!(of(LRU | MMAP), PageType::FileMapped);
        assert_eq!(of(LRU | SWAP_BACKED), PageType::FileUnmapped);
        assert_eq!(of(COMPOUND_HEAD), PageType::Compound);
    }

    #[test]
    fn types_have_their_numbers_for_places() {
        for (number, kind) in PageType::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, number, "{}", kind.name());
        }
        assert!(PageType::ALL.into_iter().filter(|kind| kind.is_file()).count() == 2);
    }

    #[test]
    fn a_page_on_its_way_to_or_from_a_disk_is_in_motion() {
        assert!(!in_motion(PUBLISHED | LRU | MMAP));
        assert!([LOCKED, DIRTY, WRITEBACK].iter().all(|&flag| in_motion(PUBLISHED | LRU | flag)));
    }
}
