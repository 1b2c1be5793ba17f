//! How a guest is asked to shut down.
//!
//! There are two ways. A guest with ACPI has a *power button*, at which Debian and others power off. Any guest has a
//! keyboard on which *Ctrl-Alt-Del* can be pressed, at which most Linux systems reboot, and a reset ends the VM as
//! well.
//!
//! A guest does not say which of them it heeds. But it has enabled the interrupt of the event device if its kernel has
//! a driver for that device. Then the power button is pressed, otherwise Ctrl-Alt-Del. The kernel may pass the button
//! on to nobody, for instance where the driver of the button is missing, or a small init has no eye for it. So a guest
//! that still runs after [`ASK_AGAIN_AFTER`] is asked in the other way too. A guest that is shutting down already
//! ignores that: systemd refuses to replace a shutdown by a reboot. A guest that is slow, on a host that is busy or
//! emulated, may not have begun by then. So the guest has more time if its kernel took long to read of the button.

#![expect(unsafe_code, reason = "reads the union in which KVM returns the IO-APIC")]

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use super::Vm;
use crate::x86::layout::POWER_IRQ;

/// When a guest that still runs is asked in another way.
pub const ASK_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How many times as long as its kernel takes to read of the button a guest may take until it shuts down: a kernel takes
/// less than a millisecond, and programs are to be scheduled and loaded.
const PROGRAMS_TAKE: u32 = 500;

/// The longest time for that.
const LONGEST_PATIENCE: Duration = Duration::from_secs(120);

/// The bit of an input of the IO-APIC that keeps its interrupts from the processors.
const MASKED: u64 = 1 << 16;

/// How the guest was asked so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// Not at all, or by Ctrl-Alt-Del alone.
    #[default]
    NotByButton,
    /// By the power button, at this time.
    ByButton(Instant),
    /// By the power button, and later by Ctrl-Alt-Del.
    InBothWays,
}

/// What is known of requests to the guest.
#[derive(Debug, Default)]
pub(super) struct Asking(Mutex<Asked>);

impl Vm {
    /// Presses Ctrl, Alt and Delete on the guest's keyboard, which asks the guest to shut down. Returns `false` if
    /// the guest reads nothing from its keyboard.
    pub fn press_ctrl_alt_del(&self) -> bool {
        self.devices.press_ctrl_alt_del()
    }

    /// Presses the power button. Returns `false` if the guest has no driver for it.
    pub fn press_power_button(&self) -> bool {
        if !hears_events(&self.kvm) {
            return false;
        }
        self.devices.press_power_button();
        self.raise_event_interrupt()
    }

    /// Raises the interrupt of the event device. Returns `false` if KVM has refused.
    pub(super) fn raise_event_interrupt(&self) -> bool {
        // An edge, as the ACPI tables have it.
        let raised = [true, false].map(|level| self.kvm.set_irq_line(POWER_IRQ, level));
        raised.iter().all(Result::is_ok)
    }

    /// Asks the guest to shut down: by the power button if the guest has a driver for it, otherwise by Ctrl-Alt-Del.
    /// Returns `false` if it has neither that driver nor one for its keyboard.
    pub fn ask_to_end(&self) -> bool {
        let mut asked = self.asking.0.lock();
        if self.press_power_button() {
            *asked = Asked::ByButton(Instant::now());
            return true;
        }
        self.devices.keyboard_in_use() && self.press_ctrl_alt_del()
    }

    /// Asks a guest in the other way that was asked at least [`ASK_AGAIN_AFTER`] ago and still runs. Has no effect
    /// once it was asked in both ways.
    pub fn ask_again(&self) {
        let mut asked = self.asking.0.lock();
        *asked = match *asked {
            // It may have got the driver since.
            Asked::NotByButton if self.press_power_button() => Asked::ByButton(Instant::now()),
            Asked::NotByButton => Asked::NotByButton,
            Asked::ByButton(at) if at.elapsed() < patience(self.devices.button_read_after()) => {
                Asked::ByButton(at)
            }
            Asked::ByButton(_) => {
                self.press_ctrl_alt_del();
                Asked::InBothWays
            }
            Asked::InBothWays => Asked::InBothWays,
        };
    }
}

