//! The content of memory: a number for each page of each VM. Both sides get the same.

use std::collections::HashMap;

use samepage_resources::demo::content::mix;

/// The number of a content; 0 is a page of zeros. Different numbers mean different contents.
pub(super) type Content = u64;

/// The contents of all VMs' pages; `None` is a page that is never touched.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    pub(super) vms: Vec<Vec<Option<Content>>>,
}

/// VMs share contents below this number. Higher numbers are a VM's own.
const OWN: Content = 1 << 40;

/// Contents that differ only from this bit on have equal pages except for the last word.
pub(super) const ALTERED: u32 = 48;

/// The pages between runs of equal pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gap {
    /// A page that is never touched: no side scans it, and the pages before and after it can never be one
    /// mapping.
    Untouched,
    /// A page with its own content.
    Own,
}

impl Layout {
    /// Returns VMs that all hold the same `pages` contents, in runs of `length` pages. Each VM except the
    /// first has its own order of runs. A gap of one page follows each run.
    pub(super) fn runs(vms: u32, pages: u32, length: u32, gap: Gap) -> Self {
        let runs = u64::from(pages / length);
        let vms = (0..u64::from(vms)).map(|vm| {
            let mut order: Vec<_> = (0..runs).collect();
            if vm > 0 {
                shuffle(&mut order, vm);
            }
            let length = u64::from(length);
            let mut contents = Vec::new();
            for (place, run) in (0..).zip(order) {
                contents.extend((1..=length).map(|page| Some(run * length + page)));
                contents.push(match gap {
                    Gap::Untouched => None,
                    Gap::Own => Some(own(vm, place)),
                });
            }
            contents
        });
        Self { vms: vms.collect() }
    }

    /// Returns VMs of `pages` pages. In each VM, `percent` of the pages hold contents that all VMs have, in
    /// runs of `length` pages at different places. The other pages have their own contents.
    pub(super) fn mixed(vms: u32, pages: u32, percent: u32, length: u32) -> Self {
        let runs = u64::from(pages / length);
        let alike = runs * u64::from(percent) / 100;
        let vms = (0..u64::from(vms)).map(|vm| {
            let mut order: Vec<_> = (0..runs).collect();
            shuffle(&mut order, vm + 1);
            let pages = order.iter().flat_map(|run| (1..=u64::from(length)).map(move |page| (run, page)));
            let content = |(&run, page): (&u64, u64)| match run * u64::from(length) + page {
                content if run < alike => content,
                content => own(vm, content),
            };
            pages.map(|page| Some(content(page))).collect()
        });
        Self { vms: vms.collect() }
    }

    /// Returns two identical VMs, and others that differ from them in the last word of every second page. So
    /// runs end after each page, and a comparison sees the difference only at the end of a page.
    pub(super) fn nearly_alike(vms: u32, pages: u32) -> Self {
        let vms = (0..u64::from(vms)).map(|vm| {
            let altered = |page: u64| if vm >= 2 && page.is_multiple_of(2) { vm << ALTERED } else { 0 };
            (1..=u64::from(pages)).map(|page| Some(page | altered(page))).collect()
        });
        Self { vms: vms.collect() }
    }

    /// Returns the number of pages of all VMs.
    pub(super) fn pages(&self) -> u64 {
        self.vms.iter().map(|vm| vm.len() as u64).sum()
    }

    /// Returns the number of touched pages.
    pub(super) fn touched(&self) -> u64 {
        self.contents().count() as u64
    }

    /// Returns the number of pages that can be merged: those whose content another page has too, without
    /// pages of zeros.
    pub(super) fn duplicates(&self) -> u64 {
        let mut pages: HashMap<Content, u64> = HashMap::new();
        self.contents()
            .filter(|&content| content != 0)
            .for_each(|content| *pages.entry(content).or_default() += 1);
        pages.values().filter(|&&pages| pages > 1).sum()
    }

    fn contents(&self) -> impl Iterator<Item = Content> + '_ {
        self.vms.iter().flatten().copied().flatten()
    }
}

/// Returns a content that no other page has.
pub(super) fn own(vm: u64, page: u64) -> Content {
    OWN | vm << 28 | page
}

/// Shuffles things into an order that depends only on `seed`.
pub(super) fn shuffle<T>(things: &mut [T], seed: u64) {
    for last in (1..things.len()).rev() {
        let other = mix(seed << 32 | last as u64) % (last as u64 + 1);
        things.swap(last, other as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_same_in_all_vms_and_apart() {
        for gap in [Gap::Untouched, Gap::Own] {
            let layout = Layout::runs(3, 64, 8, gap);
            assert_eq!((layout.pages(), layout.duplicates()), (3 * 72, 3 * 64));
            assert_eq!(layout.touched(), if gap == Gap::Own { 3 * 72 } else { 3 * 64 });
            assert_ne!(layout.vms[1], layout.vms[2]);
            let run: Vec<_> = layout.vms[0][..8].to_vec();
            assert!(layout.vms.iter().all(|vm| vm.chunks(9).any(|chunk| chunk[..8] == run)));
        }
    }

    #[test]
    fn shuffling_keeps_everything() {
        let mut things: Vec<_> = (0..100).collect();
        shuffle(&mut things, 3);
        assert!(!things.is_sorted());
        things.sort_unstable();
        assert!(things.into_iter().eq(0..100));
    }
}
