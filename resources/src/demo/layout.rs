//! The layout of the guest's arena: the guest-physical addresses and the classes of its pages.
//!
//! Usable memory is the RAM of the memory map between [`FLOOR`] and [`CEILING`]. Its first pages contain, in
//! this order, page tables for memory above 4 GiB, the version table, the disk buffers and the memory of the
//! disk's client. The rest is the arena. Arena pages are counted from 0 across holes in the memory map.

use core::fmt;
use core::ops::Range;

use super::client::ClientLayout;
use super::content::{Class, PAGE_BYTES, SECTOR_BYTES};
use super::plan::Plan;

const PAGE: u64 = PAGE_BYTES as u64;

/// The guest's image, stacks and first page tables lie below this address; the arena lies above.
pub const FLOOR: u64 = 2 << 20;
/// Memory from this address on is not used, because one page-directory-pointer table maps no more.
pub const CEILING: u64 = 512 << 30;
/// The guest's static page tables map everything below this address.
pub const MAPPED_BY_IMAGE: u64 = 4 << 30;
/// Range that one page of page-directory entries maps, in bytes.
pub const DIRECTORY_SPAN: u64 = 1 << 30;
/// Size of a version-table entry in bytes.
const VERSION_BYTES: u64 = 4;
/// Number of runs after which the sequence of classes repeats.
const CYCLE: usize = 100;

/// The reason why there can be no arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayoutError {
    /// The memory map has too many separate ranges of usable memory.
    TooManyRanges,
    /// The lowest range of usable memory is too small for the guest's tables and disk buffers.
    TooSmall {
        /// Pages for the tables and buffers.
        needed: u64,
        /// Pages in the lowest range.
        usable: u64,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManyRanges => {
                write!(f, "the memory map has more than {} ranges of usable memory", Ram::MOST)
            }
            Self::TooSmall { needed, usable } => write!(
                f,
                "tables, disk buffers and the client's cache need {needed} pages, the lowest range of usable \
                 memory above {FLOOR:#x} has {usable}: give the guest more memory, a smaller disk window or a \
                 smaller cache"
            ),
        }
    }
}

impl core::error::Error for LayoutError {}

/// Whole usable pages, in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ram {
    /// First address and number of pages of each range.
    ranges: [(u64, u64); Self::MOST],
    len: usize,
}

impl Ram {
    /// Limit for separate ranges.
    pub const MOST: usize = 16;

    /// Returns the usable pages of a memory map, which is given as byte ranges of RAM in any order.
    ///
    /// # Errors
    /// Fails with [`LayoutError::TooManyRanges`].
    pub fn new(map: impl IntoIterator<Item = Range<u64>>) -> Result<Self, LayoutError> {
        let mut ram = Self::default();
        for range in map {
            let start = range.start.clamp(FLOOR, CEILING).next_multiple_of(PAGE);
            let pages = range.end.min(CEILING).saturating_sub(start) / PAGE;
            if pages == 0 {
                continue;
            }
            let slot = ram.ranges.get_mut(ram.len).ok_or(LayoutError::TooManyRanges)?;
            *slot = (start, pages);
            ram.len += 1;
            ram.ranges[..ram.len].sort_unstable();
        }
        Ok(ram)
    }

    /// Returns the number of usable pages.
    pub fn pages(&self) -> u64 {
        self.ranges().map(|(_, pages)| pages).sum()
    }

    /// Returns first address and number of pages of each range, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.ranges[..self.len].iter().copied()
    }

    /// Returns the address of a usable page, or `None` if there are not that many.
    pub fn address(&self, mut index: u64) -> Option<u64> {
        for (start, pages) in self.ranges() {
            if index < pages {
                return Some(start + index * PAGE);
            }
            index -= pages;
        }
        None
    }

    /// Returns the number of page directories for memory above [`MAPPED_BY_IMAGE`].
    fn directories(&self) -> u64 {
        let end = self.ranges().map(|(start, pages)| start + pages * PAGE).max().unwrap_or(0);
        end.saturating_sub(MAPPED_BY_IMAGE).div_ceil(DIRECTORY_SPAN)
    }
}

/// Number of an arena's pages in each class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageCounts {
    /// Identical in all VMs with the same seed.
    pub alike: u64,
    /// Unique.
    pub own: u64,
    /// Filled with zeros.
    pub zero: u64,
    /// Never touched. They take no host memory unless the host populates guest RAM.
    pub untouched: u64,
}

impl PageCounts {
    /// Returns the number of pages that sharing can save for `vms` freshly filled VMs: all but one copy of
    /// each alike page, and all zero pages.
    pub const fn reclaimable(&self, vms: u64) -> u64 {
        self.alike * vms.saturating_sub(1) + self.zero * vms
    }
}

