//! The expected results of the simulation, at small sizes.

use super::*;

const READS: u32 = 60_000;

fn row(workload: Workload, host: f64) -> Row {
    let sizes = Sizes::of_guest(256, host);
    replay(workload.to_string(), &workload.reads(sizes, READS, NonZeroU32::MIN), sizes)
}

#[test]
fn on_zipf_an_exclusive_cache_hits_more_and_takes_less_memory() {
    // The smaller the cache, the larger the part of an inclusive cache that the guest also holds.
    for (host, gain, memory) in [(0.5, 1.9, 2.2), (1.0, 1.5, 1.6), (2.0, 1.2, 1.25)] {
        for cell in &row(Workload::Zipf(0.9), host).policies {
            let (inclusive, exclusive) = (cell.inclusive.host_hit_ratio, cell.exclusive.host_hit_ratio);
            assert!(exclusive >= inclusive * gain, "{host}: {cell:?}");
            assert!(cell.equal_memory_ratio.is_some_and(|ratio| ratio >= memory), "{host}: {cell:?}");
            assert!(cell.exclusive.hit_ratio > cell.inclusive.hit_ratio, "{host}: {cell:?}");
        }
    }
}

#[test]
fn what_fits_both_caches_together_hits_if_they_are_exclusive() {
    for cell in &row(Workload::FittingLoop, 1.0).policies {
        assert_eq!(cell.exclusive.hit_ratio, 1.0, "{cell:?}");
        assert!(cell.inclusive.hit_ratio < 0.5, "{cell:?}");
    }
}

#[test]
fn two_lru_caches_are_one_if_they_are_exclusive() {
    let sizes = Sizes::of_guest(256, 1.0);
    let reads = Workload::Zipf(0.9).reads(sizes, READS, NonZeroU32::MIN);
    let misses = Misses::of(&reads, sizes.guest);
    let hits = host::hits(&misses, Policy::Lru, Use::Exclusive, sizes.host, sizes.data);
    let one = Misses::of(&reads, sizes.guest + sizes.host);
    assert_eq!(misses.len() - hits, one.len());
}

#[test]
fn a_trace_is_replayed_at_sizes_that_follow_from_its_blocks() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("reads.txt");
    let text: String = (0..2000).map(|read| format!("{}\n", read * 7 % 120 * 1000)).collect();
    std::fs::write(&path, text).expect("write");
    let (guest, seed) = (256, NonZeroU32::MIN);
    let args = ReplayArgs { traces: vec![path.clone()], guest, reads: READS, seed, json: false };
    let report = measure(&args).expect("it is replayed");
    let sizes: Vec<_> = report.rows.iter().map(|row| (row.guest_blocks, row.host_blocks)).collect();
    assert_eq!(sizes, [(40, 20), (30, 30), (20, 40)]);
    assert!(report.format().contains("reads.txt"));
    std::fs::write(&path, "1\n2\n").expect("write");
    assert!(measure(&args).expect_err("two blocks").to_string().contains("record more"));
}
