//! Images of VMs' memory over time: the content of each page at each time, synthetic or from files.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use samepage_resources::demo::content::mix;
use samepage_sharing::PAGE_SIZE;

use super::args::Series;
use super::layout::{Content, Layout, own, shuffle};
use super::memory::Memory;

/// Number of bytes to read at a time: whole pages.
const CHUNK: usize = 1 << 20;

/// Lengths of synthetic files in pages. They have the lengths of runs of duplicates in Linux guests: most
/// files are short, and most pages are in long ones.
const LENGTHS: [u64; 16] = [1, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 16, 32, 64, 200, 600];
/// The contents of a synthetic file are numbered from the file's number times this on.
const FILE: u64 = 1 << 12;

/// Images of some VMs, all taken at the same times.
#[derive(Debug)]
pub(super) enum Images {
    /// The contents of pages at each time.
    MadeUp(Vec<Layout>),
    /// Raw images, by VM and by time.
    Files(Vec<Vec<File>>),
}

impl Images {
    /// Opens the images of all VMs.
    ///
    /// # Errors
    /// Fails if an image cannot be opened or is not raw, or if the VMs have different numbers of images.
    pub(super) fn open(series: &[Series]) -> Result<Self> {
        let counts: Vec<_> = series.iter().map(|series| series.0.len()).collect();
        ensure!(
            counts.iter().all(|count| *count == counts[0]),
            "VMs have {counts:?} images: give each --series the same number, one for each point in time"
        );
        let open = |path: &std::path::PathBuf| {
            let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
            let bytes = file.metadata().with_context(|| format!("look at {}", path.display()))?.len();
            ensure!(
                bytes > 0 && bytes.is_multiple_of(PAGE_SIZE as u64),
                "{} has {bytes} bytes, which is no whole number of pages: give raw images of memory",
                path.display()
            );
            Ok(file)
        };
        let vms = series.iter().map(|series| series.0.iter().map(open).collect());
        Ok(Self::Files(vms.collect::<Result<_>>()?))
    }

    /// Returns synthetic VMs that boot and then work. They load the same files, each in its own order and to
    /// its own places, among pages of their own. When memory is full, the oldest files are replaced.
    pub(super) fn make_up(vms: u32, pages: u32, count: usize) -> Self {
        let mut guests: Vec<_> = (0..u64::from(vms)).map(|number| Guest::new(number, pages)).collect();
        let boot = count / 2;
        let mut next_file = 1;
        let images = (0..count).map(|time| {
            // Memory nearly fills in the first half. Then a twentieth changes from image to image.
            let load = u64::from(pages) * 3 / 4;
            let load = if time < boot { load / boot.max(1) as u64 } else { u64::from(pages) / 40 };
            let mut files = Vec::new();
            let mut loaded = 0;
            while loaded < load {
                files.push(next_file);
                loaded += length(next_file);
                next_file += 1;
            }
            for guest in &mut guests {
                let mut files = files.clone();
                shuffle(&mut files, guest.number << 16 | time as u64);
                files.into_iter().for_each(|file| guest.load(file));
                guest.rewrite(u64::from(pages) / 40);
            }
            Layout { vms: guests.iter().map(|guest| guest.contents.clone()).collect() }
        });
        Self::MadeUp(images.collect())
    }

    /// Returns the number of images of each VM.
    pub(super) fn count(&self) -> usize {
        match self {
            Self::MadeUp(images) => images.len(),
            Self::Files(vms) => vms.first().map_or(0, Vec::len),
        }
    }

    /// Returns untouched memory for all VMs.
    ///
    /// # Errors
    /// Fails if the memory cannot be reserved.
    pub(super) fn memory(&self) -> Result<Vec<Memory>> {
        let pages: Vec<u64> = match self {
            Self::MadeUp(images) => images[0].vms.iter().map(|vm| vm.len() as u64).collect(),
            Self::Files(vms) => {
                let bytes = |file: &File| file.metadata().map(|metadata| metadata.len());
                let largest = |files: &Vec<File>| -> Result<u64> {
                    let bytes = files.iter().map(bytes).collect::<Result<Vec<_>, _>>();
                    let bytes = bytes.context("look at an image")?;
                    Ok(bytes.into_iter().max().unwrap_or(0) / PAGE_SIZE as u64)
                };
                vms.iter().map(largest).collect::<Result<_>>()?
            }
        };
        pages
            .into_iter()
            .map(|pages| Memory::new(u32::try_from(pages).context("an image of 16 TiB and more")?))
            .collect()
    }

