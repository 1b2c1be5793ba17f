//! Who may run while memory is short: the decisions, without the host.
//!
//! Each VM has a *claim*: what it may still make private without asking, which is its memory less its private pages.
//! While the room (memory that is to be had) is well above the largest claims, all VMs run. Below that line
//! the host is *short*:
//!
//! - All VMs run on until the room has come down to the largest claim that fits, and a reserve. Then all are held.
//! - Of the held ones, VMs run *on trial* with a deposit: as much as a VM can grow until that is seen. Faults of its
//!   vCPUs say that it may have grown, and its page map decides. VMs that do not grow run on like that.
//! - A VM that grew needs a *grant* of its whole claim: the room, less the reserve and all that is set aside for others,
//!   must cover it. So everyone with a grant can run to its end, whatever it writes. The others wait, held.
//!   Deposits never take what the next grant needs.
//! - Grants go by weight. A VM that has had its time rests, so that what it wrote may be merged, and others run.
//! - If nobody has a grant and no claim fits, the smallest claim may use a part of the reserve. If that is too little
//!   too, VMs get a part of the room, one after the other.
//!
//! Merging returns as much room as it adds to claims. A grant is therefore decided by the private pages first and
//! the room second. Growth in between makes the decision stricter, never laxer.

use std::collections::BTreeMap;
use std::time::Duration;

use samepage_api_types::events::MemoryState;
use samepage_sharing::blocks::available::Room;

use super::Held;
use super::seen::{Guest, Host};
use crate::ends::MachineNumber;

const MIB: u64 = 1 << 20;
/// The least memory that stays free, in bytes.
const LEAST_RESERVE: u64 = 16 * MIB;
/// How long VMs may grow at full speed from the moment of a look that is due until they stand still, at least. Where
/// looks come late because the host is busy, it is twice as long as they were late.
const REACTION: Duration = Duration::from_millis(10);
/// The longest time between two looks at the room: without and with shortage.
const CALM_INTERVAL: Duration = Duration::from_millis(500);
const SHORT_INTERVAL: Duration = Duration::from_millis(50);
const SHORTEST_INTERVAL: Duration = Duration::from_millis(1);
/// The shortest stay in a state before the host comes down to a better one.
const DWELL: Duration = Duration::from_secs(1);
/// How long a grant lasts at least.
const QUANTUM: Duration = Duration::from_secs(1);
/// How long a VM that has had its time is held at least, if others wait.
const REST: Duration = Duration::from_millis(250);
/// How long a VM on trial runs before another one that waits for a trial may take its place.
const TURN: Duration = Duration::from_millis(50);
/// How long a VM on trial can grow before it stands still: until the next look, and until its vCPUs have stopped.
const TRIAL_REACTION: Duration = Duration::from_millis(2);
/// How old the known claims may be while there is no shortage.
const CLAIM_AGE: Duration = Duration::from_secs(10);
/// How much faster memory is made private in huge pages.
const HUGE_FACTOR: u64 = 4;
/// By how much a VM may grow unasked, in bytes.
const ALLOWANCE: u64 = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Runs unasked.
    Free,
    /// Runs with a deposit.
    Trial { since: Duration },
    /// May grow by `limit` bytes from its base, which are set aside. Without a limit its whole claim is.
    Granted { since: Duration, limit: Option<u64> },
    /// Held, at least until `rests`.
    Waiting { since: Duration, rests: Duration },
}

/// What the policy knows of a VM.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    guest: Guest,
    phase: Phase,
    /// Private memory when it was measured last, and the faults until then.
    private: u64,
    faults: u64,
    measured: Option<Duration>,
    /// Private memory from which growth counts.
    base: u64,
    /// Grew without a grant since memory is short.
    grows: bool,
    /// Time with a grant, divided by the weight, in nanoseconds.
    served: u64,
    /// Time that it was held, without the present hold, and the longest time without a break.
    held: Duration,
    longest: Duration,
}

impl Vm {
    /// What it may make private without asking.
    fn claim(&self) -> u64 {
        self.guest.memory.saturating_sub(self.private)
    }

    fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Waiting { .. })
    }

    fn has_grant(&self) -> bool {
        matches!(self.phase, Phase::Granted { .. })
    }

    fn is_on_trial(&self) -> bool {
        matches!(self.phase, Phase::Trial { .. })
    }
}

