//! The kernel's side: KSM's settings in `/sys/kernel/mm/ksm`, its counters, and the CPU time of its thread.
//! See `Documentation/admin-guide/mm/ksm.rst` of the kernel.
//!
//! Settings are saved when KSM is opened, and restored when the value is dropped.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::context::Bench;

const FOLDER: &str = "/sys/kernel/mm/ksm";

/// Settings to save and restore, in the order of writing. An active advisor controls `pages_to_scan`, and
/// changing advisors resets it.
const SETTINGS: [&str; 5] =
    ["smart_scan", "use_zero_pages", "sleep_millisecs", "advisor_target_scan_time", "pages_to_scan"];

/// Pages of a batch if KSM runs without pause: many for each wake-up, but a batch ends within some
/// milliseconds, because stopping waits for its end.
const BATCH: &str = "2000";

/// Interval of reading the counters while KSM works.
const POLL: Duration = Duration::from_millis(2);

/// The reason why KSM cannot be measured.
#[derive(Debug, thiserror::Error)]
pub(super) enum KsmError {
    #[error("this kernel has no KSM (no {FOLDER}): samepage is measured alone; use a kernel with CONFIG_KSM")]
    Missing,
    #[error("KSM's settings cannot be changed ({0}): samepage is measured alone; run as root to compare")]
    Refused(io::Error),
    #[error(
        "KSM's thread, ksmd, is not to be seen in /proc, so its CPU time is not known: samepage is measured \
         alone; run in the host's PID namespace to compare"
    )]
    NoThread,
    #[error(
        "another benchmark has KSM at work: samepage is measured alone; wait for the other's end to compare"
    )]
    Busy,
    #[error("{0} cannot be read ({1}): samepage is measured alone")]
    Read(PathBuf, io::Error),
}

/// The mode of KSM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// No pause between batches.
    Fastest,
    /// The scan-time advisor, with its defaults.
    Advisor,
    /// The kernel's initial settings: 100 pages every 20 ms.
    Defaults,
}

impl Mode {
    pub(super) const ALL: [Self; 3] = [Self::Fastest, Self::Advisor, Self::Defaults];

    /// Returns the name of the mode in results.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fastest => "KSM fastest",
            Self::Advisor => "KSM advisor",
            Self::Defaults => "KSM defaults",
        }
    }
}

/// KSM's counters.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Shared pages of this process, with all mappings of a frame counted.
    pub(super) merged: u64,
    /// Complete passes; in a stretch of work, those since its start.
    pub(super) full_scans: u64,
}

/// The work of KSM in one stretch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    /// CPU time of ksmd.
    pub(super) cpu: Duration,
    /// Duration.
    pub(super) wall: Duration,
    /// Whether the awaited condition became true.
    pub(super) finished: bool,
    /// The counters at the end.
    pub(super) counts: Counts,
}

/// KSM, whose settings are restored when this value is dropped.
#[derive(Debug)]
pub(super) struct Ksm {
    /// Locked while this value exists.
    _lock: File,
    schedstat: PathBuf,
    saved: Vec<(&'static str, String)>,
    advisor: Option<String>,
    run: String,
}

impl Ksm {
    /// Saves the settings and stops KSM.
    ///
    /// # Errors
    /// Fails if there is no KSM, or if it cannot be configured or measured.
    pub(super) fn open() -> Result<Self, KsmError> {
        if !Path::new(FOLDER).join("run").exists() {
            return Err(KsmError::Missing);
        }
        let path = Path::new(FOLDER).join("run");
        let lock = File::open(&path).map_err(|error| KsmError::Read(path, error))?;
        // If files there cannot be locked, the user must avoid two benchmarks at the same time.
        if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(KsmError::Busy);
        }
        let run = read("run")?;
        let saved = SETTINGS
            .iter()
            .filter(|name| exists(name))
            .map(|name| Ok((*name, read(name)?)))
            .collect::<Result<_, _>>()?;
        let advisor = if exists("advisor_mode") { Some(chosen(&read("advisor_mode")?)) } else { None };
        let schedstat = thread().ok_or(KsmError::NoThread)?;
        write("run", "0").map_err(KsmError::Refused)?;
        Ok(Self { _lock: lock, schedstat, saved, advisor, run })
    }

    /// Returns whether KSM was active before. Then it may have merged pages of other processes, which its CPU
    /// time and counters include.
    pub(super) fn was_running(&self) -> bool {
        self.run == "1"
    }

    /// Configures KSM, which does not work yet.
    ///
    /// # Errors
    /// Fails if KSM refuses a setting.
    pub(super) fn set(&self, mode: Mode) -> Result<()> {
        set("advisor_mode", "none")?;
        set("smart_scan", "1")?;
        set("use_zero_pages", "0")?;
        let (pages, sleep) = if mode == Mode::Fastest { (BATCH, "0") } else { ("100", "20") };
        set("pages_to_scan", pages)?;
        set("sleep_millisecs", sleep)?;
        if mode == Mode::Advisor {
            set("advisor_target_scan_time", "200")?;
            set("advisor_mode", "scan-time")?;
        }
        Ok(())
    }

    /// Merges pages of zeros with the kernel's own, until KSM is configured again.
    ///
    /// # Errors
    /// Fails if KSM refuses the setting.
    pub(super) fn use_zero_pages(&self) -> Result<()> {
        set("use_zero_pages", "1")
    }

    /// Returns whether the kernel has the advisor of the mode.
    pub(super) fn has(&self, mode: Mode) -> bool {
        mode != Mode::Advisor || self.advisor.is_some()
    }

