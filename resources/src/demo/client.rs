//! A client of a disk: reads and writes blocks through its own page cache, like an operating system.
//!
//! The client reads the disk in *units* of one or more consecutive blocks of 4 KiB, each unit as a whole.
//! Blocks that the cache lacks are read into the least recently used pages: the cache is exact LRU. A block's
//! content is a function of its number and of the number of writes by the client
//! ([`disk_word`](super::content::disk_word), [`version_tag`](super::content::version_tag)). The client
//! checks the content of used blocks.

use core::fmt;

use super::content::{PAGE_BYTES, mix};
use super::plan::{DiskOp, DiskPlan, number, number32, percent};
use super::zipf;

/// Size of a block in bytes.
pub const BLOCK_BYTES: u64 = PAGE_BYTES as u64;
/// Limit for the blocks of a unit.
pub const LONGEST_RUN: u32 = 64;
/// Limit for the requests in flight.
pub const MOST_REQUESTS: u32 = 32;

/// The order of units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Independent choices by Zipf's law with the exponent [`ClientPlan::theta`].
    Zipf,
    /// Independent choices with equal probability.
    Uniform,
    /// In order, starting again after the last unit.
    Scan,
    /// All units in a repeated order in which neighbours are far apart.
    Spread,
    /// By Zipf's law in the first half of the units. Every fourth unit is the next of a scan of the second
    /// half.
    ScanOverZipf,
}

impl Pattern {
    const ALL: [Self; 5] = [Self::Zipf, Self::Uniform, Self::Scan, Self::Spread, Self::ScanOverZipf];

    /// Returns the value of `client_reads=`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zipf => "zipf",
            Self::Uniform => "uniform",
            Self::Scan => "scan",
            Self::Spread => "spread",
            Self::ScanOverZipf => "scan-over-zipf",
        }
    }
}

/// The work of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientPlan {
    /// Pages of the client's cache.
    pub pages: u32,
    /// Blocks of the disk to use, from [`DiskPlan::sector`] on.
    pub blocks: u32,
    /// Blocks in a unit, at most [`LONGEST_RUN`]. Blocks after the last whole unit are not used.
    pub run: u32,
    /// The order of units.
    pub reads: Pattern,
    /// The exponent of Zipf's law, in hundredths.
    pub theta: u32,
    /// Units to use in a pass.
    pub units: u64,
    /// Percentage of units that are written instead of read.
    pub writes: u8,
    /// Whether to clear pages before blocks are read into them, as Linux does with `init_on_alloc=1`.
    pub clear: bool,
    /// Whether consecutive pages of the cache are scattered in memory.
    pub scatter: bool,
    /// Whether to check every word of every used block, instead of only the first.
    pub check: bool,
    /// Passes before counting starts, to fill the caches.
    pub warmup: u64,
}

impl Default for ClientPlan {
    fn default() -> Self {
        Self {
            pages: 1024,
            blocks: 4096,
            run: 1,
            reads: Pattern::Zipf,
            theta: 90,
            units: 10_000,
            writes: 0,
            clear: false,
            scatter: false,
            check: true,
            warmup: 0,
        }
    }
}

impl ClientPlan {
    /// Sets the option with the prefix `client_` and this name. Returns `None` if the name or the value is
    /// invalid.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "pages" => self.pages = number32(value)?,
            "blocks" => self.blocks = number32(value)?,
            "run" => self.run = number32(value).filter(|run| (1..=LONGEST_RUN).contains(run))?,
            "reads" => self.reads = Pattern::ALL.into_iter().find(|pattern| pattern.name() == value)?,
            // Larger exponents would lead to probabilities that a float cannot distinguish.
            "theta" => self.theta = number32(value).filter(|theta| *theta <= 1000)?,
            "units" => self.units = number(value)?,
            "writes" => self.writes = percent(value)?,
            "clear" => self.clear = flag(value)?,
            "scatter" => self.scatter = flag(value)?,
            "check" => self.check = flag(value)?,
            "warmup" => self.warmup = number(value)?,
            _ => return None,
        }
        Some(())
    }

    /// Returns the number of units of the disk.
    pub const fn disk_units(&self) -> u32 {
        match self.run {
            0 => 0,
            run => self.blocks / run,
        }
    }
}

impl fmt::Display for ClientPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages, blocks, run, reads, theta, units, writes, clear, scatter, check, warmup } = *self;
        write!(f, "client_pages={pages} client_blocks={blocks} client_run={run}")?;
        write!(f, " client_reads={} client_theta={theta} client_units={units}", reads.name())?;
        write!(f, " client_writes={writes} client_clear={} client_scatter={}", clear as u8, scatter as u8)?;
        write!(f, " client_check={} client_warmup={warmup}", check as u8)
    }
}

