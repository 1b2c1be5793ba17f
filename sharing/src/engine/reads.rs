//! Reads of disk blocks: what the group's guests or the host hold is delivered at once, what nobody holds
//! is fetched into frames first.
//!
//! A block is delivered by mapping its frame over the guest's page, where that is worth its mappings, or
//! by copy. In exclusive use a block that was copied leaves the host; what is left is a note of the page
//! and the content, by which the block is found again when somebody reads it, or when the guest is about
//! to put something else there. The page has to prove that it still holds the block: a copy of it is
//! taken, and the digest of that copy decides.

#![expect(unsafe_code, reason = "reads and fills frames by address")]

use std::ops::Range;

use crate::blocks::admission::{Sample, Sampler};
use crate::blocks::block_index::{BlockKey, Keep};
use crate::blocks::copies::CopyRecord;
use crate::blocks::read::{BlockRead, CopyOut, FetchRun, ReadPlan, VmNumber};
use crate::blocks::replace::{History, Replacement};
use crate::blocks::state::Fetching;
use crate::engine::Engine;
use crate::engine::members::Mode;
use crate::frames::space::WINDOW_PAGES;
use crate::frames::store::{Frame, Hold};
use crate::memory::content::{self, Page, Snapshot};
use crate::memory::guest::Source;
use crate::numbers::{GlobalPage, Slot};
use crate::policy::pressure::value;

/// Blocks that are fetched as one.
const LONGEST_FETCH: u32 = 512;

/// A block that is about to be delivered.
#[derive(Clone, Copy, Debug)]
struct Delivery {
    /// Its place among the targets.
    index: usize,
    key: BlockKey,
    frame: Frame,
    target: Option<u32>,
    history: History,
}

impl Engine {
    /// What reads for the VM in a slot are begun with.
    #[must_use]
    pub fn vm_number(&self, slot: Slot) -> VmNumber {
        VmNumber { slot, id: self.members.get(slot).map_or(0, |member| member.id) }
    }

    /// Delivers what the group has of a read, and says what becomes of the rest.
    pub fn begin_read(&mut self, vm: VmNumber, read: &BlockRead<'_>, copy: &mut CopyOut<'_>) -> ReadPlan {
        let VmNumber { slot, id } = vm;
        let mut plan = ReadPlan::default();
        let blocks = read.first..read.first.saturating_add(read.targets.len() as u64);
        let member = self.members.get(slot).filter(|member| member.id == id && !member.space.lost());
        let pages = member.map_or(0, |member| member.space.pages());
        let there = read.targets.iter().flatten().all(|&page| page < pages);
        if member.is_none() || !there || blocks.end >= u64::from(u32::MAX) {
            self.cache.counters.past += read.targets.len() as u64;
            plan.past.push(blocks);
            return plan;
        }
        let image = self.cache.image(read.image);
        let key = |index: usize| BlockKey { image, block: read.first as u32 + index as u32 };
        if read.keep == Keep::Exclusive {
            self.demote_replaced(slot, read.targets, key(0));
        }

        let mut missing: Option<Range<usize>> = None;
        let mut held: Vec<Delivery> = Vec::new();
        for (index, &target) in read.targets.iter().enumerate() {
            self.members.at_mut(slot).missed(key(index), &self.cache.sampler);
            let found = if self.cache.being_written(key(index)) { None } else { self.find_block(key(index)) };
            match found {
                Some(Found::Frame(frame)) => {
                    let idle = self.store.sharers(frame) == 0;
                    plan.from_host += u64::from(idle);
                    plan.from_guests += u64::from(!idle);
                    let history = self.wanted_again(frame, read.keep);
                    held.push(Delivery { index, key: key(index), frame, target, history });
                    continue;
                }
                Some(Found::Copied(record, content)) => {
                    plan.from_guests += 1;
                    copy(index, &content);
                    self.copied(slot, target, Some(record));
                    continue;
                }
                None => {}
            }
            match &mut missing {
                Some(run) if run.end == index && run.len() < LONGEST_FETCH as usize => run.end += 1,
                _ => {
                    let run = missing.replace(index..index + 1);
                    self.fetch(vm, read, run, &mut plan);
                }
            }
        }
        self.fetch(vm, read, missing, &mut plan);
        self.deliver(slot, read.keep, &held, copy);
        self.cache.counters.served_from_guests += plan.from_guests;
        self.cache.counters.served_from_host += plan.from_host;
        self.update_cache();
        plan
    }

