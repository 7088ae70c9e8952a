//! Disks that fail, fill up or rot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use torc_engine::{Fsync, OpenError, Options, Store, WriteError};
use torc_env::{Env, ShardId};
use torc_sim::{DiskOptions, HostId, SimEnv, Simulation};

use crate::support::{get, options, put, scan_all, submit, tombstone, value};

/// A world with one host, and its only shard.
pub fn world(seed: u64, disk: DiskOptions) -> (Simulation, HostId) {
    let options = torc_sim::Options {
        disk,
        ..torc_sim::Options::default()
    };
    let simulation = Simulation::new(seed, options);
    let host = simulation.add_host(1);
    (simulation, host)
}

pub fn run<T: 'static, F: Future<Output = T> + 'static>(
    simulation: &Simulation,
    host: HostId,
    scenario: impl FnOnce(SimEnv) -> F,
) -> T {
    simulation
        .run_on(host, ShardId(0), scenario)
        .expect("nobody cuts the power")
}

fn segments(simulation: &Simulation, host: HostId) -> Vec<PathBuf> {
    let files = simulation.files(host).into_iter();
    let wal = files.filter(|(path, _)| path.extension().is_some_and(|ext| ext == "wal"));
    wal.map(|(path, _)| path).collect()
}

#[test]
fn a_frame_behind_one_that_failed_is_never_acknowledged() {
    let mut failed_first = 0;
    for seed in 0..40 {
        let (simulation, host) = world(seed, DiskOptions::default());
        let harness = simulation.clone();
        let fates = run(&simulation, host, move |env| async move {
            let (store, _) = Store::open(env.clone(), options()).await.unwrap();
            put(&store, "a", value("1", 1)).await.unwrap();
            let disk = DiskOptions {
                write_error: 0.5,
                ..DiskOptions::default()
            };
            harness.set_disk(host, disk);
            let first = submit(&store, "a", value("2", 2)).await.unwrap();
            env.sleep(Duration::from_micros(1)).await;
            let second = submit(&store, "b", value("2", 2)).await.unwrap();
            (first.wait().await, second.wait().await)
        });
        if let (Err(first), second) = &fates {
            assert!(first.in_doubt());
            assert!(second.as_ref().unwrap_err().in_doubt());
            failed_first += 1;
        }
        simulation.set_disk(host, DiskOptions::default());
        run(&simulation, host, move |env| async move {
            let (store, recovery) = Store::open(env, options()).await.unwrap();
            assert_eq!(recovery.damaged_from, None);
            let has_first = get(&store, "a").await.unwrap() == "2";
            let has_second = get(&store, "b").await.is_some();
            assert!(has_first || fates.0.is_err());
            assert!(has_second || fates.1.is_err());
            assert!(has_first || !has_second, "the second without the first");
        });
    }
    assert!(failed_first > 10, "{failed_first}");
}

#[test]
fn a_failed_write_of_the_log_poisons_the_store_for_good() {
    let (simulation, host) = world(1, DiskOptions::default());
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        put(&store, "a", value("1", 1)).await.unwrap();
        harness.set_disk(
            host,
            DiskOptions {
                write_error: 1.0,
                ..DiskOptions::default()
            },
        );
        let first = submit(&store, "a", value("2", 2)).await.unwrap();
        let second = submit(&store, "b", value("2", 2)).await.unwrap();
        for ticket in [first, second] {
            let error = ticket.wait().await.unwrap_err();
            assert!(matches!(error, WriteError::Poisoned { .. }), "{error}");
            assert!(error.in_doubt());
        }
        // The disk recovers; the store does not.
        harness.set_disk(host, DiskOptions::default());
        let refused = put(&store, "a", value("3", 3)).await.unwrap_err();
        assert!(matches!(
            refused,
            WriteError::Poisoned {
                in_doubt: false,
                ..
            }
        ));
        assert!(store.stats().poisoned);
        assert!(store.close().await.is_err());
        // What was acknowledged is still read, and what was not is not.
        assert_eq!(get(&store, "a").await.unwrap(), "1");
        assert_eq!(get(&store, "b").await, None);
    });
    // Only a new start, which reads the disk, may go on.
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert_eq!(recovery.damaged_from, None);
        let a = get(&store, "a").await.unwrap();
        assert!(a == "1" || a == "2", "in doubt means either");
        put(&store, "a", value("4", 4)).await.unwrap();
    });
}

#[test]
fn a_failed_sync_poisons_the_store_of_a_weaker_policy() {
    let (simulation, host) = world(2, DiskOptions::default());
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let options = Options {
            fsync: Fsync::Interval(Duration::from_millis(5)),
            ..options()
        };
        let (store, _) = Store::open(env.clone(), options).await.unwrap();
        put(&store, "a", value("1", 1)).await.unwrap();
        harness.set_disk(
            host,
            DiskOptions {
                sync_error: 1.0,
                ..DiskOptions::default()
            },
        );
        put(&store, "a", value("2", 2)).await.unwrap();
        env.sleep(Duration::from_millis(50)).await;
        let refused = put(&store, "a", value("3", 3)).await.unwrap_err();
        assert!(matches!(refused, WriteError::Poisoned { .. }));
    });
}