/// The policy's state.
#[derive(Debug)]
pub(crate) struct Policy {
    /// How fast all VMs together can make memory private, in bytes per second.
    rate: u64,
    /// The same without huge pages.
    small_rate: u64,
    /// How many VMs can run at the same time.
    processors: usize,
    vms: BTreeMap<MachineNumber, Vm>,
    state: MemoryState,
    since: Duration,
    room: Room,
    changes: u64,
    looked: Duration,
    /// When the next look is due, and how late looks were of late.
    due: Duration,
    late: Duration,
}

impl Policy {
    /// `rate` is how fast small pages can be made private by all VMs together, in bytes per second.
    pub(crate) fn new(rate: u64, processors: usize) -> Self {
        Self {
            rate: rate.max(1),
            small_rate: rate.max(1),
            processors: processors.max(1),
            vms: BTreeMap::new(),
            state: MemoryState::Enough,
            since: Duration::ZERO,
            room: Room { bytes: u64::MAX, of: u64::MAX },
            changes: 0,
            looked: Duration::ZERO,
            due: Duration::MAX,
            late: Duration::ZERO,
        }
    }

    pub(crate) fn state(&self) -> MemoryState {
        self.state
    }

    /// Returns how often the state has changed.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// Returns the room that was measured last.
    pub(crate) fn room(&self) -> Room {
        self.room
    }

    /// Returns how many bytes of the room nobody is to have.
    pub(crate) fn reserve(&self) -> u64 {
        growth(self.rate, self.reaction()).min(self.room.of / 8).max(LEAST_RESERVE)
    }

    fn reaction(&self) -> Duration {
        REACTION.max(self.late * 2)
    }

    /// Returns the sum of all known claims, in bytes.
    pub(crate) fn claims(&self) -> u64 {
        self.vms.values().map(Vm::claim).sum()
    }

    /// Returns for how long a VM has been held.
    pub(crate) fn held(&self, number: MachineNumber, now: Duration) -> Held {
        let Some(vm) = self.vms.get(&number) else { return Held::default() };
        let Phase::Waiting { since, .. } = vm.phase else {
            return Held { now: None, total: vm.held, longest: vm.longest };
        };
        let present = now.saturating_sub(since);
        Held { now: Some(present), total: vm.held + present, longest: vm.longest.max(present) }
    }

    /// Looks at the room and decides who runs. Returns after how long it is to be called again.
    pub(crate) fn tick(&mut self, host: &mut impl Host, guests: &[Guest]) -> Duration {
        let now = host.now();
        // A busy moment is forgotten slowly.
        self.late = now.saturating_sub(self.due).max(self.late - self.late / 64);
        let wait = self.look(host, guests, now);
        self.due = host.now() + wait;
        wait
    }

    fn look(&mut self, host: &mut impl Host, guests: &[Guest], now: Duration) -> Duration {
        let is_huge = guests.iter().any(|guest| guest.page > 4096);
        self.rate = self.small_rate.saturating_mul(if is_huge { HUGE_FACTOR } else { 1 });
        self.take_note_of(guests);
        self.count_service(now);
        self.room = host.room();
        if self.state == MemoryState::Enough {
            if !self.is_below_line(host, now) {
                return self.interval(self.reserve(), CALM_INTERVAL);
            }
            self.enter_short(host, now);
        }
        self.decide(host, now);
        if now.saturating_sub(self.since) >= DWELL {
            self.come_down(host, now);
        }
        // Held VMs do not grow.
        if self.vms.values().all(Vm::is_waiting) {
            return SHORT_INTERVAL;
        }
        let is_tried = self.vms.values().any(Vm::is_on_trial);
        let longest = if is_tried { SHORTEST_INTERVAL } else { SHORT_INTERVAL };
        self.interval(self.reserve() / 2, longest)
    }

    /// Lets all VMs run. Memory is watched no more.
    pub(crate) fn close(&mut self, host: &mut impl Host) {
        self.release_all(host, host.now());
    }

    fn take_note_of(&mut self, guests: &[Guest]) {
        let least = self.vms.values().map(|vm| vm.served).min().unwrap_or(0);
        self.vms.retain(|number, _| guests.iter().any(|guest| guest.number == *number));
        for guest in guests {
            let known = self.vms.entry(guest.number).or_insert_with(|| Vm {
                guest: *guest,
                phase: Phase::Free,
                private: 0,
                faults: 0,
                measured: None,
                base: 0,
                grows: false,
                served: least,
                held: Duration::ZERO,
                longest: Duration::ZERO,
            });
            known.guest = *guest;
        }
    }

