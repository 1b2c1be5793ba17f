//! What the VMM sets and sees of a balloon while its guest runs.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::{BalloonConfig, GuestStats};
use crate::disk::wakers::Wakers;
use crate::virtio::Interrupt;

/// The guest is to take back all pages that it has hinted at.
pub(super) const HINT_DONE: u32 = 1;
/// No hints are wanted, or the guest has no more.
pub(super) const HINT_STOP: u32 = 0;
/// The first number of a request for hints.
const FIRST_HINT: u32 = 2;

/// Length of the configuration space.
const CONFIG_BYTES: usize = 16;
/// Where the driver writes the size of the balloon, and the value of free pages.
const ACTUAL_AT: usize = 4;
const POISON_AT: usize = 12;

/// Counters of a balloon since the last boot.
#[derive(Debug, Default)]
pub struct BalloonStats {
    /// Page frames that the guest has put into the balloon.
    pub inflated: AtomicU64,
    /// Page frames that the guest has taken out, as it says.
    pub deflated: AtomicU64,
    /// Page frames that the guest has reported as free.
    pub reported: AtomicU64,
    /// Page frames that the guest has hinted at.
    pub hinted: AtomicU64,
    /// Pages whose memory the host has got back.
    pub freed: AtomicU64,
    /// Page frames that are no memory of the guest's.
    pub invalid: AtomicU64,
    /// How often the device broke.
    pub errors: AtomicU64,
}

/// The state of free page hints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HintState {
    /// The number of the host's last request; 0 before the first, and 1 once the guest was told to take all pages
    /// back.
    pub host: u32,
    /// The number of the request that the guest answers or has answered; 0 once it has no more pages.
    pub guest: Option<u32>,
}

/// The configuration space, and what belongs to it.
#[derive(Debug, Default)]
struct State {
    target: u32,
    actual: u32,
    poison: u32,
    has_poison: bool,
    hints: HintState,
    /// The number of the last request for hints.
    last_hint: u32,
    /// Whether the guest is told to take its pages back when it has no more.
    is_answered: bool,
    /// Whether the guest's arrival at the target was told.
    has_arrived: bool,
    generation: u32,
    driver: Option<Arc<Interrupt>>,
}

impl State {
    /// Tells the driver of a change.
    fn changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if let Some(driver) = &self.driver {
            driver.signal_config();
        }
    }
}

/// Told the size of the balloon in page frames, when the guest has reached the target.
type Observer = Box<dyn Fn(u32) + Send + Sync>;

/// The controls and counters of a balloon.
pub struct BalloonControl {
    state: Mutex<State>,
    interval: AtomicU32,
    config: BalloonConfig,
    stats: BalloonStats,
    guest: Mutex<GuestStats>,
    observer: OnceLock<Observer>,
    pub(super) wakers: Wakers,
    is_active: AtomicBool,
}

