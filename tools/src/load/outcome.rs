//! A run's result as a value: what `run.json` holds, what every report is made from.
//!
//! Latencies are in microseconds. A percentile that would be higher if what has no answer had taken
//! for ever is named as a lower bound.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use torc_measure::mix::Operation;

use super::health::{self, Facts, Validity};
use super::pauses::Pauses;
use super::recorder::{Dual, Recorder, Series, Status, Turns, Verdicts, add, histogram};

/// Layout of the JSON; raised when a field changes its meaning.
pub const SCHEMA: u32 = 2;

/// Percentiles that every report shows.
pub const PERCENTILES: [(f64, &str); 6] = [
    (50.0, "p50"),
    (90.0, "p90"),
    (99.0, "p99"),
    (99.9, "p99.9"),
    (99.99, "p99.99"),
    (100.0, "max"),
];
/// Columns of the heat map in a factor of two of latency.
const HEAT_STEPS: f64 = 4.0;
/// Samples beyond a percentile without which it is not drawn as a figure of its own.
const CURVE_SAMPLES_MIN: f64 = 1.0;

/// What a run was, for the head of reports.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Setup {
    /// What it is called.
    pub name: String,
    /// Protocol and servers.
    pub target: String,
    /// Open, closed or sessions, with rate.
    pub model: String,
    /// Keys, distribution, value size, mix, levels.
    pub workload: String,
    /// Seed of all random choices.
    pub seed: u64,
    /// Operations a second that were to be made; `None` for a closed loop.
    pub offered_per_s: Option<f64>,
    /// When it began, in milliseconds since 1970.
    pub began_ms: u64,
    /// Names of the targets.
    pub targets: Vec<String>,
}

/// A run's result.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// [`SCHEMA`].
    pub schema: u32,
    /// What was run.
    #[serde(flatten)]
    pub setup: Setup,
    /// Length of the measurement.
    pub seconds: f64,
    /// Whether a signal cut it short.
    #[serde(default)]
    pub interrupted: bool,
    /// Operations that were answered.
    pub operations_done: u64,
    /// The same, a second.
    pub rate_per_s: f64,
    /// Bytes of values read and written, a second.
    pub value_bytes_per_s: f64,
    /// By kind.
    pub operations: BTreeMap<String, OperationOutcome>,
    /// Operations that were due and never sent.
    pub unsent: u64,
    /// What it took that one key has one writer at a time.
    #[serde(default)]
    pub turns: Turns,
    /// Whether the client kept up.
    pub validity: Validity,
    /// How well.
    pub client: Client,
    /// What verification found.
    pub verification: Verification,
    /// The first few errors, in words.
    pub errors: Vec<String>,
    /// Errors by kind.
    pub error_kinds: BTreeMap<String, u64>,
    /// Operations and latency by target.
    pub targets_share: Vec<TargetOutcome>,
    /// The run in time.
    pub intervals: Vec<Interval>,
    /// What it was measured on.
    pub environment: Value,
}

/// One kind of operation.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct OperationOutcome {
    /// Answered as asked, or with "there is no such key".
    pub done: u64,
    /// Answered with an error that says nothing happened.
    pub refused: u64,
    /// Outcome unknown: errors, broken connections, no answer.
    pub in_doubt: u64,
    /// Reads that found no value.
    pub missing: u64,
    /// Operations without an answer, which are in the percentiles as lower bounds.
    pub censored: u64,
    /// Percentiles from when operations were due that are lower bounds: they would be higher if
    /// what has no answer had taken for ever.
    #[serde(default)]
    pub bounds_from_intended: Vec<String>,
    /// The same from when operations were sent.
    #[serde(default)]
    pub bounds_from_sent: Vec<String>,
    /// Done, a second.
    pub rate_per_s: f64,
    /// Percentiles of all that was due, from when it was due.
    pub latency_us_from_intended: BTreeMap<String, f64>,
    /// Percentiles of all that was sent, from when it was sent.
    pub latency_us_from_sent: BTreeMap<String, f64>,
    /// By how they ended: count, and percentiles from when they were due.
    pub statuses: BTreeMap<String, StatusOutcome>,
    /// Points of the percentile curve, `[percentile, from intended, from sent]`.
    pub curve: Vec<[f64; 3]>,
}

