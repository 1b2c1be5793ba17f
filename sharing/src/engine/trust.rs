//! Whether an engine can be trusted, and the lock that sees to it.
//!
//! A panic under the lock leaves the engine's metadata half changed, and a frame that the host cannot supply
//! makes what is read from frames worthless. Sharing *stops* for the group then: nothing more is merged or
//! served from its cache, and its VMs go on. What they share stays mapped. After a panic no frame is given up
//! before the last VM of the group is gone, since only the metadata tells who maps it.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use parking_lot::{Mutex, MutexGuard};

use crate::engine::Engine;

/// Why sharing has stopped for a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The engine panicked: its metadata is not to be trusted.
    Panicked = 1,
    /// The host could not supply a frame.
    FrameLost = 2,
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Panicked => "its engine panicked, which is a defect of samepage",
            Self::FrameLost => "the host's memory failed under a shared page (see dmesg)",
        })
    }
}

/// Whether a group's engine has stopped, for those who do not hold its lock as well.
#[derive(Debug, Default)]
pub(crate) struct Stop(AtomicU8);

impl Stop {
    pub(crate) fn get(&self) -> Option<Stopped> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            1 => Some(Stopped::Panicked),
            _ => Some(Stopped::FrameLost),
        }
    }

    /// Stops it. A panic weighs more than a frame.
    pub(crate) fn set(&self, why: Stopped) {
        if self.get() != Some(Stopped::Panicked) {
            self.0.store(why as u8, Ordering::SeqCst);
        }
    }
}

/// The lock of an engine. A holder that panics stops the engine.
#[derive(Debug)]
pub(crate) struct EngineLock {
    engine: Mutex<Engine>,
    stop: Arc<Stop>,
}

impl EngineLock {
    pub(crate) fn new(engine: Engine) -> Self {
        let stop = Arc::clone(&engine.stop);
        Self { engine: Mutex::new(engine), stop }
    }

    /// Why it has stopped, if it has.
    pub(crate) fn stopped(&self) -> Option<Stopped> {
        self.stop.get()
    }

    pub(crate) fn lock(&self) -> Held<'_> {
        Held::new(self.engine.lock())
    }

    pub(crate) fn try_lock(&self) -> Option<Held<'_>> {
        self.engine.try_lock().map(Held::new)
    }

    /// The engine, if it has not stopped.
    pub(crate) fn working(&self) -> Option<Held<'_>> {
        let held = self.lock();
        held.works().then_some(held)
    }

    /// What `ask` says of the engine, also of one that has stopped; `None` where it panics.
    pub(crate) fn ask<T>(&self, ask: impl FnOnce(&mut Engine) -> T) -> Option<T> {
        // Whoever panics has stopped the engine: what it left half done is not used again.
        catch_unwind(AssertUnwindSafe(|| ask(&mut self.lock()))).ok()
    }

    /// The same as [`work`](Self::work). Whoever waits for the engine meanwhile has it next.
    pub(crate) fn work_fairly<T>(&self, work: impl FnOnce(&mut Engine) -> T) -> Option<T> {
        let worked = || {
            let mut held = self.working()?;
            let outcome = work(&mut held);
            held.unlock_fair();
            Some(outcome)
        };
        catch_unwind(AssertUnwindSafe(worked)).ok().flatten()
    }

    /// What `work` comes to; `None` where the engine has stopped, or does so by that.
    pub(crate) fn work<T>(&self, work: impl FnOnce(&mut Engine) -> T) -> Option<T> {
        catch_unwind(AssertUnwindSafe(|| self.working().map(|mut held| work(&mut held)))).ok().flatten()
    }
}

/// An engine whose lock is held.
pub(crate) struct Held<'a> {
    /// Always there but while it is given up.
    engine: Option<MutexGuard<'a, Engine>>,
    panicking: bool,
}

impl<'a> Held<'a> {
    fn new(engine: MutexGuard<'a, Engine>) -> Self {
        Self { engine: Some(engine), panicking: thread::panicking() }
    }

    /// Lets whoever waits for the lock have it first.
    pub(crate) fn unlock_fair(mut self) {
        if let Some(engine) = self.engine.take() {
            MutexGuard::unlock_fair(engine);
        }
    }
}

impl Deref for Held<'_> {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        self.engine.as_ref().expect("held until it is given up")
    }
}

impl DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut Engine {
        self.engine.as_mut().expect("held until it is given up")
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(engine) = &self.engine
            && thread::panicking()
            && !self.panicking
        {
            engine.stop.set(Stopped::Panicked);
        }
    }
}

impl Engine {
    /// Whether it can be trusted.
    pub(crate) fn works(&self) -> bool {
        if self.store.lost() {
            self.stop.set(Stopped::FrameLost);
        }
        self.stop.get().is_none()
    }
}
