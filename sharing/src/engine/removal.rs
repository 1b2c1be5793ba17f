//! The end of a VM, in pieces, so that neither the engine nor the process waits for all of its memory to go.
//!
//! To unmap memory takes 80 ms and more for each GiB, under a lock of the process that page faults and new
//! mappings need too. So the memory goes a piece at a time, while the engine works for others: it is locked
//! only to take the pages of the next piece out of its metadata, and to give up the frames of the last one.
//! Frames are given up after nothing is mapped to them any more. What is left of the metadata is dropped unlocked.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::engine::Engine;
use crate::engine::holds::Since;
use crate::engine::members::Member;
use crate::engine::trust::Stopped;
use crate::memory::guest::GuestMemory;
use crate::numbers::Slot;

/// Pages that go at once: 4 MiB, in less than a millisecond.
const PIECE_PAGES: u32 = 1024;

/// A VM that leaves: it no longer runs, and the engine does nothing more for it.
pub struct Removal {
    slot: Slot,
    memory: Arc<dyn GuestMemory>,
    /// The pages that go next.
    piece: Range<u32>,
    /// Some of them are mapped to frames.
    mapped: bool,
    /// What is left of the metadata at the end.
    books: Option<Member>,
}

impl std::fmt::Debug for Removal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Removal")
            .field("slot", &self.slot)
            .field("piece", &self.piece)
            .finish_non_exhaustive()
    }
}

impl Removal {
    /// Makes the next piece untouched anonymous memory. Comes before each [`Engine::go_on_removing`], and needs
    /// no engine.
    ///
    /// # Errors
    /// Fails if the kernel refuses. The call can be repeated.
    pub fn empty(&self) -> io::Result<()> {
        self.memory.empty(self.piece.clone(), self.mapped)
    }
}

impl Engine {
    /// Begins to let a VM's RAM go, which no longer runs; `None` where it has gone. To be followed by
    /// [`Removal::empty`] and [`go_on_removing`](Self::go_on_removing) in turns. Where the kernel
    /// refuses to go on, the removal is dropped, and can be begun again.
    pub fn begin_removal(&mut self, slot: Slot) -> Option<Removal> {
        if self.forget_distrusted(slot) {
            return None;
        }
        let member = self.members.get_mut(slot)?;
        let memory = Arc::clone(member.space.memory());
        memory.leave();
        member.follower = None;
        member.claims = None;
        member.unshare = None;
        let mut removal = Removal { slot, memory, piece: 0..0, mapped: false, books: None };
        self.next_piece(&mut removal);
        Some(removal)
    }

    /// Gives up the frames of the piece that was emptied, and names the next. Returns whether there is one: the
    /// VM is gone otherwise.
    pub fn go_on_removing(&mut self, removal: &mut Removal) -> bool {
        if self.forget_distrusted(removal.slot) {
            return false;
        }
        let since = Since::now();
        let more = self.give_up_piece(removal);
        self.holds.note("end of a VM", since);
        more
    }

    fn give_up_piece(&mut self, removal: &mut Removal) -> bool {
        let Self { members, store, stable, .. } = self;
        let Some(member) = members.get_mut(removal.slot) else { return false };
        for page in removal.piece.clone() {
            if member.space.attached(page)
                && let Some(frame) = member.space.detach(page, store)
            {
                stable.remove(frame, store);
            }
        }
        member.space.emptied(removal.piece.clone());
        self.store.reclaim(&*self.host.calls);
        if removal.piece.end < removal.memory.pages() {
            self.next_piece(removal);
            return true;
        }
        removal.books = self.members.remove(removal.slot);
        self.blocks.clear();
        self.membership_changed = true;
        self.update_cache();
        false
    }

    /// After a panic the metadata no longer tells which frames can go: the VM is gone at once. Returns whether
    /// that is so.
    fn forget_distrusted(&mut self, slot: Slot) -> bool {
        let panicked = self.stop.get() == Some(Stopped::Panicked);
        if panicked {
            self.members.forget(slot);
        }
        panicked
    }

    /// Takes the pages behind a piece out of all that leads to them.
    fn next_piece(&mut self, removal: &mut Removal) {
        let start = removal.piece.end;
        removal.piece = start..removal.memory.pages().min(start.saturating_add(PIECE_PAGES));
        for page in removal.piece.clone() {
            self.forget_page(removal.slot, page);
        }
        let member = self.members.at(removal.slot);
        if !self.cache.copies.is_empty() {
            removal.piece.clone().for_each(|page| {
                self.cache.copies.remove(member.global_page(page));
            });
        }
        let on_frames = member.space.backing().on_frames();
        removal.mapped = on_frames.next_within(removal.piece.clone()).is_some();
    }

    /// Lets a VM's RAM go, which no longer runs, while the engine does nothing else: its pages become zeros and
    /// its frames are given up.
    ///
    /// # Errors
    /// Fails if the kernel refuses. The engine does nothing more for the VM, and the call can be repeated.
    pub fn remove(&mut self, slot: Slot) -> io::Result<()> {
        let Some(mut removal) = self.begin_removal(slot) else { return Ok(()) };
        loop {
            removal.empty()?;
            if !self.go_on_removing(&mut removal) {
                self.store.reclaim_all(&*self.host.calls);
                return Ok(());
            }
        }
    }
}
