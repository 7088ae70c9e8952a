//! Encryption at rest: nothing of a value or key lies readable in any file, keys change while the store
//! serves, and a missing key is refused by name and harms nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};
use torc_engine::inspect::{View, inspect};
use torc_engine::{KeyId, Keys, OpenError, Options, ReadError, Store};
use torc_env::{AlignedBuf, Class, Disk, Env, File, OpenMode, SECTOR_BYTES};
use torc_sim::{DiskOptions, HostId, SimEnv, Simulation};

use crate::compaction::EVERY_STRATEGY;
use crate::faults::{run, world};
use crate::support::{TREE, get, keys, options, put, submit, tombstone, value};

const MARKER: &[u8] = b"marker-of-plain-text";
const SNAPSHOT: &str = "snapshots/one/shard-00";

fn with(keys: Keys) -> Options {
    Options { keys, ..options() }
}

/// A key and a value that hold the marker, and do not compress away.
fn key(number: u64) -> Vec<u8> {
    [MARKER, &number.to_be_bytes()].concat()
}

fn marked(number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < 3000 {
        bytes.extend_from_slice(MARKER);
        bytes.extend_from_slice(&crate::table_support::noise(number, 50));
    }
    bytes
}

async fn fill(store: &Store<SimEnv>, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let record = match number % 7 {
            3 => tombstone(number),
            _ => value(marked(number), number),
        };
        put(store, key(number), record).await.unwrap();
    }
}

async fn verify(store: &Store<SimEnv>, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let expected = (number % 7 != 3).then(|| marked(number));
        let found = get(store, key(number)).await;
        assert_eq!(found.as_deref(), expected.as_deref(), "{number}");
    }
}

async fn content(env: &SimEnv, path: &Path) -> Vec<u8> {
    let file = env.disk().open(path, OpenMode::Read).await.unwrap();
    let len = usize::try_from(file.len().await.unwrap()).unwrap();
    let whole = AlignedBuf::zeroed(len.next_multiple_of(SECTOR_BYTES));
    let (read, buffer) = file.read_at(0, whole).await;
    buffer[..read.unwrap()].to_vec()
}

async fn contents(env: &SimEnv, files: &[(PathBuf, u64)]) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for (path, _) in files {
        all.insert(path.clone(), content(env, path).await);
    }
    all
}

/// The files in which the marker can be read. What an edge of a sector or block cuts would still show
/// most of it.
async fn readable(simulation: &Simulation, host: HostId, env: &SimEnv) -> Vec<PathBuf> {
    let all = contents(env, &simulation.files(host)).await;
    let shows = |bytes: &[u8]| bytes.windows(8).any(|window| window == &MARKER[..8]);
    let readable = all.into_iter().filter(|(_, bytes)| shows(bytes));
    readable.map(|(path, _)| path).collect()
}

/// Leaves tables, log, manifest, a snapshot and retired segments.
async fn live(env: SimEnv, options: Options) {
    let (store, _) = Store::open(env.clone(), options).await.unwrap();
    for round in 0..4 {
        fill(&store, round * 300..(round + 1) * 300).await;
        store.flush().await.unwrap();
    }
    store.hold(Duration::from_secs(1)).await.unwrap();
    let cut = store.cut().unwrap();
    store.snapshot(cut, Path::new(SNAPSHOT)).await.unwrap();
    store.compact().await.unwrap();
    fill(&store, 1200..1400).await;
    verify(&store, 0..1400).await;
    store.close().await.unwrap();
}

fn written(seed: u64, keys: Keys) -> (Simulation, HostId) {
    let (simulation, host) = world(seed, DiskOptions::default());
    run(&simulation, host, |env| live(env, with(keys)));
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    (simulation, host)
}

#[test]
fn nothing_that_was_written_can_be_read_in_any_file() {
    for (keys, is_readable) in [(Keys::default(), true), (keys(&[1]), false)] {
        let (simulation, host) = written(1, keys);
        let harness = simulation.clone();
        run(&simulation, host, move |env| async move {
            let files = harness.files(host);
            let kinds = ["table", "wal", "log", "root"];
            for kind in kinds {
                let has = |path: &Path| path.extension().is_some_and(|ext| ext == kind);
                assert!(files.iter().any(|(path, _)| has(path)), "{kind}");
            }
            let found = readable(&harness, host, &env).await;
            assert_eq!(!found.is_empty(), is_readable, "{found:?}");
        });
    }
}

