//! The purge floor of a range: before which time every deletion is known to every owner, and nothing
//! older can come back. Pure.
//!
//! Three facts make a deletion stamped before the floor safe to forget:
//!
//! 1. One repair of the range *started* after it was stamped, by a margin for writes still in flight,
//!    and was completed with all owners, so each of them holds it.
//! 2. No hint anywhere was created before that repair was over: an older value of the key may wait in it. A member that
//!    does not answer may hold one. A snapshot counts as a hint of its time: restored, it brings old values back.
//! 3. No shard of any member lacks data. One that joins is no owner yet that a repair would ask, and has fetched values
//!    that were deleted since; it compares them with the owners before it is whole, and only learns of deletions
//!    that these still know. It counts as one with a hint of any age.
//!
//! There is no grace time that could be too short.

use std::time::Duration;

use torc_env::mutation;

use crate::hlc::stamp_of_millis;
use crate::merkle::hour_of;

/// Longer than any request lives, and than clocks of healthy nodes are apart: a write stamped so
/// long before a repair has arrived or failed when the repair starts.
pub(crate) const MARGIN: Duration = Duration::from_secs(120);

const MILLIS_PER_HOUR: u64 = 3_600_000;

/// A repair of a range that was completed with all its owners, in milliseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Confirmed {
    pub(crate) started_ms: u64,
    pub(crate) completed_ms: u64,
}

/// What a shard of a member says about its hints, and what counts as such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// Nothing: it does not answer.
    Silent,
    /// When its oldest one was created; `None` = it has none.
    Oldest(Option<u64>),
}

/// Before this time deletions may be purged. A whole hour, because hash sums leave out whole hours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Floor {
    millis: u64,
}

impl Floor {
    /// As the engine compares it.
    pub(crate) fn stamp(self) -> u64 {
        stamp_of_millis(self.millis)
    }

    /// As hash sums count it.
    pub(crate) fn hour(self) -> u32 {
        hour_of(self.millis)
    }
}

/// The floor of a range, or `None` while nothing may be purged.
///
/// `reports` are those of every shard of every member, asked for after `repair` was over by
/// [`MARGIN`].
pub(crate) fn floor(repair: &Confirmed, reports: &[Report]) -> Option<Floor> {
    let margin = u64::try_from(MARGIN.as_millis()).unwrap_or(u64::MAX);
    let over_ms = repair.completed_ms.saturating_add(margin);
    let is_clear = |report: &Report| match report {
        Report::Silent => mutation::on("silent_member_does_not_block"),
        Report::Oldest(None) => true,
        Report::Oldest(Some(created_ms)) => *created_ms > over_ms,
    };
    if !reports.iter().all(is_clear) {
        return None;
    }
    let millis = repair.started_ms.checked_sub(margin)? / MILLIS_PER_HOUR * MILLIS_PER_HOUR;
    (millis > 0).then_some(Floor { millis })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = MILLIS_PER_HOUR;
    const MARGIN_MS: u64 = 120_000;

    fn repair() -> Confirmed {
        Confirmed {
            started_ms: 100 * HOUR + 300_000,
            completed_ms: 101 * HOUR,
        }
    }

    #[test]
    fn without_hints_the_floor_is_the_hour_in_which_the_repair_started() {
        let floor = floor(&repair(), &[Report::Oldest(None); 3]).unwrap();
        assert_eq!(floor.hour(), 100);
        assert_eq!(floor.stamp(), 100 * HOUR * 1000);
    }

    #[test]
    fn writes_in_flight_at_the_start_are_left_out() {
        let early = Confirmed {
            started_ms: 100 * HOUR + MARGIN_MS - 1,
            ..repair()
        };
        assert_eq!(floor(&early, &[]).unwrap().hour(), 99);
    }

    #[test]
    fn a_silent_member_blocks() {
        let reports = [Report::Oldest(None), Report::Silent];
        assert_eq!(floor(&repair(), &reports), None);
    }

    #[test]
    fn a_hint_from_before_the_end_of_the_repair_blocks_and_a_later_one_does_not() {
        let over = repair().completed_ms + MARGIN_MS;
        assert_eq!(floor(&repair(), &[Report::Oldest(Some(over))]), None);
        assert!(floor(&repair(), &[Report::Oldest(Some(over + 1))]).is_some());
        assert_eq!(
            floor(&repair(), &[Report::Oldest(Some(0))]),
            None,
            "hints that were not counted yet may be of any age, and so may what a joining node has"
        );
    }

    #[test]
    fn the_first_hour_of_time_has_no_floor() {
        let first = Confirmed {
            started_ms: 1,
            completed_ms: 2,
        };
        assert_eq!(floor(&first, &[]), None);
    }
}
