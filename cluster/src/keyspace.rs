//! Keyspaces: what the topology says about a set of keys, and what a consistency level means there.
//!
//! A keyspace is created, altered and dropped by an epoch of the topology. Its id names its tree in
//! every shard's store and is never used again after a drop.

use torc_engine::compaction::Strategy;
use torc_env::TreeId;

use crate::api::{KEYSPACE_NAME_BYTES_MAX, Level, TTL_SECONDS_MAX};
pub use crate::conflict::Conflict;
use crate::hlc::stamp_of_millis;

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

/// How the tables of a keyspace are kept in shape, on every node; see [`Strategy`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compaction {
    /// Lazy leveling: the default, right for most.
    #[default]
    Hybrid,
    /// For many reads and few writes.
    Leveled,
    /// For many writes and few reads.
    SizeTiered,
    /// For records that all expire after the same time. Needs a default time to live.
    Fifo,
    /// For records that are written once and expire, by the time of their writing.
    TimeWindow {
        /// Width of a window: 60 to [`WINDOW_SECONDS_MAX`].
        seconds: u32,
    },
}

/// Narrowest time window, in seconds.
pub const WINDOW_SECONDS_MIN: u32 = 60;
/// Widest time window, in seconds: a leap year.
pub const WINDOW_SECONDS_MAX: u32 = 366 * 86_400;
/// The time window of a keyspace that names none, in seconds: a day.
pub const WINDOW_SECONDS_DEFAULT: u32 = 86_400;

impl Compaction {
    /// The strategies' names in keyspace definitions, by code.
    pub const NAMES: [&str; 5] = ["hybrid", "leveled", "size_tiered", "fifo", "time_window"];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES[usize::from(self.code())]
    }

    /// The one of that name, with [`WINDOW_SECONDS_DEFAULT`] if it has windows.
    pub fn from_name(name: &str) -> Option<Compaction> {
        Some(match name {
            "hybrid" => Compaction::Hybrid,
            "leveled" => Compaction::Leveled,
            "size_tiered" => Compaction::SizeTiered,
            "fifo" => Compaction::Fifo,
            "time_window" => Compaction::TimeWindow {
                seconds: WINDOW_SECONDS_DEFAULT,
            },
            _ => return None,
        })
    }

    /// Its number in stored topologies.
    pub fn code(self) -> u8 {
        match self {
            Compaction::Hybrid => 0,
            Compaction::Leveled => 1,
            Compaction::SizeTiered => 2,
            Compaction::Fifo => 3,
            Compaction::TimeWindow { .. } => 4,
        }
    }

    /// The width of its time windows; 0 when it has none.
    pub fn window_seconds(self) -> u32 {
        match self {
            Compaction::TimeWindow { seconds } => seconds,
            _ => 0,
        }
    }

    /// The one with this code and window width.
    pub fn from_code(code: u8, window_seconds: u32) -> Option<Compaction> {
        Some(match (code, window_seconds) {
            (0, 0) => Compaction::Hybrid,
            (1, 0) => Compaction::Leveled,
            (2, 0) => Compaction::SizeTiered,
            (3, 0) => Compaction::Fifo,
            (4, seconds) => Compaction::TimeWindow { seconds },
            _ => return None,
        })
    }

    /// As the engine does it.
    pub fn strategy(self) -> Strategy {
        match self {
            Compaction::Hybrid => Strategy::Hybrid,
            Compaction::Leveled => Strategy::Leveled,
            Compaction::SizeTiered => Strategy::SizeTiered,
            Compaction::Fifo => Strategy::Fifo,
            Compaction::TimeWindow { seconds } => Strategy::TimeWindow {
                stamps: stamp_of_millis(u64::from(seconds) * 1000),
            },
        }
    }
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
    /// How its tables are kept in shape.
    pub compaction: Compaction,
    /// Deletions are kept at least this long, in seconds, even when every owner is known to hold
    /// them. 0 = no longer than that takes.
    pub tombstone_grace_seconds: u64,
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
            compaction: Compaction::default(),
            tombstone_grace_seconds: 0,
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
        if self.tombstone_grace_seconds > TTL_SECONDS_MAX {
            return Err(KeyspaceError::Grace {
                seconds: self.tombstone_grace_seconds,
            });
        }
        match self.compaction {
            Compaction::Fifo if self.ttl_default_seconds == 0 => {
                return Err(KeyspaceError::FifoWithoutTtl);
            }
            Compaction::TimeWindow { seconds }
                if !(WINDOW_SECONDS_MIN..=WINDOW_SECONDS_MAX).contains(&seconds) =>
            {
                return Err(KeyspaceError::Window { seconds });
            }
            _ => {}
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
    /// The tombstone grace is out of range.
    #[error("a tombstone grace of {seconds} s is above {TTL_SECONDS_MAX} s")]
    Grace {
        /// What was asked for.
        seconds: u64,
    },
    /// FIFO only forgets what has expired.
    #[error("compaction \"fifo\" needs a ttl_default_seconds: it drops only what has expired")]
    FifoWithoutTtl,
    /// The time window is out of range.
    #[error(
        "a compaction window of {seconds} s is not in {WINDOW_SECONDS_MIN} to {WINDOW_SECONDS_MAX}"
    )]
    Window {
        /// What was asked for.
        seconds: u32,
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
        assert!(bad(|k| k.tombstone_grace_seconds = TTL_SECONDS_MAX + 1).is_err());
        assert_eq!(
            bad(|k| k.compaction = Compaction::Fifo),
            Err(KeyspaceError::FifoWithoutTtl)
        );
        for seconds in [0, WINDOW_SECONDS_MIN - 1, WINDOW_SECONDS_MAX + 1] {
            let mut keyspace = Keyspace::default_keyspace();
            keyspace.compaction = Compaction::TimeWindow { seconds };
            assert_eq!(keyspace.validate(), Err(KeyspaceError::Window { seconds }));
        }
        assert!(bad(|k| k.name = String::new()).is_err());
        assert!(bad(|k| k.name = "a/b".to_owned()).is_err());
        assert!(bad(|k| k.name = "x".repeat(KEYSPACE_NAME_BYTES_MAX + 1)).is_err());
        assert_eq!(
            bad(|k| k.mode = Mode::Serial),
            Err(KeyspaceError::SerialNotServed)
        );
    }

    #[test]
    fn a_strategy_comes_back_from_its_code() {
        for code in 0..=255 {
            for window_seconds in [0, 60] {
                if let Some(compaction) = Compaction::from_code(code, window_seconds) {
                    assert_eq!(compaction.code(), code);
                    assert_eq!(compaction.window_seconds(), window_seconds);
                    let named = Compaction::from_name(Compaction::NAMES[usize::from(code)]);
                    assert_eq!(named.map(Compaction::code), Some(code));
                }
            }
        }
        let hour = Compaction::TimeWindow { seconds: 3600 };
        let stamps = 3_600_000_000;
        assert_eq!(hour.strategy(), Strategy::TimeWindow { stamps });
    }
}
