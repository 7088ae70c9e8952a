//! What was measured: a line a load as it ends, and all of it as a plot.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::workload::{Latencies, Load};

/// One line.
struct Row {
    engine: &'static str,
    load: String,
    ops_per_s: f64,
    p99_us: f64,
}

/// All lines.
#[derive(Default)]
pub struct Report(Vec<Row>);

/// When a load began, on the clock and in CPU time.
pub struct Begun {
    at: Instant,
    cpu: Duration,
}

impl Begun {
    pub fn now() -> Begun {
        Begun {
            at: Instant::now(),
            cpu: cpu_time(),
        }
    }

    pub fn at(&self) -> Instant {
        self.at
    }
}

impl Report {
    pub fn print_head() {
        println!(
            "{:<14} {:<34} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "engine", "load", "ops/s", "p50 us", "p99 us", "p99.9 us", "max us", "CPU us/op"
        );
    }

    /// Takes a load that has just ended, and prints it.
    pub fn add(&mut self, engine: &'static str, load: Load, latencies: &Latencies, begun: &Begun) {
        let took = begun.at.elapsed().as_secs_f64();
        let cpu = (cpu_time() - begun.cpu).as_secs_f64();
        let all = latencies.puts.len() + latencies.gets.len();
        let cpu_us = cpu * 1e6 / all as f64;
        let is_mixed = !latencies.puts.is_empty() && !latencies.gets.is_empty();
        for (what, histogram) in [("put", &latencies.puts), ("get", &latencies.gets)] {
            if histogram.is_empty() {
                continue;
            }
            let load = if is_mixed {
                format!("{}: {what}", load.name())
            } else {
                load.name()
            };
            let ops_per_s = histogram.len() as f64 / took;
            let at = |quantile| micros(histogram, quantile);
            println!(
                "{engine:<14} {load:<34} {ops_per_s:>9.0} {:>9.1} {:>9.1} {:>9.1} {:>9.0} {cpu_us:>9.1}",
                at(0.5),
                at(0.99),
                at(0.999),
                at(1.0),
            );
            self.0.push(Row {
                engine,
                load,
                ops_per_s,
                p99_us: at(0.99),
            });
        }
    }

    /// Writes the plot: for each load a bar an engine, throughput to the left, p99 to the right, on
    /// logarithmic scales.
    pub fn write_plot(&self, path: &Path) -> std::io::Result<()> {
        std::fs::write(path, self.plot())
    }

    fn plot(&self) -> String {
        const COLOURS: [&str; 4] = ["#1f77b4", "#ff7f0e", "#ffbb78", "#2ca02c"];
        let engines = distinct(self.0.iter().map(|row| row.engine));
        let loads = distinct(self.0.iter().map(|row| row.load.as_str()));
        let most_ops = self.0.iter().map(|row| row.ops_per_s).fold(1.0, f64::max);
        let most_us = self.0.iter().map(|row| row.p99_us).fold(1.0, f64::max);
        let mut bars = String::new();
        let mut y = 60;
        for load in &loads {
            write!(bars, r#"<text x="10" y="{}">{load}</text>"#, y + 12).expect("memory");
            for (engine, colour) in engines.iter().zip(COLOURS) {
                let is_it = |row: &&Row| row.engine == *engine && row.load == *load;
                let Some(row) = self.0.iter().find(is_it) else {
                    continue;
                };
                for (x, value, most, unit) in [
                    (260, row.ops_per_s, most_ops, "/s"),
                    (680, row.p99_us, most_us, "us"),
                ] {
                    let width = 300.0 * (value.max(1.0).ln() / most.ln()).clamp(0.0, 1.0);
                    let end = f64::from(x) + width + 4.0;
                    write!(
                        bars,
                        r#"<rect x="{x}" y="{y}" width="{width:.0}" height="11" fill="{colour}"/>
<text x="{end:.0}" y="{}">{value:.0} {unit}</text>
"#,
                        y + 10,
                    )
                    .expect("memory");
                }
                y += 13;
            }
            y += 10;
        }
        let mut legend = String::new();
        for ((engine, colour), at) in engines.iter().zip(COLOURS).zip(0..) {
            let x = 10 + at * 120;
            write!(
                legend,
                r#"<rect x="{x}" y="8" width="11" height="11" fill="{colour}"/><text x="{}" y="18">{engine}</text>"#,
                x + 16
            )
            .expect("memory");
        }
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="1080" height="{y}" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="#fff"/>
{legend}
<text x="260" y="44">operations a second (logarithmic)</text><text x="680" y="44">p99 in microseconds (logarithmic)</text>
{bars}</svg>
"##
        )
    }
}

fn micros(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    Duration::from_nanos(histogram.value_at_quantile(quantile)).as_secs_f64() * 1e6
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

/// CPU time of this process so far, kernel and background threads included.
fn cpu_time() -> Duration {
    const TICKS_PER_S: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let after_name = stat.rsplit(')').next().expect("at least one piece");
    let ticks = after_name.split_whitespace().skip(11).take(2);
    let ticks = ticks.map(|field| field.parse::<f64>().expect("a number of ticks"));
    Duration::from_secs_f64(ticks.sum::<f64>() / TICKS_PER_S)
}
