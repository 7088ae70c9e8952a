//! Rates: latency over rate (`sweep`), and the highest rate that holds a service level (`knee`).
//!
//! The knee is found several times over, each time by bisection from a bracket that the first search
//! gave; its interval is that of the median of those, by the sign test, so it rests on no model of
//! noise. A probe counts only when the client kept up.

use std::str::FromStr;

use torc_tuning::stats::median;

use super::limits::{self, Reading};
use super::options::parse_duration;
use super::outcome::Outcome;
use super::run::{Bench, Run};
use crate::failure::Failure;

/// Runs that may be repeated because the client did not keep up, for each that counts.
pub const RETRIES: u32 = 2;
/// Probes of a search at most.
const PROBES_MAX: usize = 60;
/// Rates in a row that a client cannot keep up with until it is believed that no lower one helps.
const CLIENT_FAILURES_MAX: usize = 6;

/// Conditions that all must hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Slo(Vec<Condition>);

#[derive(Clone, Debug, PartialEq)]
enum Condition {
    /// A percentile of one kind of operation, or of each, is below so many microseconds.
    Latency {
        operation: Option<String>,
        percentile: String,
        below_us: f64,
    },
    /// The share of failed operations is below this.
    Failed(f64),
}

impl FromStr for Slo {
    type Err = String;

    /// `p99<5ms`, `read:p99.9<1ms`, `failed<0.1%`; several with commas.
    fn from_str(text: &str) -> Result<Self, String> {
        let conditions = text.split(',').map(|part| {
            let (left, right) = part
                .split_once('<')
                .ok_or("expected such as p99<5ms or read:p99.9<1ms,failed<0.1%")?;
            let (left, right) = (left.trim(), right.trim());
            if left == "failed" {
                let percent = right.trim_end_matches('%').parse::<f64>();
                return match percent {
                    Ok(percent) if (0.0..=100.0).contains(&percent) => {
                        Ok(Condition::Failed(percent / 100.0))
                    }
                    _ => Err(format!("{right}: expected a percentage")),
                };
            }
            let (operation, percentile) = match left.split_once(':') {
                Some((operation, percentile)) => (Some(operation.to_owned()), percentile),
                None => (None, left),
            };
            let known = ["p50", "p90", "p99", "p99.9", "p99.99", "max", "mean"];
            if !known.contains(&percentile) {
                return Err(format!(
                    "{percentile}: expected one of {}",
                    known.join(", ")
                ));
            }
            let known = |name: &String| torc_measure::mix::Operation::named(name).is_some();
            if !operation.iter().all(known) {
                return Err(format!("{left}: no such operation"));
            }
            Ok(Condition::Latency {
                operation,
                percentile: percentile.to_owned(),
                below_us: parse_duration(right)?.as_secs_f64() * 1e6,
            })
        });
        Ok(Slo(conditions.collect::<Result<_, String>>()?))
    }
}

impl Slo {
    /// Why a result breaks it; `None` when it holds.
    pub fn broken(&self, outcome: &Outcome) -> Option<String> {
        let unsent = outcome.unsent as f64;
        let due = outcome.operations_done as f64 + unsent;
        if unsent > 0.001 * due {
            return Some(format!("{unsent} of {due} operations were never sent"));
        }
        self.0.iter().find_map(|condition| match condition {
            Condition::Failed(limit) => {
                let share = outcome.failed_share();
                (share >= *limit && share > 0.0)
                    .then(|| format!("{:.3} % of operations failed", share * 100.0))
            }
            Condition::Latency {
                operation,
                percentile,
                below_us,
            } => outcome.operations.keys().find_map(|name| {
                if operation.as_ref().is_some_and(|wanted| wanted != name) {
                    return None;
                }
                let found = outcome.latency_us(name, percentile)?;
                (found >= *below_us)
                    .then(|| format!("{name} {percentile} is {:.3} ms", found / 1e3))
            }),
        })
    }
}

