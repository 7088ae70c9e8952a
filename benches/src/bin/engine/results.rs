//! What was measured, as it is kept between runs.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::ceiling::Ceiling;
use crate::layout::Layout;
use crate::workload::{Load, Settings, Tally, Until};

/// Everything that a table and a page are made of.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Results {
    /// What the disk does by itself.
    pub ceilings: Vec<Ceiling>,
    pub cells: Vec<Cell>,
}

/// One engine in one layout with values of one size.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Cell {
    pub engine: String,
    pub layout: Layout,
    pub value_bytes: usize,
    /// Keys that the bulk load writes.
    pub keys: u32,
    /// Memory of the whole process, the page cache that it fills included; `None` where no limit could be set.
    pub memory_bytes_max: Option<u64>,
    pub rows: Vec<Row>,
    /// How the process ended before its last load, if it did.
    pub failure: Option<String>,
}

/// One load.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    pub load: String,
    pub ops_per_s: f64,
    /// CPU time of the whole process for each operation, in microseconds.
    pub cpu_us: f64,
    /// By what was done: `read`, `write`, `scan`.
    pub latency_us: BTreeMap<String, Quantiles>,
    /// Bytes that went to the disk for each byte of a record that was put.
    pub written: Option<f64>,
    /// Bytes that came from the disk for each byte of a record that was asked for.
    pub read: Option<f64>,
    /// Bytes of the directory for each byte of a record that is there.
    pub kept: f64,
    /// Of a load that overwrites until so much has been: bytes that were put for each byte that is there.
    pub overwritten: Option<f64>,
}

/// Of a latency, in microseconds.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
}

impl Results {
    /// What was kept in `path`; nothing if there is no such file.
    pub fn read(path: &Path) -> Results {
        std::fs::read(path).map_or_else(
            |_| Results::default(),
            |text| serde_json::from_slice(&text).expect("results as this benchmark writes them"),
        )
    }

    /// Takes a cell; its rows replace older ones.
    pub fn add(&mut self, cell: Cell) {
        let is_it = |old: &&mut Cell| {
            (&old.engine, old.layout, old.value_bytes)
                == (&cell.engine, cell.layout, cell.value_bytes)
        };
        let Some(old) = self.cells.iter_mut().find(is_it) else {
            return self.cells.push(cell);
        };
        let mut rows = std::mem::take(&mut old.rows);
        for row in &cell.rows {
            match rows.iter_mut().find(|other| other.load == row.load) {
                Some(other) => other.clone_from(row),
                None => rows.push(row.clone()),
            }
        }
        *old = Cell { rows, ..cell };
    }

    pub fn layouts(&self) -> Vec<Layout> {
        let layouts = self.cells.iter().map(|cell| cell.layout);
        let layouts: std::collections::BTreeSet<Layout> = layouts.collect();
        layouts.into_iter().collect()
    }

    /// The sizes of values, smallest first.
    pub fn sizes(&self) -> Vec<usize> {
        let sizes = self.cells.iter().map(|cell| cell.value_bytes);
        let sizes: std::collections::BTreeSet<usize> = sizes.collect();
        sizes.into_iter().collect()
    }

    /// Engines, each once, in the order of appearance.
    pub fn engines(&self) -> Vec<&str> {
        distinct(self.cells.iter().map(|cell| &*cell.engine))
    }

    /// Loads that were measured in a layout, likewise.
    pub fn loads(&self, layout: Layout) -> Vec<&str> {
        let cells = self.cells.iter().filter(|cell| cell.layout == layout);
        distinct(cells.flat_map(|cell| &cell.rows).map(|row| &*row.load))
    }

    pub fn cell(&self, engine: &str, layout: Layout, value_bytes: usize) -> Option<&Cell> {
        let is_it = |cell: &&Cell| {
            (&*cell.engine, cell.layout, cell.value_bytes) == (engine, layout, value_bytes)
        };
        self.cells.iter().find(is_it)
    }
}

impl Cell {
    pub fn row(&self, load: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.load == load)
    }
}

/// When a load began: on the clock, in CPU time, and in bytes that this process moved to and from disks.
#[derive(Clone, Copy)]
pub struct Begun {
    at: Instant,
    cpu: Duration,
    moved: Moved,
}

impl Begun {
    pub fn now() -> Begun {
        Begun {
            at: Instant::now(),
            cpu: cpu_time(),
            moved: Moved::so_far(),
        }
    }

    pub fn at(&self) -> Instant {
        self.at
    }

