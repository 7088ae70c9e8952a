//! The name of one write.

use std::cmp::Ordering;
use std::fmt;

use super::Actor;

/// The largest stamp. Stamps are microseconds since 1970 (see [`crate::hlc`]), so this is in the
/// year 2255; up to here every JSON reader holds a stamp exactly.
pub const STAMP_MAX: u64 = (1 << 53) - 1;

/// One write of one key: who minted it, and when by the hybrid clock.
///
/// Ordered by stamp, then by actor. Of two writes of which one has seen the other, the later one
/// has the higher dot; between concurrent writes the order means nothing but is the same
/// everywhere.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dot {
    /// The boot that minted it.
    pub actor: Actor,
    /// Hybrid-clock stamp, 1..=[`STAMP_MAX`], strictly increasing for each (key, actor).
    pub counter: u64,
}

impl Ord for Dot {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.counter, self.actor).cmp(&(other.counter, other.actor))
    }
}

impl PartialOrd for Dot {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Dot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.counter, self.actor)
    }
}

impl fmt::Debug for Dot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dot({self})")
    }
}
