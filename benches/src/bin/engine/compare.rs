//! Our engine beside others: every load, with values of every size.
//!
//! `cargo run --release -p torc-benches --bin engine -- compare [--layouts one-core,pinned]
//! [--sizes 100,1000,16384,262144] [--engines torc,rocksdb,rocksdb-buffered,fjall] [--directory DIR]
//! [--results FILE.json]`; more with `--help`.
//!
//! The peers come with `--features engines`; `benches/peers/engines.sh` takes RocksDB and fio from Debian and runs
//! all of it. Each engine in each layout with each size is a process of its own, in a control group whose memory is
//! bounded where this machine allows that, so that what the kernel caches for engines with buffered I/O counts as their
//! memory. Results are added to those in `--results`: an engine, a size or a load can be measured again alone.
//!
//! 1. On an empty store, keys in no order, each durable when its put returns.
//! 2. On another, all keys in no order, logged and not synced, durable when the load has ended; then everything is merged, and read.
//! 3. On that, overwrites, and the workloads of YCSB with its own distributions.
//!
//! All engines get the same records, of which half compresses, several times as many as they have memory; the same cores
//! ([`Layout`]) and memory; and LZ4. A *write* is blind. A *read, then write* is what a store does that
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
use core_affinity::CoreId;
use torc_engine::Keys;

use crate::ceiling;
#[cfg(feature = "fjall")]
use crate::fjall::Fjall;
use crate::layout::Layout;
use crate::memory::{self, Limit};
use crate::results::{Cell, Results};
#[cfg(feature = "rocksdb")]
use crate::rocksdb::{Rocksdb, Setup};
use crate::torc;
use crate::workload::{Durations, KEY_BYTES, Script, Settings, scripts};

/// Memory for caches, and of each of two memtables.
const CACHE_BYTES: usize = 32 << 20;
const MEMTABLE_BYTES: usize = 16 << 20;
/// Bytes of records that a bulk load writes for each byte of memory that a process may take.
const DATA_PER_MEMORY: u64 = 4;

/// Names a library for RocksDB's process to take its memory from.
const ROCKSDB_MALLOC: &str = "ROCKSDB_MALLOC";

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
    /// How the engines lie on the cores
    #[arg(long, value_delimiter = ',', default_value = "one-core,pinned")]
    layouts: Vec<Layout>,
    #[command(flatten)]
    effort: Effort,
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

/// How much is measured.
#[derive(Args, Clone, Debug)]
struct Effort {
    /// Of each load
    #[arg(long, default_value_t = 0.8)]
    seconds: f64,
    /// At most, of the overwrites, which end earlier when everything has been overwritten three times
    #[arg(long, default_value_t = 8.0)]
    overwrite_seconds: f64,
    /// A quarter of the data, a fifth of the time: to see that all of it works
    #[arg(long)]
    quick: bool,
    /// Only loads in whose names this occurs, and the bulk load
    #[arg(long, default_value = "")]
    only: String,
}

/// One engine in one layout with values of one size; prints a line of JSON for each load
#[derive(Args, Clone, Debug)]
pub struct One {
    #[arg(long)]
    engine: Engine,
    #[arg(long)]
    layout: Layout,
    #[arg(long)]
    value_bytes: usize,
    #[command(flatten)]
    effort: Effort,
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
            let found = ceiling::measure(&args.directory, args.effort.seconds);
            results.ceilings = found.unwrap_or_default();
            keep(&results);
        }
        let all = || Engine::value_variants().iter().copied();
        let engines: Vec<Engine> = match &args.engines[..] {
            [] => all().filter(|one| *one != Engine::Encrypted).collect(),
            some => some.to_vec(),
        };
        for layout in &args.layouts {
            for value_bytes in &args.sizes {
                for engine in &engines {
                    results.add(apart(args, *engine, *layout, *value_bytes));
                    keep(&results);
                }
            }
        }
    }
    let table = table::markdown(&results);
    print!("{table}");
    std::fs::write(&args.table, table).expect("a place for the table");
    std::fs::write(&args.page, page::html(&results)).expect("a place for the page");
}

