//! A model of guests, disks and the kernel's own uses of pages, beside an engine that rearranges all of it.
//! Whatever happens, in any order: each page has the content that its guest, or a disk, has put there.
#![allow(dead_code, reason = "each test binary uses its part")]
#![expect(unsafe_code, reason = "plays guests, disks and the kernel: reads and writes their memory")]

mod balloon;
mod disks;
mod tour;
pub(crate) mod weather;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use samepage_sharing::blocks::Keep;
use samepage_sharing::changes::PageSet;
use samepage_sharing::engine::{Engine, Mode, Settings, Step};
use samepage_sharing::hints::Hint;

use disks::{Disk, Reading};
use weather::{Moody, Plan, Weather};

use super::agent::{ANON, Agent, FREE};
use super::distant::Distant;
use super::followed::{Told, Vm};
use super::pipes::{Pinned, Spliced};
use super::{Guest, Numbers, WORDS, faulty_engine, losses, word};

/// What a page of a guest is known to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holds {
    seed: u64,
    /// Its guest has said that the page is free: it may be zeros instead.
    or_zero: bool,
}

/// A VM, and what is known of it.
pub(crate) struct Player {
    id: u64,
    pub(crate) vm: Vm,
    pages: Vec<Holds>,
    agent: Option<Agent>,
    free: Vec<bool>,
    /// Writes of which its log does not tell yet.
    late: Vec<u32>,
    losses: Arc<AtomicU32>,
    /// It has ended, and the engine could not let it go yet.
    ended: bool,
}

impl Player {
    fn lost(&self) -> bool {
        self.ended || self.losses.load(Ordering::Relaxed) > 0
    }

    fn count(&self) -> u32 {
        self.pages.len() as u32
    }
}

/// An engine whose calls fail by a plan.
pub(crate) fn engine_of(settings: &Settings, plan: &Plan) -> Engine {
    let plan = Arc::clone(plan);
    faulty_engine(settings, move |call| (plan.lock())(call))
}

/// All of it.
pub(crate) struct World {
    pub(crate) engine: Engine,
    pub(crate) numbers: Numbers,
    pub(crate) players: Vec<Player>,
    disks: Vec<Disk>,
    readings: Vec<Reading>,
    pinned: Vec<Pinned>,
    pub(crate) now: Instant,
    weather: Arc<Weather>,
    plan: Plan,
    /// Pages of each VM.
    size: u32,
    ids: u64,
    own: u64,
    /// What happened, for who reads about a failure.
    pub(crate) told: Vec<String>,
    /// VMs that lost memory.
    pub(crate) lost: u64,
    given_back: u64,
}

impl World {
    pub(crate) fn new(settings: &Settings, weather: Arc<Weather>, plan: Plan, seed: u64, size: u32) -> Self {
        let engine = engine_of(settings, &plan);
        let keeps = [Keep::Exclusive, Keep::Exclusive, Keep::Scrub, Keep::Inclusive];
        Self {
            engine,
            numbers: Numbers(seed | 1),
            players: Vec::new(),
            disks: (1..).zip(keeps).map(|(number, keep)| Disk::new(number, keep)).collect(),
            readings: Vec::new(),
            pinned: Vec::new(),
            now: Instant::now() + Duration::from_secs(60),
            weather,
            plan,
            size,
            ids: 0,
            own: 1 << 44,
            told: Vec::new(),
            lost: 0,
            given_back: 0,
        }
    }

    pub(crate) fn below(&mut self, limit: u32) -> u32 {
        self.numbers.below(u64::from(limit.max(1))) as u32
    }

    fn one_in(&mut self, many: u32) -> bool {
        self.below(many) == 0
    }

    fn tell(&mut self, what: String) {
        self.told.push(what);
    }

    /// A content that is nowhere else.
    fn own(&mut self) -> u64 {
        self.own += 1;
        self.own
    }

    /// A content that is elsewhere as well, in runs.
    pub(crate) fn alike(page: u32) -> u64 {
        1 + u64::from(page)
    }