impl fmt::Debug for BalloonControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalloonControl").field("state", &self.state).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BalloonControl {
    pub(super) fn new(config: BalloonConfig) -> Self {
        // Nobody waits for a guest to have an empty balloon.
        let has_arrived = config.target == 0;
        let state = State { target: config.target, has_arrived, ..State::default() };
        Self {
            state: Mutex::new(state),
            interval: AtomicU32::new(config.stats_interval),
            config,
            stats: BalloonStats::default(),
            guest: Mutex::default(),
            observer: OnceLock::new(),
            wakers: Wakers::default(),
            is_active: AtomicBool::new(false),
        }
    }

    /// Returns the counters.
    pub fn stats(&self) -> &BalloonStats {
        &self.stats
    }

    /// Returns what the guest has told of its memory.
    pub fn guest_stats(&self) -> GuestStats {
        *lock(&self.guest)
    }

    pub(super) fn take_guest_stats(&self, entries: &[u8]) {
        lock(&self.guest).take(entries);
    }

    /// Whether the guest has a driver for the device.
    pub fn is_active(&self) -> bool {
        self.is_active.load(Relaxed)
    }

    /// Returns the page frames that the guest is asked for.
    pub fn target(&self) -> u32 {
        lock(&self.state).target
    }

    /// Returns the page frames that are in the balloon, as the guest says.
    pub fn actual(&self) -> u32 {
        lock(&self.state).actual
    }

    /// Asks the guest for so many page frames in all. It gets those above that back.
    pub fn set_target(&self, frames: u32) {
        let mut state = lock(&self.state);
        if state.target != frames {
            state.target = frames;
            state.has_arrived = false;
            state.changed();
        }
    }

    /// Returns the time between two questions for statistics, in seconds; 0 if there are none.
    pub fn stats_interval(&self) -> u32 {
        self.interval.load(Relaxed)
    }

    /// Changes the time between two questions for statistics.
    pub fn set_stats_interval(&self, seconds: u32) {
        self.interval.store(seconds, Relaxed);
        self.wakers.wake();
    }

    /// Has the first observer told of the arrival at each target, once for each. It must not wait.
    pub fn on_arrival(&self, observer: impl Fn(u32) + Send + Sync + 'static) {
        let _ = self.observer.set(Box::new(observer));
    }

    /// Returns what the balloon was to be when it was made.
    pub fn config(&self) -> BalloonConfig {
        self.config
    }

    /// Returns the state of free page hints.
    pub fn hints(&self) -> HintState {
        lock(&self.state).hints
    }

    /// Asks the guest for hints. With `is_answered`, the guest is told to take the pages back once it has no more.
    pub fn start_hints(&self, is_answered: bool) {
        let mut state = lock(&self.state);
        state.last_hint = state.last_hint.wrapping_add(1).max(FIRST_HINT);
        state.hints.host = state.last_hint;
        state.is_answered = is_answered;
        state.changed();
    }

    /// Tells the guest to take back all pages that it has hinted at.
    pub fn stop_hints(&self) {
        let mut state = lock(&self.state);
        state.hints.host = HINT_DONE;
        state.changed();
    }

    /// The guest begins to answer a request for hints, or has no more.
    pub(super) fn take_hint_command(&self, command: u32) {
        let mut state = lock(&self.state);
        state.hints.guest = Some(command);
        if command == HINT_STOP && state.is_answered && state.hints.host >= FIRST_HINT {
            state.hints.host = HINT_DONE;
            state.changed();
        }
    }

    /// Whether hints of the guest are still wanted.
    pub(super) fn wants_hints(&self) -> bool {
        let state = lock(&self.state);
        state.hints.host >= FIRST_HINT && state.hints.guest == Some(state.hints.host)
    }

    /// Whether the guest expects something else than zeros in its free pages.
    pub(super) fn is_poisoned(&self) -> bool {
        let state = lock(&self.state);
        state.has_poison && state.poison != 0
    }

    /// A driver takes the device into use.
    pub(super) fn begin(&self, driver: Arc<Interrupt>, has_poison: bool) {
        let mut state = lock(&self.state);
        state.has_poison = has_poison;
        state.driver = Some(driver);
        self.is_active.store(true, Relaxed);
    }

    /// The driver is gone, and what was in the balloon with it.
    pub(super) fn end(&self) {
        let mut state = lock(&self.state);
        state.driver = None;
        state.actual = 0;
        state.poison = 0;
        state.hints = HintState::default();
        self.is_active.store(false, Relaxed);
    }

    pub(super) fn generation(&self) -> u32 {
        lock(&self.state).generation
    }

    /// `struct virtio_balloon_config`.
    pub(super) fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let state = lock(&self.state);
        let mut config = [0; CONFIG_BYTES];
        let words = [state.target, state.actual, state.hints.host, state.poison];
        for (place, word) in config.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        config
    }

    /// Takes in what the driver writes. It may write two of the four fields, and parts of them.
    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        let fields = [(ACTUAL_AT, state.actual), (POISON_AT, state.poison)];
        let [actual, poison] = fields.map(|(at, before)| {
            let mut bytes = before.to_le_bytes();
            for (index, byte) in bytes.iter_mut().enumerate() {
                let written = ((at + index) as u64).checked_sub(offset);
                let written = written.and_then(|index| data.get(usize::try_from(index).ok()?));
                *byte = written.copied().unwrap_or(*byte);
            }
            u32::from_le_bytes(bytes)
        });
        let is_news = actual != state.actual || offset == ACTUAL_AT as u64;
        (state.actual, state.poison) = (actual, poison);
        if is_news && actual == state.target && !state.has_arrived {
            state.has_arrived = true;
            drop(state);
            if let Some(observer) = self.observer.get() {
                observer(actual);
            }
        }
    }
}
