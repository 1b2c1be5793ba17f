//! Formats the result as tables.

use std::fmt::Write;

use crate::oracle::{Classes, PAGE_SIZE, Report};

use super::{Analysis, Input, Origin};
use samepage_text::table::Table;
use samepage_text::units::{bytes, count, pages, percent};

/// Longest name of a VM, in letters.
const NAME: usize = 40;

/// Returns the result as text.
pub(super) fn format(analysis: &Analysis) -> String {
    let report = &analysis.report;
    let sections = [inputs(analysis), classes(analysis), savings(report), runs(report), budgets(report)];
    let mut text = sections.into_iter().filter(|section| !section.is_empty()).collect::<Vec<_>>().join("\n");
    text.push_str(
        "\nEqual digests count as equal pages: this is an estimate. Costs of sharing (page tables, mappings,\n\
         metadata) are not subtracted.\n",
    );
    let of_file = |input: &Input| !matches!(input.origin, Origin::Process { .. });
    if report.saved.zero > 0 && analysis.inputs.iter().any(of_file) {
        text.push_str(
            "A dump may hold memory that was never touched, and takes none, as zeros: --pid tells them apart.\n",
        );
    }
    text
}

/// Returns the sources of processes' memory, because finding them is a guess.
fn inputs(analysis: &Analysis) -> String {
    let mut lines = String::new();
    for input in &analysis.inputs {
        if let Origin::Process { mappings, .. } = &input.origin {
            for part in mappings {
                line(
                    &mut lines,
                    format_args!("{}: {} at {}, {}", input.name, part.what, part.range, bytes(part.bytes)),
                );
            }
        }
    }
    lines
}

fn classes(analysis: &Analysis) -> String {
    let report = &analysis.report;
    let titles = ["memory", "untouched", "zero", "between VMs", "within a VM", "unique", "not read"];
    let unread = report.total.unread > 0;
    let row = |name: &str, classes: &Classes| {
        let figures = [
            classes.pages,
            classes.untouched,
            classes.zero,
            classes.between,
            classes.within,
            classes.unique,
            classes.unread,
        ];
        let figures = figures.iter().take(if unread { 7 } else { 6 }).map(|&figure| pages(figure));
        [shorten(name)].into_iter().chain(figures).collect::<Vec<_>>()
    };
    let mut rows =
        vec![["VM"].into_iter().chain(titles).take(if unread { 8 } else { 7 }).map(str::to_owned).collect()];
    rows.extend(report.images.iter().map(|image| row(&image.name, &image.classes)));
    if report.images.len() != 1 {
        rows.push(row("all", &report.total));
    }
    let mut text =
        aligned("Memory by class (pages with the same content elsewhere: between or within VMs)", &rows);
    line(
        &mut text,
        format_args!(
            "  {} pages of {PAGE_SIZE} bytes, {} of them in use; read in {:.1} s",
            count(report.total.pages),
            count(report.total.in_use()),
            analysis.seconds,
        ),
    );
    text
}

fn savings(report: &Report) -> String {
    let saved = &report.saved;
    let in_use = report.total.in_use();
    let row = |name: &str, saved: u64| {
        vec![name.to_owned(), count(saved), pages(saved), format!("{:.1} %", percent(saved, in_use))]
    };
    let title = ["by sharing", "pages", "memory", "of memory in use"].map(str::to_owned).to_vec();
    let rows = [
        title,
        row("pages of zeros", saved.zero),
        row("duplicates within VMs", saved.within),
        row("duplicates between VMs", saved.between),
        row("together", report.saved_pages),
    ];
    aligned("Possible savings (one frame for each content stays)", &rows)
}

fn runs(report: &Report) -> String {
    if report.runs.runs == 0 {
        return String::new();
    }
    let mut rows = vec![["pages in a run", "runs", "pages", "mappings"].map(str::to_owned).to_vec()];
    for bucket in &report.runs.buckets {
        let length = match bucket.to_pages {
            Some(to) if to == bucket.from_pages => to.to_string(),
            Some(to) => format!("{} to {to}", bucket.from_pages),
            None => format!("{} and more", bucket.from_pages),
        };
        rows.push(vec![length, count(bucket.runs), count(bucket.pages), count(bucket.mappings)]);
    }
    let all = &report.runs;
    rows.push(vec!["all".to_owned(), count(all.runs), count(all.pages), count(all.mappings)]);
    aligned("Runs of duplicate pages that can lie on consecutive frames", &rows)
}

fn budgets(report: &Report) -> String {
    if report.runs.runs == 0 {
        return String::new();
    }
    let title = ["mappings", "pages on frames", "of all", "saved", "of all that duplicates can save"];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    for budget in &report.budgets {
        rows.push(vec![
            match budget.limit {
                Some(limit) => count(limit),
                None => format!("all {}", count(budget.mappings)),
            },
            count(budget.pages),
            format!("{:.1} %", budget.pages_percent),
            bytes(budget.saved_bytes),
            format!("{:.1} %", budget.saved_percent),
        ]);
    }
    aligned("Savings for budgets of mappings, longest runs first (pages of zeros need none)", &rows)
}

/// Returns a title and rows. The first column is aligned to the left, the others to the right.
fn aligned(title: &str, rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let mut table = Table::indented((0..columns).map(|column| column > 0));
    rows.iter().for_each(|row| table.row(row));
    format!("{title}\n{table}")
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{line}");
}

/// Shortens a name at its start, because most names are paths.
fn shorten(name: &str) -> String {
    let length = name.chars().count();
    if length <= NAME {
        return name.to_owned();
    }
    let end: String = name.chars().skip(length - NAME + 3).collect();
    format!("...{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [vec!["a".to_owned(), "100".to_owned()], vec!["long".to_owned(), "7".to_owned()]];
        assert_eq!(aligned("Title", &rows), "Title\n  a     100\n  long    7\n");
    }

    #[test]
    fn long_names_keep_their_end() {
        assert_eq!(shorten("vm.raw"), "vm.raw");
        let short = shorten(&"/images/".repeat(10));
        assert_eq!(short.chars().count(), NAME);
        assert!(short.starts_with("...") && short.ends_with("/images/"));
    }
}