    /// The load has just ended, and the instances of an engine hold so many keys: prints its row, as JSON for the
    /// process that put all together, and for people.
    pub fn ended(
        &self,
        load: &Load,
        settings: &Settings,
        keys: u64,
        tallies: &[Tally],
        directory: &Path,
    ) {
        let took = self.at.elapsed().as_secs_f64();
        let cpu = (cpu_time() - self.cpu).as_secs_f64();
        let moved = Moved::so_far();
        let mut tally = Tally::new();
        tallies.iter().for_each(|one| tally.add(one));
        let done = tally.reads.len() + tally.writes.len() + tally.scans.len();
        let ratio = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let kinds = [
            ("read", &tally.reads),
            ("write", &tally.writes),
            ("scan", &tally.scans),
        ];
        let kinds = kinds.into_iter().filter(|(_, one)| !one.is_empty());
        let live = keys * settings.record_bytes();
        let row = Row {
            load: load.name.clone(),
            ops_per_s: done as f64 / took,
            cpu_us: cpu * 1e6 / done.max(1) as f64,
            latency_us: kinds
                .map(|(name, histogram)| (name.to_owned(), Quantiles::of(histogram)))
                .collect(),
            written: ratio(moved.written - self.moved.written, tally.put_bytes),
            read: ratio(moved.read - self.moved.read, tally.asked_bytes),
            kept: bytes_below(directory) as f64 / live.max(1) as f64,
            overwritten: match load.until {
                Until::Overwritten(_) => ratio(tally.put_bytes, live),
                _ => None,
            },
        };
        println!("{}", serde_json::to_string(&row).expect("plain data"));
        eprintln!("{:<34} {:>10.0}/s, {took:.1} s", row.load, row.ops_per_s);
    }
}

impl Quantiles {
    fn of(histogram: &Histogram<u64>) -> Quantiles {
        let at = |quantile| {
            Duration::from_nanos(histogram.value_at_quantile(quantile)).as_secs_f64() * 1e6
        };
        Quantiles {
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
        }
    }
}

/// CPU time of this process so far, kernel and background threads included.
fn cpu_time() -> Duration {
    const TICKS_PER_S: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let after_name = stat.rsplit(')').next().expect("at least one piece");
    let ticks = after_name.split_whitespace().skip(11).take(2);
    let ticks = ticks.map(|field| field.parse::<f64>().expect("a number of ticks"));
    Duration::from_secs_f64(ticks.sum::<f64>() / TICKS_PER_S)
}

/// Bytes that this process moved, as the kernel accounts them below the page cache.
#[derive(Clone, Copy)]
struct Moved {
    read: u64,
    written: u64,
}

impl Moved {
    fn so_far() -> Moved {
        let text = std::fs::read_to_string("/proc/self/io").expect("a kernel that accounts I/O");
        let field = |name: &str| -> u64 {
            let mut lines = text.lines().filter_map(|line| line.split_once(": "));
            let (_, value) = lines.find(|(key, _)| *key == name).expect("its name");
            value.parse().expect("a number")
        };
        Moved {
            read: field("read_bytes"),
            written: field("write_bytes"),
        }
    }
}

/// Each once, in the order of appearance.
fn distinct<'a>(items: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for item in items {
        if !seen.contains(&item) {
            seen.push(item);
        }
    }
    seen
}

/// What all files below a directory take.
fn bytes_below(directory: &Path) -> u64 {
    const BLOCK: u64 = 512;
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        // A file may go meanwhile.
        .filter_map(|entry| Some((entry.path(), entry.metadata().ok()?)))
        .map(|(path, metadata)| match metadata.is_dir() {
            true => bytes_below(&path),
            false => metadata.blocks() * BLOCK,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(layout: Layout, rows: &[(&str, f64)]) -> Cell {
        let row = |(load, ops_per_s): &(&str, f64)| Row {
            load: (*load).to_owned(),
            ops_per_s: *ops_per_s,
            cpu_us: 1.0,
            latency_us: BTreeMap::new(),
            written: None,
            read: None,
            kept: 1.0,
            overwritten: None,
        };
        Cell {
            engine: "an engine".to_owned(),
            layout,
            value_bytes: 100,
            keys: 10,
            memory_bytes_max: None,
            rows: rows.iter().map(row).collect(),
            failure: None,
        }
    }

    #[test]
    fn rows_measured_again_replace_older_ones_of_the_same_layout() {
        let mut results = Results::default();
        results.add(cell(Layout::OneCore, &[("read", 1.0), ("write", 2.0)]));
        results.add(cell(Layout::Pinned, &[("scan", 3.0)]));
        results.add(cell(Layout::OneCore, &[("write", 4.0)]));
        let found = |layout| {
            let cell = results.cell("an engine", layout, 100).unwrap();
            let rows = cell.rows.iter();
            rows.map(|row| (&*row.load, row.ops_per_s))
                .collect::<Vec<_>>()
        };
        assert_eq!(found(Layout::OneCore), [("read", 1.0), ("write", 4.0)]);
        assert_eq!(found(Layout::Pinned), [("scan", 3.0)]);
        assert_eq!(results.loads(Layout::OneCore), ["read", "write"]);
        assert_eq!(results.layouts(), [Layout::OneCore, Layout::Pinned]);
    }
}
