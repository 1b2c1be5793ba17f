//! The description of a VM, as clients and configuration files write it.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::PathBuf;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, OneOfBuilder, Schema, SchemaFormat, Type};
use utoipa::{PartialSchema, ToSchema};

use crate::disk_spec::DiskSpec;
use samepage_spec::{HugePages, MemoryHole, SharingMode};
use samepage_text::size::parse_size;

/// The group of VMs whose descriptions name none.
pub const DEFAULT_GROUP: &str = "default";
/// Bounds of a VM's memory in bytes, which is a multiple of [`PAGE_SIZE`].
pub const MIN_RAM: u64 = 2 << 20;
/// The upper bound.
pub const MAX_RAM: u64 = (1 << 43) - (4 << 30);
/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;
/// The default command line of the kernel.
pub const DEFAULT_COMMAND_LINE: &str = "console=ttyS0 reboot=k panic=-1";

fn default_command_line() -> String {
    DEFAULT_COMMAND_LINE.to_owned()
}

/// The description of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The name, unique in the process: letters, digits, `.`, `_` and `-`.
    #[schema(
        pattern = "^(\\.*[A-Za-z0-9_-][A-Za-z0-9._-]*|\\.{3,})$",
        min_length = 1,
        max_length = 64,
        example = "web-0"
    )]
    pub name: String,
    /// The kernel: a vmlinux (x86-64 ELF, with or without PVH entry) or a bzImage. Relative paths begin at the
    /// working directory of the process.
    #[schema(value_type = String, min_length = 1, example = "/srv/vmlinux")]
    pub kernel: PathBuf,
    /// The initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line. Parameters for the disks and the memory hole are appended, and the whole line
    /// must not exceed the kernel's limit.
    #[serde(default = "default_command_line")]
    #[schema(default = json!(DEFAULT_COMMAND_LINE), pattern = "^[\\t -~]*$", max_length = 2047)]
    pub cmdline: String,
    /// The size of the memory.
    #[serde(default)]
    #[schema(schema_with = memory_schema)]
    pub memory: Size,
    /// The size of the pages that back the memory.
    #[serde(default)]
    pub hugepages: HugePages,
    /// The disks, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(max_items = 8)]
    pub disks: Vec<DiskSpec>,
    /// Where the console goes, besides the backlog that clients read.
    #[serde(default)]
    pub console: ConsoleSpec,
    /// How the VM shares memory.
    #[serde(default)]
    pub sharing: SharingSpec,
    /// How an agent in the guest publishes what pages are used for. Without effect if the process shares no
    /// memory.
    #[serde(default)]
    pub memory_hole: MemoryHole,
    /// Whether the VM is started when it is created. By default, VMs of configuration files are started, and
    /// VMs that clients create are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<bool>,
}

/// Where a console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleSpec {
    /// A file for a copy of the console. The file is created or truncated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub file: Option<PathBuf>,
}

/// How a VM shares memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SharingSpec {
    /// Which pages are shared.
    #[serde(default)]
    pub mode: SharingMode,
    /// The group of VMs with which it shares memory.
    #[serde(default = "default_group")]
    #[schema(
        pattern = "^(\\.*[A-Za-z0-9_-][A-Za-z0-9._-]*|\\.{3,})$", min_length = 1, max_length = 64,
        default = json!(DEFAULT_GROUP)
    )]
    pub group: String,
}

fn default_group() -> String {
    DEFAULT_GROUP.to_owned()
}

impl Default for SharingSpec {
    fn default() -> Self {
        Self { mode: SharingMode::default(), group: default_group() }
    }
}

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

impl PartialSchema for Size {
    fn schema() -> RefOr<Schema> {
        bounded_size(0, None, None).description(Some("An amount of memory")).into()
    }
}

/// The size of a VM's memory.
fn memory_schema() -> OneOfBuilder {
    let memory = bounded_size(MIN_RAM, Some(MAX_RAM), Some(PAGE_SIZE as u64));
    memory.default(Some(json!(Size::default()))).description(Some("The size of the memory"))
}

/// The same where it may be left to others to say.
pub fn optional_memory_schema() -> OneOfBuilder {
    memory_schema().item(ObjectBuilder::new().schema_type(Type::Null))
}

/// What may be read and written a second, where there is a limit.
pub fn optional_rate_schema() -> OneOfBuilder {
    let rate = bounded_size(1, None, None).item(ObjectBuilder::new().schema_type(Type::Null));
    rate.description(Some("Bytes read and written. By default without limit"))
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

impl ToSchema for Size {
    fn name() -> Cow<'static, str> {
        "Size".into()
    }
}

impl VmSpec {
    /// Returns a VM with this kernel, and with defaults for all else.
    pub fn new(name: impl Into<String>, kernel: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            kernel: kernel.into(),
            initrd: None,
            cmdline: default_command_line(),
            memory: Size::default(),
            hugepages: HugePages::default(),
            disks: Vec::new(),
            console: ConsoleSpec::default(),
            sharing: SharingSpec::default(),
            memory_hole: MemoryHole::default(),
            start: None,
        }
    }

    /// Returns values that are out of range: their places as JSON pointers, and the reasons.
    #[must_use]
    pub fn faults(&self) -> Vec<(String, String)> {
        let disks = self.disks.iter().enumerate();
        let faults = disks.flat_map(|(number, disk)| {
            let at = move |(field, reason)| (format!("/disks/{number}/{field}"), reason);
            disk.faults().into_iter().map(at)
        });
        faults.collect()
    }

    /// Makes all paths absolute, from the working directory of this process.
    ///
    /// # Errors
    /// Fails if the working directory no longer exists.
    pub fn make_absolute(&mut self) -> io::Result<()> {
        let disks = self.disks.iter_mut().map(|disk| &mut disk.path);
        let images = self.initrd.iter_mut().chain(self.console.file.iter_mut()).chain([&mut self.kernel]);
        for path in images.chain(disks) {
            *path = std::path::absolute(&path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<VmSpec, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_are_numbers_or_text() {
        let memory = |value: &str| parse(&format!(r#"{{"name":"a","kernel":"k","memory":{value}}}"#));
        assert_eq!(memory("4096").unwrap().memory, Size(4096));
        assert_eq!(memory("\"1G\"").unwrap().memory, Size(1 << 30));
        for wrong in ["-1", "1.5", "\"1X\"", "null", "[]", "true", "99999999999999999999999"] {
            assert!(memory(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn unknown_and_double_fields_are_refused() {
        assert!(parse(r#"{"name":"a","kernel":"k","cpus":2}"#).unwrap_err().contains("unknown field"));
        assert!(parse(r#"{"name":"a","name":"b","kernel":"k"}"#).unwrap_err().contains("duplicate"));
        let disk = r#"{"name":"a","kernel":"k","disks":[{"path":"d","rw":true}]}"#;
        assert!(parse(disk).unwrap_err().contains("unknown field `rw`"));
    }
}
