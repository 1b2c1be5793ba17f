//! Fills, rewrites and verifies the arena.

use core::ops::Range;

use crate::clock::{self, Clock};
use crate::demo::content::{Class, Contents, PAGE_BYTES, PAGE_WORDS, PageContent, mix};
use crate::demo::layout::Arena;
use crate::demo::plan::{Plan, Rate};
use crate::demo::report::{Hex, Report};
use crate::port;
use crate::processors::{self, World};

/// Pages to verify between two readings of the clock.
const CHUNK: u64 = 16;
/// Steps of a walk between two readings of the clock.
const STEPS_AT_ONCE: u64 = 4096;
/// Writes between two readings of the clock.
const WRITES_AT_ONCE: u64 = 1024;
/// Interval of polling the serial port, in microseconds.
const POLL_US: u64 = 5_000;
/// Least length of the pieces of a pause, between which the serial port is polled, in microseconds.
const SHORTEST_SPELL_US: u64 = 10_000;
const LONGEST_SPELL_US: u64 = 100_000;
/// A writer with a larger backlog than this, in microseconds, drops the backlog.
const LONGEST_BACKLOG_US: u64 = 1_000_000;
/// Attempts to find a page whose class may be written.
const TRIES: usize = 1000;
/// Limit for the described wrong pages.
pub(crate) const MOST_DESCRIBED: u64 = 16;
const QUIT: u8 = b'q';
const REWRITE: u8 = b's';
/// The version of a free page, whose content does not matter.
const FREE: u32 = u32::MAX;

/// The arena during the work, or a processor's part of it.
pub(crate) struct Pages<'a> {
    /// Indexes of the pages of this processor.
    part: Range<u64>,
    /// Number of the processor, and of all that work.
    processor: u32,
    processors: u32,
    plan: &'a Plan,
    arena: &'a Arena,
    clock: &'a Clock,
    contents: Contents,
    random: u64,
    /// The version of the last written page.
    last_version: u32,
    /// The counter value at which the next write is due.
    next_write: u64,
    next_poll: u64,
    /// Rewritten pages so far.
    pub(crate) writes: u64,
    /// Wrong pages so far.
    pub(crate) corrupt: u64,
    /// Whether the host has asked the guest to end.
    pub(crate) quit: bool,
    /// The keyboard's last scan codes.
    scan_codes: u32,
}

impl<'a> Pages<'a> {
    /// Returns a part of the arena for one of so many processors; the first processor has the number 0.
    ///
    /// # Safety
    /// While the value lives, the part's pages and their entries of the version table must be mapped and unused by
    /// others. They must be untouched since the machine started, so that the table is zero.
    pub(crate) unsafe fn new(world: &World<'a>, part: Range<u64>, processor: u32, processors: u32) -> Self {
        let World { plan, arena, clock } = *world;
        let start = clock::now();
        Self {
            part,
            processor,
            processors,
            plan,
            arena,
            clock,
            contents: Contents::new(plan.seed, plan.vm),
            random: mix(u64::from(plan.vm) | u64::from(processor) << 32),
            last_version: 0,
            next_write: start,
            next_poll: start,
            writes: 0,
            corrupt: 0,
            quit: false,
            scan_codes: 0,
        }
    }

    /// Fills the part with its base content.
    pub(crate) fn fill(&mut self) {
        for index in self.part.clone() {
            self.fill_page(index);
        }
        self.next_write = clock::now();
    }

    fn fill_page(&mut self, index: u64) {
        let Some(words) = self.page(index) else { return };
        let content = self.contents.page(self.arena.class(index), index, 0);
        for i in 0..PAGE_WORDS {
            // SAFETY: the page belongs to the arena, as the caller of `new` guarantees.
            unsafe { words.add(i).write(content.base(i)) };
        }
    }

