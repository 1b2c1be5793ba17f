//! KSM on the memory of VMs, made-up ones or guests that keep their memory to themselves.

#![expect(unsafe_code, reason = "asks KSM to merge memory")]

use std::io;
use std::time::Duration;

use anyhow::{Context, Result};
use samepage_sharing::Ram;

use super::context::Bench;
use super::ksm::{Counts, Ksm, Mode, Work};
use super::memory::Memory;
use super::vms::guests::{Guest, finish};

/// Memory, or guests, that KSM merges. When they go, KSM forgets them.
#[derive(Debug)]
pub(super) struct Kernels<'a, T> {
    ksm: &'a Ksm,
    vms: Vec<T>,
}

/// What has memory for KSM to merge.
pub(super) trait Mergeable {
    /// Gives its memory to KSM.
    ///
    /// # Errors
    /// Where KSM refuses it.
    fn give(&self) -> io::Result<()>;
}

impl Mergeable for Memory {
    fn give(&self) -> io::Result<()> {
        make_mergeable(&self.ram())
    }
}

impl Mergeable for Guest {
    fn give(&self) -> io::Result<()> {
        make_mergeable(self.vm.ram())
    }
}

impl<'a, T: Mergeable> Kernels<'a, T> {
    /// Sets KSM and gives it the memory, at which it does not work yet. `None` without KSM, or where it
    /// lacks the mode.
    ///
    /// # Errors
    /// Where KSM refuses the settings or the memory.
    pub(super) fn new(bench: &'a Bench, mode: Mode, vms: Vec<T>) -> Result<Option<Self>> {
        let Some(ksm) = bench.ksm.as_ref().ok().filter(|ksm| ksm.has(mode)) else { return Ok(None) };
        ksm.set(mode)?;
        // From here on KSM forgets what it was given.
        let kernels = Self { ksm, vms };
        kernels.vms.iter().try_for_each(Mergeable::give).context("give memory to KSM")?;
        Ok(Some(kernels))
    }
}

impl<T> Kernels<'_, T> {
    /// The VMs, in the order in which they were given.
    pub(super) fn vms(&self) -> &[T] {
        &self.vms
    }

    /// Sets KSM otherwise; what it has merged stays so.
    ///
    /// # Errors
    /// Where KSM refuses the settings.
    pub(super) fn set(&self, mode: Mode) -> Result<bool> {
        if self.ksm.has(mode) { self.ksm.set(mode).map(|()| true) } else { Ok(false) }
    }

    /// Lets KSM give pages of zeros back as well.
    ///
    /// # Errors
    /// Where the setting is refused.
    pub(super) fn use_zero_pages(&self) -> Result<()> {
        self.ksm.use_zero_pages()
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
}

impl Kernels<'_, Guest> {
    /// Has the guests verify their memory and end.
    ///
    /// # Errors
    /// As there: [`finish`].
    pub(super) fn finish(mut self, bench: &Bench) -> Result<()> {
        finish(bench, std::mem::take(&mut self.vms))
    }
}

impl<T> Drop for Kernels<'_, T> {
    fn drop(&mut self) {
        self.vms.clear();
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
