//! What a store promises as long as nothing breaks.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use torc_engine::compaction::Strategy;
use torc_engine::{
    Decision, Fsync, Options, PurgeFloors, Record, ScanFrom, ScanLimits, Store, WriteError,
};
use torc_env::{Class, Disk, Env, Token, TreeId};

use crate::support::{TREE, get, options, put, scan_all, submit, tombstone, value};

#[test]
fn what_is_written_is_read_and_survives_a_reopen() {
    torc_sim::run(1, |env| async move {
        let (store, recovery) = Store::open(env.clone(), options()).await.unwrap();
        assert_eq!(recovery, Default::default());
        put(&store, "a", value("1", 1)).await.unwrap();
        put(&store, "b", value("2", 2)).await.unwrap();
        put(&store, "a", value("3", 3)).await.unwrap();
        put(&store, "b", tombstone(4)).await.unwrap();
        assert_eq!(get(&store, "a").await.unwrap(), "3");
        assert_eq!(get(&store, "b").await, None);
        assert_eq!(get(&store, "c").await, None);
        store.close().await.unwrap();

        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert!(recovery.clean && !recovery.amnesia);
        assert_eq!(recovery.records, 4);
        assert_eq!(get(&store, "a").await.unwrap(), "3");
        assert_eq!(scan_all(&store, 1).await.len(), 2);
    });
}

#[test]
fn flushed_and_compacted_records_are_read_from_tables() {
    torc_sim::run(2, |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        for round in 0..3u64 {
            for number in 0..300u64 {
                let bytes = Bytes::from(format!("{number}-{round}"));
                let ticket = submit(&store, format!("key-{number}"), value(bytes, round)).await;
                if number == 299 {
                    ticket.unwrap().wait().await.unwrap();
                }
            }
            store.flush().await.unwrap();
        }
        assert!(store.stats().table_bytes > 0);
        assert_eq!(store.stats().memtable_entries, 0);
        assert_eq!(get(&store, "key-7").await.unwrap(), "7-2");
        store.compact().await.unwrap();
        assert_eq!(store.stats().level0_runs, 0);
        assert_eq!(get(&store, "key-299").await.unwrap(), "299-2");
        assert_eq!(scan_all(&store, 7).await.len(), 300);
        store.close().await.unwrap();

        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert_eq!(recovery.records, 0, "everything is in tables");
        assert_eq!(recovery.tables, 1);
        assert_eq!(get(&store, "key-0").await.unwrap(), "0-2");
        assert_eq!(scan_all(&store, 100).await.len(), 300);
    });
}

#[test]
fn keys_that_the_filters_rule_out_take_no_place_in_the_cache() {
    torc_sim::run(3, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        for number in 0..100u32 {
            put(&store, number.to_be_bytes(), value("v", 1))
                .await
                .unwrap();
        }
        store.flush().await.unwrap();
        for number in 1000..1200u32 {
            assert_eq!(get(&store, number.to_be_bytes()).await, None);
        }
        let stats = store.stats();
        assert_eq!(
            stats.counts.table_reads, 0,
            "one in 65,536 is a wrong maybe"
        );
        assert_eq!(stats.cache.entries, 0);
        assert!(get(&store, 7u32.to_be_bytes()).await.is_some());
        assert_eq!(store.stats().cache.entries, 1);
    });
}

#[test]
fn keys_that_are_overwritten_again_and_again_are_not_read_from_the_device() {
    torc_sim::run(4, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        let mut reads = Vec::new();
        for round in 1..5u64 {
            for number in 0..50u32 {
                let ticket = submit(&store, number.to_be_bytes(), value("v", round));
                ticket.await.unwrap().wait().await.unwrap();
            }
            reads.push(store.stats().counts.table_reads);
            store.flush().await.unwrap();
        }
        assert_eq!(
            reads,
            [0, 50, 50, 50],
            "the first overwrite gives a key its place"
        );
        for number in 0..50u32 {
            assert_eq!(get(&store, number.to_be_bytes()).await.unwrap(), "v");
        }
        assert_eq!(store.stats().counts.table_reads, 50);
    });
}

