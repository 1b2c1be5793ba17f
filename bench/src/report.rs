//! The results: sections of measurements. Each measurement has the figures of two sides, their ratio, and a
//! goal.

use std::fs;
use std::time::Duration;

use serde::Serialize;

use super::context::Bench;

/// A run's results.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Release of the host's kernel.
    pub(super) kernel: String,
    /// Processors that the process may use.
    pub(super) processors: usize,
    /// Whether small sizes were used.
    pub(super) quick: bool,
    /// Number of rounds of each measurement.
    pub(super) rounds: u32,
    /// Duration of the run, in seconds.
    pub(super) seconds: f64,
    /// The reason why KSM was not measured; `None` if it was.
    pub(super) without_ksm: Option<String>,
    pub(super) sections: Vec<Section>,
    /// Workloads that could not be measured.
    pub(super) failures: Vec<Failure>,
}

impl Report {
    pub(super) fn new(bench: &Bench, sections: Vec<Section>, failures: Vec<Failure>, time: Duration) -> Self {
        Self {
            kernel: kernel(),
            processors: std::thread::available_parallelism().map_or(1, Into::into),
            quick: bench.quick,
            rounds: bench.rounds,
            seconds: time.as_secs_f64(),
            without_ksm: bench.ksm.as_ref().err().cloned(),
            sections,
            failures,
        }
    }
}

/// Returns the release of the host's kernel.
pub(super) fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim_end().to_owned()
}

/// A workload that could not be measured.
#[derive(Debug, Serialize)]
pub(super) struct Failure {
    workload: String,
    reason: String,
}

impl Failure {
    /// Records and prints the failure of a workload.
    pub(super) fn new(workload: &str, error: &anyhow::Error) -> Self {
        let reason = samepage_process::tell::causes(error);
        samepage_process::tell::tell(format_args!("workload {workload}: {reason}"));
        Self { workload: workload.to_owned(), reason }
    }
}

/// Related measurements.
#[derive(Debug, Serialize)]
pub(super) struct Section {
    /// Name of the workload.
    workload: String,
    /// A description of the measurement.
    pub(super) title: String,
    /// The names of the first and the second side.
    pub(super) sides: [String; 2],
    pub(super) measurements: Vec<Measurement>,
    /// Curves over time.
    pub(super) curves: Option<Curves>,
    /// Further notes.
    pub(super) notes: Vec<String>,
}

/// Several curves.
#[derive(Debug, Serialize)]
pub(super) struct Curves {
    /// The unit of the points.
    pub(super) unit: &'static str,
    /// The meaning of a curve's index.
    pub(super) of: &'static str,
    pub(super) names: Vec<String>,
    /// The points for each name, equally many.
    pub(super) points: Vec<Vec<f64>>,
}

impl Section {
    /// Returns a section that compares these two sides.
    pub(super) fn new(title: impl Into<String>, ours: impl Into<String>, other: impl Into<String>) -> Self {
        Self {
            workload: String::new(),
            title: title.into(),
            sides: [ours.into(), other.into()],
            measurements: Vec::new(),
            curves: None,
            notes: Vec::new(),
        }
    }

    /// Returns the section with the name of its workload.
    pub(super) fn of(self, workload: &str) -> Self {
        Self { workload: workload.to_owned(), ..self }
    }

    pub(super) fn push(&mut self, measurement: Measurement) {
        self.measurements.push(measurement);
    }

    pub(super) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}

/// A measurement of two sides.
#[derive(Debug, Serialize)]
pub(super) struct Measurement {
    pub(super) name: String,
    /// The unit of both figures.
    pub(super) unit: &'static str,
    pub(super) ours: Option<Figure>,
    pub(super) other: Option<Figure>,
    /// samepage's figure divided by the other's. It is the median of the rounds' ratios if the rounds are
    /// pairs, otherwise the ratio of the medians.
    pub(super) ratio: Option<f64>,
    pub(super) goal: Option<Goal>,
    /// Whether the goal is reached; `None` without a goal or without figures.
    pub(super) met: Option<bool>,
    pub(super) note: Option<String>,
}

