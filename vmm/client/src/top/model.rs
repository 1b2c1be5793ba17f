//! The state of `samepage top`: the last responses, rates between them, and the order of the rows.

use std::cmp::Ordering;
use std::collections::VecDeque;

use samepage_api_types::lifecycle::State;
use samepage_api_types::views::{EngineView, IoView, VmSummary};

use super::fetch::Snapshot;

/// Number of points in the chart over time.
const HISTORY: usize = 600;

/// A column for sorting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Name,
    State,
    Cpu,
    Memory,
    Resident,
    Shared,
    Saved,
    Wanted,
    Guests,
    Host,
    Disk,
}

impl Column {
    /// All columns in order.
    pub(super) const ALL: [Self; 11] = [
        Self::Name,
        Self::State,
        Self::Cpu,
        Self::Memory,
        Self::Resident,
        Self::Shared,
        Self::Saved,
        Self::Wanted,
        Self::Guests,
        Self::Host,
        Self::Disk,
    ];
}

/// A VM's reads per second in bytes, by source.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct ReadRates {
    pub(super) guests: f64,
    pub(super) host: f64,
    pub(super) disk: f64,
}

/// A VM. Unknown values are `None`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) state: State,
    /// CPU time in percent of one core.
    pub(super) cpu: Option<f64>,
    pub(super) memory: u64,
    pub(super) resident: Option<u64>,
    pub(super) shared: Option<u64>,
    pub(super) saved: Option<u64>,
    pub(super) wanted: Option<u64>,
    pub(super) reads: Option<ReadRates>,
}

/// The engine's rates per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct EngineRates {
    /// CPU time in percent of one core.
    pub(super) cpu: f64,
    pub(super) scanned: f64,
    pub(super) merged: f64,
    pub(super) broken: f64,
}

/// A point of the chart over time, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Moment {
    /// Time in seconds since 1970.
    pub(super) time: f64,
    pub(super) resident: f64,
    pub(super) saved: f64,
}

/// The data of the screen.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) socket: String,
    pub(super) latest: Option<Snapshot>,
    pub(super) rows: Vec<Row>,
    pub(super) engine: EngineRates,
    pub(super) reads: ReadRates,
    pub(super) history: VecDeque<Moment>,
    pub(super) sort: Column,
    pub(super) reversed: bool,
    /// Whether the help is shown.
    pub(super) help: bool,
    /// Whether the use of the selected VM's pages is shown.
    pub(super) types: bool,
    /// A message for the user, shown until the second next response.
    pub(super) message: Option<String>,
    message_age: u32,
    selected: Option<String>,
}

impl Model {
    pub(super) fn new(socket: String) -> Self {
        Self {
            socket,
            latest: None,
            rows: Vec::new(),
            engine: EngineRates::default(),
            reads: ReadRates::default(),
            history: VecDeque::new(),
            sort: Column::Name,
            reversed: false,
            help: false,
            types: false,
            message: None,
            message_age: 0,
            selected: None,
        }
    }

    /// Adds the next responses.
    pub(super) fn add(&mut self, snapshot: Snapshot) {
        let before = self.latest.take();
        let seconds = before.as_ref().map_or(0.0, |before| (snapshot.at - before.at).as_secs_f64());
        let find = |name: &str| before.as_ref()?.vms.iter().find(|vm| vm.name == name);
        self.rows = snapshot.vms.iter().map(|vm| Row::new(vm, find(&vm.name), seconds)).collect();
        if let Some(before) = &before {
            let (earlier, now) = (&before.sharing.statistics, &snapshot.sharing.statistics);
            if seconds > 0.0 {
                self.engine.cpu = (now.cpu_seconds - earlier.cpu_seconds).max(0.0) / seconds * 100.0;
            }
            // Samples have their own times, so use these for rates.
            let seconds = snapshot.sharing.time_seconds - before.sharing.time_seconds;
            if seconds > 0.0 {
                self.engine.count(earlier, now, seconds);
            }
        }
        self.reads = self.rows.iter().filter_map(|row| row.reads).fold(ReadRates::default(), |sum, vm| {
            ReadRates { guests: sum.guests + vm.guests, host: sum.host + vm.host, disk: sum.disk + vm.disk }
        });
        let moment = Moment {
            time: snapshot.sharing.time_seconds,
            resident: snapshot.sharing.resident_bytes as f64,
            saved: snapshot.sharing.saved_bytes as f64,
        };
        if self.history.back().is_none_or(|last| last.time < moment.time) {
            self.history.push_back(moment);
        }
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
        self.message_age += 1;
        if self.message_age > 4 {
            self.message = None;
        }
        self.latest = Some(snapshot);
        self.order();
    }

