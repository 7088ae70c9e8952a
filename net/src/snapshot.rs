//! Snapshots of a whole node: one cut over all its shards, kept as hard links below `snapshots/`, listed,
//! read and removed over HTTP. What `torc backup` copies.
//!
//! A snapshot is a directory `snapshots/<id>` with a store for each shard and `snapshot.json`, which
//! says what belongs to it. Taking one makes the updates of all shards wait until each shard's log is
//! at rest, so that no write is in it without one that it could have followed.
//!
//! One order at a time changes which snapshots there are, and it runs to its end when the client that gave it
//! has left.
//!
//! Invariants: `snapshot.json` is written last, so a directory without it is none and is removed at the
//! next start; while a snapshot is kept, no deletion that is younger is forgotten in the cluster.

use std::fs;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::{Value, json};
use torc_engine::{Cut, SnapshotReport, remove_all};
use torc_env::{AlignedBuf, Disk, Env, File, OpenMode, SECTOR_BYTES};

use crate::gather::{on_every_shard, on_one_shard, or_ended};
use crate::http::response::Problem;
use crate::service::Service;

/// Where snapshots lie in the data directory.
const DIR: &str = "snapshots";
/// What a snapshot consists of.
const DESCRIPTION: &str = "snapshot.json";
/// Newest version of [`DESCRIPTION`] that this build writes and hands out.
const VERSION: u64 = 2;
/// What is written when there are no blobs, and what whoever does not say is taken to read.
pub const VERSION_WITHOUT_BLOBS: u64 = 1;
/// Snapshots kept at the same time: each may hold on to as much space as the node has data.
const SNAPSHOTS_MAX: usize = 4;
/// How long updates wait at most for the cut.
const HOLD_PATIENCE: Duration = Duration::from_secs(2);
/// Most bytes of a file in one answer.
pub const PIECE_BYTES_MAX: u64 = 1 << 20;
/// Largest description that is read: 100,000 tables and blobs.
const DESCRIPTION_BYTES_MAX: u64 = 16 << 20;

/// Removes what crashes have left of unfinished snapshots, and returns when the oldest whole one was
/// taken. Runs before the shards exist.
///
/// # Errors
/// When the directory cannot be read or cleared.
pub fn collect(data_dir: &Path) -> io::Result<Option<u64>> {
    let entries = match fs::read_dir(data_dir.join(DIR)) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut oldest = None;
    for entry in entries {
        let path = entry?.path();
        let described = fs::read(path.join(DESCRIPTION)).ok();
        let description = described.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        match description.as_ref().and_then(created) {
            Some(taken_ms) => oldest = Some(oldest.unwrap_or(taken_ms).min(taken_ms)),
            None => {
                tracing::warn!(path = %path.display(), "an unfinished snapshot is removed");
                fs::remove_dir_all(&path)?;
            }
        }
    }
    Ok(oldest)
}

/// Takes a snapshot of this node and returns its description. Durable on return. `reads`: the newest version of a
/// description that the client understands.
///
/// # Errors
/// 409 when there are too many, or the client would not understand this one; 503 when the shards could not be
/// brought to one cut.
pub async fn create(service: &Service, reads: u64) -> Result<Value, Problem> {
    in_turn(service, move |service| async move {
        make(&service, reads).await
    })
    .await
}

/// Runs an order that changes which snapshots there are, alone on this node and to its end.
async fn in_turn<T, F, A>(service: &Service, order: F) -> Result<T, Problem>
where
    T: Send + 'static,
    F: Fn(Rc<Service>) -> A + Clone + Send + 'static,
    A: Future<Output = Result<T, Problem>> + 'static,
{
    let done = on_one_shard(&service.handle, move |service: Rc<Service>| {
        let order = order(Rc::clone(&service));
        async move {
            let _turn = service.snapshot_turn.lock().await;
            order.await
        }
    });
    let ended = || Err(Problem::not_ready("this node is stopping"));
    done.await.unwrap_or_else(ended)
}

