//! The memory of a VM that a worker has.

use std::cmp;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::memory::content::{Page, Snapshot};
use crate::memory::guest::{
    Bytes, GuestMemory, Harvest, Like, Neighbours, Remap, Remapped, Seen, SpaceError, WINDOW_PAGES,
};
use crate::memory::pagemap::Entry;
use crate::memory::ram::PAGE_SIZE;
use crate::remote::buffer::{Buffer, WORDS};
use crate::remote::messages::{Answer, Description, Question, VmIndex};
use crate::remote::worker::Worker;

/// One VM's memory, in a worker.
pub(crate) struct RemoteMemory {
    worker: Arc<Worker>,
    vm: VmIndex,
    description: Description,
    batch: u32,
    /// A part of it was lost, or the VM is about to be removed.
    lost: AtomicBool,
    /// The longest window so far, in nanoseconds.
    longest_window: AtomicU64,
    /// Pages that the engine looks at. It may ask for others of this VM meanwhile.
    contents: Mutex<Vec<Snapshot>>,
}

impl fmt::Debug for RemoteMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteMemory")
            .field("worker", &self.worker)
            .field("vm", &self.vm)
            .finish_non_exhaustive()
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the process that holds the VM has ended")
}

/// Ranges that were put in as words.
fn runs(buffer: &Buffer, count: u32, within: &Range<u32>) -> Option<Vec<Range<u32>>> {
    let mut last = within.start;
    buffer
        .take_words(count as usize)
        .map(|word| {
            let run = (word >> 32) as u32..word as u32;
            let is_sound = run.start >= last && run.start < run.end && run.end <= within.end;
            last = run.end;
            is_sound.then_some(run)
        })
        .collect()
}

impl RemoteMemory {
    pub(crate) fn new(worker: Arc<Worker>, vm: VmIndex, description: Description, batch: u32) -> Self {
        let (lost, longest_window) = (AtomicBool::new(false), AtomicU64::new(0));
        Self { worker, vm, description, batch, lost, longest_window, contents: Mutex::default() }
    }

    /// Asks for something, after `put` has filled the buffer. `None` where there is no answer.
    fn ask_with<T>(
        &self,
        question: Question,
        put: impl FnOnce(&Buffer),
        take: impl FnOnce(&Buffer, Answer) -> Option<T>,
    ) -> Option<T> {
        let (taken, lost) = self.worker.ask(self.vm, question, put, take)?;
        if lost {
            self.lost.store(true, Ordering::Release);
        }
        Some(taken)
    }

    fn ask<T>(&self, question: Question, take: impl FnOnce(&Buffer, Answer) -> Option<T>) -> Option<T> {
        self.ask_with(question, |_| {}, take)
    }

    /// How many of `most`.
    fn number(&self, question: Question, put: impl FnOnce(&Buffer), most: u32) -> u32 {
        let take = |_: &Buffer, answer| match answer {
            Answer::Number(number) if number <= most => Some(number),
            _ => None,
        };
        self.ask_with(question, put, take).unwrap_or(0)
    }

    fn done(&self, question: Question) -> io::Result<()> {
        let done = self.ask(question, |_, answer| match answer {
            Answer::Done => Some(Ok(())),
            Answer::Failed(error) => Some(Err(io::Error::from_raw_os_error(error))),
            _ => None,
        });
        done.unwrap_or_else(|| Err(gone()))
    }

    /// Runs of pages, as often as the buffer is too small for all.
    fn all_runs(
        &self,
        pages: Range<u32>,
        all: &mut Vec<Range<u32>>,
        question: impl Fn(Range<u32>) -> Question,
    ) -> io::Result<()> {
        let mut from = pages.start;
        while from < pages.end {
            let part = from..pages.end;
            let answer = self.ask(question(part.clone()), |buffer, answer| match answer {
                Answer::Runs { count, up_to, error }
                    if count as usize <= WORDS && up_to > part.start && up_to <= part.end =>
                {
                    Some((runs(buffer, count, &part)?, up_to, error))
                }
                _ => None,
            });
            let (runs, up_to, error) = answer.ok_or_else(gone)?;
            for run in runs {
                match all.last_mut() {
                    Some(last) if last.end == run.start => last.end = run.end,
                    _ => all.push(run),
                }
            }
            if let Some(error) = error {
                return Err(io::Error::from_raw_os_error(error));
            }
            from = up_to;
        }
        Ok(())
    }

    fn remapped(&self, question: Question, first: u32, count: u32) -> Remapped {
        let answer = self.ask(question, |_, answer| match answer {
            Answer::Remapped { pages, trouble, longest } if pages <= count => {
                self.longest_window.store(longest, Ordering::Relaxed);
                Some(Remapped { pages, error: trouble.map(SpaceError::from) })
            }
            _ => None,
        });
        answer.unwrap_or_else(|| {
            let error = SpaceError::Lost { doing: "remapping", first, count, error: gone() };
            Remapped { pages: 0, error: Some(error) }
        })
    }
}

impl GuestMemory for RemoteMemory {
    fn pages(&self) -> u32 {
        self.description.pages
    }

    fn address(&self) -> usize {
        self.description.address as usize
    }

    fn process(&self) -> u32 {
        self.worker.process()
    }

    fn is_far(&self) -> bool {
        true
    }

    fn lost(&self) -> bool {
        self.lost.load(Ordering::Acquire) || self.worker.is_out_of_reach()
    }

