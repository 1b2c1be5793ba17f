//! Guests that read and write disks through their own page caches and the host's block cache. They must get
//! the disk's content, whoever held it before.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use samepage_devices::disk::CachePolicy;
use samepage_machine::DiskSpec;
use samepage_resources::demo::client::{BLOCK_BYTES, ClientPlan, Pattern};
use samepage_resources::demo::plan::Plan;
use samepage_resources::demo::report::Report;
use samepage_sharing::blocks::CacheSize;
use samepage_sharing::engine::Settings;
use samepage_sharing::service::Sharing;
use samepage_tests::disks::{with_client, write_image};
use samepage_tests::guests::{Guest, hypervisor, sharing};
use samepage_tests::harness;
use samepage_tests::shared::{MEMORY, audit};

fn main() -> ExitCode {
    harness::run(&[
        ("guests_read_what_the_disk_holds_with_each_policy", read),
        ("guests_read_what_they_wrote_with_each_policy", write),
        ("a_second_guest_is_served_from_the_first_ones_memory", second_guest),
        ("what_a_guest_gives_up_is_read_from_the_host", given_up),
        ("blocks_survive_guests_that_clear_their_pages", cleared),
        ("a_disk_of_which_nothing_hits_goes_past_the_cache", past),
        ("a_disk_whose_blocks_are_read_again_goes_through_the_cache", through),
    ])
}

const POLICIES: [CachePolicy; 5] = [
    CachePolicy::Exclusive,
    CachePolicy::Scrub,
    CachePolicy::Inclusive,
    CachePolicy::None,
    CachePolicy::Buffered,
];

/// An image that guests can verify, with its folder.
struct Image {
    folder: tempfile::TempDir,
    blocks: u32,
}

