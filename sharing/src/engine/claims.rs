//! Taking in what guests say that their pages are for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use samepage_hole::{GuestHeader, PageType, Unread};

use crate::changes::follower::Turn;
use crate::engine::Engine;
use crate::engine::holds::thread_cpu;
use crate::engine::members::Member;
use crate::engine::turns::Kind;
use crate::frames::page_types::Claim;
use crate::numbers::Slot;
use crate::policy::claims::{
    ClaimSource, Claims, Heard, Reading, SharedTypes, Sweep, patience, ram_of_block,
};
use crate::policy::give_back::Giving;

/// Blocks of words that one step reads: some hundred microseconds where all have changed.
const STEP_BLOCKS: u32 = 16;

/// The least time between the beginnings of two passes' readings.
const SHORTEST: Duration = Duration::from_millis(100);

/// Reading takes one part in so many of the time.
const SHARE: u32 = 50;

/// Pages that one step handles, where something is to be done with all of them.
const STEP_PAGES: u32 = 8192;

/// After how many passes all free pages are tried again: some may have been used and freed between two.
const RETRY_PASSES: u64 = 32;

impl Member {
    /// What the guest says of a page.
    pub(crate) fn claim(&self, page: u32) -> Claim {
        self.space.backing().census().map_or_else(Claim::default, |census| census.claim(page))
    }

    /// Whether the page is of a type that is shared.
    pub(crate) fn admits(&self, page: u32) -> bool {
        match self.types {
            SharedTypes::All => true,
            SharedTypes::File => self.claim(page).page_type().is_file(),
            SharedTypes::NotFile => {
                self.claims.as_ref().is_some_and(|claims| claims.publishing())
                    && !self.claim(page).page_type().is_file()
            }
        }
    }

    /// Takes in what the guest says of a page. Returns whether it is news.
    fn hear(&mut self, page: u32, claim: Claim) -> bool {
        let attached = self.space.attached(page);
        let before = self.space.census_mut().and_then(|census| census.set(page, claim, attached));
        let (Some(before), Some(claims)) = (before, &mut self.claims) else { return false };
        if claim.free() == before.free() {
            // A page that was not shared for what it was.
            if let Some(follower) = self.follower.as_mut().filter(|_| self.types != SharedTypes::All) {
                follower.look_again(page);
            }
            return true;
        }
        if claim.free() {
            claims.offered.insert(page);
            if let Some(follower) = &mut self.follower {
                follower.drop_page(page);
            }
        } else {
            claims.offered.remove(page);
            if let Some(follower) = &mut self.follower {
                follower.look_again(page);
            }
        }
        true
    }

    /// A page of a VM whose guest says what its pages are for was written.
    pub(crate) fn written(&mut self, page: u32) {
        if let Some(claims) = &mut self.claims {
            claims.offered.remove(page);
        }
    }

    /// A page has become idle: it is scanned when its turn comes.
    pub(crate) fn queue(&mut self, page: u32) {
        let turn = self.turn_of(page);
        if let Some(follower) = &mut self.follower {
            follower.queue(page, turn);
        }
    }

    /// Whether the page is to be shared by what the guest says of it.
    pub(crate) fn wanted(&self, page: u32) -> bool {
        !self.claim(page).free() && self.admits(page)
    }

    fn turn_of(&mut self, page: u32) -> Turn {
        let claim = self.claim(page);
        let Some(claims) = self.claims.as_mut().filter(|claims| claims.publishing()) else {
            return Turn::First;
        };
        match claim.page_type() {
            PageType::Free => {
                // The next pass tells whether it still is.
                claims.offered.insert(page);
                Turn::Never
            }
            _ if claim.poor() => Turn::Last,
            kind if kind.is_file() => Turn::First,
            _ => Turn::Second,
        }
    }
}

impl Engine {
    /// Has a VM's guest listened to. The bell is to be set when it says that a pass is over.
    pub fn listen(&mut self, slot: Slot, source: Arc<dyn ClaimSource>, bell: Arc<AtomicBool>) {
        let Some(member) = self.members.get_mut(slot) else { return };
        let pages = member.space.pages();
        let ram: u64 = source.ranges().iter().map(|range| u64::from(range.count)).sum();
        let frames =
            source.ranges().iter().map(|range| u64::from(range.first) + u64::from(range.count)).max();
        assert_eq!(ram, u64::from(pages), "the ranges of page frames are the VM's RAM");
        assert!(frames.unwrap_or(0) <= u64::from(source.hole().frames()), "all RAM has words");
        member.claims = Some(Box::new(Claims::new(source, bell, pages)));
    }

    /// Takes in the next part of what guests say. Returns whether there was any.
    pub(crate) fn take_claims(&mut self, now: Instant) -> bool {
        let due = |member: &Member| {
            member.claims.as_ref().and_then(|claims| claims.due()).is_some_and(|due| due <= now)
        };
        let Some(slot) = self.next_with_work(Kind::Claims, due) else { return false };
        let claims = self.members.at(slot).claims.as_ref();
        if let Some((sweep, from)) = claims.and_then(|claims| claims.sweep) {
            self.go_on_sweeping(slot, sweep, from);
        } else if claims.is_some_and(|claims| claims.reading.is_some()) {
            self.read_blocks(slot, now);
        } else {
            self.begin_reading(slot, now);
        }
        true
    }