/// What a rate gave.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Operations a second that were offered.
    pub rate: f64,
    /// Why the service level was broken; `None` when it held.
    pub broken: Option<String>,
    /// Why the figures are not the server's; `None` when they are.
    pub invalid: Option<String>,
    /// What was busy.
    pub limit: String,
}

/// How a knee is searched.
#[derive(Clone, Copy, Debug)]
pub struct KneeOptions {
    /// First rate.
    pub start: f64,
    /// Width of the last bracket, as a share of the rate.
    pub precision: f64,
    /// Searches; their median is the knee.
    pub repeats: usize,
}

/// The highest rate that holds a service level.
#[derive(Clone, Debug)]
pub struct Knee {
    /// Median of the searches; 0 when no rate held.
    pub rate: f64,
    /// Lowest and highest search: an interval of the median.
    pub low: f64,
    /// See `low`.
    pub high: f64,
    /// Probability that the interval holds the true median, 0 to 1.
    pub confidence: f64,
    /// Whether the lowest rate that failed did so because of the client: the servers may hold more.
    pub by_client: bool,
    /// What was at its limit at the lowest rate that failed, and why it failed.
    pub limit: String,
    /// All rates that were tried, in order.
    pub probes: Vec<Probe>,
}

/// Searches the knee. `probe` offers a rate and tells what it gave.
pub fn knee<E>(
    options: KneeOptions,
    mut probe: impl FnMut(f64) -> Result<Probe, E>,
) -> Result<Knee, E> {
    let mut probes: Vec<Probe> = Vec::new();
    let mut holds = |rate: f64, probes: &mut Vec<Probe>| -> Result<bool, E> {
        let mut last = probe(rate)?;
        for _ in 0..RETRIES {
            if last.invalid.is_none() {
                break;
            }
            last = probe(rate)?;
        }
        let holds = last.broken.is_none() && last.invalid.is_none();
        probes.push(last);
        Ok(holds)
    };
    // A bracket by factors: up while it holds, down while it does not.
    let (mut low, mut high) = (0.0, f64::INFINITY);
    let mut rate = options.start;
    let hopeless = |probes: &[Probe]| {
        let of_client = probes.iter().filter(|probe| probe.invalid.is_some());
        probes.len() == CLIENT_FAILURES_MAX && of_client.count() == CLIENT_FAILURES_MAX
    };
    while probes.len() < PROBES_MAX
        && !(low > 0.0 && high.is_finite())
        && rate >= 1.0
        && !hopeless(&probes)
    {
        if holds(rate, &mut probes)? {
            low = rate;
            rate *= 2.0;
        } else {
            high = rate;
            rate /= 2.0;
        }
    }
    let mut found = Vec::new();
    while low > 0.0 && high.is_finite() && found.len() < options.repeats.max(1) {
        // Later searches start around what was found, with room for the earlier ones to be wrong.
        let (mut below, mut above) = if found.is_empty() {
            (low, high)
        } else {
            let centre = median(&found);
            (centre / 1.3, centre * 1.3)
        };
        while above / below > 1.0 + options.precision && probes.len() < PROBES_MAX {
            let middle = (below * above).sqrt();
            if holds(middle, &mut probes)? {
                below = middle;
            } else {
                above = middle;
            }
        }
        found.push((below * above).sqrt());
        if probes.len() >= PROBES_MAX {
            break;
        }
    }
    let failed = probes
        .iter()
        .filter(|probe| probe.broken.is_some() || probe.invalid.is_some())
        .min_by(|one, other| one.rate.total_cmp(&other.rate));
    let limit = failed.map_or_else(
        || "no rate that was tried failed".into(),
        |probe| {
            // What the client did not keep up with tells nothing of the servers.
            let why = probe.invalid.as_ref().or(probe.broken.as_ref());
            let why = why.map_or("", String::as_str);
            format!("{why} at {:.0}/s; busy: {}", probe.rate, probe.limit)
        },
    );
    let by_client = failed.is_some_and(|probe| probe.invalid.is_some());
    let least = found.iter().copied().fold(f64::INFINITY, f64::min);
    let most = found.iter().copied().fold(0.0, f64::max);
    let searches = i32::try_from(found.len()).unwrap_or(i32::MAX);
    Ok(Knee {
        rate: if found.is_empty() {
            low
        } else {
            median(&found)
        },
        low: if found.is_empty() { low } else { least },
        high: if found.is_empty() { high } else { most },
        // The median lies outside only if all searches fell on one side of it.
        confidence: 1.0 - 2.0_f64.powi(1 - searches.max(1)),
        by_client,
        limit,
        probes,
    })
}