    pub(crate) fn add_vm(&mut self, followed: bool, with_agent: bool) {
        let guest = Guest::new(self.size);
        let mut all = PageSet::new(self.size);
        all.insert_range(0..self.size);
        let told = Told(Arc::new(Mutex::new(all)));
        let (losses, handler) = losses();
        let rests = self.one_in(2);
        let log = followed.then(|| Box::new(Moody::new(&told, rests, self.size, &self.plan)) as _);
        let is_distant = self.one_in(4);
        let memory = self.engine.local(guest.ram.clone()).map(|memory| Distant::place(memory, is_distant));
        let slot = memory.and_then(|memory| self.engine.add_memory(memory, false, log, handler));
        let Ok(slot) = slot else {
            return self.tell("a VM was refused".into());
        };
        let vm = Vm { guest, told, slot };
        let agent = with_agent.then(|| Agent::start(&mut self.engine, slot, self.size));
        self.ids += 1;
        let pages = vec![Holds { seed: 0, or_zero: false }; self.size as usize];
        let free = vec![false; self.size as usize];
        let player = Player { id: self.ids, vm, pages, agent, free, late: Vec::new(), losses, ended: false };
        self.players.push(player);
        self.tell(format!(
            "VM {} starts in slot {slot}, {followed} followed, {is_distant} distant",
            self.ids
        ));
    }

    pub(crate) fn remove_vm(&mut self, index: usize) {
        let slot = self.players[index].vm.slot;
        let given_back = self.engine.claimed(slot).ok().flatten().map_or(0, |claimed| claimed.given_back);
        let lost = self.players[index].losses.load(Ordering::Relaxed) > 0;
        self.players[index].ended = true;
        let removed = self.engine.remove(slot).is_ok();
        self.tell(format!("VM {} ends: {removed}", self.players[index].id));
        if removed {
            self.players.remove(index);
            self.given_back += given_back;
            self.lost += u64::from(lost);
        }
    }

    /// Pages that were given back to the host, by all VMs that there were.
    pub(crate) fn given_back(&self) -> u64 {
        let of = |player: &Player| self.engine.claimed(player.vm.slot).ok().flatten();
        self.given_back + self.players.iter().filter_map(of).map(|claimed| claimed.given_back).sum::<u64>()
    }

    /// A VM that runs.
    fn any_vm(&mut self) -> Option<usize> {
        let count = self.players.len() as u32;
        let index = self.below(count) as usize;
        self.players.get(index).filter(|player| !player.lost()).map(|_| index)
    }

    /// A guest writes to a page of its own.
    pub(crate) fn write(&mut self, index: usize, page: u32, seed: u64, late: bool) {
        let player = &mut self.players[index];
        player.vm.guest.write(page, seed);
        if late {
            player.late.push(page);
        } else {
            player.vm.told.0.lock().insert(page);
        }
        player.pages[page as usize] = Holds { seed, or_zero: false };
        player.free[page as usize] = false;
        let id = player.id;
        // The kernel reads on from the page itself, where that is the guest's own.
        self.pinned.retain(|pinned| (pinned.vm, pinned.page) != (id, page));
    }

    pub(crate) fn run(&mut self, longest: u32) -> (u32, u32) {
        let count = 1 + self.below(longest.min(self.size - 1));
        (self.below(self.size - count), count)
    }

    fn write_some(&mut self) {
        let Some(index) = self.any_vm() else { return };
        let longest = [1, 4, 64, self.size][self.below(4) as usize];
        let (first, count) = self.run(longest);
        let (kind, late) = (self.below(6), self.one_in(8));
        let shift = if self.one_in(3) { self.below(self.size) } else { first };
        let disk = self.below(self.disks.len() as u32) as usize;
        self.tell(format!("VM {} writes {count} pages at {first}, kind {kind}", self.players[index].id));
        for offset in 0..count {
            let seed = match kind {
                0 | 1 => Self::alike(shift + offset),
                2 => 0,
                3 => self.disks[disk].seed(u64::from(shift + offset)),
                _ => self.own(),
            };
            self.write(index, first + offset, seed, late);
        }
    }

    /// All guests come to hold the same.
    fn become_alike(&mut self) {
        self.tell("all VMs become alike".into());
        for index in 0..self.players.len() {
            if !self.players[index].lost() {
                (0..self.size).for_each(|page| self.write(index, page, Self::alike(page), false));
            }
        }
    }

