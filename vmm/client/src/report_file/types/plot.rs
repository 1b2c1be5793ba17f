//! Draws pages by type over time as stacked areas. Each type has three shades: full for shared pages, half
//! for private memory, and faint for the rest.
//!
//! Lengths are in SVG user units.

use std::fmt::Write;
use std::ops::AddAssign;

use samepage_api_types::by_type::{ByType, TypeSample};
use samepage_hole::PageType;

use super::{Moment, series};
use samepage_text::picture::{Canvas, Scale};
use samepage_text::units::pages as amount;

const WIDTH: f64 = 960.0;
/// The chart of all VMs: left, top, width and height.
const ALL: [f64; 4] = [80.0, 64.0, 600.0, 320.0];
/// The left edge of the legend.
const LEGEND: f64 = 708.0;
/// The height of a legend entry.
const LEGEND_STEP: f64 = 38.0;
/// Charts of one VM each: width and height, and the distance to the next.
const ONE: [f64; 2] = [375.0, 130.0];
const ONE_STEP: [f64; 2] = [465.0, 200.0];
/// Limit for VMs with a chart.
const MOST_VMS: usize = 8;
/// Limits for the distinguishable moments, in the chart of all VMs and in a chart of one VM.
const MOST_MOMENTS: [usize; 2] = [400, 150];

/// From the bottom up: memory of processes, of files, of the kernel, and unused memory.
const STACK: [PageType; 9] = [
    PageType::Anonymous,
    PageType::FileMapped,
    PageType::FileUnmapped,
    PageType::Slab,
    PageType::PageTable,
    PageType::Compound,
    PageType::Unknown,
    PageType::Balloon,
    PageType::Free,
];

/// Colours of the types, as on the web page, and shades.
const STYLE: &str = "\
.anonymous { fill: #dd7f35; } .file_mapped { fill: #1f9d6b; } .file_unmapped { fill: #29a3b5; } \
.slab { fill: #8a63c9; } .page_table { fill: #d1549b; } .compound { fill: #c9a227; } \
.balloon { fill: #4d5f7a; } .unknown { fill: #93a4bd; } .free { fill: #aab4c3; } .any { fill: #5b6576; } \
.shared { fill-opacity: 1; } .own { fill-opacity: .5; } .rest { fill-opacity: .16; } \
.edge { fill: none; stroke: #ffffff; stroke-width: .8; } .small { font-size: 12px; } .muted { fill: #5b6576; } \
@media (prefers-color-scheme: dark) { \
.edge { stroke: #14181f; } .muted { fill: #9aa5b5; } .free { fill: #5a6577; } .any { fill: #9aa5b5; } }";

const TINTS: [(&str, &str); 3] =
    [("shared", "shared"), ("own", "memory of its own"), ("rest", "freed or never touched")];

/// The pages of a type.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Parts {
    shared: u64,
    own: u64,
    rest: u64,
}

impl Parts {
    fn of(sample: TypeSample) -> Self {
        let TypeSample { pages, pages_private: own, pages_merged: shared, .. } = sample;
        Self { shared, own, rest: pages.saturating_sub(shared.saturating_add(own)) }
    }

    fn in_order(&self) -> [u64; 3] {
        [self.shared, self.own, self.rest]
    }

    fn sum(&self) -> u64 {
        self.in_order().iter().fold(0, |sum, part| sum.saturating_add(*part))
    }
}

impl AddAssign for Parts {
    fn add_assign(&mut self, other: Self) {
        self.shared = self.shared.saturating_add(other.shared);
        self.own = self.own.saturating_add(other.own);
        self.rest = self.rest.saturating_add(other.rest);
    }
}

/// A moment, in seconds since the first moment.
type Point = (f64, ByType<Parts>);

/// Draws a run.
pub(super) fn draw(moments: &[Moment], state: &Moment) -> String {
    let start = moments.first().map_or(0.0, |moment| moment.time);
    let seconds = moments.last().map_or(0.0, |moment| moment.time - start);
    let all: Vec<Point> =
        moments.iter().map(|moment| (moment.time - start, moment.all().map(Parts::of))).collect();
    let of = match state.vms.as_slice() {
        [vm] => format!("VM {}", vm.name),
        vms => format!("{} VMs", vms.len()),
    };
    let headline = format!("What the pages of {of} are used for");
    let mut canvas = Canvas::default();
    canvas.text(20.0, 32.0, "title", &headline);
    panel(&mut canvas, ALL, &thin(&all, MOST_MOMENTS[0]), seconds);
    let bottom = legend(&mut canvas, &all, state);

    let series = series(moments);
    let mut vms: Vec<_> = state.vms.iter().filter(|vm| vm.publishing).collect();
    let with_agent = vms.len();
    vms.truncate(MOST_VMS);
    if state.vms.len() == 1 {
        vms.clear();
    }
    let mut top = bottom + 34.0;
    if with_agent > vms.len() && !vms.is_empty() {
        let text = format!("The first {} of {with_agent} VMs with an agent:", vms.len());
        canvas.text(20.0, top, "muted", &text);
        top += 30.0;
    }
    for (at, vm) in vms.iter().enumerate() {
        let (column, row) = (at % 2, at / 2);
        let left = ALL[0] + column as f64 * ONE_STEP[0];
        let top = top + row as f64 * ONE_STEP[1];
        let points = series.get(vm.name.as_str()).map_or(&[][..], Vec::as_slice);
        let points: Vec<Point> =
            points.iter().map(|(time, types)| (time - start, types.map(Parts::of))).collect();
        canvas.text(left, top, "", &vm.name);
        panel(&mut canvas, [left, top + 14.0, ONE[0], ONE[1]], &thin(&points, MOST_MOMENTS[1]), seconds);
    }
    let rows = vms.len().div_ceil(2);
    let height = if rows == 0 { bottom + 20.0 } else { top + rows as f64 * ONE_STEP[1] };
    canvas.finish([WIDTH, height], STYLE, &headline)
}

