//! `samepage report types`: what guests use their pages for, how much of each type is shared, and for how
//! long.
//!
//! - `source` reads the data from statistics or from a running process.
//! - `plot` draws the data over time.

mod plot;
mod source;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, bail};
use samepage_api_types::by_type::{ByType, TypeSample, present};
use samepage_api_types::views::pages::TypeView;
use samepage_sharing::PAGE_SIZE;
use serde::Serialize;

use super::Thinned;
use crate::args::TypesArgs;
use crate::table::{Table, mebibytes};
use crate::{print, print_json};
use samepage_process::tell::tell;

/// Default time for watching a process, in seconds.
const WATCHED: u32 = 10;

/// All VMs at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
struct Moment {
    /// Time in seconds since 1970.
    time: f64,
    vms: Vec<VmTypes>,
}

/// A VM at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
struct VmTypes {
    name: String,
    /// Whether an agent publishes page types.
    publishing: bool,
    /// Free pages that were freed on the host since the start, in bytes.
    given_back_bytes: u64,
    types: ByType<TypeSample>,
}

impl Moment {
    /// Returns the sums over all VMs.
    fn all(&self) -> ByType<TypeSample> {
        let mut all = ByType::default();
        self.vms.iter().for_each(|vm| all += vm.types);
        all
    }

    fn publishing(&self) -> usize {
        self.vms.iter().filter(|vm| vm.publishing).count()
    }
}

/// A run, by page type.
#[derive(Debug, Default)]
struct Run {
    /// The moments of the run.
    moments: Thinned<Moment>,
    /// The moment with the most agents, or of several such moments the last with the most VMs.
    state: Option<Moment>,
}

impl Run {
    fn add(&mut self, moment: Moment) {
        let rank = |moment: &Moment| (moment.publishing(), moment.vms.len());
        if self.state.as_ref().is_none_or(|state| rank(state) <= rank(&moment)) {
            self.state = Some(moment.clone());
        }
        // There may be no new sample.
        if self.moments.newest().is_none_or(|newest| newest.time < moment.time) {
            self.moments.add(moment);
        }
    }
}

pub(super) fn main(args: &TypesArgs) -> anyhow::Result<()> {
    let vm = args.vm.as_deref();
    let run = match &args.stats {
        Some(file) => source::read(file, vm)?,
        None => {
            let default = if args.output.is_some() { WATCHED } else { 0 };
            source::watch(&args.socket.client(), args.seconds.unwrap_or(default), vm)?
        }
    };
    let moments = run.moments.finish();
    let state = run.state.filter(|state| !state.vms.is_empty());
    let Some(state) = state else {
        match vm {
            Some(vm) => bail!("there is no VM {vm} with memory"),
            None => bail!("there are no VMs with memory"),
        }
    };
    if let Some(output) = &args.output {
        let picture = plot::draw(&moments, &state);
        if output == Path::new("-") {
            // Print no table in this case.
            return print(&picture);
        }
        super::write(output, picture.as_bytes())
            .with_context(|| format!("write the picture {}", output.display()))?;
        tell(format_args!("the picture is {}", output.display()));
    }
    if args.json { print_json(&Json::new(&moments, &state)) } else { print(&text(&state)) }
}

/// Returns the table as text.
fn text(state: &Moment) -> String {
    let mut table = Table::new(&[
        "VM",
        "TYPE",
        ">PAGES",
        ">SHARED",
        ">SAVED",
        ">GIVEN BACK",
        ">MERGES",
        ">BROKEN",
        ">MEAN LIFE",
    ]);
    for vm in &state.vms {
        add(&mut table, &vm.name, &vm.types);
    }
    if state.vms.len() > 1 {
        add(&mut table, "all VMs", &state.all());
    }
    let mut text = table.to_string();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "\nPages of 4 KiB; merges, breaks and lives since the first message of the agent in each guest."
    );
    let given_back = state.vms.iter().fold(0, |sum: u64, vm| sum.saturating_add(vm.given_back_bytes));
    let _ = writeln!(
        text,
        "{} of {} guests publish page types; {} of free pages were freed on the host since \
         the start.",
        state.publishing(),
        state.vms.len(),
        mebibytes(given_back)
    );
    text
}

