//! Reads a run from its statistics file (`--stats`), which has a line of JSON for each second.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, bail};
use samepage_api_types::views::IoView;
use samepage_sharing::PAGE_SIZE;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::frame::{CacheFrame, EngineFrame, Frame, IoFrame, Line, PairFrame, VmFrame};
use super::{Moments, Run};

/// The size of a cached block in bytes.
const BLOCK_SIZE: u64 = 4096;

/// The fields of a line that the page shows. Fields that older programs did not write are missing in the
/// charts.
#[derive(Debug, Deserialize)]
struct Sample {
    time_seconds: f64,
    sharing: bool,
    guest_bytes: u64,
    resident_bytes: u64,
    private_bytes: u64,
    /// Older programs wrote a negative number if the overhead was larger than the savings.
    saved_bytes: i64,
    #[serde(flatten)]
    engine: EngineFrame,
    #[serde(default)]
    cache: CacheBlocks,
    vms: Vec<VmSample>,
    #[serde(default)]
    pairs: Vec<PairSample>,
}

#[derive(Debug, Deserialize)]
struct VmSample {
    name: String,
    state: String,
    group: Option<String>,
    memory_bytes: u64,
    resident_bytes: u64,
    pages_merged: u64,
    pages_sharing: u64,
    pages_private: u64,
    zero_pages: u64,
    working_set: Option<WorkingSet>,
    cpu_seconds: Option<f64>,
    io: Option<IoView>,
}

#[derive(Debug, Default, Deserialize)]
struct CacheBlocks {
    blocks_cached: u64,
    blocks_limit: u64,
    blocks_in_guests: u64,
    served_from_guests: u64,
    served_from_host: u64,
    fetched: u64,
    past: u64,
}

#[derive(Debug, Deserialize)]
struct WorkingSet {
    wanted_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct PairSample {
    vms: [usize; 2],
    pages: u64,
    error: u64,
}

pub(super) fn read(path: &Path) -> anyhow::Result<Run> {
    let file = File::open(path).with_context(|| format!("open the statistics {}", path.display()))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let moments =
        parse(BufReader::new(file)).with_context(|| format!("read the statistics {}", path.display()))?;
    Ok(moments.finish(format!("samepage: {name}"), path.display().to_string()))
}

fn parse(lines: impl BufRead) -> anyhow::Result<Moments> {
    let mut moments = Moments::default();
    each(lines, |sample: Sample| moments.add(Frame::from(sample)))?;
    Ok(moments)
}

/// Calls a function with each line, parsed as `T`.
pub(super) fn each<T: DeserializeOwned>(
    mut lines: impl BufRead,
    mut take: impl FnMut(T),
) -> anyhow::Result<()> {
    let mut any = false;
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        match serde_json::from_slice::<T>(&line) {
            Ok(sample) => {
                any = true;
                take(sample);
            }
            Err(_) if line.trim_ascii().is_empty() => {}
            // The incomplete end of a file that is being written.
            Err(_) if !line.ends_with(b"\n") => {}
            Err(error) => bail!("line {number} was not written by --stats: {error}"),
        }
    }
    if !any {
        bail!("the file has no line that --stats wrote");
    }
    Ok(())
}

impl From<Sample> for Frame {
    fn from(sample: Sample) -> Self {
        let name = |vm: usize| sample.vms.get(vm).map(|vm| vm.name.clone());
        let pair = |pair: &PairSample| {
            let [one, other] = pair.vms;
            Some(PairFrame { vms: [name(one)?, name(other)?], pages: pair.pages, error: pair.error })
        };
        let pairs = sample.pairs.iter().filter_map(pair).collect();
        let line = Line {
            time: sample.time_seconds,
            enabled: sample.sharing,
            guest: sample.guest_bytes,
            resident: sample.resident_bytes,
            private: sample.private_bytes,
            saved: u64::try_from(sample.saved_bytes).unwrap_or(0),
            engine: sample.engine,
            cache: CacheFrame::from(&sample.cache),
        };
        Self { line, vms: sample.vms.into_iter().map(VmFrame::from).collect(), pairs }
    }
}

impl From<&CacheBlocks> for CacheFrame {
    fn from(cache: &CacheBlocks) -> Self {
        let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_SIZE);
        Self {
            cached: bytes(cache.blocks_cached),
            limit: bytes(cache.blocks_limit),
            in_guests: bytes(cache.blocks_in_guests),
            guests: bytes(cache.served_from_guests),
            host: bytes(cache.served_from_host),
            disk: bytes(cache.fetched.saturating_add(cache.past)),
        }
    }
}

impl From<VmSample> for VmFrame {
    fn from(vm: VmSample) -> Self {
        let bytes = |pages: u64| Some(pages.saturating_mul(PAGE_SIZE as u64));
        Self {
            name: vm.name,
            state: vm.state,
            reason: None,
            group: vm.group,
            memory: vm.memory_bytes,
            resident: Some(vm.resident_bytes),
            saved: bytes(vm.pages_sharing.saturating_add(vm.zero_pages)),
            shared: bytes(vm.pages_merged),
            private: bytes(vm.pages_private),
            zero: bytes(vm.zero_pages),
            wanted: vm.working_set.map(|known| known.wanted_bytes),
            cpu_seconds: vm.cpu_seconds,
            io: vm.io.as_ref().map(IoFrame::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use samepage_host::statistics::Sampler;

    use super::*;

    /// A line as the program writes it.
    fn line() -> String {
        let sample = Sampler::new().unwrap().sample(None, []).unwrap();
        serde_json::to_string(&sample).unwrap() + "\n"
    }

    #[test]
    fn lines_are_read_as_the_program_writes_them() {
        let text = line() + "\n" + &line() + "{\"time_seconds\": 1.0, \"shar";
        let moments = parse(text.as_bytes()).unwrap();
        assert_eq!(moments.lines.seen, 2);
        assert!(moments.state.unwrap().line.resident > 0);
    }

    #[test]
    fn what_is_no_statistics_is_told_with_its_line() {
        let told = |text: &str| parse(text.as_bytes()).unwrap_err().to_string();
        assert!(told(&(line() + "{}\n")).starts_with("line 2 was not written by --stats: missing field"));
        assert!(told("[]\n").starts_with("line 1"));
        assert!(told("").contains("no line"));
        assert!(parse(&b"\xff\xfe\n"[..]).is_err());
    }
}
