//! Which processor features a guest is told of: those of the host without what cannot be virtualized here, or those of
//! a *profile*, which are the same on every host that can serve it.
//!
//! The profiles are the levels of the System V ABI for x86-64 (x86-64-v2 and so on), which compilers and distributions
//! know. To each level belong the features for kernels that all processors of the level have had, of Intel and of AMD.
//! A profile has no other features, whatever the host has, with two exceptions. Vendor, family and model are the
//! host's, as kernels choose their work-arounds for faults by them. So are the features that mitigate such faults.
//!
//! Sources: System V Application Binary Interface, AMD64 supplement, "Micro-Architecture Levels"; Intel SDM volume 2A,
//! CPUID; AMD APM volume 3, appendix E.

use kvm_bindings::kvm_cpuid_entry2;
use samepage_spec::Cpu;

use super::xsave;

/// A register of a CPUID entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    A,
    B,
    C,
    D,
}

use Register::{A, B, C, D};

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            A => entry.eax,
            B => entry.ebx,
            C => entry.ecx,
            D => entry.edx,
        }
    }
}

/// Where a feature's bit is: leaf, sub-leaf, register, bit.
type Place = (u32, u32, Register, u32);
/// A feature with the name that Linux gives it.
type Feature = (&'static str, Place);

/// Features of all 64-bit processors.
const BASE: &[Feature] = &[
    ("fpu", (1, 0, D, 0)),
    ("de", (1, 0, D, 2)),
    ("pse", (1, 0, D, 3)),
    ("tsc", (1, 0, D, 4)),
    ("msr", (1, 0, D, 5)),
    ("pae", (1, 0, D, 6)),
    ("mce", (1, 0, D, 7)),
    ("cx8", (1, 0, D, 8)),
    ("apic", (1, 0, D, 9)),
    ("sep", (1, 0, D, 11)),
    ("mtrr", (1, 0, D, 12)),
    ("pge", (1, 0, D, 13)),
    ("mca", (1, 0, D, 14)),
    ("cmov", (1, 0, D, 15)),
    ("pat", (1, 0, D, 16)),
    ("pse36", (1, 0, D, 17)),
    ("clflush", (1, 0, D, 19)),
    ("mmx", (1, 0, D, 23)),
    ("fxsr", (1, 0, D, 24)),
    ("sse", (1, 0, D, 25)),
    ("sse2", (1, 0, D, 26)),
    ("syscall", (0x8000_0001, 0, D, 11)),
    ("nx", (0x8000_0001, 0, D, 20)),
    ("lm", (0x8000_0001, 0, D, 29)),
];

const V2: &[Feature] = &[
    ("sse3", (1, 0, C, 0)),
    ("ssse3", (1, 0, C, 9)),
    ("cx16", (1, 0, C, 13)),
    ("sse4_1", (1, 0, C, 19)),
    ("sse4_2", (1, 0, C, 20)),
    ("popcnt", (1, 0, C, 23)),
    ("lahf_lm", (0x8000_0001, 0, C, 0)),
];

const V3: &[Feature] = &[
    ("fma", (1, 0, C, 12)),
    ("movbe", (1, 0, C, 22)),
    ("xsave", (1, 0, C, 26)),
    ("avx", (1, 0, C, 28)),
    ("f16c", (1, 0, C, 29)),
    ("bmi1", (7, 0, B, 3)),
    ("avx2", (7, 0, B, 5)),
    ("bmi2", (7, 0, B, 8)),
    ("abm", (0x8000_0001, 0, C, 5)),
    // For kernels.
    ("fsgsbase", (7, 0, B, 0)),
    ("smep", (7, 0, B, 7)),
    ("xsaveopt", (xsave::LEAF, 1, A, 0)),
    ("rdtscp", (0x8000_0001, 0, D, 27)),
];

const V4: &[Feature] = &[
    ("avx512f", (7, 0, B, 16)),
    ("avx512dq", (7, 0, B, 17)),
    ("avx512cd", (7, 0, B, 28)),
    ("avx512bw", (7, 0, B, 30)),
    ("avx512vl", (7, 0, B, 31)),
    // For kernels.
    ("smap", (7, 0, B, 20)),
    ("xsavec", (xsave::LEAF, 1, A, 1)),
    ("xgetbv1", (xsave::LEAF, 1, A, 2)),
];

/// What profiles have where the host's KVM has it: what KVM emulates on all hosts, what tells of the topology, and what
/// mitigates faults of the host's processor. The registers are in order.
const ALSO: &[(u32, u32, [u32; 4])] = &[
    // Signature and numbers; x2apic, tsc_deadline_timer, hypervisor; vme, ht.
    (1, 0, [u32::MAX, u32::MAX, 1 << 21 | 1 << 24 | 1 << 31, 1 << 1 | 1 << 28]),
    // The local APIC's timer runs always.
    (6, 0, [1 << 2, 0, 0, 0]),
    // The last sub-leaf; tsc_adjust; md_clear, spec_ctrl, stibp, flush_l1d, arch_capabilities, ssbd.
    (7, 0, [u32::MAX, 1 << 1, 0, 1 << 10 | 0b1111 << 26 | 1 << 31]),
    // psfd, ipred_ctrl, rrsba_ctrl, ddpd_u, bhi_ctrl, mcdt_no.
    (7, 2, [0, 0, 0, 0b11_1111]),
    // cmp_legacy, topoext; what AMD repeats of leaf 1.
    (0x8000_0001, 0, [u32::MAX, u32::MAX, 1 << 1 | 1 << 22, 0x0183_f3ff]),
    // Widths of addresses; ibpb, ibrs, stibp and their kinds, ssbd and its kinds, psfd, btc_no, ibpb_ret; numbers.
    (0x8000_0008, 0, [u32::MAX, 0x770f_d000, u32::MAX, 0]),
    // no_nested_data_bp, lfence_rdtsc, null_sel_clr_base, autoibrs, sbpb, ibpb_brtype, srso_no.
    (0x8000_0021, 0, [1 | 1 << 2 | 1 << 6 | 1 << 8 | 0b111 << 27, 0, 0, 0]),
];

/// Leaves without features: what the processor is, its caches, its topology, its clock, and the hypervisor's. They are
/// the host's in profiles too, with what is written into them for each vCPU.
const DESCRIPTIONS: [u32; 17] = [
    0,
    2,
    4,
    0xb,
    0x15,
    0x16,
    0x1f,
    0x8000_0000,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_001d,
    0x8000_001e,
    0x4000_0000,
    0x4000_0001,
];

/// Features that no guest is told of: what each register loses.
///
/// - Nested guests: for them KVM pins pages that sharing remaps (virtual-APIC page, posted-interrupt descriptor).
///   Without these bits, KVM refuses the instructions, and the MSRs that describe them (IA32_FEATURE_CONTROL's VMX bits,
///   IA32_VMX_*, EFER.SVME, VM_CR, VM_HSAVE_PA).
/// - Encrypted guests, and SGX, whose memory no host can copy.
/// - Processor Trace, which writes guest memory by itself.
/// - AMX, whose state KVM refuses to processes that do not ask for it.
const HIDDEN: &[(u32, u32, [u32; 4])] = &[
    (1, 0, [0, 0, 1 << 5 | 1 << 6, 0]),                           // vmx, smx
    (7, 0, [0, 1 << 2 | 1 << 25, 1 << 30, 1 << 22 | 0b11 << 24]), // sgx, intel_pt; sgx_lc; amx_bf16, tile, int8
    (7, 1, [1 << 21, 0, 0, 1 << 8]),                              // amx_fp16; amx_complex
    (0x8000_0001, 0, [0, 0, 1 << 2 | 1 << 12, 0]),                // svm, skinit
];
/// Leaves about such features: SGX, Processor Trace, AMX twice, SVM, SEV.
const HIDDEN_LEAVES: [u32; 6] = [0x12, 0x14, 0x1d, 0x1e, 0x8000_000a, 0x8000_001f];

/// The features of a profile, level by level; `None` for the host's.
fn levels(cpu: Cpu) -> Option<&'static [&'static [Feature]]> {
    const LEVELS: [&[Feature]; 4] = [BASE, V2, V3, V4];
    match cpu {
        Cpu::Host => None,
        Cpu::V2 => Some(&LEVELS[..2]),
        Cpu::V3 => Some(&LEVELS[..3]),
        Cpu::V4 => Some(&LEVELS),
    }
}

