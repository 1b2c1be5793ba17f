//! One pair of guests under one engine, and its statistics over time.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::super::LinuxGuest;
use crate::monitor::Running;

/// Memory of each guest, in MiB.
pub(super) const GUEST_MIB: u32 = 64;
const VMS: usize = 2;
/// What the guests do once they have booted: they read files from one disk, fill memory alike, look at it
/// again and again, change a part of it, and go on looking.
const WORK: &str = "mount:/dev/vda:/mnt:ro,sum:/mnt/small,sum:/mnt/file,sum:/mnt/large,fill:8M:7,\
                    verify:10:500,change:8:8,verify:10:500,sleep:3000,poweroff";
/// How the agent's lines begin.
const AGENT: &str = "samepage-agent: ";

/// How an engine works.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Engine {
    /// What it is called.
    pub(crate) name: &'static str,
    /// Its `--sharing-engine`.
    pub(crate) settings: &'static str,
}

/// An engine's statistics at one moment, of which those with the same names in `--stats` are a part.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Point {
    /// Since the start of the process, in seconds.
    #[serde(skip_deserializing)]
    pub(crate) seconds: f64,
    /// Pages that are mapped to another's frame: what is saved.
    pub(crate) pages_sharing: u64,
    /// Pages of zeros given back.
    pub(crate) zero_pages: u64,
    /// CPU time for sharing, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Pages mapped to frames so far.
    pub(crate) merges: u64,
    /// Of these, found as neighbours.
    pub(crate) merges_lookahead: u64,
    /// Entries of indexes visited so far.
    pub(crate) search_steps: u64,
    /// Pages compared in searches so far.
    pub(crate) comparisons: u64,
}

/// An engine's statistics over time.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Curve {
    /// The engine.
    #[serde(flatten)]
    pub(super) engine: Engine,
    /// When both guests had booted, in seconds since the start.
    pub(crate) booted_seconds: f64,
    /// Once a second, until a guest had done its work.
    pub(crate) points: Vec<Point>,
}

impl Curve {
    /// The statistics at a moment: those told last before it.
    pub(super) fn at(&self, seconds: f64) -> Point {
        let before = self.points.iter().take_while(|point| point.seconds <= seconds + 0.5);
        before.last().copied().unwrap_or_default()
    }

    /// The last statistics.
    pub(super) fn end(&self) -> Point {
        self.points.last().copied().unwrap_or_default()
    }
}

/// Runs a pair of guests to its end.
pub(super) fn run(samepage: &Path, guest: &LinuxGuest, engine: Engine, cpu: f64) -> Result<Curve> {
    let mut command = Command::new(samepage);
    guest.run(&mut command, VMS, GUEST_MIB, WORK, cpu);
    command.arg("--disk").arg(format!("path={},readonly", guest.disk.display()));
    command.args(["--sharing-engine", engine.settings]);
    let started = Instant::now();
    let mut process = Running::start(&mut command)?;
    let mut log = Log::default();
    while let Some(line) = process.next_line()? {
        log.take(&line, started.elapsed().as_secs_f64())?;
    }
    log.into_curve(engine)
}

/// What guests and monitor have told so far.
#[derive(Debug, Default)]
struct Log {
    booted: Vec<f64>,
    points: Vec<Point>,
    done: usize,
}

impl Log {
    fn take(&mut self, line: &str, seconds: f64) -> Result<()> {
        if line.starts_with('{') {
            let point: Point =
                serde_json::from_str(line).with_context(|| format!("reading the statistics {line:?}"))?;
            // What a guest that ends gives up is no result.
            if self.done == 0 {
                self.points.push(Point { seconds, ..point });
            }
        } else if let Some((_, said)) = line.split_once(AGENT) {
            ensure!(!said.contains(" failed: "), "a guest failed: {line}");
            match said.split(' ').next() {
                Some("ready") => self.booted.push(seconds),
                Some("done") => self.done += 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn into_curve(self, engine: Engine) -> Result<Curve> {
        if self.done < VMS {
            bail!("{} of {VMS} guests did all their work; see the messages above", self.done);
        }
        let booted_seconds = self.booted.into_iter().fold(0.0, f64::max);
        Ok(Curve { engine, booted_seconds, points: self.points })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENGINE: Engine = Engine { name: "an engine", settings: "" };

    fn statistics(sharing: u64) -> String {
        format!(
            r#"{{"time_seconds":1,"pages_sharing":{sharing},"zero_pages":1,"cpu_seconds":0.5,"merges":9,
            "merges_lookahead":8,"search_steps":7,"comparisons":6,"vms":[]}}"#
        )
    }

    #[test]
    fn a_log_becomes_a_curve_that_ends_with_the_work() {
        let mut log = Log::default();
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
        let curve = log.into_curve(ENGINE).unwrap();
        assert_eq!(curve.booted_seconds, 1.7);
        assert_eq!((curve.at(0.0).pages_sharing, curve.at(1.2).pages_sharing), (0, 5));
        assert_eq!((curve.end().pages_sharing, curve.points.len()), (50, 2));
    }

    #[test]
    fn guests_that_fail_or_stop_short_are_told() {
        let mut log = Log::default();
        assert!(log.take("vm-0: samepage-agent: mount failed: /dev/vda: no such device", 1.0).is_err());
        assert!(log.take("{\"merges\":1}", 1.0).is_err());
        log.take("vm-0: samepage-agent: done ran=10 failed=0", 1.0).unwrap();
        assert!(log.into_curve(ENGINE).is_err());
    }
}
