//! The data: one JSON value, of bounded length.

use serde_json::{Map, Value};
use thiserror::Error;

/// Why data cannot be written or read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// The data would become longer than the limit.
    #[error("The MMDS patch request doesn't fit.")]
    TooLong,
    /// There is nothing at this path.
    #[error("The MMDS resource does not exist.")]
    NotFound,
    /// There are no data to patch.
    #[error("The MMDS data store is not initialized.")]
    Empty,
    /// The value is neither an object nor a string, and has no form as text.
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    NoText,
}

/// How a value is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Json,
    /// An object as its keys, one a line, with `/` behind those of objects. A string as itself.
    Text,
}

pub(crate) struct Store {
    data: Value,
    is_empty: bool,
    /// In bytes of JSON.
    limit: usize,
}

impl Store {
    pub(crate) fn new(limit: usize) -> Self {
        Self { data: Value::Null, is_empty: true, limit }
    }

    pub(crate) fn data(&self) -> &Value {
        &self.data
    }

    pub(crate) fn put(&mut self, data: Value) -> Result<(), StoreError> {
        if data.to_string().len() > self.limit {
            return Err(StoreError::TooLong);
        }
        (self.data, self.is_empty) = (data, false);
        Ok(())
    }

    pub(crate) fn patch(&mut self, patch: &Value) -> Result<(), StoreError> {
        if self.is_empty {
            return Err(StoreError::Empty);
        }
        let mut data = self.data.clone();
        merge(&mut data, patch);
        self.put(data)
    }

    /// Returns the value at a path whose parts are separated by `/`.
    pub(crate) fn get(&self, path: &str, form: Form) -> Result<String, StoreError> {
        let value = self.data.pointer(path.strip_suffix('/').unwrap_or(path)).ok_or(StoreError::NotFound)?;
        match (form, value) {
            (Form::Json, value) => Ok(value.to_string()),
            (Form::Text, Value::String(text)) => Ok(text.clone()),
            (Form::Text, Value::Object(map)) => {
                let line = |(key, value): (&String, &Value)| {
                    if value.is_object() { format!("{key}/") } else { key.clone() }
                };
                Ok(map.iter().map(line).collect::<Vec<_>>().join("\n"))
            }
            (Form::Text, _) => Err(StoreError::NoText),
        }
    }
}

/// Merges a patch as RFC 7396 says. Its depth is that of parsed JSON, which is bounded.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_value_is_read_as_json_or_as_text() {
        let mut store = Store::new(1000);
        store.put(json!({"name": {"first": "John"}, "age": 43, "phones": ["+40"]})).unwrap();
        let json = |path| store.get(path, Form::Json);
        assert_eq!(json("/name").unwrap(), r#"{"first":"John"}"#);
        assert_eq!(json("/name/first").unwrap(), r#""John""#);
        assert_eq!(json("/phones/0/").unwrap(), r#""+40""#);
        assert_eq!(json("/age").unwrap(), "43");
        assert_eq!(json("/nobody"), Err(StoreError::NotFound));
        let text = |path| store.get(path, Form::Text);
        assert_eq!(text("/").unwrap(), "age\nname/\nphones");
        assert_eq!(text("/name/first").unwrap(), "John");
        for path in ["/age", "/phones"] {
            assert_eq!(text(path), Err(StoreError::NoText));
        }
    }

    #[test]
    fn a_patch_changes_what_it_names_and_null_removes() {
        let mut store = Store::new(1000);
        assert_eq!(store.patch(&json!({"a": 1})), Err(StoreError::Empty));
        store.put(json!({"a": {"b": 1, "c": 2}, "d": "e"})).unwrap();
        store.patch(&json!({"a": {"b": null, "f": {"g": null, "h": 3}}, "d": [1]})).unwrap();
        assert_eq!(*store.data(), json!({"a": {"c": 2, "f": {"h": 3}}, "d": [1]}));
    }

    #[test]
    fn data_that_are_too_long_leave_the_old_ones() {
        let mut store = Store::new(12);
        store.put(json!({"a": "12345"})).unwrap_err();
        store.put(json!({"a": "1234"})).unwrap();
        assert_eq!(store.patch(&json!({"b": 1})), Err(StoreError::TooLong));
        assert_eq!(*store.data(), json!({"a": "1234"}));
    }
}
