//! Compares the oracle with a model that keeps every page.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// A step of feeding: a page with a content (0 is zeros), or a page without one.
#[derive(Clone, Copy, Debug)]
enum Fed {
    Content(u16),
    Untouched(u8),
    Unread(u8),
    Gap,
}

fn page(content: u16) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    page[1000..1002].copy_from_slice(&content.to_le_bytes());
    page
}

fn oracle(images: &[Vec<Fed>]) -> Report {
    let mut oracle = Oracle::new().unwrap();
    for (index, fed) in images.iter().enumerate() {
        let mut image = oracle.image(format!("vm-{index}"));
        for fed in fed {
            match *fed {
                Fed::Content(content) => image.page(&page(content)).unwrap(),
                Fed::Untouched(pages) => image.untouched(pages.into()),
                Fed::Unread(pages) => image.unread(pages.into()),
                Fed::Gap => image.gap(),
            }
        }
    }
    oracle.report()
}

fn contents(pages: impl IntoIterator<Item = u16>) -> Vec<Fed> {
    pages.into_iter().map(Fed::Content).collect()
}

/// Returns how often each VM has each content other than zeros.
fn model(images: &[Vec<Fed>]) -> BTreeMap<u16, BTreeMap<usize, u64>> {
    let mut model: BTreeMap<u16, BTreeMap<usize, u64>> = BTreeMap::new();
    for (index, fed) in images.iter().enumerate() {
        for fed in fed {
            if let Fed::Content(content @ 1..) = *fed {
                *model.entry(content).or_default().entry(index).or_default() += 1;
            }
        }
    }
    model
}

/// Returns the lengths of runs, from a walk over all pages that assigns frames in guest order.
fn model_runs(images: &[Vec<Fed>], model: &BTreeMap<u16, BTreeMap<usize, u64>>) -> Vec<u64> {
    let mut frames = BTreeMap::new();
    let mut runs: Vec<u64> = Vec::new();
    for fed in images {
        let mut guest_page = 0_u64;
        let mut last = None;
        for fed in fed {
            match *fed {
                Fed::Content(content) => {
                    if content != 0 && model[&content].values().sum::<u64>() > 1 {
                        let next = frames.len();
                        let frame = *frames.entry(content).or_insert(next);
                        if guest_page > 0 && last == Some((guest_page - 1, frame.wrapping_sub(1))) {
                            *runs.last_mut().unwrap() += 1;
                        } else {
                            runs.push(1);
                        }
                        last = Some((guest_page, frame));
                    }
                    guest_page += 1;
                }
                Fed::Untouched(pages) | Fed::Unread(pages) => guest_page += u64::from(pages),
                Fed::Gap => guest_page += 1000,
            }
        }
    }
    runs
}

