//! A run's result as text.

use std::fmt::Write as _;

use super::figures::{self, Figure};
use super::outcome::{Outcome, PERCENTILES};
use super::recorder::Status;

/// Targets at most of which it is told what failed.
const FAILED_TARGETS_MAX: usize = 10;

/// The report for people.
pub fn text(outcome: &Outcome) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    let setup = &outcome.setup;
    line(format!("target    {}", setup.target));
    line(format!("model     {}", setup.model));
    line(format!("workload  {}, seed {}", setup.workload, setup.seed));
    line(format!(
        "rate      {:.0}/s: {} operations in {:.2} s{}, {:.1} MiB/s of values",
        outcome.rate_per_s,
        outcome.operations_done,
        outcome.seconds,
        if outcome.interrupted {
            " (interrupted)"
        } else {
            ""
        },
        outcome.value_bytes_per_s / f64::from(1 << 20)
    ));
    line(format!("client    {}", outcome.validity.words()));
    line(format!("          {}", client(outcome)));
    line(String::new());
    let open = outcome.open();
    let mut head = format!(
        "{:<24}{:>10}",
        if open {
            "latency, ms"
        } else {
            "service time, ms"
        },
        "count"
    );
    for (_, name) in PERCENTILES {
        write!(head, "{name:>11}").expect("writing to a string");
    }
    line(head);
    for latency in figures::latencies(outcome) {
        let from = if latency.intended { "intended" } else { "sent" };
        let mut row = format!(
            "{:<24}{:>10}",
            format!("{} (from {from})", latency.operation),
            latency.count
        );
        for figure in &latency.figures {
            write!(row, "{:>11}", millis(*figure)).expect("writing to a string");
        }
        line(row);
    }
    line(String::new());
    for (name, operation) in &outcome.operations {
        let after_end = operation.statuses.get(Status::AfterEnd.name());
        let after_end = after_end.map(|one| format!(", after the end {}", one.count));
        line(format!(
            "{name:<9} done {}, refused {}, in doubt {}, missing {}, without an answer {}{}",
            operation.done,
            operation.refused,
            operation.in_doubt,
            operation.missing,
            operation.censored,
            after_end.unwrap_or_default()
        ));
    }
    if outcome.unsent > 0 {
        line(format!(
            "unsent    {} operations were due and never sent; they count as at least that late",
            outcome.unsent
        ));
    }
    let turns = outcome.turns;
    if turns.moved + turns.waited > 0 {
        line(format!(
            "writers   {} writes went to the next key and {} operations waited: one key has one \
             writer at a time",
            turns.moved, turns.waited
        ));
    }
    let verification = &outcome.verification;
    line(format!(
        "verified  {} values: {} wrong, {} acknowledged writes lost, {} answers with siblings",
        verification.checked, verification.wrong, verification.lost, verification.siblings
    ));
    if verification.stale > 0 {
        line(format!(
            "stale     {} reads, at most {} versions and {:.1} ms behind",
            verification.stale, verification.stale_versions_max, verification.stale_ms_max
        ));
    }
    if outcome.targets_share.len() > 1 {
        let shares = outcome
            .targets_share
            .iter()
            .map(|target| format!("{} {:.1} %", target.name, target.share * 100.0));
        line(format!(
            "targets   {}",
            shares.collect::<Vec<_>>().join(", ")
        ));
    }
    failures(outcome).into_iter().for_each(&mut line);
    for example in verification.examples.iter().chain(&outcome.errors) {
        line(format!("  {example}"));
    }
    out
}

fn client(outcome: &Outcome) -> String {
    let client = &outcome.client;
    let without_a_cpu = format!("lost its CPU for {}", client.without_a_cpu());
    let busiest = format!("busiest thread {:.0} %", client.busiest() * 100.0);
    if !outcome.open() {
        // Nothing is due at a time.
        return format!("{busiest}, {without_a_cpu}");
    }
    let lag = |name| client.scheduling_lag_us.get(name).copied().unwrap_or(0.0);
    let alone = client.pauses_us.get("p99.9");
    format!(
        "{busiest}, scheduling lag p50 {:.1} us, p99.9 {:.1} us; the machine alone: p99.9 {}, \
         {without_a_cpu}",
        lag("p50"),
        lag("p99.9"),
        alone.map_or("unknown".into(), |alone| format!("{alone:.1} us")),
    )
}