    /// The same for what is in the sample of a disk of which nothing else goes through the cache.
    pub fn begin_sampled_read(
        &mut self,
        vm: VmNumber,
        read: &BlockRead<'_>,
        sample: Sample,
        copy: &mut CopyOut<'_>,
    ) -> ReadPlan {
        if self.members.get(vm.slot).is_some_and(|member| member.id == vm.id) {
            let working_set = self.members.at_mut(vm.slot).working_set_by(&self.cache.sampler);
            working_set.follow_below(sample.disk, sample.limit);
            working_set.passed(sample.passed);
        }
        self.cache.sampling = true;
        let mut plan = self.begin_read(vm, read, copy);
        self.cache.sampling = false;
        let pages = self.members.get(vm.slot).map_or(0, |member| member.space.pages());
        plan.room = self.cache.limit.share().saturating_add(pages.into());
        plan
    }

    /// All reads of one of the VM's disks go through the cache from now on, and not a sample only.
    pub fn end_sampling(&mut self, vm: VmNumber, disk: usize) {
        if let Some(member) = self.members.get(vm.slot).filter(|member| member.id == vm.id)
            && member.working_set.is_some()
        {
            self.members.at_mut(vm.slot).working_set_by(&self.cache.sampler).follow_below(disk, u64::MAX);
        }
    }

    /// What chooses the samples.
    #[must_use]
    pub fn sampler(&self) -> Sampler {
        self.cache.sampler.clone()
    }

    /// The run was read in full, or not. What was read is delivered. Returns whether the VM was there to
    /// have it.
    pub fn end_fetch(&mut self, token: u64, read: bool, copy: &mut CopyOut<'_>) -> bool {
        let Some(fetch) = self.cache.fetches.remove(&token) else { return false };
        let (slot, hold) = (fetch.vm.slot, fetch.hold);
        let there = self.members.get(slot).is_some_and(|m| m.id == fetch.vm.id && !m.space.lost());
        if !read || !there {
            self.release_hold(hold);
            self.store.recycle(&*self.host.calls);
            return false;
        }
        self.store.fill(&hold);
        self.cache.counters.fetched += u64::from(hold.count());
        self.cache.filled = true;
        let mut deliveries = Vec::with_capacity(fetch.targets.len());
        for (index, &target) in fetch.targets.iter().enumerate() {
            let key = BlockKey { block: fetch.key.block + index as u32, ..fetch.key };
            let history = fetch.histories[index];
            let stale = fetch.stale[index] || self.cache.being_written(key);
            let frame = self.enter(hold.first() + index as u32, key, fetch.keep, history, stale);
            deliveries.push(Delivery { index, key, frame, target, history });
        }
        self.cache.sampling = fetch.sampled;
        self.deliver(slot, fetch.keep, &deliveries, copy);
        self.cache.sampling = false;
        // What nobody has taken over dies: another frame has its content, or it was written meanwhile.
        self.release_hold(hold);
        self.update_cache();
        true
    }

