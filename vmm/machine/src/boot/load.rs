//! Loads kernel, initrd and command line, and writes the boot structures of the kernel's boot protocol.

use std::io::{Seek, SeekFrom};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use samepage_devices::GuestMemory;
use samepage_sharing::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress};

use super::bzimage::BZIMAGE_64_BIT_ENTRY;
use super::image::{self, Format, Inspected, Segment};
use super::params::{self, Initrd};
use super::unpacked::Unpacked;
use super::{ImageError, ImageSource, OpenImage};
use crate::x86::layout::{
    COMMAND_LINE, COMMAND_LINE_MAX, HIGH_RAM_START, HIMEM_START, HoleRange, LOW_RAM_MAX, MapEntry,
    memory_map, ram_ranges,
};

/// The start of the first vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, start info in EBX (PVH boot ABI).
    Pvh(u64),
    /// 64-bit mode with low memory mapped one to one, boot parameters in RSI (Linux' 64-bit protocol).
    Linux64(u64),
}

/// An error of one of the two images, or of both together.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel, or its command line.
    #[error("kernel {image}: {source}")]
    Kernel {
        /// The path or the name.
        image: String,
        /// The error.
        source: ImageError,
    },
    /// The initrd.
    #[error("initrd {image}: {source}")]
    Initrd {
        /// The path or the name.
        image: String,
        /// The error.
        source: ImageError,
    },
}

impl BootError {
    fn kernel(image: &ImageSource) -> impl FnOnce(ImageError) -> Self {
        let image = image.to_string();
        |source| BootError::Kernel { image, source }
    }

    fn initrd(image: &ImageSource) -> impl FnOnce(ImageError) -> Self {
        let image = image.to_string();
        |source| BootError::Initrd { image, source }
    }
}

/// How a kernel boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Where the first vCPU starts.
    pub entry: Entry,
    /// The first address after the memory that the kernel needs at its start.
    pub end: u64,
    /// The size in bytes of the kernel that was unpacked from a bzImage.
    pub unpacked: Option<u64>,
    /// A remark for the user, about "it", the kernel.
    pub remark: Option<String>,
}

/// Describes how a kernel would boot in a VM with `ram_bytes` of RAM. Loads nothing.
///
/// # Errors
/// Fails if it would not boot.
pub fn describe(kernel: &ImageSource, ram_bytes: u64) -> Result<Description, ImageError> {
    let (inspected, image) = inspect_kernel(kernel, ram_bytes)?;
    Ok(Description {
        entry: entry(&inspected, None),
        end: inspected.end,
        unpacked: image.unpacked().map(|kernel| kernel.as_ref().len() as u64),
        remark: inspected.remark,
    })
}

/// The result of checking the images of a VM.
pub(crate) struct Checked {
    /// All faults that keep them from booting.
    pub(crate) faults: Vec<BootError>,
    /// The kernel in a bzImage. As long as it is held, [`load`] need not unpack it again.
    pub(crate) unpacked: Option<Unpacked>,
}

/// Checks the images of a VM with `ram_bytes` of RAM and this command line. `added` bytes of the command line
/// are parameters for devices. Loads nothing.
pub(crate) fn check(
    kernel: &ImageSource,
    initrd: Option<&ImageSource>,
    command_line: &str,
    added: usize,
    ram_bytes: u64,
) -> Checked {
    let mut faults = Vec::new();
    let mut unpacked = None;
    let inspected = inspect_kernel(kernel, ram_bytes).map(|(inspected, image)| {
        unpacked = image.unpacked().cloned();
        inspected
    });
    let limit = inspected.as_ref().map_or(COMMAND_LINE_MAX, |inspected| inspected.command_line_max);
    let line = check_command_line(command_line, added, limit);
    let initrd = initrd.map(|initrd| {
        let placed = match &inspected {
            Ok(inspected) => place(initrd, inspected, ram_bytes).map(drop),
            // Without a valid kernel, the room for the initrd is unknown.
            Err(_) => open_initrd(initrd).map(drop),
        };
        placed.map_err(BootError::initrd(initrd))
    });
    faults.extend(inspected.err().map(BootError::kernel(kernel)));
    faults.extend(line.err().map(BootError::kernel(kernel)));
    faults.extend(initrd.and_then(Result::err));
    Checked { faults, unpacked }
}

/// What [`load`] has put into guest memory.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// Where the first vCPU starts.
    pub(crate) entry: Entry,
    /// A remark for the user on how the kernel is booted.
    pub(crate) remark: Option<String>,
}

