//! Which key comes next: the distributions of YCSB, exactly, and a moving hot set.

mod zipf;

use std::str::FromStr;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::RngCore;

pub use zipf::Zipf;

/// Exponent of YCSB's zipfian distributions.
pub const YCSB_EXPONENT: f64 = 0.99;
/// Items over which YCSB's scrambled zipfian draws before it hashes.
const SCRAMBLED_ITEMS: u64 = 10_000_000_000;
/// 2^64 over the golden ratio: steps by it spread evenly.
pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Nanoseconds in a minute.
const MINUTE_NS: f64 = 60e9;

/// A uniform number in `[0, 1)` with 53 random bits.
pub fn unit(rng: &mut Xoshiro256PlusPlus) -> f64 {
    fraction_of(rng.next_u64())
}

/// A uniform number below `bound`, without bias worth measuring (multiply-shift of 64 bits).
pub fn below(rng: &mut Xoshiro256PlusPlus, bound: u64) -> u64 {
    let wide = u128::from(rng.next_u64()) * u128::from(bound);
    u64::try_from(wide >> 64).expect("the high half of a product fits 64 bits")
}

/// A distribution over keys, as on the command line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    /// Each key equally often.
    Uniform,
    /// Each key in turn.
    Sequential,
    /// Key of rank r in proportion to 1/r^exponent, ranks scattered by a bijection.
    Zipf {
        /// Above 0.
        exponent: f64,
    },
    /// YCSB's scrambled zipfian: ranks of ten thousand million items, hashed onto the keys.
    Scrambled,
    /// Zipf counted from the newest key backwards.
    Latest {
        /// Above 0.
        exponent: f64,
    },
    /// A share of the keys gets a share of the operations; uniform within either part.
    Hotspot {
        /// Share of the keys that are hot, 0 to 1.
        keys: f64,
        /// Share of the operations that go to them, 0 to 1.
        operations: f64,
    },
    /// Exponential distance from the newest key: so many percent within a fraction of all.
    Exponential {
        /// Percent of operations, 0 to 100.
        percent: f64,
        /// Fraction of the keys that they fall into, 0 to 1.
        fraction: f64,
    },
}

impl FromStr for Distribution {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or("");
        let numbers: Vec<f64> = parts
            .map(|part| part.parse().map_err(|_| format!("{part} is not a number")))
            .collect::<Result<_, _>>()?;
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let exponent = |value: f64| value.is_finite() && value > 0.0 && value <= 100.0;
        let distribution = match (name, &numbers[..]) {
            ("uniform", []) => Distribution::Uniform,
            ("sequential", []) => Distribution::Sequential,
            ("scrambled", []) => Distribution::Scrambled,
            ("zipf", []) => Distribution::Zipf {
                exponent: YCSB_EXPONENT,
            },
            ("zipf", [value]) if exponent(*value) => Distribution::Zipf { exponent: *value },
            ("latest", []) => Distribution::Latest {
                exponent: YCSB_EXPONENT,
            },
            ("latest", [value]) if exponent(*value) => Distribution::Latest { exponent: *value },
            ("hotspot", []) => Distribution::Hotspot {
                keys: 0.2,
                operations: 0.8,
            },
            ("hotspot", [keys, operations]) if share(*keys) && share(*operations) => {
                Distribution::Hotspot {
                    keys: *keys,
                    operations: *operations,
                }
            }
            // YCSB's defaults: 95 % within 0.8571428571 of the keys.
            ("exponential", []) => Distribution::Exponential {
                percent: 95.0,
                fraction: 6.0 / 7.0,
            },
            ("exponential", [percent, fraction])
                if *percent > 0.0 && *percent < 100.0 && *fraction > 0.0 && *fraction <= 1.0 =>
            {
                Distribution::Exponential {
                    percent: *percent,
                    fraction: *fraction,
                }
            }
            _ => {
                return Err("expected uniform, sequential, zipf[:EXPONENT], scrambled, \
                            latest[:EXPONENT], hotspot[:KEYS:OPERATIONS] or \
                            exponential[:PERCENT:FRACTION]"
                    .into());
            }
        };
        Ok(distribution)
    }
}

impl std::fmt::Display for Distribution {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Distribution::Uniform => write!(f, "uniform"),
            Distribution::Sequential => write!(f, "sequential"),
            Distribution::Scrambled => write!(f, "scrambled"),
            Distribution::Zipf { exponent } => write!(f, "zipf:{exponent}"),
            Distribution::Latest { exponent } => write!(f, "latest:{exponent}"),
            Distribution::Hotspot { keys, operations } => write!(f, "hotspot:{keys}:{operations}"),
            Distribution::Exponential { percent, fraction } => {
                write!(f, "exponential:{percent}:{fraction:.4}")
            }
        }
    }
}

