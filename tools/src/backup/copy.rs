//! Copies a snapshot of a node into an archive.
//!
//! What is there already, by table id and checksum, is not copied again; a run that broke off goes on
//! with the snapshot, and in the file, where it stopped. A copied table is read through, block by block,
//! before it counts: damage on the node's disk is found now and not by a restore.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use torc_engine::inspect::View;
use xxhash_rust::xxh3::Xxh3;

use super::archive::{
    Archive, Item, Kind, Manifest, PIECE_BYTES, failed, feed, hash_file, hex, replace, sync_dir,
};
use crate::commands::inspect;
use crate::endpoint::{Endpoint, Request};
use crate::failure::Failure;

/// Newest version of a snapshot's description that this build understands.
const SNAPSHOT_VERSION: u64 = 2;
/// Time between two lines of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// What a run did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The backup.
    pub id: String,
    /// Whether an earlier run had begun it.
    pub resumed: bool,
    /// Its tables.
    pub tables: Tally,
    /// Its blobs.
    pub blobs: Tally,
    /// All its bytes.
    pub bytes: u64,
    /// Bytes that had to be copied.
    pub copied_bytes: u64,
}

/// Files of a kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// How many there are.
    pub all: u64,
    /// How many had to be copied.
    pub copied: u64,
    /// How many of earlier backups were found damaged, and were copied again.
    pub replaced: u64,
}

impl Report {
    fn of(&mut self, kind: Kind) -> &mut Tally {
        match kind {
            Kind::Table => &mut self.tables,
            Kind::Blob => &mut self.blobs,
        }
    }
}

/// Where a store's files come from.
struct Source<'a> {
    /// The snapshot.
    id: &'a str,
    lineage: &'a str,
    /// The store's directory.
    store: &'a str,
}

/// A run.
struct Copy<'a> {
    archive: &'a Archive,
    endpoint: &'a Endpoint,
    /// Bytes a second; `None` for as fast as it goes.
    rate: Option<u64>,
    verify: bool,
    /// See [`Archive::copied`].
    copied: BTreeMap<String, String>,
    total: u64,
    began: Instant,
    told: Instant,
    report: Report,
}

/// Backs the endpoint's node up into `archive`. `verify`: whether the content of tables that are there
/// already is read again.
pub fn run(
    endpoint: &Endpoint,
    archive: &Archive,
    rate: Option<u64>,
    verify: bool,
) -> Result<Report, Failure> {
    for dir in [archive.incoming(), archive.dir().join("backups")] {
        fs::create_dir_all(&dir).map_err(|error| failed(&dir, &error))?;
    }
    let lock_path = archive.dir().join("lock");
    let lock = File::create(&lock_path).map_err(|error| failed(&lock_path, &error))?;
    lock.try_lock().map_err(|error| {
        failed(
            &lock_path,
            &format!("another backup into this directory runs ({error})"),
        )
    })?;
    let (mut manifest, resumed) = snapshot(endpoint, archive)?;
    check_node(archive, &manifest)?;
    let all = manifest.stores.iter().flat_map(|store| {
        [&store.files, &store.tables, &store.blobs]
            .into_iter()
            .flatten()
    });
    let now = Instant::now();
    let mut copy = Copy {
        archive,
        endpoint,
        rate,
        verify,
        copied: archive.copied(&manifest.lineage),
        total: all.map(|item| item.bytes).sum(),
        began: now,
        told: now,
        report: Report {
            id: manifest.id.clone(),
            resumed,
            ..Report::default()
        },
    };
    copy.everything(&mut manifest)?;
    archive.write(&manifest)?;
    remove_snapshot(endpoint, &manifest.id)?;
    let unfinished = archive.unfinished();
    fs::remove_file(&unfinished).map_err(|error| failed(&unfinished, &error))?;
    Ok(copy.report)
}

/// The snapshot that an earlier run has begun to copy, or a new one.
fn snapshot(endpoint: &Endpoint, archive: &Archive) -> Result<(Manifest, bool), Failure> {
    let unfinished = archive.unfinished();
    if let Ok(id) = fs::read_to_string(&unfinished) {
        let request = Request {
            method: "GET",
            path: format!("/admin/snapshots/{}?reads={SNAPSHOT_VERSION}", id.trim()),
            ..Request::default()
        };
        let answer = endpoint.expect(request, &[404])?;
        if answer.status != 404 {
            return Ok((described(answer.json()?)?, true));
        }
    }
    let request = Request {
        method: "POST",
        path: format!("/admin/snapshots?reads={SNAPSHOT_VERSION}"),
        ..Request::default()
    };
    let manifest = described(endpoint.expect_long(request)?.json()?)?;
    replace(&unfinished, manifest.id.as_bytes()).map_err(|error| failed(&unfinished, &error))?;
    Ok((manifest, false))
}

