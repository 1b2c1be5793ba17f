//! One pair of guests under one engine, and its statistics over time.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde::Serialize;

use super::super::LinuxGuest;
use super::super::series::{Log, Point, Series};

/// The guests' work after the boot. They read files from one disk, fill memory with identical content and verify it.
/// Then they change a part of it and verify it again.
const WORK: &str = "mount:/dev/vda:/mnt:ro,sum:/mnt/small,sum:/mnt/file,sum:/mnt/large,fill:8M:7,\
                    verify:10:500,change:8:8,verify:10:500,sleep:3000,poweroff";

/// The settings of an engine.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Engine {
    /// The name in the report.
    pub(crate) name: &'static str,
    /// The argument of `--sharing-engine`.
    pub(crate) settings: &'static str,
}

/// An engine's statistics over time.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct EngineRun {
    /// The engine.
    #[serde(flatten)]
    pub(super) engine: Engine,
    /// Time at which both guests had booted, in seconds since the start.
    pub(crate) booted_seconds: f64,
    /// Statistics until the first guest had done its work.
    pub(crate) points: Series,
}

/// Runs a pair of guests to its end.
pub(super) fn run(samepage: &Path, guest: &LinuxGuest, engine: Engine, cpu: f64) -> Result<EngineRun> {
    let mut command = Command::new(samepage);
    guest.run(&mut command, WORK, cpu);
    command.arg("--disk").arg(format!("path={},readonly", guest.disk.display()));
    command.args(["--sharing-engine", engine.settings]);
    let finished = Log::<Point>::run(&mut command)?;
    Ok(EngineRun { engine, booted_seconds: finished.booted_seconds, points: finished.series })
}
