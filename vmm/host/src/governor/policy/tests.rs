//! The policy against a model of a host: VMs that grow at full speed until they are held, and a little longer.

use super::*;

const KIB: u64 = 1 << 10;
const GIB: u64 = 1 << 30;
/// How long a vCPU runs on after it was told to stop.
const LAG: Duration = Duration::from_micros(500);

/// What a modelled guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Writes to its private pages.
    Rest,
    /// Makes all of its memory private, and ends then.
    Storm,
    /// Makes all of its memory private, again and again: what it wrote becomes alike and is merged at once when it is held.
    Waves,
    /// Makes all of its memory private, and goes on.
    Forever,
}

#[derive(Clone, Debug)]
struct Model {
    memory: u64,
    private: u64,
    faults: u64,
    work: Work,
    weight: u32,
    held: bool,
    /// Until when a held VM runs on.
    lag: Duration,
    /// Bytes written.
    written: u64,
    ended: bool,
}

struct World {
    now: Duration,
    limit: u64,
    /// Memory that others take.
    others: u64,
    rate: u64,
    processors: usize,
    vms: BTreeMap<MachineNumber, Model>,
    next: usize,
    /// How many VMs can be measured; the others cannot.
    measurable: MachineNumber,
    lowest: u64,
}

impl World {
    fn new(limit: u64, processors: usize) -> Self {
        let rate = processors as u64 * GIB;
        let vms = BTreeMap::new();
        Self {
            now: Duration::from_secs(1),
            limit,
            others: 0,
            rate,
            processors,
            vms,
            next: 0,
            measurable: MachineNumber::MAX,
            lowest: u64::MAX,
        }
    }

    fn add(&mut self, memory: u64, private: u64, work: Work) -> MachineNumber {
        let number = self.vms.len() as MachineNumber;
        let model = Model {
            memory,
            private,
            faults: private / (4 * KIB),
            work,
            weight: 100,
            held: false,
            lag: Duration::ZERO,
            written: 0,
            ended: false,
        };
        self.vms.insert(number, model);
        number
    }

    fn used(&self) -> u64 {
        self.others + self.vms.values().filter(|vm| !vm.ended).map(|vm| vm.private).sum::<u64>()
    }

    fn guests(&self) -> Vec<Guest> {
        let alive = self.vms.iter().filter(|(_, vm)| !vm.ended);
        alive
            .map(|(number, vm)| Guest {
                number: *number,
                memory: vm.memory,
                weight: vm.weight,
                vcpus: 1,
                page: 4 * KIB,
                runs: true,
            })
            .collect()
    }

    /// Lets time pass: as many VMs run as there are processors, in turns of half a millisecond.
    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.now += LAG;
            let runs = |vm: &Model, now| !vm.ended && (!vm.held || vm.lag > now);
            let now = self.now;
            let able: Vec<_> =
                self.vms.iter().filter(|(_, vm)| runs(vm, now)).map(|(number, _)| *number).collect();
            for turn in 0..self.processors.min(able.len()) {
                let number = able[(self.next + turn) % able.len()];
                self.step(number, growth(self.rate / self.processors as u64, LAG));
            }
            self.next = self.next.wrapping_add(self.processors);
            for vm in self.vms.values_mut().filter(|vm| vm.held && vm.work == Work::Waves) {
                vm.private = vm.private.min(vm.memory / 10);
            }
            let room = self.limit.saturating_sub(self.used());
            assert!(self.used() <= self.limit, "out of memory at {:?}", self.now);
            self.lowest = self.lowest.min(room);
        }
    }

    fn step(&mut self, number: MachineNumber, bytes: u64) {
        let vm = self.vms.get_mut(&number).unwrap();
        vm.written += bytes;
        if vm.work == Work::Rest {
            return;
        }
        let grown = bytes.min(vm.memory - vm.private);
        vm.private += grown;
        vm.faults += grown.div_ceil(4 * KIB);
        if grown == 0 && vm.work == Work::Storm {
            vm.ended = true;
        }
    }

    fn run(&mut self, policy: &mut Policy, time: Duration, mut until: impl FnMut(&Self) -> bool) -> bool {
        let end = self.now + time;
        while self.now < end {
            if until(self) {
                return true;
            }
            let guests = self.guests();
            let wait = policy.tick(self, &guests);
            self.pass(wait);
        }
        false
    }

    fn all_ended(&self) -> bool {
        self.vms.values().filter(|vm| vm.work == Work::Storm).all(|vm| vm.ended)
    }
}

