//! What the storage engine does by itself, and beside RocksDB and fjall: one shard's store on the
//! real runtime and the real disk.
//!
//! `cargo run --release -p torc-benches --bin engine -- [seconds a load] [directory] [plot.svg] [engine,engine…]`
//!
//! The engine `encrypted` is ours with encryption on.
//!
//! The peers come with `--features engines`; `benches/peers/engines.sh` takes RocksDB from Debian and
//! runs all of it.
//!
//! All engines get the same records (100,000 keys, 1 KB values of which half compresses), the same memory
//! for caches and memtables, and the same promise: a put has returned when it is durable. Reads come after
//! a full compaction. What the kernel caches comes on top for engines with buffered I/O: fjall, and
//! "rocksdb (buf)". CPU is that of the whole process, background threads included.
//!
//! `… --bin engine -- overwrite` is another benchmark: whether the rate of overwrites holds for minutes, and
//! what reads cost meanwhile ([`overwrite`]). `… --bin engine -- amplification` counts what each strategy of
//! compaction writes, reads and keeps, beside the bounds of the design ([`amplification`]).
//!
//! The directory must lie on a disk, not in memory: syncs are what is measured. A store of ours is one
//! thread; the others get a thread for each client.

mod amplification;
#[cfg(feature = "fjall")]
mod fjall;
mod overwrite;
mod report;
#[cfg(feature = "rocksdb")]
mod rocksdb;
#[cfg(any(feature = "fjall", feature = "rocksdb"))]
mod threads;
mod torc;
mod workload;

use std::path::PathBuf;
use std::time::Duration;

use report::Report;
use torc_engine::Keys;
use workload::Settings;

/// As in the program. RocksDB brings its own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    let mut arguments = std::env::args().skip(1).peekable();
    if arguments.next_if_eq("overwrite").is_some() {
        return overwrite::main(arguments);
    }
    if arguments.next_if_eq("amplification").is_some() {
        return amplification::main(arguments);
    }
    let seconds = arguments
        .next()
        .map_or(3.0, |text| text.parse().expect("seconds"));
    let directory = arguments.next().map_or(std::env::temp_dir(), PathBuf::from);
    let plot = arguments.next().map(PathBuf::from);
    let wanted = arguments.next();
    let is_wanted = |name: &str| {
        let is_it = |list: &String| list.split(',').any(|one| one == name);
        wanted.as_ref().is_none_or(is_it)
    };
    let settings = Settings {
        keys: 100_000,
        value_bytes: 1000,
        separate_from: Some(8 << 10),
        cache_bytes: 32 << 20,
        memtable_bytes: 16 << 20,
        duration: Duration::from_secs_f64(seconds),
    };
    let fresh = || tempfile::tempdir_in(&directory).expect("a directory for the data");

    Report::print_head();
    let mut report = Report::default();
    if is_wanted("torc") {
        report = torc::run(&settings, fresh().path(), Keys::default());
    }
    // Only when asked for: it is no peer.
    if wanted.is_some() && is_wanted("encrypted") {
        let key = "0123456789abcdef".repeat(4);
        let keys = Keys::parse(&key).expect("64 digits");
        report = torc::run(&settings, fresh().path(), keys);
    }
    #[cfg(feature = "rocksdb")]
    for is_direct in [true, false] {
        if is_wanted("rocksdb") {
            rocksdb::run(&settings, fresh().path(), is_direct, &mut report);
        }
    }
    #[cfg(feature = "fjall")]
    if is_wanted("fjall") {
        fjall::run(&settings, fresh().path(), &mut report);
    }
    if let Some(plot) = plot.filter(|plot| !plot.as_os_str().is_empty()) {
        report.write_plot(&plot).expect("a place for the plot");
    }
}
