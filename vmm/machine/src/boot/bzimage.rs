//! The headers of a bzImage, and the kernel inside.
//!
//! The setup header says where the packed kernel lies. If its compression is known, the kernel is unpacked here
//! and booted like any ELF file, at the addresses that it was linked for. Data for relocating it may follow the
//! ELF file; at these addresses the kernel needs none. Otherwise the whole image is loaded, and unpacks itself in
//! the guest.
//!
//! Source: Linux' Documentation/arch/x86/boot.rst.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::image::{
    Format, Inspected, inside_file, inside_ram, inspect_elf, truncated, u16_at, u32_at, u64_at,
};
use super::unpack::{Compression, MAGIC_BYTES, MAX_UNPACKED};
use super::unpacked::Payload;
use super::{ImageError, OpenImage};
use crate::x86::layout::COMMAND_LINE_MAX;

const SETUP_HEADER: usize = 0x1f1;
const SETUP_MAGIC_AT: usize = 0x202;
const SETUP_MAGIC: &[u8] = b"HdrS";
/// The end of the header's last field in every protocol that is accepted.
const SETUP_HEADER_END: usize = 0x26c;
const SECTOR: u64 = 512;
/// The unit of `syssize`, rounded up: the file may end within the last unit.
const PARAGRAPH: u64 = 16;
/// The first boot protocol with `xloadflags`, and so with the 64-bit entry.
const PROTOCOL_WITH_64_BIT_ENTRY: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 2;
/// Offset of the 64-bit entry from the start of the protected-mode kernel.
pub(crate) const BZIMAGE_64_BIT_ENTRY: u64 = 0x200;

/// Tells whether a file that starts with these bytes is a bzImage.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(SETUP_MAGIC_AT..SETUP_MAGIC_AT + SETUP_MAGIC.len()) == Some(SETUP_MAGIC)
}

/// Checks a bzImage, and unpacks its kernel if that is possible. Then `image` is the unpacked kernel.
pub(super) fn inspect_bzimage(
    image: &mut OpenImage<'_>,
    head: &[u8],
    ram_end: u64,
) -> Result<Inspected, ImageError> {
    let length = image.length();
    if head.len() < SETUP_HEADER_END {
        return Err(truncated("the setup header", SETUP_HEADER_END as u64, length));
    }
    let protocol = u16_at(head, 0x206);
    let loaded_high = head[0x211] & LOADED_HIGH != 0;
    let xloadflags = u16_at(head, 0x236);
    let has_64_bit_entry = protocol >= PROTOCOL_WITH_64_BIT_ENTRY && xloadflags & XLF_KERNEL_64 != 0;
    if !loaded_high || !has_64_bit_entry {
        let what = format!(
            "a Linux image without the 64-bit entry point (boot protocol {}.{:02})",
            protocol >> 8,
            protocol & 0xff
        );
        let help = "give one that is built for x86-64".to_owned();
        return Err(ImageError::NotAKernel { what, help });
    }

    let setup_sectors = match head[SETUP_HEADER] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup_bytes = (setup_sectors + 1) * SECTOR;
    // In paragraphs, without the setup sectors.
    let kernel_bytes = u64::from(u32_at(head, 0x1f4)) * PARAGRAPH;
    if kernel_bytes <= BZIMAGE_64_BIT_ENTRY {
        return Err(ImageError::Malformed(format!("a kernel of {kernel_bytes} bytes")));
    }
    let at_least = kernel_bytes - (PARAGRAPH - 1);
    inside_file("its protected-mode kernel", setup_bytes, at_least, length)?;

    let header = header_of(head);
    let command_line_max = (u32_at(head, 0x238) as usize).saturating_add(1).min(COMMAND_LINE_MAX);
    let remark = match find_payload(image, head, setup_bytes)? {
        Ok(payload) => {
            check_room(payload, ram_end)?;
            image.unpack(payload)?;
            let head = image.read_at(0, 4096)?;
            if !head.starts_with(b"\x7fELF") {
                let (compression, reason) =
                    (payload.compression.to_string(), "it holds no ELF file".to_owned());
                return Err(ImageError::CannotUnpack { compression, reason });
            }
            let kernel = inspect_elf(image, &head, ram_end)?;
            return Ok(Inspected { header: Some(header), command_line_max, ..kernel });
        }
        Err(reason) => format!(
            "it unpacks itself in the guest, which takes longer and more memory, because {reason}; give its \
             vmlinux to avoid that"
        ),
    };

    let load = u64_at(head, 0x258);
    let needed = u64::from(u32_at(head, 0x260)).max(length - setup_bytes);
    let end = inside_ram("the kernel, with the room it unpacks itself in,", load, needed, ram_end)?;
    Ok(Inspected {
        format: Format::BzImage { load },
        end,
        command_line_max,
        initrd_end_max: Some(u64::from(u32_at(head, 0x22c)) + 1),
        initrd_above_4g: xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0,
        header: Some(header),
        remark: Some(remark),
    })
}