proptest! {
    #[test]
    fn counts_are_those_of_a_model_that_keeps_all_pages(
        images in prop::collection::vec(
            prop::collection::vec(
                prop_oneof![
                    12 => (0_u16..40).prop_map(Fed::Content),
                    1 => (0_u8..5).prop_map(Fed::Untouched),
                    1 => (0_u8..5).prop_map(Fed::Unread),
                    1 => Just(Fed::Gap),
                ],
                0..200,
            ),
            0..5,
        ),
        // Long runs: ascending contents in all VMs.
        file in prop::collection::vec(100_u16..900, 0..300),
    ) {
        let mut images = images;
        for (index, image) in images.iter_mut().enumerate() {
            image.extend(contents(file[index.min(file.len())..].iter().copied()));
        }
        let report = oracle(&images);
        let model = model(&images);

        let within: u64 = model.values().flat_map(BTreeMap::values).map(|count| count - 1).sum();
        let further: u64 = model.values().map(|vms| vms.values().sum::<u64>() - 1).sum();
        prop_assert_eq!(report.saved.within, within);
        prop_assert_eq!(report.saved.between, further - within);
        prop_assert_eq!(report.saved.zero, report.total.zero);
        prop_assert_eq!(report.saved_pages, further + report.total.zero);
        prop_assert_eq!(report.saved_bytes, report.saved_pages * 4096);

        let duplicated: BTreeSet<u16> =
            model.iter().filter(|(_, vms)| vms.values().sum::<u64>() > 1).map(|(&content, _)| content).collect();
        prop_assert_eq!(report.frames, duplicated.len() as u64);
        for (index, fed) in images.iter().enumerate() {
            let mut classes = Classes::default();
            for fed in fed {
                match *fed {
                    Fed::Content(0) => { classes.zero += 1; classes.pages += 1; }
                    Fed::Content(content) => {
                        classes.pages += 1;
                        if model[&content].len() > 1 { classes.between += 1 }
                        else if duplicated.contains(&content) { classes.within += 1 }
                        else { classes.unique += 1 }
                    }
                    Fed::Untouched(pages) => { classes.untouched += u64::from(pages); classes.pages += u64::from(pages); }
                    Fed::Unread(pages) => { classes.unread += u64::from(pages); classes.pages += u64::from(pages); }
                    Fed::Gap => {}
                }
            }
            prop_assert_eq!(report.images[index].classes, classes);
        }

        let runs = model_runs(&images, &model);
        prop_assert_eq!(report.runs.runs, runs.len() as u64);
        prop_assert_eq!(report.runs.pages, report.total.duplicated());
        for bucket in &report.runs.buckets {
            let to = bucket.to_pages.unwrap_or(u64::MAX);
            let inside = runs.iter().filter(|&&run| (bucket.from_pages..=to).contains(&run));
            prop_assert_eq!(bucket.pages, inside.clone().sum::<u64>());
            prop_assert_eq!(bucket.runs, inside.count() as u64);
            prop_assert_eq!(bucket.mappings, 2 * bucket.runs);
        }
        let all = report.budgets.last().unwrap();
        prop_assert_eq!((all.limit, all.mappings, all.pages), (None, report.runs.mappings, report.runs.pages));
        prop_assert_eq!(all.saved_pages, further);
        let last = report.curve.last().unwrap();
        prop_assert_eq!((last.mappings, last.saved_bytes), (all.mappings, all.saved_bytes));
        prop_assert!(report.curve.is_sorted_by_key(|point| (point.mappings, point.saved_bytes)));
        prop_assert!(report.curve.is_sorted_by(|one, other| one.saved_bytes <= other.saved_bytes));
    }
}

#[test]
fn nothing_saves_nothing() {
    let report = oracle(&[]);
    assert_eq!((report.saved_pages, report.frames, report.runs.runs), (0, 0, 0));
    assert_eq!(report.budgets.len(), 1);
    assert_eq!(report.curve, [CurvePoint { mappings: 0, saved_bytes: 0 }]);
}

#[test]
fn two_like_vms_are_two_runs() {
    let report = oracle(&[contents(1..=600), contents(1..=600)]);
    assert_eq!(report.saved, Saved { zero: 0, within: 0, between: 600 });
    assert_eq!((report.runs.runs, report.runs.mappings, report.runs.pages), (2, 4, 1200));
    assert_eq!(report.runs.buckets[4].runs, 2);
    assert_eq!(report.total.between, 1200);
}

#[test]
fn few_mappings_buy_the_longest_runs() {
    // Both VMs have 2,000 single pages between unique ones, and a run of 500.
    let image = |own: u16| {
        let singles = (1..=2_000_u16).flat_map(move |page| [page, own + page]);
        contents(singles.chain(40_000..40_500))
    };
    let report = oracle(&[image(10_000), image(20_000)]);
    assert_eq!(report.runs.runs, 4_002);
    let saved: Vec<_> =
        report.budgets.iter().map(|budget| (budget.limit, budget.mappings, budget.saved_pages)).collect();
    // 1,000 mappings suffice for both long runs, and for 498 single pages, which are pairs.
    assert_eq!(
        saved,
        [(Some(1_000), 1_000, 500 + 249), (Some(8_000), 8_000, 500 + 1_999), (None, 8_004, 2_500)]
    );
}

#[test]
fn what_comes_in_between_ends_a_run() {
    let parted = |by: Fed| {
        let image = [contents(1..=3), vec![by], contents(4..=6)].concat();
        oracle(&[image.clone(), image]).runs.runs
    };
    assert_eq!(parted(Fed::Gap), 4);
    assert_eq!(parted(Fed::Untouched(1)), 4);
    assert_eq!(parted(Fed::Unread(1)), 4);
    assert_eq!(parted(Fed::Content(0)), 4);
    assert_eq!(parted(Fed::Untouched(0)), 2);
}

#[test]
fn digests_depend_on_the_key() {
    let (one, other) = (Oracle::new().unwrap(), Oracle::new().unwrap());
    assert_ne!(one.key, other.key);
    assert!(!format!("{one:?}").contains("key"));
}
