//! The kernel's calls, counted by the pages that each is about.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use samepage_sharing::calls::{Linux, MemoryCalls, Over};
use samepage_sharing::engine::{Engine, Settings};
use samepage_sharing::guest::Source;
use samepage_sharing::ram::RamRange;
use samepage_sharing::store::{Frame, FrameStore};

/// A call by its name, and how many pages it was about.
pub(crate) type Call = (&'static str, u32);

/// Passes calls on and notes them.
pub(crate) struct Counted {
    linux: Linux,
    calls: Arc<Mutex<Vec<Call>>>,
    /// Told of each call before it is made.
    before: Box<dyn Fn(&'static str) + Send + Sync>,
    /// Writers are not woken.
    mute: bool,
}

impl Counted {
    /// Calls for a store.
    pub(crate) fn new(store: &FrameStore) -> Self {
        let linux = Linux::open(Arc::clone(store.file())).unwrap();
        Self { linux, calls: Arc::default(), before: Box::new(|_| {}), mute: false }
    }

    /// Calls that wake nobody: all writers are missed. `before` is told of each call.
    pub(crate) fn mute(store: &FrameStore, before: impl Fn(&'static str) + Send + Sync + 'static) -> Self {
        Self { before: Box::new(before), mute: true, ..Self::new(store) }
    }

    /// The calls that are made.
    pub(crate) fn log(&self) -> Arc<Mutex<Vec<Call>>> {
        Arc::clone(&self.calls)
    }

    fn note(&self, name: &'static str, pages: u32) {
        (self.before)(name);
        self.calls.lock().push((name, pages));
    }
}

impl MemoryCalls for Counted {
    fn register(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.note("register", pages.count());
        self.linux.register(pages)
    }

    fn protect(&self, pages: RamRange<'_>) -> io::Result<u32> {
        self.note("protect", pages.count());
        self.linux.protect(pages)
    }

    fn unprotect(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.note("unprotect", pages.count());
        self.linux.unprotect(pages)
    }

    fn wake(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.note("wake", pages.count());
        if self.mute { Ok(()) } else { self.linux.wake(pages) }
    }

    fn map(&self, pages: RamRange<'_>, source: Source, over: Over) -> io::Result<()> {
        self.note("map", pages.count());
        self.linux.map(pages, source, over)
    }

    fn discard(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.note("discard", pages.count());
        self.linux.discard(pages)
    }

    fn stage(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.note("stage", pages.count());
        self.linux.stage(pages)
    }

    fn clean(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.note("clean", pages.count());
        self.linux.clean(pages)
    }

    fn restore(&self, pages: RamRange<'_>, over: Over) -> io::Result<()> {
        self.note("restore", pages.count());
        self.linux.restore(pages, over)
    }

    fn unstage(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.note("unstage", pages.count());
        self.linux.unstage(pages)
    }

    fn split(&self, pages: RamRange<'_>) -> io::Result<()> {
        self.note("split", pages.count());
        self.linux.split(pages)
    }

    fn punch(&self, frame: Frame, count: u32) -> io::Result<()> {
        self.note("punch", count);
        self.linux.punch(frame, count)
    }
}

/// An engine whose calls are counted, and the calls.
pub(crate) fn counted_engine(settings: &Settings) -> (Engine, Arc<Mutex<Vec<Call>>>) {
    let store = FrameStore::create(1 << 20).unwrap();
    let calls = Counted::new(&store);
    let log = calls.log();
    (Engine::new(settings, store, Box::new(calls)).unwrap(), log)
}
