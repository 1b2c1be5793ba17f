//! Tables of text.

/// A table with headings.
pub(super) struct Table(samepage_text::table::Table);

impl Table {
    /// Returns a table with these headings. A column is aligned to the right if its heading begins with `>`.
    pub(super) fn new(headings: &[&str]) -> Self {
        let mut table =
            samepage_text::table::Table::new(headings.iter().map(|heading| heading.starts_with('>')));
        table.row(headings.iter().map(|heading| heading.strip_prefix('>').unwrap_or(heading)));
        Self(table)
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.row(cells);
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Returns a size in MiB.
pub(super) fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Returns a size in MiB, or a dash if it is unknown.
pub(super) fn maybe_mebibytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".to_owned(), mebibytes)
}

/// Returns how long ago a time was. Both times are in seconds since 1970.
pub(super) fn ago(seconds: f64, now: f64) -> String {
    let past = (now - seconds).max(0.0) as u64;
    match past {
        0..120 => format!("{past} s"),
        120..7200 => format!("{} min", past / 60),
        7200..172_800 => format!("{} h", past / 3600),
        _ => format!("{} d", past / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_have_to_be() {
        let mut table = Table::new(&["NAME", ">MEMORY"]);
        table.row(["a".to_owned(), mebibytes(64 << 20)]);
        table.row(["longer\x1b[31m".to_owned(), maybe_mebibytes(None)]);
        assert_eq!(
            table.to_string(),
            "NAME           MEMORY\na            64.0 MiB\nlonger [31m         -\n"
        );
    }

    #[test]
    fn times_are_told_roughly() {
        let told = [5, 119, 180, 7300, 200_000].map(|past| ago(0.0, f64::from(past)));
        assert_eq!(told, ["5 s", "119 s", "3 min", "2 h", "2 d"]);
    }
}
