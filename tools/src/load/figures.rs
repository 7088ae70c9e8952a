//! Which figures of a run may be printed: every report, as text or as a page, shows what is found here.
//!
//! A percentile beyond which there is no sample is the maximum, which has its own column, and is left
//! out. One that what was never answered could raise is a lower bound.

use std::collections::BTreeMap;

use serde::Serialize;

use super::outcome::{OperationOutcome, Outcome, PERCENTILES, TargetOutcome};
use super::recorder::Status;

/// A latency.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// In microseconds.
    pub us: f64,
    /// Whether it is at least that.
    pub bound: bool,
}

/// Latencies of one kind of operation from one beginning.
#[derive(Debug, Serialize)]
pub struct Latency<'a> {
    /// The kind.
    pub operation: &'a str,
    /// Whether from when operations were due, not from when they were sent.
    pub intended: bool,
    /// Operations.
    pub count: u64,
    /// For each of [`PERCENTILES`].
    pub figures: Vec<Option<Figure>>,
}

/// Latencies of one kind of operation that ended alike on one target.
#[derive(Debug, Serialize)]
pub struct TargetLatency<'a> {
    /// The target.
    pub target: &'a str,
    /// The kind.
    pub operation: &'a str,
    /// How they ended.
    pub status: &'a str,
    /// Whether that is a failure.
    pub failed: bool,
    /// Operations.
    pub count: u64,
    /// From when they were due, for each of [`PERCENTILES`].
    pub figures: Vec<Option<Figure>>,
}

/// What a page shows of one run.
#[derive(Debug, Serialize)]
pub struct Tables<'a> {
    /// Names of the figures.
    names: Vec<&'static str>,
    latencies: Vec<Latency<'a>>,
    /// What failed first.
    targets: Vec<TargetLatency<'a>>,
    /// For each target.
    p99: Vec<Option<Figure>>,
}

impl<'a> Tables<'a> {
    /// Of this run.
    pub fn of(outcome: &'a Outcome) -> Self {
        let names = PERCENTILES.map(|(_, name)| name);
        let p99 = names.iter().position(|name| *name == "p99");
        let mut targets: Vec<_> = outcome.targets_share.iter().flat_map(of_target).collect();
        targets.sort_by_key(|one| !one.failed);
        Self {
            names: names.to_vec(),
            latencies: latencies(outcome),
            targets,
            p99: outcome
                .targets_share
                .iter()
                .map(|one| figures(&one.latency_us_from_intended, one.count, &[])[p99?])
                .collect(),
        }
    }
}

/// The latencies of a run: from sent alone where operations had no time of their own.
pub fn latencies(outcome: &Outcome) -> Vec<Latency<'_>> {
    let beginnings: &[bool] = if outcome.open() {
        &[true, false]
    } else {
        &[false]
    };
    let operations = outcome.operations.iter();
    let pairs = operations.flat_map(|one| beginnings.iter().map(move |intended| (one, *intended)));
    pairs
        .map(|((name, operation), intended)| latency(name, operation, intended))
        .collect()
}

fn latency<'a>(name: &'a str, operation: &OperationOutcome, intended: bool) -> Latency<'a> {
    let ended = |status: Status| {
        operation
            .statuses
            .get(status.name())
            .map_or(0, |one| one.count)
    };
    let answered = operation.done + ended(Status::AfterEnd);
    let all = answered + operation.refused + operation.in_doubt + operation.censored;
    let (percentiles, bounds, count) = if intended {
        let bounds = &operation.bounds_from_intended;
        (&operation.latency_us_from_intended, bounds, all)
    } else {
        let bounds = &operation.bounds_from_sent;
        (
            &operation.latency_us_from_sent,
            bounds,
            all - ended(Status::Unsent),
        )
    };
    Latency {
        operation: name,
        intended,
        count,
        figures: figures(percentiles, count, bounds),
    }
}

/// What there is of a target, by operation and how it ended.
pub fn of_target(target: &TargetOutcome) -> impl Iterator<Item = TargetLatency<'_>> {
    target
        .operations
        .iter()
        .flat_map(move |(operation, statuses)| {
            statuses.iter().map(move |(name, outcome)| {
                let status = Status::named(name);
                let mut figures = figures(&outcome.latency_us_from_intended, outcome.count, &[]);
                if status.is_some_and(Status::censored) {
                    figures
                        .iter_mut()
                        .flatten()
                        .for_each(|one| one.bound = true);
                }
                TargetLatency {
                    target: &target.name,
                    operation,
                    status: name,
                    failed: status.is_some_and(Status::failed),
                    count: outcome.count,
                    figures,
                }
            })
        })
}

fn figures(
    percentiles: &BTreeMap<String, f64>,
    count: u64,
    bounds: &[String],
) -> Vec<Option<Figure>> {
    let figure = |(percentile, name): (f64, &str)| {
        // Of a thousand samples one lies beyond p99.9, which no binary fraction tells exactly.
        let beyond = (count as f64 * (1.0 - percentile / 100.0) * 1e6).round() / 1e6;
        let us = percentiles.get(name).copied()?;
        (name == "max" || beyond >= 1.0).then(|| Figure {
            us,
            bound: bounds.iter().any(|one| one == name),
        })
    };
    PERCENTILES.into_iter().map(figure).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::outcome::StatusOutcome;

    fn percentiles() -> BTreeMap<String, f64> {
        let numbers = PERCENTILES.iter().zip(1_u32..);
        numbers
            .map(|((_, name), us)| ((*name).to_owned(), f64::from(us)))
            .collect()
    }

    #[test]
    fn a_percentile_without_a_sample_beyond_it_is_left_out() {
        let shown = |count| {
            let found = figures(&percentiles(), count, &["max".into()]);
            assert!(found[5].unwrap().bound && !found[0].is_some_and(|one| one.bound));
            found.iter().flatten().map(|one| one.us).collect::<Vec<_>>()
        };
        assert_eq!(shown(1), [6.0]);
        assert_eq!(shown(2), [1.0, 6.0]);
        assert_eq!(shown(999), [1.0, 2.0, 3.0, 6.0]);
        assert_eq!(shown(1000), [1.0, 2.0, 3.0, 4.0, 6.0]);
        assert!(
            figures(&BTreeMap::new(), 1000, &[])
                .iter()
                .all(Option::is_none)
        );
    }

    #[test]
    fn a_page_gets_what_failed_on_which_target_first_and_as_a_lower_bound() {
        let ended = |count| StatusOutcome {
            count,
            latency_us_from_intended: percentiles(),
            ..StatusOutcome::default()
        };
        let target = |name: &str, statuses: &[(&str, u64)]| {
            let statuses = statuses
                .iter()
                .map(|(name, count)| ((*name).to_owned(), ended(*count)));
            TargetOutcome {
                name: name.into(),
                operations: [("read".into(), statuses.collect())].into(),
                ..TargetOutcome::default()
            }
        };
        let outcome = Outcome {
            targets_share: vec![
                target("n1/0", &[("ok", 500)]),
                target("n2/1", &[("ok", 400), ("refused", 1), ("timed_out", 7)]),
            ],
            ..Outcome::default()
        };
        let tables = Tables::of(&outcome);
        let told: Vec<_> = tables
            .targets
            .iter()
            .map(|one| {
                (
                    one.target,
                    one.status,
                    one.count,
                    one.figures[5].unwrap().bound,
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                ("n2/1", "refused", 1, false),
                ("n2/1", "timed_out", 7, true),
                ("n1/0", "ok", 500, false),
                ("n2/1", "ok", 400, false)
            ]
        );
    }
}
