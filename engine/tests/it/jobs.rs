//! Compaction jobs in the simulated world: what comes out against a model, and what a full disk or a
//! damaged input leaves behind.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use torc_engine::crypt::{Keys, Sealing};
use torc_engine::jobs::{CompactJob, CompactOutput};
use torc_engine::purge::{PurgeFloors, PurgeRule, Reach};
use torc_engine::table::{FilterBits, ReadAhead, Table, table_id, table_path};
use torc_engine::{Entry, JobError, Kind, ReadError, ScanFrom};
use torc_env::{Disk, Env, JobClass, ShardId, Token, TokenRange};
use torc_sim::{DiskOptions, HostId, SimEnv, Simulation};

use crate::table_support::{TREE, entry, noise, options, sort, tables_dir, write_table};

const NOW_MS: u64 = 1_000;
const FLOOR: u64 = 500;

fn job(sources: Vec<Vec<(u64, TokenRange)>>, reach: Reach) -> CompactJob {
    CompactJob {
        tree: TREE,
        dir: tables_dir(),
        sources,
        purge: PurgeRule {
            floors: PurgeFloors::everywhere(FLOOR),
            now_ms: NOW_MS,
            reach,
        },
        file_ids: 1000..1100,
        filter: FilterBits::Eight,
        block_bytes: 8192,
        table_bytes: 16 << 10,
        separate_from: None,
        emptied: Default::default(),
        sealing: Sealing::default(),
        range: TokenRange::ALL,
        bytes: 1 << 20,
        pace: Default::default(),
        moving: Default::default(),
    }
}

/// The table files there are.
async fn files(env: &SimEnv) -> Vec<u64> {
    let entries = env.disk().list(&tables_dir()).await.unwrap();
    entries
        .iter()
        .filter_map(|entry| table_id(&entry.name))
        .collect()
}

async fn read(env: &SimEnv, output: &CompactOutput) -> Vec<Entry> {
    let mut found = vec![];
    for info in &output.tables {
        let table = Table::open(env.disk(), &tables_dir(), info.file_id, &Keys::default())
            .await
            .unwrap();
        assert_eq!(table.info(), info);
        let from = ScanFrom::Token(Token(0));
        let mut iter = table.iter(&from, TokenRange::ALL, ReadAhead::background(1));
        while let Some(stored) = iter.next().await.unwrap() {
            found.push(stored.entry);
        }
    }
    found
}

/// A record of one of 64 keys.
#[derive(Debug, Clone)]
struct Write {
    key: u8,
    tombstone: bool,
    stamp: u64,
    expires_at_ms: u64,
    len: usize,
}

fn write() -> impl Strategy<Value = Write> {
    let expires = prop_oneof![3 => Just(0), 1 => 900u64..1100];
    (0u8..64, any::<bool>(), 400u64..600, expires, 0usize..3000).prop_map(
        |(key, tombstone, stamp, expires_at_ms, len)| Write {
            key,
            tombstone,
            stamp,
            expires_at_ms,
            len,
        },
    )
}

/// Three runs, the last one the oldest; of each, the newest record of every key.
fn runs(writes: &[Write]) -> Vec<Vec<Entry>> {
    let third = writes.len().div_ceil(3).max(1);
    let mut runs: Vec<Vec<Entry>> = vec![];
    for (writes, base) in writes.chunks(third).zip((0..).step_by(1000)) {
        let mut run = BTreeMap::new();
        for (write, seqno) in writes.iter().zip(base..) {
            let mut entry = entry([write.key], seqno, noise(seqno, write.len));
            entry.record.stamp = write.stamp;
            entry.record.expires_at_ms = write.expires_at_ms;
            if write.tombstone {
                entry.record.kind = Kind::Tombstone;
            }
            run.insert(write.key, entry);
        }
        let mut run: Vec<Entry> = run.into_values().collect();
        sort(&mut run);
        runs.push(run);
    }
    runs.reverse();
    runs
}

