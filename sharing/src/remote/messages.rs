//! What the engine and a worker say to each other. Numbers count pages from the start of a VM's RAM.

use std::cmp::Ordering;
use std::io;
use std::ops::Range;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::memory::guest::{Remap, Remapped, Rule, Seen, Source, SpaceError, WINDOW_PAGES};
use crate::numbers::{Digest, Frame};

/// What both ends must have in common: another number means other messages.
pub(crate) const VERSION: u32 = 2;
/// The longest message, in bytes.
pub(crate) const LONGEST: usize = 4096;
/// Pages of a message that asks for pages one by one.
pub(crate) const MOST_PAGES: u32 = WINDOW_PAGES;
/// VMs of a message about several.
pub(crate) const MOST_VMS: usize = 64;

/// Number of a VM among those of its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmIndex(pub(crate) u32);

impl VmIndex {
    /// The number that a worker gave to a VM.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }
}

/// What the engine says first. With it come two descriptors: the frames, to be read, and the buffer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Welcome {
    pub(crate) version: u32,
    /// Frames that the store has room for.
    pub(crate) frames: u32,
    /// Pages that it is worth to read at once.
    pub(crate) batch: u32,
    /// The key of digests.
    pub(crate) key: Vec<u8>,
}

/// What the worker answers, if it speaks the same version.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) version: u32,
}

/// A question about one VM.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) vm: VmIndex,
    pub(crate) question: Question,
}

/// What the engine asks or orders.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Question {
    Describe,
    Leave,
    /// Runs of private pages, into the buffer.
    Private(Range<u32>),
    /// Runs of parts of huge pages, into the buffer.
    Huge(Range<u32>),
    /// Words of the page map, into the buffer.
    Entries(Range<u32>),
    Split(u32),
    /// Pages, and whether their digests are wanted. Contents go into the buffer.
    Harvest(Vec<(u32, bool)>),
    /// A page, into the buffer.
    Read(u32),
    /// Compares the first page of the buffer with a page.
    Order(u32),
    Zeros(Range<u32>),
    /// Compares neighbours with frames, or with as many pages in the buffer.
    Matching {
        pages: Range<u32>,
        frame: Option<u32>,
        is_ahead: bool,
        distance: u32,
    },
    /// Pages, into the buffer.
    Contents(Range<u32>),
    Remap(Order),
    Restore(Range<u32>),
    Empty {
        pages: Range<u32>,
        mapped: bool,
    },
    /// The log's pages, into the buffer: pairs of the index of a word and the word. The log is read if nothing of it is
    /// left from the time before.
    Collect,
    /// The same for several VMs, as far as their logs can be read and there is room: for each a word with its number and
    /// the number of pairs, and then the pairs.
    CollectAll(Vec<VmIndex>),
    /// Arms the pages of the words in the buffer.
    Arm {
        first_word: u32,
        words: u32,
    },
    SetNoting(bool),
    /// Which of all VMs are at rest: their numbers, into the buffer.
    AtRest,
}

/// An order to map pages anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) first: u32,
    pub(crate) count: u32,
    /// The first frame; none stands for zeros.
    pub(crate) frame: Option<u32>,
    pub(crate) rule: Which,
    pub(crate) copies: u32,
}

/// Which pages an order is about: see [`Rule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Which {
    Identical,
    Any,
    Unwritten,
}

impl From<Remap> for Order {
    fn from(remap: Remap) -> Self {
        let frame = match remap.source {
            Source::Frames(frame) => Some(frame.number()),
            Source::Zeros => None,
        };
        let rule = match remap.rule {
            Rule::Identical => Which::Identical,
            Rule::Any => Which::Any,
            Rule::Unwritten => Which::Unwritten,
        };
        Self { first: remap.first, count: remap.count, frame, rule, copies: remap.copies }
    }
}

impl From<Order> for Remap {
    fn from(order: Order) -> Self {
        let rule = match order.rule {
            Which::Identical => Rule::Identical,
            Which::Any => Rule::Any,
            Which::Unwritten => Rule::Unwritten,
        };
        let source = order.frame.map_or(Source::Zeros, |frame| Source::Frames(Frame::new(frame)));
        Self { first: order.first, count: order.count, source, rule, copies: order.copies }
    }
}

/// What the worker answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Reply {
    /// The VM had lost memory when the answer was ready: what was read is nobody's content.
    pub(crate) lost: bool,
    pub(crate) answer: Answer,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// It was done.
    Done,
    /// The kernel refused, with this number.
    Failed(i32),
    /// No such VM, or the question makes no sense for it.
    Refused,
    Description(Description),
    /// How many.
    Number(u32),
    Truth(bool),
    /// So many runs are in the buffer, which are all up to a page. The kernel may have refused the rest.
    Runs {
        count: u32,
        up_to: u32,
        error: Option<i32>,
    },
    Seen(Vec<Sight>),
    Order(i8),
    /// So many of the first pages have another mapping. Writers never had to wait for longer than `longest`, in
    /// nanoseconds, since the VM's start.
    Remapped {
        pages: u32,
        trouble: Option<Trouble>,
        longest: u64,
    },
    /// So many pairs are in the buffer; there are more.
    Words {
        count: u32,
        more: bool,
    },
}

