//! Operations on a raw file through io_uring, with one ring per queue.
//!
//! One call gives all collected entries to the kernel. Operations that the kernel can finish immediately,
//! such as reads from its page cache, are complete when that call returns. For the others, the ring's file
//! descriptor becomes readable.

#![expect(unsafe_code, reason = "the kernel is given addresses of memory and keeps them")]

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};

use super::channel::{Action, Channel, ChannelLost, Completion, Operation};
use super::image::Image;
use super::memory::Memory;
use super::raw::{DISCARD_MODE, RawFile, ended_early, fallocated, zero_mode};

/// Entries of a ring. More operations than that need several calls.
const ENTRIES: u32 = 128;

/// An operation that the kernel has, or is about to get.
struct Pending {
    operation: Operation,
    /// Bytes transferred so far. The kernel may transfer only a part.
    done: usize,
    /// The vectors that the entry points to. Their address does not change.
    vectors: Vec<libc::iovec>,
}

// SAFETY: the vectors point to memory that `operation` owns, which may be sent.
unsafe impl Send for Pending {}

/// A ring for one queue.
pub(super) struct UringChannel {
    ring: IoUring,
    image: Arc<dyn Image>,
    /// Operations by the number that the kernel returns.
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// Operations that are not yet in the submission queue.
    waiting: Vec<usize>,
    /// Number of operations that the kernel has.
    submitted: usize,
}

/// Returns an error with the reason if the kernel does not let this process use io_uring.
pub(super) fn probe() -> io::Result<()> {
    IoUring::new(2).map(drop)
}

impl UringChannel {
    /// Returns a ring for `image`, which must be raw.
    pub(super) fn new(image: Arc<dyn Image>) -> io::Result<Self> {
        let ring = IoUring::builder().setup_clamp().build(ENTRIES)?;
        let (pending, free, waiting) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { ring, image, pending, free, waiting, submitted: 0 })
    }

    fn raw(&self) -> &RawFile {
        self.image.raw().expect("a ring is made for raw images alone")
    }

    /// Returns the entry for the remaining part of a pending operation.
    fn entry(&mut self, index: usize) -> squeue::Entry {
        let fd = types::Fd(self.raw().file().as_raw_fd());
        let pending = self.pending[index].as_mut().expect("a waiting operation is pending");
        let Pending { operation, done, vectors } = pending;
        let offset = operation.offset + *done as u64;
        let entry = match &operation.action {
            Action::Read(_, memory) => {
                assert!(!matches!(memory, Memory::Guest(_)), "guest memory is only written from");
                *vectors = memory.vectors(*done);
                opcode::Readv::new(fd, vectors.as_ptr(), vectors.len() as u32).offset(offset).build()
            }
            Action::Write(memory) => {
                *vectors = memory.vectors(*done);
                opcode::Writev::new(fd, vectors.as_ptr(), vectors.len() as u32).offset(offset).build()
            }
            Action::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Action::Discard(len) => {
                opcode::Fallocate::new(fd, *len).offset(offset).mode(DISCARD_MODE).build()
            }
            Action::Zero { len, unmap } => {
                opcode::Fallocate::new(fd, *len).offset(offset).mode(zero_mode(*unmap)).build()
            }
        };
        entry.user_data(index as u64)
    }

    /// Gives waiting operations to the kernel. With `wait`, also waits until one completes.
    fn enter(&mut self, wait: bool) -> Result<(), ChannelLost> {
        loop {
            while let Some(&index) = self.waiting.last() {
                let entry = self.entry(index);
                // SAFETY: the entry's vectors lie in `pending[index]` and point to memory that the operation
                // there owns. Both stay until the kernel has returned the number: only then does `reap`
                // remove them, and `drop` waits for it.
                if unsafe { self.ring.submission().push(&entry) }.is_err() {
                    break;
                }
                self.waiting.pop();
                self.submitted += 1;
            }
            let idle = self.ring.submission().is_empty();
            if idle && !wait {
                return Ok(());
            }
            match self.ring.submit_and_wait(usize::from(wait && self.submitted > 0)) {
                Ok(_) if self.waiting.is_empty() => return Ok(()),
                // The queue has room again.
                Ok(_) if !wait => {}
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The kernel accepts more only after completions were taken.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {
                    if self.ring.completion().is_empty() && error.raw_os_error() == Some(libc::EAGAIN) {
                        return Err(ChannelLost(format!("submit to io_uring: {error}")));
                    }
                    return Ok(());
                }
                Err(error) => return Err(ChannelLost(format!("submit to io_uring: {error}"))),
            }
        }
    }
}

impl Channel for UringChannel {
    fn submit(&mut self, operation: Operation) {
        let pending = Some(Pending { operation, done: 0, vectors: Vec::new() });
        let index = match self.free.pop() {
            Some(index) => {
                self.pending[index] = pending;
                index
            }
            None => {
                self.pending.push(pending);
                self.pending.len() - 1
            }
        };
        self.waiting.push(index);
    }

    fn kick(&mut self) -> Result<(), ChannelLost> {
        self.enter(false)
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) -> Result<(), ChannelLost> {
        loop {
            let Some(entry) = self.ring.completion().next() else { break };
            let index = entry.user_data() as usize;
            self.submitted -= 1;
            let pending =
                self.pending[index].as_mut().expect("the kernel returns only numbers that it was given");
            let result = match progress(pending, entry.result()) {
                Some(result) => result,
                None => {
                    self.waiting.push(index);
                    continue;
                }
            };
            let Some(Pending { operation, .. }) = self.pending[index].take() else { continue };
            self.free.push(index);
            let result =
                if matches!(operation.action, Action::Flush) { self.raw().flushed(result) } else { result };
            completions.push(Completion { operation, result, is_lost: false });
        }
        if self.waiting.is_empty() { Ok(()) } else { self.enter(false) }
    }

    fn in_flight(&self) -> usize {
        self.submitted + self.waiting.len()
    }

    fn wait(&mut self) -> Result<(), ChannelLost> {
        if self.in_flight() == 0 { Ok(()) } else { self.enter(true) }
    }

    fn event(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// Applies the kernel's answer. Returns `None` if the operation must continue.
fn progress(pending: &mut Pending, answer: i32) -> Option<io::Result<()>> {
    let write = matches!(pending.operation.action, Action::Write(_));
    match &pending.operation.action {
        _ if answer == -libc::EINTR => None,
        Action::Discard(_) | Action::Zero { .. } if answer < 0 => {
            Some(fallocated(Err(io::Error::from_raw_os_error(-answer))))
        }
        _ if answer < 0 => Some(Err(io::Error::from_raw_os_error(-answer))),
        Action::Read(_, memory) | Action::Write(memory) => {
            pending.done += answer as usize;
            if pending.done >= memory.len() {
                Some(Ok(()))
            } else if answer == 0 {
                Some(Err(ended_early(write)))
            } else {
                None
            }
        }
        _ => Some(Ok(())),
    }
}

impl Drop for UringChannel {
    fn drop(&mut self) {
        // Operations that the kernel does not have yet are simply dropped.
        self.waiting.clear();
        while self.submitted > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
                Err(_) => {
                    // The kernel may still write to this memory, so it must never be used again.
                    std::mem::forget(std::mem::take(&mut self.pending));
                    return;
                }
            }
            self.submitted -= self.ring.completion().count();
        }
    }
}
