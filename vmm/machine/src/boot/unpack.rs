//! Unpacks the kernel that a bzImage holds in compressed form.
//!
//! The payload is hostile. Its declared size bounds the memory that unpacking takes, and [`MAX_UNPACKED`] bounds
//! the declared size. The libraries that do it are written in Rust; docs/decisions/unpacking.md says why.
//!
//! Sources: Linux' arch/x86/boot/compressed/Makefile and scripts/Makefile.lib, for what the payload is made
//! with; lib/decompress_unlz4.c, for the form of LZ4 that Linux uses.

use std::fmt;
use std::io::{self, Read};

use super::image::u32_at;

/// Limit for an unpacked kernel, in bytes: the largest that Linux can be (KERNEL_IMAGE_SIZE).
pub(super) const MAX_UNPACKED: u64 = 1 << 30;
/// Limit for the window of a decoder, in bytes: no kernel's own decoder has a larger one.
const MAX_WINDOW: u64 = 128 << 20;
/// The same for xz, in KiB, with the decoder's other tables.
const MAX_XZ_KIB: u32 = (MAX_WINDOW >> 10) as u32 + 1024;
/// Number of bytes at the start that suffice to recognise a compression.
pub(super) const MAGIC_BYTES: usize = 6;
/// Length of the unpacked size behind a compressed kernel.
const SIZE_BYTES: usize = 4;
/// Largest content of a block in Linux' form of LZ4.
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_LEGACY: u32 = 0x184c_2102;

/// How a kernel is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Xz,
    Lzma,
    Bzip2,
    Lz4,
    Zstd,
    /// The kernel lies there as it is.
    None,
}

const KNOWN: [(&[u8], Compression); 7] = [
    (b"\x1f\x8b", Compression::Gzip),
    (b"\xfd7zXZ\0", Compression::Xz),
    (b"\x5d\0\0", Compression::Lzma),
    (b"BZh", Compression::Bzip2),
    (b"\x02\x21\x4c\x18", Compression::Lz4),
    (b"\x28\xb5\x2f\xfd", Compression::Zstd),
    (b"\x7fELF", Compression::None),
];

impl Compression {
    /// Recognises the compression by the first bytes.
    pub(super) fn of(head: &[u8]) -> Option<Self> {
        KNOWN.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, compression)| *compression)
    }

    /// Returns the size of the unpacked kernel in bytes, from the last bytes of the payload.
    pub(super) fn unpacked_size(self, payload: u64, tail: [u8; SIZE_BYTES]) -> u64 {
        if self == Compression::None { payload } else { u32::from_le_bytes(tail).into() }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Lzma => "lzma",
            Compression::Bzip2 => "bzip2",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
            Compression::None => "nothing",
        })
    }
}

/// Unpacks a payload that declares to hold `size` bytes.
///
/// # Errors
/// Fails if the payload is damaged, holds more or less than it declares, or needs more memory than a kernel's own
/// decoder has.
pub(super) fn unpack(compression: Compression, mut payload: Vec<u8>, size: usize) -> io::Result<Vec<u8>> {
    // gzip's own format ends with the size. For the others, the kernel's build appends it.
    let packed = match compression {
        Compression::None => {
            payload.truncate(size);
            return check_size(payload, size);
        }
        Compression::Gzip => &payload[..],
        _ => &payload[..payload.len().saturating_sub(SIZE_BYTES)],
    };
    match compression {
        Compression::Gzip => read(flate2::bufread::GzDecoder::new(packed), size),
        Compression::Xz => read(lzma_rust2::XzReader::new_mem_limit(packed, false, MAX_XZ_KIB), size),
        Compression::Lzma => read(
            lzma_rust2::LzmaReader::new_mem_limit(packed, MAX_XZ_KIB, None).map_err(io::Error::other)?,
            size,
        ),
        Compression::Bzip2 => read(bzip2::bufread::BzDecoder::new(packed), size),
        Compression::Lz4 => unpack_lz4(packed, size),
        Compression::Zstd => unpack_zstd(packed, size),
        Compression::None => unreachable!("handled above"),
    }
}

/// Reads a decoder to its end, but not further than a byte beyond `size`.
fn read(decoder: impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut unpacked = reserve(size)?;
    decoder.take(size as u64 + 1).read_to_end(&mut unpacked)?;
    check_size(unpacked, size)
}

fn reserve(size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more, so that the reader finds the end without a larger buffer.
    bytes.try_reserve_exact(size + 1).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    Ok(bytes)
}

fn check_size(unpacked: Vec<u8>, size: usize) -> io::Result<Vec<u8>> {
    match unpacked.len() {
        length if length == size => Ok(unpacked),
        length if length > size => {
            Err(damaged(format!("it holds more than the {size} bytes that it declares")))
        }
        length => Err(damaged(format!("it holds {length} bytes, and declares {size}"))),
    }
}

fn unpack_zstd(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(packed, MAX_WINDOW);
    let mut decoder = decoder.map_err(io::Error::other)?;
    let unpacked = read(&mut decoder, size)?;
    let (stored, computed) =
        (decoder.decoder.get_checksum_from_data(), decoder.decoder.get_calculated_checksum());
    if stored.is_some_and(|stored| computed != Some(stored)) {
        return Err(damaged("its checksum is wrong"));
    }
    Ok(unpacked)
}

