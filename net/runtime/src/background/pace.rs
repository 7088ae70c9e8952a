//! How fast background jobs may use the disk: the I/O scheduler of a node.
//!
//! A transfer costs device time: its bytes by the measured rate of its direction. All executors of a
//! node share one account, in which jobs together may use [`SHARE_PERCENT`] of the time; a transfer
//! that comes too early waits. Flushes are booked and never wait, since writes wait for them:
//! compaction and scrub get what flushes leave.
//!
//! The shards' own requests are not seen here; the rest of the time is theirs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::config::DiskRates;

/// Part of the device's time for background jobs. Compaction moves each byte about ten times, so it
/// needs most of a busy device; the rest keeps reads and the log short.
pub(crate) const SHARE_PERCENT: u64 = 75;

/// How far ahead of its pace a job may get: a few large transfers in flight.
const BURST: Duration = Duration::from_millis(20);

/// Direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the disk.
    Read,
    /// To it.
    Write,
}

/// The account.
#[derive(Debug)]
pub(crate) struct Pace {
    rates: DiskRates,
    since: Instant,
    /// Until when, in nanoseconds since `since`, the device's time is booked.
    booked_until_ns: AtomicU64,
    waited_us: AtomicU64,
}

impl Pace {
    /// An account for a disk. Rates of zero count as one byte a second.
    pub(crate) fn new(rates: DiskRates) -> Pace {
        Pace {
            rates,
            since: Instant::now(),
            booked_until_ns: AtomicU64::new(0),
            waited_us: AtomicU64::new(0),
        }
    }

    /// Books a transfer of `bytes` now. Returns how long it has to wait first.
    pub(crate) fn book(&self, direction: Direction, bytes: usize) -> Duration {
        let now_ns = u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.book_at(now_ns, direction, bytes)
    }

    fn book_at(&self, now_ns: u64, direction: Direction, bytes: usize) -> Duration {
        let cost_ns = self.cost_ns(direction, bytes);
        let after = |until: u64| until.max(now_ns).saturating_add(cost_ns);
        let before =
            self.booked_until_ns
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |until| {
                    Some(after(until))
                });
        let (Ok(until) | Err(until)) = before;
        Duration::from_nanos(until.saturating_sub(now_ns)).saturating_sub(BURST)
    }

    /// Time of the account that a transfer takes.
    fn cost_ns(&self, direction: Direction, bytes: usize) -> u64 {
        let rate = match direction {
            Direction::Read => self.rates.read,
            Direction::Write => self.rates.write,
        };
        let allowed = (u128::from(rate) * u128::from(SHARE_PERCENT) / 100).max(1);
        let cost = bytes as u128 * 1_000_000_000 / allowed;
        u64::try_from(cost).unwrap_or(u64::MAX)
    }

    /// Notes that a job waited.
    pub(crate) fn waited(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.waited_us.fetch_add(us, Ordering::Relaxed);
    }

    /// How long jobs have waited in all.
    pub(crate) fn waited_in_all(&self) -> Duration {
        Duration::from_micros(self.waited_us.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// A disk that reads 100 and writes 50 MiB in each second that jobs may use.
    fn pace() -> Pace {
        let rate = |mebibytes: u64| mebibytes * MIB as u64 * 100 / SHARE_PERCENT;
        Pace::new(DiskRates {
            read: rate(100),
            write: rate(50),
        })
    }

    #[test]
    fn transfers_that_come_at_once_wait_until_their_time_has_come() {
        let pace = pace();
        let waits: Vec<u128> = (0..4)
            .map(|_| pace.book_at(0, Direction::Read, 10 * MIB).as_millis())
            .collect();
        // Each takes 100 ms of the account; the burst goes off each wait.
        assert_eq!(waits, [0, 80, 180, 280]);
    }

    #[test]
    fn a_write_costs_what_the_disk_makes_of_it() {
        let pace = pace();
        assert_eq!(pace.book_at(0, Direction::Write, 10 * MIB), Duration::ZERO);
        let wait = pace.book_at(0, Direction::Read, MIB);
        assert_eq!(wait.as_millis(), 180);
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let pace = pace();
        let later = 60_000_000_000;
        assert_eq!(
            pace.book_at(later, Direction::Read, 10 * MIB),
            Duration::ZERO
        );
        let wait = pace.book_at(later, Direction::Read, 10 * MIB);
        assert_eq!(wait.as_millis(), 80);
    }

    #[test]
    fn a_disk_without_a_rate_stops_nobody_for_ever_by_a_division() {
        let pace = Pace::new(DiskRates { read: 0, write: 0 });
        assert_eq!(pace.book_at(0, Direction::Read, MIB), Duration::ZERO);
        assert!(pace.book_at(0, Direction::Read, MIB) > Duration::ZERO);
    }
}
