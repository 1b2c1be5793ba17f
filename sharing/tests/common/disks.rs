//! Made-up disks, and VMs that read and write them through the block cache.
#![allow(dead_code, reason = "each test binary uses its part")]
#![expect(unsafe_code, reason = "plays disks and guests: writes where blocks land")]

use std::collections::BTreeMap;

use samepage_sharing::blocks::admission::{Admission, Readers};
use samepage_sharing::blocks::{BlockRead, FetchRun, Image, Keep, ReadPlan};
use samepage_sharing::engine::Engine;
use samepage_sharing::{PAGE_SIZE, content::Page};

use super::followed::Vm;
use super::word;

/// A disk whose blocks hold contents by their seeds.
pub(crate) struct Disk {
    pub(crate) image: Image,
    pub(crate) keep: Keep,
    /// Reads are of what is in its sample.
    pub(crate) sampled: bool,
    seeds: BTreeMap<u64, u64>,
    /// Blocks read from it.
    pub(crate) reads: u64,
}

/// A read that has not ended.
pub(crate) struct Reading {
    first: u64,
    pub(crate) targets: Vec<Option<u32>>,
    plan: ReadPlan,
    /// What the disk had when it was read.
    bytes: Vec<u64>,
}

impl Disk {
    pub(crate) fn new(number: u64, keep: Keep) -> Self {
        Self { image: Image([1, number, 0, 0]), keep, sampled: false, seeds: BTreeMap::new(), reads: 0 }
    }

    pub(crate) fn seed(&self, block: u64) -> u64 {
        self.seeds.get(&block).copied().unwrap_or((self.image.0[1] << 32) + 1 + block)
    }

    /// Reads blocks into pages one after the other.
    pub(crate) fn read(
        &mut self,
        engine: &mut Engine,
        vm: &Vm,
        first: u64,
        page: u32,
        count: u32,
    ) -> ReadPlan {
        self.read_to(engine, vm, first, (page..page + count).map(Some).collect())
    }

    pub(crate) fn read_to(
        &mut self,
        engine: &mut Engine,
        vm: &Vm,
        first: u64,
        targets: Vec<Option<u32>>,
    ) -> ReadPlan {
        let reading = self.begin(engine, vm, first, targets);
        self.end(engine, vm, reading, true)
    }

    /// Reads blocks past the cache.
    pub(crate) fn pass(&mut self, vm: &Vm, first: u64, page: u32, count: u32) {
        for index in 0..count {
            self.reads += 1;
            vm.write(page + index, self.seed(first + u64::from(index)));
        }
    }

    /// Asks the cache, and has the disk read what is to be fetched, but not delivered yet.
    pub(crate) fn begin(
        &mut self,
        engine: &mut Engine,
        vm: &Vm,
        first: u64,
        targets: Vec<Option<u32>>,
    ) -> Reading {
        let number = engine.vm_number(vm.slot);
        let read = BlockRead { keep: self.keep, image: self.image, first, targets: &targets };
        let mut copy = |index: usize, page: &Page| copy_out(vm, targets[index], page);
        let plan = match self.sampled {
            true => {
                let admission = Admission::new(engine.sampler(), Readers::One, 0);
                engine.begin_sampled_read(number, &read, admission.sample(), &mut copy)
            }
            false => engine.begin_read(number, &read, &mut copy),
        };
        let mut bytes = Vec::new();
        for fetch in &plan.fetches {
            for block in 0..fetch.blocks {
                let seed = self.seed(fetch.first + u64::from(block));
                bytes.push(seed);
                self.reads += 1;
                for index in 0..PAGE_SIZE / 8 {
                    let at = (block as usize * PAGE_SIZE) + index * 8;
                    // SAFETY: the fetch has this memory to itself.
                    unsafe { fetch.landing.add(at).cast().write(word(seed, index)) };
                }
            }
        }
        for past in &plan.past {
            for block in past.clone() {
                self.reads += 1;
                if let Some(page) = targets[(block - first) as usize] {
                    vm.write(page, self.seed(block));
                }
            }
        }
        Reading { first, targets, plan, bytes }
    }

    /// Ends what was begun.
    pub(crate) fn end(&mut self, engine: &mut Engine, vm: &Vm, reading: Reading, well: bool) -> ReadPlan {
        for fetch in &reading.plan.fetches {
            let from = (fetch.first - reading.first) as usize;
            engine.end_fetch(fetch.token, well, &mut |index, page| {
                copy_out(vm, reading.targets[from + index], page);
            });
        }
        reading.plan
    }

    /// Writes a block, in one go.
    pub(crate) fn write(&mut self, engine: &mut Engine, block: u64, seed: u64) {
        engine.begin_write(self.image, &(block..block + 1));
        self.seeds.insert(block, seed);
        engine.end_write(self.image, &(block..block + 1));
    }

    pub(crate) fn set(&mut self, block: u64, seed: u64) {
        self.seeds.insert(block, seed);
    }
}

/// Fills the memory of a fetch, each block with its number.
pub(crate) fn land(fetch: &FetchRun) {
    for block in 0..fetch.blocks as usize {
        let number = fetch.first + 1 + block as u64;
        // SAFETY: the fetch has this memory to itself.
        unsafe { fetch.landing.add(block * PAGE_SIZE).cast().write(number) };
    }
}

/// Copies a block into a guest, whose log hears of it.
fn copy_out(vm: &Vm, target: Option<u32>, content: &Page) {
    let Some(page) = target else { return };
    let address = vm.guest.ram.range(page, 1).page(0).cast_mut();
    // SAFETY: the page is guest RAM, written by this thread alone.
    unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), address, PAGE_SIZE) };
    vm.told.0.lock().insert(page);
}
