//! The demo guest under QEMU, with the same disk.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use samepage_resources::DEMO_GUEST;
use samepage_resources::demo::plan::{DiskPlan, Plan};
use samepage_resources::demo::report::Report;

use super::super::context::Bench;
use super::super::disk::client::{self, Work};
use super::super::qemu;

/// The address of the registers of the machine's only virtio-mmio device.
const DISK: u64 = 0xfeb0_0e00;
/// Time limit for a guest.
const TIME_LIMIT: Duration = Duration::from_secs(120);
/// Interval of checking for signals.
const SLICE: Duration = Duration::from_millis(50);

/// An installed QEMU, and the guest's image file.
#[derive(Debug)]
pub(super) struct Qemu {
    guest: PathBuf,
}

impl Qemu {
    /// Finds QEMU. The error says what to do.
    pub(super) fn find(folder: &Path) -> Result<Self, String> {
        qemu::version().map_err(|reason| format!("QEMU is left out: {reason}"))?;
        let guest = folder.join(format!("samepage-bench-{}-guest.elf", std::process::id()));
        fs::write(&guest, DEMO_GUEST)
            .map_err(|error| format!("QEMU is left out: write {}: {error}", guest.display()))?;
        Ok(Self { guest })
    }

    /// Runs a guest that uses a disk.
    ///
    /// # Errors
    /// Fails if QEMU does not run the guest, if it takes too long, or if the run is interrupted.
    pub(super) fn work(&self, bench: &Bench, image: &Path, plan: &Plan) -> Result<Work> {
        let disk = plan.disk.map(|disk| DiskPlan { base: DISK, ..disk });
        let plan = Plan { disk, ..plan.clone() };
        let drive = format!("if=none,id=disk,format=raw,cache=none,aio=io_uring,file={}", escaped(image));
        let mut command = qemu::command(&self.guest, client::memory(&plan) >> 20, &plan.to_string());
        command
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-drive", &drive, "-device", "virtio-blk-device,drive=disk"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = Process(command.spawn().context("start QEMU")?);
        let output = process.0.stdout.take().context("QEMU has an output")?;
        let (sender, reports) = mpsc::channel();
        let reader = thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Ok(report) = Report::parse(line.trim_end()) {
                    // The receiver is gone when the work is done.
                    let _ = sender.send(report);
                }
            }
        });
        let deadline = Instant::now() + TIME_LIMIT;
        let work = loop {
            bench.check()?;
            match reports.recv_timeout(SLICE) {
                Ok(Report::BlkCorrupt { sector, .. }) => {
                    bail!("the guest in QEMU read sector {sector} wrong")
                }
                Ok(report @ Report::ClientTotal { .. }) => break Work::of(&report),
                Ok(report @ (Report::Error { .. } | Report::Fault { .. })) => {
                    bail!("the guest in QEMU says: {report:?}")
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => bail!("QEMU takes too long"),
                Err(RecvTimeoutError::Disconnected) => bail!("QEMU ended early: {}", process.complaint()),
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            }
        };
        drop(process);
        let _ = reader.join();
        work.context("a total is a report of work")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // A small temporary file may remain.
        let _ = fs::remove_file(&self.guest);
    }
}

/// QEMU's options end at a comma; a double comma stands for one.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A running QEMU. Dropping this value ends it, because the machine has no means by which its guest could.
struct Process(Child);

impl Process {
    /// Returns QEMU's standard error after its end.
    fn complaint(&mut self) -> String {
        let stderr = self.0.stderr.take();
        stderr
            .and_then(|stderr| std::io::read_to_string(stderr).ok())
            .unwrap_or_default()
            .trim_end()
            .to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both calls have no effect after the end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
