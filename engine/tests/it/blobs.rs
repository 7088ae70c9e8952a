//! Values in blobs: written once, emptied when they are mostly dead, gone when nothing refers to them, and never
//! taken for anything else when they rot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use torc_engine::blob::{Blob, BlobFile, BlobRef, BlobWriter, blob_path};
use torc_engine::crypt::Sealing;
use torc_engine::inspect::{View, inspect};
use torc_engine::{Keys, Options, ReadError, Stats, Store, WriteError};
use torc_env::{Disk, Env, OpenMode, Token, TreeId};
use torc_sim::{DiskOptions, HostId, SimEnv, Simulation};

use crate::faults::{run, world};
use crate::support::{TREE, get, keys, lose, options, put, scan_all, tombstone, value};
use crate::table_support::{MemoryDisk, noise, now, tables_dir};

const VALUE_BYTES: usize = 5000;

fn key(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

fn large(number: u64, stamp: u64) -> Vec<u8> {
    noise(number * 1000 + stamp, VALUE_BYTES)
}

async fn write(store: &Store<SimEnv>, numbers: impl IntoIterator<Item = u64>, stamp: u64) {
    for number in numbers {
        put(store, key(number), value(large(number, stamp), stamp))
            .await
            .unwrap();
    }
    store.flush().await.unwrap();
}

async fn blob_files(env: &SimEnv) -> Vec<PathBuf> {
    let dir = Path::new("shard-00/tables");
    let entries = env.disk().list(dir).await.unwrap();
    let names = entries.into_iter().map(|entry| dir.join(entry.name));
    names
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "blob")
        })
        .collect()
}

/// Nothing is on the disk but what is in use.
async fn check_files(env: &SimEnv, store: &Store<SimEnv>) -> Stats {
    let stats = store.stats();
    assert_eq!(blob_files(env).await.len(), stats.blobs);
    stats
}

/// Opens the store again: what is open hides what is missing.
async fn reopen(env: &SimEnv, store: Store<SimEnv>, options: &Options) -> Store<SimEnv> {
    store.close().await.unwrap();
    Store::open(env.clone(), options.clone()).await.unwrap().0
}