#[test]
fn what_was_overwritten_during_its_flush_is_not_cached_by_it() {
    torc_sim::run(5, |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        for (round, written) in (1..).zip(["a", "b"]) {
            put(&store, "key", value(written, round)).await.unwrap();
            store.flush().await.unwrap();
            assert_eq!(get(&store, "key").await.unwrap(), written);
        }
        put(&store, "key", value("c", 3)).await.unwrap();
        let flushing = store.clone();
        let flushed = Rc::new(Cell::new(false));
        let done = Rc::clone(&flushed);
        env.spawn(Class::Flush, async move {
            flushing.flush().await.unwrap();
            done.set(true);
        });
        let mut round = 4;
        while !flushed.get() {
            let now = Bytes::from(round.to_string());
            put(&store, "key", value(now.clone(), round)).await.unwrap();
            assert_eq!(get(&store, "key").await.unwrap(), now);
            round += 1;
        }
        assert!(round > 5, "it was overwritten while it was flushed");
        store.flush().await.unwrap();
        assert_eq!(get(&store, "key").await.unwrap(), (round - 1).to_string());
    });
}

#[test]
pub fn an_update_is_decided_on_pending_records_that_reads_do_not_see() {
    torc_sim::run(3, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        put(&store, "key", value("old", 1)).await.unwrap();
        let ticket = submit(&store, "key", value("new", 2)).await.unwrap();
        assert_eq!(get(&store, "key").await.unwrap(), "old");
        let token = Token::of(TREE, b"key");
        let (seen, kept) = store
            .update(TREE, token, b"key", |base| {
                Decision::Keep(base.unwrap().value.clone())
            })
            .await
            .unwrap();
        assert_eq!(seen, "new");
        // Keeping a pending record means waiting for it.
        kept.wait().await.unwrap();
        assert_eq!(get(&store, "key").await.unwrap(), "new");
        ticket.wait().await.unwrap();
    });
}

#[test]
fn who_is_acknowledged_sees_all_that_was_written_before() {
    for seed in 0..20 {
        torc_sim::run(seed, |env| async move {
            let (store, _) = Store::open(env.clone(), options()).await.unwrap();
            put(&store, "first segment", value("v", 0)).await.unwrap();
            let acknowledged = Rc::new(Cell::new(0));
            for number in 0..100_u64 {
                let key = number.to_string();
                let ticket = submit(&store, key, value("v", number)).await.unwrap();
                let (store, acknowledged) = (store.clone(), Rc::clone(&acknowledged));
                env.spawn(Class::Foreground, async move {
                    ticket.wait().await.unwrap();
                    for before in 0..=number {
                        assert!(get(&store, before.to_string()).await.is_some());
                    }
                    acknowledged.set(acknowledged.get() + 1);
                });
                env.sleep(Duration::from_micros(20 + seed)).await;
            }
            store.close().await.unwrap();
            env.sleep(Duration::from_millis(1)).await;
            assert_eq!(acknowledged.get(), 100);
            let frames = store.stats().counts.wal_frames;
            assert!(frames > 4, "{frames} frames");
        });
    }
}

#[test]
pub fn concurrent_updates_of_a_key_never_lose_one() {
    for seed in 0..20 {
        torc_sim::run(seed, |env| async move {
            let (store, _) = Store::open(env.clone(), options()).await.unwrap();
            put(&store, "counter", value(vec![0; 8], 0)).await.unwrap();
            store.flush().await.unwrap();
            let done = Rc::new(Cell::new(0));
            for _ in 0..10 {
                let (store, done) = (store.clone(), Rc::clone(&done));
                env.spawn(Class::Foreground, async move {
                    for _ in 0..10 {
                        let token = Token::of(TREE, b"counter");
                        let (_, ticket) = store
                            .update(TREE, token, b"counter", |base| {
                                let old = base.unwrap();
                                let count =
                                    u64::from_le_bytes(old.value[..].try_into().unwrap()) + 1;
                                let bytes = Bytes::copy_from_slice(&count.to_le_bytes());
                                Decision::Write(value(bytes, count), ())
                            })
                            .await
                            .unwrap();
                        ticket.wait().await.unwrap();
                    }
                    done.set(done.get() + 1);
                });
            }
            while done.get() < 10 {
                store.flush().await.unwrap();
                env.sleep(Duration::from_millis(1)).await;
            }
            let count = get(&store, "counter").await.unwrap();
            assert_eq!(count[..], 100u64.to_le_bytes());
        });
    }
}

