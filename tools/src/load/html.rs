//! One self-contained HTML page of one or many runs: no network, no dependencies.
//!
//! The page holds the results as JSON and draws them itself.

use super::outcome::Outcome;

const TEMPLATE: &str = include_str!("report.html");
/// Where the results go; stands once in the page.
const PLACE: &str = "/*RUNS*/[]";

/// The page.
pub fn page(runs: &[Outcome]) -> String {
    let json = serde_json::to_string(runs).unwrap_or_default();
    // Inside a script element `</` would end it.
    TEMPLATE.replacen(PLACE, &json.replace("</", "<\\/"), 1)
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
        let page = page(&[outcome]);
        assert!(!page.contains("</script><b>"));
        assert!(!page.contains("http://") && !page.contains("src="));
        assert_eq!(page.matches("</script>").count(), 1);
    }
}
