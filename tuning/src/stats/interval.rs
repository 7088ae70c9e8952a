//! Percentiles and intervals.

use serde::{Deserialize, Serialize};

use super::Random;

/// From low to high, both included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Whether `value` lies in it.
    pub fn contains(&self, value: f64) -> bool {
        self.low <= value && value <= self.high
    }
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut samples = samples.to_vec();
    samples.sort_by(f64::total_cmp);
    samples
}

/// Percentile `q` (0 to 1) by nearest rank of ascending samples: a value that was measured.
///
/// # Panics
/// When there is no sample, or `q` is outside 0 to 1.
pub fn percentile(ascending: &[f64], q: f64) -> f64 {
    assert!(!ascending.is_empty(), "no sample, no percentile");
    assert!(
        (0.0..=1.0).contains(&q),
        "a percentile lies between 0 and 1"
    );
    let rank = count(q * ascending.len() as f64);
    ascending[rank.clamp(1, ascending.len()) - 1]
}

/// Median of samples in any order; the mean of the middle two when they are even in number.
///
/// # Panics
/// When there is no sample.
pub fn median(samples: &[f64]) -> f64 {
    assert!(!samples.is_empty(), "no sample, no median");
    let samples = sorted(samples);
    let middle = samples.len() / 2;
    if samples.len() % 2 == 1 {
        samples[middle]
    } else {
        f64::midpoint(samples[middle - 1], samples[middle])
    }
}

/// Smallest integer not below `value`.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the value is a rank: not negative, at most the number of samples"
)]
fn count(value: f64) -> usize {
    value.max(0.0).ceil() as usize
}

/// Interval of percentile `q` from order statistics: whatever the distribution, it holds with
/// at least `confidence` for independent samples. `None` when there are too few samples beyond the percentile.
pub fn percentile_interval(ascending: &[f64], q: f64, confidence: f64) -> Option<Interval> {
    let n = ascending.len();
    let tail = (1.0 - confidence) / 2.0;
    // Number of samples below the true percentile is binomial(n, q).
    let (mut low, mut high) = (None, None);
    let mut cumulative = 0.0;
    let (log_q, log_rest) = (q.ln(), (1.0 - q).ln());
    let mut log_choose = 0.0_f64;
    for k in 0..=n {
        let before = cumulative;
        cumulative += (log_choose + k as f64 * log_q + (n - k) as f64 * log_rest).exp();
        // Sample number k (from 1) is below the percentile with probability 1 − P(X < k).
        if k >= 1 && before <= tail {
            low = Some(k);
        }
        if high.is_none() && cumulative >= 1.0 - tail && k < n {
            high = Some(k + 1);
        }
        log_choose += ((n - k) as f64 / (k + 1) as f64).ln();
    }
    Some(Interval {
        low: ascending[low? - 1],
        high: ascending[high? - 1],
    })
}

/// Bootstrap interval of the ratio of medians, after ÷ before.
///
/// # Panics
/// When either side has no sample.
pub fn ratio_interval(before: &[f64], after: &[f64], confidence: f64, seed: u64) -> Interval {
    const ROUNDS: usize = 1000;
    let mut random = Random::new(seed);
    let mut draw = |samples: &[f64]| {
        let drawn: Vec<f64> = samples
            .iter()
            .map(|_| samples[random.below(samples.len())])
            .collect();
        median(&drawn)
    };
    let mut ratios: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let (before, after) = (draw(before), draw(after));
            if before == after { 1.0 } else { after / before }
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    let tail = (1.0 - confidence) / 2.0;
    Interval {
        low: percentile(&ratios, tail),
        high: percentile(&ratios, 1.0 - tail),
    }
}

#[cfg(test)]
mod tests {
    use super::{Random, median, percentile, percentile_interval};

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&samples, 0.5), 50.0);
        assert_eq!(percentile(&samples, 0.99), 99.0);
        assert_eq!(percentile(&samples, 1.0), 100.0);
        assert_eq!(percentile(&samples, 0.0), 1.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn the_interval_of_a_percentile_covers_it_as_often_as_it_says() {
        let mut random = Random::new(7);
        let rounds = 1000;
        let mut covered = 0;
        for _ in 0..rounds {
            let mut samples: Vec<f64> = (0..500).map(|_| random.unit()).collect();
            samples.sort_by(f64::total_cmp);
            let interval = percentile_interval(&samples, 0.9, 0.95).unwrap();
            covered += i32::from(interval.contains(0.9));
        }
        assert!((940..=980).contains(&covered), "{covered} of {rounds}");
    }

    #[test]
    fn a_percentile_beyond_the_samples_has_no_interval() {
        let samples: Vec<f64> = (0..100).map(f64::from).collect();
        assert_eq!(percentile_interval(&samples, 0.999, 0.95), None);
        assert_eq!(percentile_interval(&[], 0.5, 0.95), None);
    }
}
