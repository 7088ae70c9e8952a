//! One self-contained HTML page of one or many runs: no network, no dependencies.
//!
//! The page holds the results as JSON and draws them itself.

use super::outcome::Outcome;

const TEMPLATE: &str = include_str!("report.html");
/// Where the results go; stands once in the page.
const PLACE: &str = "/*RUNS*/[]";
/// Where goes what was concluded from them; stands once in the page, before it.
const SAID: &str = "/*SAID*/\"\"";

/// The page of these runs, with what was concluded from them in words.
pub fn page(runs: &[Outcome], said: &str) -> String {
    let runs = serde_json::to_string(runs).unwrap_or_default();
    let said = serde_json::to_string(said).unwrap_or_default();
    // Inside a script element `</` would end it.
    let inside = |json: String| json.replace("</", "<\\/");
    TEMPLATE
        .replacen(SAID, &inside(said), 1)
        .replacen(PLACE, &inside(runs), 1)
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
