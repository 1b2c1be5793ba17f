//! What each page of one VM's RAM is mapped from, and how many mappings that takes.
//!
//! Every page is in one of three states. Its mapping is *anonymous*; or it refers to a frame and the
//! page is *attached*, that is counted among the frame's sharers; or it refers to a frame that the page
//! has *left*, because the guest wrote to it and has a private copy there.
//!
//! With a page that is not attached a number can be kept, its note, in the place where the number of the
//! frame is otherwise: the metadata of a page is what limits how much memory can be managed.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::collections::segments::tree_bytes;
use crate::collections::sets::PageSet;
use crate::frames::page_types::Census;
use crate::frames::store::Frame;
use crate::memory::guest::Source;

/// The metadata of one VM's mappings.
#[derive(Debug)]
pub(crate) struct Backing {
    /// The frame of a page that is attached, the note of any other.
    words: Vec<u32>,
    /// Pages whose mappings refer to frames.
    on_frames: PageSet,
    attached: PageSet,
    attached_count: u32,
    /// The frames of pages that have left them.
    left: BTreeMap<u32, Frame>,
    mappings: u32,
    /// What the guest says of its pages, where it does.
    census: Option<Box<Census>>,
}

impl Backing {
    /// Anonymous memory alone.
    pub(crate) fn new(pages: u32) -> Self {
        let set = PageSet::new(pages);
        Self {
            words: vec![0; pages as usize],
            on_frames: set.clone(),
            attached: set,
            attached_count: 0,
            left: BTreeMap::new(),
            mappings: 1,
            census: None,
        }
    }

    /// Has it noted from now on what the guest says of its pages.
    pub(crate) fn take_census(&mut self) {
        let (pages, attached) = (self.pages(), self.attached_count);
        self.census.get_or_insert_with(|| Box::new(Census::new(pages, attached)));
    }

    /// What the guest says of its pages, where it does.
    pub(crate) fn census(&self) -> Option<&Census> {
        self.census.as_deref()
    }

    pub(crate) fn census_mut(&mut self) -> Option<&mut Census> {
        self.census.as_deref_mut()
    }

    pub(crate) fn pages(&self) -> u32 {
        self.words.len() as u32
    }

    /// The frame that the page's mapping refers to, whether or not the page has left it.
    pub(crate) fn refers(&self, page: u32) -> Option<Frame> {
        if self.attached.contains(page) {
            Some(Frame::new(self.words[page as usize]))
        } else if self.on_frames.contains(page) {
            self.left.get(&page).copied()
        } else {
            None
        }
    }

    /// Pages whose mappings refer to frames.
    pub(crate) fn on_frames(&self) -> &PageSet {
        &self.on_frames
    }

    pub(crate) fn attached(&self, page: u32) -> bool {
        self.attached.contains(page)
    }

