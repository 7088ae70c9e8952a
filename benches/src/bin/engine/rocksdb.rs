//! RocksDB, tuned as its guide says: LZ4, blocks of 4 KiB, filters of the same error rate, levels sized from the
//! bottom up, synced puts with its own group commit, large values in blobs; with direct I/O as ours, or with the
//! kernel's page cache on top of its own cache.

use std::path::Path;

use rocksdb::{BlockBasedOptions, Cache, DB, DBCompressionType, Options, WriteOptions};

use crate::threads::Engine;
use crate::workload::Settings;

/// Bits a key for one wrong "maybe" in 256.
const FILTER_BITS: f64 = 11.5;

pub struct Rocksdb {
    db: DB,
    synced: WriteOptions,
    /// What a bulk load is written with.
    unlogged: WriteOptions,
}

impl Rocksdb {
    /// An empty one.
    pub fn open(settings: &Settings, directory: &Path, is_direct: bool) -> Rocksdb {
        let cache = Cache::new_lru_cache(settings.cache_bytes).expect("a cache");
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(&cache);
        blocks.set_block_size(4096);
        blocks.set_bloom_filter(FILTER_BITS, false);
        blocks.set_format_version(5);
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_block_based_table_factory(&blocks);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_write_buffer_size(settings.memtable_bytes);
        options.set_max_write_buffer_number(2);
        options.set_level_compaction_dynamic_level_bytes(true);
        options.set_use_direct_reads(is_direct);
        options.set_use_direct_io_for_flush_and_compaction(is_direct);
        options.set_bytes_per_sync(1 << 20);
        options.set_recycle_log_file_num(4);
        options.set_max_background_jobs(2);
        if settings.separates() {
            options.set_enable_blob_files(true);
            options.set_blob_compression_type(DBCompressionType::Lz4);
            options.set_blob_file_size(64 << 20);
            options.set_enable_blob_gc(true);
        }
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        let mut unlogged = WriteOptions::default();
        unlogged.disable_wal(true);
        Rocksdb {
            db: DB::open(&options, directory).expect("an empty database"),
            synced,
            unlogged,
        }
    }
}

impl Engine for Rocksdb {
    fn put(&self, key: &[u8], value: &[u8], syncs: bool) {
        let how = if syncs { &self.synced } else { &self.unlogged };
        self.db.put_opt(key, value, how).expect("an accepted put");
    }

    fn get(&self, key: &[u8]) -> Option<usize> {
        let found = self.db.get_pinned(key).expect("a readable database");
        found.map(|value| value.len())
    }

    fn scan(&self, from: &[u8], records: usize) -> usize {
        let mut bytes = 0;
        let mut iterator = self.db.raw_iterator();
        iterator.seek(from);
        for _ in 0..records {
            let Some(record) = iterator.item() else { break };
            bytes += record.0.len() + record.1.len();
            iterator.next();
        }
        iterator.status().expect("a readable database");
        bytes
    }

    fn flush(&self) {
        self.db.flush().expect("a flush");
    }

    fn compact(&self) {
        self.db.compact_range(None::<&[u8]>, None::<&[u8]>);
    }
}
