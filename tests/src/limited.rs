//! A control group with a limit of memory, for the programs that a test starts.

use std::fs;
use std::path::{Path, PathBuf};

/// A control group, removed when it is dropped. All of its processes must have ended by then.
#[derive(Debug)]
pub struct Limited {
    folder: PathBuf,
    home: PathBuf,
    is_first_version: bool,
}

impl Limited {
    /// Makes a group below the present one, and moves this process there until [`Limited::leave`]. `None` if this
    /// process may not do that.
    #[must_use]
    pub fn enter(name: &str) -> Option<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let (home, is_first_version) = groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let (root, is_first) = match controllers {
                "memory" => ("/sys/fs/cgroup/memory", true),
                "" => ("/sys/fs/cgroup", false),
                _ => return None,
            };
            let home = Path::new(root).join(path.trim_start_matches('/'));
            home.join(usage_file(is_first)).exists().then_some((home, is_first))
        })?;
        let folder = home.join(format!("samepage-{name}-{}", std::process::id()));
        fs::create_dir(&folder).ok()?;
        let group = Self { folder, home, is_first_version };
        move_to(&group.folder).ok()?;
        Some(group)
    }

    /// Moves this process back. Programs that it started meanwhile stay.
    ///
    /// # Panics
    /// Panics if the kernel refuses.
    pub fn leave(&self) {
        move_to(&self.home).expect("return to the control group");
    }

    /// Returns the memory of the group's programs and of files that they read, in bytes.
    ///
    /// # Panics
    /// Panics if the kernel does not tell.
    #[must_use]
    pub fn usage(&self) -> u64 {
        self.number(usage_file(self.is_first_version))
    }

    /// Limits the memory, in bytes. Swap is not to be had.
    ///
    /// # Panics
    /// Panics if the kernel refuses.
    pub fn limit(&self, bytes: u64) {
        let file = if self.is_first_version { "memory.limit_in_bytes" } else { "memory.max" };
        fs::write(self.folder.join(file), bytes.to_string()).expect("limit the memory of the control group");
        if !self.is_first_version {
            // Without swap there is nothing to limit.
            let _ = fs::write(self.folder.join("memory.swap.max"), "0");
        }
    }

    /// Returns how many processes the kernel has killed there for lack of memory.
    ///
    /// # Panics
    /// Panics if the kernel does not tell.
    #[must_use]
    pub fn kills(&self) -> u64 {
        let file = if self.is_first_version { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(self.folder.join(file)).expect("read how many were killed");
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.and_then(|kills| kills.trim().parse().ok()).expect("a count of kills")
    }

    fn number(&self, file: &str) -> u64 {
        let text = fs::read_to_string(self.folder.join(file)).expect("read a file of the control group");
        text.trim().parse().expect("a number")
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        // An empty group may remain.
        let _ = move_to(&self.home).and_then(|()| fs::remove_dir(&self.folder));
    }
}

fn usage_file(is_first_version: bool) -> &'static str {
    if is_first_version { "memory.usage_in_bytes" } else { "memory.current" }
}

fn move_to(group: &Path) -> std::io::Result<()> {
    fs::write(group.join("cgroup.procs"), std::process::id().to_string())
}
