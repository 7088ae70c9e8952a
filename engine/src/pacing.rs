//! How long an update waits and how fast a job goes: the arithmetic of pacing, without clock or store.
//!
//! Both follow from how far the background is behind. Up to a line, jobs go about as fast as the
//! updates need, so that at no time they take more from reads than they must. Beyond it, they go as
//! fast as they can, and updates wait: not at all at the line, as long as makes them come as fast as
//! jobs follow half way to the bound, [`SLOWDOWN_MAX`] times as long close to it. So the rate of updates
//! settles where the background can follow, and there is no moment at which it stops.

use std::cell::Cell;
use std::time::Duration;

use torc_env::Instant;

/// Slowdowns, shares and speeds are counted in thousandths.
pub(crate) const ONE: u64 = 1000;
/// Never slower than this part of what the background does: a bound on how wrong a measured rate can be.
const SLOWDOWN_MAX: u64 = 16 * ONE;
/// Bytes a second below which no job is held: on an idle store it has to end in bearable time.
const SPEED_MIN: u64 = 8 << 20;
/// How full the levels are, in thousandths, when jobs go just as fast as updates need. Below 1000, for
/// what is owed goes up and down between merges.
const BALANCE: u64 = 750;
/// How full they are at the line.
const BEHIND: u64 = 1500;

/// By how much slower than the background's own rate updates may come, in thousandths: 0 up to `low`, 1000
/// half way between `low` and `high`.
pub(crate) fn slowdown(backlog: u64, low: u64, high: u64) -> u64 {
    let above = backlog.saturating_sub(low);
    if above == 0 {
        return 0;
    }
    match high.saturating_sub(backlog) {
        0 => SLOWDOWN_MAX,
        room => mul_div(above, ONE, room).min(SLOWDOWN_MAX),
    }
}

/// Bytes a second at which tables are merged when updates need `need` and `owed` bytes are to be merged,
/// where levels that are just full owe `full`. `None`: as fast as can be.
pub(crate) fn merge_speed(need: u64, owed: u64, full: u64) -> Option<u64> {
    let level = if full == 0 {
        BEHIND
    } else {
        mul_div(owed, ONE, full)
    };
    if level >= BEHIND {
        return None;
    }
    let beyond = level.saturating_sub(ONE);
    let gain = level * (ONE + 8 * beyond) / BALANCE;
    Some(mul_div(need, gain, ONE).max(SPEED_MIN))
}

/// What is owed at the line when levels that are just full owe `full`.
pub(crate) fn line(full: u64) -> u64 {
    mul_div(full, BEHIND, ONE)
}

/// Bytes a second at which a memtable is flushed while there is no hurry and updates bring `need`: in half of the time
/// that they take to fill the next one.
pub(crate) fn flush_speed(need: u64) -> u64 {
    need.saturating_mul(2).max(SPEED_MIN)
}

/// Bytes a second that are moved out of blobs while there is no hurry and updates bring `need`: emptied at half, a blob
/// gives up a byte for each that is moved, so this is twice what holds its size.
pub(crate) fn moving_speed(need: u64) -> u64 {
    need.saturating_mul(2).max(SPEED_MIN)
}

/// How far a job may come that has come as far as `done`, was allowed `before`, and is to go at `speed`, when `elapsed`
/// has passed since.
pub(crate) fn allowance(before: u64, done: u64, speed: Option<u64>, elapsed: Duration) -> u64 {
    let Some(speed) = speed else {
        return u64::MAX;
    };
    let in_time = |time: Duration| mul_div(speed, nanos(time), 1_000_000_000);
    let before = before.min(done.saturating_add(in_time(CATCH_UP)));
    before.saturating_add(in_time(elapsed.min(CATCH_UP)))
}

/// A job that was held up may catch up on so much time.
const CATCH_UP: Duration = Duration::from_millis(50);

/// `a × b ÷ c`, or the largest number.
pub(crate) fn mul_div(a: u64, b: u64, c: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product
        .checked_div(u128::from(c))
        .and_then(|quotient| u64::try_from(quotient).ok())
        .unwrap_or(u64::MAX)
}

/// A measured speed. What is long ago counts less and less.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    bytes: u64,
    nanos: u64,
}

/// Time over which a rate is measured; beyond it, the past is halved.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// A shorter time says nothing.
const RATE_MIN: Duration = Duration::from_millis(20);

impl Rate {
    /// That of so many bytes in `time`.
    pub(crate) fn of(bytes: u64, time: Duration) -> Rate {
        let mut rate = Rate::default();
        rate.add(bytes, time);
        rate
    }