/// Returns at most this number of points, including the first and the last.
fn thin(points: &[Point], most: usize) -> Vec<Point> {
    let step = points.len().div_ceil(most).max(1);
    let last = points.len().saturating_sub(1);
    points
        .iter()
        .enumerate()
        .filter(|(at, _)| at % step == 0 || *at == last)
        .map(|(_, point)| *point)
        .collect()
}

/// Draws areas over time, with axes.
fn panel(canvas: &mut Canvas, [left, top, width, height]: [f64; 4], points: &[Point], seconds: f64) {
    let bottom = top + height;
    let total =
        |types: &ByType<Parts>| types.iter().fold(0, |sum: u64, (_, one)| sum.saturating_add(one.sum()));
    let most = points.iter().map(|(_, types)| total(types)).max().unwrap_or(0);
    let scale = Scale::linear(most as f64 * 4096.0, bottom, top);
    for tick in scale.ticks() {
        let y = scale.at(tick);
        canvas.line([left, y, left + width, y], "grid");
        canvas.text(left - 8.0, y + 4.0, "end small", &amount((tick / 4096.0) as u64));
    }
    let across = |time: f64| left + if seconds > 0.0 { time / seconds * width } else { 0.0 };
    for tick in times(seconds, width / 75.0) {
        canvas.line([across(tick), bottom, across(tick), bottom + 4.0], "axis");
        canvas.text(across(tick), bottom + 18.0, "middle small", &clock(tick));
    }
    // A single moment is drawn as a short time.
    let points: Vec<Point> = match points {
        [(_, types)] if seconds <= 0.0 => vec![(0.0, *types), (width, *types)],
        points => points.to_vec(),
    };
    let across = |time: f64| if seconds > 0.0 { across(time) } else { left + time };

    let mut below = vec![0_u64; points.len()];
    for page_type in STACK {
        let parts: Vec<[u64; 3]> = points.iter().map(|(_, types)| of(types, page_type).in_order()).collect();
        if parts.iter().flatten().all(|pages| *pages == 0) {
            continue;
        }
        for (tint, (class, name)) in TINTS.into_iter().enumerate() {
            let above: Vec<u64> =
                below.iter().zip(&parts).map(|(below, parts)| below.saturating_add(parts[tint])).collect();
            if above != below {
                let place = |at: usize, pages: u64| {
                    format!("{:.1},{:.1}", across(points[at].0), scale.at_pages(pages))
                };
                let mut path = String::from("M");
                for (at, pages) in above.iter().enumerate() {
                    // Writing to a string cannot fail.
                    let _ = write!(path, "{} ", place(at, *pages));
                }
                for (at, pages) in below.iter().enumerate().rev() {
                    let _ = write!(path, "{} ", place(at, *pages));
                }
                let last = parts.last().map_or(0, |parts| parts[tint]);
                let note = format!("{}, {name}: {} at the end", page_type.name(), amount(last));
                canvas.element(format_args!(
                    "<path class=\"{} {class}\" d=\"{}Z\"><title>{note}</title></path>",
                    page_type.name(),
                    path.trim_end()
                ));
            }
            below = above;
        }
        let mut edge = String::new();
        for ((time, _), pages) in points.iter().zip(&below) {
            let _ = write!(edge, "{:.1},{:.1} ", across(*time), scale.at_pages(*pages));
        }
        canvas.element(format_args!("<polyline class=\"edge\" points=\"{}\"/>", edge.trim_end()));
    }
    canvas.line([left, bottom, left + width, bottom], "axis");
}

fn of(types: &ByType<Parts>, wanted: PageType) -> Parts {
    types.iter().find(|(page_type, _)| *page_type == wanted).map_or_else(Parts::default, |(_, one)| *one)
}

