//! Names files that were given as a kernel but cannot boot, and tells how to get a kernel from them.
//!
//! The file is untrusted: a limited part of its start is read, and every offset is checked.
//!
//! Sources: the descriptions of the formats; Linux' Documentation/arch/{arm64,riscv,x86}; the PE format.

use std::io;

use super::image::{u16_at, u32_at};
use super::{ImageError, OpenImage};

const USE_ANOTHER: &str = "give a vmlinux (x86-64 ELF) or a bzImage";
const FOR_X86_64: &str = "give one that is built for x86-64";
const NOT_A_DISK: &str = "give it as a disk, and the kernel in it as a file of its own";

/// Compressed formats: the first bytes, the name, and the command that unpacks to standard output.
const COMPRESSED: [(&[u8], &str, &str); 8] = [
    (b"\x1f\x8b", "gzip", "zcat"),
    (b"\xfd7zXZ\0", "xz", "xzcat"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstdcat"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4cat"),
    // The format of the kernel's own build.
    (b"\x02\x21\x4c\x18", "lz4", "lz4cat"),
    (b"BZh", "bzip2", "bzcat"),
    (b"\x5d\x00\x00", "lzma", "lzcat"),
    (b"\x89LZO\0\r\n\x1a\n", "lzo", "lzop -dc"),
];

/// Other formats: an offset, the bytes there, the name, and the advice.
const KNOWN: [(usize, &[u8], &str, &str); 23] = [
    (0x38, b"ARM\x64", "a Linux kernel for 64-bit ARM", FOR_X86_64),
    (0x30, b"RISCV\0\0\0", "a Linux kernel for RISC-V", FOR_X86_64),
    (0x38, b"RSC\x05", "a Linux kernel for RISC-V", FOR_X86_64),
    (0x38, b"\xcd\x23\x82\x81", "a Linux kernel for LoongArch", FOR_X86_64),
    (0x24, b"\x18\x28\x6f\x01", "a Linux kernel for 32-bit ARM (zImage)", FOR_X86_64),
    (0, b"\x27\x05\x19\x56", "an image for U-Boot (uImage)", USE_ANOTHER),
    (0, b"\xd0\x0d\xfe\xed", "a device tree, or an image for U-Boot (FIT)", USE_ANOTHER),
    (0, b"0707", "an initial RAM disk (cpio)", "give it as the initrd, beside a kernel"),
    (0, b"\xc7\x71", "an initial RAM disk (cpio)", "give it as the initrd, beside a kernel"),
    (0, b"QFI\xfb", "a disk image (qcow2)", NOT_A_DISK),
    (0, b"KDMV", "a disk image (VMDK)", NOT_A_DISK),
    (0, b"vhdxfile", "a disk image (VHDX)", NOT_A_DISK),
    (0, b"conectix", "a disk image (VHD)", NOT_A_DISK),
    (0x40, b"\x7f\x10\xda\xbe", "a disk image (VDI)", NOT_A_DISK),
    (0, b"hsqs", "a file system (squashfs)", NOT_A_DISK),
    (0x438, b"\x53\xef", "a file system (ext2, ext3 or ext4)", NOT_A_DISK),
    (0, b"XFSB", "a file system (XFS)", NOT_A_DISK),
    (0x8001, b"CD001", "the image of a CD or DVD (ISO 9660)", NOT_A_DISK),
    (0, b"!<arch>\n", "a Debian package or a library", "unpack it (`dpkg-deb -x FILE FOLDER`)"),
    (0, b"\xed\xab\xee\xdb", "an RPM package", "unpack it (`rpm2cpio FILE | cpio -id`)"),
    (0x101, b"ustar", "an archive (tar)", "unpack it (`tar -xf FILE`)"),
    (0, b"PK\x03\x04", "an archive (zip)", "unpack it (`unzip FILE`)"),
    (0, b"#!", "a script", USE_ANOTHER),
];

/// The end of a boot sector.
const BOOT_SIGNATURE: (usize, &[u8]) = (0x1fe, b"\x55\xaa");

/// Number of bytes that suffice to recognise a format.
const HEAD: usize = 0x9000;

/// Names a file that is neither ELF nor bzImage and starts with these bytes.
pub(super) fn name(image: &mut OpenImage<'_>, head: &[u8]) -> io::Result<ImageError> {
    if head.is_empty() {
        return Ok(not_a_kernel("empty", USE_ANOTHER));
    }
    for (magic, compressor, command) in COMPRESSED {
        if head.starts_with(magic) {
            let help = format!(
                "unpack a kernel (`{command} FILE > vmlinux`), or give it as the initrd if it is one"
            );
            return Ok(not_a_kernel(format!("compressed by {compressor}"), help));
        }
    }
    let head = image.read_at(0, HEAD)?;
    let has = |at: usize, bytes: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(bytes));
    if has(0, b"MZ") && has(4, b"zimg") {
        let what = "a compressed kernel in an EFI program (zboot)";
        return Ok(not_a_kernel(what, "give the vmlinux that it was made from, built for x86-64"));
    }
    // Kernels for ARM and RISC-V are also EFI programs.
    if let Some((.., what, help)) = KNOWN.iter().find(|(at, bytes, ..)| has(*at, bytes)) {
        return Ok(not_a_kernel(*what, *help));
    }
    if let Some(named) = name_efi(&head) {
        return Ok(named);
    }
    if has(BOOT_SIGNATURE.0, BOOT_SIGNATURE.1) {
        return Ok(not_a_kernel("a disk image with a boot sector", NOT_A_DISK));
    }
    Ok(not_a_kernel("neither ELF nor bzImage", USE_ANOTHER))
}

