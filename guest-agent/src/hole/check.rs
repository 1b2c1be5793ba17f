//! Compares published flags with the kernel's.
//!
//! Pages change during the comparison. So each batch is read from the kernel, published, and immediately read
//! again. A published word should equal the first or the second reading. If it equals neither, the two
//! readings should differ, because the page has changed meanwhile. A page that contradicts this is checked
//! again, because it may have changed twice. A page that always contradicts it is unexplained.

use std::fmt;

use samepage_hole::HostHeader;

use super::Error;
use super::pages::{BATCH, Flags};
use super::publish::{Target, batch, batches};

/// Number of page frames between two readings of the kernel's flags: few, so that little time passes.
const CHECKED: usize = 256;
/// Number of checks for a page that contradicts.
const LOOKS: u32 = 4;

/// The result of a check, in page frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// All page frames of RAM.
    pub pages: u64,
    /// Published as in the first or the second reading.
    pub equal: u64,
    /// Published as in neither reading, and changed in between.
    pub moved: u64,
    /// Published as in neither reading, and unchanged in each check.
    pub unexplained: u64,
}

impl Checked {
    /// Returns whether the flags are right: 99.5% are equal, and the others have changed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.pages > 0 && self.unexplained == 0 && self.equal * 1000 >= self.pages * 995
    }

    /// Returns the percentage of equal pages.
    #[must_use]
    pub fn percent(&self) -> f64 {
        100.0 * self.equal as f64 / self.pages.max(1) as f64
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pages, equal, moved, unexplained } = self;
        let percent = self.percent();
        write!(f, "pages={pages} equal={equal} percent={percent:.2} moved={moved} unexplained={unexplained}")
    }
}

/// Publishes and checks all of RAM.
///
/// # Errors
/// Fails if the kernel's flags cannot be read, or if the host does not accept them.
pub fn check(
    target: &mut impl Target,
    header: &HostHeader,
    flags: &mut impl Flags,
) -> Result<Checked, Error> {
    let mut checked = Checked::default();
    for (first, count) in batches(target.frames(), header) {
        let mut done = 0;
        while done < count {
            let part = CHECKED.min(count - done);
            look(target, first + done as u32, part, flags, LOOKS, &mut checked)?;
            done += part;
        }
    }
    Ok(checked)
}

/// Publishes and checks some page frames. Checks those that contradict up to `looks` times.
pub(super) fn look(
    target: &mut impl Target,
    first: u32,
    count: usize,
    flags: &mut impl Flags,
    looks: u32,
    checked: &mut Checked,
) -> Result<(), Error> {
    let (mut before, mut after, mut scratch) = ([0; BATCH], [0; BATCH], [0; BATCH]);
    flags.read(first, &mut before[..count])?;
    batch(target, first, flags, &mut scratch[..count])?;
    flags.read(first, &mut after[..count])?;
    for (frame, (&before, &after)) in (first..).zip(before.iter().zip(&after)).take(count) {
        let published = target.published(frame);
        if published == before || published == after {
            checked.equal += 1;
        } else if before != after {
            checked.moved += 1;
        } else if looks > 1 {
            look(target, frame, 1, flags, looks - 1, checked)?;
            // That check has counted the page.
            continue;
        } else {
            checked.unexplained += 1;
        }
        checked.pages += 1;
    }
    Ok(())
}
