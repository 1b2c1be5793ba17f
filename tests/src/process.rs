//! The resources of this process.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::console::TIME_LIMIT;

/// Resources that a VM must not leave behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open files.
    pub files: usize,
    /// Threads, by name.
    pub threads: Vec<String>,
    /// Mappings.
    pub mappings: u64,
    /// Private memory, in bytes.
    pub private_bytes: u64,
}

impl Holdings {
    /// Returns the present resources of this process.
    ///
    /// # Panics
    /// Panics if `/proc` cannot be read.
    #[must_use]
    pub fn now() -> Self {
        let mut threads: Vec<_> = fs::read_dir("/proc/self/task")
            .expect("list threads")
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .map(|name| name.trim_end().to_owned())
            .collect();
        threads.sort();
        Self {
            files: fs::read_dir("/proc/self/fd").expect("list files").count(),
            threads,
            mappings: samepage_sharing::budget::mappings_of_process().expect("count mappings"),
            private_bytes: samepage_host::statistics::rss_anon().expect("measure memory"),
        }
    }

    /// Asserts that this process has no more resources than `before`, except some mappings and memory that
    /// the allocator keeps.
    ///
    /// # Panics
    /// Panics if it still has more after minutes. The kernel lists a thread for a moment after it was joined.
    pub fn assert_back_to(before: &Self, slack_bytes: u64) {
        let deadline = Instant::now() + TIME_LIMIT;
        loop {
            let now = Self::now();
            let Some(more) = now.more_than(before, slack_bytes) else { return };
            assert!(Instant::now() < deadline, "{more} left behind: {before:?} before, {now:?} now");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn more_than(&self, before: &Self, slack_bytes: u64) -> Option<&'static str> {
        let mores = [
            (self.files > before.files, "files"),
            (self.threads.len() > before.threads.len(), "threads"),
            (self.mappings > before.mappings + 16, "mappings"),
            (self.private_bytes > before.private_bytes + slack_bytes, "memory"),
        ];
        mores.into_iter().find_map(|(more, what)| more.then_some(what))
    }
}

/// Measures the host's memory that this process uses.
///
/// If a memory cgroup can be created for the process, this is the cgroup's usage. Otherwise it is the host's
/// available memory, which depends on all other processes too.
#[derive(Debug)]
pub enum Meter {
    /// The process's own cgroup, and its original cgroup.
    Cgroup {
        /// Folder of the cgroup.
        own: PathBuf,
        /// The file with the usage in bytes.
        usage: &'static str,
        /// Folder of the cgroup to return to.
        home: PathBuf,
    },
    /// `MemAvailable` of the host.
    Available,
}

impl Meter {
    /// Returns a meter for memory that this process allocates from now on.
    #[must_use]
    pub fn start() -> Self {
        Self::cgroup().unwrap_or(Self::Available)
    }

    fn cgroup() -> Option<Self> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let (home, usage) = groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let (root, usage) = match controllers {
                "memory" => ("/sys/fs/cgroup/memory", "memory.usage_in_bytes"),
                "" => ("/sys/fs/cgroup", "memory.current"),
                _ => return None,
            };
            let home = Path::new(root).join(path.trim_start_matches('/'));
            home.join(usage).exists().then_some((home, usage))
        })?;
        let own = home.join(format!("samepage-tests-{}", std::process::id()));
        fs::create_dir(&own).ok()?;
        let meter = Self::Cgroup { own, usage, home };
        let Self::Cgroup { own, .. } = &meter else { return None };
        let entered = own.join(usage).exists() && enter(own).is_ok();
        entered.then_some(meter)
    }

    /// Returns the used bytes. Only differences are meaningful.
    ///
    /// # Panics
    /// Panics if the kernel does not report the usage.
    #[must_use]
    pub fn used(&self) -> i64 {
        match self {
            Self::Cgroup { own, usage, .. } => {
                let text = fs::read_to_string(own.join(usage)).expect("read the usage of the cgroup");
                text.trim().parse().expect("a number")
            }
            Self::Available => {
                let text = fs::read_to_string("/proc/meminfo").expect("read /proc/meminfo");
                let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
                let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB")).expect("MemAvailable");
                -kibibytes.parse::<i64>().expect("a number") * 1024
            }
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Self::Cgroup { own, home, .. } = self {
            // An empty cgroup may remain.
            let _ = enter(home).and_then(|()| fs::remove_dir(own));
        }
    }
}

fn enter(cgroup: &Path) -> std::io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
}
