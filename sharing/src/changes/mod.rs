//! Which pages of a VM were written: the engine's work follows this, not the size of memory.
//!
//! A page is *armed* when its next write will be noted. Arming costs the guest a fault at that
//! write, so pages that keep changing are armed less and less often ([`rest`]).

pub(crate) mod follower;
pub mod rest;

use std::io;
use std::time::Instant;

pub use crate::collections::sets::{PageSet, pages_of};

/// Notes writes to the pages of one VM, whoever makes them: vCPUs and the host's devices.
///
/// A log may be late and may name pages that were not written. It says where to look; it is proof
/// of nothing.
pub trait ChangeLog: Send {
    /// Adds to `written` every page that was written since it was armed, and every page that is
    /// not armed. They are not armed from then on.
    ///
    /// # Errors
    /// Fails if the kernel refuses. Nothing that was noted is lost then: the next call names it.
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()>;

    /// Arms pages that [`collect`](Self::collect) named, or that were not armed: those of `words`, which stand
    /// for pages from `64 * first_word` on, as [`pages_of`] tells them.
    ///
    /// # Errors
    /// Fails if the kernel refuses; some pages may be armed then.
    fn arm(&mut self, first_word: usize, words: &[u64]) -> io::Result<()>;

    /// Returns whether nobody can have written since the last call of [`collect`](Self::collect) began: no vCPU has
    /// run since. What a device has written meanwhile may stay unsaid until a vCPU runs. An answer that was right at
    /// `since` or later will do. `false` where it is not known.
    fn is_at_rest(&mut self, since: Instant) -> bool {
        let _ = since;
        false
    }

    /// Notes writes from now on, or no longer: while nobody follows the VM its guest is not to pay for
    /// it. A log begins noting, with no page armed, and is asked for nothing while it does not.
    ///
    /// # Errors
    /// Fails if the kernel refuses; nothing has changed then.
    fn set_noting(&mut self, noting: bool) -> io::Result<()> {
        let _ = noting;
        Ok(())
    }
}
