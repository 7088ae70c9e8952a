//! The log archive: a snapshot and what was archived since give every later moment; a segment is archived whole or still in
//! the log, whenever power is cut; an archive that does not work neither stops the store nor hides what it lacks.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use torc_engine::archive::plan::{End, Plan, plan};
use torc_engine::archive::read::Replay;
use torc_engine::archive::trailer::{Damage, Origin, Trailer};
use torc_engine::{ArchiveError, ArchiveOptions, Keys, Kind, Mark, Options, Record, Store};
use torc_env::{AlignedBuf, Class, Disk, Env, File, OpenMode, ShardId};
use torc_sim::{Cuts, DiskOptions, SimEnv, Simulation, at_every_power_cut};

use crate::faults::{run, world};
use crate::support::{TREE, keys, options, put, scan_all, submit, tombstone, value};

const DIR: &str = "archive/shard-00";
const SNAPSHOT: &str = "snapshots/one/shard-00";
const ORIGIN: Origin = Origin {
    node: 7,
    lineage: 3,
    layout: 0,
    shards: 1,
    shard: 0,
};

type Content = BTreeMap<Bytes, Record>;

fn archived() -> Options {
    Options {
        archive: Some(ArchiveOptions::new(DIR, ORIGIN)),
        ..options()
    }
}

async fn content(store: &Store<SimEnv>) -> Content {
    scan_all(store, 50).await.into_iter().collect()
}

/// Every archived segment, in order.
async fn files(env: &SimEnv) -> Vec<Vec<u8>> {
    let disk = env.disk();
    let entries = disk.list(Path::new(DIR)).await.unwrap_or_default();
    let mut all = Vec::new();
    for entry in entries.iter().filter(|entry| entry.name.ends_with(".wal")) {
        let path = Path::new(DIR).join(&entry.name);
        let file = disk.open(&path, OpenMode::Read).await.unwrap();
        let len = usize::try_from(entry.len).unwrap();
        let (read, buffer) = file.read_at(0, AlignedBuf::zeroed(len)).await;
        assert_eq!(read.unwrap(), len);
        all.push(buffer.to_vec());
    }
    all
}

fn trailers(files: &[Vec<u8>]) -> Vec<Trailer> {
    let opened = files.iter().map(|file| Trailer::open(file).unwrap().0);
    opened.collect()
}

/// Replays what the plan says onto a store, records up to `until` only.
async fn replay(
    store: &Store<SimEnv>,
    files: &[Vec<u8>],
    (plan, mark): (&Plan, Mark),
    keys: &Keys,
    until: u64,
) {
    let mut replay = Replay::new(mark);
    for index in &plan.segments {
        let (trailer, body) = Trailer::open(&files[*index]).unwrap();
        let mut frames = replay.segment(&trailer, body, keys);
        while let Some(frame) = frames.next_frame().unwrap() {
            for (tree, entry) in frame.records().filter(|(_, entry)| entry.stamp <= until) {
                let record = Record {
                    kind: entry.kind,
                    stamp: entry.stamp,
                    expires_at_ms: entry.expires_at_ms,
                    value: Bytes::copy_from_slice(entry.value),
                };
                let ticket = store.append(tree, entry.key, &record).await.unwrap();
                ticket.wait().await.unwrap();
            }
        }
    }
}

/// What was written, by moment: stamps are those of the clock, as those of a node are.
#[derive(Default)]
struct History(Vec<(u64, Bytes, Record)>);

impl History {
    fn at(&self, moment: u64) -> Content {
        let mut content = Content::new();
        for (stamp, key, record) in &self.0 {
            if *stamp <= moment {
                content.insert(key.clone(), record.clone());
            }
        }
        content
    }
}

async fn write(store: &Store<SimEnv>, env: &SimEnv, history: &mut History, len: usize) {
    let stamp = env
        .wall()
        .0
        .max(history.0.last().map_or(0, |last| last.0) + 1);
    let key = Bytes::from(format!("key-{}", env.random() % 40));
    let record = if env.random().is_multiple_of(5) {
        tombstone(stamp)
    } else {
        value(vec![env.random().to_le_bytes()[0]; len], stamp)
    };
    history.0.push((stamp, key.clone(), record.clone()));
    put(store, key, record).await.unwrap();
}

