//! RocksDB, tuned as its guide says: LZ4, blocks of 4 KiB, filters of the same error rate, levels sized from the
//! bottom up, synced puts with its own group commit, large values in blobs; with direct I/O as ours, or with the
//! kernel's page cache on top of its own cache.

use std::path::Path;

use rocksdb::{BlockBasedOptions, Cache, DB, DBCompressionType, Env, Options, WriteOptions};

use crate::threads::Engine;
use crate::workload::Settings;

/// Bits a key for one wrong "maybe" in 256.
const FILTER_BITS: f64 = 11.5;
/// Where values are in blobs, their cache has all but this part of the cache: what is left holds every block of keys.
const BLOCK_CACHE_PART: usize = 8;

/// What differs between runs.
#[derive(Clone, Copy)]
pub struct Setup {
    pub is_direct: bool,
    /// In this process.
    pub instances: usize,
}

pub struct Rocksdb {
    db: DB,
    synced: WriteOptions,
    /// What a bulk load is written with.
    unsynced: WriteOptions,
}

impl Rocksdb {
    /// In a directory of its own, made if there is nothing yet.
    pub fn open(settings: &Settings, directory: &Path, setup: Setup) -> Rocksdb {
        let block_cache_bytes = match settings.separates() {
            true => settings.cache_bytes / BLOCK_CACHE_PART,
            false => settings.cache_bytes,
        };
        let cache = Cache::new_lru_cache(block_cache_bytes).expect("a cache");
        let mut blocks = BlockBasedOptions::default();
        blocks.set_block_cache(&cache);
        blocks.set_block_size(4096);
        blocks.set_bloom_filter(FILTER_BITS, false);
        blocks.set_format_version(5);
        let mut options = Options::default();
        options.create_if_missing(true);
        // Threads are those of all instances.
        let mut env = Env::new().expect("an environment");
        let threads = i32::try_from(setup.instances).expect("not so many cores");
        env.set_background_threads(threads);
        env.set_high_priority_background_threads(threads);
        options.set_env(&env);
        options.set_block_based_table_factory(&blocks);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_write_buffer_size(settings.memtable_bytes);
        options.set_max_write_buffer_number(2);
        options.set_level_compaction_dynamic_level_bytes(true);
        options.set_use_direct_reads(setup.is_direct);
        options.set_use_direct_io_for_flush_and_compaction(setup.is_direct);
        options.set_compaction_readahead_size(2 << 20);
        options.set_bytes_per_sync(1 << 20);
        options.set_recycle_log_file_num(4);
        options.set_max_background_jobs(2);
        // The writes of a group enter the memtable each by itself: what is overwritten gains a tenth.
        options.set_unordered_write(true);
        if settings.separates() {
            options.set_enable_blob_files(true);
            options.set_blob_compression_type(DBCompressionType::Lz4);
            options.set_blob_file_size(64 << 20);
            options.set_enable_blob_gc(true);
        }
        let db = DB::open(&options, directory).expect("a database in order");
        let db = match settings.separates() {
            true => with_blob_cache(db, &env, &cache, settings.cache_bytes - block_cache_bytes),
            false => db,
        };
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        Rocksdb {
            db,
            synced,
            unsynced: WriteOptions::default(),
        }
    }
}

/// The database with a cache for its blobs. These bindings cannot give it one, but its file of options can.
fn with_blob_cache(db: DB, env: &Env, cache: &Cache, bytes: usize) -> DB {
    let directory = db.path().to_owned();
    drop(db);
    let files = std::fs::read_dir(&directory).expect("the database's directory");
    let paths = files.map(|file| file.expect("a file").path());
    let is_options = |path: &std::path::PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("OPTIONS-"))
    };
    let newest = paths.filter(is_options).max().expect("a file of options");
    let options = std::fs::read_to_string(&newest).expect("a file of options");
    let section = "[CFOptions \"default\"]\n";
    let with = options.replace(section, &format!("{section}  blob_cache={bytes}\n"));
    std::fs::write(&newest, with).expect("a file of options");
    let loaded = Options::load_latest(&directory, env.clone(), false, cache.clone());
    let (options, families) = loaded.expect("options in order");
    let db = DB::open_cf_descriptors(&options, &directory, families).expect("the database again");
    let capacity = db.property_int_value("rocksdb.blob-cache-capacity");
    let expected = u64::try_from(bytes).ok();
    assert_eq!(
        capacity.expect("a property"),
        expected,
        "no cache for blobs"
    );
    db
}

impl Engine for Rocksdb {
    fn put(&self, key: &[u8], value: &[u8], syncs: bool) {
        let how = if syncs { &self.synced } else { &self.unsynced };
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
