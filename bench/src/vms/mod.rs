//! Workloads on running VMs with the embedded demo guest. The engine works on its own threads, as usual.

mod breaks;
mod faults;
mod found;
pub(super) mod guests;
mod idle;
pub(super) mod kvm;
mod mapping;
mod share;
mod slowdown;
mod tlb;

use anyhow::Result;
use samepage_machine::Hypervisor;

pub(super) use breaks::measure as breaks;
pub(super) use faults::measure as faults;
pub(super) use found::measure as found;
pub(super) use idle::measure as idle;
pub(super) use share::measure as share;
pub(super) use slowdown::measure as slowdown;
pub(super) use tlb::measure as tlb;

use super::context::Bench;
use super::report::Section;

/// Measures on VMs. Without KVM, a section says so.
fn on_vms(
    bench: &Bench,
    what: &str,
    measure: impl FnOnce(&Bench, &Hypervisor) -> Result<Vec<Section>>,
) -> Result<Vec<Section>> {
    match Hypervisor::open() {
        Ok(hypervisor) => {
            samepage_host::host_limits::raise_open_files();
            measure(bench, &hypervisor)
        }
        Err(error) => {
            let mut section = Section::new(what, "samepage", "-");
            section.note(format!("not measured, since it needs virtual machines: {error}"));
            Ok(vec![section])
        }
    }
}
