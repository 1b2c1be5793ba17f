//! What a vCPU is told of its place among the others: its APIC id, the threads of its core, the cores of the package,
//! and who shares a cache with it.
//!
//! All vCPUs are in one package. A core has one thread, or two with simultaneous multithreading. The number of a vCPU
//! is its APIC id, whose lowest bits are the thread's number in its core and whose other bits are the core's.
//!
//! Sources: Intel SDM volume 2A, CPUID, leaves 1, 4, 0xb and 0x1f; AMD APM volume 3, appendix E, functions 8000_0001,
//! 8000_0008, 8000_001d and 8000_001e.

use kvm_bindings::kvm_cpuid_entry2;
use samepage_spec::THREADS_OF_A_CORE;

use super::cpuid::set_bit;

const LEAF_1_EDX_MULTITHREADING: u32 = 1 << 28;
/// A package of AMD's has several logical processors.
const EXTENDED_1_ECX_LEGACY_CORES: u32 = 1 << 1;
/// AMD's newer form of the topology, which says no more than the older ones.
const EXTENDED_TOPOLOGY: u32 = 0x8000_0026;
/// Caches from this level on belong to the package, the others to a core.
const PACKAGE_CACHE: u32 = 3;

/// The vCPUs of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Topology {
    vcpus: u32,
    threads_of_a_core: u32,
}

impl Topology {
    /// Returns the topology of that many vCPUs: whole cores, as the description has made sure.
    pub(crate) fn new(vcpus: u32, smt: bool) -> Self {
        Self { vcpus, threads_of_a_core: if smt && vcpus > 1 { THREADS_OF_A_CORE } else { 1 } }
    }

    /// Returns the number of vCPUs.
    pub(crate) fn vcpus(self) -> u32 {
        self.vcpus
    }

    fn cores(self) -> u32 {
        self.vcpus / self.threads_of_a_core
    }

    /// The number of bits of an APIC id that distinguish the threads of a core.
    fn thread_bits(self) -> u32 {
        self.threads_of_a_core.trailing_zeros()
    }

    /// The number of bits of an APIC id that distinguish the vCPUs.
    fn bits(self) -> u32 {
        self.thread_bits() + self.cores().next_power_of_two().trailing_zeros()
    }

    /// Writes the place of a vCPU into one of its CPUID entries.
    pub(crate) fn describe(self, vcpu: u32, entry: &mut kvm_cpuid_entry2) {
        let Self { vcpus, threads_of_a_core } = self;
        match entry.function {
            1 => {
                entry.ebx = (entry.ebx & 0x0000_ffff) | vcpus.min(255) << 16 | (vcpu & 0xff) << 24;
                set_bit(&mut entry.edx, LEAF_1_EDX_MULTITHREADING, vcpus > 1);
            }
            // Caches on Intel and on AMD.
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharers = if level >= PACKAGE_CACHE { vcpus } else { threads_of_a_core };
                entry.eax = (entry.eax & !(0xfff << 14)) | (sharers - 1).min(0xfff) << 14;
                if entry.function == 4 {
                    entry.eax = (entry.eax & 0x03ff_ffff) | (self.cores() - 1).min(0x3f) << 26;
                }
            }
            0xb | 0x1f => {
                let (shift, processors, kind) = match entry.index {
                    0 => (self.thread_bits(), threads_of_a_core, 1), // threads of a core
                    1 => (self.bits(), vcpus, 2),                    // all of the package
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = processors;
                entry.ecx = (entry.index & 0xff) | kind << 8;
                entry.edx = vcpu;
            }
            0x8000_0001 if vcpus == 1 => entry.ecx &= !EXTENDED_1_ECX_LEGACY_CORES,
            0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | self.bits() << 12 | (vcpus - 1).min(0xff),
            0x8000_001e => {
                entry.eax = vcpu;
                entry.ebx = (threads_of_a_core - 1) << 8 | (vcpu >> self.thread_bits() & 0xff);
                entry.ecx = 0; // one node
            }
            EXTENDED_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(topology: Topology, vcpu: u32, function: u32, index: u32, eax: u32) -> [u32; 4] {
        let ones = kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        let mut entry = ones;
        topology.describe(vcpu, &mut entry);
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn cores_of_one_thread_are_numbered() {
        let six = Topology::new(6, false);
        assert_eq!(described(six, 3, 1, 0, 0)[1], 0x0306_ffff);
        assert_eq!(described(six, 3, 0xb, 0, 9), [0, 1, 0x100, 3]);
        assert_eq!(described(six, 3, 0x1f, 1, 9), [3, 6, 0x201, 3]);
        assert_eq!(described(six, 3, 0xb, 2, 9), [0, 0, 2, 3]);
        assert_eq!(described(six, 3, 0x8000_001e, 0, 9)[..3], [3, 3, 0]);
        assert_eq!(described(six, 3, 0x8000_0008, 0, 9)[2], 0xffff_3f05);
    }

    #[test]
    fn the_threads_of_a_core_share_its_number_and_its_caches() {
        let six = Topology::new(6, true);
        assert_eq!(described(six, 5, 0xb, 0, 0), [1, 2, 0x100, 5]);
        assert_eq!(described(six, 5, 0xb, 1, 0), [3, 6, 0x201, 5]);
        assert_eq!([4, 5].map(|vcpu| described(six, vcpu, 0x8000_001e, 0, 0)[1]), [0x102; 2]);
        // Levels 1 and 3, of Intel and of AMD.
        assert_eq!([0x21, 0x63].map(|eax| described(six, 0, 4, 0, eax)[0]), [0x0800_4021, 0x0801_4063]);
        assert_eq!([0x21, 0x63].map(|eax| described(six, 0, 0x8000_001d, 0, eax)[0]), [0x4021, 0x1_4063]);
    }

    #[test]
    fn a_single_vcpu_is_no_multiprocessor() {
        for smt in [false, true] {
            let one = Topology::new(1, smt);
            assert_eq!(described(one, 0, 1, 0, 0)[1..], [0x0001_ffff, u32::MAX, !(1 << 28)]);
            assert_eq!(described(one, 0, 4, 0, 0xfc00_4121)[0], 0x0000_0121);
            assert_eq!(described(one, 0, 4, 3, 0xfc1f_c163)[0], 0x0000_0163);
            assert_eq!(described(one, 0, 0x8000_0001, 0, 0)[2], !2);
            assert_eq!(described(one, 0, 0xb, 1, 0), [0, 1, 0x201, 0]);
        }
    }

    #[test]
    fn all_ids_differ_and_fit_their_bits() {
        for vcpus in [1, 2, 3, 4, 62, 128, 254] {
            for smt in [false, true].into_iter().filter(|smt| !smt || vcpus % 2 == 0) {
                let topology = Topology::new(vcpus, smt);
                let mut ids: Vec<_> = (0..vcpus).map(|vcpu| described(topology, vcpu, 0xb, 1, 0)).collect();
                assert!(ids.iter().all(|[bits, count, _, id]| *id < 1 << bits && *count == vcpus));
                ids.dedup();
                assert_eq!(ids.len(), vcpus as usize);
                let cores = (0..vcpus).map(|vcpu| described(topology, vcpu, 0x8000_001e, 0, 0)[1] & 0xff);
                assert_eq!(cores.max(), Some(topology.cores() - 1));
            }
        }
    }
}
