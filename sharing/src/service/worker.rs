//! The threads that do the work of all groups, one step after the other, under the ceiling of CPU
//! time.
//!
//! The first thread keeps the time. Where the ceiling is above one core there are more: they sleep
//! until a step has found work and there are other groups to turn to. Within a group one thread works at
//! a time, since most of what takes time there is the kernel's work under one lock of the process.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::engine::Step;
use crate::engine::holds::thread_cpu;
use crate::engine::trust::Stopped;
use crate::numbers::Slot;
use crate::service::group::{Group, Groups};
use crate::service::pace::Pace;

/// What the threads and their owner have in common.
pub(crate) struct Crew {
    pub(crate) groups: Groups,
    control: Mutex<Control>,
    /// For the first thread: something new.
    changed: Condvar,
    /// For the others: there is more than one thread can do.
    more: Condvar,
    /// Nothing is to be looked for.
    paused: AtomicBool,
    pace: Mutex<Pace>,
    cpu_nanoseconds: AtomicU64,
    /// It was told that mappings run short.
    told_short: AtomicBool,
    on_notice: Mutex<Option<NoticeHandler>>,
}

impl fmt::Debug for Crew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew").field("groups", &self.groups).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Control {
    stop: bool,
    /// Something happened since the first thread last looked.
    fresh: bool,
    /// Slots whose RAM the kernel would not let go yet.
    leaving: Vec<(Arc<Group>, Slot)>,
}

/// After how long it is tried again to let memory go that the kernel would not.
const RETRY_LEAVING: Duration = Duration::from_millis(100);

/// What users should know, said once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Sharing has stopped for a group, and its VMs go on.
    Stopped {
        /// The group's name.
        group: String,
        /// Why.
        why: Stopped,
    },
    /// The process comes near the kernel's limit on mappings: only longer runs are shared from now on.
    ShortOfMappings {
        /// Mappings of the process.
        used: u64,
        /// The limit.
        limit: u64,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped { group, why } => write!(
                f,
                "sharing has stopped for group {group}: {why}; its VMs go on, nothing more of them is merged, \
                 and their disks are read past the cache; once you have stopped all of its VMs, new ones share \
                 again"
            ),
            Self::ShortOfMappings { used, limit } => write!(
                f,
                "sharing has made {used} memory mappings of the {limit} that this process may have, and from \
                 now on merges longer runs of pages only; sysctl -w vm.max_map_count=1048576 allows for more \
                 (for good: a line in /etc/sysctl.d; in force with the next start)"
            ),
        }
    }
}

/// Who is told of notices, from a sharing thread.
pub(crate) type NoticeHandler = Box<dyn Fn(Notice) + Send>;

/// What one round over the groups came to.
#[derive(Clone, Copy)]
enum Round {
    Worked,
    RestUntil(Instant),
    /// There are no VMs.
    Idle,
}

impl Crew {
    pub(crate) fn new(groups: Groups, cpu_percent: f64) -> Self {
        Self {
            groups,
            control: Mutex::default(),
            changed: Condvar::new(),
            more: Condvar::new(),
            paused: AtomicBool::new(false),
            pace: Mutex::new(Pace::new(cpu_percent, Instant::now())),
            cpu_nanoseconds: AtomicU64::new(0),
            told_short: AtomicBool::new(false),
            on_notice: Mutex::new(None),
        }
    }

    /// Wakes the first thread up.
    pub(crate) fn refresh(&self) {
        self.control.lock().fresh = true;
        self.changed.notify_all();
    }

    pub(crate) fn stop(&self) {
        self.control.lock().stop = true;
        self.changed.notify_all();
        self.more.notify_all();
    }

