//! Durations: counts by length, within 3%.

/// Buckets for each power of two.
const STEPS: usize = 1 << STEP_BITS;
const STEP_BITS: u32 = 5;
/// Lengths from 2 to this power on share a bucket.
const LONGEST_BITS: u32 = 40;
const BUCKETS: usize = STEPS * (LONGEST_BITS - STEP_BITS + 1) as usize;

/// Counts of lengths, in any unit.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: [u32; BUCKETS],
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], total: 0 }
    }
}

impl Histogram {
    /// Counts a duration.
    pub fn add(&mut self, length: u64) {
        let bucket = &mut self.counts[bucket(length)];
        *bucket = bucket.saturating_add(1);
        self.total += 1;
    }

    /// Adds the counts of another histogram.
    pub fn add_all(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count = count.saturating_add(*more);
        }
        self.total += other.total;
    }

    /// Returns a length that `percent` of the durations do not exceed, or 0 if there are none.
    pub fn percentile(&self, percent: u64) -> u64 {
        let rank = (self.total * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (bucket, &count) in self.counts.iter().enumerate() {
            seen += u64::from(count);
            if seen >= rank {
                return middle(bucket);
            }
        }
        0
    }
}

/// Returns the bucket. Short lengths have their own buckets; for longer ones the highest bits count.
fn bucket(length: u64) -> usize {
    let length = length.min((1 << LONGEST_BITS) - 1);
    if length < STEPS as u64 {
        return length as usize;
    }
    let shift = length.ilog2() - STEP_BITS;
    shift as usize * STEPS + (length >> shift) as usize
}

/// Returns the length in the middle of a bucket.
fn middle(bucket: usize) -> u64 {
    let shift = (bucket / STEPS).saturating_sub(1);
    let first = (bucket - shift * STEPS) as u64;
    (first << shift) + (1 << shift) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_come_back_within_3_percent() {
        for length in [0, 1, 31, 32, 33, 63, 64, 1000, 123_456_789, (1 << LONGEST_BITS) - 1] {
            let found = middle(bucket(length));
            assert!(found.abs_diff(length) * 32 <= length, "{length} became {found}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_lengths_that_occurred() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(50), 0);
        (0..98).for_each(|_| histogram.add(10));
        (0..2).for_each(|_| histogram.add(20));
        assert_eq!([1, 50, 98, 99, 100].map(|percent| histogram.percentile(percent)), [10, 10, 10, 20, 20]);
        let mut both = Histogram::default();
        both.add_all(&histogram);
        both.add_all(&histogram);
        assert_eq!([97, 98, 99].map(|percent| both.percentile(percent)), [10, 10, 20]);
    }
}
