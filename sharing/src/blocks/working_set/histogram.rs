//! How often each depth was met, with older reads counted less.

use super::Curve;

/// Buckets in each doubling of the depth: a bucket is 3 % wide.
const FINE: u64 = 32;
const FINE_BITS: u32 = FINE.trailing_zeros();
/// Depths from 2 to the power of this on are one: more blocks than anything holds.
const LAST_BITS: u32 = 40;
const BUCKETS: usize = ((LAST_BITS - FINE_BITS) as usize + 1) * FINE as usize;
/// Weights are brought down once the latest has become this large.
const LARGE: f64 = 1e100;

#[derive(Debug)]
pub(super) struct Histogram {
    /// Weights of reads that so many more blocks would have saved.
    buckets: Vec<f64>,
    /// Of those in buckets and of those that nothing would have saved.
    sampled: f64,
    /// Of all.
    all: f64,
    /// Of the latest read: in place of making all others lighter.
    latest: f64,
    growth: f64,
}

impl Histogram {
    /// Weights fall to 1/e in so many reads.
    pub(super) fn new(window: u32) -> Self {
        let growth = (1.0 / f64::from(window)).exp();
        Self { buckets: vec![0.0; BUCKETS], sampled: 0.0, all: 0.0, latest: 1.0, growth }
    }

    /// There is one more read.
    pub(super) fn tick(&mut self) {
        self.latest *= self.growth;
        if self.latest > LARGE {
            let down = 1.0 / self.latest;
            self.buckets.iter_mut().for_each(|weight| *weight *= down);
            self.sampled *= down;
            self.all *= down;
            self.latest = 1.0;
        }
        self.all += self.latest;
    }

    /// There are so many more reads, none of which is followed.
    pub(super) fn pass(&mut self, reads: u32) {
        let mut left = reads;
        while left > 0 {
            // Beyond a power of 200 weights would leave what a number can hold.
            let step = left.min((200.0 / self.growth.ln()) as u32).max(1);
            self.latest *= self.growth.powf(f64::from(step - 1));
            self.all += self.latest * f64::from(step - 1);
            self.tick();
            left -= step;
        }
    }

    /// The read was one of those that are followed, of which there are this part; so many followed blocks
    /// lay above its own, if that was in the stack.
    pub(super) fn add(&mut self, above: Option<u32>, rate: f64) {
        let weight = self.latest / rate;
        self.sampled += weight;
        if let Some(above) = above {
            // One more than are above it.
            let size = (f64::from(above) / rate) as u64 + 1;
            self.buckets[bucket(size)] += weight;
        }
    }

    pub(super) fn misses(&self) -> f64 {
        self.all / self.latest
    }

    pub(super) fn curve(&self) -> Curve {
        let mut points = vec![(0, 1.0)];
        if self.all > 0.0 {
            // What the sample has too much or too little of is most likely few blocks read very often.
            let mut saved = self.all - self.sampled;
            let mut ratio = 1.0;
            for (index, &weight) in
                self.buckets.iter().enumerate().skip(1).filter(|(_, weight)| **weight > 0.0)
            {
                let from = end(index - 1);
                if points.last().is_some_and(|&(size, _)| size < from) {
                    points.push((from, ratio));
                }
                saved += weight;
                ratio = (1.0 - saved / self.all).clamp(0.0, ratio);
                points.push((end(index), ratio));
            }
        }
        Curve::new(points)
    }

    pub(super) fn bytes(&self) -> usize {
        self.buckets.capacity() * size_of::<f64>()
    }
}

/// Where a size counts.
fn bucket(size: u64) -> usize {
    let size = size.min((1 << LAST_BITS) - 1);
    if size < FINE {
        return size as usize;
    }
    let shift = size.ilog2() - FINE_BITS;
    ((u64::from(shift) + 1) * FINE + (size >> shift) - FINE) as usize
}

/// The largest size of a bucket.
fn end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < FINE {
        return bucket;
    }
    let shift = bucket / FINE - 1;
    ((bucket % FINE + FINE + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other() {
        for index in 0..BUCKETS {
            assert_eq!(bucket(end(index)), index);
            assert_eq!(bucket(end(index) + 1), (index + 1).min(BUCKETS - 1));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn older_reads_count_less() {
        let mut histogram = Histogram::new(100);
        let mut read = |above: Option<u32>, times: u32| {
            (0..times).for_each(|_| {
                histogram.tick();
                histogram.add(above, 1.0);
            });
            histogram.curve()
        };
        // Weights are brought down in between.
        read(Some(9), 30_000);
        let curve = read(None, 100);
        let left = (-1.0_f64).exp();
        assert!((curve.floor() - (1.0 - left)).abs() < 0.01, "{}", curve.floor());
        assert_eq!(curve.miss_ratio(9), 1.0);
        assert!((histogram.misses() - 100.0).abs() < 1.0);
    }
}
