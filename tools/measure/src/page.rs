//! One self-contained HTML page of results: no network, no dependencies.
//!
//! A template holds `/*STYLE*/` in its style element, `/*SCRIPT*/` in its only script element, and the places of its
//! results, each written as a comment with what it has when nothing is put there. The page draws itself from
//! them, with the elements, drawings and words for figures of `page.js`.

use serde::Serialize;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// A template on the way to a page.
pub struct Page(String);

impl Page {
    /// With the style and script that pages share.
    pub fn new(template: &str) -> Self {
        let with_style = template.replacen("/*STYLE*/", STYLE, 1);
        Self(with_style.replacen("/*SCRIPT*/", SCRIPT, 1))
    }

    /// Puts results into their place, which stands once in the template. Places are filled from the last
    /// in the template to the first, so that no result is taken for a place.
    #[must_use]
    pub fn with(self, place: &str, results: &impl Serialize) -> Self {
        let json = serde_json::to_string(results).unwrap_or_default();
        // Inside a script element `</` would end it, and after `<!--<script` its end would not. In JSON a
        // `<` stands only in strings, where it may be written so.
        let inside = json.replace('<', "\\u003c");
        Self(self.0.replacen(place, &inside, 1))
    }

    /// All of it.
    pub fn html(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str =
        "<style>/*STYLE*/</style><script>/*SCRIPT*/\nconst said = /*SAID*/\"\";</script>";

    #[test]
    fn a_page_needs_nothing_else_and_no_result_can_break_out_of_it() {
        let page = Page::new(TEMPLATE)
            .with("/*SAID*/\"\"", &"</script><b><!--<script>")
            .html();
        let said = r#"const said = "\u003c/script>\u003cb>\u003c!--\u003cscript>";"#;
        assert!(page.contains(said), "{page}");
        assert!(!page.contains("http://") && !page.contains("src="));
        assert!(!page.contains("/*S"));
        assert_eq!(page.matches("</script>").count(), 1);
    }
}
