//! Reads the entries of a file, each part separately, so that an invalid part does not hide mistakes in
//! others.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use serde_path_to_error::{Path, Segment};

use super::source::escape;
use super::{ConfigFile, VmEntry};
use samepage_spec::DiskSpec;

/// Limit for the mistakes that are reported for one file.
const MOST: usize = 200;

/// A mistake in the structure of a file: a JSON pointer, and the reason.
pub(super) type Fault = (String, String);

/// A file, without its invalid parts.
#[derive(Debug, Default)]
pub(super) struct Read {
    /// The files to include, with their indexes in the list.
    pub(super) include: Vec<(usize, std::path::PathBuf)>,
    pub(super) defaults: Entry,
    /// The entries for VMs, with their indexes in the list.
    pub(super) vms: Vec<(usize, Entry)>,
    pub(super) faults: Vec<Fault>,
}

/// An entry, without its invalid parts.
#[derive(Clone, Debug, Default)]
pub(super) struct Entry {
    pub(super) vm: VmEntry,
    /// The index of each disk in the file's list, which may also contain invalid disks.
    pub(super) disks: Vec<usize>,
}

/// Reads a file.
pub(super) fn read(value: Value) -> Read {
    let mut read = Read::default();
    let Value::Object(mut file) = value else {
        // Produces an error that says what is expected.
        let _: Option<ConfigFile> = read.part("", value);
        return read;
    };
    if let Some(include) = read.list("/include", file.remove("include")) {
        for (index, path) in include.into_iter().enumerate() {
            if let Some(path) = read.part(&format!("/include/{index}"), path) {
                read.include.push((index, path));
            }
        }
    }
    if let Some(defaults) = file.remove("defaults") {
        read.defaults = read.entry("/defaults", defaults).unwrap_or_default();
    }
    if let Some(vms) = read.list("/vms", file.remove("vms")) {
        for (index, vm) in vms.into_iter().enumerate() {
            if let Some(vm) = read.entry(&format!("/vms/{index}"), vm) {
                read.vms.push((index, vm));
            }
        }
    }
    // Reports all remaining fields.
    let _: Option<ConfigFile> = read.part("", Value::Object(file));
    read
}

impl Read {
    /// Returns the elements of a list, if the value is present and a list.
    fn list(&mut self, place: &str, value: Option<Value>) -> Option<Vec<Value>> {
        match value? {
            Value::Array(values) => Some(values),
            other => {
                let _: Option<Vec<Value>> = self.part(place, other);
                None
            }
        }
    }

    fn entry(&mut self, place: &str, value: Value) -> Option<Entry> {
        let mut disks = None;
        let mut rest = value;
        if let Value::Object(fields) = &mut rest {
            disks = fields.remove("disks").filter(|disks| !disks.is_null());
        }
        let mut vm: VmEntry = self.part(place, rest)?;
        let place = format!("{place}/disks");
        let mut places = Vec::new();
        if disks.is_some() {
            let mut valid = Vec::new();
            for (index, disk) in self.list(&place, disks).into_iter().flatten().enumerate() {
                if let Some(disk) = self.part::<DiskSpec>(&format!("{place}/{index}"), disk) {
                    valid.push(disk);
                    places.push(index);
                }
            }
            vm.disks = Some(valid);
        }
        Some(Entry { vm, disks: places })
    }

    /// Parses a part of the file. Reports and skips invalid fields. Returns `None` if the whole part is
    /// invalid.
    fn part<T: DeserializeOwned>(&mut self, place: &str, mut value: Value) -> Option<T> {
        let mut wrong: Vec<Vec<String>> = Vec::new();
        loop {
            let error = match serde_path_to_error::deserialize(&value) {
                Ok(part) => return Some(part),
                Err(error) => error,
            };
            let (keys, text) = (keys(error.path()), error.inner().to_string());
            // A missing field may have been invalid, which has already been reported.
            let is_reported = wrong.iter().any(|wrong| {
                let field = wrong.strip_prefix(keys.as_slice());
                field.is_some_and(|field| text == format!("missing field `{}`", field.join("/")))
            });
            if is_reported || self.faults.len() == MOST {
                return None;
            }
            let pointer = keys.iter().fold(place.to_owned(), |all, key| format!("{all}/{}", escape(key)));
            self.faults.push((pointer, text));
            if !remove(&mut value, &keys) {
                return None;
            }
            wrong.push(keys);
        }
    }
}

/// Returns the keys that lead to the mistake, as far as they are keys of tables.
fn keys(path: &Path) -> Vec<String> {
    let keys = path.iter().map_while(|segment| match segment {
        Segment::Map { key } => Some(key.clone()),
        _ => None,
    });
    keys.collect()
}

/// Removes the value of a key. Returns whether there was one.
fn remove(value: &mut Value, keys: &[String]) -> bool {
    let Some((last, tables)) = keys.split_last() else { return false };
    let mut at: Option<&mut Map<String, Value>> = value.as_object_mut();
    for key in tables {
        at = at.and_then(|table| table.get_mut(key)).and_then(Value::as_object_mut);
    }
    at.is_some_and(|table| table.remove(last).is_some())
}
