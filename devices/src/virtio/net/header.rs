//! The header before each frame (virtio 1.2, section 5.1.6), as guests may fill it in.
//!
//! The host's kernel trusts a header less than it trusts a packet, but it is the kernel all the same. So it sees
//! only headers whose fields fit together and to the negotiated features.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP,
};

use crate::net::{HEADER_BYTES, MIN_FRAME};

/// Offset of `num_buffers` in the header.
pub(super) const NUM_BUFFERS: usize = 10;

/// Why a frame of the guest is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum HeaderError {
    #[error("a checksum is asked for that was not negotiated, or lies outside the frame")]
    Checksum,
    #[error("a segmentation is asked for that was not negotiated")]
    Segmentation,
    #[error("segments have no size, or no checksum")]
    Segments,
    #[error("its headers are longer than the frame")]
    Headers,
}

/// Checks the header of a frame of `length` bytes, and clears what the host is not to see.
pub(super) fn check(
    header: &mut [u8; HEADER_BYTES],
    length: usize,
    features: u64,
) -> Result<(), HeaderError> {
    let has = |feature: u32| features & (1 << feature) != 0;
    let field = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (headers, segment, start, offset) = (field(2), field(4), field(6), field(8));
    let needs_checksum = u32::from(header[0]) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    if needs_checksum && (!has(VIRTIO_NET_F_CSUM) || start < MIN_FRAME || start + offset + 2 > length) {
        return Err(HeaderError::Checksum);
    }
    let kind = u32::from(header[1]);
    if kind != VIRTIO_NET_HDR_GSO_NONE {
        let is_negotiated = match kind {
            VIRTIO_NET_HDR_GSO_TCPV4 => has(VIRTIO_NET_F_HOST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => has(VIRTIO_NET_F_HOST_TSO6),
            VIRTIO_NET_HDR_GSO_UDP => has(VIRTIO_NET_F_HOST_UFO),
            _ => false,
        };
        if !is_negotiated {
            return Err(HeaderError::Segmentation);
        }
        if segment == 0 || !needs_checksum {
            return Err(HeaderError::Segments);
        }
        if headers > length {
            return Err(HeaderError::Headers);
        }
    }
    header[0] = if needs_checksum { VIRTIO_NET_HDR_F_NEEDS_CSUM as u8 } else { 0 };
    if !needs_checksum {
        // The kind is NONE, so the rest means nothing.
        header[1..].fill(0);
    }
    header[NUM_BUFFERS..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = 1 << VIRTIO_NET_F_CSUM
        | 1 << VIRTIO_NET_F_HOST_TSO4
        | 1 << VIRTIO_NET_F_HOST_TSO6
        | 1 << VIRTIO_NET_F_HOST_UFO;

    fn header(flags: u8, kind: u8, fields: [u16; 5]) -> [u8; HEADER_BYTES] {
        let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (place, field) in header[2..].chunks_mut(2).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        header
    }

    #[test]
    fn only_what_was_negotiated_and_fits_passes() {
        let verdict = |features, header: [u8; HEADER_BYTES]| check(&mut { header }, 100, features);
        assert_eq!(verdict(0, header(0, 0, [0; 5])), Ok(()));
        assert_eq!(verdict(ALL, header(1, 1, [54, 1448, 34, 16, 0])), Ok(()));
        assert_eq!(verdict(ALL, header(1, 4, [74, 1448, 54, 16, 9])), Ok(()));
        assert_eq!(verdict(0, header(1, 0, [0, 0, 34, 16, 0])), Err(HeaderError::Checksum));
        assert_eq!(verdict(ALL, header(1, 0, [0, 0, 98, 1, 0])), Err(HeaderError::Checksum));
        assert_eq!(verdict(ALL, header(1, 0, [0, 0, u16::MAX, u16::MAX, 0])), Err(HeaderError::Checksum));
        assert_eq!(verdict(ALL, header(1, 0, [0, 0, 3, 16, 0])), Err(HeaderError::Checksum));
        assert_eq!(verdict(1, header(1, 1, [54, 1448, 34, 16, 0])), Err(HeaderError::Segmentation));
        // Explicit congestion notification, and a kind that nobody knows.
        for kind in [0x81, 2, 5, 0x80] {
            assert_eq!(verdict(ALL, header(1, kind, [54, 9, 34, 16, 0])), Err(HeaderError::Segmentation));
        }
        assert_eq!(verdict(ALL, header(0, 1, [54, 1448, 34, 16, 0])), Err(HeaderError::Segments));
        assert_eq!(verdict(ALL, header(1, 1, [54, 0, 34, 16, 0])), Err(HeaderError::Segments));
        assert_eq!(verdict(ALL, header(1, 1, [101, 1448, 34, 16, 0])), Err(HeaderError::Headers));
    }

    #[test]
    fn the_host_sees_no_field_without_meaning() {
        let mut seen = header(0xfe, 0, [1, 2, 3, 4, 5]);
        check(&mut seen, 100, ALL).unwrap();
        assert_eq!(seen, [0; HEADER_BYTES]);
        let mut seen = header(0xff, 0, [1, 2, 34, 6, 5]);
        check(&mut seen, 100, ALL).unwrap();
        assert_eq!(seen, header(1, 0, [1, 2, 34, 6, 0]));
    }

    proptest! {
        #[test]
        fn what_passes_stays_within_the_frame(bytes in any::<[u8; HEADER_BYTES]>(), length in 14usize..70000) {
            let mut seen = bytes;
            if check(&mut seen, length, ALL).is_ok() && seen[0] != 0 {
                let field = |at: usize| usize::from(u16::from_le_bytes([seen[at], seen[at + 1]]));
                prop_assert!(field(6) + field(8) + 2 <= length);
            }
        }
    }
}
