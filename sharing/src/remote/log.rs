//! What notes the writes to a VM that a worker has.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use crate::changes::{ChangeLog, PageSet};
use crate::remote::buffer::{Buffer, WORDS};
use crate::remote::messages::{Answer, Question, VmIndex};
use crate::remote::worker::Worker;

/// The log of one VM, in a worker.
#[derive(Debug)]
pub(crate) struct RemoteLog {
    worker: Arc<Worker>,
    vm: VmIndex,
    pages: u32,
}

impl RemoteLog {
    pub(crate) fn new(worker: Arc<Worker>, vm: VmIndex, pages: u32) -> Self {
        Self { worker, vm, pages }
    }

    fn done(&self, question: Question, put: impl FnOnce(&Buffer)) -> io::Result<()> {
        let done = self.worker.ask(self.vm, question, put, |_, answer| match answer {
            Answer::Done => Some(Ok(())),
            Answer::Failed(error) => Some(Err(io::Error::from_raw_os_error(error))),
            _ => None,
        });
        done.map_or_else(|| Err(io::ErrorKind::NotConnected.into()), |(done, _)| done)
    }

    /// Reads the log.
    fn read(&self, written: &mut PageSet) -> io::Result<()> {
        // Words come in order, so that a worker cannot always have more.
        let mut next = 0;
        loop {
            let answer = self.worker.ask(
                self.vm,
                Question::Collect,
                |_| {},
                |buffer, answer| match answer {
                    Answer::Words { count, more } if count as usize <= WORDS / 2 => {
                        let mut words = buffer.take_words(2 * count as usize);
                        while let (Some(index), Some(word)) = (words.next(), words.next()) {
                            let index = usize::try_from(index).ok()?;
                            let mask = self.mask(index);
                            if index < next || mask == 0 {
                                return None;
                            }
                            written.insert_words(index, &[word & mask]);
                            next = index + 1;
                        }
                        (count > 0 || !more).then_some(Ok(more))
                    }
                    Answer::Failed(error) => Some(Err(io::Error::from_raw_os_error(error))),
                    _ => None,
                },
            );
            let (more, _) = answer.ok_or(io::ErrorKind::NotConnected)?;
            if !more? {
                return Ok(());
            }
        }
    }

    /// Bits of a word that stand for pages.
    fn mask(&self, word: usize) -> u64 {
        match (self.pages as usize).saturating_sub(64 * word) {
            0 => 0,
            bits @ 1..64 => (1 << bits) - 1,
            _ => u64::MAX,
        }
    }
}

impl Drop for RemoteLog {
    fn drop(&mut self) {
        self.worker.forget_log(self.vm);
    }
}

impl ChangeLog for RemoteLog {
    fn collect(&mut self, written: &mut PageSet) -> io::Result<()> {
        let ahead = self.worker.collect_with_others(self.vm);
        for &(index, word) in ahead.words() {
            let mask = usize::try_from(index).map_or(0, |index| self.mask(index));
            if mask != 0 {
                written.insert_words(index as usize, &[word & mask]);
            }
        }
        if ahead.is_new {
            return Ok(());
        }
        let read = self.read(written);
        if read.is_err() {
            self.worker.put_back(self.vm, ahead);
        }
        read
    }

    fn arm(&mut self, first_word: usize, words: &[u64]) -> io::Result<()> {
        let mut first = first_word;
        for words in words.chunks(WORDS) {
            let question = Question::Arm { first_word: first as u32, words: words.len() as u32 };
            self.done(question, |buffer| buffer.put_words(0, words.iter().copied()))?;
            first += words.len();
        }
        Ok(())
    }

    fn is_at_rest(&mut self, since: Instant) -> bool {
        self.worker.is_at_rest(self.vm, since)
    }

    fn set_noting(&mut self, noting: bool) -> io::Result<()> {
        self.done(Question::SetNoting(noting), |_| {})
    }
}
