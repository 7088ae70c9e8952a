//! Short forms of the store's calls.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use torc_engine::{
    Decision, Keys, Kind, OpenError, Options, Record, ScanFrom, ScanLimits, Store, Ticket,
    WriteError,
};
use torc_env::{Disk, Env, Token, TreeId};

pub const TREE: TreeId = TreeId(1);

/// Small memtables and segments, so that flushes and switches happen, and blobs that small values go to.
pub fn options() -> Options {
    Options {
        memtable_bytes: 1 << 20,
        wal_segment_bytes: 1 << 20,
        cache_bytes: 64 << 10,
        separate_from: Some(2000),
        ..Options::new("shard-00")
    }
}

/// A master key for each byte; the last one is active.
pub fn keys(bytes: &[u8]) -> Keys {
    let line = |byte: &u8| format!("{byte:02x}").repeat(32) + "\n";
    Keys::parse(&bytes.iter().map(line).collect::<String>()).unwrap()
}

pub fn value(bytes: impl Into<Bytes>, stamp: u64) -> Record {
    Record {
        kind: Kind::Value,
        stamp,
        expires_at_ms: 0,
        value: bytes.into(),
    }
}

pub fn tombstone(stamp: u64) -> Record {
    Record {
        kind: Kind::Tombstone,
        ..value(Bytes::new(), stamp)
    }
}

/// Writes whatever the key has; acknowledged on return.
pub async fn put<E: Env>(
    store: &Store<E>,
    key: impl AsRef<[u8]>,
    record: Record,
) -> Result<(), WriteError> {
    submit(store, key, record).await?.wait().await
}

/// As [`put`], not yet acknowledged.
pub async fn submit<E: Env>(
    store: &Store<E>,
    key: impl AsRef<[u8]>,
    record: Record,
) -> Result<Ticket<E>, WriteError> {
    let key = key.as_ref();
    let token = Token::of(TREE, key);
    let (_, ticket) = store
        .update(TREE, token, key, |_| Decision::Write(record, ()))
        .await?;
    Ok(ticket)
}

/// The value of a key; `None` for tombstones and absent keys.
pub async fn get<E: Env>(store: &Store<E>, key: impl AsRef<[u8]>) -> Option<Bytes> {
    let key = key.as_ref();
    let record = store.get(TREE, Token::of(TREE, key), key).await.unwrap();
    record
        .filter(|record| record.kind == Kind::Value)
        .map(|record| record.value)
}

/// Every record, by pages of `records`.
pub async fn scan_all<E: Env>(store: &Store<E>, records: usize) -> Vec<(Bytes, Record)> {
    let limits = ScanLimits {
        records,
        bytes: 1 << 20,
    };
    let mut from = Some(ScanFrom::Token(Token(0)));
    let mut found = Vec::new();
    while let Some(start) = from {
        let page = store.scan(TREE, start, Token::MAX, limits).await.unwrap();
        assert!(page.entries.len() <= records);
        for entry in page.entries {
            assert_eq!(entry.token, Token::of(TREE, &entry.key));
            found.push((entry.key, entry.record));
        }
        from = page.next;
    }
    assert!(
        found
            .windows(2)
            .all(|two| (Token::of(TREE, &two[0].0), &two[0].0)
                < (Token::of(TREE, &two[1].0), &two[1].0)),
        "a scan ascends"
    );
    found
}

/// Takes a file away without which a store with `options` does not open: the error names it, and the remedy. Returns where
/// it is now.
pub async fn lose<E: Env>(env: &E, path: &Path, options: Options) -> PathBuf {
    let aside = path.with_extension("away");
    env.disk().rename(path, &aside).await.unwrap();
    let error = Store::open(env.clone(), options).await.err().unwrap();
    let what = error.to_string();
    assert!(matches!(error, OpenError::Corrupt { path: found, .. } if found == path));
    assert!(what.contains("put it back"), "{what}");
    aside
}