/// Fills fresh guest memory of `ram_bytes` with everything that the guest needs to start. This includes the
/// memory map of a machine with this memory hole.
pub(crate) fn load(
    memory: &GuestMemory,
    ram_bytes: u64,
    hole: Option<HoleRange>,
    kernel: &ImageSource,
    initrd: Option<&ImageSource>,
    command_line: &str,
) -> Result<Loaded, BootError> {
    let (inspected, mut image) =
        inspect(kernel, command_line, ram_bytes).map_err(BootError::kernel(kernel))?;
    load_kernel(memory, &inspected, &mut image).map_err(BootError::kernel(kernel))?;
    let initrd = match initrd {
        Some(source) => {
            Some(load_initrd(memory, source, &inspected, ram_bytes).map_err(BootError::initrd(source))?)
        }
        None => None,
    };
    let entry = entry(&inspected, initrd);
    let map = memory_map(ram_bytes, hole);
    write_parameters(memory, &map, entry, inspected.header, initrd, command_line)
        .map_err(BootError::kernel(kernel))?;
    let remark = inspected.remark.map(|remark| format!("kernel {kernel}: {remark}"));
    Ok(Loaded { entry, remark })
}

/// Chooses the protocol. PVH's start info can tell Linux of an initrd below 4 GiB only.
fn entry(kernel: &Inspected, initrd: Option<Initrd>) -> Entry {
    match kernel.format {
        Format::Elf { linux_entry, .. } if initrd.is_some_and(Initrd::is_above_4g) => {
            Entry::Linux64(linux_entry)
        }
        Format::Elf { entry, .. } => entry,
        Format::BzImage { load } => Entry::Linux64(load + BZIMAGE_64_BIT_ENTRY),
    }
}

fn inspect<'a>(
    kernel: &'a ImageSource,
    command_line: &str,
    ram_bytes: u64,
) -> Result<(Inspected, OpenImage<'a>), ImageError> {
    let (inspected, image) = inspect_kernel(kernel, ram_bytes)?;
    check_command_line(command_line, 0, inspected.command_line_max)?;
    Ok((inspected, image))
}

fn inspect_kernel(kernel: &ImageSource, ram_bytes: u64) -> Result<(Inspected, OpenImage<'_>), ImageError> {
    let mut image = kernel.open()?;
    let inspected = image::inspect(&mut image, ram_bytes.min(LOW_RAM_MAX))?;
    Ok((inspected, image))
}

/// Checks a command line against the kernel's limit in bytes, including NUL.
fn check_command_line(command_line: &str, added: usize, max: usize) -> Result<(), ImageError> {
    if let Some(odd) = command_line.chars().find(|c| !matches!(c, ' '..='~' | '\t')) {
        return Err(ImageError::CommandLineCharacter(odd));
    }
    let limit = max - 1;
    if command_line.len() > limit {
        return Err(ImageError::CommandLineTooLong { length: command_line.len() - added, added, limit });
    }
    Ok(())
}

fn load_kernel(
    memory: &GuestMemory,
    inspected: &Inspected,
    image: &mut OpenImage<'_>,
) -> Result<(), ImageError> {
    let himem = Some(GuestAddress(HIMEM_START));
    match &inspected.format {
        Format::Elf { segments, .. } => {
            for Segment { start, offset, file_bytes, .. } in segments {
                image.seek(SeekFrom::Start(*offset))?;
                memory
                    .read_exact_volatile_from(GuestAddress(*start), image, *file_bytes as usize)
                    .map_err(|source| ImageError::GuestMemory { what: "the kernel", source })?;
            }
        }
        Format::BzImage { load } => {
            BzImage::load(memory, Some(GuestAddress(*load)), image, himem)?;
        }
    }
    Ok(())
}

fn open_initrd(source: &ImageSource) -> Result<OpenImage<'_>, ImageError> {
    let image = source.open()?;
    if image.length() == 0 { Err(ImageError::EmptyInitrd) } else { Ok(image) }
}

/// Chooses the initrd's address: the highest possible page boundary below 4 GiB, or else above.
fn place<'a>(
    source: &'a ImageSource,
    kernel: &Inspected,
    ram_bytes: u64,
) -> Result<(Initrd, OpenImage<'a>), ImageError> {
    let image = open_initrd(source)?;
    let size = image.length();
    let ram_end = ram_bytes.min(LOW_RAM_MAX);
    let limit = kernel.initrd_end_max.unwrap_or(ram_end).min(ram_end);
    let within = |lowest: u64, limit: u64| {
        let start = limit.checked_sub(size).map(|start| start & !(PAGE_SIZE as u64 - 1));
        start.filter(|start| *start >= lowest)
    };
    let above = || {
        let high = ram_ranges(ram_bytes).into_iter().find(|range| range.gpa >= HIGH_RAM_START);
        let high = high.filter(|_| kernel.initrd_above_4g)?;
        within(high.gpa, high.gpa + high.bytes)
    };
    match within(kernel.end, limit).or_else(above) {
        Some(start) => Ok((Initrd { start, size }, image)),
        None => Err(ImageError::InitrdTooLarge { size, kernel_end: kernel.end, limit }),
    }
}