    pub(crate) fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
        // A step that is under way ends first.
        self.groups.all().iter().for_each(|group| drop(group.engine.lock()));
    }

    pub(crate) fn resume(&self) {
        self.paused.store(false, Ordering::SeqCst);
        self.refresh();
    }

    /// A VM's memory is to be let go; the kernel has refused so far.
    pub(crate) fn leave_later(&self, group: Arc<Group>, slot: Slot) {
        self.control.lock().leaving.push((group, slot));
        self.refresh();
    }

    /// Has `handler` told what users should know, each thing once.
    pub(crate) fn on_notice(&self, handler: NoticeHandler) {
        *self.on_notice.lock() = Some(handler);
    }

    fn notice(&self) {
        let handler = self.on_notice.lock();
        let Some(handler) = &*handler else { return };
        let budget = self.groups.budgets().tightest();
        if budget.shortest_run() > 1 && !self.told_short.swap(true, Ordering::Relaxed) {
            handler(Notice::ShortOfMappings { used: budget.used(), limit: budget.limit() });
        }
        for group in self.groups.all() {
            if let Some(why) = group.engine.stopped()
                && !group.told.swap(true, Ordering::Relaxed)
            {
                handler(Notice::Stopped { group: group.name.clone(), why });
            }
        }
    }

    pub(crate) fn cpu(&self) -> Duration {
        Duration::from_nanos(self.cpu_nanoseconds.load(Ordering::Relaxed))
    }

    /// The first thread.
    pub(crate) fn lead(&self) {
        loop {
            self.retry_leaving();
            let round = self.round(0);
            self.notice();
            let mut control = self.control.lock();
            // The ceiling holds whatever happens meanwhile.
            while !control.stop
                && let Some(until) = self.pace.lock().rest_until(Instant::now())
            {
                self.changed.wait_until(&mut control, until);
            }
            while !control.stop && !std::mem::take(&mut control.fresh) {
                match round {
                    Round::Worked => break,
                    Round::RestUntil(until) => {
                        if self.changed.wait_until(&mut control, until).timed_out() {
                            break;
                        }
                    }
                    Round::Idle if control.leaving.is_empty() => self.changed.wait(&mut control),
                    Round::Idle => {
                        self.changed.wait_for(&mut control, RETRY_LEAVING);
                        break;
                    }
                }
            }
            if control.stop {
                return;
            }
        }
    }

    /// Another thread, the `index`th.
    pub(crate) fn help(&self, index: usize) {
        let mut control = self.control.lock();
        loop {
            if control.stop {
                return;
            }
            self.more.wait(&mut control);
            MutexGuard::unlocked(&mut control, || {
                while matches!(self.round(index), Round::Worked) {
                    let now = Instant::now();
                    if self.pace.lock().rest_until(now).is_some() {
                        break;
                    }
                }
            });
        }
    }

    /// A step of each group that no other thread works for, the `first` one first.
    fn round(&self, first: usize) -> Round {
        let groups = self.groups.all();
        let started = thread_cpu();
        if first == 0 && !self.paused.load(Ordering::SeqCst) {
            self.groups.look_around(Instant::now());
        }
        let mut rest: Option<Instant> = None;
        let mut worked = false;
        for index in 0..groups.len() {
            let group = &groups[(first + index) % groups.len()];
            let Some(mut engine) = group.engine.try_lock() else {
                // Whoever has it now lets it go within milliseconds.
                worked |= first == 0;
                continue;
            };
            if self.paused.load(Ordering::SeqCst) {
                return Round::Idle;
            }
            // A panic is this group's end, and none of the others'.
            let step = catch_unwind(AssertUnwindSafe(|| group.step(&mut engine, Instant::now())));
            let step = step.unwrap_or_else(|_| {
                engine.stop.set(Stopped::Panicked);
                None
            });
            match step {
                Some(Step::Worked) => worked = true,
                Some(Step::RestUntil(moment)) => {
                    rest = Some(rest.map_or(moment, |before| before.min(moment)));
                }
                None => {}
            }
            // Whoever waits comes first.
            engine.unlock_fair();
            if worked && first == 0 && groups.len() > 1 {
                self.more.notify_all();
            }
        }
        let spent = thread_cpu().saturating_sub(started);
        self.cpu_nanoseconds.fetch_add(spent.as_nanos() as u64, Ordering::Relaxed);
        self.pace.lock().spend(spent, Instant::now());
        match rest {
            _ if worked => Round::Worked,
            Some(moment) => Round::RestUntil(moment),
            None => Round::Idle,
        }
    }

    fn retry_leaving(&self) {
        let leaving = std::mem::take(&mut self.control.lock().leaving);
        for (group, slot) in leaving {
            match group.remove(slot) {
                Ok(()) => self.groups.leave(&group),
                Err(_) => self.control.lock().leaving.push((group, slot)),
            }
        }
    }
}
