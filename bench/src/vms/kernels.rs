//! KSM on the memory of VMs that keep their memory to themselves.

#![expect(unsafe_code, reason = "asks KSM to merge guests' memory")]

use std::io;
use std::time::Duration;

use anyhow::{Context, Result};
use samepage_sharing::Ram;

use super::guests::{Guest, finish};
use crate::context::Bench;
use crate::ksm::{Counts, Ksm, Mode, Work};

/// Guests whose memory KSM merges. When they go, KSM forgets them.
#[derive(Debug)]
pub(super) struct Kernels<'a> {
    ksm: &'a Ksm,
    guests: Vec<Guest>,
}

impl<'a> Kernels<'a> {
    /// Sets KSM and gives it the memory, at which it does not work yet. `None` without KSM, or where it
    /// lacks the mode.
    ///
    /// # Errors
    /// Where KSM refuses the settings or the memory.
    pub(super) fn new(bench: &'a Bench, mode: Mode, guests: Vec<Guest>) -> Result<Option<Self>> {
        let Some(ksm) = bench.ksm.as_ref().ok().filter(|ksm| ksm.has(mode)) else { return Ok(None) };
        ksm.set(mode)?;
        // From here on KSM forgets what it was given.
        let kernels = Self { ksm, guests };
        let mut rams = kernels.guests.iter().map(|guest| guest.vm.ram());
        rams.try_for_each(|ram| make_mergeable(ram)).context("give guests' memory to KSM")?;
        Ok(Some(kernels))
    }

    pub(super) fn guests(&self) -> &[Guest] {
        &self.guests
    }

    /// Sets KSM otherwise; what it has merged stays so.
    ///
    /// # Errors
    /// Where KSM refuses the settings.
    pub(super) fn set(&self, mode: Mode) -> Result<bool> {
        if self.ksm.has(mode) { self.ksm.set(mode).map(|()| true) } else { Ok(false) }
    }

    /// See [`Ksm::work`].
    ///
    /// # Errors
    /// As there.
    pub(super) fn work(
        &self,
        bench: &Bench,
        limit: Duration,
        done: impl FnMut(Counts, Duration) -> bool,
    ) -> Result<Work> {
        self.ksm.work(bench, limit, done)
    }

    /// Has the guests verify their memory and end.
    ///
    /// # Errors
    /// As there: [`finish`].
    pub(super) fn finish(mut self, bench: &Bench) -> Result<()> {
        finish(bench, std::mem::take(&mut self.guests))
    }
}

impl Drop for Kernels<'_> {
    fn drop(&mut self) {
        self.guests.clear();
        if let Err(error) = self.ksm.forget() {
            samepage_process::tell::tell(format_args!("what KSM has merged stays so: {error:#}"));
        }
    }
}

fn make_mergeable(ram: &Ram) -> io::Result<()> {
    // SAFETY: advice; the contents stay what they are.
    let result = unsafe { libc::madvise(ram.base().as_ptr().cast(), ram.bytes(), libc::MADV_MERGEABLE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
