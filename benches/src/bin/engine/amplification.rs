//! What each strategy of compaction writes, reads and keeps, beside the bounds that the design gives.
//!
//! `cargo run --release -p torc-benches --bin engine -- amplification [--directory DIR]`; more with `--help`.
//!
//! For each strategy: every key is written once, then overwritten at random so many times the number of keys, with
//! memtables of 1 MiB so that all levels come into use; then keys are read that are there and that are
//! not, with the levels as the overwriting left them; then scans begin anywhere. What is printed are counts, so it does not matter how
//! fast the machine is, nor who else uses it.
//!
//! - *write*: bytes of the log and of tables for each byte that left memory, while overwriting.
//! - *hit*, *miss*: tables asked, each about one device read, for each read that neither memtable nor
//!   cache answered.
//! - *space*: bytes of tables, mean and most while overwriting, over what is left after a full compaction.
//! - *scan*: blocks read from the device for each scan of 100 records, of the first tenth of the scans and of the last; *merged*:
//!   bytes that compactions wrote meanwhile for each byte that was left.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;

use clap::Args;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use torc_engine::compaction::Strategy;
use torc_engine::{Fsync, Options, ScanFrom, ScanLimits, Stats, Store};
use torc_env::{Env as _, Token};
use torc_runtime::{RealEnv, Runtime, RuntimeConfig};

use crate::torc::{TREE, put};
use crate::workload::{Durations, Numbers, Settings, key};

const CLIENTS: usize = 16;
/// Updates between two looks at the size of the tables.
const LOOK_EVERY: u32 = 500;
/// Reads of each kind.
const READS: u32 = 20_000;
/// Scans, and records of each.
const SCANS: u32 = 20_000;
const SCAN_RECORDS: usize = 100;

/// What each strategy of compaction writes, reads and keeps
#[derive(Args, Clone, Debug)]
pub struct Amplification {
    /// Keys that are written once
    #[arg(long, default_value_t = 200_000)]
    keys: u32,
    #[arg(long, default_value_t = 400)]
    value_bytes: usize,
    /// Updates of each key
    #[arg(long, default_value_t = 3)]
    overwrites: u32,
    /// On a disk
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
}

impl Amplification {
    fn settings(&self) -> Settings {
        Settings {
            keys: self.keys,
            value_bytes: self.value_bytes,
            separate_from: Some(8 << 10),
            cache_bytes: 1 << 20,
            memtable_bytes: 1 << 20,
            wal_segment_bytes: 64 << 20,
            durations: Durations::default(),
        }
    }
}

/// The benchmark.
pub fn main(arguments: &Amplification) {
    let strategies = [
        ("hybrid", Strategy::Hybrid),
        ("leveled", Strategy::Leveled),
        ("size_tiered", Strategy::SizeTiered),
        ("fifo", Strategy::Fifo),
        ("time_window", Strategy::TimeWindow { stamps: 1 }),
    ];
    println!(
        "| strategy | levels | runs | write (bound) | hit | miss | space, mean / most | scan, first / last | merged |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (name, strategy) in strategies {
        let directory =
            tempfile::tempdir_in(&arguments.directory).expect("a directory for the data");
        let given = arguments.clone();
        let figures = Runtime::block_on(&RuntimeConfig::new(directory.path()), move |handle| {
            let (arguments, env) = (given.clone(), handle.env().clone());
            async move { measure(&arguments, env, strategy).await }
        })
        .expect("a runtime");
        println!("| {name} {figures}");
    }
}

/// What one strategy came to.
struct Figures {
    levels: usize,
    runs: usize,
    write: f64,
    write_bound: Option<f64>,
    hit: f64,
    miss: f64,
    space_mean: f64,
    space_most: f64,
    scan_first: f64,
    scan_last: f64,
    merged: f64,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bound = self
            .write_bound
            .map_or("none".to_owned(), |bound| format!("{bound:.1}"));
        write!(
            f,
            "| {} | {} | {:.2} ({bound}) | {:.4} | {:.4} | {:.2} / {:.2} | {:.1} / {:.1} | {:.2} |",
            self.levels,
            self.runs,
            self.write,
            self.hit,
            self.miss,
            self.space_mean,
            self.space_most,
            self.scan_first,
            self.scan_last,
            self.merged
        )
    }
}

/// The most bytes that may be written for each byte, the log's and the flush's included: where the
/// bottom is one run, a byte that comes there rewrites half of the ratio's on average.
fn write_bound(strategy: Strategy, levels: usize, ratio: f64) -> Option<f64> {
    let levels = levels as f64;
    match strategy {
        Strategy::Hybrid => Some(2.0 + (levels - 1.0) + f64::midpoint(ratio, 1.0)),
        Strategy::Leveled => Some(2.0 + levels * f64::midpoint(ratio, 1.0)),
        Strategy::SizeTiered => Some(2.0 + levels),
        Strategy::Fifo | Strategy::TimeWindow { .. } => None,
    }
}

/// What was seen of the tables while overwriting.
#[derive(Default)]
struct Seen {
    levels: usize,
    runs: usize,
    looks: u32,
    bytes_sum: f64,
    bytes_most: u64,
}