/// Operations that ended alike.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StatusOutcome {
    /// How many.
    pub count: u64,
    /// Percentiles from when they were due.
    pub latency_us_from_intended: BTreeMap<String, f64>,
    /// Percentiles from when they were sent; empty where none was.
    #[serde(default)]
    pub latency_us_from_sent: BTreeMap<String, f64>,
}

/// The client's own state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Client {
    /// Share of the time that each thread worked, 0 to 1.
    pub threads_busy: Vec<f64>,
    /// Share of the time that each thread was ready and others had its CPU, 0 to 1.
    #[serde(default)]
    pub threads_delayed: Vec<f64>,
    /// Share of the time that a hypervisor had the thread's CPU, 0 to 1.
    #[serde(default)]
    pub threads_stolen: Vec<f64>,
    /// From when an operation was due and a connection free, to when it was sent.
    pub scheduling_lag_us: BTreeMap<String, f64>,
    /// What the machine alone adds to it: how long threads that had nothing to do were held up, at
    /// a random moment. Empty where they were not seen having nothing to do.
    #[serde(default)]
    pub pauses_us: BTreeMap<String, f64>,
}

impl Client {
    /// The busiest thread's share, 0 to 1.
    pub fn busiest(&self) -> f64 {
        most(&self.threads_busy)
    }

    /// How long the threads were without a CPU, for people.
    pub fn without_a_cpu(&self) -> String {
        format!(
            "{:.1} % of the time to other programs and {:.1} % to the hypervisor",
            most(&self.threads_delayed) * 100.0,
            most(&self.threads_stolen) * 100.0
        )
    }
}

fn most(shares: &[f64]) -> f64 {
    shares.iter().copied().fold(0.0, f64::max)
}

/// What verification found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Verification {
    /// Values checked byte by byte.
    pub checked: u64,
    /// Values with a wrong byte or of another key.
    pub wrong: u64,
    /// Acknowledged writes that a read did not return though it must.
    pub lost: u64,
    /// The same, where it need not.
    pub stale: u64,
    /// Versions that the stalest read was behind.
    pub stale_versions_max: u64,
    /// Age of the newer value that the stalest read did not see, in milliseconds.
    pub stale_ms_max: f64,
    /// Answers with more than one value.
    pub siblings: u64,
    /// The first few findings, in words.
    pub examples: Vec<String>,
}

impl Verification {
    /// The same in the units of reports.
    pub fn of(verdicts: &Verdicts) -> Self {
        Self {
            checked: verdicts.checked,
            wrong: verdicts.wrong,
            lost: verdicts.lost,
            stale: verdicts.stale,
            stale_versions_max: verdicts.stale_versions_max,
            stale_ms_max: verdicts.stale_us_max as f64 / 1e3,
            siblings: verdicts.siblings,
            examples: verdicts.examples.clone(),
        }
    }
}

/// What went to one target.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TargetOutcome {
    /// Its name.
    pub name: String,
    /// Operations.
    pub count: u64,
    /// Of all, 0 to 1.
    pub share: f64,
    /// Percentiles from when operations were due.
    pub latency_us_from_intended: BTreeMap<String, f64>,
    /// By kind, and by how they ended.
    #[serde(default)]
    pub operations: BTreeMap<String, BTreeMap<String, StatusOutcome>>,
}

/// A stretch of the run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Interval {
    /// Its beginning, in seconds of the run.
    pub at_s: f64,
    /// Its length; the last one may be shorter than the others.
    #[serde(default = "one_second")]
    pub seconds: f64,
    /// Operations done, by kind.
    pub done: BTreeMap<String, u64>,
    /// Percentiles from when operations were due, by kind.
    pub latency_us: BTreeMap<String, BTreeMap<String, f64>>,
    /// Operations refused, in doubt or without an answer.
    pub failed: u64,
    /// Cells of the heat map: number of the row (see [`heat_row`]) and operations.
    pub heat: Vec<(i32, u64)>,
    /// The busiest client thread's share of work.
    pub client_busy: f64,
    /// Scheduling lag, 99.9th percentile.
    pub lag_us_p999: f64,
}

