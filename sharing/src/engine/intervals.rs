//! Ends of intervals, for VMs whose changes are followed.
//!
//! The log of a VM is read once, and then what it says is gone through in parts: the pages of a part are armed
//! again, those that changed leave their frames, those that have become idle become ready. A step does a bounded
//! amount of that, and other work has its turn before the next ([`turns`](crate::engine::turns)). Each page has its
//! interval by itself, from the moment at which it is armed: nothing depends on all of them ending at once. What
//! is written between the reading of the log and the end of the interval for its page is noted for the next
//! interval, or the page is armed after that write and before anything is done about it.

use std::ops::Range;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::changes::follower::{Follower, spans};
use crate::changes::rest::{CHANGE, PART, Part};
use crate::collections::sets::PageSet;
use crate::engine::Engine;
use crate::engine::members::Member;
use crate::engine::turns::Kind;
use crate::numbers::Slot;

/// After how many shortest intervals pages that could not be merged for want of mappings, or because a call
/// was refused, are tried again, and those are scanned that are unlikely to be shared.
const RETRY_INTERVALS: u32 = 16;
/// After how many shortest intervals all merged pages are checked, in case the log missed one.
const SWEEP_INTERVALS: u32 = 256;
/// Pages that are checked at once.
const SWEEP_PAGES: u32 = 512;
/// What that takes, in the unit of the effort of a part: a call of the kernel's.
const SWEEP: u32 = 4 * CHANGE;
/// What it takes to read a log, in the same unit.
const BEGIN: u32 = 2 * CHANGE;
/// The effort of one step, in the same unit: about a millisecond.
pub(crate) const STEP: u32 = 2 * PART;

/// The intervals of all engines are counted from here, so that they end together.
static EPOCH: OnceLock<Instant> = OnceLock::new();

/// An interval that is being ended.
#[derive(Clone, Copy, Debug)]
struct Ending {
    slot: Slot,
    /// The number of the VM in the slot.
    id: u64,
    /// Pages that wait for another try have one.
    retry: bool,
    /// The page from which on all pages are to be checked, if they are.
    sweep: Option<u32>,
}

/// What the engine keeps for the ends of intervals: one VM's is under way at a time.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    under_way: Option<Ending>,
    /// What the log of its VM said.
    written: PageSet,
    /// Used again for each part.
    part: Part,
}

impl Ends {
    pub(crate) fn bytes(&self) -> usize {
        self.written.bytes()
    }
}

impl Engine {
    /// When the first interval ends.
    pub(crate) fn interval_due(&self) -> Option<Instant> {
        let active = self.members.iter().filter(|member| member.active());
        active.filter_map(|member| member.follower.as_ref()).map(Follower::due).min()
    }

    /// Goes on with the end of an interval, or begins with that of a VM for which it is over. Returns whether
    /// there was one.
    pub(crate) fn end_an_interval(&mut self, now: Instant) -> bool {
        let mut ends = std::mem::take(&mut self.ends);
        let there = |ending: &Ending| {
            let member = self.members.get(ending.slot).filter(|member| member.active());
            member.is_some_and(|member| member.id == ending.id && member.follower.is_some())
        };
        let mut left = self.interval_effort.max(1);
        let mut worked = false;
        ends.under_way = ends.under_way.filter(there);
        while left > 0 {
            let Some(ending) = &mut ends.under_way else {
                // Nothing is left of the effort where the VM's log is longer than that.
                let begun = self.begin_to_end(now, &mut ends);
                worked |= begun;
                left = left.saturating_sub(BEGIN + ends.written.words().len() as u32);
                if begun && !self.spent() {
                    continue;
                }
                break;
            };
            worked = true;
            let slot = ending.slot;
            if self.tracks_end(slot) {
                left = left.saturating_sub(self.end_part(ending, &ends.written, left, &mut ends.part));
            } else if let Some(from) = ending.sweep {
                let (next, effort) = self.sweep(slot, from);
                ending.sweep = next;
                left = left.saturating_sub(effort);
            } else {
                ends.under_way = None;
                self.interval_ended(slot, now);
            }
            if self.spent() {
                break;
            }
        }
        self.ends = ends;
        if worked {
            self.store.reclaim(&*self.host.calls);
        }
        worked
    }

    /// Reads the log of the next VM for which an interval is over. Returns whether there was one.
    fn begin_to_end(&mut self, now: Instant, ends: &mut Ends) -> bool {
        let over = |member: &Member| {
            member.active() && member.follower.as_ref().is_some_and(|follower| follower.due() <= now)
        };
        let Some(slot) = self.next_with_work(Kind::Changes, over) else { return false };
        if self.skip_interval(slot, now) {
            return true;
        }
        let due = self.end_of_interval(now, 1);
        let member = self.members.at_mut(slot);
        let pages = member.space.pages();
        if ends.written.words().len() != (pages as usize).div_ceil(64) {
            ends.written = PageSet::new(pages);
        }
        let Some(follower) = &mut member.follower else { return false };
        let [retry, sweeps] = [RETRY_INTERVALS, SWEEP_INTERVALS].map(|count| follower.comes_every(count));
        if follower.begin_end(due, &mut ends.written).is_err() {
            self.counters.refusals += 1;
            return true;
        }
        ends.under_way = Some(Ending { slot, id: member.id, retry, sweep: sweeps.then_some(0) });
        if let Some(census) = member.space.census_mut() {
            census.elapse(now);
        }
        true
    }