impl Seen {
    fn look(&mut self, stats: &Stats) {
        self.levels = self.levels.max(stats.levels_max);
        self.runs = self.runs.max(stats.runs_max);
        self.looks += 1;
        self.bytes_sum += stats.table_bytes as f64;
        self.bytes_most = self.bytes_most.max(stats.table_bytes);
    }
}

async fn measure(arguments: &Amplification, env: RealEnv, strategy: Strategy) -> Figures {
    let settings = &arguments.settings();
    let options = Options {
        // Counts are the same, and come sooner.
        fsync: Fsync::Never,
        cache_bytes: settings.cache_bytes,
        memtable_bytes: settings.memtable_bytes * 2,
        separate_from: settings.separate_from,
        wal_segment_bytes: settings.wal_segment_bytes,
        strategy: Some(strategy),
        ..Options::new("shard-00")
    };
    let ratio = options.level_ratio as f64;
    let (store, _) = Store::open(env.clone(), options)
        .await
        .expect("an empty store");

    let seen = RefCell::new(Seen::default());
    write(
        settings,
        &env,
        &store,
        settings.keys,
        Order::Ascending,
        None,
    )
    .await;
    let before = store.stats();
    let updates = settings.keys * arguments.overwrites;
    write(settings, &env, &store, updates, Order::Random, Some(&seen)).await;
    let written = store.stats();
    let hit = read(settings, &store, "user").await;
    let miss = read(settings, &store, "none").await;
    store.flush().await.expect("a flush");
    let unscanned = store.stats();
    let scan_first = scan(&env, &store, 0).await;
    for tenth in 1..9 {
        scan(&env, &store, tenth).await;
    }
    let scan_last = scan(&env, &store, 9).await;
    let merged = store.stats().counts.compacted_bytes - unscanned.counts.compacted_bytes;
    // The others keep what has been overwritten, until it leaves by its age.
    store.set_strategy(TREE, Strategy::Hybrid);
    store.compact().await.expect("a compaction");
    let least = store.stats().table_bytes as f64;
    store.close().await.expect("a clean end");

    let seen = seen.into_inner();
    Figures {
        levels: seen.levels,
        runs: seen.runs,
        write: 1.0 + written_by_tables(&before, &written),
        write_bound: write_bound(strategy, seen.levels, ratio),
        hit,
        miss,
        space_mean: seen.bytes_sum / f64::from(seen.looks.max(1)) / least,
        space_most: seen.bytes_most as f64 / least,
        scan_first,
        scan_last,
        merged: merged as f64 / least,
    }
}

/// Bytes of tables written meanwhile for each byte flushed.
fn written_by_tables(before: &Stats, after: &Stats) -> f64 {
    let flushed = after.counts.flushed_bytes - before.counts.flushed_bytes;
    let compacted = after.counts.compacted_bytes - before.counts.compacted_bytes;
    (flushed + compacted) as f64 / flushed as f64
}

#[derive(Clone, Copy)]
enum Order {
    Ascending,
    Random,
}

/// Writes `count` records.
async fn write(
    settings: &Settings,
    env: &RealEnv,
    store: &Store<RealEnv>,
    count: u32,
    order: Order,
    seen: Option<&RefCell<Seen>>,
) {
    let next = Cell::new(0);
    let client = |client| {
        let next = &next;
        async move {
            let mut numbers = Numbers::new(client + 1);
            while next.get() < count {
                let number = next.replace(next.get() + 1);
                let key = match order {
                    Order::Ascending => key("user", number),
                    Order::Random => numbers.key("user", settings.keys),
                };
                put(env, store, &key, numbers.value(settings.value_bytes), || {}).await;
                if let Some(seen) = seen.filter(|_| number.is_multiple_of(LOOK_EVERY)) {
                    seen.borrow_mut().look(&store.stats());
                }
                env.give_way().await;
            }
        }
    };
    let clients: FuturesUnordered<_> = (0..CLIENTS).map(client).collect();
    clients.for_each(|()| std::future::ready(())).await;
}

/// Tables asked for each read that neither memtable nor cache answered.
async fn read(settings: &Settings, store: &Store<RealEnv>, kind: &str) -> f64 {
    let before = store.stats();
    let mut numbers = Numbers::new(77);
    for _ in 0..READS {
        let key = numbers.key(kind, settings.keys);
        let found = store.get(TREE, Token::of(TREE, &key), &key).await;
        let found = found.expect("a readable store");
        assert_eq!(found.is_some(), kind == "user", "a wrong answer");
    }
    let after = store.stats();
    let asked = after.counts.table_reads - before.counts.table_reads;
    let missed = after.cache.misses - before.cache.misses;
    asked as f64 / missed as f64
}

/// Blocks read from the device for each scan of a tenth of the scans.
async fn scan(env: &RealEnv, store: &Store<RealEnv>, tenth: usize) -> f64 {
    let before = store.stats();
    let mut numbers = Numbers::new(100 + tenth);
    let limits = ScanLimits {
        records: SCAN_RECORDS,
        bytes: 1 << 20,
    };
    let count = SCANS / 10;
    for _ in 0..count {
        let key = numbers.key("scan", u32::MAX);
        let from = ScanFrom::Token(Token::of(TREE, &key));
        let page = store.scan(TREE, from, Token::MAX, limits).await;
        page.expect("a readable store");
        env.give_way().await;
    }
    let read = store.stats().blocks.misses - before.blocks.misses;
    read as f64 / f64::from(count)
}
