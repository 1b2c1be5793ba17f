//! Metrics in Firecracker's form, as far as samepage counts the same: one JSON object per line, each with the
//! differences since the previous line.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::fault::Fault;
use super::log;
use super::machine::DriveCounts;
use super::model::MetricsConfig;

/// The writer of metrics.
pub(super) struct Metrics {
    id: String,
    config: MetricsConfig,
    file: File,
    told: HashMap<String, DriveCounts>,
}

impl Metrics {
    /// Opens the file or FIFO.
    pub(super) fn open(id: &str, config: MetricsConfig) -> Result<Self, Fault> {
        let file = log::open(&config.metrics_path);
        let file = file.map_err(|error| Fault::new(format!("Cannot open the metrics file: {error:#}.")))?;
        Ok(Self { id: id.to_owned(), config, file, told: HashMap::new() })
    }

    pub(super) fn config(&self) -> &MetricsConfig {
        &self.config
    }

    /// Writes a line.
    pub(super) fn write(&mut self, drives: &[(String, DriveCounts)]) -> Result<(), Fault> {
        let line = self.line(drives).to_string() + "\n";
        self.file.write_all(line.as_bytes()).map_err(|error| {
            let path = self.config.metrics_path.display();
            Fault::new(format!("Cannot write metrics to {path}: {error}."))
        })
    }

    fn line(&mut self, drives: &[(String, DriveCounts)]) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut line = Map::new();
        line.insert("utc_timestamp_ms".to_owned(), json!(now.as_millis() as u64));
        if self.config.emit_id == Some(true) {
            line.insert("id".to_owned(), json!(self.id));
        }
        if let Some(properties) = &self.config.properties {
            line.insert("properties".to_owned(), json!(properties));
        }
        let mut all = DriveCounts::default();
        for (name, counted) in drives {
            let told = self.told.insert(name.clone(), counted.clone()).unwrap_or_default();
            let new = counted.since(&told);
            all = all.plus(&new);
            line.insert(format!("block_{name}"), new.to_json());
        }
        line.insert("block".to_owned(), all.to_json());
        Value::Object(line)
    }
}

impl DriveCounts {
    /// Combines each count with the other's.
    fn with(&self, other: &Self, combine: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            reads: combine(self.reads, other.reads),
            writes: combine(self.writes, other.writes),
            flushes: combine(self.flushes, other.flushes),
            read_bytes: combine(self.read_bytes, other.read_bytes),
            written_bytes: combine(self.written_bytes, other.written_bytes),
            errors: combine(self.errors, other.errors),
            throttled: combine(self.throttled, other.throttled),
        }
    }

    fn since(&self, before: &Self) -> Self {
        self.with(before, u64::saturating_sub)
    }

    fn plus(&self, other: &Self) -> Self {
        self.with(other, u64::saturating_add)
    }

    fn to_json(&self) -> Value {
        json!({
            "read_count": self.reads,
            "write_count": self.writes,
            "flush_count": self.flushes,
            "read_bytes": self.read_bytes,
            "write_bytes": self.written_bytes,
            "execute_fails": self.errors,
            "rate_limiter_throttled_events": self.throttled,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_tells_what_came_about_since_the_last() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let config =
            MetricsConfig { metrics_path: path.to_path_buf(), emit_id: Some(true), properties: None };
        let mut metrics = Metrics::open("a", config).unwrap();
        let counted = |reads| vec![("root".to_owned(), DriveCounts { reads, ..DriveCounts::default() })];
        metrics.write(&counted(3)).unwrap();
        metrics.write(&counted(5)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let reads = lines.iter().map(|line| line["block_root"]["read_count"].as_u64().unwrap());
        assert_eq!(reads.collect::<Vec<_>>(), [3, 2]);
        assert_eq!((&lines[1]["block"]["read_count"], &lines[1]["id"]), (&json!(2), &json!("a")));
    }
}
