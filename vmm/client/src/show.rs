//! Commands that show the present state.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::socket::Client;
use hyper::Method;
use samepage_api_types::views::devices::BalloonView;
use samepage_api_types::views::{CacheView, SharingView, VmSharingView, VmSummary, VmView};
use samepage_sharing::PAGE_SIZE;
use samepage_text::counted::counted;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::args::{BalloonArgs, Connection, ListArgs, ModeArg, PsArgs, SharingArgs, VmArgs};
use super::table::{Table, ago, maybe_mebibytes, mebibytes};
use super::{client, print, print_json, vm_path};

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// Prints the resource at a path: as JSON, or as formatted by `text`.
fn answer<T: DeserializeOwned + Serialize>(
    connection: &Connection,
    path: &str,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    let client = client(connection);
    if connection.json {
        return print_json(&client.get::<Value>(path)?);
    }
    print(&text(&client.get(path)?))
}

pub(super) fn list(args: &PsArgs) -> anyhow::Result<()> {
    let state = args.state.map(|state| ("state", state.name()));
    let group = args.group.as_deref().map(|group| ("group", group));
    let name = args.name.as_deref().map(|name| ("name", name));
    // The values contain only letters that need no escaping in a query.
    let query: Vec<_> =
        [state, group, name].into_iter().flatten().map(|(key, value)| format!("{key}={value}")).collect();
    let path = if query.is_empty() { "/vms".to_owned() } else { format!("/vms?{}", query.join("&")) };
    answer(&args.connection, &path, |vms: &Vec<VmSummary>| {
        let mut table = Table::new(&[
            "NAME",
            "STATE",
            ">SINCE",
            ">VCPUS",
            ">MEMORY",
            ">RESIDENT",
            ">SAVED",
            "GROUP",
            "SHARING",
            "",
        ]);
        for vm in vms {
            table.row([
                vm.name.clone(),
                vm.state.name().to_owned(),
                ago(vm.since_time_seconds, now()),
                vm.vcpus.to_string(),
                mebibytes(vm.memory_bytes),
                maybe_mebibytes(vm.resident_bytes),
                maybe_mebibytes(vm.saved_bytes),
                vm.group.clone(),
                if vm.sharing_stopped.is_some() { "stopped".to_owned() } else { word(&vm.mode) },
                vm.reason.clone().or_else(|| vm.sharing_stopped.clone()).unwrap_or_default(),
            ]);
        }
        table.to_string()
    })
}

/// Returns a value's name in JSON.
fn word(value: &impl Serialize) -> String {
    let json = serde_json::to_value(value).unwrap_or_default();
    json.as_str().unwrap_or_default().to_owned()
}

pub(super) fn vm(args: &VmArgs) -> anyhow::Result<()> {
    answer(&args.connection, &vm_path(&args.vm)?, |vm: &VmView| {
        let VmView { summary, actions, config, console, disks, networks, vsock, rng, balloon } = vm;
        let actions: Vec<_> = actions.iter().map(|action| action.name()).collect();
        let mut table = Table::new(&["NAME", &summary.name]);
        let mut line = |name: &str, value: String| table.row([name.to_owned(), value]);
        line("state", format!("{} for {}", summary.state.name(), ago(summary.since_time_seconds, now())));
        if let Some(reason) = &summary.reason {
            line("because", reason.clone());
        }
        line("can", actions.join(", "));
        line(
            "vCPUs",
            summary.vcpus.to_string() + if config.smt { ", two threads of a core each" } else { "" },
        );
        line("memory", mebibytes(summary.memory_bytes));
        line("resident", maybe_mebibytes(summary.resident_bytes));
        line("saved", maybe_mebibytes(summary.saved_bytes));
        line("sharing", format!("{} in group {}", word(&summary.mode), summary.group));
        if let Some(why) = &summary.sharing_stopped {
            line("stopped", format!("sharing has stopped: {why}"));
        }
        if let Some(worker) = summary.worker {
            line("worker", format!("process {worker}"));
        }
        line("kernel", config.kernel.display().to_string());
        if let Some(initrd) = &config.initrd {
            line("initrd", initrd.display().to_string());
        }
        line("command line", config.cmdline.clone());
        if let Some(console) = console {
            line(
                "console",
                format!("{} written, {} lost", counted(console.sent_bytes, "byte"), console.lost_bytes),
            );
        }
        for disk in disks {
            let access = if disk.readonly { "read-only" } else { "read and written" };
            let figures = disk.statistics.as_ref().map_or_else(String::new, |figures| {
                let (read, written) = (mebibytes(figures.read_bytes), mebibytes(figures.written_bytes));
                let errors = counted(figures.errors, "error");
                format!(", {read} read, {written} written, {errors}")
            });
            let size = disk.size_bytes.map_or_else(String::new, |size| format!(" of {}", mebibytes(size)));
            line(&format!("disk {}", disk.id), format!("{}{size} {access}{figures}", disk.path));
        }
        for (network, described) in networks.iter().zip(&config.networks) {
            let state = match network.link_up {
                Some(true) => ", up",
                Some(false) => ", down",
                None => "",
            };
            let figures = network.statistics.as_ref().map_or_else(String::new, |figures| {
                let (read, written) = (mebibytes(figures.received_bytes), mebibytes(figures.sent_bytes));
                format!(", {read} received, {written} sent, {}", counted(figures.errors, "error"))
            });
            let other = if described.user { "the user's" } else { "a file" };
            let tap = network.tap.as_deref().unwrap_or(other);
            line(&format!("network {}", network.id), format!("{tap}, {}{state}{figures}", network.mac));
        }
        if let Some((vsock, described)) = vsock.as_ref().zip(config.vsock.as_ref()) {
            let (read, written) = (mebibytes(vsock.received_bytes), mebibytes(vsock.sent_bytes));
            let connections = counted(vsock.connections, "connection");
            let path = described.uds.display();
            line("vsock", format!("{path}, {connections}, {read} received, {written} sent"));
        }
        if let Some(rng) = rng {
            let errors = counted(rng.errors, "error");
            line("entropy", format!("{} of random numbers, {errors}", counted(rng.bytes, "byte")));
        }
        if let Some(balloon) = balloon {
            line("balloon", in_a_line(balloon));
        }
        table.to_string()
    })
}