    /// Passes over the interval of a VM that has not run and of which nothing is to come. Returns whether it is one.
    fn skip_interval(&mut self, slot: Slot, now: Instant) -> bool {
        let longest = self.longest_rest;
        let member = self.members.at_mut(slot);
        // Whether ranges are still huge has to be looked at.
        let follower = member.follower.as_mut().filter(|_| member.huge.is_none());
        let skips = follower.is_some_and(|follower| follower.skip(now, longest, RETRY_INTERVALS));
        if skips {
            self.set_end_of_interval(slot, now);
            self.admit_denied();
            self.follow_limit(now);
        }
        skips
    }

    /// Whether there are pages for which the VM's interval has not ended yet.
    fn tracks_end(&self, slot: Slot) -> bool {
        let follower = self.members.get(slot).and_then(|member| member.follower.as_ref());
        follower.is_some_and(Follower::is_ending)
    }

    /// Ends the interval for the next pages. Returns the effort that it took.
    fn end_part(&mut self, ending: &Ending, written: &PageSet, most: u32, part: &mut Part) -> u32 {
        let slot = ending.slot;
        let Some(follower) = &mut self.members.at_mut(slot).follower else { return most };
        follower.end_part(written, most, part);
        self.counters.refusals += u64::from(!part.armed);
        let mut left = Vec::new();
        for page in part.changed() {
            self.forget_page(slot, page);
            let member = self.members.at_mut(slot);
            member.changed(page, part.restless(page));
            if member.shared_or_zero(page) {
                left.push(page..page + 1);
            }
            if let Some(follower) = &mut member.follower {
                follower.drop_page(page);
            }
            member.written(page);
        }
        let member = self.members.at_mut(slot);
        if member.counts.volatile > 0 {
            part.rested().for_each(|page| member.set_volatile(page, false));
        }
        let told = member.space.backing().census().is_some();
        if told {
            part.rested().for_each(|page| member.queue(page));
        }
        if let Some(follower) = &mut member.follower {
            if !told {
                let (first, words) = part.rested_words();
                follower.rested(first, words);
            }
            follower.try_again(part.words.clone(), ending.retry);
        }
        if ending.sweep.is_none() {
            spans(left.into_iter()).into_iter().for_each(|span| self.release_private(slot, span));
        }
        part.effort
    }

    /// Checks the next pages, whatever the log said of them. Returns from which page on there are more, and the
    /// effort that it took.
    fn sweep(&mut self, slot: Slot, from: u32) -> (Option<u32>, u32) {
        let pages = self.members.at(slot).space.pages();
        let part: Range<u32> = from..pages.min(from.saturating_add(SWEEP_PAGES));
        let next = (part.end < pages).then_some(part.end);
        let before = self.counters.breaks;
        self.learn_huge(slot, part.clone());
        self.release_private(slot, part);
        (next, SWEEP + (self.counters.breaks - before) as u32 * CHANGE)
    }

    /// The interval of a VM has ended for all of its pages.
    fn interval_ended(&mut self, slot: Slot, now: Instant) {
        if let Some(follower) = &mut self.members.at_mut(slot).follower {
            follower.ended();
        }
        self.set_end_of_interval(slot, now);
        self.end_interval_of_huge(slot);
        self.admit_denied();
        self.follow_limit(now);
    }

    /// Has pages scanned again for which there was no room, where there is more of it now.
    fn admit_denied(&mut self) {
        let budget = self.budgets.own();
        if self.pressure.eased(budget.room(), budget.ample()) {
            self.members.iter_mut().filter_map(|member| member.follower.as_mut()).for_each(Follower::admit);
        }
    }

    /// The next interval of a VM begins now. Where the end of the last one took long it is as long as any.
    fn set_end_of_interval(&mut self, slot: Slot, now: Instant) {
        let stretch = self.members.at(slot).follower.as_ref().map_or(1, Follower::stretch);
        let due = self.end_of_interval(now, stretch);
        if let Some(follower) = &mut self.members.at_mut(slot).follower {
            follower.set_due(due);
        }
    }

    /// The end of the interval that begins now, `stretch` times as long as the shortest. All VMs' intervals end
    /// together, so that an idle engine wakes up once for all of them; one that is behind skips intervals.
    fn end_of_interval(&self, now: Instant, stretch: u32) -> Instant {
        let shortest = self.interval.max(Duration::from_micros(100));
        let (interval, half) = (shortest * stretch, shortest / 2);
        let epoch = *EPOCH.get_or_init(Instant::now);
        let passed = (now + half).saturating_duration_since(epoch).as_nanos() / interval.as_nanos();
        epoch + interval * (passed as u32).saturating_add(1)
    }
}
