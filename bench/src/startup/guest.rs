//! The guests that both monitors start, as files: PVH ELF images.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use samepage_resources::DEMO_GUEST;
use tempfile::TempDir;

/// The address for loading and entry.
const LOAD_ADDRESS: u32 = 1 << 20;
const CODE_OFFSET: usize = 0x1000;
const NOTE_OFFSET: usize = 0x2000;
const FILE_HEADER_BYTES: u16 = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;
/// `XEN_ELFNOTE_PHYS32_ENTRY`, the note with PVH's entry point (Xen, include/public/elfnote.h).
const NOTE_TYPE: u32 = 18;

/// 32-bit code that writes a line to the first serial port with its first instructions, then halts.
#[rustfmt::skip]
pub(crate) const CODE: [u8; 14] = [
    0xba, 0xf8, 0x03, 0x00, 0x00, // mov edx, 0x3f8
    0xb0, b'!',                   // mov al, '!'
    0xee,                         // out dx, al
    0xb0, b'\n',                  // mov al, '\n'
    0xee,                         // out dx, al
    0xf4,                         // hlt
    0xeb, 0xfd,                   // jmp to the hlt
];

/// The images in a folder, which is removed when this value is dropped.
pub(super) struct Files {
    /// The image that contains only its first instructions.
    pub(super) first_instruction: PathBuf,
    /// The demo guest.
    pub(super) demo: PathBuf,
    _folder: TempDir,
}

impl Files {
    pub(super) fn write() -> Result<Self> {
        let folder = TempDir::new().context("creating a folder for the guests' images")?;
        let write = |name: &str, image: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, image).with_context(|| format!("writing {}", path.display()))?;
            anyhow::Ok(path)
        };
        Ok(Self {
            first_instruction: write("first-instruction.elf", &first_instruction())?,
            demo: write("demo-guest.elf", DEMO_GUEST)?,
            _folder: folder,
        })
    }
}

/// Returns an ELF image of one segment with [`CODE`], and the note that makes it a PVH kernel.
fn first_instruction() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, 4, NOTE_TYPE, u32::from_le_bytes(*b"Xen\0"), LOAD_ADDRESS] {
        note.extend(word.to_le_bytes());
    }

    let mut image = b"\x7fELF\x02\x01\x01".to_vec(); // 64-bit, little-endian, version 1
    image.resize(16, 0);
    image.extend(2_u16.to_le_bytes()); // an executable
    image.extend(62_u16.to_le_bytes()); // for x86-64
    image.extend(1_u32.to_le_bytes());
    for offset in [u64::from(LOAD_ADDRESS), FILE_HEADER_BYTES.into(), 0] {
        image.extend(offset.to_le_bytes()); // entry point, program headers, section headers
    }
    image.extend(0_u32.to_le_bytes());
    for field in [FILE_HEADER_BYTES, PROGRAM_HEADER_BYTES, 2, 0, 0, 0] {
        image.extend(field.to_le_bytes());
    }
    for (kind, flags, offset, address, bytes) in
        [(1_u32, 5_u32, CODE_OFFSET, LOAD_ADDRESS, CODE.len()), (4, 4, NOTE_OFFSET, 0, note.len())]
    {
        image.extend(kind.to_le_bytes());
        image.extend(flags.to_le_bytes());
        let (address, bytes) = (u64::from(address), bytes as u64);
        for field in [offset as u64, address, address, bytes, bytes, 4] {
            image.extend(field.to_le_bytes());
        }
    }
    image.resize(CODE_OFFSET, 0);
    image.extend(CODE);
    image.resize(NOTE_OFFSET, 0);
    image.extend(note);
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(image: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(image[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_image_is_an_elf_with_code_at_its_entry_and_a_pvh_note() {
        let image = first_instruction();
        assert_eq!(word(&image, 24), LOAD_ADDRESS);
        let (code, note) = (64, 64 + 56);
        assert_eq!((word(&image, code), word(&image, code + 8)), (1, 0x1000));
        assert_eq!((word(&image, code + 24), word(&image, code + 32)), (LOAD_ADDRESS, 14));
        assert_eq!((word(&image, note), word(&image, note + 8), word(&image, note + 32)), (4, 0x2000, 20));
        assert_eq!(image[0x1000..0x1000 + CODE.len()], CODE);
        assert_eq!(image[0x2000..], *b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0\0\0\x10\0");
    }
}
