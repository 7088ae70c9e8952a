//! Whether two sets of runs differ: the one statistics module of `torc tune prove` and
//! `torc load compare`.
//!
//! The unit is a *run*, never a request: requests of one run share its luck, so their number proves
//! nothing. Runs of the two arms are interleaved ([`abba`]), which cancels a steady drift; the test is
//! exact and knows only ranks, so neither outliers nor the shape of the distribution matter; many
//! metrics are corrected for (Holm); and a verdict needs the test, an interval of the ratio that
//! excludes 1, and a difference worth naming. With too few runs the answer is
//! [`Verdict::CannotTell`], not "no change".

mod interval;
mod rank;

use serde::{Deserialize, Serialize};

pub use interval::{Interval, median, percentile, percentile_interval, ratio_interval};
pub use rank::{holm, rank_sum, rank_sum_least};

/// Deterministic generator (SplitMix64): the same runs always give the same verdict.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`.
    ///
    /// # Panics
    /// When `bound` is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        assert!(bound > 0, "an empty range has no element");
        let wide = (u128::from(self.bits()) * (bound as u128)) >> 64;
        usize::try_from(wide).unwrap_or(0)
    }

    /// Uniform in `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// One of two sides of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    /// As it was.
    Before,
    /// As it is to be.
    After,
}

/// Order of `repeats` runs of each arm: A B B A, B A A B, … so that either arm is first as often and a
/// steady drift falls on both alike.
pub fn abba(repeats: usize) -> Vec<Arm> {
    let mut order = Vec::with_capacity(repeats * 2);
    for pair in 0..repeats {
        // Thue–Morse: cancels a linear drift, and within eight runs a quadratic one.
        let flip = pair.count_ones() % 2 == 1;
        order.extend(if flip {
            [Arm::After, Arm::Before]
        } else {
            [Arm::Before, Arm::After]
        });
    }
    order
}

/// Which way is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Good {
    /// Latencies.
    Lower,
    /// Rates.
    Higher,
}

/// One figure of each run of both arms.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// What it is, with its unit.
    pub name: String,
    /// Which way is good.
    pub good: Good,
    /// One value a run.
    pub before: Vec<f64>,
    /// One value a run.
    pub after: Vec<f64>,
}

/// What can be said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// After is better.
    Better,
    /// After is worse.
    Worse,
    /// No difference was found that this many runs could have shown.
    NoChange,
    /// No number of agreeing runs could have shown a difference, or the figures are unusable.
    CannotTell {
        /// What is missing.
        reason: String,
    },
}

/// Outcome for one metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The metric's name.
    pub name: String,
    /// Median of the runs before.
    pub before: f64,
    /// Median of the runs after.
    pub after: f64,
    /// After ÷ before, with its 95 % interval.
    pub ratio: Interval,
    /// Two-sided probability of such a difference without any cause, for this metric alone.
    pub p: f64,
    /// The same, corrected for the number of metrics.
    pub p_corrected: f64,
    /// What follows.
    pub verdict: Verdict,
}

/// Bounds of [`compare`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CompareOptions {
    /// How often chance alone may pass for a difference, over all metrics together.
    pub level: f64,
    /// Smallest relative difference worth naming.
    pub smallest: f64,
    /// Seed of the resampling.
    pub seed: u64,
}

impl Default for CompareOptions {
    fn default() -> Self {
        Self {
            level: 0.05,
            smallest: 0.01,
            seed: 1,
        }
    }
}

/// Runs a side that `metrics` metrics need so that a difference can pass the correction at all.
pub fn repeats_needed(metrics: usize, level: f64) -> usize {
    let mut runs = 2;
    while runs < 64 && rank_sum_least(runs, runs) * metrics.max(1) as f64 > level {
        runs += 1;
    }
    runs
}

/// Compares both arms in every metric.
pub fn compare(metrics: &[Metric], options: CompareOptions) -> Vec<Comparison> {
    let unusable = |metric: &Metric| {
        let values = metric.before.iter().chain(&metric.after);
        let bad = values
            .into_iter()
            .any(|value| !value.is_finite() || *value < 0.0);
        bad || metric.before.is_empty() || metric.after.is_empty()
    };
    let usable: Vec<&Metric> = metrics.iter().filter(|metric| !unusable(metric)).collect();
    let ps: Vec<f64> = usable
        .iter()
        .map(|metric| rank_sum(&metric.before, &metric.after, options.seed))
        .collect();
    let mut corrected = ps.iter().copied().zip(holm(&ps));
    metrics
        .iter()
        .map(|metric| {
            if unusable(metric) {
                return without_figures(metric);
            }
            let (p, p_corrected) = corrected.next().unwrap_or((1.0, 1.0));
            judge(metric, p, p_corrected, usable.len(), options)
        })
        .collect()
}

