//! Background jobs, on glommio and on the shard.

use std::path::Path;
use std::time::Duration;

use torc_env::{AlignedBuf, Disk, Env, File, Job, JobClass, OpenMode, SECTOR_BYTES};
use torc_runtime::{Background, DiskRates, Runtime, RuntimeConfig};

use crate::conformance;
use crate::support::temporary;

const KINDS: [Background; 2] = [Background::Glommio, Background::Shard];
const CLASSES: [JobClass; 3] = [JobClass::Flush, JobClass::Compaction, JobClass::Scrub];

/// Runs every conformance check of the disk.
struct Conform;

impl Job for Conform {
    type Output = std::thread::ThreadId;

    async fn run<D: Disk>(self, disk: D) -> Self::Output {
        conformance::all(&disk).await;
        std::thread::current().id()
    }
}

#[test]
fn the_disk_of_a_background_job_conforms() {
    for kind in KINDS {
        let dir = temporary();
        let config = RuntimeConfig {
            background: kind,
            ..RuntimeConfig::new(dir.path())
        };
        let elsewhere = Runtime::block_on(&config, |shard| async move {
            let there = shard.env().background(JobClass::Compaction, Conform).await;
            there != std::thread::current().id()
        });
        assert_eq!(elsewhere.unwrap(), kind == Background::Glommio);
    }
}

/// Adds up a file's bytes.
struct Sum;

impl Job for Sum {
    type Output = u64;

    async fn run<D: Disk>(self, disk: D) -> u64 {
        let file = disk.open(Path::new("input"), OpenMode::Read).await.unwrap();
        let (mut sum, mut offset) = (0, 0);
        while offset < file.len().await.unwrap() {
            let (read, buffer) = file.read_at(offset, AlignedBuf::zeroed(SECTOR_BYTES)).await;
            let read = read.unwrap();
            sum += buffer[..read]
                .iter()
                .map(|byte| u64::from(*byte))
                .sum::<u64>();
            offset += read as u64;
            disk.give_way().await;
        }
        sum
    }
}

#[test]
fn jobs_of_every_class_run_at_once_beside_the_shard() {
    for kind in KINDS {
        let dir = temporary();
        let config = RuntimeConfig {
            background: kind,
            ..RuntimeConfig::new(dir.path())
        };
        let sums = Runtime::block_on(&config, |shard| async move {
            let env = shard.env();
            let input = env.disk().open(Path::new("input"), OpenMode::CreateNew);
            let mut ones = AlignedBuf::zeroed(64 * SECTOR_BYTES);
            ones.fill(1);
            input.await.unwrap().write_at(0, ones).await.0.unwrap();
            let jobs = CLASSES
                .into_iter()
                .cycle()
                .take(30)
                .map(|class| env.background(class, Sum));
            futures_util::future::join_all(jobs).await
        });
        assert_eq!(sums.unwrap(), vec![64 * SECTOR_BYTES as u64; 30]);
    }
}

#[test]
fn on_a_disk_of_known_rates_compaction_waits_and_a_flush_does_not() {
    for class in [JobClass::Compaction, JobClass::Flush] {
        let dir = temporary();
        // So slow that a sector takes longer than a job may be ahead of its pace.
        let rate = 32 * SECTOR_BYTES as u64;
        let config = RuntimeConfig {
            disk_rates: Some(DiskRates {
                read: rate,
                write: rate,
            }),
            ..RuntimeConfig::new(dir.path())
        };
        let waited = Runtime::block_on(&config, move |shard| async move {
            let env = shard.env();
            let input = env.disk().open(Path::new("input"), OpenMode::CreateNew);
            let zeros = AlignedBuf::zeroed(2 * SECTOR_BYTES);
            input.await.unwrap().write_at(0, zeros).await.0.unwrap();
            env.background(class, Sum).await;
            shard.background_waited()
        });
        assert_eq!(
            waited.unwrap() > Duration::ZERO,
            class == JobClass::Compaction
        );
    }
}

/// Never ends.
struct Endless;

impl Job for Endless {
    type Output = ();

    async fn run<D: Disk>(self, _: D) {
        std::future::pending::<()>().await;
    }
}

#[test]
fn stopping_does_not_wait_for_jobs() {
    for kind in KINDS {
        let dir = temporary();
        let config = RuntimeConfig {
            background: kind,
            ..RuntimeConfig::new(dir.path())
        };
        Runtime::block_on(&config, |shard| async move {
            let endless = shard.env().background(JobClass::Flush, Endless);
            let job = std::pin::pin!(endless);
            assert!(futures_util::poll!(job).is_pending());
        })
        .unwrap();
    }
}