#[test]
fn a_full_disk_refuses_values_and_still_reads_and_deletes_until_space_returns() {
    let small = DiskOptions {
        capacity_bytes: 24 << 20,
        ..DiskOptions::default()
    };
    let (simulation, host) = world(3, small.clone());
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        let mut written = 0u32;
        let refused = loop {
            let bytes: Vec<u8> = (0..10_000u32)
                .map(|at| (at.wrapping_mul(written.wrapping_add(7)) >> 3).to_le_bytes()[0])
                .collect();
            match put(&store, written.to_be_bytes(), value(bytes, 1)).await {
                Ok(()) => written += 1,
                Err(WriteError::Overloaded { .. }) => env.sleep(Duration::from_millis(10)).await,
                Err(error) => break error,
            }
            env.sleep(Duration::from_millis(20)).await;
        };
        assert!(matches!(refused, WriteError::DiskFull), "{refused}");
        assert!(!refused.in_doubt());
        assert!(written > 500, "{written} values fit");
        assert!(store.stats().disk_full);
        assert_eq!(get(&store, 0u32.to_be_bytes()).await.unwrap().len(), 10_000);
        for number in 0..200u32 {
            put(&store, number.to_be_bytes(), tombstone(2))
                .await
                .unwrap();
        }
        assert_eq!(get(&store, 0u32.to_be_bytes()).await, None);
        let refused = put(&store, "more", value("x", 1)).await;
        assert!(matches!(refused, Err(WriteError::DiskFull)));

        harness.set_disk(
            host,
            DiskOptions {
                capacity_bytes: 1 << 30,
                ..small
            },
        );
        env.sleep(Duration::from_secs(3)).await;
        put(&store, "more", value("x", 1)).await.unwrap();
        assert_eq!(
            scan_all(&store, 100).await.len(),
            usize::try_from(written).unwrap() + 1
        );
    });
}

#[test]
fn a_store_opens_on_a_full_disk_and_reads() {
    let (simulation, host) = world(4, DiskOptions::default());
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        for number in 0..50u32 {
            put(&store, number.to_be_bytes(), value(vec![1; 30_000], 1))
                .await
                .unwrap();
        }
    });
    simulation.set_disk(
        host,
        DiskOptions {
            capacity_bytes: 1 << 20,
            ..DiskOptions::default()
        },
    );
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        assert_eq!(scan_all(&store, 100).await.len(), 50);
        let refused = put(&store, "more", value("x", 1)).await;
        assert!(matches!(refused, Err(WriteError::DiskFull)));
        harness.set_disk(host, DiskOptions::default());
        env.sleep(Duration::from_secs(3)).await;
        put(&store, "more", value("x", 1)).await.unwrap();
        store.flush().await.unwrap();
    });
}

/// Runs a store with a few dozen frames in its log, and stops it without closing.
fn with_frames(simulation: &Simulation, host: HostId) {
    run(simulation, host, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        for number in 0..30u32 {
            put(&store, number.to_be_bytes(), value(vec![9; 100], 1))
                .await
                .unwrap();
        }
    });
    simulation.crash(host, 0);
    simulation.restart(host, 1);
}

#[test]
pub fn rot_within_the_log_is_remembered_and_costs_one_frame_only() {
    for place in [0u64, 100, 4000] {
        let (simulation, host) = world(5, DiskOptions::default());
        with_frames(&simulation, host);
        let segments = segments(&simulation, host);
        assert!(simulation.flip_bits(host, &segments[0], 10 * 4096 + place, 4));
        for round in 0..2 {
            run(&simulation, host, move |env| async move {
                let (store, recovery) = Store::open(env, options()).await.unwrap();
                assert_eq!(recovery.losses.len(), 1, "round {round}");
                assert_eq!(recovery.losses[0].tree, None, "it may have been anything");
                if round == 0 {
                    assert_eq!(recovery.damaged_from, Some(11));
                }
                assert_eq!(scan_all(&store, 100).await.len(), 29);
                store.flush().await.unwrap();
            });
            // The log that was damaged is gone, the doubt is not.
            simulation.crash(host, 1);
            simulation.restart(host, 1);
        }
        run(&simulation, host, |env| async move {
            let (store, _) = Store::open(env.clone(), options()).await.unwrap();
            store.set_losses(&[]).await.unwrap();
            let (_, recovery) = Store::open(env, options()).await.unwrap();
            assert!(recovery.losses.is_empty());
        });
    }
}

