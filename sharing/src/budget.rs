//! Mappings, a budget of the whole process: the kernel allows `vm.max_map_count` of them, and at
//! the limit thread creation and malloc fail as well. Merging stops at a reserve before that.

use std::fs;
use std::io::{self, BufRead, BufReader};

/// Mappings kept free for the process itself.
const RESERVE: u64 = 4096;
/// Mappings kept free for each VM: stacks, devices, the end of its RAM.
const RESERVE_PER_VM: u64 = 64;
/// The kernel's own default, where the setting cannot be read.
const DEFAULT_LIMIT: u64 = 65530;
/// After how many steps the process is recounted although few mappings were added.
const RECOUNT_STEPS: u32 = 4096;

/// How many mappings there are, may be, and are kept back.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    reserve: u64,
    /// Mappings of the process beyond those that guest RAM is known to need.
    other: u64,
    /// Guest RAM's at the last count.
    counted: u64,
    steps: u32,
}

impl Budget {
    /// A budget under the kernel's limit, or under a lower one of the caller's.
    #[must_use]
    pub fn new(limit: Option<u64>) -> Self {
        let kernels = fs::read_to_string("/proc/sys/vm/max_map_count")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(DEFAULT_LIMIT);
        let limit = limit.map_or(kernels, |limit| limit.min(kernels));
        Self { limit, reserve: RESERVE.min(limit / 2), other: 0, counted: 0, steps: u32::MAX }
    }

    /// The limit on mappings.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Mappings in use by the process, given those of guest RAM.
    #[must_use]
    pub fn used(&self, guest: u64) -> u64 {
        self.other + guest
    }

    /// How many more mappings merging may make with `vms` VMs, given those of guest RAM.
    #[must_use]
    pub fn room(&self, guest: u64, vms: usize) -> i64 {
        let reserve = self.reserve + RESERVE_PER_VM * vms as u64;
        self.limit as i64 - reserve as i64 - self.used(guest) as i64
    }

    /// Counts the process's mappings anew where that is due: a count costs 1 µs a mapping, so it
    /// comes with every thousand new ones, when VMs came or went (`force`), and now and then.
    ///
    /// # Errors
    /// Where `/proc` cannot be read; the old count stays.
    pub fn recount(&mut self, guest: u64, force: bool) -> io::Result<()> {
        self.steps = self.steps.saturating_add(1);
        let due = force || self.steps >= RECOUNT_STEPS || guest.abs_diff(self.counted) >= 1000;
        if due {
            self.other = mappings_of_process()?.saturating_sub(guest);
            self.counted = guest;
            self.steps = 0;
        }
        Ok(())
    }
}

/// Counts the mappings of this process.
///
/// # Errors
/// Where `/proc/self/maps` cannot be read.
pub fn mappings_of_process() -> io::Result<u64> {
    let mut maps = BufReader::with_capacity(1 << 16, fs::File::open("/proc/self/maps")?);
    let mut mappings = 0;
    while maps.skip_until(b'\n')? > 0 {
        mappings += 1;
    }
    Ok(mappings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_shrinks_with_mappings_and_vms() {
        let mut budget = Budget::new(Some(20_000));
        budget.recount(0, true).unwrap();
        let empty = budget.room(0, 0);
        assert!(empty > 10_000 && empty <= 20_000 - 4096, "{empty}");
        assert_eq!(budget.room(100, 0), empty - 100);
        assert_eq!(budget.room(100, 2), empty - 228);
    }

    #[test]
    fn the_limit_is_never_above_the_kernels() {
        assert_eq!(Budget::new(Some(u64::MAX)).limit(), Budget::new(None).limit());
    }
}
