//! Statistics of a guest's memory, as the guest tells them.

/// Bytes of an entry: a tag of 16 bits, and a value of 64 bits.
pub(super) const ENTRY_BYTES: usize = 10;

/// What a guest may tell. The number of each is its tag (virtio 1.2, section 5.5.6.3; the last ones are Linux').
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum GuestStat {
    /// Bytes swapped in.
    SwapIn,
    /// Bytes swapped out.
    SwapOut,
    /// Page faults that needed a disk.
    MajorFaults,
    /// Page faults that did not.
    MinorFaults,
    /// Bytes of unused memory.
    Free,
    /// Bytes of memory.
    Total,
    /// Bytes that programs could have without swapping.
    Available,
    /// Bytes of caches of disks.
    Caches,
    /// Huge pages that were allocated.
    HugeAllocations,
    /// Huge pages that could not be allocated.
    HugeFailures,
    /// Programs that were killed for want of memory.
    OomKills,
    /// Allocations that waited.
    Stalls,
    /// Pages scanned by the reclaiming thread.
    AsyncScans,
    /// Pages scanned by allocations.
    DirectScans,
    /// Pages reclaimed by the thread.
    AsyncReclaims,
    /// Pages reclaimed by allocations.
    DirectReclaims,
}

/// Number of kinds.
const KINDS: usize = GuestStat::DirectReclaims as usize + 1;

/// The last values that a guest has told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStats {
    values: [Option<u64>; KINDS],
    /// How often the guest has told any.
    pub updates: u64,
}

impl GuestStats {
    /// Returns a value, if the guest has ever told it.
    #[must_use]
    pub fn get(&self, stat: GuestStat) -> Option<u64> {
        self.values[stat as usize]
    }

    /// Takes entries in. Of unknown tags, values that are the absence of one (all bits set), and what is left of an
    /// entry nothing is kept.
    pub(super) fn take(&mut self, entries: &[u8]) {
        for entry in entries.chunks_exact(ENTRY_BYTES) {
            let (tag, value) = entry.split_at(2);
            let tag = usize::from(u16::from_le_bytes([tag[0], tag[1]]));
            let value = u64::from_le_bytes(value.try_into().unwrap_or_default());
            if let Some(place) = self.values.get_mut(tag)
                && value != u64::MAX
            {
                *place = Some(value);
            }
        }
        self.updates += 1;
    }
}
