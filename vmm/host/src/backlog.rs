//! What a guest wrote to its console last, for those who come later and those who read along.
//!
//! The console is a stream of bytes that are counted from 0. The last [`CAPACITY`] of them are kept. A
//! reader holds a position of its own; one that falls behind loses bytes and is told how many, and never
//! holds the guest up.

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
    closed: bool,
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes that are kept no more.
    pub lost: u64,
    /// What follows them.
    pub bytes: Vec<u8>,
    /// Where to go on.
    pub next: u64,
}

impl Backlog {
    /// The end that the VM writes to.
    pub fn sink(self: &Arc<Self>) -> Box<dyn Write + Send> {
        Box::new(Sink(Arc::clone(self)))
    }

    /// The last bytes, `most` at most, and the position behind them.
    pub fn tail(&self, most: usize) -> Piece {
        let kept = self.kept.lock();
        let count = kept.bytes.len().min(most);
        let bytes = kept.bytes.range(kept.bytes.len() - count..).copied().collect();
        Piece { lost: kept.end - count as u64, bytes, next: kept.end }
    }

    /// What there is from a position on, waiting until there is something. `None` once the VM is gone.
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
                if kept.closed {
                    return None;
                }
            }
            more.await;
        }
    }

    /// The VM is gone: readers come to their end.
    pub fn close(&self) {
        self.kept.lock().closed = true;
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
