//! How a guest publishes page types.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

/// How a guest publishes what its pages are used for: in JSON `true` or `on`, `false` or `off`, or `port`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
pub enum MemoryHole {
    /// In memory outside its RAM, which the guest maps.
    #[default]
    On,
    /// The guest publishes nothing.
    Off,
    /// Through a port of a virtio console, for kernels that permit no such mapping.
    Port,
}

impl Serialize for MemoryHole {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_bool(false),
            Self::On => serializer.serialize_bool(true),
            Self::Port => serializer.serialize_str("port"),
        }
    }
}

impl<'de> Deserialize<'de> for MemoryHole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HoleVisitor;

        impl Visitor<'_> for HoleVisitor {
            type Value = MemoryHole;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or one of \"on\", \"off\" and \"port\"")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<MemoryHole, E> {
                Ok(if on { MemoryHole::On } else { MemoryHole::Off })
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<MemoryHole, E> {
                match text {
                    "on" => Ok(MemoryHole::On),
                    "off" => Ok(MemoryHole::Off),
                    "port" => Ok(MemoryHole::Port),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(HoleVisitor)
    }
}

#[cfg(feature = "schema")]
mod schema {
    use std::borrow::Cow;

    use utoipa::openapi::RefOr;
    use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Schema, Type};
    use utoipa::{PartialSchema, ToSchema};

    use super::MemoryHole;

    impl PartialSchema for MemoryHole {
        fn schema() -> RefOr<Schema> {
            let switch = ObjectBuilder::new().schema_type(Type::Boolean).description(Some("on or off"));
            let word =
                ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["on", "off", "port"]));
            let description = "How a guest publishes what its pages are used for: in memory that the guest maps, or \
                               through a port of a virtio console, for kernels that permit no such mapping";
            let either = OneOfBuilder::new().item(switch).item(word);
            Schema::OneOf(either.description(Some(description)).build()).into()
        }
    }

    impl ToSchema for MemoryHole {
        fn name() -> Cow<'static, str> {
            "HoleSpec".into()
        }
    }
}
