//! The log's bytes: as documented, and whole or found to be damaged.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use torc_env::{AlignedBuf, Disk, Env, File, OpenMode, Token, TreeId};
use torc_sim::{SimDisk, SimEnv};

use super::payload::{Logged, encode, encoded_bytes};
use super::{FrameMeta, Log, Replayed, Segment, SegmentId, SegmentPlan, replay};
use crate::commit::resize;
use crate::crypt::{DataKey, FileUse, Keys, WriterSalt, test_keys};
use crate::dump::assert_on_page;
use crate::error::OpenError;
use crate::frame::{HEADER_BYTES, Mark, frame_bytes};
use crate::memtable::Arena;
use crate::options::Fsync;
use crate::record::{Kind, Record};

const PAGE: &str = include_str!("../../../docs/formats/wal.md");
const ID: SegmentId = SegmentId(0x0000_0001_c0ff_ee00);
const SEGMENT_BYTES: u64 = 16 << 10;
const FRAMES_BYTES: usize = 8 << 10;

fn dir() -> PathBuf {
    PathBuf::from("wal")
}

/// A frame with one record, ready to be sealed.
fn frame(seqno: u64, record: &Record) -> (AlignedBuf, FrameMeta) {
    let token = Token::of(TreeId(7), b"greeting");
    let packed = Arena::default().pack(&record.at(token, b"greeting", seqno));
    let payload_len = encoded_bytes(&packed);
    let mut frame = AlignedBuf::zeroed(frame_bytes(payload_len));
    encode(&mut frame[HEADER_BYTES..], TreeId(7), &packed);
    let meta = FrameMeta {
        durable_through: seqno - 1,
        payload_len,
        record_count: 1,
        first_seqno: seqno,
        ..FrameMeta::default()
    };
    (frame, meta)
}

/// Writes a segment with two frames: a value, and a tombstone with an expiry.
async fn write_segment(env: &SimEnv) -> Vec<u8> {
    write_sealed(env, None).await
}

fn plan(id: SegmentId, key: Option<DataKey>) -> SegmentPlan {
    SegmentPlan {
        id,
        fsync: Fsync::Group,
        key,
    }
}

async fn write_sealed(env: &SimEnv, key: Option<DataKey>) -> Vec<u8> {
    let disk = env.disk();
    disk.create_dir(&dir()).await.unwrap();
    let segment = Segment::create(disk, &dir(), SEGMENT_BYTES, plan(ID, key))
        .await
        .unwrap();
    let file = segment.file.clone();
    let mut log = Log::new(Mark::default());
    log.switch(segment);
    let value = Record {
        kind: Kind::Value,
        stamp: 0x0011_2233_4455_6677,
        expires_at_ms: 0,
        value: Bytes::from_static(b"hello"),
    };
    let tombstone = Record {
        kind: Kind::Tombstone,
        expires_at_ms: 1_700_000_000_000,
        value: Bytes::new(),
        ..value.clone()
    };
    for (seqno, record) in [(1, value), (2, tombstone)] {
        let (mut frame, meta) = frame(seqno, &record);
        resize(&mut frame, log.frame_bytes(meta.payload_len));
        log.begin(frame, meta).run().await.0.unwrap();
    }
    let (read, buffer) = file.read_at(0, AlignedBuf::zeroed(FRAMES_BYTES)).await;
    assert_eq!(read.unwrap(), FRAMES_BYTES);
    buffer.to_vec()
}

async fn read_back(disk: &SimDisk) -> Result<(Vec<u64>, Replayed), OpenError> {
    read_with(disk, &Keys::default()).await
}

async fn read_with(disk: &SimDisk, keys: &Keys) -> Result<(Vec<u64>, Replayed), OpenError> {
    let mut seqnos = Vec::new();
    let apply = |seqno, record: &Logged<'_>| {
        assert_eq!((record.tree, record.key), (TreeId(7), &b"greeting"[..]));
        seqnos.push(seqno);
    };
    let replayed = replay(disk, &dir(), &[ID], Mark::default(), keys, apply).await?;
    Ok((seqnos, replayed))
}

async fn put_image(disk: &SimDisk, path: &Path, image: &[u8]) {
    let file = disk.open(path, OpenMode::Write).await.unwrap();
    file.write_at(0, AlignedBuf::copy_of(image))
        .await
        .0
        .unwrap();
}

#[test]
fn the_bytes_are_those_of_the_page() {
    let image = torc_sim::run(1, |env| async move { write_segment(&env).await });
    assert_on_page(PAGE, "wal.md", &image);
}

#[test]
fn every_flipped_bit_costs_its_frame_only_and_is_told_from_a_torn_tail() {
    torc_sim::run(1, |env| async move {
        let mut image = write_segment(&env).await;
        let (disk, path) = (env.disk(), ID.path(&dir()));
        for bit in 0..FRAMES_BYTES * 8 {
            // Every bit of the fields, and some of the padding, which one checksum covers.
            if bit % (4096 * 8) > 200 * 8 && bit % 61 != 0 {
                continue;
            }
            image[bit / 8] ^= 1 << (bit % 8);
            put_image(disk, &path, &image).await;
            let (seqnos, replayed) = read_back(disk).await.unwrap();
            if bit < 4096 * 8 {
                assert_eq!(seqnos, [2], "bit {bit}");
                assert_eq!(replayed.end.gap.unwrap().missing_from, 1, "bit {bit}");
            } else {
                assert_eq!(seqnos, [1], "bit {bit}");
                assert_eq!(replayed.end.gap, None, "bit {bit}");
            }
            image[bit / 8] ^= 1 << (bit % 8);
        }
        put_image(disk, &path, &image).await;
        assert_eq!(read_back(disk).await.unwrap().0, [1, 2]);
    });
}

