//! Packets between guest and host: a header, and in some the data of a connection (virtio 1.2, section 5.10.6).

/// Length of a header, in bytes.
pub(super) const HEADER_BYTES: usize = 44;
/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// The kind of socket that is supported: a stream.
const STREAM: u16 = 1;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
}

const OPERATIONS: [Operation; 7] = [
    Operation::Request,
    Operation::Response,
    Operation::Reset,
    Operation::Shutdown,
    Operation::Data,
    Operation::CreditUpdate,
    Operation::CreditRequest,
];

/// The sender will receive no more (flag of a shutdown).
pub(super) const NO_RECEIVE: u32 = 1;
/// The sender will send no more (flag of a shutdown).
pub(super) const NO_SEND: u32 = 2;

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A header of the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FromGuest {
    pub(super) source: u64,
    pub(super) destination: u64,
    pub(super) ports: Ports,
    pub(super) length: u32,
    /// `None` for an unknown operation, or another kind of socket.
    pub(super) operation: Option<Operation>,
    pub(super) flags: u32,
    /// Bytes that the guest can hold for the connection.
    pub(super) buffer: u32,
    /// Bytes of the connection that the guest's programs have read, modulo 2^32.
    pub(super) forwarded: u32,
}

impl FromGuest {
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let number = usize::from(half(30)).checked_sub(1);
        let operation = number.and_then(|number| OPERATIONS.get(number)).copied();
        Self {
            source: long(0),
            destination: long(8),
            ports: Ports { guest: word(16), host: word(20) },
            length: word(24),
            operation: operation.filter(|_| half(28) == STREAM),
            flags: word(32),
            buffer: word(36),
            forwarded: word(40),
        }
    }
}

/// A header for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ToGuest {
    pub(super) guest_cid: u64,
    pub(super) ports: Ports,
    pub(super) length: u32,
    pub(super) operation: Operation,
    pub(super) flags: u32,
    /// Bytes that the host can hold for the connection.
    pub(super) buffer: u32,
    /// Bytes of the connection that the host's program has got, modulo 2^32.
    pub(super) forwarded: u32,
}

impl ToGuest {
    pub(super) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let number = OPERATIONS.iter().position(|operation| *operation == self.operation).unwrap_or(0) + 1;
        put(0, &HOST_CID.to_le_bytes());
        put(8, &self.guest_cid.to_le_bytes());
        put(16, &self.ports.host.to_le_bytes());
        put(20, &self.ports.guest.to_le_bytes());
        put(24, &self.length.to_le_bytes());
        put(28, &STREAM.to_le_bytes());
        put(30, &(number as u16).to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buffer.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_with_both_ends_exchanged() {
        for operation in OPERATIONS {
            let ports = Ports { host: 7, guest: 0xfedc_ba98 };
            let (buffer, forwarded) = (0x1_0000, u32::MAX);
            let sent = ToGuest { guest_cid: 3, ports, length: 9, operation, flags: 2, buffer, forwarded };
            let read = FromGuest::parse(&sent.bytes());
            assert_eq!((read.source, read.destination), (HOST_CID, 3));
            assert_eq!(read.ports, Ports { host: ports.guest, guest: ports.host });
            assert_eq!((read.length, read.operation, read.flags), (9, Some(operation), 2));
            assert_eq!((read.buffer, read.forwarded), (buffer, forwarded));
        }
    }

    #[test]
    fn other_sockets_and_operations_are_unknown() {
        let mut bytes = [0; HEADER_BYTES];
        for (kind, operation) in [(1, 0), (1, 8), (1, u16::MAX), (2, 1), (0, 1)] {
            bytes[28..30].copy_from_slice(&u16::to_le_bytes(kind));
            bytes[30..32].copy_from_slice(&u16::to_le_bytes(operation));
            assert_eq!(FromGuest::parse(&bytes).operation, None);
        }
    }
}
