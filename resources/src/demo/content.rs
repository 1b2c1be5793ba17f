//! The content of the guest's pages and disk sectors: a pure function of seed, VM and position.
//!
//! A word is a bijective mix of a 64-bit *counter*, in which every (kind, seed, position) has its own number.
//! So no two words of base content are equal, within a page, between pages or between seeds. Pages are equal
//! exactly as planned: an alike page equals only the page with the same index in every VM with the same seed.

/// Size of a page in bytes.
pub const PAGE_BYTES: usize = 4096;
/// Number of 64-bit words in a page.
pub const PAGE_WORDS: usize = PAGE_BYTES / 8;
/// Size of a disk sector in bytes (virtio 1.2, section 5.2.4).
pub const SECTOR_BYTES: usize = 512;
/// Number of 64-bit words in a disk sector.
pub const SECTOR_WORDS: usize = SECTOR_BYTES / 8;
/// Seeds and VM numbers are taken modulo this.
pub const SEEDS: u32 = 1 << 22;

/// Fields of a counter: kind (2 bits), seed or VM (22 bits), word position (40 bits).
const KIND_SHIFT: u32 = 62;
const SEED_SHIFT: u32 = 40;
const POSITION_MASK: u64 = (1 << SEED_SHIFT) - 1;
const KIND_ALIKE: u64 = 0;
const KIND_OWN: u64 = 1;
const KIND_TAG: u64 = 2;
const KIND_DISK: u64 = 3;

/// The kind of an arena page's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The same content at the same index in every VM with the same seed.
    Alike,
    /// Content that is unique among all pages of all VMs.
    Own,
    /// All zeros, written by the guest.
    Zero,
    /// Never touched by the guest.
    Untouched,
}

impl Class {
    /// Every class, in the order in which the layout assigns runs.
    pub const ALL: [Self; 4] = [Self::Alike, Self::Own, Self::Zero, Self::Untouched];

    /// Returns the name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alike => "alike",
            Self::Own => "own",
            Self::Zero => "zero",
            Self::Untouched => "untouched",
        }
    }

    /// Returns the class with this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.name() == name)
    }
}

/// A bijection on 64-bit words that spreads every input bit over the output (the finaliser of SplitMix64:
/// Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
#[inline]
pub const fn mix(counter: u64) -> u64 {
    let z = counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const fn counter(kind: u64, seed: u32, position: u64) -> u64 {
    kind << KIND_SHIFT | ((seed % SEEDS) as u64) << SEED_SHIFT | position & POSITION_MASK
}

/// The content of one VM's arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    seed: u32,
    vm: u32,
}

impl Contents {
    /// Returns the contents of VM number `vm` among those with this `seed`. Both are taken modulo [`SEEDS`].
    pub const fn new(seed: u32, vm: u32) -> Self {
        Self { seed, vm }
    }

    /// Returns the page at `index` of the arena, with class `class` and version `version`.
    ///
    /// Version 0 is the base content. Each other version differs from it in the first and the last word, and
    /// from all other pages and VMs.
    pub const fn page(&self, class: Class, index: u64, version: u32) -> PageContent {
        let position = index * PAGE_WORDS as u64;
        let first = match class {
            Class::Alike => Some(counter(KIND_ALIKE, self.seed, position)),
            Class::Own => Some(counter(KIND_OWN, self.vm, position)),
            Class::Zero | Class::Untouched => None,
        };
        let tag = match version {
            0 => 0,
            _ => mix(mix(counter(KIND_TAG, self.vm, position)) ^ version as u64),
        };
        PageContent { first, tag }
    }
}

/// The words of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageContent {
    /// Counter of word 0; `None` for a page of zeros.
    first: Option<u64>,
    tag: u64,
}

impl PageContent {
    /// Returns the base content of the word at `index` (below [`PAGE_WORDS`]), whatever the page's version.
    #[inline]
    pub const fn base(&self, index: usize) -> u64 {
        match self.first {
            Some(first) => mix(first + index as u64),
            None => 0,
        }
    }

    /// Returns the word at `index`, below [`PAGE_WORDS`].
    #[inline]
    pub const fn word(&self, index: usize) -> u64 {
        let tag = if index == 0 || index == PAGE_WORDS - 1 { self.tag } else { 0 };
        self.base(index) ^ tag
    }

