//! Power cuts at every disk operation of a workload, and at every one of the recovery.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use torc_engine::{Fsync, Kind, Options, PurgeFloors, Record, Store};
use torc_env::{Class, Disk, Env};
use torc_sim::{Cuts, SimEnv, at_every_power_cut};

use crate::support::{TREE, keys, options, scan_all, submit, tombstone, value};

/// What was submitted and what was promised, a key.
#[derive(Default)]
struct Promised {
    /// Every record submitted, in order.
    submitted: BTreeMap<Vec<u8>, Vec<Record>>,
    /// How many of them were acknowledged: the rest may be there or not.
    acknowledged: BTreeMap<Vec<u8>, usize>,
    /// Submission order over all keys: (key, index within the key).
    order: Vec<(Vec<u8>, usize)>,
}

type Shared = Rc<RefCell<Promised>>;

async fn write(store: &Store<SimEnv>, env: &SimEnv, promised: &Shared, key: &str, record: Record) {
    let key = key.as_bytes().to_vec();
    let index = {
        let mut promised = promised.borrow_mut();
        let records = promised.submitted.entry(key.clone()).or_default();
        records.push(record.clone());
        let index = records.len();
        promised.order.push((key.clone(), index - 1));
        index
    };
    let ticket = submit(store, &key, record).await.unwrap();
    let promised = Rc::clone(promised);
    env.spawn(Class::Foreground, async move {
        if ticket.wait().await.is_ok() {
            let mut promised = promised.borrow_mut();
            let count = promised.acknowledged.entry(key).or_default();
            *count = index.max(*count);
        }
    });
}

