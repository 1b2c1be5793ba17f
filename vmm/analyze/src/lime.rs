//! Memory in LiME's format: ranges of physical addresses, each after a header.
//!
//! The file is not trusted: the number of ranges is limited, and they must lie in the file. Source: LiME's
//! documentation of its format (`lime_mem_range_header`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::oracle::PAGE_SIZE;
use thiserror::Error;

use super::file::Region;

/// The first bytes of each range.
pub(super) const MAGIC: &[u8] = b"EMiL";

const HEADER: usize = 32;
const VERSION: u32 = 1;
/// AVML's version of the format, which compresses ranges.
const COMPRESSED: u32 = 2;
/// Limit for ranges, above the number in any machine.
const MOST_RANGES: usize = 1 << 16;
const PAGE: u64 = PAGE_SIZE as u64;

/// The reason why a file of LiME cannot be used.
#[derive(Debug, Error)]
pub(super) enum LimeError {
    #[error("the file ends within the range at offset {0}: it is truncated; copy it again")]
    Truncated(u64),
    #[error("there is no header of a range at offset {0}: the file is damaged; dump it again")]
    Damaged(u64),
    #[error("AVML has compressed it: convert it (`avml-convert FILE NEW-FILE`)")]
    Compressed,
    #[error("it is of version {0} of LiME's format: dump with `format=lime`, uncompressed")]
    Version(u32),
    #[error("it has more than {MOST_RANGES} ranges: the file is damaged; dump it again")]
    Ranges,
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// Returns the memory in a file of `length` bytes.
pub(super) fn regions(file: &File, length: u64) -> Result<Vec<Region>, LimeError> {
    let mut regions = Vec::new();
    let mut at = 0;
    while at < length {
        let mut header = [0; HEADER];
        if length - at < HEADER as u64 {
            return Err(LimeError::Truncated(at));
        }
        file.read_exact_at(&mut header, at)?;
        if !header.starts_with(MAGIC) {
            return Err(LimeError::Damaged(at));
        }
        match number(&header[4..8]) as u32 {
            VERSION => {}
            COMPRESSED => return Err(LimeError::Compressed),
            other => return Err(LimeError::Version(other)),
        }
        // The last address is inclusive.
        let (first, last) = (number(&header[8..16]), number(&header[16..24]));
        let bytes = last.checked_sub(first).and_then(|bytes| bytes.checked_add(1));
        let bytes = bytes.ok_or(LimeError::Damaged(at))?;
        let offset = at + HEADER as u64;
        if bytes > length - offset {
            return Err(LimeError::Truncated(at));
        }
        if regions.len() == MOST_RANGES {
            return Err(LimeError::Ranges);
        }
        // Align pages to the guest's addresses.
        let skipped = (first.wrapping_neg() % PAGE).min(bytes);
        regions.push(Region {
            address: first.saturating_add(skipped),
            offset: offset + skipped,
            stored: bytes - skipped,
            absent: 0,
        });
        at = offset + bytes;
    }
    Ok(regions)
}

/// Returns a little-endian number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn range(version: u32, first: u64, last: u64, content: &[u8]) -> Vec<u8> {
        let mut range = MAGIC.to_vec();
        range.extend(version.to_le_bytes());
        [first, last, 0].iter().for_each(|word| range.extend(word.to_le_bytes()));
        range.extend(content);
        range
    }

    fn parse(content: &[u8]) -> Result<Vec<Region>, LimeError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        regions(&file, content.len() as u64)
    }

    #[test]
    fn each_range_is_found_behind_its_header() {
        let low = range(1, 0x1000, 0x2fff, &[1; 0x2000]);
        let high = range(1, 1 << 32, (1 << 32) + 0xfff, &[2; 0x1000]);
        let regions = parse(&[low, high].concat()).unwrap();
        assert_eq!(
            regions,
            [
                Region { address: 0x1000, offset: 32, stored: 0x2000, absent: 0 },
                Region { address: 1 << 32, offset: 0x2040, stored: 0x1000, absent: 0 },
            ]
        );
        let odd = parse(&range(1, 0xf80, 0x1fff, &[1; 0x1080])).unwrap();
        assert_eq!(odd, [Region { address: 0x1000, offset: 32 + 0x80, stored: 0x1000, absent: 0 }]);
    }

    #[test]
    fn damaged_files_are_refused() {
        let good = range(1, 0, 0xfff, &[0; 0x1000]);
        assert!(matches!(parse(&good[..good.len() - 1]), Err(LimeError::Truncated(0))));
        assert!(matches!(parse(&[&good[..], &good[..20]].concat()), Err(LimeError::Truncated(0x1020))));
        assert!(matches!(parse(&[&good[..], &[0; 40]].concat()), Err(LimeError::Damaged(0x1020))));
        assert!(matches!(parse(&range(1, 1, 0, &[])), Err(LimeError::Damaged(0))));
        assert!(matches!(parse(&range(1, 0, u64::MAX, &[])), Err(LimeError::Damaged(0))));
        assert!(matches!(parse(&range(2, 0, 0, &[0])), Err(LimeError::Compressed)));
        assert!(matches!(parse(&range(3, 0, 0, &[0])), Err(LimeError::Version(3))));
    }

    proptest! {
        #[test]
        fn no_range_leads_beyond_the_file(ranges in prop::collection::vec((any::<u64>(), 0_u64..0x3000), 0..6)) {
            let content: Vec<u8> = ranges
                .iter()
                .flat_map(|(first, bytes)| range(1, *first, first.wrapping_add(*bytes), &[7; 0x800]))
                .collect();
            for region in parse(&content).into_iter().flatten() {
                prop_assert!(region.offset + region.stored <= content.len() as u64);
            }
        }
    }
}
