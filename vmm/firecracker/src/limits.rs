//! Converts Firecracker's token buckets to a disk's limits per second.

use samepage_spec::{RateLimits, Size};

use super::model::{RateLimiter, TokenBucket};

impl RateLimiter {
    /// Returns the rates. The initial burst is ignored.
    pub(super) fn limits(self) -> RateLimits {
        let a_second = |bucket: Option<TokenBucket>| bucket.and_then(TokenBucket::a_second);
        RateLimits { rate: a_second(self.bandwidth).map(Size), iops: a_second(self.ops) }
    }

    /// Returns the limits after a change. Limits that the change does not name stay.
    pub(super) fn changed(self, change: Self) -> Self {
        Self { bandwidth: change.bandwidth.or(self.bandwidth), ops: change.ops.or(self.ops) }
    }
}

impl TokenBucket {
    /// Returns tokens per second, at least one. A bucket of size zero or with an immediate refill has no
    /// limit.
    fn a_second(self) -> Option<u64> {
        if self.size == 0 || self.refill_time == 0 {
            return None;
        }
        let rate = u128::from(self.size) * 1000 / u128::from(self.refill_time);
        Some(u64::try_from(rate).unwrap_or(u64::MAX).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(size: u64, refill_time: u64) -> Option<TokenBucket> {
        Some(TokenBucket { size, one_time_burst: None, refill_time })
    }

    #[test]
    fn buckets_become_rates() {
        let limits = |bandwidth, ops| RateLimiter { bandwidth, ops }.limits();
        assert_eq!(limits(None, None), RateLimits::default());
        assert_eq!(limits(bucket(1 << 20, 100), None).rate, Some(Size(10 << 20)));
        assert_eq!(limits(None, bucket(1, 60_000)).iops, Some(1));
        assert_eq!(limits(bucket(0, 0), bucket(5, 0)), RateLimits::default());
        assert_eq!(limits(bucket(u64::MAX, 1), None).rate, Some(Size(u64::MAX)));
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name() {
        let before = RateLimiter { bandwidth: bucket(1, 1), ops: bucket(2, 2) };
        let after = before.changed(RateLimiter { bandwidth: None, ops: bucket(0, 0) });
        assert_eq!(after.limits(), RateLimits { rate: Some(Size(1000)), iops: None });
    }
}
