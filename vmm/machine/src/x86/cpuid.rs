//! The guest's CPUID: the features that KVM supports on this host, with each vCPU's number and topology.
//!
//! Sources: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux'
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

const HYPERVISOR_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_STEAL_TIME: u32 = 1 << 5;
/// The TLB flush that uses the page of steal time.
const KVM_PV_TLB_FLUSH: u32 = 1 << 9;
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const LEAF_1_ECX_VMX: u32 = 1 << 5;
const LEAF_1_ECX_SMX: u32 = 1 << 6;
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF_1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF_1_EDX_MULTITHREADING: u32 = 1 << 28;
const EXTENDED_1_ECX_SVM: u32 = 1 << 2;
const EXTENDED_1_ECX_SKINIT: u32 = 1 << 12;
/// Features of AMD's virtualization.
const SVM_FEATURES: u32 = 0x8000_000a;
/// AMD's encryption of guest memory.
const ENCRYPTION: u32 = 0x8000_001f;
/// Frequency of the APIC bus that KVM emulates.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The values that differ between vCPUs, VMs and hosts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Topology {
    /// Number of the vCPU, which is also its APIC id.
    pub(crate) vcpu: u32,
    /// Number of vCPUs: cores of one package, one thread each.
    pub(crate) vcpus: u32,
    /// Frequency of the guest's time stamp counter in kHz, if KVM knows it.
    pub(crate) tsc_khz: Option<u32>,
    /// Whether KVM emulates the APIC timer's deadline mode.
    pub(crate) tsc_deadline: bool,
}

/// Returns the CPUID entries of one vCPU, made from the entries that KVM supports.
pub(crate) fn for_vcpu(supported: &CpuId, topology: Topology) -> Result<CpuId, String> {
    let mut entries = supported.as_slice().to_vec();
    for entry in &mut entries {
        set_topology(entry, topology);
        hide_virtualization(entry);
    }
    if let Some(tsc_khz) = topology.tsc_khz {
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

fn set_topology(entry: &mut kvm_cpuid_entry2, topology: Topology) {
    let Topology { vcpu, vcpus, tsc_deadline, .. } = topology;
    // The number of bits that distinguish the cores of the package.
    let core_bits = vcpus.next_power_of_two().trailing_zeros();
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | vcpus.min(255) << 16 | (vcpu & 0xff) << 24;
            entry.ecx |= LEAF_1_ECX_HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= LEAF_1_ECX_TSC_DEADLINE;
            }
            set_bit(&mut entry.edx, LEAF_1_EDX_MULTITHREADING, vcpus > 1);
        }
        // Caches on Intel and on AMD: levels 1 and 2 belong to a core, level 3 to the package.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharers = if level >= 3 { vcpus } else { 1 };
            entry.eax = (entry.eax & !(0xfff << 14)) | (sharers - 1).min(0xfff) << 14;
            if entry.function == 4 {
                entry.eax = (entry.eax & 0x03ff_ffff) | (vcpus - 1).min(0x3f) << 26;
            }
        }
        0xb | 0x1f => {
            let (shift, processors, kind) = match entry.index {
                0 => (0, 1, 1),             // threads of a core
                1 => (core_bits, vcpus, 2), // cores of the package
                _ => (0, 0, 0),
            };
            entry.eax = shift;
            entry.ebx = processors;
            entry.ecx = (entry.index & 0xff) | kind << 8;
            entry.edx = vcpu;
        }
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | core_bits << 12 | (vcpus - 1).min(0xff),
        0x8000_001e => {
            entry.eax = vcpu;
            entry.ebx = vcpu & 0xff; // one thread in this core
            entry.ecx = 0; // one node
        }
        _ => {}
    }
}

