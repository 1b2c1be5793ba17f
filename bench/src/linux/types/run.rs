//! One pair of guests in one scenario, and its statistics over time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::super::series::{Log, Point, Series};
use super::super::{LinuxGuest, VMS};

/// The guests' work after the boot. They read common files. They write their own files repeatedly, as a build does, and
/// read them. They use memory and free it. In the end they are idle.
const WORK: &str = "mount:/dev/vda:/mnt:ro,sum:/mnt/small,sum:/mnt/file,sum:/mnt/large,sleep:4000,\
                    fill:8M:7,verify:4:500,change:8:8,verify:4:500,\
                    mount:/dev/vdb:/work,write:/work/a:2M:21,sum:/work/a,write:/work/b:2M:22,sleep:1500,\
                    write:/work/a:2M:23,sum:/work/a,sync,write:/work/b:2M:24,sum:/work/b,sleep:1500,\
                    write:/work/a:2M:25,sum:/work/a,sync,release,fill:4M:9,sum:/mnt/large,sleep:1500,\
                    write:/work/b:2M:26,verify:4:500,release,sync,sleep:12000,poweroff";

/// A scenario.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Scenario {
    /// The name in the report.
    pub(crate) name: &'static str,
    /// Whether agents in the guests publish page types.
    #[serde(rename = "told")]
    pub(crate) has_agent: bool,
    /// The argument of `--sharing-engine`.
    pub(crate) engine: &'static str,
}

/// Counters of one page type, summed over all guests.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct TypeCounts {
    /// Pages of the type.
    pub(crate) pages: u64,
    /// Pages that sharing saves.
    #[serde(rename = "pages_sharing")]
    pub(crate) sharing: u64,
    /// Freed pages.
    #[serde(rename = "zero_pages")]
    pub(crate) zero: u64,
    /// Pages mapped to frames since the start.
    pub(crate) merges: u64,
    /// Merged pages that were written since.
    pub(crate) broken: u64,
    /// Total time that pages were mapped to frames, in page-seconds.
    pub(crate) merged_seconds: f64,
    /// Time of observation, in seconds.
    #[serde(default)]
    pub(crate) watched_seconds: f64,
}

/// The statistics of one pair of guests.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Round {
    /// Time at which both guests had booted, in seconds since the start.
    pub(crate) booted_seconds: f64,
    /// Statistics until the first guest had done its work.
    pub(crate) moments: Series,
    /// Counters by page type, at the last moment.
    pub(crate) types: BTreeMap<String, TypeCounts>,
}

/// Runs a pair of guests to its end.
pub(super) fn run(samepage: &Path, guest: &LinuxGuest, scenario: Scenario, cpu: f64) -> Result<Round> {
    let folder = tempfile::tempdir().context("making a folder for the guests' disks")?;
    for index in 0..VMS {
        let copy = folder.path().join(format!("work-{index}.img"));
        fs::copy(&guest.disk, &copy).with_context(|| format!("copying a disk to {}", copy.display()))?;
    }
    let work = if scenario.has_agent { format!("publish:1000,{WORK}") } else { WORK.to_owned() };
    let mut command = Command::new(samepage);
    guest.run(&mut command, &work, cpu);
    command.arg("--disk").arg(format!("path={},readonly,cache=none", guest.disk.display()));
    command
        .arg("--disk")
        .arg(format!("path={}/work-{{index}}.img,format=raw,cache=none", folder.path().display()));
    command.args(["--sharing-engine", scenario.engine]);
    let finished = Log::<Sample>::run(&mut command)?;
    Ok(Round {
        booted_seconds: finished.booted_seconds,
        moments: finished.series,
        types: sum(&finished.last.vms),
    })
}

/// The used fields of a line of `--stats`.
#[derive(Debug, Deserialize)]
struct Sample {
    #[serde(flatten)]
    point: Point,
    #[serde(default)]
    vms: Vec<Vm>,
}

impl AsRef<Point> for Sample {
    fn as_ref(&self) -> &Point {
        &self.point
    }
}

#[derive(Debug, Deserialize)]
struct Vm {
    claimed: Option<Claimed>,
}

#[derive(Debug, Deserialize)]
struct Claimed {
    types: BTreeMap<String, TypeCounts>,
}

fn sum(vms: &[Vm]) -> BTreeMap<String, TypeCounts> {
    let mut all: BTreeMap<String, TypeCounts> = BTreeMap::new();
    for (name, counts) in vms.iter().filter_map(|vm| vm.claimed.as_ref()).flat_map(|claimed| &claimed.types) {
        let sum = all.entry(name.clone()).or_default();
        sum.pages += counts.pages;
        sum.sharing += counts.sharing;
        sum.zero += counts.zero;
        sum.merges += counts.merges;
        sum.broken += counts.broken;
        sum.merged_seconds += counts.merged_seconds;
        sum.watched_seconds = sum.watched_seconds.max(counts.watched_seconds);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_over_the_guests() {
        let slab = r#"{"pages":10,"private":3,"merged":4,"pages_sharing":2,"zero_pages":0,"merges":5,"broken":1,"merged_seconds":8.5}"#;
        let line = format!(
            r#"{{"time_seconds":1,"pages_sharing":40,"zero_pages":1,"resident_bytes":4096,"cpu_seconds":0.5,
            "pages_scanned":20,"merges":9,"merges_lookahead":8,"breaks":2,"search_steps":7,"comparisons":6,
            "vms":[{{"name":"a","claimed":{{"publishing":true,"types":{{"slab":{slab}}}}}}},
                   {{"name":"b","claimed":{{"publishing":true,"types":{{"slab":{slab}}}}}}},{{"name":"c"}}]}}"#
        );
        let sample: Sample = serde_json::from_str(&line).unwrap();
        assert_eq!(sample.as_ref().pages_sharing, 40);
        let slab = sum(&sample.vms)["slab"];
        assert_eq!((slab.pages, slab.merges, slab.merged_seconds), (20, 10, 17.0));
    }
}
