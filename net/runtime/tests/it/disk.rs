//! The disk on the shard's ring.

use std::io::ErrorKind;
use std::path::Path;

use torc_env::{AlignedBuf, Disk, Env, File, OpenMode, SECTOR_BYTES};

use crate::conformance;
use crate::support::on_shard;

#[test]
fn the_ring_disk_conforms() {
    on_shard(|shard| async move { conformance::all(shard.env().disk()).await });
}

#[test]
fn paths_cannot_leave_the_data_directory() {
    on_shard(|shard| async move {
        let disk = shard.env().disk();
        for path in ["/etc/passwd", "../outside", "a/../../outside"] {
            let path = Path::new(path);
            let refused = disk.open(path, OpenMode::Read).await.err().unwrap();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
            let refused = disk.list(path).await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(disk.list(Path::new("")).await.unwrap(), []);
    });
}

#[test]
fn an_abandoned_write_still_happens_and_its_buffer_stays_alive() {
    on_shard(|shard| async move {
        let disk = shard.env().disk();
        let path = Path::new("file");
        let file = disk.open(path, OpenMode::CreateNew).await.unwrap();
        for sector in 0..64_u64 {
            let mut buffer = AlignedBuf::zeroed(SECTOR_BYTES);
            buffer.fill(7);
            let write = file.write_at(sector * SECTOR_BYTES as u64, buffer);
            let started = futures_util::poll!(std::pin::pin!(write));
            assert!(started.is_pending(), "the kernel has not been entered yet");
        }
        // The ring orders nothing: look until all have arrived.
        let until = shard.env().now() + std::time::Duration::from_secs(30);
        loop {
            let (read, buffer) = file.read_at(0, AlignedBuf::zeroed(64 * SECTOR_BYTES)).await;
            if read.unwrap() == buffer.len() && buffer.iter().all(|byte| *byte == 7) {
                break;
            }
            assert!(shard.env().now() < until, "an abandoned write got lost");
        }
    });
}

#[test]
fn many_reads_in_flight_each_get_their_own_sector() {
    on_shard(|shard| async move {
        let disk = shard.env().disk();
        let path = Path::new("file");
        let file = disk.open(path, OpenMode::CreateNew).await.unwrap();
        let mut content = AlignedBuf::zeroed(256 * SECTOR_BYTES);
        for (sector, byte) in content.chunks_mut(SECTOR_BYTES).zip(0..=255) {
            sector.fill(byte);
        }
        file.write_at(0, content).await.0.unwrap();
        // More operations than the submission queue has entries.
        let reads = (0..2000_u64).map(|number| {
            let file = file.clone();
            async move {
                let sector = number % 256;
                let buffer = AlignedBuf::zeroed(SECTOR_BYTES);
                let (read, buffer) = file.read_at(sector * SECTOR_BYTES as u64, buffer).await;
                assert_eq!(read.unwrap(), SECTOR_BYTES);
                assert!(buffer.iter().all(|byte| u64::from(*byte) == sector));
            }
        });
        futures_util::future::join_all(reads).await;
    });
}

#[test]
fn a_large_file_that_was_removed_is_read_on_and_keeps_its_other_name() {
    const BYTES: u64 = 12 << 20;
    on_shard(|shard| async move {
        let env = shard.env();
        let disk = env.disk();
        let paths = ["read", "linked", "alone"].map(Path::new);
        for path in paths {
            let file = disk.open(path, OpenMode::CreateNew).await.unwrap();
            file.allocate(BYTES).await.unwrap();
            let mut end = AlignedBuf::zeroed(SECTOR_BYTES);
            end.fill(7);
            let at = BYTES - SECTOR_BYTES as u64;
            file.write_at(at, end).await.0.unwrap();
        }
        let kept = Path::new("kept");
        disk.hard_link(paths[1], kept).await.unwrap();
        let reader = disk.open(paths[0], OpenMode::Read).await.unwrap();
        for path in paths {
            disk.remove(path).await.unwrap();
            let gone = disk.open(path, OpenMode::Read).await.err().unwrap();
            assert_eq!(gone.kind(), ErrorKind::NotFound);
        }
        let until = env.now() + std::time::Duration::from_secs(60);
        // The one that nobody reads goes first, after the thread has met the one that is read.
        while shard.removed_pending_bytes() > BYTES {
            assert!(env.now() < until, "nothing is given back");
            env.sleep(std::time::Duration::from_millis(1)).await;
        }
        let linked = disk.open(kept, OpenMode::Read).await.unwrap();
        for file in [reader, linked] {
            let at = BYTES - SECTOR_BYTES as u64;
            let (read, end) = file.read_at(at, AlignedBuf::zeroed(SECTOR_BYTES)).await;
            assert_eq!(read.unwrap(), SECTOR_BYTES);
            assert!(end.iter().all(|byte| *byte == 7));
        }
        while shard.removed_pending_bytes() > 0 {
            assert!(env.now() < until, "a file stays that nobody reads any more");
            env.sleep(std::time::Duration::from_millis(1)).await;
        }
    });
}
