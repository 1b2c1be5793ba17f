//! The processors of a VM.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Upper limit for the vCPUs of a VM. Their APIC ids are their numbers, from 0, and of the 8 bits of such an id the
/// value 255 means all processors; one more is left for the IO-APIC.
pub const MAX_VCPUS: u32 = 254;
/// The number of threads of a core of a VM with simultaneous multithreading.
pub const THREADS_OF_A_CORE: u32 = 2;

/// The processor features that guests are told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = CpuSpec))]
pub enum Cpu {
    /// All that the host's processor and its KVM have.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// The level x86-64-v2: SSE4.2, as in processors since 2009.
    #[serde(rename = "x86-64-v2")]
    #[cfg_attr(feature = "clap", value(name = "x86-64-v2"))]
    V2,
    /// The level x86-64-v3: AVX2, as in processors since 2013.
    #[serde(rename = "x86-64-v3")]
    #[cfg_attr(feature = "clap", value(name = "x86-64-v3"))]
    V3,
    /// The level x86-64-v4: AVX-512.
    #[serde(rename = "x86-64-v4")]
    #[cfg_attr(feature = "clap", value(name = "x86-64-v4"))]
    V4,
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cpu::Host => "host",
            Cpu::V2 => "x86-64-v2",
            Cpu::V3 => "x86-64-v3",
            Cpu::V4 => "x86-64-v4",
        })
    }
}

/// The number of vCPUs of a VM whose description has none.
pub(crate) fn one_vcpu() -> u32 {
    1
}

/// Returns the values that are out of range: the fields, and the reasons.
pub(crate) fn faults(vcpus: u32, smt: bool) -> Vec<(&'static str, String)> {
    if !(1..=MAX_VCPUS).contains(&vcpus) {
        vec![("vcpus", format!("{vcpus} vCPUs: a VM has 1 to {MAX_VCPUS}"))]
    } else if smt && vcpus > 1 && !vcpus.is_multiple_of(THREADS_OF_A_CORE) {
        let reason = format!(
            "{vcpus} vCPUs are not whole cores of {THREADS_OF_A_CORE} threads; use an even number of vCPUs, or no smt"
        );
        vec![("smt", reason)]
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_have_the_same_names_as_shown_and_in_json() {
        for cpu in [Cpu::Host, Cpu::V2, Cpu::V3, Cpu::V4] {
            assert_eq!(serde_json::to_value(cpu).unwrap(), cpu.to_string());
        }
    }

    #[test]
    fn vcpus_fill_whole_cores_within_the_limit() {
        for (vcpus, smt) in [(1, false), (1, true), (2, true), (3, false), (254, false), (254, true)] {
            assert_eq!(faults(vcpus, smt), [], "{vcpus} {smt}");
        }
        for (vcpus, smt, field) in [(0, false, "vcpus"), (255, true, "vcpus"), (3, true, "smt")] {
            let found = faults(vcpus, smt);
            assert_eq!(found.iter().map(|fault| fault.0).collect::<Vec<_>>(), [field], "{found:?}");
        }
    }
}
