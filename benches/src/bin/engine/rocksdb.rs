//! RocksDB: LZ4, blocks of 4 KiB, filters of the same error rate, synced puts with its own group commit;
//! with direct I/O as ours, and with the kernel's page cache on top of its own cache.

use std::path::Path;

use rocksdb::{BlockBasedOptions, Cache, DB, DBCompressionType, Options, WriteOptions};

use crate::report::Report;
use crate::threads::{self, Engine};
use crate::workload::Settings;

/// Bits a key for one wrong "maybe" in 256.
const FILTER_BITS: f64 = 11.5;

pub fn run(settings: &Settings, directory: &Path, is_direct: bool, report: &mut Report) {
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
    options.set_use_direct_reads(is_direct);
    options.set_use_direct_io_for_flush_and_compaction(is_direct);
    options.set_recycle_log_file_num(4);
    options.set_max_background_jobs(2);
    let db = DB::open(&options, directory).expect("an empty database");
    let mut synced = WriteOptions::default();
    synced.set_sync(true);
    threads::run(
        settings,
        &Engine {
            name: if is_direct {
                "rocksdb"
            } else {
                "rocksdb (buf)"
            },
            put: &|key, value| db.put_opt(key, value, &synced).expect("a durable put"),
            get: &|key| db.get_pinned(key).expect("a readable database").is_some(),
            compact: &|| db.compact_range(None::<&[u8]>, None::<&[u8]>),
        },
        report,
    );
}