#[test]
fn updates_that_arrive_together_share_a_frame() {
    torc_sim::run(4, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        put(&store, "first", value("", 0)).await.unwrap();
        let before = store.stats().counts;
        let mut tickets = Vec::new();
        for number in 0..1000u32 {
            tickets.push(
                submit(&store, number.to_le_bytes(), value("x", 1))
                    .await
                    .unwrap(),
            );
        }
        for ticket in tickets {
            ticket.wait().await.unwrap();
        }
        let after = store.stats().counts;
        assert_eq!(after.wal_records - before.wal_records, 1000);
        assert!(after.wal_frames - before.wal_frames <= 2);
    });
}

#[test]
fn segments_are_switched_retired_and_recycled() {
    torc_sim::run(5, |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        for number in 0..200u64 {
            let bytes = vec![7; 50_000];
            put(&store, format!("key-{}", number % 10), value(bytes, number))
                .await
                .unwrap();
        }
        let stats = store.stats();
        assert!(stats.counts.flushes >= 2, "{stats:?}");
        assert!(stats.wal_segments <= 6, "{stats:?}");
        store.close().await.unwrap();
        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert!(recovery.clean && !recovery.amnesia);
        assert_eq!(scan_all(&store, 100).await.len(), 10);
    });
}

#[test]
fn records_above_a_segment_are_kept_and_those_above_the_limit_refused() {
    torc_sim::run(6, |env| async move {
        let options = Options {
            value_bytes_max: 3 << 20,
            memtable_bytes: 16 << 20,
            ..options()
        };
        let (store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
        let large = Bytes::from(vec![5; 3 << 20]);
        put(&store, "large", value(large.clone(), 1)).await.unwrap();
        put(&store, "small", value("s", 2)).await.unwrap();
        let refused = put(&store, "larger", value(vec![0; (3 << 20) + 1], 3)).await;
        assert!(matches!(refused, Err(WriteError::TooLarge { .. })));
        let refused = put(&store, vec![0; 65_536], value("", 3)).await;
        assert!(matches!(refused, Err(WriteError::TooLarge { .. })));
        let (store, recovery) = Store::open(env, options).await.unwrap();
        assert_eq!(recovery.records, 2);
        assert_eq!(get(&store, "large").await.unwrap(), large);
        assert_eq!(get(&store, "small").await.unwrap(), "s");
    });
}

#[test]
fn a_dropped_tree_stays_gone_whatever_was_in_flight() {
    for seed in 0..20 {
        torc_sim::run(seed, |env| async move {
            let (store, _) = Store::open(env.clone(), options()).await.unwrap();
            for number in 0..50u32 {
                put(&store, number.to_le_bytes(), value("old", 1))
                    .await
                    .unwrap();
            }
            if seed % 2 == 0 {
                store.flush().await.unwrap();
            }
            for number in 50..100u32 {
                put(&store, number.to_le_bytes(), value("old", 1))
                    .await
                    .unwrap();
            }
            let flushing = store.clone();
            env.spawn(Class::Flush, async move {
                flushing.flush().await.unwrap();
                flushing.compact().await.unwrap();
            });
            env.sleep(Duration::from_micros(seed * 50)).await;
            let pending = submit(&store, "pending", value("old", 1)).await.unwrap();
            store.drop_tree(TREE).await.unwrap();
            pending.wait().await.unwrap();
            assert_eq!(scan_all(&store, 100).await, []);
            assert_eq!(get(&store, "pending").await, None);
            put(&store, "new", value("new", 2)).await.unwrap();
            store.flush().await.unwrap();
            store.compact().await.unwrap();
            assert_eq!(scan_all(&store, 100).await.len(), 1);
            store.close().await.unwrap();

            let (store, _) = Store::open(env, options()).await.unwrap();
            assert_eq!(scan_all(&store, 100).await.len(), 1);
            assert_eq!(get(&store, "new").await.unwrap(), "new");
        });
    }
}

#[test]
fn trees_are_apart() {
    torc_sim::run(7, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        for tree in [TreeId(1), TreeId(2)] {
            let token = Token::of(tree, b"key");
            let record = value(tree.0.to_string(), 1);
            let (_, ticket) = store
                .update(tree, token, b"key", |base| {
                    assert_eq!(base, None);
                    Decision::Write(record, ())
                })
                .await
                .unwrap();
            ticket.wait().await.unwrap();
        }
        for round in 0..2 {
            for tree in [TreeId(1), TreeId(2)] {
                let token = Token::of(tree, b"key");
                let found = store.get(tree, token, b"key").await.unwrap().unwrap();
                assert_eq!(found.value, tree.0.to_string(), "round {round}");
            }
            store.flush().await.unwrap();
        }
    });
}

