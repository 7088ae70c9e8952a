//! Does the rate hold? Overwrites of random keys as fast as they are accepted, for minutes, on data several
//! times the memory, with a light reader beside them.
//!
//! `cargo run --release -p torc-benches --bin engine -- overwrite [--directory DIR] [--plot FILE.svg]`; more with
//! `--help`.
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

use clap::Args;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use torc_engine::{Fsync, Keys, Stats, Store};
use torc_env::{Env as _, Token};
use torc_runtime::{RealEnv, Runtime, RuntimeConfig};

use crate::torc::{TREE, open, put};
use crate::workload::{Durations, Numbers, Settings, key};
use series::Series;

/// Whether the rate of overwrites holds for minutes
#[derive(Args, Clone, Debug)]
pub struct Overwrite {
    /// As fast as they are accepted
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// At half the rate that it had
    #[arg(long, default_value_t = 60)]
    half_seconds: u64,
    /// Before it counts
    #[arg(long, default_value_t = 20)]
    warm_seconds: u64,
    #[arg(long, default_value_t = 1_000_000)]
    keys: u32,
    #[arg(long, default_value_t = 1000)]
    value_bytes: usize,
    /// Bytes from which on a value goes into a blob; 0: none does
    #[arg(long, default_value_t = 8 << 10)]
    blob_from: usize,
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// A second, beside the clients
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    reads: u32,
    /// On the disk that is measured
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// For a line a second
    #[arg(long)]
    csv: Option<PathBuf>,
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Lines of an earlier run, for the plot
    #[arg(long)]
    beside: Option<PathBuf>,
}

impl Overwrite {
    fn settings(&self) -> Settings {
        Settings {
            keys: self.keys,
            value_bytes: self.value_bytes,
            separate_from: (self.blob_from > 0).then_some(self.blob_from),
            cache_bytes: 32 << 20,
            memtable_bytes: 16 << 20,
            wal_segment_bytes: 64 << 20,
            durations: Durations::default(),
        }
    }
}

/// The benchmark.
pub fn main(arguments: Overwrite) {
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

async fn measure(arguments: &Overwrite, env: RealEnv) -> Series {
    let settings = arguments.settings();
    let store = open(&settings, &env, Fsync::Group, &Keys::default()).await;
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
async fn fill(arguments: &Overwrite, env: &RealEnv, store: &Store<RealEnv>) {
    let next = Cell::new(0);
    let clients: FuturesUnordered<_> = (0..arguments.clients)
        .map(|client| {
            let next = &next;
            async move {
                let mut numbers = Numbers::new(client + 1000);
                while next.get() < arguments.keys {
                    let key = key("user", next.replace(next.get() + 1));
                    let value = numbers.value(arguments.value_bytes);
                    put(env, store, &key, value, || {}).await;
                }
            }
        })
        .collect();
    clients.for_each(|()| std::future::ready(())).await;
}

/// A phase.
struct Load<'a> {
    arguments: &'a Overwrite,
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
        arguments: &Overwrite,
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
            let key = numbers.key("user", self.arguments.keys);
            let value = numbers.value(self.arguments.value_bytes);
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
        let interval = Duration::from_secs(1) / self.arguments.reads;
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
            let key = numbers.key("user", self.arguments.keys);
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
