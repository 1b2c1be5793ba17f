//! Disks: blocks that guests read and write, as slowly as disks do.

use std::collections::BTreeMap;
use std::ptr::NonNull;

use samepage_sharing::PAGE_SIZE;
use samepage_sharing::blocks::{BlockRead, Image, Keep};
use samepage_sharing::content::Page;

use super::super::{WORDS, word};
use super::{Holds, Player, World};

/// A disk: what its blocks hold, and the writes that are under way.
pub(super) struct Disk {
    pub(super) image: Image,
    keep: Keep,
    seeds: BTreeMap<u64, u64>,
    writes: Vec<(u64, u64)>,
}

impl Disk {
    /// A disk that keeps its blocks so.
    pub(super) fn new(number: u64, keep: Keep) -> Self {
        Self { image: Image([1, number, 0, 0]), keep, seeds: BTreeMap::new(), writes: Vec::new() }
    }

    pub(super) fn seed(&self, block: u64) -> u64 {
        self.seeds.get(&block).copied().unwrap_or((self.image.0[1] << 32) + 1 + block)
    }

    fn being_written(&self, block: u64) -> bool {
        self.writes.iter().any(|&(first, count)| (first..first + count).contains(&block))
    }
}

/// A run of blocks that a disk reads into memory of the host's.
struct Fetch {
    token: u64,
    first: u64,
    landing: NonNull<u8>,
    /// The contents of each block's two halves, as far as they have been read.
    halves: [Vec<u64>; 2],
    blocks: u32,
}

/// Blocks that a guest has asked for, and of which some are still to come.
pub(super) struct Reading {
    disk: usize,
    pub(super) vm: u64,
    first: u64,
    pub(super) targets: Vec<Option<u32>>,
    fetches: Vec<Fetch>,
}

impl World {
    pub(super) fn begin_read(&mut self) {
        let Some(index) = self.any_vm() else { return };
        let disk = self.below(self.disks.len() as u32) as usize;
        let (page, count) = self.run(40);
        let first = u64::from(self.below(self.size));
        let targets: Vec<_> = if self.one_in(3) {
            // Each page once: what a guest reads to one page twice at once is its own affair.
            (0..count.min(self.size / 3)).map(|offset| Some((page + offset * 3) % self.size)).collect()
        } else {
            let whole = |offset| (offset % 11 != 10).then_some(page + offset);
            (0..count).map(whole).collect()
        };
        self.read(index, disk, first, targets);
    }

    /// A guest reads blocks: what is there is delivered, the rest is on its way.
    pub(crate) fn read(&mut self, index: usize, disk: usize, first: u64, targets: Vec<Option<u32>>) {
        let player = &mut self.players[index];
        self.told.push(format!(
            "VM {} reads {} blocks of disk {disk} at {first} to {targets:?}",
            player.id,
            targets.len()
        ));
        targets.iter().flatten().for_each(|&page| player.free[page as usize] = false);
        let number = self.engine.vm_number(player.vm.slot);
        let Disk { image, keep, .. } = self.disks[disk];
        let read = BlockRead { keep, image, first, targets: &targets };
        let mut copied = Vec::new();
        let plan = self.engine.begin_read(number, &read, &mut |index, content| {
            copied.push((index, first_word(content)));
            copy_out(player, targets[index], content);
        });
        let fetched = |block: u64| {
            plan.fetches
                .iter()
                .any(|fetch| (fetch.first..fetch.first + u64::from(fetch.blocks)).contains(&block))
        };
        let past = |block: u64| plan.past.iter().any(|past| past.contains(&block));
        for &(offset, found) in &copied {
            let block = first + offset as u64;
            let seed = self.disks[disk].seed(block);
            assert_eq!(found, word(seed, 0), "block {block} of disk {disk}, copied at once");
        }
        for (block, &target) in (first..).zip(&targets) {
            if fetched(block) {
                continue;
            }
            let seed = self.disks[disk].seed(block);
            if past(block) {
                if let Some(page) = target.filter(|_| !self.players[index].lost()) {
                    self.write(index, page, seed, false);
                }
                continue;
            }
            assert!(!self.disks[disk].being_written(block), "block {block} of disk {disk} is being written");
            let copied = copied.iter().any(|&(offset, _)| first + offset as u64 == block);
            self.delivered(index, target, seed, copied);
        }
        let fetches = plan.fetches.into_iter().map(|fetch| Fetch {
            token: fetch.token,
            first: fetch.first,
            landing: fetch.landing,
            halves: [Vec::new(), Vec::new()],
            blocks: fetch.blocks,
        });
        let vm = self.players[index].id;
        let reading = Reading { disk, vm, first, targets, fetches: fetches.collect() };
        if !reading.fetches.is_empty() {
            self.readings.push(reading);
        }
    }

    /// A page has been filled from a disk.
    fn delivered(&mut self, index: usize, target: Option<u32>, seed: u64, copied: bool) {
        let Some(page) = target.filter(|_| !self.players[index].lost()) else { return };
        self.players[index].pages[page as usize] = Holds { seed, or_zero: false };
        self.check(index, page, 1);
        if copied {
            // The kernel reads on from the page itself, where that is the guest's own.
            let id = self.players[index].id;
            self.pinned.retain(|pinned| (pinned.vm, pinned.page) != (id, page));
        }
    }

    /// The disk reads the next halves of what was asked for.
    pub(super) fn land(&mut self) {
        let count = self.readings.len() as u32;
        let number = self.below(count) as usize;
        if number < self.readings.len() {
            self.tell(format!("reading {number} lands in part"));
            self.land_next(number);
        }
    }

