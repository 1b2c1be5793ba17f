//! Records a run by watching its process for some seconds.

use std::thread;
use std::time::{Duration, Instant};

use crate::socket::{Client, ClientError};
use samepage_api_types::views::{CacheView, PairView, SharingView, VmSummary};

use super::frame::{CacheFrame, EngineFrame, Frame, IoFrame, Line, PairFrame, VmFrame};
use super::{Moments, Run};

/// Upper limit for maps of memory in a report.
const MOST_MAPS: usize = 64;

pub(super) fn watch(client: &Client, seconds: u32) -> anyhow::Result<Run> {
    let socket = client.socket();
    let mut moments = Moments::default();
    let begun = Instant::now();
    for second in 0..=seconds {
        // Statistics are polled once a second, because no event reports them.
        let due = begun + Duration::from_secs(second.into());
        thread::sleep(due.saturating_duration_since(Instant::now()));
        moments.add(frame(client)?);
    }
    let place = format!("{}, watched for {seconds} seconds", socket.display());
    let mut run = moments.finish(format!("samepage: {}", socket.display()), place);
    let vms = run.state.as_ref().map_or(&[][..], |state| &state.vms);
    let cells = if vms.len() > 8 { 512 } else { 2048 };
    for vm in vms.iter().filter(|vm| vm.resident.is_some()).take(MOST_MAPS) {
        // The VM may have ended meanwhile.
        if let Ok(map) = client.get(&format!("/vms/{}/pages/map?cells={cells}", vm.name)) {
            run.maps.insert(vm.name.clone(), map);
        }
    }
    Ok(run)
}

fn frame(client: &Client) -> Result<Frame, ClientError> {
    let sharing: SharingView = client.get("/sharing")?;
    let cache: CacheView = client.get("/cache")?;
    let pairs: Vec<PairView> = client.get("/sharing/pairs?limit=496")?;
    let vms: Vec<VmSummary> = client.get("/vms")?;
    let line = Line {
        time: sharing.time_seconds,
        enabled: sharing.enabled,
        guest: sharing.guest_bytes,
        resident: sharing.resident_bytes,
        private: sharing.private_bytes,
        saved: sharing.saved_bytes,
        engine: EngineFrame::from(&sharing.statistics),
        cache: CacheFrame::from(&cache),
    };
    let pair = |pair: PairView| {
        Some(PairFrame { vms: pair.vms.try_into().ok()?, pages: pair.pages, error: pair.pages_error })
    };
    let pairs = pairs.into_iter().filter_map(pair).collect();
    Ok(Frame { line, vms: vms.into_iter().map(VmFrame::from).collect(), pairs })
}

impl From<VmSummary> for VmFrame {
    fn from(vm: VmSummary) -> Self {
        Self {
            state: vm.state.name().to_owned(),
            name: vm.name,
            reason: vm.reason,
            group: Some(vm.group),
            memory: vm.memory_bytes,
            resident: vm.resident_bytes,
            saved: vm.saved_bytes,
            shared: vm.shared_bytes,
            private: vm.private_bytes,
            zero: vm.zero_bytes,
            wanted: vm.wanted_bytes,
            cpu_seconds: vm.cpu_seconds,
            io: vm.io.as_ref().map(IoFrame::from),
        }
    }
}