    /// Enters a frame that was just filled, and is held, into the cache, unless there is another of that block
    /// or content. Returns the one to be delivered, which holds the block or is the one that was filled.
    fn enter(&mut self, frame: Frame, key: BlockKey, keep: Keep, history: History, stale: bool) -> Frame {
        if !stale && let Some(other) = self.cache.index.frame(key) {
            // Somebody else read it meanwhile.
            return other;
        }
        // SAFETY: the frame is live, and its content no longer changes.
        let page = unsafe { &*self.store.content(frame).cast::<Page>() };
        let digest = self.digester.digest(page);
        self.counters.digests += 1;
        self.store.set_digest(frame, digest);
        if keep == Keep::Inclusive {
            if !stale {
                self.index_block(frame, key, keep, history);
            }
            return frame;
        }
        if !stale
            && let Some(like) = self.frame_like(page, digest)
            && self.index_block(like, key, keep, history)
        {
            return like;
        }
        self.stable.insert(frame, &mut self.store);
        if !stale {
            self.index_block(frame, key, keep, history);
        }
        frame
    }

    /// Fetches a run that nobody holds.
    fn fetch(&mut self, vm: VmNumber, read: &BlockRead<'_>, run: Option<Range<usize>>, plan: &mut ReadPlan) {
        let Some(run) = run else { return };
        let image = self.cache.image(read.image);
        let first = read.first + run.start as u64;
        let key = BlockKey { image, block: first as u32 };
        let targets = read.targets[run.clone()].to_vec();
        let count = targets.len() as u32;
        // Neighbours in the guest on neighbours in the store make one mapping.
        let space = &self.members.at(vm.slot).space;
        let before = targets[0].and_then(|page| page.checked_sub(1)).filter(|&page| space.attached(page));
        let preferred = before.and_then(|page| space.refers(page)).map(|frame| frame + 1);
        let spare = if preferred.is_none() { self.store.allocate_spare(count) } else { None };
        let Some(hold) = spare.or_else(|| self.store.allocate(count, preferred)) else {
            self.counters.refusals += 1;
            self.cache.counters.past += u64::from(count);
            plan.past.push(first..first + u64::from(count));
            return;
        };
        let keys = (key.block..key.block + count).map(|block| BlockKey { image, block });
        let histories = keys.clone().map(|key| self.cache.order.miss(key)).collect();
        let stale = keys.map(|key| self.cache.being_written(key)).collect();
        let landing = self.store.landing(&hold);
        let (keep, sampled) = (read.keep, self.cache.sampling);
        let fetching = Fetching { vm, keep, sampled, key, hold, targets, histories, stale };
        let token = self.cache.add_fetch(fetching);
        plan.fetches.push(FetchRun { token, first, blocks: count, landing });
    }

    /// Where a block is, if the group holds it.
    fn find_block(&mut self, key: BlockKey) -> Option<Found> {
        if let Some(frame) = self.cache.index.frame(key) {
            return Some(Found::Frame(frame));
        }
        let (global, record) = self.cache.copies.holder(key)?;
        let (slot, page) = self.members.locate(global);
        let member = self.members.at(slot);
        if member.mode != Mode::Full || member.space.lost() {
            return None;
        }
        if let Some(frame) = member.space.refers(page).filter(|_| member.space.attached(page))
            && self.proof_of(frame) == record.proof
            && self.index_block(frame, key, Keep::Exclusive, record.history)
        {
            return Some(Found::Frame(frame));
        }
        let content = self.members.at(slot).space.memory().read(page);
        if self.cache.prover.proof(&content) == record.proof {
            return Some(Found::Copied(record, content));
        }
        self.refute(global);
        None
    }

    /// A page does not hold what was copied to it.
    fn refute(&mut self, global: GlobalPage) {
        self.cache.counters.refuted += 1;
        self.give_up(global);
    }

    fn give_up(&mut self, global: GlobalPage) {
        let (slot, _) = self.members.locate(global);
        if let Some(record) = self.cache.copies.remove(global) {
            self.members.at_mut(slot).gave_up(record.key);
        }
    }

