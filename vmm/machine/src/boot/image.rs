//! Recognises kernel images and checks the values in their headers before anything is loaded.
//!
//! Sources: the ELF-64 object file format; the PVH boot ABI (Xen's docs/misc/pvh.pandoc).

use linux_loader::elf::{PT_LOAD, PT_NOTE};
use linux_loader::loader::bootparam::setup_header;

use super::bzimage::{inspect_bzimage, is_bzimage};
use super::load::Entry;
use super::{ImageError, OpenImage, foreign, notes};
use crate::x86::layout::{COMMAND_LINE_MAX, HIMEM_START};

const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// Limit for program headers, above the number in any kernel. It bounds the work for a hostile image.
const MAX_PROGRAM_HEADERS: usize = 128;
/// Limit for the notes of all segments together, above the size in any kernel.
const MAX_NOTE_BYTES: u64 = 1 << 20;

/// A kernel image with valid headers.
#[derive(Debug)]
pub(crate) struct Inspected {
    pub(crate) format: Format,
    /// The first address after the memory that the kernel needs at its start, including uninitialized data.
    pub(crate) end: u64,
    /// Longest command line in bytes, including NUL.
    pub(crate) command_line_max: usize,
    /// The address at which an initrd below 4 GiB must end, if the image has a limit.
    pub(crate) initrd_end_max: Option<u64>,
    /// Whether an initrd may lie above 4 GiB, with Linux' 64-bit protocol.
    pub(crate) initrd_above_4g: bool,
    /// The setup header of the bzImage, for Linux' boot parameters.
    pub(crate) header: Option<setup_header>,
    /// A remark for the user, about "it", the kernel.
    pub(crate) remark: Option<String>,
}

/// The kind of the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// An ELF file, loaded by segments. `linux_entry` is the ELF file's own entry point, which is the 64-bit one of
    /// Linux.
    Elf { segments: Vec<Segment>, entry: Entry, linux_entry: u64 },
    /// A bzImage that unpacks itself. It must be loaded at `load`.
    BzImage { load: u64 },
}

/// A loaded part of an ELF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// The physical address.
    pub(crate) start: u64,
    /// The address after the last byte. Bytes beyond the file's part are zero.
    pub(crate) end: u64,
    /// Offset in the file.
    pub(crate) offset: u64,
    /// Length in the file.
    pub(crate) file_bytes: u64,
}

/// Checks a kernel image against its file, and against RAM below 4 GiB that ends at `ram_end`.
pub(crate) fn inspect(image: &mut OpenImage<'_>, ram_end: u64) -> Result<Inspected, ImageError> {
    let head = image.read_at(0, 4096)?;
    if head.starts_with(b"\x7fELF") {
        inspect_elf(image, &head, ram_end)
    } else if is_bzimage(&head) {
        inspect_bzimage(image, &head, ram_end)
    } else {
        Err(foreign::name(image, &head)?)
    }
}

