//! Frees the pages that a guest's balloon names: by the engine that shares them, or where nobody shares them, here.

use std::ops::Range;
use std::sync::Arc;

use samepage_devices::virtio::balloon::{FRAME_BYTES, FreePages, Freed};
use samepage_sharing::Ram;
use samepage_sharing::service::{Discarded, Membership, PagesClient};

use super::memory::{MemorySlot, VmMemory};
use crate::config::{Elsewhere, PageOrders};

/// Who frees the pages.
enum Giver {
    Engine(PagesClient),
    /// The engine of another process.
    Elsewhere(Arc<dyn PageOrders>),
    Alone(Arc<Ram>),
}

impl Giver {
    fn free(&self, pages: Range<u32>) -> Discarded {
        match self {
            Self::Engine(engine) => engine.free(pages),
            Self::Elsewhere(engine) => engine.free(pages),
            Self::Alone(ram) => {
                // What the kernel refuses keeps its content.
                let (next, freed) =
                    ram.discard(pages.start, pages.end - pages.start).unwrap_or((pages.end, 0));
                Discarded { next, freed }
            }
        }
    }
}

/// A VM's pages, by the page frames of its guest.
pub(super) struct GivenPages {
    slots: Vec<MemorySlot>,
    giver: Giver,
}

impl GivenPages {
    pub(super) fn new(
        memory: &VmMemory,
        membership: Option<&Membership>,
        elsewhere: Option<&Elsewhere>,
    ) -> Self {
        let giver = match (membership, elsewhere) {
            (Some(membership), _) => Giver::Engine(membership.pages()),
            (None, Some(there)) => Giver::Elsewhere(Arc::clone(&there.pages)),
            (None, None) => Giver::Alone(Arc::clone(memory.ram())),
        };
        Self { slots: memory.slots().to_vec(), giver }
    }
}

impl FreePages for GivenPages {
    fn free(&self, frames: Range<u64>) -> Freed {
        let nothing = |next: u64| Freed { next, freed: 0, invalid: next - frames.start };
        let bounds = |slot: &MemorySlot| {
            let first = slot.range.gpa / FRAME_BYTES;
            first..first + slot.range.bytes / FRAME_BYTES
        };
        let slot = self.slots.iter().find(|slot| bounds(slot).end > frames.start);
        let Some(slot) = slot.filter(|slot| bounds(slot).start < frames.end) else {
            return nothing(frames.end);
        };
        let bounds = bounds(slot);
        if frames.start < bounds.start {
            return nothing(bounds.start);
        }
        // Both are less than the number of the VM's pages.
        let page = |frame: u64| (frame - bounds.start + slot.range.ram_offset / FRAME_BYTES) as u32;
        let pages = page(frames.start)..page(frames.end.min(bounds.end));
        let Discarded { next, freed } = self.giver.free(pages.clone());
        let done = next.clamp(pages.start, pages.end) - pages.start;
        Freed { next: frames.start + u64::from(done), freed: freed.min(done).into(), invalid: 0 }
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::HugePages;

    /// Notes what was to be freed. Says that it has done more than that.
    #[derive(Default)]
    struct Noted(Mutex<Vec<Range<u32>>>);

    impl PageOrders for Noted {
        fn free(&self, pages: Range<u32>) -> Discarded {
            let next = pages.end + 7;
            self.0.lock().push(pages);
            Discarded { next, freed: u32::MAX }
        }
    }

    fn all(given: &GivenPages, frames: Range<u64>) -> (u64, u64) {
        let (mut next, mut freed, mut invalid) = (frames.start, 0, 0);
        while next < frames.end {
            let done = given.free(next..frames.end);
            assert!(done.next > next && done.next <= frames.end, "{done:?}");
            (next, freed, invalid) = (done.next, freed + done.freed, invalid + done.invalid);
        }
        (freed, invalid)
    }

    #[test]
    fn page_frames_are_clipped_to_memory_on_both_sides_of_the_gap() {
        const MIB: u64 = 256;
        let memory = VmMemory::reserve((3 << 30) + (1 << 20), false, HugePages::Off).unwrap();
        let noted = Arc::<Noted>::default();
        let given =
            GivenPages { slots: memory.slots().to_vec(), giver: Giver::Elsewhere(noted.clone() as Arc<_>) };
        let gib = 1024 * MIB;
        assert_eq!(all(&given, 3 * gib - 2..4 * gib + 3), (5, gib));
        let pages = (3 * gib) as u32;
        assert_eq!(*noted.0.lock(), [pages - 2..pages, pages..pages + 3]);
        noted.0.lock().clear();
        assert_eq!(all(&given, 4 * gib + MIB..u64::MAX >> 12), (0, (u64::MAX >> 12) - 4 * gib - MIB));
        assert_eq!(all(&given, 3 * gib..3 * gib + 9), (0, 9));
        assert!(noted.0.lock().is_empty());
    }

    #[test]
    fn memory_that_nobody_shares_is_freed_at_once() {
        let memory = VmMemory::reserve(64 << 20, false, HugePages::Off).unwrap();
        let given = GivenPages::new(&memory, None, None);
        (10..3000).for_each(|page| memory.view().write_obj(1_u8, GuestAddress(page << 12)).unwrap());
        assert_eq!(all(&given, 5..2000), (1990, 0));
        assert_eq!(all(&given, 5..2000), (0, 0));
        assert_eq!(all(&given, 0..1 << 14), (1000, 0));
    }
}
