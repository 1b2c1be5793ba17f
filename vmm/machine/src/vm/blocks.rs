//! Connects a VM's disks to the blocks that its sharing group holds. Guest addresses become page numbers.
//! Copies are written through the VM's view of its memory, so that its change log records them.

#![expect(unsafe_code, reason = "hands memory of the frame store to disks")]

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use samepage_devices::GuestMemory;
use samepage_devices::disk::CachePolicy;
use samepage_devices::disk::cache::{BLOCK_SIZE, BlockCache, BlockRead, Fetch, ImageId, ReadPlan, Served};
use samepage_sharing::blocks::admission::{Admission, Readers};
use samepage_sharing::blocks::{self, Image, Keep};
use samepage_sharing::content::Page;
use samepage_sharing::service::{BlockClient, Fetched};
use vm_memory::{Bytes, GuestAddress};

use super::memory::MemorySlot;
use super::provenance::page_of;

/// The access of one disk to the block cache of its VM's group.
pub(super) struct DiskBlocks {
    client: BlockClient,
    policy: Mutex<CachePolicy>,
    /// Decides which reads of a disk with the policy "exclusive" go through the cache.
    admission: Admission,
    memory: GuestMemory,
    slots: Vec<MemorySlot>,
    /// The targets for the blocks of fetches in progress, by token.
    targets: Mutex<HashMap<u64, Vec<GuestAddress>>>,
}

impl DiskBlocks {
    /// Returns the access for the disk with this number in its VM.
    pub(super) fn new(
        client: BlockClient,
        policy: CachePolicy,
        readers: Readers,
        disk: usize,
        memory: GuestMemory,
        slots: Vec<MemorySlot>,
    ) -> Self {
        let admission = Admission::new(client.sampler(), readers, disk);
        Self { client, policy: Mutex::new(policy), admission, memory, slots, targets: Mutex::default() }
    }

    /// Returns the policy for new reads.
    pub(super) fn policy(&self) -> CachePolicy {
        *self.policy.lock()
    }

    /// Changes the policy for new reads. Cached blocks stay until they are evicted.
    pub(super) fn set_policy(&self, policy: CachePolicy) {
        *self.policy.lock() = policy;
    }

    /// Returns the page that begins at an address, or `None` if the address is not aligned.
    fn page(&self, address: GuestAddress) -> Option<u32> {
        address.0.is_multiple_of(4096).then(|| page_of(&self.slots, address.0, 1)).flatten()
    }

    fn copy(&self, to: GuestAddress, content: &Page) -> io::Result<()> {
        self.memory.write_slice(content, to).map_err(io::Error::other)
    }
}

impl DiskBlocks {
    /// Begins a read, or a part of a read that is in the sample.
    fn begin(&self, read: &BlockRead<'_>, keep: Keep, sampled: bool) -> ReadPlan {
        let targets: Vec<_> = read.targets.iter().map(|&address| self.page(address)).collect();
        let image = image(read.image);
        let wanted = blocks::BlockRead { keep, image, first: read.first, targets: &targets };
        let mut failed = Vec::new();
        let copy = |index: usize, content: &Page| {
            if self.copy(read.targets[index], content).is_err() {
                failed.push(index as u64);
            }
        };
        let blocks = targets.len() as u64;
        let hits = |plan: &blocks::ReadPlan| plan.from_guests + plan.from_host;
        let plan = if sampled {
            let sample = self.admission.sample();
            let plan = self.client.begin_sampled_read(&wanted, sample, copy);
            if self.admission.note_sampled(read.first, blocks, hits(&plan), sample, plan.room) {
                self.client.end_sampling(self.admission.disk());
            }
            plan
        } else {
            let plan = self.client.begin_read(&wanted, copy);
            if keep == Keep::Exclusive {
                self.admission.note(read.first, blocks, hits(&plan));
            }
            plan
        };
        // The disk delivers these blocks itself, and then finds out why the delivery fails.
        let failed = failed.into_iter().map(|index| read.first + index..read.first + index + 1);
        let past = plan.past.into_iter().chain(failed).collect();
        let mut targets = self.targets.lock();
        let fetches = plan.fetches.into_iter().map(|fetch| {
            let from = (fetch.first - read.first) as usize;
            targets.insert(fetch.token, read.targets[from..from + fetch.blocks as usize].to_vec());
            let lease = Arc::new(self.client.clone());
            // SAFETY: the landing place of a fetch is whole pages. Nothing else accesses them until the fetch
            // ends. They exist as long as the group, which the client keeps.
            unsafe { Fetch::new(fetch.first, fetch.blocks, fetch.landing, fetch.token, lease) }
        });
        let fetches = fetches.collect();
        ReadPlan {
            served: Served { from_guests: plan.from_guests, from_host: plan.from_host },
            fetches,
            past,
        }
    }
}

