//! Copies the kernel's changed flags to the host.

use std::sync::atomic::Ordering;

use samepage_hole::{BLOCK_PAGES, Hole, HostHeader};

use super::Error;
use super::pages::{BATCH, Flags};

// A batch lies within one block, so one counter suffices.
const _: () = assert!((BLOCK_PAGES as usize).is_multiple_of(BATCH));

/// A target for published words.
pub trait Target {
    /// Returns the number of page frames with words.
    fn frames(&self) -> u32;

    /// Returns the published word of a page frame.
    fn published(&self, frame: u32) -> u32;

    /// Publishes the words of the page frames from `first` on, as far as they differ from the published ones.
    /// All of them lie in one block. Returns the number of changed words.
    ///
    /// # Errors
    /// Fails if the host does not accept them.
    /// The host does not take them.
    fn publish(&mut self, first: u32, words: &[u32]) -> Result<u32, Error>;
}

impl Target for Hole<'_> {
    fn frames(&self) -> u32 {
        Hole::frames(self)
    }

    fn published(&self, frame: u32) -> u32 {
        self.flags()[frame as usize].load(Ordering::Relaxed)
    }

    fn publish(&mut self, first: u32, words: &[u32]) -> Result<u32, Error> {
        let mut changed = 0;
        for (published, &word) in self.flags()[first as usize..].iter().zip(words) {
            if published.load(Ordering::Relaxed) != word {
                published.store(word, Ordering::Relaxed);
                changed += 1;
            }
        }
        if changed > 0 {
            self.count(first / BLOCK_PAGES);
        }
        Ok(changed)
    }
}

/// Publishes all of RAM once. Returns the number of changed words.
///
/// # Errors
/// Fails if flags cannot be read or published. Words that were published before the failure stay.
pub fn all(
    target: &mut impl Target,
    header: &HostHeader,
    flags: &mut impl Flags,
    words: &mut [u32; BATCH],
) -> Result<u32, Error> {
    let mut changed = 0;
    for (first, count) in batches(target.frames(), header) {
        changed += batch(target, first, flags, &mut words[..count])?;
    }
    Ok(changed)
}

/// Returns the page frames of RAM as (first, count): at most [`BATCH`] within one block.
pub fn batches(frames: u32, header: &HostHeader) -> impl Iterator<Item = (u32, usize)> + use<> {
    header.ranges.into_iter().flat_map(move |range| {
        let end = range.first.saturating_add(range.count).min(frames);
        let mut next = range.first;
        std::iter::from_fn(move || {
            let first = next;
            let boundary = (first / BATCH as u32 + 1).saturating_mul(BATCH as u32);
            next = end.min(boundary).max(first);
            (first < next).then(|| (first, (next - first) as usize))
        })
    })
}

/// Reads the flags of the page frames from `first` on into `words`, and publishes those that differ from the
/// published ones. Returns their number.
///
/// # Errors
/// Fails if flags cannot be read or published.
pub fn batch(
    target: &mut impl Target,
    first: u32,
    flags: &mut impl Flags,
    words: &mut [u32],
) -> Result<u32, Error> {
    flags.read(first, words)?;
    target.publish(first, words)
}
