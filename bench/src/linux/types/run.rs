//! One pair of guests, and what the engine's statistics say of it over time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::super::LinuxGuest;
use crate::monitor::Running;

/// Memory of each guest, in MiB.
pub(super) const GUEST_MIB: u32 = 64;
const VMS: usize = 2;
/// What the guests do once they have booted. They read files that both have; write files of their own as a
/// build does, over and over, and read them; use memory and free it; and come to rest.
const WORK: &str = "mount:/dev/vda:/mnt:ro,sum:/mnt/small,sum:/mnt/file,sum:/mnt/large,sleep:4000,\
                    fill:8M:7,verify:4:500,change:8:8,verify:4:500,\
                    mount:/dev/vdb:/work,write:/work/a:2M:21,sum:/work/a,write:/work/b:2M:22,sleep:1500,\
                    write:/work/a:2M:23,sum:/work/a,sync,write:/work/b:2M:24,sum:/work/b,sleep:1500,\
                    write:/work/a:2M:25,sum:/work/a,sync,release,fill:4M:9,sum:/mnt/large,sleep:1500,\
                    write:/work/b:2M:26,verify:4:500,release,sync,sleep:12000,poweroff";
/// How the agent's lines begin.
const AGENT: &str = "samepage-agent: ";

/// What is measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Scenario {
    /// What it is called.
    pub(crate) name: &'static str,
    /// Whether agents in the guests say what pages are for.
    pub(crate) told: bool,
    /// The engine's settings.
    pub(crate) engine: &'static str,
}

/// What sharing came to by one type of pages, in all guests.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct TypeTold {
    /// Pages of the type.
    pub(crate) pages: u64,
    /// Pages that sharing saves.
    #[serde(rename = "pages_sharing")]
    pub(crate) sharing: u64,
    /// Pages given back.
    #[serde(rename = "zero_pages")]
    pub(crate) zero: u64,
    /// Pages mapped to frames since the start.
    pub(crate) merges: u64,
    /// Of these, written since.
    pub(crate) broken: u64,
    /// How long pages were mapped to frames, in page-seconds.
    pub(crate) merged_seconds: f64,
    /// How long they were watched, in seconds.
    #[serde(default)]
    pub(crate) watched_seconds: f64,
}

/// The engine's statistics at one moment, by their names in `--stats`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Moment {
    /// Since the start of the process, in seconds.
    #[serde(skip_deserializing)]
    pub(crate) seconds: f64,
    /// Pages that sharing saves.
    pub(crate) pages_sharing: u64,
    /// Pages of zeros, and free ones, that were given back.
    pub(crate) zero_pages: u64,
    /// Memory that the process takes, in bytes.
    pub(crate) resident_bytes: u64,
    /// CPU time for sharing, in seconds.
    pub(crate) cpu_seconds: f64,
    /// Pages looked at so far.
    pub(crate) pages_scanned: u64,
    /// Pages mapped to frames so far.
    pub(crate) merges: u64,
    /// Of these, written since.
    pub(crate) breaks: u64,
}

/// What was told of one pair of guests.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Told {
    /// When both guests had booted, in seconds since the start.
    pub(crate) booted_seconds: f64,
    /// Once a second, until a guest had done its work.
    pub(crate) moments: Vec<Moment>,
    /// At the last of them, by type.
    pub(crate) types: BTreeMap<String, TypeTold>,
}

impl Told {
    /// The last statistics.
    pub(super) fn end(&self) -> Moment {
        self.moments.last().copied().unwrap_or_default()
    }

    /// Pages saved, on average over time.
    pub(super) fn mean_sharing(&self) -> f64 {
        let sum: u64 = self.moments.iter().map(|moment| moment.pages_sharing).sum();
        sum as f64 / self.moments.len().max(1) as f64
    }

    /// The last statistics before both guests had booted and read their files.
    pub(super) fn at(&self, seconds: f64) -> Moment {
        let before = self.moments.iter().take_while(|moment| moment.seconds <= seconds + 0.5);
        before.last().copied().unwrap_or_default()
    }
}

/// Runs a pair of guests to its end.
pub(super) fn run(samepage: &Path, guest: &LinuxGuest, scenario: Scenario, cpu: f64) -> Result<Told> {
    let folder = tempfile::tempdir().context("making a folder for the guests' disks")?;
    for index in 0..VMS {
        let copy = folder.path().join(format!("work-{index}.img"));
        fs::copy(&guest.disk, &copy).with_context(|| format!("copying a disk to {}", copy.display()))?;
    }
    let work = if scenario.told { format!("publish:1000,{WORK}") } else { WORK.to_owned() };
    let mut command = Command::new(samepage);
    guest.run(&mut command, VMS, GUEST_MIB, &work, cpu);
    command.arg("--disk").arg(format!("path={},readonly,cache=none", guest.disk.display()));
    command
        .arg("--disk")
        .arg(format!("path={}/work-{{index}}.img,format=raw,cache=none", folder.path().display()));
    command.args(["--sharing-engine", scenario.engine]);
    let started = Instant::now();
    let mut process = Running::start(&mut command)?;
    let mut log = Log::default();
    while let Some(line) = process.next_line()? {
        log.take(&line, started.elapsed().as_secs_f64())?;
    }
    log.into_told()
}

