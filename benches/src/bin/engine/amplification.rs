//! What each strategy of compaction writes, reads and keeps, beside the bounds that the design gives.
//!
//! `cargo run --release -p torc-benches --bin engine -- amplification [--keys 200000] [--value-bytes 400]
//! [--overwrites 3] [--directory DIR]`
//!
//! For each strategy: every key is written once, then overwritten at random so many times the number of keys, with
//! memtables of 1 MiB so that all levels come into use; then keys are read that are there and that are
//! not, with the levels as the overwriting left them. What is printed are counts, so it does not matter how
//! fast the machine is, nor who else uses it.
//!
//! - *write*: bytes of the log and of tables for each byte that left memory, while overwriting.
//! - *hit*, *miss*: tables asked, each about one device read, for each read that neither memtable nor
//!   cache answered.
//! - *space*: bytes of tables, mean and most while overwriting, over what is left after a full compaction.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use torc_engine::compaction::Strategy;
use torc_engine::{Fsync, Options, Stats, Store};
use torc_env::{Env as _, Token, TreeId};
use torc_runtime::{RealEnv, Runtime, RuntimeConfig};

use crate::overwrite::put;
use crate::workload::{Keys, Numbers, Settings, key, option};

const TREE: TreeId = TreeId(1);
const CLIENTS: usize = 16;
/// Updates between two looks at the size of the tables.
const LOOK_EVERY: u32 = 500;
/// Reads of each kind.
const READS: u32 = 20_000;

/// What was asked for.
#[derive(Clone)]
struct Arguments {
    overwrites: u32,
    directory: PathBuf,
    settings: Settings,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Arguments {
        let mut arguments = Arguments {
            overwrites: 3,
            directory: std::env::temp_dir(),
            settings: Settings {
                keys: 200_000,
                value_bytes: 400,
                separate_from: Some(8 << 10),
                cache_bytes: 1 << 20,
                memtable_bytes: 1 << 20,
                duration: std::time::Duration::ZERO,
            },
        };
        while let Some((word, value)) = option(&mut words) {
            let number = || -> u32 { value.parse().expect("a number") };
            match word.as_str() {
                "--keys" => arguments.settings.keys = number(),
                "--value-bytes" => {
                    arguments.settings.value_bytes = usize::try_from(number()).expect("64 bits");
                }
                "--overwrites" => arguments.overwrites = number(),
                "--directory" => arguments.directory = value.into(),
                _ => panic!("no such option: {word}"),
            }
        }
        arguments
    }
}

/// The benchmark.
pub fn main(words: impl Iterator<Item = String>) {
    let arguments = Arguments::parse(words);
    let strategies = [
        ("hybrid", Strategy::Hybrid),
        ("leveled", Strategy::Leveled),
        ("size_tiered", Strategy::SizeTiered),
        ("fifo", Strategy::Fifo),
        ("time_window", Strategy::TimeWindow { stamps: 1 }),
    ];
    println!("| strategy | levels | runs | write (bound) | hit | miss | space, mean / most |");
    println!("|---|---|---|---|---|---|---|");
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
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bound = self
            .write_bound
            .map_or("none".to_owned(), |bound| format!("{bound:.1}"));
        write!(
            f,
            "| {} | {} | {:.2} ({bound}) | {:.4} | {:.4} | {:.2} / {:.2} |",
            self.levels,
            self.runs,
            self.write,
            self.hit,
            self.miss,
            self.space_mean,
            self.space_most
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

async fn measure(arguments: &Arguments, env: RealEnv, strategy: Strategy) -> Figures {
    let settings = &arguments.settings;
    let options = Options {
        // Counts are the same, and come sooner.
        fsync: Fsync::Never,
        cache_bytes: settings.cache_bytes,
        memtable_bytes: settings.memtable_bytes * 2,
        separate_from: settings.separate_from,
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
    let hit = read(settings, &store, Keys::Uniform).await;
    let miss = read(settings, &store, Keys::Absent).await;
    store.flush().await.expect("a flush");
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
                    Order::Random => numbers.key(settings, Keys::Uniform),
                };
                put(
                    env,
                    store,
                    &key,
                    Bytes::from(numbers.value(settings)),
                    || {},
                )
                .await;
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
async fn read(settings: &Settings, store: &Store<RealEnv>, keys: Keys) -> f64 {
    let before = store.stats();
    let mut numbers = Numbers::new(77);
    for _ in 0..READS {
        let key = numbers.key(settings, keys);
        let found = store.get(TREE, Token::of(TREE, &key), &key).await;
        let found = found.expect("a readable store");
        assert_eq!(found.is_some(), keys != Keys::Absent, "a wrong answer");
    }
    let after = store.stats();
    let asked = after.counts.table_reads - before.counts.table_reads;
    let missed = after.cache.misses - before.cache.misses;
    asked as f64 / missed as f64
}
