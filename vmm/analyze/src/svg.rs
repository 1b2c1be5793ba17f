//! Draws the result: each VM's memory by class, runs by length, and savings by the number of mappings.
//!
//! Lengths are in SVG user units.

use std::fmt::Write;

use crate::oracle::{Classes, ImageReport, PAGE_SIZE, Report};

use samepage_text::picture::{Canvas, Scale};
use samepage_text::units::{bytes, count, pages, percent};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 240.0;
const RIGHT: f64 = 900.0;
/// Height of a VM's bar, and distance to the next.
const BAR: f64 = 18.0;
const BAR_STEP: f64 = 26.0;
/// Height of a chart.
const CHART: f64 = 220.0;
/// Limit for readable bars. The other VMs share one bar.
const MOST_BARS: usize = 64;
/// Longest name beside a bar, in letters.
const NAME: usize = 27;

/// The style of the classes of pages and of the curve.
const STYLE: &str = "\
.curve { fill: none; stroke: #1f7a4d; stroke-width: 2.5; } \
.untouched { fill: #e6e9ef; } .zero { fill: #a9b4c6; } .between { fill: #1f7a4d; } .within { fill: #68bb8c; } \
.unique { fill: #d9772b; } .unread { fill: #8a5aa8; } \
@media (prefers-color-scheme: dark) { \
.curve { stroke: #3fae74; } .untouched { fill: #2a303b; } .zero { fill: #66728a; } .between { fill: #3fae74; } \
.within { fill: #1f6b45; } .unique { fill: #e08a45; } .unread { fill: #a97cc6; } }";

/// Draws a report as an SVG document.
pub(super) fn draw(report: &Report) -> String {
    let mut canvas = Canvas::default();
    let saved = format!(
        "{} of {} in use can be saved by sharing",
        bytes(report.saved_bytes),
        pages(report.total.in_use())
    );
    canvas.text(20.0, 30.0, "title", &saved);
    let top = bars(&mut canvas, report, 60.0);
    let top = histogram(&mut canvas, report, top + 50.0);
    let bottom = curve(&mut canvas, report, top + 50.0);
    canvas.finish([WIDTH, bottom + 20.0], STYLE, &saved)
}

/// Draws a bar for each VM.
fn bars(canvas: &mut Canvas, report: &Report, top: f64) -> f64 {
    canvas.text(20.0, top, "title", "Memory by class of pages");
    let legend = [
        ("between", "duplicates between VMs"),
        ("within", "within a VM"),
        ("zero", "zeros"),
        ("unique", "unique"),
        ("unread", "not read"),
        ("untouched", "untouched"),
    ];
    let mut x = 20.0;
    for (class, name) in legend {
        canvas.rect([x, top + 15.0, 12.0, 12.0], class, "");
        canvas.text(x + 18.0, top + 26.0, "", name);
        x += 44.0 + 7.0 * name.len() as f64;
    }

    let images = shown(report);
    let largest = images.iter().map(|image| image.classes.pages).max().unwrap_or(0);
    let scale = Scale::linear(largest as f64 * PAGE_SIZE as f64, LEFT, RIGHT);
    let first = top + 44.0;
    let bottom = first + images.len() as f64 * BAR_STEP;
    for tick in scale.ticks() {
        canvas.line([scale.at(tick), first - 4.0, scale.at(tick), bottom], "grid");
        canvas.text(scale.at(tick), bottom + 16.0, "middle", &bytes(tick as u64));
    }
    for (index, image) in images.iter().enumerate() {
        let y = first + index as f64 * BAR_STEP;
        canvas.text(LEFT - 10.0, y + 14.0, "end", &shorten(&image.name));
        let Classes { pages: _, untouched, unread, zero, between, within, unique } = image.classes;
        let parts = [between, within, zero, unique, unread, untouched];
        let mut start = 0;
        for ((class, name), part) in legend.iter().zip(parts) {
            let (from, to) = (scale.at_pages(start), scale.at_pages(start.saturating_add(part)));
            if part > 0 {
                let note = format!(
                    "{}: {name}, {}, {:.1} %",
                    image.name,
                    pages(part),
                    percent(part, image.classes.pages)
                );
                canvas.rect([from, y, to - from, BAR], class, &note);
            }
            start = start.saturating_add(part);
        }
    }
    canvas.text((LEFT + RIGHT) / 2.0, bottom + 36.0, "middle", "memory");
    bottom + 36.0
}

/// Returns the VMs, or as many as fit and a sum of the others.
fn shown(report: &Report) -> Vec<ImageReport> {
    let mut images = report.images.clone();
    if images.len() > MOST_BARS {
        let rest = images.split_off(MOST_BARS - 1);
        let mut all = rest[0].clone();
        all.name = format!("{} more", rest.len());
        for image in &rest[1..] {
            all.classes += image.classes;
        }
        images.push(all);
    }
    images
}