    /// Shows a message.
    pub(super) fn say(&mut self, message: String) {
        // Names from guests and files must not contain control characters for the terminal.
        self.message = Some(message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect());
        self.message_age = 0;
    }

    /// Returns the selected VM's row number.
    pub(super) fn selected_row(&self) -> Option<usize> {
        let name = self.selected.as_deref();
        self.rows
            .iter()
            .position(|row| Some(row.name.as_str()) == name)
            .or((!self.rows.is_empty()).then_some(0))
    }

    /// Returns the selected VM.
    pub(super) fn selected(&self) -> Option<&Row> {
        self.selected_row().map(|row| &self.rows[row])
    }

    /// Returns the VM whose pages should be requested.
    pub(super) fn pages_of(&self) -> Option<String> {
        self.selected().filter(|_| self.types).map(|row| row.name.clone())
    }

    /// Moves the selection down by this number of rows.
    pub(super) fn select(&mut self, down: isize) {
        let Some(row) = self.selected_row() else { return };
        let row = row.saturating_add_signed(down).min(self.rows.len() - 1);
        self.selected = Some(self.rows[row].name.clone());
    }

    pub(super) fn sort_by_next(&mut self) {
        self.turn(1);
    }

    pub(super) fn sort_by_previous(&mut self) {
        self.turn(Column::ALL.len() - 1);
    }

    fn turn(&mut self, columns: usize) {
        let now = Column::ALL.iter().position(|column| *column == self.sort).unwrap_or(0);
        self.sort = Column::ALL[(now + columns) % Column::ALL.len()];
        self.reversed = false;
        self.order();
    }

    pub(super) fn reverse(&mut self) {
        self.reversed = !self.reversed;
        self.order();
    }

    fn order(&mut self) {
        // The selection stays on its VM.
        self.selected = self.selected().map(|row| row.name.clone());
        let (sort, reversed) = (self.sort, self.reversed);
        self.rows.sort_by(|one, other| {
            let order = sort.compare(one, other);
            if reversed { order.reverse() } else { order }.then_with(|| natural(&one.name, &other.name))
        });
    }
}

impl Column {
    /// Sorts names from a to z, numbers from the largest down, and unknown values to the end.
    fn compare(self, one: &Row, other: &Row) -> Ordering {
        let reads = |of: fn(&ReadRates) -> f64| {
            let value = |row: &Row| row.reads.as_ref().map_or(-1.0, of);
            value(other).total_cmp(&value(one))
        };
        match self {
            Self::Name => natural(&one.name, &other.name),
            Self::State => one.state.name().cmp(other.state.name()),
            Self::Cpu => other.cpu.unwrap_or(-1.0).total_cmp(&one.cpu.unwrap_or(-1.0)),
            Self::Memory => other.memory.cmp(&one.memory),
            Self::Resident => other.resident.cmp(&one.resident),
            Self::Shared => other.shared.cmp(&one.shared),
            Self::Saved => other.saved.cmp(&one.saved),
            Self::Wanted => other.wanted.cmp(&one.wanted),
            Self::Guests => reads(|reads| reads.guests),
            Self::Host => reads(|reads| reads.host),
            Self::Disk => reads(|reads| reads.disk),
        }
    }
}

/// Compares names in natural order: vm-2 before vm-10.
fn natural(one: &str, other: &str) -> Ordering {
    let key = |name: &str| {
        let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count();
        let (stem, number) = name.split_at(name.len() - digits);
        (stem.to_owned(), number.trim_start_matches('0').len(), number.to_owned())
    };
    key(one).cmp(&key(other))
}

