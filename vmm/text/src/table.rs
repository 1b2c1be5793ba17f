//! Tables of text, in columns as wide as their widest cell and two spaces apart.

use std::fmt;

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment};

/// A table without borders. Names of guests and files cannot steer a terminal: control characters in cells become
/// spaces.
#[derive(Debug)]
pub struct Table {
    /// Whether each column is aligned to the right. Further columns are aligned to the left.
    right: Vec<bool>,
    /// Spaces before and after each cell.
    padding: (u16, u16),
    rows: comfy_table::Table,
}

impl Table {
    /// Returns a table whose lines begin at the margin. `right` says for each column whether it is aligned to the
    /// right.
    pub fn new(right: impl IntoIterator<Item = bool>) -> Self {
        let mut rows = comfy_table::Table::new();
        rows.load_style(NOTHING);
        Self { right: right.into_iter().collect(), padding: (0, 2), rows }
    }

    /// Returns a table as [`Table::new`] does, whose lines begin with two spaces.
    pub fn indented(right: impl IntoIterator<Item = bool>) -> Self {
        Self { padding: (2, 0), ..Self::new(right) }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl AsRef<str>>) {
        let cells = cells.into_iter().enumerate().map(|(column, text)| {
            let is_right = self.right.get(column).copied().unwrap_or(false);
            let plain = text.as_ref().chars().map(|c| if c.is_control() { ' ' } else { c });
            let alignment = if is_right { CellAlignment::Right } else { CellAlignment::Left };
            Cell::new_owned(plain.collect()).set_alignment(alignment)
        });
        let cells: Vec<_> = cells.collect();
        self.rows.add_row(cells);
        for column in self.rows.column_iter_mut() {
            column.set_padding(self.padding);
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rows.lines().try_for_each(|line| writeln!(f, "{}", line.trim_end()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new([false, true]);
        table.row(["NAME", "MEMORY"]);
        table.row(["a", "64.0 MiB"]);
        table.row(["longer\x1b[31m", "-"]);
        table.row(["日本"]);
        assert_eq!(
            table.to_string(),
            "NAME           MEMORY\na            64.0 MiB\nlonger [31m         -\n日本\n"
        );
        assert_eq!(Table::new([]).to_string(), "");
    }

    #[test]
    fn wide_characters_take_two_columns() {
        let mut table = Table::indented([false, true, false]);
        table.row(["日本", "1", ""]);
        table.row(["ab", "22", "µs"]);
        assert_eq!(table.to_string(), "  日本   1\n  ab    22  µs\n");
    }
}
