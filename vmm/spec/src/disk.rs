//! The description of a disk.

use std::borrow::Cow;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[cfg(feature = "schema")]
use crate::size::schema::{optional_disk_size, optional_rate};
use crate::{CachePolicy, Format, Size};

/// Unit of the size of a disk.
const SECTOR_BYTES: u64 = 512;
/// Upper limit for the queues of a disk.
pub const MAX_QUEUES: usize = 16;

/// A virtual disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// An image file or a block device.
    #[cfg_attr(feature = "schema", schema(value_type = String, min_length = 1, example = "/srv/root.img"))]
    pub path: PathBuf,
    /// Whether the disk is read-only.
    #[serde(default)]
    pub readonly: bool,
    /// The name of the disk within the VM, which the guest sees as the serial number. By default `disk` and the
    /// number of the disk, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "schema",
        schema(pattern = "^(\\.*[A-Za-z0-9_-][A-Za-z0-9._-]*|\\.{3,})$", min_length = 1, max_length = 20)
    )]
    pub id: Option<String>,
    /// The format of the image. By default the format is detected, and images are refused if that is unsafe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The image whose content the disk has until its guest writes. The disk's image is a qcow2 image that holds only
    /// what the guest has written. An image with another backing file is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>, min_length = 1))]
    pub backing: Option<PathBuf>,
    /// The format of the backing image, for an image that is created. By default the format is detected, and backing
    /// images are refused if that is unsafe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_format: Option<Format>,
    /// Whether a missing image is created, as a qcow2 image. An image that exists stays as it is.
    #[serde(default, skip_serializing_if = "is_false")]
    pub create: bool,
    /// The size of the disk, for an image that is created. By default the size of the backing image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(schema_with = optional_disk_size))]
    pub size: Option<Size>,
    /// Which of its blocks the host keeps in memory, and where. By default `exclusive`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CachePolicy>,
    /// Limits per second.
    #[serde(default)]
    pub limits: RateLimits,
    /// The number of queues that the device offers. By default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(minimum = 1, maximum = 16))]
    pub queues: Option<usize>,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// Limits of a disk per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = LimitsSpec))]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Bytes read and written. By default without limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(schema_with = optional_rate))]
    pub rate: Option<Size>,
    /// Requests. By default without limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(minimum = 1))]
    pub iops: Option<u64>,
}

impl DiskSpec {
    /// Returns the name of the disk of this number, from 0.
    #[must_use]
    pub fn id(&self, number: usize) -> Cow<'_, str> {
        match &self.id {
            Some(id) => Cow::Borrowed(id),
            None => Cow::Owned(format!("disk{number}")),
        }
    }

    /// Returns the format of the image, if the description decides it.
    #[must_use]
    pub fn format(&self) -> Option<Format> {
        self.format.or((self.create || self.backing.is_some()).then_some(Format::Qcow2))
    }

    /// Returns the cache policy.
    #[must_use]
    pub fn cache(&self) -> CachePolicy {
        self.cache.unwrap_or_default()
    }

    /// Returns the number of queues that the device offers.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.queues.unwrap_or(1)
    }

    /// Returns values that are out of range: the field, and the reason.
    #[must_use]
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let queues = self.queues.filter(|queues| !(1..=MAX_QUEUES).contains(queues));
        let queues =
            queues.map(|queues| ("queues", format!("{queues} queues: a disk has 1 to {MAX_QUEUES}")));
        queues.into_iter().chain(self.limits.faults()).chain(self.faults_of_creation()).collect()
    }

    fn faults_of_creation(&self) -> impl Iterator<Item = (&'static str, String)> + use<> {
        let has_backing = self.backing.is_some();
        let size = self.size.map(|size| size.0);
        let is_size_wrong = size.is_some_and(|bytes| bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES));
        [
            (
                self.format() == Some(Format::Raw) && (self.create || has_backing),
                "format",
                "only qcow2 images are created, and only these have a backing image",
            ),
            (
                self.create && !has_backing && size.is_none(),
                "create",
                "a new image needs a backing image or a size",
            ),
            (
                self.create && self.readonly,
                "create",
                "a read-only image is not created, because nobody could fill it",
            ),
            (self.backing_format.is_some() && !has_backing, "backing_format", "there is no backing image"),
            (size.is_some() && !self.create, "size", "a size is for images that are created; use create too"),
            (is_size_wrong, "size", "a disk has a positive multiple of 512 bytes"),
        ]
        .into_iter()
        .filter(|(is_wrong, ..)| *is_wrong)
        .map(|(_, field, reason)| (field, reason.to_owned()))
    }
}