async fn snapshot(store: &Store<SimEnv>) -> Mark {
    store.hold(Duration::from_secs(1)).await.unwrap();
    let cut = store.cut().unwrap();
    let report = store.snapshot(cut, Path::new(SNAPSHOT)).await.unwrap();
    report.through
}

/// Random writes, flushes, orders to archive and reopenings; a snapshot somewhere.
async fn live(env: &SimEnv, options: &Options) -> (History, Mark, u64) {
    let (mut store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
    let mut history = History::default();
    let (mut mark, mut cut) = (Mark::default(), 0);
    for step in 0..400 {
        let len = if env.random().is_multiple_of(10) {
            90_000
        } else {
            2_000
        };
        write(&store, env, &mut history, len).await;
        match env.random() % 40 {
            0 => store.flush().await.unwrap(),
            1 => {
                let before = env.wall().0;
                assert!(store.archive_log().await.unwrap() >= before.saturating_sub(1));
            }
            2 => {
                store.close().await.unwrap();
                store = Store::open(env.clone(), options.clone()).await.unwrap().0;
            }
            3 => store.compact().await.unwrap(),
            _ => env.sleep(Duration::from_micros(env.random() % 3_000)).await,
        }
        if step == 80 {
            mark = snapshot(&store).await;
            cut = history.0.last().unwrap().0;
        }
    }
    env.sleep(Duration::from_millis(1)).await;
    let reach = store.archive_log().await.unwrap();
    assert!(reach >= history.0.last().unwrap().0);
    let stats = store.stats();
    assert_eq!((stats.archive_waiting, stats.counts.archive_gaps), (0, 0));
    store.close().await.unwrap();
    (history, mark, cut)
}

fn every_moment(seed: u64, options: Options) {
    let simulation = Simulation::new(seed, torc_sim::Options::default());
    let host = simulation.add_host(1);
    run(&simulation, host, move |env| async move {
        let (history, mark, cut) = live(&env, &options).await;
        let files = files(&env).await;
        assert!(files.len() > 5, "{} segments", files.len());
        let trailers = trailers(&files);
        assert!(trailers.iter().all(|trailer| trailer.origin == ORIGIN));
        let newest = history.0.last().unwrap().0;
        for round in 0..12 {
            let moment = match round {
                0 => cut,
                1 => newest,
                _ => cut + env.random() % (newest - cut),
            };
            let plan = plan(&trailers, mark, moment);
            assert_eq!(plan.end, End::Reached, "moment {moment}");
            // A copy, so that the snapshot stays as it is.
            let restored = Options {
                dir: format!("restored-{round}").into(),
                archive: None,
                ..options.clone()
            };
            let (from, _) = Store::open(
                env.clone(),
                Options {
                    dir: SNAPSHOT.into(),
                    archive: None,
                    ..options.clone()
                },
            )
            .await
            .unwrap();
            let (to, _) = Store::open(env.clone(), restored).await.unwrap();
            for (key, record) in content(&from).await {
                put(&to, key, record).await.unwrap();
            }
            from.close().await.unwrap();
            replay(&to, &files, (&plan, mark), &options.keys, moment).await;
            assert_eq!(content(&to).await, history.at(moment), "moment {moment}");
        }
    });
}

#[test]
fn a_snapshot_and_the_archive_give_every_later_moment() {
    for seed in 0..6 {
        every_moment(seed, archived());
    }
}

#[test]
fn a_snapshot_and_the_archive_give_every_later_moment_with_encryption_on() {
    for seed in 0..3 {
        let encrypted = Options {
            keys: keys(&[1]),
            ..archived()
        };
        every_moment(seed, encrypted);
    }
}

#[test]
fn archived_segments_stay_sealed_and_name_their_key() {
    let (simulation, host) = world(4, Default::default());
    run(&simulation, host, |env| async move {
        let encrypted = Options {
            keys: keys(&[1]),
            ..archived()
        };
        let (store, _) = Store::open(env.clone(), encrypted.clone()).await.unwrap();
        put(&store, "key", value("a secret that is long enough", 1))
            .await
            .unwrap();
        store.archive_log().await.unwrap();
        let files = files(&env).await;
        let secret = b"a secret that is long enough";
        assert!(!files[0].windows(secret.len()).any(|part| part == secret));
        let (trailer, body) = Trailer::open(&files[0]).unwrap();
        assert_eq!(trailer.key, encrypted.keys.active());
        let none = Keys::default();
        let mut replay = Replay::new(Mark::default());
        let refused = replay.segment(&trailer, body, &none).next_frame().err();
        let named = refused.unwrap().to_string();
        assert!(named.contains(&trailer.key.unwrap().to_string()), "{named}");
    });
}

#[test]
fn a_changed_byte_is_found_and_a_missing_segment_is_named() {
    let (simulation, host) = world(5, Default::default());
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env.clone(), archived()).await.unwrap();
        for stamp in 1..=5 {
            put(&store, "key", value(vec![1; 3000], stamp))
                .await
                .unwrap();
            store.archive_log().await.unwrap();
        }
        let mut files = files(&env).await;
        let whole = trailers(&files);
        assert_eq!(
            plan(&whole, Mark::default(), u64::MAX).segments,
            [0, 1, 2, 3, 4]
        );
        files[2][100] ^= 1;
        assert_eq!(Trailer::open(&files[2]).unwrap_err(), Damage::Body);
        let without = [&whole[..2], &whole[3..]].concat();
        let planned = plan(&without, Mark::default(), u64::MAX);
        let gap = End::Gap {
            from: whole[2].first,
            to: whole[2].last,
            behind: 2,
        };
        assert_eq!((planned.end, planned.segments.len()), (gap, 2));
    });
}

