//! Does the rate hold? Overwrites of random keys as fast as they are accepted, for minutes, on data several
//! times the memory, with a light reader beside them.
//!
//! `cargo run --release -p torc-benches --bin engine -- overwrite [--seconds 600] [--half-seconds 60] [--warm-seconds 20] [--keys 1000000]
//! [--value-bytes 1000] [--blob-from 8192]
//! [--clients 64] [--reads 500] [--directory DIR] [--csv FILE] [--plot FILE.svg] [--beside FILE.csv]`
//!
//! 1. All keys are written once and merged into one run. Then phase 2 is run for `--warm-seconds`, uncounted: filling
//!    is several times as fast, and levels have to take their shape.
//! 2. For `--seconds`, each of the clients updates one key after the other: it reads, writes, and waits until
//!    that is durable. One that is refused tries again a millisecond later.
//! 3. For `--half-seconds`, the same at half the rate that phase 2 had.
//!
//! Beside phases 2 and 3, keys are read at a fixed rate, whether or not the reads before have returned.
//! A read counts as one during compaction if tables were being merged when it began or when it ended. Its latency
//! is taken from when it was due.
//!
//! `--csv` writes a line a second of phase 2, and `--beside` draws such a file of an earlier run into the plot.

mod plot;
mod series;

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use torc_engine::{Decision, Kind, Record, Stats, Store, WriteError};
use torc_env::{Env as _, Token, TreeId};
use torc_runtime::{RealEnv, Runtime, RuntimeConfig};

use crate::torc::open;
use crate::workload::{Keys, Numbers, Settings, key, option};
use series::Series;

const TREE: TreeId = TreeId(1);
/// How long a refused client waits.
const BACK_OFF: Duration = Duration::from_millis(1);

/// What was asked for.
#[derive(Clone)]
struct Arguments {
    seconds: u64,
    half_seconds: u64,
    warm_seconds: u64,
    clients: usize,
    reads_per_s: u32,
    directory: PathBuf,
    csv: Option<PathBuf>,
    plot: Option<PathBuf>,
    beside: Option<PathBuf>,
    settings: Settings,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Arguments {
        let mut arguments = Arguments {
            seconds: 600,
            half_seconds: 60,
            warm_seconds: 20,
            clients: 64,
            reads_per_s: 500,
            directory: std::env::temp_dir(),
            csv: None,
            plot: None,
            beside: None,
            settings: Settings {
                keys: 1_000_000,
                value_bytes: 1000,
                separate_from: Some(8 << 10),
                cache_bytes: 32 << 20,
                memtable_bytes: 16 << 20,
                duration: Duration::ZERO,
            },
        };
        while let Some((word, value)) = option(&mut words) {
            let number = || -> u32 { value.parse().expect("a number") };
            match word.as_str() {
                "--seconds" => arguments.seconds = number().into(),
                "--half-seconds" => arguments.half_seconds = number().into(),
                "--warm-seconds" => arguments.warm_seconds = number().into(),
                "--keys" => arguments.settings.keys = number(),
                "--value-bytes" => {
                    arguments.settings.value_bytes = usize::try_from(number()).expect("64 bits");
                }
                "--blob-from" => {
                    let from = usize::try_from(number()).expect("64 bits");
                    arguments.settings.separate_from = (from > 0).then_some(from);
                }
                "--clients" => arguments.clients = usize::try_from(number()).expect("64 bits"),
                "--reads" => arguments.reads_per_s = number().max(1),
                "--directory" => arguments.directory = value.into(),
                "--csv" => arguments.csv = Some(value.into()),
                "--plot" => arguments.plot = Some(value.into()),
                "--beside" => arguments.beside = Some(value.into()),
                _ => panic!("no such option: {word}"),
            }
        }
        arguments
    }
}

