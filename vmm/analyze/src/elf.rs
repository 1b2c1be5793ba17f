//! Finds memory in ELF cores.
//!
//! Two kinds of cores contain guest memory. QEMU (`dump-guest-memory`, `virsh dump --memory-only`) writes
//! guest memory with physical addresses. The kernel and gcore write the memory of a process, in which the
//! large read-write mappings are guest memory. Source: the System V ABI, chapters 4 and 5.
//!
//! QEMU's dumps by virtual addresses (`paging: true`) describe only a part of the memory that the guest maps.
//! The file nevertheless contains all RAM after the notes, and this module reads it from there (QEMU's
//! dump/dump.c).
//!
//! The file is not trusted: counts are limited, sums are checked, and only headers are kept in memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::oracle::PAGE_SIZE;
use thiserror::Error;

use super::file::Region;
use super::xen;
use samepage_text::units::bytes;

/// The first bytes of an ELF file.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

const PAGE: u64 = PAGE_SIZE as u64;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: usize = 64;
/// With this value, the first section header contains the number of segments.
const PN_XNUM: u64 = 0xffff;
/// Above the number in any dump: a process in Linux has 65,530 mappings by default.
const MOST_SEGMENTS: u64 = 1 << 20;
const ET_CORE: u64 = 4;
const EM_X86_64: u64 = 62;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// Limit for searching notes, in bytes. They have some hundred bytes for each vCPU.
const MOST_NOTES: u64 = 1 << 20;
/// Limit for segments with notes. A dump has one.
const MOST_NOTE_SEGMENTS: usize = 16;
const PF_WRITE: u64 = 2;
const PF_READ: u64 = 4;

/// A raw image may begin with the ELF header of the guest's kernel.
const RAW: &str = "; for raw memory that begins with a program, use --format raw";

/// The reason why a core cannot be used.
#[derive(Debug, Error)]
pub(super) enum CoreError {
    #[error("the file ends within its {0}: it is truncated; dump it again")]
    Truncated(&'static str),
    #[error("it is an ELF file, but not 64-bit little-endian: only memory of x86-64 guests can be read{RAW}")]
    Class,
    #[error("it is an ELF file, but not a core dump (its type is {0}, not 4): give a memory image{RAW}")]
    NoCore(u64),
    #[error("it is a core dump of machine {0}: only memory of x86-64 guests can be read{RAW}")]
    Machine(u64),
    #[error("its program headers are {0} bytes long, not 56: the file is damaged")]
    HeaderSize(u64),
    #[error("its header has {0} segments, which is too many: the file is damaged")]
    Segments(u64),
    #[error(
        "segment {index} is {bytes} bytes from offset {offset} on, and the file is {file} bytes long: it is \
         truncated; dump it again, with enough free disk space"
    )]
    Segment { index: u64, offset: u64, bytes: u64, file: u64 },
    #[error(
        "the file has only a part of the memory of segment {0}, and QEMU did not write this dump, so the \
         rest cannot be found; dump by physical addresses (without `-p` of dump-guest-memory)"
    )]
    Partial(u64),
    #[error("it holds no memory: no segment to load has contents")]
    Empty,
    #[error(
        "it is the core of a process without a read-write mapping of {least} or more that could be guest \
         memory; lower --min-mapping, or include guest memory in the dump (/proc/PID/coredump_filter)",
        least = bytes(*.0)
    )]
    NoGuest(u64),
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// A segment to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    /// The index among all program headers.
    index: u64,
    flags: u64,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    stored: u64,
    bytes: u64,
}

/// Returns the guest memory in a core of `length` bytes. In the core of a process, mappings below `least`
/// bytes are ignored.
pub(super) fn regions(file: &File, length: u64, least: u64) -> Result<Vec<Region>, CoreError> {
    let Headers { elf, segments, notes } = headers(file, length)?;
    if segments.is_empty()
        && let Some(pages) = xen::regions(file, length, &elf)?.filter(|pages| pages.stored > 0)
    {
        return Ok(vec![pages]);
    }
    if segments.iter().all(|segment| segment.stored == 0) {
        return Err(CoreError::Empty);
    }
    let by_virtual_address = segments.iter().any(|segment| {
        ![0, segment.physical_address].contains(&segment.virtual_address) || segment.stored < segment.bytes
    });
    if by_virtual_address
        && let Some(all) = all_of_qemu(file, length, &notes)?
        && segments.iter().all(|segment| segment.stored == 0 || segment.offset >= all.offset)
    {
        return Ok(vec![all]);
    }
    let of_process = segments.iter().all(|segment| segment.physical_address == 0)
        && segments.iter().any(|segment| segment.virtual_address != 0);
    if of_process { process(segments, least) } else { physical(&segments) }
}

