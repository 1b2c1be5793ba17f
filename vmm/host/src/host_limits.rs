//! How much memory the host can promise to guests.
//!
//! Guest memory is only reserved when a VM starts, so nothing stops a host from promising more than it
//! has until guests touch it, and then the kernel kills a process. This module measures beforehand what is
//! available: free memory, or less if the commit limit or a control group allows less. Units: bytes.
//!
//! Sources: Linux' Documentation/filesystems/proc.rst, admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1.

#![expect(unsafe_code, reason = "sets a resource limit")]

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use samepage_sharing::PAGE_SIZE;
use thiserror::Error;

/// What sets the limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LimitedBy {
    /// MemAvailable of /proc/meminfo.
    FreeMemory,
    /// CommitLimit of /proc/meminfo, in force with vm.overcommit_memory=2.
    CommitLimit,
    /// The control group at this path.
    ControlGroup(PathBuf),
}

impl fmt::Display for LimitedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LimitedBy::FreeMemory => f.write_str("free memory of the host"),
            LimitedBy::CommitLimit => f.write_str("the commit limit, with vm.overcommit_memory=2"),
            LimitedBy::ControlGroup(path) => write!(f, "the control group {}", path.display()),
        }
    }
}

/// Memory that new guests may use before the host runs short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMemory {
    /// In bytes.
    pub available: u64,
    /// Where that figure comes from.
    pub limited_by: LimitedBy,
}

/// A request for more memory than the host can promise. Sizes are in MiB.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Overcommitted {
    /// The guests' memory itself.
    #[error(
        "the VMs are to have {requested} MiB of memory together, and the host can promise {allowed} MiB \
         ({available} MiB from {limited_by}, times --overcommit {ratio}); start fewer or smaller VMs, or raise \
         --overcommit if sharing and idle memory will make up for it"
    )]
    Guests {
        /// The requested memory.
        requested: u64,
        /// The memory that may be promised.
        allowed: u64,
        /// The available memory.
        available: u64,
        /// The limit that the available memory comes from.
        limited_by: LimitedBy,
        /// The ratio, as text.
        ratio: String,
    },
    /// The host's metadata for the guests' pages.
    #[error(
        "the VMs are to have {requested} MiB of memory together, and to keep track of that takes {needed} MiB of \
         the host's {available} MiB (from {limited_by}), whether guests use their memory or not; start fewer or \
         smaller VMs"
    )]
    Bookkeeping {
        /// The requested memory.
        requested: u64,
        /// The memory that metadata takes at once.
        needed: u64,
        /// The available memory.
        available: u64,
        /// The limit that the available memory comes from.
        limited_by: LimitedBy,
    },
}

/// What is kept for each guest page: the sharing engine's state, and a bit of what the VMM wrote.
const BOOKKEEPING_BYTES_PER_PAGE: u64 = 17;
/// The part of the available memory that this may take: a quarter.
const BOOKKEEPING_DIVISOR: u64 = 4;

const MIB: u64 = 1 << 20;

impl HostMemory {
    /// Measures this host. Returns `None` if /proc is not readable.
    pub fn measure() -> Option<Self> {
        Self::from_files(&|path| fs::read_to_string(path).ok())
    }

    fn from_files(read: &dyn Fn(&Path) -> Option<String>) -> Option<Self> {
        let meminfo = read(Path::new("/proc/meminfo"))?;
        let mut limit =
            Self { available: field_kib(&meminfo, "MemAvailable:")?, limited_by: LimitedBy::FreeMemory };
        let mode = read(Path::new("/proc/sys/vm/overcommit_memory")).unwrap_or_default();
        if mode.trim() == "2"
            && let Some(total) = field_kib(&meminfo, "CommitLimit:")
            && let Some(used) = field_kib(&meminfo, "Committed_AS:")
        {
            limit.lower_to(total.saturating_sub(used), LimitedBy::CommitLimit);
        }
        if let Some(groups) = read(Path::new("/proc/self/cgroup")) {
            for group in memory_groups(&groups) {
                if let Some(available) = group.available(read) {
                    limit.lower_to(available, LimitedBy::ControlGroup(group.directory));
                }
            }
        }
        Some(limit)
    }

    fn lower_to(&mut self, available: u64, limited_by: LimitedBy) {
        if available < self.available {
            *self = Self { available, limited_by };
        }
    }

    /// Checks whether guests with `requested` bytes of memory in all may start.
    ///
    /// # Errors
    /// Fails if they are to have more than `ratio` times the available memory, or need too much metadata.
    pub fn check(&self, requested: u64, ratio: f64) -> Result<(), Overcommitted> {
        let (requested_mib, available) = (requested.div_ceil(MIB), self.available / MIB);
        let limited_by = self.limited_by.clone();
        let allowed = self.available as f64 * ratio;
        if requested as f64 > allowed {
            return Err(Overcommitted::Guests {
                requested: requested_mib,
                allowed: allowed as u64 / MIB,
                available,
                limited_by,
                ratio: ratio.to_string(),
            });
        }
        let bookkeeping = (requested / PAGE_SIZE as u64).saturating_mul(BOOKKEEPING_BYTES_PER_PAGE);
        if bookkeeping > self.available / BOOKKEEPING_DIVISOR {
            return Err(Overcommitted::Bookkeeping {
                requested: requested_mib,
                needed: bookkeeping.div_ceil(MIB),
                available,
                limited_by,
            });
        }
        Ok(())
    }
}

