//! What the engine knows about its work, in KSM's terms: see
//! `Documentation/admin-guide/mm/ksm.rst` of the kernel.

use std::io;

use serde::Serialize;

use crate::engine::Engine;
use crate::inspect::survey::{Survey, VmCount};
use crate::memory::ram::PAGE_SIZE;
use crate::numbers::Slot;

/// The engine as a whole. Pages are of 4 KiB.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EngineStatistics {
    /// Frames in use by two or more guest pages.
    pub pages_shared: u64,
    /// Further guest pages mapped to those frames: what is saved.
    pub pages_sharing: u64,
    /// Pages scanned and found unique.
    pub pages_unshared: u64,
    /// Pages that changed since the pass before.
    pub pages_volatile: u64,
    /// Guest pages of zeros whose memory was freed.
    pub zero_pages: u64,
    /// Complete passes over all VMs.
    pub full_scans: u64,
    /// Frames in use, with those of a single sharer.
    pub frames: u64,
    /// Places for frames up to the last in use; more than `frames` where the store has holes.
    pub frame_places: u64,
    /// Times that frames were moved to close holes, since the start.
    pub compactions: u64,
    /// Pages scanned since the start.
    pub pages_scanned: u64,
    /// Pages mapped to frames since the start.
    pub merges: u64,
    /// Of those, the ones found as neighbours of a page that matched, without digest or search.
    pub merges_lookahead: u64,
    /// The ones found in the index of frames.
    pub merges_stable: u64,
    /// The ones found in the index of pages that are not shared.
    pub merges_unstable: u64,
    /// Of all merges, those whose runs a device's hint began.
    pub merges_hinted: u64,
    /// Entries that searches of the indexes visited since the start.
    pub search_steps: u64,
    /// Comparisons of pages that the search made since the start.
    pub comparisons: u64,
    /// Digests taken since the start.
    pub digests: u64,
    /// Merged pages that were written to and left their frames since the start.
    pub breaks: u64,
    /// Runs not merged for want of mappings since the start.
    pub mappings_denied: u64,
    /// Pages taken off their frames since the start, for better runs or because a VM is not to share.
    pub pages_undone: u64,
    /// Huge pages split since the start, to share parts of them.
    pub huge_split: u64,
    /// Hints of devices taken up since the start.
    pub hints: u64,
    /// Hints dropped because too many waited, of the VMs that are there.
    pub hints_dropped: u64,
    /// Calls of the kernel that failed since the start; guests are whole.
    pub refusals: u64,
    /// Bytes that the kernel charges for the frame store.
    pub store_bytes: u64,
    /// Bytes that the engine's metadata takes.
    pub metadata_bytes: u64,
    /// Bytes of page tables through which the engine itself reads the frames.
    pub page_table_bytes: u64,
    /// Mappings that the VMs' memory is made of.
    pub guest_mappings: u64,
    /// Mappings of the process.
    pub mappings: u64,
    /// The kernel's limit on them.
    pub mappings_limit: u64,
    /// The shortest run of pages that is worth two mappings now.
    pub shortest_run: u64,
    /// The longest time for which writers to a run of pages have been made to wait, in microseconds,
    /// of the VMs that are there.
    pub longest_window_us: u64,
    /// Groups for which sharing has stopped: see [`trust`](crate::engine::trust).
    pub groups_stopped: u64,
    /// CPU time of the sharing threads, in seconds.
    pub cpu_seconds: f64,
}

impl EngineStatistics {
    /// Bytes saved: what merged pages and pages of zeros would take, less what sharing takes itself. Nothing is
    /// saved where it takes more.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        let gross = (self.pages_sharing + self.zero_pages) * PAGE_SIZE as u64;
        gross.saturating_sub(self.overhead_bytes())
    }

    /// Bytes that sharing takes itself, for its metadata, for the kernel's mappings and for the page tables of the
    /// frame store's view.
    #[must_use]
    pub fn overhead_bytes(&self) -> u64 {
        self.metadata_bytes + self.guest_mappings * MAPPING_BYTES + self.page_table_bytes
    }
}

macro_rules! add_fields {
    ($sum:expr, $other:expr, $($field:ident),+ $(,)?) => { $( $sum.$field += $other.$field; )+ };
}

impl EngineStatistics {
    /// Adds another engine's, but for what is the process's: mappings, their limit and CPU time.
    pub(crate) fn add(&mut self, other: &Self) {
        self.add_counters(other);
        add_fields!(
            self,
            other,
            pages_shared,
            pages_sharing,
            pages_unshared,
            pages_volatile,
            zero_pages,
            frames,
            frame_places,
            store_bytes,
            metadata_bytes,
            page_table_bytes,
            guest_mappings,
            groups_stopped,
        );
        self.shortest_run = self.shortest_run.max(other.shortest_run);
        self.longest_window_us = self.longest_window_us.max(other.longest_window_us);
    }

