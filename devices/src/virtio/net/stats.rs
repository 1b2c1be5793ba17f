//! Counters of a network device, and the state of its link.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::virtio::Interrupt;

/// Counters of a network device since the last boot. Directions are the guest's.
#[derive(Debug, Default)]
pub struct NetStats {
    /// Frames that the guest received.
    pub received_frames: AtomicU64,
    /// Bytes of these frames.
    pub received_bytes: AtomicU64,
    /// Frames for the guest that were dropped: the link was down, or the guest's buffer was too small.
    pub received_dropped: AtomicU64,
    /// Frames that the guest sent.
    pub sent_frames: AtomicU64,
    /// Bytes of these frames.
    pub sent_bytes: AtomicU64,
    /// Frames of the guest that were dropped: the link was down or refused them, or their header was wrong.
    pub sent_dropped: AtomicU64,
    /// Frames that were delayed by the device's limits.
    pub throttled: AtomicU64,
    /// How often the device or its link broke.
    pub errors: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl NetStats {
    pub(super) fn record_error(&self, error: String) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// Returns the last error.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Told why a link is gone.
type Observer = Box<dyn Fn(&str) + Send + Sync>;

/// The state of the link, as the guest sees it.
pub struct LinkState {
    /// Whether the user has the link up.
    wanted: AtomicBool,
    /// Whether the other end is there.
    alive: AtomicBool,
    generation: AtomicU32,
    driver: Mutex<Option<Arc<Interrupt>>>,
    observer: OnceLock<Observer>,
}

impl fmt::Debug for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkState").field("is_up", &self.is_up()).finish_non_exhaustive()
    }
}

impl Default for LinkState {
    fn default() -> Self {
        let (wanted, alive) = (AtomicBool::new(true), AtomicBool::new(true));
        let (generation, driver, observer) = Default::default();
        Self { wanted, alive, generation, driver, observer }
    }
}

impl LinkState {
    /// Returns whether frames pass.
    pub fn is_up(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) && self.alive.load(Ordering::SeqCst)
    }

    /// Takes the link up or down. The guest is told.
    pub fn set(&self, up: bool) {
        if self.wanted.swap(up, Ordering::SeqCst) != up {
            self.tell();
        }
    }

    /// Has the first observer told when the other end is gone.
    pub fn on_gone(&self, observer: impl Fn(&str) + Send + Sync + 'static) {
        let _ = self.observer.set(Box::new(observer));
    }

    /// Notes that the other end is gone for good.
    pub(super) fn set_gone(&self, reason: &str) {
        if self.alive.swap(false, Ordering::SeqCst) {
            self.tell();
            if let Some(observer) = self.observer.get() {
                observer(reason);
            }
        }
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn set_driver(&self, driver: Option<Arc<Interrupt>>) {
        *self.driver.lock().unwrap_or_else(PoisonError::into_inner) = driver;
    }

    fn tell(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if let Some(driver) = &*self.driver.lock().unwrap_or_else(PoisonError::into_inner) {
            driver.signal_config();
        }
    }
}