fn flag(value: &str) -> Option<bool> {
    number(value).filter(|number| *number <= 1).map(|number| number == 1)
}

/// The sequence of units that a client uses. The caller has the table of [`zipf::chances`].
#[derive(Debug, Clone)]
pub struct Units {
    pattern: Pattern,
    units: u32,
    /// Number of units that Zipf's law chooses from.
    ranked: u32,
    /// Distance between neighbouring ranks, or between units of [`Pattern::Spread`], in units. So popular
    /// units are spread over the disk.
    stride: u32,
    scanned: u64,
    count: u64,
    random: u64,
}

impl Units {
    /// Returns the units for VM number `vm`.
    pub fn new(plan: &ClientPlan, vm: u32) -> Self {
        let units = plan.disk_units();
        let ranked = ranks(plan);
        let stride = stride(if plan.reads == Pattern::Spread { units } else { ranked });
        Self { pattern: plan.reads, units, ranked, stride, scanned: 0, count: 0, random: mix(vm.into()) }
    }

    /// Returns a pseudorandom number.
    pub fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.random)
    }

    /// Returns the next unit, given the table of chances, or 0 if there are no units.
    pub fn next(&mut self, chance: impl Fn(u32) -> u64) -> u32 {
        self.count += 1;
        match self.pattern {
            Pattern::Uniform => ((u128::from(self.random()) * u128::from(self.units)) >> 64) as u32,
            Pattern::Scan => self.scan(0, self.units),
            Pattern::Spread => spread(self.scan(0, self.units), self.stride, self.units),
            Pattern::ScanOverZipf if self.count.is_multiple_of(4) => {
                self.scan(self.ranked, self.units - self.ranked)
            }
            Pattern::Zipf | Pattern::ScanOverZipf => {
                let rank = zipf::choose(self.ranked, self.random(), chance);
                spread(rank, self.stride, self.ranked)
            }
        }
    }

    fn scan(&mut self, first: u32, units: u32) -> u32 {
        let unit = first + (self.scanned % u64::from(units.max(1))) as u32;
        self.scanned += 1;
        unit
    }
}

/// Returns the number of entries in the table of chances.
pub const fn ranks(plan: &ClientPlan) -> u32 {
    match plan.reads {
        Pattern::Zipf => plan.disk_units(),
        Pattern::ScanOverZipf => plan.disk_units() / 2,
        Pattern::Uniform | Pattern::Scan | Pattern::Spread => 0,
    }
}

/// Returns the distance that spreads `count` consecutive items over `count` places as evenly as possible:
/// about the golden ratio of the count. It has no common divisor with the count.
pub fn stride(count: u32) -> u32 {
    let wanted = (u64::from(count) * 618 / 1000) as u32;
    (wanted.max(1)..).find(|&stride| coprime(stride, count)).unwrap_or(1)
}

/// Returns the place of the item with this number, for this distance.
const fn spread(number: u32, stride: u32, count: u32) -> u32 {
    match count {
        0 => 0,
        count => (number as u64 * stride as u64 % count as u64) as u32,
    }
}

const fn coprime(a: u32, b: u32) -> bool {
    let (mut a, mut b) = (a, b);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a == 1
}

/// The places of a client's tables and pages, in bytes from the start of its memory, which is page-aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientLayout {
    /// The chances of ranks, each a `u64`.
    pub chances: u64,
    /// For each block, a `u32` with its place in the cache (from 1 on, or 0 for none), and a `u32` with its
    /// version.
    pub blocks: u64,
    /// The places of the cache; see the guest.
    pub places: u64,
    /// A table of descriptors for each request in flight.
    pub descriptors: u64,
    /// The pages of the cache.
    pub pages: u64,
    /// The total size.
    pub bytes: u64,
}

impl ClientLayout {
    /// Size of a block's entry in bytes.
    pub const BLOCK_ENTRY: u64 = 8;
    /// Size of a place of the cache in bytes.
    pub const PLACE: u64 = 16;
    /// Size of a request's table in bytes: header, blocks and status.
    pub const DESCRIPTORS: u64 = (LONGEST_RUN as u64 + 2) * 16;

    /// Returns the layout for a disk's plan, or `None` if no client uses the disk.
    pub fn new(disk: &DiskPlan) -> Option<Self> {
        disk.ops.iter().any(|op| op == DiskOp::Client).then(|| Self::of(&disk.client))
    }

    /// Returns the page of a place of the cache. Places count from 1.
    pub fn page(&self, plan: &ClientPlan, place: u32) -> u64 {
        let stride = if plan.scatter { stride(plan.pages) } else { 1 };
        self.page_at(plan, place, stride)
    }

