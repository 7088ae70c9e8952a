//! Restores a backup into the data directory of a stopped node.
//!
//! Order: a marker, the files, what is replayed onto them, the identity, the marker's end. A directory with a marker starts no node, so
//! a restore that broke off is begun again from scratch.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use torc_env::NodeId;
use torc_net::boot::identity::Identity;
use torc_net::boot::{RESTORING, write_identity};
use torc_net::replay::{self, Plan, Replayed};
use torc_runtime::Background;
use xxhash_rust::xxh3::Xxh3;

use super::archive::{Archive, Item, Manifest, failed, feed, hex, sync_dir};
use super::moment::Moment;
use crate::failure::Failure;

/// A restored boot counter is the time in seconds, shifted by so much: above every counter of an earlier
/// life, which rises by one a start.
const BOOT_SHIFT: u32 = 20;

/// When a lineage began that a restore has begun: not before this second was over.
pub fn restored_at(lineage: u64) -> Moment {
    Moment(((lineage >> BOOT_SHIFT) + 1).saturating_mul(1_000_000))
}

/// Time between two lines of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// What a restore is to become besides what the backup holds.
pub struct Forward {
    /// What is replayed onto it.
    pub plan: Plan,
    /// Bytes of that.
    pub bytes: u64,
    /// Where the replay runs.
    pub background: Background,
    /// The file `node/topology` of the moment.
    pub topology: Option<Vec<u8>>,
}

/// What a restore has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Restored {
    /// Bytes of the backup.
    pub bytes: u64,
    /// What was replayed.
    pub replayed: Replayed,
}

/// Restores `manifest` into `data_dir`, and brings it `forward`. Durable on return. `abstains`: the node must not vote on the
/// topology, because others may remember votes that it does not.
pub fn run(
    archive: &Archive,
    manifest: &Manifest,
    data_dir: &Path,
    abstains: bool,
    forward: Option<Forward>,
) -> Result<Restored, Failure> {
    begin(data_dir)?;
    let mut bytes = 0;
    for store in &manifest.stores {
        let dir = data_dir.join(&store.dir);
        let tables = dir.join("tables");
        make_dir(&tables)?;
        for (kind, item) in store.shared() {
            let target = tables.join(format!("{}.{}", item.name, kind.extension()));
            let source = archive.shared(&manifest.lineage, kind, item);
            bytes += copy(&source, &target, item)?;
        }
        for file in &store.files {
            let source = archive
                .backup(&manifest.id)
                .join(&store.dir)
                .join(&file.name);
            bytes += copy(&source, &dir.join(&file.name), file)?;
        }
        for dir in [&tables, &dir] {
            sync_dir(dir).map_err(|error| failed(dir, &error))?;
        }
    }
    let mut restored = Restored {
        bytes,
        ..Restored::default()
    };
    let mut topology = None;
    if let Some(forward) = forward {
        let progress = progress(forward.bytes);
        let replayed = replay::run(forward.plan, forward.background, progress);
        restored.replayed = replayed.map_err(|error| Failure::new(error.to_string()))?;
        topology = forward.topology;
    }
    finish(manifest, data_dir, abstains, topology)?;
    Ok(restored)
}

/// Tells how far a replay is, once a second.
fn progress(total: u64) -> impl Fn(u64) + Clone + Send + 'static {
    let done = Arc::new(Mutex::new((0, Instant::now())));
    move |bytes| {
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        done.0 += bytes;
        if done.1.elapsed() >= PROGRESS_INTERVAL {
            done.1 = Instant::now();
            eprintln!(
                "{} of {} MiB of the log replayed",
                done.0 >> 20,
                total >> 20
            );
        }
    }
}

/// The topology that a backup holds, as a copy of its file.
pub fn topology_of(manifest: &Manifest) -> Result<Option<Vec<u8>>, Failure> {
    let decoded = manifest.topology.as_ref().map(|text| STANDARD.decode(text));
    let malformed = |error| Failure::new(format!("the backup's topology is malformed: {error}"));
    decoded.transpose().map_err(malformed)
}

