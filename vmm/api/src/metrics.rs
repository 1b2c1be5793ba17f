//! Metrics in the text formats of OpenMetrics and Prometheus.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use samepage_sharing::PAGE_SIZE;

use crate::sampling::CachedSample;
use crate::views::devices;
use crate::views::{self, saved_bytes};
use samepage_api_types::by_type::TypeSample;
use samepage_api_types::lifecycle::State;
use samepage_api_types::views::DiskStatistics;
use samepage_api_types::views::devices::{
    BalloonStatistics, BalloonView, GuestMemoryView, NetworkStatistics, RngStatistics, VsockStatistics,
};
use samepage_host::record::Record;
use samepage_host::statistics::{ClaimedSample, IoSample, VmSample, WorkerSample};
use samepage_worker::machine::Look;

/// The state of the process at one moment.
#[derive(Debug)]
struct Metrics {
    records: Vec<Arc<Record>>,
    /// Each VM that exists, with what it has used and counted.
    looks: Vec<(Arc<Record>, Look)>,
    seen: Arc<CachedSample>,
}

/// Returns all metrics as text.
pub(super) fn text(vms: Vec<Arc<Record>>, seen: Arc<CachedSample>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("samepage");
    let look = |record: &Arc<Record>| Some((Arc::clone(record), record.vm()?.look()));
    let looks = vms.iter().filter_map(look).collect();
    registry.register_collector(Box::new(Metrics { records: vms, looks, seen }));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// Converts metrics to Prometheus' text format. In this format, the counters' names in types and help texts
/// have the suffix `_total`, and there are no units and no end mark.
///
/// Source: Prometheus' documentation, "Exposition formats"; the specification of OpenMetrics.
pub(super) fn for_prometheus(openmetrics: &str) -> String {
    let mut text = String::with_capacity(openmetrics.len() + openmetrics.len() / 8);
    let mut help = "";
    for line in openmetrics.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            text.extend([line, "\n"]);
            continue;
        };
        let mut words = comment.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            // The type comes next, and decides the name of the family.
            (Some("HELP"), Some(_), Some(what)) => help = what,
            (Some("TYPE"), Some(name), Some(kind)) => {
                let total = if kind == "counter" { "_total" } else { "" };
                let lines = ["# HELP ", name, total, " ", help, "\n# TYPE ", name, total, " ", kind, "\n"];
                text.extend(lines);
                help = "";
            }
            _ => {}
        }
    }
    text
}

/// Returns a number from a sample.
type Count<T> = fn(&T) -> u64;

type Labels<'a> = [(&'static str, &'a str)];

