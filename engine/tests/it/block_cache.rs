//! The block cache: what it saves, how much it holds, and who leaves it alone.

use std::path::PathBuf;

use torc_engine::cache::CacheStats;
use torc_engine::compaction::Strategy;
use torc_engine::{Options, Stats, Store};
use torc_sim::{DiskOptions, HostId, SimEnv, Simulation};

use crate::faults::{run, world};
use crate::support::{TREE, get, options, put, scan_all, value};
use crate::table_support::noise;

const KEYS: u64 = 300;

/// Room for all blocks, in the tenth of their share that what was never hit has. Nothing is merged by itself.
fn roomy() -> Options {
    Options {
        cache_bytes: 8 << 20,
        strategy: None,
        ..options()
    }
}

fn key(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

/// Writes every key with a value of so many bytes.
async fn fill(store: &Store<SimEnv>, bytes: usize) {
    for number in 0..KEYS {
        let record = value(noise(number, bytes), 1);
        put(store, key(number), record).await.unwrap();
    }
    store.flush().await.unwrap();
}

/// A store in which nothing is cached, with several runs if `is_spread`.
async fn filled(env: &SimEnv, options: Options, bytes: usize, is_spread: bool) -> Store<SimEnv> {
    let (store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
    if is_spread {
        for part in 0..4 {
            for number in (part..KEYS).step_by(4) {
                let record = value(noise(number, bytes), 1);
                put(&store, key(number), record).await.unwrap();
            }
            store.flush().await.unwrap();
        }
    } else {
        fill(&store, bytes).await;
    }
    store.close().await.unwrap();
    Store::open(env.clone(), options).await.unwrap().0
}

/// From now on no block of a table can be read.
fn damage_tables(simulation: &Simulation, host: HostId) {
    let files = simulation.files(host).into_iter();
    let is_table = |(path, _): &(PathBuf, u64)| path.extension().is_some_and(|ext| ext == "table");
    for (path, len) in files.filter(is_table) {
        for sector in (0..len).step_by(4096) {
            assert!(simulation.flip_bits(host, &path, sector + 100, 1));
        }
    }
}

async fn get_all(store: &Store<SimEnv>, bytes: usize) {
    for number in 0..KEYS {
        let found = get(store, key(number)).await.unwrap();
        assert_eq!(found, noise(number, bytes), "{number}");
    }
}

/// What lookups and fills change.
fn use_of(stats: &Stats) -> (u64, u64, u64) {
    let CacheStats {
        hits,
        misses,
        entries,
        ..
    } = stats.blocks;
    (hits, misses, entries)
}

#[test]
fn a_get_of_a_large_value_costs_one_read_once_its_block_was_seen() {
    let (simulation, host) = world(1, DiskOptions::default());
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let store = filled(&env, roomy(), 5000, false).await;
        get_all(&store, 5000).await;
        let stats = store.stats();
        let blocks = stats.blocks.entries;
        assert!((1..10).contains(&blocks), "{stats:?}");
        assert_eq!(stats.counts.table_reads, blocks);
        assert_eq!(stats.counts.blob_reads, KEYS);
        assert_eq!(stats.counts.blob_gets, KEYS);
        assert_eq!(stats.blocks.hits, KEYS - blocks);
        assert!(stats.read_amplification() < 1.05, "{stats:?}");
        // No counter says it: what can no longer be read is not.
        store.close().await.unwrap();
        let (store, _) = Store::open(env, roomy()).await.unwrap();
        for number in (0..KEYS).step_by(3) {
            get(&store, key(number)).await.unwrap();
        }
        assert_eq!(store.stats().blocks.entries, blocks, "all of them");
        damage_tables(&harness, host);
        get_all(&store, 5000).await;
        assert!(store.scrub(1 << 30).await.unwrap().damaged > 0);
    });
}

#[test]
fn a_scan_that_is_repeated_reads_no_block_again() {
    let (simulation, host) = world(2, DiskOptions::default());
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let store = filled(&env, roomy(), 200, true).await;
        let found = scan_all(&store, 50).await;
        assert_eq!(u64::try_from(found.len()).unwrap(), KEYS);
        damage_tables(&harness, host);
        assert_eq!(scan_all(&store, 50).await, found);
        assert_eq!(scan_all(&store, 7).await, found);
        assert!(store.stats().blocks.hits > 0);
    });
}

#[test]
fn gets_of_values_that_stand_in_their_blocks_leave_none_behind() {
    torc_sim::run(3, |env| async move {
        let store = filled(&env, roomy(), 200, false).await;
        get_all(&store, 200).await;
        let stats = store.stats();
        assert_eq!(stats.blocks.entries, 0);
        assert_eq!(stats.counts.table_reads, KEYS);
    });
}

#[test]
fn both_caches_together_keep_their_budget_and_records_get_what_blocks_leave() {
    for (seed, percent) in [(4, 0), (5, 10), (6, 50), (7, 100)] {
        torc_sim::run(seed, move |env| async move {
            const BUDGET: u64 = 256 << 10;
            let options = Options {
                cache_bytes: 256 << 10,
                cache_blocks_percent: percent,
                block_bytes: 500,
                strategy: None,
                ..options()
            };
            let store = filled(&env, options, 300, true).await;
            let check = |what: &str| {
                let stats = store.stats();
                let (blocks, records) = (stats.blocks.bytes, stats.cache.bytes);
                assert!(blocks + records <= BUDGET, "{what}: {stats:?}");
                assert!(
                    blocks <= BUDGET * u64::from(percent) / 100,
                    "{what}: {stats:?}"
                );
                stats
            };
            let mut most = 0;
            for round in 0..6 {
                for number in 0..KEYS {
                    get(&store, key(number)).await.unwrap();
                    check("get");
                }
                scan_all(&store, 10 + round).await;
                let stats = check("scan");
                most = most.max(stats.cache.bytes);
                assert_eq!(stats.blocks.entries == 0, percent == 0, "{stats:?}");
            }
            if percent == 0 {
                assert!(most > BUDGET / 2, "{most}");
            }
            store.drop_tree(TREE).await.unwrap();
            let stats = check("drop");
            assert_eq!((stats.blocks.entries, stats.cache.entries), (0, 0));
        });
    }
}

#[test]
fn blocks_of_removed_tables_go_and_merges_and_scrubs_leave_the_others_alone() {
    torc_sim::run(8, |env| async move {
        let store = filled(&env, roomy(), 5000, true).await;
        get_all(&store, 5000).await;
        scan_all(&store, 100).await;
        let before = use_of(&store.stats());
        assert!(before.2 >= 4);
        assert_eq!(store.scrub(1 << 30).await.unwrap().damaged, 0);
        assert_eq!(use_of(&store.stats()), before);
        store.set_strategy(TREE, Strategy::Hybrid);
        store.compact().await.unwrap();
        assert_eq!(use_of(&store.stats()), (before.0, before.1, 0));
        get_all(&store, 5000).await;
        scan_all(&store, 100).await;
        let stats = store.stats();
        assert!(stats.blocks.entries > 0);
        store.drop_tree(TREE).await.unwrap();
        assert_eq!(store.stats().blocks.entries, 0);
    });
}
