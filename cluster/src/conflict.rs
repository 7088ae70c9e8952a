//! What a keyspace does with concurrent writes.
//!
//! On the path of every mint and every merge: [`crate::version::State`] asks here which of the
//! uncovered writes stay. The answer depends on nothing but the dots, so every replica that holds
//! the same writes keeps the same ones, in whatever order they arrived.
//!
//! Deliberately absent: merge types (counter, set, register map). They need a value format of
//! their own and get a variant when they have one.

/// The conflict policy of a keyspace; the same on every replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Conflict {
    /// Concurrent writes are all kept, until a write covers them.
    #[default]
    Siblings,
    /// Only the write with the highest dot is kept: highest stamp, then actor. A write that is
    /// acknowledged may be lost to a concurrent one whose node's clock is ahead, within the skew
    /// bound.
    Lww,
}

impl Conflict {
    /// The policy's name in keyspace definitions.
    pub fn name(self) -> &'static str {
        match self {
            Conflict::Siblings => "siblings",
            Conflict::Lww => "lww",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Conflict> {
        match name {
            "siblings" => Some(Conflict::Siblings),
            "lww" => Some(Conflict::Lww),
            _ => None,
        }
    }

    /// Of uncovered writes in ascending order of dots: the first one that stays.
    pub(crate) fn first_kept(self, dots: usize) -> usize {
        match self {
            Conflict::Siblings => 0,
            Conflict::Lww => dots.saturating_sub(1),
        }
    }

    /// Whether two dots of one request count as one write, of which the lower one stays.
    ///
    /// Not under last-write: there the highest dot must win always, or replicas that dropped a
    /// value in between would disagree with those that did not. The answer of a replay is the lower
    /// dot's all the same.
    pub(crate) fn joins_retries(self) -> bool {
        match self {
            Conflict::Siblings => true,
            Conflict::Lww => false,
        }
    }

    /// Whether a stamp that runs ahead of this node's clock beyond the skew bound must be refused
    /// before it is minted. Siblings never lose a write to a clock, so they are minted all the
    /// same.
    pub fn orders_by_time(self) -> bool {
        match self {
            Conflict::Siblings => false,
            Conflict::Lww => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_policies_belong_together() {
        for conflict in [Conflict::Siblings, Conflict::Lww] {
            assert_eq!(Conflict::from_name(conflict.name()), Some(conflict));
        }
        assert_eq!(Conflict::from_name("counter"), None);
    }
}
