//! Curves over time as a picture, which stands alone and follows the viewer's light or dark scheme.
//! Lengths are in SVG user units. Source: the SVG 1.1 recommendation.

use std::fmt::Write;

use samepage_text::picture::escape;

/// Something over time.
pub(super) struct Curve<'a> {
    pub(super) name: &'a str,
    /// Seconds, and how much it was then.
    pub(super) points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 620.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 370.0;
/// About how many lines of the grid there are in each direction.
const TICKS: f64 = 6.0;

/// Plain rules rather than variables, which many viewers lack. Curves differ by more than colour.
const STYLE: &str = "\
text { font: 13px system-ui, sans-serif; fill: #1c2330; } .title { font-size: 16px; font-weight: 600; } \
.end { text-anchor: end; } .middle { text-anchor: middle; } .ground { fill: #ffffff; } \
.grid { stroke: #d5dae2; } .curve { fill: none; stroke-width: 2.5; } \
.c0 { stroke: #1f7a4d; } .c1 { stroke: #1f7a4d; stroke-dasharray: 7 4; } \
.c2 { stroke: #d9772b; } .c3 { stroke: #d9772b; stroke-dasharray: 7 4; } \
@media (prefers-color-scheme: dark) { text { fill: #e4e8ef; } .ground { fill: #14181f; } \
.grid { stroke: #363d4a; } .c0, .c1 { stroke: #3fae74; } .c2, .c3 { stroke: #e08a45; } }";

/// Draws curves as an SVG document.
pub(super) fn draw(title: &str, curves: &[Curve<'_>]) -> String {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let seconds = points().map(|point| point.0).fold(1.0, f64::max);
    let most = points().map(|point| point.1).fold(1.0, f64::max);
    let x = |second: f64| LEFT + (RIGHT - LEFT) * second / seconds;
    let y = |much: f64| BOTTOM - (BOTTOM - TOP) * much / most;
    let title = escape(title);

    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">
<title>{title}</title>
<style>{STYLE}</style>
<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>
<text class="title" x="20" y="30">{title}</text>"#
    );
    for tick in ticks(most) {
        let y = y(tick);
        let _ = writeln!(
            text,
            r#"<path class="grid" d="M{LEFT} {y:.1}H{RIGHT}"/><text class="end" x="{:.1}" y="{:.1}">{tick}</text>"#,
            LEFT - 8.0,
            y + 4.0
        );
    }
    for tick in ticks(seconds) {
        let x = x(tick);
        let _ = writeln!(
            text,
            r#"<path class="grid" d="M{x:.1} {TOP}V{BOTTOM}"/><text class="middle" x="{x:.1}" y="{:.1}">{tick} s</text>"#,
            BOTTOM + 18.0
        );
    }
    for (index, curve) in curves.iter().enumerate() {
        let class = format!("curve c{}", index % 4);
        let line: String =
            curve.points.iter().map(|&(second, much)| format!("L{:.1} {:.1}", x(second), y(much))).collect();
        let _ = writeln!(text, r#"<path class="{class}" d="M{:.1} {:.1}{line}"/>"#, x(0.0), y(0.0));
        let place = TOP + 20.0 + index as f64 * 24.0;
        let _ = writeln!(
            text,
            r#"<path class="{class}" d="M{:.1} {place:.1}h34"/><text x="{:.1}" y="{:.1}">{}</text>"#,
            RIGHT + 16.0,
            RIGHT + 56.0,
            place + 4.0,
            escape(curve.name)
        );
    }
    text.push_str("</svg>\n");
    text
}

/// Round numbers from 0 up to `most`.
fn ticks(most: f64) -> impl Iterator<Item = f64> {
    let rough = most / TICKS;
    let decade = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|step| step * decade).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    (0..=(most / step) as u32).map(move |tick| f64::from(tick) * step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_curve_is_drawn_and_named() {
        let curve = |name, slope: u32| {
            let points = (1..=12).map(|second| (f64::from(second) + 0.01, f64::from(slope * second)));
            Curve { name, points: points.collect() }
        };
        let picture = draw("Pages <saved>", &[curve("fast", 100), curve("slow & steady", 10)]);
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
        assert_eq!(picture.matches(r#"class="curve c"#).count(), 4, "two curves and their samples");
        assert!(picture.contains(">slow &amp; steady</text>"), "{picture}");
        // The steepest curve ends at the top.
        assert!(picture.contains("L620.0 60.0\""), "{picture}");
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert!(ticks(27.4).eq([0.0, 5.0, 10.0, 15.0, 20.0, 25.0]));
        assert!(ticks(6400.0).eq([0.0, 2000.0, 4000.0, 6000.0]));
        assert!(ticks(1.0).count() <= 7);
    }
}