    /// Guests leave most of what they share.
    fn leave_most(&mut self) {
        let stay = 4 + self.below(30);
        self.tell(format!("all VMs leave all but every {stay}th page"));
        for index in 0..self.players.len() {
            for page in (0..self.size).filter(|page| !page.is_multiple_of(stay)) {
                if !self.players[index].lost() {
                    let seed = self.own();
                    self.write(index, page, seed, false);
                }
            }
        }
        // Now the store has holes.
        self.now += Duration::from_secs(11);
        for _ in 0..40 {
            if !self.engine.frames_under_way().is_empty() {
                break;
            }
            self.steps(1, Duration::from_millis(30));
        }
    }

    fn tell_late(&mut self) {
        for player in &mut self.players {
            let mut told = player.vm.told.0.lock();
            player.late.drain(..).for_each(|page| told.insert(page));
        }
    }

    pub(crate) fn steps(&mut self, count: u32, jump: Duration) {
        self.tell(format!("{count} steps, each {jump:?} later"));
        for _ in 0..count {
            self.now += jump;
            self.engine.step(self.now);
        }
    }

    /// Does all work there is, and lets an interval pass, so many times.
    pub(crate) fn intervals(&mut self, count: u32) {
        self.tell(format!("{count} intervals"));
        for _ in 0..count {
            for _ in 0..2000 {
                if let Step::RestUntil(end) = self.engine.step(self.now) {
                    self.now = self.now.max(end.min(self.now + Duration::from_secs(20)));
                    break;
                }
            }
        }
    }

    /// A guest has a page written to a disk: the kernel holds on to the page until the disk has read it.
    fn pin(&mut self) {
        let Some(index) = self.any_vm().filter(|_| self.pinned.len() < 6) else { return };
        let (first, count) = self.run(3);
        self.pin_run(index, first, count);
    }

    fn pin_run(&mut self, index: usize, first: u32, count: u32) {
        for page in first..first + count {
            let player = &self.players[index];
            let Holds { seed, or_zero } = player.pages[page as usize];
            if or_zero {
                continue;
            }
            let spliced = Spliced::new(&player.vm.guest, page);
            self.pinned.push(Pinned { vm: player.id, page, seed, spliced });
        }
        let id = self.players[index].id;
        self.tell(format!("VM {id} writes {count} pages at {first} to a disk"));
    }

    /// A guest reads over pages that it is still writing to a disk, and others read.
    fn read_over(&mut self) {
        let Some(index) = self.any_vm().filter(|_| self.pinned.len() < 12) else { return };
        let disk = self.below(2) as usize;
        let (page, count) = self.run(16);
        let first = u64::from(self.below(self.size));
        let targets = || (page..page + count).map(Some).collect();
        let mut readings = self.readings.len();
        self.read(index, disk, first, targets());
        self.finish_from(readings);
        if self.players[index].lost() {
            return;
        }
        self.pin_run(index, page, count.min(3));
        if self.one_in(2) {
            self.write_blocks(disk, (first, u64::from(count)));
        }
        if self.one_in(3) {
            self.steps(2, Duration::from_millis(30));
        }
        for _ in 0..1 + self.below(3) {
            let (other, from) = (self.below(2) as usize, u64::from(self.below(self.size)));
            let Some(reader) = self.any_vm() else { return };
            readings = self.readings.len();
            if reader == index && !self.one_in(3) {
                self.read(index, other, from, targets());
            } else {
                let (page, count) = self.run(16);
                self.read(reader, other, from, (page..page + count).map(Some).collect());
            }
            if !self.one_in(3) {
                self.finish_from(readings);
            }
        }
    }

    /// Readings from this one on end.
    fn finish_from(&mut self, number: usize) {
        while self.readings.len() > number {
            self.finish(number, true);
        }
    }

    fn unpin(&mut self) {
        let count = self.pinned.len() as u32;
        let number = self.below(count) as usize;
        if number < self.pinned.len() {
            let pinned = self.pinned.swap_remove(number);
            self.tell(format!("the disk reads page {} of VM {}", pinned.page, pinned.vm));
            pinned.spliced.check(pinned.seed);
        }
    }