    /// Returns the page if consecutive places are this number of pages apart.
    pub const fn page_at(&self, plan: &ClientPlan, place: u32, stride: u32) -> u64 {
        self.pages + spread(place.wrapping_sub(1), stride, plan.pages) as u64 * BLOCK_BYTES
    }

    fn of(plan: &ClientPlan) -> Self {
        let blocks = u64::from(ranks(plan)) * 8;
        let places = blocks + u64::from(plan.blocks) * Self::BLOCK_ENTRY;
        // Place 0 is the end of the list.
        let descriptors = places.next_multiple_of(16) + (u64::from(plan.pages) + 1) * Self::PLACE;
        let tables = descriptors + u64::from(MOST_REQUESTS) * Self::DESCRIPTORS;
        let pages = tables.next_multiple_of(BLOCK_BYTES);
        Self {
            chances: 0,
            blocks,
            places: places.next_multiple_of(16),
            descriptors,
            pages,
            bytes: pages + u64::from(plan.pages) * BLOCK_BYTES,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(plan: &ClientPlan, count: usize) -> Vec<u32> {
        let mut table = Vec::new();
        zipf::chances(ranks(plan), plan.theta, |_, chance| table.push(chance));
        let mut units = Units::new(plan, 0);
        (0..count).map(|_| units.next(|rank| table[rank as usize])).collect()
    }

    #[test]
    fn a_scan_visits_every_unit_in_turn() {
        let plan = ClientPlan { reads: Pattern::Scan, blocks: 15, run: 2, ..ClientPlan::default() };
        assert_eq!(units(&plan, 9), [0, 1, 2, 3, 4, 5, 6, 0, 1]);
    }

    #[test]
    fn every_unit_is_reached_whatever_their_number() {
        for blocks in [1, 2, 3, 10, 97, 100] {
            for reads in [Pattern::Zipf, Pattern::Uniform, Pattern::ScanOverZipf] {
                let plan = ClientPlan { reads, blocks, theta: 0, ..ClientPlan::default() };
                let mut seen = units(&plan, 4000);
                seen.sort_unstable();
                seen.dedup();
                assert_eq!(seen.len(), blocks as usize, "{reads:?} of {blocks}");
            }
        }
    }

    #[test]
    fn spread_units_are_all_visited_once_and_never_side_by_side() {
        let plan = ClientPlan { reads: Pattern::Spread, blocks: 100, ..ClientPlan::default() };
        let mut units = units(&plan, 100);
        assert!(units.windows(2).all(|pair| pair[0].abs_diff(pair[1]) > 20), "{units:?}");
        units.sort_unstable();
        assert!(units.iter().copied().eq(0..100));
    }

    #[test]
    fn places_have_pages_of_their_own() {
        for scatter in [false, true] {
            let plan = ClientPlan { pages: 12, scatter, ..ClientPlan::default() };
            let layout = ClientLayout::of(&plan);
            let mut pages: Vec<_> = (1..=12).map(|place| layout.page(&plan, place)).collect();
            let together = pages.windows(2).filter(|pair| pair[1] == pair[0] + BLOCK_BYTES).count();
            assert_eq!(together, if scatter { 0 } else { 11 });
            pages.sort_unstable();
            assert!(pages.iter().copied().eq((0..12).map(|page| layout.pages + page * BLOCK_BYTES)));
        }
    }

    #[test]
    fn a_scan_goes_on_beside_popular_units() {
        let plan = ClientPlan { reads: Pattern::ScanOverZipf, blocks: 8, ..ClientPlan::default() };
        let units = units(&plan, 16);
        let scanned: Vec<_> = units.iter().skip(3).step_by(4).copied().collect();
        assert_eq!(scanned, [4, 5, 6, 7]);
        assert!(units.iter().enumerate().all(|(i, unit)| i % 4 == 3 || *unit < 4));
    }

    #[test]
    fn tables_do_not_overlap() {
        let plan = ClientPlan { pages: 7, blocks: 101, ..ClientPlan::default() };
        let layout = ClientLayout::of(&plan);
        assert_eq!(layout.blocks, 101 * 8);
        assert!(layout.places >= layout.blocks + 101 * ClientLayout::BLOCK_ENTRY);
        assert!(layout.descriptors >= layout.places + 8 * ClientLayout::PLACE);
        assert!(layout.pages >= layout.descriptors + 32 * ClientLayout::DESCRIPTORS);
        assert_eq!((layout.pages % 4096, layout.bytes), (0, layout.pages + 7 * 4096));
        assert_eq!(ClientLayout::new(&DiskPlan::new(0)), None);
    }
}
