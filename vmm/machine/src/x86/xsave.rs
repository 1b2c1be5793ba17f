//! Leaf 0xd: the parts of a processor's state that XSAVE saves, and the size of all together.
//!
//! KVM states the size for all that it supports on the host. A guest that has fewer parts must read a size for these
//! alone, or its kernel reserves the wrong memory and says so. The sizes for the parts that a guest has enabled are
//! KVM's to compute, while the guest runs.
//!
//! Source: Intel SDM volume 1, chapter 13; volume 2A, CPUID, leaf 0xd.

use kvm_bindings::kvm_cpuid_entry2;

pub(super) const LEAF: u32 = 0xd;
/// Parts by their bits in XCR0: x87 and SSE, AVX, and the three of AVX-512.
pub(super) const LEGACY: u64 = 0b11;
pub(super) const AVX: u64 = 1 << 2;
pub(super) const AVX512: u64 = 0b111 << 5;
/// The two parts of AMX. KVM refuses them, as the process never asks for their use.
pub(super) const AMX: u64 = 0b11 << 17;
/// Size of the area for x87, SSE and the header.
const LEAST_BYTES: u32 = 576;
/// Bit of sub-leaf 1 that announces XFD, which only AMX uses, and XSAVES, which saves supervisor state.
const XSAVES: u32 = 1 << 3;
const XFD: u32 = 1 << 4;

/// Restricts the state to some parts, and optionally to what user code can have. Where the guest has no XSAVE at all,
/// so pass no parts, the leaf says nothing.
pub(super) fn restrict(entries: &mut Vec<kvm_cpuid_entry2>, parts: u64, with_supervisor: bool) {
    let has = |parts: u64, entry: &kvm_cpuid_entry2| entry.index < 64 && parts >> entry.index & 1 != 0;
    let xcr0 = entries.iter().find(|entry| (entry.function, entry.index) == (LEAF, 0));
    let parts = xcr0.map_or(0, |entry| u64::from(entry.eax) | u64::from(entry.edx) << 32) & parts;
    let xss = entries.iter().find(|entry| (entry.function, entry.index) == (LEAF, 1));
    let xss = xss.map_or(0, |entry| u64::from(entry.ecx) | u64::from(entry.edx) << 32);
    let xss = if with_supervisor { xss } else { 0 };
    entries.retain(|entry| entry.function != LEAF || entry.index < 2 || has(parts | xss, entry));
    // Areas of supervisor parts have no fixed place, and the value 0 there.
    let end = |entry: &kvm_cpuid_entry2| entry.eax + entry.ebx;
    let of_user = |entry: &&kvm_cpuid_entry2| entry.function == LEAF && entry.index >= 2 && has(parts, entry);
    let bytes = entries.iter().filter(of_user).map(end).max().unwrap_or(0).max(LEAST_BYTES);
    for entry in entries.iter_mut().filter(|entry| entry.function == LEAF) {
        match entry.index {
            _ if parts == 0 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0 => {
                (entry.eax, entry.edx) = (parts as u32, (parts >> 32) as u32);
                (entry.ebx, entry.ecx) = (entry.ebx.min(bytes), bytes);
            }
            1 => {
                (entry.ecx, entry.edx) = (xss as u32, (xss >> 32) as u32);
                if !with_supervisor {
                    entry.eax &= !XSAVES;
                }
                if parts & AMX == 0 {
                    entry.eax &= !XFD;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function: LEAF, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// As of a Sapphire Rapids: AVX, AVX-512, PKRU, AMX, and shadow stacks as supervisor state.
    fn host() -> Vec<kvm_cpuid_entry2> {
        vec![
            entry(0, [0x6_02e7, 0x2b00, 0x2b00, 0]),
            entry(1, [0x1f, 0x2b00, 0x1800, 0]),
            entry(2, [0x100, 0x240, 0, 0]),
            entry(5, [0x40, 0x440, 0, 0]),
            entry(6, [0x200, 0x480, 0, 0]),
            entry(7, [0x400, 0x680, 0, 0]),
            entry(9, [0x8, 0xa80, 0, 0]),
            entry(11, [0x10, 0, 1, 0]),
            entry(12, [0x18, 0, 1, 0]),
            entry(17, [0x40, 0xac0, 2, 0]),
            entry(18, [0x2000, 0xb00, 6, 0]),
        ]
    }

    fn restricted(parts: u64, with_supervisor: bool) -> Vec<kvm_cpuid_entry2> {
        let mut entries = host();
        restrict(&mut entries, parts, with_supervisor);
        entries
    }

    fn indexes(entries: &[kvm_cpuid_entry2]) -> Vec<u32> {
        entries.iter().map(|entry| entry.index).collect()
    }

    #[test]
    fn without_amx_the_area_ends_before_its_tiles() {
        let entries = restricted(!AMX, true);
        assert_eq!(indexes(&entries), [0, 1, 2, 5, 6, 7, 9, 11, 12]);
        assert_eq!((entries[0].eax, entries[0].ebx, entries[0].ecx), (0x2e7, 0xa88, 0xa88));
        assert_eq!((entries[1].eax, entries[1].ecx), (0xf, 0x1800));
    }

    #[test]
    fn a_profile_has_the_size_of_its_own_parts() {
        let v3 = restricted(LEGACY | AVX, false);
        assert_eq!(indexes(&v3), [0, 1, 2]);
        assert_eq!((v3[0].eax, v3[0].ecx, v3[1].eax, v3[1].ecx), (0b111, 0x340, 0x7, 0));
        let v4 = restricted(LEGACY | AVX | AVX512, false);
        assert_eq!((indexes(&v4), v4[0].ecx), (vec![0, 1, 2, 5, 6, 7], 0xa80));
        assert_eq!(restricted(LEGACY, false)[0].ecx, 576);
    }

    #[test]
    fn without_xsave_the_leaf_says_nothing() {
        for entry in restricted(0, false) {
            assert_eq!((entry.eax, entry.ebx, entry.ecx, entry.edx), (0, 0, 0, 0));
        }
    }
}
