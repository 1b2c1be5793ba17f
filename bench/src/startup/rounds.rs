//! The memory of a process after its VMs have ended.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::Value;
use tempfile::TempDir;

use super::smaps::{self, Memory};
use crate::monitor::Running;
use crate::program;

/// VMs in a round.
const VMS: u32 = 32;
/// Memory of each VM, in MiB.
const GUEST_MIB: u32 = 32;
/// Pages that each VM uses. Two in five are identical in all VMs.
const PAGES: u32 = 2048;
/// Pages that must be merged in a round.
const MERGED: u64 = (VMS as u64 - 1) * PAGES as u64 / 5;
/// Time limit for merging in a round, and for the process to become idle.
const TIME_LIMIT: Duration = Duration::from_secs(120);
/// Time after which the process has freed its unused memory.
const REST: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(100);

/// Private memory of a process without VMs, in KiB.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct RoundsRow {
    /// Number of rounds.
    pub(crate) rounds: u32,
    /// VMs in each round.
    pub(crate) vms: u32,
    /// Memory before the first round.
    pub(crate) before_kib: u64,
    /// Memory after the last round.
    pub(crate) after_kib: u64,
}

/// Runs rounds of VMs that start, share and end in one process.
pub(super) fn measure(rounds: u32, samepage: &Path, kernel: &Path) -> Result<RoundsRow> {
    let folder = TempDir::new().context("creating a folder for the control socket")?;
    let socket = folder.path().join("socket");
    let config = folder.path().join("vms.toml");
    let line = format!("pages={PAGES} rounds=0 every=500 vm={{index}}");
    let vms = format!(
        "[[vms]]\nname = 'vm'\ncount = {VMS}\nkernel = '{}'\nmemory = '{GUEST_MIB}M'\ncmdline = '{line}'\n",
        kernel.display()
    );
    fs::write(&config, vms).context("writing the configuration of a round")?;
    let mut serve = Command::new(samepage);
    serve.args(["serve", "--sharing-cpu", "100", "--socket"]).arg(&socket);
    let process = Running::start(&mut serve)?;
    let ask = |arguments: &[&str]| {
        program::output(Command::new(samepage).args(arguments).arg("--socket").arg(&socket))
    };
    wait("the control socket", || Ok(socket.exists()))?;
    // As after a round: use the code that clients need.
    ask(&["sharing", "--json"])?;
    thread::sleep(REST);
    let before: Memory = smaps::of_samepage(process.id(), 0)?;
    let config = config.to_str().context("naming the configuration")?;
    for _ in 0..rounds {
        ask(&["create", config])?;
        wait("merging what guests have in common", || {
            let sharing: Value = serde_json::from_str(&ask(&["sharing", "--json"])?)?;
            Ok(sharing["statistics"]["pages_sharing"].as_u64().context("finding pages_sharing")? >= MERGED)
        })?;
        ask(&["rm", "--all"])?;
    }
    thread::sleep(REST);
    let after = smaps::of_samepage(process.id(), 0)?;
    Ok(RoundsRow { rounds, vms: VMS, before_kib: before.private_kib, after_kib: after.private_kib })
}

fn wait(what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIME_LIMIT;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("{what} takes more than {} s", TIME_LIMIT.as_secs());
        }
        thread::sleep(TICK);
    }
    Ok(())
}