/// Names an ELF file that is not a kernel for x86-64. The head contains the ELF header.
pub(super) fn name_elf(head: &[u8]) -> Option<ImageError> {
    const EM_X86_64: u16 = 62;
    const ET_EXEC: u16 = 2;
    const ET_DYN: u16 = 3;
    // EI_DATA gives the byte order of numbers.
    let half = |at: usize| if head[5] == 2 { u16_at(head, at).swap_bytes() } else { u16_at(head, at) };
    let (kind, machine) = (half(16), half(18));
    let machine = match machine {
        EM_X86_64 if (head[4], head[5]) == (2, 1) => None,
        EM_X86_64 => Some("x86-64 with 32-bit addresses (x32)".to_owned()),
        3 => Some("32-bit x86".to_owned()),
        8 => Some("MIPS".to_owned()),
        20 => Some("32-bit PowerPC".to_owned()),
        21 => Some("64-bit PowerPC".to_owned()),
        22 => Some("IBM S/390".to_owned()),
        40 => Some("32-bit ARM".to_owned()),
        183 => Some("64-bit ARM".to_owned()),
        243 => Some("RISC-V".to_owned()),
        258 => Some("LoongArch".to_owned()),
        other => Some(format!("another processor (machine {other})")),
    };
    if let Some(machine) = machine {
        return Some(not_a_kernel(format!("an ELF for {machine}"), FOR_X86_64));
    }
    match kind {
        ET_EXEC | ET_DYN => None,
        1 => Some(not_a_kernel("an object file, as kernel modules are", USE_ANOTHER)),
        4 => Some(not_a_kernel("a core dump", USE_ANOTHER)),
        other => Some(not_a_kernel(format!("an ELF of type {other}, and not executable"), USE_ANOTHER)),
    }
}

/// Names an EFI program. Returns `None` if the file is not a PE file.
fn name_efi(head: &[u8]) -> Option<ImageError> {
    const PE_HEADER: usize = 24;
    const SECTION: usize = 40;
    let pe_at =
        head.get(..0x40).filter(|dos| dos.starts_with(b"MZ")).map(|dos| u32_at(dos, 0x3c) as usize)?;
    let pe = head.get(pe_at..)?.get(..PE_HEADER).filter(|pe| pe.starts_with(b"PE\0\0"))?;
    let machine = match u16_at(pe, 4) {
        0x8664 => "x86-64",
        0x14c => "32-bit x86",
        0xaa64 => "64-bit ARM",
        0x1c0 | 0x1c2 | 0x1c4 => "32-bit ARM",
        0x5064 => "RISC-V",
        0x6264 => "LoongArch",
        _ => "another processor",
    };
    let (sections, optional_bytes) = (usize::from(u16_at(pe, 6)), usize::from(u16_at(pe, 20)));
    let sections = head[pe_at + PE_HEADER..].get(optional_bytes..)?.chunks_exact(SECTION).take(sections);
    if machine == "x86-64" && sections.into_iter().any(|section| section.starts_with(b".linux\0\0")) {
        let help = "take the kernel out of it (`objcopy -O binary --only-section=.linux FILE bzImage`), and the \
                    initrd likewise (.initrd)";
        return Some(not_a_kernel("a unified kernel image, an EFI program with a kernel inside", help));
    }
    let what = format!("an EFI program for {machine} without Linux' boot header");
    Some(not_a_kernel(what, USE_ANOTHER))
}

fn not_a_kernel(what: impl Into<String>, help: impl Into<String>) -> ImageError {
    ImageError::NotAKernel { what: what.into(), help: help.into() }
}

#[cfg(test)]
mod tests {
    use super::super::image::inspect;
    use super::super::test_images::{bzimage, elf64};
    use super::super::{ImageError, ImageSource};

    fn refusal(bytes: Vec<u8>) -> String {
        let source = ImageSource::Bytes { name: "test image", bytes: bytes.into() };
        let error = inspect(&mut source.open().unwrap(), 64 << 20).unwrap_err();
        assert!(matches!(error, ImageError::NotAKernel { .. }), "{error}");
        error.to_string()
    }

