//! The hybrid logical clock of one shard: civil time that never goes backwards and is never
//! behind what it has seen.
//!
//! On the path of every mint. A stamp is a plain count of microseconds since 1970: the clock gives
//! max(civil time, last stamp + 1, newest stamp of the key + 1). Folding the logical part into the
//! microseconds instead of giving it bits of its own keeps stamps below 2^53, exact in JSON; a
//! shard would have to mint more than a million dots a second, for long, to run ahead of time.
//!
//! Invariants: stamps strictly increase within one clock; a foreign stamp further ahead than the
//! skew bound never moves it (a broken peer must not drag everyone into the future); after
//! [`Hlc::seal`] it gives no stamp any more, so that what was the last one can be written down.
//!
//! Deliberately absent: reading time (the caller passes it) and writing the high-water mark (the
//! caller does, see [`Hlc::high_water_due`]).
//!
//! Source: Kulkarni et al., *Logical Physical Clocks*, 2014, with the two counters folded into one.

use std::cell::Cell;
use std::time::Duration;

use torc_env::WallTime;

use crate::version::STAMP_MAX;

/// How far a foreign stamp may be ahead of this node's clock, unless configured: well above what
/// NTP holds, below what a person notices.
pub const SKEW_MAX_DEFAULT: Duration = Duration::from_millis(500);

/// How far ahead of civil time the durable mark is set: a crash costs at most so much of a jump
/// forward, and the mark is written once in half that time.
const HIGH_WATER_LEAD: Duration = Duration::from_secs(10);

/// How far ahead of the newest stamp it is set at least. A clock that is ahead of civil time, as after a
/// jump, only moves by a microsecond a mint: with a longer lead, crashes that follow each other would
/// add up.
const NEWEST_LEAD: Duration = Duration::from_millis(200);

/// A stamp is further ahead of this node's clock than is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stamp {stamp} is {ahead_us} us ahead of this node's clock, allowed are {bound_us} us")]
pub struct Skew {
    /// The stamp.
    pub stamp: u64,
    /// By how much it is ahead, in microseconds.
    pub ahead_us: u64,
    /// The bound, in microseconds.
    pub bound_us: u64,
}

/// Why a clock gives no stamp now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Withheld {
    /// It is sealed: its shard is stopping.
    #[error("this node is stopping")]
    Sealed,
    /// No mark of this life is durable yet. After a clean stop the one of the last life has no lead: a crash now
    /// would let the clock begin there again.
    #[error("this node has just started and its clock's mark is not durable yet")]
    NoMark,
}

/// What a clock's life has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No mark of this life is durable.
    Resumed,
    /// The mark leads.
    Running,
    /// See [`Hlc::seal`].
    Sealed,
}

/// The clock. One a shard, shared by reference.
#[derive(Debug)]
pub struct Hlc {
    /// The highest stamp minted or observed.
    last: Cell<u64>,
    /// No stamp above this one has been promised to be durable.
    high_water: Cell<u64>,
    phase: Cell<Phase>,
    bound_us: u64,
}

impl Hlc {
    /// A clock that goes on above `high_water`, the mark that was written last (0 on a fresh
    /// node): stamps stay monotone even if civil time was set back while the node was down.
    pub fn resume(high_water: u64, skew_max: Duration) -> Self {
        let high_water = high_water.min(STAMP_MAX);
        Self {
            last: Cell::new(high_water),
            high_water: Cell::new(high_water),
            phase: Cell::new(Phase::Resumed),
            bound_us: micros(skew_max),
        }
    }

    /// The next stamp, above `above`: the newest stamp of the key's state and of the write's
    /// context, which have been admitted by [`Hlc::observe`] or come from this node's own disk.
    ///
    /// # Panics
    /// When stamps are used up (in the year 2255), or the clock is sealed.
    pub fn mint(&self, wall: WallTime, above: u64) -> u64 {
        assert!(!self.is_sealed(), "a sealed clock gives no stamps");
        let stamp = wall.0.max(self.last.get() + 1).max(above + 1);
        assert!(stamp <= STAMP_MAX, "stamp {stamp} is above {STAMP_MAX}");
        self.last.set(stamp);
        stamp
    }

