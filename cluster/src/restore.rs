//! When what a record holds was decided: which records of an archived log belong to a moment.
//!
//! Used by `torc restore`, never by a node. A record holds a key's whole state, so it belongs to every moment from its newest write
//! on. A write that came late, after a newer one of its key, comes with that newer one.

use torc_engine::{EntryRef, Kind};
use torc_env::{Token, TreeId};

use crate::core::tree;
use crate::hint;
use crate::topology::Topology;
use crate::version::{StateError, StateRef};

/// What to do with a record of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It was decided at this stamp, in microseconds since 1970.
    At(u64),
    /// It belongs to whatever was done before it: a hint that was handed over.
    Always,
    /// It says something of the node that kept it, which a restored one must not believe, or belongs to a keyspace
    /// that there is not.
    Never,
}

/// When the record of `tree` was decided, for a restore to `topology`.
///
/// # Errors
/// When it holds no state.
pub fn moment(
    topology: Option<&Topology>,
    tree: TreeId,
    entry: &EntryRef<'_>,
) -> Result<Moment, StateError> {
    let state = match tree {
        // Marks of the clock and of what is missing: the backup has them as they were at its cut.
        tree::SYSTEM => return Ok(Moment::Never),
        tree::HINTS if entry.kind == Kind::Tombstone => return Ok(Moment::Always),
        tree::HINTS => match hint::state_of(entry.key, entry.value) {
            Some(state) => state,
            None => return Ok(Moment::Never),
        },
        _ => {
            let keyspaces = topology.iter().flat_map(|topology| &topology.keyspaces);
            if !keyspaces.into_iter().any(|keyspace| keyspace.id == tree) {
                return Ok(Moment::Never);
            }
            entry.value
        }
    };
    Ok(Moment::At(StateRef::parse_head(state)?.newest_stamp()))
}

/// The token that says which shard keeps a record.
pub fn owner(tree: TreeId, entry: &EntryRef<'_>) -> Token {
    if tree == tree::HINTS {
        hint::token_of_key(entry.key).unwrap_or(entry.token)
    } else {
        entry.token
    }
}
