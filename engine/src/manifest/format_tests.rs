//! The manifest's bytes: as documented, and whole or found to be damaged.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use torc_env::{AlignedBuf, Class, Disk, Env, File, OpenMode, ShardId, Token, TokenRange, TreeId};
use torc_sim::{Cuts, DiskOptions, SimDisk, SimEnv, Simulation, at_every_power_cut};

use super::change::{Change, Listed, State};
use super::files::{LogFile, Pointer, RootFile, log_path, root_path};
use super::{FULL_RETRY, Manifest, files};
use crate::crypt::{DataKey, FileUse, Keys, WriterSalt, test_keys};
use crate::dump::assert_on_page;
use crate::error::OpenError;
use crate::frame::Mark;
use crate::wal::SegmentId;

const PAGE: &str = include_str!("../../../docs/formats/manifest.md");
const ID: u64 = 0x1122_3344_5566_7788;

fn dir() -> PathBuf {
    PathBuf::from("shard-00")
}

fn edits() -> [Vec<Change>; 2] {
    [
        vec![Change::AddSegment(SegmentId(0x0000_0001_c0ff_ee00))],
        vec![
            Change::AddTable(Listed {
                tree: TreeId(7),
                file_id: 1,
                level: 0,
                run: 1,
                extent: TokenRange {
                    first: Token(0x10),
                    last: Token(0x20),
                },
                bytes: 8192,
            }),
            Change::Flushed(Mark {
                sequence: 9,
                hash: 0xabcd,
            }),
        ],
    ]
}

/// A root and a log of a snapshot and two edits; returns the log's three frames and the root.
async fn write_manifest(env: &SimEnv) -> (Vec<u8>, Vec<u8>, Pointer) {
    write_sealed(env, None).await
}

async fn write_sealed(env: &SimEnv, key: Option<DataKey>) -> (Vec<u8>, Vec<u8>, Pointer) {
    let disk = env.disk();
    disk.create_dir(&dir()).await.unwrap();
    let snapshot = State::default().snapshot();
    let mut log = LogFile::create(disk, &dir(), ID, &snapshot, key)
        .await
        .unwrap();
    let mut root = RootFile::create(disk, &dir()).await.unwrap();
    root.point_to(log.pointer()).await.unwrap();
    for edit in edits() {
        log.append(&edit).await.unwrap();
    }
    let log_bytes = image(disk, &log_path(&dir(), ID), 3 * 4096).await;
    let root_bytes = image(disk, &root_path(&dir()), 2 * 4096).await;
    (log_bytes, root_bytes, log.pointer())
}

async fn image(disk: &SimDisk, path: &Path, len: usize) -> Vec<u8> {
    let file = disk.open(path, OpenMode::Read).await.unwrap();
    let (read, buffer) = file.read_at(0, AlignedBuf::zeroed(len)).await;
    assert_eq!(read.unwrap(), len);
    buffer.to_vec()
}

async fn put_image(disk: &SimDisk, path: &Path, image: &[u8]) {
    let file = disk.open(path, OpenMode::Write).await.unwrap();
    file.write_at(0, AlignedBuf::copy_of(image))
        .await
        .0
        .unwrap();
}

async fn read(
    disk: &SimDisk,
    pointer: Pointer,
) -> Result<(LogFile<<SimDisk as Disk>::File>, State), OpenError> {
    LogFile::read(disk, &dir(), pointer, &Keys::default(), WriterSalt::default).await
}

fn state_after(edits: &[Vec<Change>]) -> State {
    let mut state = State::default();
    for change in edits.iter().flatten() {
        state.apply(change).unwrap();
    }
    state
}

#[test]
fn the_bytes_are_those_of_the_page() {
    let (log, root, _) = torc_sim::run(1, |env| async move { write_manifest(&env).await });
    assert_on_page(PAGE, "manifest.md", &log);
    assert_on_page(PAGE, "manifest.md", &root);
}

