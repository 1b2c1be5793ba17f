//! Events, for clients that watch.

use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type};
use utoipa::{PartialSchema, ToSchema};

use crate::lifecycle::State;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The number of the event; events are numbered from 1 without gaps.
    pub id: u64,
    /// When the event happened, in seconds since 1970.
    pub time_seconds: f64,
    /// What happened.
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
            "The number of the event; events are numbered from 1 without gaps",
        );
        let time =
            number(Type::Number, KnownFormat::Double, "When the event happened, in seconds since 1970");
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

/// How short memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MemoryState {
    /// All VMs run.
    #[default]
    Enough,
    /// VMs that need more are held, and run in turns.
    Short,
    /// The reserve is used: VMs that need more are held until there is more.
    Exhausted,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Happening {
    /// A VM came into a state.
    State {
        /// The VM's name.
        vm: String,
        /// The state.
        state: State,
        /// Why the VM has ended or was reset; absent otherwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// A VM's guest crashed. The state follows.
    Crash {
        /// The VM's name.
        vm: String,
        /// Where and how the guest crashed.
        report: String,
    },
    /// A VM was deleted.
    Deleted {
        /// The VM's name.
        vm: String,
    },
    /// A VM's disk could not be read or written.
    Disk {
        /// The VM's name.
        vm: String,
        /// The disk's name.
        disk: String,
        /// The error.
        message: String,
    },
    /// A VM's balloon has the size that its guest was asked for.
    Balloon {
        /// The VM's name.
        vm: String,
        /// The memory that the guest has given up.
        size_bytes: u64,
    },
    /// A VM goes on whose managing process has ended. This process manages it now.
    Adopted {
        /// The VM's name.
        vm: String,
        /// The state.
        state: State,
        /// The number of the worker process that holds the VM.
        worker: u32,
    },
    /// A worker process goes on that this process cannot manage.
    Left {
        /// The number of the worker process.
        worker: u32,
        /// Why, and what to do.
        message: String,
    },
    /// Memory became short, or is no longer.
    Memory {
        /// How short memory is now.
        state: MemoryState,
        /// Memory that is to be had, in bytes.
        room_bytes: u64,
        /// What all VMs together may take of it without asking, in bytes.
        claims_bytes: u64,
        /// What this means, and what to do.
        message: String,
    },
    /// A limit was reached.
    Limit {
        /// The limit, and what to do.
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
            Happening::Balloon { .. } => "balloon",
            Happening::Adopted { .. } => "adopted",
            Happening::Left { .. } => "left",
            Happening::Memory { .. } => "memory",
            Happening::Limit { .. } => "limit",
            Happening::Missed { .. } => "missed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_flat_objects() {
        let what = Happening::State { vm: "web".into(), state: State::Paused, reason: None };
        let json = serde_json::to_value(Event { id: 7, time_seconds: 1.5, what }).unwrap();
        let expected = serde_json::json!({ "id": 7, "time_seconds": 1.5, "event": "state", "vm": "web", "state": "paused" });
        assert_eq!(json, expected);
    }
}
