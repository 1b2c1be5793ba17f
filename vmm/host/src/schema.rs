//! The JSON Schema of configuration files.

use serde_json::{Map, Value, json};
use utoipa::{PartialSchema, ToSchema};

use crate::config_file::ConfigFile;

/// The prefixes of references to schemas in OpenAPI and in JSON Schema.
const PREFIXES: (&str, &str) = ("#/components/schemas/", "#/$defs/");

/// The pattern for a group in a file. `{index}` and `{name}` are replaced by each VM's number and name, so
/// only the result must be a name.
const GROUP: &str = r"^(\.*([A-Za-z0-9_-]|\{(index|name)\})([A-Za-z0-9._-]|\{(index|name)\})*|\.{3,})$";

/// Returns the schema for editors and checkers (JSON Schema, draft 2020-12), as text.
#[must_use]
pub fn config_schema() -> String {
    let mut named = Vec::new();
    ConfigFile::schemas(&mut named);
    named.sort_by(|(one, _), (other, _)| one.cmp(other));
    named.dedup_by(|(one, _), (other, _)| one == other);
    let definitions: Map<_, _> = named.into_iter().map(|(name, schema)| (name, json!(schema))).collect();
    let mut schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration file of samepage",
        "$defs": definitions,
    });
    if let (Value::Object(schema), Value::Object(body)) = (&mut schema, json!(ConfigFile::schema())) {
        schema.extend(body);
    }
    let group = &mut schema["$defs"]["SharingSpec"]["properties"]["group"];
    group["pattern"] = GROUP.into();
    // A name has at most this number of letters, and each may come from the longest template.
    group["maxLength"] = json!(group["maxLength"].as_u64().map(|letters| letters * "{index}".len() as u64));
    let port = &mut schema["$defs"]["PublishSpec"]["pattern"];
    if let Some((host, rest)) = port.as_str().and_then(|pattern| pattern.strip_prefix('^')?.split_once(':')) {
        // In a file, the number of a VM may be a part of the host's port.
        *port = format!(r"^({host}|[0-9]{{0,5}}\{{index\}}[0-9]{{0,5}}):{rest}").into();
    }
    // Values of constant types can always be serialised.
    let text = serde_json::to_string_pretty(&schema).unwrap_or_default();
    text.replace(PREFIXES.0, PREFIXES.1) + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_in_the_repository_is_current() {
        let kept = include_str!("../../../resources/config.schema.json");
        assert!(
            kept == config_schema(),
            "resources/config.schema.json is out of date: samepage config schema > resources/config.schema.json"
        );
    }

    #[test]
    fn all_that_the_schema_refers_to_is_in_it() {
        let schema: Value = serde_json::from_str(&config_schema()).unwrap();
        let text = schema.to_string();
        for reference in text.split(PREFIXES.1).skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(schema["$defs"][name].is_object(), "{name}");
        }
    }
}
