//! The purge floor of a range: the stamp below which every deletion is known to every owner, and nothing
//! older can come back. Pure.
//!
//! Three facts make a deletion stamped below the floor safe to forget:
//!
//! 1. Every shard of every member had promised to mint no stamp below the floor any more, before one repair of the range
//!    began that was completed with all owners. So the owner that minted the deletion had it when the repair began, and
//!    each of them holds it since.
//! 2. No hint waits any more that waited when that repair was over, by as long as requests live: an older value of the
//!    key may be in it. A member that does not answer may hold one. A snapshot counts as a hint of its time:
//!    restored, it brings old values back.
//! 3. No shard of any member lacks data. One that joins is no owner yet that a repair would ask, and has fetched values
//!    that were deleted since; it compares them with the owners before it is whole, and only learns of deletions
//!    that these still know. It counts as one with a hint of any age.
//!
//! None of them rests on clocks that agree, or that never jump: all is order on one shard's own clock. A promise is the
//! hybrid clock's, as far as it is durably marked ([`Hlc::promise`]). Whoever joins compares its clock with the floors
//! of the others before it mints. And every member is asked twice, after the repair: the first time it says how far its clock
//! of hints has come, which never goes back; the oldest hint of the second time must be later. A node whose clock is slow
//! keeps all floors low, and never brings anything back.
//!
//! There is no grace time that could be too short.
//!
//! [`Hlc::promise`]: crate::hlc::Hlc::promise

use std::collections::BTreeMap;

use torc_env::{Address, Instant, mutation};

use crate::hlc::{stamp_millis, stamp_of_millis};
use crate::merkle::hour_of;
use crate::topology::Epoch;

const MILLIS_PER_HOUR: u64 = 3_600_000;

/// A repair of a range that was completed with all its owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Confirmed {
    /// In milliseconds since 1970.
    pub(crate) started_ms: u64,
    pub(crate) completed: Instant,
    /// What all had promised before it began; `None` when somebody was silent.
    pub(crate) promised: Option<u64>,
}

/// What a shard says to those who forget deletions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    /// When the oldest hint was created, by the shard's clock of hints; `None` = it has none.
    pub(crate) oldest_ms: Option<u64>,
    /// How far that clock has come. Nothing that waits is later.
    pub(crate) now_ms: u64,
    /// A stamp below which it mints none any more.
    pub(crate) promised: u64,
}

/// What all shards of all members have said.
#[derive(Clone, Debug)]
pub(crate) struct Reports {
    /// Whose members were asked.
    pub(crate) epoch: Epoch,
    /// Before the first of them was.
    pub(crate) asked: Instant,
    /// `None`: it does not answer.
    pub(crate) told: BTreeMap<Address, Option<Told>>,
}

impl Reports {
    /// A stamp below which nobody mints any more; `None` where somebody was silent.
    pub(crate) fn promised(&self) -> Option<u64> {
        let is_counted =
            |told: &&Option<Told>| told.is_some() || !mutation::on("silent_member_does_not_block");
        let told = self.told.values().filter(is_counted);
        let promised: Option<Vec<u64>> = told.map(|told| Some(told.as_ref()?.promised)).collect();
        promised?.into_iter().min()
    }

    /// Whether nothing of what waited at the time of the reports `before` waits any more.
    pub(crate) fn are_clear_since(&self, before: &Reports) -> bool {
        self.told
            .iter()
            .all(|(shard, told)| match (told, before.told.get(shard)) {
                (Some(told), Some(Some(before))) => told
                    .oldest_ms
                    .is_none_or(|oldest_ms| oldest_ms > before.now_ms),
                // Who was silent then may only now send what it was about to.
                _ => mutation::on("silent_member_does_not_block"),
            })
    }
}

/// Before this time deletions may be purged. A whole hour, because hash sums leave out whole hours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Floor {
    millis: u64,
}

impl Floor {
    /// The floor at or below a stamp; `None` in the first hour of time.
    pub(crate) fn below(stamp: u64) -> Option<Floor> {
        let millis = stamp_millis(stamp) / MILLIS_PER_HOUR * MILLIS_PER_HOUR;
        (millis > 0).then_some(Floor { millis })
    }

    /// As the engine compares it.
    pub(crate) fn stamp(self) -> u64 {
        stamp_of_millis(self.millis)
    }

    /// As hash sums count it.
    pub(crate) fn hour(self) -> u32 {
        hour_of(self.millis)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use torc_env::{NodeId, ShardId};

    use super::*;

    fn reports(told: &[Option<Told>]) -> Reports {
        let shards = (0..).map(|shard| Address {
            node: NodeId(1),
            host: SocketAddr::from(([0, 0, 0, 0], 0)),
            shard: ShardId(shard),
        });
        Reports {
            epoch: Epoch(1),
            asked: Instant(0),
            told: shards.zip(told.iter().copied()).collect(),
        }
    }

    fn told(oldest_ms: Option<u64>, now_ms: u64) -> Option<Told> {
        Some(Told {
            oldest_ms,
            now_ms,
            promised: now_ms * 1000,
        })
    }

    #[test]
    fn a_floor_is_a_whole_hour_and_none_in_the_first() {
        let hour = MILLIS_PER_HOUR * 1000;
        let floor = Floor::below(101 * hour - 1).unwrap();
        assert_eq!((floor.hour(), floor.stamp()), (100, 100 * hour));
        assert_eq!(Floor::below(100 * hour), Some(floor));
        assert_eq!(Floor::below(hour - 1), None);
    }

    #[test]
    fn the_lowest_promise_counts_and_silence_is_none() {
        let given = [told(None, 30), told(Some(1), 20), told(None, 25)];
        assert_eq!(reports(&given).promised(), Some(20_000));
        assert_eq!(reports(&[given[0], None]).promised(), None);
    }

    #[test]
    fn a_member_that_was_silent_once_or_is_new_blocks() {
        let (then, now) = (told(None, 10), told(None, 20));
        let before = reports(&[then, then]);
        assert!(reports(&[now, now]).are_clear_since(&before));
        assert!(!reports(&[now, None]).are_clear_since(&before));
        assert!(!reports(&[now, now]).are_clear_since(&reports(&[then, None])));
        assert!(!reports(&[now, now]).are_clear_since(&reports(&[then])));
    }

    #[test]
    fn what_waited_then_blocks_and_what_came_since_does_not() {
        let before = reports(&[told(Some(5), 10)]);
        for (oldest_ms, is_clear) in [(5, false), (10, false), (11, true)] {
            let now = reports(&[told(Some(oldest_ms), 20)]);
            assert_eq!(now.are_clear_since(&before), is_clear, "{oldest_ms}");
        }
        let unknown = reports(&[told(Some(0), 20)]);
        assert!(
            !unknown.are_clear_since(&before),
            "hints that were not counted yet may be of any age, and so may what a joining node has"
        );
    }
}
