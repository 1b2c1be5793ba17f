//! What the block cache knows about its work.

use serde::Serialize;

/// The cache of a group, or of all. Blocks are of 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheStatistics {
    /// Blocks that the host alone holds, now.
    pub blocks_cached: u64,
    /// Most that it may, now, in all groups together; each has an equal share of it.
    pub blocks_limit: u64,
    /// Frames that hold blocks and are mapped by guests, now.
    pub blocks_in_guests: u64,
    /// Guest pages that blocks were copied to, as far as they are noted, now.
    pub blocks_noted: u64,
    /// Blocks that guests read which a guest held already, since the start.
    pub served_from_guests: u64,
    /// Blocks that guests read which the host alone held, since the start.
    pub served_from_host: u64,
    /// Blocks that were read from disks, since the start.
    pub fetched: u64,
    /// Blocks that went past the cache, since the start.
    pub past: u64,
    /// Blocks that were mapped into guests, since the start.
    pub delivered_mapped: u64,
    /// Blocks that were copied into guests, since the start.
    pub delivered_copied: u64,
    /// Blocks that became cached when the last guest left their frame, since the start.
    pub demoted_mapped: u64,
    /// Blocks that became cached since a guest's page was proven to hold them still, since the start.
    pub demoted_copied: u64,
    /// Guest pages that no longer held the block that was copied to them, since the start.
    pub refuted: u64,
    /// Cached blocks that were dropped for others or for want of memory, since the start.
    pub evicted: u64,
    /// Blocks that were written to, which the host or a guest was known to hold, since the start.
    pub overwritten: u64,
    /// Bytes that the cache's metadata takes.
    pub metadata_bytes: u64,
}

impl CacheStatistics {
    /// Adds another group's, but for the limit, which is the process's.
    pub fn add(&mut self, other: &Self) {
        macro_rules! add {
            ($($field:ident),+ $(,)?) => { $( self.$field += other.$field; )+ };
        }
        add!(
            blocks_cached,
            blocks_in_guests,
            blocks_noted,
            served_from_guests,
            served_from_host,
            fetched,
            past,
            delivered_mapped,
            delivered_copied,
            demoted_mapped,
            demoted_copied,
            refuted,
            evicted,
            overwritten,
            metadata_bytes,
        );
        self.blocks_limit = other.blocks_limit;
    }
}