/// Writes to few keys, some of them large, flushes, compacts, deletes and reopens.
async fn workload(env: SimEnv, mut options: Options, promised: Shared) {
    let (mut store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
    for step in 1..=24u64 {
        let len = if step % 5 == 0 { 200_000 } else { 300 };
        let key = format!("key-{}", step % 7);
        let record = if step % 6 == 0 {
            tombstone(step)
        } else {
            value(vec![u8::try_from(step).unwrap(); len], step)
        };
        write(&store, &env, &promised, &key, record).await;
        write(
            &store,
            &env,
            &promised,
            "hot",
            value(step.to_string(), step),
        )
        .await;
        if step % 2 == 0 {
            env.sleep(Duration::from_millis(1)).await;
        }
        match step {
            8 => store.flush().await.unwrap(),
            14 => {
                store.flush().await.unwrap();
                store.compact().await.unwrap();
            }
            16 if options.keys.active().is_some() => {
                options.keys = keys(&[1, 2]);
                store.set_keys(&options.keys).unwrap();
            }
            18 => {
                store.close().await.unwrap();
                store = Store::open(env.clone(), options.clone()).await.unwrap().0;
            }
            20 => {
                store.set_purge_floors(TREE, PurgeFloors::everywhere(7));
                store.flush().await.unwrap();
                store.compact().await.unwrap();
            }
            _ => {}
        }
    }
    env.sleep(Duration::from_millis(20)).await;
}

/// What a store holds, by key.
async fn contents(store: &Store<SimEnv>) -> BTreeMap<Vec<u8>, Record> {
    let all = scan_all(store, 10).await;
    all.into_iter()
        .map(|(key, record): (Bytes, Record)| (key.to_vec(), record))
        .collect()
}

/// Purged by the workload's floor: an absence that stands for a tombstone.
fn may_be_purged(record: &Record) -> bool {
    record.kind == Kind::Tombstone && record.stamp < 7
}

/// Holds what a store has against what was promised. `keeps_promises`: acknowledged means durable.
fn judge(found: &BTreeMap<Vec<u8>, Record>, promised: &Promised, keeps_promises: bool) {
    for key in found.keys() {
        assert!(promised.submitted.contains_key(key), "a key from nowhere");
    }
    // Which prefix of each key's history is there: every state that is consistent with what was found.
    let mut low = 0;
    let mut high = promised.order.len();
    for (key, records) in &promised.submitted {
        let acknowledged = promised.acknowledged.get(key).copied().unwrap_or(0);
        let is_at = |count: &usize| match count.checked_sub(1).map(|index| &records[index]) {
            None => !found.contains_key(key),
            Some(last) => {
                found.get(key) == Some(last) || !found.contains_key(key) && may_be_purged(last)
            }
        };
        let least = if keeps_promises { acknowledged } else { 0 };
        let count = (least..=records.len()).find(is_at);
        let name = String::from_utf8_lossy(key);
        let count = count.unwrap_or_else(|| {
            panic!(
                "{name}: {acknowledged} of {} acknowledged, found stamp {:?}",
                records.len(),
                found.get(key).map(|record| record.stamp)
            )
        });
        // The store holds submissions up to some point of the one order, and nothing beyond it.
        let place = |index: usize| {
            let at = |(other, number): &(Vec<u8>, usize)| other == key && *number == index;
            promised.order.iter().position(at)
        };
        // What a check wrote on top has no place in the workload's order.
        if let Some(last) = count.checked_sub(1).and_then(place) {
            low = low.max(last + 1);
        }
        if let Some(next) = place(count) {
            high = high.min(next);
        }
    }
    assert!(low <= high, "not a prefix: has {low}, lacks {high}");
}

async fn check(env: SimEnv, mut options: Options, promised: Shared) {
    if options.keys.active().is_some() {
        options.keys = keys(&[1, 2]);
    }
    let keeps_promises = options.fsync.is_synced();
    let (store, recovery) = Store::open(env.clone(), options.clone()).await.unwrap();
    assert_eq!(recovery.damaged_from, None, "a power cut is not rot");
    assert!(!keeps_promises || !recovery.amnesia);
    let found = contents(&store).await;
    judge(&found, &promised.borrow(), keeps_promises);

    // The store works on, and a second recovery sees the same and what came on top.
    let record = value("after", 1_000);
    {
        // Power may be cut below, and this check be run again.
        let mut promised = promised.borrow_mut();
        let after = promised.submitted.entry(b"after".to_vec()).or_default();
        after.push(record.clone());
    }
    let ticket = submit(&store, "after", record.clone()).await.unwrap();
    ticket.wait_durable().await.unwrap();
    if options.keys.active().is_some() {
        // It may still be removing segments under the older key.
        store.close().await.unwrap();
    }
    let (store, recovery) = Store::open(env.clone(), options.clone()).await.unwrap();
    assert_eq!(recovery.damaged_from, None);
    let mut expected = found;
    expected.insert(b"after".to_vec(), record);
    assert_eq!(contents(&store).await, expected);
    store.flush().await.unwrap();
    store.compact().await.unwrap();
    assert_eq!(contents(&store).await, expected);
    let tables = env.disk().list(&options.dir.join("tables")).await.unwrap();
    let is_blob = |name: &str| name.ends_with(".blob");
    let blobs = tables.iter().filter(|entry| is_blob(&entry.name)).count();
    assert_eq!(blobs, store.stats().blobs, "nothing is left behind");
}

fn cut_everywhere(fsync: Fsync, cuts: &Cuts) -> u64 {
    let options = Options { fsync, ..options() };
    cut_with(options, cuts)
}

fn cut_with(options: Options, cuts: &Cuts) -> u64 {
    at_every_power_cut(
        cuts,
        {
            let options = options.clone();
            move |env, promised| workload(env, options.clone(), promised)
        },
        move |env, promised| check(env, options.clone(), promised),
    )
}

#[test]
pub fn nothing_acknowledged_is_lost_whenever_power_is_cut() {
    for seed in 1..=2 {
        let cuts = Cuts {
            seed,
            ..Cuts::default()
        };
        let images = cut_everywhere(Fsync::Group, &cuts);
        assert!(images > 400, "{images} images");
    }
}

#[test]
pub fn weaker_policies_lose_a_suffix_at_most() {
    for fsync in [Fsync::Never, Fsync::Interval(Duration::from_millis(3))] {
        let images = cut_everywhere(fsync, &Cuts::default());
        assert!(images > 400, "{images} images");
    }
}

#[test]
fn a_recovery_that_is_cut_short_is_repeated() {
    let cuts = Cuts {
        stride: 7,
        variants: 3,
        cut_recovery: true,
        ..Cuts::default()
    };
    let images = cut_everywhere(Fsync::Group, &cuts);
    assert!(images > 400, "{images} images");
}

/// Nearly every value is in a blob, and blobs are emptied of the rest as soon as one is dead.
#[test]
fn nothing_acknowledged_is_lost_whenever_power_is_cut_with_values_in_blobs() {
    let separated = Options {
        separate_from: Some(100),
        blob_dead_percent: 1,
        ..options()
    };
    for cut_recovery in [false, true] {
        let cuts = Cuts {
            seed: 4,
            stride: if cut_recovery { 7 } else { 1 },
            cut_recovery,
            ..Cuts::default()
        };
        let images = cut_with(separated.clone(), &cuts);
        assert!(images > 400, "{images} images");
    }
}

/// The key changes on the way, too.
#[test]
fn nothing_acknowledged_is_lost_whenever_power_is_cut_with_encryption_on() {
    let encrypted = Options {
        keys: keys(&[1]),
        ..options()
    };
    let cuts = Cuts {
        seed: 3,
        ..Cuts::default()
    };
    let images = cut_with(encrypted.clone(), &cuts);
    assert!(images > 400, "{images} images");
    let cuts = Cuts {
        stride: 7,
        variants: 3,
        cut_recovery: true,
        ..Cuts::default()
    };
    let images = cut_with(encrypted, &cuts);
    assert!(images > 400, "{images} images");
}