    /// Takes notice of a stamp that came from a peer or a client.
    ///
    /// # Errors
    /// When it is ahead of `wall` by more than the bound. The clock is then unmoved, and what
    /// carried the stamp must be refused.
    pub fn observe(&self, wall: WallTime, stamp: u64) -> Result<(), Skew> {
        // What this clock has reached itself is known already: no reason to refuse it, even when
        // civil time was set back.
        if stamp > self.last.get() {
            self.within(wall, stamp)?;
            self.last.set(stamp);
        }
        Ok(())
    }

    /// A stamp below which this clock gives none any more, nor one of a later life: civil time and the last stamp, as
    /// far as the mark reaches that is written.
    pub fn promise(&self, wall: WallTime) -> u64 {
        let promised = wall.0.max(self.last.get()).min(self.high_water.get());
        self.last.set(self.last.get().max(promised));
        promised
    }

    /// Whether the next stamp would be within the bound of civil time. Policies that order writes
    /// by time refuse to mint when it is not.
    ///
    /// # Errors
    /// When this clock runs ahead of `wall` by more than the bound: civil time was set back.
    pub fn check(&self, wall: WallTime) -> Result<(), Skew> {
        self.within(wall, self.last.get())
    }

    /// Whether stamps are given out that order nothing by time: they may come again, under another actor.
    ///
    /// # Errors
    /// See [`Withheld::Sealed`].
    pub fn check_open(&self) -> Result<(), Withheld> {
        match self.phase.get() {
            Phase::Resumed | Phase::Running => Ok(()),
            Phase::Sealed => Err(Withheld::Sealed),
        }
    }

    /// Whether stamps are given out that order by time, and must go on rising over a crash.
    ///
    /// # Errors
    /// See [`Withheld`].
    pub fn check_marked(&self) -> Result<(), Withheld> {
        match self.phase.get() {
            Phase::Resumed => Err(Withheld::NoMark),
            Phase::Running => Ok(()),
            Phase::Sealed => Err(Withheld::Sealed),
        }
    }

    /// Ends minting for good. [`Hlc::mark_at_end`] may then be written, and no other mark may follow it.
    pub fn seal(&self) {
        self.phase.set(Phase::Sealed);
    }

    /// The mark of a sealed clock, which needs no lead. Not below civil time: an archive of the log says by
    /// that how far it reaches, and what comes in the next life must be stamped later.
    pub fn mark_at_end(&self, wall: WallTime) -> u64 {
        self.last.get().max(wall.0).min(STAMP_MAX)
    }

    /// See [`Hlc::seal`].
    pub fn is_sealed(&self) -> bool {
        self.phase.get() == Phase::Sealed
    }

    /// How far the clock runs ahead of civil time. For metrics.
    pub fn ahead(&self, wall: WallTime) -> Duration {
        Duration::from_micros(self.last.get().saturating_sub(wall.0))
    }

    /// The highest stamp minted or observed.
    pub fn last(&self) -> u64 {
        self.last.get()
    }

    /// The mark to write now, if the written one is nearly used up. Report it with
    /// [`Hlc::high_water_written`] once it is durable.
    ///
    /// Minting waits for the first one of a life where stamps order by time, and for no other: dots are
    /// unique by their actor, the mark only keeps stamps monotone over a restart with a clock set back.
    pub fn high_water_due(&self, wall: WallTime) -> Option<u64> {
        let ahead_by = |civil: u64, newest: u64| {
            let (wall, last) = (wall.0, self.last.get());
            wall.saturating_add(civil).max(last.saturating_add(newest))
        };
        let (civil, newest) = (micros(HIGH_WATER_LEAD), micros(NEWEST_LEAD));
        let is_due = ahead_by(civil / 2, newest / 2) > self.high_water.get();
        is_due.then(|| ahead_by(civil, newest).min(STAMP_MAX))
    }

