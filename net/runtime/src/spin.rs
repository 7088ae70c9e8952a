//! Whether an idle shard may spin.
//!
//! Spinning trades a core for the tens of microseconds that a wake-up costs. It pays only while the
//! core is the shard's own: when the kernel reports that this thread had to wait for its CPU, somebody
//! else needs it, and the shard goes to sleep like everybody for a while.

use std::cell::Cell;
use std::time::Duration;

use torc_env::Instant;

/// How often the kernel is asked.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// A thread that waited for its CPU for more than one part in this many is not alone.
const WAITING_SHARE: u32 = 50;

/// How long a shard that was not alone does not spin.
const PENALTY: Duration = Duration::from_secs(1);

/// One shard's permission to spin.
pub(crate) struct Spin {
    /// How long to look for work before sleeping; zero: never.
    budget: Duration,
    checked_at: Cell<Instant>,
    waited: Cell<Duration>,
    banned_until: Cell<Instant>,
}

impl Spin {
    /// A shard that may spin for `budget` whenever it is idle.
    pub(crate) fn new(budget: Duration) -> Spin {
        Spin {
            budget,
            checked_at: Cell::default(),
            waited: Cell::default(),
            banned_until: Cell::default(),
        }
    }

    /// How long to spin now; zero: not at all.
    pub(crate) fn budget(&self, now: Instant) -> Duration {
        if self.budget.is_zero() {
            return Duration::ZERO;
        }
        if now - self.checked_at.get() >= CHECK_INTERVAL {
            self.check(now, waited_for_cpu());
        }
        if now < self.banned_until.get() {
            return Duration::ZERO;
        }
        self.budget
    }

    /// Looks at the time that this thread has waited for its CPU since it started.
    fn check(&self, now: Instant, waited: Option<Duration>) {
        let passed = now - self.checked_at.replace(now);
        let Some(waited) = waited else { return };
        let newly = waited.saturating_sub(self.waited.replace(waited));
        if newly > passed / WAITING_SHARE {
            self.banned_until.set(now + PENALTY);
        }
    }
}

/// How long the calling thread has been ready to run without a CPU to run on. `None` when the
/// kernel does not count it.
fn waited_for_cpu() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanos = stat.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Instant {
        Instant(0) + Duration::from_millis(millis)
    }

    #[test]
    fn a_thread_that_waits_for_its_cpu_stops_spinning_for_a_while() {
        let spin = Spin::new(Duration::from_micros(50));
        spin.check(at(1000), Some(Duration::from_millis(1)));
        assert_eq!(spin.budget(at(1001)), Duration::from_micros(50));
        spin.check(at(1100), Some(Duration::from_millis(31)));
        assert_eq!(spin.budget(at(1101)), Duration::ZERO);
        spin.checked_at.set(at(2200));
        assert_eq!(spin.budget(at(2200)), Duration::from_micros(50));
    }

    #[test]
    fn no_budget_is_no_spinning() {
        assert_eq!(Spin::new(Duration::ZERO).budget(at(5)), Duration::ZERO);
    }
}