#[test]
fn merges_leave_large_values_where_they_are() {
    torc_sim::run(1, |env| async move {
        // Enough for the blocks of references.
        let options = Options {
            cache_bytes: 1 << 20,
            ..options()
        };
        let (mut store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
        for round in 0..10 {
            write(&store, round * 20..round * 20 + 20, 1).await;
        }
        let written = store.stats().counts.blob_bytes_written;
        assert!(written > 200 * 5000);
        store.compact().await.unwrap();
        let stats = check_files(&env, &store).await;
        assert_eq!(stats.counts.blob_bytes_written, written);
        assert_eq!(stats.blob_dead_bytes, 0);
        assert!(stats.counts.compactions > 0);
        assert!(stats.table_bytes < 200 * 500, "{stats:?}");
        assert!(stats.write_amplification() < 1.2, "{stats:?}");
        store = reopen(&env, store, &options).await;
        for number in 0..200 {
            assert_eq!(get(&store, key(number)).await.unwrap(), large(number, 1));
        }
        let stats = store.stats();
        assert_eq!(stats.counts.blob_reads, 200);
        assert!(stats.counts.table_reads < 20, "{stats:?}");
        assert_eq!(scan_all(&store, 7).await.len(), 200);
    });
}

#[test]
pub fn a_blob_goes_with_the_last_table_that_refers_to_it_and_not_before() {
    torc_sim::run(2, |env| async move {
        // Many small tables share each blob, and are merged piece by piece.
        let options = Options {
            table_bytes_max: 4 << 10,
            compaction_bytes_max: 48 << 10,
            ..options()
        };
        let (mut store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
        for stamp in 1..=12 {
            let numbers = (0..300).filter(|number| number % 7 == stamp % 7 || stamp == 1);
            write(&store, numbers, stamp).await;
            env.sleep(Duration::from_secs(2)).await;
            store = reopen(&env, store, &options).await;
            for number in 0..300 {
                assert!(get(&store, key(number)).await.is_some());
            }
            check_files(&env, &store).await;
        }
        store.drop_tree(TREE).await.unwrap();
        assert_eq!(check_files(&env, &store).await.blobs, 0);
    });
}

#[test]
fn blobs_that_are_mostly_dead_are_emptied_without_being_asked() {
    torc_sim::run(3, |env| async move {
        let (mut store, _) = Store::open(env.clone(), options()).await.unwrap();
        let mut stamp = 0;
        for _ in 0..12 {
            for part in 0..3 {
                stamp += 1;
                write(&store, (0..90).filter(|number| number % 3 == part), stamp).await;
            }
            env.sleep(Duration::from_secs(5)).await;
        }
        let stats = check_files(&env, &store).await;
        let live = 90 * 5000;
        // Half of each blob may be dead, and four runs of level 0 hide a third each.
        assert!(stats.blob_bytes < live * 4, "{stats:?}");
        assert!(stats.blob_dead_bytes < live, "{stats:?}");
        store.compact().await.unwrap();
        let stats = check_files(&env, &store).await;
        assert!(stats.blob_bytes < live * 2 + live / 2, "{stats:?}");
        assert!(stats.space_amplification() < 2.5, "{stats:?}");
        store = reopen(&env, store, &options()).await;
        for number in 0..90 {
            assert!(get(&store, key(number)).await.is_some());
        }
        for number in 0..90 {
            put(&store, key(number), tombstone(99)).await.unwrap();
        }
        store.flush().await.unwrap();
        store.compact().await.unwrap();
        assert_eq!(check_files(&env, &store).await.blobs, 0);
    });
}

/// Most bytes of values that one compaction has moved since `before`, and how many compactions there were, once nothing
/// is left to be done. Nothing is flushed meanwhile.
async fn moved_by_each(env: &SimEnv, store: &Store<SimEnv>) -> (u64, u64) {
    let (mut most, mut compactions) = (0, 0);
    let mut before = store.stats().counts;
    let mut idle = 0;
    while idle < 10_000 {
        env.sleep(Duration::from_micros(200)).await;
        let now = store.stats().counts;
        idle += 1;
        if now.compactions > before.compactions {
            assert_eq!(now.compactions, before.compactions + 1, "looked too late");
            assert_eq!(now.flushes, before.flushes);
            most = most.max(now.blob_bytes_written - before.blob_bytes_written);
            compactions += 1;
            idle = 0;
        }
        before = now;
    }
    (most, compactions)
}

/// Otherwise level 0 fills up behind one that moves all that it can, and reads wait for the disk.
#[test]
fn no_compaction_moves_more_values_than_two_memtables_hold_and_all_are_emptied_all_the_same() {
    torc_sim::run(13, |env| async move {
        let idle = Options {
            strategy: None,
            ..options()
        };
        let (mut store, _) = Store::open(env.clone(), idle.clone()).await.unwrap();
        // Eight memtables of values, of which half die in each blob.
        for part in 0..8 {
            write(&store, (0..800).filter(|number| number / 100 == part), 1).await;
        }
        write(&store, (0..800).filter(|number| number % 8 < 5), 2).await;
        store = reopen(&env, store, &options()).await;
        let (most, compactions) = moved_by_each(&env, &store).await;
        let stats = check_files(&env, &store).await;
        println!("{most} bytes at most, {compactions} compactions, {stats:?}");
        assert!(most > 0 && most <= 1 << 20, "{most} bytes at once");
        assert!(compactions > 2);
        assert!(stats.blob_dead_bytes < stats.blob_bytes / 2, "{stats:?}");
        for number in 0..800 {
            let stamp = if number % 8 < 5 { 2 } else { 1 };
            assert_eq!(
                get(&store, key(number)).await.unwrap(),
                large(number, stamp)
            );
        }
    });
}

#[test]
fn values_return_to_tables_when_blobs_are_turned_off() {
    torc_sim::run(4, |env| async move {
        let (mut store, _) = Store::open(env.clone(), options()).await.unwrap();
        write(&store, 0..40, 1).await;
        let off = Options {
            separate_from: None,
            blob_dead_percent: 10,
            ..options()
        };
        store = reopen(&env, store, &off).await;
        assert_eq!(store.stats().blobs, 1);
        write(&store, 0..10, 2).await;
        store.compact().await.unwrap();
        let stats = check_files(&env, &store).await;
        assert_eq!(stats.blobs, 0, "{stats:?}");
        for number in 0..40 {
            let stamp = if number < 10 { 2 } else { 1 };
            assert_eq!(
                get(&store, key(number)).await.unwrap(),
                large(number, stamp)
            );
        }
    });
}

#[test]
fn after_a_compaction_no_blob_needs_an_older_key() {
    torc_sim::run(5, |env| async move {
        let encrypted = Options {
            keys: keys(&[1]),
            ..options()
        };
        let (mut store, _) = Store::open(env.clone(), encrypted).await.unwrap();
        write(&store, 0..40, 1).await;
        store.compact().await.unwrap();
        store.set_keys(&keys(&[1, 2])).unwrap();
        assert!(store.missing_key(&keys(&[2])).is_some());
        store.compact().await.unwrap();
        assert_eq!(store.missing_key(&keys(&[2])), None);
        let later = Options {
            keys: keys(&[2]),
            ..options()
        };
        store = reopen(&env, store, &later).await;
        for number in 0..40 {
            assert_eq!(get(&store, key(number)).await.unwrap(), large(number, 1));
        }
        check_files(&env, &store).await;
    });
}

fn filled(seed: u64) -> (Simulation, HostId, PathBuf, u64) {
    let (simulation, host) = world(seed, DiskOptions::default());
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        write(&store, 0..20, 1).await;
        store.close().await.unwrap();
    });
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    let files = simulation.files(host).into_iter();
    let mut blobs = files.filter(|(path, _)| path.extension().is_some_and(|found| found == "blob"));
    let (path, bytes) = blobs.next().unwrap();
    (simulation, host, path, bytes)
}

