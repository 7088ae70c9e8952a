//! Results as one self-contained page that draws them as bars.

use std::collections::BTreeMap;

use torc_measure::page::Page;

use crate::ceiling;
use crate::results::Results;

const TEMPLATE: &str = include_str!("page.html");
const RESULTS: &str = "/*RESULTS*/{}";
/// By size, then by load: what the disk allows.
const CEILINGS: &str = "/*CEILINGS*/{}";

pub fn html(results: &Results) -> String {
    let of_size = |value_bytes| -> BTreeMap<&str, f64> {
        let layouts = results.layouts().into_iter();
        let loads = layouts.flat_map(|layout| results.loads(layout));
        loads
            .filter_map(|load| Some((load, ceiling::of(&results.ceilings, load, value_bytes)?)))
            .collect()
    };
    let ceilings: BTreeMap<usize, BTreeMap<&str, f64>> = results
        .sizes()
        .into_iter()
        .map(|value_bytes| (value_bytes, of_size(value_bytes)))
        .collect();
    let page = Page::new(TEMPLATE).with(CEILINGS, &ceilings);
    page.with(RESULTS, results).html()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::results::Cell;

    #[test]
    fn the_page_holds_the_results_and_needs_nothing_else() {
        let results = Results {
            ceilings: Vec::new(),
            cells: vec![Cell {
                engine: "an engine".to_owned(),
                layout: Layout::Pinned,
                value_bytes: 1000,
                keys: 10,
                memory_bytes_max: None,
                rows: Vec::new(),
                failure: None,
            }],
        };
        let page = html(&results);
        assert!(page.contains(r#""engine":"an engine""#), "{page}");
        assert!(!page.contains("http://") && !page.contains("src=") && !page.contains("/*R"));
    }
}