/// Draws the legend, with figures of the moment with the complete state. Returns its end.
fn legend(canvas: &mut Canvas, all: &[Point], state: &Moment) -> f64 {
    let now = state.all();
    let mut y = ALL[1] + 4.0;
    for page_type in STACK.into_iter().rev() {
        if all.iter().all(|(_, types)| of(types, page_type) == Parts::default()) {
            continue;
        }
        let sample =
            now.iter().find(|(one, _)| *one == page_type).map_or_else(TypeSample::default, |(_, one)| *one);
        for (at, (tint, _)) in TINTS.iter().enumerate() {
            let place = [LEGEND + 9.0 * at as f64, y, 9.0, 12.0];
            canvas.rect(place, &format!("{} {tint}", page_type.name()), "");
        }
        canvas.text(LEGEND + 36.0, y + 10.0, "", page_type.name());
        let mut figures = amount(sample.pages);
        if sample.pages_merged > 0 {
            let _ = write!(figures, ", {} shared", amount(sample.pages_merged));
        }
        canvas.text(LEGEND + 36.0, y + 26.0, "small muted", &figures);
        y += LEGEND_STEP;
    }
    let bottom = (ALL[1] + ALL[3] + 48.0).max(y + 10.0);
    let mut x = ALL[0];
    for (tint, name) in TINTS {
        canvas.rect([x, bottom - 11.0, 14.0, 12.0], &format!("any {tint}"), "");
        canvas.text(x + 20.0, bottom, "small", name);
        x += 52.0 + 6.6 * name.len() as f64;
    }
    bottom
}

/// Returns the ticks of a time axis at steps of seconds, minutes or hours.
fn times(seconds: f64, most: f64) -> impl Iterator<Item = f64> {
    const STEPS: [f64; 15] = [
        1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 14_400.0, 43_200.0,
        86_400.0,
    ];
    let step = STEPS.into_iter().find(|step| seconds / step <= most);
    let step = step.unwrap_or_else(|| 86_400.0 * (seconds / 86_400.0 / most).ceil());
    let marks = if seconds > 0.0 { (seconds / step) as u32 } else { 0 };
    (0..=marks).map(move |mark| f64::from(mark) * step)
}

fn clock(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..7200 if whole.is_multiple_of(60) => format!("{} min", whole / 60),
        60..7200 => format!("{}:{:02} min", whole / 60, whole % 60),
        _ if whole.is_multiple_of(3600) => format!("{} h", whole / 3600),
        _ => format!("{}:{:02} h", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::super::VmTypes;
    use super::super::tests::vm;
    use super::*;

    fn moments(count: u32, vms: u64) -> Vec<Moment> {
        let moment = |time: u32| Moment {
            time: f64::from(time),
            vms: (0..vms).map(|at| vm(&format!("vm-{at}"), 1000 + 10 * u64::from(time), 0)).collect(),
        };
        (0..count).map(moment).collect()
    }

    fn picture(moments: &[Moment]) -> String {
        draw(moments, moments.last().unwrap())
    }

    #[test]
    fn each_type_that_there_is_has_areas_and_a_name() {
        let svg = picture(&moments(100, 1));
        assert_eq!(svg.matches("<path class=\"anonymous").count(), 3, "{svg}");
        assert_eq!(svg.matches("<path class=\"free rest").count(), 1);
        assert_eq!(svg.matches("<path").count(), 4);
        assert!(svg.contains(">anonymous<") && !svg.contains(">slab<"), "{svg}");
    }

    #[test]
    fn vms_have_pictures_of_their_own_as_far_as_there_is_room() {
        assert_eq!(picture(&moments(10, 2)).matches("<path class=\"free rest").count(), 3);
        let many = picture(&moments(10, 30));
        assert_eq!(many.matches("<path class=\"free rest").count(), 9);
        assert!(many.contains("The first 8 of 30 VMs"));
    }

    #[test]
    fn what_may_be_strange_is_drawn() {
        let mut odd = moments(1, 1);
        assert!(picture(&odd).contains("<path"));
        odd[0].vms[0].name = "<a&\u{1}>".into();
        odd[0].vms[0].types.slab =
            TypeSample { pages: u64::MAX, pages_merged: u64::MAX, ..TypeSample::default() };
        odd.push(Moment { time: 1e9, vms: vec![VmTypes::default()] });
        let svg = picture(&odd);
        assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("<a&"), "{svg}");
    }

    #[test]
    fn a_long_run_is_not_a_large_picture() {
        let svg = picture(&moments(1200, 8));
        assert!(svg.len() < 400 << 10, "{}", svg.len());
    }

    #[test]
    fn marks_on_the_axis_are_few_and_round() {
        for seconds in [0.0, 3.0, 59.0, 700.0, 7000.0, 1e5, 1e7] {
            let marks: Vec<_> = times(seconds, 8.0).collect();
            assert!((1..=9).contains(&marks.len()), "{seconds}: {marks:?}");
        }
        assert_eq!([90.0, 150.0, 600.0, 9000.0].map(clock), ["1:30 min", "2:30 min", "10 min", "2:30 h"]);
    }
}