impl RateLimits {
    /// Returns limits of zero: the field, and the reason.
    #[must_use]
    pub fn faults(&self) -> Vec<(&'static str, String)> {
        let nothing = |unit: &str| format!("a limit of 0 {unit} a second lets nothing through");
        let rate = (self.rate == Some(Size(0))).then(|| ("limits/rate", nothing("bytes")));
        let iops = (self.iops == Some(0)).then(|| ("limits/iops", nothing("requests")));
        rate.into_iter().chain(iops).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_let_something_through() {
        let faults = |json: &str| serde_json::from_str::<DiskSpec>(json).unwrap().faults();
        assert!(faults(r#"{"path": "x", "queues": 0}"#)[0].1.contains("1 to"));
        let both = faults(r#"{"path": "x", "queues": 17, "limits": {"rate": 0, "iops": 0}}"#);
        assert_eq!(
            both.iter().map(|fault| fault.0).collect::<Vec<_>>(),
            ["queues", "limits/rate", "limits/iops"]
        );
        assert_eq!(faults(r#"{"path": "x", "limits": {"iops": 1}}"#), []);
    }

    #[test]
    fn images_are_created_of_a_backing_image_or_a_size() {
        let disk = |json: &str| serde_json::from_str::<DiskSpec>(json).unwrap();
        let overlay = disk(r#"{"path": "x", "backing": "base", "create": true}"#);
        assert_eq!((overlay.faults(), overlay.format()), (vec![], Some(Format::Qcow2)));
        assert_eq!(disk(r#"{"path": "x", "create": true, "size": "1G"}"#).faults(), []);
        assert_eq!(disk(r#"{"path": "x", "backing": "base"}"#).faults(), []);
        assert_eq!(disk(r#"{"path": "x"}"#).format(), None);
        for (wrong, field) in [
            (r#"{"path": "x", "create": true}"#, "create"),
            (r#"{"path": "x", "create": true, "size": "1G", "format": "raw"}"#, "format"),
            (r#"{"path": "x", "backing": "base", "format": "raw"}"#, "format"),
            (r#"{"path": "x", "backing": "base", "create": true, "readonly": true}"#, "create"),
            (r#"{"path": "x", "backing_format": "raw"}"#, "backing_format"),
            (r#"{"path": "x", "size": "1G"}"#, "size"),
            (r#"{"path": "x", "create": true, "size": 1000}"#, "size"),
            (r#"{"path": "x", "create": true, "size": 0}"#, "size"),
        ] {
            let faults = disk(wrong).faults();
            assert_eq!(faults.iter().map(|fault| fault.0).collect::<Vec<_>>(), [field], "{wrong}");
        }
        // What is not given is not written.
        assert!(!serde_json::to_string(&disk(r#"{"path": "x"}"#)).unwrap().contains("create"));
    }

    #[test]
    fn a_disk_says_what_it_is_to_be_and_what_is_left_out_is_as_by_default() {
        let disk = |json: &str| serde_json::from_str::<DiskSpec>(json).unwrap();
        let full =
            disk(r#"{"path": "x", "cache": "none", "limits": {"rate": "1M", "iops": 10}, "queues": 4}"#);
        assert_eq!((full.id(2).as_ref(), full.cache(), full.queues()), ("disk2", CachePolicy::None, 4));
        assert_eq!(full.limits, RateLimits { rate: Some(Size(1 << 20)), iops: Some(10) });
        let plain = disk(r#"{"path": "x"}"#);
        assert_eq!(plain, DiskSpec { path: "x".into(), ..DiskSpec::default() });
        assert_eq!(
            (plain.id(0).as_ref(), plain.cache(), plain.queues()),
            ("disk0", CachePolicy::Exclusive, 1)
        );
        assert_eq!(disk(r#"{"path": "x", "id": "root"}"#).id(1), "root");
    }
}
