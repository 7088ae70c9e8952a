//! What a run does next: which operation on which key, and when.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand_xoshiro::Xoshiro256PlusPlus;

use super::keys::{Keys, unit};
use super::recorder::Operation;

/// Where operations come from. Shared by all workers of a run.
pub enum Source {
    /// A mix of reads and writes until the end.
    Mix {
        /// Which keys.
        keys: Keys,
        /// Share of reads, 0 to 1.
        read_fraction: f64,
    },
    /// One operation on every key, in order.
    Each {
        /// The operation.
        operation: Operation,
        /// The next key.
        next: AtomicU64,
        /// Number of keys.
        count: u64,
    },
}

impl Source {
    /// The next operation and key; `None` when all is done.
    pub fn next(&self, rng: &mut Xoshiro256PlusPlus) -> Option<(Operation, u64)> {
        match self {
            Source::Mix {
                keys,
                read_fraction,
            } => {
                let read = unit(rng) < *read_fraction;
                let operation = if read {
                    Operation::Read
                } else {
                    Operation::Write
                };
                Some((operation, keys.next(rng)))
            }
            Source::Each {
                operation,
                next,
                count,
            } => {
                let key = next.fetch_add(1, Ordering::Relaxed);
                (key < *count).then_some((*operation, key))
            }
        }
    }

    /// Whether an operation that failed is tried again until it is done.
    pub fn insists(&self) -> bool {
        matches!(self, Source::Each { .. })
    }
}

/// When operations are due.
pub enum Pace {
    /// As soon as the one before is answered.
    Closed,
    /// By a schedule that does not wait for answers.
    Open(Arrivals),
}

/// Poisson arrivals: exponential gaps, so that bursts happen as they do with independent callers.
pub struct Arrivals {
    mean_gap: Duration,
    next: Instant,
    due: VecDeque<Instant>,
}

impl Arrivals {
    /// Arrivals at `rate` a second from `start` on.
    ///
    /// # Panics
    /// When the rate is not above zero.
    pub fn new(rate: f64, start: Instant) -> Self {
        assert!(rate > 0.0, "an open loop needs a rate above zero");
        Self {
            mean_gap: Duration::from_secs_f64(1.0 / rate),
            next: start,
            due: VecDeque::new(),
        }
    }

    /// Moves everything that is due by `now` into the queue.
    pub fn advance(&mut self, now: Instant, rng: &mut Xoshiro256PlusPlus) {
        while self.next <= now {
            self.due.push_back(self.next);
            let gap = -(1.0 - unit(rng)).ln();
            self.next += self.mean_gap.mul_f64(gap);
        }
    }

    /// The oldest operation that is due and not yet taken.
    pub fn take(&mut self) -> Option<Instant> {
        self.due.pop_front()
    }

    /// When the next one will be due.
    pub fn next_due(&self) -> Instant {
        self.due.front().copied().unwrap_or(self.next)
    }

    /// Operations that are due and were not sent.
    pub fn backlog(&self) -> u64 {
        u64::try_from(self.due.len()).expect("a length fits 64 bits")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_xoshiro::rand_core::SeedableRng;

    #[test]
    fn arrivals_keep_their_rate_and_are_not_thinned_by_a_stall() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
        let start = Instant::now();
        let mut arrivals = Arrivals::new(1000.0, start);
        arrivals.advance(start + Duration::from_secs(10), &mut rng);
        let backlog = arrivals.backlog();
        assert!(
            (9_500..10_500).contains(&backlog),
            "{backlog} arrivals in 10 s at 1000/s"
        );
        let first = arrivals.take().unwrap();
        assert_eq!(first, start, "a late one keeps its intended time");
    }

    #[test]
    fn each_key_comes_once() {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(3);
        let source = Source::Each {
            operation: Operation::Write,
            next: AtomicU64::new(0),
            count: 3,
        };
        let keys: Vec<u64> = std::iter::from_fn(|| source.next(&mut rng))
            .map(|(_, key)| key)
            .collect();
        assert_eq!(keys, [0, 1, 2]);
    }
}