/// The row of the heat map for a latency: four to a factor of two, 0 at a microsecond.
pub fn heat_row(micros: f64) -> i32 {
    let row = (micros.max(1e-3).log2() * HEAT_STEPS).floor();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a logarithm times four is far within 32 bits"
    )]
    let row = row as i32;
    row
}

/// What older results did not tell.
fn one_second() -> f64 {
    1.0
}

impl Interval {
    /// The run ended after so many seconds: nothing was measured beyond.
    pub fn end(&mut self, seconds: f64) {
        self.seconds = self.seconds.min((seconds - self.at_s).max(0.0));
    }
}

/// The figures of one interval.
pub fn interval(at_s: f64, seconds: f64, recorder: &Recorder) -> Interval {
    let mut all = histogram(3);
    let mut result = Interval {
        at_s,
        seconds,
        client_busy: recorder.health.most(health::Thread::busy),
        lag_us_p999: micros(recorder.health.lag.value_at_quantile(0.999)),
        ..Interval::default()
    };
    for operation in Operation::ALL {
        let series = recorder.series(operation);
        if series.total_count() == 0 {
            continue;
        }
        let total = series.total().intended;
        let name = operation.name().to_owned();
        result.done.insert(name.clone(), series.done());
        result.latency_us.insert(name, percentiles(&total));
        result.failed += series.failed();
        add(&mut all, &total);
    }
    for value in all.iter_recorded() {
        let row = heat_row(micros(value.value_iterated_to()));
        match result.heat.last_mut() {
            Some((last, count)) if *last == row => *count += value.count_at_value(),
            _ => result.heat.push((row, value.count_at_value())),
        }
    }
    result
}

impl Outcome {
    /// The result of a run.
    pub fn new(
        setup: Setup,
        seconds: f64,
        recorder: &Recorder,
        intervals: Vec<Interval>,
        environment: Value,
    ) -> Self {
        let mut all = histogram(3);
        let mut operations = BTreeMap::new();
        for operation in Operation::ALL {
            let series = recorder.series(operation);
            if series.total_count() > 0 {
                let total = series.total();
                add(&mut all, &total.intended);
                let outcome = operation_outcome(series, &total, seconds);
                operations.insert(operation.name().to_owned(), outcome);
            }
        }
        let unsent = recorder.count(Status::Unsent);
        let validity = health::judge(Facts {
            health: &recorder.health,
            open: setup.offered_per_s.is_some(),
            due: all.len(),
            unsent,
            waited: recorder.turns.waited,
            median_ns: all.value_at_quantile(0.5),
        });
        Self {
            schema: SCHEMA,
            seconds,
            interrupted: false,
            operations_done: recorder.done(),
            rate_per_s: rate(recorder.done(), seconds),
            value_bytes_per_s: rate(recorder.value_bytes, seconds),
            operations,
            unsent,
            turns: recorder.turns,
            validity,
            client: Client {
                threads_busy: threads(recorder, health::Thread::busy),
                threads_delayed: threads(recorder, health::Thread::delayed),
                threads_stolen: threads(recorder, health::Thread::stolen),
                scheduling_lag_us: percentiles(&recorder.health.lag),
                pauses_us: pauses(&recorder.health.pauses),
            },
            verification: Verification::of(&recorder.verdicts),
            errors: recorder.errors.clone(),
            error_kinds: recorder.error_kinds.clone(),
            targets_share: targets(&setup.targets, recorder),
            intervals,
            environment,
            setup,
        }
    }

    /// Whether operations had their own time, whatever was answered.
    pub fn open(&self) -> bool {
        self.setup.offered_per_s.is_some()
    }

    /// A figure of one kind of operation in microseconds: latency from when it was due, service
    /// time in a closed loop.
    pub fn latency_us(&self, operation: &str, percentile: &str) -> Option<f64> {
        let operation = self.operations.get(operation)?;
        let percentiles = if self.open() {
            &operation.latency_us_from_intended
        } else {
            &operation.latency_us_from_sent
        };
        percentiles.get(percentile).copied()
    }