/// Describes a balloon in a few words.
fn in_a_line(balloon: &BalloonView) -> String {
    let wanted = mebibytes(balloon.size_bytes);
    let actual = balloon.actual_bytes.map_or_else(|| "-".to_owned(), mebibytes);
    let driver = if balloon.active == Some(false) { ", no driver in the guest" } else { "" };
    let freed = balloon.statistics.as_ref().map_or_else(String::new, |counted| {
        format!(", {} given back so far", mebibytes(counted.freed_pages * PAGE_SIZE as u64))
    });
    format!("{actual} of {wanted}{driver}{freed}")
}

pub(super) fn balloon(args: &BalloonArgs) -> anyhow::Result<()> {
    let path = vm_path(&args.vm)? + "/balloon";
    if args.size.is_some() || args.stats_interval.is_some() {
        let client: Client = client(&args.connection);
        let change = json!({ "size": args.size, "stats_interval": args.stats_interval });
        let changed: Value = client.send(Method::PATCH, &path, &change)?;
        return if args.connection.json { print_json(&changed) } else { Ok(()) };
    }
    answer(&args.connection, &path, |balloon: &BalloonView| {
        let mut table = Table::new(&["BALLOON", &in_a_line(balloon)]);
        let on = |is_on: bool| if is_on { "on" } else { "off" }.to_owned();
        table.row(["deflate on OOM".to_owned(), on(balloon.deflate_on_oom)]);
        table.row(["reporting".to_owned(), on(balloon.reporting)]);
        table.row(["hinting".to_owned(), on(balloon.hinting)]);
        table.row(["stats interval".to_owned(), format!("{} s", balloon.stats_interval)]);
        let figures = [serde_json::to_value(&balloon.statistics), serde_json::to_value(&balloon.guest)];
        for (whose, figures) in ["", "guest "].into_iter().zip(figures) {
            let Ok(Value::Object(figures)) = figures else { continue };
            for (name, value) in figures {
                table.row([format!("{whose}{}", name.replace('_', " ")), value.to_string()]);
            }
        }
        table.to_string()
    })
}

pub(super) fn stats(args: &ListArgs) -> anyhow::Result<()> {
    let client = client(&args.connection);
    let vms: Vec<VmSummary> = client.get("/vms")?;
    let mut all = Vec::new();
    for vm in vms {
        // The VM may have been deleted meanwhile.
        if let Ok(sharing) = client.get::<VmSharingView>(&format!("/vms/{}/sharing", vm.name)) {
            all.push((vm, sharing));
        }
    }
    if args.connection.json {
        let all: Vec<_> = all
            .iter()
            .map(|(vm, sharing)| json!({ "name": vm.name, "state": vm.state, "sharing": sharing }))
            .collect();
        return print_json(&all);
    }
    let headings = [
        "NAME",
        "STATE",
        ">PAGES",
        ">PRIVATE",
        ">MERGED",
        ">SAVED",
        ">ZERO",
        ">UNIQUE",
        ">VOLATILE",
        ">MAPPINGS",
    ];
    let mut table = Table::new(&headings);
    for (vm, sharing) in &all {
        let counted = sharing.statistics.clone().unwrap_or_default();
        let figures = [
            counted.pages,
            counted.pages_private,
            counted.pages_merged,
            counted.pages_sharing,
            counted.zero_pages,
            counted.pages_unshared,
            counted.pages_volatile,
            counted.mappings,
        ];
        let known = sharing.statistics.is_some();
        let figures = figures.map(|figure| if known { figure.to_string() } else { "-".to_owned() });
        table.row([vm.name.clone(), vm.state.name().to_owned()].into_iter().chain(figures));
    }
    print(&table.to_string())
}

