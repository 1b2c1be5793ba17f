//! A cache of built files that outlives the working copy.
//!
//! The cache is in `$SAMEPAGE_CACHE`, or else in `samepage` below `$XDG_CACHE_HOME` or `~/.cache`. An entry
//! is a folder `KIND-KEY`. The key is a digest of everything that the content depends on. An entry is filled
//! under another name and then renamed, so every entry is complete. A lock for each kind keeps two runs from
//! building the same entry. Only the most recently used entries of a kind are kept.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use twox_hash::XxHash3_64;

/// Number of entries to keep for each kind.
const KEPT: usize = 4;

/// Everything that an entry's content depends on.
#[derive(Clone, Default)]
pub struct Key(Vec<u8>);

impl Key {
    /// Returns a key without dependencies.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a part. The boundaries between parts matter.
    pub fn part(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        self.0.extend((part.len() as u64).to_le_bytes());
        self.0.extend(part);
        self
    }

    /// Adds the content of a file.
    ///
    /// # Errors
    /// Fails if the file cannot be read.
    pub fn file(self, path: &Path) -> Result<Self> {
        let content = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(self.part(content))
    }

    /// Adds the names and contents of all files below a folder.
    ///
    /// # Errors
    /// Fails if a folder or a file cannot be read.
    pub fn folder(mut self, path: &Path) -> Result<Self> {
        let reading = || format!("reading {}", path.display());
        let mut entries: Vec<PathBuf> = fs::read_dir(path)
            .with_context(reading)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<_>>()
            .with_context(reading)?;
        entries.sort();
        for entry in entries {
            self = self.part(entry.file_name().unwrap_or_default().as_encoded_bytes());
            self = if entry.is_dir() { self.folder(&entry)? } else { self.file(&entry)? };
        }
        Ok(self)
    }

    fn digest(&self) -> String {
        format!("{:016x}", XxHash3_64::oneshot(&self.0))
    }
}

/// A cache in a folder.
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Returns the user's cache, without creating anything.
    ///
    /// # Errors
    /// Fails if no environment variable gives a folder for caches.
    pub fn of_user() -> Result<Self> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = variable("SAMEPAGE_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("samepage")))
            .or_else(|| variable("HOME").map(|dir| dir.join(".cache/samepage")));
        match root {
            Some(root) => Ok(Self { root }),
            None => bail!("there is no folder for the cache: set SAMEPAGE_CACHE to one"),
        }
    }

    /// Returns the cache in the folder `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Returns the folder of the cache.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the folder of an entry, if it has been built.
    pub fn find(&self, kind: &str, key: &Key) -> Option<PathBuf> {
        let entry = self.entry(kind, key);
        entry.is_dir().then(|| {
            // The time only affects the order of removal. An entry of another user keeps its time.
            let _ = File::open(&entry).and_then(|dir| dir.set_modified(SystemTime::now()));
            entry
        })
    }

    /// Returns the folder of an entry. If there is none, calls `build` with an empty folder to fill. Other
    /// runs that need an entry of this kind wait meanwhile.
    ///
    /// # Errors
    /// Fails if `build` or an operation on the cache's files fails. No entry exists then.
    pub fn get_or_build(
        &self,
        kind: &str,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        if let Some(entry) = self.find(kind, key) {
            return Ok(entry);
        }
        let in_cache = || format!("using the cache {} (SAMEPAGE_CACHE chooses another)", self.root.display());
        fs::create_dir_all(&self.root).with_context(in_cache)?;
        let lock = File::create(self.root.join(format!("{kind}.lock"))).with_context(in_cache)?;
        lock.lock().with_context(in_cache)?;
        if let Some(entry) = self.find(kind, key) {
            return Ok(entry);
        }
        // Under the lock, a folder with this name can only come from an interrupted run.
        let unfinished = self.root.join(format!("{kind}.unfinished"));
        remove(&unfinished).with_context(in_cache)?;
        fs::create_dir(&unfinished).with_context(in_cache)?;
        let entry = self.entry(kind, key);
        let built = build(&unfinished).and_then(|()| fs::rename(&unfinished, &entry).with_context(in_cache));
        if built.is_err() {
            remove(&unfinished).with_context(in_cache)?;
        }
        built?;
        self.prune(kind).with_context(in_cache)?;
        Ok(entry)
    }

    fn entry(&self, kind: &str, key: &Key) -> PathBuf {
        self.root.join(format!("{kind}-{}", key.digest()))
    }

    /// Removes all entries of `kind` except the most recently used.
    fn prune(&self, kind: &str) -> io::Result<()> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            let name = entry.file_name();
            let digest = name.to_str().and_then(|name| name.strip_prefix(kind)?.strip_prefix('-'));
            if digest.is_some_and(|digest| digest.len() == 16) {
                entries.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        entries.sort_by(|a, b| b.cmp(a));
        entries.iter().skip(KEPT).try_for_each(|(_, path)| remove(path))
    }
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn an_entry_is_built_once() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let cache = Cache::at(dir.path());
        let key = Key::new().part("a");
        assert_eq!(cache.find("thing", &key), None);
        let builds = AtomicUsize::new(0);
        let build = || {
            cache.get_or_build("thing", &key, |dir| {
                builds.fetch_add(1, Ordering::Relaxed);
                Ok(fs::write(dir.join("file"), "content")?)
            })
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(build)).collect();
            for thread in threads {
                let entry = thread.join().expect("no panic")?;
                assert_eq!(fs::read_to_string(entry.join("file"))?, "content");
            }
            anyhow::Ok(())
        })?;
        assert_eq!(builds.into_inner(), 1);
        assert!(cache.find("thing", &key).is_some());
        assert_eq!(cache.find("other", &key), None);
        Ok(())
    }

    #[test]
    fn a_failed_build_leaves_nothing() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let cache = Cache::at(dir.path());
        let key = Key::new().part("a");
        let failed = cache.get_or_build("thing", &key, |dir| {
            fs::write(dir.join("half"), "")?;
            bail!("no luck")
        });
        assert_eq!(failed.expect_err("it failed").to_string(), "no luck");
        assert_eq!(cache.find("thing", &key), None);
        let entry = cache.get_or_build("thing", &key, |_| Ok(()))?;
        assert_eq!(fs::read_dir(entry)?.count(), 0);
        Ok(())
    }

    #[test]
    fn few_entries_are_kept() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let cache = Cache::at(dir.path());
        for number in 0..10u8 {
            cache.get_or_build("thing", &Key::new().part([number]), |_| Ok(()))?;
        }
        assert!(cache.find("thing", &Key::new().part([9])).is_some());
        assert_eq!((0..10u8).filter(|n| cache.find("thing", &Key::new().part([*n])).is_some()).count(), KEPT);
        Ok(())
    }

    #[test]
    fn keys_tell_parts_apart() {
        assert_ne!(Key::new().part("ab").part("c").digest(), Key::new().part("a").part("bc").digest());
        assert_ne!(Key::new().part("").digest(), Key::new().digest());
    }

    #[test]
    fn a_folder_is_its_names_and_contents() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let digest = || Ok::<_, anyhow::Error>(Key::new().folder(dir.path())?.digest());
        fs::create_dir(dir.path().join("sub"))?;
        fs::write(dir.path().join("sub/a"), "1")?;
        let first = digest()?;
        assert_eq!(digest()?, first);
        fs::rename(dir.path().join("sub/a"), dir.path().join("sub/b"))?;
        let renamed = digest()?;
        assert_ne!(renamed, first);
        fs::write(dir.path().join("sub/b"), "2")?;
        assert_ne!(digest()?, renamed);
        Ok(())
    }
}
