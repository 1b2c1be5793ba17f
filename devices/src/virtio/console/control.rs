//! Control messages (virtio 1.2, section 5.3.6.2): the driver's events, and the messages that the device
//! still has to send.
//!
//! A driver may send any number of events and never provide a buffer for an answer. So answers are not
//! queued. The device stores which of three messages are outstanding, and composes them when there is a
//! buffer.

use samepage_hole::port::NAME;

use super::PORT;

/// Length of a message without the name, in bytes: the port, the event and its value.
pub(super) const CONTROL_BYTES: usize = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// The driver's events that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The driver has found the device.
    DeviceReady,
    /// The driver has found the port.
    PortReady,
    /// A program of the guest has opened (`true`) or closed the port.
    PortOpen(bool),
}

impl Event {
    pub(super) fn parse(message: &[u8; CONTROL_BYTES]) -> Option<Self> {
        let [a, b, c, d, event, event_high, value, value_high] = *message;
        let port = u32::from_le_bytes([a, b, c, d]);
        let value = u16::from_le_bytes([value, value_high]);
        match u16::from_le_bytes([event, event_high]) {
            // This event concerns the device, whatever its port number.
            DEVICE_READY if value == 1 => Some(Self::DeviceReady),
            PORT_READY if (port, value) == (PORT, 1) => Some(Self::PortReady),
            PORT_OPEN if port == PORT => Some(Self::PortOpen(value != 0)),
            _ => None,
        }
    }
}

/// Outstanding messages to the driver, in order.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outstanding {
    add: bool,
    name: bool,
    open: bool,
}

/// A message to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    Add,
    Name,
    Open,
}

impl Outstanding {
    pub(super) fn add(&mut self) {
        self.add = true;
    }

    /// Adds the messages that describe a port.
    pub(super) fn describe(&mut self) {
        self.name = true;
        self.open = true;
    }

    /// Adds the message about the host's end.
    pub(super) fn open(&mut self) {
        self.open = true;
    }

    pub(super) fn next(self) -> Option<Message> {
        let Self { add, name, open } = self;
        [(add, Message::Add), (name, Message::Name), (open, Message::Open)]
            .into_iter()
            .find_map(|(is_outstanding, message)| is_outstanding.then_some(message))
    }

    pub(super) fn remove(&mut self, message: Message) {
        match message {
            Message::Add => self.add = false,
            Message::Name => self.name = false,
            Message::Open => self.open = false,
        }
    }
}

impl Message {
    /// Returns the bytes of the message. `is_open` tells whether the host's end is open.
    pub(super) fn bytes(self, is_open: bool) -> Vec<u8> {
        let (event, value, name) = match self {
            Self::Add => (DEVICE_ADD, 1, ""),
            Self::Name => (PORT_NAME, 1, NAME),
            Self::Open => (PORT_OPEN, u16::from(is_open), ""),
        };
        let mut bytes = PORT.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes
    }
}