async fn make(service: &Rc<Service>, reads: u64) -> Result<Value, Problem> {
    let kept = list(service).await?;
    if kept.len() >= SNAPSHOTS_MAX {
        return Err(Problem::new(
            409,
            "too_many_snapshots",
            format!("this node keeps {SNAPSHOTS_MAX} snapshots already: remove one"),
        ));
    }
    let created_ms = service.env.wall().millis();
    let id = format!("{created_ms:012x}{:04x}", service.env.random() >> 48);
    let oldest = kept.iter().filter_map(created).min();
    protect(service, Some(oldest.unwrap_or(created_ms).min(created_ms))).await;
    let dir = Path::new(DIR).join(&id);
    let taken = take(service, &id, &dir, created_ms).await;
    let taken = taken.and_then(|description| understood(description, reads));
    if taken.is_err() {
        if let Err(error) = remove_all(service.env.disk(), &dir).await {
            tracing::warn!(%error, "an unfinished snapshot stays until the next start");
        }
        protect(service, oldest).await;
    }
    taken
}

/// The descriptions of all snapshots, oldest first, without their files.
///
/// # Errors
/// When the disk fails.
pub async fn list(service: &Service) -> Result<Vec<Value>, Problem> {
    let disk = service.env.disk();
    let entries = match disk.list(Path::new(DIR)).await {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(&error)),
    };
    let mut all = Vec::new();
    for entry in entries {
        // One that is being taken or removed has no description.
        if let Ok(Some(mut description)) = read_description(service, &entry.name).await {
            if let Some(fields) = description.as_object_mut() {
                fields.retain(|name, _| name != "stores" && name != "topology");
            }
            all.push(description);
        }
    }
    Ok(all)
}

/// A snapshot's description. `reads`: the newest version of it that the client understands.
///
/// # Errors
/// 404 when there is no such snapshot, 409 when the client, or this build, would not understand it.
pub async fn describe(service: &Service, id: &str, reads: u64) -> Result<Value, Problem> {
    let found = read_description(service, checked_id(id)?).await;
    let found = found.map_err(|error| failed(&error))?;
    understood(found.ok_or_else(unknown)?, reads)
}

/// Refuses what a newer build has written, or what the client would take for less than it is: a tool that knows
/// nothing of blobs would leave them out and call that a backup.
fn understood(description: Value, reads: u64) -> Result<Value, Problem> {
    let version = description.get("version").and_then(Value::as_u64);
    match version {
        Some(version) if version <= reads.min(VERSION) => return Ok(description),
        _ => {}
    }
    let version = version.map_or("no version".to_owned(), |version| {
        format!("version {version}")
    });
    Err(Problem::new(
        409,
        "snapshot_version",
        if reads < VERSION {
            format!(
                "this snapshot has {version}, and whoever asks understands up to {reads}: use the `torc` of this \
                 node's build (`?reads={VERSION}`)"
            )
        } else {
            format!(
                "this snapshot has {version}, and this node's build understands up to {VERSION}: run the build \
                 that took it, or remove the snapshot (`torc backup drop`)"
            )
        },
    ))
}

/// Removes a snapshot.
///
/// # Errors
/// 404 when there is no such snapshot.
pub async fn remove(service: &Service, id: &str) -> Result<(), Problem> {
    let id = id.to_owned();
    in_turn(service, move |service| {
        let id = id.clone();
        async move { remove_kept(&service, &id).await }
    })
    .await
}

async fn remove_kept(service: &Service, id: &str) -> Result<(), Problem> {
    let found = read_description(service, checked_id(id)?).await;
    found.map_err(|error| failed(&error))?.ok_or_else(unknown)?;
    let disk = service.env.disk();
    let dir = Path::new(DIR).join(id);
    let gone = async {
        disk.remove(&dir.join(DESCRIPTION)).await?;
        disk.sync_dir(&dir).await?;
        remove_all(disk, &dir).await
    };
    gone.await.map_err(|error| failed(&error))?;
    let oldest = list(service).await?.iter().filter_map(created).min();
    protect(service, oldest).await;
    Ok(())
}

/// Up to `length` bytes of a file of a snapshot from `offset`, fewer at its end. The caller bounds
/// `length` by [`PIECE_BYTES_MAX`].
///
/// # Errors
/// 400 when the place is not aligned or the path is none, 404 when there is no such file.
pub async fn read(
    service: &Service,
    id: &str,
    path: &str,
    offset: u64,
    length: u64,
) -> Result<Bytes, Problem> {
    let path = checked_path(path)?;
    let sector = u64::try_from(SECTOR_BYTES).unwrap_or(u64::MAX);
    if !offset.is_multiple_of(sector) {
        return Err(Problem::bad_request(format!(
            "offset is a multiple of {sector}"
        )));
    }
    let path = Path::new(DIR).join(checked_id(id)?).join(path);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let piece = async {
        let file = service.env.disk().open(&path, OpenMode::Read).await?;
        let buffer = AlignedBuf::zeroed(length.next_multiple_of(SECTOR_BYTES));
        let (read, mut buffer) = file.read_at(offset, buffer).await;
        buffer.set_len(read?.min(length));
        Ok(buffer.into_bytes())
    };
    piece.await.map_err(|error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => unknown(),
        _ => failed(&error),
    })
}

