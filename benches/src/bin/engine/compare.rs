//! Our engine beside others: every load, with values of every size.
//!
//! `cargo run --release -p torc-benches --bin engine -- compare [--sizes 100,1000,16384,262144]
//! [--engines torc,rocksdb,rocksdb-buffered,fjall] [--directory DIR] [--results FILE.json]`; more with `--help`.
//!
//! The peers come with `--features engines`; `benches/peers/engines.sh` takes RocksDB and fio from Debian and runs
//! all of it. Each engine with each size is a process of its own, in a control group whose memory is bounded where
//! this machine allows that, so that what the kernel caches for engines with buffered I/O counts as their memory.
//! Results are added to those in `--results`: an engine or a size can be measured again alone.
//!
//! 1. On an empty store, keys in no order, each durable when its put returns.
//! 2. On another, all keys in order, durable when the load has ended; then everything is merged, and read.
//! 3. On that, overwrites, and the workloads of YCSB with its own distributions.
//!
//! All engines get the same records, of which half compresses, several times as many as they have memory; the
//! same memory for caches and memtables; and LZ4. A *write* is blind. A *read, then write* is what a store does that
//! merges versions. CPU is that of the whole process, background threads included. What is written to the disk and
//! read from it is what the kernel accounts to the process, what is kept is what the files of its directory take.
//!
//! The directory must lie on a disk, not in memory: syncs are what is measured. A store of ours is one
//! thread; the others get a thread for each client.

mod page;
mod table;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::{Args, ValueEnum};
use torc_engine::Keys;

use crate::ceiling;
use crate::memory::{self, Limit};
use crate::results::{Cell, Results};
use crate::torc;
use crate::workload::{KEY_BYTES, Script, Settings, scripts};

/// Memory for caches, and of each of two memtables.
const CACHE_BYTES: usize = 32 << 20;
const MEMTABLE_BYTES: usize = 16 << 20;
/// What a process may take in all: besides caches and memtables filters, what is on its way, and its threads.
const MEMORY_BYTES_MAX: u64 = 320 << 20;
/// Bytes of records that a bulk load writes, and fewer when records are so small that it would take long.
const DATA_BYTES: usize = 512 << 20;
const SMALL_DATA_BYTES: usize = 256 << 20;
const SMALL_VALUE_BYTES: usize = 256;

/// What the first table sets side by side: both with direct I/O.
const OURS: &str = "torc";
const PEER: &str = "rocksdb";

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Engine {
    Torc,
    /// Ours, with encryption on. Only when asked for: it is no peer.
    Encrypted,
    #[cfg(feature = "rocksdb")]
    Rocksdb,
    #[cfg(feature = "rocksdb")]
    RocksdbBuffered,
    #[cfg(feature = "fjall")]
    Fjall,
}

/// Our engine beside others, with values of several sizes
#[derive(Args, Clone, Debug)]
pub struct Compare {
    /// Bytes of a value
    #[arg(long, value_delimiter = ',', default_value = "100,1000,16384,262144")]
    sizes: Vec<usize>,
    /// All that are built in when not given
    #[arg(long, value_delimiter = ',')]
    engines: Vec<Engine>,
    /// Of each load
    #[arg(long, default_value_t = 1.2)]
    seconds: f64,
    /// A quarter of the data, a fifth of the time: to see that all of it works
    #[arg(long)]
    quick: bool,
    /// On the disk that is measured
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// What is measured is added here
    #[arg(long, default_value = "engine.json")]
    results: PathBuf,
    /// All results as a table in Markdown
    #[arg(long, default_value = "engine.md")]
    table: PathBuf,
    /// All results as a page
    #[arg(long, default_value = "engine.html")]
    page: PathBuf,
    /// Measures nothing: only writes table and page
    #[arg(long)]
    show: bool,
}

/// One engine with values of one size; prints a line of JSON for each load
#[derive(Args, Clone, Debug)]
pub struct One {
    #[arg(long)]
    engine: Engine,
    #[arg(long)]
    value_bytes: usize,
    #[arg(long)]
    seconds: f64,
    #[arg(long)]
    quick: bool,
    #[arg(long)]
    directory: PathBuf,
    /// A control group to join
    #[arg(long)]
    group: Option<PathBuf>,
}