/// The header as it goes to the kernel.
fn header_of(head: &[u8]) -> setup_header {
    let mut header = setup_header::default();
    let bytes = size_of_val(&header).min(SETUP_HEADER_END - SETUP_HEADER);
    header.as_mut_slice()[..bytes].copy_from_slice(&head[SETUP_HEADER..SETUP_HEADER + bytes]);
    header
}

/// Finds the packed kernel. The inner error says why it cannot be unpacked here.
fn find_payload(
    image: &mut OpenImage<'_>,
    head: &[u8],
    setup_bytes: u64,
) -> Result<Result<Payload, String>, ImageError> {
    let (offset, bytes) = (setup_bytes + u64::from(u32_at(head, 0x248)), u64::from(u32_at(head, 0x24c)));
    if bytes == 0 {
        return Ok(Err("its header does not say where the compressed kernel is".to_owned()));
    }
    inside_file("its compressed kernel", offset, bytes, image.length())?;
    let magic = image.read_at(offset, MAGIC_BYTES.min(bytes as usize))?;
    let Some(compression) = Compression::of(&magic) else {
        let compressor = if magic.starts_with(b"\x89LZO") { "lzo" } else { "a program unknown to samepage" };
        return Ok(Err(format!("it is compressed by {compressor}")));
    };
    let tail = image.read_at(offset + bytes.saturating_sub(4), 4)?;
    let tail = tail.first_chunk().copied().unwrap_or_default();
    Ok(Ok(Payload { compression, offset, bytes, unpacked: compression.unpacked_size(bytes, tail) }))
}

