//! Files that a newer program has written: an older one says so and leaves everything as it is. A version that its checksum
//! does not vouch for is damage.

use std::path::{Path, PathBuf};

use torc_engine::inspect::{InspectError, View, inspect};
use torc_engine::{OpenError, Recovery, Store};
use torc_env::{AlignedBuf, Disk, Env, File, OpenMode, SECTOR_BYTES};
use torc_sim::{DiskOptions, HostId, SimEnv, Simulation};

use crate::faults::{run, world};
use crate::support::{options, put, value};
use crate::table_support::noise;

/// Two tables, one of which refers to a blob, and something in the log.
fn filled() -> (Simulation, HostId) {
    let (simulation, host) = world(1, DiskOptions::default());
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        put(&store, "small", value("1", 1)).await.unwrap();
        store.flush().await.unwrap();
        put(&store, "large", value(noise(2, 5000), 2))
            .await
            .unwrap();
        store.flush().await.unwrap();
        put(&store, "logged", value("3", 3)).await.unwrap();
        // No close: the log is needed.
    });
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    (simulation, host)
}

/// The files whose names end so, in order.
fn files(simulation: &Simulation, host: HostId, end: &str) -> Vec<PathBuf> {
    let files = simulation.files(host).into_iter();
    let mut paths: Vec<PathBuf> = files.map(|(path, _)| path).collect();
    paths.retain(|path| path.to_string_lossy().ends_with(end));
    paths.sort();
    paths
}

/// Every file with what it holds.
fn everything(simulation: &Simulation, host: HostId) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = files(simulation, host, "").into_iter();
    paths
        .map(|path| {
            let content = simulation.content(host, &path).unwrap();
            (path, content)
        })
        .collect()
}

/// Changes the sector at `offset`.
fn change(simulation: &Simulation, host: HostId, path: &Path, offset: u64, sector: Vec<u8>) {
    let path = path.to_owned();
    run(simulation, host, move |env| async move {
        let opened = env.disk().open(&path, OpenMode::Write).await;
        let file = opened.unwrap();
        let (written, _) = file.write_at(offset, AlignedBuf::copy_of(&sector)).await;
        written.unwrap();
        file.sync().await.unwrap();
    });
}

fn open(simulation: &Simulation, host: HostId) -> Result<Recovery, OpenError> {
    run(simulation, host, |env: SimEnv| async move {
        let opened = Store::open(env, options()).await;
        opened.map(|(_, recovery)| recovery)
    })
}

/// How a file's version and checksum are changed: a sector of it, and where that lies.
type Seal = fn(u64, u64, &mut [u8]);

/// Of tables and blobs: bound to the file's id and the place.
fn seal_footer(file_id: u64, offset: u64, footer: &mut [u8]) {
    let mut covered = file_id.to_le_bytes().to_vec();
    covered.extend_from_slice(&offset.to_le_bytes());
    covered.extend_from_slice(&footer[12..]);
    let checksum = u32::try_from(crc_fast::checksum(
        crc_fast::CrcAlgorithm::Crc32Iscsi,
        &covered,
    ));
    footer[8..12].copy_from_slice(&checksum.unwrap().to_le_bytes());
}

/// Of frames.
fn seal_frame(_: u64, _: u64, frame: &mut [u8]) {
    let checksum = crc_fast::crc32_iscsi(&frame[..60]);
    frame[60..64].copy_from_slice(&checksum.to_le_bytes());
}

/// A kind of file: the end of its name, where its version is in the first or last sector, the newest known.
struct Format {
    end: &'static str,
    is_at_end: bool,
    version_at: usize,
    known: u16,
    seal: Seal,
}

impl Format {
    const fn footer(end: &'static str, known: u16) -> Self {
        Self {
            end,
            is_at_end: true,
            version_at: 12,
            known,
            seal: seal_footer,
        }
    }

    const fn frame(end: &'static str, known: u16) -> Self {
        Self {
            end,
            is_at_end: false,
            version_at: 4,
            known,
            seal: seal_frame,
        }
    }

    /// The sector in which the version is, and where it lies.
    fn sector(&self, simulation: &Simulation, host: HostId, path: &Path) -> (u64, Vec<u8>) {
        let content = simulation.content(host, path).unwrap();
        let at = if self.is_at_end {
            content.len() - SECTOR_BYTES
        } else {
            0
        };
        let sector = content[at..at + SECTOR_BYTES].to_vec();
        (u64::try_from(at).unwrap(), sector)
    }