    fn count_service(&mut self, now: Duration) {
        let passed = u64::try_from(now.saturating_sub(self.looked).as_nanos()).unwrap_or(u64::MAX);
        self.looked = now;
        for vm in self.vms.values_mut() {
            if matches!(vm.phase, Phase::Granted { .. } | Phase::Trial { .. }) {
                vm.served = vm.served.saturating_add(passed / u64::from(vm.guest.weight.max(1)));
            }
        }
    }

    /// Whether memory is short, or soon will be.
    fn is_below_line(&mut self, host: &mut impl Host, now: Duration) -> bool {
        let room = self.room.bytes;
        // Sizes bound claims, and cost nothing to know.
        let sizes = |policy: &Self| policy.vms.values().map(|vm| vm.guest.memory).collect::<Vec<_>>();
        if room >= self.line(sizes(self)) || sizes(self).iter().sum::<u64>() <= room {
            return false;
        }
        let is_old = |vm: &Vm| vm.measured.is_none_or(|then| now.saturating_sub(then) >= CLAIM_AGE);
        for number in self.numbers(is_old) {
            self.measure(host, number);
        }
        // If all claims fit, memory cannot run out by what guests do.
        let is_below = |policy: &Self| {
            let claims: Vec<_> = policy.vms.values().map(Vm::claim).collect();
            room < claims.iter().sum() && room < policy.line(claims)
        };
        if !is_below(self) {
            return false;
        }
        // VMs that have grown since they were measured claim less.
        for number in self.numbers(|vm| vm.measured != Some(now)) {
            self.measure(host, number);
        }
        is_below(self)
    }

    /// As many of the largest claims as can grow at the same time, twice the largest, and twice the reserve.
    fn line(&self, mut claims: Vec<u64>) -> u64 {
        claims.sort_unstable_by(|one, other| other.cmp(one));
        let largest = claims.first().copied().unwrap_or(0);
        let together: u64 = claims.iter().take(self.processors).sum();
        together.max(2 * largest) + 2 * self.reserve()
    }

    fn enter_short(&mut self, host: &mut impl Host, now: Duration) {
        self.change(MemoryState::Short, now);
        for number in self.numbers(|_| true) {
            self.measure(host, number);
            let vm = self.vm(number);
            vm.base = vm.private;
        }
    }

    fn decide(&mut self, host: &mut impl Host, now: Duration) {
        let (room, reserve) = (self.room.bytes, self.reserve());
        if room < reserve / 2 && self.state != MemoryState::Exhausted {
            self.change(MemoryState::Exhausted, now);
            self.hold_all(host, now, |vm| !vm.is_waiting());
        } else if self.state == MemoryState::Exhausted
            && room >= reserve
            && now.saturating_sub(self.since) >= DWELL
        {
            self.change(MemoryState::Short, now);
        }
        self.hold_growers(host, now);
        if self.must_hold(self.spare(reserve)) {
            self.hold_all(host, now, |vm| vm.phase == Phase::Free);
        }
        self.let_run(host, now);
    }

    /// Whether more growth would take what the largest claim that fits may need. VMs that start to grow together are
    /// seen one after the other, so half as much again must be left for them.
    fn must_hold(&self, spare: u64) -> bool {
        let growth = growth(self.rate, self.reaction());
        let at_risk = |claim: u64| spare < claim + claim / 2 + growth && claim <= spare + spare / 4;
        let free = self.vms.values().filter(|vm| vm.phase == Phase::Free);
        spare < growth || free.map(Vm::claim).any(at_risk)
    }

    fn hold_all(&mut self, host: &mut impl Host, now: Duration, which: impl Fn(&Vm) -> bool) {
        for number in self.numbers(which) {
            self.hold(host, number, now);
        }
    }

    /// Holds VMs that have grown on trial, or to the limit of their grant.
    fn hold_growers(&mut self, host: &mut impl Host, now: Duration) {
        for number in self.numbers(|_| true) {
            let limit = match self.vms[&number].phase {
                Phase::Trial { .. } => ALLOWANCE,
                Phase::Granted { limit: Some(limit), .. } => limit,
                _ => continue,
            };
            if self.growth(host, number, limit) >= limit {
                self.vm(number).grows = true;
                self.hold(host, number, now);
            }
        }
    }

    /// Returns by how much a VM has grown since its base. It is measured if its faults could make up for `enough`. If that
    /// fails, the faults count.
    fn growth(&mut self, host: &mut impl Host, number: MachineNumber, enough: u64) -> u64 {
        let faults = host.faults(number);
        let vm = &self.vms[&number];
        let suspected =
            faults.map_or(u64::MAX, |faults| faults.saturating_sub(vm.faults).saturating_mul(vm.guest.page));
        let known = vm.private.saturating_sub(vm.base);
        let most = known.saturating_add(suspected);
        if most < enough {
            return known;
        }
        if !self.measure(host, number) {
            return most;
        }
        let vm = &self.vms[&number];
        vm.private.saturating_sub(vm.base)
    }