/// The benchmark.
pub fn main(words: impl Iterator<Item = String>) {
    let arguments = Arguments::parse(words);
    let directory = tempfile::tempdir_in(&arguments.directory).expect("a directory for the data");
    let given = arguments.clone();
    let series = Runtime::block_on(&RuntimeConfig::new(directory.path()), move |handle| {
        let (arguments, env) = (arguments.clone(), handle.env().clone());
        async move { measure(&arguments, env).await }
    })
    .expect("a runtime");
    if let Some(csv) = &given.csv {
        std::fs::write(csv, series.csv()).expect("a place for the lines");
    }
    if let Some(path) = &given.plot {
        let beside = given.beside.as_deref().map(read_csv);
        let plot = plot::draw(&series, beside.as_ref());
        std::fs::write(path, plot).expect("a place for the plot");
    }
}

fn read_csv(path: &Path) -> Series {
    let text = std::fs::read_to_string(path).expect("the lines of an earlier run");
    Series::parse(&text).expect("lines as this benchmark writes them")
}

async fn measure(arguments: &Arguments, env: RealEnv) -> Series {
    let store = open(&arguments.settings, &env, torc_engine::Keys::default()).await;
    fill(arguments, &env, &store).await;
    store.flush().await.expect("a flush");
    store.compact().await.expect("a compaction");

    Load::run(arguments, &env, &store, arguments.warm_seconds, None).await;
    let full = Load::run(arguments, &env, &store, arguments.seconds, None).await;
    series::print_rates(&full);
    full.print_reads("at full speed");
    let rate = full.mean() / 2.0;
    if arguments.half_seconds > 0 {
        let half = Load::run(arguments, &env, &store, arguments.half_seconds, Some(rate)).await;
        half.print_reads("at half speed");
    }
    let stats = store.stats();
    println!(
        "on the disk: tables {} MiB, blobs {} MiB, {} MiB of them dead",
        stats.table_bytes >> 20,
        stats.blob_bytes >> 20,
        stats.blob_dead_bytes >> 20
    );
    store.close().await.expect("a clean end");
    full
}

/// Writes every key once.
async fn fill(arguments: &Arguments, env: &RealEnv, store: &Store<RealEnv>) {
    let next = Cell::new(0);
    let clients: FuturesUnordered<_> = (0..arguments.clients)
        .map(|client| {
            let next = &next;
            async move {
                let mut numbers = Numbers::new(client + 1000);
                while next.get() < arguments.settings.keys {
                    let key = key("user", next.replace(next.get() + 1));
                    let value = Bytes::from(numbers.value(&arguments.settings));
                    put(env, store, &key, value, || {}).await;
                }
            }
        })
        .collect();
    clients.for_each(|()| std::future::ready(())).await;
}

/// A phase.
struct Load<'a> {
    arguments: &'a Arguments,
    env: &'a RealEnv,
    store: &'a Store<RealEnv>,
    begun: Instant,
    duration: Duration,
    /// Updates a second of each client; as many as can be if `None`.
    rate: Option<f64>,
    series: RefCell<Series>,
}