    /// Guest pages are about to hold other blocks: what they hold provably now becomes cached.
    fn demote_replaced(&mut self, slot: Slot, targets: &[Option<u32>], first: BlockKey) {
        for (index, &target) in (0..).zip(targets) {
            let Some(page) = target else { continue };
            let global = self.members.at(slot).global_page(page);
            let Some(&record) = self.cache.copies.get(global) else { continue };
            let same = record.key == BlockKey { block: first.block + index, ..first };
            let held = self.cache.index.frame(record.key).is_some() || self.cache.being_written(record.key);
            if same || held || self.cache.limit.share() == 0 {
                continue;
            }
            // A guest that clears its pages first is told by the first bytes.
            if self.members.at(slot).space.memory().zeros(page..page + 1) == 1 {
                self.refute(global);
                continue;
            }
            let Some(hold) = self.copy_to_frame(slot, page) else { return };
            if self.proof_of(hold.first()) != record.proof {
                self.release_hold(hold);
                self.refute(global);
                continue;
            }
            self.give_up(global);
            let frame = self.enter(hold.first(), record.key, Keep::Exclusive, record.history, false);
            self.release_hold(hold);
            if self.store.sharers(frame) == 0 && self.store.kept(frame) {
                self.cache.order.insert(record.key, record.history);
                self.cache.counters.demoted_copied += 1;
            }
        }
    }

    /// A frame with a copy of a guest's page, which may have changed meanwhile. `None` where there is no memory
    /// for it.
    fn copy_to_frame(&mut self, slot: Slot, page: u32) -> Option<Hold> {
        let hold = if let Some(hold) = self.store.allocate_spare(1) {
            let landing = self.store.landing(&hold).as_ptr();
            self.members.at(slot).space.memory().contents(page..page + 1, &mut |bytes| {
                // SAFETY: what is named as bytes is mapped; the frame is new, and nobody maps it.
                unsafe { content::copy_bytes(bytes.page(0), landing) };
            });
            hold
        } else {
            let hold = self.store.allocate(1, None)?;
            if self.write_frames(&hold, slot, page).is_err() {
                self.release_hold(hold);
                return None;
            }
            hold
        };
        self.store.fill(&hold);
        Some(hold)
    }

    /// A block that the host holds is read. Returns its history.
    fn wanted_again(&mut self, frame: Frame, keep: Keep) -> History {
        let Some(named) = self.cache.index.of_mut(frame) else { return History::NONE };
        if keep == Keep::Exclusive && named.keep == Keep::Exclusive {
            named.history = self.cache.order.take(named.key).unwrap_or(named.history);
        } else {
            self.cache.order.hit(named.key);
        }
        named.history
    }

    /// Maps frames over pages in runs where that is worth it, and copies the others.
    fn deliver(&mut self, slot: Slot, keep: Keep, deliveries: &[Delivery], copy: &mut CopyOut<'_>) {
        let joined = |one: &Delivery, next: &Delivery| {
            let pages = one.target.zip(next.target).is_some_and(|(one, next)| next == one + 1);
            pages && next.frame == one.frame + 1
        };
        for run in deliveries.chunk_by(joined) {
            for part in run.chunks(WINDOW_PAGES as usize) {
                let first = part[0].target.filter(|_| keep == Keep::Exclusive);
                let mapped = first.map_or(0, |page| self.map_run(slot, page, part));
                for delivery in &part[mapped as usize..] {
                    self.deliver_copy(slot, keep, delivery, copy);
                }
            }
        }
        // One frame may have been delivered several times, and is found by its first owner alone after that.
        for delivery in deliveries {
            self.dismiss(keep, delivery);
        }
    }

    fn deliver_copy(&mut self, slot: Slot, keep: Keep, delivery: &Delivery, copy: &mut CopyOut<'_>) {
        let Delivery { index, key, frame, target, history } = *delivery;
        self.cache.counters.delivered_copied += 1;
        // SAFETY: the frame is live, and its content no longer changes.
        copy(index, unsafe { &*self.store.content(frame).cast::<Page>() });
        let holds = self.cache.index.frame(key) == Some(frame);
        let record = (keep == Keep::Exclusive && holds && target.is_some()).then(|| CopyRecord {
            key,
            proof: self.proof_of(frame),
            history,
        });
        self.copied(slot, target, record);
    }