    /// When guests have to be listened to again.
    pub(crate) fn claims_due(&self) -> Option<Instant> {
        self.members.iter().filter_map(|member| member.claims.as_ref()?.due()).min()
    }

    fn begin_reading(&mut self, slot: Slot, now: Instant) {
        let member = self.members.at_mut(slot);
        let Some(claims) = &mut member.claims else { return };
        claims.rung.store(false, Ordering::Release);
        claims.not_before = now + SHORTEST;
        let header = claims.source.hole().guest_header();
        let news =
            |header: &GuestHeader| claims.header().is_none_or(|last| last.generation != header.generation);
        match header {
            Ok(header) if news(&header) => {
                claims.reading = Some(Reading { header, block: 0, started: now, took: Duration::ZERO });
                claims.not_before = now;
                member.space.take_census();
            }
            // It was rung for nothing, or the header does not hold still: that is like silence.
            Ok(_) | Err(Unread::Unsettled) => {
                if claims.heard.is_some_and(|heard| heard.at + heard.patience <= now) {
                    self.forget_claims(slot);
                }
            }
            Err(Unread::Absent) => self.forget_claims(slot),
        }
    }

    /// Reads the words of the next blocks that changed.
    fn read_blocks(&mut self, slot: Slot, now: Instant) {
        // Time in which this thread had no processor is not the guest's.
        let started = thread_cpu();
        let member = self.members.at_mut(slot);
        let Some(claims) = &mut member.claims else { return };
        let Some(mut reading) = claims.reading.take() else { return };
        let source = Arc::clone(&claims.source);
        let hole = source.hole();
        let mut read = 0;
        let mut words = 0;
        while reading.block < hole.blocks() && read < STEP_BLOCKS {
            let block = reading.block;
            reading.block += 1;
            let counter = hole.counter(block);
            let Some(claims) = &mut member.claims else { return };
            let known = std::mem::replace(&mut claims.counters[block as usize], counter);
            // At the first pass the counter may be what it happened to be.
            if known == counter && claims.heard.is_some() {
                continue;
            }
            read += 1;
            let flags = hole.block(block);
            for (index, page, count) in ram_of_block(source.ranges(), block) {
                for (word, page) in flags[index as usize..].iter().zip(page..page + count) {
                    words += u64::from(member.hear(page, Claim::new(word.load(Ordering::Relaxed))));
                }
            }
        }
        let Some(claims) = &mut member.claims else { return };
        claims.words += words;
        reading.took += thread_cpu().saturating_sub(started);
        if reading.block < hole.blocks() {
            claims.reading = Some(reading);
            return;
        }
        claims.not_before = reading.started + SHORTEST.max(reading.took * SHARE);
        let answered = reading.header.answered;
        let first = !claims.publishing();
        let since = claims.heard.map(|heard| now.saturating_duration_since(heard.at));
        let patience = patience(&reading.header, since);
        claims.heard = Some(Heard { header: reading.header, at: now, patience });
        claims.passes += 1;
        if let Some(census) = member.space.census_mut() {
            census.elapse(now);
        }
        let Some(claims) = &mut member.claims else { return };
        if claims.passes.is_multiple_of(RETRY_PASSES) {
            claims.sweep = Some((Sweep::Retry, 0));
        }
        self.pass_was_read(slot, answered);
        if first && self.members.at(slot).types == SharedTypes::NotFile {
            // Only now is it known what may be shared.
            let member = self.members.at_mut(slot);
            let pages = member.space.pages();
            if let Some(follower) = &mut member.follower {
                follower.reset(0..pages);
            }
        }
    }

    /// Goes over the next pages.
    fn go_on_sweeping(&mut self, slot: Slot, sweep: Sweep, from: u32) {
        let member = self.members.at_mut(slot);
        let pages = member.space.pages();
        let end = pages.min(from.saturating_add(STEP_PAGES));
        for page in from..end {
            match sweep {
                Sweep::Forget => {
                    member.hear(page, Claim::default());
                }
                Sweep::Retry => {
                    let free = member.claim(page).free();
                    if let Some(claims) = member.claims.as_mut().filter(|_| free) {
                        claims.offered.insert(page);
                    }
                }
            }
        }
        if let Some(claims) = &mut member.claims {
            claims.sweep = (end < pages).then_some((sweep, end));
        }
    }

    /// A guest says nothing any more: what it said holds no longer, page by page.
    fn forget_claims(&mut self, slot: Slot) {
        let member = self.members.at_mut(slot);
        let Some(claims) = &mut member.claims else { return };
        if claims.heard.take().is_none() {
            return;
        }
        claims.reading = None;
        claims.giving = Giving::default();
        claims.counters.fill(0);
        claims.offered.clear();
        claims.sweep = Some((Sweep::Forget, 0));
        if let Some(census) = member.space.census_mut() {
            census.end_lending();
        }
    }
}
