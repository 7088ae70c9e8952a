//! Random operations against a sorted map.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;
use torc_engine::{Fsync, Kind, Options, Record, Store};
use torc_env::Token;

use crate::compaction::EVERY_STRATEGY;
use crate::support::{TREE, get, options, put, scan_all, submit, tombstone, value};

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

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_store_agrees_with_a_sorted_map(
        seed in any::<u64>(),
        ops in prop::collection::vec(op(), 1..250),
        policy in 0..3u8,
    ) {
        let options = Options {
            fsync: [Fsync::Always, Fsync::Group, Fsync::Never][usize::from(policy)],
            ..options()
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