fn features(cpu: Cpu) -> impl Iterator<Item = &'static Feature> {
    levels(cpu).into_iter().flatten().copied().flatten()
}

/// Returns the features of a profile that this host's KVM cannot give to guests.
pub(super) fn missing(supported: &[kvm_cpuid_entry2], cpu: Cpu) -> Vec<&'static str> {
    let has = |(leaf, index, register, bit): Place| {
        let entry = supported.iter().find(|entry| (entry.function, entry.index) == (leaf, index));
        entry.is_some_and(|entry| register.of(entry) >> bit & 1 != 0)
    };
    features(cpu).filter(|(_, place)| !has(*place)).map(|(name, _)| *name).collect()
}

/// Restricts the features that KVM supports to those of a guest. The host has all of a profile's.
pub(super) fn restrict(entries: &mut Vec<kvm_cpuid_entry2>, cpu: Cpu) {
    for entry in entries.iter_mut() {
        let kept = kept(entry.function, entry.index, cpu);
        entry.eax &= kept[0];
        entry.ebx &= kept[1];
        entry.ecx &= kept[2];
        entry.edx &= kept[3];
    }
    let leaf_1 = entries.iter().find(|entry| entry.function == 1);
    let has_xsave = leaf_1.is_some_and(|entry| entry.ecx >> 26 & 1 != 0);
    let parts = match cpu {
        _ if !has_xsave => 0,
        Cpu::Host => !xsave::AMX,
        Cpu::V2 | Cpu::V3 => xsave::LEGACY | xsave::AVX,
        Cpu::V4 => xsave::LEGACY | xsave::AVX | xsave::AVX512,
    };
    xsave::restrict(entries, parts, cpu == Cpu::Host);
}

