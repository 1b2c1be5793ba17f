//! Content that depends only on a seed and a position.
//!
//! A seed defines an endless stream of bytes. All guests that fill memory or a file from the same seed hold
//! identical pages, and a host can compute any part of the stream to check it. Seed 0 is the stream of zero
//! bytes. The streams of all other seeds contain no two identical pages, within one stream or between two
//! streams (except after a collision of 64-bit words).
//!
//! Byte `8 k + i` of a stream is byte `i`, little-endian, of `mix(mix(seed) + k * 2^64/phi)`,
//! where `mix` is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

/// Size of a page of content in bytes, the same as that of a page of guest memory.
pub const PAGE_SIZE: usize = 4096;

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `buf` with the stream of `seed`, from the start of page number `page` on.
pub fn fill(seed: u64, page: u64, buf: &mut [u8]) {
    if seed == 0 {
        buf.fill(0);
        return;
    }
    let base = mix(seed);
    let first = page.wrapping_mul((PAGE_SIZE / 8) as u64);
    for (k, chunk) in buf.chunks_mut(8).enumerate() {
        let word = mix(base.wrapping_add(first.wrapping_add(k as u64).wrapping_mul(GOLDEN_GAMMA)));
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
}

/// Returns the first `len` bytes of the stream of `seed`.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0; len];
    fill(seed, 0, &mut buf);
    buf
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn is_fixed_for_all_time() {
        // A host and a guest of different versions must agree.
        assert_eq!(bytes(1, 12), [0x7d, 0x3a, 0x36, 0x0f, 0x09, 0x0e, 0xb4, 0x7a, 0x72, 0xd7, 0xc2, 0xdd]);
    }

    #[test]
    fn seed_zero_is_zeros() {
        assert_eq!(bytes(0, 100), [0; 100]);
    }

    #[test]
    fn no_two_pages_are_alike() {
        let pages: HashSet<Vec<u8>> = (1..4)
            .flat_map(|seed| bytes(seed, 64 * PAGE_SIZE).chunks(PAGE_SIZE).map(Vec::from).collect::<Vec<_>>())
            .collect();
        assert_eq!(pages.len(), 3 * 64);
    }

    proptest! {
        #[test]
        fn a_page_is_the_same_wherever_it_is_computed(seed: u64, page in 0u64..16, len in 0usize..2 * PAGE_SIZE) {
            let stream = bytes(seed, 18 * PAGE_SIZE);
            let mut part = vec![0xff; len];
            fill(seed, page, &mut part);
            let start = page as usize * PAGE_SIZE;
            prop_assert_eq!(&part[..], &stream[start..start + len]);
        }
    }
}
