//! The state of a vCPU at its first instruction, and the tables in guest memory that this state needs.
//!
//! Sources: PVH boot ABI (Xen's docs/misc/pvh.pandoc); Linux' Documentation/arch/x86/boot.rst, 64-bit
//! boot protocol; Intel SDM volume 3A.

use kvm_bindings::{
    Msrs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use samepage_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{BOOT_STACK, GDT_START, PAGE_DIRECTORIES, PDPT, PML4, PVH_START_INFO, ZERO_PAGE};
use crate::boot::load::Entry;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 2;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// The selectors of Linux' boot protocol.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
const CODE_EXECUTE_READ_ACCESSED: u8 = 0xb;
const DATA_READ_WRITE_ACCESSED: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_DELIVERY_MODE: u32 = 0x700;
const APIC_DELIVER_NMI: u32 = 0x400;
const APIC_DELIVER_EXTINT: u32 = 0x700;

/// Returns a flat segment in the form of the processor's hidden registers.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    let is_tss = selector == TSS_SELECTOR;
    let is_code = selector == CODE_SELECTOR;
    kvm_segment {
        base: 0,
        limit: if is_tss { 0x67 } else { 0xffff_ffff },
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!(is_tss || is_code && long)),
        s: u8::from(!is_tss),
        l: u8::from(is_code && long),
        g: u8::from(!is_tss),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Returns a segment as the 8 bytes of a descriptor.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let flag = |bit: u8, at: u32| u64::from(bit) << at;
    limit & 0xffff
        | (limit >> 16) << 48
        | (segment.base & 0xff_ffff) << 16
        | (segment.base >> 24 & 0xff) << 56
        | flag(segment.type_, 40)
        | flag(segment.s, 44)
        | flag(segment.dpl, 45)
        | flag(segment.present, 47)
        | flag(segment.l, 53)
        | flag(segment.db, 54)
        | flag(segment.g, 55)
}

/// Writes the GDT and, for a 64-bit entry, page tables that map the first 4 GiB one to one.
pub(crate) fn write_tables(memory: &GuestMemory, entry: Entry) -> Result<(), GuestMemoryError> {
    let long = matches!(entry, Entry::Linux64(_));
    let segments = [
        segment(CODE_SELECTOR, CODE_EXECUTE_READ_ACCESSED, long),
        segment(DATA_SELECTOR, DATA_READ_WRITE_ACCESSED, long),
        segment(TSS_SELECTOR, TSS_BUSY, long),
    ];
    for segment in &segments {
        memory.write_obj(descriptor(segment), GuestAddress(GDT_START + u64::from(segment.selector)))?;
    }
    if !long {
        return Ok(());
    }
    memory.write_obj(PDPT | PAGE_PRESENT_WRITABLE, GuestAddress(PML4))?;
    for gib in 0..4 {
        let directory = PAGE_DIRECTORIES + gib * 4096;
        memory.write_obj(directory | PAGE_PRESENT_WRITABLE, GuestAddress(PDPT + gib * 8))?;
        let mut bytes = [0; 4096];
        for (index, slot) in (0..).zip(bytes.chunks_exact_mut(8)) {
            let page = (gib * 512 + index) * LARGE_PAGE_BYTES;
            slot.copy_from_slice(&(page | PAGE_LARGE | PAGE_PRESENT_WRITABLE).to_le_bytes());
        }
        memory.write_slice(&bytes, GuestAddress(directory))?;
    }
    Ok(())
}

/// Sets the boot vCPU to the first instruction of the kernel.
pub(crate) fn set_up(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    let mut system = vcpu.get_sregs()?;
    set_system_registers(&mut system, entry);
    vcpu.set_sregs(&system)?;
    vcpu.set_regs(&general_registers(entry))?;
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })?;
    set_msrs(vcpu)?;
    let mut lapic = vcpu.get_lapic()?;
    set_local_interrupts(&mut lapic);
    vcpu.set_lapic(&lapic)
}

/// Sets what firmware sets on all other vCPUs, and what their start leaves as it is. They wait for that.
pub(crate) fn set_up_waiting(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    set_msrs(vcpu)
}

fn set_system_registers(registers: &mut kvm_sregs, entry: Entry) {
    let long = matches!(entry, Entry::Linux64(_));
    registers.gdt = kvm_dtable { base: GDT_START, limit: TSS_SELECTOR + 7, ..Default::default() };
    registers.idt = kvm_dtable::default();
    registers.cs = segment(CODE_SELECTOR, CODE_EXECUTE_READ_ACCESSED, long);
    let data = segment(DATA_SELECTOR, DATA_READ_WRITE_ACCESSED, long);
    for register in
        [&mut registers.ds, &mut registers.es, &mut registers.fs, &mut registers.gs, &mut registers.ss]
    {
        *register = data;
    }
    registers.tr = segment(TSS_SELECTOR, TSS_BUSY, long);
    (registers.cr0, registers.cr3, registers.cr4, registers.efer) = match entry {
        Entry::Pvh(_) => (CR0_PE | CR0_ET, 0, 0, 0),
        Entry::Linux64(_) => (CR0_PE | CR0_ET | CR0_PG, PML4, CR4_PAE, EFER_LME | EFER_LMA),
    };
}