    /// The frames of the pages of a range that are attached.
    pub(crate) fn frames(&self, pages: Range<u32>) -> impl Iterator<Item = Frame> + '_ {
        self.attached.runs_within(pages).flatten().map(|page| Frame::new(self.words[page as usize]))
    }

    /// The runs of attached pages of a range.
    pub(crate) fn attached_runs(&self, pages: Range<u32>) -> impl Iterator<Item = Range<u32>> + '_ {
        self.attached.runs_within(pages)
    }

    pub(crate) fn attached_count(&self) -> u32 {
        self.attached_count
    }

    pub(crate) fn mappings(&self) -> u32 {
        self.mappings
    }

    /// The note of a page that is not attached: anything, where none was made since it was.
    pub(crate) fn note(&self, page: u32) -> u32 {
        debug_assert!(!self.attached(page));
        self.words[page as usize]
    }

    /// Makes the note of a page that is not attached.
    pub(crate) fn set_note(&mut self, page: u32, note: u32) {
        debug_assert!(!self.attached(page));
        self.words[page as usize] = note;
    }

    /// Pages are mapped to frames now, and attached.
    pub(crate) fn attach(&mut self, first: u32, frame: Frame, count: u32) {
        let before = self.boundaries(first, count);
        if let Some(census) = &mut self.census {
            census.remapped(first..first + count);
        }
        for (page, frame) in (first..first + count).zip(frame.run(count)) {
            if !self.attached.contains(page) {
                self.left.remove(&page);
                self.attached.insert(page);
                self.attached_count += 1;
                if let Some(census) = &mut self.census {
                    census.attached(page);
                }
            }
            self.words[page as usize] = frame.number();
        }
        self.on_frames.insert_range(first..first + count);
        self.mappings = self.mappings + self.boundaries(first, count) - before;
    }

    /// The page has left its frame, which is returned; its mapping refers to it as before.
    pub(crate) fn leave(&mut self, page: u32) -> Frame {
        assert!(self.attached.remove(page), "page {page} is on no frame");
        self.attached_count -= 1;
        if let Some(census) = &mut self.census {
            census.left(page);
        }
        let frame = Frame::new(self.words[page as usize]);
        self.left.insert(page, frame);
        frame
    }

    /// Pages that are not attached are mapped to anonymous memory now.
    pub(crate) fn make_anonymous(&mut self, first: u32, count: u32) {
        let before = self.boundaries(first, count);
        for page in first..first + count {
            debug_assert!(!self.attached(page));
            self.left.remove(&page);
        }
        self.on_frames.remove_range(first..first + count);
        self.mappings = self.mappings + self.boundaries(first, count) - before;
    }

    /// How many more mappings the kernel will need once the pages are mapped from `source`.
    pub(crate) fn mappings_added(&self, first: u32, count: u32, source: Source) -> i64 {
        let refers = |page: u32| match source {
            Source::Frames(frame) if (first..first + count).contains(&page) => Some(frame + (page - first)),
            Source::Zeros if (first..first + count).contains(&page) => None,
            _ => self.refers(page),
        };
        let edges = [first, first + count];
        let after = edges
            .iter()
            .filter(|&&edge| edge > 0 && edge < self.pages())
            .filter(|&&edge| !joined(refers(edge - 1), refers(edge)))
            .count();
        after as i64 - i64::from(self.boundaries(first, count))
    }

    /// Places within and at the ends of a run where one mapping ends and another starts.
    fn boundaries(&self, first: u32, count: u32) -> u32 {
        let from = first.saturating_sub(1);
        let to = (first + count + 1).min(self.pages());
        let mut boundaries = 0;
        let mut before = self.refers(from);
        for page in from + 1..to {
            let refers = self.refers(page);
            boundaries += u32::from(!joined(before, refers));
            before = refers;
        }
        boundaries
    }

    /// Bytes that the metadata takes.
    pub(crate) fn bytes(&self) -> usize {
        self.words.capacity() * size_of::<u32>()
            + self.on_frames.bytes()
            + self.attached.bytes()
            + tree_bytes(&self.left)
            + self.census.as_ref().map_or(0, |census| census.bytes())
    }
}

/// Whether the kernel makes one mapping of two neighbours.
pub(crate) fn joined(before: Option<Frame>, after: Option<Frame>) -> bool {
    match (before, after) {
        (Some(before), Some(after)) => after == before + 1,
        (before, after) => before == after,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u32 = 64;

    fn mappings(model: &[Option<Frame>]) -> u32 {
        1 + model.windows(2).filter(|pair| !joined(pair[0], pair[1])).count() as u32
    }

    proptest! {
        #[test]
        fn mappings_are_counted(
            changes in prop::collection::vec((0..3_u8, 0..PAGES, 1..20_u32, 0..200_u32), 0..60)
        ) {
            let mut backing = Backing::new(PAGES);
            let mut model = vec![None; PAGES as usize];
            let mut attached = [false; PAGES as usize];
            let mut notes = [0; PAGES as usize];
            for (change, first, count, frame) in changes {
                let (number, frame) = (frame, Frame::new(frame));
                let count = count.min(PAGES - first);
                let pages = first..first + count;
                let free = pages.clone().all(|page| !attached[page as usize]);
                match change {
                    0 => {
                        let added = backing.mappings_added(first, count, Source::Frames(frame));
                        let before = i64::from(backing.mappings());
                        backing.attach(first, frame, count);
                        prop_assert_eq!(i64::from(backing.mappings()), before + added);
                        for (page, frame) in pages.zip(frame.run(count)) {
                            model[page as usize] = Some(frame);
                            attached[page as usize] = true;
                        }
                    }
                    1 if free => {
                        let added = backing.mappings_added(first, count, Source::Zeros);
                        let before = i64::from(backing.mappings());
                        backing.make_anonymous(first, count);
                        prop_assert_eq!(i64::from(backing.mappings()), before + added);
                        pages.for_each(|page| model[page as usize] = None);
                    }
                    _ => {
                        for page in pages.filter(|&page| std::mem::take(&mut attached[page as usize])) {
                            prop_assert_eq!(Some(backing.leave(page)), model[page as usize]);
                            backing.set_note(page, number + page);
                            notes[page as usize] = number + page;
                        }
                    }
                }
                prop_assert_eq!(backing.mappings(), mappings(&model));
                for page in 0..PAGES {
                    prop_assert_eq!(backing.refers(page), model[page as usize]);
                    prop_assert_eq!(backing.attached(page), attached[page as usize]);
                    prop_assert_eq!(backing.on_frames().contains(page), model[page as usize].is_some());
                }
                for page in (0..PAGES).filter(|&page| !attached[page as usize] && notes[page as usize] > 0) {
                    let note = backing.note(page);
                    prop_assert!(note == notes[page as usize] || note < 300 + PAGES);
                }
            }
        }
    }
}
