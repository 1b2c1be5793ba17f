//! What the logs of a worker's VMs said when another VM's was read: one question is enough for all that are read at about
//! the same time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::remote::buffer::Buffer;
use crate::remote::messages::{MOST_VMS, VmIndex};

/// For how long what was read is new.
const NEW: Duration = Duration::from_millis(50);

/// What a log said.
#[derive(Debug, Default)]
pub(crate) struct Words {
    /// The numbers of words of 64 pages, and the words.
    pairs: Vec<(u64, u64)>,
    /// There is no need to read the log.
    pub(crate) is_new: bool,
}

impl Words {
    pub(crate) fn words(&self) -> &[(u64, u64)] {
        &self.pairs
    }

    /// Adds what was said before.
    pub(crate) fn add(&mut self, before: Self) {
        self.pairs.extend(before.pairs);
    }
}

/// What is known of the VMs of a worker.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// What was read, and its log's VM has not taken. A log does not say it again.
    read: BTreeMap<VmIndex, (Option<Instant>, Words)>,
    /// VMs whose logs were taken since the worker was last asked.
    taken: Vec<VmIndex>,
    /// VMs that were at rest, and when the worker was asked.
    at_rest: Option<(Instant, BTreeSet<VmIndex>)>,
}

impl Ahead {
    /// Takes what was read of a VM's log.
    pub(crate) fn take(&mut self, vm: VmIndex) -> Words {
        let Some((asked, mut words)) = self.read.remove(&vm) else { return Words::default() };
        words.is_new = asked.is_some_and(|asked| asked.elapsed() < NEW);
        if words.is_new && !self.taken.contains(&vm) {
            self.taken.push(vm);
        }
        words
    }

    /// A VM's log is to be read. Returns the VMs whose logs are read with it: they were read with it the last time.
    pub(crate) fn together_with(&mut self, vm: VmIndex) -> Vec<VmIndex> {
        let mut vms = std::mem::replace(&mut self.taken, vec![vm]);
        vms.retain(|other| *other != vm && !self.read.contains_key(other));
        vms.truncate(MOST_VMS - 1);
        vms.push(vm);
        vms
    }

    /// Notes what some of these VMs' logs said. Returns `None` if the answer makes no sense.
    pub(crate) fn note(
        &mut self,
        asked: Instant,
        vms: &[VmIndex],
        buffer: &Buffer,
        count: usize,
    ) -> Option<()> {
        let mut words = buffer.take_words(count);
        while let Some(head) = words.next() {
            let (vm, pairs) = (VmIndex((head >> 32) as u32), head as u32 as usize);
            if !vms.contains(&vm) {
                return None;
            }
            let mut pairs = Vec::with_capacity(pairs.min(count / 2));
            for _ in 0..head as u32 {
                pairs.push((words.next()?, words.next()?));
            }
            self.read.entry(vm).or_insert_with(|| (Some(asked), Words::default())).1.pairs.extend(pairs);
        }
        Some(())
    }

    /// Keeps what was taken, since the VM's log could not be read.
    pub(crate) fn put_back(&mut self, vm: VmIndex, words: Words) {
        self.read.entry(vm).or_default().1.add(words);
    }

    /// Forgets a VM.
    pub(crate) fn forget(&mut self, vm: VmIndex) {
        self.read.remove(&vm);
        self.taken.retain(|other| *other != vm);
    }

    /// Whether a VM was at rest, if that was asked at a moment or later.
    pub(crate) fn is_at_rest(&self, vm: VmIndex, since: Instant) -> Option<bool> {
        let (_, at_rest) = self.at_rest.as_ref().filter(|(asked, _)| *asked >= since)?;
        Some(at_rest.contains(&vm))
    }

    /// Notes which VMs were at rest.
    pub(crate) fn set_at_rest(&mut self, asked: Instant, vms: BTreeSet<VmIndex>) {
        self.at_rest = Some((asked, vms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ahead: &mut Ahead, vms: &[VmIndex], words: &[u64]) -> Option<()> {
        let (_file, buffer) = Buffer::create().unwrap();
        buffer.put_words(0, words.iter().copied());
        ahead.note(Instant::now(), vms, &buffer, words.len())
    }

    #[test]
    fn vms_that_were_read_one_after_the_other_are_read_together() {
        let (mut ahead, vms) = (Ahead::default(), [7, 8, 9].map(VmIndex));
        for vm in vms {
            assert!(!ahead.take(vm).is_new);
            // Nobody was read with it so far, or one that was is.
            assert!(ahead.together_with(vm).ends_with(&[vm]));
        }
        let together = ahead.together_with(vms[0]);
        assert_eq!(together, [vms[2], vms[0]]);
        answer(&mut ahead, &together, &[9 << 32 | 2, 0, 5, 3, 6, 7 << 32]).unwrap();
        let words = ahead.take(vms[2]);
        assert_eq!((words.words(), words.is_new), (&[(0, 5), (3, 6)][..], true));
        assert!(ahead.take(vms[0]).is_new && !ahead.take(vms[1]).is_new);
        assert_eq!(ahead.together_with(vms[1]), [vms[0], vms[2], vms[1]]);
    }

    #[test]
    fn answers_that_make_no_sense_are_refused() {
        let vms = [VmIndex(1)];
        for words in [&[2 << 32][..], &[1 << 32 | 1, 0], &[1 << 32 | u64::from(u32::MAX), 0, 0]] {
            assert_eq!(answer(&mut Ahead::default(), &vms, words), None, "{words:?}");
        }
    }

    #[test]
    fn what_was_read_is_kept_until_it_is_taken() {
        let (mut ahead, vm) = (Ahead::default(), VmIndex(1));
        answer(&mut ahead, &[vm], &[1 << 32 | 1, 0, 5]).unwrap();
        answer(&mut ahead, &[vm], &[1 << 32 | 1, 2, 6]).unwrap();
        let words = ahead.take(vm);
        assert_eq!(words.words(), [(0, 5), (2, 6)]);
        ahead.put_back(vm, words);
        let words = ahead.take(vm);
        assert_eq!((words.words().len(), words.is_new), (2, false));
        answer(&mut ahead, &[vm], &[1 << 32 | 1, 0, 5]).unwrap();
        ahead.forget(vm);
        assert_eq!(ahead.take(vm).words(), []);
    }
}