/// Returns the size of the host's memory, if `/proc` is readable.
#[must_use]
pub fn total_bytes() -> Option<u64> {
    field_kib(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Returns in bytes the value of a line like `MemAvailable:   123 kB`, of a file of the kernel's.
pub(crate) fn field_kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// A control group that may limit memory, by the names its version gives to things.
struct Group {
    directory: PathBuf,
    limit: &'static str,
    usage: &'static str,
    /// The line of memory.stat with page cache that the kernel drops before anything runs short.
    cache: &'static str,
}

/// All control groups around the process, from /proc/self/cgroup, with both versions' hierarchies.
fn memory_groups(text: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, limit, usage, cache) = if controllers.is_empty() {
            ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
        } else if controllers.split(',').any(|name| name == "memory") {
            let names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file");
            ("/sys/fs/cgroup/memory", names.0, names.1, names.2)
        } else {
            continue;
        };
        // A group is within the limits of all groups above it.
        for relative in Path::new(path.trim_start_matches('/')).ancestors() {
            groups.push(Group { directory: Path::new(root).join(relative), limit, usage, cache });
        }
    }
    groups
}

impl Group {
    fn available(&self, read: &dyn Fn(&Path) -> Option<String>) -> Option<u64> {
        // "max" is no number, and no limit.
        let limit: u64 = read(&self.directory.join(self.limit))?.trim().parse().ok()?;
        let usage: u64 = read(&self.directory.join(self.usage))?.trim().parse().ok()?;
        let statistics = read(&self.directory.join("memory.stat")).unwrap_or_default();
        let cache = statistics
            .lines()
            .find_map(|line| line.strip_prefix(self.cache)?.trim().parse::<u64>().ok())
            .unwrap_or(0);
        Some(limit.saturating_sub(usage.saturating_sub(cache)))
    }
}

/// Raises this process's limit of open files as far as possible: each VM takes about a dozen.
pub fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid structure. Where the limit cannot be raised, it stays as it is, and
    // the first file too many is an error that says what to do.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur < limit.rlim_max {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       8000000 kB\nMemAvailable:   4194304 kB\nCommitLimit:  3145728 kB\nCommitted_AS: 1048576 kB\n";

    fn measure(files: &[(&str, &str)]) -> Option<HostMemory> {
        HostMemory::from_files(&|path| {
            files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| (*text).to_owned())
        })
    }

    #[test]
    fn free_memory_is_the_limit_where_nothing_else_is() {
        let memory = measure(&[
            ("/proc/meminfo", MEMINFO),
            ("/proc/sys/vm/overcommit_memory", "0\n"),
            ("/proc/self/cgroup", "0::/user.slice\n"),
            ("/sys/fs/cgroup/user.slice/memory.max", "max\n"),
        ]);
        assert_eq!(memory, Some(HostMemory { available: 4 << 30, limited_by: LimitedBy::FreeMemory }));
        assert_eq!(measure(&[]), None);
    }

    #[test]
    fn strict_overcommit_lowers_it() {
        let memory =
            measure(&[("/proc/meminfo", MEMINFO), ("/proc/sys/vm/overcommit_memory", "2\n")]).unwrap();
        assert_eq!((memory.available, memory.limited_by), (2 << 30, LimitedBy::CommitLimit));
    }

    #[test]
    fn the_tightest_control_group_counts_and_its_cache_does_not() {
        let memory = measure(&[
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "0::/a.slice/b.scope\n"),
            ("/sys/fs/cgroup/a.slice/b.scope/memory.max", "max\n"),
            ("/sys/fs/cgroup/a.slice/memory.max", "1073741824\n"),
            ("/sys/fs/cgroup/a.slice/memory.current", "536870912\n"),
            ("/sys/fs/cgroup/a.slice/memory.stat", "anon 1\ninactive_file 268435456\n"),
        ])
        .unwrap();
        assert_eq!(memory.available, 768 << 20);
        assert_eq!(memory.limited_by, LimitedBy::ControlGroup("/sys/fs/cgroup/a.slice".into()));
    }

    #[test]
    fn version_1_control_groups_count_too() {
        let memory = measure(&[
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/x\n"),
            ("/sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1048576\n"),
            ("/sys/fs/cgroup/memory/x/memory.usage_in_bytes", "1048575\n"),
        ])
        .unwrap();
        assert_eq!(memory.available, 1);
    }

    #[test]
    fn the_ratio_says_how_much_may_be_promised() {
        let memory = HostMemory { available: 1 << 30, limited_by: LimitedBy::FreeMemory };
        assert!(memory.check(1 << 30, 1.0).is_ok());
        assert!(memory.check((1 << 30) + 4096, 1.0).is_err());
        assert!(memory.check(2 << 30, 2.0).is_ok());
        let text = memory.check(2 << 30, 1.5).unwrap_err().to_string();
        assert!(
            text.contains("2048 MiB") && text.contains("1536 MiB") && text.contains("--overcommit 1.5"),
            "{text}"
        );
        let text = memory.check(1 << 40, 1e6).unwrap_err().to_string();
        assert!(text.contains("keep track"), "{text}");
    }
}