/// Adds the rows of a VM, for types with pages.
fn add(table: &mut Table, name: &str, types: &ByType<TypeSample>) {
    let mut sum = TypeSample::default();
    let mut row = |name: &str, title: &str, one: &TypeSample| {
        let figures =
            [one.pages, one.pages_merged, one.pages_sharing, one.zero_pages, one.merges, one.broken];
        let figures = figures.map(|figure| figure.to_string());
        let life = match one.mean_life_seconds() {
            Some(life) => duration(life),
            // The average lifetime is longer than the time of observation.
            None if one.broken > 0 => format!("> {}", duration(one.watched_seconds)),
            None => "-".to_owned(),
        };
        table.row([name.to_owned(), title.to_owned()].into_iter().chain(figures).chain([life]));
    };
    let mut name = name;
    for (page_type, one) in types.iter().filter(|(_, one)| **one != TypeSample::default()) {
        row(name, page_type.name(), one);
        name = "";
        sum += *one;
    }
    row(name, "all types", &sum);
}

/// Returns a duration as text.
fn duration(seconds: f64) -> String {
    match seconds {
        ..1.0 => format!("{:.0} ms", seconds * 1e3),
        ..120.0 => format!("{seconds:.1} s"),
        ..7200.0 => format!("{:.1} min", seconds / 60.0),
        ..172_800.0 => format!("{:.1} h", seconds / 3600.0),
        _ => format!("{:.1} d", seconds / 86_400.0),
    }
}

/// The report as JSON.
#[derive(Debug, Serialize)]
struct Json<'a> {
    /// The time of all fields except `moments`.
    time_seconds: f64,
    vms: Vec<JsonVm<'a>>,
    all: ByType<TypeView>,
    /// The sums over all VMs at each moment.
    moments: Vec<JsonMoment>,
}

#[derive(Debug, Serialize)]
struct JsonVm<'a> {
    name: &'a str,
    publishing: bool,
    given_back_bytes: u64,
    types: ByType<TypeView>,
}

#[derive(Debug, Serialize)]
struct JsonMoment {
    time_seconds: f64,
    #[serde(with = "present")]
    types: ByType<JsonParts>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct JsonParts {
    bytes: u64,
    private_bytes: u64,
    shared_bytes: u64,
}

impl<'a> Json<'a> {
    fn new(moments: &[Moment], state: &'a Moment) -> Self {
        let vm = |vm: &'a VmTypes| JsonVm {
            name: &vm.name,
            publishing: vm.publishing,
            given_back_bytes: vm.given_back_bytes,
            types: vm.types.map(TypeView::from),
        };
        let bytes = |pages: u64| pages.saturating_mul(PAGE_SIZE as u64);
        let parts = |one: TypeSample| JsonParts {
            bytes: bytes(one.pages),
            private_bytes: bytes(one.pages_private),
            shared_bytes: bytes(one.pages_merged),
        };
        let moment =
            |moment: &Moment| JsonMoment { time_seconds: moment.time, types: moment.all().map(parts) };
        Self {
            time_seconds: state.time,
            vms: state.vms.iter().map(vm).collect(),
            all: state.all().map(TypeView::from),
            moments: moments.iter().map(moment).collect(),
        }
    }
}

/// Returns the VMs by name, over time.
fn series(moments: &[Moment]) -> BTreeMap<&str, Vec<(f64, &ByType<TypeSample>)>> {
    let mut series: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for moment in moments {
        for vm in &moment.vms {
            series.entry(vm.name.as_str()).or_default().push((moment.time, &vm.types));
        }
    }
    series
}

#[cfg(test)]
mod tests {
    use samepage_hole::PageType;