/// Returns how long a guest may take until it shuts down, if its kernel took that long to read of the power button.
fn patience(read_after: Option<Duration>) -> Duration {
    read_after.unwrap_or_default().saturating_mul(PROGRAMS_TAKE).min(LONGEST_PATIENCE)
}

/// Whether the guest has enabled the interrupt of the event device, which drivers alone do.
fn hears_events(kvm: &VmFd) -> bool {
    let mut controller = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    if kvm.get_irqchip(&mut controller).is_err() {
        return false;
    }
    // SAFETY: KVM has filled in the state of the controller that was asked for, whose number is in `chip_id`.
    let inputs = unsafe { controller.chip.ioapic.redirtbl };
    // SAFETY: all bit patterns are valid for an integer, and the other field of this union is as long.
    let input = unsafe { inputs[POWER_IRQ as usize].bits };
    input & MASKED == 0
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use samepage_spec::Size;

    use super::*;
    use crate::boot::test_images::pvh_elf;
    use crate::{Hypervisor, ImageSource, VmConfig, VmEnd};

    /// Enables the input of the event device in the IO-APIC, waits for the event, and enters soft off.
    const HEARS: &[u8] = &[
        0xbb, 0x00, 0x00, 0xc0, 0xfe, // mov ebx, 0xfec00000
        0xc7, 0x03, 0x30, 0x00, 0x00, 0x00, // mov dword [ebx], 0x30: the input's lower half
        0xc7, 0x43, 0x10, 0x40, 0x00, 0x00, 0x00, // mov dword [ebx + 0x10], 0x40: a vector, not masked
        0x66, 0xba, 0x02, 0x06, // mov dx, 0x602
        0xec, // wait: in al, dx
        0x3c, 0x01, // cmp al, 1
        0x75, 0xfb, // jne wait
        0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
        0xb0, 0x30, // mov al, 0x30: another sleeping state
        0xee, // out dx, al
        0xb0, 0x14, // mov al, 0x14: soft off, but not enabled
        0xee, // out dx, al
        0xb0, 0x34, // mov al, 0x34
        0xee, // out dx, al
        0xb0, 0xfe, // mov al, 0xfe
        0xe6, 0x64, // out 0x64, al: a reset, if the machine is still on
        0xf4, // hlt
        0xeb, 0xfd, // jmp to the hlt
        0x90, // nop
    ];

    fn start(hypervisor: &Hypervisor, code: &[u8]) -> Vm {
        let kernel = ImageSource::Bytes { name: "test image", bytes: pvh_elf(code).into() };
        let mut config = VmConfig::new("asked", kernel);
        config.spec.memory = Size(4 << 20);
        let vm = Vm::build(config, hypervisor).expect("a VM");
        vm.start();
        vm
    }

    #[test]
    fn a_guest_that_hears_events_is_asked_by_the_power_button_and_powers_off() {
        let Ok(hypervisor) = Hypervisor::open() else {
            eprintln!("SKIPPED: there is no KVM here");
            return;
        };
        let vm = start(&hypervisor, HEARS);
        let until = Instant::now() + Duration::from_secs(60);
        while !vm.ask_to_end() && vm.end().is_none() {
            assert!(Instant::now() < until, "the guest enables no interrupt");
            std::thread::yield_now();
        }
        assert_eq!(vm.wait(), VmEnd::PowerOff);
    }

    #[test]
    fn a_slow_guest_has_more_time() {
        assert_eq!(patience(None), Duration::ZERO, "a guest that reads nothing is asked in the other way");
        assert!(patience(Some(Duration::from_millis(1))) < ASK_AGAIN_AFTER);
        assert_eq!(patience(Some(Duration::from_millis(40))), Duration::from_secs(20));
        assert_eq!(patience(Some(Duration::MAX)), LONGEST_PATIENCE);
    }

    #[test]
    fn a_guest_without_a_driver_is_not_asked_by_the_power_button() {
        let Ok(hypervisor) = Hypervisor::open() else {
            eprintln!("SKIPPED: there is no KVM here");
            return;
        };
        // Does nothing: jmp to itself.
        let vm = start(&hypervisor, &[0xeb, 0xfe]);
        assert!(!vm.press_power_button() && !vm.ask_to_end());
        vm.ask_again();
        assert_eq!(*vm.asking.0.lock(), Asked::NotByButton);
        assert_eq!(vm.stop(), VmEnd::Stopped);
    }
}
