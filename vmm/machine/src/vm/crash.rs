//! The report about a guest that cannot continue.

use std::fmt;

use kvm_ioctls::VcpuFd;
use samepage_devices::GuestMemory;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

/// Longest instruction of x86.
const INSTRUCTION_MAX: u64 = 15;
const PAGE_MASK: u64 = 0xfff;
/// Where a processor starts after a reset: its RIP and the base of its code segment (Intel's manual, volume 3A, 11.1.1).
const RESET: (u64, u64) = (0xfff0, 0xffff_0000);

/// The reason why the guest cannot continue. The numbers are those of KVM and of the hardware.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CrashKind {
    /// KVM_EXIT_SHUTDOWN.
    TripleFault,
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError {
        /// KVM's suberror: 1 emulation, 2 simultaneous exceptions, 3 event delivery, 4 unexpected exit.
        suberror: u32,
    },
    /// KVM_EXIT_FAIL_ENTRY.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// Any other exit that a guest should not cause.
    Unexpected(String),
}

impl fmt::Display for CrashKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CrashKind::TripleFault => f.write_str("triple fault"),
            CrashKind::InternalError { suberror } => write!(f, "KVM internal error, suberror {suberror}"),
            CrashKind::FailEntry { reason } => {
                write!(f, "the processor refused to enter the guest, reason {reason:#x}")
            }
            CrashKind::Unexpected(exit) => write!(f, "unexpected exit {exit}"),
        }
    }
}

impl CrashKind {
    fn meaning(&self) -> &'static str {
        match self {
            CrashKind::TripleFault => {
                "The guest took an exception that it could not handle, and then could not handle the next exception \
                 either. Its exception handlers, stack or page tables are unusable. A reboot with reboot=t \
                 looks the same; reboot=k gives a clean end."
            }
            CrashKind::InternalError { suberror: 1 } => {
                "KVM had to interpret the instruction at RIP and does not know it. With hardware KVM, the guest \
                 most likely jumped into data. KVM without hardware support lacks some kernel-mode instructions; \
                 clearcpuid= on Linux' command line stops a guest from using them."
            }
            CrashKind::InternalError { suberror: 2 } => {
                "Two exceptions occurred at the same time in a combination that no processor produces."
            }
            CrashKind::InternalError { suberror: 3 } => {
                "The guest's memory failed while KVM delivered an interrupt or exception: its tables or its \
                 stack are not in RAM."
            }
            CrashKind::InternalError { .. } => {
                "KVM itself could not continue with this guest; the kernel log (dmesg) may say more."
            }
            CrashKind::FailEntry { .. } => {
                "The guest's registers are in an invalid state; the kernel log (dmesg) may say more."
            }
            CrashKind::Unexpected(_) => "KVM reported something that no guest of this machine should cause.",
        }
    }
}

/// A crash, its place and its meaning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CrashReport {
    /// The kind of the crash.
    pub kind: CrashKind,
    /// Number of the vCPU.
    pub vcpu: u32,
    /// The instruction pointer, if it could be read. After a triple fault, KVM for AMD's processors has reset it.
    pub rip: Option<u64>,
    /// The bytes at the instruction pointer, as far as they lie in mapped RAM.
    pub instruction: Vec<u8>,
}

impl CrashReport {
    /// Takes a report of the stopped vCPU.
    pub(super) fn take(kind: CrashKind, number: u32, vcpu: &VcpuFd, memory: &GuestMemory) -> Self {
        let at = vcpu.get_regs().ok().zip(vcpu.get_sregs().ok());
        let at = at.filter(|(registers, system)| !was_reset(&kind, registers.rip, system.cs.base));
        let instruction = match &at {
            Some((registers, system)) => {
                let linear = system.cs.base.wrapping_add(registers.rip);
                read_linear(linear, memory, |address| {
                    let translation = vcpu.translate_gva(address).ok()?;
                    (translation.valid != 0).then_some(translation.physical_address)
                })
            }
            None => Vec::new(),
        };
        Self { kind, vcpu: number, rip: at.map(|(registers, _)| registers.rip), instruction }
    }
}