#[test]
fn every_flipped_bit_of_the_log_is_found() {
    torc_sim::run(1, |env| async move {
        let (mut log, _, pointer) = write_manifest(&env).await;
        let (disk, path) = (env.disk(), log_path(&dir(), ID));
        for bit in 0..log.len() * 8 {
            // Every bit of the fields, and some of the padding, which one checksum covers.
            if bit % (4096 * 8) > 200 * 8 && bit % 61 != 0 {
                continue;
            }
            log[bit / 8] ^= 1 << (bit % 8);
            put_image(disk, &path, &log).await;
            let read = read(disk, pointer).await;
            if bit < 2 * 4096 * 8 {
                // The snapshot, or an edit that another one follows.
                assert!(matches!(read, Err(OpenError::Corrupt { .. })), "bit {bit}");
            } else {
                // The last edit cannot be told from one that was never finished.
                assert_eq!(read.unwrap().1, state_after(&edits()[..1]), "bit {bit}");
            }
            log[bit / 8] ^= 1 << (bit % 8);
        }
        put_image(disk, &path, &log).await;
        let read = read(disk, pointer).await.unwrap();
        assert_eq!(read.1, state_after(&edits()));
    });
}

#[test]
fn every_truncation_keeps_the_whole_edits_or_is_refused() {
    torc_sim::run(1, |env| async move {
        let (_, _, pointer) = write_manifest(&env).await;
        let disk = env.disk();
        let file = disk
            .open(&log_path(&dir(), ID), OpenMode::Write)
            .await
            .unwrap();
        for len in (0..=3 * 4096).rev().step_by(31) {
            file.set_len(len).await.unwrap();
            let read = read(disk, pointer).await;
            match len {
                ..4096 => assert!(matches!(read, Err(OpenError::Corrupt { .. })), "{len}"),
                4096..8192 => assert_eq!(read.unwrap().1, State::default(), "{len}"),
                8192..12_288 => assert_eq!(read.unwrap().1, state_after(&edits()[..1]), "{len}"),
                _ => assert_eq!(read.unwrap().1, state_after(&edits()), "{len}"),
            }
        }
    });
}

#[test]
fn a_damaged_root_slot_leaves_the_other_one() {
    torc_sim::run(1, |env| async move {
        write_manifest(&env).await;
        let (disk, path) = (env.disk(), root_path(&dir()));
        let (mut root, first) = RootFile::read(disk, &dir()).await.unwrap().unwrap();
        let second = Pointer {
            log: 5,
            first_hash: 6,
        };
        root.point_to(second).await.unwrap();
        let mut bytes = image(disk, &path, 2 * 4096).await;
        for bit in 0..80 * 8 {
            for (slot, left) in [(0, first), (1, second)] {
                let at = slot * 4096 + bit / 8;
                bytes[at] ^= 1 << (bit % 8);
                put_image(disk, &path, &bytes).await;
                let read = RootFile::read(disk, &dir()).await.unwrap();
                assert_eq!(read.unwrap().1, left, "slot {slot}, bit {bit}");
                bytes[at] ^= 1 << (bit % 8);
            }
        }
        put_image(disk, &path, &vec![0; 2 * 4096]).await;
        assert!(RootFile::read(disk, &dir()).await.unwrap().is_none());
    });
}