/// Measures a cell in a process of its own.
fn apart(args: &Compare, engine: Engine, layout: Layout, value_bytes: usize) -> Cell {
    let Effort {
        seconds,
        overwrite_seconds,
        quick,
        only,
    } = &args.effort;
    let memory_bytes_max = layout.memory_bytes_max();
    let group = Limit::new(memory_bytes_max);
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .arg("one")
        .args(["--engine", &name(&engine)])
        .args(["--layout", &name(&layout)])
        .args(["--value-bytes", &value_bytes.to_string()])
        .args(["--seconds", &seconds.to_string()])
        .args(["--overwrite-seconds", &overwrite_seconds.to_string()])
        .args(["--only", only])
        .arg("--directory")
        .arg(&args.directory)
        .stderr(Stdio::inherit());
    if let Some(group) = &group {
        command.arg("--group").arg(group.path());
    }
    if *quick {
        command.arg("--quick");
    }
    if let Some(malloc) = std::env::var_os(ROCKSDB_MALLOC)
        && name(&engine).starts_with(PEER)
    {
        command.env("LD_PRELOAD", malloc);
    }
    eprintln!(
        "{}, {}, values of {value_bytes} bytes",
        name(&engine),
        layout.name()
    );
    let output = command.output().expect("this program once more");
    let lines = output.stdout.split(|byte| *byte == b'\n');
    let rows = lines.filter(|line| !line.is_empty());
    Cell {
        engine: name(&engine),
        layout,
        value_bytes,
        keys: settings(value_bytes, layout, &args.effort).keys,
        memory_bytes_max: group.map(|_| memory_bytes_max),
        rows: rows
            .map(|row| serde_json::from_slice(row).expect("a row"))
            .collect(),
        failure: (!output.status.success()).then(|| output.status.to_string()),
    }
}

/// As the command line has it.
fn name(value: &impl ValueEnum) -> String {
    let value = value.to_possible_value().expect("no value is hidden");
    value.get_name().to_owned()
}

/// Measures a cell here.
pub fn one(args: &One) {
    if let Some(group) = &args.group {
        memory::join(group);
    }
    let cores = args.layout.enter();
    let settings = settings(args.value_bytes, args.layout, &args.effort);
    for script in scripts() {
        let script = script.only(&args.effort.only);
        let directory = tempfile::tempdir_in(&args.directory).expect("a directory for the data");
        run(args.engine, &settings, script, directory.path(), &cores);
    }
}

fn settings(value_bytes: usize, layout: Layout, effort: &Effort) -> Settings {
    let data = layout.memory_bytes_max() * DATA_PER_MEMORY;
    let (data, times) = match effort.quick {
        true => (data / 4, 0.2),
        false => (data, 1.0),
    };
    let record_bytes = u64::try_from(KEY_BYTES + value_bytes).expect("64 bits");
    Settings {
        keys: u32::try_from(data / record_bytes).expect("not so many keys"),
        value_bytes,
        separate_from: Some(8 << 10),
        cache_bytes: CACHE_BYTES,
        memtable_bytes: MEMTABLE_BYTES,
        // What is kept is counted with the log.
        wal_segment_bytes: 16 << 20,
        durations: Durations {
            load: Duration::from_secs_f64(effort.seconds * times),
            overwrite_max: Duration::from_secs_f64(effort.overwrite_seconds * times),
        },
    }
}

/// Runs a script with an instance of an engine on each of some cores.
fn run(engine: Engine, settings: &Settings, script: Script, directory: &Path, cores: &[CoreId]) {
    match engine {
        Engine::Torc => torc::run(settings, script, directory, &Keys::default(), cores.len()),
        Engine::Encrypted => {
            let keys = Keys::parse(&"0123456789abcdef".repeat(4)).expect("64 digits");
            torc::run(settings, script, directory, &keys, cores.len());
        }
        #[cfg(feature = "rocksdb")]
        Engine::Rocksdb | Engine::RocksdbBuffered => {
            let part = settings.part(cores.len());
            let open = |directory: &Path| {
                let setup = Setup {
                    is_direct: engine == Engine::Rocksdb,
                    instances: cores.len(),
                };
                Rocksdb::open(&part, directory, setup)
            };
            crate::threads::run(settings, script, cores, directory, &open);
        }
        #[cfg(feature = "fjall")]
        Engine::Fjall => {
            let part = settings.part(cores.len());
            let open = |directory: &Path| Fjall::open(&part, directory);
            crate::threads::run(settings, script, cores, directory, &open);
        }
    }
}
