//! VMs that have lost a part of their memory: they are about to end, and nothing of them is scanned or
//! counted on any more. Every reader of a member's memory checks that by itself; here their pages are taken
//! out of the indexes and lists, a bounded part in each step.

use crate::engine::Engine;
use crate::memory::loss;
use crate::numbers::Slot;

/// Pages that one step takes out.
const STEP_PAGES: u32 = 8192;

impl Engine {
    /// Takes the next pages of VMs that lost memory out of everything that leads to them. Returns whether
    /// there were any.
    pub(crate) fn retire_step(&mut self) -> bool {
        let losses = loss::count();
        if losses == self.losses_seen {
            return false;
        }
        let lost = |&slot: &Slot| {
            let member = self.members.at(slot);
            member.space.lost() && member.retired < member.space.pages()
        };
        let Some(slot) = self.members.slots().find(lost) else {
            self.losses_seen = losses;
            return false;
        };
        let member = self.members.at_mut(slot);
        let from = member.retired;
        let end = member.space.pages().min(from.saturating_add(STEP_PAGES));
        if from == 0 {
            member.follower = None;
            member.claims = None;
            member.unshare = None;
        }
        for page in from..end {
            self.forget_page(slot, page);
            self.cache.copies.remove(self.members.at(slot).global_page(page));
        }
        self.members.at_mut(slot).retired = end;
        true
    }
}
