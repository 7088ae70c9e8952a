//! Which operation comes next: mixes, and those of YCSB.

use std::str::FromStr;

use rand_xoshiro::Xoshiro256PlusPlus;

use crate::keys::{Distribution, YCSB_EXPONENT, unit};
use crate::sizes::Sizes;

/// Kinds of operations that are measured apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    /// Read of one key.
    Read,
    /// Write of a key that exists.
    Write,
    /// Write of a new key.
    Insert,
    /// Read of a key, then a write of it; the latency is that of both.
    Modify,
    /// Deletion of one key.
    Delete,
    /// One page of keys with their values.
    Scan,
    /// Read of several keys in one request.
    Batch,
}

impl Operation {
    /// All kinds, in order of `as usize`.
    pub const ALL: [Operation; 7] = [
        Operation::Read,
        Operation::Write,
        Operation::Insert,
        Operation::Modify,
        Operation::Delete,
        Operation::Scan,
        Operation::Batch,
    ];

    /// Name in reports and mixes.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Insert => "insert",
            Operation::Modify => "modify",
            Operation::Delete => "delete",
            Operation::Scan => "scan",
            Operation::Batch => "batch",
        }
    }

    /// The kind with this name.
    pub fn named(name: &str) -> Option<Operation> {
        Operation::ALL.into_iter().find(|one| one.name() == name)
    }

    /// Whether it changes its key.
    pub fn writes(self) -> bool {
        matches!(
            self,
            Operation::Write | Operation::Insert | Operation::Modify | Operation::Delete
        )
    }
}

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

    /// The next kind.
    pub fn draw(&self, rng: &mut Xoshiro256PlusPlus) -> Operation {
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
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
                exponent: YCSB_EXPONENT,
            },
            _ => Distribution::Scrambled,
        };
        let scans = Sizes::Uniform { low: 1, high: 100 };
        (Mix::of(weights), distribution, scans)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_xoshiro::rand_core::SeedableRng;

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