/// Measures what is wanted, one after the other, and shows all that has been.
pub fn compare(args: &Compare) {
    // As our runtime does it for itself. With them, the first touch of each client's thread costs 2 MiB.
    rustix::thread::disable_transparent_huge_pages(true).expect("a kernel that can");
    let mut results = Results::read(&args.results);
    let keep = |results: &Results| {
        let json = serde_json::to_string_pretty(results).expect("plain data");
        std::fs::write(&args.results, json).expect("a place for the results");
    };
    if !args.show {
        if results.ceilings.is_empty() {
            let found = ceiling::measure(&args.directory, args.seconds);
            results.ceilings = found.unwrap_or_default();
            keep(&results);
        }
        let all = || Engine::value_variants().iter().copied();
        let engines: Vec<Engine> = match &args.engines[..] {
            [] => all().filter(|one| *one != Engine::Encrypted).collect(),
            some => some.to_vec(),
        };
        for value_bytes in &args.sizes {
            for engine in &engines {
                results.add(apart(args, *engine, *value_bytes));
                keep(&results);
            }
        }
    }
    let table = table::markdown(&results);
    print!("{table}");
    std::fs::write(&args.table, table).expect("a place for the table");
    std::fs::write(&args.page, page::html(&results)).expect("a place for the page");
}

/// Measures a cell in a process of its own.
fn apart(args: &Compare, engine: Engine, value_bytes: usize) -> Cell {
    let group = Limit::new(MEMORY_BYTES_MAX);
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .arg("one")
        .args(["--engine", &name(engine)])
        .args(["--value-bytes", &value_bytes.to_string()])
        .args(["--seconds", &args.seconds.to_string()])
        .arg("--directory")
        .arg(&args.directory)
        .stderr(Stdio::inherit());
    if let Some(group) = &group {
        command.arg("--group").arg(group.path());
    }
    if args.quick {
        command.arg("--quick");
    }
    eprintln!("{}, values of {value_bytes} bytes", name(engine));
    let output = command.output().expect("this program once more");
    let lines = output.stdout.split(|byte| *byte == b'\n');
    let rows = lines.filter(|line| !line.is_empty());
    Cell {
        engine: name(engine),
        value_bytes,
        keys: settings(value_bytes, args.seconds, args.quick).keys,
        memory_bytes_max: group.map(|_| MEMORY_BYTES_MAX),
        rows: rows
            .map(|row| serde_json::from_slice(row).expect("a row"))
            .collect(),
        failure: (!output.status.success()).then(|| output.status.to_string()),
    }
}

fn name(engine: Engine) -> String {
    let value = engine.to_possible_value().expect("no engine is hidden");
    value.get_name().to_owned()
}

/// Measures a cell here.
pub fn one(args: &One) {
    if let Some(group) = &args.group {
        memory::join(group);
    }
    let settings = settings(args.value_bytes, args.seconds, args.quick);
    for script in scripts() {
        let directory = tempfile::tempdir_in(&args.directory).expect("a directory for the data");
        run(args.engine, &settings, script, directory.path());
    }
}

fn settings(value_bytes: usize, seconds: f64, is_quick: bool) -> Settings {
    let data = match value_bytes {
        ..SMALL_VALUE_BYTES => SMALL_DATA_BYTES,
        _ => DATA_BYTES,
    };
    let (data, seconds) = match is_quick {
        true => (data / 4, seconds / 5.0),
        false => (data, seconds),
    };
    let keys = data / (KEY_BYTES + value_bytes);
    Settings {
        keys: u32::try_from(keys).expect("not so many keys"),
        value_bytes,
        separate_from: Some(8 << 10),
        cache_bytes: CACHE_BYTES,
        memtable_bytes: MEMTABLE_BYTES,
        // What is kept is counted with the log.
        wal_segment_bytes: 16 << 20,
        duration: Duration::from_secs_f64(seconds),
    }
}

fn run(engine: Engine, settings: &Settings, script: Script, directory: &Path) {
    match engine {
        Engine::Torc => torc::run(settings, script, directory, &Keys::default()),
        Engine::Encrypted => {
            let keys = Keys::parse(&"0123456789abcdef".repeat(4)).expect("64 digits");
            torc::run(settings, script, directory, &keys)
        }
        #[cfg(feature = "rocksdb")]
        Engine::Rocksdb | Engine::RocksdbBuffered => {
            let is_direct = engine == Engine::Rocksdb;
            let engine = crate::rocksdb::Rocksdb::open(settings, directory, is_direct);
            crate::threads::run(settings, &script, &engine, directory)
        }
        #[cfg(feature = "fjall")]
        Engine::Fjall => {
            let engine = crate::fjall::Fjall::open(settings, directory);
            crate::threads::run(settings, &script, &engine, directory)
        }
    }
}
