//! What a run does next: which operation on which key.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use rand_xoshiro::Xoshiro256PlusPlus;

use super::keys::{Distribution, Keys, unit};
use super::recorder::Operation;
use super::sizes::Sizes;

/// How often each kind of operation comes.
#[derive(Clone, Debug, PartialEq)]
pub struct Mix {
    /// Kinds with the running sum of their shares; the last is 1.
    cumulative: Vec<(Operation, f64)>,
}

impl Mix {
    /// So many percent of reads, the rest writes.
    pub fn reads(percent: f64) -> Self {
        let (read, write) = (percent / 100.0, 1.0 - percent / 100.0);
        Self::of(&[(Operation::Read, read), (Operation::Write, write)])
    }

    /// From weights; kinds of weight 0 do not come.
    pub fn of(weights: &[(Operation, f64)]) -> Self {
        let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
        let mut sum = 0.0;
        let cumulative = weights
            .iter()
            .filter(|(_, weight)| *weight > 0.0)
            .map(|(operation, weight)| {
                sum += weight / total;
                (*operation, sum)
            })
            .collect();
        Self { cumulative }
    }

    /// The kinds that come.
    pub fn operations(&self) -> impl Iterator<Item = Operation> + '_ {
        self.cumulative.iter().map(|(operation, _)| *operation)
    }

    fn draw(&self, rng: &mut Xoshiro256PlusPlus) -> Operation {
        if let [(only, _)] = self.cumulative[..] {
            return only;
        }
        let at = unit(rng);
        let drawn = self.cumulative.iter().find(|(_, sum)| at < *sum);
        drawn
            .or(self.cumulative.last())
            .map_or(Operation::Read, |(operation, _)| *operation)
    }
}

impl FromStr for Mix {
    type Err = String;

    /// `read=90,write=9,scan=1`; the shares need not sum to anything.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut weights = Vec::new();
        for part in text.split(',') {
            let (name, weight) = part
                .split_once('=')
                .ok_or("expected such as read=90,write=10")?;
            let operation = Operation::named(name.trim()).ok_or_else(|| {
                let names = Operation::ALL.map(Operation::name).join(", ");
                format!("{name}: expected one of {names}")
            })?;
            match weight.trim().parse::<f64>() {
                Ok(weight) if weight.is_finite() && weight >= 0.0 => {
                    weights.push((operation, weight));
                }
                _ => return Err(format!("{weight}: expected a share of at least 0")),
            }
        }
        if weights.iter().all(|(_, weight)| *weight == 0.0) {
            return Err("every share is 0".into());
        }
        Ok(Mix::of(&weights))
    }
}

impl std::fmt::Display for Mix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut below = 0.0;
        for (number, (operation, sum)) in self.cumulative.iter().enumerate() {
            let comma = if number > 0 { ", " } else { "" };
            let percent = ((sum - below) * 1e6).round() / 1e4;
            write!(f, "{comma}{} {percent} %", operation.name())?;
            below = *sum;
        }
        Ok(())
    }
}

/// The core workloads of YCSB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Ycsb {
    /// Update heavy: 50 % reads, 50 % updates, scrambled zipfian
    A,
    /// Read mostly: 95 % reads, 5 % updates, scrambled zipfian
    B,
    /// Read only, scrambled zipfian
    C,
    /// Read latest: 95 % reads of the latest, 5 % inserts
    D,
    /// Short ranges: 95 % scans of 1 to 100, 5 % inserts, scrambled zipfian
    E,
    /// 50 % reads, 50 % read-modify-write, scrambled zipfian
    F,
}

impl Ycsb {
    /// Its mix, its distribution, and its scan lengths.
    pub fn parts(self) -> (Mix, Distribution, Sizes) {
        use Operation::{Insert, Modify, Read, Scan, Write};
        let weights: &[(Operation, f64)] = match self {
            Ycsb::A => &[(Read, 50.0), (Write, 50.0)],
            Ycsb::B => &[(Read, 95.0), (Write, 5.0)],
            Ycsb::C => &[(Read, 100.0)],
            Ycsb::D => &[(Read, 95.0), (Insert, 5.0)],
            Ycsb::E => &[(Scan, 95.0), (Insert, 5.0)],
            Ycsb::F => &[(Read, 50.0), (Modify, 50.0)],
        };
        let distribution = match self {
            Ycsb::D => Distribution::Latest {
                exponent: super::keys::YCSB_EXPONENT,
            },
            _ => Distribution::Scrambled,
        };
        let scans = Sizes::Uniform { low: 1, high: 100 };
        (Mix::of(weights), distribution, scans)
    }
}

/// Where operations come from. Shared by all workers of a run.
pub enum Source {
    /// A mix until the end.
    Mix {
        /// Which operations.
        mix: Mix,
        /// Which keys; each worker clones it.
        keys: Keys,
    },
    /// One operation on every key, in order.
    Each {
        /// The operation.
        operation: Operation,
        /// The next key.
        next: AtomicU64,
        /// One past the last key.
        end: u64,
        /// Distance between keys.
        step: u64,
    },
    /// What the schedule's rows say.
    Trace,
}

impl Source {
    /// `operation` on every key below `end`, from `first` by `step`.
    pub fn each(operation: Operation, first: u64, end: u64, step: u64) -> Self {
        Source::Each {
            operation,
            next: AtomicU64::new(first),
            end,
            step,
        }
    }

    /// The next operation of a mix, or the next operation and key of a fill; `None` when all is
    /// done.
    pub fn next(&self, rng: &mut Xoshiro256PlusPlus) -> Option<(Operation, Option<u64>)> {
        match self {
            Source::Mix { mix, .. } => Some((mix.draw(rng), None)),
            Source::Each {
                operation,
                next,
                end,
                step,
            } => {
                let key = next.fetch_add(*step, Ordering::Relaxed);
                (key < *end).then_some((*operation, Some(key)))
            }
            Source::Trace => None,
        }
    }

    /// Whether an operation that failed is tried again until it is done.
    pub fn insists(&self) -> bool {
        matches!(self, Source::Each { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_xoshiro::rand_core::SeedableRng;

    #[test]
    fn each_key_comes_once() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
        let source = Source::each(Operation::Write, 1, 8, 3);
        let keys: Vec<u64> = std::iter::from_fn(|| source.next(&mut rng))
            .filter_map(|(_, key)| key)
            .collect();
        assert_eq!(keys, [1, 4, 7]);
    }

    #[test]
    fn operations_come_in_their_shares() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
        let (mix, _, _) = Ycsb::D.parts();
        let inserts = (0..100_000)
            .filter(|_| mix.draw(&mut rng) == Operation::Insert)
            .count();
        assert!((4_700..5_300).contains(&inserts), "{inserts}");
        assert_eq!(mix.to_string(), "read 95 %, insert 5 %");
        assert_eq!("read=95,insert=5".parse::<Mix>().unwrap(), mix);
        for bad in ["read", "read=x", "frob=1", "read=0", "read=-1"] {
            assert!(bad.parse::<Mix>().is_err(), "{bad}");
        }
    }
}
