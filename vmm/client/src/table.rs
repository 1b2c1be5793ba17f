//! Tables of text.

/// Rows of cells, in columns of the necessary width.
pub(super) struct Table {
    /// Whether each column is aligned to the right.
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Returns a table with these headings. A column is aligned to the right if its heading begins with `>`.
    pub(super) fn new(headings: &[&str]) -> Self {
        let right = headings.iter().map(|heading| heading.starts_with('>')).collect();
        let headings = headings.iter().map(|heading| heading.strip_prefix('>').unwrap_or(heading).to_owned());
        Self { right, rows: vec![headings.collect()] }
    }

    /// Adds a row.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        // Names from guests and files must not contain control characters for the terminal.
        let plain = |text: String| text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        self.rows.push(cells.into_iter().map(plain).collect());
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.right.len()).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                let cell =
                    if self.right[column] { format!("{cell:>width$}") } else { format!("{cell:width$}") };
                line.push_str(&cell);
                line.push_str("  ");
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
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
