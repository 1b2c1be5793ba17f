//! The guest's CPUID: the features that KVM supports on this host, with each vCPU's number and topology.
//!
//! Sources: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux'
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use samepage_spec::Cpu;

use super::features;
use super::topology::Topology;

const HYPERVISOR_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_STEAL_TIME: u32 = 1 << 5;
/// The TLB flush that uses the page of steal time.
const KVM_PV_TLB_FLUSH: u32 = 1 << 9;
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Frequency of the APIC bus that KVM emulates.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The values that differ between vCPUs, VMs and hosts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    /// Number of the vCPU, which is also its APIC id. Nothing else differs between the vCPUs of a VM.
    pub(crate) vcpu: u32,
    /// All vCPUs of the VM.
    pub(crate) topology: Topology,
    /// Frequency of the guest's time stamp counter in kHz, if KVM knows it.
    pub(crate) tsc_khz: Option<u32>,
    /// Whether KVM emulates the APIC timer's deadline mode.
    pub(crate) tsc_deadline: bool,
}

/// Returns the entries that all vCPUs of a VM have in common, made from the entries that KVM supports.
///
/// # Errors
/// Fails with the names of the features that this host lacks.
pub(crate) fn for_vm(supported: &CpuId, cpu: Cpu) -> Result<CpuId, String> {
    let mut entries = supported.as_slice().to_vec();
    let missing = features::missing(&entries, cpu);
    if !missing.is_empty() {
        return Err(format!(
            "guests cannot have the profile {cpu} on this host, since its KVM lacks {}; use --cpu host or a lower profile",
            missing.join(", ")
        ));
    }
    features::restrict(&mut entries, cpu);
    CpuId::from_entries(&entries).map_err(|error| format!("{error:?}"))
}

/// Returns the CPUID entries of one vCPU, made from those of its VM.
pub(crate) fn for_vcpu(supported: &CpuId, identity: Identity) -> Result<CpuId, String> {
    let Identity { vcpu, topology, tsc_khz, tsc_deadline } = identity;
    let mut entries = supported.as_slice().to_vec();
    for entry in &mut entries {
        topology.describe(vcpu, entry);
        announce_emulation(entry, tsc_deadline);
    }
    if let Some(tsc_khz) = tsc_khz {
        add_timing(&mut entries, tsc_khz);
    }
    if entries.len() > KVM_MAX_CPUID_ENTRIES {
        return Err(format!(
            "this host reports {} CPUID entries, KVM takes {KVM_MAX_CPUID_ENTRIES}",
            entries.len()
        ));
    }
    CpuId::from_entries(&entries).map_err(|error| format!("{error:?}"))
}

/// Tells of the hypervisor, and of the timer that KVM emulates on any processor.
fn announce_emulation(entry: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
    if entry.function == 1 {
        entry.ecx |= LEAF_1_ECX_HYPERVISOR;
        if tsc_deadline {
            entry.ecx |= LEAF_1_ECX_TSC_DEADLINE;
        }
    }
}

pub(super) fn set_bit(word: &mut u32, bit: u32, on: bool) {
    if on {
        *word |= bit;
    } else {
        *word &= !bit;
    }
}

