//! What this process holds.

use std::fs;

/// Things that a VM must not leave behind.
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
    /// What this process holds now.
    ///
    /// # Panics
    /// Where `/proc` cannot be read.
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
            private_bytes: samepage::statistics::rss_anon().expect("measure memory"),
        }
    }

    /// Asserts that this is no more than `before`, but for some mappings and memory that the
    /// allocator keeps.
    ///
    /// # Panics
    /// Where it is more.
    pub fn assert_no_more_than(&self, before: &Self, slack_bytes: u64) {
        assert_eq!(self.files, before.files, "open files");
        assert_eq!(self.threads, before.threads, "threads");
        assert!(
            self.mappings <= before.mappings + 16,
            "mappings: {} before, {} now",
            before.mappings,
            self.mappings
        );
        assert!(
            self.private_bytes <= before.private_bytes + slack_bytes,
            "private memory: {} bytes before, {} now",
            before.private_bytes,
            self.private_bytes
        );
    }
}
