//! Tests of the frame store.

use super::reclaim::{SPARE_FRAMES, STEP_RUNS};
use super::*;
use crate::memory::calls::Linux;

fn store() -> (FrameStore, Linux) {
    let store = FrameStore::create(4096).unwrap();
    let calls = Linux::open(store.file().clone()).unwrap();
    (store, calls)
}

/// Takes frames, fills them, and has each referred to by a page.
fn mapped(store: &mut FrameStore, count: u32, preferred: Option<Frame>) -> Frame {
    let hold = store.allocate(count, preferred).unwrap();
    let pages = vec![5_u8; count as usize * PAGE_SIZE];
    store.write(&hold, pages.as_ptr()).unwrap();
    store.fill(&hold);
    hold.frames().for_each(|frame| store.attach(frame));
    let first = hold.first();
    assert!(store.release(hold).is_empty());
    first
}

/// The pages on frames leave them.
fn leave(store: &mut FrameStore, frames: impl IntoIterator<Item = u32>) {
    frames.into_iter().for_each(|frame| assert!(store.detach(at(frame)), "frame {frame} lives on"));
}

fn at(number: u32) -> Frame {
    Frame::new(number)
}

#[test]
fn frames_count_their_sharers_and_give_memory_back() {
    let (mut store, calls) = store();
    let pages = vec![5_u8; 8 * PAGE_SIZE];
    let hold = store.allocate(8, None).unwrap();
    store.write(&hold, pages.as_ptr()).unwrap();
    store.fill(&hold);
    let frame = hold.first();
    assert_eq!(store.charged_bytes().unwrap(), 8 * PAGE_SIZE as u64);
    for _ in 0..3 {
        store.attach(frame + 2);
    }
    assert_eq!((store.live(), store.shared(), store.sharing(), store.held()), (8, 1, 2, 8));
    let others: Vec<_> = frame.run(8).filter(|&other| other != frame + 2).collect();
    assert_eq!(store.release(hold), others, "what nobody has come to dies");
    assert!(!store.detach(frame + 2) && !store.detach(frame + 2));
    assert_eq!((store.shared(), store.sharing(), store.held()), (0, 0, 0));
    assert!(store.detach(frame + 2));
    store.reclaim(&calls);
    assert_eq!((store.live(), store.charged_bytes().unwrap()), (0, 0));
}

#[test]
fn kept_frames_stay_without_sharers_until_they_are_let_go() {
    let (mut store, calls) = store();
    let hold = store.allocate(2, None).unwrap();
    let frame = hold.first();
    // SAFETY: the frames are new.
    unsafe { store.landing(&hold).write_bytes(7, 2 * PAGE_SIZE) };
    store.fill(&hold);
    // SAFETY: the frame is live, and was just written.
    assert_eq!(unsafe { store.content(frame + 1).add(PAGE_SIZE - 1).read() }, 7);
    store.keep(frame);
    store.keep(frame + 1);
    assert!(store.release(hold).is_empty());
    assert_eq!(store.idle(), 2);
    store.attach(frame);
    store.attach(frame);
    assert_eq!((store.idle(), store.shared(), store.sharing(), store.sharers(frame)), (1, 1, 1, 2));
    assert!(!store.detach(frame) && !store.detach(frame), "it does not die");
    assert_eq!((store.idle(), store.live(), store.take_left()), (2, 2, BTreeSet::from([frame])));
    store.attach(frame);
    assert!(!store.let_go(frame), "it has a sharer");
    assert!(!store.kept(frame) && store.detach(frame));
    assert!(store.let_go(frame + 1));
    store.reclaim(&calls);
    assert_eq!((store.idle(), store.live(), store.charged_bytes().unwrap()), (0, 0, 0));
}

#[test]
fn frames_that_were_left_are_not_told_of_when_they_are_wanted_again_or_let_go() {
    let (mut store, _) = store();
    let first = mapped(&mut store, 4, None);
    first.run(4).for_each(|frame| {
        store.keep(frame);
        assert!(!store.detach(frame));
    });
    store.attach(first);
    assert!(store.let_go(first + 1));
    assert_eq!(store.take_left(), BTreeSet::from([first + 2, first + 3]));
    assert!(!store.any_left());
}