    /// Returns the words of a page with content.
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
        // SAFETY: the version table has an entry for each page, as the caller of `new` guarantees.
        let version = unsafe { self.version(index).read() };
        self.contents.page(self.arena.class(index), index, version)
    }

    /// Verifies every page, and rewrites pages meanwhile if `writing`. Returns the number of verified pages,
    /// or `None` if the host asked the guest to end before that.
    pub(crate) fn verify(&mut self, writing: bool) -> Option<u64> {
        let mut verified = 0;
        for index in self.part.clone() {
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

    /// Reads words at random places, each place given by the previous word, and rewrites pages meanwhile.
    /// Returns the number of words: fewer than `steps` if the host asked the guest to end, or if there is
    /// nothing to read.
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
            // The upper half of the product is as even a choice as the remainder, without a division.
            let index = ((u128::from(place) * u128::from(self.arena.pages())) >> 64) as u64;
            if let Some(words) = self.page(index) {
                // SAFETY: the page belongs to the arena, as the caller of `new` guarantees, and the index is
                // within it.
                place ^= unsafe { words.add(place as usize % PAGE_WORDS).read_volatile() };
            }
        }
        steps
    }

    /// Verifies a page. Returns whether the page has content to verify.
    fn verify_page(&mut self, index: u64) -> bool {
        let Some(words) = self.page(index).filter(|_| !self.is_free(index)) else { return false };
        let content = self.content(index);
        // SAFETY: the page belongs to the arena, as the caller of `new` guarantees. The read is volatile,
        // because the memory may differ from what this program wrote.
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
        // If no word is wrong any more, one was wrong before. Word 512 represents it.
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

    /// Does the due writes, and polls the serial port if that is due. At [`Rate::Max`], `fill_in` writes are
    /// due.
    pub(crate) fn attend(&mut self, fill_in: u64) {
        let now = clock::now();
        if now >= self.next_poll {
            self.poll(now);
        }
        match self.plan.rate {
            Rate::PerSecond(0) => {}
            Rate::Max => (0..fill_in).for_each(|_| self.write_any()),
            Rate::PerSecond(rate) => {
                let step = (self.clock.tsc_khz * 1000 * u64::from(self.processors) / u64::from(rate)).max(1);
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
        if self.processor > 0 {
            self.quit |= processors::must_quit();
            return;
        }
        while let Some(byte) = port::receive() {
            self.quit |= byte == QUIT;
            if byte == REWRITE {
                self.rewrite_all();
            }
        }
        self.quit |= port::ctrl_alt_del(&mut self.scan_codes);
    }

    /// Pauses for `ms` and rewrites pages, until the host asks the guest to end.
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

    /// Whether rewriting goes on without pauses.
    pub(crate) fn is_busy(&self) -> bool {
        self.plan.rate == Rate::Max
    }

    pub(crate) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(1);
        mix(self.random)
    }

    /// Rewrites a random page among those that may be written, if one is found.
    fn write_any(&mut self) {
        if self.part.is_empty() {
            return;
        }
        for _ in 0..TRIES {
            let index = self.part.start + self.random() % (self.part.end - self.part.start);
            if self.plan.write.contains(self.arena.class(index)) && !self.is_free(index) {
                return self.write(index);
            }
        }
    }

    /// Rewrites every page that may be written, and ends then.
    fn rewrite_all(&mut self) {
        for index in self.part.clone() {
            if self.plan.write.contains(self.arena.class(index)) && !self.is_free(index) {
                self.write(index);
            }
        }
        self.quit = true;
    }

    fn next_version(&mut self) -> u32 {
        self.last_version = if self.last_version + 1 == FREE { 1 } else { self.last_version + 1 };
        self.last_version
    }

    /// Returns the number of pages in the arena.
    pub(crate) fn count(&self) -> u64 {
        self.arena.pages()
    }

    /// Returns the number of a page's frame.
    pub(crate) fn frame(&self, index: u64) -> u64 {
        self.arena.address(index).unwrap_or(0) / PAGE_BYTES as u64
    }

    /// Returns whether the page is free.
    pub(crate) fn is_free(&self, index: u64) -> bool {
        // SAFETY: the version table has an entry for each page, as the caller of `new` guarantees.
        unsafe { self.version(index).read() == FREE }
    }

    /// Verifies and frees a page, like a kernel: the content stays and has no meaning any more.
    pub(crate) fn free(&mut self, index: u64) {
        if self.verify_page(index) {
            // SAFETY: as for `is_free`.
            unsafe { self.version(index).write(FREE) };
        }
    }

    /// Uses a free page again: writes all of it, half the time with its first content. Returns whether it
    /// contained only zeros before. A page has other content when it is freed, except pages of zeros, for
    /// which this returns false.
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

    /// Overwrites a page with any content. The page is never verified again.
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
        // SAFETY: the version table has an entry for each page and the page belongs to the arena, as the
        // caller of `new` guarantees.
        unsafe {
            self.version(index).write(version);
            let content = self.content(index);
            words.write_volatile(content.word(0));
            words.add(PAGE_WORDS - 1).write_volatile(content.word(PAGE_WORDS - 1));
        }
        self.writes += 1;
    }
}
