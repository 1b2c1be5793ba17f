//! Counts how often memory holds each block, by searching for its content, independently of any metadata.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::{Context, Result};
use hashbrown::{HashMap, HashSet};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use samepage_resources::demo::client::{BLOCK_BYTES, ClientLayout};
use samepage_resources::demo::content::{SECTOR_BYTES, disk_word};
use samepage_resources::demo::layout::Arena;
use samepage_resources::demo::plan::Plan;
use samepage_sharing::PAGE_SIZE;

use super::super::vms::guests::Guest;

/// Name of the frames' memory file.
const FRAMES: &str = "memfd:samepage-frames";

/// The copies of a disk's blocks in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Copies {
    /// Copies that only the host holds.
    pub(super) host: u64,
    /// Further copies of each block, in the host and in guests: memory without content of its own.
    pub(super) twice: u64,
}

/// Counts the copies of blocks in guests' caches, in frames, and in the page cache.
///
/// # Errors
/// Fails if memory cannot be read.
pub(super) fn count(guests: &[Guest], plan: &Plan, memory: u64, page_cache: &[u32]) -> Result<Copies> {
    let Some(disk) = &plan.disk else { return Ok(Copies::default()) };
    let Some(layout) = ClientLayout::new(disk) else { return Ok(Copies::default()) };
    let arena = Arena::on_map(plan, std::iter::once(0..memory)).context("lay out a guest's memory")?;
    let mut copies = vec![0_u32; disk.client.blocks as usize];
    page_cache.iter().for_each(|&block| copies[block as usize] += 1);

    let blocks: HashMap<u64, usize> =
        (0..copies.len()).map(|block| (first_word(plan.seed, block as u64), block)).collect();
    let mut frames = vec![false; copies.len()];
    for word in words_of_frames()? {
        if let Some(&block) = blocks.get(&word) {
            copies[block] += 1;
            frames[block] = true;
        }
    }
    let mut host: u64 = copies.iter().map(|&copies| u64::from(copies)).sum();

    let mut mapped = vec![false; copies.len()];
    for guest in guests {
        let private = guest.private_pages()?;
        let mut entries = vec![0; copies.len() * ClientLayout::BLOCK_ENTRY as usize];
        guest.read_bytes(arena.client + layout.blocks, &mut entries)?;
        for (block, entry) in entries.chunks_exact(ClientLayout::BLOCK_ENTRY as usize).enumerate() {
            let place = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            if place == 0 {
                continue;
            }
            let page = ((arena.client + layout.page(&disk.client, place)) / PAGE_SIZE as u64) as u32;
            let after = private.partition_point(|run| run.start <= page);
            if after > 0 && private[after - 1].contains(&page) {
                copies[block] += 1;
            } else {
                mapped[block] |= frames[block];
            }
        }
    }
    host -= mapped.iter().map(|&mapped| u64::from(mapped)).sum::<u64>();
    let twice = copies.iter().map(|&copies| u64::from(copies.saturating_sub(1))).sum();
    Ok(Copies { host, twice })
}

fn first_word(seed: u32, block: u64) -> u64 {
    disk_word(seed, block * (BLOCK_BYTES / SECTOR_BYTES as u64), 0)
}

/// Returns the first word of each frame of this process that takes memory.
fn words_of_frames() -> Result<Vec<u64>> {
    let mut words = Vec::new();
    // A store is open more than once.
    let mut stores = HashSet::new();
    for file in fs::read_dir("/proc/self/fd").context("list open files")?.flatten() {
        let is_store = fs::read_link(file.path()).is_ok_and(|name| name.to_string_lossy().contains(FRAMES));
        if is_store {
            // A separate position in the file, so that the engine's does not change.
            let store = File::open(file.path()).context("open the frames")?;
            if stores.insert(store.metadata().context("look at the frames")?.ino()) {
                add_words(&store, &mut words)?;
            }
        }
    }
    Ok(words)
}

fn add_words(store: &File, words: &mut Vec<u64>) -> Result<()> {
    let mut at = 0;
    loop {
        let start = match seek(store, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error).context("look for frames"),
        };
        let end = seek(store, SeekFrom::Hole(start)).context("look for the end of frames")?;
        for offset in (start..end).step_by(PAGE_SIZE) {
            let mut word = [0; 8];
            store.read_exact_at(&mut word, offset).context("read a frame")?;
            words.push(u64::from_le_bytes(word));
        }
        at = end;
    }
}
