//! What is to be known of the machine that measured.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// The machine, in general words.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    /// Processors that this process may use.
    pub processors: usize,
    /// The kernel's release.
    pub kernel: String,
    /// The module behind `/dev/kvm`, as `kvm_intel`.
    pub kvm: String,
    /// Load averages of the last minute before and after the measurements: more than a processor's worth
    /// of other work makes times of no use.
    pub load: [f64; 2],
}

impl Host {
    /// This machine, before anything is measured.
    pub(super) fn look() -> Result<Self> {
        let release =
            fs::read_to_string("/proc/sys/kernel/osrelease").context("asking for the kernel's release")?;
        let modules = fs::read_dir("/sys/module").into_iter().flatten().flatten();
        let kvm = modules
            .filter_map(|entry| entry.file_name().into_string().ok())
            .find(|name| name.starts_with("kvm_"))
            .unwrap_or_else(|| "unknown".to_owned());
        let load = load_average()?;
        Ok(Self {
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: release.trim().to_owned(),
            kvm,
            load: [load, load],
        })
    }

    /// Notes the load after everything has been measured.
    pub(super) fn look_again(&mut self) -> Result<()> {
        self.load[1] = load_average()?;
        Ok(())
    }
}

fn load_average() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("asking for the load average")?;
    let first = text.split(' ').next().unwrap_or_default();
    first.parse().with_context(|| format!("reading the load average {text:?}"))
}

/// Fails unless this process may use KVM.
pub(super) fn check_kvm() -> Result<()> {
    let open = fs::File::options().read(true).write(true).open("/dev/kvm");
    open.map(drop).context(
        "opening /dev/kvm, which both monitors need; run as root or join the group that owns it \
         (sudo usermod -aG kvm $USER), and turn on virtualization if it does not exist",
    )
}
