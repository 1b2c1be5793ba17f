//! The guarantees of S3-FIFO, and its exact order.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};

use proptest::prelude::*;

use super::queues::Queues;
use super::*;

/// A call of a policy.
///
/// The benchmarks' policies are tested with the same calls in a copy of this type. A common one would need a feature
/// of this crate with proptest among the dependencies.
#[derive(Clone, Copy, Debug)]
enum Event {
    Insert(u16, u8),
    Take(u16),
    Hit(u16),
    Miss(u16),
    Remove(u16),
    Evict,
    Shrink,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let key = || prop_oneof![0..12_u16, 0..60_u16];
    let event = prop_oneof![
        8 => (key(), 0..4_u8).prop_map(|(key, history)| Event::Insert(key, history)),
        3 => key().prop_map(Event::Take),
        3 => key().prop_map(Event::Hit),
        3 => key().prop_map(Event::Miss),
        1 => key().prop_map(Event::Remove),
        4 => Just(Event::Evict),
        1 => Just(Event::Shrink),
    ];
    prop::collection::vec(event, 0..400)
}

proptest! {
    #[test]
    fn s3_fifo_knows_what_is_cached(events in events()) {
        let mut order = S3Fifo::new(RandomState::new());
        let mut cached = HashSet::new();
        let mut most = 0;
        for &event in &events {
            match event {
                Event::Insert(key, bits) => {
                    prop_assert_eq!(order.insert(key, History::from_bits(bits)), cached.insert(key));
                }
                Event::Take(key) => prop_assert_eq!(order.take(key).is_some(), cached.remove(&key)),
                Event::Hit(key) => prop_assert_eq!(order.hit(key), cached.contains(&key)),
                Event::Miss(key) => {
                    order.miss(key);
                }
                Event::Remove(key) => prop_assert_eq!(order.remove(key), cached.remove(&key)),
                Event::Evict => {
                    let victim = order.evict();
                    prop_assert_eq!(victim.is_none(), cached.is_empty());
                    prop_assert!(victim.is_none_or(|key| cached.remove(&key)));
                    prop_assert!(victim.is_none_or(|key| !order.contains(key)));
                }
                Event::Shrink => {
                    order.shrink();
                    most = cached.len();
                }
            }
            most = most.max(cached.len());
            prop_assert_eq!(order.len(), cached.len());
            prop_assert!(order.ghosts() <= most, "{} of {most}", order.ghosts());
        }
        for key in 0..60 {
            prop_assert_eq!(order.contains(key), cached.contains(&key));
        }
        while let Some(key) = order.evict() {
            prop_assert!(cached.remove(&key));
        }
        prop_assert!(cached.is_empty() && order.is_empty());
    }

    #[test]
    fn s3_fifo_evicts_as_it_should(events in events()) {
        let mut s3_fifo = S3Fifo::new(RandomState::new());
        let mut plain_s3_fifo = PlainS3Fifo::default();
        for event in events {
            match event {
                Event::Insert(key, bits) => {
                    let history = History::from_bits(bits);
                    if s3_fifo.contains(key) {
                        s3_fifo.insert(key, history);
                        plain_s3_fifo.hit(key);
                    } else {
                        // What the ghosts say is not exact.
                        let history = history.max(s3_fifo.miss(key));
                        s3_fifo.insert(key, history);
                        plain_s3_fifo.insert(key, history.bits());
                    }
                }
                Event::Take(key) => {
                    let expected = plain_s3_fifo.remove(key).map(|times| times.min(3));
                    prop_assert_eq!(s3_fifo.take(key).map(History::bits), expected);
                }
                Event::Hit(key) => {
                    s3_fifo.hit(key);
                    plain_s3_fifo.hit(key);
                }
                Event::Miss(_) => {}
                Event::Remove(key) => {
                    s3_fifo.remove(key);
                    plain_s3_fifo.remove(key);
                }
                Event::Evict => {
                    prop_assert_eq!(s3_fifo.evict(), plain_s3_fifo.evict());
                }
                Event::Shrink => {
                    s3_fifo.shrink();
                }
            }
        }
    }

    #[test]
    fn queues_are_queues(changes in prop::collection::vec((0..6_u8, 0..3_usize, 0..40_u16), 0..400)) {
        let mut queues = Queues::<u16, RandomState, 3>::new(RandomState::new());
        let mut model: [VecDeque<(u16, u8)>; 3] = Default::default();
        for (change, queue, key) in changes {
            let known = model.iter().position(|keys| keys.iter().any(|&(known, _)| known == key));
            let place = queues.find(key);
            prop_assert_eq!(place.map(|place| queues.queue(place)), known);
            let Some((place, known)) = place.zip(known) else {
                queues.push(queue, key, change % 4);
                model[queue].push_back((key, change % 4));
                continue;
            };
            let index = model[known].iter().position(|&(other, _)| other == key).expect("it is known");
            prop_assert_eq!(queues.count(place), model[known][index].1);
            match change {
                0 => {
                    queues.remove(place);
                    model[known].remove(index);
                }
                1 => {
                    queues.refresh(queue, place);
                    let entry = model[known].remove(index).expect("it is known");
                    model[queue].push_back(entry);
                }
                2 => {
                    prop_assert_eq!(queues.pop(queue), model[queue].pop_front().map(|(key, _)| key));
                }
                3 => queues.shrink(),
                _ => {
                    queues.set_count(place, change - 3);
                    model[known][index].1 = change - 3;
                }
            }
        }
        for (queue, keys) in model.iter_mut().enumerate() {
            prop_assert_eq!(queues.len(queue), keys.len());
            while let Some((key, _)) = keys.pop_front() {
                prop_assert_eq!(queues.pop(queue), Some(key));
            }
            prop_assert_eq!(queues.pop(queue), None);
        }
    }
}