#[test]
fn a_frame_that_somebody_holds_outlives_its_pages_and_its_block() {
    let (mut store, calls) = store();
    let first = mapped(&mut store, 2, None);
    let hold = store.hold(first).unwrap();
    assert!(store.hold(first).is_none(), "one hold at a time");
    assert!(!store.detach(first));
    store.keep(first);
    assert!(!store.let_go(first));
    store.reclaim(&calls);
    assert!(store.is_filled(first));
    assert_eq!(store.release(hold), [first]);
    assert!(store.hold(first).is_none(), "it is dead");
    store.reclaim(&calls);
    assert!(store.hold(first).is_none() && store.hold(at(4000)).is_none());
    let unfilled = store.allocate(1, None).unwrap();
    assert_eq!(unfilled.first(), first);
    assert!(store.hold(first).is_none() && !store.is_filled(first), "it is being filled");
    assert_eq!(store.release(unfilled), [first]);
}

#[test]
#[should_panic(expected = "has no content")]
fn a_frame_that_is_being_filled_cannot_be_mapped() {
    let (mut store, _) = store();
    let hold = store.allocate(1, None).unwrap();
    store.attach(hold.first());
}

#[test]
#[should_panic(expected = "filled already")]
fn a_frame_is_filled_once() {
    let (mut store, _) = store();
    let hold = store.allocate(1, None).unwrap();
    store.fill(&hold);
    let _ = store.landing(&hold);
}

#[test]
fn extents_are_reused_preferred_and_joined() {
    let (mut store, calls) = store();
    let first = mapped(&mut store, 100, None);
    assert_eq!(mapped(&mut store, 10, Some(first + 100)), at(100));
    leave(&mut store, 20..40);
    store.reclaim(&calls);
    assert_eq!(mapped(&mut store, 5, Some(at(30))), at(30));
    assert_eq!(mapped(&mut store, 8, None), at(20));
    assert_eq!(mapped(&mut store, 8, None), at(110), "no extent of 8 is left");
    leave(&mut store, (30..35).chain(20..28));
    store.reclaim(&calls);
    assert_eq!(mapped(&mut store, 20, None), at(20), "neighbours became one extent again");
}

#[test]
fn places_before_a_frame_are_found_in_the_longest_runs_that_there_are() {
    let (mut store, calls) = store();
    mapped(&mut store, 1000, None);
    leave(&mut store, (100..130).chain(300..500));
    store.reclaim(&calls);
    let hold = store.allocate_before(at(400), 60).unwrap();
    assert_eq!((hold.first(), hold.count()), (at(300), 60));
    let hold = store.allocate_before(at(370), 60).unwrap();
    assert_eq!((hold.first(), hold.count()), (at(100), 30));
    let hold = store.allocate_before(at(370), 60).unwrap();
    assert_eq!((hold.first(), hold.count()), (at(360), 10));
    assert!(store.allocate_before(at(370), 1).is_none());
}

#[test]
fn what_no_guest_has_mapped_keeps_its_memory_until_it_is_filled_again_or_dropped() {
    let (mut store, calls) = store();
    let pages = vec![5_u8; 2000 * PAGE_SIZE];
    let hold = store.allocate(2000, None).unwrap();
    store.write(&hold, pages.as_ptr()).unwrap();
    store.fill(&hold);
    assert!(store.allocate_spare(1).is_none());
    // Frames 200 and 1800 have been a guest's.
    [200, 1800].into_iter().for_each(|frame| store.attach(at(frame)));
    for hold in hold.each() {
        let frame = hold.first();
        if (100..164).contains(&frame.number()) || (300..302).contains(&frame.number()) {
            assert_eq!(store.release(hold), [frame]);
        } else {
            store.keep(frame);
            assert!(store.release(hold).is_empty());
        }
    }
    store.recycle(&calls);
    assert_eq!((store.spare(), store.charged_bytes().unwrap()), (66, 2000 * PAGE_SIZE as u64));
    assert!(store.allocate_spare(65).is_none());
    let spare = store.allocate_spare(64).unwrap();
    assert_eq!(spare.first(), at(100));
    assert!(store.is_live(at(163)) && !store.is_live(at(300)));
    let fresh = store.allocate(2, Some(at(300))).unwrap();
    assert_eq!(fresh.first(), at(2000), "they are not free");

    assert_eq!((store.detach(at(200)), store.let_go(at(200)), store.detach(at(1800))), (false, true, false));
    let others = (164..1800).filter(|&frame| frame != 200 && !(300..302).contains(&frame));
    others.for_each(|frame| assert!(store.let_go(at(frame))));
    store.recycle(&calls);
    assert_eq!(store.spare(), SPARE_FRAMES, "no more than that");
    assert!(
        store.spare.iter().all(|(first, count)| !(first..first + count).contains(&200)),
        "it is a guest's"
    );
    store.drop_spare(&calls);
    // Two were not written yet.
    assert_eq!(store.charged_bytes().unwrap(), (u64::from(store.live()) - 2) * PAGE_SIZE as u64);
    assert_eq!((store.spare(), store.dead()), (0, 0));
    drop((spare, fresh));
}