/// Returns all RAM of a guest in a dump of QEMU: the data after the notes. Returns `None` if the notes are
/// not QEMU's.
fn all_of_qemu(file: &File, length: u64, notes: &[Segment]) -> Result<Option<Region>, CoreError> {
    for Segment { offset, stored, .. } in notes.iter().take(MOST_NOTE_SEGMENTS) {
        let mut bytes = vec![0; (*stored).min(MOST_NOTES) as usize];
        file.read_exact_at(&mut bytes, *offset)?;
        if has_note_of(b"QEMU\0", &bytes) {
            let start = offset + stored;
            // Names of sections may follow, which are shorter than a page.
            let stored = (length - start) & !(PAGE - 1);
            return Ok((stored > 0).then_some(Region { address: 0, offset: start, stored, absent: 0 }));
        }
    }
    Ok(None)
}

fn has_note_of(owner: &[u8], mut notes: &[u8]) -> bool {
    const NOTE_HEADER: usize = 12;
    while let Some((header, rest)) = notes.split_at_checked(NOTE_HEADER) {
        let [name, content] = [number(header, 0, 4), number(header, 4, 4)].map(|bytes| bytes as usize);
        if name == owner.len() && rest.starts_with(owner) {
            return true;
        }
        notes = rest.get(name.next_multiple_of(4) + content.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// The headers of a core.
struct Headers {
    elf: [u8; HEADER],
    /// Segments to load.
    segments: Vec<Segment>,
    /// Segments of notes.
    notes: Vec<Segment>,
}

fn headers(file: &File, length: u64) -> Result<Headers, CoreError> {
    let read = |offset: u64, bytes: &mut [u8], what| {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > length) {
            return Err(CoreError::Truncated(what));
        }
        Ok(file.read_exact_at(bytes, offset)?)
    };
    let mut header = [0; HEADER];
    read(0, &mut header, "ELF header")?;
    // EI_CLASS must be ELFCLASS64, EI_DATA must be ELFDATA2LSB.
    if header[4..6] != [2, 1] {
        return Err(CoreError::Class);
    }
    match (number(&header, 16, 2), number(&header, 18, 2)) {
        (ET_CORE, EM_X86_64) => {}
        (ET_CORE, machine) => return Err(CoreError::Machine(machine)),
        (kind, _) => return Err(CoreError::NoCore(kind)),
    }
    let table = number(&header, 32, 8);
    let mut count = number(&header, 56, 2);
    if count > 0 && number(&header, 54, 2) != PROGRAM_HEADER as u64 {
        return Err(CoreError::HeaderSize(number(&header, 54, 2)));
    }
    if count == PN_XNUM {
        let mut section = [0; SECTION_HEADER];
        read(number(&header, 40, 8), &mut section, "first section header")?;
        count = number(&section, 44, 4);
    }
    if count > MOST_SEGMENTS {
        return Err(CoreError::Segments(count));
    }

    let (mut segments, mut notes) = (Vec::new(), Vec::new());
    let mut headers = vec![0; count as usize * PROGRAM_HEADER];
    read(table, &mut headers, "program headers")?;
    for (index, header) in (0..).zip(headers.as_chunks::<PROGRAM_HEADER>().0) {
        let kind = number(header, 0, 4);
        if kind != PT_LOAD && kind != PT_NOTE {
            continue;
        }
        let segment = Segment {
            index,
            flags: number(header, 4, 4),
            offset: number(header, 8, 8),
            virtual_address: number(header, 16, 8),
            physical_address: number(header, 24, 8),
            stored: number(header, 32, 8),
            bytes: number(header, 40, 8),
        };
        let Segment { offset, stored, .. } = segment;
        if stored > 0 && offset.checked_add(stored).is_none_or(|end| end > length) {
            return Err(CoreError::Segment { index, offset, bytes: stored, file: length });
        }
        if kind == PT_LOAD { segments.push(segment) } else { notes.push(segment) }
    }
    Ok(Headers { elf: header, segments, notes })
}

/// Returns all stored memory. Segments without contents are device memory, or were filtered out for the dump.
fn physical(segments: &[Segment]) -> Result<Vec<Region>, CoreError> {
    let mut regions = Vec::new();
    for segment in segments.iter().filter(|segment| segment.stored > 0) {
        if segment.stored < segment.bytes {
            return Err(CoreError::Partial(segment.index));
        }
        let Segment { physical_address: address, offset, stored, .. } = *segment;
        regions.push(Region { address, offset, stored, absent: 0 });
    }
    Ok(once(regions))
}

/// Returns the large read-write mappings. Parts that were not dumped count as absent.
fn process(mut segments: Vec<Segment>, least: u64) -> Result<Vec<Region>, CoreError> {
    segments.retain(|segment| segment.flags & (PF_READ | PF_WRITE) == PF_READ | PF_WRITE);
    segments.sort_by_key(|segment| segment.virtual_address);
    let end = |segment: &Segment| segment.virtual_address.saturating_add(segment.bytes);
    let regions: Vec<_> = segments
        // The kernel splits mappings where their attributes differ.
        .chunk_by(|one, next| end(one) == next.virtual_address)
        .filter(|group| group.iter().map(|segment| segment.bytes).fold(0, u64::saturating_add) >= least)
        .flatten()
        .map(|segment| Region {
            address: segment.virtual_address,
            offset: segment.offset,
            stored: segment.stored.min(segment.bytes),
            absent: segment.bytes.saturating_sub(segment.stored),
        })
        .collect();
    if regions.iter().all(|region| region.stored == 0) {
        return Err(CoreError::NoGuest(least));
    }
    Ok(once(regions))
}

/// Returns the regions in file order, with each byte in only one region. So a file cannot cause more work
/// than its size.
fn once(mut regions: Vec<Region>) -> Vec<Region> {
    regions.sort_by_key(|region| region.offset);
    let mut taken = 0;
    regions.retain_mut(|region| {
        if region.stored == 0 {
            return true;
        }
        let end = region.offset + region.stored;
        let repeated = taken.max(region.offset) - region.offset;
        if repeated >= region.stored {
            return false;
        }
        taken = end;
        *region = Region {
            address: region.address.saturating_add(repeated),
            offset: region.offset + repeated,
            stored: region.stored - repeated,
            absent: region.absent,
        };
        true
    });
    regions
}

/// Returns the little-endian number of `size` bytes at `offset`, which must be within the header.
pub(super) fn number(header: &[u8], offset: usize, size: usize) -> u64 {
    header[offset..offset + size].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    const MIB: u64 = 1 << 20;

    fn segment(physical_address: u64, virtual_address: u64, offset: u64, stored: u64) -> Segment {
        Segment { index: 0, flags: 6, offset, virtual_address, physical_address, stored, bytes: stored }
    }

    fn core(segments: &[Segment]) -> Vec<u8> {
        let mut file = vec![0; HEADER];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[16..20].copy_from_slice(&[4, 0, 62, 0]);
        file[32] = HEADER as u8;
        file[54] = PROGRAM_HEADER as u8;
        file[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        for segment in segments {
            file.extend(1_u32.to_le_bytes());
            file.extend((segment.flags as u32).to_le_bytes());
            for word in [
                segment.offset,
                segment.virtual_address,
                segment.physical_address,
                segment.stored,
                segment.bytes,
                4096,
            ] {
                file.extend(word.to_le_bytes());
            }
        }
        file
    }

    /// Parses headers in front of a hole.
    fn parse(headers: &[u8], length: u64) -> Result<Vec<Region>, CoreError> {
        parse_from(headers, length, 16 * MIB)
    }

    fn parse_from(headers: &[u8], length: u64, least: u64) -> Result<Vec<Region>, CoreError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(headers).unwrap();
        file.set_len(length).unwrap();
        regions(&file, length, least)
    }

    #[test]
    fn guest_memory_is_found_by_physical_addresses() {
        let two = [segment(1 << 32, 0, MIB, MIB), segment(0, 0, 4096, 65536)];
        let regions = parse(&core(&two), 2 * MIB).unwrap();
        assert_eq!(
            regions,
            [
                Region { address: 0, offset: 4096, stored: 65536, absent: 0 },
                Region { address: 1 << 32, offset: MIB, stored: MIB, absent: 0 },
            ]
        );
        // One segment at address 0 looks like nothing else.
        assert_eq!(parse(&core(&[segment(0, 0, 4096, 4096)]), MIB).unwrap().len(), 1);
    }

    #[test]
    fn bytes_that_several_segments_name_count_once() {
        let segments = [
            segment(4096, 0xffff_8000_0000_1000, 4096, 8 * 4096),
            segment(8192, 0x40_0000, 8192, 4096),
            segment(8 * 4096, 0x50_0000, 8 * 4096, 4 * 4096),
            segment(0xfee0_0000, 0x60_0000, 0, 0),
        ];
        let regions = parse(&core(&segments), MIB).unwrap();
        assert_eq!(
            regions,
            [
                Region { address: 4096, offset: 4096, stored: 8 * 4096, absent: 0 },
                Region { address: 9 * 4096, offset: 9 * 4096, stored: 3 * 4096, absent: 0 },
            ]
        );
    }

    #[test]
    fn of_a_process_its_large_writable_mappings_count() {
        let base = 0x7f00_0000_0000;
        let code = Segment { flags: 5, ..segment(0, 0x40_0000, 40 * MIB, 20 * MIB) };
        let segments = [
            code,
            segment(0, 0x1000_0000, 4096, MIB),
            segment(0, base + 10 * MIB, 20 * MIB, 10 * MIB),
            Segment { bytes: 10 * MIB, ..segment(0, base, 2 * MIB, 8 * MIB) },
        ];
        let regions = parse(&core(&segments), 60 * MIB).unwrap();
        assert_eq!(
            regions,
            [
                Region { address: base, offset: 2 * MIB, stored: 8 * MIB, absent: 2 * MIB },
                Region { address: base + 10 * MIB, offset: 20 * MIB, stored: 10 * MIB, absent: 0 },
            ]
        );
        assert!(matches!(parse(&core(&segments[..2]), 60 * MIB), Err(CoreError::NoGuest(_))));
    }

    /// Bytes of the notes in the next.
    const NOTES: u64 = 24 + 28;

    /// Returns a core of this size, with notes of this owner before its segments.
    fn core_with_notes(owner: &[u8; 5], segments: &[Segment], length: usize) -> Vec<u8> {
        let note = Segment { stored: NOTES, ..segment(0, 0, 1024, 0) };
        let mut file = core(&[&[note][..], segments].concat());
        file[HEADER] = PT_NOTE as u8;
        file.resize(1024, 0);
        for (name, content) in [(b"CORE\0", 1), (owner, 7)] {
            [5_u32, content, 1].iter().for_each(|word| file.extend(word.to_le_bytes()));
            file.extend(name);
            file.resize(file.len().next_multiple_of(4), 0);
            file.resize((file.len() + content as usize).next_multiple_of(4), 0);
        }
        assert_eq!(file.len() as u64, 1024 + NOTES);
        file.resize(length, 0);
        file
    }

    #[test]
    fn a_dump_by_virtual_addresses_holds_all_memory_behind_its_notes() {
        const START: u64 = 1024 + NOTES;
        let direct_map = Segment { bytes: MIB, ..segment(0, 0xffff_8880_0000_0000, START, 16 * PAGE) };
        let text = segment(8 * PAGE, 0xffff_ffff_8100_0000, START + 8 * PAGE, 4 * PAGE);
        // Names of sections follow the memory.
        let length = START + 40 * PAGE + 11;
        let all = Region { address: 0, offset: START, stored: 40 * PAGE, absent: 0 };
        for segments in [
            &[direct_map][..],
            &[direct_map, text],
            &[text],
            &[Segment { bytes: MIB, ..segment(0, 0, START, PAGE) }],
        ] {
            let dump = core_with_notes(b"QEMU\0", segments, length as usize);
            assert_eq!(parse(&dump, length).unwrap(), [all], "{segments:?}");
        }
        // By physical addresses it is described as a whole.
        let physical = [segment(0, 0, START, 8 * PAGE), segment(MIB, MIB, START + 8 * PAGE, PAGE)];
        assert_eq!(parse(&core_with_notes(b"QEMU\0", &physical, length as usize), length).unwrap().len(), 2);
        let others = core_with_notes(b"KVMM\0", &[direct_map, text], length as usize);
        assert!(matches!(parse(&others, length), Err(CoreError::Partial(1))));
        // Memory in front of the notes is in no dump of QEMU's.
        let before = core_with_notes(b"QEMU\0", &[segment(PAGE, MIB, 512, PAGE)], length as usize);
        assert_eq!(parse(&before, length).unwrap()[0].offset, 512);
    }

    #[test]
    fn many_segments_are_counted_in_a_section_header() {
        let mut file = core(&[segment(0, 0, 4096, 4096)]);
        file[56..58].copy_from_slice(&[0xff, 0xff]);
        file[40..48].copy_from_slice(&512_u64.to_le_bytes());
        file.resize(512 + SECTION_HEADER, 0);
        file[512 + 44] = 1;
        assert_eq!(parse(&file, MIB).unwrap().len(), 1);
        file[512 + 44..512 + 48].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(parse(&file, MIB), Err(CoreError::Segments(_))));
    }

    #[test]
    fn damaged_cores_are_refused() {
        let good = core(&[segment(0, 0, 4096, 4096)]);
        assert!(matches!(parse(&good[..40], 40), Err(CoreError::Truncated("ELF header"))));
        assert!(matches!(parse(&good[..100], 100), Err(CoreError::Truncated("program headers"))));
        assert!(matches!(parse(&good, 8191), Err(CoreError::Segment { index: 0, file: 8191, .. })));
        let with = |at: usize, byte: u8| {
            let mut file = good.clone();
            file[at] = byte;
            parse(&file, MIB)
        };
        assert!(matches!(with(4, 1), Err(CoreError::Class)));
        assert!(matches!(with(5, 2), Err(CoreError::Class)));
        assert!(matches!(with(16, 2), Err(CoreError::NoCore(2))));
        assert!(matches!(with(18, 183), Err(CoreError::Machine(183))));
        assert!(matches!(with(54, 32), Err(CoreError::HeaderSize(32))));
        assert!(matches!(with(39, 255), Err(CoreError::Truncated("program headers"))));
        assert!(matches!(parse(&core(&[]), MIB), Err(CoreError::Empty)));
        let partial = Segment { bytes: MIB, ..segment(4096, 4096, 4096, 4096) };
        assert!(matches!(parse(&core(&[partial]), MIB), Err(CoreError::Partial(0))));
        let huge = segment(0, 0, u64::MAX - 4095, u64::MAX);
        assert!(matches!(parse(&core(&[huge]), MIB), Err(CoreError::Segment { .. })));
    }

    proptest! {
        #[test]
        fn no_header_leads_beyond_the_file(
            words in prop::collection::vec((0_usize..44, any::<u64>(), 0_u32..64), 0..6),
            of_process in any::<bool>(),
        ) {
            let length = MIB;
            let physical_address = if of_process { 0 } else { MIB };
            let mut file = core(&[4096, 8192, 65536].map(|offset| segment(physical_address, offset << 20, offset, 16 * 4096)));
            for (at, word, shift) in words {
                // Words of all magnitudes, anywhere behind the magic number.
                let at = 8 + at * 4;
                file[at..at + 8].copy_from_slice(&(word >> shift).to_le_bytes());
            }
            if let Ok(regions) = parse_from(&file, length, 0) {
                let stored: u64 = regions.iter().map(|region| region.stored).sum();
                prop_assert!(stored <= length);
                for region in regions {
                    prop_assert!(region.stored == 0 || region.offset + region.stored <= length);
                }
            }
        }
    }

    #[test]
    fn impossible_addresses_do_no_harm() {
        let far = Segment { bytes: u64::MAX, ..segment(0, u64::MAX - 4095, 4096, 4096) };
        let regions = parse(&core(&[far, far]), MIB).unwrap();
        // Of the second, all bytes are the first one's.
        assert_eq!(
            regions,
            [Region { address: u64::MAX - 4095, offset: 4096, stored: 4096, absent: u64::MAX - 4096 }]
        );
        let far = segment(u64::MAX, 0, 4096, 4096);
        assert_eq!(parse(&core(&[far]), MIB).unwrap()[0].address, u64::MAX);
    }
}