    fn leave(&self) {
        self.lost.store(true, Ordering::Release);
        let _ = self.done(Question::Leave);
    }

    fn private(&self, pages: Range<u32>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        self.all_runs(pages, runs, Question::Private)
    }

    fn entries(&self, pages: Range<u32>, entries: &mut [Entry]) -> io::Result<()> {
        let mut from = pages.start;
        for entries in entries.chunks_mut(WORDS) {
            let part = from..from + entries.len() as u32;
            from = part.end;
            let answer = self.ask(Question::Entries(part), |buffer, answer| match answer {
                Answer::Done => {
                    for (entry, word) in entries.iter_mut().zip(buffer.take_words(WORDS)) {
                        *entry = Entry::new(word);
                    }
                    Some(Ok(()))
                }
                Answer::Failed(error) => Some(Err(io::Error::from_raw_os_error(error))),
                _ => None,
            });
            answer.unwrap_or_else(|| Err(gone()))?;
        }
        Ok(())
    }

    fn tells_huge(&self) -> bool {
        self.description.tells_huge
    }

    fn huge(&self, pages: Range<u32>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        self.all_runs(pages, runs, Question::Huge)
    }

    fn split(&self, first: u32) -> io::Result<bool> {
        let split = self.ask(Question::Split(first), |_, answer| match answer {
            Answer::Truth(truth) => Some(Ok(truth)),
            Answer::Failed(error) => Some(Err(io::Error::from_raw_os_error(error))),
            _ => None,
        });
        split.unwrap_or_else(|| Err(gone()))
    }

    fn batch(&self) -> u32 {
        self.batch
    }

    fn harvest(&self, harvest: &mut Harvest) {
        let wanted = harvest.wanted().to_vec();
        let filled = self.ask(Question::Harvest(wanted), |buffer, answer| match answer {
            Answer::Seen(seen) if seen.len() == harvest.len() => {
                let mut seen = (0..).zip(seen);
                harvest.fill(|_, _, content| {
                    let Some((index, sight)) = seen.next() else { return Seen::Content };
                    buffer.take(index, content.bytes_mut());
                    sight.into()
                });
                Some(())
            }
            _ => None,
        });
        if filled.is_none() {
            harvest.fill(|_, _, _| Seen::Content);
        }
    }

    fn read(&self, page: u32) -> Box<Snapshot> {
        let mut content = Box::<Snapshot>::default();
        self.ask(Question::Read(page), |buffer, answer| {
            (answer == Answer::Done).then(|| buffer.take(0, content.bytes_mut()))
        });
        content
    }

    fn order(&self, content: &Page, page: u32) -> cmp::Ordering {
        let take = |_: &Buffer, answer| match answer {
            Answer::Order(sign) => Some(sign.cmp(&0)),
            _ => None,
        };
        self.ask_with(Question::Order(page), |buffer| buffer.put(0, content), take)
            .unwrap_or(cmp::Ordering::Less)
    }

    fn zeros(&self, pages: Range<u32>) -> u32 {
        let most = pages.end - pages.start;
        self.number(Question::Zeros(pages), |_| {}, most)
    }

    fn matching(&self, neighbours: Neighbours<'_>) -> u32 {
        let Neighbours { pages, like, is_ahead, distance } = neighbours;
        let most = pages.end - pages.start;
        let frame = match like {
            Like::Frames(frame) => Some(frame.number()),
            Like::Pages(_) => None,
        };
        let question = Question::Matching { pages, frame, is_ahead, distance };
        let put = |buffer: &Buffer| {
            if let Like::Pages(bytes) = like {
                buffer.put_pages(bytes);
            }
        };
        self.number(question, put, most)
    }

    fn contents(&self, pages: Range<u32>, take: &mut dyn FnMut(Bytes<'_>)) {
        let count = pages.end - pages.start;
        let mut contents = self.contents.lock();
        contents.resize_with(count as usize, Snapshot::default);
        // Where the worker is gone these are pages of zeros or older ones, which match nothing under protection.
        self.ask(Question::Contents(pages), |buffer, answer| {
            (answer == Answer::Done).then(|| {
                (0..).zip(contents.iter_mut()).for_each(|(index, content)| {
                    buffer.take(index, content.bytes_mut());
                });
            })
        });
        take(Bytes::of(&contents));
    }

    fn remap(&self, remap: Remap) -> Remapped {
        assert!(remap.count > 0 && remap.count <= WINDOW_PAGES, "{remap:?}");
        self.remapped(Question::Remap(remap.into()), remap.first, remap.count)
    }

    fn restore(&self, pages: Range<u32>) -> Remapped {
        let (first, count) = (pages.start, pages.end - pages.start);
        assert!(count > 0 && count <= WINDOW_PAGES, "{pages:?}");
        self.remapped(Question::Restore(pages), first, count)
    }

    fn empty(&self, pages: Range<u32>, mapped: bool) -> io::Result<()> {
        let emptied = self.done(Question::Empty { pages, mapped });
        // With its process all of its mappings have ended.
        if self.worker.has_ended() { Ok(()) } else { emptied }
    }

    fn longest_window(&self) -> Duration {
        Duration::from_nanos(self.longest_window.load(Ordering::Relaxed))
    }
}

const _: () = assert!(size_of::<Snapshot>() == PAGE_SIZE);
