//! What a run does next: which operation on which key.

use std::sync::atomic::{AtomicU64, Ordering};

use rand_xoshiro::Xoshiro256PlusPlus;
use torc_measure::keys::Keys;
use torc_measure::mix::{Mix, Operation};

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
}