/// Prevents nested guests. For them, KVM pins pages (virtual-APIC page, posted-interrupt descriptor) that
/// sharing remaps. Without these bits, KVM refuses the instructions, and the MSRs that describe them
/// (IA32_FEATURE_CONTROL's VMX bits, IA32_VMX_*, EFER.SVME, VM_CR, VM_HSAVE_PA).
fn hide_virtualization(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => entry.ecx &= !(LEAF_1_ECX_VMX | LEAF_1_ECX_SMX),
        0x8000_0001 => entry.ecx &= !(EXTENDED_1_ECX_SVM | EXTENDED_1_ECX_SKINIT),
        SVM_FEATURES | ENCRYPTION => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

fn set_bit(word: &mut u32, bit: u32, on: bool) {
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

    fn result(entries: &[kvm_cpuid_entry2], topology: Topology) -> Vec<kvm_cpuid_entry2> {
        let supported = complete(&CpuId::from_entries(entries).unwrap()).unwrap();
        for_vcpu(&supported, topology).unwrap().as_slice().to_vec()
    }

    const FOURTH_OF_SIX: Topology =
        Topology { vcpu: 3, vcpus: 6, tsc_khz: Some(2_400_000), tsc_deadline: true };

    #[test]
    fn a_vcpu_reads_its_own_number_everywhere() {
        let all = result(
            &[
                entry(1, 0, [0x906ea, 0x7700_0800, 0, LEAF_1_EDX_MULTITHREADING]),
                entry(0xb, 0, [9, 9, 9, 9]),
                entry(0x8000_001e, 0, [9, 9, 9, 0]),
            ],
            FOURTH_OF_SIX,
        );
        let find =
            |function, index| *all.iter().find(|e| (e.function, e.index) == (function, index)).unwrap();
        assert_eq!(find(1, 0).ebx, 0x0306_0800);
        assert_eq!(find(1, 0).ecx, LEAF_1_ECX_HYPERVISOR | LEAF_1_ECX_TSC_DEADLINE);
        assert_eq!(
            (find(0xb, 0).eax, find(0xb, 0).ebx, find(0xb, 0).ecx, find(0xb, 0).edx),
            (0, 1, 0x100, 3)
        );
        assert_eq!(
            (find(0xb, 1).eax, find(0xb, 1).ebx, find(0xb, 1).ecx, find(0xb, 1).edx),
            (3, 6, 0x201, 3)
        );
        assert_eq!((find(0xb, 2).ebx, find(0xb, 2).ecx), (0, 2));
        assert_eq!((find(0x8000_001e, 0).eax, find(0x8000_001e, 0).ebx), (3, 3));
    }

    #[test]
    fn a_single_vcpu_is_no_multiprocessor() {
        let alone = Topology { vcpu: 0, vcpus: 1, tsc_khz: None, tsc_deadline: false };
        let all = result(
            &[
                entry(1, 0, [0, 0x1234_0800, 0, LEAF_1_EDX_MULTITHREADING]),
                entry(4, 0, [0xfc00_4121, 0, 0, 0]),
                entry(4, 3, [0xfc1f_c163, 0, 0, 0]),
            ],
            alone,
        );
        assert_eq!((all[0].ebx, all[0].edx), (0x0001_0800, 0));
        assert_eq!((all[1].eax, all[2].eax), (0x0000_0121, 0x0000_0163));
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
    fn no_vcpu_is_told_of_virtualization() {
        let all = [entry(1, 0, [0, 0, u32::MAX, 0]), entry(0x8000_0001, 0, [1, 2, u32::MAX, 3])];
        let features = [entry(0x8000_000a, 0, [1, 0x8000, 0, 0xffff]), entry(0x8000_001f, 0, [3, 4, 5, 6])];
        for vcpu in 0..3 {
            let topology = Topology { vcpu, vcpus: 3, ..FOURTH_OF_SIX };
            let told = result(&[&all[..], &features].concat(), topology);
            assert_eq!(told[0].ecx, !(1 << 5 | 1 << 6));
            assert_eq!((told[1].eax, told[1].ecx, told[1].edx), (1, !(1 << 2 | 1 << 12), 3));
            assert!(told[2..4].iter().all(|e| (e.eax, e.ebx, e.ecx, e.edx) == (0, 0, 0, 0)), "{told:?}");
        }
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
        let with = result(&[entry(0x4000_0000, 0, [0x4000_0001, 0, 0, 0])], FOURTH_OF_SIX);
        assert_eq!(with[0].eax, 0x4000_0010);
        assert_eq!((with[1].function, with[1].eax, with[1].ebx), (0x4000_0010, 2_400_000, 1_000_000));
        assert_eq!(result(&[entry(0, 0, [1, 0, 0, 0])], FOURTH_OF_SIX).len(), 1);
    }
}
