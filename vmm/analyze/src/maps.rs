//! Parses `/proc/PID/maps` and finds the mappings that are guest memory.
//!
//! A monitor maps guest memory readable and writable. The mapping is private and anonymous, or shared from a
//! memfd, `/dev/shm`, hugetlbfs or a file, or private from a snapshot's file. Such mappings count from a
//! given size on. The heap, stacks and device memory do not count. The kernel splits mappings where
//! attributes differ, so adjacent mappings count together. Source: Linux' Documentation/filesystems/proc.rst.

use std::ops::Range;

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// The addresses.
    pub(super) range: Range<u64>,
    read_write: bool,
    shared: bool,
    offset: u64,
    /// Device and inode of a file mapping, in the kernel's form.
    file: Option<String>,
    /// The kernel's name of the mapping.
    name: String,
}

/// Adjacent mappings of one kind: a part of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GuestMemory {
    /// The name for users.
    pub(super) name: String,
    /// The mappings by ascending address.
    pub(super) mappings: Vec<Mapping>,
}

impl GuestMemory {
    /// Returns the addresses from the first to the last mapping.
    pub(super) fn range(&self) -> Range<u64> {
        match (self.mappings.first(), self.mappings.last()) {
            (Some(first), Some(last)) => first.range.start..last.range.end,
            _ => 0..0,
        }
    }

    /// Returns the size in bytes.
    pub(super) fn bytes(&self) -> u64 {
        let range = self.range();
        range.end - range.start
    }
}

impl Mapping {
    /// Parses a line of `/proc/PID/maps`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let (start, end) = fields.next()?.split_once('-')?;
        let range = u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?;
        let access = fields.next()?;
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let (device, inode) = (fields.next()?, fields.next()?);
        (range.start < range.end).then(|| Self {
            range,
            read_write: access.starts_with("rw"),
            shared: access.ends_with('s'),
            offset,
            file: (inode != "0").then(|| format!("{device} {inode}")),
            name: fields.next().unwrap_or_default().trim().to_owned(),
        })
    }

    /// Returns whether this is a private mapping of samepage's frames. Its pages exist even if the page table
    /// has none.
    pub(super) fn on_frames(&self) -> bool {
        !self.shared && self.name.starts_with("/memfd:samepage-frames")
    }

    fn can_be_guest_memory(&self) -> bool {
        let name = self.name.as_str();
        let memory = match name.strip_prefix("/dev/") {
            Some(device) => {
                ["shm/", "zero", "hugepages", "mem"].iter().any(|memory| device.starts_with(memory))
            }
            None => !name.starts_with('[') || name.starts_with("[anon"),
        };
        self.read_write && memory && !name.starts_with("anon_inode:")
    }

    /// Returns whether this mapping continues `last`.
    fn continues(&self, last: &Self) -> bool {
        let samepage = |one: &Self, other: &Self| one.on_frames() && other.file.is_none() && !other.shared;
        self.range.start == last.range.end
            && ((self.on_frames() && last.on_frames())
                || samepage(self, last)
                || samepage(last, self)
                || (self.shared == last.shared
                    && self.file == last.file
                    && (self.file.is_none()
                        || self.offset == last.offset + (last.range.end - last.range.start))))
    }

    fn describe(&self) -> String {
        match self.name.as_str() {
            "" if self.shared => "shared memory".to_owned(),
            "" => "private memory".to_owned(),
            name => name.trim_end_matches(" (deleted)").to_owned(),
        }
    }
}

/// Parses `/proc/PID/maps`. Invalid lines are skipped.
pub(super) fn parse(maps: &str) -> Vec<Mapping> {
    maps.lines().filter_map(Mapping::parse).collect()
}

/// Returns the mappings that are probably guest memory: at least `least` bytes of adjacent mappings.
pub(super) fn guess(maps: &[Mapping], least: u64) -> Vec<GuestMemory> {
    let candidates: Vec<_> = maps.iter().filter(|mapping| mapping.can_be_guest_memory()).cloned().collect();
    candidates
        .chunk_by(|last, next| next.continues(last))
        .map(|group| GuestMemory {
            // Do not name guest memory after the frames that parts of it were merged into.
            name: group.iter().find(|part| !part.on_frames()).unwrap_or(&group[0]).describe(),
            mappings: group.to_vec(),
        })
        .filter(|memory| memory.bytes() >= least)
        .collect()
}