#[derive(Debug, Default)]
struct Log {
    told: Told,
    booted: Vec<f64>,
    done: usize,
}

#[derive(Deserialize)]
struct Sample {
    #[serde(flatten)]
    moment: Moment,
    #[serde(default)]
    vms: Vec<Vm>,
}

#[derive(Deserialize)]
struct Vm {
    claimed: Option<Claimed>,
}

#[derive(Deserialize)]
struct Claimed {
    types: BTreeMap<String, TypeTold>,
}

impl Log {
    fn take(&mut self, line: &str, seconds: f64) -> Result<()> {
        if line.starts_with('{') {
            let sample: Sample =
                serde_json::from_str(line).with_context(|| format!("reading the statistics {line:?}"))?;
            // What a guest that ends gives up is no result.
            if self.done == 0 {
                self.told.moments.push(Moment { seconds, ..sample.moment });
                self.told.types = sum(&sample.vms);
            }
        } else if let Some((_, said)) = line.split_once(AGENT) {
            ensure!(!said.contains(" failed: "), "a guest failed: {line}");
            match said.split(' ').next() {
                Some("ready") => self.booted.push(seconds),
                Some("done") => self.done += 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn into_told(mut self) -> Result<Told> {
        if self.done < VMS {
            bail!("{} of {VMS} guests did all their work; see the messages above", self.done);
        }
        self.told.booted_seconds = self.booted.into_iter().fold(0.0, f64::max);
        Ok(self.told)
    }
}

fn sum(vms: &[Vm]) -> BTreeMap<String, TypeTold> {
    let mut all: BTreeMap<String, TypeTold> = BTreeMap::new();
    for (name, told) in vms.iter().filter_map(|vm| vm.claimed.as_ref()).flat_map(|claimed| &claimed.types) {
        let sum = all.entry(name.clone()).or_default();
        sum.pages += told.pages;
        sum.sharing += told.sharing;
        sum.zero += told.zero;
        sum.merges += told.merges;
        sum.broken += told.broken;
        sum.merged_seconds += told.merged_seconds;
        sum.watched_seconds = sum.watched_seconds.max(told.watched_seconds);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(sharing: u64) -> String {
        let slab = r#"{"pages":10,"private":3,"merged":4,"pages_sharing":2,"zero_pages":0,"merges":5,"broken":1,"merged_seconds":8.5}"#;
        format!(
            r#"{{"time_seconds":1,"pages_sharing":{sharing},"zero_pages":1,"resident_bytes":4096,"cpu_seconds":0.5,
            "pages_scanned":20,"merges":9,"breaks":2,
            "vms":[{{"name":"a","claimed":{{"publishing":true,"types":{{"slab":{slab}}}}}}},
                   {{"name":"b","claimed":{{"publishing":true,"types":{{"slab":{slab}}}}}}},{{"name":"c"}}]}}"#
        )
        .replace('\n', " ")
    }

    #[test]
    fn guests_are_added_up_until_the_first_has_done_its_work() {
        let mut log = Log::default();
        log.take("vm-0: samepage-agent: ready uptime_ms=1", 1.0).unwrap();
        log.take(&line(40), 1.5).unwrap();
        log.take(&line(60), 2.5).unwrap();
        log.take("vm-0: samepage-agent: done ran=9 failed=0", 3.0).unwrap();
        log.take(&line(1), 3.5).unwrap();
        assert!(log.into_told().is_err(), "the other guest has not done its work");
        let mut log = Log::default();
        log.take(&line(40), 1.5).unwrap();
        log.take(&line(60), 2.5).unwrap();
        log.done = 2;
        let told = log.into_told().unwrap();
        assert_eq!((told.moments.len(), told.end().pages_sharing), (2, 60));
        assert_eq!((told.mean_sharing(), told.at(1.6).pages_sharing), (50.0, 40));
        let slab = told.types["slab"];
        assert_eq!((slab.pages, slab.merges, slab.merged_seconds), (20, 10, 17.0));
    }

    #[test]
    fn a_guest_that_fails_fails_the_benchmark() {
        let mut log = Log::default();
        assert!(log.take("vm-0: samepage-agent: mount failed: /dev/vdb: no such device", 1.0).is_err());
    }
}
