//! Our stores: shards of the runtime, each client a task of one.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use torc_engine::{
    Decision, Fsync, Keys, Kind, Options, Record, ScanFrom, ScanLimits, Store, WriteError,
};
use torc_env::{Env as _, Token, TreeId};
use torc_measure::mix::Operation;
use torc_runtime::{RealEnv, Runtime, RuntimeConfig};

use crate::results::Begun;
use crate::workload::{Client, Load, Population, Run, Script, Settings, Tally};

pub const TREE: TreeId = TreeId(1);
/// How long a refused client waits.
const BACK_OFF: Duration = Duration::from_millis(1);
/// How often a shard looks whether the others are there.
const LOOK_INTERVAL: Duration = Duration::from_micros(200);
/// Bytes of a page of a scan.
const PAGE_BYTES: usize = 1 << 20;

/// How long an idle shard looks for work before it sleeps, as in the program.
const SPIN: Duration = Duration::from_micros(50);

/// Runs a script on empty stores in `directory`, a shard on each of so many cores and each with its part of all;
/// encrypted if there are `keys`.
pub fn run(settings: &Settings, script: Script, directory: &Path, keys: &Keys, shards: usize) {
    let config = RuntimeConfig {
        shards: u16::try_from(shards).expect("not so many cores"),
        pin: true,
        spin: SPIN,
        ..RuntimeConfig::new(directory)
    };
    let given = Arc::new(Given {
        settings: settings.part(shards),
        script: script.part(shards),
        keys: keys.clone(),
        directory: directory.to_owned(),
        begin: Meeting::of(shards),
        begun: Mutex::default(),
        end: Meeting::of(shards),
    });
    Runtime::block_on(&config, move |handle| {
        let (given, env) = (Arc::clone(&given), handle.env().clone());
        async move {
            let directory = format!("shard-{}", env.shard());
            measure(&given, &env, &directory).await;
            // The first shard to end would end the others.
            given.begin.join(&env, (), |_| ()).await;
        }
    })
    .expect("a runtime")
}

/// What all shards are given.
struct Given {
    settings: Settings,
    script: Script,
    keys: Keys,
    directory: PathBuf,
    /// Before a load.
    begin: Meeting<()>,
    /// When the load has begun that all are at.
    begun: Mutex<Option<Begun>>,
    /// After a load: what each has done.
    end: Meeting<Done>,
}

/// What the clients of a shard have done, and the keys that it has.
type Done = (Tally, u64);

/// Where shards wait for each other.
struct Meeting<T> {
    shards: usize,
    /// From those that are there.
    brought: Mutex<Vec<T>>,
    /// Times that all have been there.
    count: AtomicUsize,
}

impl<T> Meeting<T> {
    fn of(shards: usize) -> Meeting<T> {
        Meeting {
            shards,
            brought: Mutex::default(),
            count: AtomicUsize::new(0),
        }
    }

    /// Returns when all are there; the last one to come does something with what they brought.
    async fn join(&self, env: &RealEnv, mine: T, last: impl FnOnce(Vec<T>)) {
        let before = self.count.load(Ordering::Acquire);
        if self.is_last(mine, last) {
            return;
        }
        while self.count.load(Ordering::Acquire) == before {
            env.sleep(LOOK_INTERVAL).await;
        }
    }

    fn is_last(&self, mine: T, last: impl FnOnce(Vec<T>)) -> bool {
        let mut brought = self.brought.lock().expect("no shard has panicked");
        brought.push(mine);
        let are_all = brought.len() == self.shards;
        if are_all {
            last(std::mem::take(&mut brought));
            self.count.fetch_add(1, Ordering::Release);
        }
        are_all
    }
}

/// A store with the memory that `settings` give it.
pub async fn open(settings: &Settings, env: &RealEnv, fsync: Fsync, keys: &Keys) -> Store<RealEnv> {
    open_in("shard-00", settings, env, fsync, keys).await
}

async fn open_in(
    directory: &str,
    settings: &Settings,
    env: &RealEnv,
    fsync: Fsync,
    keys: &Keys,
) -> Store<RealEnv> {
    let options = Options {
        fsync,
        keys: keys.clone(),
        cache_bytes: settings.cache_bytes,
        memtable_bytes: settings.memtable_bytes * 2,
        separate_from: settings.separate_from,
        wal_segment_bytes: settings.wal_segment_bytes,
        ..Options::new(directory)
    };
    let (store, _) = Store::open(env.clone(), options)
        .await
        .expect("a store in order");
    store
}

