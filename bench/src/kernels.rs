//! KSM on the memory of made-up VMs.

use std::time::Duration;

use anyhow::{Context, Result};

use super::context::Bench;
use super::ksm::{Counts, Ksm, Mode, Work};
use super::memory::Memory;

/// Memory that KSM merges. When it goes, KSM forgets it.
#[derive(Debug)]
pub(super) struct Kernels<'a> {
    ksm: &'a Ksm,
    memory: Vec<Memory>,
}

impl<'a> Kernels<'a> {
    /// Sets KSM and gives it the memory, at which it does not work yet. `None` without KSM, or where it
    /// lacks the mode.
    ///
    /// # Errors
    /// Where KSM refuses the settings or the memory.
    pub(super) fn new(bench: &'a Bench, mode: Mode, memory: Vec<Memory>) -> Result<Option<Self>> {
        let Some(ksm) = bench.ksm.as_ref().ok().filter(|ksm| ksm.has(mode)) else { return Ok(None) };
        ksm.set(mode)?;
        // From here on KSM forgets what it was given.
        let kernels = Self { ksm, memory };
        kernels.memory.iter().try_for_each(Memory::mergeable).context("give memory to KSM")?;
        Ok(Some(kernels))
    }

    pub(super) fn memory(&self) -> &[Memory] {
        &self.memory
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

impl Drop for Kernels<'_> {
    fn drop(&mut self) {
        self.memory.clear();
        if let Err(error) = self.ksm.forget() {
            samepage_process::tell::tell(format_args!("what KSM has merged stays so: {error:#}"));
        }
    }
}
