//! How long a thread that only reads the clock and polls its sockets is held up: what the machine
//! itself adds to the scheduling lag.
//!
//! Timer interrupts, the kernel's own threads, a hypervisor and other programs all show as two
//! readings of the clock that lie too far apart. They are taken while the load runs, whenever a
//! worker has nothing to do, so they tell of the same minutes as the lag beside them.

use hdrhistogram::Histogram;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use torc_measure::keys::unit;

use super::recorder::{add, histogram};
use super::world::Nanos;

/// A poll that takes no longer is none: asking the kernel takes part of a microsecond.
const GAP_NS_MIN: Nanos = 2_000;
/// Polling for less than this says nothing of the rare pauses.
const POLLED_NS_MIN: Nanos = 50_000_000;

/// Pauses of one thread, or of several added up.
#[derive(Clone)]
pub struct Pauses {
    /// Time in which they would have been seen, in nanoseconds.
    pub polled_ns: Nanos,
    /// From one reading of the clock to the next, where that took too long, in nanoseconds.
    pub gaps: Histogram<u64>,
}

impl Default for Pauses {
    fn default() -> Self {
        Self {
            polled_ns: 0,
            gaps: histogram(3),
        }
    }
}

impl Pauses {
    /// From one reading of the clock to the next it took so long.
    pub fn polled(&mut self, took: Nanos) {
        self.polled_ns += took;
        if took >= GAP_NS_MIN {
            self.gaps.saturating_record(took);
        }
    }

    /// What an operation that came up at a random moment of that time would have waited, at most,
    /// in this share of cases (0 to 1), in nanoseconds. `None` where too little was polled to tell.
    pub fn wait_at(&self, quantile: f64) -> Option<Nanos> {
        if self.polled_ns < POLLED_NS_MIN {
            return None;
        }
        // Of a gap of `g`, the moments that are more than `w` before its end are `g - w` long. The
        // wait sought is that at which these add up to the share that may lie beyond.
        let beyond = (1.0 - quantile) * self.polled_ns as f64;
        let mut gaps: Vec<(f64, f64)> = self
            .gaps
            .iter_recorded()
            .map(|one| (one.value_iterated_to() as f64, one.count_at_value() as f64))
            .collect();
        gaps.reverse();
        let (mut count, mut sum) = (0.0, 0.0);
        for (at, (gap, times)) in gaps.iter().enumerate() {
            count += times;
            sum += times * gap;
            let wait = ((sum - beyond) / count).max(0.0);
            let next = gaps.get(at + 1).map_or(0.0, |(gap, _)| *gap);
            if wait >= next {
                return Some(nanos(wait));
            }
        }
        Some(0)
    }

    /// What operations of one thread would wait in this share of cases (0 to 1) that come up at random, so many a
    /// second, and take `each_ns`, in nanoseconds: behind each other, and behind pauses like these, which come at random
    /// too. It is what a client is late that has no other fault.
    pub fn queue_at(&self, quantile: f64, rate_per_s: f64, each_ns: f64) -> Nanos {
        const OPERATIONS: u32 = 500_000;
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(1);
        let mut after = |mean: f64| -(1.0 - unit(&mut rng)).ln() * mean;
        let mut pauses = Xoshiro256PlusPlus::seed_from_u64(2);
        let pause_every = self.polled_ns as f64 / self.gaps.len() as f64;
        let (mut now, mut free_at, mut pause_at) = (0.0_f64, 0.0_f64, after(pause_every));
        let mut waits = histogram(3);
        for _ in 0..OPERATIONS {
            now += after(1e9 / rate_per_s);
            while pause_at <= free_at.max(now) {
                let gap = self.gaps.value_at_quantile(unit(&mut pauses)) as f64;
                free_at = free_at.max(pause_at) + gap;
                pause_at += after(pause_every);
            }
            let begins = free_at.max(now);
            waits.saturating_record(nanos(begins - now));
            free_at = begins + each_ns;
        }
        waits.value_at_quantile(quantile)
    }

    /// Adds those of another thread or interval.
    pub fn merge(&mut self, other: &Pauses) {
        self.polled_ns += other.polled_ns;
        add(&mut self.gaps, &other.gaps);
    }

    /// Forgets them all.
    pub fn clear(&mut self) {
        self.polled_ns = 0;
        if !self.gaps.is_empty() {
            self.gaps.reset();
        }
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between zero and the longest gap, which was such a number"
)]
fn nanos(wait: f64) -> Nanos {
    wait as Nanos
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    fn near(found: Option<Nanos>, expected: Nanos) {
        let found = found.unwrap();
        assert!(found.abs_diff(expected) * 100 <= expected, "{found}");
    }

    #[test]
    fn pauses_weigh_as_long_as_they_last() {
        let mut pauses = Pauses::default();
        // A tick: 250 pauses of 60 us in a second. A thousandth of it is 1 ms, which is the first
        // 4 us of each.
        for _ in 0..250 {
            pauses.polled(60_000);
        }
        pauses.polled(1_000);
        pauses.polled_ns = SECOND;
        near(pauses.wait_at(0.999), 56_000);
        near(pauses.wait_at(0.99), 20_000);
        assert_eq!(pauses.wait_at(0.9), Some(0), "most moments are free");
        // One pause of 50 ms in that second is a twentieth of it.
        let mut other = Pauses::default();
        other.polled(50_000_000);
        pauses.merge(&other);
        pauses.polled_ns = SECOND;
        near(pauses.wait_at(0.999), 49_000_000);
        near(pauses.wait_at(0.99), 40_000_000);
        pauses.clear();
        assert_eq!((pauses.polled_ns, pauses.wait_at(0.5)), (0, None));
    }

    #[test]
    fn operations_wait_behind_each_other_and_behind_pauses() {
        let none = Pauses::default();
        // M/D/1, half busy: the wait beyond which a thousandth lies is five times the service.
        let alone = none.queue_at(0.999, 50_000.0, 10_000.0);
        assert!((46_000..54_000).contains(&alone), "{alone}");
        let mut ticks = Pauses::default();
        for _ in 0..250 {
            ticks.polled(60_000);
        }
        ticks.polled_ns = SECOND;
        let both = ticks.queue_at(0.999, 50_000.0, 10_000.0);
        assert!((alone + 20_000..alone + 60_000).contains(&both), "{both}");
        let rare = ticks.queue_at(0.999, 10.0, 10_000.0);
        assert!(
            (50_000..61_000).contains(&rare),
            "as if it were alone: {rare}"
        );
    }

    #[test]
    fn a_thread_that_is_not_held_up_has_no_pauses() {
        let mut pauses = Pauses::default();
        for _ in 0..100_000 {
            pauses.polled(600);
        }
        assert_eq!((pauses.wait_at(0.999), pauses.gaps.len()), (Some(0), 0));
    }
}