#[test]
fn memory_is_given_back_in_bounded_pieces() {
    let (mut store, calls) = store();
    mapped(&mut store, 1000, None);
    leave(&mut store, (0..1000).filter(|frame| frame % 2 == 0));
    assert_eq!(store.reclaim(&calls), STEP_RUNS as u32);
    assert_eq!(store.dead(), 500 - STEP_RUNS as u32);
    store.reclaim_all(&calls);
    assert_eq!((store.dead(), store.charged_bytes().unwrap()), (0, 500 * PAGE_SIZE as u64));
}

#[test]
fn a_full_store_says_so() {
    let (mut store, _) = store();
    assert!(store.allocate(4097, None).is_none());
    assert_eq!(mapped(&mut store, 4096, None), at(0));
    assert!(store.allocate(1, None).is_none());
}

#[test]
fn places_in_a_store_of_single_holes_are_found_at_once() {
    const FRAMES: u32 = 400_000;
    let mut store = FrameStore::create(1 << 20).unwrap();
    let calls = Linux::open(store.file().clone()).unwrap();
    let hold = store.allocate(FRAMES, None).unwrap();
    store.fill(&hold);
    for hold in hold.each().filter(|hold| hold.first().number() % 2 == 0) {
        assert_eq!(store.release(hold).len(), 1);
    }
    store.reclaim_all(&calls);
    let started = std::time::Instant::now();
    for count in 0..1000 {
        let hold = store.allocate_before(at(FRAMES), 2).unwrap();
        assert_eq!((hold.first(), hold.count()), (at(2 * count), 1), "the first of the longest");
    }
    // To go over all holes each time took ten seconds and more.
    println!("{:?} for each", started.elapsed() / 1000);
    assert!(started.elapsed() < std::time::Duration::from_secs(5), "{:?}", started.elapsed());
}

#[test]
fn memory_that_free_frames_have_taken_again_is_given_back() {
    let (mut store, calls) = store();
    let first = mapped(&mut store, 64, None).number();
    leave(&mut store, (first..first + 64).filter(|frame| frame % 2 == 0));
    store.reclaim_all(&calls);
    assert_eq!(store.charged_bytes().unwrap(), 32 * PAGE_SIZE as u64);
    let touch = |store: &FrameStore, frame: u32| {
        // SAFETY: the place is mapped; the byte is not used.
        unsafe { store.view.frame(at(frame)).read_volatile() };
    };
    // Reads that were under way, of a hole between others and of a place behind all of them.
    [first + 6, first + 40, first + 100].into_iter().for_each(|frame| touch(&store, frame));
    assert_eq!(store.charged_bytes().unwrap(), 35 * PAGE_SIZE as u64);
    assert_eq!(store.reclaim(&calls), 0, "nobody has died");
    assert_eq!(store.charged_bytes().unwrap(), 32 * PAGE_SIZE as u64);
    // What has owners is as it was.
    let mut page = [0; PAGE_SIZE];
    for frame in (first..first + 64).filter(|frame| frame % 2 == 1) {
        store.read(at(frame), &mut page).unwrap();
        assert_eq!(page, [5; PAGE_SIZE], "frame {frame}");
    }
    leave(&mut store, (first..first + 64).filter(|frame| frame % 2 == 1));
    touch(&store, first);
    store.reclaim_all(&calls);
    assert_eq!(store.charged_bytes().unwrap(), 0);
}
