//! Copying the kernel's flags into the hole: only what changed.

use std::sync::atomic::Ordering;

use samepage_hole::{BLOCK_PAGES, Hole, HostHeader};

use super::Error;
use super::pages::{BATCH, Flags};

// A batch lies within one block, whose counter tells of it.
const _: () = assert!((BLOCK_PAGES as usize).is_multiple_of(BATCH));

/// Goes over all RAM once. Returns how many words changed.
///
/// # Errors
/// That of reading flags; what was written until then stays.
pub fn all(
    hole: &Hole<'_>,
    header: &HostHeader,
    flags: &mut impl Flags,
    words: &mut [u32; BATCH],
) -> Result<u32, Error> {
    let mut changed = 0;
    for (first, count) in batches(hole, header) {
        changed += batch(hole, first, flags, &mut words[..count])?;
    }
    Ok(changed)
}

/// The page frames that are RAM, as (first, count): at most [`BATCH`] within one block.
pub fn batches(hole: &Hole<'_>, header: &HostHeader) -> impl Iterator<Item = (u32, usize)> {
    let frames = hole.frames();
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

/// Reads the flags of the page frames from `first` on into `words`, and writes those into the hole that
/// differ from what is there. Returns how many.
///
/// # Errors
/// That of reading flags.
pub fn batch(hole: &Hole<'_>, first: u32, flags: &mut impl Flags, words: &mut [u32]) -> Result<u32, Error> {
    flags.read(first, words)?;
    let mut changed = 0;
    for (published, &word) in hole.flags()[first as usize..].iter().zip(words.iter()) {
        if published.load(Ordering::Relaxed) != word {
            published.store(word, Ordering::Relaxed);
            changed += 1;
        }
    }
    if changed > 0 {
        hole.count(first / BLOCK_PAGES);
    }
    Ok(changed)
}