    /// Returns whether the base content is all zeros.
    pub const fn is_zero(&self) -> bool {
        self.first.is_none()
    }
}

/// Returns the word at `index` (below [`SECTOR_WORDS`]) of the pattern in `sector` of a disk.
#[inline]
pub const fn disk_word(seed: u32, sector: u64, index: usize) -> u64 {
    mix(counter(KIND_DISK, seed, sector * SECTOR_WORDS as u64 + index as u64))
}

/// Returns the difference between the pattern and a sector that was written `version` times, counted from 0:
/// the first word is combined with this value by exclusive or.
#[inline]
pub const fn version_tag(seed: u32, sector: u64, version: u32) -> u64 {
    match version {
        0 => 0,
        _ => mix(disk_word(seed, sector, 0).wrapping_add(version as u64)),
    }
}

/// Checksum of a disk transfer: the sum, modulo 2^64, of each little-endian 64-bit word times
/// `2 * position + 1`, where positions count words from the start of the transfer.
///
/// Parts of the transfer may be added in any order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checksum(pub u64);

impl Checksum {
    /// Adds the word at `position`.
    #[inline]
    pub const fn add(&mut self, position: u64, word: u64) {
        self.0 = self.0.wrapping_add(word.wrapping_mul(position.wrapping_mul(2).wrapping_add(1)));
    }

    /// Returns the checksum of a whole transfer, without bytes after the last whole word.
    pub fn of(bytes: &[u8]) -> Self {
        let mut sum = Self::default();
        for (position, word) in bytes.chunks_exact(8).enumerate() {
            let mut raw = [0; 8];
            raw.copy_from_slice(word);
            sum.add(position as u64, u64::from_le_bytes(raw));
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn words(content: PageContent) -> impl Iterator<Item = u64> {
        (0..PAGE_WORDS).map(move |index| content.word(index))
    }

    #[test]
    fn no_two_words_of_base_content_are_equal() {
        let mut seen = HashSet::new();
        for vm in 0..3 {
            for page in 0..64 {
                let contents = Contents::new(vm, vm);
                for class in [Class::Alike, Class::Own] {
                    assert!(words(contents.page(class, page, 0)).all(|word| seen.insert(word)));
                }
            }
        }
        assert!((0..64).all(|sector| (0..SECTOR_WORDS).all(|i| seen.insert(disk_word(1, sector, i)))));
    }

    #[test]
    fn alike_pages_depend_on_the_seed_and_own_pages_on_the_vm() {
        let (a, b, c) = (Contents::new(1, 1), Contents::new(1, 2), Contents::new(2, 1));
        assert_eq!(a.page(Class::Alike, 7, 0), b.page(Class::Alike, 7, 0));
        assert_ne!(a.page(Class::Alike, 7, 0), c.page(Class::Alike, 7, 0));
        assert_ne!(a.page(Class::Own, 7, 0), b.page(Class::Own, 7, 0));
        assert_eq!(a.page(Class::Own, 7, 0), c.page(Class::Own, 7, 0));
    }

    #[test]
    fn a_version_changes_the_first_and_the_last_word_in_a_way_of_its_own() {
        let (a, b) = (Contents::new(1, 1), Contents::new(1, 2));
        for class in [Class::Alike, Class::Own, Class::Zero] {
            let base = a.page(class, 3, 0);
            let written = a.page(class, 3, 9);
            let differing: Vec<_> = (0..PAGE_WORDS).filter(|&i| base.word(i) != written.word(i)).collect();
            assert_eq!(differing, [0, PAGE_WORDS - 1]);
            assert_ne!(written.word(0), a.page(class, 3, 10).word(0));
            assert_ne!(written.word(0), b.page(class, 3, 9).word(0));
        }
    }

    #[test]
    fn a_checksum_can_be_added_up_in_any_order() {
        let bytes: Vec<u8> = (0..64).collect();
        let mut backwards = Checksum::default();
        for (position, word) in bytes.chunks_exact(8).enumerate().rev() {
            backwards.add(position as u64, u64::from_le_bytes(word.try_into().unwrap()));
        }
        assert_eq!(backwards, Checksum::of(&bytes));
        assert_ne!(Checksum::of(&bytes), Checksum::of(&[0; 64]));
    }
}
