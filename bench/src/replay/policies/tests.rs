//! The guarantees of all policies, and the exact order of LRU.

use std::collections::{HashSet, VecDeque};

use proptest::prelude::*;

use super::super::host::FixedHashes;
use samepage_sharing::blocks::replace::History;

use super::*;

/// A call of a policy. The tests of S3-FIFO in `samepage-sharing` have a copy of this type, and say why.
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
    fn a_policy_knows_what_is_cached(events in events()) {
        for policy in Policy::ALL {
            let mut order = policy.start_with::<u16>(FixedHashes::default());
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
                        prop_assert_eq!(victim.is_none(), cached.is_empty(), "{}", policy);
                        prop_assert!(victim.is_none_or(|key| cached.remove(&key)), "{}", policy);
                        prop_assert!(victim.is_none_or(|key| !order.contains(key)), "{}", policy);
                    }
                    Event::Shrink => {
                        order.shrink();
                        most = cached.len();
                    }
                }
                most = most.max(cached.len());
                prop_assert_eq!(order.len(), cached.len(), "{}", policy);
                prop_assert!(order.ghosts() <= most, "{policy}: {} of {most}", order.ghosts());
            }
            for key in 0..60 {
                prop_assert_eq!(order.contains(key), cached.contains(&key), "{}", policy);
            }
            while let Some(key) = order.evict() {
                prop_assert!(cached.remove(&key));
            }
            prop_assert!(cached.is_empty() && order.is_empty());
        }
    }

    #[test]
    fn lru_evicts_what_was_used_least_recently(events in events()) {
        let mut lru = Policy::Lru.start_with::<u16>(FixedHashes::default());
        let mut plain = PlainLru::default();
        for event in events {
            match event {
                Event::Insert(key, _) => {
                    lru.insert(key, History::NONE);
                    plain.remove(key);
                    plain.0.push_back(key);
                }
                Event::Take(key) => {
                    lru.take(key);
                    plain.remove(key);
                }
                Event::Hit(key) => {
                    if lru.hit(key) {
                        plain.remove(key);
                        plain.0.push_back(key);
                    }
                }
                Event::Miss(_) => {}
                Event::Remove(key) => {
                    lru.remove(key);
                    plain.remove(key);
                }
                Event::Evict => prop_assert_eq!(lru.evict(), plain.0.pop_front()),
                Event::Shrink => lru.shrink(),
            }
        }
    }
}

/// Keys, the least recently used first.
#[derive(Default)]
struct PlainLru(VecDeque<u16>);

impl PlainLru {
    fn remove(&mut self, key: u16) {
        self.0.retain(|&other| other != key);
    }
}

#[test]
fn what_comes_back_after_it_was_taken_outlives_what_is_new() {
    for policy in [Policy::S3Fifo, Policy::Arc, Policy::TwoQ] {
        let mut order = policy.start_with::<u32>(FixedHashes::default());
        (0..100).for_each(|key| assert!(order.insert(key, History::NONE)));
        // The guest takes twenty blocks and evicts them.
        let taken: Vec<_> = (40..60).map(|key| (key, order.take(key).expect("it is cached"))).collect();
        taken.into_iter().for_each(|(key, history)| assert!(order.insert(key, history)));
        // A scan passes.
        for key in 1000..2000 {
            let history = order.miss(key);
            order.insert(key, history);
            order.evict();
        }
        let kept = (40..60).filter(|&key| order.contains(key)).count();
        assert_eq!(kept, 20, "{policy}");
    }
}

#[test]
fn what_is_read_from_the_disk_soon_after_its_eviction_outlives_what_is_new() {
    // ARC has no ghosts of blocks that were used once while there are no others.
    for policy in [Policy::S3Fifo, Policy::TwoQ] {
        let mut order = policy.start_with::<u32>(FixedHashes::default());
        (0..100).for_each(|key| assert!(order.insert(key, History::NONE)));
        let victims: Vec<_> = (0..10).filter_map(|_| order.evict()).collect();
        let read: Vec<_> = victims.iter().map(|&key| (key, order.miss(key))).collect();
        assert!(read.iter().all(|&(_, history)| history > History::NONE), "{policy}: {read:?}");
        // The guests hold the blocks for a while.
        (100..200).for_each(|key| {
            order.insert(key, History::NONE);
            order.evict();
        });
        read.into_iter().for_each(|(key, history)| assert!(order.insert(key, history)));
        (1000..1500).for_each(|key| {
            order.insert(key, History::NONE);
            order.evict();
        });
        assert!(victims.iter().all(|&key| order.contains(key)), "{policy}");
    }
}