    /// Share of all due operations that were refused, in doubt or without an answer, 0 to 1.
    pub fn failed_share(&self) -> f64 {
        let failed: u64 = self
            .operations
            .values()
            .map(|one| one.refused + one.in_doubt + one.censored)
            .sum();
        failed as f64 / (failed + self.operations_done).max(1) as f64
    }
}

fn pauses(pauses: &Pauses) -> BTreeMap<String, f64> {
    PERCENTILES
        .iter()
        .filter_map(|(percentile, name)| {
            let wait = pauses.wait_at(percentile / 100.0)?;
            Some(((*name).to_owned(), micros(wait)))
        })
        .collect()
}

fn threads(recorder: &Recorder, share: fn(&health::Thread) -> f64) -> Vec<f64> {
    recorder.health.threads.values().map(share).collect()
}

fn operation_outcome(series: &Series, total: &Dual, seconds: f64) -> OperationOutcome {
    let censored = Status::ALL
        .iter()
        .filter(|status| status.censored())
        .map(|status| series.count(*status))
        .sum();
    let statuses = Status::ALL.iter().filter_map(|status| {
        let dual = series
            .of(*status)
            .filter(|dual| !dual.intended.is_empty())?;
        let outcome = StatusOutcome {
            count: dual.intended.len(),
            latency_us_from_intended: percentiles(&dual.intended),
            latency_us_from_sent: percentiles(&dual.sent),
        };
        Some((status.name().to_owned(), outcome))
    });
    OperationOutcome {
        done: series.done(),
        refused: series.count(Status::Refused),
        in_doubt: series.count(Status::InDoubt),
        missing: series.count(Status::Missing),
        censored,
        bounds_from_intended: bounds(series, &total.intended, |dual| &dual.intended),
        bounds_from_sent: bounds(series, &total.sent, |dual| &dual.sent),
        rate_per_s: rate(series.done(), seconds),
        latency_us_from_intended: percentiles(&total.intended),
        latency_us_from_sent: percentiles(&total.sent),
        statuses: statuses.collect(),
        curve: curve(total),
    }
}

/// Names of the percentiles of `total` that would rise by more than a hundredth if what was
/// censored had taken for ever.
fn bounds(
    series: &Series,
    total: &Histogram<u64>,
    of: fn(&Dual) -> &Histogram<u64>,
) -> Vec<String> {
    let mut answered = histogram(3);
    for status in Status::ALL.iter().filter(|status| !status.censored()) {
        if let Some(dual) = series.of(*status) {
            add(&mut answered, of(dual));
        }
    }
    let (all, known) = (total.len() as f64, answered.len() as f64);
    let rises = |percentile: f64| {
        let rank = all * percentile / 100.0;
        let most = answered.value_at_quantile((rank / known).min(1.0)) as f64;
        rank > known || most > 1.01 * total.value_at_percentile(percentile) as f64
    };
    PERCENTILES
        .iter()
        .filter(|(percentile, _)| known < all && rises(*percentile))
        .map(|(_, name)| (*name).to_owned())
        .collect()
}

fn targets(names: &[String], recorder: &Recorder) -> Vec<TargetOutcome> {
    let mut found: Vec<TargetOutcome> = names
        .iter()
        .enumerate()
        .map(|(number, name)| {
            let mut found = TargetOutcome {
                name: name.clone(),
                ..TargetOutcome::default()
            };
            let Some(target) = recorder.targets().get(number) else {
                return found;
            };
            let intended = target.intended();
            found.count = intended.len();
            found.latency_us_from_intended = percentiles(&intended);
            for (operation, status, cell) in target.cells() {
                let outcome = StatusOutcome {
                    count: cell.intended.len(),
                    latency_us_from_intended: percentiles(&cell.intended.dense()),
                    latency_us_from_sent: percentiles(&cell.sent.dense()),
                };
                let statuses = found.operations.entry(operation.name().to_owned());
                statuses
                    .or_default()
                    .insert(status.name().to_owned(), outcome);
            }
            found
        })
        .collect();
    let all: u64 = found.iter().map(|target| target.count).sum();
    for target in &mut found {
        target.share = target.count as f64 / all.max(1) as f64;
    }
    found
}