    /// Adds what another engine has counted since its start.
    pub(crate) fn add_counters(&mut self, other: &Self) {
        add_fields!(
            self,
            other,
            full_scans,
            pages_scanned,
            merges,
            merges_lookahead,
            merges_stable,
            merges_unstable,
            merges_hinted,
            search_steps,
            comparisons,
            digests,
            breaks,
            mappings_denied,
            pages_undone,
            compactions,
            huge_split,
            hints,
            hints_dropped,
            refusals,
        );
    }
}

/// Kernel memory for one mapping, in bytes: a vm_area_struct and its part of the maple tree.
const MAPPING_BYTES: u64 = 240;

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VmStatistics {
    /// Pages of its RAM.
    pub pages: u64,
    /// Its pages on frames that it shares, with itself or others, counting each frame once for
    /// its share: `pages_merged - pages_sharing`, rounded.
    pub pages_shared: u64,
    /// Pages that sharing saves by this VM: each of n sharers of a frame saves 1 - 1/n of a page.
    pub pages_sharing: u64,
    /// Its pages that are mapped to frames.
    pub pages_merged: u64,
    /// Its pages scanned and found unique.
    pub pages_unshared: u64,
    /// Its pages that changed since the pass before.
    pub pages_volatile: u64,
    /// Its pages of zeros whose memory was freed.
    pub zero_pages: u64,
    /// Its pages that take memory of their own, now.
    pub pages_private: u64,
    /// Huge pages, of 512 pages each, that back a part of them now, where huge pages are wanted and the
    /// kernel tells (Linux 6.7).
    pub huge_whole: u64,
    /// Its huge pages that were split since the start, to share parts of them.
    pub huge_split: u64,
    /// Mappings of its RAM.
    pub mappings: u64,
}

impl Engine {
    /// The engine's statistics, without the CPU time.
    #[must_use]
    pub fn statistics(&self) -> EngineStatistics {
        let windows = self.members.iter().map(|member| member.space.memory().longest_window());
        let budget = self.budgets.tightest();
        EngineStatistics {
            pages_shared: self.store.shared().into(),
            pages_sharing: self.store.sharing(),
            pages_unshared: self.members.iter().map(|member| u64::from(member.counts.unique)).sum(),
            pages_volatile: self.members.iter().map(|member| u64::from(member.counts.volatile)).sum(),
            zero_pages: self.members.iter().map(|member| u64::from(member.counts.zero)).sum(),
            full_scans: self.counters.full_scans,
            frames: self.store.live().into(),
            frame_places: self.store.places().into(),
            compactions: self.counters.compactions,
            pages_scanned: self.counters.scanned,
            merges: self.counters.merges,
            merges_lookahead: self.counters.merges_lookahead,
            merges_stable: self.counters.merges_stable,
            merges_unstable: self.counters.merges_unstable,
            merges_hinted: self.counters.merges_hinted,
            search_steps: self.counters.effort.steps,
            comparisons: self.counters.effort.comparisons,
            digests: self.counters.digests,
            breaks: self.counters.breaks,
            mappings_denied: self.counters.denied,
            pages_undone: self.counters.unmerged,
            huge_split: self.counters.split,
            hints: self.counters.hints,
            hints_dropped: self.members.iter().map(|member| member.hints.dropped()).sum(),
            refusals: self.counters.refusals,
            store_bytes: self.store.charged_bytes().unwrap_or(0),
            metadata_bytes: self.metadata_bytes() as u64,
            page_table_bytes: self.store.page_table_bytes(),
            guest_mappings: self.members.mappings(),
            mappings: budget.used(),
            mappings_limit: budget.limit(),
            shortest_run: self.shortest_run().into(),
            longest_window_us: windows.max().unwrap_or_default().as_micros() as u64,
            groups_stopped: u64::from(self.stop.get().is_some()),
            cpu_seconds: 0.0,
        }
    }

    /// One VM's statistics; `None` for a slot without a VM.
    ///
    /// # Errors
    /// Fails if the page map cannot be read.
    pub fn vm_statistics(&self, slot: Slot) -> io::Result<Option<VmStatistics>> {
        Survey::new(slot, VmCount::default()).all(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_saved_where_sharing_takes_more_than_it_saves() {
        let mut idle =
            EngineStatistics { metadata_bytes: 180_752, guest_mappings: 1, ..EngineStatistics::default() };
        assert_eq!((idle.saved_bytes(), idle.overhead_bytes()), (0, 180_992));
        idle.pages_sharing = 100;
        assert_eq!(idle.saved_bytes(), 409_600 - 180_992);
    }
}
