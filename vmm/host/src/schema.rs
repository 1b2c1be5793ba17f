//! The JSON Schema of configuration files.

use serde_json::{Map, Value, json};
use utoipa::{PartialSchema, ToSchema};

use crate::config_file::ConfigFile;

/// Where OpenAPI keeps schemas, and where JSON Schema does.
const PREFIXES: (&str, &str) = ("#/components/schemas/", "#/$defs/");

/// The schema, for editors and checkers (JSON Schema, draft 2020-12), as text.
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
    // Values of constant types can always be written.
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