/// Brings all shards to one cut and links their tables and blobs.
async fn take(
    service: &Rc<Service>,
    id: &str,
    dir: &Path,
    created_ms: u64,
) -> Result<Value, Problem> {
    let disk = service.env.disk();
    let made = disk.create_dir(dir).await;
    made.map_err(|error| failed(&error))?;
    let held = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        let held = service.store.hold(HOLD_PATIENCE).await;
        held.map_err(|error| error.to_string())
    });
    let held: Vec<Result<(), String>> = or_ended(held.await).collect();
    let cuts = match held.iter().find_map(|held| held.clone().err()) {
        None => {
            let cuts = on_every_shard(&service.handle, |service: Rc<Service>| async move {
                let cut = service.store.cut().map_err(|error| error.to_string())?;
                Ok((cut, service.node.newest_stamp()))
            });
            or_ended(cuts.await).collect()
        }
        Some(error) => Err(error),
    };
    let cuts: Vec<(Cut, u64)> = match cuts {
        Ok(cuts) => cuts,
        Err(error) => {
            release(service, &held).await;
            return Err(not_cut(&error));
        }
    };
    let cut_stamp = cuts.iter().map(|(_, stamp)| *stamp).max().unwrap_or(0);
    let layout = service.identity.layout();
    let (cuts, target): (Arc<[(Cut, u64)]>, Arc<Path>) = (cuts.into(), dir.into());
    let reports = on_every_shard(&service.handle, move |service: Rc<Service>| {
        let shard = service.env.shard();
        let cut = cuts[usize::from(shard.0)].0;
        let dir = target.join(layout.dir(shard));
        async move {
            let report = service.store.snapshot(cut, &dir).await;
            report.map_err(|error| error.to_string())
        }
    });
    let reports: Result<Vec<SnapshotReport>, String> = or_ended(reports.await).collect();
    let reports = reports.map_err(|error| not_cut(&error))?;
    let described = describe_new(service, id, dir, created_ms, cut_stamp, &reports).await;
    described.map_err(|error| failed(&error))
}