    /// The host has written to a page: what the metadata says of it is no longer so.
    fn copied(&mut self, slot: Slot, target: Option<u32>, record: Option<CopyRecord>) {
        let Some(page) = target else { return };
        if !self.members.at(slot).space.attached(page) {
            self.forget_page(slot, page);
            self.members.at_mut(slot).not_zero(page);
        }
        let member = self.members.at_mut(slot);
        let global = member.global_page(page);
        let before = self.cache.copies.remove(global).map(|record| record.key);
        if let Some(before) = before.filter(|&before| record.is_none_or(|record| record.key != before)) {
            member.gave_up(before);
        }
        if let Some(record) = record {
            self.cache.copies.insert(global, record);
        }
    }

    /// A block has been delivered: the host keeps it, or leaves it to the guest.
    fn dismiss(&mut self, keep: Keep, delivery: &Delivery) {
        // Of a frame without a name only who filled it is left, or guests.
        let Some(&named) = self.cache.index.of(delivery.frame) else { return };
        if self.store.sharers(delivery.frame) > 0 {
            return;
        }
        if keep == Keep::Exclusive && named.keep == Keep::Exclusive && delivery.target.is_some() {
            self.drop_block(delivery.frame);
        } else if !self.cache.order.contains(named.key) {
            self.cache.order.insert(named.key, named.history);
        }
    }

    /// Maps a run of frames over pages from `first` on. Returns how many.
    fn map_run(&mut self, slot: Slot, first: u32, run: &[Delivery]) -> u32 {
        let (frame, count) = (run[0].frame, run.len() as u32);
        if !self.worth_mapping(slot, first, frame, run) {
            return 0;
        }
        let held = self.forget_run(slot, first, count);
        let mut dead = Vec::new();
        let Self { members, store, .. } = self;
        let outcome = members.at_mut(slot).space.deliver(first, frame, count, store, &mut dead);
        dead.into_iter().for_each(|frame| self.stable.remove(frame, &mut self.store));
        let mapped = self.note_outcome(slot, outcome);
        for ((page, delivery), held) in (first..first + mapped).zip(run).zip(held) {
            let member = self.members.at_mut(slot);
            member.not_zero(page);
            member.became_merged(page);
            let global = member.global_page(page);
            let noted = self.cache.copies.remove(global).map(|record| record.key);
            if let Some(key) = held.or(noted).filter(|&key| key != delivery.key) {
                member.gave_up(key);
            }
        }
        self.cache.counters.delivered_mapped += u64::from(mapped);
        self.report_mappings();
        mapped
    }

    fn worth_mapping(&self, slot: Slot, first: u32, frame: Frame, run: &[Delivery]) -> bool {
        let member = self.members.at(slot);
        let count = run.len() as u32;
        let any_huge = || (first..first + count).any(|page| member.is_huge(page));
        let copied = |delivery: &Delivery| {
            self.cache.index.of(delivery.frame).is_some_and(|named| named.keep != Keep::Exclusive)
        };
        if member.mode != Mode::Full || member.space.lost() || any_huge() || run.iter().any(copied) {
            return false;
        }
        let added = member.space.mappings_added(first, count, Source::Frames(frame));
        if added <= 0 {
            return true;
        }
        let budget = member.budget();
        let shortest = budget.shortest_run();
        let least = if shortest == 1 { 0 } else { shortest };
        // What goes past the cache leaves a mapping where all see it, and a note where nobody looks.
        let least_run = if self.cache.sampling { 1 } else { self.shortest_mapping };
        count >= least_run
            && value(count, added) >= least.max(self.pressure.floor())
            && added + 2 <= budget.room()
    }
}

/// A block that the group holds.
enum Found {
    /// In a frame.
    Frame(Frame),
    /// In a guest's page alone, of which this is a copy.
    Copied(CopyRecord, Box<Snapshot>),
}
