//! Zipf's law, sampled exactly.

use rand_xoshiro::Xoshiro256PlusPlus;

use super::{unit, whole};

/// Zipf's law over ranks `1..=count` for any positive exponent, by rejection-inversion
/// (Hörmann and Derflinger 1996): constant time, no table, exact.
#[derive(Clone, Debug)]
pub struct Zipf {
    count: u64,
    exponent: f64,
    integral_first: f64,
    integral_last: f64,
    squeeze: f64,
}

impl Zipf {
    /// A distribution over `count` keys. `exponent` is above 0; YCSB's is 0.99.
    ///
    /// # Panics
    /// When there is no key or the exponent is not above zero.
    pub fn new(count: u64, exponent: f64) -> Self {
        assert!(
            count > 0 && exponent > 0.0,
            "zipf needs keys and a positive exponent"
        );
        let mut zipf = Self {
            count,
            exponent,
            integral_first: 0.0,
            integral_last: 0.0,
            squeeze: 0.0,
        };
        zipf.integral_first = zipf.integral(1.5) - 1.0;
        let last = count as f64 + 0.5;
        zipf.integral_last = zipf.integral(last);
        zipf.squeeze = 2.0 - zipf.inverse(zipf.integral(2.5) - zipf.height(2.0));
        zipf
    }

    /// Number of keys.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// A rank from 1 (the most frequent) to the number of keys.
    pub fn rank(&self, rng: &mut Xoshiro256PlusPlus) -> u64 {
        loop {
            let area = self.integral_last + unit(rng) * (self.integral_first - self.integral_last);
            let x = self.inverse(area);
            // x lies in 1..=count+0.5 by construction.
            let rank = whole(x + 0.5).clamp(1, self.count);
            let centre = rank as f64;
            if centre - x <= self.squeeze
                || area >= self.integral(centre + 0.5) - self.height(centre)
            {
                return rank;
            }
        }
    }

    /// Antiderivative of `height`.
    fn integral(&self, x: f64) -> f64 {
        let log = x.ln();
        exp_minus_one_over((1.0 - self.exponent) * log) * log
    }

    fn height(&self, x: f64) -> f64 {
        (-self.exponent * x.ln()).exp()
    }

    fn inverse(&self, area: f64) -> f64 {
        let t = (area * (1.0 - self.exponent)).max(-1.0);
        (log_one_plus_over(t) * area).exp()
    }
}

/// `(e^x - 1) / x`, also near zero.
fn exp_minus_one_over(x: f64) -> f64 {
    if x.abs() > 1e-8 {
        x.exp_m1() / x
    } else {
        1.0 + x * 0.5 * (1.0 + x / 3.0)
    }
}

/// `ln(1 + x) / x`, also near zero.
fn log_one_plus_over(x: f64) -> f64 {
    if x.abs() > 1e-8 {
        x.ln_1p() / x
    } else {
        1.0 - x * (0.5 - x / 3.0)
    }
}