/// Writes what the snapshot consists of: from here on it is one.
async fn describe_new(
    service: &Service,
    id: &str,
    dir: &Path,
    created_ms: u64,
    cut_stamp: u64,
    reports: &[SnapshotReport],
) -> io::Result<Value> {
    let disk = service.env.disk();
    let identity = &service.identity;
    let layout = identity.layout();
    let mut stores = Vec::new();
    for (shard, report) in layout.shards().zip(reports) {
        let store = layout.dir(shard);
        let entries = disk.list(&dir.join(&store)).await?;
        let files = entries.iter().filter(|entry| !entry.is_dir);
        let listed = |files: &[(u64, u64)]| {
            let files = files.iter();
            files
                .map(|(id, bytes)| json!({"name": format!("{id:016x}"), "bytes": bytes}))
                .collect::<Vec<_>>()
        };
        stores.push(json!({
            "dir": store.display().to_string(),
            "files": files.map(|file| json!({"name": file.name, "bytes": file.len}))
                .collect::<Vec<_>>(),
            "tables": listed(&report.tables),
            "blobs": listed(&report.blobs),
            "log": {
                "sequence": report.through.sequence,
                "hash": format!("{:016x}", report.through.hash),
            },
        }));
    }
    let topology = match read_whole(disk, Path::new("node/topology")).await {
        Ok(topology) => Some(STANDARD.encode(topology)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let has_blobs = reports.iter().any(|report| !report.blobs.is_empty());
    let description = json!({
        "format": "torc-snapshot",
        "version": if has_blobs { VERSION } else { VERSION_WITHOUT_BLOBS },
        "id": id,
        "created_ms": created_ms,
        "cut_stamp": cut_stamp,
        "node": identity.node.to_string(),
        "name": identity.name,
        "cluster": identity.cluster,
        "boot": identity.boot,
        "members": service.view().map_or(0, |view| view.topology.members.len()),
        "shards": identity.shards,
        "layout": identity.layout,
        "lineage": format!("{:016x}", identity.lineage),
        "topology": topology,
        "stores": stores,
    });
    write_whole(
        disk,
        &dir.join(DESCRIPTION),
        description.to_string().as_bytes(),
    )
    .await?;
    disk.sync_dir(dir).await?;
    Ok(description)
}

/// Gives the snapshot up on the shards that were held for it.
async fn release(service: &Service, held: &[Result<(), String>]) {
    let held: Arc<[bool]> = held.iter().map(Result::is_ok).collect();
    let released = on_every_shard(&service.handle, move |service: Rc<Service>| {
        let is_held = held[usize::from(service.env.shard().0)];
        async move {
            if is_held {
                service.store.release().await;
            }
        }
    });
    released.await;
}

/// Tells every shard since when there is a snapshot.
async fn protect(service: &Service, since_ms: Option<u64>) {
    let told = on_every_shard(&service.handle, move |service: Rc<Service>| async move {
        service.node.set_snapshot_since_ms(since_ms);
    });
    told.await;
}

fn created(description: &Value) -> Option<u64> {
    description.get("created_ms")?.as_u64()
}

fn checked_id(id: &str) -> Result<&str, Problem> {
    let is_id = id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_id { Ok(id) } else { Err(unknown()) }
}

/// A path below the snapshot's directory, and nothing else.
fn checked_path(path: &str) -> Result<&str, Problem> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._/".contains(&byte);
    if path.contains("..") || path.starts_with('/') || !path.bytes().all(is_plain) {
        return Err(Problem::bad_request("this is no path of a snapshot's file"));
    }
    Ok(path)
}

async fn read_description(service: &Service, id: &str) -> io::Result<Option<Value>> {
    let path: PathBuf = Path::new(DIR).join(id).join(DESCRIPTION);
    match read_whole(service.env.disk(), &path).await {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(io::Error::other)
            .map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) async fn read_whole<D: Disk>(disk: &D, path: &Path) -> io::Result<Bytes> {
    let file = disk.open(path, OpenMode::Read).await?;
    let len = file.len().await?;
    if len > DESCRIPTION_BYTES_MAX {
        return Err(io::Error::other(format!("{} is too long", path.display())));
    }
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let buffer = AlignedBuf::zeroed(len.next_multiple_of(SECTOR_BYTES));
    let (read, mut buffer) = file.read_at(0, buffer).await;
    buffer.set_len(read?);
    Ok(buffer.into_bytes())
}

/// Makes a file in `dir`, whole or not at all; durable on return. Files of one directory are made one after the other.
pub(crate) async fn place_whole<D: Disk>(
    disk: &D,
    dir: &Path,
    name: &str,
    bytes: &[u8],
) -> io::Result<()> {
    let part = dir.join("part");
    match disk.remove(&part).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    write_whole(disk, &part, bytes).await?;
    disk.rename(&part, &dir.join(name)).await?;
    disk.sync_dir(dir).await
}

pub(crate) async fn write_whole<D: Disk>(disk: &D, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = disk.open(path, OpenMode::CreateNew).await?;
    let mut buffer = AlignedBuf::copy_of(bytes);
    buffer.set_len(buffer.capacity());
    file.write_at(0, buffer).await.0?;
    file.set_len(u64::try_from(bytes.len()).unwrap_or(u64::MAX))
        .await?;
    file.sync().await
}

fn failed(error: &io::Error) -> Problem {
    Problem {
        retryable: true,
        ..Problem::new(500, "internal", format!("snapshot: {error}"))
    }
}

fn not_cut(error: &str) -> Problem {
    Problem {
        retryable: true,
        retry_after_ms: 1000,
        ..Problem::new(
            503,
            "snapshot_failed",
            format!("no snapshot was taken: {error}"),
        )
    }
}

fn unknown() -> Problem {
    Problem::new(404, "unknown_snapshot", "there is no such snapshot or file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_stays_inside_the_snapshot() {
        assert!(checked_path("shard-00/tables/0000000000000001.table").is_ok());
        for path in ["/etc/passwd", "../1", "a/../../b", "a\0b", "a b", "\u{e9}"] {
            assert_eq!(
                checked_path(path).map_err(|problem| problem.status),
                Err(400)
            );
        }
    }
}