/// Checks an ELF file that starts with the bytes `head`.
pub(super) fn inspect_elf(
    image: &mut OpenImage<'_>,
    head: &[u8],
    ram_end: u64,
) -> Result<Inspected, ImageError> {
    let length = image.length();
    if head.len() < ELF_HEADER_BYTES {
        return Err(truncated("the ELF header", ELF_HEADER_BYTES as u64, length));
    }
    if let Some(foreign) = foreign::name_elf(head) {
        return Err(foreign);
    }

    let (table, entry_bytes, count) = (u64_at(head, 32), u16_at(head, 54), usize::from(u16_at(head, 56)));
    if usize::from(entry_bytes) != PROGRAM_HEADER_BYTES || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(ImageError::Malformed(format!("{count} program headers of {entry_bytes} bytes")));
    }
    if table < ELF_HEADER_BYTES as u64 {
        return Err(ImageError::Malformed(format!("program headers at byte {table}, inside the ELF header")));
    }
    let table_bytes = count * PROGRAM_HEADER_BYTES;
    inside_file("its table of program headers", table, table_bytes as u64, length)?;
    let headers = image.read_at(table, table_bytes)?;

    let mut segments = Vec::new();
    let mut note_bytes = 0;
    let mut pvh_entry = None;
    for (index, header) in headers.chunks_exact(PROGRAM_HEADER_BYTES).enumerate() {
        let what = || format!("its segment {index}");
        let (offset, address) = (u64_at(header, 8), u64_at(header, 24));
        let (file_bytes, memory_bytes) = (u64_at(header, 32), u64_at(header, 40));
        match u32_at(header, 0) {
            PT_LOAD if memory_bytes > 0 => {
                if file_bytes > memory_bytes {
                    return Err(ImageError::Malformed(format!(
                        "segment {index} holds {file_bytes} bytes for {memory_bytes} bytes of memory"
                    )));
                }
                inside_file(&what(), offset, file_bytes, length)?;
                let end = inside_ram(&what(), address, memory_bytes, ram_end)?;
                segments.push(Segment { start: address, end, offset, file_bytes });
            }
            PT_NOTE => {
                inside_file(&what(), offset, file_bytes, length)?;
                note_bytes += file_bytes;
                if note_bytes > MAX_NOTE_BYTES {
                    return Err(ImageError::Malformed(format!("notes of {note_bytes} bytes and more")));
                }
                if pvh_entry.is_none() {
                    let notes = image.read_at(offset, file_bytes as usize)?;
                    pvh_entry = notes::pvh_entry(&notes, u64_at(header, 48))?;
                }
            }
            PT_LOAD if file_bytes > 0 => {
                return Err(ImageError::Malformed(format!("segment {index} holds bytes for no memory")));
            }
            _ => {}
        }
    }
    let end = segments.iter().map(|segment| segment.end).max();
    let end = end.ok_or_else(|| ImageError::Malformed("it has nothing to load".into()))?;
    let linux_entry = u64_at(head, 24);
    let entry = pvh_entry.map_or(Entry::Linux64(linux_entry), Entry::Pvh);
    let (Entry::Pvh(address) | Entry::Linux64(address)) = entry;
    let loaded = |address| segments.iter().any(|segment| (segment.start..segment.end).contains(&address));
    if !loaded(address) {
        return Err(ImageError::Malformed(format!("its entry point {address:#x} is in no segment")));
    }
    let initrd_above_4g = loaded(linux_entry);
    Ok(Inspected {
        format: Format::Elf { segments, entry, linux_entry },
        end,
        command_line_max: COMMAND_LINE_MAX,
        initrd_end_max: None,
        initrd_above_4g,
        header: None,
        remark: None,
    })
}

pub(super) fn truncated(what: &str, end: u64, length: u64) -> ImageError {
    ImageError::Truncated { what: what.into(), end, length }
}

pub(super) fn inside_file(what: &str, offset: u64, bytes: u64, length: u64) -> Result<(), ImageError> {
    let end = offset
        .checked_add(bytes)
        .ok_or_else(|| ImageError::Malformed(format!("{what} wraps around the end of a 64-bit file")))?;
    if end > length { Err(truncated(what, end, length)) } else { Ok(()) }
}

/// Checks that a part of the kernel lies in RAM and outside the boot structures. Returns its end.
pub(super) fn inside_ram(what: &str, start: u64, bytes: u64, ram_end: u64) -> Result<u64, ImageError> {
    if start < HIMEM_START {
        return Err(ImageError::OverBootStructures { what: what.into(), start });
    }
    let end = start
        .checked_add(bytes)
        .ok_or_else(|| ImageError::Malformed(format!("{what} wraps around the end of memory")))?;
    if end > ram_end {
        return Err(ImageError::OutsideRam { what: what.into(), start, end, ram_end });
    }
    Ok(end)
}

