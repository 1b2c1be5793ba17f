//! Metrics in Firecracker's form, as far as samepage counts the same: one JSON object per line, each with the
//! differences since the previous line.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

use super::fault::Fault;
use super::log;
use super::machine::{DeviceCounts, DeviceKind};
use super::model::MetricsConfig;

/// The writer of metrics.
pub(super) struct Metrics {
    id: String,
    config: MetricsConfig,
    file: File,
    /// What was written of each device, by kind and name.
    told: HashMap<(DeviceKind, String), Vec<u64>>,
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
    pub(super) fn write(&mut self, devices: &[DeviceCounts]) -> Result<(), Fault> {
        let line = self.line(devices).to_string() + "\n";
        self.file.write_all(line.as_bytes()).map_err(|error| {
            let path = self.config.metrics_path.display();
            Fault::new(format!("Cannot write metrics to {path}: {error}."))
        })
    }

    fn line(&mut self, devices: &[DeviceCounts]) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut line = Map::new();
        line.insert("utc_timestamp_ms".to_owned(), json!(now.as_millis() as u64));
        if self.config.emit_id == Some(true) {
            line.insert("id".to_owned(), json!(self.id));
        }
        if let Some(properties) = &self.config.properties {
            line.insert("properties".to_owned(), json!(properties));
        }
        for kind in DeviceKind::ALL {
            let mut sums = vec![0_u64; kind.counters().len()];
            for DeviceCounts { id, counts, .. } in devices.iter().filter(|device| device.kind == kind) {
                let told = self.told.insert((kind, id.clone()), counts.clone());
                let told = told.unwrap_or_else(|| vec![0; counts.len()]);
                let new = counts.iter().zip(told).map(|(now, told)| now.saturating_sub(told));
                let new: Vec<_> = new.collect();
                sums.iter_mut().zip(&new).for_each(|(sum, new)| *sum = sum.saturating_add(*new));
                if !id.is_empty() {
                    line.insert(format!("{}_{id}", kind.name()), named(kind, &new));
                }
            }
            line.insert(kind.name().to_owned(), named(kind, &sums));
        }
        Value::Object(line)
    }
}

fn named(kind: DeviceKind, counts: &[u64]) -> Value {
    let names = kind.counters().iter().map(|name| (*name).to_owned());
    Value::Object(names.zip(counts.iter().map(|count| json!(count))).collect())
}

#[cfg(test)]
mod tests {
    use samepage_api_types::views::DiskStatistics;
    use samepage_api_types::views::devices::{NetworkStatistics, RngStatistics, VsockStatistics};

    use super::*;

    #[test]
    fn each_line_tells_what_came_about_since_the_last() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let config =
            MetricsConfig { metrics_path: path.to_path_buf(), emit_id: Some(true), properties: None };
        let mut metrics = Metrics::open("a", config).unwrap();
        let counted = |reads: u64| {
            let network = NetworkStatistics {
                received_frames: 1,
                received_bytes: 1000 * reads,
                sent_frames: 2,
                sent_bytes: 60,
                ..NetworkStatistics::default()
            };
            let vsock =
                VsockStatistics { connections: reads, received_bytes: 7, ..VsockStatistics::default() };
            [
                DeviceCounts::drive("root", &DiskStatistics { reads, ..DiskStatistics::default() }),
                DeviceCounts::network("eth0", &network),
                DeviceCounts::entropy(&RngStatistics { bytes: reads, ..RngStatistics::default() }),
                DeviceCounts::vsock(&vsock),
            ]
        };
        metrics.write(&counted(3)).unwrap();
        metrics.write(&counted(5)).unwrap();
        metrics.write(&[]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let reads = lines.iter().map(|line| line["block_root"]["read_count"].as_u64().unwrap());
        assert_eq!(reads.take(2).collect::<Vec<_>>(), [3, 2]);
        assert_eq!(lines[1]["net_eth0"]["rx_bytes_count"], 2000);
        assert_eq!(
            (&lines[0]["net"]["tx_packets_count"], &lines[1]["net"]["tx_packets_count"]),
            (&json!(2), &json!(0))
        );
        assert_eq!(lines[0]["entropy"]["entropy_bytes"], 3);
        assert_eq!(lines.iter().map(|line| &line["vsock"]["conns_added"]).collect::<Vec<_>>(), [3, 2, 0]);
        assert_eq!((&lines[0]["vsock"]["rx_bytes_count"], &lines[0]["vsock_"]), (&json!(7), &Value::Null));
        assert_eq!((&lines[2]["net"]["rx_fails"], &lines[2]["net_eth0"]), (&json!(0), &Value::Null));
        assert_eq!((&lines[1]["block"]["read_count"], &lines[1]["id"]), (&json!(2), &json!("a")));
    }
}
