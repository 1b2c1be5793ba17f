//! How much pairs of VMs have in common, estimated from a sample of the frames.
//!
//! No book says who shares a frame, since that would cost memory for each of them. A few thousand frames,
//! the same for all VMs of a group, are looked for among those that each VM refers to; which of them two
//! VMs both refer to tells what they have in common. The work is one look at each page's entry in the
//! metadata, in pieces between which the engine goes on, and some bits for each pair.

use crate::engine::Engine;
use crate::frames::store::Frame;
use crate::numbers::Slot;

/// Frames of a sample at most, as long as their number is a power of two.
const SAMPLE: u32 = 4096;
/// Pages that are scanned while the engine waits.
const PIECE: u32 = 1 << 16;
/// VMs that are compared with each other at most: those that hold most.
const MOST_VMS: usize = 1024;

/// The frames of a sample that one VM refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameSample {
    /// In order, each once.
    frames: Vec<Frame>,
    /// One of `1 << shift` frames is in the sample.
    shift: u32,
}

/// What two VMs have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The one, and the other, by their places in what was given to [`pairs`].
    pub vms: [usize; 2],
    /// Frames that both refer to: pages of content that are in memory once for both.
    pub pages: u64,
    /// The standard error of that number; 0 where all frames were scanned.
    pub error: u64,
}

impl FrameSample {
    /// A sample of frames of a VM; of `live` frames there are in all.
    fn of(live: u32) -> Self {
        let shift = live.div_ceil(SAMPLE).next_power_of_two().trailing_zeros();
        Self { frames: Vec::new(), shift }
    }

    fn add(&mut self, frames: impl Iterator<Item = Frame>) {
        let shift = self.shift;
        self.frames.extend(frames.filter(|&frame| is_sampled(frame, shift)));
        self.frames.sort_unstable();
        self.frames.dedup();
    }

    /// Those that are in a sample of fewer as well.
    fn within(&self, shift: u32) -> impl Iterator<Item = Frame> {
        self.frames.iter().copied().filter(move |&frame| is_sampled(frame, shift))
    }
}

/// Whether a frame is in the sample of one in `1 << shift`. What is in a sample is in all larger ones.
/// Multiples of the golden ratio spread neighbours evenly.
fn is_sampled(frame: Frame, shift: u32) -> bool {
    frame.number().wrapping_mul(0x9e37_79b1).checked_shr(32 - shift).unwrap_or(0) == 0
}

/// The pairs of VMs of one group that have anything in common, the ones with most first, and no more than
/// `most`.
#[must_use]
pub fn pairs(vms: &[&FrameSample], most: usize) -> Vec<Pair> {
    // The number of frames may have changed while the VMs were scanned.
    let shift = vms.iter().map(|vm| vm.shift).max().unwrap_or(0);
    let mut frames: Vec<Frame> = vms.iter().flat_map(|vm| vm.within(shift)).collect();
    frames.sort_unstable();
    frames.dedup();
    let mut sets: Vec<(usize, u32, Vec<u64>)> = (0..vms.len())
        .map(|vm| {
            let mut bits = vec![0_u64; frames.len().div_ceil(64)];
            let mut count = 0;
            for at in vms[vm].within(shift).filter_map(|frame| frames.binary_search(&frame).ok()) {
                bits[at / 64] |= 1 << (at % 64);
                count += 1;
            }
            (vm, count, bits)
        })
        .collect();
    if sets.len() > MOST_VMS {
        sets.sort_by_key(|&(vm, count, _)| (std::cmp::Reverse(count), vm));
        sets.truncate(MOST_VMS);
        sets.sort_by_key(|&(vm, ..)| vm);
    }
    let mut pairs = Vec::new();
    for (index, (first, _, bits)) in sets.iter().enumerate() {
        for (second, _, others) in &sets[index + 1..] {
            let common: u32 = bits.iter().zip(others).map(|(one, other)| (one & other).count_ones()).sum();
            if common > 0 {
                pairs.push(Pair {
                    vms: [*first, *second],
                    pages: u64::from(common) << shift,
                    error: error(common, shift),
                });
            }
        }
    }
    pairs.sort_by_key(|pair| (std::cmp::Reverse(pair.pages), pair.vms));
    pairs.truncate(most);
    pairs
}

/// The standard error of a number of frames, of which `counted` were in the sample.
fn error(counted: u32, shift: u32) -> u64 {
    let rate = f64::from(shift).exp2().recip();
    ((f64::from(counted) * (1.0 - rate)).sqrt() / rate).round() as u64
}

impl Engine {
    /// Goes on with a sample of the frames that a VM refers to, from a page on. Returns the page where it
    /// goes on; none at the end, or where the slot is empty.
    pub(crate) fn sample_frames(&self, slot: Slot, from: u32, sample: &mut FrameSample) -> Option<u32> {
        let member = self.members.get(slot)?;
        if from == 0 {
            *sample = FrameSample::of(self.store.live());
        }
        let pages = member.space.pages();
        let end = from.saturating_add(PIECE).min(pages);
        sample.add(member.space.backing().frames(from..end));
        (end < pages).then_some(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(live: u32, frames: impl Iterator<Item = u32>) -> FrameSample {
        let mut sample = FrameSample::of(live);
        sample.add(frames.map(Frame::new));
        sample
    }

    #[test]
    fn few_frames_are_counted_one_by_one() {
        let vms = [sample(3000, 0..2000), sample(3000, 1500..3000), sample(3000, 2990..3000)];
        let found = pairs(&vms.iter().collect::<Vec<_>>(), 10);
        let pair = |vms, pages| Pair { vms, pages, error: 0 };
        assert_eq!(found, [pair([0, 1], 500), pair([1, 2], 10)]);
        assert_eq!(pairs(&vms.iter().collect::<Vec<_>>(), 1).len(), 1);
        assert_eq!(pairs(&[], 1), []);
    }

    #[test]
    fn many_frames_are_estimated_within_the_error_that_is_told() {
        let live = 1_000_000;
        let vms = [sample(live, 0..600_000), sample(live, 500_000..live)];
        assert!(vms.iter().all(|vm| vm.frames.len() <= SAMPLE as usize && vm.shift == 8), "{vms:?}");
        let [pair] = pairs(&[&vms[0], &vms[1]], 10)[..] else { panic!("one pair") };
        assert!(pair.pages.abs_diff(100_000) <= 2 * pair.error, "{pair:?}");
        assert!((4000..6000).contains(&pair.error), "{pair:?}");
    }

    #[test]
    fn samples_of_different_sizes_are_compared_by_the_smaller() {
        let vms = [sample(4096, 0..4096), sample(1 << 20, 0..1 << 20)];
        assert_eq!((vms[0].shift, vms[1].shift), (0, 8));
        let [pair] = pairs(&[&vms[0], &vms[1]], 10)[..] else { panic!("one pair") };
        assert!(pair.pages.abs_diff(4096) <= 2 * pair.error.max(256), "{pair:?}");
    }

    #[test]
    fn a_page_that_a_vm_holds_often_counts_once() {
        let vms = [sample(10, (0..10).chain(0..10)), sample(10, 0..5)];
        assert_eq!(pairs(&[&vms[0], &vms[1]], 10)[0].pages, 5);
    }
}
