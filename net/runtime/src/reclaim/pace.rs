//! How fast the space of removed files is given back: the arithmetic.

use std::time::Duration;

/// Bytes given back at a time: a disk is done with their discard in about a millisecond. Smaller files go whole.
pub(crate) const PIECE_BYTES: u64 = 4 << 20;

/// Bytes a second when little waits.
const RATE_MIN: u64 = 32 << 20;

/// What waits is given back in about so many seconds. So it settles at what is removed in that time, however fast that is.
const DRAIN_SECONDS: u64 = 4;

/// What waits may be this part of the free space; beyond it, it is needed elsewhere.
const SHARE_OF_FREE: u64 = 4;

/// How long to rest after a piece while `pending` bytes wait and the file system has `free` ones.
pub(super) fn rest(pending: u64, free: u64) -> Duration {
    if pending > free / SHARE_OF_FREE {
        return Duration::ZERO;
    }
    let rate = (pending / DRAIN_SECONDS).max(RATE_MIN);
    Duration::from_nanos(PIECE_BYTES * 1_000_000_000 / rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_waits_settles_at_what_is_removed_in_four_seconds() {
        for removed_each_second in [GIB / 32, GIB / 4, GIB, 5 * GIB] {
            let mut pending = 0;
            for _ in 0..60 {
                pending += removed_each_second;
                let mut time = Duration::ZERO;
                while time < Duration::from_secs(1) && pending > 0 {
                    time += rest(pending, u64::MAX);
                    pending -= PIECE_BYTES.min(pending);
                }
            }
            let bound = DRAIN_SECONDS * removed_each_second + PIECE_BYTES;
            assert!(pending <= bound, "{pending} of {removed_each_second}");
        }
    }

    #[test]
    fn the_rest_of_little_does_not_take_for_ever() {
        assert_eq!(rest(PIECE_BYTES, GIB), Duration::from_millis(125));
        assert_eq!(rest(0, GIB), Duration::from_millis(125));
    }

    #[test]
    fn nothing_waits_for_its_turn_when_space_is_short() {
        assert!(rest(GIB, 4 * GIB) > Duration::ZERO);
        assert_eq!(rest(GIB, 4 * GIB - SHARE_OF_FREE), Duration::ZERO);
        assert_eq!(rest(1, 0), Duration::ZERO);
    }
}
