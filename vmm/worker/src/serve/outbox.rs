//! What a worker tells: replies and events at once, and output of consoles as fast as the other process takes it.
//!
//! While no process manages the worker, what is told is lost. The end of each console is kept if somebody may come.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use parking_lot::{Condvar, Mutex};

use crate::messages::{Answer, Told, VmNumber};
use crate::wire::Sender;

/// Bytes of output that are kept of each console. Older ones are dropped.
const KEPT: usize = 64 << 10;
/// Stack of the thread that sends output, in bytes.
const STACK_BYTES: usize = 64 << 10;

/// The way out.
pub(super) struct Outbox {
    line: Mutex<Line>,
    output: Mutex<HashMap<VmNumber, Output>>,
    more: Condvar,
    /// Whether output is kept after it was sent.
    keeps: bool,
}

/// The connection to the managing process.
struct Line {
    /// `None` while no process manages the worker.
    sender: Option<Sender>,
    turn: Turn,
}

/// One managing process after another. A request of an earlier one is not answered to a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn(u64);

/// The output of one console. Bytes are counted from the start of the VM.
#[derive(Default)]
struct Output {
    kept: VecDeque<u8>,
    /// Bytes that were written, and bytes that were sent or dropped.
    written: u64,
    sent: u64,
    /// Whether somebody listens.
    is_followed: bool,
}

impl Output {
    fn has_news(&self) -> bool {
        self.is_followed && self.sent < self.written
    }

    /// Bytes before the first one that is kept.
    fn start(&self) -> u64 {
        self.written - self.kept.len() as u64
    }

    fn write(&mut self, bytes: &[u8]) {
        let new = &bytes[bytes.len().saturating_sub(KEPT)..];
        let overflow = (self.kept.len() + new.len()).saturating_sub(KEPT);
        self.kept.drain(..overflow);
        self.kept.extend(new);
        self.written += bytes.len() as u64;
    }

    /// Takes what was not sent yet.
    fn take(&mut self, keeps: bool) -> String {
        let skip = self.sent.saturating_sub(self.start()) as usize;
        let text = self.kept.range(skip..).copied().map(char::from).collect();
        self.sent = self.written;
        if !keeps {
            self.kept = VecDeque::new();
        }
        text
    }
}

impl Line {
    /// Returns whether the message was sent.
    fn send(&mut self, told: &Told, with: Option<BorrowedFd<'_>>) -> bool {
        self.sender.as_mut().is_some_and(|sender| sender.send(told, with).is_ok())
    }
}

impl Outbox {
    /// Starts to send. With `keeps`, the end of each console is kept for who follows later.
    pub(super) fn start(sender: Sender, keeps: bool) -> io::Result<Arc<Self>> {
        let line = Mutex::new(Line { sender: Some(sender), turn: Turn(0) });
        let outbox = Arc::new(Self { line, output: Mutex::default(), more: Condvar::new(), keeps });
        let sending = Arc::clone(&outbox);
        thread::Builder::new()
            .name("consoles".into())
            .stack_size(STACK_BYTES)
            .spawn(move || sending.send_consoles())?;
        Ok(outbox)
    }

    /// Tells nobody anything from now on.
    pub(super) fn detach(&self) {
        let mut line = self.line.lock();
        line.sender = None;
        line.turn.0 += 1;
        self.output.lock().values_mut().for_each(|output| output.is_followed = false);
    }

    /// Tells another process from now on, which [follows](Self::follow) consoles one by one.
    pub(super) fn attach(&self, new: Sender) {
        let mut line = self.line.lock();
        self.output.lock().values_mut().for_each(|output| output.is_followed = false);
        line.sender = Some(new);
    }

    /// Returns whose turn it is.
    pub(super) fn turn(&self) -> Turn {
        self.line.lock().turn
    }

    /// Sends a message. If the other process is gone, the thread that receives requests notices.
    pub(super) fn send(&self, told: &Told) {
        self.line.lock().send(told, None);
    }

    /// Sends a reply, if it is still the turn of who has asked. `is_told` says whether the reply was sent, from before
    /// the other process can have it, and before it is the next one's turn.
    pub(super) fn reply(
        &self,
        turn: Turn,
        number: u64,
        answer: Answer,
        with: Option<BorrowedFd<'_>>,
        is_told: &AtomicBool,
    ) {
        let mut line = self.line.lock();
        if line.turn == turn {
            is_told.store(true, Ordering::Release);
            let is_sent = line.send(&Told::Reply { number, answer }, with);
            is_told.store(is_sent, Ordering::Release);
        }
    }

    /// Sends what a console has written so far, and then a message.
    pub(super) fn send_after_console(&self, vm: VmNumber, told: &Told) {
        let mut line = self.line.lock();
        self.send_console(&mut line, vm);
        line.send(told, None);
    }

