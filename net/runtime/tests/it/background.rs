//! Background jobs, on glommio and on the shard.

use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
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

/// Ends at once, and says where it ran.
struct Nothing;

impl Job for Nothing {
    type Output = std::thread::ThreadId;

    async fn run<D: Disk>(self, _: D) -> Self::Output {
        std::thread::current().id()
    }
}

/// In place of the file that the first executor of a class opens first: a pipe that is full. Whoever writes
/// into it waits until it is let go on.
struct Held {
    probe: PathBuf,
    pipe: std::fs::File,
}

impl Held {
    fn new(dir: &Path, class: &str) -> Held {
        let probe = dir.join(format!(".{class}-0.probe"));
        let made = Command::new("mkfifo").arg(&probe).status().unwrap();
        assert!(made.success());
        let mut pipe = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&probe)
            .unwrap();
        let full = loop {
            if let Err(error) = pipe.write(&[0; SECTOR_BYTES]) {
                break error;
            }
        };
        assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
        Held { probe, pipe }
    }

    /// The pipe stays open: what is still written into it must not fail.
    fn let_go(&mut self) {
        let file = self.probe.with_extension("file");
        std::fs::write(&file, [0; SECTOR_BYTES]).unwrap();
        std::fs::rename(&file, &self.probe).unwrap();
        while self.pipe.read(&mut [0; SECTOR_BYTES]).is_ok() {}
    }
}

#[test]
fn a_shard_goes_on_while_an_executor_starts() {
    let dir = temporary();
    let mut held = Held::new(dir.path(), "flush");
    let (goes_on, told) = mpsc::channel();
    // Not the shard lets the start go on, or this test would hang instead of failing.
    let watch = std::thread::spawn(move || {
        let told = told.recv_timeout(Duration::from_secs(60)).is_ok();
        held.let_go();
        (told, held)
    });
    let elsewhere = Runtime::block_on(&RuntimeConfig::new(dir.path()), move |shard| {
        let goes_on = goes_on.clone();
        async move {
            let mut jobs: Vec<_> = (0..3)
                .map(|_| Box::pin(shard.env().background(JobClass::Flush, Nothing)))
                .collect();
            for job in &mut jobs {
                assert!(futures_util::poll!(job).is_pending());
            }
            shard.env().sleep(Duration::from_millis(1)).await;
            goes_on.send(()).unwrap();
            let there = futures_util::future::join_all(jobs).await;
            let here = std::thread::current().id();
            there.into_iter().all(|thread| thread != here)
        }
    });
    let (told, _held) = watch.join().unwrap();
    assert!(told, "the shard waited for the executor");
    assert!(elsewhere.unwrap());
}

#[test]
fn jobs_of_an_executor_that_does_not_start_run_on_the_shard() {
    let dir = temporary();
    // What an executor writes first cannot be written.
    std::fs::create_dir(dir.path().join(".flush-0.probe")).unwrap();
    let here = Runtime::block_on(&RuntimeConfig::new(dir.path()), |shard| async move {
        let jobs = [(); 3].map(|()| shard.env().background(JobClass::Flush, Nothing));
        let there = futures_util::future::join_all(jobs).await;
        let here = std::thread::current().id();
        there.into_iter().all(|thread| thread == here)
    });
    assert!(here.unwrap());
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
            // Then the executor takes jobs.
            shard.env().background(JobClass::Flush, Nothing).await;
            let endless = shard.env().background(JobClass::Flush, Endless);
            let job = std::pin::pin!(endless);
            assert!(futures_util::poll!(job).is_pending());
        })
        .unwrap();
    }
}
