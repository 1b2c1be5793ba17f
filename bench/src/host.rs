//! What is to be known of the machine that measured.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

use super::report::kernel;
use super::vms::kvm;

/// The machine, in general words.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Host {
    /// Processors that this process may use.
    pub(crate) processors: usize,
    /// The kernel's release.
    pub(crate) kernel: String,
    /// What kind of KVM it has, in words.
    pub(crate) kvm: String,
    /// Load averages of the last minute before and after the measurements: more than a processor's worth
    /// of other work makes times of no use.
    pub(crate) load: [f64; 2],
}

impl Host {
    /// This machine, before anything is measured.
    pub(crate) fn look() -> Result<Self> {
        let load = load_average()?;
        Ok(Self {
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel(),
            kvm: kvm::kind(),
            load: [load, load],
        })
    }

    /// Notes the load after everything has been measured.
    pub(crate) fn look_again(&mut self) -> Result<()> {
        self.load[1] = load_average()?;
        Ok(())
    }
}

fn load_average() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("asking for the load average")?;
    let first = text.split(' ').next().unwrap_or_default();
    first.parse().with_context(|| format!("reading the load average {text:?}"))
}