#[test]
fn an_encrypted_store_comes_back_after_a_crash_and_so_does_its_snapshot() {
    let (simulation, host) = written(2, keys(&[1]));
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env.clone(), with(keys(&[1]))).await.unwrap();
        assert!(!recovery.amnesia && recovery.damaged_tables == 0);
        verify(&store, 0..1400).await;
        assert_eq!(store.scrub(1 << 30).await.unwrap().damaged, 0);
        let copy = Options {
            dir: SNAPSHOT.into(),
            ..with(keys(&[1]))
        };
        let (copy, _) = Store::open(env, copy).await.unwrap();
        verify(&copy, 0..1200).await;
    });
}

fn needed(error: &OpenError) -> KeyId {
    match error {
        OpenError::Key { source, .. } => source.needed,
        _ => panic!("{error}"),
    }
}

#[test]
fn a_missing_key_is_refused_by_name_and_nothing_is_touched() {
    let (simulation, host) = written(3, keys(&[1]));
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let before = contents(&env, &harness.files(host)).await;
        for wrong in [Keys::default(), keys(&[2]), keys(&[3, 2])] {
            let known = wrong.ids();
            let error = Store::open(env.clone(), with(wrong)).await.err().unwrap();
            assert_eq!(Some(needed(&error)), keys(&[1]).active());
            let text = error.to_string();
            assert!(text.contains("manifest-"), "{text}");
            assert!(text.contains(&needed(&error).to_string()), "{text}");
            for id in known {
                assert!(text.contains(&id.to_string()), "{text}");
            }
        }
        let after = contents(&env, &harness.files(host)).await;
        assert!(before == after, "a refused open changes nothing");
        let (store, recovery) = Store::open(env, with(keys(&[1]))).await.unwrap();
        assert!(!recovery.amnesia);
        verify(&store, 0..1400).await;
    });
}

/// The manifest opens with the newer key; a table, or the log, needs the older one.
#[test]
fn a_key_that_only_some_files_need_is_refused_too() {
    for flushed in [true, false] {
        let (simulation, host) = world(4, DiskOptions::default());
        let harness = simulation.clone();
        run(&simulation, host, move |env| async move {
            let (store, _) = Store::open(env.clone(), with(keys(&[1]))).await.unwrap();
            fill(&store, 0..50).await;
            if flushed {
                store.flush().await.unwrap();
            }
            store.close().await.unwrap();
            // Goes over to the newer key with its manifest at once, and with nothing else.
            let (store, _) = Store::open(env.clone(), with(keys(&[1, 2]))).await.unwrap();
            store.close().await.unwrap();
            let before = contents(&env, &harness.files(host)).await;
            let error = Store::open(env.clone(), with(keys(&[2])))
                .await
                .err()
                .unwrap();
            assert_eq!(Some(needed(&error)), keys(&[1]).active());
            let text = error.to_string();
            assert!(
                text.contains(if flushed { ".table" } else { ".wal" }),
                "{text}"
            );
            assert!(before == contents(&env, &harness.files(host)).await);
            let (store, _) = Store::open(env, with(keys(&[1, 2]))).await.unwrap();
            verify(&store, 0..50).await;
        });
    }
}

#[test]
fn a_plain_store_becomes_an_encrypted_one_and_compaction_leaves_nothing_plain() {
    let (simulation, host) = world(5, DiskOptions::default());
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        for round in 0..3 {
            fill(&store, round * 400..(round + 1) * 400).await;
            store.flush().await.unwrap();
        }
        store.close().await.unwrap();
        let (store, _) = Store::open(env.clone(), with(keys(&[1]))).await.unwrap();
        verify(&store, 0..1200).await;
        let plain = readable(&harness, host, &env).await;
        assert!(!plain.is_empty());
        fill(&store, 1200..1300).await;
        store.flush().await.unwrap();
        assert!(store.files_by_key()[&None] > 0);
        store.compact().await.unwrap();
        let active = keys(&[1]).active();
        let left: Vec<_> = store.files_by_key().into_keys().collect();
        assert_eq!(left, [active]);
        assert_eq!(readable(&harness, host, &env).await, Vec::<PathBuf>::new());
        verify(&store, 0..1300).await;
        store.close().await.unwrap();
        let (store, _) = Store::open(env, with(keys(&[1]))).await.unwrap();
        verify(&store, 0..1300).await;
    });
}

#[test]
fn encryption_is_turned_off_by_a_key_file_that_ends_in_plain() {
    let (simulation, host) = written(6, keys(&[1]));
    run(&simulation, host, |env| async move {
        let text = format!("{}\nplain\n", "01".repeat(32));
        let (store, _) = Store::open(env.clone(), with(Keys::parse(&text).unwrap()))
            .await
            .unwrap();
        verify(&store, 0..1400).await;
        store.compact().await.unwrap();
        assert_eq!(store.files_by_key().into_keys().collect::<Vec<_>>(), [None]);
        store.close().await.unwrap();
        let (store, _) = Store::open(env, options()).await.unwrap();
        verify(&store, 0..1400).await;
    });
}