    use super::*;

    /// A VM with some pages of two types.
    pub(super) fn vm(name: &str, anonymous: u64, broken: u64) -> VmTypes {
        let sample = |pages: u64| TypeSample {
            pages,
            pages_private: pages / 2,
            pages_merged: pages / 4,
            pages_sharing: pages / 8,
            broken,
            merged_seconds: 300.0,
            watched_seconds: 500.0,
            ..TypeSample::default()
        };
        let free = TypeSample { pages: 100, zero_pages: 90, ..TypeSample::default() };
        let types = ByType { anonymous: sample(anonymous), free, ..ByType::default() };
        VmTypes { name: name.into(), publishing: true, given_back_bytes: 1 << 20, types }
    }

    #[test]
    fn a_table_has_each_vm_and_all() {
        let state = Moment { time: 0.0, vms: vec![vm("one", 1000, 0), vm("other", 3000, 100)] };
        let text = text(&state);
        let words: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(words[1], ["one", "anonymous", "1000", "250", "125", "0", "0", "0", "-"]);
        assert_eq!(words[2], ["free", "100", "0", "0", "90", "0", "0", "-"]);
        assert_eq!(words[4], ["other", "anonymous", "3000", "750", "375", "0", "0", "100", "3.0", "s"]);
        assert_eq!(words[7], ["all", "VMs", "anonymous", "4000", "1000", "500", "0", "0", "100", "6.0", "s"]);
        assert_eq!(words[9], ["all", "types", "4200", "1000", "500", "180", "0", "100", "6.0", "s"]);
        // A life longer than the time of observation is unknown.
        let young = vm("young", 1000, 1);
        let anonymous = TypeSample { watched_seconds: 180.0, ..young.types.anonymous };
        let types = ByType { anonymous, ..ByType::default() };
        let young = super::text(&Moment { time: 0.0, vms: vec![VmTypes { types, ..young }] });
        assert!(young.lines().nth(1).unwrap().ends_with("> 3.0 min"), "{young}");
        assert!(text.contains("2 of 2 guests publish") && text.contains("2.0 MiB of free pages"), "{text}");
        // A guest may publish any figures, and they must stay in their columns.
        let widest = text.lines().take(10).map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= 100, "{text}");
    }

    #[test]
    fn json_has_all_types_and_few_moments() {
        let moment = |time| Moment { time, vms: vec![vm("one", 1000, 1)] };
        let moments = [moment(1.0), moment(2.0)];
        let json = serde_json::to_value(Json::new(&moments, &moments[1])).unwrap();
        assert_eq!(json["vms"][0]["types"].as_object().unwrap().len(), PageType::ALL.len());
        assert_eq!(json["all"]["anonymous"]["mean_life_seconds"], 300.0);
        assert_eq!(json["all"]["slab"]["mean_life_seconds"], serde_json::Value::Null);
        assert_eq!(json["moments"][1]["types"]["anonymous"]["shared_bytes"], 250 * 4096);
        assert_eq!(json["moments"][1]["types"].as_object().unwrap().len(), 2);
    }

    #[test]
    fn the_state_is_that_with_the_most_agents() {
        let mut run = Run::default();
        let silent = VmTypes { publishing: false, ..vm("b", 10, 0) };
        run.add(Moment { time: 1.0, vms: vec![vm("a", 10, 0), silent.clone()] });
        run.add(Moment { time: 2.0, vms: vec![vm("a", 10, 0), silent.clone()] });
        run.add(Moment { time: 3.0, vms: vec![silent.clone(), silent] });
        assert_eq!(run.state.unwrap().time, 2.0);
        assert_eq!(run.moments.finish().len(), 3);
    }

    #[test]
    fn times_have_units() {
        let told = [0.25, 3.0, 150.0, 7200.0, 1e6].map(duration);
        assert_eq!(told, ["250 ms", "3.0 s", "2.5 min", "2.0 h", "11.6 d"]);
    }
}
