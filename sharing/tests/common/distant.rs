//! Guest memory that another thread has: whatever the engine asks of it goes there as a message, and its answer comes
//! back as one. Messages own what is in them, as those to another process would.
#![expect(unsafe_code, reason = "names the bytes of messages")]

use std::cmp::Ordering;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use samepage_sharing::PAGE_SIZE;
use samepage_sharing::content::{Page, Snapshot};
use samepage_sharing::guest::{Bytes, GuestMemory, Harvest, Like, Neighbours, Remap, Remapped};
use samepage_sharing::pagemap::Entry;

/// What the other thread is to do.
type Message = Box<dyn FnOnce(&dyn GuestMemory) + Send>;

/// Memory of another thread.
#[derive(Debug)]
pub(crate) struct Distant {
    messages: Mutex<Sender<Message>>,
    pages: u32,
    address: usize,
    batch: u32,
    tells_huge: bool,
}

impl Distant {
    /// Gives memory to a thread of its own, which ends with this value.
    pub(crate) fn new(memory: Arc<dyn GuestMemory>) -> Self {
        let (messages, inbox) = channel::<Message>();
        let (pages, address) = (memory.pages(), memory.address());
        let (batch, tells_huge) = (memory.batch(), memory.tells_huge());
        thread::spawn(move || inbox.into_iter().for_each(|message| message(&*memory)));
        Self { messages: Mutex::new(messages), pages, address, batch, tells_huge }
    }

    /// Gives memory to a thread of its own if it is to be distant.
    pub(crate) fn place(memory: Arc<dyn GuestMemory>, is_distant: bool) -> Arc<dyn GuestMemory> {
        if is_distant { Arc::new(Self::new(memory)) } else { memory }
    }

    /// Sends a message, and returns the answer.
    fn ask<T: Send + 'static>(&self, what: impl FnOnce(&dyn GuestMemory) -> T + Send + 'static) -> T {
        let (reply, answer) = channel();
        let message = move |memory: &dyn GuestMemory| reply.send(what(memory)).unwrap();
        self.messages.lock().send(Box::new(message)).unwrap();
        answer.recv().unwrap()
    }
}

/// A copy of pages.
fn copied(bytes: Bytes<'_>) -> Vec<Page> {
    let copy = |index| {
        let mut page = [0; PAGE_SIZE];
        // SAFETY: what is named as bytes is mapped.
        unsafe { samepage_sharing::content::copy(bytes.page(index), &mut page) };
        page
    };
    (0..bytes.pages()).map(copy).collect()
}

/// The bytes of a copy.
fn bytes(pages: &[Page]) -> Bytes<'_> {
    // SAFETY: the pages are borrowed as long as the value lasts.
    unsafe { Bytes::new(pages.as_ptr().cast(), pages.len() as u32) }
}

/// Ranges that were appended to, and whether all were.
type Runs = (Vec<Range<u32>>, io::Result<()>);

fn append(runs: &mut Vec<Range<u32>>, (more, outcome): Runs) -> io::Result<()> {
    for run in more {
        match runs.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => runs.push(run),
        }
    }
    outcome
}

impl GuestMemory for Distant {
    fn pages(&self) -> u32 {
        self.pages
    }

    fn address(&self) -> usize {
        self.address
    }

    fn is_far(&self) -> bool {
        true
    }

    fn lost(&self) -> bool {
        self.ask(|memory| memory.lost())
    }

    fn leave(&self) {
        self.ask(|memory| memory.leave());
    }

    fn private(&self, pages: Range<u32>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        let answer = self.ask(|memory| {
            let mut runs = Vec::new();
            let outcome = memory.private(pages, &mut runs);
            (runs, outcome)
        });
        append(runs, answer)
    }

    fn entries(&self, pages: Range<u32>, entries: &mut [Entry]) -> io::Result<()> {
        let mut answer = vec![Entry::default(); entries.len()];
        let answer = self.ask(move |memory| memory.entries(pages, &mut answer).map(|()| answer));
        answer.map(|answer| entries.copy_from_slice(&answer))
    }

    fn tells_huge(&self) -> bool {
        self.tells_huge
    }

    fn huge(&self, pages: Range<u32>, runs: &mut Vec<Range<u32>>) -> io::Result<()> {
        let answer = self.ask(|memory| {
            let mut runs = Vec::new();
            let outcome = memory.huge(pages, &mut runs);
            (runs, outcome)
        });
        append(runs, answer)
    }

    fn split(&self, first: u32) -> io::Result<bool> {
        self.ask(move |memory| memory.split(first))
    }

    fn batch(&self) -> u32 {
        self.batch
    }

    fn harvest(&self, harvest: &mut Harvest) {
        let mut sent = std::mem::take(harvest);
        *harvest = self.ask(move |memory| {
            memory.harvest(&mut sent);
            sent
        });
    }

    fn read(&self, page: u32) -> Box<Snapshot> {
        self.ask(move |memory| memory.read(page))
    }

    fn order(&self, content: &Page, page: u32) -> Ordering {
        let content = *content;
        self.ask(move |memory| memory.order(&content, page))
    }

    fn zeros(&self, pages: Range<u32>) -> u32 {
        self.ask(|memory| memory.zeros(pages))
    }

    fn matching(&self, neighbours: Neighbours<'_>) -> u32 {
        let Neighbours { pages, like, is_ahead, distance } = neighbours;
        match like {
            Like::Frames(frame) => self.ask(move |memory| {
                memory.matching(Neighbours { pages, like: Like::Frames(frame), is_ahead, distance })
            }),
            Like::Pages(others) => {
                let others = copied(others);
                self.ask(move |memory| {
                    let like = Like::Pages(bytes(&others));
                    memory.matching(Neighbours { pages, like, is_ahead, distance })
                })
            }
        }
    }

    fn contents(&self, pages: Range<u32>, take: &mut dyn FnMut(Bytes<'_>)) {
        let contents = self.ask(|memory| {
            let mut contents = Vec::new();
            memory.contents(pages, &mut |bytes| contents = copied(bytes));
            contents
        });
        take(bytes(&contents));
    }

    fn remap(&self, remap: Remap) -> Remapped {
        self.ask(move |memory| memory.remap(remap))
    }

    fn restore(&self, pages: Range<u32>) -> Remapped {
        self.ask(|memory| memory.restore(pages))
    }

    fn empty(&self, pages: Range<u32>, mapped: bool) -> io::Result<()> {
        self.ask(move |memory| memory.empty(pages, mapped))
    }

    fn longest_window(&self) -> Duration {
        self.ask(|memory| memory.longest_window())
    }
}