impl Image {
    fn new(blocks: u32) -> Self {
        let image = Self { folder: tempfile::tempdir().expect("a folder"), blocks };
        write_image(&image.path(), blocks);
        image
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    fn disk(&self, policy: CachePolicy, client: &ClientPlan) -> DiskSpec {
        DiskSpec {
            path: self.path(),
            id: Some("disk".into()),
            readonly: client.writes == 0,
            format: Some(samepage_devices::disk::Format::Raw),
            cache: Some(policy),
            ..DiskSpec::default()
        }
    }
}

/// Starts a guest that only uses the whole image, until it is asked to finish.
fn start(sharing: &Arc<Sharing>, vm: u32, image: &Image, policy: CachePolicy, client: ClientPlan) -> Guest {
    let client = ClientPlan { blocks: image.blocks, ..client };
    let plan =
        Plan { alike: 0, own: 0, zero: 0, pages: Some(0), rounds: 0, every_ms: 10, vm, ..Plan::default() };
    let plan = with_client(plan, client);
    let mut config = Guest::config(&format!("client-{vm}"), &plan, MEMORY, Some(sharing));
    config.spec.disks = vec![image.disk(policy, &client)];
    Guest::start(&hypervisor(), config)
}

/// Starts an engine whose cache has this number of blocks.
fn with_cache(blocks: u32) -> Arc<Sharing> {
    let block_cache = CacheSize::Bytes(u64::from(blocks) * BLOCK_BYTES);
    sharing(Settings { block_cache, rest_ms: 20, ..Settings::default() })
}

/// Returns the number of blocks that a guest's disk read from guests' memory, from the host's cache, and from
/// the image.
fn sources(guest: &Guest) -> [u64; 3] {
    let stats = &guest.vm.disks()[0].stats;
    [&stats.blocks_from_guests, &stats.blocks_from_host, &stats.blocks_fetched]
        .map(|counter| counter.load(Ordering::Relaxed))
}

/// Asks guests to finish, and checks that they read nothing wrong.
fn finish(guests: Vec<Guest>) {
    for guest in guests {
        let console = guest.console.clone();
        guest.finish();
        let total = |report: &Report| match report {
            Report::ClientTotal { corrupt, requests, .. } => Some((*corrupt, *requests)),
            _ => None,
        };
        let (corrupt, requests) = console.wait_for_report("totals", total);
        assert_eq!(corrupt, 0);
        assert!(requests > 0);
    }
}

/// Ways to read: single blocks, runs in consecutive pages, and runs in scattered pages.
fn ways() -> [ClientPlan; 3] {
    let base = ClientPlan { pages: 300, units: 1000, ..ClientPlan::default() };
    let runs = ClientPlan { run: 16, units: 150, ..base };
    [base, ClientPlan { reads: Pattern::ScanOverZipf, ..runs }, ClientPlan { scatter: true, ..runs }]
}

fn read() {
    let image = Image::new(1200);
    for policy in POLICIES {
        for client in ways() {
            let sharing = with_cache(300);
            let guests: Vec<_> = (0..2).map(|vm| start(&sharing, vm, &image, policy, client)).collect();
            guests.iter().for_each(|guest| guest.console.wait_for_round(4));
            audit(&sharing);
            finish(guests);
            audit(&sharing);
        }
    }
}

fn write() {
    for policy in POLICIES {
        for client in ways() {
            let image = Image::new(1200);
            let sharing = with_cache(300);
            let guests = vec![start(&sharing, 0, &image, policy, ClientPlan { writes: 30, ..client })];
            guests[0].console.wait_for_round(4);
            audit(&sharing);
            finish(guests);
        }
    }
}

fn second_guest() {
    for run in [1, 16] {
        let image = Image::new(640);
        // The host need not keep any block, because shared blocks are in guests.
        let sharing = with_cache(0);
        let client = ClientPlan {
            reads: Pattern::Scan,
            pages: 1000,
            run,
            units: u64::from(image.blocks / run),
            ..ClientPlan::default()
        };
        let first = start(&sharing, 0, &image, CachePolicy::Exclusive, client);
        first.console.wait_for_round(1);
        assert_eq!(sources(&first), [0, 0, 640], "nobody held anything");
        let second = start(&sharing, 1, &image, CachePolicy::Exclusive, client);
        second.console.wait_for_round(1);
        assert_eq!(sources(&second), [640, 0, 0], "the first guest held everything");
        audit(&sharing);
        finish(vec![first, second]);
    }
}

/// A loop over blocks that fit into both caches together, but into neither alone.
fn looping(run: u32) -> ClientPlan {
    ClientPlan { reads: Pattern::Scan, pages: 512, run, units: u64::from(960 / run), ..ClientPlan::default() }
}

fn given_up() {
    for run in [1, 16] {
        let image = Image::new(960);
        let sharing = with_cache(640);
        let guest = start(&sharing, 0, &image, CachePolicy::Exclusive, looping(run));
        guest.console.wait_for_round(4);
        let [from_guests, from_host, fetched] = sources(&guest);
        let held = sharing.cache();
        assert_eq!(fetched, 960, "blocks are read from the disk once: {held:?}");
        assert!(from_host >= 3 * 960 - 64, "{from_guests} from guests, {from_host} from the host: {held:?}");
        audit(&sharing);
        finish(vec![guest]);
    }
}

fn cleared() {
    let image = Image::new(960);
    for run in [1, 16] {
        let sharing = with_cache(640);
        let client = ClientPlan { clear: true, ..looping(run) };
        let guest = start(&sharing, 0, &image, CachePolicy::Exclusive, client);
        guest.console.wait_for_round(4);
        audit(&sharing);
        finish(vec![guest]);
    }
}

/// Blocks that a disk of one VM reads through the cache before it has shown any hits.
const CREDIT: u64 = 1024;

fn past() {
    for run in [1, 16] {
        let image = Image::new(24_000);
        let sharing = with_cache(600);
        // Each block is used once in a pass. By the next pass, the caches have evicted it.
        let scan = ClientPlan { reads: Pattern::Scan, pages: 300, run, ..ClientPlan::default() };
        let units = u64::from(image.blocks / run);
        let guest = start(
            &sharing,
            0,
            &image,
            CachePolicy::Exclusive,
            ClientPlan { units, writes: 10, check: true, ..scan },
        );
        guest.console.wait_for_round(2);
        let [from_guests, from_host, fetched] = sources(&guest);
        println!("{from_guests} from guests, {from_host} from the host, {fetched} through the cache");
        let sampled = 2 * u64::from(image.blocks) / 64;
        assert!(from_guests + from_host + fetched <= CREDIT + sampled, "{fetched} went through the cache");
        audit(&sharing);
        finish(vec![guest]);
        audit(&sharing);
    }
}

fn through() {
    for run in [1, 16] {
        let image = Image::new(6000);
        let sharing = with_cache(6000);
        // A loop over the whole disk, which fits into the host's cache.
        let units = u64::from(image.blocks / run);
        let plan = ClientPlan {
            reads: Pattern::Scan,
            pages: 300,
            run,
            units,
            writes: 1,
            check: true,
            ..ClientPlan::default()
        };
        let guest = start(&sharing, 0, &image, CachePolicy::Exclusive, plan);
        // The sample shows hits in the second pass, and everything is cached in the fourth. On a busy host,
        // the engine may be late.
        let mut round = 4;
        let (from_host, fetched) = loop {
            guest.console.wait_for_round(round);
            let before = sources(&guest);
            guest.console.wait_for_round(round + 2);
            let after = sources(&guest);
            let [_, from_host, fetched] = [0, 1, 2].map(|source| after[source] - before[source]);
            println!("{from_host} from the host, {fetched} fetched");
            if from_host > 4 * fetched || round > 40 {
                break (from_host, fetched);
            }
            round += 2;
        };
        assert!(from_host > 4 * fetched, "{from_host} from the host, {fetched} fetched");
        audit(&sharing);
        finish(vec![guest]);
    }
}
