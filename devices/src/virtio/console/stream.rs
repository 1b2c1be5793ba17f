//! The stream on the port: writes the guest's messages into the hole, and reads the host's messages from it.

use std::sync::atomic::Ordering;

use samepage_hole::port::{Decoder, HOST_BYTES, Item, host};
use samepage_hole::{BLOCK_PAGES, Hole};

use super::PortHole;

/// The guest's stream is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InvalidStream;

/// A stream, from the opening of the port to its end.
#[derive(Debug, Default)]
pub(super) struct Stream {
    decoder: Decoder,
    /// A block with written words that has not been counted yet.
    uncounted: Option<u32>,
    /// The last message to the guest: request and interval.
    last_sent: Option<(u32, u32)>,
    /// A message to the guest that is being sent.
    message: Option<[u8; HOST_BYTES]>,
    sent: usize,
}

impl Stream {
    /// Applies data from the guest to the hole.
    pub(super) fn take(&mut self, mut bytes: &[u8], port: &dyn PortHole) -> Result<(), InvalidStream> {
        let hole = port.hole();
        let flags = hole.flags();
        loop {
            match self.decoder.next(&mut bytes) {
                Ok(None) => return Ok(()),
                Ok(Some(Item::Flags { frame, word })) => {
                    let place = flags.get(frame as usize).ok_or(InvalidStream)?;
                    let block = frame / BLOCK_PAGES;
                    if self.uncounted != Some(block) {
                        self.count(&hole);
                        self.uncounted = Some(block);
                    }
                    place.store(word, Ordering::Relaxed);
                }
                Ok(Some(Item::Pass(header))) => {
                    // Write words first, then the counters of their blocks, then the header.
                    self.count(&hole);
                    hole.set_guest_header(&header);
                    port.ring();
                }
                Ok(Some(Item::Host { .. })) | Err(_) => return Err(InvalidStream),
            }
        }
    }

    fn count(&mut self, hole: &Hole<'_>) {
        if let Some(block) = self.uncounted.take() {
            hole.count(block);
        }
    }

    /// Returns the bytes to send to the guest, or an empty slice.
    pub(super) fn pending(&mut self, hole: &Hole<'_>) -> &[u8] {
        if self.message.is_none()
            && let Some(header) = hole.host_header()
        {
            let news = (header.requested, header.interval_ms);
            let is_first = self.last_sent.is_none();
            if self.last_sent.replace(news) != Some(news) {
                self.message = Some(host(&header, is_first));
                self.sent = 0;
            }
        }
        self.message.as_ref().map_or(&[], |message| &message[self.sent..])
    }

    /// Records that this many of the pending bytes have been sent.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        if self.sent >= HOST_BYTES {
            self.message = None;
        }
    }
}