/// The places and classes of a plan's pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arena {
    ram: Ram,
    /// Usable pages before the first page of the arena.
    first: u64,
    pages: u64,
    run: u64,
    cycle: [Class; CYCLE],
    /// Address of the page directories for memory above [`MAPPED_BY_IMAGE`].
    pub directories: u64,
    /// Address of the version table: a `u32` for each arena page.
    pub versions: u64,
    /// Address of the consecutive disk buffers, each a whole number of sectors.
    pub buffers: u64,
    /// Address of the memory of the disk's client, if there is one.
    pub client: u64,
}

impl Arena {
    /// Returns the layout of `plan` on `ram`.
    ///
    /// # Errors
    /// Fails with [`LayoutError::TooSmall`].
    pub fn new(plan: &Plan, ram: Ram) -> Result<Self, LayoutError> {
        let most = plan.pages.unwrap_or(u64::MAX).min(ram.pages());
        let directories = ram.directories();
        let versions = (most * VERSION_BYTES).div_ceil(PAGE);
        let buffers = buffer_bytes(plan).div_ceil(PAGE);
        let client = plan.disk.as_ref().and_then(ClientLayout::new);
        let client = client.map_or(0, |layout| layout.bytes.div_ceil(PAGE));
        let needed = directories + versions + buffers + client;
        let (base, usable) = ram.ranges().next().unwrap_or((FLOOR, 0));
        if needed > usable {
            return Err(LayoutError::TooSmall { needed, usable });
        }
        let first = needed.saturating_add(plan.skip).min(ram.pages());
        Ok(Self {
            ram,
            first,
            pages: most.min(ram.pages() - first),
            run: u64::from(plan.run.max(1)),
            cycle: cycle(plan),
            directories: base,
            versions: base + directories * PAGE,
            buffers: base + (directories + versions) * PAGE,
            client: base + (directories + versions + buffers) * PAGE,
        })
    }

    /// Returns the layout of `plan` on the byte ranges of RAM in a memory map.
    ///
    /// # Errors
    /// Fails like [`Ram::new`] and [`Arena::new`].
    pub fn on_map(plan: &Plan, map: impl IntoIterator<Item = Range<u64>>) -> Result<Self, LayoutError> {
        Self::new(plan, Ram::new(map)?)
    }

    /// Returns the number of pages.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Returns the usable memory that contains the arena.
    pub const fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Returns the guest-physical address of a page, or `None` from [`pages`](Self::pages) on.
    pub fn address(&self, index: u64) -> Option<u64> {
        if index >= self.pages {
            return None;
        }
        self.ram.address(self.first + index)
    }

    /// Returns the class of the page at `index`.
    pub fn class(&self, index: u64) -> Class {
        self.cycle[(index / self.run % CYCLE as u64) as usize]
    }

    /// Returns the number of pages in each class.
    pub fn counts(&self) -> PageCounts {
        let mut counts = PageCounts::default();
        let mut index = 0;
        while index < self.pages {
            let pages = self.run.min(self.pages - index);
            match self.class(index) {
                Class::Alike => counts.alike += pages,
                Class::Own => counts.own += pages,
                Class::Zero => counts.zero += pages,
                Class::Untouched => counts.untouched += pages,
            }
            index += pages;
        }
        counts
    }
}

/// Returns the size of one disk request of `plan` in bytes: whole sectors, at least one.
pub fn request_bytes(plan: &Plan) -> u64 {
    let size = plan.disk.map_or(0, |disk| u64::from(disk.size));
    size.max(1).next_multiple_of(SECTOR_BYTES as u64)
}

/// Returns the number of requests of `plan` with distinct buffers.
pub fn request_window(plan: &Plan) -> u64 {
    plan.disk.map_or(0, |disk| u64::from(disk.window.max(disk.depth).max(1)))
}

fn buffer_bytes(plan: &Plan) -> u64 {
    request_bytes(plan).saturating_mul(request_window(plan))
}

/// Returns the classes of 100 runs. After any number of them, each class has its share to within one run. The
/// next run goes to the class with the largest credit.
fn cycle(plan: &Plan) -> [Class; CYCLE] {
    let mut left = CYCLE as i32;
    let mut share = |percent: u8| {
        let share = left.min(percent.into());
        left -= share;
        share
    };
    let touched = [share(plan.alike), share(plan.own), share(plan.zero)];
    let shares = [touched[0], touched[1], touched[2], left];

    let mut credits = [0; Class::ALL.len()];
    let mut cycle = [Class::Untouched; CYCLE];
    for slot in &mut cycle {
        let mut richest = 0;
        for class in 0..shares.len() {
            credits[class] += shares[class];
            if credits[class] > credits[richest] {
                richest = class;
            }
        }
        credits[richest] -= CYCLE as i32;
        *slot = Class::ALL[richest];
    }
    cycle
}

#[cfg(test)]
mod tests {
    use std::iter::once;

    use super::super::plan::DiskPlan;
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn arena(plan: &Plan, ram: u64) -> Arena {
        Arena::on_map(plan, [0..0xa_0000, MIB..ram]).unwrap()
    }