impl Knee {
    /// The finding for people.
    pub fn words(&self) -> String {
        if self.rate <= 0.0 {
            return match self.probes.iter().all(|probe| probe.invalid.is_some()) {
                true => "none: this client did not keep up at any rate".into(),
                false => "none: no rate held".into(),
            };
        }
        let least = if self.by_client { "at least " } else { "" };
        let interval = if self.confidence > 0.0 {
            format!(
                ", {:.0}/s to {:.0}/s with {:.1} % confidence",
                self.low,
                self.high,
                self.confidence * 100.0
            )
        } else {
            " by one search".into()
        };
        let whose = if self.by_client {
            "; this client, not the servers, was at its limit"
        } else {
            ""
        };
        let probes = self.probes.len();
        format!(
            "{least}{:.0}/s{interval} ({probes} probes){whose}",
            self.rate
        )
    }
}

/// Runs a bench at a rate and judges it.
pub fn probe(bench: &mut Bench, rate: f64, slo: &Slo) -> Result<(Probe, Run), Failure> {
    bench.set_rate(rate);
    let before = Reading::now(bench.addresses());
    let run = bench.run()?;
    let uses = before.until(&Reading::now(bench.addresses()));
    let outcome = &run.outcome;
    let probe = Probe {
        rate,
        broken: slo.broken(outcome),
        invalid: outcome.validity.client.then(|| outcome.validity.words()),
        limit: limits::limiting(&uses, outcome.client.busiest()),
    };
    Ok((probe, run))
}

/// Rates from low to high by equal factors.
pub fn rates(low: f64, high: f64, steps: u32) -> Vec<f64> {
    let last = f64::from(steps.max(2) - 1);
    (0..steps.max(2))
        .map(|step| low * (high / low).powf(f64::from(step) / last))
        .collect()
}