/// What a snapshot consists of, as the node says. Refuses a version that this build would take for less than it is.
fn described(description: Value) -> Result<Manifest, Failure> {
    let odd = |what: &dyn std::fmt::Display| {
        Failure::new(format!("the node describes a snapshot oddly: {what}"))
    };
    if description.get("format").and_then(Value::as_str) != Some("torc-snapshot") {
        return Err(odd(&"it is none"));
    }
    match description.get("version").and_then(Value::as_u64) {
        Some(1..=SNAPSHOT_VERSION) => {}
        Some(version) => {
            return Err(Failure::new(format!(
                "the node's snapshot has version {version}, this build of torc understands up to \
                 {SNAPSHOT_VERSION} and would leave out what it does not know: back up with the build that the \
                 node runs"
            )));
        }
        None => return Err(odd(&"it has no version")),
    }
    serde_json::from_value(description).map_err(|error| odd(&error))
}

fn remove_snapshot(endpoint: &Endpoint, id: &str) -> Result<(), Failure> {
    let request = Request {
        method: "DELETE",
        path: format!("/admin/snapshots/{id}"),
        ..Request::default()
    };
    endpoint.expect(request, &[404]).map(drop)
}

/// An archive is of one node.
fn check_node(archive: &Archive, manifest: &Manifest) -> Result<(), Failure> {
    let Some(last) = archive.ids()?.pop() else {
        return Ok(());
    };
    let earlier = archive.read(&last)?;
    if earlier.node == manifest.node {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{} holds backups of node {} ({}), but the endpoint is node {} ({}): use another directory",
        archive.dir().display(),
        earlier.name,
        earlier.node,
        manifest.name,
        manifest.node
    )))
}

