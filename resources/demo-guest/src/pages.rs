//! Filling, rewriting and verifying the arena.

use crate::clock::{self, Clock};
use crate::demo::content::{Class, Contents, PAGE_BYTES, PAGE_WORDS, PageContent, mix};
use crate::demo::layout::Arena;
use crate::demo::plan::{Plan, Rate};
use crate::demo::report::{Hex, Report};
use crate::port;

/// Pages verified between two looks at the clock.
const CHUNK: u64 = 16;
/// Steps of a walk between two looks at the clock.
const STEPS_AT_ONCE: u64 = 4096;
/// Writes between two looks at the clock.
const WRITES_AT_ONCE: u64 = 1024;
/// Between two looks at the serial port, in microseconds.
const POLL_US: u64 = 5_000;
/// Pauses are cut into spells of at least this, so that the serial port is looked at, in microseconds.
const SHORTEST_SPELL_US: u64 = 10_000;
const LONGEST_SPELL_US: u64 = 100_000;
/// A writer that is behind by more than this, in microseconds, gives the backlog up.
const LONGEST_BACKLOG_US: u64 = 1_000_000;
/// Pages tried in search of one whose class may be written.
const TRIES: usize = 1000;
/// Wrong pages that are described.
pub(crate) const MOST_DESCRIBED: u64 = 16;
const QUIT: u8 = b'q';
/// Stands in the version table for a page that is free: it holds nothing that counts.
const FREE: u32 = u32::MAX;

/// The arena at work.
pub(crate) struct Pages<'a> {
    plan: &'a Plan,
    arena: &'a Arena,
    clock: &'a Clock,
    contents: Contents,
    random: u64,
    /// Version given to the last page written.
    last_version: u32,
    /// Counter value at which the next write is due.
    next_write: u64,
    next_poll: u64,
    /// Pages rewritten so far.
    pub(crate) writes: u64,
    /// Pages found to be wrong so far.
    pub(crate) corrupt: u64,
    /// Whether the host has asked to come to an end.
    pub(crate) quit: bool,
    /// The last scan codes of the keyboard's.
    scan_codes: u32,
}

impl<'a> Pages<'a> {
    /// Fill the arena of `plan` with its base content.
    ///
    /// # Safety
    /// All of the arena's pages and its version table must be mapped, used by nothing else, and untouched
    /// since the machine started (so that the table is zero), as long as the value lives.
    pub(crate) unsafe fn fill(plan: &'a Plan, arena: &'a Arena, clock: &'a Clock) -> Self {
        let start = clock::now();
        let contents = Contents::new(plan.seed, plan.vm);
        let mut pages = Self {
            plan,
            arena,
            clock,
            contents,
            random: mix(plan.vm.into()),
            last_version: 0,
            next_write: start,
            next_poll: start,
            writes: 0,
            corrupt: 0,
            quit: false,
            scan_codes: 0,
        };
        for index in 0..arena.pages() {
            pages.fill_page(index);
        }
        pages.next_write = clock::now();
        pages
    }

    fn fill_page(&mut self, index: u64) {
        let Some(words) = self.page(index) else { return };
        let content = self.contents.page(self.arena.class(index), index, 0);
        for i in 0..PAGE_WORDS {
            // SAFETY: the page is the arena's, as `fill`'s caller confirmed.
            unsafe { words.add(i).write(content.base(i)) };
        }
    }

    /// The words of a page that has content.
    fn page(&self, index: u64) -> Option<*mut u64> {
        if self.arena.class(index) == Class::Untouched {
            return None;
        }
        let address = self.arena.address(index)?;
        Some(core::ptr::with_exposed_provenance_mut(address as usize))
    }

    fn version(&self, index: u64) -> *mut u32 {
        let table = core::ptr::with_exposed_provenance_mut::<u32>(self.arena.versions as usize);
        table.wrapping_add(index as usize)
    }

    fn content(&self, index: u64) -> PageContent {
        // SAFETY: the version table has an entry for each page, as `fill`'s caller confirmed.
        let version = unsafe { self.version(index).read() };
        self.contents.page(self.arena.class(index), index, version)
    }

