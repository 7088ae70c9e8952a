//! The durable high-water mark of a shard's hybrid clock.
//!
//! Not on the path: written every few seconds in the background, read once at start, so that stamps
//! go on rising over a restart even when civil time was set back meanwhile. Dots do not depend on it
//! (every boot has its own actor); last-write-wins keyspaces do.
//!
//! It leads, so a start after a crash begins in the future and waits there. A clean stop leaves a
//! mark without a lead: [`leave`]. No stamp follows that one in its life, and none that orders by time is given
//! out in the next before a mark leads again.
//!
//! Kept in the store's tree of its own things, as 8 bytes little-endian.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use torc_engine::{Decision, Kind, ReadError, Record, ScanFrom, ScanLimits, Store, WriteError};
use torc_env::{Env, ShardId, Token};

use crate::core::{Core, tree};

/// One mark a shard, so that a redistribution over other shards keeps them apart.
const KEY_PREFIX: &str = "clock/";
const INTERVAL: Duration = Duration::from_secs(1);

/// The newest mark in the store; 0 when there is none. After a change of the number of shards there
/// may be several.
pub(crate) async fn read<E: Env>(env: &E, store: &Store<E>) -> Result<u64, ReadError> {
    let mut newest = 0;
    let mut from = ScanFrom::Token(Token(0));
    let limits = ScanLimits {
        records: 64,
        bytes: 1 << 16,
    };
    loop {
        let page = store.scan(tree::SYSTEM, from, Token::MAX, limits).await?;
        for entry in &page.entries {
            if entry.key.starts_with(KEY_PREFIX.as_bytes())
                && let Some(mark) = entry.record.value.first_chunk::<8>()
            {
                newest = newest.max(u64::from_le_bytes(*mark));
            }
        }
        match page.next {
            Some(next) => from = next,
            None => return Ok(newest),
        }
        env.give_way().await;
    }
}

/// The key of a shard's mark.
pub(crate) fn key(shard: ShardId) -> String {
    format!("{KEY_PREFIX}{shard}")
}

/// Keeps the mark ahead of the clock for as long as the shard mints.
pub(crate) async fn keep<E: Env>(core: Rc<Core<E>>) {
    while !core.clock.is_sealed() {
        if let Some(mark) = core.clock.high_water_due(core.env.wall()) {
            // Looked at again in the step that writes: the one that a stop leaves must be the last.
            let ahead = || (!core.clock.is_sealed()).then_some(mark);
            match write(&core, ahead).await {
                Ok(()) => core.clock.high_water_written(mark),
                Err(error) => {
                    tracing::debug!(%error, "the clock's mark is not written");
                    if matches!(error, WriteError::DiskFull) {
                        core.clock.go_on();
                    }
                }
            }
        }
        core.env.sleep(INTERVAL).await;
    }
}

/// Leaves the mark of a clock that is sealed: the next life goes on there, and has nothing to wait for that was
/// only reserved. When it fails, or a crash comes first, the mark that leads is still there.
pub(crate) async fn leave<E: Env>(core: &Core<E>) -> Result<(), WriteError> {
    assert!(core.clock.is_sealed(), "a stamp might follow the mark");
    write(core, || Some(core.clock.mark_at_end(core.env.wall()))).await
}

/// Writes what `mark` says in the step that writes, if anything. Durable on return.
async fn write<E: Env>(
    core: &Core<E>,
    mark: impl FnOnce() -> Option<u64>,
) -> Result<(), WriteError> {
    let key = key(core.env.shard());
    let token = Token::of(tree::SYSTEM, key.as_bytes());
    let decide = |_: Option<&Record>| match mark() {
        None => Decision::Keep(()),
        Some(mark) => {
            let record = Record {
                kind: Kind::Value,
                stamp: 0,
                expires_at_ms: 0,
                value: Bytes::copy_from_slice(&mark.to_le_bytes()),
            };
            Decision::Write(record, ())
        }
    };
    let updated = core
        .store
        .update(tree::SYSTEM, token, key.as_bytes(), decide);
    let ((), ticket) = updated.await?;
    ticket.wait_durable().await
}
