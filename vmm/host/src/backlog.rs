//! The end of a console's output, for clients that read it later and for clients that follow it.
//!
//! The console is a stream of bytes, counted from 0. The last [`CAPACITY`] bytes are kept. Each reader has its
//! own position. A slow reader loses bytes and learns how many; the guest never waits for readers.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Bytes of console output kept for each VM.
pub const CAPACITY: usize = 64 << 10;

/// The end of a VM's console output.
#[derive(Debug, Default)]
pub struct Backlog {
    kept: Mutex<Kept>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Kept {
    bytes: VecDeque<u8>,
    /// Bytes written since the VM was made.
    end: u64,
    is_closed: bool,
}

/// A piece of the output.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes before this piece that are no longer kept.
    pub lost: u64,
    /// The output.
    pub bytes: Vec<u8>,
    /// The position after this piece.
    pub next: u64,
}

impl Backlog {
    /// Returns the writer for the VM.
    pub fn sink(self: &Arc<Self>) -> Box<dyn Write + Send> {
        Box::new(Sink(Arc::clone(self)))
    }

    /// Counts bytes that the console wrote before, and that are not kept. To be called before there are readers.
    pub(crate) fn note_lost(&self, bytes: u64) {
        self.kept.lock().end += bytes;
    }

    /// Returns up to `most` of the last bytes.
    pub fn tail(&self, most: usize) -> Piece {
        let kept = self.kept.lock();
        let count = kept.bytes.len().min(most);
        let bytes = kept.bytes.range(kept.bytes.len() - count..).copied().collect();
        Piece { lost: kept.end - count as u64, bytes, next: kept.end }
    }

    /// Waits for output after a position, and returns it. Returns `None` when the VM is deleted.
    pub async fn read(&self, from: u64) -> Option<Piece> {
        loop {
            let more = self.more.notified();
            tokio::pin!(more);
            // From here on nothing is missed.
            more.as_mut().enable();
            {
                let kept = self.kept.lock();
                if kept.end > from {
                    let start = kept.end - kept.bytes.len() as u64;
                    let skip = from.saturating_sub(start) as usize;
                    let bytes = kept.bytes.range(skip..).copied().collect();
                    return Some(Piece { lost: start.saturating_sub(from), bytes, next: kept.end });
                }
                if kept.is_closed {
                    return None;
                }
            }
            more.await;
        }
    }

    /// Ends all readers: the VM is deleted.
    pub fn close(&self) {
        self.kept.lock().is_closed = true;
        self.more.notify_waiters();
    }
}

struct Sink(Arc<Backlog>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.kept.lock();
        kept.end += bytes.len() as u64;
        let new = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let overflow = (kept.bytes.len() + new.len()).saturating_sub(CAPACITY);
        kept.bytes.drain(..overflow);
        kept.bytes.extend(new);
        drop(kept);
        self.0.more.notify_waiters();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn the_end_of_the_output_is_kept_and_losses_are_counted() {
        let backlog = Arc::new(Backlog::default());
        let mut sink = backlog.sink();
        sink.write_all(b"hello").unwrap();
        assert_eq!(backlog.tail(2), Piece { lost: 3, bytes: b"lo".into(), next: 5 });
        assert_eq!(run(backlog.read(1)), Some(Piece { lost: 0, bytes: b"ello".into(), next: 5 }));
        sink.write_all(&vec![b'x'; CAPACITY]).unwrap();
        sink.write_all(b"end").unwrap();
        let piece = run(backlog.read(5)).unwrap();
        assert_eq!((piece.lost, piece.bytes.len(), piece.next), (3, CAPACITY, CAPACITY as u64 + 8));
        assert!(piece.bytes.ends_with(b"xend"));
        sink.write_all(&vec![b'y'; 3 * CAPACITY]).unwrap();
        assert_eq!(backlog.tail(usize::MAX).bytes, vec![b'y'; CAPACITY]);
    }

    #[test]
    fn readers_wait_for_more_and_end_with_the_vm() {
        let backlog = Arc::new(Backlog::default());
        let writer = std::thread::spawn({
            let backlog = Arc::clone(&backlog);
            move || {
                let mut sink = backlog.sink();
                b"abcdef".iter().for_each(|byte| sink.write_all(&[*byte]).unwrap());
                backlog.close();
            }
        });
        let (mut text, mut at) = (Vec::new(), 0);
        while let Some(piece) = run(backlog.read(at)) {
            assert_eq!(piece.lost, 0);
            text.extend(piece.bytes);
            at = piece.next;
        }
        writer.join().unwrap();
        assert_eq!(text, b"abcdef");
    }
}
