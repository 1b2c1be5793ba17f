//! The guest's data in the memory hole: true or false.

use core::sync::atomic::{AtomicU32, Ordering, fence};

use samepage_hole::flags::{ANON, BUDDY, LRU, MMAP, PUBLISHED, SWAP_BACKED};
use samepage_hole::{BLOCK_PAGES, GuestHeader, Hole, HostHeader, PAGE_BYTES};

use crate::clock::{self, Clock};
use crate::demo::layout::MAPPED_BY_IMAGE;
use crate::demo::plan::{HoleMode, HolePlace, Plan};
use crate::demo::report::{Report, Text};
use crate::pages::Pages;

/// The word of a used page of the arena.
const USED: u32 = PUBLISHED | ANON | MMAP | LRU | SWAP_BACKED;
/// The word of an unused page.
const UNUSED: u32 = PUBLISHED | BUDDY;

/// Interval in which an honest guest publishes without a request, in microseconds.
const TELL_US: u64 = 20_000;
/// Interval of polling for requests, in microseconds.
const GLANCE_US: u64 = 500;
/// Longest times between an answer and the next use of pages that are published as free. A host needs about
/// that time to learn of the answer and to free the pages.
const LULLS_US: [u64; 2] = [3_000, 150_000];
/// One of this number of pages is freed or used again between two passes.
const TURN: u64 = 32;
/// Number of consecutive pages to free or use at once.
const RUN: u64 = 8;

/// Duration of a game, in microseconds.
const GAME_US: u64 = 20_000;
/// Number of moves between two readings of the clock.
const MOVES_AT_ONCE: u32 = 64;

/// Index of the guest's header in the hole, in words.
const GUEST: usize = 1024;
const SEQUENCE: usize = GUEST + 2;

type Game = (&'static str, fn(&mut Claims<'_>, &mut Pages<'_>));

/// Each function makes one move.
const GAMES: &[Game] = &[
    ("noise", |claims, pages| {
        // Any place, including the host's header and the counters, but never publish this program's own
        // memory as free.
        let place = claims.random() as usize % claims.words.len();
        let flags = claims.words.len() - claims.hole.flags().len().next_multiple_of(PAGE_BYTES as usize / 4);
        let arena = pages.frame(0)..=pages.frame(pages.count().saturating_sub(1));
        if place < flags || arena.contains(&((place - flags) as u64)) {
            let value = claims.random() as u32;
            claims.words[place].store(value, Ordering::Relaxed);
        }
        claims.ring_sometimes();
    }),
    ("never-even", |claims, _| {
        let odd = claims.words[SEQUENCE].load(Ordering::Relaxed).wrapping_add(2) | 1;
        claims.words[SEQUENCE].store(odd, Ordering::Relaxed);
        claims.ring();
    }),
    ("never-settled", |claims, _| {
        claims.words[SEQUENCE].fetch_add(1, Ordering::Relaxed);
        claims.ring_sometimes();
    }),
    ("all-free", |claims, pages| {
        // The pages are written immediately.
        claims.flag_all(pages, |_| UNUSED);
        claims.finish_pass(claims.requested());
        (0..RUN).for_each(|_| claims.spoil(pages));
    }),
    ("free-and-used", |claims, pages| {
        let turn = claims.random();
        claims.flag_all(pages, |index| if (index ^ turn) & 1 == 0 { UNUSED } else { USED });
        claims.finish_pass(claims.requested());
    }),
    ("answers-before-questions", |claims, pages| {
        let ahead = [0, 1, 2, u32::MAX, 1 << 31][claims.random() as usize % 5];
        claims.finish_pass(claims.requested().wrapping_add(ahead));
        claims.spoil(pages);
    }),
    ("answers-at-once", |claims, pages| {
        // Repeatedly, and without reading any page.
        claims.finish_pass(claims.requested());
        claims.spoil(pages);
    }),
    ("any-flags", |claims, pages| {
        let salt = claims.random() as u32;
        claims.flag_all(pages, |index| salt.wrapping_mul(index as u32 | 1));
        claims.finish_pass(claims.requested());
    }),
    ("any-header", |claims, _| {
        let mut any = || claims.random() as u32;
        let header = GuestHeader {
            features: any(),
            generation: any(),
            answered: any(),
            next_ms: [0, u32::MAX, any()][any() as usize % 3],
            time_ms: [0, u64::MAX, any().into()][any() as usize % 3],
            changed: any(),
            cpu_us: any(),
        };
        claims.hole.set_guest_header(&header);
        claims.ring();
    }),
    ("comes-and-goes", |claims, _| {
        claims.hole.clear_guest_header();
        claims.ring_sometimes();
        claims.finish_pass(claims.requested());
    }),
    ("other-version", |claims, _| {
        let version = claims.random() as u32 % 3;
        claims.words[GUEST + 1].store(version, Ordering::Relaxed);
        claims.ring_sometimes();
    }),
    ("only-counters", |claims, _| {
        (0..claims.hole.blocks()).for_each(|block| claims.hole.count(block));
        claims.finish_pass(claims.requested());
    }),
    ("other-memory", |claims, _| {
        // The description of the guest's memory in the host's header.
        let mut header = claims.host;
        header.frames = claims.random() as u32;
        header.doorbell = claims.random();
        for range in &mut header.ranges {
            (range.first, range.count) = (claims.random() as u32, claims.random() as u32);
        }
        header.requested = claims.random() as u32;
        claims.hole.set_host_header(&header);
        claims.finish_pass(header.requested);
    }),
    ("storm", |claims, _| claims.ring()),
];

/// The hole and its published data.
pub(crate) struct Claims<'a> {
    mode: HoleMode,
    clock: &'a Clock,
    words: &'static [AtomicU32],
    hole: Hole<'static>,
    /// The host's first header.
    host: HostHeader,
    generation: u32,
    /// The last answered request.
    answered: u32,
    random: u64,
    games: usize,
    passes: u64,
    answers: u64,
    freed: u64,
    returned: u64,
    rings: u64,
}