/// Unpacks blocks behind a magic number, each after its packed length. There is no end mark.
fn unpack_lz4(packed: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut unpacked = reserve(size)?;
    unpacked.resize(size, 0);
    let (mut rest, mut filled) = (packed, 0);
    while let Some((word, behind)) = rest.split_at_checked(4) {
        let length = u32_at(word, 0);
        if length == LZ4_LEGACY {
            rest = behind;
            continue;
        }
        let Some((block, behind)) = behind.split_at_checked(length as usize) else {
            return Err(damaged(format!("a block of {length} bytes is cut off")));
        };
        let room = (size - filled).min(LZ4_BLOCK);
        filled += lz4_flex::block::decompress_into(block, &mut unpacked[filled..filled + room])
            .map_err(io::Error::other)?;
        rest = behind;
    }
    unpacked.truncate(filled);
    check_size(unpacked, size)
}

fn damaged(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::test_images::{COMPRESSIONS, pack};
    use super::*;

    fn content() -> Vec<u8> {
        // Three blocks of LZ4's, compressible and not the same everywhere.
        (0..20_u32 << 20).map(|at| (at >> 12) as u8 ^ (at % 251) as u8).collect()
    }

    fn unpack_declared(payload: &[u8]) -> io::Result<Vec<u8>> {
        let compression = Compression::of(payload).expect("a known compression");
        let tail = payload.last_chunk().copied().unwrap_or_default();
        let size = compression.unpacked_size(payload.len() as u64, tail).min(64 << 20);
        unpack(compression, payload.to_vec(), size as usize)
    }

    #[test]
    fn every_compression_gives_back_what_was_packed() {
        let content = content();
        let mut seen = Vec::new();
        for name in COMPRESSIONS.iter().filter(|name| **name != "none") {
            let payload = pack(name, &content);
            let compression = Compression::of(&payload).unwrap();
            assert_eq!(compression.to_string(), *name);
            assert!(unpack_declared(&payload).unwrap() == content, "{name}");
            seen.push(compression);
        }
        assert_eq!(seen.len() + 1, KNOWN.len());
        let elf = pack("none", b"\x7fELF and more");
        assert_eq!(unpack_declared(&elf).unwrap(), elf);
    }

    #[test]
    fn threads_that_build_machines_have_stack_enough() {
        let payloads: Vec<_> = COMPRESSIONS.iter().map(|name| pack(name, b"\x7fELF")).collect();
        let unpack_all = move || payloads.iter().all(|payload| unpack_declared(payload).is_ok());
        let thread = std::thread::Builder::new().stack_size(256 << 10).spawn(unpack_all);
        assert!(thread.unwrap().join().unwrap());
    }

    #[test]
    fn what_declares_another_size_is_refused() {
        let content = vec![7; 1 << 20];
        for name in COMPRESSIONS.iter().filter(|name| **name != "none") {
            for (declared, complaint) in [(1 << 12, "more than"), (2 << 20, "and declares")] {
                let payload = pack(name, &content);
                let compression = Compression::of(&payload).unwrap();
                let error = unpack(compression, payload, declared).unwrap_err().to_string();
                // LZ4 and gzip notice some of it themselves.
                let own = ["gzip", "lz4"].contains(name);
                assert!(own || error.contains(complaint), "{name}: {error}");
            }
        }
    }

    #[test]
    fn a_bomb_takes_no_more_memory_than_it_declares() {
        // A GiB of zeros in a few KiB: more than the machine of the tests should hold.
        let bomb = pack("zstd", &vec![0; 64 << 20]);
        assert!(bomb.len() < 64 << 10);
        let error = unpack(Compression::Zstd, bomb, 1 << 16).unwrap_err();
        assert!(error.to_string().contains("more than the 65536 bytes"), "{error}");
    }

    #[test]
    fn windows_beyond_a_kernel_s_are_refused() {
        // zstd: a window of 2^31 bytes. lzma: a dictionary of 4 GiB. xz's limit is the same.
        let zstd = b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00\x00\x00\x00\x00".to_vec();
        assert!(unpack(Compression::Zstd, zstd, 16).is_err());
        let mut lzma = pack("lzma", &[1; 100]);
        lzma[1..5].copy_from_slice(&[0xff; 4]);
        assert!(unpack(Compression::Lzma, lzma, 100).is_err());
    }

    #[test]
    fn every_truncation_is_an_error_and_no_panic() {
        let content: Vec<u8> = (0..3000_u32).map(|at| ((at * at) >> 7) as u8).collect();
        for name in COMPRESSIONS.iter().filter(|name| **name != "none") {
            let payload = pack(name, &content);
            let compression = Compression::of(&payload).unwrap();
            for length in 0..payload.len() - SIZE_BYTES {
                let cut = payload[..length].to_vec();
                assert!(unpack(compression, cut, content.len()).is_err(), "{name}, {length} bytes");
            }
        }
    }

    proptest! {
        #[test]
        fn damage_is_an_error_or_the_content_of_the_declared_size(
            which in 0..COMPRESSIONS.len(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        ) {
            let content: Vec<u8> = (0..5000_u32).map(|at| ((at * at) >> 9) as u8).collect();
            let mut payload = pack(COMPRESSIONS[which], &content);
            let compression = Compression::of(&payload).unwrap_or(Compression::None);
            for (index, value) in changes {
                let at = index.index(payload.len());
                payload[at] = value;
            }
            if let Ok(unpacked) = unpack(compression, payload, content.len()) {
                prop_assert_eq!(unpacked.len(), content.len());
            }
        }
    }
}