impl Measurement {
    /// Returns a measurement from the rounds' figures of both sides. Either may have none.
    pub(super) fn new(name: impl Into<String>, unit: &'static str, ours: &[f64], other: &[f64]) -> Self {
        let (figure, others) = (Figure::of(ours), Figure::of(other));
        let ratio = match (&figure, &others) {
            _ if ours.len() == other.len() => {
                let ratios: Vec<_> = ours
                    .iter()
                    .zip(other)
                    .filter(|(_, other)| **other > 0.0)
                    .map(|(ours, other)| ours / other)
                    .collect();
                Figure::of(&ratios).map(|ratio| ratio.median)
            }
            (Some(ours), Some(other)) if other.median > 0.0 => Some(ours.median / other.median),
            _ => None,
        };
        Self {
            name: name.into(),
            unit,
            ours: figure,
            other: others,
            ratio,
            goal: None,
            met: None,
            note: None,
        }
    }

    /// Returns the measurement with a goal.
    pub(super) fn goal(self, goal: Goal) -> Self {
        let met = match goal {
            Goal::RatioAtMost(most) => self.ratio.map(|ratio| ratio <= most),
            Goal::RatioAtLeast(least) => self.ratio.map(|ratio| ratio >= least),
            Goal::AtMost(most) => self.ours.as_ref().map(|ours| ours.median <= most),
            Goal::AtLeast(least) => self.ours.as_ref().map(|ours| ours.median >= least),
        };
        Self { goal: Some(goal), met, ..self }
    }

    pub(super) fn note(self, note: impl Into<String>) -> Self {
        Self { note: Some(note.into()), ..self }
    }
}

/// A figure from several rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Figure {
    pub(super) median: f64,
    /// First and third quartile.
    pub(super) quartiles: [f64; 2],
    /// Number of rounds.
    pub(super) rounds: usize,
}

impl Figure {
    /// Returns the figure, or `None` without samples.
    pub(super) fn of(samples: &[f64]) -> Option<Self> {
        let mut samples = samples.to_vec();
        samples.sort_by(f64::total_cmp);
        let last = samples.len().checked_sub(1)?;
        let [low, median, high] = [0.25, 0.5, 0.75].map(|part| {
            let place = last as f64 * part;
            let (below, above) = (samples[place.floor() as usize], samples[place.ceil() as usize]);
            below + (above - below) * place.fract()
        });
        Some(Self { median, quartiles: [low, high], rounds: samples.len() })
    }
}

/// The goal of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    /// The ratio is at most this.
    RatioAtMost(f64),
    /// The ratio is at least this.
    RatioAtLeast(f64),
    /// samepage's figure is at most this.
    AtMost(f64),
    /// samepage's figure is at least this.
    AtLeast(f64),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_of_pairs_and_judged() {
        let slow_second_round = Measurement::new("x", "µs", &[1.0, 10.0, 2.0], &[2.0, 20.0, 4.0]);
        assert_eq!(slow_second_round.ratio, Some(0.5));
        assert_eq!(slow_second_round.goal(Goal::RatioAtMost(0.5)).met, Some(true));
        assert_eq!(Measurement::new("x", "µs", &[3.0, 3.0], &[4.0]).ratio, Some(0.75));
        let alone = Measurement::new("x", "µs", &[3.0], &[]);
        assert_eq!(alone.ratio, None);
        assert_eq!(alone.goal(Goal::RatioAtMost(1.0)).met, None);
        assert_eq!(Measurement::new("x", "µs", &[3.0], &[]).goal(Goal::AtMost(2.0)).met, Some(false));
        assert_eq!(Measurement::new("x", "µs", &[0.0], &[0.0]).ratio, None);
    }

    #[test]
    fn quartiles_lie_between_samples() {
        let figure = Figure::of(&[5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert_eq!((figure.median, figure.quartiles, figure.rounds), (3.0, [2.0, 4.0], 5));
        assert_eq!(Figure::of(&[]), None);
    }
}
