//! Tells whether this host has huge pages for guest memory.
//!
//! Source: Linux' Documentation/admin-guide/mm/transhuge.rst.

use std::fs;

/// The host's setting for all sizes of huge pages.
const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// The host's setting for pages of 2 MiB, since Linux 6.8.
const SWITCH_2M: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/enabled";

/// Returns the reason why guests get no huge pages on this host, and how to change that. Returns `None` if
/// they do.
#[must_use]
pub fn unavailable() -> Option<String> {
    let read = |path| fs::read_to_string(path).ok();
    missing(read(SWITCH).as_deref(), read(SWITCH_2M).as_deref())
}

fn missing(all: Option<&str>, of_2m: Option<&str>) -> Option<String> {
    let off = |path: &str| {
        format!(
            "huge pages are off on this host ({path} says never), so guests get pages of 4 KiB; as root, \
             `echo madvise > {path}` turns them on"
        )
    };
    let Some(all) = all else {
        return Some(
            "this host's kernel has no transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE), so guests get pages \
             of 4 KiB"
                .to_owned(),
        );
    };
    match of_2m.and_then(chosen) {
        Some("never") => Some(off(SWITCH_2M)),
        Some("always" | "madvise") => None,
        _ => (chosen(all) == Some("never")).then(|| off(SWITCH)),
    }
}

/// Returns the word in brackets.
fn chosen(text: &str) -> Option<&str> {
    text.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switches_are_read_as_the_kernel_does() {
        let madvise = Some("always [madvise] never\n");
        let never = Some("always madvise [never]\n");
        let inherit = Some("always [inherit] madvise never\n");
        assert_eq!(missing(madvise, None), None);
        assert_eq!(missing(madvise, inherit), None);
        assert_eq!(missing(never, madvise), None);
        for (all, of_2m) in [(never, None), (never, inherit)] {
            assert!(
                missing(all, of_2m)
                    .unwrap()
                    .contains("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled")
            );
        }
        assert!(missing(madvise, never).unwrap().contains("hugepages-2048kB/enabled"));
        assert!(missing(None, None).unwrap().contains("CONFIG_TRANSPARENT_HUGEPAGE"));
    }
}