/// Checks that an unpacked kernel is not larger than RAM, where all of it has to be, and that what is read to unpack it
/// is not longer than any kernel. A file can be as long as it declares to be, with holes.
fn check_room(payload: Payload, ram_end: u64) -> Result<(), ImageError> {
    let Payload { unpacked: size, bytes, .. } = payload;
    if bytes > MAX_UNPACKED {
        return Err(ImageError::Malformed(format!(
            "its compressed kernel is {bytes} bytes long, and no kernel is larger than {MAX_UNPACKED}"
        )));
    }
    if size > MAX_UNPACKED {
        return Err(ImageError::Malformed(format!(
            "its compressed kernel declares to hold {size} bytes, and no kernel is larger than {MAX_UNPACKED}"
        )));
    }
    if size > ram_end { Err(ImageError::UnpackedTooLarge { size, ram_end }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::super::ImageSource;
    use super::super::image::inspect;
    use super::super::load::Entry;
    use super::super::test_images::{COMPRESSIONS, bzimage, bzimage_with_payload, elf64, pack, pvh_elf};
    use super::*;

    const RAM: u64 = 64 << 20;

    fn inspect_bytes(bytes: Vec<u8>) -> Result<Inspected, ImageError> {
        let source = ImageSource::Bytes { name: "test image", bytes: bytes.into() };
        inspect(&mut source.open()?, RAM)
    }

    fn refused(bytes: Vec<u8>) -> String {
        inspect_bytes(bytes).unwrap_err().to_string()
    }

    fn patched(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    }

    #[test]
    fn the_kernel_inside_is_found_whatever_packed_it() {
        for name in COMPRESSIONS {
            for (kernel, expected) in
                [(pvh_elf(b"\xf4"), Entry::Pvh(0x10_0000)), (elf64(b"\xf4"), Entry::Linux64(0x10_0000))]
            {
                // Relocations follow the kernel.
                let kernel = [kernel, vec![0x81; 4000]].concat();
                let inspected = inspect_bytes(bzimage_with_payload(&pack(name, &kernel))).unwrap();
                let Format::Elf { segments, entry, .. } = inspected.format else { panic!("{name}") };
                assert_eq!((entry, segments.len(), inspected.end), (expected, 1, 0x10_2000), "{name}");
                assert_eq!((inspected.command_line_max, inspected.remark), (2048, None));
                let header = inspected.header.unwrap();
                assert_eq!(({ header.version }, { header.xloadflags }), (0x20f, 1));
            }
        }
    }

    #[test]
    fn what_cannot_be_unpacked_here_unpacks_itself_with_a_remark() {
        for (payload, part) in [
            (b"\x89LZO\0\r\n\x1a\n".to_vec(), "lzo"),
            (b"something else".to_vec(), "unknown"),
            (vec![], "does not say"),
        ] {
            let inspected = inspect_bytes(bzimage_with_payload(&payload)).unwrap();
            assert_eq!(inspected.format, Format::BzImage { load: 0x100_0000 });
            assert!(inspected.remark.as_ref().is_some_and(|remark| remark.contains(part)), "{inspected:?}");
        }
    }

    #[test]
    fn damaged_payloads_are_errors_that_say_what_to_do() {
        let image = bzimage_with_payload(&pack("gzip", &pvh_elf(b"\xf4")));
        let far = patched(image.clone(), 0x248, &u32::MAX.to_le_bytes());
        assert!(refused(far).contains("truncated"));
        let long = patched(image.clone(), 0x24c, &u32::MAX.to_le_bytes());
        assert!(refused(long).contains("truncated"));
        let at = 0x400 + 0x300;
        assert_eq!(image[at..at + 2], *b"\x1f\x8b");
        let damaged = patched(image.clone(), at + 20, &[0xff; 8]);
        assert!(refused(damaged).contains("copy the file again"));
        let no_elf = bzimage_with_payload(&pack("gzip", b"nothing of the kind"));
        assert!(refused(no_elf).contains("no ELF"));
        let for_arm = patched(pvh_elf(b"\xf4"), 18, &183_u16.to_le_bytes());
        assert!(refused(bzimage_with_payload(&pack("xz", &for_arm))).contains("64-bit ARM"));
    }

    #[test]
    fn declared_sizes_are_bounded_by_ram_and_by_what_kernels_can_be() {
        for (size, part) in [(RAM as u32 + 1, "more memory"), (u32::MAX, "no kernel is larger")] {
            let mut payload = pack("zstd", &pvh_elf(b"\xf4"));
            let at = payload.len() - 4;
            payload[at..].copy_from_slice(&size.to_le_bytes());
            let said = refused(bzimage_with_payload(&payload));
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn a_compressed_kernel_that_is_longer_than_any_kernel_is_not_read() {
        let image = bzimage_with_payload(&pack("gzip", &pvh_elf(b"\xf4")));
        let long = patched(image, 0x24c, &(MAX_UNPACKED as u32 + 1).to_le_bytes());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), long).unwrap();
        file.as_file().set_len(2 * MAX_UNPACKED).unwrap();
        let source = ImageSource::Path(file.path().to_owned());
        let said = inspect(&mut source.open().unwrap(), RAM).unwrap_err().to_string();
        assert!(said.contains("no kernel is larger"), "{said}");
    }

    #[test]
    fn every_truncation_and_any_hostile_byte_is_an_error_and_no_panic() {
        let image = bzimage_with_payload(&pack("lz4", &pvh_elf(b"\xf4")));
        for length in 0..=image.len() - 16 {
            assert!(inspect_bytes(image[..length].to_vec()).is_err(), "{length} bytes");
        }
        for at in 0x1f0..image.len() - 8 {
            for value in [0x00, 0x7f, 0xff] {
                let _ = inspect_bytes(patched(image.clone(), at, &[value; 8]));
            }
        }
    }

    #[test]
    fn a_bzimage_may_end_within_its_last_paragraph() {
        let whole = bzimage(b"\xf4");
        for missing in 0..=15 {
            inspect_bytes(whole[..whole.len() - missing].to_vec()).unwrap();
        }
        let short = inspect_bytes(whole[..whole.len() - 16].to_vec()).unwrap_err();
        assert!(matches!(short, ImageError::Truncated { .. }), "{short}");
    }
}