impl<'a> Claims<'a> {
    /// Finds the hole of `plan`.
    ///
    /// # Errors
    /// Fails with words joined by hyphens.
    ///
    /// # Safety
    /// The hole must be at the plan's place, and nothing else in the guest may write there.
    pub(crate) unsafe fn open(plan: &Plan, mode: HoleMode, clock: &'a Clock) -> Result<Self, &'static str> {
        let HolePlace { bytes, address } = plan.hole.ok_or("no-memory-hole-on-the-command-line")?;
        let end = address.checked_add(bytes).filter(|end| *end <= MAPPED_BY_IMAGE - PAGE_BYTES);
        if end.is_none() || address == 0 || !address.is_multiple_of(PAGE_BYTES) {
            return Err("memory-hole-out-of-reach");
        }
        let start = core::ptr::with_exposed_provenance::<AtomicU32>(address as usize);
        // SAFETY: the first 4 GiB are mapped, and the caller guarantees the range. Atomics allow that others
        // write the words too.
        let words = unsafe { core::slice::from_raw_parts(start, bytes as usize / 4) };
        let hole = Hole::described(words).ok_or("memory-hole-not-described")?;
        let host = hole.host_header().ok_or("memory-hole-not-described")?;
        Ok(Self {
            mode,
            clock,
            words,
            hole,
            host,
            generation: 0,
            answered: host.requested,
            random: clock::now(),
            games: 0,
            passes: 0,
            answers: 0,
            freed: 0,
            returned: 0,
            rings: 0,
        })
    }

    /// Returns whether only the truth is published.
    pub(crate) fn is_honest(&self) -> bool {
        self.mode == HoleMode::Honest
    }

    /// Frees pages and uses them again for `ms`, and publishes that.
    pub(crate) fn tell(&mut self, pages: &mut Pages<'_>, ms: u64) -> Report {
        let end = clock::now().saturating_add(self.clock.ticks(ms.saturating_mul(1000)));
        loop {
            pages.attend(1);
            self.turn_over(pages);
            self.pass(pages);
            let time_limit = end.min(clock::now() + self.clock.ticks(TELL_US));
            while clock::now() < time_limit && self.requested() == self.answered {
                self.clock.sleep(GLANCE_US);
            }
            if self.requested() != self.answered {
                self.pass(pages);
                // The host now frees the free pages. The guest uses pages again before, during and after
                // that.
                let longest = LULLS_US[self.random() as usize % LULLS_US.len()];
                let lull = self.random() % longest;
                self.clock.sleep(lull);
            }
            if pages.quit || clock::now() >= end {
                return self.report("honest");
            }
        }
    }

    /// Frees some pages, and uses others again.
    fn turn_over(&mut self, pages: &mut Pages<'_>) {
        for _ in 0..pages.count() / TURN / RUN {
            let start = pages.random() % pages.count();
            let free = !pages.is_free(start);
            for index in start..pages.count().min(start + RUN) {
                if free == pages.is_free(index) {
                    continue;
                }
                if free {
                    pages.free(index);
                    self.freed += u64::from(pages.is_free(index));
                } else {
                    self.returned += u64::from(pages.reuse(index));
                }
            }
        }
    }

    /// Publishes all pages of the arena, and answers earlier requests.
    fn pass(&mut self, pages: &Pages<'_>) {
        let requested = self.requested();
        // Each word must be newer than the request.
        fence(Ordering::SeqCst);
        self.flag_all(pages, |index| if pages.is_free(index) { UNUSED } else { USED });
        self.finish_pass(requested);
    }

    /// Publishes all pages of the arena, and counts the blocks with a changed word.
    fn flag_all(&mut self, pages: &Pages<'_>, word: impl Fn(u64) -> u32) {
        let mut changed = None;
        for index in 0..pages.count() {
            let frame = pages.frame(index) as u32;
            let Some(published) = self.hole.flags().get(frame as usize) else { break };
            let word = word(index);
            if published.load(Ordering::Relaxed) == word {
                continue;
            }
            published.store(word, Ordering::Relaxed);
            let block = frame / BLOCK_PAGES;
            if let Some(before) = changed.filter(|before| *before != block) {
                self.hole.count(before);
            }
            changed = Some(block);
        }
        if let Some(block) = changed {
            self.hole.count(block);
        }
    }

    fn finish_pass(&mut self, answered: u32) {
        self.generation = self.generation.wrapping_add(1);
        self.passes += 1;
        self.answers += u64::from(self.answered != answered);
        self.answered = answered;
        self.hole.set_guest_header(&GuestHeader {
            features: 0,
            generation: self.generation,
            answered,
            next_ms: (TELL_US / 1000) as u32,
            time_ms: clock::now() / self.clock.tsc_khz,
            changed: 0,
            cpu_us: 0,
        });
        self.ring();
    }

    /// Returns the number of the last requested pass, wherever the host's header is now.
    fn requested(&self) -> u32 {
        self.hole.host_header().map_or(self.answered, |header| header.requested)
    }

    /// Plays the next game, and reports the result.
    pub(crate) fn lie(&mut self, pages: &mut Pages<'_>) -> Report {
        if self.mode == HoleMode::Ruin {
            return self.ruin(pages);
        }
        let (name, play) = GAMES[self.games % GAMES.len()];
        self.games += 1;
        let end = clock::now() + self.clock.ticks(GAME_US);
        let mut moves = 0;
        while clock::now() < end {
            (0..MOVES_AT_ONCE).for_each(|_| play(self, pages));
            moves += u64::from(MOVES_AT_ONCE);
        }
        // Restore what the host needs for the next game.
        self.hole.set_host_header(&HostHeader { requested: self.requested(), ..self.host });
        self.passes = moves;
        pages.attend(0);
        self.report(name)
    }

    /// Publishes all memory as free, including the memory of this program.
    fn ruin(&mut self, pages: &mut Pages<'_>) -> Report {
        let end = clock::now() + self.clock.ticks(GAME_US);
        while clock::now() < end {
            let requested = self.requested();
            for (block, frames) in (0..self.hole.blocks()).map(|block| (block, self.hole.block(block))) {
                frames.iter().for_each(|word| word.store(UNUSED, Ordering::Relaxed));
                self.hole.count(block);
            }
            self.finish_pass(requested);
            self.clock.sleep(GLANCE_US);
        }
        pages.attend(0);
        self.report("ruin")
    }

    /// Writes to any page of the arena, whatever was published about it.
    fn spoil(&mut self, pages: &mut Pages<'_>) {
        if pages.count() > 0 {
            pages.spoil(self.random() % pages.count());
        }
    }

    fn ring(&mut self) {
        self.rings += 1;
        let doorbell = core::ptr::with_exposed_provenance_mut::<u32>(self.host.doorbell as usize);
        // SAFETY: the host has given the address, which is mapped. A write there changes no memory.
        unsafe { doorbell.write_volatile(self.rings as u32) };
    }

    fn ring_sometimes(&mut self) {
        if self.random().is_multiple_of(64) {
            self.ring();
        }
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(1);
        crate::demo::content::mix(self.random)
    }

    fn report(&self, game: &str) -> Report {
        let &Self { passes, answers, freed, returned, rings, .. } = self;
        Report::Hole { game: Text::new(game.as_bytes()), passes, answered: answers, freed, returned, rings }
    }
}
