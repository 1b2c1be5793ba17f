//! Kernel images of a few bytes of machine code, for tests of the loaders.

use std::io::Write;

const CODE_AT: usize = 0x1000;
const LOAD_ADDRESS: u64 = 0x10_0000;

/// Returns an ELF file with one segment of 8 KiB, which has `code` at the entry point, 1 MiB.
pub fn elf64(code: &[u8]) -> Vec<u8> {
    elf(code, &[])
}

/// Returns the same ELF file with a PVH note, for code that starts in 32-bit mode.
pub fn pvh_elf(code: &[u8]) -> Vec<u8> {
    elf_with_notes(code, &[&xen_note(18, &(LOAD_ADDRESS as u32).to_le_bytes())])
}

/// Returns a note of Xen. Its content is whole words, unless it is the last note of its segment.
pub fn xen_note(kind: u32, content: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, content.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(content);
    note
}

/// Returns the same ELF file with a segment for each of these notes.
pub fn elf_with_notes(code: &[u8], notes: &[&[u8]]) -> Vec<u8> {
    elf(code, notes)
}

fn elf(code: &[u8], notes: &[&[u8]]) -> Vec<u8> {
    let mut image = Vec::new();
    image.extend(b"\x7fELF\x02\x01\x01");
    image.resize(16, 0);
    image.extend(2_u16.to_le_bytes()); // ET_EXEC
    image.extend(62_u16.to_le_bytes()); // EM_X86_64
    image.extend(1_u32.to_le_bytes());
    image.extend(LOAD_ADDRESS.to_le_bytes());
    image.extend(64_u64.to_le_bytes()); // program headers
    image.extend(0_u64.to_le_bytes()); // section headers
    image.extend(0_u32.to_le_bytes());
    for half in [64, 56, 1 + notes.len() as u16, 0, 0, 0] {
        image.extend(u16::to_le_bytes(half));
    }
    // The code comes last, so that a truncated file lacks some of it.
    let note_bytes: usize = notes.iter().map(|note| note.len()).sum();
    let code_at = (0x800 + note_bytes).next_multiple_of(CODE_AT);
    program_header(&mut image, 1, code_at, LOAD_ADDRESS, code.len(), 0x2000);
    let mut at = 0x800;
    for note in notes {
        program_header(&mut image, 4, at, 0, note.len(), note.len());
        at += note.len();
    }
    image.resize(0x800, 0);
    notes.iter().for_each(|note| image.extend(*note));
    image.resize(code_at, 0);
    image.extend(code);
    image
}

fn program_header(image: &mut Vec<u8>, kind: u32, offset: usize, address: u64, file: usize, memory: usize) {
    image.extend(kind.to_le_bytes());
    image.extend(5_u32.to_le_bytes());
    for field in [offset as u64, address, address, file as u64, memory as u64, 0x1000] {
        image.extend(field.to_le_bytes());
    }
}

/// Returns a bzImage of one setup sector with `code` at its 64-bit entry, for loading at 16 MiB.
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024 + 0x200];
    image.extend(code);
    image.resize(image.len().next_multiple_of(16), 0x90);
    let kernel_paragraphs = ((image.len() - 1024) / 16) as u32;
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup sectors
    put(0x1f4, &kernel_paragraphs.to_le_bytes());
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes()); // boot protocol
    put(0x211, &[1]); // loaded high
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel alignment
    put(0x234, &[1]); // relocatable
    put(0x236, &1_u16.to_le_bytes()); // XLF_KERNEL_64
    put(0x238, &2047_u32.to_le_bytes()); // command line size
    put(0x258, &0x100_0000_u64.to_le_bytes()); // preferred address
    put(0x260, &0x10_0000_u32.to_le_bytes()); // init_size
    image
}

/// What the kernel's build can pack a kernel with, by the names of its programs.
pub const COMPRESSIONS: [&str; 7] = ["gzip", "xz", "lzma", "bzip2", "lz4", "zstd", "none"];

/// Packs a kernel as its build does: compressed, and the size behind it.
///
/// # Panics
/// Panics for a compression that is not one of [`COMPRESSIONS`].
pub fn pack(compression: &str, kernel: &[u8]) -> Vec<u8> {
    let mut packed = match compression {
        "gzip" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(kernel).expect("compress by gzip");
            // The format itself ends with the size.
            return encoder.finish().expect("compress by gzip");
        }
        "xz" => {
            let mut options = lzma_rust2::XzOptions::with_preset(0);
            options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
            options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
            let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).expect("compress by xz");
            encoder.write_all(kernel).expect("compress by xz");
            encoder.finish().expect("compress by xz")
        }
        "lzma" => {
            let options = lzma_rust2::LzmaOptions::with_preset(0);
            let encoder = lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None);
            let mut encoder = encoder.expect("compress by lzma");
            encoder.write_all(kernel).expect("compress by lzma");
            encoder.finish().expect("compress by lzma")
        }
        "bzip2" => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            encoder.write_all(kernel).expect("compress by bzip2");
            encoder.finish().expect("compress by bzip2")
        }
        "lz4" => {
            let mut packed = 0x184c_2102_u32.to_le_bytes().to_vec();
            for block in kernel.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend((block.len() as u32).to_le_bytes());
                packed.extend(block);
            }
            packed
        }
        "zstd" => ruzstd::encoding::compress_to_vec(kernel, ruzstd::encoding::CompressionLevel::Fastest),
        "none" => return kernel.to_vec(),
        other => panic!("no compression is named {other}"),
    };
    packed.extend((kernel.len() as u32).to_le_bytes());
    packed
}

/// Returns a bzImage with this payload. Its own code stops the processor.
pub fn bzimage_with_payload(payload: &[u8]) -> Vec<u8> {
    let mut code = b"\xf4".to_vec();
    code.resize(0x100, 0);
    // From the protected-mode kernel on.
    let offset = (0x200 + code.len()) as u32;
    code.extend(payload);
    let mut image = bzimage(&code);
    image[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    image
}