    /// Verify every page, rewriting pages meanwhile if `writing`. Gives the number of pages verified, or
    /// `None` if the host asked to come to an end before all were.
    pub(crate) fn verify(&mut self, writing: bool) -> Option<u64> {
        let mut verified = 0;
        for index in 0..self.arena.pages() {
            verified += u64::from(self.verify_page(index));
            if writing && index % CHUNK == 0 {
                self.attend(CHUNK);
                if self.quit {
                    return None;
                }
            }
        }
        Some(verified)
    }

    /// Read words at random places one after the other, each place given by the word read before, and rewrite
    /// pages meanwhile. Gives the number of words read: fewer than `steps` if the host asked to come to an
    /// end, or if there is nothing to read.
    pub(crate) fn walk(&mut self, steps: u64) -> u64 {
        let mut place = self.random();
        for step in 0..steps {
            if step.is_multiple_of(STEPS_AT_ONCE) {
                self.attend(CHUNK);
                if self.quit || self.arena.pages() == 0 {
                    return step;
                }
            }
            place = mix(place);
            // The upper half of the product: as even a choice as the remainder, without a division.
            let index = ((u128::from(place) * u128::from(self.arena.pages())) >> 64) as u64;
            if let Some(words) = self.page(index) {
                // SAFETY: the page is the arena's, as `fill`'s caller confirmed, and the index is within it.
                place ^= unsafe { words.add(place as usize % PAGE_WORDS).read_volatile() };
            }
        }
        steps
    }

    /// Whether the page has content to verify.
    fn verify_page(&mut self, index: u64) -> bool {
        let Some(words) = self.page(index).filter(|_| !self.is_free(index)) else { return false };
        let content = self.content(index);
        // SAFETY: the page is the arena's, as `fill`'s caller confirmed. Volatile, since what is looked for
        // is memory that differs from what this program wrote.
        let read = |i: usize| unsafe { words.add(i).read_volatile() };

        let mut wrong = (read(0) ^ content.word(0)) | (read(PAGE_WORDS - 1) ^ content.word(PAGE_WORDS - 1));
        if content.is_zero() {
            (1..PAGE_WORDS - 1).for_each(|i| wrong |= read(i));
        } else {
            (1..PAGE_WORDS - 1).for_each(|i| wrong |= read(i) ^ content.base(i));
        }
        if wrong != 0 {
            self.describe(index, content, read);
        }
        true
    }

    #[cold]
    fn describe(&mut self, index: u64, content: PageContent, read: impl Fn(usize) -> u64) {
        self.corrupt += 1;
        if self.corrupt > MOST_DESCRIBED {
            return;
        }
        let mut first = None;
        let mut words = 0;
        for i in 0..PAGE_WORDS {
            let found = read(i);
            if found != content.word(i) {
                first.get_or_insert((i, found));
                words += 1;
            }
        }
        // If no word is wrong now, one was: word 512 stands for that.
        let (word, found) = first.unwrap_or((PAGE_WORDS, 0));
        port::print(Report::Corrupt {
            page: index,
            word: word as u64,
            expected: Hex(if word < PAGE_WORDS { content.word(word) } else { 0 }),
            found: Hex(found),
            class: self.arena.class(index),
            address: Hex(self.arena.address(index).unwrap_or(0)),
            words,
        });
    }

    /// Do the writes that are due, and look at the serial port if it is time to. At [`Rate::Max`] `fill_in`
    /// writes are due.
    pub(crate) fn attend(&mut self, fill_in: u64) {
        let now = clock::now();
        if now >= self.next_poll {
            self.poll(now);
        }
        match self.plan.rate {
            Rate::PerSecond(0) => {}
            Rate::Max => (0..fill_in).for_each(|_| self.write_any()),
            Rate::PerSecond(rate) => {
                let step = (self.clock.tsc_khz * 1000 / u64::from(rate)).max(1);
                if self.next_write.saturating_add(self.clock.ticks(LONGEST_BACKLOG_US)) < now {
                    self.next_write = now;
                }
                let mut left = WRITES_AT_ONCE;
                while self.next_write <= now && left > 0 {
                    self.write_any();
                    self.next_write += step;
                    left -= 1;
                }
            }
        }
    }

    fn poll(&mut self, now: u64) {
        self.next_poll = now + self.clock.ticks(POLL_US);
        while let Some(byte) = port::receive() {
            self.quit |= byte == QUIT;
        }
        self.quit |= port::ctrl_alt_del(&mut self.scan_codes);
    }

