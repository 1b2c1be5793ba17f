//! The header of a qcow2 image, which is read before the rest of the image. An image that requires unknown
//! features is refused, as the specification demands (QEMU, `docs/interop/qcow2.txt`).
//!
//! A refused image is not changed. The error contains the command that makes a supported image from it.

use std::path::Path;

use super::super::open::{ImageFile, OpenError};
use super::refused;

const MAGIC: &[u8] = b"QFI\xfb";
/// Length of the version 2 header, and least length of the version 3 header, in bytes.
const LEN_V2: usize = 72;
const LEN_V3: usize = 104;
/// QEMU's limits for the size of a cluster, as a power of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const MAX_REFCOUNT_ORDER: u32 = 6;
pub(super) const MAX_NAME: usize = 1023;

/// Bits of the incompatible features.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// The bit of the autoclear features for up-to-date bitmaps. Writers clear it.
const BITMAPS: u64 = 1 << 0;

/// Kinds of header extensions.
const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const ENCRYPTION: u32 = 0x0537_be77;

/// The facts about an image that can be opened.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// The name of the backing file, as written in the image.
    pub(super) backing: Option<String>,
    pub(super) backing_format: Option<String>,
    /// The size of the disk in bytes.
    pub(super) size: u64,
    /// The size of a cluster in bytes.
    pub(super) cluster_size: u64,
    /// Whether clusters can be marked as zeros.
    pub(super) has_zero_clusters: bool,
    /// Whether the image has bitmaps for incremental backups. The first write makes them invalid.
    pub(super) has_bitmaps: bool,
}

impl Header {
    /// Reads the header of `file`. Fails if it requires an unknown feature.
    pub(super) fn read(file: &ImageFile) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Io { action: "read the header of", path: file.path.clone(), source };
        // The whole header lies in the first cluster.
        let most = 1_u64 << CLUSTER_BITS.end();
        let mut bytes = vec![0; file.size.min(most) as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file.file, &mut bytes, 0).map_err(failed)?;
        parse(&bytes, &file.path).map_err(|reason| refused(&file.path, reason))
    }
}

/// Parses an image's first cluster. An error completes a sentence about the image.
fn parse(bytes: &[u8], path: &Path) -> Result<Header, String> {
    let u32_at = |at: usize| u32::from_be_bytes(array(bytes, at));
    let u64_at = |at: usize| u64::from_be_bytes(array(bytes, at));
    if bytes.get(..4) != Some(MAGIC) {
        return Err("it does not begin like a qcow2 image; is its format raw?".to_owned());
    }
    let version = u32_at(4);
    match version {
        1 => return Err(format!("it is a qcow image of version 1; {}", convert(path, "qcow"))),
        2 | 3 => {}
        _ => {
            return Err(format!(
                "its version {version} is unknown; convert it to version 3 with the program that \
                 made it"
            ));
        }
    }
    let cluster_bits = u32_at(20);
    if bytes.len() < if version == 2 { LEN_V2 } else { LEN_V3 } || !CLUSTER_BITS.contains(&cluster_bits) {
        return Err("its header is damaged".to_owned());
    }
    let cluster = bytes.len().min(1 << cluster_bits);
    let len = if version == 2 { LEN_V2 } else { u32_at(100) as usize };
    let refcount_order = if version == 2 { 4 } else { u32_at(96) };
    let well_formed = len >= LEN_V2.max(if version == 2 { 0 } else { LEN_V3 });
    if !well_formed || len > cluster || !len.is_multiple_of(8) || refcount_order > MAX_REFCOUNT_ORDER {
        return Err("its header is damaged".to_owned());
    }
    let bytes = &bytes[..cluster];
    // The list of extensions ends at the name of the backing file, if not before.
    let name_at = u64_at(8);
    let extensions_end = if name_at == 0 { cluster as u64 } else { name_at.min(cluster as u64) };
    let extensions = extensions(bytes, len, extensions_end as usize)?;
    let extension = |kind| extensions.iter().find(|(other, _)| *other == kind).map(|&(_, data)| data);

    match u32_at(32) {
        0 if extension(ENCRYPTION).is_none() => {}
        1 => return Err(format!("it is encrypted (AES); {}", decrypt(path))),
        2 => return Err(format!("it is encrypted (LUKS); {}", decrypt(path))),
        _ => return Err(format!("it is encrypted by an unknown method; {}", decrypt(path))),
    }
    let mut has_bitmaps = false;
    if version == 3 {
        let names = extension(FEATURE_NAMES).unwrap_or_default();
        check_features(u64_at(72), names, path)?;
        // The fields after the first version 3 are the type of compression and unknown fields.
        if bytes[LEN_V3..len].iter().any(|&byte| byte != 0) {
            return Err(format!("its header has unknown fields; {}", convert(path, "qcow2")));
        }
        has_bitmaps = u64_at(88) & BITMAPS != 0;
    }
    let backing = match name_at {
        0 => None,
        _ => Some(backing_name(bytes, name_at, u32_at(16))?),
    };
    let backing_format = extension(BACKING_FORMAT).map(text).transpose()?;
    let (cluster_size, has_zero_clusters) = (1 << cluster_bits, version > 2);
    let size = u64_at(24);
    Ok(Header { backing, backing_format, size, cluster_size, has_zero_clusters, has_bitmaps })
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk().copied()).unwrap_or([0; N])
}

