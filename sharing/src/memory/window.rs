//! The time in which pages are protected, compared and remapped, and what is done where the kernel refuses a
//! part of it: the guest is never left without its pages while these can be had, and nothing that other
//! threads have mapped is replaced.

use std::io;

use crate::memory::calls::{MemoryCalls, Over};
use crate::memory::guest::Source;
use crate::memory::ram::RamRange;

/// Protects pages. Returns how many of the first are.
pub(crate) fn protect(pages: RamRange<'_>, calls: &dyn MemoryCalls) -> io::Result<u32> {
    calls.protect(pages).or_else(|_| {
        // A part that was remapped and could not be registered again.
        calls.register(pages)?;
        calls.protect(pages)
    })
}

/// What has become of pages.
pub(crate) enum Outcome {
    /// They are as they were.
    Nothing,
    /// Their private copies were dropped.
    Discarded,
    /// They are mapped anew.
    Mapped,
}

/// Why pages have no new mapping.
pub(crate) enum MapError {
    /// They are as they were.
    Refused(io::Error),
    /// They are gone.
    Lost(io::Error),
}

/// The time in which a run is protected. No lock that a writer to guest memory can hold, no
/// allocation and no output belong in it. It ends on every way out.
pub(crate) struct Window<'a> {
    calls: &'a dyn MemoryCalls,
    pages: RamRange<'a>,
    /// How many of the first pages have a new mapping, which is not protected.
    remapped: u32,
    open: bool,
}

impl<'a> Window<'a> {
    /// A window on pages that are about to be protected.
    pub(crate) fn new(calls: &'a dyn MemoryCalls, pages: RamRange<'a>) -> Self {
        Self { calls, pages, remapped: 0, open: true }
    }

    /// Moves the copy that was staged over the pages.
    pub(crate) fn restore(&mut self, pages: RamRange<'_>) -> Result<(), MapError> {
        if let Err(error) = self.calls.restore(pages, Over::Pages) {
            // As in `map`: the copy is still there.
            if self.calls.restore(pages, Over::Hole).is_err() {
                return self.still_there(pages, error);
            }
        }
        self.remapped = pages.count();
        Ok(())
    }

    /// Pages that still can be unprotected are the guest's own, as they were.
    fn still_there<T>(&mut self, pages: RamRange<'_>, error: io::Error) -> Result<T, MapError> {
        match self.calls.unprotect(pages) {
            Ok(()) => Err(MapError::Refused(error)),
            Err(_) => {
                self.remapped = pages.count();
                Err(MapError::Lost(error))
            }
        }
    }

    /// Maps pages anew.
    pub(crate) fn map(&mut self, part: RamRange<'_>, source: Source) -> Result<Outcome, MapError> {
        // Untouched memory comes from the shadow, so that the kernel makes one mapping of it and of the anonymous
        // memory around. Memory that is mapped anew is as good, and only stays a mapping of its own: where the
        // kernel commits itself to all memory that can be written it may refuse as much again as a guest has.
        let fresh = source == Source::Zeros && self.calls.clean(part).is_ok();
        let mapped = if fresh {
            self.calls.restore(part, Over::Pages)
        } else {
            self.calls.map(part, source, Over::Pages)
        };
        let outcome = match mapped {
            Ok(()) => Ok(()),
            // The pages may be gone. Their content is known, so it can be mapped at once; only
            // where nothing else has been placed since.
            Err(error) => match self.calls.map(part, source, Over::Hole) {
                Ok(()) => Ok(()),
                Err(_) => self.still_there(part, error),
            },
        };
        if fresh {
            // Where this fails the shadow stays in parts, and is as good.
            let _ = self.calls.unstage(part);
        }
        outcome?;
        self.remapped = part.count();
        Ok(Outcome::Mapped)
    }

    /// Lifts what is left of the protection and wakes who waits.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        let rest = self.pages.part(self.remapped, self.pages.count() - self.remapped);
        // To lift the protection wakes who waits for it.
        let lifted = if rest.count() > 0 { self.lift(rest) } else { Ok(()) };
        if self.remapped > 0 {
            // Who is missed is woken all the same: see `wakes`.
            let _ = self.calls.wake(self.pages.part(0, self.remapped));
        }
        lifted
    }

    fn lift(&self, pages: RamRange<'_>) -> io::Result<()> {
        if self.calls.unprotect(pages).is_ok() {
            return Ok(());
        }
        // Pages that are not registered stand in the way of the others, and were not protected.
        let lifted =
            (0..pages.count()).try_for_each(|page| match self.calls.unprotect(pages.part(page, 1)) {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                lifted => lifted,
            });
        let _ = self.calls.wake(pages);
        lifted
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        let _ = self.close();
    }
}
