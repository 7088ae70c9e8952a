//! Snapshots: what they hold, what they keep from being removed, and what power cuts leave of them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use torc_engine::{Options, Record, SnapshotError, Store, remove_all};
use torc_env::{Class, Disk, Env, ShardId};
use torc_sim::{Cuts, SimEnv, Simulation, at_every_power_cut};

use crate::support::{options, put, scan_all, submit, tombstone, value};

const SNAPSHOT: &str = "snapshots/one/shard-00";
const PATIENCE: Duration = Duration::from_secs(1);

type Content = BTreeMap<Bytes, Record>;

fn in_snapshot() -> Options {
    Options {
        dir: SNAPSHOT.into(),
        ..options()
    }
}

async fn content(store: &Store<SimEnv>) -> Content {
    scan_all(store, 50).await.into_iter().collect()
}

async fn take(store: &Store<SimEnv>) -> Content {
    store.hold(PATIENCE).await.unwrap();
    let content = content(store).await;
    let cut = store.cut().unwrap();
    store.snapshot(cut, Path::new(SNAPSHOT)).await.unwrap();
    content
}

async fn fill(store: &Store<SimEnv>, from: u64, count: u64) {
    for step in from..from + count {
        let record = match step % 5 {
            0 => tombstone(step),
            _ => value(vec![u8::try_from(step % 251).unwrap(); 3000], step),
        };
        put(store, format!("key-{}", step % 37), record)
            .await
            .unwrap();
    }
}

#[test]
fn a_snapshot_is_a_store_as_of_its_cut_whatever_comes_later() {
    let simulation = Simulation::new(1, torc_sim::Options::default());
    let host = simulation.add_host(1);
    let expected = simulation
        .run_on(host, ShardId(0), |env| async move {
            let (store, _) = Store::open(env, options()).await.unwrap();
            fill(&store, 1, 200).await;
            store.flush().await.unwrap();
            fill(&store, 201, 30).await;
            let expected = take(&store).await;
            fill(&store, 300, 200).await;
            store.flush().await.unwrap();
            store.compact().await.unwrap();
            assert_ne!(content(&store).await, expected);
            expected
        })
        .unwrap();
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    simulation
        .run_on(host, ShardId(0), |env| async move {
            let (copy, recovery) = Store::open(env, in_snapshot()).await.unwrap();
            assert!(recovery.amnesia, "what came after the cut is missing");
            assert_eq!(content(&copy).await, expected);
            let before = copy.stats().seqno;
            fill(&copy, 1000, 10).await;
            assert!(copy.stats().seqno > before);
        })
        .unwrap();
}

#[test]
fn updates_wait_for_the_cut_and_none_of_them_is_in_the_snapshot() {
    let simulation = Simulation::new(2, torc_sim::Options::default());
    let host = simulation.add_host(1);
    simulation
        .run_on(host, ShardId(0), |env| async move {
            let (store, _) = Store::open(env.clone(), options()).await.unwrap();
            fill(&store, 1, 20).await;
            store.hold(PATIENCE).await.unwrap();
            let (writer, done) = (store.clone(), Rc::new(RefCell::new(false)));
            let noted = Rc::clone(&done);
            env.spawn(Class::Foreground, async move {
                put(&writer, "late", value("x", 1)).await.unwrap();
                noted.replace(true);
            });
            env.sleep(PATIENCE / 2).await;
            assert!(!*done.borrow(), "an update went past the hold");
            let cut = store.cut().unwrap();
            env.sleep(PATIENCE / 2).await;
            assert!(*done.borrow(), "the hold was not released");
            // In tables before they are linked, but decided after the cut.
            store.flush().await.unwrap();
            store.snapshot(cut, Path::new(SNAPSHOT)).await.unwrap();
            let (copy, _) = Store::open(env, in_snapshot()).await.unwrap();
            let found = content(&copy).await;
            assert!(!found.contains_key(&b"late"[..]));
            assert!(found.contains_key(&b"key-1"[..]));
        })
        .unwrap();
}

