//! Our store: one shard on the runtime, each client a task of it.

use std::path::Path;
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
use crate::workload::{Client, Population, Run, Script, Settings, Tally};

pub const TREE: TreeId = TreeId(1);
/// How long a refused client waits.
const BACK_OFF: Duration = Duration::from_millis(1);
/// Bytes of a page of a scan.
const PAGE_BYTES: usize = 1 << 20;

/// Runs a script on an empty store in `directory`; encrypted if there are `keys`.
pub fn run(settings: &Settings, script: Script, directory: &Path, keys: &Keys) {
    let given = (settings.clone(), script, keys.clone(), directory.to_owned());
    let given = std::sync::Arc::new(given);
    Runtime::block_on(&RuntimeConfig::new(directory), move |handle| {
        let (given, env) = (std::sync::Arc::clone(&given), handle.env().clone());
        async move {
            let (settings, script, keys, directory) = &*given;
            measure(settings, script, env, keys, directory).await
        }
    })
    .expect("a runtime")
}

/// A store with the memory that `settings` give it.
pub async fn open(settings: &Settings, env: &RealEnv, fsync: Fsync, keys: &Keys) -> Store<RealEnv> {
    let options = Options {
        fsync,
        keys: keys.clone(),
        cache_bytes: settings.cache_bytes,
        memtable_bytes: settings.memtable_bytes * 2,
        separate_from: settings.separate_from,
        wal_segment_bytes: settings.wal_segment_bytes,
        ..Options::new("shard-00")
    };
    let (store, _) = Store::open(env.clone(), options)
        .await
        .expect("a store in order");
    store
}

async fn measure(
    settings: &Settings,
    script: &Script,
    env: RealEnv,
    keys: &Keys,
    directory: &Path,
) {
    let population = Population::new(script.is_scattered);
    let policy = |at: usize| {
        let is_bulk = script.loads.get(at).is_some_and(|load| load.is_bulk);
        if is_bulk { Fsync::Never } else { Fsync::Group }
    };
    let mut store = open(settings, &env, policy(0), keys).await;
    for (number, load) in script.loads.iter().enumerate() {
        if number == script.settled_after {
            store.flush().await.expect("a flush");
            store.compact().await.expect("a compaction");
        }
        let begun = Begun::now();
        let run = Run::new(settings, load, &population, begun.at());
        let mut tally = Tally::new();
        let clients: FuturesUnordered<_> = run
            .clients()
            .map(|number| one_client(&run, &env, &store, number))
            .collect();
        let add = |mine: Tally| {
            tally.add(&mine);
            std::future::ready(())
        };
        clients.for_each(add).await;
        if load.is_bulk {
            store.flush().await.expect("a flush");
        }
        begun.ended(&run, &tally, directory);
        if policy(number) != policy(number + 1) {
            store.close().await.expect("a clean end");
            store = open(settings, &env, policy(number + 1), keys).await;
        }
    }
    store.close().await.expect("a clean end");
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
