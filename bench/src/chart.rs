//! Charts: curves as an SVG document that stands alone and follows the viewer's light or dark scheme.
//!
//! The elements have the colours of the light scheme. A style sheet finds them by these colours: it replaces
//! the colours in the dark scheme, and dashes some curves, so that they differ by more than colour. Lengths are
//! in pixels.

use std::fmt::Write;
use std::io;

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use samepage_text::picture::escape;

use super::report::Curves;

const SIZE: (u32, u32) = (900, 460);
/// Space for the title and the unit.
const TOP: u32 = 60;
/// Space for the names of curves.
const NAMES: u32 = 230;
/// The least distance between the names of two curves.
const NAME: i32 = 16;
/// Upper limits for the lines of the grid in each direction.
const LINES: (usize, usize) = (10, 6);

const GROUND: RGBColor = RGBColor(0xff, 0xff, 0xff);
const INK: RGBColor = RGBColor(0x1c, 0x23, 0x30);
const GRID: RGBColor = RGBColor(0xd5, 0xda, 0xe2);

/// How a curve is drawn. Each pen has a colour of its own, by which the style sheet finds its curve.
struct Pen {
    colour: RGBColor,
    /// The colour in the dark scheme.
    dark: &'static str,
    /// Lengths of dashes and gaps. Empty for a solid curve.
    dashes: &'static str,
}

const PENS: [Pen; 7] = [
    Pen { colour: RGBColor(0x1f, 0x7a, 0x4d), dark: "#3fae74", dashes: "" },
    Pen { colour: RGBColor(0x1f, 0x7a, 0x4e), dark: "#3fae74", dashes: "7 4" },
    Pen { colour: RGBColor(0xd9, 0x77, 0x2b), dark: "#e08a45", dashes: "" },
    Pen { colour: RGBColor(0xd9, 0x77, 0x2c), dark: "#e08a45", dashes: "7 4" },
    Pen { colour: RGBColor(0x2f, 0x6f, 0xb3), dark: "#5b96d6", dashes: "" },
    Pen { colour: RGBColor(0x8a, 0x5a, 0xa8), dark: "#a97cc6", dashes: "" },
    Pen { colour: RGBColor(0x8b, 0x95, 0xa7), dark: "#8b95a7", dashes: "2 3" },
];

/// A curve, by its name and its points.
#[derive(Debug)]
pub(super) struct Curve<'a> {
    pub(super) name: &'a str,
    /// How far across, and how much it was there.
    pub(super) points: Vec<(f64, f64)>,
}

/// Curves with common axes.
#[derive(Debug)]
pub(super) struct Chart<'a> {
    title: &'a str,
    /// The unit of the curves' values.
    unit: &'a str,
    /// What the axis across shows.
    across: &'a str,
    curves: Vec<Curve<'a>>,
}

impl<'a> Chart<'a> {
    /// Returns a chart of curves whose points are numbered from 1.
    pub(super) fn numbered(title: &'a str, curves: &'a Curves) -> Self {
        let points = |points: &Vec<f64>| (1..).map(f64::from).zip(points.iter().copied()).collect();
        let named = curves.names.iter().zip(&curves.points);
        Self {
            title,
            unit: curves.unit,
            across: curves.of,
            curves: named.map(|(name, values)| Curve { name, points: points(values) }).collect(),
        }
    }

    /// Returns a chart of curves over time, in seconds. All begin with nothing.
    pub(super) fn over_time(title: &'a str, unit: &'a str, mut curves: Vec<Curve<'a>>) -> Self {
        curves.iter_mut().for_each(|curve| curve.points.insert(0, (0.0, 0.0)));
        Self { title, unit, across: "seconds", curves }
    }

    /// Draws the chart as an SVG document.
    ///
    /// # Errors
    /// Fails if the drawing library does.
    pub(super) fn draw(&self) -> Result<String> {
        let mut picture = String::new();
        self.draw_elements(&mut picture).map_err(|error| anyhow!("draw {:?}: {error}", self.title))?;
        // The library writes neither a title nor a style sheet.
        let title = escape(self.title);
        let head = format!(" role=\"img\">\n<title>{title}</title>\n<style>{}</style>", style_sheet());
        Ok(picture.replacen('>', &head, 1))
    }

    fn draw_elements(&self, picture: &mut String) -> Result<(), DrawingAreaErrorKind<io::Error>> {
        let root = SVGBackend::with_string(picture, SIZE).into_drawing_area();
        root.fill(&GROUND)?;
        let font = ("sans-serif", 16).into_font();
        let label = font.color(&INK);
        let title = font.style(FontStyle::Bold).color(&INK);
        root.draw(&Text::new(self.title, (20, 14), title))?;
        root.draw(&Text::new(self.unit, (20, 36), label.clone()))?;

        let points = || self.curves.iter().flat_map(|curve| &curve.points);
        let from = points().map(|point| point.0).reduce(f64::min).unwrap_or(0.0);
        let to = points().map(|point| point.0).fold(from + 1.0, f64::max);
        let most = points().map(|point| point.1).reduce(f64::max).filter(|most| *most > 0.0).unwrap_or(1.0);
        // Points that are numbered have no fractions between them.
        let longest = self.curves.iter().map(|curve| curve.points.len()).max().unwrap_or(0);
        let mut chart = ChartBuilder::on(&root)
            .margin_top(TOP)
            .margin_right(NAMES)
            .x_label_area_size(50)
            .y_label_area_size(80)
            .build_cartesian_2d(from..to, 0.0..most)?;
        chart
            .configure_mesh()
            .x_desc(self.across)
            .x_labels(longest.clamp(2, LINES.0))
            .y_labels(LINES.1)
            .x_label_formatter(&number)
            .y_label_formatter(&number)
            .label_style(label.clone())
            .axis_style(GRID)
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (curve, pen) in self.curves.iter().zip(PENS.iter().cycle()) {
            chart.draw_series(LineSeries::new(curve.points.iter().copied(), pen.colour.stroke_width(2)))?;
        }

        let height = |value: f64| chart.backend_coord(&(to, value)).1;
        let ends = self.curves.iter().map(|curve| height(curve.points.last().map_or(0.0, |point| point.1)));
        let left = (SIZE.0 - NAMES) as i32;
        for (index, y) in names(ends, height(0.0)) {
            let pen = PENS[index % PENS.len()].colour.stroke_width(2);
            let middle = label.pos(Pos::new(HPos::Left, VPos::Center));
            root.draw(&PathElement::new([(left + 10, y), (left + 36, y)], pen))?;
            root.draw(&Text::new(self.curves[index].name, (left + 42, y), middle))?;
        }
        root.present()
    }
}