impl Row {
    fn new(vm: &VmSummary, before: Option<&VmSummary>, seconds: f64) -> Self {
        let rate =
            |now: f64, before: f64| if seconds > 0.0 { (now - before).max(0.0) / seconds } else { 0.0 };
        let cpu = vm.cpu_seconds.zip(before.and_then(|before| before.cpu_seconds));
        let reads = vm.io.as_ref().zip(before.and_then(|before| before.io.as_ref()));
        Self {
            name: vm.name.clone(),
            state: vm.state,
            cpu: cpu.map(|(now, before)| 100.0 * rate(now, before)),
            memory: vm.memory_bytes,
            resident: vm.resident_bytes,
            shared: vm.shared_bytes,
            saved: vm.saved_bytes,
            wanted: vm.wanted_bytes,
            reads: reads.map(|(now, before)| {
                let of = |bytes: fn(&IoView) -> u64| rate(bytes(now) as f64, bytes(before) as f64);
                ReadRates {
                    guests: of(|io| io.from_guests_bytes),
                    host: of(|io| io.from_host_bytes),
                    disk: of(|io| io.from_disk_bytes),
                }
            }),
        }
    }
}

impl EngineRates {
    /// Computes the rates between two samples.
    fn count(&mut self, before: &EngineView, now: &EngineView, seconds: f64) {
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        self.scanned = rate(now.pages_scanned, before.pages_scanned);
        self.merged = rate(now.merges, before.merges);
        self.broken = rate(now.breaks, before.breaks);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::{Duration, Instant};

    use samepage_api_types::by_type::{ByType, TypeSample};
    use samepage_api_types::views::pages::{TypeView, VmPagesView};
    use samepage_api_types::views::{CacheSources, CacheView, PairView, SharingView};
    use samepage_spec::SharingMode;

    use super::*;

    /// Returns a snapshot of a server's VMs at this number of seconds after the start.
    pub(in super::super) fn snapshot(start: Instant, seconds: u64, vms: u64) -> Snapshot {
        let mib = 1 << 20;
        let vm = |index: u64| VmSummary {
            name: format!("vm-{index}"),
            state: if index == 2 { State::Paused } else { State::Running },
            since_time_seconds: 0.0,
            reason: None,
            memory_bytes: 128 * mib,
            vcpus: 2,
            worker: None,
            group: "default".into(),
            mode: SharingMode::Full,
            resident_bytes: Some((40 + index) * mib),
            saved_bytes: Some((60 - index) * mib),
            shared_bytes: Some(70 * mib),
            private_bytes: Some(20 * mib),
            zero_bytes: Some(5 * mib),
            wanted_bytes: (index == 0).then_some(12 * mib),
            sharing_stopped: None,
            cpu_seconds: Some(seconds as f64 * (index as f64 + 1.0) / 10.0),
            io: Some(IoView {
                from_guests_bytes: seconds * mib * index,
                from_host_bytes: 0,
                from_disk_bytes: seconds * 4096,
                written_bytes: 0,
            }),
        };
        let statistics = EngineView {
            pages_scanned: 1000 * seconds,
            merges: 100 * seconds,
            breaks: 3 * seconds,
            mappings: 1234,
            mappings_limit: 65530,
            cpu_seconds: seconds as f64 * 0.05,
            ..EngineView::default()
        };
        let sharing = SharingView {
            enabled: true,
            settings: None,
            time_seconds: 1e9 + seconds as f64,
            guest_bytes: vms * 128 * mib,
            resident_bytes: vms * 50 * mib,
            private_bytes: vms * 30 * mib,
            saved_bytes: vms * (40 + seconds % 20) * mib,
            overhead_bytes: vms * mib / 10,
            statistics,
            groups: Vec::new(),
            pairs: Vec::<PairView>::new(),
            workers: Vec::new(),
        };
        let cache = CacheView {
            enabled: true,
            time_seconds: sharing.time_seconds,
            cached_bytes: 32 * mib,
            limit_bytes: 512 * mib,
            in_guests_bytes: 64 * mib,
            sources: CacheSources::default(),
            statistics: samepage_api_types::views::CacheCounters::default(),
        };
        let sample = TypeSample {
            pages: 1024,
            pages_merged: 512,
            broken: 2,
            merged_seconds: 9.0,
            watched_seconds: 60.0,
            ..TypeSample::default()
        };
        let types = ByType { anonymous: sample, ..ByType::default() };
        let pages = VmPagesView {
            time_seconds: Some(sharing.time_seconds),
            publishing: true,
            agent: None,
            given_back_bytes: mib,
            types: Some(types.map(TypeView::from)),
        };
        Snapshot {
            at: start + Duration::from_secs(seconds),
            vms: (0..vms).map(vm).collect(),
            sharing,
            cache,
            pages: Some(("vm-0".into(), pages)),
        }
    }

    /// Returns a model after one minute.
    pub(in super::super) fn model(vms: u64) -> Model {
        let start = Instant::now();
        let mut model = Model::new("/run/samepage.sock".into());
        (0..60).for_each(|second| model.add(snapshot(start, second, vms)));
        model
    }

    fn names(model: &Model) -> Vec<&str> {
        model.rows.iter().map(|row| row.name.as_str()).collect()
    }

    #[test]
    fn rates_are_of_the_time_between_two_answers() {
        let model = model(3);
        assert!((model.rows[1].cpu.unwrap() - 20.0).abs() < 0.1, "{:?}", model.rows[1]);
        assert!((model.rows[2].reads.unwrap().guests - f64::from(2 << 20)).abs() < 1.0);
        assert!((model.engine.cpu - 5.0).abs() < 0.1 && (model.engine.merged - 100.0).abs() < 0.1);
        assert!((model.reads.disk - 3.0 * 4096.0).abs() < 1.0);
        assert_eq!(model.history.len(), 60);
    }

    #[test]
    fn cpu_time_goes_on_between_looks_at_memory() {
        let start = Instant::now();
        let mut model = Model::new("/s".into());
        model.add(snapshot(start, 0, 2));
        model.add(snapshot(start, 1, 2));
        let mut between = snapshot(start, 2, 2);
        // There was no new sample.
        between.sharing.time_seconds = 1e9 + 1.0;
        between.sharing.statistics =
            EngineView { cpu_seconds: 0.3, ..snapshot(start, 1, 2).sharing.statistics };
        model.add(between);
        assert!((model.engine.cpu - 25.0).abs() < 0.1 && (model.engine.scanned - 1000.0).abs() < 0.1);
        assert!((model.rows[1].cpu.unwrap() - 20.0).abs() < 0.1, "{:?}", model.rows[1]);
        assert_eq!(model.history.len(), 2);
    }

    #[test]
    fn a_vm_that_was_booted_anew_has_no_negative_rate() {
        let mut model = model(1);
        let mut anew = snapshot(model.latest.as_ref().unwrap().at, 1, 1);
        anew.vms[0].cpu_seconds = Some(0.0);
        model.add(anew);
        assert_eq!(model.rows[0].cpu, Some(0.0));
    }

    #[test]
    fn rows_are_ordered_and_the_selection_goes_along() {
        let mut model = model(12);
        assert_eq!(names(&model)[9..], ["vm-9", "vm-10", "vm-11"]);
        model.select(1);
        assert_eq!(model.selected().unwrap().name, "vm-1");
        (0..2).for_each(|_| model.sort_by_next());
        assert_eq!(model.sort, Column::Cpu);
        assert_eq!(names(&model)[..2], ["vm-11", "vm-10"]);
        assert_eq!(model.selected_row(), Some(10));
        model.reverse();
        assert_eq!((names(&model)[0], model.selected_row()), ("vm-0", Some(1)));
        model.sort_by_previous();
        assert_eq!((model.sort, model.reversed), (Column::State, false));
        model.select(isize::MAX);
        assert_eq!(model.selected_row(), Some(11));
        model.select(isize::MIN);
        assert_eq!(model.selected_row(), Some(0));
    }

    #[test]
    fn a_selected_vm_may_go() {
        let mut model = model(3);
        model.select(2);
        model.add(snapshot(Instant::now() + Duration::from_secs(100), 61, 1));
        assert_eq!(model.selected().unwrap().name, "vm-0");
        model.add(snapshot(Instant::now() + Duration::from_secs(101), 62, 0));
        assert_eq!((model.selected(), model.selected_row()), (None, None));
        model.select(1);
    }

    #[test]
    fn messages_are_plain_and_go() {
        let mut model = model(1);
        model.say("a\x1b[31mb".into());
        assert_eq!(model.message.as_deref(), Some("a [31mb"));
        (61..70).for_each(|second| model.add(snapshot(Instant::now(), second, 1)));
        assert_eq!(model.message, None);
    }
}