/// Makes the directory, which must be empty but for what an earlier restore has left.
fn begin(data_dir: &Path) -> Result<(), Failure> {
    make_dir(data_dir)?;
    let marker = data_dir.join(RESTORING);
    if marker.exists() {
        clear(data_dir).map_err(|error| failed(data_dir, &error))?;
    }
    let mut entries = fs::read_dir(data_dir).map_err(|error| failed(data_dir, &error))?;
    let found = entries.find(|entry| {
        let name = entry.as_ref().map(fs::DirEntry::file_name);
        !matches!(name, Ok(name) if name == RESTORING || name == "lost+found")
    });
    if let Some(found) = found {
        let name = found.map_or_else(
            |error| error.to_string(),
            |entry| entry.file_name().to_string_lossy().into_owned(),
        );
        return Err(Failure::new(format!(
            "{} is not empty (it holds {name}): a restore goes into an empty directory; stop the node \
             and move its data away",
            data_dir.display()
        )));
    }
    let made = File::create(&marker).and_then(|file| file.sync_all());
    made.and_then(|()| sync_dir(data_dir))
        .map_err(|error| failed(&marker, &error))
}

fn clear(data_dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(data_dir)? {
        let entry = entry?;
        if entry.file_name() == RESTORING {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Copies a file and holds it against its checksum on the way.
fn copy(source: &Path, target: &Path, item: &Item) -> Result<u64, Failure> {
    let mut from = File::open(source).map_err(|error| failed(source, &error))?;
    let mut to = File::create(target).map_err(|error| failed(target, &error))?;
    let mut hasher = Xxh3::new();
    let copied = feed(&mut from, &mut hasher, &mut to).and_then(|bytes| {
        to.sync_all()?;
        Ok(bytes)
    });
    let bytes = copied.map_err(|error| failed(target, &error))?;
    if bytes != item.bytes || hex(hasher.digest128()) != item.xxh3 {
        return Err(failed(
            source,
            &"damaged: its checksum does not fit; use another backup",
        ));
    }
    Ok(bytes)
}

/// `topology`: another one than that of the backup.
fn finish(
    manifest: &Manifest,
    data_dir: &Path,
    abstains: bool,
    topology: Option<Vec<u8>>,
) -> Result<(), Failure> {
    let node_dir = data_dir.join("node");
    make_dir(&node_dir)?;
    let topology = match topology {
        Some(topology) => Some(topology),
        None => topology_of(manifest)?,
    };
    if let Some(topology) = topology {
        write(&node_dir.join("topology"), &topology)?;
    }
    let odd = |what| Failure::new(format!("the backup's {what} is malformed"));
    let node = u128::from_str_radix(&manifest.node, 16).map_err(|_| odd("node"))?;
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs());
    let boot = (manifest.boot + 1).max(seconds << BOOT_SHIFT);
    let identity = Identity {
        node: NodeId(node),
        boot,
        // Drawn at every start.
        random: 0,
        shards: manifest.shards,
        layout: manifest.layout,
        lineage: boot,
        abstains,
        has_served: false,
        name: manifest.name.clone(),
        cluster: manifest.cluster.clone(),
    };
    write_identity(data_dir, &identity).map_err(|error| Failure::new(error.to_string()))?;
    let marker = data_dir.join(RESTORING);
    let ended = fs::remove_file(&marker).and_then(|()| sync_dir(data_dir));
    ended.map_err(|error| failed(&marker, &error))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let written = fs::write(path, bytes).and_then(|()| File::open(path)?.sync_all());
    written.map_err(|error| failed(path, &error))
}

fn make_dir(dir: &Path) -> Result<(), Failure> {
    fs::create_dir_all(dir).map_err(|error| failed(dir, &error))
}