async fn try_get(store: &Store<SimEnv>, number: u64) -> Result<bool, ReadError> {
    let key = key(number);
    let record = store.get(TREE, Token::of(TREE, &key), &key).await?;
    if let Some(record) = &record {
        assert_eq!(record.value, large(number, 1));
    }
    Ok(record.is_some())
}

#[test]
fn a_damaged_value_costs_its_own_key_only() {
    let (simulation, host, path, _) = filled(6);
    assert!(simulation.flip_bits(host, &path, 2000, 1));
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env.clone(), options()).await.unwrap();
        assert!(!recovery.amnesia);
        let mut unreadable = Vec::new();
        for number in 0..20 {
            match try_get(&store, number).await {
                Ok(is_there) => assert!(is_there),
                Err(ReadError::CorruptValue { offset: 0, .. }) => unreadable.push(number),
                Err(error) => panic!("{error}"),
            }
        }
        let [lost] = unreadable[..] else {
            panic!("{unreadable:?}");
        };
        let damages = store.damages();
        assert_eq!(damages.len(), 1);
        assert_eq!(damages[0].range.first, damages[0].range.last);
        assert_eq!(store.stats().counts.corrupt_blocks, 1);
        let refused = put(&store, key(lost), value("w", 9)).await.unwrap_err();
        assert!(matches!(refused, WriteError::Read(_)));
        let mut lines = Vec::new();
        let mut print = |line| lines.push(line);
        let looked = inspect(env.disk(), &path, &View::default(), &mut print).await;
        assert_eq!(looked.unwrap(), 1, "{lines:?}");

        store.quarantine(&store.damages()).await.unwrap();
        assert!(!store.is_damaged());
        for number in 0..20 {
            assert_eq!(try_get(&store, number).await.unwrap(), number != lost);
        }
        let found = store.scrub(1 << 30).await.unwrap();
        assert_eq!(found.damaged, 0, "what is damaged is not in use");
        // The scrub has seen that the blob is not sound: what can be read leaves it.
        env.sleep(Duration::from_secs(5)).await;
        assert!(!blob_files(&env).await.contains(&path));
        for number in 0..20 {
            assert_eq!(try_get(&store, number).await.unwrap(), number != lost);
        }
        store.close().await.unwrap();
        let (_, recovery) = Store::open(env, options()).await.unwrap();
        assert_eq!(recovery.losses.len(), 1);
    });
}

#[test]
fn a_scrub_finds_damaged_values_and_has_blobs_with_dead_damage_emptied() {
    let (simulation, host, path, bytes) = filled(7);
    // A value, and the footer, which no read needs.
    assert!(simulation.flip_bits(host, &path, 9000, 1));
    assert!(simulation.flip_bits(host, &path, bytes - 4000, 1));
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        let report = store.scrub(1 << 30).await.unwrap();
        assert_eq!((report.blobs, report.damaged), (1, 1), "{report:?}");
        assert_eq!(store.damages().len(), 1);
        env.sleep(Duration::from_secs(5)).await;
        assert!(
            blob_files(&env).await.contains(&path),
            "not while damage is known"
        );
        store.quarantine(&store.damages()).await.unwrap();
        env.sleep(Duration::from_secs(5)).await;
        let report = store.scrub(1 << 30).await.unwrap();
        assert_eq!((report.blobs, report.damaged, report.records), (1, 0, 19));
        assert!(!blob_files(&env).await.contains(&path));
    });
}

