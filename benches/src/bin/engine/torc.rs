//! Our store: one shard on the runtime, each writer and reader a task of it.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use torc_engine::{Decision, Fsync, Kind, Options, Record, Store};
use torc_env::{Env as _, Token, TreeId};
use torc_runtime::{RealEnv, Runtime, RuntimeConfig};

use crate::workload::{self, GETS, Keys, Load, Numbers, PUTS, Settings};

const TREE: TreeId = TreeId(1);
/// Tasks that fill the store.
const FILLERS: usize = 64;

pub fn run(settings: &Settings, directory: &Path) {
    let config = RuntimeConfig::new(directory);
    let settings = settings.clone();
    Runtime::block_on(&config, move |handle| {
        let (settings, env) = (settings.clone(), handle.env().clone());
        async move { measure(&settings, env).await }
    })
    .expect("a runtime");
}

async fn measure(settings: &Settings, env: RealEnv) {
    let options = Options {
        fsync: Fsync::Group,
        cache_bytes: settings.cache_bytes,
        memtable_bytes: settings.memtable_bytes * 2,
        ..Options::new("shard-00")
    };
    let (store, _) = Store::open(env.clone(), options)
        .await
        .expect("an empty store");
    fill(settings, &store).await;
    for load in PUTS {
        run_load(settings, &env, &store, load).await;
    }
    store.compact().await.expect("a compaction");
    for load in GETS {
        run_load(settings, &env, &store, load).await;
    }
    let stats = store.stats();
    println!(
        "{:<10} {} tables, {} KiB of filters and fences, {} flushes, {} compactions",
        "",
        stats.tables,
        stats.table_memory_bytes >> 10,
        stats.counts.flushes,
        stats.counts.compactions,
    );
    store.close().await.expect("a clean end");
}

/// Puts every key once, from many tasks.
async fn fill(settings: &Settings, store: &Store<RealEnv>) {
    let next = Rc::new(Cell::new(0));
    let latencies = Rc::new(RefCell::new(workload::histogram()));
    let begun = Instant::now();
    let tasks: FuturesUnordered<_> = (0..FILLERS)
        .map(|task| {
            let (next, latencies) = (next.clone(), latencies.clone());
            async move {
                let mut numbers = Numbers::new(task + 1000);
                loop {
                    let number = next.get();
                    if number >= settings.keys {
                        return;
                    }
                    next.set(number + 1);
                    let key = workload::key(number);
                    let value = numbers.value(settings);
                    let sent = Instant::now();
                    put(store, &key, value).await;
                    workload::record(&mut latencies.borrow_mut(), sent.elapsed());
                }
            }
        })
        .collect();
    tasks.for_each(|()| std::future::ready(())).await;
    let load = format!("fill, synced, {FILLERS} writers");
    workload::print("torc", &load, &latencies.borrow(), begun.elapsed());
}

async fn run_load(settings: &Settings, env: &RealEnv, store: &Store<RealEnv>, load: Load) {
    let latencies = &RefCell::new(workload::histogram());
    let (Load::Put { writers: count } | Load::Get { readers: count, .. }) = load;
    let begun = Instant::now();
    let end = begun + settings.duration;
    let tasks: FuturesUnordered<_> = (0..count)
        .map(|task| async move {
            let numbers = Numbers::new(task + 1);
            one_client(settings, env, store, load, end, numbers, latencies).await;
        })
        .collect();
    tasks.for_each(|()| std::future::ready(())).await;
    workload::print("torc", &load.name(), &latencies.borrow(), begun.elapsed());
}

async fn one_client(
    settings: &Settings,
    env: &RealEnv,
    store: &Store<RealEnv>,
    load: Load,
    end: Instant,
    mut numbers: Numbers,
    latencies: &RefCell<Histogram<u64>>,
) {
    loop {
        let sent = match load {
            Load::Put { .. } => {
                let key = numbers.key(settings, Keys::Uniform);
                let value = numbers.value(settings);
                let sent = Instant::now();
                put(store, &key, value).await;
                sent
            }
            Load::Get { keys, .. } => {
                let key = numbers.key(settings, keys);
                let sent = Instant::now();
                let token = Token::of(TREE, &key);
                let found = store
                    .get(TREE, token, &key)
                    .await
                    .expect("a readable store");
                assert_eq!(found.is_none(), keys == Keys::Absent);
                sent
            }
        };
        let now = Instant::now();
        workload::record(&mut latencies.borrow_mut(), now - sent);
        if now >= end {
            return;
        }
        env.give_way().await;
    }
}

async fn put(store: &Store<RealEnv>, key: &[u8], value: Vec<u8>) {
    let record = Record {
        kind: Kind::Value,
        stamp: 1,
        expires_at_ms: 0,
        value: Bytes::from(value),
    };
    let token = Token::of(TREE, key);
    let (_, ticket) = store
        .update(TREE, token, key, |_| Decision::Write(record, ()))
        .await
        .expect("an accepted update");
    ticket.wait().await.expect("a durable update");
}
