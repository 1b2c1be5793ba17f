//! Whose a frame is: numbers of frames that are kept from step to step, and memory that the kernel still reads.

mod common;

use std::time::{Duration, Instant};

use common::disks::{Disk, Reading};
use common::followed::{Vm, following};
use common::pipes::Spliced;
use common::{audit, engine};
use samepage_sharing::blocks::{CacheSize, Keep};
use samepage_sharing::engine::{Engine, Settings};

const PAGES: u32 = 2000;

fn settings() -> Settings {
    let block_cache = CacheSize::Bytes(1000 * 4096);
    Settings { block_cache, few_holes: 64, compaction_windows: 1, ..following() }
}

fn alike(page: u32) -> u64 {
    1 + u64::from(page)
}

fn own(number: u64, page: u32) -> u64 {
    (number + 1) << 40 | u64::from(page)
}

/// Whether a page keeps its frame when most are left.
fn stays(page: u32) -> bool {
    page.is_multiple_of(16)
}

/// An engine whose store is being compacted, three VMs, and time.
struct UnderWay {
    engine: Engine,
    vms: Vec<Vm>,
    now: Instant,
}

impl UnderWay {
    /// Two VMs share all of their pages and leave most, and compaction has begun.
    fn begin() -> Self {
        let mut engine = engine(&settings());
        let vms: Vec<_> = (0..3).map(|_| Vm::start(&mut engine, PAGES)).collect();
        vms[..2].iter().for_each(|vm| (0..PAGES).for_each(|page| vm.write(page, alike(page))));
        let mut this = Self { engine, vms, now: Instant::now() + Duration::from_secs(60) };
        this.step_until("all is shared", |engine| engine.statistics().frames == u64::from(PAGES));
        for (number, vm) in (0..).zip(&this.vms[..2]) {
            (0..PAGES).filter(|&page| !stays(page)).for_each(|page| vm.write(page, own(number, page)));
        }
        this.step_until("frames are under way", |engine| !engine.frames_under_way().is_empty());
        this
    }

    fn step_until(&mut self, what: &str, reached: impl Fn(&Engine) -> bool) {
        for _ in 0..100_000 {
            if reached(&self.engine) {
                return;
            }
            self.now += Duration::from_millis(25);
            self.engine.step(self.now);
        }
        panic!("it never comes to it that {what}");
    }

    /// Pages of the first VM change over, and then all of them are written, and some of the second VM's: frames
    /// and their copies are left while they are under way.
    fn leave_what_is_under_way(&mut self) {
        (0..60).for_each(|_| assert!(self.engine.compact_step(self.now)));
        for page in (0..PAGES).filter(|&page| stays(page)) {
            self.vms[0].write(page, own(8, page));
            if page.is_multiple_of(32) {
                self.vms[1].write(page, own(9, page));
            }
        }
        for _ in 0..40 {
            self.now += Duration::from_millis(120);
            self.engine.step(self.now);
        }
        assert!(!self.engine.frames_under_way().is_empty(), "compaction ended too early");
    }

    /// The third VM reads blocks from a disk, one by one: each read takes a single frame, the first that is free,
    /// which is in use until the read ends.
    fn read(&mut self, disk: &mut Disk, first: u64, page: u32, count: u32) -> Vec<Reading> {
        let each = (first..).zip(page..page + count);
        each.map(|(block, page)| disk.begin(&mut self.engine, &self.vms[2], block, vec![Some(page)]))
            .collect()
    }

    fn end(&mut self, disk: &mut Disk, readings: Vec<Reading>) {
        for reading in readings {
            disk.end(&mut self.engine, &self.vms[2], reading, true);
        }
    }

    fn end_compaction(&mut self) {
        self.step_until("compaction ends", |engine| engine.frames_under_way().is_empty());
    }

    fn check(&mut self) {
        for (number, vm) in (0..).zip(&self.vms[..2]) {
            for page in 0..PAGES {
                let content = match page {
                    _ if !stays(page) => own(number, page),
                    _ if number == 0 => own(8, page),
                    _ if page.is_multiple_of(32) => own(9, page),
                    _ => alike(page),
                };
                vm.guest.check(page, content);
            }
        }
        audit(&mut self.engine);
    }
}

