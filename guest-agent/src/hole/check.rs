//! Whether the flags that are published are those of the kernel.
//!
//! Pages change while they are looked at. So each batch is read from the kernel, published, and read once
//! more at once: what was published is to equal what was read before or what was read after, and where it
//! equals neither, the two are to differ: the page changed meanwhile. A page that seems to contradict that
//! is looked at again, since it may have changed to and fro; one that always does is unexplained.

use std::fmt;

use samepage_hole::HostHeader;

use super::Error;
use super::pages::{BATCH, Flags};
use super::publish::{Target, batch, batches};

/// Page frames looked at between two readings of the kernel's flags: few, so that little time passes.
const CHECKED: usize = 256;
/// How often a page that contradicts is looked at again.
const LOOKS: u32 = 4;

/// What a check found, in page frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// All that are RAM.
    pub pages: u64,
    /// Published as the kernel said before or after.
    pub equal: u64,
    /// Published as neither, and changed between the two.
    pub moved: u64,
    /// Neither, and not changed, whenever they were looked at.
    pub unexplained: u64,
}

impl Checked {
    /// Whether the flags are right: 99.5% are equal, and the rest has changed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.pages > 0 && self.unexplained == 0 && self.equal * 1000 >= self.pages * 995
    }

    /// Share of the pages that are equal, in percent.
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
/// The kernel's flags cannot be read, or the host does not take them.
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

/// Publishes and checks some page frames, those that contradict up to `looks` times.
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
            // That look has counted the page.
            continue;
        } else {
            checked.unexplained += 1;
        }
        checked.pages += 1;
    }
    Ok(())
}
