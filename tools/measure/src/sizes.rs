//! Sizes of values and lengths of scans: fixed, uniform, log-normal, or as a file lists them.

use std::f64::consts::TAU;
use std::path::Path;
use std::str::FromStr;

use rand_xoshiro::Xoshiro256PlusPlus;

use crate::keys::{below, unit};

/// A distribution of whole numbers, each above 0.
#[derive(Clone, Debug, PartialEq)]
pub enum Sizes {
    /// Always this.
    Fixed(u32),
    /// Each from low to high, both included, equally often.
    Uniform {
        /// Least.
        low: u32,
        /// Most.
        high: u32,
    },
    /// Logarithms are normal; cut at the largest value.
    LogNormal {
        /// Half are below this.
        median: f64,
        /// Standard deviation of the natural logarithm.
        sigma: f64,
    },
    /// Sizes with the running sum of their weights.
    Listed(Vec<(u32, u64)>),
}

/// The largest size that is drawn: the largest value of the store, a mebibyte.
pub const SIZE_MAX: u32 = 1 << 20;

impl Sizes {
    /// One size, between `least` and [`SIZE_MAX`].
    pub fn sample(&self, rng: &mut Xoshiro256PlusPlus, least: u32) -> u32 {
        let drawn = match self {
            Sizes::Fixed(size) => *size,
            Sizes::Uniform { low, high } => {
                let offset = below(rng, u64::from(high - low) + 1);
                low + u32::try_from(offset).expect("below the width of a 32-bit range")
            }
            Sizes::LogNormal { median, sigma } => {
                // Box and Muller; one of the pair is enough.
                let radius = (-2.0 * (1.0 - unit(rng)).ln()).sqrt();
                let normal = radius * (TAU * unit(rng)).cos();
                rounded(median * (sigma * normal).exp())
            }
            Sizes::Listed(list) => {
                let total = list.last().map_or(1, |(_, sum)| *sum);
                let at = below(rng, total);
                let index = list.partition_point(|(_, sum)| *sum <= at);
                list.get(index).map_or(1, |(size, _)| *size)
            }
        };
        drawn.clamp(least, SIZE_MAX)
    }

    /// Lines of `SIZE` or `SIZE COUNT` (blank or comma between); `#` starts a comment.
    fn from_lines(text: &str) -> Result<Self, String> {
        let mut list = Vec::new();
        let mut sum = 0_u64;
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or("").trim();
            if line.is_empty() {
                continue;
            }
            let mut words = line.split([' ', '\t', ',']).filter(|word| !word.is_empty());
            let size = words.next().and_then(|word| word.parse().ok());
            let weight = words
                .next()
                .map_or(Some(1), |word| word.parse::<u64>().ok());
            match (size, weight) {
                (Some(size @ 1..=SIZE_MAX), Some(weight @ 1..)) => {
                    sum = sum.saturating_add(weight);
                    list.push((size, sum));
                }
                _ => {
                    return Err(format!(
                        "line {}: expected SIZE or SIZE COUNT with sizes up to {SIZE_MAX}",
                        number + 1
                    ));
                }
            }
        }
        if list.is_empty() {
            return Err("no size in the file".into());
        }
        Ok(Sizes::Listed(list))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "not negative, and the cast saturates"
)]
fn rounded(value: f64) -> u32 {
    value.round() as u32
}

impl FromStr for Sizes {
    type Err = String;

    /// `N`, `uniform:LOW-HIGH`, `lognormal:MEDIAN:SIGMA`, `file:PATH`.
    fn from_str(text: &str) -> Result<Self, String> {
        let size = |text: &str| match text.parse::<u32>() {
            Ok(size @ 1..=SIZE_MAX) => Ok(size),
            _ => Err(format!("{text}: expected 1 to {SIZE_MAX}")),
        };
        match text.split_once(':') {
            None => size(text).map(Sizes::Fixed),
            Some(("uniform", range)) => {
                let (low, high) = range.split_once('-').ok_or("expected uniform:LOW-HIGH")?;
                let (low, high) = (size(low)?, size(high)?);
                if low > high {
                    return Err(format!("{low} is above {high}"));
                }
                Ok(Sizes::Uniform { low, high })
            }
            Some(("lognormal", rest)) => {
                let parts = rest.split_once(':').and_then(|(median, sigma)| {
                    Some((median.parse::<f64>().ok()?, sigma.parse::<f64>().ok()?))
                });
                match parts {
                    Some((median, sigma)) if median >= 1.0 && (0.0..=10.0).contains(&sigma) => {
                        Ok(Sizes::LogNormal { median, sigma })
                    }
                    _ => Err("expected lognormal:MEDIAN:SIGMA, such as lognormal:400:1.2".into()),
                }
            }
            Some(("file", path)) => {
                let lines = std::fs::read_to_string(Path::new(path))
                    .map_err(|error| format!("{path}: {error}"))?;
                Sizes::from_lines(&lines).map_err(|error| format!("{path}: {error}"))
            }
            Some(_) => {
                Err("expected N, uniform:LOW-HIGH, lognormal:MEDIAN:SIGMA or file:PATH".into())
            }
        }
    }
}

impl std::fmt::Display for Sizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Sizes::Fixed(size) => write!(f, "{size}"),
            Sizes::Uniform { low, high } => write!(f, "uniform:{low}-{high}"),
            Sizes::LogNormal { median, sigma } => write!(f, "lognormal:{median}:{sigma}"),
            Sizes::Listed(list) => write!(f, "{} listed sizes", list.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_xoshiro::rand_core::SeedableRng;

    fn draw(sizes: &Sizes, count: usize) -> Vec<f64> {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(5);
        (0..count)
            .map(|_| f64::from(sizes.sample(&mut rng, 1)))
            .collect()
    }

    #[test]
    fn uniform_sizes_reach_both_ends_equally_often() {
        let drawn = draw(&"uniform:10-19".parse().unwrap(), 100_000);
        for size in 10..20 {
            let share = drawn.iter().filter(|x| **x == f64::from(size)).count();
            assert!((9_600..10_400).contains(&share), "{size}: {share}");
        }
    }

    #[test]
    fn log_normal_sizes_have_the_median_and_spread_asked_for() {
        let mut logs: Vec<f64> = draw(&"lognormal:400:0.8".parse().unwrap(), 100_000)
            .iter()
            .map(|size| size.ln())
            .collect();
        logs.sort_by(f64::total_cmp);
        let median = logs[50_000].exp();
        assert!((390.0..410.0).contains(&median), "{median}");
        // 84.13 % of a normal distribution are below one standard deviation.
        let sigma = logs[84_134] - logs[50_000];
        assert!((0.78..0.82).contains(&sigma), "{sigma}");
    }

    #[test]
    fn listed_sizes_come_by_their_weight() {
        let sizes = Sizes::from_lines("# size count\n100 3\n200,1\n\n").unwrap();
        let drawn = draw(&sizes, 40_000);
        let small = drawn.iter().filter(|size| **size == 100.0).count();
        assert!((29_500..30_500).contains(&small), "{small}");
        assert!(Sizes::from_lines("100 x").unwrap_err().contains("line 1"));
        assert!(Sizes::from_lines("# nothing").is_err());
    }

    #[test]
    fn bad_sizes_are_refused() {
        for bad in [
            "0",
            "x",
            "uniform:9-3",
            "uniform:9",
            "lognormal:0:1",
            "gauss:3",
            "2000000",
        ] {
            assert!(bad.parse::<Sizes>().is_err(), "{bad}");
        }
    }
}