/// A line of a sweep or a search.
pub fn line(outcome: &Outcome, probe: &Probe) -> String {
    let worst = |percentile: &str| {
        let found = outcome.operations.keys();
        found
            .filter_map(|name| outcome.latency_us(name, percentile))
            .fold(0.0, f64::max)
            / 1e3
    };
    let verdict = match (&probe.broken, &probe.invalid) {
        (_, Some(_)) => "client limited",
        (Some(_), None) => "FAIL",
        (None, None) => "ok",
    };
    let why = probe.broken.iter().filter(|_| probe.invalid.is_none());
    let why: String = why.map(|why| format!("{why}; busy: ")).collect();
    format!(
        "{:>10.0}/s {:>10.0}/s done  p50 {:>9.3}  p99 {:>9.3}  p99.9 {:>9.3} ms  unsent {:>7}  \
         {verdict:<14}  {why}{}\n",
        probe.rate,
        outcome.rate_per_s,
        worst("p50"),
        worst("p99"),
        worst("p99.9"),
        outcome.unsent,
        probe.limit
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::outcome::Setup;
    use crate::load::schedule::{Arrivals, Gaps, Schedule};
    use crate::load::virtual_world::{self, Service};
    use rand_xoshiro::Xoshiro256PlusPlus;
    use rand_xoshiro::rand_core::SeedableRng;
    use torc_measure::keys::{unit, whole};

    /// A queue with one server and exponential service, offered `rate` for 5 s.
    fn queue(rate: f64, mean_ns: f64, seed: u64) -> Outcome {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let service: Service =
            Box::new(move |now, _| Some((now, whole(-(1.0 - unit(&mut rng)).ln() * mean_ns))));
        let schedule = Schedule::Open(Arrivals::new(rate, Gaps::Poisson, 0.0));
        let length = 5_000_000_000;
        let recorder = virtual_world::run(schedule, 100.0, 256, length, seed ^ 99, service);
        let setup = Setup {
            offered_per_s: Some(rate),
            ..Setup::default()
        };
        Outcome::new(setup, 5.0, &recorder, Vec::new(), serde_json::Value::Null)
    }

    #[test]
    fn the_knee_of_a_queue_is_where_theory_puts_it() {
        // M/M/1: p99 = ln(100) / (service rate - arrival rate). 60 us of service and a limit of
        // 1 ms leave 16667 - 4605 = 12062 a second.
        let theory = 1e9 / 60_000.0 - 100.0_f64.ln() * 1000.0;
        let slo: Slo = "p99<1ms".parse().unwrap();
        let mut seed = 0;
        let options = KneeOptions {
            start: 1000.0,
            precision: 0.02,
            repeats: 6,
        };
        let found = knee(options, |rate| {
            seed += 1;
            let outcome = queue(rate, 60_000.0, seed);
            Ok::<_, ()>(Probe {
                rate,
                broken: slo.broken(&outcome),
                invalid: None,
                limit: "server".into(),
            })
        })
        .unwrap();
        assert!(
            (found.rate / theory - 1.0).abs() < 0.05,
            "{found:?}, theory {theory}"
        );
        assert!(found.low <= found.rate && found.rate <= found.high);
        assert!(
            found.high / found.low < 1.15,
            "{} to {}",
            found.low,
            found.high
        );
        assert!(
            found.confidence > 0.95 && found.limit.contains("read p99"),
            "{}",
            found.limit
        );
        let words = found.words();
        assert!(words.contains("96.9 % confidence"), "{words}");
        assert!(!words.contains("client"), "{words}");
    }

    #[test]
    fn a_client_that_cannot_keep_up_is_not_taken_for_the_server() {
        let options = KneeOptions {
            start: 1000.0,
            precision: 0.05,
            repeats: 3,
        };
        let mut probes = 0;
        let found = knee(options, |rate| {
            probes += 1;
            Ok::<_, ()>(Probe {
                rate,
                broken: None,
                invalid: (rate > 5000.0).then(|| "INVALID: busy".into()),
                limit: "this client".into(),
            })
        })
        .unwrap();
        assert!((4500.0..5500.0).contains(&found.rate), "{found:?}");
        assert!(found.limit.contains("INVALID"), "{}", found.limit);
        let words = found.words();
        assert!(words.starts_with("at least "), "{words}");
        assert!(words.ends_with("this client, not the servers, was at its limit"));
    }

    #[test]
    fn a_client_that_keeps_up_at_no_rate_is_not_asked_down_to_the_lowest() {
        let options = KneeOptions {
            start: 1000.0,
            precision: 0.05,
            repeats: 3,
        };
        let found = knee(options, |rate| {
            Ok::<_, ()>(Probe {
                rate,
                broken: Some("read p99 is 9 ms".into()),
                invalid: Some("INVALID: requests left late".into()),
                limit: "cpu0 100 %".into(),
            })
        })
        .unwrap();
        assert_eq!(found.probes.len(), CLIENT_FAILURES_MAX);
        assert!(found.by_client && found.limit.contains("left late"));
        let words = found.words();
        assert!(words.contains("client did not keep up"), "{words}");
    }

    #[test]
    fn levels_are_read_and_judged() {
        let outcome = queue(10_000.0, 60_000.0, 1);
        let broken = |text: &str| text.parse::<Slo>().unwrap().broken(&outcome);
        assert_eq!(broken("read:p99<10ms,failed<0.1%"), None);
        assert!(broken("p50<10us").unwrap().contains("read p50"));
        assert_eq!(broken("write:p50<10us"), None, "there are no writes");
        for bad in ["", "p99", "p98<1ms", "frob:p99<1ms", "p99<x", "failed<200%"] {
            assert!(bad.parse::<Slo>().is_err(), "{bad}");
        }
        assert_eq!(rates(100.0, 400.0, 3), [100.0, 200.0, 400.0]);
    }
}
