//! The durable high-water mark of a shard's hybrid clock.
//!
//! Not on the path: written every few seconds in the background, read once at start, so that stamps
//! go on rising over a restart even when civil time was set back meanwhile. Dots do not depend on it
//! (every boot has its own actor); last-write-wins keyspaces do.
//!
//! Kept in the store's tree of its own things, as 8 bytes little-endian.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use torc_engine::{Decision, Kind, ReadError, Record, ScanFrom, ScanLimits, Store};
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

/// Keeps the mark ahead of the clock for as long as the shard runs.
pub(crate) async fn keep<E: Env>(core: Rc<Core<E>>) {
    let key = key(core.env.shard());
    let token = Token::of(tree::SYSTEM, key.as_bytes());
    loop {
        if let Some(mark) = core.clock.high_water_due(core.env.wall()) {
            let record = Record {
                kind: Kind::Value,
                stamp: 0,
                expires_at_ms: 0,
                value: Bytes::copy_from_slice(&mark.to_le_bytes()),
            };
            let written = core
                .store
                .update(tree::SYSTEM, token, key.as_bytes(), |_| {
                    Decision::Write(record, ())
                })
                .await;
            let durable = match written {
                Ok(((), ticket)) => ticket.wait().await,
                Err(error) => Err(error),
            };
            match durable {
                Ok(()) => core.clock.high_water_written(mark),
                Err(error) => tracing::debug!(%error, "the clock's mark is not written"),
            }
        }
        core.env.sleep(INTERVAL).await;
    }
}
