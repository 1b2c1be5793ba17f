//! The results as tables for people.

use std::fmt::Write;

use samepage_text::table::Table;

use super::report::{Curves, Figure, Goal, Measurement, Report, Section};

/// How many points of a curve are printed; all of them are in the JSON.
const POINTS: usize = 16;

/// The results, as they are printed.
pub(super) fn format(report: &Report) -> String {
    let mut text = format!(
        "Linux {}, {} processors; medians of {} round{}{}, with quartiles\n",
        report.kernel,
        report.processors,
        report.rounds,
        if report.rounds == 1 { "" } else { "s" },
        if report.quick { ", small sizes" } else { "" },
    );
    for section in &report.sections {
        add(&mut text, section);
    }
    let judged = report.sections.iter().flat_map(|section| &section.measurements).filter_map(|m| m.met);
    let (met, missed): (Vec<bool>, Vec<bool>) = judged.partition(|&met| met);
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "\n{} of {} goals met; took {:.0} s",
        met.len(),
        met.len() + missed.len(),
        report.seconds
    );
    if let Some(reason) = &report.without_ksm {
        let _ = writeln!(text, "{reason}");
    }
    text
}

/// A section, as it is printed.
pub(super) fn add(text: &mut String, section: &Section) {
    let [ours, other] = &section.sides;
    let header = ["", "", ours, other, "ratio", "goal", ""].map(str::to_owned).to_vec();
    let rows: Vec<_> = std::iter::once(header).chain(section.measurements.iter().map(row)).collect();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "\n{}", section.title);
    align(text, &rows, &[0, 1, 6]);
    let notes = section.measurements.iter().filter_map(|m| Some(format!("{}: {}", m.name, m.note.as_ref()?)));
    for note in notes.chain(section.notes.iter().cloned()) {
        let _ = writeln!(text, "  - {note}");
    }
    if let Some(curves) = &section.curves {
        let _ = writeln!(text, "\n  {} after each {}", curves.unit, curves.of);
        align(text, &table_of(curves), &[]);
    }
}

/// Curves side by side, with no more than about [`POINTS`] of their points, the last among them.
fn table_of(curves: &Curves) -> Vec<Vec<String>> {
    let header = std::iter::once(String::new()).chain(curves.names.iter().cloned()).collect();
    let count = curves.points.iter().map(Vec::len).max().unwrap_or(0);
    let every = count.div_ceil(POINTS).max(1);
    let places = (0..count).filter(|place| (count - 1 - place).is_multiple_of(every));
    let row = |place: usize| {
        let point =
            |points: &Vec<f64>| points.get(place).map_or_else(|| "-".to_owned(), |&point| number(point));
        std::iter::once((place + 1).to_string()).chain(curves.points.iter().map(point)).collect()
    };
    std::iter::once(header).chain(places.map(row)).collect()
}

/// Rows with columns as wide as they must be: some to the left, the others to the right.
pub(super) fn align(text: &mut String, rows: &[Vec<String>], left: &[usize]) {
    let columns = rows.first().map_or(0, Vec::len);
    let mut table = Table::indented((0..columns).map(|column| !left.contains(&column)));
    rows.iter().for_each(|row| table.row(row));
    // Writing to a string cannot fail.
    let _ = write!(text, "{table}");
}

fn row(measurement: &Measurement) -> Vec<String> {
    let goal = match measurement.goal {
        None => String::new(),
        Some(Goal::RatioAtMost(most)) => format!("<= {}", number(most)),
        Some(Goal::RatioAtLeast(least)) => format!(">= {}", number(least)),
        Some(Goal::AtMost(most)) => format!("<= {} {}", number(most), measurement.unit),
        Some(Goal::AtLeast(least)) => format!(">= {} {}", number(least), measurement.unit),
    };
    let met = match measurement.met {
        Some(true) => "met",
        Some(false) => "missed",
        None => "",
    };
    vec![
        measurement.name.clone(),
        measurement.unit.to_owned(),
        figure(measurement.ours.as_ref()),
        figure(measurement.other.as_ref()),
        measurement.ratio.map_or_else(|| "-".to_owned(), number),
        goal,
        met.to_owned(),
    ]
}

fn figure(figure: Option<&Figure>) -> String {
    match figure {
        None => "-".to_owned(),
        Some(figure) if figure.rounds == 1 => number(figure.median),
        Some(figure) => {
            let [low, high] = figure.quartiles;
            format!("{} ({}-{})", number(figure.median), number(low), number(high))
        }
    }
}

/// A figure with about three digits that count.
pub(super) fn number(figure: f64) -> String {
    let size = figure.abs();
    if figure == figure.round() && size < 1e6 {
        format!("{figure}")
    } else if size >= 100.0 {
        format!("{figure:.0}")
    } else if size >= 10.0 {
        format!("{figure:.1}")
    } else if size >= 0.1 {
        format!("{figure:.2}")
    } else {
        format!("{figure:.4}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_the_digits_that_count() {
        let figures = [0.0, 3.0, 1234.5, 12.34, 1.234, 0.333_33, 0.012_34].map(number);
        assert_eq!(figures, ["0", "3", "1234", "12.3", "1.23", "0.33", "0.0123"]);
    }

    #[test]
    fn a_section_is_a_table() {
        let mut section = Section::new("CPU", "samepage", "KSM");
        section.push(
            Measurement::new("runs of 1", "µs", &[1.0, 2.0, 3.0], &[4.0]).goal(Goal::RatioAtMost(0.75)),
        );
        section.push(Measurement::new("runs of 64", "µs", &[1.0], &[]).note("alone"));
        let mut text = String::new();
        add(&mut text, &section);
        assert_eq!(
            text,
            "\nCPU\n                       samepage  KSM  ratio     goal\n  \
             runs of 1   µs  2 (1.50-2.50)    4   0.50  <= 0.75  met\n  \
             runs of 64  µs              1    -      -\n  - runs of 64: alone\n"
        );
    }
}
