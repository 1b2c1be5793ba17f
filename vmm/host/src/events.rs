//! A bounded log of numbered events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use samepage_api_types::events::{Event, Happening};
use tokio::sync::Notify;

/// How many events are kept.
const CAPACITY: usize = 1024;

/// The latest events.
#[derive(Debug, Default)]
pub struct EventLog {
    kept: Mutex<Kept>,
    more: Notify,
}

#[derive(Debug, Default)]
struct Kept {
    events: VecDeque<Arc<Event>>,
    /// The number of the last event.
    last: u64,
}

impl EventLog {
    /// Appends an event.
    pub fn tell(&self, what: Happening) {
        let mut kept = self.kept.lock();
        kept.last += 1;
        let event = Event { id: kept.last, time_seconds: unix_seconds(SystemTime::now()), what };
        if kept.events.len() == CAPACITY {
            kept.events.pop_front();
        }
        kept.events.push_back(Arc::new(event));
        drop(kept);
        self.more.notify_waiters();
    }

    /// Returns the number of the last event.
    pub fn last(&self) -> u64 {
        self.kept.lock().last
    }

    /// Waits for events after a number, and returns them.
    pub async fn after(&self, id: u64) -> Vec<Arc<Event>> {
        loop {
            let more = self.more.notified();
            tokio::pin!(more);
            // From here on nothing is missed.
            more.as_mut().enable();
            let new = self.now_after(id);
            if !new.is_empty() {
                return new;
            }
            more.await;
        }
    }

    fn now_after(&self, id: u64) -> Vec<Arc<Event>> {
        let kept = self.kept.lock();
        let first = kept.last - kept.events.len() as u64 + 1;
        let skip = (id + 1).saturating_sub(first) as usize;
        let mut new = Vec::new();
        if id + 1 < first {
            let what = Happening::Missed { count: first - id - 1 };
            new.push(Arc::new(Event { id: first - 1, time_seconds: unix_seconds(SystemTime::now()), what }));
        }
        new.extend(kept.events.iter().skip(skip).cloned());
        new
    }
}

/// Returns seconds since 1970.
pub fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(number: usize) -> Happening {
        Happening::Limit { message: number.to_string() }
    }

    #[test]
    fn events_are_numbered_and_those_who_come_late_are_told() {
        let log = EventLog::default();
        assert_eq!(log.last(), 0);
        assert!(log.now_after(0).is_empty());
        (0..CAPACITY + 3).for_each(|number| log.tell(limit(number)));
        let all = log.now_after(0);
        assert_eq!((all[0].id, &all[0].what), (3, &Happening::Missed { count: 3 }));
        assert_eq!((all[1].id, &all[1].what), (4, &limit(3)));
        assert_eq!(all.len(), CAPACITY + 1);
        let last = log.now_after(log.last() - 1);
        assert_eq!((last.len(), last[0].id), (1, CAPACITY as u64 + 3));
        assert!(log.now_after(log.last()).is_empty());
    }
}