#[test]
fn a_hold_that_nobody_ends_ends_by_itself_and_gives_no_cut() {
    let simulation = Simulation::new(3, torc_sim::Options::default());
    let host = simulation.add_host(1);
    simulation
        .run_on(host, ShardId(0), |env| async move {
            let (store, _) = Store::open(env.clone(), options()).await.unwrap();
            store.hold(PATIENCE).await.unwrap();
            put(&store, "a", value("x", 1)).await.unwrap();
            assert!(matches!(store.cut(), Err(SnapshotError::Late)));
            let second = store.hold(PATIENCE).await;
            assert!(matches!(second, Err(SnapshotError::Busy)));
            store.release().await;
            put(&store, "b", value("x", 1)).await.unwrap();
        })
        .unwrap();
}

#[test]
fn a_removed_snapshot_gives_its_space_back() {
    let simulation = Simulation::new(4, torc_sim::Options::default());
    let host = simulation.add_host(1);
    simulation
        .run_on(host, ShardId(0), |env| async move {
            let (store, _) = Store::open(env.clone(), options()).await.unwrap();
            fill(&store, 1, 100).await;
            take(&store).await;
            fill(&store, 200, 100).await;
            store.flush().await.unwrap();
            store.compact().await.unwrap();
            env.sleep(Duration::from_secs(1)).await;
            let held = env.disk().space().await.unwrap().free_bytes;
            let dir = Path::new("snapshots/one");
            remove_all(env.disk(), dir).await.unwrap();
            remove_all(env.disk(), dir).await.unwrap();
            let free = env.disk().space().await.unwrap().free_bytes;
            assert!(free > held + 50_000, "{held} bytes were free, then {free}");
            env.disk().list(dir).await.unwrap_err();
        })
        .unwrap();
}

#[derive(Default)]
struct Noted {
    /// Every acknowledged update so far.
    acknowledged: u64,
    at_cut: Option<Content>,
    is_taken: bool,
}

#[test]
fn power_cuts_during_a_snapshot_leave_the_store_whole_and_a_taken_snapshot_complete() {
    let cuts = Cuts {
        variants: 4,
        ..Cuts::default()
    };
    let workload = |env: SimEnv, noted: Rc<RefCell<Noted>>| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        for step in 1..=6u64 {
            let record = value(vec![7; 40_000], step);
            let ticket = submit(&store, format!("key-{step}"), record).await.unwrap();
            ticket.wait().await.unwrap();
            noted.borrow_mut().acknowledged = step;
            if step == 3 {
                store.flush().await.unwrap();
            }
        }
        store.hold(PATIENCE).await.unwrap();
        noted.borrow_mut().at_cut = Some(content(&store).await);
        let cut = store.cut().unwrap();
        let writer = store.clone();
        env.spawn(Class::Foreground, async move {
            put(&writer, "key-7", value(vec![8; 40_000], 7))
                .await
                .unwrap();
            writer.flush().await.unwrap();
            writer.compact().await.unwrap();
        });
        store.snapshot(cut, Path::new(SNAPSHOT)).await.unwrap();
        noted.borrow_mut().is_taken = true;
        env.sleep(Duration::from_millis(50)).await;
    };
    let check = |env: SimEnv, noted: Rc<RefCell<Noted>>| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        let found = content(&store).await;
        for step in 1..=noted.borrow().acknowledged {
            assert!(found.contains_key(format!("key-{step}").as_bytes()));
        }
        if noted.borrow().is_taken {
            let (copy, _) = Store::open(env.clone(), in_snapshot()).await.unwrap();
            assert_eq!(Some(content(&copy).await), noted.borrow().at_cut);
            copy.close().await.unwrap();
        }
        // What a cut left can be cleared away, and the next one succeeds.
        remove_all(env.disk(), Path::new("snapshots/one"))
            .await
            .unwrap();
        let expected = take(&store).await;
        let (copy, _) = Store::open(env, in_snapshot()).await.unwrap();
        assert_eq!(content(&copy).await, expected);
    };
    let images = at_every_power_cut(&cuts, workload, check);
    assert!(images > 100, "{images} images");
}
