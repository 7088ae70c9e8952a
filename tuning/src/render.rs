//! Hosts, plans and measurements as text, map and picture. The same input gives the same bytes.

mod map;
mod measured;
mod plan;
mod svg;
mod text;

pub use map::map;
pub use measured::{disk, irqproof, jitter, proofs};
pub use plan::plan;
pub use svg::svg;
pub use text::{findings, host};

use crate::host::Unavailable;

/// Appends words.
fn words(out: &mut String, words: std::fmt::Arguments<'_>) {
    out.push_str(&words.to_string());
}

/// Appends a line.
fn line(out: &mut String, line: std::fmt::Arguments<'_>) {
    words(out, line);
    out.push('\n');
}

/// `1 queue`, `2 queues`.
pub(crate) fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// `s0,s3`.
fn shard_names(shards: &[usize]) -> String {
    let names: Vec<String> = shards.iter().map(|shard| format!("s{shard}")).collect();
    names.join(",")
}

/// What this host does not tell or cannot do, one line each.
fn unavailable(out: &mut String, missing: &[Unavailable]) {
    for missing in missing {
        line(
            out,
            format_args!("not available here: {}: {}", missing.what, missing.reason),
        );
    }
}

/// Rows of cells in columns as wide as their widest cell, two spaces apart. Columns of numbers, by
/// index, are set to the right.
struct Table {
    indent: usize,
    numbers: &'static [usize],
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(indent: usize, numbers: &'static [usize]) -> Self {
        Self {
            indent,
            numbers,
            rows: Vec::new(),
        }
    }

    fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    fn draw(&self, out: &mut String) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut text = " ".repeat(self.indent);
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                if self.numbers.contains(&column) {
                    words(&mut text, format_args!("{cell:>width$}  "));
                } else {
                    words(&mut text, format_args!("{cell:<width$}  "));
                }
            }
            line(out, format_args!("{}", text.trim_end()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(1, &[1]);
        table.row(["a", "1000", "x"]);
        table.row(["long", "7"]);
        let mut out = String::new();
        table.draw(&mut out);
        assert_eq!(out, " a     1000  x\n long     7\n");
    }
}