/// Adds the leaf with the frequencies of TSC and APIC, so that a guest need not measure them.
fn add_timing(entries: &mut Vec<kvm_cpuid_entry2>, tsc_khz: u32) {
    // Guests find this leaf only through KVM's own leaves.
    let Some(signature) = entries.iter_mut().find(|e| e.function == HYPERVISOR_SIGNATURE) else { return };
    signature.eax = signature.eax.max(HYPERVISOR_TIMING);
    entries.retain(|entry| entry.function != HYPERVISOR_TIMING);
    entries.push(kvm_cpuid_entry2 {
        function: HYPERVISOR_TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
}

/// Removes the page of steal time from the features in KVM's own leaf.
pub(crate) fn without_steal_time(supported: &CpuId) -> Result<CpuId, String> {
    let mut entries = supported.as_slice().to_vec();
    for entry in entries.iter_mut().filter(|entry| entry.function == KVM_FEATURES) {
        entry.eax &= !(KVM_STEAL_TIME | KVM_PV_TLB_FLUSH);
    }
    CpuId::from_entries(&entries).map_err(|error| format!("{error:?}"))
}

/// Returns whether this kernel's KVM keeps the frame of the page of steal time and does not notice a remap:
/// Linux 5.6 to 5.15. Its writes would be lost after a merge of the page. Earlier kernels count as affected
/// too, because some of them have the same code.
pub(crate) fn holds_steal_time(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().ok());
    match (numbers.next().flatten(), numbers.next().flatten()) {
        (Some(major), Some(minor)) => (major, minor) < (5, 16),
        _ => false,
    }
}

/// Completes KVM's list of supported entries. A guest needs both levels of the topology leaf 0xb. Older
/// kernels list it once, or not at all below its second level.
pub(crate) fn complete(supported: &CpuId) -> Result<CpuId, String> {
    let mut entries = supported.as_slice().to_vec();
    for leaf in [0xb, 0x1f] {
        if entries.iter().any(|entry| entry.function == leaf) {
            entries.retain(|entry| entry.function != leaf);
            entries.extend((0..3).map(|index| kvm_cpuid_entry2 {
                function: leaf,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                ..Default::default()
            }));
        }
    }
    CpuId::from_entries(&entries).map_err(|error| format!("{error:?}"))
}

/// Returns the number of bits in guest physical addresses that guests can use: the processor's, or fewer if
/// KVM says so.
pub(crate) fn address_bits(supported: &CpuId) -> u32 {
    const SIZES: u32 = 0x8000_0008;
    /// The number for a processor that reports none.
    const LEAST: u32 = 36;
    let eax = supported.as_slice().iter().find(|entry| entry.function == SIZES).map_or(0, |entry| entry.eax);
    let told = [eax & 0xff, eax >> 16 & 0xff];
    told.into_iter().filter(|&bits| bits > 0).min().map_or(LEAST, |bits| bits.clamp(LEAST, 52))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn result(entries: &[kvm_cpuid_entry2], identity: Identity) -> Vec<kvm_cpuid_entry2> {
        let supported = complete(&CpuId::from_entries(entries).unwrap()).unwrap();
        for_vcpu(&supported, identity).unwrap().as_slice().to_vec()
    }

    fn fourth_of_six() -> Identity {
        Identity { vcpu: 3, topology: Topology::new(6, false), tsc_khz: Some(2_400_000), tsc_deadline: true }
    }

    #[test]
    fn a_vcpu_reads_its_own_number_everywhere() {
        let all = result(
            &[
                entry(1, 0, [0x906ea, 0x7700_0800, 0, 1 << 28]),
                entry(0xb, 0, [9, 9, 9, 9]),
                entry(0x8000_001e, 0, [9, 9, 9, 0]),
            ],
            fourth_of_six(),
        );
        let find =
            |function, index| *all.iter().find(|e| (e.function, e.index) == (function, index)).unwrap();
        assert_eq!(find(1, 0).ebx, 0x0306_0800);
        assert_eq!(find(1, 0).ecx, LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_TSC_DEADLINE);
        assert_eq!([0, 1, 2].map(|level| find(0xb, level).edx), [3; 3]);
        assert_eq!((find(0x8000_001e, 0).eax, find(0x8000_001e, 0).ebx), (3, 3));
    }

    #[test]
    fn steal_time_is_offered_where_kvm_follows_the_page() {
        for (release, holds) in [
            ("5.15.0-91-generic", true),
            ("5.4.0", true),
            ("4.19.0-26-amd64", true),
            ("5.16.0", false),
            ("6.1.0-31-amd64", false),
            ("6.18", false),
            ("unknown", false),
        ] {
            assert_eq!(holds_steal_time(release), holds, "{release}");
        }
        let supported = CpuId::from_entries(&[entry(0x4000_0001, 0, [u32::MAX, 0, 0, 0])]).unwrap();
        let told = without_steal_time(&supported).unwrap();
        assert_eq!(told.as_slice()[0].eax, !(1 << 5 | 1 << 9));
    }

    #[test]
    fn vcpus_of_a_vm_differ_in_their_ids_alone() {
        let leaves = [0, 1, 4, 7, 0xb, 0x1f, 0x8000_0001, 0x8000_0008, 0x8000_001d, 0x8000_001e];
        let host: Vec<_> = leaves.map(|leaf| entry(leaf, 0, [0x21; 4])).into();
        let supported = complete(&CpuId::from_entries(&host).unwrap()).unwrap();
        let vm = for_vm(&supported, Cpu::Host).unwrap();
        for smt in [false, true] {
            let of = |vcpu| {
                let identity = Identity { vcpu, topology: Topology::new(6, smt), ..fourth_of_six() };
                for_vcpu(&vm, identity).unwrap().as_slice().to_vec()
            };
            let first = of(0);
            for vcpu in 1..6 {
                for (one, other) in first.iter().zip(of(vcpu)) {
                    let mut other = other;
                    match other.function {
                        1 => other.ebx &= 0x00ff_ffff,
                        0xb | 0x1f => other.edx = 0,
                        0x8000_001e => (other.eax, other.ebx) = (0, other.ebx & !0xff),
                        _ => {}
                    }
                    assert_eq!(*one, other, "vCPU {vcpu}");
                }
            }
        }
    }

    #[test]
    fn a_profile_that_the_host_cannot_serve_is_refused_with_what_is_missing() {
        let host = CpuId::from_entries(&[entry(1, 0, [0, 0, 0, u32::MAX])]).unwrap();
        let refused = for_vm(&host, Cpu::V2).unwrap_err();
        assert!(
            refused.contains("x86-64-v2") && refused.contains("lacks syscall, nx, lm, sse3"),
            "{refused}"
        );
        assert!(for_vm(&host, Cpu::Host).is_ok());
    }

    #[test]
    fn the_narrower_of_both_widths_counts() {
        let bits =
            |eax| address_bits(&CpuId::from_entries(&[entry(0x8000_0008, 0, [eax, 0, 0, 0])]).unwrap());
        assert_eq!([0x3028, 0x30_3934, 0x0030_392e, 0].map(bits), [40, 48, 46, 36]);
        assert_eq!(address_bits(&CpuId::from_entries(&[]).unwrap()), 36);
    }

    #[test]
    fn timing_is_announced_behind_kvm_s_signature_and_only_there() {
        let with = result(&[entry(0x4000_0000, 0, [0x4000_0001, 0, 0, 0])], fourth_of_six());
        assert_eq!(with[0].eax, 0x4000_0010);
        assert_eq!((with[1].function, with[1].eax, with[1].ebx), (0x4000_0010, 2_400_000, 1_000_000));
        assert_eq!(result(&[entry(0, 0, [1, 0, 0, 0])], fourth_of_six()).len(), 1);
    }
}