    /// Lets VMs that wait run, as far as the room goes.
    fn let_run(&mut self, host: &mut impl Host, now: Duration) {
        let may_run =
            |vm: &Vm| matches!(vm.phase, Phase::Waiting { rests, .. } if rests <= now) && vm.guest.runs;
        let mut waiting = self.numbers(may_run);
        if waiting.is_empty() {
            return;
        }
        waiting.sort_by_key(|number| self.vms[number].served);
        let is_old = |vm: &Vm| vm.measured.is_none_or(|then| now.saturating_sub(then) >= SHORT_INTERVAL);
        for number in self.numbers(|vm| vm.has_grant() || vm.is_waiting() && is_old(vm)) {
            self.measure(host, number);
        }
        self.room = host.room();
        let reserve = self.reserve();
        for &number in &waiting {
            if !self.fits(number) {
                continue;
            }
            // Merging may have raised the claim since it was measured.
            self.measure(host, number);
            self.room = host.room();
            if self.fits(number) && self.vms[&number].grows {
                self.grant(host, number, None, now);
            } else if self.fits(number) {
                self.begin_trial(host, number, now);
            }
        }
        waiting.retain(|number| self.vms[number].is_waiting());
        let growing: Vec<_> = waiting.iter().copied().filter(|number| self.vms[number].grows).collect();
        let waits_for_trial = waiting.len() > growing.len();
        self.end_trials(host, now, waits_for_trial);
        let Some(&first) = growing.first() else { return };
        self.end_grants(host, first, now);
        if self.vms.values().any(Vm::has_grant) {
            return;
        }
        // Nobody can run to its end. Few others run, so a part of the reserve is enough for one.
        let smallest = *growing.iter().min_by_key(|number| self.vms[number].claim()).unwrap_or(&first);
        let part = self.spare(reserve) / 4;
        if self.vms[&smallest].claim() <= self.spare(reserve / 4) {
            self.grant(host, smallest, None, now);
        } else if part >= self.deposit(&self.vms[&first]) {
            self.grant(host, first, Some(part), now);
        }
    }

    fn grant(&mut self, host: &mut impl Host, number: MachineNumber, limit: Option<u64>, now: Duration) {
        let vm = self.vm(number);
        vm.base = vm.private;
        self.run(host, number, Phase::Granted { since: now, limit }, now);
    }

    /// Whether there is room for a VM that waits: for its claim, or for its deposit.
    fn fits(&self, number: MachineNumber) -> bool {
        let vm = &self.vms[&number];
        if vm.grows { vm.claim() <= self.spare(self.reserve()) } else { self.may_try(number) }
    }

    /// Whether there is room for a deposit, such that the next grant fits nevertheless.
    fn may_try(&self, number: MachineNumber) -> bool {
        let (reserve, deposit) = (self.reserve(), self.deposit(&self.vms[&number]));
        if deposit > self.spare(reserve) {
            return false;
        }
        let waits = |vm: &&Vm| vm.is_waiting() && vm.grows;
        let Some(next) = self.vms.values().filter(waits).map(Vm::claim).min() else { return true };
        let deposits: u64 = self.vms.values().filter(|vm| vm.is_on_trial()).map(|vm| self.deposit(vm)).sum();
        // What ends gives all of its memory back.
        let granted: u64 = self.vms.values().filter(|vm| vm.has_grant()).map(|vm| vm.private).sum();
        next.saturating_add(deposits + deposit + reserve) <= self.room.bytes.saturating_add(granted)
    }

    /// What a VM can make private until it is seen to grow, and stands still.
    fn deposit(&self, vm: &Vm) -> u64 {
        let vcpus = u64::from(vm.guest.vcpus).min(self.processors as u64);
        growth(self.rate / self.processors as u64 * vcpus, TRIAL_REACTION).min(vm.claim())
    }

    fn begin_trial(&mut self, host: &mut impl Host, number: MachineNumber, now: Duration) {
        let vm = self.vm(number);
        vm.base = vm.private;
        self.run(host, number, Phase::Trial { since: now }, now);
    }

    /// Holds a VM that had a trial long enough, for another one.
    fn end_trials(&mut self, host: &mut impl Host, now: Duration, is_wanted: bool) {
        if is_wanted {
            let is_over =
                |vm: &Vm| matches!(vm.phase, Phase::Trial { since } if now.saturating_sub(since) >= TURN);
            self.hold_all(host, now, is_over);
        }
    }

