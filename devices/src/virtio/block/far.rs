//! Reads that a cache in another process carries out: it says later what has become of them.

use vm_memory::GuestAddress;

use super::service::Service;
use super::stats::add;
use super::transfer::{Part, PartKind};
use crate::disk::cache::{BLOCK_SIZE, BlockRead, ImageId};
use crate::disk::channel::{Action, ChannelLost};
use crate::disk::image::Layer;
use crate::disk::line::Answer;
use crate::disk::memory::{Bounce, Memory};
use crate::virtio::queue::QueueError;

/// A read that the cache carries out.
pub(super) struct FarRead {
    image: ImageId,
    layer: Layer,
    /// Number of the first block.
    first: u64,
    /// Targets of the blocks.
    targets: Vec<GuestAddress>,
    /// For blocks that the cache leaves to the disk. It was taken first, so these reads never wait for memory.
    bounce: Bounce,
}

impl Service {
    /// Has the cache read whole blocks from number `first` on. There must be a line, with room.
    pub(super) fn begin_far(
        &mut self,
        index: usize,
        (image, layer): (ImageId, Layer),
        first: u64,
        targets: Vec<GuestAddress>,
        bounce: Bounce,
    ) {
        let read = FarRead { image, layer, first, targets: targets.clone(), bounce };
        let id = self.keep(Part { request: index, kind: PartKind::Far(read) });
        if let Some(line) = &mut self.line {
            line.begin(id, &BlockRead { image, first, targets: &targets });
        }
    }

    /// Processes what the cache has answered. Returns the requests that this concerns.
    pub(super) fn reap_far(&mut self) -> Vec<usize> {
        let mut answers = Vec::new();
        if let Some(line) = &mut self.line {
            line.reap(&mut answers);
        }
        answers.into_iter().map(|answer| self.process_answer(answer)).collect()
    }

    fn process_answer(&mut self, answer: Answer) -> usize {
        let Answer { id, served, fetched, past } = answer;
        let Part { request: index, kind } = self.end_part(id);
        let PartKind::Far(read) = kind else { return index };
        let FarRead { image, layer, first, targets, bounce } = read;
        let stats = &self.common.stats;
        add(&stats.blocks_from_guests, served.from_guests);
        add(&stats.blocks_from_host, served.from_host);
        add(&stats.blocks_fetched, fetched);
        let target = |number: u64| {
            let block = usize::try_from(number.checked_sub(first)?).ok()?;
            let offset = block * BLOCK_SIZE as usize;
            Some((*targets.get(block)?, offset..offset + BLOCK_SIZE as usize))
        };
        let copies: Vec<_> = past.into_iter().flatten().filter_map(target).collect();
        if copies.is_empty() {
            self.bounces.give(bounce);
        } else {
            let kind = PartKind::Copy { image: Some(image), copies, fetches: Vec::new() };
            let action = Action::Read(layer, Memory::Bounce(bounce));
            self.submit(Part { request: index, kind }, first * BLOCK_SIZE, action);
        }
        index
    }

    /// Waits until an operation or a read of the cache is over, if there is any.
    pub(super) fn wait(&mut self) -> Result<(), QueueError> {
        if self.channel.in_flight() > 0 {
            return Ok(self.channel.wait().map_err(|lost: ChannelLost| lost)?);
        }
        if let Some(line) = &mut self.line {
            line.wait();
        }
        Ok(())
    }

    /// Waits until the cache does nothing more for the queue.
    pub(super) fn end_far(&mut self) {
        if let Some(line) = &mut self.line {
            while line.in_flight() > 0 {
                line.wait();
                line.reap(&mut Vec::new());
            }
        }
    }
}
