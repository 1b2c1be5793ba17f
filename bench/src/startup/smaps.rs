//! Memory of a process in addition to its guests', from the kernel's accounts of its mappings.
//!
//! The unit is KiB, as in the kernel. See `Documentation/filesystems/proc.rst`, the parts on
//! `/proc/PID/smaps` and `/proc/PID/status`.

use std::fs;
use std::ops::{Add, AddAssign};

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// The memory file of samepage's frames, which contain guests' content.
const FRAMES: &str = "/memfd:samepage-frames";

/// Memory of processes, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// Memory that no other process has mapped. The program's code is private while only one process runs it.
    pub(crate) private_kib: u64,
    /// Private memory, and the share of memory that several processes have mapped: the proportional set size.
    pub(crate) proportional_kib: u64,
    /// The process's page tables, including those for guest memory. The kernel counts them separately.
    pub(crate) page_tables_kib: u64,
}

impl Add for Memory {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            private_kib: self.private_kib + other.private_kib,
            proportional_kib: self.proportional_kib + other.proportional_kib,
            page_tables_kib: self.page_tables_kib + other.page_tables_kib,
        }
    }
}

impl AddAssign for Memory {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// A mapping, with sizes in KiB.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mapping {
    size: u64,
    permissions: String,
    name: String,
    proportional: u64,
    private: u64,
    anonymous: u64,
}

fn mappings(smaps: &str) -> Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let unexpected = || format!("reading /proc/PID/smaps: {line:?}");
        let (word, rest) = line.split_once(char::is_whitespace).with_context(unexpected)?;
        if let Some((start, end)) = word.split_once('-') {
            let [start, end] = [start, end].map(|address| u64::from_str_radix(address, 16));
            // Permissions, offset, device, inode, name.
            let mut fields = rest.split_whitespace();
            let permissions = fields.next().with_context(unexpected)?.to_owned();
            let name = fields.skip(3).collect::<Vec<_>>().join(" ");
            let size = end.with_context(unexpected)?.checked_sub(start.with_context(unexpected)?);
            let size = size.with_context(unexpected)? >> 10;
            mappings.push(Mapping { size, permissions, name, ..Mapping::default() });
            continue;
        }
        let mapping = mappings.last_mut().with_context(unexpected)?;
        let sum = match word {
            "Pss:" => &mut mapping.proportional,
            "Private_Clean:" | "Private_Dirty:" => &mut mapping.private,
            "Anonymous:" => &mut mapping.anonymous,
            _ => continue,
        };
        *sum += kib(rest).with_context(unexpected)?;
    }
    Ok(mappings)
}

/// Returns the number of a field like `   123 kB`.
fn kib(field: &str) -> Option<u64> {
    field.trim().strip_suffix(" kB")?.parse().ok()
}

/// Returns the memory of a samepage process without `guest_private_kib` of private guest pages and without
/// all frames.
pub(super) fn of_samepage(process: u32, guest_private_kib: u64) -> Result<Memory> {
    beyond_guests(process, |smaps| without_private_pages(&mappings(smaps)?, guest_private_kib))
}

/// Returns the memory of a QEMU process without its guest's, which is a mapping of this size.
pub(super) fn of_qemu(process: u32, guest_kib: u64) -> Result<Memory> {
    beyond_guests(process, |smaps| without_mapping(&mappings(smaps)?, guest_kib))
}

fn beyond_guests(process: u32, count: impl FnOnce(&str) -> Result<Memory>) -> Result<Memory> {
    let read = |name: &str| {
        let path = format!("/proc/{process}/{name}");
        fs::read_to_string(&path).with_context(|| format!("reading {path}"))
    };
    let status = read("status")?;
    let page_tables = status.lines().find_map(|line| line.strip_prefix("VmPTE:")).and_then(kib);
    let page_tables_kib = page_tables.context("finding VmPTE in /proc/PID/status")?;
    Ok(Memory { page_tables_kib, ..count(&read("smaps")?)? })
}

fn without_private_pages(mappings: &[Mapping], guest_kib: u64) -> Result<Memory> {
    let mut all = Memory::default();
    for mapping in mappings {
        // Anonymous pages over frames are guests' own copies, which count as their private pages. Frames
        // contain guests' content.
        let is_frames = mapping.name.starts_with(FRAMES);
        let part = |whole| if is_frames { mapping.anonymous } else { whole };
        all.private_kib += part(mapping.private);
        all.proportional_kib += part(mapping.proportional);
    }
    let less = |kib: u64| kib.checked_sub(guest_kib).context("guests have more memory than their process");
    Ok(Memory { private_kib: less(all.private_kib)?, proportional_kib: less(all.proportional_kib)?, ..all })
}

fn without_mapping(mappings: &[Mapping], guest_kib: u64) -> Result<Memory> {
    let is_ram = |mapping: &Mapping| {
        mapping.size == guest_kib && mapping.permissions == "rw-p" && mapping.name.is_empty()
    };
    let count = mappings.iter().filter(|mapping| is_ram(mapping)).count();
    if count != 1 {
        bail!("{count} mappings of QEMU's look like guest memory of {guest_kib} KiB, and one has to");
    }
    Ok(mappings.iter().filter(|mapping| !is_ram(mapping)).fold(Memory::default(), |sum, mapping| {
        let (private_kib, proportional_kib) = (mapping.private, mapping.proportional);
        sum + Memory { private_kib, proportional_kib, page_tables_kib: 0 }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 fe:00 77 /usr/bin/samepage
Rss:                 100 kB
Pss:                  60 kB
Private_Clean:        40 kB
Private_Dirty:         4 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0004000000 rw-p 00000000 00:00 0
Pss:                 500 kB
Private_Clean:         0 kB
Private_Dirty:       500 kB
Anonymous:           500 kB
7f0004000000-7f0004010000 rw-p 00003000 00:01 5 /memfd:samepage-frames (deleted)
Pss:                  30 kB
Private_Clean:         0 kB
Private_Dirty:        12 kB
Anonymous:             8 kB
";

    #[test]
    fn mappings_are_read() {
        let mappings = mappings(SMAPS).unwrap();
        assert_eq!(mappings.len(), 3);
        assert_eq!((mappings[0].size, mappings[0].private, mappings[0].proportional), (1024, 44, 60));
        assert_eq!((mappings[1].permissions.as_str(), mappings[1].name.as_str()), ("rw-p", ""));
        assert_eq!(mappings[2].name, "/memfd:samepage-frames (deleted)");
        assert!(super::mappings("Pss: 1 kB\n").is_err());
    }

    #[test]
    fn guest_memory_is_left_out() {
        let mappings = mappings(SMAPS).unwrap();
        let qemu = without_mapping(&mappings, 64 << 10).unwrap();
        assert_eq!((qemu.private_kib, qemu.proportional_kib), (44 + 12, 60 + 30));
        assert!(without_mapping(&mappings, 32 << 10).is_err());

        let samepage = without_private_pages(&mappings, 408).unwrap();
        assert_eq!((samepage.private_kib, samepage.proportional_kib), (44 + 100, 60 + 100));
        assert!(without_private_pages(&mappings, 1 << 20).is_err());
    }

    #[test]
    fn this_process_has_memory() {
        let memory = of_samepage(std::process::id(), 0).unwrap();
        assert!(memory.private_kib > 0 && memory.page_tables_kib > 0, "{memory:?}");
        assert!(memory.proportional_kib >= memory.private_kib / 2, "{memory:?}");
    }
}
