//! `torc load compare`: whether systems differ, from repeated, interleaved runs.
//!
//! The unit is a run. Runs of all systems take turns, forwards and backwards (for two: ABBA…), so
//! that a drift of the machine falls on all alike; `torc_tuning::stats` judges, metric by metric,
//! corrected for their number.

use std::fmt::Write as _;

use torc_tuning::stats::{
    CompareOptions, Comparison, Good, Metric, Verdict, compare, median, repeats_needed,
};

use super::outcome::Outcome;
use crate::failure::Failure;

/// Percentiles that are compared.
const COMPARED: [&str; 3] = ["p50", "p99", "p99.9"];
/// How often chance alone may pass for a difference, over all figures of a comparison together.
/// Below one in twenty, so that systems that are equal are called so at least 95 times in 100.
const LEVEL: f64 = 0.03;
/// Fewest samples beyond a percentile for it to be compared.
const BEYOND_MIN: f64 = 10.0;

/// The order of runs: so many rounds of all systems, each forwards or backwards.
pub fn order(systems: usize, repeats: usize) -> Vec<usize> {
    (0..repeats)
        .flat_map(|round| {
            let turn: Vec<usize> = if round.count_ones() % 2 == 1 {
                (0..systems).rev().collect()
            } else {
                (0..systems).collect()
            };
            turn
        })
        .collect()
}

/// Runs, and again while the client did not keep up and so often at most. What decides is the client's
/// own lag, never what the servers did, so that it favours none of them.
///
/// # Errors
/// Those of `run`, at the first.
pub fn undisturbed(
    retries: usize,
    mut run: impl FnMut() -> Result<Outcome, Failure>,
) -> Result<Outcome, Failure> {
    let mut outcome = run()?;
    for _ in 0..retries {
        if !outcome.validity.client || outcome.interrupted {
            break;
        }
        outcome = run()?;
    }
    Ok(outcome)
}

/// Compares the runs of two systems: rate (in a closed loop) and percentiles of each operation
/// that both have in numbers.
pub fn judge(before: &[&Outcome], after: &[&Outcome]) -> Vec<Comparison> {
    let options = CompareOptions {
        level: LEVEL,
        ..CompareOptions::default()
    };
    compare(&metrics(before, after), options)
}

/// Runs a side that a comparison of runs like this one needs.
pub fn repeats_for(outcome: &Outcome) -> usize {
    repeats_needed(metrics(&[outcome], &[outcome]).len(), LEVEL)
}

fn metrics(before: &[&Outcome], after: &[&Outcome]) -> Vec<Metric> {
    let Some(first) = before.first() else {
        return Vec::new();
    };
    let all = || before.iter().chain(after);
    let mut metrics = Vec::new();
    let closed = first.setup.offered_per_s.is_none();
    if closed {
        let rate = |runs: &[&Outcome]| runs.iter().map(|run| run.rate_per_s).collect();
        metrics.push(Metric {
            name: "rate, operations/s".into(),
            good: Good::Higher,
            before: rate(before),
            after: rate(after),
        });
    }
    for operation in first.operations.keys() {
        for percentile in COMPARED {
            let share: f64 = percentile[1..].parse().unwrap_or(0.0);
            let enough = |run: &&&Outcome| {
                let done = run.operations.get(operation).map_or(0, |one| one.done);
                done as f64 * (1.0 - share / 100.0) >= BEYOND_MIN
            };
            if !all().all(|run| enough(&run)) {
                continue;
            }
            let values = |runs: &[&Outcome]| {
                let found = runs
                    .iter()
                    .filter_map(|run| run.latency_us(operation, percentile));
                found.collect()
            };
            metrics.push(Metric {
                name: format!("{operation} {percentile}, us"),
                good: Good::Lower,
                before: values(before),
                after: values(after),
            });
        }
    }
    metrics
}

/// The run of a system that stands for it in pictures: the one with the median tail.
pub fn typical<'a>(runs: &[&'a Outcome]) -> Option<&'a Outcome> {
    let figure = |run: &Outcome| {
        let found = run.operations.keys();
        found
            .filter_map(|name| run.latency_us(name, "p99"))
            .fold(0.0, f64::max)
    };
    let middle = median(&runs.iter().map(|run| figure(run)).collect::<Vec<_>>());
    let distance = |run: &Outcome| (figure(run) - middle).abs();
    runs.iter()
        .min_by(|one, other| distance(one).total_cmp(&distance(other)))
        .copied()
}

