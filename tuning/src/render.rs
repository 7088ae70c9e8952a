//! Hosts and plans as text, map and picture. The same input gives the same bytes.

mod map;
mod svg;
mod text;

pub use map::map;
pub use svg::svg;
pub use text::{findings, host, plan};

/// Appends words.
fn words(out: &mut String, words: std::fmt::Arguments<'_>) {
    out.push_str(&words.to_string());
}

/// Appends a line.
fn line(out: &mut String, line: std::fmt::Arguments<'_>) {
    words(out, line);
    out.push('\n');
}
