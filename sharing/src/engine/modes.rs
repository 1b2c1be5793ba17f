//! Modes: what of a VM's memory is shared, which can change while it runs.
//!
//! Whoever changes a mode waits for none of the VM's memory. From then on nothing more of the VM is merged with
//! others, in either direction: the engine scans none of its pages for that, and a page of it that is found in
//! an index is passed over. A VM that is not to share any more is unshared step by step: its pages leave the
//! indexes, and then their frames.

use std::time::{Duration, Instant};

use crate::engine::Engine;
use crate::engine::holds::Since;
use crate::engine::members::{Member, Mode};
use crate::engine::turns::Kind;
use crate::engine::unmerge::BATCH_PAGES;
use crate::numbers::Slot;

/// Pages that one step takes out of indexes at most: some hundred microseconds.
const STEP_PAGES: u32 = 2048;
/// After a refusal, when a VM's pages are tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How far a VM has come that is not to share any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unshare {
    /// The page from which on pages are to be taken off their frames.
    next: u32,
    /// Pages before this one are in no index.
    forgotten: u32,
    /// When it goes on.
    pub(crate) due: Instant,
}

impl Engine {
    /// Says what of a VM's memory is shared from now on. When this returns nothing more of the VM is merged that
    /// is not to be. Pages that are shared, and are not to be any more, are taken off their frames step by step.
    pub fn set_mode(&mut self, slot: Slot, mode: Mode) {
        let since = Since::now();
        self.change_mode(slot, mode);
        self.holds.note("change of mode", since);
    }

    fn change_mode(&mut self, slot: Slot, mode: Mode) {
        let changes = |member: &&mut Member| member.mode != mode && !member.space.lost();
        let Some(member) = self.members.get_mut(slot).filter(changes) else { return };
        let (before, pages) = (member.mode, member.space.pages());
        member.mode = mode;
        let unshare = Unshare { next: 0, forgotten: 0, due: Instant::now() };
        member.unshare = (mode != Mode::Full).then_some(unshare);
        if mode == Mode::Full || before == Mode::Off || member.huge.is_some() {
            // Whatever changed meanwhile, all of it is new.
            if let Some(follower) = &mut member.follower {
                follower.reset(0..pages);
            }
            self.pass.due = Instant::now();
        }
        if let Some(follower) = &mut member.follower
            && (mode == Mode::Off) != (before == Mode::Off)
            && follower.set_following(mode != Mode::Off, pages).is_err()
        {
            self.counters.refusals += 1;
            if mode != Mode::Off {
                member.follower = None;
            }
        }
    }

    /// When VMs that are not to share any more have their next turn.
    pub(crate) fn unshare_due(&self) -> Option<Instant> {
        let kept = self.members.iter().filter(|member| !member.space.lost());
        kept.filter_map(|member| member.unshare).map(|unshare| unshare.due).min()
    }

    /// What of a VM's memory is shared; `None` for a slot without a VM.
    #[must_use]
    pub fn mode(&self, slot: Slot) -> Option<Mode> {
        self.members.get(slot).map(|member| member.mode)
    }

    /// Takes the next pages of a VM that is not to share any more out of the indexes, and off their frames.
    /// Returns whether there were any.
    pub(crate) fn unshare(&mut self, now: Instant) -> bool {
        let wanted = |member: &Member| {
            member.unshare.is_some_and(|unshare| unshare.due <= now) && !member.space.lost()
        };
        let Some(slot) = self.next_with_work(Kind::Unshare, wanted) else { return false };
        let member = self.members.at(slot);
        let Some(Unshare { next, forgotten, .. }) = member.unshare else { return false };
        let pages = member.space.pages();
        let end = pages.min(next.saturating_add(STEP_PAGES));
        let part = member.space.backing().on_frames().runs_within(next..end).next();
        let part = part.map(|run| run.start..run.end.min(run.start + BATCH_PAGES));
        let end = part.as_ref().map_or(end, |part| part.end);
        for page in forgotten.max(next)..end {
            self.forget_mode_of(slot, page);
        }
        if let Some(part) = part {
            self.unmerge(slot, part);
        }
        let member = self.members.at_mut(slot);
        let forgotten = forgotten.max(end);
        // Pages that were refused are tried again.
        let left = member.space.mappings() > 1;
        member.unshare = if end < pages {
            Some(Unshare { next: end, forgotten, due: now })
        } else {
            left.then_some(Unshare { next: 0, forgotten, due: now + RETRY })
        };
        true
    }

    /// What was known of a page for the sake of sharing does not count in the mode that the VM has now.
    fn forget_mode_of(&mut self, slot: Slot, page: u32) {
        self.forget_page(slot, page);
        let member = self.members.at_mut(slot);
        // A page of zeros still counts.
        if member.clear_alike(page)
            && member.mode == Mode::Zero
            && let Some(follower) = &mut member.follower
        {
            follower.look_again(page);
        }
    }
}