fn load_initrd(
    memory: &GuestMemory,
    source: &ImageSource,
    kernel: &Inspected,
    ram_bytes: u64,
) -> Result<Initrd, ImageError> {
    let (initrd, mut image) = place(source, kernel, ram_bytes)?;
    memory
        .read_exact_volatile_from(GuestAddress(initrd.start), &mut image, initrd.size as usize)
        .map_err(|source| ImageError::GuestMemory { what: "the initrd", source })?;
    Ok(initrd)
}

fn write_parameters(
    memory: &GuestMemory,
    map: &[MapEntry],
    entry: Entry,
    header: Option<setup_header>,
    initrd: Option<Initrd>,
    command_line: &str,
) -> Result<(), ImageError> {
    // Fresh guest memory is zero, so the text needs no explicit NUL.
    memory
        .write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))
        .map_err(|source| ImageError::GuestMemory { what: "the command line", source })?;
    let written = match entry {
        Entry::Pvh(_) => params::write_start_info(memory, map, initrd),
        Entry::Linux64(_) => {
            params::write_zero_page(memory, map, header, initrd, command_line.len() as u32 + 1)
        }
    };
    written.map_err(|source| ImageError::GuestMemory { what: "the boot parameters", source })
}

#[cfg(test)]
mod tests {
    use super::super::test_images::{bzimage, bzimage_with_payload, elf64, pack, pvh_elf};
    use super::*;
    use crate::vm::memory::VmMemory;
    use crate::x86::layout::ZERO_PAGE;

    const RAM: u64 = 64 << 20;

    fn source(bytes: Vec<u8>) -> ImageSource {
        ImageSource::Bytes { name: "test image", bytes: bytes.into() }
    }

    fn load_into(memory: &VmMemory, kernel: Vec<u8>, initrd: Option<Vec<u8>>) -> Result<Entry, BootError> {
        let initrd = initrd.map(source);
        let loaded = load(memory.view(), RAM, None, &source(kernel), initrd.as_ref(), "console=ttyS0");
        loaded.map(|loaded| loaded.entry)
    }

    fn patched(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    }