/// What should come out, by the rule written out a second time.
fn expected(runs: &[Vec<Entry>], range: TokenRange, reach: Reach) -> Vec<Entry> {
    let mut newest: BTreeMap<&[u8], &Entry> = BTreeMap::new();
    for run in runs.iter().rev() {
        for entry in run.iter().filter(|entry| range.contains(entry.token)) {
            newest.insert(&entry.key, entry);
        }
    }
    let is_kept = |entry: &&&Entry| {
        let record = &entry.record;
        let is_expired = record.expires_at_ms != 0 && record.expires_at_ms <= NOW_MS;
        let is_dead = record.kind == Kind::Tombstone || is_expired;
        !(is_dead && record.stamp < FLOOR && reach == Reach::Bottom)
    };
    let mut kept: Vec<Entry> = newest
        .values()
        .filter(is_kept)
        .map(|e| (*e).clone())
        .collect();
    sort(&mut kept);
    kept
}

async fn write_runs(
    env: &SimEnv,
    runs: &[Vec<Entry>],
    range: TokenRange,
) -> Vec<Vec<(u64, TokenRange)>> {
    env.disk().create_dir(&tables_dir()).await.unwrap();
    let mut sources = vec![];
    for (file_id, run) in (1..).zip(runs) {
        write_table(env.disk(), file_id, options(FilterBits::Sixteen), run)
            .await
            .unwrap();
        sources.push(vec![(file_id, range)]);
    }
    sources
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_compaction_keeps_the_newest_record_of_every_key_and_purges_by_the_rule(
        writes in prop::collection::vec(write(), 1..200),
        at_bottom in any::<bool>(),
        bounds in prop_oneof![Just((0, u128::MAX)), any::<(u128, u128)>()],
        seed in any::<u64>(),
    ) {
        let reach = if at_bottom { Reach::Bottom } else { Reach::Above };
        let range = TokenRange {
            first: Token(bounds.0.min(bounds.1)),
            last: Token(bounds.0.max(bounds.1)),
        };
        let runs = runs(&writes);
        torc_sim::run(seed, |env| async move {
            let sources = write_runs(&env, &runs, range).await;
            let job = job(sources, reach);
            let output = env.background(JobClass::Compaction, job).await.unwrap();
            let found = read(&env, &output).await;
            assert_eq!(found, expected(&runs, range, reach));
            let kept = u64::try_from(found.len()).unwrap();
            assert_eq!(output.merged - output.purged, kept);
            let inside = |entry: &&Entry| range.contains(entry.token);
            let given = runs.iter().flatten().filter(inside).count();
            assert_eq!(output.merged + output.superseded, u64::try_from(given).unwrap());
            // Cut where they should be: not much above the size, and in order.
            for pair in output.tables.windows(2) {
                assert!(pair[0].last_token < pair[1].first_token);
                assert!(pair[0].bytes >= 16 << 10);
            }
            for info in &output.tables {
                assert!(info.bytes <= 36 << 10, "{} bytes", info.bytes);
            }
        });
    }
}

#[test]
fn a_job_with_too_few_file_ids_makes_its_last_table_larger() {
    torc_sim::run(1, |env| async move {
        let mut run: Vec<Entry> = (0..100u8)
            .map(|key| entry([key], key.into(), noise(key.into(), 1000)))
            .collect();
        sort(&mut run);
        let runs = [run];
        let sources = write_runs(&env, &runs, TokenRange::ALL).await;
        let mut job = job(sources, Reach::Above);
        job.file_ids = 7..9;
        let output = env.background(JobClass::Compaction, job).await.unwrap();
        let ids: Vec<u64> = output.tables.iter().map(|info| info.file_id).collect();
        assert_eq!(ids, [7, 8]);
        assert_eq!(read(&env, &output).await, runs[0]);
    });
}

#[test]
fn a_compaction_that_purges_everything_leaves_no_table() {
    torc_sim::run(1, |env| async move {
        let mut run: Vec<Entry> = (0..100u8)
            .map(|key| entry([key], key.into(), b""))
            .collect();
        for entry in &mut run {
            entry.record.kind = Kind::Tombstone;
            entry.record.stamp = 1;
        }
        sort(&mut run);
        let sources = write_runs(&env, &[run], TokenRange::ALL).await;
        let job = job(sources, Reach::Bottom);
        let output = env.background(JobClass::Compaction, job).await.unwrap();
        assert!(output.tables.is_empty());
        assert_eq!(output.purged, 100);
        assert_eq!(files(&env).await, [1]);
    });
}