#[test]
fn a_key_is_retired_while_the_store_serves_whatever_the_strategy() {
    for (seed, strategy) in (7..).zip(EVERY_STRATEGY) {
        let (simulation, host) = world(seed, DiskOptions::default());
        run(&simulation, host, move |env| async move {
            let options = |keys| Options {
                strategy: Some(strategy),
                ..with(keys)
            };
            let (store, _) = Store::open(env.clone(), options(keys(&[1]))).await.unwrap();
            fill(&store, 0..600).await;
            store.flush().await.unwrap();
            fill(&store, 600..700).await;
            store.set_keys(&keys(&[1, 2])).unwrap();
            fill(&store, 700..800).await;
            assert!(store.files_by_key().len() > 1, "{strategy:?}");
            verify(&store, 0..800).await;
            store.compact().await.unwrap();
            let active = keys(&[2]).active();
            let left: Vec<_> = store.files_by_key().into_keys().collect();
            assert_eq!(left, [active], "{strategy:?}");
            store.set_keys(&keys(&[2])).unwrap();
            fill(&store, 800..900).await;
            store.close().await.unwrap();
            let (store, _) = Store::open(env, options(keys(&[2]))).await.unwrap();
            verify(&store, 0..900).await;
        });
    }
}

#[test]
fn an_idle_store_gives_an_old_key_up_too() {
    let (simulation, host) = world(20, DiskOptions::default());
    run(&simulation, host, |env| async move {
        // Nothing at all, a spare segment only, an empty memtable over a log.
        let (store, _) = Store::open(env.clone(), with(keys(&[1]))).await.unwrap();
        for (old, new, writes) in [(1, 2, 0), (2, 3, 1), (3, 4, 0)] {
            fill(&store, 0..writes).await;
            store.flush().await.unwrap();
            store.set_keys(&keys(&[old, new])).unwrap();
            store.compact().await.unwrap();
            let left: Vec<_> = store.files_by_key().into_keys().collect();
            assert_eq!(left, [keys(&[new]).active()], "{old}");
            store.set_keys(&keys(&[new])).unwrap();
        }
        store.close().await.unwrap();
        let (store, recovery) = Store::open(env, with(keys(&[4]))).await.unwrap();
        assert!(!recovery.amnesia);
        verify(&store, 0..1).await;
    });
}

#[test]
fn keys_without_one_that_is_in_use_are_refused_and_the_old_ones_stay() {
    let (simulation, host) = world(21, DiskOptions::default());
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, with(keys(&[1]))).await.unwrap();
        fill(&store, 0..10).await;
        let missing = store.set_keys(&keys(&[2])).unwrap_err();
        assert_eq!(Some(missing.needed), keys(&[1]).active());
        fill(&store, 10..20).await;
        store.compact().await.unwrap();
        let left: Vec<_> = store.files_by_key().into_keys().collect();
        assert_eq!(left, [keys(&[1]).active()]);
    });
}

/// What a store is doing when it is given other keys.
#[derive(Clone, Copy, Debug)]
enum Doing {
    Flush,
    Compaction,
    FirstSegment,
    Edit,
}

/// Whether the key before the last could be taken away so long after the store had begun with it; with or without it, the store opens
/// after a crash.
fn a_key_is_taken_away(doing: Doing, delay: Duration) -> bool {
    let (simulation, host) = world(24, DiskOptions::default());
    let is_taken = run(&simulation, host, move |env| async move {
        let (store, _) = Store::open(env.clone(), with(Keys::default()))
            .await
            .unwrap();
        let rounds = if matches!(doing, Doing::FirstSegment) {
            0
        } else {
            4
        };
        for _ in 0..rounds {
            fill(&store, 0..5).await;
            if matches!(doing, Doing::Compaction) {
                store.flush().await.unwrap();
            }
        }
        store.set_keys(&keys(&[1])).unwrap();
        let busy = store.clone();
        env.spawn(Class::Flush, async move {
            match doing {
                Doing::Flush | Doing::Compaction => busy.flush().await.unwrap(),
                Doing::FirstSegment => fill(&busy, 0..1).await,
                Doing::Edit => busy.drop_tree(TREE).await.unwrap(),
            }
        });
        env.sleep(delay).await;
        store.set_keys(&keys(&[1, 2])).unwrap();
        let is_taken = store.set_keys(&keys(&[2])).is_ok();
        env.sleep(Duration::from_secs(5)).await;
        is_taken
    });
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    run(&simulation, host, move |env| async move {
        let left = if is_taken { keys(&[2]) } else { keys(&[1, 2]) };
        if let Err(error) = Store::open(env, with(left)).await {
            panic!("{doing:?}, after {delay:?}: {error}");
        }
    });
    is_taken
}

