//! The sources of page types: lines of `--stats`, and running processes.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::socket::{Client, ClientError};
use anyhow::Context;
use samepage_api_types::by_type::{ByType, TypeSample, present};
use samepage_api_types::views::VmSummary;
use samepage_api_types::views::pages::VmPagesView;
use samepage_sharing::PAGE_SIZE;
use serde::Deserialize;

use super::super::statistics::each;
use super::{Moment, Run, VmTypes};
use crate::vm_path;

/// The relevant fields of a line of `--stats`.
#[derive(Debug, Deserialize)]
struct Sample {
    time_seconds: f64,
    vms: Vec<VmSample>,
}

#[derive(Debug, Deserialize)]
struct VmSample {
    name: String,
    state: String,
    claimed: Option<Claimed>,
    pages: u64,
    pages_private: u64,
    pages_merged: u64,
    pages_sharing: u64,
    zero_pages: u64,
}

#[derive(Debug, Deserialize)]
struct Claimed {
    publishing: bool,
    given_back: u64,
    #[serde(with = "present")]
    types: ByType<TypeSample>,
}

impl From<VmSample> for VmTypes {
    fn from(vm: VmSample) -> Self {
        let VmSample { name, pages, pages_private, pages_merged, pages_sharing, zero_pages, .. } = vm;
        if let Some(Claimed { publishing, given_back, types }) = vm.claimed {
            let given_back_bytes = given_back.saturating_mul(PAGE_SIZE as u64);
            return Self { name, publishing, given_back_bytes, types };
        }
        let unknown = TypeSample {
            pages,
            pages_private,
            pages_merged,
            pages_sharing,
            zero_pages,
            ..TypeSample::default()
        };
        Self { name, types: ByType { unknown, ..ByType::default() }, ..Self::default() }
    }
}

/// Reads a run from its statistics file.
pub(super) fn read(path: &Path, vm: Option<&str>) -> anyhow::Result<Run> {
    let file = File::open(path).with_context(|| format!("open the statistics {}", path.display()))?;
    parse(BufReader::new(file), vm).with_context(|| format!("read the statistics {}", path.display()))
}

fn parse(lines: impl BufRead, wanted: Option<&str>) -> anyhow::Result<Run> {
    let mut run = Run::default();
    each(lines, |sample: Sample| {
        let vms = sample.vms.into_iter().filter(|vm| vm.state != "ended");
        let vms = vms.filter(|vm| wanted.is_none_or(|wanted| vm.name == wanted));
        run.add(Moment { time: sample.time_seconds, vms: vms.map(VmTypes::from).collect() });
    })?;
    Ok(run)
}

/// Records a run by watching its process for some seconds.
pub(super) fn watch(client: &Client, seconds: u32, vm: Option<&str>) -> anyhow::Result<Run> {
    let mut run = Run::default();
    let begun = Instant::now();
    for second in 0..=seconds {
        // Statistics are polled once a second, because no event reports them.
        let due = begun + Duration::from_secs(second.into());
        thread::sleep(due.saturating_duration_since(Instant::now()));
        run.add(moment(client, vm)?);
    }
    Ok(run)
}

fn moment(client: &Client, wanted: Option<&str>) -> anyhow::Result<Moment> {
    let names = match wanted {
        Some(name) => vec![name.to_owned()],
        None => client.get::<Vec<VmSummary>>("/vms")?.into_iter().map(|vm| vm.name).collect(),
    };
    let mut moment = Moment::default();
    for name in names {
        let view: VmPagesView = match client.get(&(vm_path(&name)? + "/pages")) {
            Ok(view) => view,
            // The VM may have been deleted meanwhile.
            Err(ClientError::Problem(problem)) if problem.status == 404 && wanted.is_none() => continue,
            Err(error) => return Err(error.into()),
        };
        if let (Some(time), Some(types)) = (view.time_seconds, view.types) {
            moment.time = moment.time.max(time);
            let types = types.map(TypeSample::from);
            let VmPagesView { publishing, given_back_bytes, .. } = view;
            moment.vms.push(VmTypes { name, publishing, given_back_bytes, types });
        }
    }
    Ok(moment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_and_without_an_agent_are_read() {
        let vm = |name: &str, more: &str| {
            format!(
                r#"{{"name":"{name}","state":"running","pages":100,"pages_private":50,"pages_merged":20,
                "pages_sharing":10,"zero_pages":5{more}}}"#
            )
            .replace('\n', "")
        };
        let types = r#"{"slab":{"pages":7,"pages_private":1,"pages_merged":2,"pages_sharing":1,"zero_pages":0,
            "merges":9,"broken":3,"merged_seconds":1.5}}"#;
        let claimed = format!(
            r#","claimed":{{"publishing":true,"passes":1,"words":1,"pass_cpu_us":1,"given_back":2,"types":{types}}}"#
        );
        let line = |time: u32| {
            let (with, without) = (vm("a", &claimed.replace('\n', "")), vm("b", ""));
            let ended = vm("c", "").replace("running", "ended");
            format!("{{\"time_seconds\":{time},\"vms\":[{with},{without},{ended}]}}\n")
        };
        let text = line(1) + &line(2);
        let state = parse(text.as_bytes(), None).unwrap().state.unwrap();
        assert_eq!((state.time, state.vms.len(), state.publishing()), (2.0, 2, 1));
        assert_eq!((state.vms[0].types.slab.broken, state.vms[0].given_back_bytes), (3, 8192));
        assert_eq!((state.vms[1].types.unknown.pages, state.vms[1].publishing), (100, false));
        let one = parse(text.as_bytes(), Some("b")).unwrap().state.unwrap();
        assert_eq!(one.vms.len(), 1);
        assert!(parse(&b"{}\n"[..], None).unwrap_err().to_string().starts_with("line 1"));
    }
}