    fn land_next(&mut self, number: usize) {
        let Reading { disk, fetches, .. } = &mut self.readings[number];
        for fetch in fetches {
            let Some(half) = fetch.halves.iter().position(Vec::is_empty) else { continue };
            for block in 0..fetch.blocks {
                let seed = self.disks[*disk].seed(fetch.first + u64::from(block));
                fetch.halves[half].push(seed);
                for index in half * WORDS / 2..(half + 1) * WORDS / 2 {
                    let at = block as usize * PAGE_SIZE + index * 8;
                    // SAFETY: the fetch has this memory to itself.
                    unsafe { fetch.landing.add(at).cast().write(word(seed, index)) };
                }
            }
        }
    }

    pub(super) fn end_read(&mut self) {
        let count = self.readings.len() as u32;
        let number = self.below(count) as usize;
        if number < self.readings.len() {
            let well = !self.one_in(10);
            self.finish(number, well);
        }
    }

    /// A read ends, well or not.
    pub(crate) fn finish(&mut self, number: usize, well: bool) {
        self.tell(format!("reading {number} ends, well {well}"));
        if well {
            (0..2).for_each(|_| self.land_next(number));
        }
        let Reading { disk, vm, first, targets, fetches } = self.readings.remove(number);
        let index = self.players.iter().position(|player| player.id == vm);
        for fetch in fetches {
            let from = (fetch.first - first) as usize;
            let mut copied = Vec::new();
            let there = self.engine.end_fetch(fetch.token, well, &mut |offset, content| {
                let index = index.expect("a VM that has ended is copied to");
                copied.push((offset, first_word(content)));
                copy_out(&self.players[index], targets[from + offset], content);
            });
            let Some(index) = index.filter(|_| there) else { continue };
            for &(offset, found) in &copied {
                let seed = fetch.halves[0][offset];
                assert_eq!(
                    found,
                    word(seed, 0),
                    "block {} of disk {disk}, copied",
                    fetch.first + offset as u64
                );
            }
            let [one, other] = &fetch.halves;
            for (offset, (&one, &other)) in one.iter().zip(other).enumerate() {
                let target = targets[from + offset];
                if one == other {
                    let copied = copied.iter().any(|&(other, _)| other == offset);
                    self.delivered(index, target, one, copied);
                } else if let Some(page) = target.filter(|_| !self.players[index].lost()) {
                    // It was written while it was read.
                    let seed = self.own();
                    self.write(index, page, seed, false);
                }
            }
        }
    }

    pub(super) fn write_disk(&mut self) {
        let disk = self.below(self.disks.len() as u32) as usize;
        let (first, count) = self.run(8);
        let (first, count) = (u64::from(first), u64::from(count));
        let overlaps = |&(other, many): &(u64, u64)| other < first + count && first < other + many;
        if self.disks[disk].writes.iter().any(overlaps) {
            return;
        }
        self.tell(format!("a write of {count} blocks at {first} of disk {disk} begins"));
        let image = self.disks[disk].image;
        self.disks[disk].writes.push((first, count));
        if self.one_in(2) {
            self.engine.begin_write(image, &(first..first + count));
        } else {
            // Something happens before all of it is forgotten.
            let mut rest = self.engine.announce_write(image, &(first..first + count));
            for _ in 0..self.below(3) {
                match self.below(4) {
                    0 => self.begin_read(),
                    1 => self.end_read(),
                    2 => self.steps(2, std::time::Duration::from_millis(30)),
                    _ => self.vms_come_and_go(),
                }
            }
            while self.engine.forget_next(&mut rest) {}
        }
        if self.one_in(2) {
            self.change(disk, (first, count));
        }
    }

    /// Blocks are written in one go.
    pub(super) fn write_blocks(&mut self, disk: usize, (first, count): (u64, u64)) {
        let overlaps = |&(other, many): &(u64, u64)| other < first + count && first < other + many;
        if !self.disks[disk].writes.iter().any(overlaps) {
            self.engine.begin_write(self.disks[disk].image, &(first..first + count));
            self.change(disk, (first, count));
            self.engine.end_write(self.disks[disk].image, &(first..first + count));
        }
    }

    fn change(&mut self, disk: usize, (first, count): (u64, u64)) {
        for block in first..first + count {
            let seed = if self.one_in(2) { self.own() } else { Self::alike(block as u32) };
            self.disks[disk].seeds.insert(block, seed);
        }
    }

    pub(super) fn end_writes(&mut self) {
        for disk in 0..self.disks.len() {
            for (first, count) in std::mem::take(&mut self.disks[disk].writes) {
                self.change(disk, (first, count));
                self.engine.end_write(self.disks[disk].image, &(first..first + count));
            }
        }
        self.tell("all writes end".into());
    }
}

fn first_word(content: &Page) -> u64 {
    u64::from_ne_bytes(content[..8].try_into().expect("eight bytes"))
}

/// Copies a block into a guest, whose log hears of it.
fn copy_out(player: &Player, target: Option<u32>, content: &Page) {
    let Some(page) = target.filter(|_| !player.lost()) else { return };
    let vm = &player.vm;
    let address = vm.guest.ram.range(page, 1).page(0).cast_mut();
    // SAFETY: the page is guest RAM, written by this thread alone.
    unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), address, PAGE_SIZE) };
    vm.told.0.lock().insert(page);
}
