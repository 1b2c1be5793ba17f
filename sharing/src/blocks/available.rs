//! How much memory there is to be had: what is free on the host, or within the cgroups that this process is
//! in, whichever is least.
//!
//! A cgroup at its limit has processes killed while the host may have gigabytes to spare. The limits of a
//! cgroup's ancestors hold for it as well. See `Documentation/admin-guide/cgroup-v2.rst` and
//! `cgroup-v1/memory.rst` of the kernel.

use std::fs;
use std::path::{Path, PathBuf};

/// The interfaces of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Where a hierarchy of cgroups that limits memory is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    version: Version,
    /// The cgroup that the folder stands for.
    root: PathBuf,
    folder: PathBuf,
}

/// Memory that is to be had, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// What is to be had.
    pub bytes: u64,
    /// The whole of which this is a part: the host's memory, or the limit of a cgroup.
    pub of: u64,
}

/// Looks at what is free.
#[derive(Debug)]
pub struct Available {
    mounts: Vec<Mount>,
}

impl Default for Available {
    fn default() -> Self {
        Self::new()
    }
}

impl Available {
    /// Finds the hierarchies of cgroups.
    #[must_use]
    pub fn new() -> Self {
        let mounts =
            fs::read_to_string("/proc/self/mountinfo").map_or_else(|_| Vec::new(), |text| mounts(&text));
        Self { mounts }
    }

    /// Memory that could be had without swapping, in bytes; `None` where nobody tells.
    pub(crate) fn bytes(&self) -> Option<u64> {
        self.room().map(|room| room.bytes)
    }

    /// Memory that could be had without swapping; `None` where nobody tells.
    #[must_use]
    pub fn room(&self) -> Option<Room> {
        // A process may be moved to another cgroup while it runs.
        let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let rooms = self
            .mounts
            .iter()
            .filter_map(|mount| room_up_to(&mount.folder, &folder(mount, &cgroups)?, mount.version));
        host_room().into_iter().chain(rooms).min_by_key(|room| room.bytes)
    }
}

/// What is free on the host.
fn host_room() -> Option<Room> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    };
    Some(Room { bytes: field("MemAvailable:")?, of: field("MemTotal:")? })
}

/// The hierarchies in a `mountinfo` (`proc_pid_mountinfo(5)`).
fn mounts(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, folder) = (before.next()?, before.next()?);
        let mut after = after.split(' ');
        let version = match after.next()? {
            "cgroup2" => Version::Two,
            "cgroup" if after.nth(1)?.split(',').any(|option| option == "memory") => Version::One,
            _ => return None,
        };
        Some(Mount { version, root: root.into(), folder: folder.into() })
    };
    text.lines().filter_map(mount).collect()
}

/// The folder of the process's own cgroup, by its `cgroup` (`cgroups(7)`).
fn folder(mount: &Mount, cgroups: &str) -> Option<PathBuf> {
    let path = cgroups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let own = match mount.version {
            Version::One => controllers.split(',').any(|name| name == "memory"),
            Version::Two => number == "0" && controllers.is_empty(),
        };
        own.then_some(path)
    })?;
    // A cgroup that is not shown below the mount is bounded by those that are.
    let below = Path::new(path).strip_prefix(&mount.root).unwrap_or(Path::new(""));
    let ordinary = below.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    Some(if ordinary { mount.folder.join(below) } else { mount.folder.clone() })
}

/// The least room in a cgroup and its ancestors up to the mount; `None` where none has a limit.
fn room_up_to(mount: &Path, folder: &Path, version: Version) -> Option<Room> {
    folder
        .ancestors()
        .take_while(|ancestor| ancestor.starts_with(mount))
        .filter_map(|ancestor| room(ancestor, version))
        .min_by_key(|room| room.bytes)
}