/// What a VM's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) pages: u32,
    pub(crate) address: u64,
    pub(crate) tells_huge: bool,
    /// Huge pages are wanted.
    pub(crate) is_huge: bool,
    /// There is a log of what was written.
    pub(crate) has_log: bool,
}

/// What a page held: see [`Seen`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Sight {
    Zero,
    Digest(u32),
    Content,
}

impl From<Seen> for Sight {
    fn from(seen: Seen) -> Self {
        match seen {
            Seen::Zero => Self::Zero,
            Seen::Digest(digest) => Self::Digest(digest.number()),
            Seen::Content => Self::Content,
        }
    }
}

impl From<Sight> for Seen {
    fn from(sight: Sight) -> Self {
        match sight {
            Sight::Zero => Self::Zero,
            Sight::Digest(digest) => Self::Digest(Digest::new(digest)),
            Sight::Content => Self::Content,
        }
    }
}

/// Why pages were not remapped: see [`SpaceError`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trouble {
    /// The guest must not run on.
    lost: bool,
    doing: Doing,
    first: u32,
    count: u32,
    error: i32,
}

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Doing {
    Protecting,
    Unprotecting,
    Remapping,
    Restoring,
}

/// The words for it.
const DOINGS: [(Doing, &str); 4] = [
    (Doing::Protecting, "write-protecting"),
    (Doing::Unprotecting, "unprotecting"),
    (Doing::Remapping, "remapping"),
    (Doing::Restoring, "taking off their frames"),
];

impl From<SpaceError> for Trouble {
    fn from(error: SpaceError) -> Self {
        let lost = matches!(error, SpaceError::Lost { .. });
        let (SpaceError::Refused { doing, first, count, error }
        | SpaceError::Lost { doing, first, count, error }) = error;
        let named = DOINGS.iter().find(|(_, words)| *words == doing);
        let doing = named.map_or(Doing::Remapping, |&(doing, _)| doing);
        Self { lost, doing, first, count, error: number_of(&error) }
    }
}

impl From<Trouble> for SpaceError {
    fn from(trouble: Trouble) -> Self {
        let Trouble { lost, doing, first, count, error } = trouble;
        let named = DOINGS.iter().find(|(known, _)| *known == doing);
        let doing = named.map_or("remapping", |&(_, words)| words);
        let error = io::Error::from_raw_os_error(error);
        if lost {
            Self::Lost { doing, first, count, error }
        } else {
            Self::Refused { doing, first, count, error }
        }
    }
}

impl Answer {
    /// What became of an order, and the longest window so far.
    pub(crate) fn remapped(remapped: Remapped, longest: Duration) -> Self {
        let longest = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
        Self::Remapped { pages: remapped.pages, trouble: remapped.error.map(Trouble::from), longest }
    }
}

impl From<io::Result<()>> for Answer {
    fn from(outcome: io::Result<()>) -> Self {
        outcome.map_or_else(|error| Self::Failed(number_of(&error)), |()| Self::Done)
    }
}

/// The kernel's number of an error.
pub(crate) fn number_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// The number of an order among contents.
pub(crate) fn sign(order: Ordering) -> i8 {
    order as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_messages_have_room() {
        let pages: Vec<_> = (0..MOST_PAGES).map(|page| (u32::MAX - page, true)).collect();
        let request = Request { vm: VmIndex(u32::MAX), question: Question::Harvest(pages) };
        let seen = vec![Sight::Digest(u32::MAX); MOST_PAGES as usize];
        let reply = Reply { lost: true, answer: Answer::Seen(seen) };
        let all = Question::CollectAll(vec![VmIndex(u32::MAX); MOST_VMS]);
        let all = Request { vm: VmIndex(u32::MAX), question: all };
        let mut room = [0; LONGEST];
        assert!(postcard::to_slice(&all, &mut room).is_ok());
        assert!(postcard::to_slice(&request, &mut room).is_ok());
        assert!(postcard::to_slice(&reply, &mut room).is_ok());
    }

    #[test]
    fn orders_and_errors_are_the_same_at_the_other_end() {
        for source in [Source::Zeros, Source::Frames(Frame::new(7))] {
            for rule in [Rule::Identical, Rule::Any, Rule::Unwritten] {
                let remap = Remap { first: 3, count: 5, source, rule, copies: 2 };
                let back = Remap::from(Order::from(remap));
                assert_eq!(format!("{remap:?}"), format!("{back:?}"));
            }
        }
        for (_, doing) in DOINGS {
            for lost in [false, true] {
                let error = io::Error::from_raw_os_error(libc::ENOMEM);
                let error = if lost {
                    SpaceError::Lost { doing, first: 1, count: 2, error }
                } else {
                    SpaceError::Refused { doing, first: 1, count: 2, error }
                };
                let text = error.to_string();
                assert_eq!(SpaceError::from(Trouble::from(error)).to_string(), text);
            }
        }
    }
}
