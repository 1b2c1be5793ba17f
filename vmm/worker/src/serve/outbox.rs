//! What a worker tells: replies and events at once, and output of consoles as fast as the other process takes it.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};

use crate::messages::{Told, VmNumber};
use crate::wire::Sender;

/// Bytes of output that are kept for a process that takes them slowly. Older ones are dropped.
const KEPT: usize = 64 << 10;
/// Stack of the thread that sends output, in bytes.
const STACK_BYTES: usize = 64 << 10;

/// The way out.
pub(super) struct Outbox {
    sender: Mutex<Sender>,
    output: Mutex<HashMap<VmNumber, VecDeque<u8>>>,
    more: Condvar,
}

impl Outbox {
    pub(super) fn start(sender: Sender) -> io::Result<Arc<Self>> {
        let outbox =
            Arc::new(Self { sender: Mutex::new(sender), output: Mutex::default(), more: Condvar::new() });
        let sending = Arc::clone(&outbox);
        thread::Builder::new()
            .name("consoles".into())
            .stack_size(STACK_BYTES)
            .spawn(move || sending.send_consoles())?;
        Ok(outbox)
    }

    /// Sends a message. If the other process is gone, the thread that receives requests notices.
    pub(super) fn send(&self, told: &Told) {
        self.send_with(told, None);
    }

    /// The same, with a descriptor.
    pub(super) fn send_with(&self, told: &Told, with: Option<BorrowedFd<'_>>) {
        let _ = self.sender.lock().send(told, with);
    }

    /// Sends what a console has written so far, and then a message.
    pub(super) fn send_after_console(&self, vm: VmNumber, told: &Told) {
        let mut sender = self.sender.lock();
        self.send_console(&mut sender, vm);
        let _ = sender.send(told, None);
    }

    /// Drops what is left of a console.
    pub(super) fn close(&self, vm: VmNumber) {
        self.output.lock().remove(&vm);
    }

    /// Whoever sends has the connection first, so that pieces stay in order.
    fn send_console(&self, sender: &mut Sender, vm: VmNumber) {
        let Some(bytes) = self.output.lock().get_mut(&vm).map(std::mem::take) else { return };
        if !bytes.is_empty() {
            let text = bytes.into_iter().map(char::from).collect();
            let _ = sender.send(&Told::Console { vm, text }, None);
        }
    }

    fn send_consoles(&self) {
        loop {
            let vms: Vec<_> = {
                let mut output = self.output.lock();
                loop {
                    let full = output.iter().filter(|(_, bytes)| !bytes.is_empty());
                    let vms: Vec<_> = full.map(|(vm, _)| *vm).collect();
                    if !vms.is_empty() {
                        break vms;
                    }
                    self.more.wait(&mut output);
                }
            };
            for vm in vms {
                self.send_console(&mut self.sender.lock(), vm);
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
        outbox.output.lock().insert(vm, VecDeque::new());
        Self { outbox: Arc::clone(outbox), vm }
    }
}

impl Write for ConsoleCopy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(kept) = self.outbox.output.lock().get_mut(&self.vm) {
            let new = &bytes[bytes.len().saturating_sub(KEPT)..];
            let overflow = (kept.len() + new.len()).saturating_sub(KEPT);
            kept.drain(..overflow);
            kept.extend(new);
        }
        self.outbox.more.notify_one();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