    fn assert_named(bytes: Vec<u8>, parts: &[&str]) {
        let said = refusal(bytes);
        assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} in {said}");
    }

    /// A file of zeros but for some bytes at one place.
    fn at(place: usize, bytes: &[u8]) -> Vec<u8> {
        let mut file = vec![0; place];
        file.extend(bytes);
        file.resize((place + bytes.len()).next_multiple_of(512), 0);
        file
    }

    fn patched(mut image: Vec<u8>, place: usize, bytes: &[u8]) -> Vec<u8> {
        image[place..place + bytes.len()].copy_from_slice(bytes);
        image
    }

    /// A PE file with sections of these names.
    fn efi(machine: u16, sections: &[&str]) -> Vec<u8> {
        let mut file = patched(vec![0; 0x80], 0, b"MZ");
        file = patched(file, 0x3c, &0x80_u32.to_le_bytes());
        file.extend(b"PE\0\0");
        file.extend(machine.to_le_bytes());
        file.extend((sections.len() as u16).to_le_bytes());
        file.extend([0; 12]);
        file.extend(240_u16.to_le_bytes());
        file.extend([0; 242]);
        for name in sections {
            let start = file.len();
            file.extend(name.as_bytes());
            file.resize(start + 40, 0);
        }
        file.resize(0x1000, 0);
        file
    }

    #[test]
    fn compressed_kernels_are_named_with_what_unpacks_them() {
        for (bytes, compressor, command) in [
            (&b"\x1f\x8b\x08rest"[..], "gzip", "zcat"),
            (b"\xfd7zXZ\0rest", "xz", "xzcat"),
            (b"\x28\xb5\x2f\xfdrest", "zstd", "zstdcat"),
            (b"\x04\x22\x4d\x18rest", "lz4", "lz4cat"),
            (b"\x02\x21\x4c\x18rest", "lz4", "lz4cat"),
            (b"BZh91AY", "bzip2", "bzcat"),
            (b"\x5d\0\0\0\x04rest", "lzma", "lzcat"),
            (b"\x89LZO\0\r\n\x1a\nrest", "lzo", "lzop -dc"),
        ] {
            assert_named(bytes.to_vec(), &[compressor, &format!("`{command} FILE > vmlinux`")]);
        }
    }

    #[test]
    fn kernels_for_other_processors_are_named() {
        assert_named(at(0x38, b"ARM\x64"), &["64-bit ARM", "built for x86-64"]);
        // With EFI's header in front, as they mostly are.
        assert_named(patched(at(0x38, b"ARM\x64"), 0, b"MZ"), &["64-bit ARM"]);
        assert_named(at(0x30, b"RISCV\0\0\0RSC\x05"), &["RISC-V"]);
        assert_named(at(0x38, b"RSC\x05"), &["RISC-V"]);
        assert_named(at(0x24, b"\x18\x28\x6f\x01"), &["32-bit ARM"]);
        for (machine, name) in
            [(3_u16, "32-bit x86"), (183, "64-bit ARM"), (243, "RISC-V"), (500, "machine 500")]
        {
            assert_named(patched(elf64(b"\xf4"), 18, &machine.to_le_bytes()), &["an ELF for", name]);
        }
        let big_endian = patched(patched(elf64(b"\xf4"), 5, &[2]), 16, &[0, 2, 0, 21]);
        assert_named(big_endian, &["64-bit PowerPC"]);
        assert_named(patched(elf64(b"\xf4"), 4, &[1]), &["x32"]);
        assert_named(patched(elf64(b"\xf4"), 16, &[1]), &["kernel modules"]);
        assert_named(patched(elf64(b"\xf4"), 16, &[4]), &["core dump"]);
        assert_named(patched(bzimage(b"\xf4"), 0x206, &0x20a_u16.to_le_bytes()), &["64-bit entry", "x86-64"]);
    }

    #[test]
    fn efi_programs_are_named_and_unified_kernel_images_taken_apart() {
        assert_named(efi(0x8664, &[".text", ".data"]), &["EFI program for x86-64"]);
        assert_named(efi(0xaa64, &[".linux"]), &["EFI program for 64-bit ARM"]);
        assert_named(efi(0x8664, &[".osrel", ".linux", ".initrd"]), &["--only-section=.linux"]);
        assert_named(patched(at(0, b"MZ"), 4, b"zimg\0"), &["zboot"]);
        // Offsets that lead out of the file.
        for place in [0x3c, 0x80 + 6, 0x80 + 20] {
            for bytes in [[0xff; 4], [0, 0, 0, 0x80], [0xf0, 0x0f, 0, 0]] {
                refusal(patched(efi(0x8664, &[".linux"]), place, &bytes));
            }
        }
        assert_named(b"MZ".to_vec(), &["neither ELF nor bzImage"]);
    }

    #[test]
    fn initrds_and_disks_are_told_where_they_belong() {
        assert_named(at(0, b"070701000"), &["as the initrd"]);
        for disk in [
            at(0, b"QFI\xfb\0\0\0\x03"),
            at(0x438, b"\x53\xef"),
            at(0x8001, b"CD001"),
            at(0x1fe, b"\x55\xaa"),
        ] {
            assert_named(disk, &["as a disk"]);
        }
        assert_named(b"!<arch>\ndebian".to_vec(), &["dpkg-deb"]);
        assert_named(b"#!/bin/sh\n".to_vec(), &["a script"]);
        assert_named(b"hello".to_vec(), &["neither ELF nor bzImage"]);
        assert_named(vec![], &["empty"]);
    }
}
