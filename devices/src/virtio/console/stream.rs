//! The stream on the port: what the guest says goes into the hole, what the host says comes out of it.

use std::sync::atomic::Ordering;

use samepage_hole::port::{Decoder, HOST_BYTES, Item, host};
use samepage_hole::{BLOCK_PAGES, Hole};

use super::PortHole;

/// The guest's stream makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Senseless;

/// From the opening of the port to its end.
#[derive(Debug, Default)]
pub(super) struct Stream {
    decoder: Decoder,
    /// A block of whose words some were written since it was counted.
    touched: Option<u32>,
    /// What the guest was told last: request, interval.
    told: Option<(u32, u32)>,
    /// A message to the guest, and how much of it has been sent.
    message: Option<[u8; HOST_BYTES]>,
    sent: usize,
}

impl Stream {
    /// Takes in what the guest sends.
    pub(super) fn take(&mut self, mut bytes: &[u8], port: &dyn PortHole) -> Result<(), Senseless> {
        let hole = port.hole();
        let flags = hole.flags();
        loop {
            match self.decoder.next(&mut bytes) {
                Ok(None) => return Ok(()),
                Ok(Some(Item::Flags { frame, word })) => {
                    let place = flags.get(frame as usize).ok_or(Senseless)?;
                    let block = frame / BLOCK_PAGES;
                    if self.touched != Some(block) {
                        self.count(&hole);
                        self.touched = Some(block);
                    }
                    place.store(word, Ordering::Relaxed);
                }
                Ok(Some(Item::Pass(header))) => {
                    // Words first, then the counters of their blocks, then the header.
                    self.count(&hole);
                    hole.set_guest_header(&header);
                    port.ring();
                }
                Ok(Some(Item::Host { .. })) | Err(_) => return Err(Senseless),
            }
        }
    }

    fn count(&mut self, hole: &Hole<'_>) {
        if let Some(block) = self.touched.take() {
            hole.count(block);
        }
    }

    /// What is left to be sent to the guest; empty where there is nothing.
    pub(super) fn pending(&mut self, hole: &Hole<'_>) -> &[u8] {
        if self.message.is_none()
            && let Some(header) = hole.host_header()
        {
            let news = (header.requested, header.interval_ms);
            let begins = self.told.is_none();
            if self.told.replace(news) != Some(news) {
                self.message = Some(host(&header, begins));
                self.sent = 0;
            }
        }
        self.message.as_ref().map_or(&[], |message| &message[self.sent..])
    }

    /// So many bytes of it have been sent.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        if self.sent >= HOST_BYTES {
            self.message = None;
        }
    }
}
