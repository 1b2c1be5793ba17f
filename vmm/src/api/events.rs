//! What happens, for those who watch: a bounded log of numbered events.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type};
use utoipa::{PartialSchema, ToSchema};

use super::lifecycle::State;

/// Events kept for those who come late.
const CAPACITY: usize = 1024;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its number; events are numbered from 1 on without gaps.
    pub id: u64,
    /// When, in seconds since 1970.
    pub time_seconds: f64,
    /// What.
    #[serde(flatten)]
    pub what: Happening,
}

impl PartialSchema for Event {
    /// One object for each kind of event, since generators of clients cannot put an object and a choice together.
    fn schema() -> RefOr<Schema> {
        let number = |kind, format, description| {
            let format = SchemaFormat::KnownFormat(format);
            ObjectBuilder::new()
                .schema_type(kind)
                .format(Some(format))
                .description(Some(description))
                .minimum(Some(1))
        };
        let id = number(
            Type::Integer,
            KnownFormat::Int64,
            "Its number; events are numbered from 1 on without gaps",
        );
        let time = number(Type::Number, KnownFormat::Double, "When, in seconds since 1970");
        let (id, time): (RefOr<Schema>, RefOr<Schema>) = (id.into(), time.into());
        let mut schema = Happening::schema();
        if let RefOr::T(Schema::OneOf(kinds)) = &mut schema {
            kinds.description = Some("Something that happened".to_owned());
            for kind in &mut kinds.items {
                let RefOr::T(Schema::Object(object)) = kind else { continue };
                object.properties.insert("id".to_owned(), id.clone());
                object.properties.insert("time_seconds".to_owned(), time.clone());
                object.required.extend(["id".to_owned(), "time_seconds".to_owned()]);
            }
        }
        schema
    }
}

impl ToSchema for Event {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        Happening::schemas(schemas);
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Happening {
    /// A VM came into a state.
    State {
        /// Its name.
        vm: String,
        /// The state.
        state: State,
        /// Why, where the VM has ended or was reset.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// A VM's guest crashed. The state follows.
    Crash {
        /// Its name.
        vm: String,
        /// Where and how.
        report: String,
    },
    /// A VM was deleted.
    Deleted {
        /// Its name.
        vm: String,
    },
    /// A VM's disk could not be read or written.
    Disk {
        /// The VM's name.
        vm: String,
        /// The disk's.
        disk: String,
        /// What went wrong.
        message: String,
    },
    /// A limit was reached.
    Limit {
        /// Which, and what to do.
        message: String,
    },
    /// The reader was too slow, or came too late: events are missing here.
    Missed {
        /// How many.
        count: u64,
    },
}

impl Happening {
    /// The word for it, as in JSON.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Happening::State { .. } => "state",
            Happening::Crash { .. } => "crash",
            Happening::Deleted { .. } => "deleted",
            Happening::Disk { .. } => "disk",
            Happening::Limit { .. } => "limit",
            Happening::Missed { .. } => "missed",
        }
    }
}

/// The latest events.
#[derive(Debug, Default)]
pub(crate) struct EventLog {
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
    /// Notes that something happened.
    pub(crate) fn tell(&self, what: Happening) {
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

    /// The number of the last event.
    pub(crate) fn last(&self) -> u64 {
        self.kept.lock().last
    }

    /// The events after a number, waiting until there is one.
    pub(crate) async fn after(&self, id: u64) -> Vec<Arc<Event>> {
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

/// Seconds since 1970.
pub(crate) fn unix_seconds(time: SystemTime) -> f64 {
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

    #[test]
    fn events_are_flat_objects() {
        let what = Happening::State { vm: "web".into(), state: State::Paused, reason: None };
        let json = serde_json::to_value(Event { id: 7, time_seconds: 1.5, what }).unwrap();
        let expected = serde_json::json!({ "id": 7, "time_seconds": 1.5, "event": "state", "vm": "web", "state": "paused" });
        assert_eq!(json, expected);
    }
}
