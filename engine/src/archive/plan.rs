//! Decides which archived segments bring a store from one point of its log to a moment.
//!
//! Pure. Segments of a store are taken in the order of their numbers, each when it continues the one before: what does
//! not is what a log that ended in the middle of a write had left, and was continued elsewhere. When nothing continues
//! before the moment is reached, the log has a gap or an end there, and the plan says which.

use super::trailer::Trailer;
use crate::frame::Mark;

/// What is to be replayed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Indices of the segments, in this order.
    pub segments: Vec<usize>,
    /// Everything that the store decided up to here is in them, in microseconds since 1970; 0 when there is none.
    pub reach_us: u64,
    /// The last frame.
    pub last: Mark,
    /// Why it goes no further than that.
    pub end: End,
}

/// How far a plan comes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum End {
    /// To the moment that was asked for.
    Reached,
    /// The archive ends before it.
    #[default]
    Archive,
    /// Frames are missing before it.
    Gap {
        /// The first missing frame.
        from: u64,
        /// The last missing one, as far as is known.
        to: u64,
        /// Index of the segment behind the gap.
        behind: usize,
    },
}

/// Plans a replay behind `mark` up to `until_us`, in microseconds since 1970, or as far as it goes. `segments` are all of one
/// store, in order.
pub fn plan(segments: &[Trailer], mark: Mark, until_us: u64) -> Plan {
    let mut plan = Plan {
        last: mark,
        ..Plan::default()
    };
    let mut passed = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        if segment.last <= mark.sequence {
            // In the backup already; but nothing came behind it before it was full.
            let ends_there = segment.last == mark.sequence && segment.last_hash == mark.hash;
            if ends_there && plan.segments.is_empty() {
                plan.reach_us = segment.reach_us;
            }
            if ends_there && segment.reach_us >= until_us {
                plan.end = End::Reached;
                return plan;
            }
            continue;
        }
        if !continues(segment, plan.last, mark) {
            passed.push(index);
            continue;
        }
        passed.clear();
        plan.segments.push(index);
        plan.last = Mark {
            sequence: segment.last,
            hash: segment.last_hash,
        };
        plan.reach_us = plan.reach_us.max(segment.reach_us);
        if segment.reach_us >= until_us {
            plan.end = End::Reached;
            return plan;
        }
    }
    // The first one that leaves frames out.
    let from = plan.last.sequence + 1;
    let behind = passed
        .into_iter()
        .find(|index| segments[*index].first > from);
    if let Some(behind) = behind {
        plan.end = End::Gap {
            from,
            to: segments[behind].first - 1,
            behind,
        };
    }
    plan
}

/// Whether a segment goes on behind `last`. The first one may begin before the mark: that its frames lead to it is seen when they
/// are read.
fn continues(segment: &Trailer, last: Mark, mark: Mark) -> bool {
    if last == mark && segment.first <= mark.sequence {
        return true;
    }
    segment.first == last.sequence + 1 && segment.previous == last.hash
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::SegmentId;
    use crate::archive::trailer::Origin;

    fn segment(first: u64, last: u64, reach_us: u64) -> Trailer {
        Trailer {
            origin: Origin::default(),
            segment: SegmentId(first),
            body_bytes: 4096,
            key: None,
            first,
            previous: (first - 1) * 10,
            last,
            last_hash: last * 10,
            reach_us,
            body_xxh3: 0,
        }
    }

    fn mark(sequence: u64) -> Mark {
        Mark {
            sequence,
            hash: sequence * 10,
        }
    }

    #[test]
    fn a_plan_begins_behind_the_backup_and_ends_with_the_segment_that_reaches_the_moment() {
        let segments = [
            segment(1, 4, 100),
            segment(5, 9, 200),
            segment(10, 12, 300),
            segment(13, 20, 400),
        ];
        let found = plan(&segments, mark(6), 250);
        assert_eq!((found.segments, found.end), (vec![1, 2], End::Reached));
        assert_eq!((found.reach_us, found.last), (300, mark(12)));
        let whole = plan(&segments, mark(4), u64::MAX);
        assert_eq!((whole.segments, whole.end), (vec![1, 2, 3], End::Archive));
        assert_eq!(whole.reach_us, 400);
        let none = plan(&segments[..1], mark(4), 50);
        assert_eq!((none.segments, none.end), (vec![], End::Reached));
        let short = plan(&segments[..1], mark(4), 150);
        assert_eq!((short.reach_us, short.end), (100, End::Archive));
    }

    #[test]
    fn a_missing_segment_is_named_wherever_it_is() {
        let segments = [
            segment(1, 4, 100),
            segment(10, 12, 300),
            segment(13, 20, 400),
        ];
        let gap = End::Gap {
            from: 5,
            to: 9,
            behind: 1,
        };
        assert_eq!(plan(&segments, mark(2), 250).end, gap);
        assert_eq!(plan(&segments, mark(4), 250).end, gap);
        assert_eq!(plan(&segments, mark(2), 90).end, End::Reached);
        let behind_the_gap = plan(&segments, mark(9), 250);
        assert_eq!(behind_the_gap.segments, [1]);
    }

    #[test]
    fn what_a_crash_left_beside_the_log_is_passed_over() {
        // Frame 5 was lost, frame 6 behind it was on disk: the next start went on with another frame 5.
        let stray = Trailer {
            previous: 77,
            last_hash: 78,
            ..segment(6, 6, 150)
        };
        let segments = [segment(1, 4, 0), stray, segment(5, 7, 200)];
        let found = plan(&segments, mark(0), 180);
        assert_eq!((found.segments, found.end), (vec![0, 2], End::Reached));
        assert_eq!(found.last, mark(7));
        let without = plan(&segments[..2], mark(0), 180);
        assert!(matches!(without.end, End::Gap { from: 5, to: 5, .. }));
    }

    #[test]
    fn a_reach_that_is_not_known_is_none() {
        let segments = [segment(1, 4, 0), segment(5, 6, 300)];
        let found = plan(&segments, mark(0), 1);
        assert_eq!((found.segments, found.end), (vec![0, 1], End::Reached));
    }
}
