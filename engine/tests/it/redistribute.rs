//! The same data over other numbers of shards, and power cuts on the way.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use torc_engine::{Decision, Layout, Options, Record, Store, redistribute};
use torc_env::{ShardId, Token, TokenRange};
use torc_sim::{Cuts, SimEnv, Simulation, at_every_power_cut};

use crate::support::{TREE, options, scan_all, tombstone, value};

type Content = BTreeMap<Bytes, Record>;

fn in_layout(layout: Layout, shard: ShardId) -> Options {
    Options {
        file_id_first: layout.file_id_first(shard),
        dir: layout.dir(shard),
        ..options()
    }
}

async fn open_all(env: &SimEnv, layout: Layout) -> Vec<Store<SimEnv>> {
    let mut stores = Vec::new();
    for shard in layout.shards() {
        let store = Store::open(env.clone(), in_layout(layout, shard)).await;
        stores.push(store.unwrap().0);
    }
    stores
}

/// Writes to the shard that owns the key, and notes it.
async fn put(stores: &[Store<SimEnv>], content: &mut Content, key: String, record: Record) {
    let shards = u16::try_from(stores.len()).unwrap();
    let token = Token::of(TREE, key.as_bytes());
    let store = &stores[usize::from(token.shard(shards).0)];
    let written = record.clone();
    let update = store.update(TREE, token, key.as_bytes(), |_| {
        Decision::Write(written, ())
    });
    update.await.unwrap().1.wait().await.unwrap();
    content.insert(Bytes::from(key), record);
}

/// Everything, each record from the shard that owns its token.
async fn content(stores: &[Store<SimEnv>]) -> Content {
    let shards = u16::try_from(stores.len()).unwrap();
    let mut found = Content::new();
    for (store, shard) in stores.iter().zip((0..).map(ShardId)) {
        for (key, record) in scan_all(store, 50).await {
            assert_eq!(Token::of(TREE, &key).shard(shards), shard);
            let token = Token::of(TREE, &key);
            assert_eq!(
                store.get(TREE, token, &key).await.unwrap().as_ref(),
                Some(&record)
            );
            assert!(found.insert(key, record).is_none());
        }
    }
    found
}

async fn fill(stores: &[Store<SimEnv>], content: &mut Content, from: u64, count: u64, len: usize) {
    for step in from..from + count {
        let mut record = match step % 5 {
            0 => tombstone(step),
            _ => value(vec![u8::try_from(step % 251).unwrap(); len], step),
        };
        if step % 7 == 0 {
            record.expires_at_ms = u64::MAX;
        }
        put(stores, content, format!("key-{}", step % 97), record).await;
    }
}

async fn change(env: &SimEnv, from: Layout, to: Layout) {
    let made = redistribute(env, from, to, in_layout, |_| true).await;
    made.unwrap().finish().await.unwrap();
}

#[test]
fn records_tombstones_and_expiries_survive_one_two_four_three_and_one_shards() {
    let simulation = Simulation::new(7, torc_sim::Options::default());
    let host = simulation.add_host(1);
    simulation
        .run_on(host, ShardId(0), |env| async move {
            let mut expected = Content::new();
            let mut layout = Layout {
                number: 0,
                shards: 1,
            };
            let mut step = 1;
            for shards in [2, 4, 3, 1] {
                let stores = open_all(&env, layout).await;
                assert_eq!(content(&stores).await, expected);
                fill(&stores, &mut expected, step, 150, 3000).await;
                for store in &stores {
                    store.flush().await.unwrap();
                }
                fill(&stores, &mut expected, step + 150, 60, 3000).await;
                for store in &stores {
                    store.close().await.unwrap();
                }
                step += 210;
                let next = Layout {
                    number: layout.number + 1,
                    shards,
                };
                change(&env, layout, next).await;
                layout = next;
            }
            let stores = open_all(&env, layout).await;
            assert_eq!(content(&stores).await, expected);
            for store in &stores {
                store.compact().await.unwrap();
            }
            assert_eq!(content(&stores).await, expected);
        })
        .unwrap();
}

#[derive(Default)]
struct Noted {
    expected: Content,
    is_written: bool,
    is_changed: bool,
}

const FROM: Layout = Layout {
    number: 0,
    shards: 2,
};
const TO: Layout = Layout {
    number: 1,
    shards: 3,
};

#[test]
fn what_a_store_has_lost_its_parts_lack_each_in_its_own_range() {
    let simulation = Simulation::new(9, torc_sim::Options::default());
    let host = simulation.add_host(1);
    let [from, to] = [(0, 1), (1, 2)].map(|(number, shards)| Layout { number, shards });
    simulation
        .run_on(host, ShardId(0), move |env| async move {
            let stores = open_all(&env, from).await;
            fill(&stores, &mut Content::new(), 0, 150, 3000).await;
            stores[0].flush().await.unwrap();
            stores[0].close().await.unwrap();
        })
        .unwrap();
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    for (path, len) in simulation.files(host) {
        if path.extension().is_some_and(|name| name == "table") {
            assert!(simulation.flip_bits(host, &path, len - 4096 + 40, 1));
        }
    }
    simulation
        .run_on(host, ShardId(0), move |env| async move {
            change(&env, from, to).await;
            let stores = open_all(&env, to).await;
            for (store, shard) in stores.iter().zip(to.shards()) {
                let losses = store.losses();
                assert!(!losses.is_empty(), "{shard}");
                let slice = TokenRange::of_shard(shard, to.shards);
                for loss in losses {
                    assert_eq!(loss.tree, Some(TREE));
                    assert_eq!(loss.range.intersection(&slice), Some(loss.range));
                }
            }
        })
        .unwrap();
}

#[test]
fn power_cuts_during_a_redistribution_leave_the_old_stores_whole_or_the_new_ones() {
    let workload = |env: SimEnv, noted: Rc<RefCell<Noted>>| async move {
        let stores = open_all(&env, FROM).await;
        let mut expected = Content::new();
        fill(&stores, &mut expected, 1, 6, 30_000).await;
        stores[0].flush().await.unwrap();
        fill(&stores, &mut expected, 7, 4, 30_000).await;
        noted.borrow_mut().expected = expected;
        noted.borrow_mut().is_written = true;
        // Not closed: the log is what a crash leaves.
        drop(stores);
        change(&env, FROM, TO).await;
        noted.borrow_mut().is_changed = true;
    };
    let check = |env: SimEnv, noted: Rc<RefCell<Noted>>| async move {
        if !noted.borrow().is_written {
            return;
        }
        let expected = noted.borrow().expected.clone();
        if noted.borrow().is_changed {
            assert_eq!(content(&open_all(&env, TO).await).await, expected);
            return;
        }
        let stores = open_all(&env, FROM).await;
        assert_eq!(content(&stores).await, expected);
        for store in &stores {
            store.close().await.unwrap();
        }
        change(&env, FROM, TO).await;
        assert_eq!(content(&open_all(&env, TO).await).await, expected);
    };
    let cuts = Cuts {
        variants: 4,
        ..Cuts::default()
    };
    let images = at_every_power_cut(&cuts, workload, check);
    assert!(images > 100, "{images} images");
}
