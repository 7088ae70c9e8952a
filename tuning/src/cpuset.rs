//! Sets of CPUs and the two notations in which the kernel reads and prints them.
//!
//! Lists (`0-3,8`) and masks (`ff,ffffffff`: hexadecimal words of 32 CPUs, most significant first)
//! mean the same, and neither has a canonical width, so values are compared as sets, never as text.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Highest CPU number accepted; the kernel's own bound is 8192.
pub const CPU_MAX: u32 = 65_535;

/// A text that is no list or mask of CPUs.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is no {notation} of CPUs")]
pub struct CpuSetError {
    /// `"list"` or `"mask"`.
    pub notation: &'static str,
    /// What was read.
    pub text: String,
}

/// A set of CPU numbers, in order.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CpuSet(BTreeSet<u32>);

impl CpuSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The set of one CPU.
    pub fn of(cpu: u32) -> Self {
        Self(BTreeSet::from([cpu]))
    }

    /// Reads a list: `0-3,8`, also `0, 1` as block queues print it; blank and `(null)` are empty.
    pub fn parse_list(text: &str) -> Result<Self, CpuSetError> {
        let refuse = || CpuSetError {
            notation: "list",
            text: text.trim().to_owned(),
        };
        let mut cpus = BTreeSet::new();
        for piece in text.trim().split(',').map(str::trim) {
            if piece.is_empty() || piece == "(null)" {
                continue;
            }
            let (first, last) = piece.split_once('-').unwrap_or((piece, piece));
            let first: u32 = first.trim().parse().map_err(|_| refuse())?;
            let last: u32 = last.trim().parse().map_err(|_| refuse())?;
            if first > last || last > CPU_MAX {
                return Err(refuse());
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }

    /// Reads a mask: comma-separated hexadecimal words of 32 CPUs, the last one CPUs 0 to 31.
    pub fn parse_mask(text: &str) -> Result<Self, CpuSetError> {
        let refuse = || CpuSetError {
            notation: "mask",
            text: text.trim().to_owned(),
        };
        let mut cpus = BTreeSet::new();
        let mut base = 0_u32;
        for word in text.trim().rsplit(',').map(str::trim) {
            let bits = u32::from_str_radix(word, 16).map_err(|_| refuse())?;
            if base > CPU_MAX - 31 {
                return Err(refuse());
            }
            cpus.extend(
                (0..32)
                    .filter(|bit| bits >> bit & 1 == 1)
                    .map(|bit| base + bit),
            );
            base += 32;
        }
        Ok(Self(cpus))
    }

    /// The mask notation, as short as it can be; the empty set is `0`.
    pub fn to_mask(&self) -> String {
        let words = self.0.last().map_or(1, |last| last / 32 + 1);
        let word = |index: u32| {
            self.0
                .range(index * 32..=index * 32 + 31)
                .fold(0_u32, |bits, cpu| bits | 1 << (cpu % 32))
        };
        let mut text = format!("{:x}", word(words - 1));
        for index in (0..words - 1).rev() {
            text.push_str(&format!(",{:08x}", word(index)));
        }
        text
    }

    /// Whether no CPU is in the set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many CPUs are in the set.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether `cpu` is in the set.
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }

    /// Adds a CPU.
    pub fn insert(&mut self, cpu: u32) {
        self.0.insert(cpu);
    }

    /// Lowest CPU.
    pub fn first(&self) -> Option<u32> {
        self.0.first().copied()
    }

    /// CPUs in ascending order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// CPUs that are in both.
    pub fn and(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0).copied().collect())
    }

    /// CPUs that are in either.
    pub fn or(&self, other: &Self) -> Self {
        Self(self.0.union(&other.0).copied().collect())
    }

    /// CPUs of this set that are not in the other.
    pub fn minus(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).copied().collect())
    }

    /// Whether every CPU of this set is in the other.
    pub fn within(&self, other: &Self) -> bool {
        self.0.is_subset(&other.0)
    }
}

impl FromIterator<u32> for CpuSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        Self(cpus.into_iter().collect())
    }
}

/// The list notation.
impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut run: Option<(u32, u32)> = None;
        let mut comma = "";
        let mut write = |f: &mut fmt::Formatter<'_>, (first, last): (u32, u32)| {
            write!(f, "{comma}{first}")?;
            comma = ",";
            if last > first {
                write!(f, "-{last}")?;
            }
            Ok(())
        };
        for &cpu in &self.0 {
            run = match run {
                Some((first, last)) if last + 1 == cpu => Some((first, cpu)),
                Some(done) => {
                    write(f, done)?;
                    Some((cpu, cpu))
                }
                None => Some((cpu, cpu)),
            };
        }
        run.map_or(Ok(()), |done| write(f, done))
    }
}

impl fmt::Debug for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{{self}}}")
    }
}

impl From<CpuSet> for String {
    fn from(cpus: CpuSet) -> Self {
        cpus.to_string()
    }
}

impl TryFrom<String> for CpuSet {
    type Error = CpuSetError;

    fn try_from(text: String) -> Result<Self, CpuSetError> {
        Self::parse_list(&text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::CpuSet;

    #[test]
    fn the_kernels_own_spellings_are_read() {
        let list = |text| CpuSet::parse_list(text).unwrap().iter().collect::<Vec<_>>();
        assert_eq!(list("0-2,8\n"), [0, 1, 2, 8]);
        assert_eq!(list("0, 1\n"), [0, 1]);
        assert_eq!(list(" (null)\n"), [0_u32; 0]);
        let mask = |text| CpuSet::parse_mask(text).unwrap().to_string();
        assert_eq!(mask("3\n"), "0-1");
        assert_eq!(mask("00000001,00000000\n"), "32");
        assert_eq!(mask("ff,ffffffff"), "0-39");
        assert_eq!(CpuSet::parse_list("32").unwrap().to_mask(), "1,00000000");
    }

    #[test]
    fn nonsense_is_refused_and_not_guessed() {
        for text in ["x", "3-1", "1-", "-1", "0-99999999"] {
            assert!(CpuSet::parse_list(text).is_err(), "{text}");
        }
        for text in ["", "g", "1,,2", "123456789"] {
            assert!(CpuSet::parse_mask(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn both_notations_round_trip(cpus in proptest::collection::btree_set(0_u32..2048, 0..80)) {
            let set: CpuSet = cpus.into_iter().collect();
            prop_assert_eq!(&CpuSet::parse_mask(&set.to_mask()).unwrap(), &set);
            prop_assert_eq!(&CpuSet::parse_list(&set.to_string()).unwrap(), &set);
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            drop((CpuSet::parse_list(&text), CpuSet::parse_mask(&text)));
        }
    }
}
