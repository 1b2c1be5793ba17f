//! The keyboard controller, as far as x86 guests use it to reset the machine.
//!
//! Ports 0x60 to 0x64. The command 0xfe to port 0x64 pulses the CPU's reset line: it writes the reset
//! event, and the VMM decides what a reset means. All else reads as zero (no keyboard, input buffer
//! empty, so a guest that polls before it sends the command does not wait).

use vmm_sys_util::eventfd::EventFd;

use crate::{BusDevice, EventTrigger, read_bytewise, write_bytewise};

/// First port of the controller; offsets of [`BusDevice`] are relative to it.
pub const BASE_PORT: u16 = 0x60;
/// Number of ports from [`BASE_PORT`], the command register included.
pub const PORTS: u16 = 5;

/// A keyboard controller that knows the reset command alone.
pub struct I8042 {
    inner: vm_superio::I8042Device<EventTrigger>,
}

impl I8042 {
    /// `reset` is written each time the guest sends the reset command.
    pub fn new(reset: EventFd) -> Self {
        Self { inner: vm_superio::I8042Device::new(EventTrigger(reset)) }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytewise(offset, data, |port| self.inner.read(port));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytewise(offset, data, |port, value| {
            // A full event counter means that a reset is pending already.
            let _ = self.inner.write(port, value);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_command_alone_raises_the_event() {
        let reset = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mut i8042 = I8042::new(reset.try_clone().unwrap());

        i8042.write(4, &[0xfd]);
        i8042.write(0, &[0xfe]);
        i8042.write(u64::MAX, &[0xfe, 0xfe]);
        assert!(reset.read().is_err());

        i8042.write(4, &[0xfe]);
        assert_eq!(reset.read().unwrap(), 1);

        // A wide write covers the command port with its second byte.
        i8042.write(3, &[0, 0xfe]);
        assert_eq!(reset.read().unwrap(), 1);
    }

    #[test]
    fn the_status_says_that_commands_may_be_sent() {
        let mut i8042 = I8042::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut data = [0xaa; 8];
        i8042.read(4, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