/// Returns the mappings within `range`, cut to it. Returns `None` if nothing readable is mapped there.
pub(super) fn within(maps: &[Mapping], range: &Range<u64>) -> Option<GuestMemory> {
    let mappings: Vec<_> = maps
        .iter()
        .filter(|mapping| mapping.read_write)
        .filter_map(|mapping| {
            let start = mapping.range.start.max(range.start);
            let end = mapping.range.end.min(range.end);
            (start < end).then(|| Mapping { range: start..end, ..mapping.clone() })
        })
        .collect();
    let name = mappings.first()?.describe();
    Some(GuestMemory { name, mappings })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c0000000-55d0c0800000 r-xp 00000000 fe:00 1234       /usr/bin/qemu-system-x86_64
55d0c2000000-55d0c4000000 rw-p 00000000 00:00 0          [heap]
7f0000000000-7f0040000000 rw-p 00000000 00:00 0 \n\
7f0040000000-7f0080000000 rw-p 00000000 00:00 0 \n\
7f0100000000-7f0101000000 rw-s 00000000 00:05 77         /dev/dri/card0
7f0180000000-7f01a0000000 rw-s 00000000 00:01 1025       /memfd:memory-backend-memfd (deleted)
7f01a0000000-7f01c0000000 rw-s 20000000 00:01 1025       /memfd:memory-backend-memfd (deleted)
7f01c0000000-7f01e0000000 rw-s 00000000 00:01 1026       /memfd:other (deleted)
7f0200000000-7f0210000000 r--p 00000000 00:00 0 \n\
7f0220000000-7f0220100000 rw-p 00000000 00:00 0 \n\
7ffc00000000-7ffc02000000 rw-p 00000000 00:00 0          [stack]
rubbish
2-1 rw-p 0 0:0 0
";

    #[test]
    fn guest_memory_is_large_writable_and_no_heap_stack_or_device() {
        let found = guess(&parse(MAPS), 16 << 20);
        let found: Vec<_> = found.iter().map(|memory| (memory.range(), memory.name.as_str())).collect();
        assert_eq!(
            found,
            [
                (0x7f00_0000_0000..0x7f00_8000_0000, "private memory"),
                (0x7f01_8000_0000..0x7f01_c000_0000, "/memfd:memory-backend-memfd"),
                (0x7f01_c000_0000..0x7f01_e000_0000, "/memfd:other"),
            ]
        );
        assert_eq!(guess(&parse(MAPS), 1 << 20).len(), 4);
    }

    #[test]
    fn merged_pages_are_parts_of_the_memory_around_them() {
        let maps = "\
7f0000000000-7f0001000000 rw-p 00000000 00:00 0 \n\
7f0001000000-7f0001003000 rw-p 00007000 00:01 5 /memfd:samepage-frames (deleted)
7f0001003000-7f0001004000 rw-p 00001000 00:01 5 /memfd:samepage-frames (deleted)
7f0001004000-7f0002000000 rw-p 00000000 00:00 0 \n\
7f0002000000-7f0004000000 rw-s 00000000 00:01 5 /memfd:samepage-frames (deleted)
";
        let found = guess(&parse(maps), 20 << 20);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].bytes(), found[0].name.as_str()), (32 << 20, "private memory"));
        let on_frames: Vec<_> = found[0].mappings.iter().map(Mapping::on_frames).collect();
        assert_eq!(on_frames, [false, true, true, false]);
    }

    #[test]
    fn a_range_is_cut_from_the_mappings() {
        let maps = parse(MAPS);
        let memory = within(&maps, &(0x7f00_3fff_f000..0x7f00_4000_1000)).unwrap();
        assert_eq!((memory.bytes(), memory.mappings.len()), (8192, 2));
        assert_eq!(within(&maps, &(0x1000..0x2000)), None);
        assert_eq!(within(&maps, &(0x7f02_0000_0000..0x7f02_1000_0000)), None, "read-only");
    }
}