/// Returns whether KVM has reset the vCPU, so that the registers reveal nothing about the guest.
fn was_reset(kind: &CrashKind, rip: u64, code_base: u64) -> bool {
    *kind == CrashKind::TripleFault && (rip, code_base) == RESET
}

/// Returns the bytes of at most one instruction from a linear address on. It returns fewer if a page is not mapped.
fn read_linear(linear: u64, memory: &GuestMemory, translate: impl Fn(u64) -> Option<u64>) -> Vec<u8> {
    let in_first_page = INSTRUCTION_MAX.min(PAGE_MASK + 1 - (linear & PAGE_MASK));
    let parts =
        [(linear, in_first_page), (linear.wrapping_add(in_first_page), INSTRUCTION_MAX - in_first_page)];
    let mut bytes = Vec::new();
    for (start, count) in parts {
        if count == 0 {
            break;
        }
        let mut part = vec![0; count as usize];
        let Some(physical) = translate(start) else { break };
        if memory.read_slice(&mut part, GuestAddress(physical)).is_err() {
            break;
        }
        bytes.append(&mut part);
    }
    bytes
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on vCPU {}", self.kind, self.vcpu)?;
        match self.rip {
            None => f.write_str(" at an unknown RIP")?,
            Some(rip) if self.instruction.is_empty() => {
                write!(f, " at RIP {rip:#x}, where no memory is mapped")?;
            }
            Some(rip) => {
                write!(f, " at RIP {rip:#x}, bytes there")?;
                for byte in &self.instruction {
                    write!(f, " {byte:02x}")?;
                }
            }
        }
        write!(f, ". {}", self.kind.meaning())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::memory::VmMemory;

    #[test]
    fn instruction_bytes_are_read_across_pages_as_far_as_they_are_mapped() {
        let memory = VmMemory::reserve(2 << 20, true, crate::HugePages::Off).unwrap();
        memory.view().write_slice(&[1; 5], GuestAddress(0x5ffb)).unwrap();
        memory.view().write_slice(&[2; 10], GuestAddress(0x9000)).unwrap();
        let paged = |linear: u64| match linear {
            0xffff_8000_0000_0ffb => Some(0x5ffb),
            0xffff_8000_0000_1000 => Some(0x9000),
            _ => None,
        };
        let read = |linear| read_linear(linear, memory.view(), paged);
        assert_eq!(read(0xffff_8000_0000_0ffb), [[1; 5].as_slice(), &[2; 10]].concat());
        assert_eq!(read_linear(0x5ffb, memory.view(), |a| (a < 0x6000).then_some(a)), [1; 5]);
        assert!(read(0).is_empty());
        assert!(read_linear(u64::MAX, memory.view(), Some).is_empty());
    }

    #[test]
    fn registers_of_a_vcpu_that_was_reset_are_not_told() {
        assert!(was_reset(&CrashKind::TripleFault, 0xfff0, 0xffff_0000));
        assert!(!was_reset(&CrashKind::TripleFault, 0xfff0, 0));
        assert!(!was_reset(&CrashKind::InternalError { suberror: 1 }, 0xfff0, 0xffff_0000));
        let report =
            CrashReport { kind: CrashKind::TripleFault, vcpu: 1, rip: None, instruction: Vec::new() };
        let text = report.to_string();
        assert!(text.starts_with("triple fault on vCPU 1 at an unknown RIP. The guest"), "{text}");
    }

    #[test]
    fn a_report_says_where_and_what() {
        let report = CrashReport {
            kind: CrashKind::TripleFault,
            vcpu: 0,
            rip: Some(0x10_0000),
            instruction: vec![0x0f, 0x0b],
        };
        let text = report.to_string();
        assert!(
            text.starts_with("triple fault on vCPU 0 at RIP 0x100000, bytes there 0f 0b. The guest"),
            "{text}"
        );
    }
}