/// Whoever restores must get what was acknowledged, in whatever state archive and log were left.
async fn workload(env: SimEnv, options: Options, acknowledged: Rc<RefCell<BTreeMap<Bytes, u64>>>) {
    let (mut store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
    for step in 1..=30u64 {
        let key = Bytes::from(format!("key-{}", step % 7));
        let len = if step % 3 == 0 { 300_000 } else { 500 };
        let ticket = submit(&store, &key, value(vec![1; len], step))
            .await
            .unwrap();
        let noted = Rc::clone(&acknowledged);
        env.spawn(Class::Foreground, async move {
            if ticket.wait().await.is_ok() {
                noted.borrow_mut().insert(key, step);
            }
        });
        match step {
            6 | 20 => {
                let _reach: u64 = store.archive_log().await.unwrap();
            }
            10 | 24 => store.flush().await.unwrap(),
            15 => {
                store.close().await.unwrap();
                store = Store::open(env.clone(), options.clone()).await.unwrap().0;
            }
            _ => env.sleep(Duration::from_micros(300)).await,
        }
    }
    env.sleep(Duration::from_millis(30)).await;
}

async fn check(env: SimEnv, options: Options, acknowledged: Rc<RefCell<BTreeMap<Bytes, u64>>>) {
    let (store, recovery) = Store::open(env.clone(), options.clone()).await.unwrap();
    assert_eq!(recovery.damaged_from, None);
    let reach = store.archive_log().await.unwrap();
    let files = files(&env).await;
    let trailers = trailers(&files);
    let plan = plan(&trailers, Mark::default(), reach);
    assert_eq!(plan.end, End::Reached, "{trailers:#?}");
    let restored = Options {
        dir: "restored".into(),
        archive: None,
        ..options.clone()
    };
    // Power may be cut below, and this be run again.
    torc_engine::remove_all(env.disk(), Path::new("restored"))
        .await
        .unwrap();
    let (copy, _) = Store::open(env.clone(), restored).await.unwrap();
    replay(
        &copy,
        &files,
        (&plan, Mark::default()),
        &options.keys,
        u64::MAX,
    )
    .await;
    let found = content(&copy).await;
    assert_eq!(found, content(&store).await, "what the store has");
    for (key, step) in acknowledged.borrow().iter() {
        assert!(found[key].stamp >= *step, "{key:?}");
    }
    assert_eq!(store.stats().counts.archive_gaps, 0);
}

fn cut_everywhere(options: Options, cuts: &Cuts) -> u64 {
    at_every_power_cut(
        cuts,
        {
            let options = options.clone();
            move |env, noted| workload(env, options.clone(), noted)
        },
        move |env, noted| check(env, options.clone(), noted),
    )
}

#[test]
pub fn a_segment_is_archived_whole_or_still_in_the_log_whenever_power_is_cut() {
    let images = cut_everywhere(archived(), &Cuts::default());
    assert!(images > 400, "{images} images");
}

#[test]
fn so_it_is_when_power_is_cut_again_during_the_recovery_and_with_encryption_on() {
    let encrypted = Options {
        keys: keys(&[1]),
        ..archived()
    };
    let cuts = Cuts {
        seed: 2,
        stride: 23,
        variants: 3,
        cut_recovery: true,
        ..Cuts::default()
    };
    let images = cut_everywhere(encrypted, &cuts);
    assert!(images > 100, "{images} images");
}

/// A world whose archive has no room; what it returns has it mended.
fn full_archive(seed: u64) -> (Simulation, torc_sim::HostId, impl Fn()) {
    let disk = DiskOptions {
        full_dir: Some("archive"),
        ..DiskOptions::default()
    };
    let (simulation, host) = world(seed, disk);
    let harness = simulation.clone();
    let mend = move || harness.set_disk(host, DiskOptions::default());
    (simulation, host, mend)
}

async fn fill(store: &Store<SimEnv>, stamps: std::ops::Range<u64>) {
    for stamp in stamps {
        let key = format!("key-{}", stamp % 9);
        put(store, key, value(vec![2; 200_000], stamp))
            .await
            .unwrap();
    }
}

#[test]
fn an_archive_that_fails_holds_segments_back_and_gets_them_when_it_works_again() {
    let (simulation, host, mend) = full_archive(8);
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env.clone(), archived()).await.unwrap();
        fill(&store, 1..40).await;
        store.flush().await.unwrap();
        let refused = store.archive_log().await.unwrap_err();
        assert!(matches!(&refused, ArchiveError::Failing(why) if why.contains(DIR)));
        let stats = store.stats();
        assert!(stats.archive_failing && stats.counts.archive_failures > 0);
        assert!(stats.archive_held_bytes > 4 << 20, "{stats:?}");
        assert_eq!(stats.counts.archive_gaps, 0);
        // A start finds them again.
        store.close().await.unwrap();
        let (store, _) = Store::open(env.clone(), archived()).await.unwrap();
        mend();
        env.sleep(Duration::from_secs(20)).await;
        let reach = store.archive_log().await.unwrap();
        let stats = store.stats();
        assert!(!stats.archive_failing);
        assert_eq!((stats.archive_waiting, stats.archive_held_bytes), (0, 0));
        let trailers = trailers(&files(&env).await);
        assert_eq!(plan(&trailers, Mark::default(), reach).end, End::Reached);
    });
}

