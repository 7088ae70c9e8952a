//! Which key comes next.

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::RngCore;

/// A uniform number in `[0, 1)` with 53 random bits.
pub fn unit(rng: &mut Xoshiro256PlusPlus) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit a double exactly")]
    let bits = (rng.next_u64() >> 11) as f64;
    bits / 9_007_199_254_740_992.0
}

/// A uniform number below `bound`, without bias worth measuring (multiply-shift of 64 bits).
pub fn below(rng: &mut Xoshiro256PlusPlus, bound: u64) -> u64 {
    let wide = u128::from(rng.next_u64()) * u128::from(bound);
    u64::try_from(wide >> 64).expect("the high half of a product fits 64 bits")
}

/// How keys are chosen among `0..count`.
#[derive(Clone, Debug)]
pub enum Keys {
    /// Each key equally often.
    Uniform {
        /// Number of keys.
        count: u64,
    },
    /// Key of rank r in proportion to 1/r^exponent; ranks are scattered over the key space, so that
    /// hot keys are not neighbours.
    Zipf(Zipf),
}

impl Keys {
    /// The next key's index, below the number of keys.
    pub fn next(&self, rng: &mut Xoshiro256PlusPlus) -> u64 {
        match self {
            Keys::Uniform { count } => below(rng, *count),
            Keys::Zipf(zipf) => scatter(zipf.rank(rng) - 1, zipf.count),
        }
    }
}

/// Spreads ranks over `0..count` with a bijection (a cycle-walking Feistel network), so every
/// key keeps exactly one rank.
fn scatter(rank: u64, count: u64) -> u64 {
    debug_assert!(rank < count);
    let bits = (64 - (count - 1).leading_zeros())
        .max(2)
        .next_multiple_of(2);
    let half = bits / 2;
    let mask = (1u64 << half) - 1;
    let mut value = rank;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0u64..4 {
            let mixed = (right ^ (round << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (left, right) = (right, left ^ ((mixed >> 33) & mask));
        }
        value = (left << half) | right;
        if value < count {
            return value;
        }
    }
}

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
        #[expect(clippy::cast_precision_loss, reason = "key counts are far below 2^53")]
        let last = count as f64 + 0.5;
        zipf.integral_last = zipf.integral(last);
        zipf.squeeze = 2.0 - zipf.inverse(zipf.integral(2.5) - zipf.height(2.0));
        zipf
    }

    /// A rank from 1 (the most frequent) to the number of keys.
    pub fn rank(&self, rng: &mut Xoshiro256PlusPlus) -> u64 {
        loop {
            let area = self.integral_last + unit(rng) * (self.integral_first - self.integral_last);
            let x = self.inverse(area);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "x lies in 1..=count+0.5 by construction; the cast saturates"
            )]
            let rank = ((x + 0.5) as u64).clamp(1, self.count);
            #[expect(clippy::cast_precision_loss, reason = "ranks are far below 2^53")]
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

#[cfg(test)]
mod tests {
    use super::*;
    use rand_xoshiro::rand_core::SeedableRng;

    #[test]
    fn scattering_is_a_bijection() {
        for count in [1u64, 2, 3, 17, 1000, 4097] {
            let mut seen: Vec<u64> = (0..count).map(|rank| scatter(rank, count)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..count).collect::<Vec<_>>());
        }
    }

    #[test]
    fn zipf_ranks_follow_the_law() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
        for exponent in [0.5, 0.99, 1.0, 1.4] {
            let zipf = Zipf::new(1000, exponent);
            let draws = 200_000u32;
            let mut counts = vec![0u32; 1000];
            for _ in 0..draws {
                counts[usize::try_from(zipf.rank(&mut rng)).unwrap() - 1] += 1;
            }
            let weight = |rank: u32| f64::from(rank).powf(-exponent);
            let total: f64 = (1..=1000).map(weight).sum();
            for rank in [1u32, 2, 3, 10, 100] {
                let expected = f64::from(draws) * weight(rank) / total;
                let found = f64::from(counts[rank as usize - 1]);
                let sigma = expected.sqrt();
                assert!(
                    (found - expected).abs() < 5.0 * sigma,
                    "exponent {exponent}, rank {rank}: {found} instead of {expected}"
                );
            }
        }
    }

    #[test]
    fn uniform_keys_reach_both_ends() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
        let keys = Keys::Uniform { count: 10 };
        let mut counts = [0u32; 10];
        for _ in 0..10_000 {
            counts[usize::try_from(keys.next(&mut rng)).unwrap()] += 1;
        }
        assert!(
            counts.iter().all(|count| (800..1200).contains(count)),
            "{counts:?}"
        );
    }
}