pub(super) fn sharing(args: &SharingArgs) -> anyhow::Result<()> {
    let Some(vm) = &args.vm else {
        return answer(&args.connection, "/sharing", process);
    };
    let path = vm_path(vm)? + "/sharing";
    if let Some(mode) = args.mode {
        let client: Client = client(&args.connection);
        let mode = match mode {
            ModeArg::Full => "full",
            ModeArg::Zero => "zero",
            ModeArg::Off => "off",
        };
        let changed: Value = client.send(Method::PATCH, &path, &json!({ "mode": mode }))?;
        return if args.connection.json { print_json(&changed) } else { Ok(()) };
    }
    answer(&args.connection, &path, |vm: &VmSharingView| {
        let mut table = Table::new(&["GROUP", &vm.group]);
        table.row(["mode".to_owned(), word(&vm.mode)]);
        table.row(["resident".to_owned(), maybe_mebibytes(vm.resident_bytes)]);
        if let Ok(Value::Object(counted)) = serde_json::to_value(&vm.statistics) {
            counted
                .into_iter()
                .for_each(|(name, value)| table.row([name.replace('_', " "), value.to_string()]));
        }
        table.to_string()
    })
}

pub(super) fn cache(args: &ListArgs) -> anyhow::Result<()> {
    answer(&args.connection, "/cache", |cache: &CacheView| {
        let CacheView { enabled, cached_bytes, limit_bytes, in_guests_bytes, sources, statistics, .. } =
            cache;
        let mut table = Table::new(&["CACHE", ""]);
        let mut line = |name: &str, value: String| table.row([name.to_owned(), value]);
        if !enabled {
            line("", "there is no cache, because this process shares no memory".to_owned());
        }
        line("held by the host", format!("{} of {}", mebibytes(*cached_bytes), mebibytes(*limit_bytes)));
        line("held by guests", mebibytes(*in_guests_bytes));
        let all = sources.guests_bytes + sources.host_bytes + sources.disk_bytes;
        for (name, bytes) in
            [("guests", sources.guests_bytes), ("host", sources.host_bytes), ("disk", sources.disk_bytes)]
        {
            let percent = 100.0 * bytes as f64 / all.max(1) as f64;
            line(&format!("read from {name}"), format!("{} ({percent:.1} %)", mebibytes(bytes)));
        }
        line("dropped", counted(statistics.evicted, "block"));
        table.to_string()
    })
}

fn process(sharing: &SharingView) -> String {
    let mut text = String::new();
    if !sharing.enabled {
        text.push_str("this process shares no memory\n");
    }
    for group in sharing.groups.iter().filter(|group| group.stopped) {
        let _ =
            writeln!(text, "sharing has stopped for group {}; see the log, or `samepage show`", group.name);
    }
    let figures = &sharing.statistics;
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "guest memory  {}\nresident      {}\nsaved         {}\noverhead      {}\nframes        {} for {}\n\
         zero pages    {}\nmappings      {} of {}\ncpu           {:.1} s\n",
        mebibytes(sharing.guest_bytes),
        mebibytes(sharing.resident_bytes),
        mebibytes(sharing.saved_bytes),
        mebibytes(sharing.overhead_bytes),
        figures.frames,
        counted(figures.pages_shared + figures.pages_sharing, "page"),
        figures.zero_pages,
        figures.mappings,
        figures.mappings_limit,
        figures.cpu_seconds,
    );
    if !sharing.workers.is_empty() {
        let private = sharing.workers.iter().map(|worker| worker.private_bytes).sum();
        let cpu: f64 = sharing.workers.iter().map(|worker| worker.cpu_seconds).sum();
        let workers = match sharing.workers.len() {
            1 => "1 process".to_owned(),
            count => format!("{count} processes"),
        };
        let _ = writeln!(text, "workers       {workers}, {} private, {cpu:.1} s", mebibytes(private));
    }
    text.push('\n');
    let mut table = Table::new(&["GROUP", ">SHARED", ">SHARING", ">ZERO", ">MERGES", ">SAVED"]);
    for group in &sharing.groups {
        let saved = mebibytes(group.saved_bytes);
        let figures = [group.pages_shared, group.pages_sharing, group.zero_pages, group.merges];
        let figures = figures.map(|figure| figure.to_string());
        table.row([group.name.clone()].into_iter().chain(figures).chain([saved]));
    }
    text.push_str(&table.to_string());
    if !sharing.pairs.is_empty() {
        let mut table = Table::new(&["VM", "VM", ">IN COMMON", ">PAGES", ""]);
        for pair in &sharing.pairs {
            let error = if pair.pages_error > 0 { format!("± {}", pair.pages_error) } else { String::new() };
            let common = mebibytes(pair.pages * PAGE_SIZE as u64);
            table.row(pair.vms.iter().cloned().chain([common, pair.pages.to_string(), error]));
        }
        let _ = write!(text, "\n{table}");
    }
    text
}