#[test]
fn tombstones_are_purged_below_the_floor_only() {
    torc_sim::run(8, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        for stamp in 1..=10 {
            put(&store, format!("{stamp}"), tombstone(stamp))
                .await
                .unwrap();
        }
        store.flush().await.unwrap();
        store.compact().await.unwrap();
        assert_eq!(scan_all(&store, 100).await.len(), 10);
        store.set_purge_floors(TREE, PurgeFloors::everywhere(6));
        store.compact().await.unwrap();
        assert_eq!(scan_all(&store, 100).await.len(), 5);
        assert_eq!(store.stats().counts.purged, 5);
    });
}

#[test]
fn a_page_ends_at_its_limits_and_at_the_last_token() {
    torc_sim::run(9, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        for number in 0..100u32 {
            put(&store, number.to_le_bytes(), value(vec![1; 100], 1))
                .await
                .unwrap();
            if number == 50 {
                store.flush().await.unwrap();
            }
        }
        let all = scan_all(&store, 1000).await;
        assert_eq!(all.len(), 100);
        let from = ScanFrom::Token(Token(0));
        let limits = ScanLimits {
            records: 1000,
            bytes: 1040,
        };
        let page = store.scan(TREE, from, Token::MAX, limits).await.unwrap();
        assert_eq!(page.entries.len(), 10);
        assert_eq!(
            page.next,
            Some(ScanFrom::After(
                page.entries[9].token,
                page.entries[9].key.clone()
            ))
        );
        // A page that ends exactly with the range has nothing behind it.
        let last = Token::of(TREE, &all[29].0);
        let limits = ScanLimits {
            records: 10,
            bytes: 1 << 20,
        };
        let from = ScanFrom::After(Token::of(TREE, &all[19].0), all[19].0.clone());
        let page = store.scan(TREE, from, last, limits).await.unwrap();
        assert_eq!((page.entries.len(), page.next), (10, None));
        // A record above the byte limit still gets through.
        let limits = ScanLimits {
            records: 5,
            bytes: 1,
        };
        let page = store
            .scan(TREE, ScanFrom::Token(Token(0)), Token::MAX, limits)
            .await
            .unwrap();
        assert_eq!(page.entries.len(), 1);
    });
}

#[test]
fn weaker_policies_acknowledge_early_and_sync_on_demand() {
    for fsync in [Fsync::Never, Fsync::Interval(Duration::from_millis(20))] {
        torc_sim::run(10, move |env| async move {
            let options = Options { fsync, ..options() };
            let (store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
            put(&store, "a", value("1", 1)).await.unwrap();
            assert_eq!(get(&store, "a").await.unwrap(), "1");
            // That this life acknowledges early has to be durable.
            assert_eq!(store.stats().counts.wal_syncs, 1);
            let ticket = submit(&store, "b", value("2", 2)).await.unwrap();
            ticket.wait_durable().await.unwrap();
            assert_eq!(store.stats().counts.wal_syncs, 2);
            put(&store, "c", value("3", 3)).await.unwrap();
            env.sleep(Duration::from_millis(100)).await;
            let expected = if fsync == Fsync::Never { 2 } else { 3 };
            assert_eq!(store.stats().counts.wal_syncs, expected);
            store.close().await.unwrap();
            let (_, recovery) = Store::open(env, options).await.unwrap();
            assert!(recovery.clean && !recovery.amnesia);
        });
    }
}

#[test]
fn a_closed_store_refuses_updates_and_still_reads() {
    torc_sim::run(11, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        let ticket = submit(&store, "a", value("1", 1)).await.unwrap();
        store.close().await.unwrap();
        ticket.wait().await.unwrap();
        assert_eq!(get(&store, "a").await.unwrap(), "1");
        let refused = put(&store, "b", value("2", 1)).await;
        assert!(matches!(refused, Err(WriteError::Closed)));
        store.close().await.unwrap();
    });
}

