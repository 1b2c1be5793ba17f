//! The figures of a demo.

use std::fmt;
use std::time::Duration;

use samepage_sharing::PAGE_SIZE;
use serde::Serialize;

use super::Progress;
use super::display::mebibytes;
use samepage_host::statistics::Sample;
use samepage_machine::vm::VmEnd;

/// The result of a demo.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Summary {
    /// Number of VMs.
    pub vms: usize,
    /// Sum of their memory, in bytes.
    pub guest_bytes: u64,
    /// Memory of the process with all guests' memory filled and nothing shared, in bytes.
    pub resident_before_bytes: u64,
    /// The same with everything shared, each frame counted once.
    pub resident_after_bytes: u64,
    /// Frames in use by two or more guest pages.
    pub pages_shared: u64,
    /// Further guest pages mapped to them.
    pub pages_sharing: u64,
    /// Guest pages of zeros whose memory is freed.
    pub zero_pages: u64,
    /// Memory that sharing saved, in bytes, without the overhead of metadata and mappings.
    pub saved_bytes: u64,
    /// Lower limit for the saved memory, in bytes: the pages that the guests fill with identical content or zeros.
    /// Their programs and their boot leave more identical pages, so more is saved in the end.
    pub can_save_at_least_bytes: u64,
    /// Memory of the engine's metadata, in bytes.
    pub metadata_bytes: u64,
    /// From the start of sharing until everything was shared, in seconds.
    pub merged_in_seconds: f64,
    /// CPU time of the sharing thread until then, in seconds.
    pub merged_cpu_seconds: f64,
    /// CPU time of the sharing thread in all, in seconds.
    pub cpu_seconds: f64,
    /// Mappings of pages to frames; a page that came back to a frame counts again.
    pub merges: u64,
    /// Pages that guests verified word by word.
    pub pages_verified: u64,
    /// Pages that guests rewrote meanwhile.
    pub pages_written: u64,
    /// Verifications of all memory by the guest that did the fewest.
    pub rounds: u64,
    /// Pages with other content than their guest had written.
    pub corrupt: u64,
    /// VMs in which one vCPU worked alone, because the guest could not start all others.
    pub alone: Vec<String>,
    /// VMs that did not end with a reset by their guest, or lacked a last verification.
    pub unfinished: Vec<String>,
}

impl Summary {
    pub(super) fn new(
        progress: &[Progress],
        ends: &[VmEnd],
        last: &Sample,
        resident_before_bytes: u64,
        can_save_at_least_bytes: u64,
        merged: (Duration, f64),
    ) -> Self {
        let engine = &last.engine;
        let unfinished = last
            .vms
            .iter()
            .zip(progress)
            .zip(ends)
            .filter(|((_, progress), end)| progress.done.is_none() || **end != VmEnd::Reset)
            .map(|((vm, _), end)| format!("{}: {end}", vm.name))
            .collect();
        let alone = last.vms.iter().zip(progress).filter_map(|(vm, progress)| {
            let vcpus = progress.alone_of?;
            Some(format!("{}: one vCPU worked alone, because not all {vcpus} vCPUs started", vm.name))
        });
        Self {
            alone: alone.collect(),
            vms: progress.len(),
            guest_bytes: last.guest_bytes,
            resident_before_bytes,
            resident_after_bytes: last.resident_bytes,
            pages_shared: engine.pages_shared,
            pages_sharing: engine.pages_sharing,
            zero_pages: engine.zero_pages,
            saved_bytes: (engine.pages_sharing + engine.zero_pages) * PAGE_SIZE as u64,
            can_save_at_least_bytes,
            metadata_bytes: engine.metadata_bytes,
            merged_in_seconds: merged.0.as_secs_f64(),
            merged_cpu_seconds: merged.1,
            cpu_seconds: engine.cpu_seconds,
            merges: engine.merges,
            pages_verified: progress.iter().map(|vm| vm.verified).sum(),
            pages_written: progress.iter().map(|vm| vm.writes).sum(),
            rounds: progress.iter().map(|vm| vm.rounds).min().unwrap_or(0),
            corrupt: progress.iter().map(|vm| vm.corrupt.max(vm.done.unwrap_or(0))).sum(),
            unfinished,
        }
    }

    /// Returns whether every guest verified its memory and sharing saved at least the lower limit.
    #[must_use]
    pub(super) fn passed(&self) -> bool {
        self.corrupt == 0 && self.unfinished.is_empty() && self.saved_bytes >= self.can_save_at_least_bytes
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scale = self.guest_bytes.max(1);
        let mut bar = |name: &str, bytes: u64| {
            let cells = (bytes * 38).div_ceil(scale) as usize;
            writeln!(f, "  {name:24} {:>10}  {}", mebibytes(bytes), "█".repeat(cells))
        };
        bar("guest memory", self.guest_bytes)?;
        bar("resident before sharing", self.resident_before_bytes)?;
        bar("resident with sharing", self.resident_after_bytes)?;
        bar("saved", self.saved_bytes)?;
        let least = mebibytes(self.can_save_at_least_bytes);
        writeln!(f, "  {:24} {least:>10}  was filled with identical pages or zeros", "  of this at least")?;
        writeln!(
            f,
            "\n  {} frames are shared by {} pages; {} pages of zeros were freed.",
            self.pages_shared,
            self.pages_shared + self.pages_sharing,
            self.zero_pages
        )?;
        writeln!(
            f,
            "  Found and merged in {:.2} s with {:.3} s of CPU time; metadata takes {}.",
            self.merged_in_seconds,
            self.merged_cpu_seconds,
            mebibytes(self.metadata_bytes)
        )?;
        writeln!(
            f,
            "  Guests verified {} pages word by word in {} rounds each and\n  rewrote {} pages: {} corrupt.",
            self.pages_verified, self.rounds, self.pages_written, self.corrupt
        )?;
        for vm in self.alone.iter().chain(&self.unfinished) {
            writeln!(f, "  {vm}")?;
        }
        if self.saved_bytes < self.can_save_at_least_bytes {
            writeln!(f, "  Less was saved than is possible.")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saving_more_than_the_lower_limit_passes() {
        let sample = samepage_host::statistics::Sampler::new().unwrap().sample(None, []).unwrap();
        let mut summary = Summary::new(&[], &[], &sample, 386 << 20, 192 << 20, (Duration::ZERO, 0.0));
        (summary.guest_bytes, summary.saved_bytes) = (512 << 20, 193 << 20);
        let text = summary.to_string();
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        assert!(lines[3].starts_with("saved  ") && lines[3].contains("193.0 MiB"), "{text}");
        assert!(lines[4].starts_with("of this at least  ") && lines[4].contains("192.0 MiB"), "{text}");
        assert!(summary.passed() && !text.contains("Less was saved"), "{text}");
        summary.saved_bytes = 191 << 20;
        assert!(!summary.passed() && summary.to_string().contains("Less was saved"));
    }
}