/// A world with two runs of a megabyte each, and what the job should do with them.
fn world() -> (Simulation, HostId, Vec<Vec<(u64, TokenRange)>>) {
    let simulation = Simulation::new(1, torc_sim::Options::default());
    let host = simulation.add_host(1);
    let sources = simulation.run_on(host, ShardId(0), |env| async move {
        let runs: Vec<Vec<Entry>> = (0..2u64)
            .map(|run| {
                let entries = (0..1000u32).map(|key| {
                    entry(
                        key.to_le_bytes(),
                        (2 - run) * 1000 + u64::from(key),
                        noise(key.into(), 1000),
                    )
                });
                let mut entries: Vec<Entry> = entries.collect();
                sort(&mut entries);
                entries
            })
            .collect();
        write_runs(&env, &runs, TokenRange::ALL).await
    });
    (simulation, host, sources.unwrap())
}

#[test]
fn a_full_disk_ends_a_compaction_typed_and_without_leftovers() {
    let (simulation, host, sources) = world();
    let used = 2_400_000;
    let mut failures = 0;
    // From no room at all to more than enough.
    for room in (0..1_600_000).step_by(50_000) {
        let disk = DiskOptions {
            capacity_bytes: used + room,
            ..DiskOptions::default()
        };
        simulation.set_disk(host, disk);
        let job = job(sources.clone(), Reach::Above);
        let found = simulation.run_on(host, ShardId(0), |env| async move {
            let result = env.background(JobClass::Compaction, job).await;
            let left = files(&env).await;
            if let Ok(output) = &result {
                for info in &output.tables {
                    let path = table_path(&tables_dir(), info.file_id);
                    env.disk().remove(&path).await.unwrap();
                }
                env.disk().sync_dir(&tables_dir()).await.unwrap();
            }
            (result, left)
        });
        let (result, left) = found.unwrap();
        match result {
            Err(error) => {
                assert!(error.is_disk_full(), "{error:?}");
                assert_eq!(left, [1, 2], "room for {room}");
                failures += 1;
            }
            Ok(output) => assert_eq!(left.len(), 2 + output.tables.len()),
        }
    }
    assert!(
        (5..30).contains(&failures),
        "{failures} of 32 attempts failed"
    );
}

#[test]
fn a_damaged_input_ends_a_compaction_typed_and_without_leftovers() {
    let (simulation, host, sources) = world();
    let path = table_path(&tables_dir(), 2);
    assert!(simulation.flip_bits(host, &path, 500_000, 1));
    let job = job(sources, Reach::Bottom);
    let found = simulation.run_on(host, ShardId(0), |env| async move {
        let result = env.background(JobClass::Compaction, job).await;
        (result, files(&env).await)
    });
    let (result, left) = found.unwrap();
    match result {
        Err(JobError::Read(ReadError::Corrupt { path, offset, .. })) => {
            assert_eq!(path, table_path(Path::new("tables"), 2));
            assert!((450_000..=500_000).contains(&offset), "{offset}");
        }
        other => panic!("expected a corrupt input, got {other:?}"),
    }
    assert_eq!(left, [1, 2]);
}

#[test]
fn outputs_are_durable_when_a_job_has_succeeded() {
    let (simulation, host, sources) = world();
    for variant in 0..5 {
        let mut job = job(sources.clone(), Reach::Above);
        let first = 1000 + u64::from(variant) * 200;
        job.file_ids = first..first + 200;
        let output = simulation
            .run_on(host, ShardId(0), |env| async move {
                env.background(JobClass::Compaction, job).await.unwrap()
            })
            .unwrap();
        assert!(simulation.disk_is_settled(host));
        simulation.crash(host, variant);
        simulation.restart(host, 1);
        let entries = simulation
            .run_on(
                host,
                ShardId(0),
                |env| async move { read(&env, &output).await },
            )
            .unwrap();
        assert_eq!(entries.len(), 1000);
        assert!(
            entries.iter().all(|entry| entry.seqno >= 2000),
            "the newer run won"
        );
    }
}