#[test]
fn a_missing_blob_fails_the_open_and_an_empty_one_costs_its_values_alone() {
    let (simulation, host, path, _) = filled(8);
    let before = simulation.files(host).len();
    run(&simulation, host, move |env| async move {
        let aside = lose(&env, &path, options()).await;
        env.disk().rename(&aside, &path).await.unwrap();
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        assert!(try_get(&store, 3).await.unwrap());
        store.close().await.unwrap();
        drop(store);

        env.disk().rename(&path, &aside).await.unwrap();
        env.disk().open(&path, OpenMode::CreateNew).await.unwrap();
        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert_eq!((recovery.damaged_tables, recovery.losses.len()), (1, 1));
        assert!(!try_get(&store, 3).await.unwrap(), "cut out");
    });
    assert!(simulation.files(host).len() >= before, "kept as evidence");
}

#[test]
fn a_table_that_cannot_be_opened_keeps_its_blob_as_evidence() {
    let (simulation, host, blob, _) = filled(9);
    let files = simulation.files(host).into_iter();
    let mut tables =
        files.filter(|(path, _)| path.extension().is_some_and(|found| found == "table"));
    let (table, len) = tables.next().unwrap();
    assert!(simulation.flip_bits(host, &table, len - 4096 + 40, 1));
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert_eq!(recovery.damaged_tables, 1);
        assert!(!try_get(&store, 3).await.unwrap());
    });
    let names: Vec<PathBuf> = simulation
        .files(host)
        .into_iter()
        .map(|(path, _)| path)
        .collect();
    assert!(names.contains(&blob.with_extension("damaged")), "{names:?}");
}

#[test]
fn damage_that_emptying_a_blob_meets_is_noted_and_not_met_again() {
    let (simulation, host, path, _) = filled(10);
    assert!(simulation.flip_bits(host, &path, 2000, 1));
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        let mut lost = None;
        for number in 0..20 {
            if try_get(&store, number).await.is_err() {
                lost = Some(number);
            }
        }
        store.close().await.unwrap();
        // What was noted is forgotten: the compaction is to meet it.
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        assert!(!store.is_damaged());
        let lost = lost.unwrap();
        let others = (0..20).filter(|number| *number != lost).take(15);
        for number in others {
            put(&store, key(number), tombstone(2)).await.unwrap();
        }
        store.flush().await.unwrap();
        let failed = store.compact().await.unwrap_err();
        assert!(matches!(failed, WriteError::Job(_)), "{failed}");
        assert_eq!(store.damages().len(), 1);
        env.sleep(Duration::from_secs(30)).await;
        assert_eq!(store.stats().counts.failed_compactions, 1);
        store.quarantine(&store.damages()).await.unwrap();
        store.compact().await.unwrap();
        assert!(!blob_files(&env).await.contains(&path));
        let left = scan_all(&store, 100).await;
        let values = left.iter().filter(|(_, record)| !record.value.is_empty());
        assert_eq!(values.count(), 4);
    });
}