#[test]
fn compaction_gives_up_no_frame_that_a_disk_read_is_filling() {
    let mut state = UnderWay::begin();
    let mut disk = Disk::new(1, Keep::Exclusive);
    let before = state.read(&mut disk, 0, 100, 64);
    state.leave_what_is_under_way();
    let after = state.read(&mut disk, 100, 300, 200);
    state.end_compaction();
    for (reading, first, page, count) in [(before, 0, 100, 64), (after, 100, 300, 200)] {
        state.end(&mut disk, reading);
        (0..count)
            .for_each(|index| state.vms[2].guest.check(page + index, disk.seed(first + u64::from(index))));
    }
    // What was read is what others read.
    let reads = disk.reads;
    disk.read(&mut state.engine, &state.vms[2], 100, 700, 200);
    assert_eq!(disk.reads, reads);
    (0..200).for_each(|index| state.vms[2].guest.check(700 + index, disk.seed(100 + u64::from(index))));
    state.check();
}

#[test]
fn no_other_vms_memory_is_served_as_a_disk_block() {
    let mut state = UnderWay::begin();
    let mut disk = Disk::new(1, Keep::Exclusive);
    state.leave_what_is_under_way();
    let reading = state.read(&mut disk, 100, 300, 200);
    state.end_compaction();
    // The first two VMs come to hold the same secrets, which are merged.
    let secret = |page: u32| 0x5ec2e7 << 20 | u64::from(page);
    let hidden = || (1..PAGES).filter(|&page| !stays(page)).take(300);
    let merges = state.engine.statistics().merges;
    for vm in &state.vms[..2] {
        hidden().for_each(|page| vm.write(page, secret(page)));
    }
    state.step_until("the secrets are merged", |engine| engine.statistics().merges >= merges + 600);
    state.end(&mut disk, reading);
    disk.read(&mut state.engine, &state.vms[2], 100, 700, 200);
    for page in [300, 700] {
        (0..200).for_each(|index| state.vms[2].guest.check(page + index, disk.seed(100 + u64::from(index))));
    }
    for vm in &state.vms[..2] {
        hidden().for_each(|page| vm.guest.check(page, secret(page)));
    }
    audit(&mut state.engine);
}

#[test]
fn a_frame_that_a_disk_is_filling_is_matched_with_no_page() {
    let mut engine = engine(&settings());
    let vms: Vec<_> = (0..3).map(|_| Vm::start(&mut engine, PAGES)).collect();
    let mut disk = Disk::new(1, Keep::Exclusive);
    let mut now = Instant::now() + Duration::from_secs(60);
    // A read lands behind a block that guests hold: its frames are zeros until the disk has answered.
    disk.read(&mut engine, &vms[0], 0, 0, 2);
    let targets: Vec<_> = (2..64).map(Some).collect();
    let number = engine.vm_number(vms[0].slot);
    let read = samepage_sharing::blocks::BlockRead {
        keep: disk.keep,
        image: disk.image,
        first: 2,
        targets: &targets,
    };
    let plan = engine.begin_read(number, &read, &mut |_, _| unreachable!("nobody holds them"));
    // Another VM holds the block, and zeros behind it.
    for page in 0..2 {
        vms[1].write(page, disk.seed(page.into()));
    }
    (2..64).for_each(|page| vms[1].write(page, 0));
    for _ in 0..200 {
        now += Duration::from_millis(25);
        engine.step(now);
    }
    assert_eq!(engine.statistics().pages_sharing, 2, "the block was found, with lookahead behind it");
    for fetch in &plan.fetches {
        common::disks::land(fetch);
        assert!(engine.end_fetch(fetch.token, true, &mut |_, _| {}));
    }
    (2..64).for_each(|page| vms[1].guest.check(page, 0));
    audit(&mut engine);
}

#[test]
fn a_page_that_the_kernel_still_writes_to_a_disk_is_filled_with_nothing_else() {
    let mut engine = engine(&settings());
    let vms: Vec<_> = (0..2).map(|_| Vm::start(&mut engine, PAGES)).collect();
    let [mut mine, mut theirs] = [Disk::new(1, Keep::Exclusive), Disk::new(2, Keep::Exclusive)];
    // The guest reads two blocks; its pages show frames.
    mine.read(&mut engine, &vms[0], 0, 0, 2);
    let content = mine.seed(0);
    vms[0].guest.check(0, content);
    // It writes one of the pages to a disk: the kernel holds the page (as O_DIRECT does) until the device has
    // read it.
    let spliced = Spliced::new(&vms[0].guest, 0);
    // Meanwhile it overwrites the blocks on its disk, and reads others over the pages.
    mine.write(&mut engine, 0, 77);
    mine.write(&mut engine, 1, 78);
    mine.read(&mut engine, &vms[0], 10, 0, 2);
    // Another VM reads from its disk, over and over.
    for round in 0..8 {
        theirs.read(&mut engine, &vms[1], 500 + 20 * round, 100, 1 + round as u32 % 2);
    }
    spliced.check(content);
    audit(&mut engine);
}