    /// The mark is durable.
    pub fn high_water_written(&self, mark: u64) {
        self.high_water.set(self.high_water.get().max(mark));
        self.go_on();
    }

    /// The mark that was written is not on the disk any more: the next one is due at once, and what orders by time waits
    /// for it.
    pub fn mark_is_gone(&self) {
        self.high_water.set(0);
        if self.phase.get() == Phase::Running {
            self.phase.set(Phase::Resumed);
        }
    }

    /// No mark can be written for long, and stamps are given out all the same: a full disk must take
    /// deletions.
    pub fn go_on(&self) {
        if self.phase.get() == Phase::Resumed {
            self.phase.set(Phase::Running);
        }
    }

    fn within(&self, wall: WallTime, stamp: u64) -> Result<(), Skew> {
        let ahead_us = stamp.saturating_sub(wall.0);
        if ahead_us > self.bound_us || stamp > STAMP_MAX {
            return Err(Skew {
                stamp,
                ahead_us,
                bound_us: self.bound_us,
            });
        }
        Ok(())
    }
}

/// The whole milliseconds since 1970 of a stamp.
pub fn stamp_millis(stamp: u64) -> u64 {
    stamp / 1000
}

/// The first stamp of a millisecond since 1970; the last stamp there is when it lies beyond.
pub fn stamp_of_millis(millis: u64) -> u64 {
    millis.saturating_mul(1000).min(STAMP_MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_millis(500);

    #[test]
    fn stamps_follow_civil_time_and_never_repeat() {
        let clock = Hlc::resume(0, BOUND);
        assert_eq!(clock.mint(WallTime(1_000), 0), 1_000);
        assert_eq!(clock.mint(WallTime(1_000), 0), 1_001);
        assert_eq!(clock.mint(WallTime(5_000), 0), 5_000);
    }

    #[test]
    fn a_clock_set_back_does_not_take_stamps_back() {
        let clock = Hlc::resume(0, BOUND);
        let before = clock.mint(WallTime(10_000_000), 0);
        assert_eq!(clock.mint(WallTime(1_000_000), 0), before + 1);
        assert_eq!(
            clock.ahead(WallTime(1_000_000)),
            Duration::from_micros(9_000_001)
        );
        assert!(clock.check(WallTime(1_000_000)).is_err());
        assert!(clock.check(WallTime(10_000_000)).is_ok());
        clock
            .observe(WallTime(1_000_000), before)
            .expect("a stamp of one's own is never too far ahead");
    }

    #[test]
    fn a_mint_is_above_the_key_and_above_what_was_observed() {
        let clock = Hlc::resume(0, BOUND);
        assert_eq!(clock.mint(WallTime(100), 7_000), 7_001);
        clock
            .observe(WallTime(100), 9_000)
            .expect("within the bound");
        assert_eq!(clock.mint(WallTime(100), 0), 9_001);
    }

    #[test]
    fn a_stamp_beyond_the_bound_is_refused_and_moves_nothing() {
        let clock = Hlc::resume(0, BOUND);
        let wall = WallTime(1_000_000);
        let edge = 1_000_000 + 500_000;
        let skew = clock.observe(wall, edge + 1).expect_err("beyond the bound");
        assert_eq!((skew.ahead_us, skew.bound_us), (500_001, 500_000));
        assert_eq!(clock.last(), 0);
        clock.observe(wall, edge).expect("at the bound");
        assert!(clock.observe(WallTime(u64::MAX), u64::MAX).is_err());
    }

    #[test]
    fn the_high_water_mark_leads_and_outlives_a_restart() {
        let clock = Hlc::resume(0, BOUND);
        let wall = WallTime(1_000_000_000);
        let mark = clock.high_water_due(wall).expect("nothing is written yet");
        clock.high_water_written(mark);
        assert_eq!(clock.high_water_due(wall), None);
        let later = WallTime(wall.0 + 6_000_000);
        let newest = clock.mint(later, 0);
        assert!(clock.high_water_due(later).is_some_and(|next| next > mark));

        let resumed = Hlc::resume(mark, BOUND);
        assert!(resumed.mint(WallTime(0), 0) > newest);
    }

    #[test]
    fn what_is_promised_holds_after_the_clock_is_set_back_and_after_a_crash() {
        let clock = Hlc::resume(0, BOUND);
        let wall = WallTime(1_000_000_000);
        assert_eq!(clock.promise(wall), 0, "no mark is written");
        let mark = clock.high_water_due(wall).unwrap();
        clock.high_water_written(mark);
        assert_eq!(clock.promise(wall), wall.0);
        assert!(clock.mint(WallTime(0), 0) > wall.0);
        let late = WallTime(mark + 1);
        assert_eq!(clock.promise(late), mark, "no further than the mark");
        assert!(Hlc::resume(mark, BOUND).mint(WallTime(0), 0) > mark);
        clock.mark_is_gone();
        assert_eq!(clock.promise(late), 0);
    }

    #[test]
    fn a_clock_that_ended_cleanly_goes_on_where_it_ended_and_soon_leads_again() {
        let wall = WallTime(1_000_000_000);
        let clock = Hlc::resume(0, BOUND);
        clock.high_water_written(clock.high_water_due(wall).unwrap());
        let newest = clock.mint(wall, 0);
        clock.seal();
        let mark = clock.mark_at_end(wall);
        assert_eq!(mark, newest);
        let later = WallTime(wall.0 + 5);
        assert_eq!(
            clock.mark_at_end(later),
            later.0,
            "so far an archive reaches"
        );

        let resumed = Hlc::resume(mark, BOUND);
        assert_eq!(resumed.check(wall), Ok(()), "nothing was only reserved");
        assert!(resumed.mint(WallTime(0), 0) > newest);
        let due = resumed
            .high_water_due(wall)
            .expect("the mark leads no more");
        assert!(due >= wall.0 + micros(HIGH_WATER_LEAD));
    }

    #[test]
    fn stamps_that_order_by_time_wait_for_the_first_mark_and_none_come_after_the_seal() {
        let clock = Hlc::resume(7, BOUND);
        assert_eq!(clock.check_open(), Ok(()));
        assert_eq!(clock.check_marked(), Err(Withheld::NoMark));
        clock.high_water_written(10);
        assert_eq!(clock.check_marked(), Ok(()));
        clock.seal();
        clock.high_water_written(20);
        clock.go_on();
        assert_eq!(clock.check_open(), Err(Withheld::Sealed));
        assert_eq!(clock.check_marked(), Err(Withheld::Sealed));
    }

    #[test]
    #[should_panic(expected = "sealed")]
    fn a_sealed_clock_never_mints() {
        let clock = Hlc::resume(0, BOUND);
        clock.seal();
        clock.mint(WallTime(1), 0);
    }

    #[test]
    fn crashes_that_follow_each_other_do_not_add_up() {
        let (mut wall, mut mark) = (WallTime(1_000_000_000), 0);
        let mut newest = 0;
        for _ in 0..100 {
            let clock = Hlc::resume(mark, BOUND);
            let mut write_mark = || {
                if let Some(due) = clock.high_water_due(wall) {
                    clock.high_water_written(due);
                    mark = due;
                }
            };
            write_mark();
            for _ in 0..1_000 {
                newest = newest.max(clock.mint(wall, 0));
                assert!(clock.last() >= newest, "stamps rise over a crash");
            }
            write_mark();
            assert!(newest <= mark);
            let ahead_max = HIGH_WATER_LEAD + NEWEST_LEAD;
            assert!(clock.ahead(wall) <= ahead_max, "{:?}", clock.ahead(wall));
            wall.0 += 300_000;
        }
    }
}
