//! What the storage engine does by itself, and beside RocksDB and fjall (`--features engines`; RocksDB
//! takes many minutes to build and needs libclang): one shard's store on the real runtime and the real disk.
//!
//! All engines get the same records (100,000 keys, 1 KB values of which half compresses), the same memory
//! for caches and memtables, and the same promise: a put has returned when it is durable. Reads come after
//! a full compaction.
//!
//! `cargo run --release -p torc-benches --bin engine [--features engines] -- [seconds a load] [directory]`
//!
//! The directory must lie on a disk, not in memory: syncs are what is measured. A store of ours is one
//! thread; the others get a thread for each writer or reader.

#[cfg(feature = "fjall")]
mod fjall;
#[cfg(feature = "rocksdb")]
mod rocksdb;
#[cfg(any(feature = "fjall", feature = "rocksdb"))]
mod threads;
mod torc;
mod workload;

use std::path::PathBuf;
use std::time::Duration;

use workload::Settings;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments
        .next()
        .map_or(3.0, |text| text.parse().expect("seconds"));
    let directory = arguments.next().map_or(std::env::temp_dir(), PathBuf::from);
    let settings = Settings {
        keys: 100_000,
        value_bytes: 1000,
        cache_bytes: 64 << 20,
        memtable_bytes: 32 << 20,
        duration: Duration::from_secs_f64(seconds),
    };
    let fresh = || tempfile::tempdir_in(&directory).expect("a directory for the data");

    println!(
        "{:<10} {:<28} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "engine", "load", "ops/s", "p50 us", "p99 us", "p99.9 us", "max us"
    );
    torc::run(&settings, fresh().path());
    #[cfg(feature = "rocksdb")]
    rocksdb::run(&settings, fresh().path());
    #[cfg(feature = "fjall")]
    fjall::run(&settings, fresh().path());
}