impl Host for World {
    fn now(&self) -> Duration {
        self.now
    }

    fn room(&mut self) -> Room {
        Room { bytes: self.limit - self.used(), of: self.limit }
    }

    fn private(&mut self, vm: MachineNumber) -> Option<u64> {
        (vm < self.measurable).then(|| self.vms[&vm].private)
    }

    fn faults(&mut self, vm: MachineNumber) -> Option<u64> {
        Some(self.vms[&vm].faults)
    }

    fn withhold(&mut self, vm: MachineNumber) {
        let lag = self.now + LAG;
        let vm = self.vms.get_mut(&vm).unwrap();
        (vm.held, vm.lag) = (true, lag);
    }

    fn release(&mut self, vm: MachineNumber) {
        self.vms.get_mut(&vm).unwrap().held = false;
    }
}

fn describe(world: &World, policy: &Policy) -> String {
    let phases: Vec<_> = policy.vms.values().map(|vm| (vm.phase, vm.claim() / KIB, vm.grows)).collect();
    let room = (world.limit - world.used()) / KIB;
    format!("{:?}, room {room} KiB, reserve {} KiB, {phases:?}", policy.state, policy.reserve() / KIB)
}

fn policy(world: &World) -> Policy {
    Policy::new(world.rate, world.processors)
}

/// 64 VMs share nine tenths of 16 MiB; the limit is half more than what is then resident.
fn storm(processors: usize) -> World {
    let mut world = World::new(u64::MAX, processors);
    for _ in 0..64 {
        world.add(16 * MIB, 16 * MIB / 10, Work::Storm);
    }
    world.others = 100 * MIB;
    world.limit = world.used() * 3 / 2;
    world
}

#[test]
fn a_storm_ends_without_running_out() {
    for processors in [1, 2, 4] {
        let mut world = storm(processors);
        let mut policy = policy(&world);
        assert!(
            world.run(&mut policy, Duration::from_secs(600), World::all_ended),
            "{}",
            describe(&world, &policy)
        );
        assert!(policy.changes() >= 1);
        let longest = world.now;
        println!("{processors} processors: {longest:?}, lowest room {} MiB", world.lowest / MIB);
    }
}

#[test]
fn vms_that_do_not_grow_run_on() {
    let mut world = storm(2);
    let resting: Vec<_> = (0..8).map(|_| world.add(GIB, 2 * MIB, Work::Rest)).collect();
    world.limit += 16 * MIB;
    let start = world.now;
    let mut policy = policy(&world);
    assert!(world.run(&mut policy, Duration::from_secs(600), World::all_ended));
    for number in resting {
        let held = policy.held(number, world.now);
        assert!(
            held.longest < Duration::from_millis(500) && held.total < (world.now - start) / 2,
            "{held:?}"
        );
    }
}

#[test]
fn nothing_is_held_where_all_claims_fit() {
    let mut world = World::new(600 * MIB, 2);
    world.add(560 * MIB, MIB, Work::Forever);
    let mut policy = policy(&world);
    world.run(&mut policy, Duration::from_secs(20), |_| false);
    assert_eq!((policy.state(), policy.changes()), (MemoryState::Enough, 0));
    assert_eq!(world.vms[&0].private, 560 * MIB);
}

#[test]
fn waves_take_turns_by_weight() {
    let mut world = World::new(u64::MAX, 2);
    for number in 0..12 {
        let vm = world.add(64 * MIB, 6 * MIB, Work::Waves);
        world.vms.get_mut(&vm).unwrap().weight = if number < 6 { 100 } else { 300 };
    }
    world.limit = world.used() + 180 * MIB;
    let mut policy = policy(&world);
    world.run(&mut policy, Duration::from_secs(120), |_| false);
    let served = |light: bool| -> Duration {
        let total = |number: MachineNumber| world.now - policy.held(number, world.now).total;
        (0..12).filter(|number| (*number < 6) == light).map(total).sum()
    };
    let ratio = served(false).as_secs_f64() / served(true).as_secs_f64();
    assert!((1.5..4.5).contains(&ratio), "ran {:?} and {:?}", served(true), served(false));
    for number in 0..12 {
        let held = policy.held(number, world.now);
        assert!(held.longest < Duration::from_secs(40), "{number}: {held:?}");
    }
    assert!(policy.changes() <= 2 * 120);
}

