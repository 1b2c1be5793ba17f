//! Kinds of numbers that several folders use. Each is a type of its own, so that none is taken for another.
//!
//! A page of a VM is a plain number, counted from the start of its RAM, and no other kind of number is plain. Runs of
//! pages are ranges that nearly everything iterates over, and stable Rust has no iteration over ranges of such types.

use std::fmt;
use std::ops::{Add, Sub};

/// A number that tables without knowledge of its kind keep.
pub(crate) trait Number: Copy + Eq {
    /// Takes a number for one of this kind, that it was before.
    fn new(number: u32) -> Self;

    /// Returns the plain number.
    fn number(self) -> u32;
}

/// Where an engine keeps a VM. Another VM may be there later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(usize);

impl Slot {
    /// A slot in which no VM is.
    pub(crate) const NONE: Self = Self(usize::MAX);

    pub(crate) const fn new(index: usize) -> Self {
        Self(index)
    }

    /// Returns the index of the slot among all of an engine.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0
    }

    /// Returns the slot behind it.
    pub(crate) const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of a page among the pages of all VMs of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GlobalPage(u32);

impl Number for GlobalPage {
    fn new(number: u32) -> Self {
        Self(number)
    }

    fn number(self) -> u32 {
        self.0
    }
}

impl GlobalPage {
    /// Returns the page that many pages behind, of the same VM.
    pub(crate) const fn offset(self, pages: u32) -> Self {
        Self(self.0 + pages)
    }

    /// Returns the page that many pages behind; `None` beyond the last number.
    pub(crate) fn checked_add(self, pages: u32) -> Option<Self> {
        self.0.checked_add(pages).map(Self)
    }

    /// Returns how many pages it is behind another that is not behind it.
    pub(crate) const fn behind(self, first: Self) -> u32 {
        self.0 - first.0
    }
}

/// Number of a frame in its store. Its offset in the memory file is that many pages. It says nothing about who owns the
/// frame: see [`store`](crate::frames::store).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame(u32);

impl Frame {
    /// Takes a number for one of a frame.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// Returns the plain number.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// Returns so many frames from this one on.
    pub(crate) fn run(self, count: u32) -> impl DoubleEndedIterator<Item = Self> + ExactSizeIterator + Clone {
        (self.0..self.0 + count).map(Self)
    }

    /// Returns the frame that many frames behind; `None` beyond the last number.
    pub(crate) fn checked_add(self, frames: u32) -> Option<Self> {
        self.0.checked_add(frames).map(Self)
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Add<u32> for Frame {
    type Output = Self;

    fn add(self, frames: u32) -> Self {
        Self(self.0 + frames)
    }
}

impl Sub<u32> for Frame {
    type Output = Self;

    fn sub(self, frames: u32) -> Self {
        Self(self.0 - frames)
    }
}

impl Sub for Frame {
    type Output = u32;

    fn sub(self, other: Self) -> u32 {
        self.0 - other.0
    }
}

impl Number for Frame {
    fn new(number: u32) -> Self {
        Self(number)
    }

    fn number(self) -> u32 {
        self.0
    }
}

/// The keyed digest of a page's content. Equal contents have equal digests; others may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(u32);

impl Digest {
    pub(crate) const fn new(number: u32) -> Self {
        Self(number)
    }

    pub(crate) const fn number(self) -> u32 {
        self.0
    }
}

impl fmt::LowerHex for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