/// Returns the style sheet of all charts.
fn style_sheet() -> String {
    let stroke = |RGBColor(red, green, blue)| format!("[stroke=\"#{red:02X}{green:02X}{blue:02X}\"]");
    let (mut light, mut dark) = (String::new(), String::new());
    for Pen { colour, dark: dark_colour, dashes } in &PENS {
        let curve = stroke(*colour);
        // Writing to a string cannot fail.
        if !dashes.is_empty() {
            let _ = write!(light, "{curve} {{ stroke-dasharray: {dashes}; }} ");
        }
        let _ = write!(dark, "{curve} {{ stroke: {dark_colour}; }} ");
    }
    format!(
        "text {{ font-family: system-ui, sans-serif; }} {light}@media (prefers-color-scheme: dark) {{ \
         text {{ fill: #e4e8ef; }} rect {{ fill: #14181f; }} {grid} {{ stroke: #363d4a; }} {dark}}}",
        grid = stroke(GRID)
    )
}

/// Returns for each curve the height of its name: where the curve ends, and not over another name. `lowest` is
/// the greatest height.
fn names(ends: impl Iterator<Item = i32>, mut lowest: i32) -> Vec<(usize, i32)> {
    let mut names: Vec<_> = ends.enumerate().collect();
    names.sort_by_key(|(_, end)| *end);
    // From the lowest up, each at least a line above the one below it.
    for (_, place) in names.iter_mut().rev() {
        *place = (*place).min(lowest);
        lowest = *place - NAME;
    }
    names
}

/// Returns a label of an axis, without errors of rounding.
fn number(value: &f64) -> String {
    ((value * 1e6).round() / 1e6).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strokes(picture: &str, pen: &Pen) -> usize {
        let RGBColor(red, green, blue) = pen.colour;
        picture.matches(&format!("stroke=\"#{red:02X}{green:02X}{blue:02X}\" stroke-width")).count()
    }

    #[test]
    fn every_curve_has_a_line_and_a_name_of_its_own() {
        let curves = Curves {
            unit: "pages",
            of: "image",
            names: vec!["a".into(), "b & c".into()],
            points: vec![vec![1.0, 2.0, 3.0], vec![1.0, 3.0, 3.0]],
        };
        let picture = Chart::numbered("<title>", &curves).draw().unwrap();
        assert_eq!(
            [0, 1, 2].map(|pen| strokes(&picture, &PENS[pen])),
            [2, 2, 0],
            "two curves and their samples"
        );
        assert!(picture.contains("b &amp; c") && picture.contains("&lt;title&gt;"));
        let places: Vec<_> = names([100, 100].into_iter(), 400).into_iter().map(|(_, place)| place).collect();
        assert!((places[1] - places[0]).abs() >= NAME);
    }

    #[test]
    fn each_curve_is_drawn_and_named() {
        let curve = |name, slope: u32| {
            let points = (1..=12).map(|second| (f64::from(second) + 0.01, f64::from(slope * second)));
            Curve { name, points: points.collect() }
        };
        let curves = vec![curve("fast", 100), curve("slow & steady", 10)];
        let picture = Chart::over_time("Pages <saved>", "pages", curves).draw().unwrap();
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
        assert_eq!([0, 1].map(|pen| strokes(&picture, &PENS[pen])), [2, 2], "two curves and their samples");
        assert!(picture.contains("\nslow &amp; steady\n"), "{picture}");
        // The steepest curve ends at the top.
        assert!(picture.contains(&format!(",{TOP} \"")), "{picture}");
        // Labels are round and few.
        assert!(picture.contains("\n1000\n") && picture.matches("<text").count() < 30, "{picture}");
    }

    #[test]
    fn nothing_can_be_drawn() {
        let picture = Chart::over_time("nothing", "pages", Vec::new()).draw().unwrap();
        assert!(!picture.contains("NaN") && !picture.contains("inf"), "{picture}");
        let alone = Curve { name: "alone", points: vec![(3.0, 0.0)] };
        Chart { title: "", unit: "", across: "", curves: vec![alone] }.draw().unwrap();
    }

    #[test]
    fn the_style_sheet_tells_all_pens_apart() {
        let mut colours: Vec<_> =
            PENS.iter().map(|Pen { colour: RGBColor(r, g, b), .. }| (r, g, b)).collect();
        colours.sort_unstable();
        colours.dedup();
        assert_eq!(colours.len(), PENS.len());
    }
}
