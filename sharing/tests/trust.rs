//! Panics within the engine: sharing stops for that group, everybody is told, and guests go on.

mod common;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Fault, Faulty, Guest, losses};
use parking_lot::Mutex;
use samepage_sharing::blocks::{BlockRead, CacheSize, Image, Keep};
use samepage_sharing::calls::Linux;
use samepage_sharing::content::Page;
use samepage_sharing::engine::{Mode, Settings};
use samepage_sharing::service::{Fetched, Membership, Notice, Sharing, SharingSpec};
use samepage_sharing::store::FrameStore;
use samepage_sharing::trust::Stopped;

const PAGES: u32 = 256;
const PATIENCE: Duration = Duration::from_secs(120);

/// Sharing whose default group panics in the named call, once it is told to.
struct Trial {
    sharing: Sharing,
    armed: Arc<AtomicBool>,
    notices: mpsc::Receiver<Notice>,
}

impl Trial {
    fn new(call: &'static str) -> Self {
        let armed = Arc::new(AtomicBool::new(false));
        let plan = {
            let armed = Arc::clone(&armed);
            move |name: &'static str| {
                assert!(name != call || !armed.load(Ordering::SeqCst), "as a test");
                Fault::None
            }
        };
        let store = FrameStore::create(1 << 16).unwrap();
        let linux = Linux::open(Arc::clone(store.file())).unwrap();
        let calls = Faulty { linux, plan: Arc::new(Mutex::new(plan)) };
        let settings = Settings {
            cpu_percent: 100.0,
            settle: false,
            longest_pause_ms: 20,
            block_cache: CacheSize::Bytes(1 << 20),
            ..Settings::default()
        };
        let sharing = Sharing::start_with(settings, store, Box::new(calls)).unwrap();
        let (sender, notices) = mpsc::channel();
        sharing.on_notice(move |notice| sender.send(notice).unwrap_or_default());
        Self { sharing, armed, notices }
    }

    fn join(&self, guest: &Guest, group: &str) -> Membership {
        let participation = SharingSpec { group: group.to_owned(), mode: Mode::Full };
        self.sharing.add(guest.ram.clone(), None, &participation, losses().1).unwrap()
    }

    fn stopped(&self) {
        let notice = self.notices.recv_timeout(PATIENCE).unwrap();
        assert_eq!(notice, Notice::Stopped { group: "default".to_owned(), why: Stopped::Panicked });
        assert_eq!(self.sharing.statistics().groups_stopped, 1);
    }

    /// Waits until so many pages of a group are shared.
    fn shares(&self, group: &str, pages: u64) {
        let until = Instant::now() + PATIENCE;
        let sharing = || {
            let groups = self.sharing.groups();
            groups.iter().find(|(name, _)| name == group).map_or(0, |(_, counted)| counted.pages_sharing)
        };
        while sharing() < pages {
            assert!(Instant::now() < until, "{group} shares {} of {pages} pages", sharing());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn fill(guest: &Guest, pages: Range<u32>, from: u64) {
    pages.for_each(|page| guest.write(page, from + u64::from(page)));
}

fn check(guest: &Guest, pages: Range<u32>, from: u64) {
    pages.for_each(|page| guest.check(page, from + u64::from(page)));
}

#[test]
fn a_panic_in_any_call_stops_sharing_for_its_group_alone() {
    for call in ["register", "protect", "map", "punch"] {
        let trial = Trial::new(call);
        let guests = [Guest::new(PAGES), Guest::new(PAGES), Guest::new(PAGES)];
        guests.iter().for_each(|guest| fill(guest, 0..PAGES / 2, 1));
        let mut members: Vec<_> = guests.iter().map(|guest| Some(trial.join(guest, "default"))).collect();
        trial.shares("default", u64::from(PAGES));
        trial.armed.store(true, Ordering::SeqCst);
        // There is more to be merged, and frames lose their sharers.
        guests.iter().for_each(|guest| fill(guest, PAGES / 2..PAGES, 7000));
        for (number, guest) in (0..).zip(&guests) {
            fill(guest, 0..PAGES / 4, 10_000 * (number + 1));
        }
        trial.stopped();
        // Guests go on: what they share stays, what they write is theirs.
        for (number, guest) in (0..).zip(&guests) {
            check(guest, 0..PAGES / 4, 10_000 * (number + 1));
            check(guest, PAGES / 4..PAGES / 2, 1);
            check(guest, PAGES / 2..PAGES, 7000);
        }
        // The first leaves: the others keep its frames.
        members[0] = None;
        fill(&guests[1], PAGES / 4..PAGES / 2, 20);
        check(&guests[2], PAGES / 4..PAGES / 2, 1);
        // Who joins now runs without sharing.
        let late = Guest::new(PAGES);
        let member = trial.join(&late, "default");
        assert_eq!(member.statistics().unwrap().pages, 0);
        // Another group shares.
        let others = [Guest::new(PAGES), Guest::new(PAGES)];
        others.iter().for_each(|guest| fill(guest, 0..PAGES, 1));
        let _others = others.each_ref().map(|guest| trial.join(guest, "others"));
        trial.shares("others", u64::from(PAGES));
        assert!(trial.notices.try_recv().is_err(), "it is told once");
        // Once all are gone, the next share again.
        drop(member);
        members.clear();
        let next = [Guest::new(PAGES), Guest::new(PAGES)];
        next.iter().for_each(|guest| fill(guest, 0..PAGES, 1));
        let _next = next.each_ref().map(|guest| trial.join(guest, "default"));
        trial.shares("default", u64::from(PAGES));
        assert_eq!(trial.sharing.statistics().groups_stopped, 0);
    }
}

const IMAGE: Image = Image([1; 4]);

#[test]
fn reads_of_disks_go_past_the_cache_of_a_group_that_has_stopped() {
    let trial = Trial::new("map");
    let guest = Guest::new(PAGES);
    let member = trial.join(&guest, "default");
    let blocks = member.blocks();
    let targets: Vec<_> = (0..8).map(Some).collect();
    let read = BlockRead { keep: Keep::Exclusive, image: IMAGE, first: 100, targets: &targets };
    let mut plan = blocks.begin_read(&read, |_, _| panic!("nobody holds it"));
    let fetch = plan.fetches.pop().unwrap();
    // Another fetch is under way, which ends afterwards.
    let read = BlockRead { first: 200, ..read };
    let other = blocks.begin_read(&read, |_, _| panic!("nobody holds it")).fetches.pop().unwrap();
    [&fetch, &other].into_iter().for_each(common::disks::land);
    trial.armed.store(true, Ordering::SeqCst);
    assert_eq!(blocks.end_fetch(fetch.token, true, |_, _: &Page| {}), Fetched::ToBeCopied);
    assert_eq!(blocks.end_fetch(other.token, true, |_, _: &Page| {}), Fetched::ToBeCopied);
    trial.stopped();
    trial.armed.store(false, Ordering::SeqCst);
    let plan = blocks.begin_read(&read, |_, _| panic!("nothing is served"));
    assert_eq!((plan.past.as_slice(), plan.fetches.len()), (std::slice::from_ref(&(200..208)), 0));
    blocks.begin_write(IMAGE, &(200..208));
    blocks.end_write(IMAGE, &(200..208));
    assert_eq!(blocks.end_fetch(other.token, false, |_, _: &Page| {}), Fetched::Not);
}
