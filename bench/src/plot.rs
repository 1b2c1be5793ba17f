//! Curves as a picture, an SVG document that stands alone and follows the viewer's light or dark
//! scheme. Source: the SVG 1.1 recommendation.

use std::fmt::Write;

use super::report::Curves;
use samepage_text::picture::escape;

/// Lengths in SVG user units.
const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 690.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 400.0;
/// About so many lines across.
const LINES: f64 = 5.0;
/// The least distance between names beside the curves.
const NAME: f64 = 16.0;

/// Of the curves; told apart without colour as well, by dashes.
const PENS: [(&str, &str); 7] = [
    ("#d9772b", ""),
    ("#1f7a4d", ""),
    ("#1f7a4d", "6 4"),
    ("#2f6fb3", ""),
    ("#8a5aa8", "6 4"),
    ("#8a5aa8", ""),
    ("#8b95a7", "2 3"),
];

const STYLE: &str = "\
text { font: 13px system-ui, sans-serif; fill: #1c2330; } .title { font-size: 16px; font-weight: 600; } \
.end { text-anchor: end; } .middle { text-anchor: middle; } .ground { fill: #ffffff; } \
.grid { stroke: #d5dae2; } .curve { fill: none; stroke-width: 2.5; } \
@media (prefers-color-scheme: dark) { \
text { fill: #e4e8ef; } .ground { fill: #14181f; } .grid { stroke: #363d4a; } }";

/// Draws curves.
pub(super) fn draw(title: &str, curves: &Curves) -> String {
    let most = curves.points.iter().flatten().copied().fold(0.0, f64::max);
    let count = curves.points.iter().map(Vec::len).max().unwrap_or(0);
    let step = round_step(most / LINES);
    let top = (most / step).ceil().max(1.0) * step;
    let x = |place: usize| LEFT + (RIGHT - LEFT) * place as f64 / (count.max(2) - 1) as f64;
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * value / top;

    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n\
         <rect class=\"ground\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n",
        title = escape(title)
    );
    let mut line = |class: &str, at: [f64; 2], what: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "<text class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            at[0],
            at[1],
            escape(what)
        );
    };
    line("title", [20.0, 30.0], title);
    line("", [20.0, 50.0], curves.unit);
    line("middle", [(LEFT + RIGHT) / 2.0, BOTTOM + 42.0], curves.of);
    for tick in (0..).map(|tick| f64::from(tick) * step).take_while(|tick| *tick <= top) {
        line("end", [LEFT - 8.0, y(tick) + 4.0], &format!("{tick}"));
    }
    for place in (0..count).step_by(count.div_ceil(10).max(1)) {
        line("middle", [x(place), BOTTOM + 20.0], &(place + 1).to_string());
    }
    let names = names(curves, y);
    for &(curve, place) in &names {
        line("", [RIGHT + 42.0, place], &curves.names[curve]);
    }
    for tick in (0..).map(|tick| f64::from(tick) * step).take_while(|tick| *tick <= top) {
        let y = y(tick);
        let _ =
            writeln!(text, "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{RIGHT}\" y2=\"{y:.1}\"/>");
    }
    for (curve, place) in names {
        let (colour, dashes) = PENS[curve % PENS.len()];
        let (from, to, y) = (RIGHT + 10.0, RIGHT + 36.0, place - 4.0);
        let _ = writeln!(
            text,
            "<line class=\"curve\" stroke=\"{colour}\" stroke-dasharray=\"{dashes}\" x1=\"{from}\" y1=\"{y:.1}\" \
             x2=\"{to}\" y2=\"{y:.1}\"/>"
        );
    }
    for (points, (colour, dashes)) in curves.points.iter().zip(PENS.iter().cycle()) {
        let points: Vec<_> = points
            .iter()
            .enumerate()
            .map(|(place, &value)| format!("{:.1},{:.1}", x(place), y(value)))
            .collect();
        let points = points.join(" ");
        let _ = writeln!(
            text,
            "<polyline class=\"curve\" stroke=\"{colour}\" stroke-dasharray=\"{dashes}\" points=\"{points}\"/>"
        );
    }
    text.push_str("</svg>\n");
    text
}

/// For each curve, how high its name is written: where it ends, and not over another's.
fn names(curves: &Curves, y: impl Fn(f64) -> f64) -> Vec<(usize, f64)> {
    let ends = curves.points.iter().map(|points| y(points.last().copied().unwrap_or(0.0)) + 4.0);
    let mut names: Vec<_> = ends.enumerate().collect();
    names.sort_by(|one, other| one.1.total_cmp(&other.1));
    // From the lowest up, each at least a line above the one below it.
    let mut lowest = BOTTOM + 4.0;
    for (_, place) in names.iter_mut().rev() {
        *place = place.min(lowest);
        lowest = *place - NAME;
    }
    names
}

/// 1, 2 or 5 times a power of ten, and no less than this.
fn round_step(least: f64) -> f64 {
    if least <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|&step| step >= least)
        .unwrap_or(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        assert_eq!([0.0, 1.0, 3.0, 4000.0, 6001.0].map(round_step), [1.0, 1.0, 5.0, 5000.0, 10_000.0]);
    }

    #[test]
    fn every_curve_has_a_line_and_a_name_of_its_own() {
        let curves = Curves {
            unit: "pages",
            of: "image",
            names: vec!["a".into(), "b & c".into()],
            points: vec![vec![1.0, 2.0, 3.0], vec![1.0, 3.0, 3.0]],
        };
        let picture = draw("<title>", &curves);
        assert_eq!(picture.matches("<polyline").count(), 2);
        assert!(picture.contains("b &amp; c") && picture.contains("&lt;title&gt;"));
        let places: Vec<_> = names(&curves, |value| value).into_iter().map(|(_, place)| place).collect();
        assert!((places[1] - places[0]).abs() >= NAME);
    }
}
