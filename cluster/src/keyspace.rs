//! Keyspaces: what the topology says about a set of keys, and what a consistency level means there.
//!
//! A keyspace is created, altered and dropped by an epoch of the topology. Its id names its tree in
//! every shard's store and is never used again after a drop.

use torc_env::TreeId;

use crate::api::{KEYSPACE_NAME_BYTES_MAX, Level, TTL_SECONDS_MAX};
pub use crate::conflict::Conflict;

/// Most copies that a keyspace can ask for.
pub const REPLICAS_MAX: u8 = 9;

/// The keyspace that exists from the first epoch on.
pub const DEFAULT_NAME: &str = "default";

/// Whether simultaneous writes meet as siblings or are ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Any W replicas take a write; concurrent writes meet later.
    Eventual,
    /// Each key is a register with linearizable reads and writes. Reserved: not served yet.
    Serial,
}

/// A keyspace, as an epoch of the topology defines it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyspace {
    /// Its tree in every store. Never reused.
    pub id: TreeId,
    /// Unique among the keyspaces of an epoch.
    pub name: String,
    /// Copies wanted, 1 to [`REPLICAS_MAX`]. What counts is [`Keyspace::effective_n`].
    pub n: u8,
    /// Eventual or serial.
    pub mode: Mode,
    /// What becomes of concurrent values.
    pub conflict: Conflict,
    /// Time to live of a value written without one, in seconds; 0 = for ever.
    pub ttl_default_seconds: u64,
}

impl Keyspace {
    /// The keyspace `default` of a new cluster.
    pub fn default_keyspace() -> Keyspace {
        Keyspace {
            id: TreeId(1),
            name: DEFAULT_NAME.to_owned(),
            n: 3,
            mode: Mode::Eventual,
            conflict: Conflict::Siblings,
            ttl_default_seconds: 0,
        }
    }

    /// Copies that a key of this keyspace has: N, or the number of ring members when that is lower.
    pub fn effective_n(&self, ring_members: usize) -> u8 {
        u8::try_from(ring_members).map_or(self.n, |members| self.n.min(members))
    }

    /// Checks what a person may have got wrong.
    pub fn validate(&self) -> Result<(), KeyspaceError> {
        validate_name(&self.name)?;
        if self.n == 0 || self.n > REPLICAS_MAX {
            return Err(KeyspaceError::Replicas { n: self.n });
        }
        if self.ttl_default_seconds > TTL_SECONDS_MAX {
            return Err(KeyspaceError::Ttl {
                seconds: self.ttl_default_seconds,
            });
        }
        if self.mode == Mode::Serial {
            return Err(KeyspaceError::SerialNotServed);
        }
        Ok(())
    }
}

fn validate_name(name: &str) -> Result<(), KeyspaceError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > KEYSPACE_NAME_BYTES_MAX || !name.bytes().all(allowed) {
        return Err(KeyspaceError::Name {
            name: name.chars().take(KEYSPACE_NAME_BYTES_MAX).collect(),
        });
    }
    Ok(())
}

/// The number of replicas that must answer under `level` when each key has `n` (effective) copies.
/// Placement is not by datacenter yet, so the datacenter levels count over all replicas.
///
/// A number above `n` is refused, never clipped: a caller that asked for three copies must not
/// believe that two are three.
pub fn replies_needed(level: Level, n: u8) -> Result<u8, LevelError> {
    match level {
        Level::One => Ok(1),
        Level::Quorum | Level::LocalQuorum | Level::EachQuorum => Ok(n / 2 + 1),
        Level::All => Ok(n),
        Level::Count(count) if (1..=n).contains(&count) => Ok(count),
        Level::Count(count) => Err(LevelError { count, n }),
    }
}

/// A level that the keyspace cannot meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{count} replicas were asked for, but a key has {n} (1 to {n} are possible)")]
pub struct LevelError {
    /// What was asked for.
    pub count: u8,
    /// The effective N.
    pub n: u8,
}

/// What is wrong with a keyspace definition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyspaceError {
    /// The name has a character or a length that is not allowed.
    #[error(
        "keyspace name {name:?} is not 1 to {KEYSPACE_NAME_BYTES_MAX} of the characters a-z A-Z 0-9 _ - ."
    )]
    Name {
        /// The name, cut to the longest length.
        name: String,
    },
    /// N is out of range.
    #[error("n = {n} is not in 1 to {REPLICAS_MAX}")]
    Replicas {
        /// What was asked for.
        n: u8,
    },
    /// The default time to live is out of range.
    #[error("a default time to live of {seconds} s is above {TTL_SECONDS_MAX} s")]
    Ttl {
        /// What was asked for.
        seconds: u64,
    },
    /// Serial keyspaces do not exist yet.
    #[error("mode \"serial\" is not served by this version; use \"eventual\"")]
    SerialNotServed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effective_n_is_cut_to_the_members_and_nothing_else() {
        let keyspace = Keyspace::default_keyspace();
        assert_eq!(keyspace.effective_n(1), 1);
        assert_eq!(keyspace.effective_n(2), 2);
        assert_eq!(keyspace.effective_n(3), 3);
        assert_eq!(keyspace.effective_n(1000), 3);
    }

    #[test]
    fn levels_count_over_the_effective_n() {
        for (n, quorum) in [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)] {
            assert_eq!(replies_needed(Level::Quorum, n), Ok(quorum));
            assert_eq!(replies_needed(Level::One, n), Ok(1));
            assert_eq!(replies_needed(Level::All, n), Ok(n));
        }
    }

    #[test]
    fn a_number_outside_one_to_n_is_refused() {
        assert_eq!(replies_needed(Level::Count(3), 3), Ok(3));
        assert_eq!(
            replies_needed(Level::Count(3), 2),
            Err(LevelError { count: 3, n: 2 })
        );
        assert!(replies_needed(Level::Count(0), 3).is_err());
    }

    #[test]
    fn definitions_that_cannot_be_served_are_refused() {
        let good = Keyspace::default_keyspace();
        assert_eq!(good.validate(), Ok(()));
        let bad = |edit: fn(&mut Keyspace)| {
            let mut keyspace = Keyspace::default_keyspace();
            edit(&mut keyspace);
            keyspace.validate()
        };
        assert!(bad(|k| k.n = 0).is_err());
        assert!(bad(|k| k.n = REPLICAS_MAX + 1).is_err());
        assert!(bad(|k| k.ttl_default_seconds = TTL_SECONDS_MAX + 1).is_err());
        assert!(bad(|k| k.name = String::new()).is_err());
        assert!(bad(|k| k.name = "a/b".to_owned()).is_err());
        assert!(bad(|k| k.name = "x".repeat(KEYSPACE_NAME_BYTES_MAX + 1)).is_err());
        assert_eq!(
            bad(|k| k.mode = Mode::Serial),
            Err(KeyspaceError::SerialNotServed)
        );
    }
}