    /// Sends what is kept of a console, then the reply, and from then on what it writes.
    pub(super) fn follow(&self, turn: Turn, vm: VmNumber, number: u64) {
        let mut line = self.line.lock();
        if line.turn != turn {
            return;
        }
        let before = self.output.lock().get_mut(&vm).map_or(0, |output| {
            output.is_followed = true;
            output.sent = output.start();
            output.sent
        });
        self.send_console(&mut line, vm);
        line.send(&Told::Reply { number, answer: Answer::Following { before } }, None);
    }

    /// Drops what is left of a console.
    pub(super) fn close(&self, vm: VmNumber) {
        self.output.lock().remove(&vm);
    }

    /// Whoever sends has the connection first, so that pieces stay in order.
    fn send_console(&self, line: &mut Line, vm: VmNumber) {
        let text = match self.output.lock().get_mut(&vm) {
            Some(output) if line.sender.is_none() => {
                output.is_followed = false;
                return;
            }
            Some(output) if output.has_news() => output.take(self.keeps),
            _ => return,
        };
        line.send(&Told::Console { vm, text }, None);
    }

    fn send_consoles(&self) {
        loop {
            let vms: Vec<_> = {
                let mut output = self.output.lock();
                loop {
                    let news = output.iter().filter(|(_, output)| output.has_news());
                    let vms: Vec<_> = news.map(|(vm, _)| *vm).collect();
                    if !vms.is_empty() {
                        break vms;
                    }
                    self.more.wait(&mut output);
                }
            };
            for vm in vms {
                self.send_console(&mut self.line.lock(), vm);
            }
        }
    }
}

/// The copy of a console's output for the other process. It never waits.
pub(super) struct ConsoleCopy {
    outbox: Arc<Outbox>,
    vm: VmNumber,
}

impl ConsoleCopy {
    pub(super) fn new(outbox: &Arc<Outbox>, vm: VmNumber) -> Self {
        outbox.output.lock().insert(vm, Output { is_followed: true, ..Output::default() });
        Self { outbox: Arc::clone(outbox), vm }
    }
}

impl Write for ConsoleCopy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(output) = self.outbox.output.lock().get_mut(&self.vm) {
            output.write(bytes);
        }
        self.outbox.more.notify_one();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{self, Receiver};

    fn line() -> (Sender, Receiver) {
        let (one, other) = wire::pair().unwrap();
        (wire::split(one).unwrap().0, wire::split(other).unwrap().1)
    }

    fn told(receiver: &mut Receiver) -> Told {
        receiver.receive::<Told>().unwrap().0
    }

    /// Receives output until it ends with this text.
    fn console(receiver: &mut Receiver, end: &str) -> String {
        let mut all = String::new();
        while !all.ends_with(end) {
            match told(receiver) {
                Told::Console { text, .. } => all += &text,
                other => panic!("{other:?} after {all:?}"),
            }
        }
        all
    }

    #[test]
    fn who_comes_later_gets_the_end_of_a_console_once_and_what_follows() {
        let vm = VmNumber(0);
        let (sender, mut receiver) = line();
        let outbox = Outbox::start(sender, true).unwrap();
        let mut copy = ConsoleCopy::new(&outbox, vm);
        copy.write_all(b"one ").unwrap();
        assert_eq!(console(&mut receiver, "one "), "one ");
        drop(receiver);
        outbox.detach();
        copy.write_all(b"two ").unwrap();
        let is_told = AtomicBool::new(false);
        outbox.reply(Turn(0), 1, Answer::Done, None, &is_told);
        assert!(!is_told.load(Ordering::Relaxed));
        let (sender, mut receiver) = line();
        outbox.attach(sender);
        // What another one has asked for is not this one's.
        outbox.reply(Turn(0), 1, Answer::Done, None, &is_told);
        assert!(!is_told.load(Ordering::Relaxed));
        // Nobody follows this console yet.
        outbox.send_after_console(vm, &Told::Bell { vm });
        assert!(matches!(told(&mut receiver), Told::Bell { .. }));
        outbox.follow(outbox.turn(), vm, 5);
        copy.write_all(b"three").unwrap();
        assert_eq!(console(&mut receiver, "two "), "one two ");
        assert!(matches!(
            told(&mut receiver),
            Told::Reply { number: 5, answer: Answer::Following { before: 0 } }
        ));
        assert_eq!(console(&mut receiver, "three"), "three");
    }

    #[test]
    fn the_last_of_a_long_console_is_kept_and_what_is_lost_is_counted() {
        let vm = VmNumber(0);
        let (sender, receiver) = line();
        drop(receiver);
        let outbox = Outbox::start(sender, true).unwrap();
        outbox.detach();
        let mut copy = ConsoleCopy::new(&outbox, vm);
        copy.write_all(&[b'x'; KEPT - 1]).unwrap();
        copy.write_all(b"yyz").unwrap();
        let (sender, mut receiver) = line();
        outbox.attach(sender);
        outbox.follow(outbox.turn(), vm, 1);
        let kept = console(&mut receiver, "z");
        assert_eq!((kept.len(), kept.ends_with("xyyz")), (KEPT, true));
        assert!(matches!(told(&mut receiver), Told::Reply { answer: Answer::Following { before: 2 }, .. }));
    }
}