    /// Changes the version of a file, and its checksum if it `is_sealed`.
    fn become_newer(&self, simulation: &Simulation, host: HostId, path: &Path, is_sealed: bool) {
        let (offset, mut sector) = self.sector(simulation, host, path);
        let at = self.version_at;
        sector[at..at + 2].copy_from_slice(&(self.known + 1).to_le_bytes());
        if is_sealed {
            let stem = path.file_stem().unwrap().to_string_lossy();
            let file_id = u64::from_str_radix(&stem, 16).unwrap_or_default();
            (self.seal)(file_id, offset, &mut sector);
        }
        change(simulation, host, path, offset, sector);
    }
}

const TABLE: Format = Format::footer(".table", 3);
const BLOB: Format = Format::footer(".blob", 1);
const WAL: Format = Format::frame(".wal", 2);
const LOG: Format = Format::frame(".log", 2);
const ROOT: Format = Format {
    // Generation 1 lies in the second slot.
    is_at_end: true,
    ..Format::frame(".root", 1)
};

#[test]
fn a_newer_file_of_any_kind_is_refused_by_name_and_nothing_is_changed() {
    for format in [TABLE, BLOB, WAL, LOG, ROOT] {
        let (simulation, host) = filled();
        let path = files(&simulation, host, format.end)[0].clone();
        format.become_newer(&simulation, host, &path, true);
        // What a crash between two steps may leave, and an open that succeeds removes.
        run(&simulation, host, |env: SimEnv| async move {
            for name in [
                "manifest-00000000000000aa.log",
                "tables/00000000000000aa.table",
            ] {
                let path = Path::new("shard-00").join(name);
                let created = env.disk().open(&path, OpenMode::CreateNew).await;
                created.unwrap().sync().await.unwrap();
            }
        });
        let before = everything(&simulation, host);
        let refused = open(&simulation, host).unwrap_err();
        let OpenError::Newer { path: named, .. } = &refused else {
            panic!("{}: {refused}", format.end);
        };
        assert_eq!(*named, path);
        let what = refused.to_string();
        let versions = format!(
            "format version {}, this program reads up to {}",
            format.known + 1,
            format.known
        );
        assert!(what.contains(&versions), "{what}");
        assert!(what.contains("start a newer program"), "{what}");
        assert!(before == everything(&simulation, host), "{what}");
    }
}

#[test]
fn a_version_that_its_checksum_does_not_vouch_for_is_damage() {
    for (format, damaged_tables) in [(TABLE, 1), (BLOB, 0)] {
        let (simulation, host) = filled();
        let path = files(&simulation, host, format.end)[0].clone();
        format.become_newer(&simulation, host, &path, false);
        let recovery = open(&simulation, host).unwrap();
        assert_eq!(recovery.damaged_tables, damaged_tables, "{}", format.end);
    }
    // The first frame is in a table by now, so nothing is lost with it.
    let (simulation, host) = filled();
    let path = files(&simulation, host, WAL.end)[0].clone();
    WAL.become_newer(&simulation, host, &path, false);
    open(&simulation, host).unwrap();
    for format in [LOG, ROOT] {
        let (simulation, host) = filled();
        let path = files(&simulation, host, format.end)[0].clone();
        format.become_newer(&simulation, host, &path, false);
        let refused = open(&simulation, host).unwrap_err();
        assert!(matches!(refused, OpenError::Corrupt { .. }), "{refused}");
    }
}

#[test]
fn features_that_are_not_known_are_refused_like_a_version() {
    let (simulation, host) = filled();
    let path = files(&simulation, host, TABLE.end)[0].clone();
    let (offset, mut sector) = TABLE.sector(&simulation, host, &path);
    sector[14] |= 8;
    let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
    seal_footer(u64::from_str_radix(&stem, 16).unwrap(), offset, &mut sector);
    change(&simulation, host, &path, offset, sector);
    let refused = open(&simulation, host).unwrap_err();
    let what = refused.to_string();
    assert!(what.contains("features 0008"), "{what}");
}

#[test]
fn inspection_does_not_call_a_newer_file_damaged() {
    for format in [TABLE, BLOB, WAL, LOG, ROOT] {
        let (simulation, host) = filled();
        let path = files(&simulation, host, format.end)[0].clone();
        format.become_newer(&simulation, host, &path, true);
        let lines = run(&simulation, host, move |env: SimEnv| async move {
            let mut lines = Vec::new();
            let view = View::default();
            let looked = inspect(env.disk(), &path, &view, &mut |line| lines.push(line)).await;
            assert!(matches!(looked, Err(InspectError::Newer { .. })));
            lines
        });
        assert!(!lines.concat().contains("DAMAGED"), "{lines:?}");
    }
}