/// Chooses keys; each worker has its own.
#[derive(Clone, Debug)]
pub struct Keys {
    distribution: Distribution,
    /// Keys at the start; hot keys are scattered over these.
    base: u64,
    /// Share of the ranks that get another key each minute.
    churn_per_minute: f64,
    zipf: Option<Zipf>,
    /// The next key of a sequence.
    turn: u64,
}

impl Keys {
    /// A chooser over `base` keys at first.
    ///
    /// # Panics
    /// When there is no key.
    pub fn new(distribution: Distribution, base: u64, churn_per_minute: f64) -> Self {
        assert!(base > 0, "a distribution needs keys");
        let zipf = match distribution {
            Distribution::Zipf { exponent } | Distribution::Latest { exponent } => {
                Some(Zipf::new(base, exponent))
            }
            Distribution::Scrambled => Some(Zipf::new(SCRAMBLED_ITEMS, YCSB_EXPONENT)),
            _ => None,
        };
        Self {
            distribution,
            base,
            churn_per_minute,
            zipf,
            turn: 0,
        }
    }

    /// The next key's index, below `count`, the number of keys at `now_ns` after the begin.
    pub fn next(&mut self, rng: &mut Xoshiro256PlusPlus, count: u64, now_ns: u64) -> u64 {
        match self.distribution {
            Distribution::Uniform => below(rng, count),
            Distribution::Sequential => {
                let key = self.turn % count;
                self.turn += 1;
                key
            }
            Distribution::Zipf { .. } => {
                let rank = self.rank(rng) - 1;
                self.place(rank, now_ns)
            }
            Distribution::Scrambled => fnv64(self.rank(rng) - 1) % self.base,
            Distribution::Latest { exponent } => {
                if self.zipf.as_ref().is_none_or(|zipf| zipf.count() != count) {
                    self.zipf = Some(Zipf::new(count, exponent));
                }
                count - self.rank(rng)
            }
            Distribution::Hotspot { keys, operations } => {
                let hot = share_of(self.base, keys);
                let rank = if unit(rng) < operations || hot == self.base {
                    below(rng, hot)
                } else {
                    hot + below(rng, self.base - hot)
                };
                self.place(rank, now_ns)
            }
            Distribution::Exponential { percent, fraction } => {
                let range = count as f64 * fraction;
                let gamma = -(1.0 - percent / 100.0).ln() / range;
                loop {
                    let back = whole(-(1.0 - unit(rng)).ln() / gamma);
                    if back < count {
                        return count - 1 - back;
                    }
                }
            }
        }
    }

    fn rank(&self, rng: &mut Xoshiro256PlusPlus) -> u64 {
        self.zipf.as_ref().map_or(1, |zipf| zipf.rank(rng))
    }

    /// The key that holds `rank` now. With churn each rank changes its key at its own moments.
    fn place(&self, rank: u64, now_ns: u64) -> u64 {
        let home = scatter(rank, self.base);
        if self.churn_per_minute <= 0.0 {
            return home;
        }
        let phase = fraction_of(mixed(rank));
        let minutes = now_ns as f64 / MINUTE_NS;
        match whole(minutes * self.churn_per_minute + phase) {
            0 => home,
            epoch => mixed(rank ^ mixed(epoch)) % self.base,
        }
    }
}

/// The whole part of a number that is not negative.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "not negative, and the cast saturates"
)]
pub fn whole(value: f64) -> u64 {
    value as u64
}

/// So much of `count`, at least one.
fn share_of(count: u64, share: f64) -> u64 {
    let part = count as f64 * share;
    whole(part).clamp(1, count)
}

fn fraction_of(bits: u64) -> f64 {
    let top = (bits >> 11) as f64;
    top / 9_007_199_254_740_992.0
}

/// Mixes all bits: what splitmix64 gives in state `value`.
pub fn mixed(value: u64) -> u64 {
    let mut word = value.wrapping_add(GOLDEN);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// FNV-1a over the eight bytes, lowest first, as YCSB hashes its keys; without the sign.
fn fnv64(value: u64) -> u64 {
    let hash = value
        .to_le_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(1_099_511_628_211)
        });
    hash.cast_signed().unsigned_abs()
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
            let mixed = (right ^ (round << 40)).wrapping_mul(GOLDEN);
            (left, right) = (right, left ^ ((mixed >> 33) & mask));
        }
        value = (left << half) | right;
        if value < count {
            return value;
        }
    }
}

#[cfg(test)]
mod tests;