/// Keys and hits, from the oldest. Its ghosts are the other's.
#[derive(Default)]
struct PlainS3Fifo {
    small: VecDeque<(u16, u8)>,
    main: VecDeque<(u16, u8)>,
}

impl PlainS3Fifo {
    fn insert(&mut self, key: u16, times: u8) {
        match times {
            0 => self.small.push_back((key, 0)),
            _ => self.main.push_back((key, times - 1)),
        }
    }

    fn hit(&mut self, key: u16) {
        for entry in self.small.iter_mut().chain(&mut self.main).filter(|entry| entry.0 == key) {
            entry.1 = (entry.1 + 1).min(3);
        }
    }

    fn remove(&mut self, key: u16) -> Option<u8> {
        if let Some(index) = self.small.iter().position(|entry| entry.0 == key) {
            return self.small.remove(index).map(|(_, hits)| hits + 1);
        }
        let index = self.main.iter().position(|entry| entry.0 == key)?;
        self.main.remove(index).map(|(_, hits)| hits + 2)
    }

    fn evict(&mut self) -> Option<u16> {
        let cached = self.small.len() + self.main.len();
        loop {
            if self.small.len() * 10 > cached || self.main.is_empty() {
                match self.small.pop_front()? {
                    (key, 0) => return Some(key),
                    (key, _) => self.main.push_back((key, 0)),
                }
            } else {
                match self.main.pop_front()? {
                    (key, 0) => return Some(key),
                    (key, hits) => self.main.push_back((key, hits - 1)),
                }
            }
        }
    }
}

/// Hashes that are the same in each run.
#[derive(Clone, Debug)]
struct Fixed;

impl BuildHasher for Fixed {
    type Hasher = std::hash::DefaultHasher;

    fn build_hasher(&self) -> Self::Hasher {
        Self::Hasher::new()
    }
}

#[test]
fn a_block_takes_forty_bytes_at_most_and_no_more_once_there_are_as_many_as_ever() {
    let mut order = S3Fifo::new(Fixed);
    let (mut most, mut full) = (0.0_f64, 0);
    let capacity = 100_000;
    for turn in 0..1_000_000_u64 {
        // A third are wanted again.
        let key = if turn % 3 == 0 { turn / 3 % 50_000 } else { turn };
        let history = order.take(key).unwrap_or_else(|| order.miss(key));
        order.insert(key, history);
        while order.len() > capacity {
            order.evict();
        }
        if order.len() > 10_000 {
            most = most.max(order.bytes() as f64 / order.len() as f64);
        }
        if turn == 500_000 {
            full = order.bytes();
        }
    }
    assert!(most <= 40.0, "{most} bytes");
    assert!(order.bytes().abs_diff(full) <= full / 100, "{} and {full} bytes", order.bytes());
    while order.len() > 100 {
        order.evict();
    }
    order.shrink();
    assert!(order.bytes() <= 100 * 40 + 1000, "{}", order.bytes());
}

#[test]
fn what_comes_back_after_it_was_taken_outlives_what_is_new() {
    let mut order = S3Fifo::<u32, _>::new(Fixed);
    (0..100).for_each(|key| assert!(order.insert(key, History::NONE)));
    // The guest takes twenty blocks and gives them back.
    let taken: Vec<_> = (40..60).map(|key| (key, order.take(key).expect("it is cached"))).collect();
    taken.into_iter().for_each(|(key, history)| assert!(order.insert(key, history)));
    // A scan passes.
    for key in 1000..2000 {
        let history = order.miss(key);
        order.insert(key, history);
        order.evict();
    }
    let kept = (40..60).filter(|&key| order.contains(key)).count();
    assert_eq!(kept, 20);
}

#[test]
fn what_is_read_from_the_disk_soon_after_its_eviction_outlives_what_is_new() {
    let mut order = S3Fifo::<u32, _>::new(Fixed);
    (0..100).for_each(|key| assert!(order.insert(key, History::NONE)));
    let victims: Vec<_> = (0..10).filter_map(|_| order.evict()).collect();
    let read: Vec<_> = victims.iter().map(|&key| (key, order.miss(key))).collect();
    assert!(read.iter().all(|&(_, history)| history > History::NONE), "{read:?}");
    // It was the guests' for a while.
    (100..200).for_each(|key| {
        order.insert(key, History::NONE);
        order.evict();
    });
    read.into_iter().for_each(|(key, history)| assert!(order.insert(key, history)));
    (1000..1500).for_each(|key| {
        order.insert(key, History::NONE);
        order.evict();
    });
    assert!(victims.iter().all(|&key| order.contains(key)));
}