/// Draws duplicate pages by the length of their run.
fn histogram(canvas: &mut Canvas, report: &Report, top: f64) -> f64 {
    canvas.text(20.0, top, "title", "Duplicate pages by the length of their run");
    let (first, bottom) = (top + 30.0, top + 30.0 + CHART);
    let buckets = &report.runs.buckets;
    let most = buckets.iter().map(|bucket| bucket.pages).max().unwrap_or(0);
    let scale = Scale::linear(most as f64 * PAGE_SIZE as f64, bottom, first);
    vertical_axis(canvas, &scale, "memory in such runs");
    let step = (RIGHT - LEFT) / buckets.len() as f64;
    for (index, bucket) in buckets.iter().enumerate() {
        let x = LEFT + (index as f64 + 0.5) * step;
        let y = scale.at_pages(bucket.pages);
        let runs = format!("{} runs", count(bucket.runs));
        canvas.rect(
            [x - step * 0.35, y, step * 0.7, bottom - y],
            "between",
            &format!("{runs}, {}", pages(bucket.pages)),
        );
        canvas.text(x, y - 6.0, "middle", &runs);
        let length = match bucket.to_pages {
            Some(to) if to == bucket.from_pages => to.to_string(),
            Some(to) => format!("{}–{to}", bucket.from_pages),
            None => format!("{}+", bucket.from_pages),
        };
        canvas.text(x, bottom + 18.0, "middle", &length);
    }
    canvas.line([LEFT, bottom, RIGHT, bottom], "axis");
    canvas.text(
        (LEFT + RIGHT) / 2.0,
        bottom + 40.0,
        "middle",
        "length of a run, in pages (each run costs two mappings)",
    );
    bottom + 40.0
}

/// Draws the savings of duplicates over the number of mappings, longest runs first.
fn curve(canvas: &mut Canvas, report: &Report, top: f64) -> f64 {
    canvas.text(
        20.0,
        top,
        "title",
        "Savings by number of mappings: longest runs first, without pages of zeros",
    );
    let (first, bottom) = (top + 30.0, top + 30.0 + CHART);
    let last = report.curve.last().copied();
    let most = last.map_or(0, |point| point.saved_bytes);
    let scale = Scale::linear(most as f64, bottom, first);
    vertical_axis(canvas, &scale, "saved by duplicates");
    let most_mappings = last.map_or(0, |point| point.mappings).max(10);
    let across = |mappings: u64| {
        let part = (mappings.max(1) as f64).ln() / (most_mappings as f64).ln();
        LEFT + part * (RIGHT - LEFT)
    };
    for power in (0..20).map(|power| 10_u64.pow(power)).take_while(|&power| power <= most_mappings) {
        canvas.line([across(power), first, across(power), bottom], "grid");
        canvas.text(across(power), bottom + 18.0, "middle", &count(power));
    }
    let mut points = String::new();
    for point in &report.curve {
        // Writing to a string cannot fail.
        let _ = write!(points, "{:.1},{:.1} ", across(point.mappings), scale.at(point.saved_bytes as f64));
    }
    canvas.element(format_args!("<polyline class=\"curve\" points=\"{}\"/>", points.trim_end()));
    canvas.line([LEFT, bottom, RIGHT, bottom], "axis");
    canvas.text((LEFT + RIGHT) / 2.0, bottom + 40.0, "middle", "mappings");
    bottom + 40.0
}

fn vertical_axis(canvas: &mut Canvas, scale: &Scale, title: &str) {
    for tick in scale.ticks() {
        canvas.line([LEFT, scale.at(tick), RIGHT, scale.at(tick)], "grid");
        canvas.text(LEFT - 10.0, scale.at(tick) + 4.0, "end", &bytes(tick as u64));
    }
    canvas.text(20.0, (scale.from + scale.to) / 2.0, "", title);
}

/// Shortens a name at its start, because the end says more.
fn shorten(name: &str) -> String {
    let length = name.chars().count();
    if length <= NAME {
        return name.to_owned();
    }
    let end: String = name.chars().skip(length + 1 - NAME).collect();
    format!("…{end}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::Oracle;

    #[test]
    fn names_cannot_break_the_document() {
        let mut oracle = Oracle::new().unwrap();
        oracle.image("<a href=\"x\">&\u{1}\u{ffff}").page(&[1; PAGE_SIZE]).unwrap();
        let svg = draw(&oracle.report());
        assert!(svg.contains("&lt;a href=&quot;x&quot;&gt;&amp;\u{fffd}\u{fffd}"));
    }

    #[test]
    fn many_vms_end_in_one_bar() {
        let mut oracle = Oracle::new().unwrap();
        for vm in 0..200 {
            oracle.image(format!("vm-{vm}")).untouched(10);
        }
        let report = oracle.report();
        let shown = shown(&report);
        assert_eq!((shown.len(), shown[63].name.as_str(), shown[63].classes.pages), (64, "137 more", 1370));
        assert!(draw(&report).contains("137 more"));
    }

    #[test]
    fn nothing_can_be_drawn() {
        let svg = draw(&Oracle::new().unwrap().report());
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
