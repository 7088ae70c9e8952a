//! The two clocks of the host.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use torc_env::{Instant, WallTime};

use crate::sys;

/// The host's monotonic time, the same for all shards. Read several times a request, so it is the
/// kernel's number as it is.
pub(crate) fn now() -> Instant {
    Instant(sys::monotonic_nanos())
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