/// Nothing of such a life may be durable when the power is cut, and the log then ends as the life before has left it.
#[test]
pub fn a_life_that_acknowledges_early_is_known_to_have_lost_something_from_its_first_update_on() {
    for (seed, fsync) in [
        (1, Fsync::Never),
        (2, Fsync::Interval(Duration::from_secs(60))),
    ] {
        let (simulation, host) = world(seed, DiskOptions::default());
        for is_closed in [true, false] {
            run(&simulation, host, |env| async move {
                let (store, _) = Store::open(env, options()).await.unwrap();
                put(&store, "a", value("1", 1)).await.unwrap();
                store.forget_amnesia().await.unwrap();
                if is_closed {
                    store.close().await.unwrap();
                }
            });
            simulation.crash(host, 0);
            simulation.restart(host, 1);
            run(&simulation, host, move |env| async move {
                let options = Options { fsync, ..options() };
                let (store, recovery) = Store::open(env, options).await.unwrap();
                assert!(!recovery.amnesia);
                put(&store, "b", value("2", 2)).await.unwrap();
            });
            simulation.crash(host, 0);
            simulation.restart(host, 1);
            run(&simulation, host, |env| async move {
                let (_, recovery) = Store::open(env, options()).await.unwrap();
                assert!(recovery.amnesia);
            });
        }
    }
}

/// The segment with its first frame, which is synced, goes once what it holds is in tables.
#[test]
pub fn a_life_that_acknowledges_early_is_known_to_have_lost_something_after_its_first_segment_is_gone()
 {
    for (seed, fsync) in [
        (1, Fsync::Never),
        (2, Fsync::Interval(Duration::from_secs(60))),
    ] {
        let (simulation, host) = world(seed, DiskOptions::default());
        run(&simulation, host, move |env| async move {
            let options = Options { fsync, ..options() };
            let (store, _) = Store::open(env.clone(), options).await.unwrap();
            for index in 0..12u8 {
                let filling = value(vec![index; 100_000], 1);
                put(&store, format!("{index}"), filling).await.unwrap();
            }
            store.flush().await.unwrap();
            env.sleep(Duration::from_secs(1)).await;
            put(&store, "b", value("2", 2)).await.unwrap();
        });
        let left = segments(&simulation, host);
        simulation.crash(host, 0);
        simulation.restart(host, 1);
        run(&simulation, host, move |env| async move {
            let (store, recovery) = Store::open(env, options()).await.unwrap();
            let is_there = get(&store, "b").await.is_some();
            assert!(is_there || recovery.amnesia, "{fsync:?}, of {left:?}");
        });
    }
}

#[test]
fn damage_to_the_last_frame_looks_like_a_write_that_never_ended() {
    let (simulation, host) = world(6, DiskOptions::default());
    with_frames(&simulation, host);
    let segments = segments(&simulation, host);
    assert!(simulation.flip_bits(host, &segments[0], 29 * 4096 + 70, 1));
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert!(recovery.losses.is_empty());
        assert_eq!(recovery.damaged_from, None);
        assert_eq!(scan_all(&store, 100).await.len(), 29);
    });
}

#[test]
fn a_damaged_manifest_is_refused_and_nothing_is_deleted() {
    let (simulation, host) = world(7, DiskOptions::default());
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        for round in 0..3u64 {
            put(&store, "key", value("v", round)).await.unwrap();
            store.flush().await.unwrap();
        }
    });
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    let before = simulation.files(host);
    let log = before
        .iter()
        .map(|(path, _)| path)
        .find(|path| path.to_string_lossy().contains("manifest-"))
        .unwrap()
        .clone();
    // The snapshot, and an edit that others follow.
    for offset in [100, 4096 + 80] {
        assert!(simulation.flip_bits(host, &log, offset, 1));
        run(&simulation, host, |env| async move {
            let error = Store::open(env, options()).await.err().unwrap();
            assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
        });
        assert!(simulation.flip_bits(host, &log, offset, 1));
    }
    // Both roots.
    let root = Path::new("shard-00/manifest.root");
    for slot in [0, 4096] {
        simulation.flip_bits(host, root, slot + 8, 1);
    }
    run(&simulation, host, |env| async move {
        let error = Store::open(env, options()).await.err().unwrap();
        assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
    });
    for slot in [0, 4096] {
        simulation.flip_bits(host, root, slot + 8, 1);
    }
    assert_eq!(simulation.files(host), before);
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        assert_eq!(get(&store, "key").await.unwrap(), "v");
    });
}

#[test]
fn a_damaged_block_is_an_error_and_never_an_absence() {
    let (simulation, host) = world(8, DiskOptions::default());
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        put(&store, "key", value("v", 1)).await.unwrap();
        store.flush().await.unwrap();
    });
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    let table = simulation
        .files(host)
        .into_iter()
        .map(|(path, _)| path)
        .find(|path| path.extension().is_some_and(|ext| ext == "table"))
        .unwrap();
    assert!(simulation.flip_bits(host, &table, 20, 1));
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        let token = torc_env::Token::of(crate::support::TREE, b"key");
        let error = store
            .get(crate::support::TREE, token, b"key")
            .await
            .unwrap_err();
        assert!(matches!(error, torc_engine::ReadError::Corrupt { .. }));
        assert_eq!(store.stats().counts.corrupt_blocks, 1);
        let refused = put(&store, "key", value("w", 2)).await.unwrap_err();
        assert!(matches!(refused, WriteError::Read(_)));
    });
}
