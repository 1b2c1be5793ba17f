//! A miss-ratio curve.

/// How near the curve's floor the working set is: it saves all but this part of what can be saved.
const NEAR: f64 = 0.05;

/// Which part of its misses a VM would still have with so many blocks of memory more. It starts at (0, 1)
/// and never rises; beyond its last point it stays where it is, at what no memory saves: first reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    points: Vec<(u64, f64)>,
}

impl Curve {
    /// From points of a curve that never rises, sizes rising.
    pub(super) fn new(points: Vec<(u64, f64)>) -> Self {
        debug_assert!(points.first() == Some(&(0, 1.0)));
        debug_assert!(points.is_sorted_by(|one, next| one.0 < next.0 && one.1 >= next.1));
        Self { points }
    }

    /// Sizes in blocks, with their parts of today's misses. In between the curve is straight.
    #[must_use]
    pub fn points(&self) -> &[(u64, f64)] {
        &self.points
    }

    /// The part of today's misses that is left with so many blocks more.
    #[must_use]
    pub fn miss_ratio(&self, blocks: u64) -> f64 {
        let next = self.points.partition_point(|&(size, _)| size <= blocks);
        let (size, ratio) = self.points[next - 1];
        match self.points.get(next) {
            Some(&(above, lower)) => {
                let part = (blocks - size) as f64 / (above - size) as f64;
                ratio + (lower - ratio) * part
            }
            None => ratio,
        }
    }

    /// The part of today's misses that no memory saves.
    #[must_use]
    pub fn floor(&self) -> f64 {
        self.points[self.points.len() - 1].1
    }

    /// The least number of blocks more that saves 95 % of the misses that memory can save; 0 where it saves
    /// none.
    #[must_use]
    pub fn working_set(&self) -> u64 {
        let floor = self.floor();
        let near = floor + (1.0 - floor) * NEAR;
        let reached = self.points.iter().position(|&(_, ratio)| ratio <= near);
        match reached {
            None | Some(0) => 0,
            Some(next) => {
                let ((size, ratio), (above, lower)) = (self.points[next - 1], self.points[next]);
                let part = if ratio > lower { (ratio - near) / (ratio - lower) } else { 1.0 };
                size + ((above - size) as f64 * part).ceil() as u64
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_working_set_saves_nearly_all_that_can_be_saved() {
        let curve = Curve::new(vec![(0, 1.0), (100, 0.4), (200, 0.2), (1000, 0.2)]);
        assert_eq!(curve.floor(), 0.2);
        // 0.2 + 0.8 * 0.05 = 0.24 lies four fifths on the way from 0.4 to 0.2.
        assert_eq!(curve.working_set(), 180);
        assert!((curve.miss_ratio(50) - 0.7).abs() < 1e-9 && curve.miss_ratio(5000) == 0.2);
        assert_eq!(Curve::new(vec![(0, 1.0)]).working_set(), 0);
        assert_eq!(Curve::new(vec![(0, 1.0), (9, 1.0)]).working_set(), 0);
    }
}
