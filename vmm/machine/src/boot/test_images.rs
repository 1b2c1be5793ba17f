//! Kernel images of a few bytes of machine code, for tests of the loaders.

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
