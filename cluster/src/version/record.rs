//! A state as the engine stores it, and the step that every replica takes with a state that it is
//! sent.
//!
//! The engine knows nothing of versions: it compares the stamp with purge floors, and may drop a
//! tombstone or an expired record once repair has confirmed it. What this file puts into those
//! fields decides how long a state lives.

use bytes::Bytes;
use torc_engine::record::{Kind, Record};
use torc_env::mutation;

use super::{DotClash, State, StateError, StateRef};
use crate::conflict::Conflict;
use crate::hlc::stamp_of_millis;

/// What became of a state that a replica was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// The replica had all of it.
    Unchanged,
    /// This is to be written.
    Write(Record),
}

/// Why a state cannot be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// What is stored cannot be read: unknown, not absent.
    #[error("the stored state: {0}")]
    Stored(#[source] StateError),
    /// What was sent cannot be read.
    #[error("the incoming state: {0}")]
    Incoming(#[source] StateError),
    /// See [`DotClash`].
    #[error(transparent)]
    Clash(#[from] DotClash),
}

impl State {
    /// The record that holds this state.
    ///
    /// It is a tombstone when no sibling has a value, and expires with the last of its values if
    /// all of them do. The stamp is the newest one in the state; a dead record that still remembers
    /// answers is stamped, or expires, when the last of them is due, so that it is not purged under
    /// a retry.
    pub fn to_record(&self) -> Record {
        self.record_of(self.encode())
    }

    /// The state in a record, to be changed and written again. Values share its buffer; they are not
    /// checked here but by whoever shows them, since they keep their checks.
    ///
    /// # Errors
    /// See [`StateRef::parse_head`].
    pub fn from_record(record: &Record) -> Result<State, StateError> {
        StateRef::parse_head(&record.value)?.to_state(&record.value)
    }

    fn record_of(&self, encoded: Bytes) -> Record {
        let mut values = self
            .siblings
            .iter()
            .filter(|s| s.value.is_some())
            .peekable();
        let kind = if values.peek().is_some() {
            Kind::Value
        } else {
            Kind::Tombstone
        };
        let expires_at_ms = values.try_fold(0, |last, sibling| match sibling.expires_at_ms {
            0 => None,
            expiry => Some(expiry.max(last)),
        });
        let remembered_until_ms = self.window.last_until_ms();
        let newest = self.newest_stamp();
        let (stamp, expires_at_ms) = match kind {
            Kind::Tombstone => (newest.max(stamp_of_millis(remembered_until_ms)), 0),
            Kind::Value => (
                newest,
                expires_at_ms.map_or(0, |last| last.max(remembered_until_ms)),
            ),
        };
        Record {
            kind,
            stamp,
            expires_at_ms,
            value: encoded,
        }
    }
}

/// Merges a state that was sent into what is stored. When the stored state adds nothing to it, the
/// incoming bytes are taken as they are.
///
/// # Errors
/// See [`ApplyError`]. Nothing may then be written.
pub fn apply(
    stored: Option<&Record>,
    incoming: &Bytes,
    conflict: Conflict,
) -> Result<Applied, ApplyError> {
    let theirs = State::decode(incoming).map_err(ApplyError::Incoming)?;
    let Some(record) = stored else {
        return Ok(Applied::Write(theirs.record_of(incoming.clone())));
    };
    if mutation::on("read_repair_overwrites") {
        return Ok(Applied::Write(theirs.record_of(incoming.clone())));
    }
    if record.value == *incoming {
        return Ok(Applied::Unchanged);
    }
    let ours = State::from_record(record).map_err(ApplyError::Stored)?;
    let merged = ours.merge(&theirs, conflict)?;
    if merged == ours {
        return Ok(Applied::Unchanged);
    }
    let record = if merged == theirs {
        theirs.record_of(incoming.clone())
    } else {
        merged.to_record()
    };
    Ok(Applied::Write(record))
}

/// The planted bug `expiry_counted_from_arrival`: what is new here of a state that was sent lives as long as its
/// writer asked for, but from `now_ms` on.
pub(crate) fn counted_from_arrival(
    stored: Option<&Record>,
    incoming: &Bytes,
    now_ms: u64,
) -> Bytes {
    let ours = stored.and_then(|record| State::from_record(record).ok());
    let Ok(mut theirs) = State::decode(incoming) else {
        return incoming.clone();
    };
    for sibling in theirs.siblings.iter_mut().filter(|s| s.expires_at_ms != 0) {
        let ours = ours.iter().flat_map(|state| &state.siblings);
        let known = ours.into_iter().find(|known| known.dot == sibling.dot);
        let minted_ms = sibling.dot.counter / 1_000;
        sibling.expires_at_ms = match known {
            Some(known) => known.expires_at_ms,
            None => now_ms + sibling.expires_at_ms.saturating_sub(minted_ms),
        };
    }
    theirs.encode()
}
