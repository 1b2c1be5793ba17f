//! The statistics of guests over time, read from the output of `samepage run --stats -`.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::VMS;
use crate::chart::Curve;
use crate::monitor::Running;

/// The start of the agent's lines.
const AGENT: &str = "samepage-agent: ";

/// Statistics of the process at one moment, with the names of `--stats`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Point {
    /// Time since the start of the process, in seconds.
    #[serde(skip_deserializing)]
    pub(crate) seconds: f64,
    /// Pages that sharing saves: further pages mapped to frames.
    pub(crate) pages_sharing: u64,
    /// Pages of zeros, and free pages, whose memory is freed.
    pub(crate) zero_pages: u64,
    /// Memory of the process, in bytes.
    pub(crate) resident_bytes: u64,
    /// CPU time for sharing, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Scanned pages so far.
    pub(crate) pages_scanned: u64,
    /// Pages mapped to frames so far.
    pub(crate) merges: u64,
    /// Merges of neighbours of matching pages.
    pub(crate) merges_lookahead: u64,
    /// Merged pages that were written since.
    pub(crate) breaks: u64,
    /// Visited entries of indexes so far.
    pub(crate) search_steps: u64,
    /// Pages compared in searches so far.
    pub(crate) comparisons: u64,
}

impl AsRef<Point> for Point {
    fn as_ref(&self) -> &Point {
        self
    }
}

/// Statistics over time: one point a second, until the first guest has done its work.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Series(pub(super) Vec<Point>);

impl Series {
    /// Returns the last statistics before a time, which is in seconds since the start.
    pub(super) fn at(&self, seconds: f64) -> Point {
        let before = self.0.iter().take_while(|point| point.seconds <= seconds + 0.5);
        before.last().copied().unwrap_or_default()
    }

    /// Returns the last statistics.
    pub(super) fn end(&self) -> Point {
        self.0.last().copied().unwrap_or_default()
    }

    /// Returns the pages that sharing saves, on average over time.
    pub(super) fn mean_sharing(&self) -> f64 {
        let sum: u64 = self.0.iter().map(|point| point.pages_sharing).sum();
        sum as f64 / self.0.len().max(1) as f64
    }

    /// Returns the curve of the pages that sharing saves.
    pub(super) fn curve(&self, name: &'static str) -> Curve<'static> {
        Curve {
            name,
            points: self.0.iter().map(|point| (point.seconds, point.pages_sharing as f64)).collect(),
        }
    }
}

/// The result of one run of guests.
#[derive(Debug)]
pub(super) struct Finished<S> {
    /// Time at which all guests had booted, in seconds since the start.
    pub(super) booted_seconds: f64,
    /// Statistics until the first guest had done its work.
    pub(super) series: Series,
    /// The last sample.
    pub(super) last: S,
}

/// The output of guests and engine so far. `S` is a line of statistics, which contains a [`Point`].
#[derive(Debug)]
pub(super) struct Log<S> {
    booted: Vec<f64>,
    series: Series,
    last: Option<S>,
    /// Number of guests that have done their work.
    done: usize,
}

impl<S> Default for Log<S> {
    fn default() -> Self {
        Self { booted: Vec::new(), series: Series::default(), last: None, done: 0 }
    }
}

impl<S: DeserializeOwned + AsRef<Point>> Log<S> {
    /// Runs a command that starts [`VMS`] guests, until they have ended.
    pub(super) fn run(command: &mut Command) -> Result<Finished<S>> {
        let started = Instant::now();
        let mut process = Running::start(command)?;
        let mut log = Self::default();
        while let Some(line) = process.next_line()? {
            log.take(&line, started.elapsed().as_secs_f64())?;
        }
        log.finish()
    }

    /// Adds a line that was printed at this time, in seconds since the start.
    pub(super) fn take(&mut self, line: &str, seconds: f64) -> Result<()> {
        if line.starts_with('{') {
            let sample: S =
                serde_json::from_str(line).with_context(|| format!("reading the statistics {line:?}"))?;
            // Pages that an ending guest frees are no result of sharing.
            if self.done == 0 {
                self.series.0.push(Point { seconds, ..*sample.as_ref() });
                self.last = Some(sample);
            }
        } else if let Some((_, text)) = line.split_once(AGENT) {
            ensure!(!text.contains(" failed: "), "a guest failed: {line}");
            match text.split(' ').next() {
                Some("ready") => self.booted.push(seconds),
                Some("done") => self.done += 1,
                _ => {}
            }
        }
        Ok(())
    }

    /// Returns the result.
    ///
    /// # Errors
    /// Fails if a guest has not done all its work, or if there are no statistics.
    pub(super) fn finish(self) -> Result<Finished<S>> {
        if self.done < VMS {
            bail!("{} of {VMS} guests did all their work; see the messages above", self.done);
        }
        let last = self.last.context("samepage printed no statistics")?;
        let booted_seconds = self.booted.into_iter().fold(0.0, f64::max);
        Ok(Finished { booted_seconds, series: self.series, last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics(sharing: u64) -> String {
        format!(
            r#"{{"time_seconds":1,"pages_sharing":{sharing},"zero_pages":1,"resident_bytes":4096,"cpu_seconds":0.5,
            "pages_scanned":20,"merges":9,"merges_lookahead":8,"breaks":2,"search_steps":7,"comparisons":6,"vms":[]}}"#
        )
    }

    #[test]
    fn a_series_ends_with_the_work() {
        let mut log = Log::<Point>::default();
        for (seconds, line) in [
            (1.0, statistics(5).as_str()),
            (1.5, "vm-0: samepage-agent: ready uptime_ms=1000"),
            (1.7, "vm-1: samepage-agent: ready uptime_ms=1200"),
            (2.0, &statistics(50)),
            (2.5, "vm-1: samepage-agent: done ran=10 failed=0"),
            (3.0, &statistics(2)),
            (3.1, "vm-0: samepage-agent: done ran=10 failed=0"),
        ] {
            log.take(line, seconds).unwrap();
        }
        let Finished { booted_seconds, series, last } = log.finish().unwrap();
        assert_eq!(booted_seconds, 1.7);
        assert_eq!((series.at(0.0).pages_sharing, series.at(1.2).pages_sharing), (0, 5));
        assert_eq!((series.end().pages_sharing, series.0.len(), series.mean_sharing()), (50, 2, 27.5));
        assert_eq!(last.pages_sharing, 50);
    }

    #[test]
    fn guests_that_fail_or_stop_early_are_errors() {
        let mut log = Log::<Point>::default();
        assert!(log.take("vm-0: samepage-agent: mount failed: /dev/vda: no such device", 1.0).is_err());
        assert!(log.take("{\"merges\":1}", 1.0).is_err());
        log.take(&statistics(5), 1.0).unwrap();
        log.take("vm-0: samepage-agent: done ran=10 failed=0", 1.0).unwrap();
        assert!(log.finish().is_err());
    }

    #[test]
    fn a_run_without_statistics_is_an_error() {
        let mut log = Log::<Point>::default();
        for vm in 0..VMS {
            log.take(&format!("vm-{vm}: samepage-agent: done ran=10 failed=0"), 1.0).unwrap();
        }
        assert!(log.finish().unwrap_err().to_string().contains("no statistics"));
    }
}
