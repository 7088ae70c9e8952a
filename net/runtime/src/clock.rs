//! The two clocks of the host.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use torc_env::{Instant, WallTime};

/// All shards measure from here, so that an [`Instant`] means the same on each of them.
static START: OnceLock<std::time::Instant> = OnceLock::new();

/// Monotonic time since the first call in this process, plus one second, so that "a moment before
/// now" never saturates at zero.
pub(crate) fn now() -> Instant {
    let start = START.get_or_init(std::time::Instant::now);
    Instant(nanos(start.elapsed()).saturating_add(1_000_000_000))
}

/// Civil time; 1970 when the host's clock stands before that.
pub(crate) fn wall() -> WallTime {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    WallTime(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// A duration in nanoseconds; saturates after 584 years.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
