//! The time until a guest's first output, for a VM that a client creates and for one of `samepage run`.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyper::Method;
use samepage_resources::demo::plan::Plan;
use serde::Serialize;
use serde_json::Value;

use super::server::{MEMORY, Server};

/// Time limit for a guest's first output.
const TIME_LIMIT: Duration = Duration::from_secs(30);

/// Times until the first byte on a guest's console: medians in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Starts {
    /// From `POST /vms` with `start`, over the stream of the console.
    pub(super) post_ms: f64,
    /// From the start of the process `samepage run`.
    pub(super) run_ms: f64,
    /// The first time divided by the second.
    pub(super) ratio: f64,
}

/// Starts VMs in both ways, alternately.
pub(super) fn measure(server: &Server, count: u32) -> Result<Starts> {
    let (mut posts, mut runs) = (Vec::new(), Vec::new());
    for _ in 0..count {
        posts.push(post(server)?);
        runs.push(run(server)?);
    }
    let (post_ms, run_ms) = (median_ms(posts), median_ms(runs));
    Ok(Starts { post_ms, run_ms, ratio: post_ms / run_ms })
}

/// A guest that prints something and ends.
fn plan() -> Plan {
    Plan { pages: Some(1), ..Plan::default() }
}

fn post(server: &Server) -> Result<Duration> {
    let vm = server.vm("new", &plan());
    let started = Instant::now();
    server.client().send::<Value>(Method::POST, "/vms", &vm).context("create a VM")?;
    let (mut stream, first) = server.client().attach("new").context("attach to a console")?;
    if first.is_empty() {
        stream.set_read_timeout(Some(TIME_LIMIT)).context("set a timeout")?;
        stream.read_exact(&mut [0]).context("wait for the guest")?;
    }
    let took = started.elapsed();
    server.client().delete("/vms/new").context("delete a VM")?;
    Ok(took)
}

fn run(server: &Server) -> Result<Duration> {
    let mut command = Command::new(crate::program::path()?);
    command.args(["run", "--kernel"]).arg(server.guest());
    command.args(["--memory", &MEMORY.to_string(), "--cmdline", &plan().to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let started = Instant::now();
    let mut process = command.spawn().context("start samepage run")?;
    let said = process.stdout.take().context("its output is a pipe").map(|mut output| {
        let read = output.read_exact(&mut [0]);
        let took = started.elapsed();
        // The process ends by itself.
        let _ = output.read_to_end(&mut Vec::new());
        read.map(|()| took)
    });
    let status = process.wait().context("wait for samepage run")?;
    ensure!(status.success(), "samepage run failed: {status}");
    said?.context("wait for the guest")
}

fn median_ms(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    super::percentile_us(&times, 50) / 1000.0
}