fn general_registers(entry: Entry) -> kvm_regs {
    match entry {
        Entry::Pvh(rip) => {
            kvm_regs { rip, rbx: PVH_START_INFO, rflags: RFLAGS_RESERVED, ..Default::default() }
        }
        Entry::Linux64(rip) => kvm_regs {
            rip,
            rsi: ZERO_PAGE,
            rsp: BOOT_STACK,
            rbp: BOOT_STACK,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        },
    }
}

/// Sets the MSRs that firmware would set. KVM resets the others.
fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    for (index, data) in
        [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK)]
    {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).expect("one entry is within KVM's limit");
        // A kernel without support for a register sets none and returns 0. The guest then finds the
        // register's reset value, and works without fast strings or write-back defaults.
        vcpu.set_msrs(&msrs)?;
    }
    Ok(())
}

/// Connects the local APIC as firmware does: legacy interrupts on LINT0, NMI on LINT1.
fn set_local_interrupts(lapic: &mut kvm_lapic_state) {
    for (register, mode) in [(APIC_LVT_LINT0, APIC_DELIVER_EXTINT), (APIC_LVT_LINT1, APIC_DELIVER_NMI)] {
        let bytes = &mut lapic.regs[register..register + 4];
        let mut word = [0; 4];
        for (to, from) in word.iter_mut().zip(bytes.iter()) {
            *to = from.cast_unsigned();
        }
        let value = u32::from_le_bytes(word) & !APIC_DELIVERY_MODE | mode;
        for (to, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
            *to = from.cast_signed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::memory::VmMemory;

    #[test]
    fn descriptors_have_their_well_known_values() {
        assert_eq!(
            descriptor(&segment(CODE_SELECTOR, CODE_EXECUTE_READ_ACCESSED, true)),
            0x00af_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&segment(CODE_SELECTOR, CODE_EXECUTE_READ_ACCESSED, false)),
            0x00cf_9b00_0000_ffff
        );
        assert_eq!(
            descriptor(&segment(DATA_SELECTOR, DATA_READ_WRITE_ACCESSED, true)),
            0x00cf_9300_0000_ffff
        );
        assert_eq!(descriptor(&segment(TSS_SELECTOR, TSS_BUSY, true)), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn page_tables_map_4_gib_one_to_one() {
        let memory = VmMemory::reserve(2 << 20, true, crate::HugePages::Off).unwrap();
        write_tables(memory.view(), Entry::Linux64(0)).unwrap();
        let word = |address| memory.view().read_obj::<u64>(GuestAddress(address)).unwrap();
        let address_of = |entry: u64| entry & 0x000f_ffff_ffff_f000;
        for address in [0, 0x10_0000_u64, 0xbfe0_0000, 0xffe0_0000] {
            let directory_pointer = word(address_of(word(PML4)) + (address >> 30) * 8);
            let entry = word(address_of(directory_pointer) + (address >> 21 & 511) * 8);
            assert_eq!(entry & !0xfff, address & !(LARGE_PAGE_BYTES - 1));
            assert_eq!(entry & 0xfff, PAGE_LARGE | PAGE_PRESENT_WRITABLE);
        }
    }

    #[test]
    fn each_protocol_starts_in_its_mode() {
        let mut system = kvm_sregs::default();
        set_system_registers(&mut system, Entry::Pvh(0x10_0000));
        assert_eq!((system.cr0, system.efer, system.cs.db, system.cs.l), (0x11, 0, 1, 0));
        assert_eq!(general_registers(Entry::Pvh(0x10_0000)).rbx, PVH_START_INFO);
        set_system_registers(&mut system, Entry::Linux64(0x10_0000));
        assert_eq!((system.cr0, system.efer, system.cs.db, system.cs.l), (0x8000_0011, 0x500, 0, 1));
        assert_eq!(general_registers(Entry::Linux64(0x10_0000)).rsi, ZERO_PAGE);
    }

    #[test]
    fn local_interrupts_keep_all_but_their_delivery_mode() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT_LINT0 + 2] = 1; // masked
        set_local_interrupts(&mut lapic);
        assert_eq!(lapic.regs[APIC_LVT_LINT0..APIC_LVT_LINT0 + 4], [0, 7, 1, 0]);
        assert_eq!(lapic.regs[APIC_LVT_LINT1..APIC_LVT_LINT1 + 4], [0, 4, 0, 0]);
    }
}
