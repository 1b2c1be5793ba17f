//! The other processors, and the work that all do at once.
//!
//! The first processor starts the others and gives each an equal part of the arena's pages, in which nobody else writes.
//! Then it calls out one *task* after the other. Each processor carries a task out in its own part, adds up what it has
//! done, and waits for the next one. While it waits between two verifications, it goes on rewriting pages.

use core::ops::Range;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crate::boot;
use crate::clock::{self, Clock};
use crate::demo::layout::Arena;
use crate::demo::plan::{MOST_PROCESSORS, Plan};
use crate::demo::report::Report;
use crate::pages::Pages;
use crate::port;

/// How long the other processors may take to start, in microseconds.
const PATIENCE_US: u64 = 10_000_000;
/// Length of the pieces in which a processor waits, in microseconds.
const SPELL_US: u64 = 5_000;

/// What all processors do in their parts of the arena.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Task {
    /// Fill the pages with their first content.
    Fill,
    /// Verify the pages, and rewrite some meanwhile and afterwards.
    Verify,
    /// Verify the pages, which nobody writes any more.
    VerifyLast,
}

/// What a processor needs for its work.
#[derive(Clone, Copy)]
pub(crate) struct World<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) arena: &'a Arena,
    pub(crate) clock: &'a Clock,
}

/// The first processor's [`World`], before others start.
static WORLD: AtomicPtr<World<'static>> = AtomicPtr::new(ptr::null_mut());
/// The number of processors that work, once it is known.
static SIZE: AtomicU32 = AtomicU32::new(0);
/// How many other processors are in ring 3.
static STARTED: AtomicU32 = AtomicU32::new(0);
/// The present task, and how many were called out so far.
static TASK: AtomicU32 = AtomicU32::new(0);
static CALLS: AtomicU32 = AtomicU32::new(0);
/// How many other processors have finished the present task.
static FINISHED: AtomicU32 = AtomicU32::new(0);
/// What the other processors have done: pages verified in the present task, and pages rewritten and found wrong so far.
static VERIFIED: AtomicU64 = AtomicU64::new(0);
static WRITES: AtomicU64 = AtomicU64::new(0);
static CORRUPT: AtomicU64 = AtomicU64::new(0);
/// Whether the host has asked the guest to end.
static QUIT: AtomicBool = AtomicBool::new(false);

/// The processors that work.
pub(crate) struct Team<'a> {
    clock: &'a Clock,
    size: u32,
}

impl<'a> Team<'a> {
    /// Starts as many processors as the plan asks for. If one of them does not start, the first one works alone.
    ///
    /// # Safety
    /// To be called once, by the first processor, when all memory is mapped and low memory is not needed any more. The
    /// world must stay as it is as long as the machine runs.
    pub(crate) unsafe fn start(world: &'a World<'a>) -> Self {
        let World { plan, clock, .. } = *world;
        // What the guest tells in the memory hole is about the first processor's pages.
        let asked = if plan.hole_mode.is_some() || plan.balloon.is_some() { 1 } else { plan.cpus.clamp(1, MOST_PROCESSORS) };
        if asked == 1 {
            return Self { clock, size: 1 };
        }
        let start = clock::now();
        // SAFETY: passed on from the caller.
        unsafe { boot::prepare_processors() };
        // The caller keeps the world for ever.
        WORLD.store(ptr::from_ref(world).cast_mut().cast(), Ordering::Release);
        clock::start_others(boot::TRAMPOLINE_PAGE);
        let end = start.saturating_add(clock.ticks(PATIENCE_US));
        let all_started = || STARTED.load(Ordering::Acquire) >= asked - 1;
        while !all_started() && clock::now() < end {
            clock.sleep(SPELL_US / 4);
        }
        let size = if all_started() { asked } else { 1 };
        let us = clock.elapsed_us(start);
        port::print(Report::Processors { asked: asked.into(), working: size.into(), us });
        SIZE.store(size, Ordering::Release);
        Self { clock, size }
    }

