//! A shard's role as a replica: read and merge whole states in its own store.
//!
//! On the path: coordinators call it directly on their own shard, and through [`Node::serve`] on
//! others; below it is the engine's store. Every change of a keyspace's tree goes through
//! [`update`], which keeps the hash sums of anti-entropy in step.
//!
//! Invariants: what is acknowledged is durable by the fsync policy (also when nothing was written,
//! because the base of that decision may itself still be in flight); what cannot be read is a
//! failure, never an absent key; a merge never loses a write.
//!
//! It counts no quorums and mints no dots.
//!
//! [`Node::serve`]: crate::node::Node::serve

use bytes::Bytes;
use torc_engine::{Decision, ReadError, Record, Ticket, WriteError};
use torc_env::{Env, Token, TreeId, mutation};

use crate::api::{Failure, FailureCode};
use crate::conflict::Conflict;
use crate::core::Core;
use crate::metrics::Counter;
use crate::version::{Applied, ApplyError, StateRef, apply, counted_from_arrival};

/// The encoded state that this shard holds durably; empty when the key was never written.
pub(crate) async fn read<E: Env>(
    core: &Core<E>,
    tree: TreeId,
    token: Token,
    key: &[u8],
) -> Result<Bytes, Failure> {
    match core.store.get(tree, token, key).await {
        Ok(Some(record)) => match StateRef::parse_head(&record.value) {
            Ok(_) => Ok(record.value),
            // Said here, it is one replica's silence; passed on, it would spoil what the others say.
            Err(error) => {
                core.count(Counter::UnreadableRecords);
                Err(Failure::refused(FailureCode::Unreadable, error))
            }
        },
        Ok(None) => Ok(Bytes::new()),
        Err(_) if mutation::on("unreadable_is_absent") => Ok(Bytes::new()),
        Err(error) => {
            core.count(Counter::UnreadableRecords);
            Err(read_failure(&error))
        }
    }
}

/// An atomic read-modify-write of one key that keeps the hash sums in step.
pub(crate) async fn update<E: Env, R>(
    core: &Core<E>,
    tree: TreeId,
    token: Token,
    key: &[u8],
    decide: impl FnOnce(Option<&Record>) -> Decision<R>,
) -> Result<(R, Ticket<E>), WriteError> {
    let mut change = None;
    let updated = core
        .store
        .update(tree, token, key, |stored| {
            let decision = decide(stored);
            if let Decision::Write(record, _) = &decision {
                change = Some((stored.cloned(), record.clone()));
            }
            decision
        })
        .await?;
    // Only now: the store may refuse what was decided, and sums that count a record which is not
    // there hide for ever that it is missing. Nothing waits between the decision and this line, so
    // changes are counted in their order.
    if let Some((stored, record)) = change {
        core.sums
            .borrow_mut()
            .changed(tree, token, key, stored.as_ref(), &record);
    }
    Ok(updated)
}

/// Merges an encoded state into this shard's. On return it is written; the ticket says when it is
/// durable.
pub(crate) async fn merge<E: Env>(
    core: &Core<E>,
    tree: TreeId,
    token: Token,
    key: &[u8],
    incoming: &Bytes,
    conflict: Conflict,
) -> Result<Ticket<E>, Failure> {
    if let Ok(state) = StateRef::parse_head(incoming) {
        // A stamp beyond the bound does not move the clock; the state is merged all the same,
        // because it exists already.
        let observed = core.clock.observe(core.env.wall(), state.newest_stamp());
        if observed.is_err() {
            core.count(Counter::SkewedStamps);
        }
    }
    let (result, ticket) = update(core, tree, token, key, |stored| {
        let applied = if mutation::on("expiry_counted_from_arrival") {
            let counted = counted_from_arrival(stored, incoming, core.env.wall().millis());
            apply(stored, &counted, conflict)
        } else {
            apply(stored, incoming, conflict)
        };
        match applied {
            Ok(Applied::Unchanged) => Decision::Keep(Ok(())),
            Ok(Applied::Write(record)) => Decision::Write(record, Ok(())),
            Err(error) => Decision::Keep(Err(error)),
        }
    })
    .await
    .map_err(|error| write_failure(&error))?;
    result.map_err(|error| apply_failure(core, &error))?;
    Ok(ticket)
}

/// Merges, and waits until it is durable.
pub(crate) async fn merge_durably<E: Env>(
    core: &Core<E>,
    tree: TreeId,
    token: Token,
    key: &[u8],
    incoming: &Bytes,
    conflict: Conflict,
) -> Result<(), Failure> {
    let ticket = merge(core, tree, token, key, incoming, conflict).await?;
    if mutation::on("ack_before_sync") {
        return Ok(());
    }
    ticket.wait().await.map_err(|error| write_failure(&error))
}

fn apply_failure<E: Env>(core: &Core<E>, error: &ApplyError) -> Failure {
    core.count(Counter::UnreadableRecords);
    tracing::error!(%error, "a state cannot be merged");
    let code = match error {
        ApplyError::Stored(_) => FailureCode::Unreadable,
        ApplyError::Incoming(_) => FailureCode::InvalidRequest,
        ApplyError::Clash(_) => FailureCode::DotClash,
    };
    Failure::refused(code, error)
}

/// What a failed read of the store means for a request.
pub(crate) fn read_failure(error: &ReadError) -> Failure {
    let code = match error {
        ReadError::Corrupt { .. }
        | ReadError::CorruptValue { .. }
        | ReadError::Io { .. }
        | ReadError::Key { .. }
        | ReadError::Newer { .. } => FailureCode::Unreadable,
        ReadError::Closed => FailureCode::NotReady,
    };
    Failure::refused(code, error)
}

/// What a failed update of the store means for a request.
pub(crate) fn write_failure(error: &WriteError) -> Failure {
    let code = match error {
        WriteError::DiskFull => FailureCode::DiskFull,
        WriteError::Overloaded { .. } => FailureCode::Overloaded,
        WriteError::Poisoned { .. } | WriteError::Job(_) => FailureCode::Internal,
        WriteError::TooLarge { .. } => FailureCode::TooLarge,
        WriteError::Read(_) => FailureCode::Unreadable,
        WriteError::Closed => FailureCode::NotReady,
    };
    let failure = Failure::refused(code, error);
    if error.in_doubt() {
        failure.in_doubt()
    } else {
        failure
    }
}