#[test]
fn writers_without_end_run_as_far_as_memory_goes_and_nobody_is_killed() {
    let mut world = storm(2);
    world.vms.values_mut().for_each(|vm| vm.work = Work::Forever);
    let mut policy = policy(&world);
    world.run(&mut policy, Duration::from_secs(60), |_| false);
    assert!(world.vms.values().any(|vm| vm.private == vm.memory));
    // Who gives memory back lets others go on.
    let whole = |world: &World| world.vms.values().filter(|vm| vm.private == vm.memory).count();
    let before = whole(&world);
    world.vms.values_mut().find(|vm| vm.private == vm.memory).unwrap().ended = true;
    assert!(world.run(&mut policy, Duration::from_secs(60), |world| whole(world) > before));
}

#[test]
fn a_limit_lowered_under_running_vms_holds_them_until_it_rises() {
    let mut world = storm(2);
    let mut policy = policy(&world);
    world.run(&mut policy, Duration::from_secs(1), |world| world.vms.values().any(|vm| vm.ended));
    let before = world.limit;
    world.limit = world.used() + 3 * MIB;
    world.run(&mut policy, Duration::from_secs(5), |_| false);
    assert_eq!(policy.state(), MemoryState::Exhausted);
    world.limit = before;
    assert!(world.run(&mut policy, Duration::from_secs(600), World::all_ended));
}

#[test]
fn a_vm_that_cannot_be_measured_counts_in_full() {
    let mut world = storm(2);
    world.measurable = 60;
    world.limit += 16 * MIB;
    let mut policy = policy(&world);
    assert!(
        world.run(&mut policy, Duration::from_secs(600), World::all_ended),
        "{}",
        describe(&world, &policy)
    );
}

#[test]
fn calm_comes_back_and_does_not_swing() {
    let mut world = World::new(4 * GIB, 2);
    for _ in 0..4 {
        world.add(GIB, 64 * MIB, Work::Rest);
    }
    let mut policy = policy(&world);
    let start = world.now;
    for _ in 0..1000 {
        world.others = 3 * GIB + 512 * MIB;
        let guests = world.guests();
        let wait = policy.tick(&mut world, &guests);
        world.pass(wait.min(Duration::from_millis(20)));
        world.others = 0;
        let guests = world.guests();
        let wait = policy.tick(&mut world, &guests);
        world.pass(wait.min(Duration::from_millis(20)));
    }
    assert!(policy.changes() > 2);
    assert!(policy.changes() as f64 <= 2.0 * (world.now - start).as_secs_f64() + 2.0);
    world.run(&mut policy, Duration::from_secs(3), |_| false);
    assert_eq!(policy.state(), MemoryState::Enough);
    assert!(world.vms.values().all(|vm| !vm.held));
}

#[test]
fn random_hosts_never_run_out() {
    for seed in 1..150_u64 {
        let mut state = seed;
        let mut random = |below: u64| {
            // Knuth's generator of MMIX; the upper bits are good.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut world = World::new(u64::MAX, 1 + random(4) as usize);
        for _ in 0..2 + random(30) {
            let memory = (8 + random(120)) * MIB;
            let work = [Work::Rest, Work::Storm, Work::Storm, Work::Waves][random(4) as usize];
            let vm = world.add(memory, memory / (2 + random(20)), work);
            world.vms.get_mut(&vm).unwrap().weight = 1 + random(1000) as u32;
        }
        let largest = world.vms.values().map(|vm| vm.memory).max().unwrap();
        world.limit = world.used() + largest * 2 + (30 + random(100)) * MIB + world.rate / 25;
        let mut policy = policy(&world);
        assert!(
            world.run(&mut policy, Duration::from_secs(900), World::all_ended),
            "{seed}: {}",
            describe(&world, &policy)
        );
    }
}