/// What processes in a cgroup may still take, with what the kernel would give up for it. Only pages of files that
/// were not used of late count as that, as in what Kubernetes calls the working set.
fn room(folder: &Path, version: Version) -> Option<Room> {
    let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (limit, usage, idle) = match version {
        Version::One => (number("memory.limit_in_bytes"), "memory.usage_in_bytes", "total_inactive_file "),
        Version::Two => {
            // "max" is no number.
            let limits = [number("memory.max"), number("memory.high")];
            (limits.into_iter().flatten().min(), "memory.current", "inactive_file ")
        }
    };
    let statistics = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let idle = statistics.lines().find_map(|line| line.strip_prefix(idle)?.trim().parse().ok()).unwrap_or(0);
    let of = limit?;
    Some(Room { bytes: of.saturating_sub(number(usage)?).saturating_add(idle), of })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "\
22 1 0:21 / /proc rw - proc proc rw
31 22 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
32 22 0:28 /docker/7 /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 22 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
";

    fn write(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        files.iter().for_each(|(name, text)| fs::write(folder.join(name), text).unwrap());
    }

    #[test]
    fn hierarchies_that_limit_memory_are_found() {
        let found = mounts(MOUNTINFO);
        let mount =
            |version, root: &str, folder: &str| Mount { version, root: root.into(), folder: folder.into() };
        assert_eq!(
            found,
            [
                mount(Version::Two, "/", "/sys/fs/cgroup/unified"),
                mount(Version::One, "/docker/7", "/sys/fs/cgroup/memory"),
            ]
        );
        let own = "4:memory:/docker/7/a\n3:cpu,cpuacct:/x\n0::/user.slice/b\n";
        assert_eq!(folder(&found[0], own).unwrap(), Path::new("/sys/fs/cgroup/unified/user.slice/b"));
        assert_eq!(folder(&found[1], own).unwrap(), Path::new("/sys/fs/cgroup/memory/a"));
        // In a namespace of its own the process sees itself at the root, or outside.
        assert_eq!(folder(&found[1], "4:memory:/").unwrap(), Path::new("/sys/fs/cgroup/memory"));
        assert_eq!(folder(&found[0], "0::/../other").unwrap(), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(folder(&found[1], "0::/a"), None);
    }

    #[test]
    fn the_tightest_ancestor_counts() {
        let directory = tempfile::tempdir().unwrap();
        let mount = directory.path();
        let bytes = |mount, folder, version| room_up_to(mount, folder, version).map(|room| room.bytes);
        let own = mount.join("slice/own");
        write(&own, &[("memory.max", "max\n"), ("memory.high", "max\n"), ("memory.current", "1000\n")]);
        assert_eq!(bytes(mount, &own, Version::Two), None);
        write(&own, &[("memory.max", "9000\n"), ("memory.stat", "anon 5\ninactive_file 300\n")]);
        assert_eq!(bytes(mount, &own, Version::Two), Some(8300));
        write(&own, &[("memory.high", "5000\n")]);
        assert_eq!(bytes(mount, &own, Version::Two), Some(4300));
        write(&mount.join("slice"), &[("memory.max", "10000\n"), ("memory.current", "9900\n")]);
        assert_eq!(bytes(mount, &own, Version::Two), Some(100));
        write(&mount.join("slice"), &[("memory.current", "20000\n")]);
        assert_eq!(bytes(mount, &own, Version::Two), Some(0));

        let older = mount.join("older");
        write(
            &older,
            &[("memory.limit_in_bytes", "9223372036854771712\n"), ("memory.usage_in_bytes", "4096\n")],
        );
        assert!(bytes(mount, &older, Version::One).unwrap() > 1 << 60);
        write(&older, &[("memory.limit_in_bytes", "8192\n"), ("memory.stat", "total_inactive_file 100\n")]);
        assert_eq!(bytes(mount, &older, Version::One), Some(4196));
    }

    #[test]
    fn this_host_tells_what_is_free() {
        let available = Available::new().bytes().unwrap();
        assert!(available > 0 && available <= host_room().unwrap().bytes + (1 << 30), "{available}");
    }
}
