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

use crate::signal::Signal;

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

/// What a byte of an update costs when as many as `room` may come in `time`; never more than [`SLOWDOWN_MAX`] makes of the
/// background's own `rate`.
pub(crate) fn price_of_room(time: Duration, room: u64, rate: u64) -> Price {
    let picos = mul_div(nanos(time), 1000, room);
    let highest = price(SLOWDOWN_MAX, Some(rate));
    Price {
        picos_per_byte: picos,
    }
    .min(highest)
}

/// Time in which so many bytes are done at a `rate`.
pub(crate) fn time_of(bytes: u64, rate: u64) -> Duration {
    Duration::from_nanos(mul_div(bytes, 1_000_000_000, rate))
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

    /// Bytes that are paid for in `time`.
    fn bytes_in(self, time: Duration) -> u64 {
        mul_div(nanos(time), 1000, self.picos_per_byte)
    }

    /// Whether it is a quarter lower, or more.
    fn is_much_below(self, other: Price) -> bool {
        self < other && self.picos_per_byte <= other.picos_per_byte - other.picos_per_byte / 4
    }
}

/// The queue of updates: each takes as much time as its bytes cost, one after the other.
///
/// As updates come in bursts, so many bytes pass at once before anybody waits.
///
/// What waits is counted in bytes, not in time: when the price falls, those that have taken their turn at a higher one
/// go on earlier, and those that come do not wait for what others would have paid. When it rises, nobody waits longer
/// than was said when the turn was taken.
#[derive(Default)]
pub(crate) struct Queue {
    price: Cell<Price>,
    burst_bytes: u64,
    /// Bytes that were taken, ever.
    taken: Cell<u64>,
    /// Bytes of them whose turn had come at `counted_at`.
    served: Cell<u64>,
    counted_at: Cell<Instant>,
    /// Bytes of an update, on average.
    bytes: Cell<u64>,
    /// The price has fallen by a quarter or more since it rang, or since the highest one after that.
    cheaper: Signal,
    highest: Cell<Price>,
}

impl Queue {
    pub(crate) fn new(burst_bytes: u64) -> Queue {
        Queue {
            burst_bytes,
            ..Queue::default()
        }
    }

    pub(crate) fn set_price(&self, now: Instant, price: Price) {
        self.count(now);
        self.price.set(price);
        let highest = self.highest.get().max(price);
        self.highest.set(highest);
        if price.is_much_below(highest) {
            self.highest.set(price);
            self.cheaper.ring();
        }
    }

    /// Whether updates cost any time.
    pub(crate) fn is_free(&self) -> bool {
        self.price.get() == Price::default()
    }

    /// Counts what was served up to now.
    fn count(&self, now: Instant) {
        let price = self.price.get();
        let (taken, counted_at) = (self.taken.get(), self.counted_at.get());
        let more = price.bytes_in(now - counted_at);
        let served = self.served.get().saturating_add(more);
        self.served.set(served.min(taken));
        // Part of a byte's time is not lost: with many who look, that could be all of it.
        let until = if served < taken {
            counted_at + price.of(more)
        } else {
            now
        };
        self.counted_at.set(until);
    }

    /// How long it takes at this price until all before `place` are served, but for a burst.
    fn left(&self, now: Instant, place: u64) -> Duration {
        self.count(now);
        // What was given back need not be waited for.
        let place = place.min(self.taken.get());
        let before = place.saturating_sub(self.served.get());
        self.price.get().of(before.saturating_sub(self.burst_bytes))
    }

    /// Takes a turn of an average update, or `None` when that is further away than `patience`.
    pub(crate) fn take(&self, now: Instant, patience: Duration) -> Option<Due<'_>> {
        let place = self.taken.get();
        let left = self.left(now, place);
        if left > patience {
            return None;
        }
        let bytes = self.bytes.get();
        self.taken.set(place.saturating_add(bytes));
        Some(Due {
            queue: self,
            bytes,
            place,
            turn: now + left,
        })
    }

    /// For an update that has not taken any time, and whose size is to be known all the same.
    pub(crate) fn untaken(&self) -> Due<'_> {
        Due {
            queue: self,
            bytes: 0,
            place: 0,
            turn: Instant::default(),
        }
    }

    /// Makes what was taken as `before` be `now`.
    fn correct(&self, before: u64, now: u64) {
        let others = self.taken.get().saturating_sub(before);
        let taken = others.saturating_add(now);
        self.taken.set(taken);
        self.served.set(self.served.get().min(taken));
    }
}

/// What an update has taken of the queue. An update that is given up, or fails, before it is known what
/// it writes gives everything back.
#[must_use = "what was taken is settled when the update's size is known"]
pub(crate) struct Due<'a> {
    queue: &'a Queue,
    bytes: u64,
    /// Bytes that were taken before.
    place: u64,
    /// When its turn has come at the latest.
    turn: Instant,
}

impl Due<'_> {
    /// When its turn comes, as the price is now.
    pub(crate) fn turn(&self, now: Instant) -> Instant {
        self.turn.min(now + self.queue.left(now, self.place))
    }

    /// Completes when updates have become so much cheaper that its turn is to be looked at again.
    pub(crate) async fn cheaper(&self) {
        let before = self.queue.price.get();
        let is_cheaper = || self.queue.price.get().is_much_below(before);
        let cheaper = || is_cheaper().then_some(());
        self.queue.cheaper.until(cheaper).await;
    }

    /// Puts right what the update has taken, now that its bytes are known: 0 if it wrote nothing.
    pub(crate) fn settle(mut self, bytes: u64) {
        let queue = self.queue;
        if bytes > 0 {
            let average = queue.bytes.get();
            queue.bytes.set((average * 7 + bytes).div_ceil(8));
        }
        let before = std::mem::take(&mut self.bytes);
        if !queue.is_free() || before > 0 {
            queue.correct(before, bytes);
        }
    }
}

