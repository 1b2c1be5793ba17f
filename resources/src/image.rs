//! Disk images for the demo guest.

use std::io::{self, Write};

use crate::demo::content::{SECTOR_BYTES, SECTOR_WORDS, disk_word};

/// Number of sectors to make at a time.
const SECTORS_AT_ONCE: u64 = 512;

/// Writes the content that a disk of this size must have for guests with this seed: the pattern that they
/// verify, which is also the initial content for a disk's [client](crate::demo::client). The memory use does
/// not depend on the disk's size.
///
/// ```
/// use samepage_resources::demo::content::disk_word;
///
/// let mut image = Vec::new();
/// samepage_resources::image::write_pattern(&mut image, 7, 16)?;
/// assert_eq!(image.len(), 16 * 512);
/// assert_eq!(image[15 * 512..][..8], disk_word(7, 15, 0).to_le_bytes());
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// Fails if the writer fails.
pub fn write_pattern(writer: &mut impl Write, seed: u32, sectors: u64) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(SECTORS_AT_ONCE.min(sectors) as usize * SECTOR_BYTES);
    for first in (0..sectors).step_by(SECTORS_AT_ONCE as usize) {
        bytes.clear();
        for sector in first..sectors.min(first + SECTORS_AT_ONCE) {
            let words = (0..SECTOR_WORDS).map(|word| disk_word(seed, sector, word));
            bytes.extend(words.flat_map(u64::to_le_bytes));
        }
        writer.write_all(&bytes)?;
    }
    Ok(())
}