// The callers have checked the lengths of the slices.

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::super::test_images::{self, bzimage, elf64, pvh_elf};
    use super::super::{ImageError, ImageSource};
    use super::*;

    const RAM: u64 = 64 << 20;

    fn inspect_bytes(bytes: Vec<u8>) -> Result<Inspected, ImageError> {
        inspect_in(bytes, RAM)
    }

    fn inspect_in(bytes: Vec<u8>, ram_end: u64) -> Result<Inspected, ImageError> {
        let source = ImageSource::Bytes { name: "test image", bytes: bytes.into() };
        inspect(&mut source.open()?, ram_end)
    }

    fn patched(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    }

    #[test]
    fn sound_images_are_recognised() {
        let segments =
            vec![Segment { start: 0x10_0000, end: 0x10_0000 + 0x2000, offset: 0x1000, file_bytes: 1 }];
        let elf = inspect_bytes(pvh_elf(b"\xf4")).unwrap();
        let linux_entry = 0x10_0000;
        let entry = Entry::Pvh(0x10_0000);
        assert_eq!(elf.format, Format::Elf { segments: segments.clone(), entry, linux_entry });
        assert_eq!(elf.end, 0x10_2000);
        let elf = inspect_bytes(elf64(b"\xf4")).unwrap();
        assert_eq!(elf.format, Format::Elf { segments, entry: Entry::Linux64(0x10_0000), linux_entry });

        let bz = inspect_bytes(bzimage(b"\xf4")).unwrap();
        assert_eq!(bz.format, Format::BzImage { load: 0x100_0000 });
        assert_eq!((bz.end, bz.command_line_max), (0x100_0000 + 0x10_0000, 2048));
        assert_eq!(bz.initrd_end_max, Some(0x8000_0000));
    }

    #[test]
    fn every_truncation_of_an_image_is_an_error_and_no_panic() {
        for image in [pvh_elf(b"\xf4"), elf64(b"\xf4"), bzimage(b"\xf4")] {
            let paragraph = if image.starts_with(b"\x7fELF") { 1 } else { 16 };
            for length in 0..=image.len() - paragraph {
                assert!(inspect_bytes(image[..length].to_vec()).is_err(), "{length} bytes");
            }
        }
        let short = inspect_bytes(pvh_elf(b"\xf4")[..0x1000].to_vec()).unwrap_err();
        assert!(matches!(short, ImageError::Truncated { .. }), "{short}");
    }

    #[test]
    fn any_byte_of_a_header_may_be_hostile() {
        for image in [pvh_elf(b"\xf4"), bzimage(b"\xf4")] {
            for at in 0..0x300 {
                for value in [0x00, 0x7f, 0x80, 0xff] {
                    let _ = inspect_bytes(patched(image.clone(), at, &[value; 8]));
                }
            }
        }
    }

    #[test]
    fn segments_must_lie_in_ram_and_off_the_boot_structures() {
        let address_at = 64 + 24;
        let low = patched(pvh_elf(b"\xf4"), address_at, &0x7000_u64.to_le_bytes());
        assert!(matches!(inspect_bytes(low).unwrap_err(), ImageError::OverBootStructures { .. }));
        let high = patched(pvh_elf(b"\xf4"), address_at, &(RAM - 0x1000).to_le_bytes());
        assert!(matches!(inspect_bytes(high).unwrap_err(), ImageError::OutsideRam { .. }));
        let wrapped = patched(pvh_elf(b"\xf4"), address_at, &(u64::MAX - 0x1000).to_le_bytes());
        assert!(matches!(inspect_bytes(wrapped).unwrap_err(), ImageError::Malformed(_)));
        assert!(matches!(inspect_in(bzimage(b"\xf4"), 16 << 20).unwrap_err(), ImageError::OutsideRam { .. }));
    }

    #[test]
    fn the_pvh_note_is_found_in_whichever_segment_it_is() {
        let entry = |image| match inspect_bytes(image).unwrap().format {
            Format::Elf { entry, .. } => entry,
            Format::BzImage { .. } => panic!("it is an ELF"),
        };
        let pvh = test_images::xen_note(18, &0x10_0001_u32.to_le_bytes());
        let other = test_images::xen_note(5, b"linux\0\0\0");
        let elf = |notes: &[&[u8]]| test_images::elf_with_notes(b"\xf4\xf4", notes);
        for notes in [
            &[&pvh[..], &other][..],
            &[&other, &pvh],
            &[&other, &[], &pvh, &other],
            &[&[&other[..], &pvh].concat()],
        ] {
            assert_eq!(entry(elf(notes)), Entry::Pvh(0x10_0001), "{notes:?}");
        }
        assert_eq!(entry(elf(&[&other, &other])), Entry::Linux64(0x10_0000));
        // Notes that are cut off hide none in other segments.
        assert_eq!(entry(elf(&[&other[..other.len() - 3], &pvh])), Entry::Pvh(0x10_0001));
        let short = inspect_bytes(elf(&[&test_images::xen_note(18, b"\0\0")])).unwrap_err();
        assert!(short.to_string().contains("PVH"), "{short}");
        let far = inspect_bytes(elf(&[&test_images::xen_note(18, &0x7000_u32.to_le_bytes())])).unwrap_err();
        assert!(far.to_string().contains("in no segment"), "{far}");
    }

    #[test]
    fn notes_are_bounded_over_all_segments() {
        let half = vec![0; (MAX_NOTE_BYTES / 2) as usize];
        let sound = test_images::elf_with_notes(b"\xf4", &[&half, &half]);
        inspect_bytes(sound).unwrap();
        let more = test_images::elf_with_notes(b"\xf4", &[&half, &half, &[0; 12]]);
        assert!(inspect_bytes(more).unwrap_err().to_string().contains("notes of"));
    }
}
