//! Amounts of memory, as numbers or as text with a unit.

use std::fmt;

use samepage_text::size::parse_size;
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

/// An amount of memory: a number of bytes, or text with a unit, as in `512M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Size(pub u64);

impl Default for Size {
    fn default() -> Self {
        Self(256 << 20)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or text with a unit as in \"512M\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                let size = u64::try_from(bytes).map(Size);
                size.map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                parse_size(text).map(Size).map_err(E::custom)
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

#[cfg(feature = "schema")]
pub(crate) mod schema {
    use std::borrow::Cow;

    use serde_json::json;
    use utoipa::openapi::RefOr;
    use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, OneOfBuilder, Schema, SchemaFormat, Type};
    use utoipa::{PartialSchema, ToSchema};

    use super::Size;
    use crate::vm::{MAX_RAM, MIN_RAM, PAGE_SIZE};

    impl PartialSchema for Size {
        fn schema() -> RefOr<Schema> {
            bounded_size(0, None, None).description(Some("An amount of memory")).into()
        }
    }

    impl ToSchema for Size {
        fn name() -> Cow<'static, str> {
            "Size".into()
        }
    }

    /// The schema of the size of a VM's memory.
    pub(crate) fn memory() -> OneOfBuilder {
        let memory = bounded_size(MIN_RAM, Some(MAX_RAM), Some(PAGE_SIZE as u64));
        memory.default(Some(json!(Size::default()))).description(Some("The size of the memory"))
    }

    /// The schema of the size of a VM's memory, where the size may be null.
    pub fn optional_memory() -> OneOfBuilder {
        memory().item(ObjectBuilder::new().schema_type(Type::Null))
    }

    /// The schema of a limit of bytes per second, which may be null.
    pub(crate) fn optional_rate() -> OneOfBuilder {
        let rate = bounded_size(1, None, None).item(ObjectBuilder::new().schema_type(Type::Null));
        rate.description(Some("Bytes read and written. By default without limit"))
    }

    /// The schema of the size of a disk, which may be null.
    pub(crate) fn optional_disk_size() -> OneOfBuilder {
        let size = bounded_size(512, None, Some(512)).item(ObjectBuilder::new().schema_type(Type::Null));
        size.description(Some("The size of the disk, for an image that is created"))
    }

    /// The schema of the size of a balloon.
    pub(crate) fn balloon() -> OneOfBuilder {
        let size = bounded_size(0, Some(MAX_RAM), Some(PAGE_SIZE as u64));
        let text = "The memory that the guest is to give up from its start on. By default none";
        size.default(Some(json!(0))).description(Some(text))
    }

    /// The schema of the size of a balloon, which may be null.
    pub fn optional_balloon() -> OneOfBuilder {
        let size = bounded_size(0, Some(MAX_RAM), Some(PAGE_SIZE as u64));
        let size = size.item(ObjectBuilder::new().schema_type(Type::Null));
        size.description(Some("The memory that the guest is to give up"))
    }

    /// A number of bytes within bounds, or text with a unit.
    fn bounded_size(min: u64, max: Option<u64>, multiple_of: Option<u64>) -> OneOfBuilder {
        let bytes = ObjectBuilder::new()
            .schema_type(Type::Integer)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Int64)))
            .minimum(Some(min as usize))
            .maximum(max.map(|max| max as usize))
            .multiple_of(multiple_of.map(|bytes| bytes as usize))
            .description(Some("Bytes"));
        let text = ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some("^[0-9]+([KkMmGgTt][Ii]?[Bb]?|[Bb])?$"))
            .description(Some("A number and a unit, as in 512M"));
        OneOfBuilder::new().item(bytes).item(text)
    }
}