impl Load<'_> {
    /// Runs a phase; `rate` is that of all clients.
    async fn run(
        arguments: &Arguments,
        env: &RealEnv,
        store: &Store<RealEnv>,
        seconds: u64,
        rate: Option<f64>,
    ) -> Series {
        let before = store.stats();
        let load = Load {
            arguments,
            env,
            store,
            begun: Instant::now(),
            duration: Duration::from_secs(seconds),
            rate: rate.map(|rate| rate / arguments.clients as f64),
            series: RefCell::new(Series::new(seconds)),
        };
        let clients: FuturesUnordered<_> = (0..arguments.clients)
            .map(|client| load.write(client))
            .collect();
        let clients = clients.for_each(|()| std::future::ready(()));
        futures_util::join!(clients, load.read(), load.watch());
        let mut series = load.series.into_inner();
        series.end(written(&before, &store.stats()));
        series
    }

    fn is_over(&self) -> bool {
        self.begun.elapsed() >= self.duration
    }

    async fn write(&self, client: usize) {
        let mut numbers = Numbers::new(client + 1);
        let mut done = 0_u32;
        while !self.is_over() {
            if let Some(rate) = self.rate {
                let due = self.begun + Duration::from_secs_f64(f64::from(done) / rate);
                let wait = due.saturating_duration_since(Instant::now());
                self.env.sleep(wait).await;
            }
            let key = numbers.key(&self.arguments.settings, Keys::Uniform);
            let value = Bytes::from(numbers.value(&self.arguments.settings));
            let sent = Instant::now();
            let refused = || self.series.borrow_mut().refused(self.begun.elapsed());
            put(self.env, self.store, &key, value, refused).await;
            let (at, taken) = (self.begun.elapsed(), sent.elapsed());
            self.series.borrow_mut().written(at, taken);
            done += 1;
            self.env.give_way().await;
        }
    }

    async fn read(&self) {
        let reads = FuturesUnordered::new();
        let mut reads = std::pin::pin!(reads);
        let mut numbers = Numbers::new(9999);
        let interval = Duration::from_secs(1) / self.arguments.reads_per_s;
        let mut due = self.begun;
        while !self.is_over() {
            due += interval;
            let wait = due.saturating_duration_since(Instant::now());
            let mut timer = std::pin::pin!(self.env.sleep(wait));
            // What is on its way goes on while the next one is not due.
            loop {
                let next = async { reads.next().await.is_some() };
                match futures_util::future::select(timer.as_mut(), std::pin::pin!(next)).await {
                    futures_util::future::Either::Left(_) => break,
                    futures_util::future::Either::Right((true, _)) => {}
                    futures_util::future::Either::Right((false, _)) => {
                        timer.as_mut().await;
                        break;
                    }
                }
            }
            let key = numbers.key(&self.arguments.settings, Keys::Uniform);
            reads.push(self.read_one(due, key));
        }
        while reads.next().await.is_some() {}
    }

    async fn read_one(&self, due: Instant, key: Vec<u8>) {
        let at_begin = self.store.is_compacting();
        let found = self.store.get(TREE, Token::of(TREE, &key), &key).await;
        assert!(found.expect("a readable store").is_some(), "a lost key");
        let is_compacting = at_begin || self.store.is_compacting();
        let mut series = self.series.borrow_mut();
        series.read(self.begun.elapsed(), due.elapsed(), is_compacting);
    }

    /// Looks at the store once a second.
    async fn watch(&self) {
        for second in 0..self.duration.as_secs() {
            let end = self.begun + Duration::from_secs(second + 1);
            let wait = end.saturating_duration_since(Instant::now());
            self.env.sleep(wait).await;
            let stats = self.store.stats();
            self.series.borrow_mut().look(second, &stats);
        }
    }
}

/// Bytes written to tables, and to the log, meanwhile, and bytes that flushes wrote of it.
fn written(before: &Stats, after: &Stats) -> series::Written {
    let (before, after) = (&before.counts, &after.counts);
    series::Written {
        log: after.wal_bytes - before.wal_bytes,
        flushed: after.flushed_bytes - before.flushed_bytes,
        compacted: after.compacted_bytes - before.compacted_bytes,
    }
}

/// Writes a key; on return it is as durable as the store's policy says. Tries again when the store is overloaded.
pub async fn put(
    env: &RealEnv,
    store: &Store<RealEnv>,
    key: &[u8],
    value: Bytes,
    mut refused: impl FnMut(),
) {
    let token = Token::of(TREE, key);
    loop {
        let record = Record {
            kind: Kind::Value,
            stamp: 1,
            expires_at_ms: 0,
            value: value.clone(),
        };
        match store
            .update(TREE, token, key, |_| Decision::Write(record, ()))
            .await
        {
            Ok(((), ticket)) => return ticket.wait().await.expect("a durable update"),
            Err(WriteError::Overloaded { .. }) => {
                refused();
                env.sleep(BACK_OFF).await;
            }
            Err(error) => panic!("an update failed: {error}"),
        }
    }
}