/// Writes families of metrics.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn gauge<'l, L: AsRef<Labels<'l>>>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        values: impl IntoIterator<Item = (L, f64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        values.into_iter().try_for_each(|(labels, value)| match labels.as_ref() {
            [] => family.encode_gauge(&value),
            labels => family.encode_family(&labels)?.encode_gauge(&value),
        })
    }

    fn counter<'l, L: AsRef<Labels<'l>>>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        values: impl IntoIterator<Item = (L, f64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        values.into_iter().try_for_each(|(labels, value)| match labels.as_ref() {
            [] => family.encode_counter::<NoLabels, f64, f64>(&value, None),
            labels => family.encode_family(&labels)?.encode_counter::<NoLabels, f64, f64>(&value, None),
        })
    }

    /// Writes counters of devices, each with its labels.
    fn devices<const LABELS: usize, T>(
        &mut self,
        devices: &[([(&'static str, &str); LABELS], T)],
        counters: impl IntoIterator<Item = Counter<T>>,
    ) -> fmt::Result {
        counters.into_iter().try_for_each(|(name, help, unit, value)| {
            let values = devices.iter().map(|(labels, counted)| (*labels, value(counted) as f64));
            self.counter(name, help, unit, values)
        })
    }
}

/// A counter of devices: its name, help and unit.
type Counter<T> = (&'static str, &'static str, Option<Unit>, Count<T>);

type NoLabels = [(&'static str, &'static str); 0];

impl Collector for Metrics {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut writer = Writer(encoder);
        self.process(&mut writer)?;
        self.workers(&mut writer)?;
        self.cache(&mut writer)?;
        self.vms(&mut writer)?;
        self.types(&mut writer)?;
        self.disks(&mut writer)?;
        self.networks(&mut writer)?;
        self.sockets(&mut writer)?;
        self.entropy(&mut writer)?;
        self.balloons(&mut writer)
    }
}

impl Metrics {
    fn process(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let sample = &self.seen.sample;
        let engine = &sample.engine;
        let one = |value: f64| [([] as [(&str, &str); 0], value)];
        let states = State::ALL.map(|state| {
            let count = self.records.iter().filter(|record| record.state() == state).count();
            ([("state", state.name())], count as f64)
        });
        writer.gauge("vms", "VMs by state", None, states)?;
        let bytes = || Some(Unit::Bytes);
        let gauges = [
            ("guest_memory", "Sum of the VMs' memory", sample.guest_bytes as f64),
            ("resident", "Memory of the process, with each frame counted once", sample.resident_bytes as f64),
            ("private", "Private pages of the process", sample.private_bytes as f64),
            ("saved", "Memory that sharing saves, minus the overhead", sample.saved_bytes as f64),
            ("overhead", "Overhead of sharing", sample.overhead_bytes as f64),
            ("frames_stored", "Memory charged for frames", engine.store_bytes as f64),
            ("engine_books", "Memory of the engine's metadata", engine.metadata_bytes as f64),
        ];
        for (name, help, value) in gauges {
            writer.gauge(name, help, bytes(), one(value))?;
        }
        let gauges = [
            ("pages_shared", "Frames in use by two or more guest pages", engine.pages_shared),
            ("pages_sharing", "Further guest pages mapped to those frames", engine.pages_sharing),
            ("pages_unshared", "Scanned pages with unique content", engine.pages_unshared),
            ("pages_volatile", "Pages that changed since the previous scan", engine.pages_volatile),
            ("zero_pages", "Guest pages of zeros whose memory is freed", engine.zero_pages),
            ("groups_stopped", "Groups for which sharing has stopped", engine.groups_stopped),
            ("mappings", "Mappings of the process", engine.mappings),
            ("mappings_limit", "The kernel's limit on mappings", engine.mappings_limit),
        ];
        for (name, help, value) in gauges {
            writer.gauge(name, help, None, one(value as f64))?;
        }
        let counters = [
            ("pages_scanned", "Scanned pages", engine.pages_scanned),
            ("merges", "Pages mapped to frames", engine.merges),
            ("breaks", "Merged pages that got private memory again after a write", engine.breaks),
            ("mappings_denied", "Runs not merged because of the limit on mappings", engine.mappings_denied),
            ("refusals", "System calls that failed", engine.refusals),
        ];
        for (name, help, value) in counters {
            writer.counter(name, help, None, one(value as f64))?;
        }
        let help = "CPU time of the sharing threads";
        writer.counter("sharing_cpu", help, Some(Unit::Seconds), one(engine.cpu_seconds))
    }

    fn workers(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let workers = &self.seen.sample.workers;
        let numbers: Vec<_> = workers.iter().map(|worker| worker.process.to_string()).collect();
        let labelled = |value: fn(&WorkerSample) -> f64| {
            let labels = numbers.iter().map(|number| [("worker", number.as_str())]);
            labels.zip(workers.iter().map(value))
        };
        let help = "Private pages of a worker process";
        let private = labelled(|worker| worker.private_bytes as f64);
        writer.gauge("worker_private", help, Some(Unit::Bytes), private)?;
        let help = "CPU time of a worker process, with that of the vCPUs";
        writer.counter("worker_cpu", help, Some(Unit::Seconds), labelled(|worker| worker.cpu_seconds))
    }

    fn cache(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let cache = views::cache(&self.seen.sample);
        let one = |value: u64| [([] as [(&str, &str); 0], value as f64)];
        let gauges = [
            ("cache", "Disk blocks that only the host holds", cache.cached_bytes),
            ("cache_limit", "Upper limit for cached disk blocks that no guest holds", cache.limit_bytes),
            ("cache_in_guests", "Disk blocks in frames that guests map", cache.in_guests_bytes),
        ];
        for (name, help, value) in gauges {
            writer.gauge(name, help, Some(Unit::Bytes), one(value))?;
        }
        let sources = [
            ("guests", cache.sources.guests_bytes),
            ("host", cache.sources.host_bytes),
            ("disk", cache.sources.disk_bytes),
        ];
        let values = sources.map(|(source, bytes)| ([("source", source)], bytes as f64));
        let help = "Data that guests read through the block cache, by source";
        writer.counter("cache_read", help, Some(Unit::Bytes), values)?;
        let help = "Cached blocks that were evicted for others or because of a lack of memory";
        writer.counter("cache_evictions", help, None, one(cache.statistics.evicted))
    }

    fn vms(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let page = PAGE_SIZE as u64;
        let memory: [(&str, &str, Count<VmSample>); 3] = [
            ("vm_resident", "Memory of a VM: private pages and its share of frames", |vm| vm.resident_bytes),
            ("vm_saved", "Memory that sharing saves for a VM, including pages of zeros", saved_bytes),
            ("vm_private", "A VM's private pages", |vm| vm.pages.pages_private * PAGE_SIZE as u64),
        ];
        let all = self.records.iter().map(|record| ([("vm", record.name())], record.spec().memory.0 as f64));
        writer.gauge("vm_memory", "A VM's memory", Some(Unit::Bytes), all)?;
        for (name, help, value) in memory {
            let vms = self.seen.sample.vms.iter();
            let values = vms.map(|vm| ([("vm", vm.name.as_str())], value(vm) as f64));
            writer.gauge(name, help, Some(Unit::Bytes), values)?;
        }
        let merged = self.seen.sample.vms.iter();
        let merged = merged.map(|vm| ([("vm", vm.name.as_str())], (vm.pages.pages_merged * page) as f64));
        writer.gauge("vm_merged", "A VM's pages that are mapped to frames", Some(Unit::Bytes), merged)?;
        let looks = || self.looks.iter().map(|(record, look)| (record.name(), look));
        let sent = looks().map(|(vm, look)| ([("vm", vm)], look.devices.console.sent_bytes as f64));
        writer.counter("vm_console", "Output of a guest to its console", Some(Unit::Bytes), sent)?;
        let cpu = looks().map(|(vm, look)| ([("vm", vm)], look.cpu_time.as_secs_f64()));
        writer.counter("vm_cpu", "CPU time of a VM's vCPUs", Some(Unit::Seconds), cpu)?;
        let vcpus =
            self.looks.iter().map(|(record, _)| ([("vm", record.name())], record.spec().vcpus.into()));
        writer.gauge("vm_vcpus", "Number of a VM's vCPUs", None, vcpus)?;
        let wanted = self.seen.sample.vms.iter().filter_map(|vm| {
            Some(([("vm", vm.name.as_str())], vm.working_set.as_ref()?.wanted_bytes as f64))
        });
        let help = "Additional memory that would save 95 % of the reads that more memory can save";
        writer.gauge("vm_wanted", help, Some(Unit::Bytes), wanted)?;
        let read = looks().flat_map(|(vm, look)| {
            let io = IoSample::of(&look.devices);
            let sources = [
                ("guests", io.from_guests_bytes),
                ("host", io.from_host_bytes),
                ("disk", io.from_disk_bytes),
            ];
            sources.map(|(source, bytes)| ([("vm", vm), ("source", source)], bytes as f64))
        });
        let help = "Data that a VM's disks read, by source";
        writer.counter("vm_disk_read", help, Some(Unit::Bytes), read)
    }

    /// Writes metrics of VMs with an agent that publishes page types.
    fn types(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let vms: Vec<(&str, &ClaimedSample)> = self
            .seen
            .sample
            .vms
            .iter()
            .filter_map(|vm| Some((vm.name.as_str(), vm.claimed.as_ref()?)))
            .filter(|(_, claimed)| claimed.publishing)
            .collect();
        let by_type = |value: fn(&TypeSample) -> f64| {
            vms.iter().flat_map(move |(vm, claimed)| {
                let types = claimed.types.iter();
                types.map(move |(one, counted)| ([("vm", *vm), ("type", one.name())], value(counted)))
            })
        };
        let help = "Pages of a VM by type, as published by the agent in the guest";
        writer.gauge("vm_type_pages", help, None, by_type(|one| one.pages as f64))?;
        let help = "Pages of a type that are mapped to frames";
        writer.gauge("vm_type_merged_pages", help, None, by_type(|one| one.pages_merged as f64))?;
        let help = "Pages of a type that sharing saves, including freed pages";
        writer.gauge("vm_type_saved_pages", help, None, by_type(|one| one.saved() as f64))?;
        let help = "Pages of a type that were mapped to frames";
        writer.counter("vm_type_merges", help, None, by_type(|one| one.merges as f64))?;
        let help = "Merged pages of a type that were written to";
        writer.counter("vm_type_breaks", help, None, by_type(|one| one.broken as f64))?;
        let help = "Total time that pages of a type were mapped to frames";
        writer.counter("vm_type_merged", help, Some(Unit::Seconds), by_type(|one| one.merged_seconds))?;
        let given_back = vms.iter().map(|(vm, claimed)| ([("vm", *vm)], claimed.given_back as f64));
        let help = "Free pages of a VM that were freed on the host";
        writer.counter("vm_given_back_pages", help, None, given_back)?;
        let passes = vms.iter().map(|(vm, claimed)| ([("vm", *vm)], claimed.passes as f64));
        writer.counter(
            "vm_agent_passes",
            "Passes of the agent in a VM that the engine has read",
            None,
            passes,
        )
    }

    fn networks(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let networks = self.looks.iter().flat_map(|(record, look)| {
            let networks = devices::networks_of(record, Some(&look.devices)).into_iter();
            networks.filter_map(move |network| Some((record.name(), network.id, network.statistics?)))
        });
        let networks: Vec<_> = networks.collect();
        let networks: Vec<_> = networks
            .iter()
            .map(|(vm, id, counted)| ([("vm", *vm), ("network", id.as_str())], counted))
            .collect();
        let bytes = || Some(Unit::Bytes);
        let counters: [Counter<&NetworkStatistics>; 7] = [
            ("network_received_frames", "Frames that the guest received", None, |net| net.received_frames),
            ("network_sent_frames", "Frames that the guest sent", None, |net| net.sent_frames),
            ("network_received", "Bytes of frames that the guest received", bytes(), |net| {
                net.received_bytes
            }),
            ("network_sent", "Bytes of frames that the guest sent", bytes(), |net| net.sent_bytes),
            ("network_received_dropped", "Frames for the guest that were dropped", None, |net| {
                net.received_dropped
            }),
            ("network_sent_dropped", "Frames of the guest that were dropped", None, |net| net.sent_dropped),
            ("network_errors", "How often the device or its link broke", None, |net| net.errors),
        ];
        writer.devices(&networks, counters)
    }

    fn sockets(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let sockets = self.looks.iter();
        let sockets: Vec<_> = sockets
            .filter_map(|(record, look)| Some(([("vm", record.name())], look.devices.vsock.clone()?)))
            .collect();
        let bytes = || Some(Unit::Bytes);
        let counters: [Counter<VsockStatistics>; 9] = [
            ("vsock_connections", "Connections that were opened", None, |vsock| vsock.connections),
            ("vsock_ended", "Connections that were opened and are over", None, |vsock| vsock.ended),
            ("vsock_resets", "Connections that the device refused, ended or broke", None, |vsock| {
                vsock.resets
            }),
            ("vsock_timeouts", "Programs of the host that waited too long for the guest", None, |vsock| {
                vsock.timeouts
            }),
            ("vsock_received_packets", "Packets for the guest", None, |vsock| vsock.received_packets),
            ("vsock_received", "Data for the guest", bytes(), |vsock| vsock.received_bytes),
            ("vsock_sent_packets", "Packets of the guest", None, |vsock| vsock.sent_packets),
            ("vsock_sent", "Data of the guest", bytes(), |vsock| vsock.sent_bytes),
            ("vsock_errors", "How often the socket device broke", None, |vsock| vsock.errors),
        ];
        writer.devices(&sockets, counters)
    }

    fn entropy(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let entropy = self.looks.iter();
        let entropy: Vec<_> = entropy
            .filter_map(|(record, look)| Some(([("vm", record.name())], look.devices.rng.clone()?)))
            .collect();
        let counters: [Counter<RngStatistics>; 4] = [
            ("rng_requests", "Requests for random bytes that were answered", None, |rng| rng.requests),
            ("rng", "Random bytes that the guest got", Some(Unit::Bytes), |rng| rng.bytes),
            ("rng_throttled", "Requests for random bytes that limits delayed", None, |rng| rng.throttled),
            ("rng_errors", "How often the entropy device broke", None, |rng| rng.errors),
        ];
        writer.devices(&entropy, counters)
    }

    fn balloons(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let balloons = self.looks.iter();
        let balloons: Vec<_> = balloons
            .filter_map(|(record, look)| Some(([("vm", record.name())], look.devices.balloon.as_ref()?)))
            .collect();
        type Gauge = (&'static str, &'static str, fn(&BalloonView) -> Option<u64>);
        fn guest(balloon: &BalloonView, get: fn(&GuestMemoryView) -> Option<u64>) -> Option<u64> {
            get(balloon.guest.as_ref()?)
        }
        let gauges: [Gauge; 6] = [
            ("balloon_size", "Memory that the guest is asked to give up", |balloon| Some(balloon.size_bytes)),
            ("balloon_actual", "Memory that the guest has given up, as it says", |balloon| {
                balloon.actual_bytes
            }),
            ("guest_total", "Memory that the guest has, as it says", |balloon| {
                guest(balloon, |memory| memory.total_bytes)
            }),
            ("guest_free", "Memory that the guest does not use, as it says", |balloon| {
                guest(balloon, |memory| memory.free_bytes)
            }),
            ("guest_available", "Memory that programs of the guest could have, as it says", |balloon| {
                guest(balloon, |memory| memory.available_bytes)
            }),
            ("guest_caches", "Memory of the guest's caches of disks, as it says", |balloon| {
                guest(balloon, |memory| memory.cache_bytes)
            }),
        ];
        for (name, help, value) in gauges {
            let known = balloons.iter().filter_map(|(labels, of)| Some((*labels, value(of)? as f64)));
            writer.gauge(name, help, Some(Unit::Bytes), known)?;
        }
        let counted = balloons.iter().filter_map(|(labels, of)| Some((*labels, of.statistics.clone()?)));
        let counted: Vec<_> = counted.collect();
        let counters: [Counter<BalloonStatistics>; 7] = [
            ("balloon_inflated_pages", "Pages that the guest put into the balloon", None, |pages| {
                pages.inflated_pages
            }),
            ("balloon_deflated_pages", "Pages that the guest took out of the balloon", None, |pages| {
                pages.deflated_pages
            }),
            ("balloon_reported_pages", "Pages that the guest reported as free", None, |pages| {
                pages.reported_pages
            }),
            ("balloon_hinted_pages", "Pages that the guest hinted at as free", None, |pages| {
                pages.hinted_pages
            }),
            ("balloon_freed_pages", "Pages whose memory the host got back", None, |pages| pages.freed_pages),
            ("balloon_invalid_pages", "Pages that the guest does not have", None, |pages| {
                pages.invalid_pages
            }),
            ("balloon_errors", "How often the balloon broke", None, |pages| pages.errors),
        ];
        writer.devices(&counted, counters)
    }

    fn disks(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let disks = self.looks.iter().flat_map(|(record, look)| {
            let disks = views::disks_of(record, Some(&look.devices)).into_iter();
            disks.filter_map(move |disk| Some((record.name(), disk.id, disk.statistics?)))
        });
        let disks: Vec<_> = disks.collect();
        let disks: Vec<_> =
            disks.iter().map(|(vm, id, counted)| ([("vm", *vm), ("disk", id.as_str())], counted)).collect();
        let counters: [Counter<&DiskStatistics>; 6] = [
            ("disk_reads", "Read requests that succeeded", None, |disk| disk.reads),
            ("disk_writes", "Write requests that succeeded", None, |disk| disk.writes),
            ("disk_flushes", "Flush requests that succeeded", None, |disk| disk.flushes),
            ("disk_errors", "Requests that failed", None, |disk| disk.errors),
            ("disk_read", "Bytes of successful reads", Some(Unit::Bytes), |disk| disk.read_bytes),
            ("disk_written", "Bytes of successful writes", Some(Unit::Bytes), |disk| disk.written_bytes),
        ];
        writer.devices(&disks, counters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_own_format_names_counters_as_their_samples() {
        let openmetrics = "# HELP samepage_vms VMs by state.\n# TYPE samepage_vms gauge\n\
            samepage_vms{state=\"running\"} 2.0\n\
            # HELP samepage_sharing_cpu_seconds CPU time.\n# TYPE samepage_sharing_cpu_seconds counter\n\
            # UNIT samepage_sharing_cpu_seconds seconds\nsamepage_sharing_cpu_seconds_total 0.5\n# EOF\n";
        let expected = "# HELP samepage_vms VMs by state.\n# TYPE samepage_vms gauge\n\
            samepage_vms{state=\"running\"} 2.0\n\
            # HELP samepage_sharing_cpu_seconds_total CPU time.\n\
            # TYPE samepage_sharing_cpu_seconds_total counter\nsamepage_sharing_cpu_seconds_total 0.5\n";
        assert_eq!(for_prometheus(openmetrics), expected);
    }
}