/// Dead values leave before the disk is full of them.
#[test]
fn overwrites_go_on_on_a_volume_that_could_hold_them_a_few_times_only() {
    let disk = DiskOptions {
        capacity_bytes: 32 << 20,
        ..DiskOptions::default()
    };
    let (simulation, host) = world(11, disk);
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        let mut refused = 0;
        for round in 0..4000u64 {
            let number = round * 77 % 150;
            let content = noise(round, 20_000);
            loop {
                match put(&store, key(number), value(content.clone(), round)).await {
                    Ok(()) => break,
                    Err(WriteError::DiskFull | WriteError::Overloaded { .. }) => {
                        refused += 1;
                        assert!(refused < 2000, "{:?}", store.stats());
                        env.sleep(Duration::from_millis(100)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
        // Until nothing is being written or removed.
        store.flush().await.unwrap();
        env.sleep(Duration::from_secs(30)).await;
        let stats = check_files(&env, &store).await;
        assert!(stats.counts.blob_bytes_written > 60 << 20, "{stats:?}");
        for number in 0..150 {
            assert_eq!(get(&store, key(number)).await.unwrap().len(), 20_000);
        }
    });
}

/// What overwrites of values of 16 KiB, six times the data, make a store write and keep. A memtable holds an eighth of
/// the data.
fn overwritten(separate_from: Option<usize>) -> Stats {
    torc_sim::run(12, move |env| async move {
        let options = Options {
            separate_from,
            ..options()
        };
        let (store, _) = Store::open(env.clone(), options).await.unwrap();
        for round in 0..7 * 256u64 {
            let number = match round {
                0..256 => round,
                _ => round.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56,
            };
            let record = value(noise(round, 16 << 10), round);
            put(&store, key(number), record).await.unwrap();
            env.sleep(Duration::from_millis(20)).await;
        }
        store.flush().await.unwrap();
        env.sleep(Duration::from_secs(30)).await;
        let stats = store.stats();
        let (written, space) = (
            stats.write_amplification(),
            stats.blob_bytes + stats.table_bytes,
        );
        let live = 256 * (16 << 10);
        println!(
            "{separate_from:?}: written {written:.2} for each byte flushed, {:.2} kept for each that lives",
            space as f64 / live as f64
        );
        stats
    })
}

#[test]
fn separating_values_halves_what_overwrites_make_a_store_write() {
    let (whole, separated) = (overwritten(None), overwritten(Some(8 << 10)));
    assert!(
        separated.write_amplification() < whole.write_amplification() / 2.0,
        "{separated:?}"
    );
}

/// A small blob in memory, with the values in it.
async fn small(disk: &MemoryDisk, sealing: &Sealing) -> (BlobFile, Vec<(BlobRef, Vec<u8>)>) {
    let dir = tables_dir();
    let writer = BlobWriter::create(disk.clone(), &dir, 7, TreeId(1), sealing);
    let mut writer = writer.await.unwrap();
    let mut values = Vec::new();
    for (seed, len) in [(1, 500), (2, 1), (3, 3900), (4, 4000)] {
        let content = if seed == 4 {
            vec![9; len]
        } else {
            noise(seed, len)
        };
        values.push((writer.add(&content).await.unwrap(), content));
    }
    (writer.finish().await.unwrap(), values)
}

/// Reads everything: whether all of it was right. Anything but damage panics.
async fn read_all(
    disk: &MemoryDisk,
    keys: &Keys,
    file: &BlobFile,
    values: &[(BlobRef, Vec<u8>)],
) -> bool {
    let mut is_right = true;
    let blob = match Blob::open(disk, &tables_dir(), file, keys).await {
        Ok(blob) => blob,
        Err(ReadError::Corrupt { .. }) => return false,
        Err(error) => panic!("{error}"),
    };
    for (reference, content) in values {
        match blob.get(reference).await {
            Ok(value) => assert_eq!(value, content),
            Err(ReadError::Corrupt { .. }) => is_right = false,
            Err(error) => panic!("{error}"),
        }
    }
    is_right
}

async fn damaged_parts(disk: &MemoryDisk, keys: &Keys) -> u64 {
    let view = View {
        keys: keys.clone(),
        ..View::default()
    };
    let path = blob_path(&tables_dir(), 7);
    let mut print = |_| {};
    inspect(disk, &path, &view, &mut print).await.unwrap()
}

#[test]
fn every_flipped_byte_and_every_truncation_of_a_blob_is_noticed() {
    for keys in [Keys::default(), keys(&[1])] {
        let simulated = keys.clone();
        let sealing = torc_sim::run(1, |env| async move { Sealing::new(&simulated, &env) });
        let disk = MemoryDisk::default();
        let (file, values) = now(small(&disk, &sealing));
        assert!(now(read_all(&disk, &keys, &file, &values)));
        assert_eq!(now(damaged_parts(&disk, &keys)), 0);
        let path = blob_path(&tables_dir(), 7);
        let len = disk.content(&path).len();
        let is_stored = |at: u64| {
            values.iter().any(|(reference, _)| {
                (reference.offset..reference.offset + u64::from(reference.stored_len)).contains(&at)
            })
        };
        for at in 0..len {
            let place = u64::try_from(at).unwrap();
            let in_footer = at >= len - 4096;
            for mask in [1, 0x80] {
                disk.flip(&path, at, mask);
                let is_right = now(read_all(&disk, &keys, &file, &values));
                assert_eq!(is_right, !is_stored(place), "byte {at}");
                if is_stored(place) || in_footer {
                    assert_eq!(now(damaged_parts(&disk, &keys)), 1, "byte {at}");
                }
                disk.flip(&path, at, mask);
            }
        }
        let whole = disk.content(&path);
        for len in (0..whole.len()).step_by(64) {
            disk.set_content(&path, whole[..len].to_vec());
            assert!(!now(read_all(&disk, &keys, &file, &values)));
            assert_eq!(now(damaged_parts(&disk, &keys)), 1, "{len} bytes");
        }
        // Values of another blob, and those of another place, do not pass.
        let mut moved = file;
        moved.file_id = 8;
        disk.set_content(&blob_path(&tables_dir(), 8), whole);
        let blob = now(Blob::open(&disk, &tables_dir(), &moved, &keys)).unwrap();
        assert!(now(blob.get(&values[0].0)).is_err());
    }
}