impl Copy<'_> {
    fn everything(&mut self, manifest: &mut Manifest) -> Result<(), Failure> {
        let tables = self.archive.tables(&manifest.lineage);
        fs::create_dir_all(&tables).map_err(|error| failed(&tables, &error))?;
        for store in &mut manifest.stores {
            let source = Source {
                id: &manifest.id,
                lineage: &manifest.lineage,
                store: &store.dir,
            };
            for table in &mut store.tables {
                self.shared(&source, Kind::Table, table)?;
            }
            for blob in &mut store.blobs {
                self.shared(&source, Kind::Blob, blob)?;
            }
            let dir = self.archive.backup(&manifest.id).join(&store.dir);
            fs::create_dir_all(&dir).map_err(|error| failed(&dir, &error))?;
            for file in &mut store.files {
                let source = format!("{}/{}", store.dir, file.name);
                let target = dir.join(&file.name);
                file.xxh3 = self.fetch(&manifest.id, &source, file.bytes, &target)?;
            }
            sync_dir(&dir).map_err(|error| failed(&dir, &error))?;
        }
        let backup = self.archive.backup(&manifest.id);
        let parts = ["tables", "backups", ""].map(|part| self.archive.dir().join(part));
        for dir in parts.iter().chain([&tables, &backup]) {
            sync_dir(dir).map_err(|error| failed(dir, &error))?;
        }
        Ok(())
    }

    /// Copies a table or blob that other backups may have already.
    fn shared(&mut self, source: &Source<'_>, kind: Kind, item: &mut Item) -> Result<(), Failure> {
        let lineage = source.lineage;
        self.report.of(kind).all += 1;
        if let Some(xxh3) = self.copied.remove(&item.name) {
            item.xxh3 = xxh3;
            let path = self.archive.shared(lineage, kind, item);
            if self.is_whole(&path, &item.xxh3, item.bytes)? {
                self.done(item.bytes, false);
                return Ok(());
            }
            self.report.of(kind).replaced += 1;
            fs::remove_file(&path).map_err(|error| failed(&path, &error))?;
        }
        let name = format!("{}.{}", item.name, kind.extension());
        let incoming = self.archive.incoming().join(&name);
        let path = format!("{}/tables/{name}", source.store);
        item.xxh3 = self.fetch(source.id, &path, item.bytes, &incoming)?;
        if let Err(failure) = read_through(&incoming) {
            // The next run must not go on with it, nor with this snapshot.
            fs::remove_file(&incoming).map_err(|error| failed(&incoming, &error))?;
            remove_snapshot(self.endpoint, source.id)?;
            return Err(failure);
        }
        let target = self.archive.shared(lineage, kind, item);
        fs::rename(&incoming, &target).map_err(|error| failed(&target, &error))?;
        self.report.of(kind).copied += 1;
        Ok(())
    }

    fn is_whole(&self, path: &Path, xxh3: &str, bytes: u64) -> Result<bool, Failure> {
        let found = if self.verify {
            hash_file(path).map(|(len, found)| len == bytes && found == xxh3)
        } else {
            fs::metadata(path).map(|found| found.len() == bytes)
        };
        found.map_err(|error| failed(path, &error))
    }

    /// Copies a file of the snapshot, from where an earlier run stopped. Its content is durable on
    /// return; its checksum comes back.
    fn fetch(
        &mut self,
        id: &str,
        source: &str,
        bytes: u64,
        target: &Path,
    ) -> Result<String, Failure> {
        let io = |error: io::Error| failed(target, &error);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(target)
            .map_err(io)?;
        let piece = u64::try_from(PIECE_BYTES).unwrap_or(u64::MAX);
        let mut at = file.metadata().map_err(io)?.len().min(bytes) / piece * piece;
        file.set_len(at).map_err(io)?;
        let mut hasher = Xxh3::new();
        feed(&mut file, &mut hasher, &mut io::sink()).map_err(io)?;
        self.done(at, false);
        while at < bytes {
            let length = piece.min(bytes - at);
            let request = Request {
                method: "GET",
                path: format!("/admin/snapshots/{id}/{source}?offset={at}&length={length}"),
                ..Request::default()
            };
            let answer = self.endpoint.expect(request, &[])?;
            let got = u64::try_from(answer.body.len()).unwrap_or(u64::MAX);
            if got != length {
                return Err(Failure::new(format!(
                    "{source}: {got} bytes came instead of {length}"
                )));
            }
            hasher.update(&answer.body);
            file.write_all(&answer.body).map_err(io)?;
            at += length;
            self.done(length, true);
        }
        file.sync_all().map_err(io)?;
        Ok(hex(hasher.digest128()))
    }

    /// Counts bytes, tells about them now and then, and keeps to the rate.
    fn done(&mut self, bytes: u64, copied: bool) {
        self.report.bytes += bytes;
        if copied {
            self.report.copied_bytes += bytes;
            if let Some(rate) = self.rate {
                let micros = u128::from(self.report.copied_bytes) * 1_000_000 / u128::from(rate);
                let due = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
                std::thread::sleep(due.saturating_sub(self.began.elapsed()));
            }
        }
        if self.told.elapsed() >= PROGRESS_INTERVAL {
            self.told = Instant::now();
            eprintln!(
                "{} of {} MiB, {} MiB copied",
                self.report.bytes >> 20,
                self.total >> 20,
                self.report.copied_bytes >> 20
            );
        }
    }
}

/// Verifies every block of a table, or every value of a blob; of an encrypted one, the checksums: no key is needed
/// here.
fn read_through(path: &Path) -> Result<(), Failure> {
    if inspect::one(path, &View::default(), |_| {})? == 0 {
        return Ok(());
    }
    Err(failed(
        path,
        &"this file is damaged on the node: `torc scrub` fetches what is lost from the replicas; then \
          back up again",
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn snapshot(format: &str, version: &Value) -> Value {
        json!({
            "format": format, "version": version, "id": "0000018bcfe5680001ab", "created_ms": 1,
            "cut_stamp": 2, "node": "n", "name": "n1", "cluster": "c", "boot": 1, "members": 1,
            "shards": 1, "layout": 0, "lineage": "0000000000000001", "topology": null, "stores": [],
        })
    }

    #[test]
    fn a_snapshot_of_a_later_version_is_refused_by_name() {
        for version in [1, 2] {
            let manifest = described(snapshot("torc-snapshot", &json!(version))).unwrap();
            assert_eq!(manifest.version, version);
        }
        let refused = |format, version| {
            let failure = described(snapshot(format, &version)).unwrap_err();
            failure.to_string()
        };
        let later = refused("torc-snapshot", json!(3));
        assert!(later.contains("version 3"), "{later}");
        assert!(later.contains("the build that the node runs"), "{later}");
        assert!(refused("torc-snapshot", Value::Null).contains("no version"));
        assert!(refused("torc-backup", json!(1)).contains("it is none"));
    }
}
