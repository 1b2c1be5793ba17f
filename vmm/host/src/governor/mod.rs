//! The governor: keeps VMs from running out of memory together.
//!
//! Guests are promised more memory than there is, and sharing comes apart when guests write. Without a governor the
//! kernel then kills a process, and all its VMs with it. The governor holds VMs before that, and lets them go on in turns.
//!
//! - `policy` decides, and knows no host: a test runs it against a model.
//! - `seen` is what both have in common.
//! - `host` measures: what is to be had, what VMs have, and which of them grow.
//! - This file is the thread that brings both together, and what others may see of it.

mod host;
mod policy;
mod seen;

use std::collections::BTreeMap;
use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use samepage_api_types::events::{Happening, MemoryState};
use samepage_process::tell::tell;

use crate::ends::MachineNumber;
use crate::registry::Registry;
use host::ThisHost;
use policy::Policy;
use seen::{Guest, Host};

/// How fast one processor can make memory private, in bytes per second. Measured: 0.45 GiB/s where guests write to
/// shared pages, 0.9 GiB/s where they touch new ones.
const RATE: u64 = 1 << 30;
/// A little before other threads: growth does not wait. Needs a privilege; without it the thread is as others.
const NICE: i32 = -10;

/// For how long a VM was held for lack of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Held {
    /// For how long now; `None` if it is not held.
    pub now: Option<Duration>,
    /// In all, the present time included.
    pub total: Duration,
    /// The longest time without a break, the present one included.
    pub longest: Duration,
}

/// What the governor last saw.
#[derive(Clone, Debug, Default)]
pub struct MemoryReport {
    /// Whether there is a governor.
    pub governed: bool,
    /// How short memory is.
    pub state: MemoryState,
    /// Memory that is to be had, in bytes.
    pub room_bytes: u64,
    /// The whole of which this is a part: the host's memory or the limit of a control group, in bytes.
    pub of_bytes: u64,
    /// The part of the room that no VM is to have, in bytes.
    pub reserve_bytes: u64,
    /// What all VMs together may make private, as far as it is known, in bytes.
    pub claims_bytes: u64,
    /// How often the state has changed.
    pub changes: u64,
    /// The longest time without a break that any VM was held.
    pub longest: Duration,
    /// The VMs, by the numbers of their machines.
    vms: BTreeMap<MachineNumber, Held>,
}

/// The report of the governor, for other threads, and a way to call it.
#[derive(Debug, Default)]
pub struct MemoryWatch {
    report: Mutex<MemoryReport>,
    call: Arc<Call>,
}

impl MemoryWatch {
    /// Returns the last report.
    pub fn report(&self) -> MemoryReport {
        self.report.lock().clone()
    }

    /// Has the governor look at once, because a VM has started.
    pub(crate) fn look(&self) {
        self.call.asked.lock().look = true;
        self.call.changed.notify_all();
    }

    /// Returns for how long a machine was held.
    pub(crate) fn held(&self, number: MachineNumber) -> Held {
        self.report.lock().vms.get(&number).copied().unwrap_or_default()
    }
}

/// What the governor is asked to do at once.
#[derive(Debug, Default)]
struct Asked {
    look: bool,
    stop: bool,
}

#[derive(Debug, Default)]
struct Call {
    asked: Mutex<Asked>,
    changed: Condvar,
}

/// The governor's thread. When this is dropped, the thread ends, and no VM is held any more.
#[derive(Debug)]
pub struct Governor {
    call: Arc<Call>,
    thread: Option<JoinHandle<()>>,
}

impl Governor {
    /// Starts to watch memory for the VMs of a registry.
    ///
    /// # Errors
    /// Fails if the host hides how much memory there is, or if no thread can be started.
    pub fn start(registry: &Arc<Registry>) -> io::Result<Self> {
        let mut host = ThisHost::new(Arc::downgrade(registry))?;
        let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let mut policy = Policy::new(RATE * processors as u64, processors);
        let call = Arc::clone(&registry.memory.call);
        let (asked, registry) = (Arc::clone(&call), Arc::downgrade(registry));
        let thread = thread::Builder::new().name("governor".into()).spawn(move || {
            host::prefer_this_thread(NICE);
            watch(&mut policy, &mut host, &registry, &asked);
            policy.close(&mut host);
        })?;
        Ok(Self { call, thread: Some(thread) })
    }
}

impl Drop for Governor {
    fn drop(&mut self) {
        self.call.asked.lock().stop = true;
        self.call.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed.
            let _ = thread.join();
        }
    }
}

/// Watches until it is asked to stop.
fn watch(policy: &mut Policy, host: &mut ThisHost, registry: &Weak<Registry>, call: &Call) {
    let mut guests = Vec::new();
    let mut asked = call.asked.lock();
    while !asked.stop {
        asked.look = false;
        drop(asked);
        host.find_guests(&mut guests);
        let before = policy.state();
        let wait = policy.tick(host, &guests);
        if let Some(registry) = registry.upgrade() {
            note(&registry, policy, host, &guests, before);
        }
        asked = call.asked.lock();
        if !asked.stop && !asked.look {
            call.changed.wait_for(&mut asked, wait);
        }
    }
}

/// Tells others what the policy has decided.
fn note(registry: &Registry, policy: &Policy, host: &ThisHost, guests: &[Guest], before: MemoryState) {
    let (state, room, now) = (policy.state(), policy.room(), host.now());
    {
        let mut report = registry.memory.report.lock();
        let vms = &mut report.vms;
        vms.clear();
        let held = guests.iter().map(|guest| (guest.number, policy.held(guest.number, now)));
        vms.extend(held.filter(|(_, held)| held.longest > Duration::ZERO));
        let longest = report.vms.values().map(|held| held.longest).max().unwrap_or_default();
        report.longest = report.longest.max(longest);
        report.governed = true;
        report.state = state;
        (report.room_bytes, report.of_bytes) = (room.bytes, room.of);
        (report.reserve_bytes, report.claims_bytes) = (policy.reserve(), policy.claims());
        report.changes = policy.changes();
    }
    if state != before {
        let message = sentence(state, room.bytes >> 20);
        tell(format_args!("{message}"));
        let (room_bytes, claims_bytes) = (room.bytes, policy.claims());
        registry.events.tell(Happening::Memory { state, room_bytes, claims_bytes, message });
    }
}

/// Says in a sentence what a state means.
fn sentence(state: MemoryState, room: u64) -> String {
    match state {
        MemoryState::Enough => {
            format!("memory is no longer short: {room} MiB are to be had, and all VMs run")
        }
        MemoryState::Short => format!(
            "memory is short: {room} MiB are to be had; VMs that need more of it are held and run in turns, until VMs \
             end or give memory back"
        ),
        MemoryState::Exhausted => format!(
            "memory is exhausted: {room} MiB are to be had; VMs that need more of it are held until there is more; \
             stop VMs, or raise the limit of the control group"
        ),
    }
}