#[test]
fn many_edits_go_through_many_logs() {
    torc_sim::run(1, |env| async move {
        env.disk().create_dir(&dir()).await.unwrap();
        let manifest = Manifest::open(&env, &dir(), Some(State::default()), &Keys::default())
            .await
            .unwrap();
        for number in 0..300u32 {
            let id = SegmentId::new(number, env.random());
            manifest.commit(&[Change::AddSegment(id)]).await.unwrap();
            if number % 2 == 0 {
                manifest.commit(&[Change::RemoveSegment(id)]).await.unwrap();
            }
            if number % 50 == 0 {
                let reopened = Manifest::open(&env, &dir(), None, &Keys::default())
                    .await
                    .unwrap();
                assert_eq!(*reopened.state(), *manifest.state());
            }
        }
        assert_eq!(manifest.state().segments.len(), 150);
        let names = env.disk().list(&dir()).await.unwrap();
        assert_eq!(names.len(), 2, "one root, one log: {names:?}");
        let reopened = Manifest::open(&env, &dir(), None, &Keys::default())
            .await
            .unwrap();
        assert_eq!(*reopened.state(), *manifest.state());
    });
}

#[test]
fn a_store_without_a_root_is_not_taken_for_a_fresh_one() {
    torc_sim::run(1, |env| async move {
        write_manifest(&env).await;
        env.disk().remove(&files::root_path(&dir())).await.unwrap();
        let error = Manifest::open(&env, &dir(), None, &Keys::default())
            .await
            .err()
            .unwrap();
        assert!(matches!(error, OpenError::Corrupt { .. }));
        let manifest = Manifest::open(&env, &dir(), Some(State::default()), &Keys::default())
            .await
            .unwrap();
        assert_eq!(*manifest.state(), State::default());
    });
}

/// The numbers of the segments that were added, and how many of these edits were acknowledged.
#[derive(Default)]
struct Promised {
    begun: Vec<SegmentId>,
    acknowledged: usize,
}

async fn many_edits(env: SimEnv, promised: Rc<RefCell<Promised>>) {
    env.disk().create_dir(&dir()).await.unwrap();
    let manifest = Manifest::open(&env, &dir(), Some(State::default()), &Keys::default())
        .await
        .unwrap();
    for number in 0..60u32 {
        let id = SegmentId::new(number, env.random());
        promised.borrow_mut().begun.push(id);
        manifest.commit(&[Change::AddSegment(id)]).await.unwrap();
        promised.borrow_mut().acknowledged += 1;
    }
}

async fn is_a_prefix(env: SimEnv, promised: Rc<RefCell<Promised>>) {
    env.disk().create_dir(&dir()).await.unwrap();
    let (begun, acknowledged) = {
        let promised = promised.borrow();
        (promised.begun.clone(), promised.acknowledged)
    };
    let may_be_fresh = acknowledged == 0;
    let manifest = Manifest::open(
        &env,
        &dir(),
        may_be_fresh.then(State::default),
        &Keys::default(),
    )
    .await
    .unwrap();
    let found = manifest.state().segments.clone();
    assert!(found.len() >= acknowledged, "{acknowledged} acknowledged");
    assert_eq!(found, begun[..found.len()]);
}

#[test]
fn edits_survive_a_power_cut_at_any_step_of_a_rotation() {
    let images = at_every_power_cut(&Cuts::default(), many_edits, is_a_prefix);
    assert!(images > 300, "{images} images");
}

const SEALED_PAGE: &str = include_str!("../../../docs/formats/encryption.md");

fn sealed_key() -> Option<DataKey> {
    let file = FileUse::Manifest(ID);
    test_keys(&[1]).begin(|| WriterSalt::fixed(2), file)
}

#[test]
fn the_sealed_bytes_are_those_of_the_page() {
    torc_sim::run(1, |env| async move {
        let (log, _, pointer) = write_sealed(&env, sealed_key()).await;
        assert_on_page(SEALED_PAGE, "encryption.md", &log);
        let keys = test_keys(&[1]);
        let read = LogFile::read(env.disk(), &dir(), pointer, &keys, WriterSalt::default).await;
        assert_eq!(read.unwrap().1, state_after(&edits()));
    });
}