/// Points at 0, 50, 75, 87.5, … percent with three between each: evenly spaced on an axis of
/// nines, as far as there are samples.
fn curve(total: &Dual) -> Vec<[f64; 3]> {
    let count = total.intended.len() as f64;
    let mut points = Vec::new();
    let mut beyond = 1.0_f64;
    while beyond * count >= CURVE_SAMPLES_MIN && points.len() < 200 {
        let quantile = 1.0 - beyond;
        let at = |histogram: &Histogram<u64>| micros(histogram.value_at_quantile(quantile));
        points.push([quantile * 100.0, at(&total.intended), at(&total.sent)]);
        beyond /= 2.0_f64.powf(0.25);
    }
    points.push([
        100.0,
        micros(total.intended.max()),
        micros(total.sent.max()),
    ]);
    points
}

/// The usual percentiles, mean and standard deviation, in microseconds; empty without samples.
pub fn percentiles(histogram: &Histogram<u64>) -> BTreeMap<String, f64> {
    if histogram.is_empty() {
        return BTreeMap::new();
    }
    let mut object: BTreeMap<String, f64> = PERCENTILES
        .iter()
        .map(|(percentile, name)| {
            let value = micros(histogram.value_at_percentile(*percentile));
            ((*name).to_owned(), value)
        })
        .collect();
    object.insert("mean".into(), histogram.mean() / 1e3);
    object
}

/// Nanoseconds as microseconds.
pub fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1e3
}

fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        count as f64 / seconds
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heat_rows_are_four_to_a_factor_of_two() {
        assert_eq!(heat_row(1.0), 0);
        assert_eq!(heat_row(2.0), 4);
        assert_eq!(heat_row(1000.0), 39);
        assert_eq!(heat_row(0.5), -4);
    }

    #[test]
    fn a_result_survives_its_file() {
        let mut recorder = Recorder::default();
        for micros in 1..=1000 {
            recorder.record(
                Operation::Write,
                Status::Ok,
                micros * 1000,
                Some(micros * 500),
            );
            let (intended, sent) = (micros * 1000, micros * 500);
            recorder.record_target(0, Operation::Write, Status::Ok, intended, sent);
        }
        recorder.record(
            Operation::Write,
            Status::TimedOut,
            5_000_000,
            Some(5_000_000),
        );
        recorder.record_target(0, Operation::Write, Status::TimedOut, 5_000_000, 4_000_000);
        let setup = Setup {
            name: "a".into(),
            targets: vec!["n1/0".into()],
            ..Setup::default()
        };
        let intervals = vec![interval(0.0, 1.0, &recorder)];
        let outcome = Outcome::new(setup, 10.0, &recorder, intervals, Value::Null);
        let text = serde_json::to_string(&outcome).unwrap();
        let again: Outcome = serde_json::from_str(&text).unwrap();
        assert_eq!(again.rate_per_s, 100.0);
        let write = &again.operations["write"];
        assert_eq!((write.done, write.censored, write.in_doubt), (1000, 1, 0));
        assert_eq!(write.bounds_from_intended, ["p99.99", "max"]);
        let p99 = write.latency_us_from_intended["p99"];
        assert!((989.0..993.0).contains(&p99), "{p99}");
        assert!(write.curve.is_sorted_by(|one, other| one[1] <= other[1]));
        let heat: u64 = again.intervals[0].heat.iter().map(|(_, count)| count).sum();
        assert_eq!(heat, 1001);
        let target = &again.targets_share[0];
        let writes = &target.operations["write"];
        assert_eq!(
            (target.count, writes["ok"].count, writes["timed_out"].count),
            (1001, 1000, 1)
        );
        let p50 = |latency: &BTreeMap<String, f64>| latency["p50"].round();
        let ok = &writes["ok"];
        assert_eq!(
            (
                p50(&ok.latency_us_from_intended),
                p50(&ok.latency_us_from_sent)
            ),
            (502.0, 251.0)
        );
    }
}
