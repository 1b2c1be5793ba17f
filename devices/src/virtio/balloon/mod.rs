//! Virtio memory balloon (virtio 1.2, section 5.5): the guest gives memory back to the host.
//!
//! | queue | purpose |
//! | --- | --- |
//! | 0 | page frames that go into the balloon: their memory is freed |
//! | 1 | page frames that leave the balloon |
//! | 2 | statistics of the guest's memory |
//! | 3 | free page hints, when the host asks for them |
//! | 4 | free page reports: blocks that the guest keeps unused until they are answered |
//!
//! The standard numbers the last three so. Linux numbers those without gaps whose features were negotiated. The
//! device finds out by the queues that the driver set up.
//!
//! One worker thread serves all queues. It frees memory through [`FreePages`], a bounded piece at a time, and pauses
//! after each piece for as long as it took. So a guest that sends requests without end takes half of the time at
//! most of what others use as well.
//!
//! VIRTIO_BALLOON_F_MUST_TELL_HOST is not offered. A page frame of the balloon is memory like any other, so the
//! guest may use it before it says so.
//!
//! # Page poison
//! A guest that fills its free pages with a value, and checks that, finds zeros in a page that was freed. If
//! its value is another one, reports and hints are answered, and nothing is freed.
//!
//! # Free page hints
//! Linux takes hinted pages back when its memory runs short, and does not wait for the device. A page that it uses
//! again at that moment can be freed afterwards, and reads as zeros. Firecracker's device does the same. So hints
//! are an option, and reports are the better choice.
//!
//! # Errors
//! Page frames outside memory are counted and left alone. An invalid ring or chain, or a list of page frames outside
//! guest memory, breaks the device until it is reset.

use std::ops::Range;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_config};

mod control;
mod service;
mod stats;
#[cfg(test)]
mod tests;

pub use control::{BalloonControl, BalloonStats, HintState};
use service::{Queues, Service};
pub use stats::{GuestStat, GuestStats};

/// The device returns statistics' buffers to ask for newer ones.
const STATS_VQ: u32 = 1;
/// The guest takes pages out of the balloon by itself before it kills a program.
const DEFLATE_ON_OOM: u32 = 2;
/// The guest tells on request which pages are free.
const FREE_PAGE_HINT: u32 = 3;
/// The guest says what it fills free pages with.
const PAGE_POISON: u32 = 4;
/// The guest reports free pages by itself.
const REPORTING: u32 = 5;

/// Linux refuses a queue for reports with fewer than 32 places.
const QUEUE_SIZES: [u16; 5] = [128; 5];
/// The queues of the features that bring one, as the standard numbers them.
const OPTIONAL: [(u32, usize); 3] = [(STATS_VQ, 2), (FREE_PAGE_HINT, 3), (REPORTING, 4)];

/// Length of a page frame, in bytes.
pub const FRAME_BYTES: u64 = 4096;

/// What was done of an order to free page frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// The page frame to go on with.
    pub next: u64,
    /// Pages that had memory and have none any more.
    pub freed: u64,
    /// Page frames that are no memory of the guest's.
    pub invalid: u64,
}

/// Frees the memory of a guest's pages, whose content the guest does not want any more.
pub trait FreePages: Send + Sync {
    /// Frees the first of these page frames, as many as a millisecond or so is enough for, and one at least. On
    /// return, the page frames before [`Freed::next`] read as zeros, or as what the guest had in them.
    fn free(&self, frames: Range<u64>) -> Freed;
}

/// What a balloon is.
#[derive(Clone, Copy, Debug, Default)]
pub struct BalloonConfig {
    /// Page frames that the guest is asked for.
    pub target: u32,
    /// Whether the guest may take pages back before it kills a program.
    pub deflate_on_oom: bool,
    /// Whether the guest may report free pages.
    pub reporting: bool,
    /// Whether the guest can be asked for free page hints.
    pub hinting: bool,
    /// The time between two questions for statistics, in seconds. 0 for none after the first.
    pub stats_interval: u32,
}

/// A memory balloon.
pub struct Balloon {
    thread_name: String,
    features: u64,
    pages: Arc<dyn FreePages>,
    control: Arc<BalloonControl>,
    worker: Option<Worker>,
}

impl Balloon {
    /// Returns the device of the VM `vm`.
    pub fn new(vm: &str, config: BalloonConfig, pages: Arc<dyn FreePages>) -> Self {
        let mut features = 1 << STATS_VQ | 1 << PAGE_POISON;
        for (is_offered, feature) in [
            (config.deflate_on_oom, DEFLATE_ON_OOM),
            (config.reporting, REPORTING),
            (config.hinting, FREE_PAGE_HINT),
        ] {
            features |= u64::from(is_offered) << feature;
        }
        // A zero byte would end the thread's name early.
        let thread_name = format!("balloon-{vm}").replace('\0', "?");
        let control = Arc::new(BalloonControl::new(config));
        Self { thread_name, features, pages, control, worker: None }
    }

    /// Returns the controls and counters. They outlive the device.
    pub fn control(&self) -> Arc<BalloonControl> {
        self.control.clone()
    }
}

/// Returns the numbers of the queues for statistics, hints and reports.
fn queue_numbers(features: u64, is_ready: impl Fn(usize) -> bool) -> [Option<usize>; 3] {
    let negotiated = OPTIONAL.map(|(feature, _)| features & (1 << feature) != 0);
    let standard = |index: usize| negotiated[index].then_some(OPTIONAL[index].1);
    let numbers = [0, 1, 2].map(standard);
    if numbers.iter().flatten().all(|&number| is_ready(number)) {
        return numbers;
    }
    let mut next = OPTIONAL[0].1;
    negotiated.map(|is_there| {
        is_there.then(|| {
            next += 1;
            next - 1
        })
    })
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.control.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.control.write_config(offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.control.generation()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let ready: Vec<_> = activation.queues.iter().map(|queue| queue.index).collect();
        let [stats, hints, reports] = queue_numbers(features, |number| ready.contains(&number));
        let (inflate, deflate) = (activation.take(0)?, activation.take(1)?);
        let mut take = |number: Option<usize>| number.map(|number| activation.take(number)).transpose();
        let queues =
            Queues { inflate, deflate, stats: take(stats)?, hints: take(hints)?, reports: take(reports)? };
        let (control, pages) = (self.control.clone(), self.pages.clone());
        // A driver that reads zeros in each free page has negotiated the feature with the value 0.
        let has_poison = features & (1 << PAGE_POISON) != 0;
        self.control.begin(activation.interrupt.clone(), has_poison);
        let make = move || Service::new(control, pages, queues);
        let worker = Worker::spawn(self.thread_name.clone(), activation.interrupt, make)
            .map_err(ActivateError::Worker)?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.control.end();
    }
}