impl Drop for Due<'_> {
    fn drop(&mut self) {
        // Nothing is left after a settlement.
        self.queue.correct(self.bytes, 0);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
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

    const START: Instant = Instant(1_000_000_000);
    const PATIENCE: Duration = Duration::from_millis(100);

    /// How long after the start the turn comes that is taken then.
    fn wait(due: &Due<'_>) -> Duration {
        due.turn(START) - START
    }

    #[test]
    fn updates_take_turns_at_the_rate_that_the_price_allows() {
        let queue = Queue::default();
        assert!(queue.is_free());
        // As much again as the background does, which is 1000 bytes a millisecond.
        queue.set_price(START, price(ONE, Some(1_000_000)));
        assert!(!queue.is_free());
        let take = |now| queue.take(now, PATIENCE);
        let first = take(START).unwrap();
        assert_eq!(wait(&first), Duration::ZERO);
        first.settle(8000);
        let second = take(START).unwrap();
        assert_eq!(wait(&second), Duration::from_millis(8));
        // What was not written is given back.
        second.settle(0);
        let third = take(START).unwrap();
        assert_eq!(wait(&third), Duration::from_millis(8));
        third.settle(1000);
        let dues: Vec<Due<'_>> = std::iter::from_fn(|| take(START)).collect();
        assert!(wait(dues.last().unwrap()) <= PATIENCE);
        assert!(take(START).is_none());
        assert!(take(START + PATIENCE).is_some());
    }

    #[test]
    fn who_waits_goes_on_earlier_when_updates_become_cheaper_and_not_later_when_dearer() {
        let queue = Queue::default();
        let at = |rate| price(ONE, Some(rate));
        queue.set_price(START, at(1_000_000));
        let taken = || queue.take(START, PATIENCE).unwrap();
        taken().settle(50_000);
        let waiting = taken();
        let mut cheaper = Box::pin(waiting.cheaper());
        assert!((&mut cheaper).now_or_never().is_none());
        assert_eq!(wait(&waiting), Duration::from_millis(50));
        queue.set_price(START, at(500_000));
        assert_eq!(wait(&waiting), Duration::from_millis(50));
        assert!((&mut cheaper).now_or_never().is_none());
        queue.set_price(START, at(2_000_000));
        assert_eq!(wait(&waiting), Duration::from_millis(25));
        assert!((&mut cheaper).now_or_never().is_some());
        queue.set_price(START, Price::default());
        assert_eq!(wait(&waiting), Duration::ZERO);
        // And who comes once there is a price again does not wait for what was free.
        queue.set_price(START, at(1_000_000));
        let next = taken();
        drop(cheaper);
        waiting.settle(0);
        assert_eq!(wait(&next), Duration::ZERO);
    }

    #[test]
    fn a_burst_does_not_wait_but_what_comes_too_fast_all_the_time_does() {
        let queue = Queue::new(10_000);
        queue.set_price(START, price(ONE, Some(1_000_000)));
        let ms = Duration::from_millis;
        let take = |after| queue.take(START + after, PATIENCE).unwrap();
        let mut waits = Vec::new();
        for number in 0..5 {
            let after = ms(5) * number;
            let due = take(after);
            waits.push(due.turn(START + after) - (START + after));
            due.settle(8000);
        }
        // Each brings 3 ms more than is served between two.
        assert_eq!(waits, [ms(0), ms(0), ms(0), ms(0), ms(2)]);
    }

    /// A byte costs 16 microseconds, and somebody looks every 7.
    #[test]
    fn what_is_served_does_not_depend_on_how_often_it_is_counted() {
        let queue = Queue::default();
        queue.set_price(START, price(SLOWDOWN_MAX, Some(1_000_000)));
        let first = queue.take(START, PATIENCE).unwrap();
        first.settle(5000);
        for micros in (0..79_000).step_by(7) {
            queue.count(START + Duration::from_micros(micros));
        }
        let now = START + Duration::from_millis(79);
        let left = queue.take(now, PATIENCE).unwrap().turn(now) - now;
        let millisecond = Duration::from_millis(1);
        assert!(left.abs_diff(millisecond) < millisecond / 20, "{left:?}");
    }

    #[test]
    fn who_waits_behind_one_that_gives_up_is_served() {
        let queue = Queue::default();
        queue.set_price(START, price(ONE, Some(1_000_000)));
        let taken = || queue.take(START, PATIENCE).unwrap();
        taken().settle(8000);
        let (first, second) = (taken(), taken());
        drop(first);
        queue.set_price(START, Price::default());
        assert_eq!(wait(&second), Duration::ZERO);
    }

    #[test]
    fn a_byte_costs_the_time_in_which_the_room_may_be_filled() {
        let ms = Duration::from_millis;
        let of = |price: Price| price.of(1000);
        assert_eq!(of(price_of_room(ms(10), 10_000, MIB)), ms(1));
        assert_eq!(of(price_of_room(Duration::ZERO, 10, MIB)), ms(0));
        // Without room, as slow as it gets.
        let slowest = price(SLOWDOWN_MAX, Some(MIB));
        assert_eq!(price_of_room(ms(10), 0, MIB), slowest);
        assert_eq!(time_of(500, 1_000_000), Duration::from_micros(500));
    }

    #[test]
    fn without_a_measured_rate_nothing_is_priced() {
        assert_eq!(price(SLOWDOWN_MAX, None), Price::default());
        assert!(price(1, Some(MIB)) < price(2, Some(MIB)));
        assert!(price(ONE, Some(2 * MIB)) < price(ONE, Some(MIB)));
    }
}
