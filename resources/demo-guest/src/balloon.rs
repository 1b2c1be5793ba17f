//! A virtio balloon: pages of the arena are given to the host, and used again.

use crate::clock::{self, Clock};
use crate::demo::plan::Plan;
use crate::demo::report::Report;
use crate::pages::Pages;
use crate::virtio::{Descriptor, Device, SetupError};

/// The type of the device.
const BALLOON: u32 = 5;
/// The queues that its driver has to set up: the first one takes page frames.
const QUEUES: u32 = 2;

/// Limit for the page frames of a request.
const MOST: usize = 256;
/// One of this number of pages is given away or used again at a time.
const TURN: u64 = 16;
/// Number of consecutive pages to give away or use at once.
const RUN: u64 = 8;
/// Interval of polling for answers, in microseconds.
const GLANCE_US: u64 = 50;
/// How long an answer may take, in microseconds. Hosts with much other work are slow.
const PATIENCE_US: u64 = 60_000_000;
/// Pause between two requests, in microseconds.
const PAUSE_US: u64 = 1_000;

static mut FRAMES: [u32; MOST] = [0; MOST];

/// A balloon.
pub(crate) struct Balloon<'a> {
    clock: &'a Clock,
    device: Device,
    requests: u64,
    given: u64,
    returned: u64,
    longest_us: u64,
}

impl<'a> Balloon<'a> {
    /// Takes the device of the plan into use.
    ///
    /// # Safety
    /// As for [`Device::open`]. There may be one balloon.
    pub(crate) unsafe fn open(plan: &Plan, base: u64, clock: &'a Clock) -> Result<Self, &'static str> {
        if plan.disk.is_some() || plan.hole_mode.is_some() {
            return Err("balloon-beside-a-disk-or-a-hole");
        }
        // SAFETY: guaranteed by the caller.
        let device = unsafe { Device::open_with(base, BALLOON, 0, QUEUES) };
        let device = device.map_err(|error| match error {
            SetupError::OtherDevice => "no-balloon-there",
            SetupError::NoReset => "balloon-does-not-reset",
            SetupError::Rejected => "balloon-rejected",
        })?;
        Ok(Self { clock, device, requests: 0, given: 0, returned: 0, longest_us: 0 })
    }

    /// Gives pages away and uses them again for `ms`.
    pub(crate) fn play(&mut self, pages: &mut Pages<'_>, ms: u64) -> Result<Report, &'static str> {
        let end = clock::now().saturating_add(self.clock.ticks(ms.saturating_mul(1000)));
        loop {
            pages.attend(1);
            let count = self.turn_over(pages);
            if count > 0 {
                self.give(count)?;
            }
            if pages.quit || clock::now() >= end {
                let Self { requests, given, returned, longest_us, .. } = *self;
                return Ok(Report::Given { requests, given, returned, us: longest_us });
            }
            self.clock.sleep(PAUSE_US);
        }
    }

    /// Uses some pages again, which the host was given, and frees others. Returns the number of frames to be given.
    fn turn_over(&mut self, pages: &mut Pages<'_>) -> usize {
        let frames = &raw mut FRAMES;
        let mut count = 0;
        for _ in 0..(pages.count() / TURN / RUN).max(1) {
            let start = pages.random() % pages.count().max(1);
            let run = start..pages.count().min(start + RUN);
            // What is freed in this turn is not given yet, and stays free up to the next one.
            let is_new = |frame: u32| {
                // SAFETY: this is the only user of the list, while the device has no request.
                (0..count).any(|at| unsafe { (&raw const (*frames)[at]).read_volatile() } == frame)
            };
            if run.clone().any(|index| is_new(pages.frame(index) as u32)) {
                continue;
            }
            let frees = !pages.is_free(start);
            for index in run {
                if frees == pages.is_free(index) {
                    continue;
                }
                if !frees {
                    self.returned += u64::from(pages.reuse(index));
                } else if count < MOST {
                    pages.free(index);
                    if pages.is_free(index) {
                        // SAFETY: as above.
                        unsafe { (&raw mut (*frames)[count]).write_volatile(pages.frame(index) as u32) };
                        count += 1;
                    }
                }
            }
        }
        count
    }

    /// Gives the first frames of the list to the host, and waits for its answer.
    fn give(&mut self, count: usize) -> Result<(), &'static str> {
        let start = clock::now();
        let address = (&raw const FRAMES).addr() as u64;
        self.device.describe(0, Descriptor { address, len: 4 * count as u32, flags: 0, next: 0 });
        self.device.offer(0);
        self.device.publish();
        while self.device.take_used().is_none() {
            if self.clock.elapsed_us(start) > PATIENCE_US {
                return Err("no-answer-of-the-balloon");
            }
            self.clock.sleep(GLANCE_US);
        }
        self.requests += 1;
        self.given += count as u64;
        self.longest_us = self.longest_us.max(self.clock.elapsed_us(start));
        Ok(())
    }
}
