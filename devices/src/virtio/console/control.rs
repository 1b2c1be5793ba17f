//! Control messages (virtio 1.2, section 5.3.6.2): what the driver says of ports, and what it is owed.
//!
//! A driver may say anything as often as it likes and never give a buffer for an answer. So answers are not
//! queued: what is kept is which of three messages are owed, and they are made when there is a buffer.

use samepage_hole::port::NAME;

use super::PORT;

/// Bytes of a message but for a name: the port, the event, its value.
pub(super) const CONTROL_BYTES: usize = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What the driver says that is of interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// It knows the device.
    DeviceReady,
    /// It knows the port.
    PortReady,
    /// A program of the guest's has opened the port, or closed it.
    PortOpen(bool),
}

impl Event {
    pub(super) fn parse(message: &[u8; CONTROL_BYTES]) -> Option<Self> {
        let [a, b, c, d, event, event_high, value, value_high] = *message;
        let port = u32::from_le_bytes([a, b, c, d]);
        let value = u16::from_le_bytes([value, value_high]);
        match u16::from_le_bytes([event, event_high]) {
            // Of the device, whatever the port.
            DEVICE_READY if value == 1 => Some(Self::DeviceReady),
            PORT_READY if (port, value) == (PORT, 1) => Some(Self::PortReady),
            PORT_OPEN if port == PORT => Some(Self::PortOpen(value != 0)),
            _ => None,
        }
    }
}

/// Messages that the driver is owed, in the order in which it gets them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Owed {
    add: bool,
    name: bool,
    open: bool,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    Add,
    Name,
    Open,
}

impl Owed {
    pub(super) fn add(&mut self) {
        self.add = true;
    }

    /// All that a driver has to know of a port that it knows.
    pub(super) fn describe(&mut self) {
        self.name = true;
        self.open = true;
    }

    /// Whether the host's end is open.
    pub(super) fn open(&mut self) {
        self.open = true;
    }

    pub(super) fn next(self) -> Option<Message> {
        let Self { add, name, open } = self;
        [(add, Message::Add), (name, Message::Name), (open, Message::Open)]
            .into_iter()
            .find_map(|(owed, message)| owed.then_some(message))
    }

    pub(super) fn settle(&mut self, message: Message) {
        match message {
            Message::Add => self.add = false,
            Message::Name => self.name = false,
            Message::Open => self.open = false,
        }
    }
}

impl Message {
    /// The message, where the host's end is open or not.
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
