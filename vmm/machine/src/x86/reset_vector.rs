//! The code where a PC's processor starts after a reset, and where kernels jump that reset the machine through its BIOS.
//!
//! There is no BIOS, so the code resets the machine itself. Linux goes this way on hardware-reduced ACPI machines unless
//! `reboot=` says otherwise: it takes them for machines with EFI, and those without EFI for old ones.
//!
//! Source: Linux' arch/x86/kernel/reboot.c, `reboot_init` and `native_machine_emergency_restart`.

use samepage_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::RESET_VECTOR;

/// Code for real mode: has the keyboard controller pulse the reset line.
const CODE: [u8; 7] = [
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// Writes the code.
pub(crate) fn write(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_slice(&CODE, GuestAddress(RESET_VECTOR))
}