    /// Writes the different pages, so that memory equals the image at this time.
    ///
    /// # Errors
    /// Fails if a file cannot be read.
    pub(super) fn apply(&self, time: usize, memory: &[Memory]) -> Result<()> {
        match self {
            Self::MadeUp(images) => {
                for (vm, (contents, memory)) in images[time].vms.iter().zip(memory).enumerate() {
                    let before = time.checked_sub(1).map(|time| &images[time].vms[vm]);
                    for (page, content) in (0..).zip(contents) {
                        let same = before.is_some_and(|before| before[page as usize] == *content);
                        content.iter().filter(|_| !same).for_each(|&content| memory.write(page, content));
                    }
                }
                Ok(())
            }
            Self::Files(vms) => {
                vms.iter().zip(memory).try_for_each(|(files, memory)| replay(&files[time], memory))
            }
        }
    }
}

fn replay(file: &File, memory: &Memory) -> Result<()> {
    let bytes = file.metadata().context("look at an image")?.len();
    let mut chunk = vec![0; CHUNK];
    for start in (0..bytes).step_by(CHUNK) {
        let chunk = &mut chunk[..(bytes - start).min(CHUNK as u64) as usize];
        file.read_exact_at(chunk, start).context("read an image")?;
        let first = (start / PAGE_SIZE as u64) as u32;
        for (page, content) in (first..).zip(chunk.as_chunks::<PAGE_SIZE>().0) {
            memory.become_like(page, content);
        }
    }
    Ok(())
}

/// A synthetic VM.
struct Guest {
    number: u64,
    contents: Vec<Option<Content>>,
    /// The place for the next file.
    cursor: usize,
    /// Number of contents of its own so far.
    owned: u64,
}

impl Guest {
    fn new(number: u64, pages: u32) -> Self {
        Self { number, contents: vec![None; pages as usize], cursor: 0, owned: 0 }
    }

    fn own(&mut self) -> Content {
        self.owned += 1;
        own(self.number, self.owned)
    }

    fn put(&mut self, content: Content) {
        self.contents[self.cursor] = Some(content);
        self.cursor = (self.cursor + 1) % self.contents.len();
    }

    /// Loads a file, and some own pages for the work on it.
    fn load(&mut self, file: u64) {
        let length = length(file);
        (0..length).for_each(|page| self.put(file * FILE + page));
        for _ in 0..1 + length / 8 {
            let content = self.own();
            self.put(content);
        }
        (0..length / 16).for_each(|_| self.put(0));
    }

    /// Writes to random pages.
    fn rewrite(&mut self, pages: u64) {
        for _ in 0..pages {
            let content = self.own();
            let page = mix(self.number << 32 | self.owned) as usize % self.contents.len();
            // Untouched pages stay untouched.
            if let Some(before) = &mut self.contents[page] {
                *before = content;
            }
        }
    }
}

fn length(file: u64) -> u64 {
    LENGTHS[mix(file) as usize % LENGTHS.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_vms_fill_their_memory_with_much_that_is_alike() {
        let Images::MadeUp(images) = Images::make_up(2, 4096, 10) else { unreachable!() };
        let touched: Vec<_> = images.iter().map(Layout::touched).collect();
        assert!(touched.is_sorted() && touched[0] < 4096 && touched[9] > 6000, "{touched:?}");
        let last = &images[9];
        assert!(last.duplicates() > last.touched() / 2, "{} of {}", last.duplicates(), last.touched());
        assert_ne!(last.vms[0], last.vms[1]);
    }
}
