//! The machine of the measurements.

use std::{fmt, fs};

use anyhow::{Context, Result};
use serde::Serialize;

use super::report::kernel;
use super::vms::kvm;

/// A description of the machine.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Host {
    /// Processors that this process may use.
    pub(crate) processors: usize,
    /// The kernel's release.
    pub(crate) kernel: String,
    /// The kind of KVM, in words.
    pub(crate) kvm: String,
    /// Load averages of the last minute, before and after the measurements. If other work uses more than a processor,
    /// times mean nothing.
    pub(crate) load: [f64; 2],
}

impl Host {
    /// Returns a description of this machine before the measurements.
    pub(crate) fn look() -> Result<Self> {
        let load = load_average()?;
        Ok(Self {
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel(),
            kvm: kvm::kind(),
            load: [load, load],
        })
    }

    /// Records the load after the measurements.
    pub(crate) fn look_again(&mut self) -> Result<()> {
        self.load[1] = load_average()?;
        Ok(())
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processors, kernel, kvm, load: [before, after] } = self;
        write!(f, "{processors} processors, Linux {kernel}, {kvm}; load {before:.2} before, {after:.2} after")
    }
}

fn load_average() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("asking for the load average")?;
    let first = text.split(' ').next().unwrap_or_default();
    first.parse().with_context(|| format!("reading the load average {text:?}"))
}
