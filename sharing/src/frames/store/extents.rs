//! Runs of free places, found by place and by length: each search takes a few steps however many there are.

use std::collections::{BTreeMap, BTreeSet};

/// Extents of the class that the wanted length itself is in, of which some are too short, that are tried.
const TRIED: usize = 8;

/// Free extents, none of which touches another.
#[derive(Debug)]
pub(crate) struct Extents {
    /// Start to length.
    lengths: BTreeMap<u32, u32>,
    /// The starts of extents by length: those of class n are from 2 to the power of n frames on.
    classes: [BTreeSet<u32>; u32::BITS as usize],
    frames: u32,
}

impl Default for Extents {
    fn default() -> Self {
        Self { lengths: BTreeMap::new(), classes: std::array::from_fn(|_| BTreeSet::new()), frames: 0 }
    }
}

fn class(len: u32) -> usize {
    len.ilog2() as usize
}

impl Extents {
    /// Adds frames, none of which is in an extent. Returns the extent that they are part of now.
    pub(crate) fn add(&mut self, mut start: u32, count: u32) -> (u32, u32) {
        self.frames += count;
        let mut end = start + count;
        if let Some((&before, &len)) = self.lengths.range(..start).next_back()
            && before + len == start
        {
            self.unlink(before, len);
            start = before;
        }
        if let Some(&len) = self.lengths.get(&end) {
            self.unlink(end, len);
            end += len;
        }
        self.link(start, end - start);
        (start, end - start)
    }

    /// Takes frames that are in one extent. Returns whether they were.
    pub(crate) fn take(&mut self, frame: u32, count: u32) -> bool {
        let Some((&start, &len)) = self.lengths.range(..=frame).next_back() else { return false };
        let end = start + len;
        let Some(taken) = frame.checked_add(count).filter(|&taken| taken <= end) else { return false };
        self.unlink(start, len);
        self.link(start, frame - start);
        self.link(taken, end - taken);
        self.frames -= count;
        true
    }

    /// Where an extent begins that has room for so many frames, as far as is easily found.
    pub(crate) fn room_for(&self, count: u32) -> Option<u32> {
        self.within(u32::MAX, count)
    }

    /// As [`room_for`](Self::room_for), all of it before frame `end`.
    pub(crate) fn within(&self, end: u32, count: u32) -> Option<u32> {
        let fits = |&start: &u32| self.length_before(start, end) >= count;
        let certain = self.classes[class(count)..].iter().skip(usize::from(!count.is_power_of_two()));
        let certain = certain.filter_map(|starts| starts.first().copied().filter(fits)).min();
        certain.or_else(|| self.classes[class(count)].range(..end).take(TRIED).copied().find(fits))
    }

    /// One of the longest extents before frame `end`, as far as it lies before.
    pub(crate) fn longest_within(&self, end: u32) -> Option<(u32, u32)> {
        let whole = |start: u32| (start, self.length_before(start, u32::MAX));
        let before = |&(start, len): &(u32, u32)| start < end && start + len <= end;
        let first = |starts: &BTreeSet<u32>| starts.first().copied().map(whole).filter(before);
        let longest = self.classes.iter().rev().find_map(first);
        let last = self.lengths.range(..end).next_back();
        let last = last.map(|(&start, _)| (start, self.length_before(start, end)));
        // The last is cut off by `end`, or is in a class with others.
        last.filter(|&(_, len)| longest.is_none_or(|(_, other)| len > other)).or(longest)
    }

    fn length_before(&self, start: u32, end: u32) -> u32 {
        self.lengths.get(&start).copied().unwrap_or(0).min(end.saturating_sub(start))
    }

    /// Takes up to `most` frames of the first extent from `from` on.
    pub(crate) fn take_next(&mut self, from: u32, most: u32) -> Option<(u32, u32)> {
        let (&start, &len) = self.lengths.range(from..).next()?;
        let count = len.min(most);
        self.take(start, count);
        Some((start, count))
    }

    /// Frames in all extents.
    pub(crate) fn frames(&self) -> u32 {
        self.frames
    }

    /// The extents that begin at a place or behind it.
    pub(crate) fn from(&self, place: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.lengths.range(place..).map(|(&start, &len)| (start, len))
    }

    /// All extents.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.lengths.iter().map(|(&start, &len)| (start, len))
    }

    fn link(&mut self, start: u32, len: u32) {
        if len > 0 {
            self.lengths.insert(start, len);
            self.classes[class(len)].insert(start);
        }
    }

    fn unlink(&mut self, start: u32, len: u32) {
        self.lengths.remove(&start);
        self.classes[class(len)].remove(&start);
    }

    /// Bytes that the metadata takes, about.
    pub(crate) fn bytes(&self) -> usize {
        // A map's leaves are two thirds full.
        self.lengths.len() * (size_of::<(u32, u32)>() + size_of::<u32>()) * 3 / 2
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn extents_are_a_set_of_frames(changes in prop::collection::vec((0..4_u8, 0..300_u32, 1..40_u32), 0..80)) {
            let mut extents = Extents::default();
            let mut model: BTreeSet<u32> = BTreeSet::new();
            for (change, frame, count) in changes {
                let frames = || frame..frame + count;
                match change {
                    0 | 1 if frames().all(|frame| !model.contains(&frame)) => {
                        let (start, len) = extents.add(frame, count);
                        model.extend(frames());
                        prop_assert!((start..start + len).all(|frame| model.contains(&frame)));
                    }
                    2 => {
                        let all = frames().all(|frame| model.contains(&frame));
                        prop_assert_eq!(extents.take(frame, count), all);
                        if all {
                            frames().for_each(|frame| assert!(model.remove(&frame)));
                        }
                    }
                    _ => {
                        let next = extents.take_next(frame, count);
                        if let Some((start, len)) = next {
                            prop_assert!(start >= frame && len <= count);
                            (start..start + len).for_each(|frame| assert!(model.remove(&frame)));
                        }
                    }
                }
                prop_assert!(extents.iter().flat_map(|(start, len)| start..start + len).eq(model.iter().copied()));
                prop_assert!(extents.iter().zip(extents.iter().skip(1)).all(|(one, next)| one.0 + one.1 < next.0));
                prop_assert_eq!(extents.frames() as usize, model.len());
                let room = |start: u32, count: u32| (start..start + count).all(|frame| model.contains(&frame));
                for end in [50, 200, u32::MAX] {
                    let found = extents.within(end, count);
                    prop_assert!(found.is_none_or(|start| room(start, count) && start + count <= end));
                    // Whatever has room for twice as much is found.
                    let ample = extents.iter().any(|(start, len)| len.min(end.saturating_sub(start)) >= 2 * count && start + len <= end);
                    prop_assert!(found.is_some() || !ample);
                    let longest = extents.longest_within(end);
                    prop_assert_eq!(longest.is_some(), model.first().is_some_and(|&first| first < end));
                    prop_assert!(longest.is_none_or(|(start, len)| len > 0 && room(start, len) && start + len <= end));
                }
            }
        }
    }
}