fn text(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_owned()).map_err(|_| "a name in its header is not UTF-8".to_owned())
}

/// Returns kind and content of the header's extensions.
fn extensions(bytes: &[u8], start: usize, end: usize) -> Result<Vec<(u32, &[u8])>, String> {
    let mut found = Vec::new();
    let mut at = start;
    while at + 8 <= end {
        let (kind, len) = (u32::from_be_bytes(array(bytes, at)), u32::from_be_bytes(array(bytes, at + 4)));
        if kind == END {
            break;
        }
        at += 8;
        let data = bytes.get(at..).and_then(|rest| rest.get(..len as usize));
        found.push((kind, data.ok_or("its header is damaged: an extension is longer than a cluster")?));
        at += (len as usize).next_multiple_of(8);
    }
    Ok(found)
}

fn backing_name(bytes: &[u8], at: u64, len: u32) -> Result<String, String> {
    let place = usize::try_from(at).ok().and_then(|at| Some(at..at.checked_add(len as usize)?));
    let name = place.filter(|place| place.len() <= MAX_NAME).and_then(|place| bytes.get(place));
    text(name.ok_or("its header is damaged: the name of its backing file lies outside")?)
}

/// Refuses all incompatible features, because none is supported.
fn check_features(features: u64, names: &[u8], path: &Path) -> Result<(), String> {
    if features & CORRUPT != 0 {
        return Err(format!("it is marked as corrupt; {}", repair(path)));
    }
    if features & DIRTY != 0 {
        return Err(format!("it was not closed, and its reference counts are stale; {}", repair(path)));
    }
    let Some(bit) = (0..64).find(|bit| features & (1 << bit) != 0) else { return Ok(()) };
    let what = match 1 << bit {
        EXTERNAL_DATA => "keeps its data in another file".to_owned(),
        COMPRESSION => "uses another compression than deflate".to_owned(),
        EXTENDED_L2 => "has subclusters (extended L2 entries)".to_owned(),
        _ => match feature_name(bit, names) {
            Some(name) => format!("has the unknown feature {name:?} (bit {bit})"),
            None => format!("has an unknown feature (bit {bit})"),
        },
    };
    Err(format!("it {what}, which is not supported; {}", convert(path, "qcow2")))
}

/// Returns the image's own name for an incompatible feature. An entry consists of kind, bit and 46 bytes of
/// text.
fn feature_name(bit: u32, names: &[u8]) -> Option<String> {
    let entry = names.chunks_exact(48).find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit)?;
    let name = entry[2..].split(|&byte| byte == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned())
}

fn repair(path: &Path) -> String {
    format!("repair it: qemu-img check -r all -f qcow2 {}", quoted(path))
}

/// Returns the instruction that makes a standalone image that can be opened.
pub(super) fn convert(path: &Path, format: &str) -> String {
    format!("convert it: qemu-img convert -f {format} -O qcow2 {} NEW.qcow2", quoted(path))
}

fn decrypt(path: &Path) -> String {
    // A comma would end the name within an option.
    let name = quoted(Path::new(&format!("file.filename={}", path.display().to_string().replace(',', ",,"))));
    format!(
        "decrypt it: qemu-img convert --object secret,id=key,file=PASSWORD_FILE --image-opts \
         driver=qcow2,encrypt.key-secret=key,{name} -O qcow2 NEW.qcow2"
    )
}

/// Returns a path quoted for a shell.
pub(super) fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-=,+:@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
