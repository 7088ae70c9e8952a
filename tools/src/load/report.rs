//! A run's result as text and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::recorder::{Operation, Recorder, Series};

/// Percentiles that every report shows.
const PERCENTILES: [(f64, &str); 6] = [
    (50.0, "p50"),
    (90.0, "p90"),
    (99.0, "p99"),
    (99.9, "p99.9"),
    (99.99, "p99.99"),
    (100.0, "max"),
];

/// What was run, for the head of the report.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Protocol and endpoints.
    pub target: String,
    /// `closed loop (service time)` or `open loop at N/s`.
    pub model: String,
    /// Keys, distribution, value size, mix, levels.
    pub workload: String,
    /// Seed of all random choices.
    pub seed: u64,
}

/// The report as text.
pub fn text(setup: &Setup, elapsed: Duration, recorder: &Recorder) -> String {
    let mut out = String::new();
    let seconds = elapsed.as_secs_f64();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!("target    {}", setup.target));
    line(format!("model     {}", setup.model));
    line(format!("workload  {}, seed {}", setup.workload, setup.seed));
    let done: u64 = Operation::ALL
        .iter()
        .map(|op| recorder.series(*op).done)
        .sum();
    line(format!(
        "rate      {:.0}/s: {done} operations in {seconds:.2} s",
        rate(done, seconds)
    ));
    line(String::new());
    let mut head = format!("{:<22}{:>9}", "latency, ms", "count");
    for (_, name) in PERCENTILES {
        write!(head, "{name:>10}").expect("writing to a string");
    }
    line(head);
    for operation in Operation::ALL {
        let series = recorder.series(operation);
        if series.intended.is_empty() {
            continue;
        }
        line(latency_row(
            &format!("{} (from intended)", operation.name()),
            &series.intended,
        ));
        line(latency_row(
            &format!("{} (from sent)", operation.name()),
            &series.sent,
        ));
    }
    line(String::new());
    for operation in Operation::ALL {
        let series = recorder.series(operation);
        line(format!(
            "{:<6} done {}, refused {}, in doubt {}, missing {}",
            operation.name(),
            series.done,
            series.refused,
            series.in_doubt,
            series.missing
        ));
    }
    if recorder.unsent > 0 {
        line(format!(
            "unsent    {}: the server or this client did not keep up",
            recorder.unsent
        ));
    }
    let verdicts = &recorder.verdicts;
    line(format!(
        "verified  {} values: {} wrong, {} acknowledged writes lost, {} answers with siblings",
        verdicts.checked, verdicts.wrong, verdicts.lost, verdicts.siblings
    ));
    for example in verdicts.examples.iter().chain(&recorder.errors) {
        line(format!("  {example}"));
    }
    out
}

/// The report as one JSON object. Latencies are in microseconds.
pub fn json(setup: &Setup, elapsed: Duration, recorder: &Recorder) -> Value {
    let seconds = elapsed.as_secs_f64();
    let mut operations = serde_json::Map::new();
    let mut done = 0;
    for operation in Operation::ALL {
        let series = recorder.series(operation);
        done += series.done;
        operations.insert(operation.name().into(), series_json(series, seconds));
    }
    let verdicts = &recorder.verdicts;
    json!({
        "target": setup.target,
        "model": setup.model,
        "workload": setup.workload,
        "seed": setup.seed,
        "seconds": seconds,
        "operations_done": done,
        "rate_per_s": rate(done, seconds),
        "operations": operations,
        "unsent": recorder.unsent,
        "verification": {
            "checked": verdicts.checked,
            "wrong": verdicts.wrong,
            "lost": verdicts.lost,
            "siblings": verdicts.siblings,
            "examples": verdicts.examples,
        },
        "errors": recorder.errors,
    })
}

fn series_json(series: &Series, seconds: f64) -> Value {
    json!({
        "done": series.done,
        "refused": series.refused,
        "in_doubt": series.in_doubt,
        "missing": series.missing,
        "rate_per_s": rate(series.done, seconds),
        "latency_us_from_intended": percentiles_json(&series.intended),
        "latency_us_from_sent": percentiles_json(&series.sent),
    })
}

fn percentiles_json(histogram: &Histogram<u64>) -> Value {
    let mut object = serde_json::Map::new();
    for (percentile, name) in PERCENTILES {
        object.insert(name.into(), json!(at(histogram, percentile) * 1000.0));
    }
    object.insert("mean".into(), json!(histogram.mean() / 1000.0));
    Value::Object(object)
}

fn latency_row(name: &str, histogram: &Histogram<u64>) -> String {
    let mut row = format!("{name:<22}{:>9}", histogram.len());
    for (percentile, _) in PERCENTILES {
        write!(row, "{:>10.3}", at(histogram, percentile)).expect("writing to a string");
    }
    row
}

/// Milliseconds at a percentile.
fn at(histogram: &Histogram<u64>, percentile: f64) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "an hour in nanoseconds fits 53 bits"
    )]
    let nanos = histogram.value_at_percentile(percentile) as f64;
    nanos / 1e6
}

fn rate(count: u64, seconds: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    let count = count as f64;
    if seconds > 0.0 { count / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_json_tell_the_same() {
        let mut recorder = Recorder::default();
        for millis in 1..=100 {
            let latency = Duration::from_millis(millis);
            recorder.latency(Operation::Write, latency, latency / 2);
            recorder.series_mut(Operation::Write).done += 1;
        }
        recorder.verdicts.lost = 2;
        let setup = Setup {
            target: "http".into(),
            model: "closed loop".into(),
            workload: "10 keys".into(),
            seed: 7,
        };
        let document = json(&setup, Duration::from_secs(10), &recorder);
        assert_eq!(document["rate_per_s"], 10.0);
        let p99 = document["operations"]["write"]["latency_us_from_intended"]["p99"].as_f64();
        assert!((98_900.0..99_200.0).contains(&p99.unwrap()), "{p99:?}");
        let words = text(&setup, Duration::from_secs(10), &recorder);
        assert!(words.contains("2 acknowledged writes lost"), "{words}");
        assert!(words.contains("100 operations in 10.00 s"), "{words}");
    }
}