/// The edit that a cut has torn is followed by another one with its number, under another data key.
#[test]
fn a_log_is_continued_under_a_salt_of_its_own() {
    torc_sim::run(1, |env| async move {
        let (_, _, pointer) = write_sealed(&env, sealed_key()).await;
        let keys = test_keys(&[1]);
        let disk = env.disk();
        let path = log_path(&dir(), ID);
        let whole = image(disk, &path, 3 * 4096).await;
        put_image(disk, &path, &[&whole[..8192], &[0; 4096]].concat()).await;
        let salt = || WriterSalt::fixed(3);
        let read = LogFile::read(disk, &dir(), pointer, &keys, salt).await;
        let (mut log, state) = read.unwrap();
        assert_eq!(state, state_after(&edits()[..1]));
        log.append(&edits()[1]).await.unwrap();
        let again = image(disk, &path, 3 * 4096).await;
        assert_eq!(again[..8192], whole[..8192]);
        assert_ne!(again[8192 + 64..8192 + 128], whole[8192 + 64..8192 + 128]);
        let read = LogFile::read(disk, &dir(), pointer, &keys, salt).await;
        assert_eq!(read.unwrap().1, state_after(&edits()));
    });
}

async fn logs(env: &SimEnv) -> usize {
    let entries = env.disk().list(&dir()).await.unwrap();
    let logs = entries.iter().filter(|entry| entry.name.ends_with(".log"));
    logs.count()
}

/// More edits than fit into what a log has reserved, each of which finds that the log's key is not the active one.
async fn more_edits_than_fit(manifest: &Manifest<SimEnv>, env: &SimEnv) {
    for number in 1..=200 {
        let edit = [Change::AddSegment(SegmentId(number))];
        manifest.commit(&edit).await.unwrap();
        assert_eq!(logs(env).await, 1, "after edit {number}");
    }
}

#[test]
fn new_logs_that_a_full_disk_refuses_leave_nothing_behind_however_often_they_are_tried() {
    for (seed, room) in [(1, 0), (2, 4096), (3, 200 << 10)] {
        let simulation = Simulation::new(seed, torc_sim::Options::default());
        let host = simulation.add_host(1);
        let manifest = simulation.run_on(host, ShardId(0), |env| async move {
            env.disk().create_dir(&dir()).await.unwrap();
            let opened =
                Manifest::open(&env, &dir(), Some(State::default()), &test_keys(&[1])).await;
            opened.unwrap()
        });
        let manifest = Rc::new(manifest.unwrap());
        manifest.set_keys(&test_keys(&[2, 1]));
        let used: u64 = simulation.files(host).iter().map(|(_, bytes)| bytes).sum();
        simulation.set_disk(
            host,
            DiskOptions {
                capacity_bytes: used + room,
                ..DiskOptions::default()
            },
        );
        let is_done = Rc::new(Cell::new(false));
        let writer = (manifest.clone(), is_done.clone());
        let left = simulation.run_on(host, ShardId(0), |env| async move {
            let edits = env.clone();
            env.spawn(Class::Control, async move {
                more_edits_than_fit(&writer.0, &edits).await;
                writer.1.set(true);
            });
            env.sleep(20 * FULL_RETRY).await;
            logs(&env).await
        });
        assert_eq!(left.unwrap(), 1, "with {room} bytes of room");
        assert!(!is_done.get(), "an edit waits for room");
        simulation.set_disk(host, DiskOptions::default());
        simulation.run_on(host, ShardId(0), |env| async move {
            env.sleep(2 * FULL_RETRY).await;
        });
        assert!(is_done.get());
        assert_eq!(manifest.key_ids(), BTreeSet::from([manifest.active_key()]));
    }
}

#[cfg(mutations)]
mod mutations {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use torc_env::mutation;

    #[test]
    fn a_forgotten_sync_of_the_directory_is_found() {
        mutation::select(Some("forget_directory_sync"));
        let test = super::edits_survive_a_power_cut_at_any_step_of_a_rotation;
        let found = catch_unwind(AssertUnwindSafe(test)).is_err();
        mutation::select(None);
        assert!(found);
    }
}