    /// Returns the number of processors.
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// Returns the first processor's part of the arena.
    pub(crate) fn first_part(&self, arena: &Arena) -> Range<u64> {
        part(0, self.size, arena)
    }

    /// Calls out a task to the other processors.
    pub(crate) fn begin(&self, task: Task) {
        FINISHED.store(0, Ordering::Relaxed);
        VERIFIED.store(0, Ordering::Relaxed);
        TASK.store(task as u32, Ordering::Relaxed);
        CALLS.fetch_add(1, Ordering::Release);
    }

    /// Waits until the other processors have finished the task, and does something meanwhile, again and again. Returns
    /// the number of pages that they have verified.
    pub(crate) fn finish(&self, mut meanwhile: impl FnMut()) -> u64 {
        while FINISHED.load(Ordering::Acquire) < self.size - 1 {
            meanwhile();
            self.clock.sleep(SPELL_US / 4);
        }
        VERIFIED.load(Ordering::Relaxed)
    }

    /// Has the other processors finish early.
    pub(crate) fn quit(&self) {
        QUIT.store(true, Ordering::Relaxed);
    }
}

/// Returns how many pages the other processors have rewritten.
pub(crate) fn others_writes() -> u64 {
    WRITES.load(Ordering::Relaxed)
}

/// Returns how many wrong pages the other processors have found.
pub(crate) fn others_corrupt() -> u64 {
    CORRUPT.load(Ordering::Relaxed)
}

/// Whether the host has asked the guest to end, as far as the other processors know.
pub(crate) fn must_quit() -> bool {
    QUIT.load(Ordering::Relaxed)
}

/// Returns a processor's part of the arena, one of `size` equal ones.
fn part(number: u32, size: u32, arena: &Arena) -> Range<u64> {
    let start = |number: u32| arena.pages() * u64::from(number) / u64::from(size);
    start(number)..start(number + 1)
}

/// The start of another processor in ring 3, with its number in the order of the starts, from 1.
#[unsafe(no_mangle)]
extern "C" fn ring3_processor(number: u32) -> ! {
    // SAFETY: this is the first code of this processor in ring 3.
    unsafe { boot::set_up_floating_point() };
    clock::set_up_apic();
    // SAFETY: the pointer is null, or that of the first processor's world, which stays for ever.
    let Some(world) = (unsafe { WORLD.load(Ordering::Acquire).as_ref() }) else { clock::sleep_forever() };
    STARTED.fetch_add(1, Ordering::AcqRel);
    let size = loop {
        match SIZE.load(Ordering::Acquire) {
            0 => world.clock.sleep(SPELL_US),
            size if number < size => break size,
            _ => clock::sleep_forever(),
        }
    };
    // SAFETY: the first processor has mapped all memory, and this part is no other processor's.
    let mut pages = unsafe { Pages::new(world, part(number, size, world.arena), number, size) };
    let mut calls = 0;
    let mut rewrites = false;
    let (mut writes, mut corrupt) = (0, 0);
    loop {
        while CALLS.load(Ordering::Acquire) == calls {
            if rewrites {
                pages.attend(1);
            }
            if !rewrites || !pages.is_busy() {
                world.clock.sleep(SPELL_US);
            }
        }
        calls += 1;
        let task = TASK.load(Ordering::Relaxed);
        rewrites = task == Task::Verify as u32;
        if task == Task::Fill as u32 {
            pages.fill();
        } else {
            VERIFIED.fetch_add(pages.verify(rewrites).unwrap_or(0), Ordering::Relaxed);
        }
        WRITES.fetch_add(pages.writes - writes, Ordering::Relaxed);
        CORRUPT.fetch_add(pages.corrupt - corrupt, Ordering::Relaxed);
        (writes, corrupt) = (pages.writes, pages.corrupt);
        FINISHED.fetch_add(1, Ordering::Release);
    }
}
