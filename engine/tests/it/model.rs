//! Random operations against a sorted map.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;
use torc_engine::{Fsync, Keys, Kind, Options, Record, Store};
use torc_env::Token;

use crate::compaction::EVERY_STRATEGY;
use crate::support::{TREE, get, keys, options, put, scan_all, submit, tombstone, value};

#[derive(Clone, Debug)]
enum Op {
    Put(u8, usize),
    PutWithoutWaiting(u8, usize),
    Delete(u8),
    Get(u8),
    Scan(usize),
    Flush,
    Compact,
    Reopen,
    DropTree,
    Compaction(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let len = prop_oneof![8 => 0..200usize, 1 => 5_000..60_000usize];
    prop_oneof![
        20 => (any::<u8>(), len.clone()).prop_map(|(key, len)| Op::Put(key, len)),
        20 => (any::<u8>(), len).prop_map(|(key, len)| Op::PutWithoutWaiting(key, len)),
        10 => any::<u8>().prop_map(Op::Delete),
        10 => any::<u8>().prop_map(Op::Get),
        4 => (1..50usize).prop_map(Op::Scan),
        3 => Just(Op::Flush),
        2 => Just(Op::Compact),
        2 => Just(Op::Reopen),
        1 => Just(Op::DropTree),
        2 => (0..EVERY_STRATEGY.len()).prop_map(Op::Compaction),
    ]
}

fn key(number: u8) -> Vec<u8> {
    // Of different lengths, sharing prefixes.
    vec![number % 16; 1 + usize::from(number / 16)]
}

/// How many courses of operations, each under options of its own. `TORC_METAMORPHIC_RUNS` says so at night.
fn runs() -> u32 {
    let runs = std::env::var("TORC_METAMORPHIC_RUNS").ok();
    runs.map_or(200, |runs| runs.parse().expect("a number"))
}

/// Options that must not show in any answer.
fn any_options() -> impl Strategy<Value = Options> {
    let memory = (
        prop::sample::select(vec![1 << 20, 2 << 20]),
        prop_oneof![0..64usize << 10, 0..1usize << 20],
        0..=100u8,
    );
    let tables = (
        200..20_000usize,
        prop::sample::select(vec![16 << 10, 64 << 10, 64 << 20]),
    );
    let levels = (
        2..5usize,
        2..9u64,
        prop::sample::select(vec![64 << 10, 1 << 20, 256 << 20]),
    );
    let keys = prop::sample::select(vec![Keys::default(), keys(&[1])]);
    let blobs = (
        prop::sample::select(vec![None, Some(1), Some(100), Some(8 << 10)]),
        1..=100u8,
    );
    (memory, tables, levels, 0..EVERY_STRATEGY.len(), keys, blobs).prop_map(
        |(memory, tables, levels, strategy, keys, blobs)| Options {
            keys,
            separate_from: blobs.0,
            blob_dead_percent: blobs.1,
            memtable_bytes: memory.0,
            cache_bytes: memory.1,
            cache_blocks_percent: memory.2,
            block_bytes: tables.0,
            table_bytes_max: tables.1,
            level0_runs: levels.0,
            level_ratio: levels.1,
            compaction_bytes_max: levels.2,
            strategy: Some(EVERY_STRATEGY[strategy]),
            ..options()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: runs(), ..ProptestConfig::default() })]

    #[test]
    fn a_store_agrees_with_a_sorted_map(
        seed in any::<u64>(),
        ops in prop::collection::vec(op(), 1..250),
        policy in 0..3u8,
        options in any_options(),
    ) {
        let options = Options {
            fsync: [Fsync::Always, Fsync::Group, Fsync::Never][usize::from(policy)],
            ..options
        };
        torc_sim::run(seed, |env| async move {
            let (mut store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
            let mut model: BTreeMap<(Token, Vec<u8>), Record> = BTreeMap::new();
            let mut tickets = Vec::new();
            for (stamp, op) in (1u64..).zip(ops) {
                // Reads see what is acknowledged.
                if matches!(op, Op::Get(_) | Op::Scan(_)) {
                    for ticket in tickets.drain(..) {
                        torc_engine::Ticket::wait(ticket).await.unwrap();
                    }
                }
                match op {
                    Op::Put(number, len) | Op::PutWithoutWaiting(number, len) => {
                        let key = key(number);
                        let record = value(vec![number; len], stamp);
                        model.insert((Token::of(TREE, &key), key.clone()), record.clone());
                        if matches!(op, Op::Put(..)) {
                            put(&store, &key, record).await.unwrap();
                        } else {
                            tickets.push(submit(&store, &key, record).await.unwrap());
                        }
                    }
                    Op::Delete(number) => {
                        let key = key(number);
                        model.insert((Token::of(TREE, &key), key.clone()), tombstone(stamp));
                        put(&store, &key, tombstone(stamp)).await.unwrap();
                    }
                    Op::Get(number) => {
                        let key = key(number);
                        let expected = model
                            .get(&(Token::of(TREE, &key), key.clone()))
                            .filter(|record| record.kind == Kind::Value)
                            .map(|record| record.value.clone());
                        assert_eq!(get(&store, &key).await, expected);
                    }
                    Op::Scan(records) => {
                        let expected: Vec<_> = model
                            .iter()
                            .map(|((_, key), record)| (Bytes::from(key.clone()), record.clone()))
                            .collect();
                        assert_eq!(scan_all(&store, records).await, expected);
                    }
                    Op::Flush => store.flush().await.unwrap(),
                    Op::Compact => store.compact().await.unwrap(),
                    Op::Reopen => {
                        store.close().await.unwrap();
                        tickets.clear();
                        let (opened, recovery) =
                            Store::open(env.clone(), options.clone()).await.unwrap();
                        assert!(!recovery.amnesia);
                        store = opened;
                    }
                    Op::Compaction(number) => store.set_strategy(TREE, EVERY_STRATEGY[number]),
                    Op::DropTree => {
                        store.drop_tree(TREE).await.unwrap();
                        model.clear();
                    }
                }
            }
            for ticket in tickets {
                ticket.wait().await.unwrap();
            }
            let expected: Vec<_> = model
                .iter()
                .map(|((_, key), record)| (Bytes::from(key.clone()), record.clone()))
                .collect();
            assert_eq!(scan_all(&store, 64).await, expected);
        });
    }
}