/// One shard's part.
async fn measure(given: &Given, env: &RealEnv, directory: &str) {
    let Given {
        settings,
        script,
        keys,
        ..
    } = given;
    let population = Population::default();
    let policy = |at: usize| {
        let is_bulk = script.loads.get(at).is_some_and(Load::is_bulk);
        if is_bulk { Fsync::Never } else { Fsync::Group }
    };
    let mut store = open_in(directory, settings, env, policy(0), keys).await;
    for (number, load) in script.loads.iter().enumerate() {
        if number == script.settled_after {
            store.flush().await.expect("a flush");
            store.compact().await.expect("a compaction");
        }
        one_load(given, load, env, &store, &population).await;
        if policy(number) != policy(number + 1) {
            store.close().await.expect("a clean end");
            store = open_in(directory, settings, env, policy(number + 1), keys).await;
        }
    }
    store.close().await.expect("a clean end");
}

async fn one_load(
    given: &Given,
    load: &Load,
    env: &RealEnv,
    store: &Store<RealEnv>,
    population: &Population,
) {
    let begun = || given.begun.lock().expect("no shard has panicked");
    let begin = |_| *begun() = Some(Begun::now());
    given.begin.join(env, (), begin).await;
    let begun = begun().expect("all have begun");
    let run = Run::new(&given.settings, load, population, begun.at());
    let mut tally = Tally::new();
    let clients: FuturesUnordered<_> = run
        .clients()
        .map(|number| one_client(&run, env, store, number))
        .collect();
    let add = |mine: Tally| {
        tally.add(&mine);
        std::future::ready(())
    };
    clients.for_each(add).await;
    if load.is_bulk() {
        store.flush().await.expect("a flush");
    }
    let show = |all: Vec<Done>| {
        let (tallies, keys): (Vec<Tally>, Vec<u64>) = all.into_iter().unzip();
        let keys = keys.iter().sum();
        begun.ended(load, &given.settings, keys, &tallies, &given.directory);
    };
    given.end.join(env, (tally, population.count()), show).await;
}

async fn one_client(run: &Run<'_>, env: &RealEnv, store: &Store<RealEnv>, number: usize) -> Tally {
    let mut client = Client::new(run, number);
    while let Some(step) = client.next() {
        let sent = Instant::now();
        let mut scanned = 0;
        match step.operation {
            Operation::Read => {
                let token = Token::of(TREE, &step.key);
                let found = store.get(TREE, token, &step.key).await;
                let found = found.expect("a readable store");
                let expected = step.is_there.then_some(run.settings.value_bytes);
                let found = found.map(|record| record.value.len());
                assert_eq!(found, expected, "a wrong answer");
            }
            Operation::Scan => scanned = scan(store, &step.key, step.records).await,
            Operation::Modify => put(env, store, &step.key, step.value.clone(), || {}).await,
            _ => append(env, store, &step.key, step.value.clone()).await,
        }
        let scanned = u64::try_from(scanned).expect("64 bits");
        client.done(&step, sent.elapsed(), scanned);
        env.give_way().await;
    }
    client.tally
}

/// Bytes of the next so many records from a key on, in the order of the store.
async fn scan(store: &Store<RealEnv>, from: &[u8], records: usize) -> usize {
    let mut from = ScanFrom::Token(Token::of(TREE, from));
    let (mut bytes, mut left) = (0, records);
    while left > 0 {
        let limits = ScanLimits {
            records: left,
            bytes: PAGE_BYTES,
        };
        let page = store.scan(TREE, from, Token::MAX, limits).await;
        let page = page.expect("a readable store");
        let sizes = page
            .entries
            .iter()
            .map(|one| one.key.len() + one.record.value.len());
        bytes += sizes.sum::<usize>();
        left -= page.entries.len();
        match page.next {
            Some(next) => from = next,
            None => break,
        }
    }
    bytes
}

fn record(value: Bytes) -> Record {
    Record {
        kind: Kind::Value,
        stamp: 1,
        expires_at_ms: 0,
        value,
    }
}

/// Writes a key after a look at what it has, as all writes of the program do; on return it is as durable as the
/// store's policy says. Tries again when the store is overloaded.
pub async fn put(
    env: &RealEnv,
    store: &Store<RealEnv>,
    key: &[u8],
    value: Bytes,
    mut refused: impl FnMut(),
) {
    let token = Token::of(TREE, key);
    loop {
        let record = record(value.clone());
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

/// As [`put`], without the look.
async fn append(env: &RealEnv, store: &Store<RealEnv>, key: &[u8], value: Bytes) {
    let record = record(value);
    loop {
        match store.append(TREE, key, &record).await {
            Ok(ticket) => return ticket.wait().await.expect("a durable update"),
            Err(WriteError::Overloaded { .. }) => env.sleep(BACK_OFF).await,
            Err(error) => panic!("an update failed: {error}"),
        }
    }
}