#[test]
fn what_is_held_back_is_bounded_and_what_was_given_up_is_a_gap() {
    let (simulation, host, mend) = full_archive(9);
    run(&simulation, host, |env| async move {
        let mut options = archived();
        if let Some(archive) = &mut options.archive {
            archive.held_bytes_max = 3 << 20;
        }
        let (store, _) = Store::open(env.clone(), options).await.unwrap();
        fill(&store, 1..80).await;
        store.flush().await.unwrap();
        env.sleep(Duration::from_secs(20)).await;
        let stats = store.stats();
        assert!(stats.archive_held_bytes <= 3 << 20, "{stats:?}");
        assert!(stats.counts.archive_gaps > 5, "{stats:?}");
        mend();
        env.sleep(Duration::from_secs(20)).await;
        store.archive_log().await.unwrap();
        let trailers = trailers(&files(&env).await);
        let planned = plan(&trailers, Mark::default(), u64::MAX);
        assert!(
            matches!(planned.end, End::Gap { from: 1, .. }),
            "{planned:?}"
        );
        assert!(planned.segments.is_empty());
    });
}

#[test]
fn the_archive_reaches_the_present_but_for_an_interval_whether_or_not_anything_is_written() {
    let (simulation, host) = world(10, Default::default());
    run(&simulation, host, |env| async move {
        let mut options = archived();
        if let Some(archive) = &mut options.archive {
            archive.interval = Some(Duration::from_secs(10));
        }
        let (store, _) = Store::open(env.clone(), options).await.unwrap();
        for stamp in 1..=20 {
            if stamp % 7 == 0 {
                put(&store, "key", value("x", stamp)).await.unwrap();
            }
            env.sleep(Duration::from_secs(30)).await;
            let stats = store.stats();
            assert!(
                stats.archive_reach_us + 21_000_000 > env.wall().0,
                "{stats:?}"
            );
            assert!(stats.wal_segments <= 7, "{stats:?}");
        }
        let trailers = trailers(&files(&env).await);
        assert_eq!(
            plan(&trailers, Mark::default(), u64::MAX).segments.len(),
            trailers.len()
        );
    });
}

