//! Images whose content guests verify, and guests that read them through page caches of their own.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use samepage_resources::demo::client::{BLOCK_BYTES, ClientPlan};
use samepage_resources::demo::content::SECTOR_BYTES;
use samepage_resources::demo::plan::{DiskOp, DiskOps, DiskPlan, Plan};
use samepage_resources::image::write_pattern;

/// Guest-physical address of a VM's first disk.
pub const FIRST_DISK: u64 = 0xd000_0000;

/// Writes an image that guests can verify.
///
/// # Panics
/// Panics if it cannot be written.
pub fn write_image(path: &Path, blocks: u32) {
    let mut writer = BufWriter::new(File::create(path).expect("an image"));
    let sectors = u64::from(blocks) * BLOCK_BYTES / SECTOR_BYTES as u64;
    write_pattern(&mut writer, Plan::default().seed, sectors).expect("fill the image");
    writer.flush().expect("fill the image");
}

/// Returns a plan whose guest also uses an image of so many blocks, in each round, as a client.
#[must_use]
pub fn with_client(plan: Plan, client: ClientPlan) -> Plan {
    let disk =
        DiskPlan { ops: DiskOps::new(&[DiskOp::Client]), depth: 4, client, ..DiskPlan::new(FIRST_DISK) };
    Plan { disk: Some(disk), ..plan }
}