/// Returns the bits of an entry's registers that a guest is told of.
fn kept(leaf: u32, index: u32, cpu: Cpu) -> [u32; 4] {
    let at = |table: &[(u32, u32, [u32; 4])]| {
        let entry = table.iter().find(|entry| (entry.0, entry.1) == (leaf, index));
        entry.map_or([0; 4], |entry| entry.2)
    };
    if HIDDEN_LEAVES.contains(&leaf) {
        return [0; 4];
    }
    let hidden = at(HIDDEN);
    let mut kept = match cpu {
        Cpu::Host => [u32::MAX; 4],
        _ if DESCRIPTIONS.contains(&leaf) => [u32::MAX; 4],
        // Sizes and places of saved state.
        _ if leaf == xsave::LEAF && index != 1 => [u32::MAX; 4],
        _ if leaf == xsave::LEAF => [0, u32::MAX, 0, 0],
        _ => at(ALSO),
    };
    for (_, (_, _, register, bit)) in features(cpu).filter(|(_, place)| (place.0, place.1) == (leaf, index)) {
        kept[*register as usize] |= 1 << bit;
    }
    std::array::from_fn(|register| kept[register] & !hidden[register])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    const LEAVES: [(u32, u32); 16] = [
        (0, 0),
        (1, 0),
        (6, 0),
        (7, 0),
        (7, 1),
        (7, 2),
        (0xa, 0),
        (0x12, 0),
        (0x14, 0),
        (0x1d, 0),
        (0x8000_0001, 0),
        (0x8000_0007, 0),
        (0x8000_0008, 0),
        (0x8000_000a, 0),
        (0x8000_001f, 0),
        (0x8000_0021, 0),
    ];

    /// A host that has all features there are.
    fn greatest() -> Vec<kvm_cpuid_entry2> {
        let all = LEAVES.map(|(leaf, index)| entry(leaf, index, [u32::MAX; 4]));
        let state = [
            entry(0xd, 0, [0x6_02e7, 0x2b00, 0x2b00, 0]),
            entry(0xd, 1, [0x1f, 0x2b00, 0x1800, 0]),
            entry(0xd, 2, [0x100, 0x240, 0, 0]),
            entry(0xd, 5, [0x40, 0x440, 0, 0]),
            entry(0xd, 6, [0x200, 0x480, 0, 0]),
            entry(0xd, 7, [0x400, 0x680, 0, 0]),
            entry(0xd, 9, [0x8, 0xa80, 0, 0]),
            entry(0xd, 17, [0x40, 0xac0, 2, 0]),
        ];
        all.into_iter().chain(state).collect()
    }

    /// A host that has the features of a profile and no others.
    fn least(cpu: Cpu) -> Vec<kvm_cpuid_entry2> {
        let mut entries: Vec<_> = LEAVES.map(|(leaf, index)| entry(leaf, index, [0; 4])).into();
        let parts = |index| if index == 0 { [0xe7, 576, 576, 0] } else { [0; 4] };
        entries.extend([0, 1, 2, 5, 6, 7].map(|index| entry(xsave::LEAF, index, parts(index))));
        for (_, (leaf, index, register, bit)) in features(cpu) {
            let entry = entries.iter_mut().find(|e| (e.function, e.index) == (*leaf, *index)).unwrap();
            let word = match register {
                A => &mut entry.eax,
                B => &mut entry.ebx,
                C => &mut entry.ecx,
                D => &mut entry.edx,
            };
            *word |= 1 << bit;
        }
        entries
    }

    fn restricted(mut entries: Vec<kvm_cpuid_entry2>, cpu: Cpu) -> Vec<kvm_cpuid_entry2> {
        restrict(&mut entries, cpu);
        entries
    }

    fn registers(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> [u32; 4] {
        let entry = entries.iter().find(|entry| (entry.function, entry.index) == (leaf, index)).unwrap();
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn a_guest_with_the_host_s_features_lacks_only_what_cannot_be_virtualized() {
        let told = restricted(greatest(), Cpu::Host);
        assert_eq!(registers(&told, 1, 0), [u32::MAX, u32::MAX, !(1 << 5 | 1 << 6), u32::MAX]);
        let seven = registers(&told, 7, 0);
        assert_eq!(seven[1..], [!(1 << 2 | 1 << 25), !(1 << 30), !(1 << 22 | 1 << 24 | 1 << 25)]);
        let extended = registers(&told, 0x8000_0001, 0);
        assert_eq!((extended[2], extended[3]), (!(1 << 2 | 1 << 12), u32::MAX));
        for leaf in [0x12, 0x14, 0x1d, 0x8000_000a, 0x8000_001f] {
            assert_eq!(registers(&told, leaf, 0), [0; 4], "{leaf:#x}");
        }
        assert_eq!(registers(&told, 0xa, 0), [u32::MAX; 4]);
        let state = registers(&told, 0xd, 0);
        assert_eq!((state[0], state[2]), (0x2e7, 0xa88));
    }

    #[test]
    fn a_profile_is_the_same_on_unlike_hosts() {
        for cpu in [Cpu::V2, Cpu::V3, Cpu::V4] {
            assert_eq!(missing(&least(cpu), cpu), [""; 0]);
            let (least, greatest) = (restricted(least(cpu), cpu), restricted(greatest(), cpu));
            for (leaf, index) in LEAVES.into_iter().filter(|(leaf, _)| !DESCRIPTIONS.contains(leaf)) {
                let also = ALSO.iter().find(|entry| (entry.0, entry.1) == (leaf, index));
                let also = also.map_or([0; 4], |entry| entry.2);
                let [least, greatest] = [&least, &greatest].map(|told| registers(told, leaf, index));
                for register in 0..4 {
                    let differ = (least[register] ^ greatest[register]) & !also[register];
                    assert_eq!(differ, 0, "{cpu}: {leaf:#x}.{index}, register {register}");
                }
            }
            assert_eq!(registers(&least, 0xd, 1)[0], registers(&greatest, 0xd, 1)[0], "{cpu}");
        }
    }

    #[test]
    fn the_state_of_a_profile_is_that_of_its_features() {
        let of = |cpu| registers(&restricted(greatest(), cpu), 0xd, 0);
        assert_eq!(of(Cpu::V2), [0; 4]);
        assert_eq!((of(Cpu::V3)[0], of(Cpu::V3)[2]), (0b111, 0x340));
        assert_eq!((of(Cpu::V4)[0], of(Cpu::V4)[2]), (0b1110_0111, 0xa80));
    }

    #[test]
    fn a_host_without_a_profile_s_features_is_told_which_are_missing() {
        assert_eq!(missing(&least(Cpu::V3), Cpu::V2), [""; 0]);
        let lacks = ["avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl", "smap", "xsavec", "xgetbv1"];
        assert_eq!(missing(&least(Cpu::V3), Cpu::V4), lacks);
        assert_eq!(missing(&[], Cpu::V2).len(), BASE.len() + V2.len());
        assert_eq!(missing(&[], Cpu::Host), [""; 0]);
    }

    #[test]
    fn profiles_hide_what_guests_are_never_told() {
        for (leaf, index, hidden) in HIDDEN {
            for cpu in [Cpu::V2, Cpu::V3, Cpu::V4] {
                let kept = kept(*leaf, *index, cpu);
                assert!((0..4).all(|register| kept[register] & hidden[register] == 0), "{cpu} {leaf:#x}");
            }
        }
    }
}
