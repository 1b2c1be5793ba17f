//! How a guest is asked to shut down.
//!
//! There are two ways. A guest with ACPI has a *power button*, at which Debian and others power off. Any guest has a
//! keyboard on which *Ctrl-Alt-Del* can be pressed, at which most Linux systems reboot, and a reset ends the VM as
//! well.
//!
//! A guest does not say which of them it heeds. But it has enabled the interrupt of the event device if its kernel has
//! a driver for that device. Then the power button is pressed, otherwise Ctrl-Alt-Del. The kernel may pass the button
//! on to nobody, for instance where the driver of the button is missing, or a small init has no eye for it. So a guest
//! that still runs is asked in the other way too.
//!
//! When this happens depends on whether the kernel has read of the button. If it has not, the button has no effect, and
//! Ctrl-Alt-Del follows after [`ASK_AGAIN_AFTER`]. If it has, a program may be at work on it, and slow. A reboot that
//! Ctrl-Alt-Del begins first stands in the way of the power-off: systemd replaces none of the two by the other. So such
//! a guest has three quarters of its time for the button, and the last quarter is for Ctrl-Alt-Del.

#![expect(unsafe_code, reason = "reads the union in which KVM returns the IO-APIC")]

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use super::Vm;
use crate::x86::layout::POWER_IRQ;

/// When a guest is asked in another way whose kernel has not read of the power button.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// The part of its time in which a guest is asked in every way.
const SHORT_PART: u32 = 4;

/// The bit of an input of the IO-APIC that keeps its interrupts from the processors.
const MASKED: u64 = 1 << 16;

/// How the guest was asked so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// Not at all, or by Ctrl-Alt-Del alone.
    #[default]
    NotByButton,
    /// By the power button.
    ByButton,
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
            *asked = Asked::ByButton;
            return true;
        }
        self.devices.keyboard_in_use() && self.press_ctrl_alt_del()
    }

    /// Asks a guest in the other way that was asked before and still runs, or waits for a guest that has read of the
    /// power button until its time is short. Has no effect once it was asked in both ways. [`TimeToEnd`] says when to
    /// call this, and whether the time is short.
    pub fn ask_again(&self, time_is_short: bool) {
        let mut asked = self.asking.0.lock();
        *asked = match *asked {
            // It may have got the driver since.
            Asked::NotByButton if self.press_power_button() => Asked::ByButton,
            Asked::NotByButton => Asked::NotByButton,
            Asked::ByButton if self.devices.has_read_of_button() && !time_is_short => Asked::ByButton,
            Asked::ByButton => {
                self.press_ctrl_alt_del();
                Asked::InBothWays
            }
            Asked::InBothWays => Asked::InBothWays,
        };
    }
}

/// The time in which guests that were asked are to shut down, and when to ask them again meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct TimeToEnd {
    short_from: Instant,
    until: Instant,
    step: Duration,
}

impl TimeToEnd {
    /// Starts now, and is over after `timeout`.
    pub fn new(timeout: Duration) -> Self {
        let now = Instant::now();
        Self {
            short_from: now + (timeout - timeout / SHORT_PART),
            until: now + timeout,
            // A short time is enough to ask again as well.
            step: ASK_AGAIN_AFTER.min(timeout / 2),
        }
    }

    /// Returns what is left. Zero if the time is over.
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Whether the last quarter has begun, as [`Vm::ask_again`] wants to know.
    pub fn is_short(&self) -> bool {
        Instant::now() >= self.short_from
    }

    /// Returns how long to wait until [`Vm::ask_again`] is to be called, or until the time is over.
    pub fn until_next(&self) -> Duration {
        self.until_next_at(Instant::now())
    }

    fn until_next_at(&self, now: Instant) -> Duration {
        let goal = if now < self.short_from { self.short_from } else { self.until };
        goal.saturating_duration_since(now).min(self.step)
    }
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

    /// Presses the button in a guest that runs this code, as soon as the guest has enabled the interrupt.
    fn asked(hypervisor: &Hypervisor, code: &[u8]) -> Vm {
        let vm = start(hypervisor, code);
        while !vm.ask_to_end() {
            assert_eq!(vm.end(), None, "the guest has enabled no interrupt");
            std::thread::yield_now();
        }
        vm
    }

    #[test]
    fn a_slow_guest_has_more_time() {
        let Ok(hypervisor) = Hypervisor::open() else {
            eprintln!("SKIPPED: there is no KVM here");
            return;
        };
        // Reads of the button, and never heeds it: jmp instead of jne.
        let mut reads = HEARS.to_vec();
        let waits = reads.windows(2).position(|code| code == [0x75, 0xfb]).expect("the loop");
        reads[waits] = 0xeb;
        let vm = asked(&hypervisor, &reads);
        while !vm.devices.has_read_of_button() {
            assert_eq!(vm.end(), None, "the guest reads no events");
            std::thread::yield_now();
        }
        for _ in 0..3 {
            vm.ask_again(false);
            assert_eq!(*vm.asking.0.lock(), Asked::ByButton);
        }
        // Who presses the button once more has a guest that has read of it.
        assert!(vm.ask_to_end());
        vm.ask_again(false);
        assert_eq!(*vm.asking.0.lock(), Asked::ByButton);
        vm.ask_again(true);
        assert_eq!(*vm.asking.0.lock(), Asked::InBothWays);
        assert_eq!(vm.stop(), VmEnd::Stopped);
    }

    #[test]
    fn a_guest_that_does_not_read_of_the_button_is_asked_in_the_other_way() {
        let Ok(hypervisor) = Hypervisor::open() else {
            eprintln!("SKIPPED: there is no KVM here");
            return;
        };
        // Enables the interrupt, and does nothing else: jmp to itself.
        let enables = HEARS.windows(4).position(|code| code == [0x66, 0xba, 0x02, 0x06]).expect("the reads");
        let vm = asked(&hypervisor, &[&HEARS[..enables], &[0xeb, 0xfe]].concat());
        vm.ask_again(false);
        assert_eq!(*vm.asking.0.lock(), Asked::InBothWays);
        assert_eq!(vm.stop(), VmEnd::Stopped);
    }

    /// When guests are asked again within this time, in milliseconds, and its end.
    fn calls(timeout: u64) -> Vec<u64> {
        let time = TimeToEnd::new(Duration::from_millis(timeout));
        let begin = time.until - Duration::from_millis(timeout);
        let mut calls = Vec::new();
        let mut now = begin;
        while now < time.until {
            now += time.until_next_at(now);
            calls.push(u64::try_from((now - begin).as_millis()).expect("some seconds"));
        }
        calls
    }

    #[test]
    fn guests_are_asked_again_every_five_seconds_and_when_the_last_quarter_begins() {
        assert_eq!(calls(30_000), [5_000, 10_000, 15_000, 20_000, 22_500, 27_500, 30_000]);
        assert_eq!(calls(12_000), [5_000, 9_000, 12_000]);
        assert_eq!(calls(4_000), [2_000, 3_000, 4_000]);
        assert!(calls(0).is_empty());
        let over = TimeToEnd::new(Duration::ZERO);
        assert!(over.is_short() && over.left().is_zero() && over.until_next().is_zero());
        let long = TimeToEnd::new(Duration::from_secs(86_400));
        assert!(!long.is_short() && !long.left().is_zero() && long.until_next() == ASK_AGAIN_AFTER);
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
        vm.ask_again(true);
        assert_eq!(*vm.asking.0.lock(), Asked::NotByButton);
        assert_eq!(vm.stop(), VmEnd::Stopped);
    }
}