/// Seed 7860 of the simulated world: a flush that had begun under the key before the last.
#[test]
fn a_key_under_which_something_is_still_being_written_is_in_use() {
    for doing in [
        Doing::Flush,
        Doing::Compaction,
        Doing::FirstSegment,
        Doing::Edit,
    ] {
        let delays = (0..300_u64).map(|step| Duration::from_micros(step * step / 2));
        let taken = delays
            .filter(|delay| a_key_is_taken_away(doing, *delay))
            .count();
        assert!((1..295).contains(&taken), "{doing:?}: {taken} of 300");
    }
}

#[test]
fn rot_in_an_encrypted_store_is_rot_and_not_a_wrong_key() {
    let (simulation, host) = written(22, keys(&[1]));
    let files = simulation.files(host);
    let tables = Path::new("shard-00/tables");
    let is_table = |path: &Path| path.extension().is_some_and(|found| found == "table");
    let table = files
        .iter()
        .find(|(path, _)| path.starts_with(tables) && is_table(path));
    let (path, _) = table.unwrap().clone();
    assert!(simulation.flip_bits(host, &path, 300, 1));
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, with(keys(&[1]))).await.unwrap();
        assert_eq!(store.scrub(1 << 30).await.unwrap().damaged, 1);
        let range = store.damages()[0].range;
        let (mut lost, mut kept) = (0, 0);
        for number in 0..1400 {
            let token = torc_env::Token::of(TREE, &key(number));
            match store.get(TREE, token, &key(number)).await {
                Ok(_) => kept += 1,
                Err(ReadError::Corrupt { .. }) => {
                    assert!(range.contains(token));
                    lost += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert!(lost > 0 && kept > 1000, "{lost} lost, {kept} kept");
    });
}

#[test]
fn every_encrypted_file_is_told_in_words_with_its_key_and_verified_without() {
    let (simulation, host) = written(23, keys(&[1]));
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let id = keys(&[1]).active().unwrap().to_string();
        for (path, _) in harness.files(host) {
            let kind = path.extension().unwrap().to_string_lossy().into_owned();
            for given in [Keys::default(), keys(&[1])] {
                let view = View {
                    with_records: true,
                    keys: given.clone(),
                };
                let mut text = String::new();
                let mut print = |line: String| text.push_str(&(line + "\n"));
                let damaged = inspect(env.disk(), &path, &view, &mut print).await.unwrap();
                assert_eq!(damaged, 0, "{}: {text}", path.display());
                let has_content = kind != "root" && (kind != "wal" || text.contains("frame"));
                let shows_key = text.contains("marker-of-plain-text");
                match given.active() {
                    None => assert!(!shows_key, "{text}"),
                    Some(_) if kind == "log" => assert!(text.contains("AddTable("), "{text}"),
                    Some(_) if kind == "blob" => assert!(text.contains(" values of "), "{text}"),
                    Some(_) => {
                        assert_eq!(shows_key, has_content && text.contains("tree"), "{text}")
                    }
                }
                assert_eq!(text.contains(&id), has_content, "{text}");
            }
        }
    });
}

/// Whoever waits for a segment of the log gets one under the key that is active by then.
#[test]
fn keys_that_change_while_a_segment_is_made_do_not_stop_the_log() {
    for seed in 0..30 {
        let (simulation, host) = world(seed, DiskOptions::default());
        run(&simulation, host, move |env| async move {
            let (store, _) = Store::open(env.clone(), with(keys(&[1]))).await.unwrap();
            for newest in 2..20 {
                let given: Vec<u8> = (1..=newest).collect();
                store.set_keys(&keys(&given)).unwrap();
                let compacted = store.clone();
                env.spawn(Class::Control, async move {
                    compacted.compact().await.unwrap();
                });
                let written = submit(&store, key(u64::from(newest)), value("x", 1));
                let ticket = written.await.unwrap();
                if newest % 3 == 0 {
                    let late = pin!(env.sleep(Duration::from_secs(60)));
                    match select(pin!(ticket.wait()), late).await {
                        Either::Left((written, _)) => written.unwrap(),
                        Either::Right(_) => panic!("seed {seed}: the log stands still"),
                    }
                }
                env.sleep(Duration::from_micros(env.random() % 1_500)).await;
            }
        });
    }
}
