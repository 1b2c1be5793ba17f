//! KSM on the memory of VMs: synthetic VMs, or guests whose memory samepage does not share.

#![expect(unsafe_code, reason = "asks KSM to merge memory")]

use std::io;
use std::time::Duration;

use anyhow::{Context, Result};
use samepage_sharing::Ram;

use super::context::Bench;
use super::ksm::{Counts, Ksm, Mode, Work};
use super::memory::Memory;
use super::vms::guests::{Guest, finish};

/// Memory, or guests, that KSM merges. When this value is dropped, KSM forgets them.
#[derive(Debug)]
pub(super) struct Kernels<'a, T> {
    ksm: &'a Ksm,
    vms: Vec<T>,
}

/// Memory that KSM can merge.
pub(super) trait Mergeable {
    /// Gives the memory to KSM.
    ///
    /// # Errors
    /// Fails if KSM refuses it.
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
    /// Configures KSM and gives it the memory. KSM does not work yet. Returns `None` without KSM, or if KSM
    /// lacks the mode.
    ///
    /// # Errors
    /// Fails if KSM refuses the settings or the memory.
    pub(super) fn new(bench: &'a Bench, mode: Mode, vms: Vec<T>) -> Result<Option<Self>> {
        let Some(ksm) = bench.ksm.as_ref().ok().filter(|ksm| ksm.has(mode)) else { return Ok(None) };
        ksm.set(mode)?;
        // Dropping this value makes KSM forget the memory.
        let kernels = Self { ksm, vms };
        kernels.vms.iter().try_for_each(Mergeable::give).context("give memory to KSM")?;
        Ok(Some(kernels))
    }
}

impl<T> Kernels<'_, T> {
    /// Returns the VMs in the original order.
    pub(super) fn vms(&self) -> &[T] {
        &self.vms
    }

    /// Changes the mode of KSM. Merged pages stay merged.
    ///
    /// # Errors
    /// Fails if KSM refuses the settings.
    pub(super) fn set(&self, mode: Mode) -> Result<bool> {
        if self.ksm.has(mode) { self.ksm.set(mode).map(|()| true) } else { Ok(false) }
    }

    /// Makes KSM also free pages of zeros.
    ///
    /// # Errors
    /// Fails if KSM refuses the setting.
    pub(super) fn use_zero_pages(&self) -> Result<()> {
        self.ksm.use_zero_pages()
    }

    /// Lets KSM work; see [`Ksm::work`].
    ///
    /// # Errors
    /// Fails like [`Ksm::work`].
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
    /// Lets the guests verify their memory and end.
    ///
    /// # Errors
    /// Fails like [`finish`].
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
    // SAFETY: the advice does not change the contents.
    let result = unsafe { libc::madvise(ram.base().as_ptr().cast(), ram.bytes(), libc::MADV_MERGEABLE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