    fn bytes_at(memory: &VmMemory, address: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        memory.view().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn each_kind_of_kernel_is_loaded_where_it_starts() {
        let code = b"\xb0\x2a\xf4";
        for (image, entry, code_at) in [
            (pvh_elf(code), Entry::Pvh(0x10_0000), 0x10_0000),
            (elf64(code), Entry::Linux64(0x10_0000), 0x10_0000),
            (bzimage(code), Entry::Linux64(0x100_0200), 0x100_0200),
        ] {
            let memory = VmMemory::reserve(RAM, true, crate::HugePages::Off).unwrap();
            assert_eq!(load_into(&memory, image, None).unwrap(), entry);
            assert_eq!(bytes_at(&memory, code_at, code.len()), code);
            assert_eq!(bytes_at(&memory, COMMAND_LINE, 14), b"console=ttyS0\0");
        }
    }

    #[test]
    fn a_kernel_file_reads_like_the_same_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), pvh_elf(b"\xf4")).unwrap();
        let memory = VmMemory::reserve(RAM, true, crate::HugePages::Off).unwrap();
        let kernel = ImageSource::Path(file.path().to_owned());
        let loaded = load(memory.view(), RAM, None, &kernel, None, "").unwrap();
        assert_eq!((loaded.entry, loaded.remark), (Entry::Pvh(0x10_0000), None));
        assert_eq!(bytes_at(&memory, 0x10_0000, 1), b"\xf4");
    }

    #[test]
    fn the_initrd_ends_at_the_top_of_low_ram() {
        let memory = VmMemory::reserve(RAM, true, crate::HugePages::Off).unwrap();
        load_into(&memory, pvh_elf(b"\xf4"), Some(vec![7; 5000])).unwrap();
        let start = RAM - 2 * PAGE_SIZE as u64;
        assert_eq!(bytes_at(&memory, start, 5001), [vec![7; 5000], vec![0]].concat());
    }

    fn check(
        kernel: &ImageSource,
        initrd: Option<&ImageSource>,
        line: &str,
        ram: u64,
    ) -> Result<(), BootError> {
        super::check(kernel, initrd, line, 0, ram).faults.into_iter().next().map_or(Ok(()), Err)
    }

    #[test]
    fn all_faults_are_found_at_once() {
        let nowhere = || ImageSource::Path("/nonexistent".into());
        let all = super::check(&nowhere(), Some(&nowhere()), "a\nb", 0, RAM).faults;
        let text: Vec<_> = all.iter().map(ToString::to_string).collect();
        assert!(matches!(
            all[..],
            [BootError::Kernel { .. }, BootError::Kernel { .. }, BootError::Initrd { .. }]
        ));
        assert!(text[1].contains("printable"), "{text:?}");
    }

    #[test]
    fn an_initrd_that_is_empty_or_meets_the_kernel_is_refused() {
        let kernel = pvh_elf(b"\xf4");
        let refused = |bytes| check(&source(kernel.clone()), Some(&source(bytes)), "", 4 << 20).unwrap_err();
        assert!(refused(vec![]).to_string().contains("empty"));
        assert!(refused(vec![1; 3 << 20]).to_string().contains("more memory"));
        check(&source(kernel.clone()), Some(&source(vec![1; 2 << 20])), "", 4 << 20).unwrap();
    }

    #[test]
    fn an_initrd_of_gibibytes_lies_above_the_gap_and_is_told_of_by_linux_own_protocol() {
        const GIB: u64 = 1 << 30;
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * GIB).unwrap();
        let initrd = ImageSource::Path(file.path().to_owned());
        let linux = patched(bzimage(b"\xf4"), 0x236, &3_u16.to_le_bytes());
        let kernels = [
            (pvh_elf(b"\xf4"), Entry::Linux64(0x10_0000)),
            (elf64(b"\xf4"), Entry::Linux64(0x10_0000)),
            (bzimage_with_payload(&pack("lz4", &pvh_elf(b"\xf4"))), Entry::Linux64(0x10_0000)),
            (linux, Entry::Linux64(0x100_0200)),
        ];
        for (kernel, expected) in kernels {
            let kernel = source(kernel);
            let (inspected, _) = inspect_kernel(&kernel, 8 * GIB).unwrap();
            let (placed, _) = place(&initrd, &inspected, 8 * GIB).unwrap();
            assert_eq!(placed, Initrd { start: 6 * GIB, size: 3 * GIB });
            assert_eq!(entry(&inspected, Some(placed)), expected);
            // There is RAM enough, but not in one piece.
            let split = place(&initrd, &inspected, 5 * GIB).map(drop).unwrap_err();
            assert!(matches!(split, ImageError::InitrdTooLarge { .. }), "{split}");
        }
        // A kernel that says nothing of addresses above 4 GiB.
        let kernel = source(bzimage(b"\xf4"));
        let (inspected, _) = inspect_kernel(&kernel, 8 * GIB).unwrap();
        assert!(place(&initrd, &inspected, 8 * GIB).is_err());
    }

    #[test]
    fn the_kernel_in_a_bzimage_is_loaded_like_the_same_elf_file() {
        let code = b"\xb0\x2a\xf4";
        for (kernel, expected) in
            [(pvh_elf(code), Entry::Pvh(0x10_0000)), (elf64(code), Entry::Linux64(0x10_0000))]
        {
            let memory = VmMemory::reserve(RAM, true, crate::HugePages::Off).unwrap();
            let image = bzimage_with_payload(&pack("zstd", &kernel));
            assert_eq!(load_into(&memory, image, None).unwrap(), expected);
            assert_eq!(bytes_at(&memory, 0x10_0000, code.len()), code);
            // The setup header goes along with Linux' boot parameters, which PVH lacks.
            let magic = bytes_at(&memory, ZERO_PAGE + 0x202, 4);
            assert_eq!(magic == b"HdrS", expected == Entry::Linux64(0x10_0000));
        }
    }

    #[test]
    fn machines_that_are_built_together_share_what_validation_unpacked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bzimage_with_payload(&pack("gzip", &pvh_elf(b"\xf4")))).unwrap();
        let kernel = ImageSource::Path(file.path().to_owned());
        let held = super::check(&kernel, None, "", 0, RAM).unpacked.unwrap();
        let (_, image) = inspect_kernel(&kernel, RAM).unwrap();
        let again = image.unpacked().unwrap();
        assert_eq!(held.as_ref().as_ptr(), again.as_ref().as_ptr());
    }

    #[test]
    fn a_command_line_that_does_not_fit_is_refused() {
        let kernel = source(bzimage(b"\xf4"));
        check(&kernel, None, &"x".repeat(2047), RAM).unwrap();
        let long = check(&kernel, None, &"x".repeat(2048), RAM).unwrap_err();
        assert!(long.to_string().contains("2047 bytes at most"), "{long}");
        let odd = check(&kernel, None, "root=\0", RAM).unwrap_err();
        assert!(odd.to_string().contains("printable"), "{odd}");
    }

    #[test]
    fn an_entry_point_outside_the_kernel_is_refused() {
        let mut image = elf64(b"\xf4");
        image[24..32].copy_from_slice(&0x7000_u64.to_le_bytes());
        let memory = VmMemory::reserve(RAM, true, crate::HugePages::Off).unwrap();
        let error = load_into(&memory, image, None).unwrap_err();
        assert!(error.to_string().contains("in no segment"), "{error}");
    }
}