#[test]
fn expired_records_are_purged_below_the_floor() {
    torc_sim::run(12, |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        let record = Record {
            expires_at_ms: env.wall().millis() + 10,
            ..value("soon gone", 1)
        };
        put(&store, "key", record).await.unwrap();
        store.set_purge_floors(TREE, PurgeFloors::everywhere(2));
        store.flush().await.unwrap();
        store.compact().await.unwrap();
        assert!(get(&store, "key").await.is_some());
        env.sleep(Duration::from_millis(20)).await;
        store.compact().await.unwrap();
        assert_eq!(scan_all(&store, 10).await, []);
    });
}

#[test]
fn expired_tables_of_a_fifo_tree_go_unread_once_they_lie_below_the_floor() {
    torc_sim::run(13, |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        store.set_strategy(TREE, Strategy::Fifo);
        let write = |number: u64, stamp| {
            let record = Record {
                expires_at_ms: env.wall().millis() + 1000,
                ..value(vec![1; 100], stamp)
            };
            put(&store, number.to_le_bytes(), record)
        };
        for number in 0..100 {
            write(number, 1).await.unwrap();
        }
        store.flush().await.unwrap();
        env.sleep(Duration::from_secs(2)).await;
        write(7, 2).await.unwrap();
        store.flush().await.unwrap();
        let dropped = || store.stats().counts.dropped_tables;
        assert_eq!((dropped(), scan_all(&store, 10).await.len()), (0, 100));

        store.set_purge_floors(TREE, PurgeFloors::everywhere(2));
        for _ in 0..10 {
            env.give_way().await;
        }
        env.sleep(Duration::from_secs(2)).await;
        assert_eq!((dropped(), store.stats().tables), (1, 1));
        assert_eq!(store.stats().counts.compacted_bytes, 0);
        let left = scan_all(&store, 10).await;
        assert_eq!(left.len(), 1, "what was written again is there");
        store.close().await.unwrap();
        let (store, _) = Store::open(env, options()).await.unwrap();
        assert_eq!(scan_all(&store, 10).await, left);
    });
}

#[test]
fn a_tree_whose_strategy_is_not_known_yet_is_left_alone() {
    torc_sim::run(14, |env| async move {
        let options = Options {
            strategy: None,
            ..options()
        };
        let (store, _) = Store::open(env.clone(), options).await.unwrap();
        for number in 0..8u64 {
            put(&store, number.to_le_bytes(), value("v", 1))
                .await
                .unwrap();
            store.flush().await.unwrap();
        }
        store.compact().await.unwrap();
        assert_eq!(store.stats().level0_runs, 8);
        store.set_strategy(TREE, Strategy::Leveled);
        env.sleep(Duration::from_secs(2)).await;
        assert!(store.stats().level0_runs < 4);
        assert_eq!(scan_all(&store, 10).await.len(), 8);
    });
}

#[test]
fn after_close_nothing_touches_the_files_any_more() {
    let mut flushing = 0;
    for seed in 0..20 {
        flushing += torc_sim::run(seed, |env| async move {
            let (store, _) = Store::open(env.clone(), options()).await.unwrap();
            let mut last = None;
            for number in 0..60u32 {
                let bytes = vec![7; 10_000];
                last = Some(submit(&store, number.to_be_bytes(), value(bytes, 1)).await);
            }
            last.unwrap().unwrap().wait().await.unwrap();
            let sealed = store.stats().sealed_memtables;
            store.close().await.unwrap();
            let files = async || {
                let mut found = Vec::new();
                for dir in ["shard-00", "shard-00/wal", "shard-00/tables"] {
                    found.extend(env.disk().list(Path::new(dir)).await.unwrap());
                }
                found
            };
            let before = files().await;
            env.sleep(Duration::from_secs(5)).await;
            assert_eq!(files().await, before, "seed {seed}");
            for _ in 0..2 {
                let (store, recovery) = Store::open(env.clone(), options()).await.unwrap();
                assert!(recovery.clean);
                assert_eq!(scan_all(&store, 100).await.len(), 60);
                store.close().await.unwrap();
            }
            sealed
        });
    }
    assert!(flushing > 0, "no flush was under way at any close");
}
