//! A limit for the kernel's page cache: a memory cgroup that the process enters for a while.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

/// The process in its own cgroup, which limits the memory of further reads. Dropping this value returns the
/// process to its original cgroup. Memory from before does not move.
#[derive(Debug)]
pub(super) struct Limited {
    own: PathBuf,
    home: PathBuf,
}

/// Memory that the kernel charges to the cgroup for work in progress, in bytes.
const SLACK: u64 = 1 << 20;

impl Limited {
    /// Enters a new cgroup with this limit in bytes.
    ///
    /// # Errors
    /// Fails if there is no memory cgroup, or if this user may not create one.
    pub(super) fn enter(bytes: u64) -> Result<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup").context("ask for the process's cgroups")?;
        let (home, limit) = groups
            .lines()
            .find_map(place)
            .ok_or_else(|| anyhow!("this host has no cgroups that limit memory"))?;
        let own = home.join(format!("samepage-bench-{}", std::process::id()));
        fs::create_dir(&own).with_context(|| format!("make the cgroup {}", own.display()))?;
        let limited = Self { own, home };
        let file = limited.own.join(limit);
        fs::write(&file, (bytes + SLACK).to_string())
            .with_context(|| format!("limit memory with {}", file.display()))?;
        enter(&limited.own)?;
        Ok(limited)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        // An empty cgroup may remain.
        let _ = enter(&self.home);
        let _ = fs::remove_dir(&self.own);
    }
}

/// Returns the folder for a line of `/proc/self/cgroup`, and the file there that limits memory.
fn place(line: &str) -> Option<(PathBuf, &'static str)> {
    let (_, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    let (root, limit) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max"),
        _ if controllers.split(',').any(|name| name == "memory") => {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
        }
        _ => return None,
    };
    let folder = Path::new(root).join(path.trim_start_matches('/'));
    // The root of the second version's hierarchy has no limit, but its children have one.
    let controlled = folder.join(limit).exists()
        || fs::read_to_string(folder.join("cgroup.subtree_control"))
            .is_ok_and(|text| text.contains("memory"));
    controlled.then_some((folder, limit))
}

fn enter(group: &Path) -> Result<()> {
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
        .with_context(|| format!("enter the cgroup {}", group.display()))
}