impl BlockCache for DiskBlocks {
    fn admits(&self, blocks: Range<u64>) -> bool {
        match keep(self.policy()) {
            None => false,
            Some(Keep::Exclusive) => {
                self.admission.admits(blocks.start, blocks.end.saturating_sub(blocks.start))
            }
            Some(_) => true,
        }
    }

    fn begin_read(&self, read: &BlockRead<'_>) -> ReadPlan {
        let blocks = read.first..read.first.saturating_add(read.targets.len() as u64);
        let Some(keep) = keep(self.policy()) else {
            return ReadPlan { past: vec![blocks], ..ReadPlan::default() };
        };
        if keep != Keep::Exclusive || !self.admission.samples() {
            return self.begin(read, keep, false);
        }
        let mut plan = ReadPlan::default();
        let taken: Vec<_> = blocks.map(|block| self.admission.takes(block)).collect();
        let mut from = 0;
        for run in taken.chunk_by(|one, next| one == next) {
            let (first, targets) = (read.first + from as u64, &read.targets[from..from + run.len()]);
            from += run.len();
            if !run[0] {
                self.admission.pass(targets.len() as u64);
                plan.past.push(first..first + targets.len() as u64);
                continue;
            }
            let part = self.begin(&BlockRead { first, targets, ..*read }, keep, true);
            plan.served.from_guests += part.served.from_guests;
            plan.served.from_host += part.served.from_host;
            plan.fetches.extend(part.fetches);
            plan.past.extend(part.past);
        }
        plan
    }

    fn end_fetch(&self, fetch: Fetch, read: Result<(), ()>) -> io::Result<()> {
        let targets = self.targets.lock().remove(&fetch.token()).unwrap_or_default();
        let mut copied = Ok(());
        let delivered = self.client.end_fetch(fetch.token(), read.is_ok(), |index, content| {
            if let Err(error) = self.copy(targets[index], content) {
                copied = Err(error);
            }
        });
        match delivered {
            Fetched::Delivered => copied,
            Fetched::ToBeCopied => targets.iter().enumerate().try_for_each(|(index, &target)| {
                let mut page: Page = [0; BLOCK_SIZE as usize];
                // SAFETY: the fetch was read in full. Its memory exists and belongs to nothing else while the
                // fetch lives.
                unsafe {
                    fetch.buffer().cast::<Page>().add(index).copy_to_nonoverlapping((&mut page).into(), 1)
                };
                self.copy(target, &page)
            }),
            Fetched::Not if read.is_ok() => Err(io::Error::other("the VM's memory, or the block's, is gone")),
            Fetched::Not => copied,
        }
    }

    fn begin_write(&self, image_id: ImageId, blocks: Range<u64>) {
        self.client.begin_write(image(image_id), &blocks);
    }

    fn end_write(&self, image_id: ImageId, blocks: Range<u64>) {
        self.client.end_write(image(image_id), &blocks);
    }
}

/// Returns how the block cache keeps blocks under a policy, or `None` if it keeps none.
pub(super) fn keep(policy: CachePolicy) -> Option<Keep> {
    match policy {
        CachePolicy::Exclusive => Some(Keep::Exclusive),
        CachePolicy::Scrub => Some(Keep::Scrub),
        CachePolicy::Inclusive => Some(Keep::Inclusive),
        CachePolicy::None | CachePolicy::Buffered => None,
    }
}

fn image(id: ImageId) -> Image {
    Image(id.parts())
}
