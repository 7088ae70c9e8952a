//! fjall: LZ4, buffered I/O (it has no other), a sync after each put, large values in blobs. It does not join the
//! syncs of concurrent writers.

use std::path::Path;

use fjall::{Database, Keyspace, KeyspaceCreateOptions, KvSeparationOptions, PersistMode};

use crate::threads::Engine;
use crate::workload::Settings;

pub struct Fjall {
    db: Database,
    items: Keyspace,
}

impl Fjall {
    /// In a directory of its own, made if there is nothing yet.
    pub fn open(settings: &Settings, directory: &Path) -> Fjall {
        let bytes = |bytes: usize| u64::try_from(bytes).expect("a size in memory");
        let db = Database::builder(directory)
            .cache_size(bytes(settings.cache_bytes))
            .worker_threads(2)
            .open()
            .expect("a database in order");
        let options = || {
            let blobs = settings.separates().then(KvSeparationOptions::default);
            KeyspaceCreateOptions::default()
                .max_memtable_size(bytes(settings.memtable_bytes))
                .with_kv_separation(blobs)
        };
        let items = db.keyspace("items", options).expect("a keyspace");
        Fjall { db, items }
    }
}

impl Engine for Fjall {
    fn put(&self, key: &[u8], value: &[u8], syncs: bool) {
        self.items.insert(key, value).expect("an accepted put");
        if syncs {
            self.db
                .persist(PersistMode::SyncData)
                .expect("a durable put");
        }
    }

    fn get(&self, key: &[u8]) -> Option<usize> {
        let found = self.items.get(key).expect("a readable database");
        found.map(|value| value.len())
    }

    fn scan(&self, from: &[u8], records: usize) -> usize {
        let range = self.items.range(from..).take(records);
        range
            .map(|record| {
                let (key, value) = record.into_inner().expect("a readable database");
                key.len() + value.len()
            })
            .sum()
    }

    fn flush(&self) {
        self.db.persist(PersistMode::SyncAll).expect("a sync");
        self.items.rotate_memtable_and_wait().expect("a flush");
    }

    fn compact(&self) {
        self.items.major_compact().expect("a compaction");
    }
}