/// The comparison for people. The verdict is on `after`.
pub fn text(before: &str, after: &str, comparisons: &[Comparison], invalid: usize) -> String {
    let mut out = String::new();
    let width = comparisons
        .iter()
        .map(|one| one.name.len())
        .max()
        .unwrap_or(0);
    writeln!(out, "A = {before}\nB = {after}\n").expect("writing to a string");
    writeln!(
        out,
        "{:<width$}{:>14}{:>14}{:>9}  {:<18}{:>8}  verdict on B",
        "medians of runs", "A", "B", "B/A", "95 % interval", "p"
    )
    .expect("writing to a string");
    for one in comparisons {
        let verdict = match &one.verdict {
            Verdict::Better => "BETTER".to_owned(),
            Verdict::Worse => "WORSE".to_owned(),
            Verdict::NoChange => "no difference".to_owned(),
            Verdict::CannotTell { reason } => format!("cannot tell: {reason}"),
        };
        let interval = format!("{:.3} to {:.3}", one.ratio.low, one.ratio.high);
        writeln!(
            out,
            "{:<width$}{:>14.1}{:>14.1}{:>9.3}  {interval:<18}{:>8.3}  {verdict}",
            one.name,
            one.before,
            one.after,
            one.after / one.before,
            one.p_corrected
        )
        .expect("writing to a string");
    }
    let differs = comparisons
        .iter()
        .any(|one| matches!(one.verdict, Verdict::Better | Verdict::Worse));
    let unsure = comparisons
        .iter()
        .any(|one| matches!(one.verdict, Verdict::CannotTell { .. }));
    let conclusion = match (differs, unsure) {
        (true, _) => "B differs from A (probabilities corrected for the number of figures)",
        (false, true) => "cannot tell: more runs are needed",
        (false, false) => "no difference was found that so many runs could have shown",
    };
    writeln!(out, "\n{conclusion}").expect("writing to a string");
    if invalid > 0 {
        writeln!(
            out,
            "CAUTION: {invalid} runs are INVALID: they measured the client too"
        )
        .expect("writing to a string");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::health::Validity;
    use crate::load::outcome::Setup;
    use crate::load::schedule::Schedule;
    use crate::load::virtual_world::{self, Service};
    use rand_xoshiro::Xoshiro256PlusPlus;
    use rand_xoshiro::rand_core::SeedableRng;
    use torc_measure::keys::{unit, whole};

    /// One run against a server whose speed differs a little from run to run.
    fn run(random: &mut Xoshiro256PlusPlus, slower: f64, length: u64) -> Outcome {
        use rand_xoshiro::rand_core::RngCore as _;
        let seed = random.next_u64();
        let mean_ns = 60_000.0 * slower * (1.0 + 0.02 * (unit(random) - 0.5));
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let service: Service =
            Box::new(move |now, _| Some((now, whole(-(1.0 - unit(&mut rng)).ln() * mean_ns))));
        let recorder = virtual_world::run(Schedule::Closed, 50.0, 4, length, seed, service);
        let setup = Setup::default();
        let seconds = length as f64 / 1e9;
        Outcome::new(
            setup,
            seconds,
            &recorder,
            Vec::new(),
            serde_json::Value::Null,
        )
    }

    /// Share of comparisons of 6 + 6 runs that find a difference anywhere.
    fn found(slower: f64, rounds: usize, length: u64) -> f64 {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(5);
        let hits = (0..rounds)
            .filter(|_| {
                let (mut before, mut after) = (Vec::new(), Vec::new());
                for system in order(2, 6) {
                    match system {
                        0 => before.push(run(&mut random, 1.0, length)),
                        _ => after.push(run(&mut random, slower, length)),
                    }
                }
                let (before, after): (Vec<_>, Vec<_>) =
                    (before.iter().collect(), after.iter().collect());
                judge(&before, &after)
                    .iter()
                    .any(|one| matches!(one.verdict, Verdict::Better | Verdict::Worse))
            })
            .count();
        hits as f64 / rounds as f64
    }

    #[test]
    fn equal_systems_show_no_difference_nineteen_times_in_twenty() {
        let share = found(1.0, 200, 200_000_000);
        assert!(
            share <= 0.05,
            "{share} of A/A comparisons found a difference"
        );
    }

    #[test]
    fn a_slowdown_of_five_percent_is_found() {
        let share = found(1.05, 20, 600_000_000);
        assert!(share >= 0.9, "found in {share} of comparisons");
    }

    /// What is taken for a run of a system, with so many retries, whose runs come out like this; and how many were made.
    fn taken(retries: usize, runs: &[Validity]) -> (Validity, usize) {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(6);
        let outcome = run(&mut random, 1.0, 1_000_000);
        let mut made = 0;
        let taken = undisturbed(retries, || {
            made += 1;
            let validity = runs[made - 1].clone();
            Ok(Outcome {
                validity,
                ..outcome.clone()
            })
        });
        (taken.unwrap().validity, made)
    }

    #[test]
    fn a_run_is_done_again_only_while_the_client_did_not_keep_up_and_so_often_at_most() {
        let late = |run: &str| Validity {
            reasons: vec![run.to_owned()],
            client: true,
        };
        let slow_server = Validity {
            client: false,
            ..late("the servers did not keep up")
        };
        let good = Validity::default();
        let runs = [late("first"), late("second"), late("third"), good.clone()];
        assert_eq!(taken(0, &runs), (late("first"), 1));
        assert_eq!(
            taken(2, &runs),
            (late("third"), 3),
            "the last one tells why"
        );
        assert_eq!(taken(3, &runs), (good.clone(), 4));
        assert_eq!(taken(9, &runs), (good.clone(), 4));
        assert_eq!(taken(9, std::slice::from_ref(&good)), (good, 1));
        let runs = [late("first"), slow_server.clone()];
        assert_eq!(
            taken(9, &runs),
            (slow_server, 2),
            "no system gets a better chance"
        );
    }

    #[test]
    fn a_run_that_fails_is_not_done_again() {
        let mut made = 0;
        let failed = undisturbed(9, || {
            made += 1;
            Err(Failure::new("the server is gone"))
        });
        assert!(failed.is_err() && made == 1);
    }

    #[test]
    fn systems_take_turns_forwards_and_backwards() {
        assert_eq!(order(2, 4), [0, 1, 1, 0, 1, 0, 0, 1]);
        assert_eq!(order(3, 2), [0, 1, 2, 2, 1, 0]);
    }

    #[test]
    fn too_few_runs_are_told() {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(5);
        let runs = [1.0, 2.0].map(|slower| run(&mut random, slower, 200_000_000));
        let comparisons = judge(&[&runs[0]], &[&runs[1]]);
        let words = text("a", "b", &comparisons, 1);
        assert!(
            words.contains("cannot tell") && words.contains("CAUTION"),
            "{words}"
        );
        assert!(repeats_for(&runs[0]) >= 5);
    }
}