#[test]
fn orders_on_an_idle_store_reach_the_present_and_pile_nothing_up() {
    let (simulation, host) = world(11, Default::default());
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env.clone(), archived()).await.unwrap();
        for _ in 0..50 {
            env.sleep(Duration::from_secs(60)).await;
            let before = env.wall().0;
            assert!(store.archive_log().await.unwrap() + 1 >= before);
        }
        env.sleep(Duration::from_secs(1)).await;
        assert!(store.stats().wal_segments <= 6, "{:?}", store.stats());
        let found = store.get(TREE, torc_env::Token::of(TREE, b"x"), b"x").await;
        assert_eq!(found.unwrap().map(|record| record.kind), None::<Kind>);
    });
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    let opened = simulation.run_on(host, ShardId(0), |env| async move {
        Store::open(env, archived()).await.unwrap().1.damaged_from
    });
    assert_eq!(opened, Some(None));
}

/// A node's clock is ahead of civil time after a start: what it stamps then is in the archive as well.
#[test]
fn an_archive_reaches_what_a_clock_ahead_of_civil_time_has_stamped() {
    let (simulation, host) = world(12, Default::default());
    run(&simulation, host, |env| async move {
        const AHEAD_US: u64 = 10_000_000;
        let (store, _) = Store::open(env.clone(), archived()).await.unwrap();
        let newest = Rc::new(Cell::new(env.wall().0 + AHEAD_US));
        let told = Rc::clone(&newest);
        store.set_newest_stamp(Box::new(move || told.get()));
        for round in 0..5 {
            let mut waiting = Vec::new();
            for _ in 0..20 {
                newest.set(newest.get() + 1);
                let record = value(vec![1; 20_000], newest.get());
                waiting.push(submit(&store, b"key", record).await.unwrap());
                if round % 2 == 0 {
                    env.sleep(Duration::from_micros(200)).await;
                }
            }
            for ticket in waiting {
                ticket.wait().await.unwrap();
            }
            let reach = store.archive_log().await.unwrap();
            assert!(reach >= newest.get(), "{reach} of {}", newest.get());
            // No segment says that it reaches what is only in a later one.
            let mut reached = 0;
            for file in files(&env).await {
                let (trailer, body) = Trailer::open(&file).unwrap();
                let mut replay = Replay::new(Mark {
                    sequence: trailer.first - 1,
                    hash: trailer.previous,
                });
                let keys = Keys::default();
                let mut frames = replay.segment(&trailer, body, &keys);
                while let Some(frame) = frames.next_frame().unwrap() {
                    for (_, entry) in frame.records() {
                        assert!(entry.stamp > reached, "said to be in an earlier segment");
                    }
                }
                reached = trailer.reach_us;
            }
        }
    });
}