    /// Pause for `ms`, rewriting pages, until the host asks to come to an end.
    pub(crate) fn pause(&mut self, ms: u64) {
        let end = clock::now().saturating_add(self.clock.ticks(ms.saturating_mul(1000)));
        let spell = match self.plan.rate {
            Rate::Max => None,
            Rate::PerSecond(0) => Some(LONGEST_SPELL_US),
            Rate::PerSecond(rate) => {
                Some((1_000_000 / u64::from(rate)).clamp(SHORTEST_SPELL_US, LONGEST_SPELL_US))
            }
        };
        loop {
            self.attend(WRITES_AT_ONCE);
            let now = clock::now();
            if self.quit || now >= end {
                return;
            }
            let behind = !matches!(self.plan.rate, Rate::PerSecond(0)) && self.next_write <= now;
            match spell {
                Some(spell) if !behind => self.clock.sleep_until(end.min(now + self.clock.ticks(spell))),
                _ => {}
            }
        }
    }

    pub(crate) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(1);
        mix(self.random)
    }

    /// Rewrite a page chosen at random among those that may be written, if one is found.
    fn write_any(&mut self) {
        if self.arena.pages() == 0 {
            return;
        }
        for _ in 0..TRIES {
            let index = self.random() % self.arena.pages();
            if self.plan.write.contains(self.arena.class(index)) && !self.is_free(index) {
                return self.write(index);
            }
        }
    }

    fn next_version(&mut self) -> u32 {
        self.last_version = if self.last_version + 1 == FREE { 1 } else { self.last_version + 1 };
        self.last_version
    }

    /// Pages in the arena.
    pub(crate) fn count(&self) -> u64 {
        self.arena.pages()
    }

    /// Number of a page's frame.
    pub(crate) fn frame(&self, index: u64) -> u64 {
        self.arena.address(index).unwrap_or(0) / PAGE_BYTES as u64
    }

    /// Whether the page has been given up.
    pub(crate) fn is_free(&self, index: u64) -> bool {
        // SAFETY: the version table has an entry for each page, as `fill`'s caller confirmed.
        unsafe { self.version(index).read() == FREE }
    }

    /// Gives a page up, as a kernel does: what is in it stays there and means nothing any more. It is verified
    /// first.
    pub(crate) fn free(&mut self, index: u64) {
        if self.verify_page(index) {
            // SAFETY: as for `is_free`.
            unsafe { self.version(index).write(FREE) };
        }
    }

    /// Uses a page that was given up: all of it is written, half the time with its first content. Returns whether it held nothing but zeros by then,
    /// which no page does when it is given up, but for pages of zeros, for which the answer is no.
    pub(crate) fn reuse(&mut self, index: u64) -> bool {
        let Some(words) = self.page(index) else { return false };
        let version = if self.random().is_multiple_of(2) { 0 } else { self.next_version() };
        // SAFETY: as for `write`.
        unsafe {
            let returned = self.arena.class(index) != Class::Zero
                && [0, 1, PAGE_WORDS / 2, PAGE_WORDS - 1].iter().all(|&i| words.add(i).read_volatile() == 0);
            self.version(index).write(version);
            let content = self.content(index);
            (0..PAGE_WORDS).for_each(|i| words.add(i).write_volatile(content.word(i)));
            returned
        }
    }

    /// Overwrites a page with anything; it is never to be verified again.
    pub(crate) fn spoil(&mut self, index: u64) {
        let Some(words) = self.page(index) else { return };
        let value = self.random();
        // SAFETY: as for `write`.
        unsafe { words.add(value as usize % PAGE_WORDS).write_volatile(value) };
    }

    fn write(&mut self, index: u64) {
        let Some(words) = self.page(index) else { return };
        let restored = self.random() % 100 < self.plan.restore.into();
        let version = if restored { 0 } else { self.next_version() };
        // SAFETY: the version table has an entry for each page and the page is the arena's, as `fill`'s caller
        // confirmed.
        unsafe {
            self.version(index).write(version);
            let content = self.content(index);
            words.write_volatile(content.word(0));
            words.add(PAGE_WORDS - 1).write_volatile(content.word(PAGE_WORDS - 1));
        }
        self.writes += 1;
    }
}