    /// Counts what was done in `time`, of which at most [`RATE_WINDOW`] counts: a long pause is not
    /// slowness.
    pub(crate) fn add(&mut self, bytes: u64, time: Duration) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.nanos += nanos(time.min(RATE_WINDOW));
        if self.nanos > nanos(RATE_WINDOW) {
            self.bytes /= 2;
            self.nanos /= 2;
        }
    }

    /// Bytes a second; `None` while too little was measured.
    pub(crate) fn per_s(&self) -> Option<u64> {
        let is_known = self.bytes > 0 && self.nanos >= nanos(RATE_MIN);
        is_known.then(|| mul_div(self.bytes, 1_000_000_000, self.nanos).max(1))
    }

    /// Its bytes for each thousand of another's that was measured over the same times.
    pub(crate) fn share_of(&self, other: &Rate) -> u64 {
        mul_div(self.bytes, ONE, other.bytes.max(1))
    }
}

/// What a byte of an update costs in time, from the rate at which the background follows and the slowdown.
pub(crate) fn price(slowdown: u64, rate: Option<u64>) -> Price {
    let Some(rate) = rate else {
        return Price::default();
    };
    Price {
        picos_per_byte: mul_div(
            slowdown.min(SLOWDOWN_MAX),
            1_000_000_000_000 / ONE,
            rate.max(1),
        ),
    }
}

/// Time that a byte of an update costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Price {
    picos_per_byte: u64,
}

impl Price {
    fn of(self, bytes: u64) -> Duration {
        Duration::from_nanos(mul_div(self.picos_per_byte, bytes, 1000))
    }
}

/// The queue of updates: each takes as much time as its bytes cost, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    price: Cell<Price>,
    /// Until when time is taken.
    taken_until: Cell<Instant>,
    /// Bytes of an update, on average.
    bytes: Cell<u64>,
}

impl Queue {
    pub(crate) fn set_price(&self, price: Price) {
        self.price.set(price);
    }

    /// Whether updates cost any time.
    pub(crate) fn is_free(&self) -> bool {
        self.price.get() == Price::default()
    }

    /// Takes the time of an average update: when its turn comes, or `None` when that is further away than
    /// `patience`.
    pub(crate) fn take(&self, now: Instant, patience: Duration) -> Option<(Instant, Due<'_>)> {
        let turn = self.taken_until.get().max(now);
        if turn - now > patience {
            return None;
        }
        let time = self.price.get().of(self.bytes.get());
        self.taken_until.set(turn + time);
        Some((turn, Due { queue: self, time }))
    }

    /// For an update that has not taken any time, and whose size is to be known all the same.
    pub(crate) fn untaken(&self) -> Due<'_> {
        Due {
            queue: self,
            time: Duration::ZERO,
        }
    }

    /// Makes what was taken as `before` be `now`.
    fn correct(&self, before: Duration, now: Duration) {
        let taken = self.taken_until.get();
        self.taken_until.set(if now > before {
            taken + (now - before)
        } else {
            Instant(taken.0.saturating_sub(nanos(before - now)))
        });
    }
}

/// What an update has taken of the queue's time. An update that is given up, or fails, before it is known what
/// it writes gives everything back.
#[derive(Debug)]
#[must_use = "what was taken is settled when the update's size is known"]
pub(crate) struct Due<'a> {
    queue: &'a Queue,
    time: Duration,
}

impl Due<'_> {
    /// Puts right what the update has taken, now that its bytes are known: 0 if it wrote nothing.
    pub(crate) fn settle(mut self, bytes: u64) {
        let queue = self.queue;
        if bytes > 0 {
            let average = queue.bytes.get();
            queue.bytes.set((average * 7 + bytes).div_ceil(8));
        }
        let before = std::mem::take(&mut self.time);
        if !queue.is_free() || !before.is_zero() {
            queue.correct(before, queue.price.get().of(bytes));
        }
    }
}