#[test]
fn every_truncation_keeps_the_whole_frames() {
    torc_sim::run(1, |env| async move {
        write_segment(&env).await;
        let disk = env.disk();
        let file = disk.open(&ID.path(&dir()), OpenMode::Write).await.unwrap();
        for len in (0..=SEGMENT_BYTES).rev().step_by(31) {
            file.set_len(len).await.unwrap();
            let (seqnos, _) = read_back(disk).await.unwrap();
            let whole: &[u64] = match len {
                ..4096 => &[],
                4096..8192 => &[1],
                _ => &[1, 2],
            };
            assert_eq!(seqnos, whole, "{len} bytes");
        }
    });
}

#[test]
fn a_recycled_segment_holds_nothing_of_its_former_life() {
    torc_sim::run(1, |env| async move {
        write_segment(&env).await;
        let disk = env.disk();
        let id = SegmentId::new(2, 0);
        let old = (ID, SEGMENT_BYTES);
        let segment = Segment::recycle(disk, &dir(), old, plan(id, None))
            .await
            .unwrap();
        let empty = replay(
            disk,
            &dir(),
            &[id],
            Mark::default(),
            &Keys::default(),
            |_, _| panic!("a record"),
        )
        .await
        .unwrap();
        assert_eq!(empty.frames, 0);
        assert_eq!(empty.segment_last, [None]);
        drop(segment);
    });
}

#[test]
fn a_segment_that_cannot_be_read_is_an_error_and_not_an_empty_log() {
    torc_sim::run(1, |env| async move {
        let error = read_back(env.disk()).await.unwrap_err();
        assert!(matches!(error, OpenError::Io { .. }), "{error}");
    });
}

const SEALED_PAGE: &str = include_str!("../../../docs/formats/encryption.md");

fn sealed_key(salt: u8) -> Option<DataKey> {
    let file = FileUse::Segment(ID.0);
    test_keys(&[1]).begin(|| WriterSalt::fixed(salt), file)
}

#[test]
fn the_sealed_bytes_are_those_of_the_page() {
    torc_sim::run(1, |env| async move {
        let image = write_sealed(&env, sealed_key(2)).await;
        assert_on_page(SEALED_PAGE, "encryption.md", &image);
        let (seqnos, replayed) = read_with(env.disk(), &test_keys(&[1])).await.unwrap();
        assert_eq!(seqnos, [1, 2]);
        assert_eq!(replayed.segment_keys, [test_keys(&[1]).active()]);
    });
}

#[test]
fn every_flipped_bit_of_a_sealed_log_is_rot_or_a_torn_tail_and_never_a_wrong_record() {
    torc_sim::run(1, |env| async move {
        let mut image = write_sealed(&env, sealed_key(2)).await;
        let (disk, path) = (env.disk(), ID.path(&dir()));
        for bit in 0..FRAMES_BYTES * 8 {
            if bit % (4096 * 8) > 250 * 8 && bit % 61 != 0 {
                continue;
            }
            image[bit / 8] ^= 1 << (bit % 8);
            put_image(disk, &path, &image).await;
            let (seqnos, replayed) = read_with(disk, &test_keys(&[1])).await.unwrap();
            let is_first = bit < 4096 * 8;
            assert_eq!(seqnos, [if is_first { 2 } else { 1 }], "bit {bit}");
            assert_eq!(replayed.end.gap.is_some(), is_first, "bit {bit}");
            image[bit / 8] ^= 1 << (bit % 8);
        }
    });
}

/// Frames whose checksums fit, but which the writer did not seal so: what only the key tells.
#[test]
fn a_forged_frame_is_refused() {
    torc_sim::run(1, |env| async move {
        let image = write_sealed(&env, sealed_key(2)).await;
        let (disk, path) = (env.disk(), ID.path(&dir()));
        // A bit of a record, of the tag, of the salt, of the count of records, of the first seqno.
        let payload_end = 64 + 37 + 40;
        for at in [64, payload_end - 40, payload_end - 1, 44, 48] {
            let mut forged = image[4096..].to_vec();
            forged[at] ^= 4;
            let body = crc_fast::crc32_iscsi(&forged[64..]);
            forged[56..60].copy_from_slice(&body.to_le_bytes());
            let header = crc_fast::crc32_iscsi(&forged[..60]);
            forged[60..64].copy_from_slice(&header.to_le_bytes());
            put_image(disk, &path, &[&image[..4096], &forged].concat()).await;
            let error = read_with(disk, &test_keys(&[1])).await.unwrap_err();
            assert!(matches!(error, OpenError::Corrupt { .. }), "{at}: {error}");
            assert!(error.to_string().contains("authenticate"), "{at}: {error}");
        }
    });
}
