//! Lookahead: how far two runs are identical, ahead of a page that matched and behind it.
//!
//! Shared pages come in runs, so neighbours are compared before any is searched for. How far a run goes is not known
//! beforehand: what is compared at once doubles with each time that all of it matched.

use std::ops::Range;

use crate::engine::members::Member;
use crate::frames::store::FrameStore;
use crate::index::Effort;
use crate::memory::guest::{Bytes, Like, Neighbours};
use crate::numbers::Frame;

/// Neighbours that are compared first.
const FIRST: u32 = 2;

/// Which neighbours: those of higher or of lower numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Ahead,
    Behind,
}

impl Way {
    /// The neighbour of a page, or of a frame, at a distance. It is within the run.
    fn at(self, from: u32, distance: u32) -> u32 {
        match self {
            Self::Ahead => from + distance,
            Self::Behind => from - distance,
        }
    }

    /// The neighbours at so many distances, in order.
    fn range(self, from: u32, distance: u32, count: u32) -> Range<u32> {
        match self {
            Self::Ahead => from + distance..from + distance + count,
            Self::Behind => from + 1 - distance - count..from + 1 - distance,
        }
    }
}

/// Returns for how many distances from 1 to `most` a run goes on. `matching` tells how many distances from one on,
/// of so many, match without a gap.
pub(crate) fn run_length(most: u32, mut matching: impl FnMut(u32, u32) -> u32) -> u32 {
    let (mut length, mut next) = (0, FIRST);
    while length < most {
        let count = next.min(most - length);
        let matched = matching(length + 1, count);
        length += matched;
        if matched < count {
            break;
        }
        next *= 2;
    }
    length
}

/// A page, and a frame with its content.
#[derive(Clone, Copy)]
pub(crate) struct OnFrame<'a> {
    pub(crate) member: &'a Member,
    pub(crate) page: u32,
    pub(crate) store: &'a FrameStore,
    pub(crate) frame: Frame,
}

impl OnFrame<'_> {
    /// Returns how many neighbours of the page, `most` at most, have the contents of the frame's neighbours.
    pub(crate) fn matching(self, way: Way, most: u32, effort: &mut Effort) -> u32 {
        let Self { member, page, store, frame } = self;
        let most = match way {
            Way::Ahead => most.min(u32::MAX - frame.number()),
            Way::Behind => most.min(frame.number()),
        };
        run_length(most, |distance, count| {
            let is_possible = |&distance: &u32| {
                member.mergeable(way.at(page, distance))
                    && store.is_filled(Frame::new(way.at(frame.number(), distance)))
            };
            let count = (distance..distance + count).take_while(is_possible).count() as u32;
            let first = Frame::new(way.range(frame.number(), distance, count).start);
            compare(member, way, page, distance, count, Like::Frames(first), effort)
        })
    }
}

/// A page, and one of the same or another VM with its content.
#[derive(Clone, Copy)]
pub(crate) struct Twins<'a> {
    pub(crate) member: &'a Member,
    pub(crate) page: u32,
    pub(crate) other: &'a Member,
    pub(crate) twin: u32,
}

impl Twins<'_> {
    /// Returns how many neighbours of the page, `most` at most, have the contents of the twin's neighbours, and no
    /// zeros.
    pub(crate) fn matching(self, way: Way, most: u32, effort: &mut Effort) -> u32 {
        let Self { member, page, other, twin } = self;
        run_length(most, |distance, count| {
            let is_possible = |&distance: &u32| {
                member.mergeable(way.at(page, distance)) && other.mergeable(way.at(twin, distance))
            };
            let count = (distance..distance + count).take_while(is_possible).count() as u32;
            if count == 0 || other.space.lost() {
                return 0;
            }
            let mut matching = 0;
            other.space.memory().contents(way.range(twin, distance, count), &mut |bytes: Bytes<'_>| {
                matching = compare(member, way, page, distance, count, Like::Pages(bytes), effort);
            });
            matching
        })
    }

    /// Whether the two pages are identical, and hold more than zeros, as far as is known without protection.
    pub(crate) fn are_identical(self, effort: &mut Effort) -> bool {
        let mut matching = 0;
        self.other.space.memory().contents(self.twin..self.twin + 1, &mut |bytes| {
            matching = compare(self.member, Way::Ahead, self.page, 0, 1, Like::Pages(bytes), effort);
        });
        matching > 0
    }
}

fn compare(
    member: &Member,
    way: Way,
    page: u32,
    distance: u32,
    count: u32,
    like: Like<'_>,
    effort: &mut Effort,
) -> u32 {
    if count == 0 {
        return 0;
    }
    let pages = way.range(page, distance, count);
    let is_ahead = way == Way::Ahead;
    let matching = member.space.memory().matching(Neighbours { pages, like, is_ahead, distance });
    effort.comparisons += u64::from(matching + u32::from(matching < count));
    matching
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_where_a_neighbour_differs_or_the_most_is_reached() {
        for most in 0..40 {
            for matches in 0..40 {
                let mut asked = Vec::new();
                let length = run_length(most, |distance, count| {
                    assert!(count > 0 && distance + count <= most + 1);
                    asked.push(distance..distance + count);
                    count.min((matches + 1_u32).saturating_sub(distance))
                });
                assert_eq!(length, most.min(matches));
                assert!(asked.windows(2).all(|pair| pair[0].end == pair[1].start), "{asked:?}");
                assert!(asked.iter().map(|run| run.end - run.start).sum::<u32>() <= 2 * length + FIRST);
            }
        }
    }

    #[test]
    fn neighbours_are_in_order_whatever_the_way() {
        assert_eq!(Way::Ahead.range(10, 1, 3), 11..14);
        assert_eq!(Way::Behind.range(10, 1, 3), 7..10);
        for (way, distances) in [(Way::Ahead, [4, 5, 6]), (Way::Behind, [6, 5, 4])] {
            let range = way.range(10, 4, 3);
            assert!(range.eq(distances.map(|distance| way.at(10, distance))));
        }
        assert_eq!(Way::Behind.range(2, 1, 2), 0..2);
    }
}
