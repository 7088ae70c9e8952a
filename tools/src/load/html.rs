//! One self-contained HTML page of one or many runs: no network, no dependencies.
//!
//! The page holds the results as JSON and draws them itself.

use torc_measure::page::Page;

use super::figures::Tables;
use super::outcome::Outcome;

const TEMPLATE: &str = include_str!("report.html");
/// Where the results go.
const PLACE: &str = "/*RUNS*/[]";
/// Where goes what may be printed of them.
const TABLES: &str = "/*TABLES*/[]";
/// Where goes what was concluded from them.
const SAID: &str = "/*SAID*/\"\"";

/// The page of these runs, with what was concluded from them in words.
pub fn page(runs: &[Outcome], said: &str) -> String {
    let tables: Vec<Tables<'_>> = runs.iter().map(Tables::of).collect();
    let page = Page::new(TEMPLATE)
        .with(TABLES, &tables)
        .with(PLACE, &runs)
        .with(SAID, &said);
    page.html()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::outcome::Setup;

    #[test]
    fn the_page_needs_nothing_else_and_no_run_can_break_out_of_it() {
        let outcome = Outcome {
            setup: Setup {
                name: "</script><b>".into(),
                ..Setup::default()
            },
            ..Outcome::default()
        };
        let page = page(&[outcome], "A = </script><b>");
        assert!(!page.contains("</script><b>"));
        assert!(!page.contains("http://") && !page.contains("src="));
        assert_eq!(page.matches("</script>").count(), 1);
    }
}
