//! The common parts of all workloads: the user's options, KSM, progress, and the signals that end the run.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use samepage_process::signals::ShutdownSignals;

use super::args::SharingArgs;
use super::images::Images;
use super::ksm::Ksm;

/// Default number of rounds.
const ROUNDS: u32 = 5;

/// A run of the benchmark.
#[derive(Debug)]
pub(super) struct Bench {
    /// Whether to use small sizes.
    pub(super) quick: bool,
    /// Number of rounds of each measurement.
    pub(super) rounds: u32,
    /// Images that replace the synthetic ones.
    pub(super) images: Option<Images>,
    /// KSM, or the reason why it is missing and what to do.
    pub(super) ksm: Result<Ksm, String>,
    /// CPU time for each image, if the user gives it.
    pub(super) series_cpu: Option<Duration>,
    signals: ShutdownSignals,
    workload: String,
    terminal: bool,
}

/// A signal that asks the benchmark to end.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted; settings of the host are as before")]
pub(super) struct Interrupted {
    signal: i32,
}

impl Interrupted {
    /// Returns the exit status, in the form of shells for a signal.
    pub(super) fn status(self) -> u8 {
        128_u8.saturating_add(u8::try_from(self.signal).unwrap_or(0))
    }
}

impl Bench {
    /// Catches signals and saves KSM's settings, which are restored when this value is dropped.
    pub(super) fn new(args: &SharingArgs) -> Result<Self> {
        // Report errors in files before the measurements.
        let images = if args.series.is_empty() { None } else { Some(Images::open(&args.series)?) };
        // Before KSM is changed and before any thread starts.
        let signals = ShutdownSignals::catch().context("catch signals")?;
        let bench = Self {
            quick: args.quick,
            rounds: args.runs.unwrap_or(if args.quick { 1 } else { ROUNDS }),
            images,
            series_cpu: args.series_cpu_ms.map(Duration::from_millis),
            ksm: Ksm::open().map_err(|error| error.to_string()),
            signals,
            workload: String::new(),
            terminal: io::stderr().is_terminal(),
        };
        if let Err(reason) = &bench.ksm {
            samepage_process::tell::tell(reason);
        }
        Ok(bench)
    }

    /// Catches signals, for benchmarks without KSM.
    pub(super) fn without_ksm(quick: bool, rounds: u32) -> Result<Self> {
        Ok(Self {
            quick,
            rounds,
            images: None,
            series_cpu: None,
            ksm: Err("not measured".to_owned()),
            signals: ShutdownSignals::catch().context("catch signals")?,
            workload: String::new(),
            terminal: io::stderr().is_terminal(),
        })
    }

    /// Returns one value for a full run, and another for a quick one.
    pub(super) fn size<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Begins a workload.
    pub(super) fn begin(&mut self, workload: String) {
        self.workload = workload;
        // Without a terminal, a line for each workload is enough.
        if !self.terminal {
            let _ = writeln!(io::stderr(), "{}", self.workload);
        }
    }

    /// Prints what is being measured.
    pub(super) fn say(&self, what: impl Display) {
        if self.terminal {
            // A closed standard error needs no progress.
            let _ = write!(io::stderr(), "\r\x1b[K{}: {what}", self.workload);
        }
    }

    /// Removes the line about what is being measured.
    pub(super) fn end(&self) {
        if self.terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }

    /// Returns the figures of all rounds for both sides. The sides alternate in going first. A side without a
    /// figure returns `None`.
    ///
    /// # Errors
    /// Fails with the error of a side.
    pub(super) fn in_turns<A, B>(
        &self,
        what: &str,
        mut one: impl FnMut() -> Result<Option<A>>,
        mut other: impl FnMut() -> Result<Option<B>>,
    ) -> Result<(Vec<A>, Vec<B>)> {
        let (mut ones, mut others) = (Vec::new(), Vec::new());
        for round in 0..self.rounds {
            self.say(format_args!("{what}, round {} of {}", round + 1, self.rounds));
            if round % 2 == 0 {
                ones.extend(one()?);
                others.extend(other()?);
            } else {
                others.extend(other()?);
                ones.extend(one()?);
            }
        }
        Ok((ones, others))
    }

    /// Checks for signals. To be called at least several times a second.
    ///
    /// # Errors
    /// Fails with [`Interrupted`] after a signal.
    pub(super) fn check(&self) -> Result<()> {
        match self.signals.take() {
            Some(signal) => {
                self.end();
                Err(Interrupted { signal }.into())
            }
            None => Ok(()),
        }
    }

    /// Sleeps for this time.
    ///
    /// # Errors
    /// Fails like [`check`](Self::check).
    pub(super) fn rest(&self, time: Duration) -> Result<()> {
        const SLICE: Duration = Duration::from_millis(50);
        let end = Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(SLICE));
        }
    }
}
