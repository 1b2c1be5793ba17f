//! The text of a configuration file: its values and their line numbers.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Number, Value};
use toml::de::{DeTable, DeValue};

use super::Mistake;
use super::json;

/// A file that was read.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    /// The line of each value, counted from 1, by its JSON pointer.
    lines: HashMap<String, usize>,
}

impl Source {
    /// Parses a file. Returns its line numbers, its valid values, and the mistakes in its syntax.
    pub(super) fn parse(path: &Path, text: &str) -> (Self, Value, Vec<Mistake>) {
        let mut source = Self { path: path.to_owned(), lines: HashMap::new() };
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        let (value, mistakes) = if is_json { source.parse_json(text) } else { source.parse_toml(text) };
        (source, value, mistakes)
    }

    /// Returns the line of the value at a JSON pointer, or that of the nearest value around it.
    pub(super) fn line_of(&self, pointer: &str) -> Option<usize> {
        let mut pointer = pointer;
        loop {
            if let Some(line) = self.lines.get(pointer) {
                return Some(*line);
            }
            pointer = &pointer[..pointer.rfind('/')?];
        }
    }

    fn mistake(&self, line: Option<usize>, text: impl Into<String>) -> Mistake {
        Mistake { file: self.path.clone(), line, text: text.into() }
    }

    fn parse_toml(&mut self, text: &str) -> (Value, Vec<Mistake>) {
        let starts: Vec<_> =
            text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect();
        let line_at = |span: &Range<usize>| 1 + starts.partition_point(|newline| *newline < span.start);
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut mistakes: Vec<_> = errors
            .iter()
            .map(|error| self.mistake(error.span().as_ref().map(line_at), error.message()))
            .collect();
        let value = DeValue::Table(table.into_inner());
        let value = self.take_toml(value, String::new(), &line_at, &mut mistakes);
        (value, mistakes)
    }

    fn take_toml(
        &mut self,
        value: DeValue<'_>,
        pointer: String,
        line_at: &impl Fn(&Range<usize>) -> usize,
        mistakes: &mut Vec<Mistake>,
    ) -> Value {
        match value {
            DeValue::String(text) => Value::String(text.into_owned()),
            DeValue::Boolean(on) => Value::Bool(on),
            DeValue::Integer(integer) => {
                let (text, radix) = (integer.as_str(), integer.radix());
                let number = u64::from_str_radix(text, radix).map(Number::from);
                let number = number.or_else(|_| i64::from_str_radix(text, radix).map(Number::from));
                number.map(Value::Number).unwrap_or_else(|_| {
                    mistakes.push(
                        self.mistake(self.line_of(&pointer), format!("{text} does not fit into 64 bits")),
                    );
                    Value::Null
                })
            }
            DeValue::Float(float) => {
                float.as_str().parse().ok().and_then(Number::from_f64).map_or(Value::Null, Value::Number)
            }
            // No field of a configuration is a date. The text appears in the error.
            DeValue::Datetime(date) => {
                Value::Object(Map::from_iter([("date".to_owned(), date.to_string().into())]))
            }
            DeValue::Array(array) => {
                let mut values = Vec::new();
                for (index, value) in array.into_iter().enumerate() {
                    let pointer = format!("{pointer}/{index}");
                    self.lines.insert(pointer.clone(), line_at(&value.span()));
                    values.push(self.take_toml(value.into_inner(), pointer, line_at, mistakes));
                }
                Value::Array(values)
            }
            DeValue::Table(table) => {
                let mut values = Map::new();
                for (key, value) in table {
                    let pointer = format!("{pointer}/{}", escape(key.get_ref()));
                    self.lines.insert(pointer.clone(), line_at(&value.span()));
                    let value = self.take_toml(value.into_inner(), pointer, line_at, mistakes);
                    values.insert(key.into_inner().into_owned(), value);
                }
                Value::Object(values)
            }
        }
    }

    fn parse_json(&mut self, text: &str) -> (Value, Vec<Mistake>) {
        match serde_json::from_str(text) {
            Ok(value) => {
                let (lines, doubled) = json::lines(text);
                self.lines = lines;
                let doubled = doubled.into_iter().map(|(line, key)| {
                    self.mistake(Some(line), format!("the key {key:?} is given twice; leave one of them out"))
                });
                (value, doubled.collect())
            }
            Err(error) => (Value::Null, vec![self.mistake(Some(error.line()), error.to_string())]),
        }
    }
}

/// Returns a key as a part of a JSON pointer (RFC 6901).
pub(super) fn escape(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}
