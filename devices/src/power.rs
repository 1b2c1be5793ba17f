//! Power management of a machine with hardware-reduced ACPI: the registers by which a guest turns the machine off,
//! the power button, and news of the VM generation ID.
//!
//! The device has [`PORTS`] ports of one byte each, at the offsets [`SLEEP_CONTROL`], [`SLEEP_STATUS`] and [`EVENTS`].
//! The machine knows one sleeping state, [`SOFT_OFF`]. A guest that asks for another one goes on. It reads from
//! [`EVENTS`] what has happened since it read last. The VMM raises the interrupt of an event, after it has called
//! [`Power::press_button`] or [`Power::tell_new_generation`].
//!
//! Source: Advanced Configuration and Power Interface Specification 6.5, section 4.8.3.7 "Sleep Control and Status
//! Registers". The register of events is the machine's own; its ACPI tables hold the code that reads it.

use crate::{BusDevice, read_bytewise, write_bytewise};

/// Number of ports.
pub const PORTS: u16 = 3;
/// Offset of the register by which the guest puts the machine to sleep.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the register that says whether the machine woke up. It never does.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the register of events. A read clears it.
pub const EVENTS: u16 = 2;

/// The number of the sleeping state "soft off" in the register [`SLEEP_CONTROL`].
pub const SOFT_OFF: u8 = 5;
/// Where the number of the sleeping state begins in the register, and its width.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
/// The bit that puts the machine to sleep.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The event that the power button was pressed.
pub const BUTTON_PRESSED: u8 = 1;
/// The event that the VM generation ID is another one.
pub const GENERATION_CHANGED: u8 = 2;

/// The power management of a machine.
#[derive(Debug, Default)]
pub struct Power {
    is_off: bool,
    events: u8,
    /// Whether the guest has ever read that the power button was pressed.
    has_read_of_button: bool,
}

impl Power {
    /// Notes that the power button was pressed. Whoever calls this raises the interrupt.
    pub fn press_button(&mut self) {
        self.events |= BUTTON_PRESSED;
    }

    /// Whether the guest has ever read that the power button was pressed.
    pub fn has_read_of_button(&self) -> bool {
        self.has_read_of_button
    }

    /// Notes that the VM generation ID is another one. Whoever calls this has written it, and raises the interrupt.
    pub fn tell_new_generation(&mut self) {
        self.events |= GENERATION_CHANGED;
    }

    /// Whether the guest has turned the machine off.
    pub fn is_off(&self) -> bool {
        self.is_off
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytewise(offset, data, |port| match port.into() {
            EVENTS => {
                let events = std::mem::take(&mut self.events);
                self.has_read_of_button |= events & BUTTON_PRESSED != 0;
                events
            }
            _ => 0,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytewise(offset, data, |port, byte| {
            let sleep_type = byte >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
            let is_sleep = u16::from(port) == SLEEP_CONTROL && byte & SLEEP_ENABLE != 0;
            self.is_off |= is_sleep && sleep_type == SOFT_OFF;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(power: &mut Power, port: u16) -> u8 {
        let mut data = [0xff];
        power.read(port.into(), &mut data);
        data[0]
    }

    #[test]
    fn soft_off_alone_turns_the_machine_off() {
        for byte in 0..=u8::MAX {
            let mut power = Power::default();
            power.write(SLEEP_CONTROL.into(), &[byte]);
            // The bits beside type and enable are reserved, and ignored.
            assert_eq!(power.is_off(), byte & 0b11_1100 == 0b11_0100, "{byte:#x}");
        }
    }

    #[test]
    fn a_guest_that_has_read_of_the_button_is_known() {
        let mut power = Power::default();
        power.tell_new_generation();
        read(&mut power, EVENTS);
        assert!(!power.has_read_of_button(), "that was another event");
        power.press_button();
        assert!(!power.has_read_of_button());
        assert_eq!(read(&mut power, EVENTS), BUTTON_PRESSED);
        assert!(power.has_read_of_button());
        power.press_button();
        assert!(power.has_read_of_button(), "it has read of the first press");
    }

    #[test]
    fn other_registers_and_offsets_turn_nothing_off() {
        let mut power = Power::default();
        for offset in [SLEEP_STATUS.into(), EVENTS.into(), 3, 255, 256, u64::MAX] {
            power.write(offset, &[0x34; 8]);
            let mut data = [0xff; 8];
            power.read(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
        assert!(!power.is_off());
        // A wide write covers the register with its first byte.
        power.write(0, &[0x34, 0xff]);
        assert!(power.is_off());
    }

    #[test]
    fn each_event_is_read_once() {
        let mut power = Power::default();
        assert_eq!(read(&mut power, EVENTS), 0);
        power.press_button();
        power.press_button();
        // What a guest writes neither makes nor clears events.
        power.write(EVENTS.into(), &[0xff]);
        assert_eq!([read(&mut power, SLEEP_CONTROL), read(&mut power, SLEEP_STATUS)], [0, 0]);
        assert_eq!([read(&mut power, EVENTS), read(&mut power, EVENTS)], [BUTTON_PRESSED, 0]);
        power.tell_new_generation();
        power.press_button();
        let both = BUTTON_PRESSED | GENERATION_CHANGED;
        assert_eq!([read(&mut power, EVENTS), read(&mut power, EVENTS)], [both, 0]);
    }
}