    /// Lets KSM work until `done` returns true, or for `limit`, and stops it.
    ///
    /// # Errors
    /// Fails if KSM's files cannot be used, or if the benchmark is interrupted.
    pub(super) fn work(
        &self,
        bench: &Bench,
        limit: Duration,
        mut done: impl FnMut(Counts, Duration) -> bool,
    ) -> Result<Work> {
        let before = self.cpu()?;
        let passes = self.counts()?.full_scans;
        let since = |now: Counts| Counts { full_scans: now.full_scans.saturating_sub(passes), ..now };
        let started = Instant::now();
        write("run", "1").context("start KSM")?;
        let running = Running;
        let (finished, wall) = loop {
            std::thread::sleep(POLL);
            bench.check()?;
            let cpu = self.cpu()?.saturating_sub(before);
            let wall = started.elapsed();
            if done(since(self.counts()?), cpu) {
                break (true, wall);
            }
            if wall > limit {
                break (false, wall);
            }
        };
        drop(running);
        // The scheduler's time for a running thread may lag by a tick. Now it is exact.
        let cpu = self.cpu()?.saturating_sub(before);
        Ok(Work { cpu, wall, finished, counts: since(self.counts()?) })
    }

    /// Makes KSM forget its state, so that the next measurement starts anew. This would also unmerge pages of
    /// other processes, so it has no effect if KSM was active before.
    ///
    /// # Errors
    /// Fails if the kernel refuses, because memory is short.
    pub(super) fn forget(&self) -> Result<()> {
        if !self.was_running() {
            write("run", "2").context("split up KSM's pages")?;
            write("run", "0").context("stop KSM")?;
        }
        Ok(())
    }

    /// Returns the CPU time of ksmd so far.
    ///
    /// # Errors
    /// Fails if `/proc` cannot be read.
    pub(super) fn cpu(&self) -> Result<Duration> {
        let text = fs::read_to_string(&self.schedstat)
            .with_context(|| format!("read {}", self.schedstat.display()))?;
        let nanoseconds = text.split_whitespace().next().and_then(|word| word.parse().ok());
        Ok(Duration::from_nanos(nanoseconds.context("ksmd's CPU time is no number")?))
    }

    /// Returns the counters.
    ///
    /// # Errors
    /// Fails if they cannot be read.
    pub(super) fn counts(&self) -> Result<Counts> {
        Ok(Counts { merged: merged()?, full_scans: number(&read("full_scans")?)? })
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        let mut result = self.forget().map_err(|error| io::Error::other(error.to_string()));
        if self.advisor.is_some() {
            result = result.and(write("advisor_mode", "none"));
        }
        for (name, value) in &self.saved {
            // Write only changed settings, because the kernel refuses some writes of unchanged ones.
            if read(name).is_ok_and(|now| now != *value) {
                result = result.and(write(name, value));
            }
        }
        if let Some(advisor) = self.advisor.as_ref().filter(|advisor| *advisor != "none") {
            result = result.and(write("advisor_mode", advisor));
        }
        result = result.and(write("run", &self.run));
        if let Err(error) = result {
            samepage_process::tell::tell(format_args!(
                "KSM's settings in {FOLDER} could not be put back: {error}"
            ));
        }
    }
}

/// A running KSM. Dropping this value stops it.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        // The kernel refuses this only if it refused the start too.
        let _ = write("run", "0");
    }
}

/// Changes a setting, unless the kernel lacks it.
fn set(name: &str, value: &str) -> Result<()> {
    if exists(name) {
        write(name, value).with_context(|| format!("set KSM's {name} to {value}"))?;
    }
    Ok(())
}

/// Returns the number of this process's shared pages, or that of all processes if the kernel does not report
/// it.
fn merged() -> Result<u64> {
    if let Some(pages) = of_process("ksm_merging_pages") {
        return Ok(pages);
    }
    Ok(number(&read("pages_shared")?)? + number(&read("pages_sharing")?)?)
}

fn of_process(counter: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/ksm_stat").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(counter))?;
    line.trim().parse().ok()
}

/// Returns the file with the CPU time of ksmd.
fn thread() -> Option<PathBuf> {
    let processes = fs::read_dir("/proc").ok()?;
    let folder = processes.flatten().map(|process| process.path()).find(|process| {
        let comm = fs::read_to_string(process.join("comm"));
        // A kernel thread has no command line.
        let kernel = || fs::read(process.join("cmdline")).is_ok_and(|line| line.is_empty());
        comm.is_ok_and(|comm| comm.trim_end() == "ksmd") && kernel()
    })?;
    Some(folder.join("schedstat")).filter(|file| file.exists())
}

fn exists(name: &str) -> bool {
    Path::new(FOLDER).join(name).exists()
}

fn read(name: &str) -> Result<String, KsmError> {
    let path = Path::new(FOLDER).join(name);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim_end().to_owned()),
        Err(error) => Err(KsmError::Read(path, error)),
    }
}

fn write(name: &str, value: &str) -> io::Result<()> {
    fs::write(Path::new(FOLDER).join(name), value)
}

fn number(text: &str) -> Result<u64> {
    text.parse().with_context(|| format!("KSM says {text:?} where a number is due"))
}

/// Returns the choice in brackets.
fn chosen(text: &str) -> String {
    let marked = text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    marked.unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_one_of_several_is_marked() {
        assert_eq!(chosen("[none] scan-time"), "none");
        assert_eq!(chosen("none [scan-time]"), "scan-time");
    }
}
