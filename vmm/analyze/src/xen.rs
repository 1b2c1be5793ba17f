//! Cores of Xen's guests (`xl dump-core`): the memory is in sections, and there are no segments.
//!
//! The file is not trusted: the number of sections is limited, and they must lie in the file. Source: Xen's
//! docs/misc/dump-core-format.txt.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::elf::{CoreError, number};
use super::file::Region;

const SECTION_HEADER: usize = 64;
/// Limit for sections. A core has ten.
const MOST_SECTIONS: u64 = 256;
/// The section with the guest's pages, usually in the order of their numbers.
const PAGES: &[u8] = b".xen_pages\0";

/// Returns the memory in a core of `length` bytes with this ELF header, or `None` if it is not a core of Xen.
pub(super) fn regions(file: &File, length: u64, header: &[u8]) -> Result<Option<Region>, CoreError> {
    let (table, count, names) = (number(header, 40, 8), number(header, 60, 2), number(header, 62, 2));
    if !(1..=MOST_SECTIONS).contains(&count) || names >= count {
        return Ok(None);
    }
    let read = |offset: u64, bytes: &mut [u8], what| {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > length) {
            return Err(CoreError::Truncated(what));
        }
        Ok(file.read_exact_at(bytes, offset)?)
    };
    let mut headers = vec![0; count as usize * SECTION_HEADER];
    read(table, &mut headers, "section headers")?;
    let sections = headers.as_chunks::<SECTION_HEADER>().0;
    let names_at = number(&sections[names as usize], 24, 8);
    for section in sections {
        let mut name = [0; PAGES.len()];
        let at = names_at.saturating_add(number(section, 0, 4));
        // Names may be shorter than this one, and be the last in the file.
        if read(at, &mut name, "names of sections").is_err() || name != *PAGES {
            continue;
        }
        let (offset, stored) = (number(section, 24, 8), number(section, 32, 8));
        if offset.checked_add(stored).is_none_or(|end| end > length) {
            return Err(CoreError::Truncated("section .xen_pages"));
        }
        return Ok(Some(Region { address: 0, offset, stored, absent: 0 }));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const PAGE: usize = 4096;

    /// Returns a core of Xen with this number of bytes of memory. The header says that it has `stored` bytes.
    fn core(memory: usize, stored: u64) -> Vec<u8> {
        let names = b"\0.shstrtab\0.xen_pages\0.xen_pfn\0";
        let (names_at, table_at, pages_at) = (64, 128, PAGE);
        let mut file = vec![0; pages_at + memory];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[16..20].copy_from_slice(&[4, 0, 62, 0]);
        file[40] = table_at as u8;
        file[60..64].copy_from_slice(&[3, 0, 1, 0]);
        file[names_at..names_at + names.len()].copy_from_slice(names);
        let mut section = |number: usize, name: u32, offset: u64, bytes: u64| {
            let at = table_at + number * SECTION_HEADER;
            file[at..at + 4].copy_from_slice(&name.to_le_bytes());
            file[at + 24..at + 32].copy_from_slice(&offset.to_le_bytes());
            file[at + 32..at + 40].copy_from_slice(&bytes.to_le_bytes());
        };
        section(1, 1, names_at as u64, names.len() as u64);
        section(2, 11, pages_at as u64, stored);
        file
    }

    fn parse(content: &[u8]) -> Result<Vec<Region>, CoreError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        super::super::elf::regions(&file, content.len() as u64, 0)
    }

    #[test]
    fn pages_are_found_by_the_name_of_their_section() {
        let good = core(3 * PAGE, 3 * PAGE as u64);
        let expected = Region { address: 0, offset: PAGE as u64, stored: 3 * PAGE as u64, absent: 0 };
        assert_eq!(parse(&good).unwrap(), [expected]);
        assert!(matches!(parse(&core(PAGE, 2 * PAGE as u64)), Err(CoreError::Truncated(_))));
        assert!(matches!(parse(&core(PAGE, u64::MAX)), Err(CoreError::Truncated(_))));
        assert!(matches!(parse(&core(PAGE, 0)), Err(CoreError::Empty)));
        for at in 40..64 {
            for byte in [0xff, 0x7f, 0] {
                let mut file = good.clone();
                file[at] = byte;
                let _ = parse(&file);
            }
        }
    }
}
