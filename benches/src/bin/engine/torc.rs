//! Our store: one shard on the runtime, each client a task of it.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use torc_engine::{Decision, Fsync, Keys, Kind, Options, Record, Store};
use torc_env::{Env as _, Token, TreeId};
use torc_runtime::{RealEnv, Runtime, RuntimeConfig};

use crate::report::{Begun, Report};
use crate::workload::{Latencies, Load, Numbers, READS, Settings, Step, WRITES};

const TREE: TreeId = TreeId(1);

/// What all clients of a load share.
struct Run<'a> {
    settings: &'a Settings,
    env: &'a RealEnv,
    store: &'a Store<RealEnv>,
    load: Load,
    end: Instant,
    filled: Cell<u32>,
    latencies: RefCell<Latencies>,
}

/// Encrypted if there are `keys`.
pub fn run(settings: &Settings, directory: &Path, keys: Keys) -> Report {
    let settings = settings.clone();
    Runtime::block_on(&RuntimeConfig::new(directory), move |handle| {
        let (settings, env) = (settings.clone(), handle.env().clone());
        let keys = keys.clone();
        async move {
            let mut report = Report::default();
            measure(&settings, env, keys, &mut report).await;
            report
        }
    })
    .expect("a runtime")
}

/// An empty store with the memory that `settings` give it.
pub async fn open(settings: &Settings, env: &RealEnv, keys: Keys) -> Store<RealEnv> {
    let options = Options {
        fsync: Fsync::Group,
        keys,
        cache_bytes: settings.cache_bytes,
        memtable_bytes: settings.memtable_bytes * 2,
        separate_from: settings.separate_from,
        ..Options::new("shard-00")
    };
    let (store, _) = Store::open(env.clone(), options)
        .await
        .expect("an empty store");
    store
}

async fn measure(settings: &Settings, env: RealEnv, keys: Keys, report: &mut Report) {
    let name = if keys.active().is_some() {
        "torc encrypted"
    } else {
        "torc"
    };
    let store = open(settings, &env, keys).await;
    for load in WRITES {
        run_load(settings, &env, (name, &store), load, report).await;
    }
    store.flush().await.expect("a flush");
    store.compact().await.expect("a compaction");
    for load in READS {
        run_load(settings, &env, (name, &store), load, report).await;
    }
    let stats = store.stats();
    println!(
        "{:<14} {} tables, {} KiB of filters and fences, {} flushes, {} compactions",
        "",
        stats.tables,
        stats.table_memory_bytes >> 10,
        stats.counts.flushes,
        stats.counts.compactions,
    );
    store.close().await.expect("a clean end");
}

async fn run_load(
    settings: &Settings,
    env: &RealEnv,
    (name, store): (&'static str, &Store<RealEnv>),
    load: Load,
    report: &mut Report,
) {
    let begun = Begun::now();
    let run = Run {
        settings,
        env,
        store,
        load,
        end: begun.at() + settings.duration,
        filled: Cell::new(0),
        latencies: RefCell::new(Latencies::new()),
    };
    let clients: FuturesUnordered<_> = (0..load.clients())
        .map(|client| one_client(&run, Numbers::new(client + 1)))
        .collect();
    clients.for_each(|()| std::future::ready(())).await;
    report.add(name, load, &run.latencies.borrow(), &begun);
}

async fn one_client(run: &Run<'_>, mut numbers: Numbers) {
    let is_timed = !matches!(run.load, Load::Fill { .. });
    let number = || run.filled.replace(run.filled.get() + 1);
    while let Some(step) = run.load.next(run.settings, &mut numbers, number) {
        let sent = Instant::now();
        let is_put = match step {
            // Ours always decides on what is there.
            Step::Insert { key, value } | Step::Update { key, value } => {
                put(run.store, &key, value).await;
                true
            }
            Step::Get { key, is_there } => {
                let token = Token::of(TREE, &key);
                let found = run.store.get(TREE, token, &key).await;
                assert_eq!(found.expect("a readable store").is_some(), is_there);
                false
            }
        };
        let now = Instant::now();
        run.latencies.borrow_mut().record(is_put, now - sent);
        if is_timed && now >= run.end {
            return;
        }
        run.env.give_way().await;
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