    fn change_mode(&mut self) {
        let Some(index) = self.any_vm() else { return };
        let mode = [Mode::Full, Mode::Full, Mode::Zero, Mode::Off][self.below(4) as usize];
        self.tell(format!("VM {} has mode {mode:?}", self.players[index].id));
        self.engine.set_mode(self.players[index].vm.slot, mode);
    }

    fn hint(&mut self) {
        let Some(index) = self.any_vm() else { return };
        let (first, count) = self.run(32);
        let pages = first..first + count;
        let block = u64::from(self.below(self.size));
        let hint = Hint { pages, image: 1, block };
        if let Some(hints) = self.engine.hints(self.players[index].vm.slot) {
            self.told.push(format!("VM {} hints {hint:?}", self.players[index].id));
            hints.give(hint);
        }
    }

    /// A guest frees pages.
    fn free(&mut self) {
        let Some(index) = self.any_vm().filter(|&index| self.players[index].agent.is_some()) else { return };
        let longest = [8, 200, self.size][self.below(3) as usize];
        let (first, count) = self.run(longest);
        let reading = |page: u32| {
            let vm = self.players[index].id;
            self.readings.iter().any(|reading| reading.vm == vm && reading.targets.contains(&Some(page)))
        };
        let pages: Vec<_> = (first..first + count).filter(|&page| !reading(page)).collect();
        let player = &mut self.players[index];
        for page in pages {
            player.free[page as usize] = true;
            player.pages[page as usize].or_zero = true;
        }
        let id = player.id;
        // What is written to a disk from a free page is of no account.
        self.pinned.retain(|pinned| pinned.vm != id);
        self.tell(format!("VM {id} frees {count} pages at {first}"));
    }

    /// The agent in a guest tells what is free.
    fn agent_pass(&mut self) {
        if let Some(index) = self.any_vm() {
            self.agent_pass_of(index);
        }
    }

    fn agent_pass_of(&mut self, index: usize) {
        let player = &mut self.players[index];
        let Some(agent) = &mut player.agent else { return };
        let pages = 0..player.free.len() as u32;
        agent.say(pages.clone().filter(|&page| player.free[page as usize]), FREE);
        agent.say(pages.filter(|&page| !player.free[page as usize]), ANON);
        agent.pass();
        self.told.push(format!("the agent of VM {} ends a pass", player.id));
    }

    /// What it takes for free memory to go back to the host, with something else in between.
    fn free_and_tell(&mut self) {
        self.free();
        for _ in 0..self.players.len() {
            self.agent_pass();
        }
        self.intervals(2);
        self.write_some();
        for _ in 0..2 * self.players.len() {
            self.agent_pass();
        }
        let count = 1 + self.below(40);
        self.steps(count, Duration::from_millis(30));
    }

    fn vms_come_and_go(&mut self) {
        if self.players.len() > 1 && self.one_in(2) {
            let index = self.below(self.players.len() as u32) as usize;
            self.remove_vm(index);
        } else if self.players.len() < 4 {
            let (followed, with_agent) = (!self.one_in(5), self.one_in(2));
            self.add_vm(followed, with_agent);
        }
    }

    /// Lost VMs end.
    fn bury(&mut self) {
        while let Some(index) = self.players.iter().position(Player::lost) {
            let before = self.players.len();
            self.remove_vm(index);
            if self.players.len() == before {
                break;
            }
        }
    }

    /// What frames under way are to survive: guests leave them, disks and other guests take frames, and some
    /// of that lasts until long after.
    fn stir(&mut self) {
        match self.below(12) {
            0..4 => {
                let Some(index) = self.any_vm() else { return };
                let (first, count) = self.run(self.size);
                self.tell(format!("VM {} leaves {count} pages at {first}", self.players[index].id));
                for page in first..first + count {
                    let seed = self.own();
                    self.write(index, page, seed, false);
                }
            }
            4..8 => {
                let (count, jump) = (1 + self.below(3), [0, 150][self.below(2) as usize]);
                self.steps(count, Duration::from_millis(jump));
            }
            8..10 => self.begin_read(),
            10 => self.write_some(),
            _ => self.end_read(),
        }
    }