    #[test]
    fn classes_have_their_shares() {
        for (alike, own, zero) in [(40, 40, 20), (100, 0, 0), (33, 33, 33), (0, 0, 0), (80, 80, 80)] {
            let plan = Plan { alike, own, zero, run: 1, pages: Some(5000), ..Plan::default() };
            let counts = arena(&plan, 64 * MIB).counts();
            let expected_own = own.min(100 - alike);
            let expected_zero = zero.min(100 - alike - expected_own);
            assert_eq!(counts.alike, u64::from(alike) * 50);
            assert_eq!(counts.own, u64::from(expected_own) * 50);
            assert_eq!(counts.zero, u64::from(expected_zero) * 50);
            assert_eq!(counts.alike + counts.own + counts.zero + counts.untouched, 5000);
        }
    }

    #[test]
    fn runs_of_the_classes_take_turns() {
        let arena = arena(&Plan { run: 4, ..Plan::default() }, 64 * MIB);
        let first: Vec<_> = (0..10).map(|run| arena.class(run * 4)).collect();
        for class in [Class::Alike, Class::Own] {
            assert_eq!(first.iter().filter(|c| **c == class).count(), 4);
        }
        assert!(first.windows(3).all(|run| run[0] != run[1] || run[1] != run[2]));
        assert!((0..4).all(|page| arena.class(page) == arena.class(0)));
    }

    #[test]
    fn counts_agree_with_a_walk_over_the_pages() {
        let plan = Plan { run: 7, ..Plan::default() };
        let arena = arena(&plan, 16 * MIB);
        let walk = |class| (0..arena.pages()).filter(|index| arena.class(*index) == class).count() as u64;
        let counts = arena.counts();
        assert_eq!(counts.alike, walk(Class::Alike));
        assert_eq!(counts.own, walk(Class::Own));
        assert_eq!(counts.zero, walk(Class::Zero));
        assert_eq!(counts.untouched, walk(Class::Untouched));
        assert_eq!(counts.reclaimable(3), 2 * counts.alike + 3 * counts.zero);
    }

    #[test]
    fn tables_and_arena_share_out_all_usable_memory() {
        let plan =
            Plan { disk: Some(DiskPlan { size: 5000, window: 3, ..DiskPlan::new(0) }), ..Plan::default() };
        let arena = arena(&plan, 64 * MIB);
        let version_pages = (62 * MIB / PAGE * 4).div_ceil(PAGE);
        assert_eq!(arena.versions, FLOOR);
        assert_eq!(arena.buffers, FLOOR + version_pages * PAGE);
        assert_eq!(arena.address(0), Some(arena.buffers + 4 * PAGE), "3 buffers of 10 sectors");
        assert_eq!(arena.address(arena.pages() - 1), Some(64 * MIB - PAGE));
        assert_eq!(arena.address(arena.pages()), None);
    }

    #[test]
    fn the_arena_goes_on_behind_a_hole() {
        let map = [0..0xa_0000, MIB..3 * GIB, 4 * GIB..5 * GIB + MIB];
        let arena = Arena::on_map(&Plan::default(), map).unwrap();
        assert_eq!(arena.versions, arena.directories + 2 * PAGE, "two directories for 1 GiB and 1 MiB");
        assert_eq!(arena.address(arena.pages() - 1), Some(5 * GIB + MIB - PAGE));
        let below = (3 * GIB - arena.address(0).unwrap()) / PAGE;
        assert_eq!(arena.address(below - 1), Some(3 * GIB - PAGE));
        assert_eq!(arena.address(below), Some(4 * GIB));
    }

    #[test]
    fn a_plan_can_limit_and_move_the_arena() {
        let near = arena(&Plan { pages: Some(100), ..Plan::default() }, 64 * MIB);
        let far = arena(&Plan { pages: Some(100), skip: 5, ..Plan::default() }, 64 * MIB);
        assert_eq!((near.pages(), far.pages()), (100, 100));
        assert_eq!(far.address(0).unwrap(), near.address(0).unwrap() + 5 * PAGE);
        assert_eq!(arena(&Plan { skip: u64::MAX, ..Plan::default() }, 64 * MIB).pages(), 0);
    }

    #[test]
    fn impossible_layouts_are_errors() {
        let disk = DiskPlan { size: u32::MAX, window: u32::MAX, ..DiskPlan::new(0) };
        let plan = Plan { disk: Some(disk), ..Plan::default() };
        assert!(matches!(Arena::on_map(&plan, once(0..64 * MIB)), Err(LayoutError::TooSmall { .. })));
        assert_eq!(Arena::on_map(&Plan::default(), once(0..MIB)).map(|arena| arena.pages()), Ok(0));
        let map = (1..40).map(|i| i * 2 * FLOOR..i * 2 * FLOOR + PAGE);
        assert_eq!(Ram::new(map), Err(LayoutError::TooManyRanges));
        assert_eq!(Ram::new([u64::MAX - 1..u64::MAX, 5..5]).map(|ram| ram.pages()), Ok(0));
    }
}