/// Which target failed how: a line each, those with most failures first.
fn failures(outcome: &Outcome) -> Vec<String> {
    let mut targets: Vec<(u64, String)> = Vec::new();
    for target in &outcome.targets_share {
        let failed = figures::of_target(target).filter(|one| one.failed);
        let (counts, words): (Vec<u64>, Vec<String>) = failed
            .map(|one| {
                let times = match &one.figures[..] {
                    [Some(median), ..] => format!(" (p50 {} ms)", millis(Some(*median))),
                    // There is one alone.
                    [.., Some(only)] => format!(" ({} ms)", millis(Some(*only))),
                    _ => String::new(),
                };
                let words = format!("{} {} {}{times}", one.count, one.operation, one.status);
                (one.count, words)
            })
            .unzip();
        if !words.is_empty() {
            let words = format!("failed    {}: {}", target.name, words.join(", "));
            targets.push((counts.iter().sum(), words));
        }
    }
    targets.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    let more = targets.len().saturating_sub(FAILED_TARGETS_MAX);
    let told = targets.into_iter().take(FAILED_TARGETS_MAX);
    let mut lines: Vec<String> = told.map(|(_, words)| words).collect();
    if more > 0 {
        lines.push(format!("failed    on {more} more targets, see run.json"));
    }
    lines
}

/// A figure in milliseconds; `-` where there is none.
fn millis(figure: Option<Figure>) -> String {
    figure.map_or("-".into(), |figure| {
        let bound = if figure.bound { ">=" } else { "" };
        format!("{bound}{:.3}", figure.us / 1e3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::outcome::Setup;
    use crate::load::recorder::Recorder;
    use torc_measure::mix::Operation;

    fn outcome(offered_per_s: Option<f64>) -> Outcome {
        let mut recorder = Recorder::default();
        for millis in 1..=100 {
            let latency = millis * 1_000_000;
            recorder.record(Operation::Write, Status::Ok, latency, Some(latency / 2));
        }
        recorder.record(Operation::Write, Status::Unsent, 500_000_000, None);
        recorder.verdicts.lost = 2;
        let setup = Setup {
            offered_per_s,
            ..Setup::default()
        };
        Outcome::new(setup, 10.0, &recorder, Vec::new(), serde_json::Value::Null)
    }

    #[test]
    fn lower_bounds_are_marked_and_findings_are_told() {
        let words = text(&outcome(Some(10.0)));
        assert!(words.contains("2 acknowledged writes lost"), "{words}");
        assert!(words.contains("100 operations in 10.00 s"), "{words}");
        assert!(words.contains(">=5"), "{words}");
        let intended = words.lines().find(|line| line.contains("intended"));
        let figures: Vec<&str> = intended.unwrap().split_whitespace().collect();
        assert_eq!(
            figures[7..9],
            ["-", "-"],
            "no sample of 101 lies beyond p99.9"
        );
        assert!(words.contains("INVALID"), "{words}");
    }

    #[test]
    fn what_failed_once_has_a_time_and_no_median() {
        let mut recorder = Recorder::default();
        for (status, count) in [(Status::Refused, 1), (Status::TimedOut, 2)] {
            for _ in 0..count {
                recorder.record_target(0, Operation::Read, status, 3_000_000, 2_000_000);
            }
        }
        let setup = Setup {
            targets: vec!["n1/0".into()],
            ..Setup::default()
        };
        let outcome = Outcome::new(setup, 10.0, &recorder, Vec::new(), serde_json::Value::Null);
        let words = failures(&outcome).join("\n");
        assert!(words.contains("1 read refused (3.0"), "{words}");
        assert!(words.contains("2 read timed_out (p50 >=3.0"), "{words}");
    }

    #[test]
    fn a_closed_loop_never_says_latency() {
        let words = text(&outcome(None));
        assert!(
            words.contains("service time") && !words.contains("latency"),
            "{words}"
        );
    }
}
