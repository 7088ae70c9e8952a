//! fjall: LZ4, buffered I/O (it has no other), a sync after each put. It does not join the syncs of
//! concurrent writers.

use std::path::Path;

use fjall::{Database, KeyspaceCreateOptions, PersistMode};

use crate::report::Report;
use crate::threads::{self, Engine};
use crate::workload::Settings;

pub fn run(settings: &Settings, directory: &Path, report: &mut Report) {
    let bytes = |bytes: usize| u64::try_from(bytes).expect("a size in memory");
    let db = Database::builder(directory)
        .cache_size(bytes(settings.cache_bytes))
        .worker_threads(2)
        .open()
        .expect("an empty database");
    let options =
        || KeyspaceCreateOptions::default().max_memtable_size(bytes(settings.memtable_bytes));
    let items = db.keyspace("items", options).expect("a keyspace");
    threads::run(
        settings,
        &Engine {
            name: "fjall",
            put: &|key, value| {
                items.insert(key, value).expect("an accepted put");
                db.persist(PersistMode::SyncData).expect("a durable put");
            },
            get: &|key| items.get(key).expect("a readable database").is_some(),
            compact: &|| {
                items.rotate_memtable_and_wait().expect("a flush");
                items.major_compact().expect("a compaction");
            },
        },
        report,
    );
}