    /// Has VMs rest that have had more time with a grant than the first that waits.
    fn end_grants(&mut self, host: &mut impl Host, first: MachineNumber, now: Duration) {
        let least = self.vms[&first].served;
        let is_over = |vm: &Vm| {
            matches!(vm.phase, Phase::Granted { since, .. } if now.saturating_sub(since) >= QUANTUM)
                && vm.served > least
        };
        for number in self.numbers(is_over) {
            self.hold(host, number, now);
            self.vm(number).phase = Phase::Waiting { since: now, rests: now + REST };
        }
    }

    /// The room that is set aside for nobody, less a reserve.
    fn spare(&self, reserve: u64) -> u64 {
        let aside = |vm: &Vm| match vm.phase {
            Phase::Granted { limit, .. } => {
                let grown = vm.private.saturating_sub(vm.base);
                limit.map_or(vm.claim(), |limit| limit.saturating_sub(grown).min(vm.claim()))
            }
            Phase::Trial { .. } => self.deposit(vm),
            Phase::Free | Phase::Waiting { .. } => 0,
        };
        self.vms.values().map(aside).fold(self.room.bytes.saturating_sub(reserve), u64::saturating_sub)
    }

    /// Lets all VMs run if memory is no longer short.
    fn come_down(&mut self, host: &mut impl Host, now: Duration) {
        if self.state != MemoryState::Short {
            return;
        }
        let claims = |policy: &Self| policy.vms.values().map(Vm::claim).collect::<Vec<_>>();
        let is_enough = |policy: &Self| {
            let line = policy.line(claims(policy));
            policy.room.bytes >= line + line / 4 || policy.claims() <= policy.room.bytes
        };
        if !is_enough(self) {
            return;
        }
        // Merging may have raised claims since.
        for number in self.numbers(|vm| vm.measured != Some(now)) {
            self.measure(host, number);
        }
        self.room = host.room();
        if is_enough(self) {
            self.change(MemoryState::Enough, now);
            self.release_all(host, now);
        }
    }

    fn release_all(&mut self, host: &mut impl Host, now: Duration) {
        for number in self.numbers(|vm| vm.phase != Phase::Free) {
            self.vm(number).grows = false;
            self.run(host, number, Phase::Free, now);
        }
    }

    fn hold(&mut self, host: &mut impl Host, number: MachineNumber, now: Duration) {
        host.withhold(number);
        self.vm(number).phase = Phase::Waiting { since: now, rests: now };
    }

    fn run(&mut self, host: &mut impl Host, number: MachineNumber, phase: Phase, now: Duration) {
        let held = self.held(number, now);
        let vm = self.vm(number);
        (vm.held, vm.longest) = (held.total, held.longest);
        vm.phase = phase;
        host.release(number);
    }

    /// Measures the private memory of a VM. Returns whether that was possible.
    fn measure(&mut self, host: &mut impl Host, number: MachineNumber) -> bool {
        // In this order: faults in between are looked at again.
        let (now, faults) = (host.now(), host.faults(number));
        let Some(private) = host.private(number) else { return false };
        let vm = self.vm(number);
        if vm.measured.is_none() {
            vm.base = private;
        }
        vm.private = private;
        vm.faults = faults.unwrap_or(vm.faults);
        vm.measured = Some(now);
        true
    }

    fn change(&mut self, state: MemoryState, now: Duration) {
        (self.state, self.since) = (state, now);
        self.changes += 1;
    }

    fn numbers(&self, which: impl Fn(&Vm) -> bool) -> Vec<MachineNumber> {
        self.vms.iter().filter(|(_, vm)| which(vm)).map(|(number, _)| *number).collect()
    }

    fn vm(&mut self, number: MachineNumber) -> &mut Vm {
        self.vms.get_mut(&number).expect("the policy asks only for VMs that it knows")
    }

    /// The time in which half of the room above `floor` can be used up.
    fn interval(&self, floor: u64, longest: Duration) -> Duration {
        let bytes = self.room.bytes.saturating_sub(floor) / 2;
        Duration::try_from_secs_f64(bytes as f64 / self.rate as f64)
            .unwrap_or(longest)
            .clamp(SHORTEST_INTERVAL, longest)
    }
}

/// Bytes that can be made private in a time.
fn growth(rate: u64, time: Duration) -> u64 {
    (rate as f64 * time.as_secs_f64()) as u64
}

#[cfg(test)]
mod tests;
