//! A vector that grows by the piece, so that nobody has to wait for all of it to be copied.

use std::ops::{Index, IndexMut};

/// Values of a piece.
const PIECE: usize = 512;

/// The vector.
#[derive(Debug)]
pub(crate) struct Pieces<T> {
    pieces: Vec<Vec<T>>,
}

impl<T> Default for Pieces<T> {
    fn default() -> Self {
        Self { pieces: Vec::new() }
    }
}

impl<T> Pieces<T> {
    pub(crate) fn len(&self) -> usize {
        self.pieces.last().map_or(0, |last| (self.pieces.len() - 1) * PIECE + last.len())
    }

    pub(crate) fn push(&mut self, value: T) {
        if self.pieces.last().is_none_or(|last| last.len() == PIECE) {
            self.pieces.push(Vec::new());
        }
        if let Some(last) = self.pieces.last_mut() {
            // By a sixteenth: doubling would waste half of it at worst.
            if last.len() == last.capacity() {
                last.reserve_exact((last.len() / 16 + 16).min(PIECE - last.len()));
            }
            last.push(value);
        }
    }

    /// Bytes that it takes.
    pub(crate) fn bytes(&self) -> usize {
        let full = self.pieces.len().saturating_sub(1) * PIECE;
        let last = self.pieces.last().map_or(0, Vec::capacity);
        (full + last) * size_of::<T>() + self.pieces.capacity() * size_of::<Vec<T>>()
    }
}

impl<T> Index<usize> for Pieces<T> {
    type Output = T;

    fn index(&self, index: usize) -> &T {
        &self.pieces[index / PIECE][index % PIECE]
    }
}

impl<T> IndexMut<usize> for Pieces<T> {
    fn index_mut(&mut self, index: usize) -> &mut T {
        &mut self.pieces[index / PIECE][index % PIECE]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_where_they_are_while_others_come() {
        let mut pieces = Pieces::default();
        pieces.push(0_u64);
        (1..100).for_each(|value| pieces.push(value));
        assert!(pieces.bytes() < 150 * 8 + 200, "{} bytes", pieces.bytes());
        (100..PIECE as u64).for_each(|value| pieces.push(value));
        let first: *const u64 = &raw const pieces[0];
        (PIECE as u64..10_000).for_each(|value| pieces.push(value));
        assert!(std::ptr::eq(first, &raw const pieces[0]), "what is full is never copied");
        assert!((0..10_000).all(|index| pieces[index] == index as u64));
        pieces[700] = 7;
        assert_eq!((pieces[700], pieces.len()), (7, 10_000));
    }
}
