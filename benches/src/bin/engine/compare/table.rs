//! Results as tables in Markdown.

use std::fmt::Write as _;

use crate::ceiling::{self, Work};
use crate::layout::Layout;
use crate::results::{Results, Row};

use super::{OURS, PEER};

/// First how we stand beside the peer, then all figures.
pub fn markdown(results: &Results) -> String {
    let mut out = String::new();
    for layout in results.layouts() {
        beside(results, layout, &mut out).expect("memory");
    }
    ceilings(results, &mut out).expect("memory");
    for layout in results.layouts() {
        for value_bytes in results.sizes() {
            figures(results, layout, value_bytes, &mut out).expect("memory");
        }
    }
    out
}

/// For each load and size our rate over the peer's, and its p99.9 over ours.
fn beside(results: &Results, layout: Layout, out: &mut String) -> std::fmt::Result {
    let sizes = results.sizes();
    writeln!(out, "\n## {OURS} beside {PEER}, {}\n", layout.name())?;
    writeln!(
        out,
        "Rate over rate · p99.9 over p99.9 (of reads / of writes where there are both): above 1 ours is better.\n"
    )?;
    write!(out, "| load |")?;
    for value_bytes in &sizes {
        write!(out, " {} |", size(*value_bytes))?;
    }
    writeln!(out, "\n|---|{}", "---|".repeat(sizes.len()))?;
    for load in results.loads(layout) {
        write!(out, "| {load} |")?;
        for value_bytes in &sizes {
            let row = |engine| results.cell(engine, layout, *value_bytes)?.row(load);
            let (Some(ours), Some(theirs)) = (row(OURS), row(PEER)) else {
                write!(out, " |")?;
                continue;
            };
            let tails = ours.latency_us.iter().filter_map(|(name, mine)| {
                let other = theirs.latency_us.get(name)?;
                Some(format!("{:.2}", other.p999 / mine.p999))
            });
            let tails: Vec<String> = tails.collect();
            let rate = ours.ops_per_s / theirs.ops_per_s;
            write!(out, " **{rate:.2}** · {} |", tails.join(" / "))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn ceilings(results: &Results, out: &mut String) -> std::fmt::Result {
    writeln!(out, "\n## The disk\n")?;
    if results.ceilings.is_empty() {
        return writeln!(out, "fio is not installed: no ceiling.");
    }
    writeln!(
        out,
        "| fio, direct I/O | at once | a second |\n|---|---|---|"
    )?;
    for one in &results.ceilings {
        let work = match one.work {
            Work::RandomRead => "random reads",
            Work::DurableWrite => "durable writes",
        };
        let kib = one.block_bytes >> 10;
        let rate = number(one.per_s);
        writeln!(out, "| {work} of {kib} KiB | {} | {rate} |", one.depth)?;
    }
    Ok(())
}

/// All figures of all engines in one layout with values of one size.
fn figures(
    results: &Results,
    layout: Layout,
    value_bytes: usize,
    out: &mut String,
) -> std::fmt::Result {
    let engines: Vec<&str> = results.engines();
    let cells = engines.iter();
    let cells = cells.filter_map(|engine| results.cell(engine, layout, value_bytes));
    let cells: Vec<_> = cells.collect();
    let keys = cells.first().map_or(0, |cell| cell.keys);
    let (layout_name, size) = (layout.name(), size(value_bytes));
    writeln!(out, "\n## Values of {size}, {layout_name}, {keys} keys\n")?;
    write!(out, "| load | ceiling |")?;
    for cell in &cells {
        write!(out, " {} |", cell.engine)?;
    }
    writeln!(out, "\n|---|---|{}", "---|".repeat(cells.len()))?;
    for load in results.loads(layout) {
        let ceiling = ceiling::of(&results.ceilings, load, value_bytes);
        let ceiling = ceiling.map_or("–".to_owned(), number);
        write!(out, "| {load} | {ceiling} |")?;
        for cell in &cells {
            match cell.row(load) {
                Some(row) => write!(out, " {} |", figures_of(row))?,
                None => write!(out, " |")?,
            }
        }
        writeln!(out)?;
    }
    for cell in &cells {
        if let Some(failure) = &cell.failure {
            writeln!(out, "\n{} did not reach the end: {failure}.", cell.engine)?;
        }
    }
    Ok(())
}

fn figures_of(row: &Row) -> String {
    let mut out = format!("**{}**", number(row.ops_per_s));
    for (name, latency) in &row.latency_us {
        let name = match row.latency_us.len() {
            1 => String::new(),
            _ => format!("{name} "),
        };
        let [p50, p99, p999] = [latency.p50, latency.p99, latency.p999].map(micros);
        write!(out, "<br>{name}{p50} / {p99} / {p999}").expect("memory");
    }
    let share = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.2}"));
    write!(
        out,
        "<br>{} · {} {} {:.2}",
        micros(row.cpu_us),
        share(row.written),
        share(row.read),
        row.kept
    )
    .expect("memory");
    if let Some(times) = row.overwritten {
        write!(out, "<br>{times:.1} times").expect("memory");
    }
    out
}

fn size(bytes: usize) -> String {
    match bytes {
        ..10_000 => format!("{bytes} B"),
        _ => format!("{} KiB", bytes >> 10),
    }
}

fn micros(value: f64) -> String {
    match value {
        ..10.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn number(value: f64) -> String {
    match value {
        ..100.0 => format!("{value:.1}"),
        ..10_000.0 => format!("{value:.0}"),
        ..1e6 => format!("{:.1} k", value / 1e3),
        _ => format!("{:.2} M", value / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::results::{Cell, Quantiles};

    #[test]
    fn twice_the_rate_and_half_the_tail_are_better() {
        let cell = |engine: &str, ops_per_s, p999| Cell {
            engine: engine.to_owned(),
            layout: Layout::OneCore,
            value_bytes: 1000,
            keys: 10,
            memory_bytes_max: None,
            rows: vec![Row {
                load: "read".to_owned(),
                ops_per_s,
                cpu_us: 3.0,
                latency_us: BTreeMap::from([(
                    "read".to_owned(),
                    Quantiles {
                        p50: 1.0,
                        p99: 2.0,
                        p999,
                    },
                )]),
                written: None,
                read: Some(4.0),
                kept: 0.6,
                overwritten: Some(2.25),
            }],
            failure: Some("signal: 9".to_owned()),
        };
        let results = Results {
            ceilings: Vec::new(),
            cells: vec![cell(OURS, 200.0, 50.0), cell(PEER, 100.0, 100.0)],
        };
        let table = markdown(&results);
        assert!(table.contains("| read | **2.00** · 2.00 |"), "{table}");
        assert!(
            table.contains("**200**<br>1.0 / 2.0 / 50<br>3.0 · – 4.00 0.60<br>2.2 times"),
            "{table}"
        );
        assert!(
            table.contains("torc did not reach the end: signal: 9."),
            "{table}"
        );
        assert!(table.contains("fio is not installed"), "{table}");
    }
}