    /// Something happens.
    pub(crate) fn act(&mut self) {
        if !self.engine.frames_under_way().is_empty() && !self.one_in(4) {
            return self.stir();
        }
        match self.below(67) {
            0..10 => self.write_some(),
            10..12 => self.become_alike(),
            12..14 => self.leave_most(),
            14..24 => {
                let count = 1 + self.below(12);
                let jump = [0, 1, 30, 150, 11_000][self.below(5) as usize];
                self.steps(count, Duration::from_millis(jump));
            }
            24..30 => {
                let count = 1 + self.below(4);
                self.intervals(count);
            }
            30..38 => self.begin_read(),
            38..40 => self.land(),
            40..46 => self.end_read(),
            46..48 => self.write_disk(),
            48 => self.end_writes(),
            49 => self.change_mode(),
            50 => self.vms_come_and_go(),
            51 => self.hint(),
            52 => self.free(),
            53..55 => self.agent_pass(),
            55..57 => self.free_and_tell(),
            57 => self.pin(),
            58..60 => self.read_over(),
            60 => self.unpin(),
            61 => self.tell_late(),
            62 => self.bury(),
            63..66 => self.put_into_balloon(),
            _ => self.check_all(1 + WORDS / 16),
        }
    }

    fn write_all(&mut self, index: usize, pages: std::ops::Range<u32>, content: impl Fn(u32) -> u64) {
        for page in pages {
            if !self.players[index].lost() {
                self.write(index, page, content(page), false);
            }
        }
    }

    fn finish_all(&mut self) {
        self.finish_from(0);
    }

    /// Checks a page of a guest, every `stride`-th word of it.
    fn check(&mut self, index: usize, page: u32, stride: usize) {
        let player = &mut self.players[index];
        let Holds { mut seed, or_zero } = player.pages[page as usize];
        let address = player.vm.guest.ram.range(page, 1).page(0).cast::<u64>();
        if or_zero && player.vm.guest.is_zero(page) {
            seed = 0;
        }
        for index in (0..WORDS).step_by(stride) {
            // SAFETY: within the page, which is mapped.
            let found = unsafe { address.add(index).read_volatile() };
            if found != word(seed, index) {
                let id = player.id;
                panic!(
                    "page {page} of VM {id}, word {index}: found {found:#x}, {:#x} is of {seed:#x}",
                    word(seed, index)
                );
            }
        }
    }

    pub(crate) fn check_all(&mut self, stride: usize) {
        for index in 0..self.players.len() {
            if !self.players[index].lost() {
                (0..self.size).for_each(|page| self.check(index, page, stride));
            }
        }
    }

    pub(crate) fn audit(&mut self) {
        let report = self.engine.audit().unwrap();
        // Where pages could not be registered again the kernel keeps their mappings apart.
        let apart = |text: &&String| text.contains("mappings, the books say");
        let apart = report.descriptions.iter().filter(apart).count() as u64;
        let refused = self.engine.statistics().refusals > 0 || self.weather.ever.load(Ordering::Relaxed) > 0;
        assert!(report.problems <= if refused { apart } else { 0 }, "{report:#?}");
    }

    /// Ends everything, and looks for what is left.
    pub(crate) fn end(&mut self) {
        self.weather.refused.store(0, Ordering::Relaxed);
        self.weather.fatal.store(0, Ordering::Relaxed);
        self.check_all(1);
        self.audit();
        self.finish_all();
        self.end_writes();
        while !self.pinned.is_empty() {
            self.unpin();
        }
        self.intervals(3);
        self.check_all(1);
        self.audit();
        // What is refused once is tried again.
        for _ in 0..8 {
            (0..self.players.len()).rev().for_each(|index| self.remove_vm(index));
        }
        assert!(self.players.is_empty(), "a VM cannot be removed");
        for disk in &self.disks {
            self.engine.begin_write(disk.image, &(0..1 << 40));
            self.engine.end_write(disk.image, &(0..1 << 40));
        }
        // Compaction may have frames on their way still.
        self.intervals(20);
        self.audit();
        let statistics = self.engine.statistics();
        assert_eq!((statistics.frames, statistics.store_bytes), (0, 0), "something is left");
    }
}