fn without_figures(metric: &Metric) -> Comparison {
    Comparison {
        name: metric.name.clone(),
        before: f64::NAN,
        after: f64::NAN,
        ratio: Interval {
            low: 0.0,
            high: f64::INFINITY,
        },
        p: 1.0,
        p_corrected: 1.0,
        verdict: Verdict::CannotTell {
            reason: "a run gave no figure".into(),
        },
    }
}

fn judge(
    metric: &Metric,
    p: f64,
    p_corrected: f64,
    metrics: usize,
    options: CompareOptions,
) -> Comparison {
    let (before, after) = (median(&metric.before), median(&metric.after));
    let ratio = ratio_interval(&metric.before, &metric.after, 0.95, options.seed);
    let least = rank_sum_least(metric.before.len(), metric.after.len()) * metrics as f64;
    let verdict = if least > options.level {
        Verdict::CannotTell {
            reason: format!(
                "{} + {} runs cannot show a difference in {metrics} metrics: {} a side can",
                metric.before.len(),
                metric.after.len(),
                repeats_needed(metrics, options.level)
            ),
        }
    } else if p_corrected > options.level
        || ratio.contains(1.0)
        || (after - before).abs() < options.smallest * before.max(f64::MIN_POSITIVE)
    {
        Verdict::NoChange
    } else if (after < before) == (metric.good == Good::Lower) {
        Verdict::Better
    } else {
        Verdict::Worse
    };
    Comparison {
        name: metric.name.clone(),
        before,
        after,
        ratio,
        p,
        p_corrected,
        verdict,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Arm, CompareOptions, Good, Metric, Random, Verdict, abba, compare, repeats_needed,
    };

    /// Runs of two arms on a machine whose noise has memory and drifts; `effect` multiplies "after".
    fn runs(random: &mut Random, repeats: usize, effect: f64) -> Metric {
        let mut memory = 0.0;
        let drift = (random.unit() - 0.5) * 0.02;
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for (at, arm) in abba(repeats).into_iter().enumerate() {
            memory = 0.6 * memory + (random.unit() + random.unit() - 1.0) * 0.05;
            let value = 100.0 * (1.0 + memory + drift * at as f64);
            match arm {
                Arm::Before => before.push(value),
                Arm::After => after.push(value * effect),
            }
        }
        Metric {
            name: "p99".into(),
            good: Good::Lower,
            before,
            after,
        }
    }

    fn share(effect: f64, repeats: usize, wanted: &Verdict) -> f64 {
        let mut random = Random::new(42);
        let rounds = 2000_u32;
        let hits = (0..rounds)
            .filter(|_| {
                let metric = runs(&mut random, repeats, effect);
                compare(&[metric], CompareOptions::default())[0].verdict == *wanted
            })
            .count();
        hits as f64 / f64::from(rounds)
    }

    #[test]
    fn equal_arms_are_called_better_at_most_one_time_in_twenty() {
        for repeats in [5, 8] {
            let (better, worse) = (
                share(1.0, repeats, &Verdict::Better),
                share(1.0, repeats, &Verdict::Worse),
            );
            assert!(better <= 0.05, "better {better} with {repeats} repeats");
            assert!(worse <= 0.05, "worse {worse} with {repeats} repeats");
        }
    }

    #[test]
    fn a_tenth_more_is_found_four_times_in_five() {
        let found = share(1.10, 8, &Verdict::Worse);
        assert!(found >= 0.8, "{found}");
        let found = share(0.90, 8, &Verdict::Better);
        assert!(found >= 0.8, "{found}");
    }

    #[test]
    fn three_runs_a_side_cannot_tell() {
        let metric = Metric {
            name: "rate".into(),
            good: Good::Higher,
            before: vec![1.0, 1.1, 1.2],
            after: vec![9.0, 9.1, 9.2],
        };
        let outcome = compare(&[metric], CompareOptions::default());
        assert!(matches!(outcome[0].verdict, Verdict::CannotTell { .. }));
        assert_eq!(repeats_needed(1, 0.05), 4);
        assert_eq!(repeats_needed(6, 0.05), 5);
        assert_eq!(repeats_needed(10, 0.05), 6);
    }

    #[test]
    fn the_order_is_balanced_against_drift() {
        use Arm::{After as B, Before as A};
        assert_eq!(abba(4), [A, B, B, A, B, A, A, B]);
    }

    #[test]
    fn a_run_without_a_figure_is_no_evidence() {
        let metric = |before: Vec<f64>| Metric {
            name: "x".into(),
            good: Good::Lower,
            before,
            after: vec![1.0; 5],
        };
        for before in [vec![], vec![f64::NAN; 5], vec![-1.0; 5]] {
            let outcome = compare(&[metric(before)], CompareOptions::default());
            assert!(matches!(outcome[0].verdict, Verdict::CannotTell { .. }));
        }
    }
}