impl Drop for Due<'_> {
    fn drop(&mut self) {
        // Nothing is left after a settlement.
        self.queue.correct(self.time, Duration::ZERO);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    proptest! {
        #[test]
        fn a_slowdown_grows_from_nothing_with_the_backlog_and_is_bounded(
            low in 0..1_u64 << 40,
            band in 1..1_u64 << 40,
            backlog in 0..1_u64 << 41,
            more in 0..1_u64 << 41,
        ) {
            let high = low + band;
            let at = |backlog| slowdown(backlog, low, high);
            prop_assert!(at(backlog) <= at(backlog + more));
            prop_assert!(at(backlog) <= SLOWDOWN_MAX);
            prop_assert_eq!(at(low.min(backlog)), 0);
            prop_assert_eq!(at(high + more), SLOWDOWN_MAX);
            prop_assert!(at(low + band / 2) <= ONE);
        }

        #[test]
        fn jobs_go_the_faster_the_more_is_owed(
            need in 0..1_u64 << 40,
            full in 1..1_u64 << 40,
            owed in 0..1_u64 << 41,
            more in 0..1_u64 << 41,
        ) {
            let at = |owed| merge_speed(need, owed, full).unwrap_or(u64::MAX);
            prop_assert!(at(owed) <= at(owed + more));
            prop_assert!(at(owed) >= SPEED_MIN);
            prop_assert_eq!(at(full * 3 / 2 + 1), u64::MAX);
        }
    }

    #[test]
    fn a_slowdown_is_one_half_way() {
        assert_eq!(slowdown(150, 100, 200), ONE);
        assert_eq!(slowdown(100, 100, 200), 0);
        assert_eq!(slowdown(u64::MAX, 100, u64::MAX), SLOWDOWN_MAX);
    }

    #[test]
    fn jobs_keep_pace_with_updates_when_levels_are_filled_as_usual() {
        assert_eq!(merge_speed(100 * MIB, 750, 1000), Some(100 * MIB));
        assert_eq!(merge_speed(0, 100, 1000), Some(SPEED_MIN));
        assert_eq!(merge_speed(100 * MIB, 1500, 1000), None);
        assert_eq!(merge_speed(100 * MIB, 0, 0), None);
    }

    #[test]
    fn a_job_catches_up_on_a_moment_and_not_on_more() {
        let at = |before, done, elapsed| {
            allowance(
                before,
                done,
                Some(1_000_000),
                Duration::from_millis(elapsed),
            )
        };
        assert_eq!(at(10_000, 10_000, 5), 15_000);
        assert_eq!(at(10_000, 8_000, 5), 15_000);
        assert_eq!(at(90_000, 10_000, 5), 65_000);
        assert_eq!(at(10_000, 10_000, 5000), 60_000);
        assert_eq!(at(u64::MAX, 10_000, 5), 65_000);
        assert_eq!(allowance(10, 10, None, Duration::ZERO), u64::MAX);
    }

    #[test]
    fn a_rate_forgets_and_does_not_take_a_pause_for_slowness() {
        let mut rate = Rate::default();
        assert_eq!(rate.per_s(), None);
        rate.add(10 * MIB, Duration::from_secs(1));
        assert_eq!(rate.per_s(), Some(10 * MIB));
        rate.add(10 * MIB, Duration::from_secs(3600));
        for _ in 0..20 {
            rate.add(20 * MIB, Duration::from_secs(1));
        }
        let now = rate.per_s().unwrap();
        assert!((15 * MIB..=20 * MIB).contains(&now), "{now}");
    }

    #[test]
    fn updates_take_turns_at_the_rate_that_the_price_allows() {
        let queue = Queue::default();
        assert!(queue.is_free());
        let start = Instant(1_000_000_000);
        let patience = Duration::from_millis(100);
        // As much again as the background does, which is 1000 bytes a millisecond.
        queue.set_price(price(ONE, Some(1_000_000)));
        assert!(!queue.is_free());
        let (first, due) = queue.take(start, patience).unwrap();
        assert_eq!(first, start);
        due.settle(8000);
        let (second, due) = queue.take(start, patience).unwrap();
        assert_eq!(second - start, Duration::from_millis(8));
        // What was not written is given back.
        due.settle(0);
        let (third, due) = queue.take(start, patience).unwrap();
        assert_eq!(third, second);
        due.settle(1000);
        let mut dues = Vec::new();
        let turns = std::iter::from_fn(|| {
            let (turn, due) = queue.take(start, patience)?;
            dues.push(due);
            Some(turn)
        });
        let last = turns.last().unwrap();
        assert!(last - start <= patience);
        assert!(queue.take(start, patience).is_none());
        assert!(queue.take(start + patience, patience).is_some());
    }

    #[test]
    fn without_a_measured_rate_nothing_is_priced() {
        assert_eq!(price(SLOWDOWN_MAX, None), Price::default());
        assert!(price(1, Some(MIB)) < price(2, Some(MIB)));
        assert!(price(ONE, Some(2 * MIB)) < price(ONE, Some(MIB)));
    }
}
