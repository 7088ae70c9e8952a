//! Snapshots: a directory that is a store of its own, as of one moment.
//!
//! Not on a request's path. A snapshot consists of hard links of the tables and blobs and a manifest of its own; it
//! has no log, so what is in memory at the cut is flushed first. Updates wait while the stores of
//! a node are brought to one cut, which takes as long as the log writes in flight.
//!
//! Invariants: between a hold and the end of its snapshot no table or blob loses its name; what a snapshot's
//! manifest lists is there, durably, before that manifest is.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use torc_env::{Class, Disk, Env, Instant};

use super::Inner;
use super::tables::DataFile;
use crate::error::{OpenError, ReadError, WriteError};
use crate::frame::Mark;
use crate::manifest::{Manifest, State};
use crate::signal::Signal;
use crate::table::Table;

/// How often a held store looks whether what was in flight is durable.
const SETTLE_INTERVAL: Duration = Duration::from_micros(500);

/// A moment of a store: all that was acknowledged before it, and nothing that was decided after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    through: u64,
}

/// What a snapshot holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotReport {
    /// Its tables, ascending: file id and bytes.
    pub tables: Vec<(u64, u64)>,
    /// Its blobs, likewise.
    pub blobs: Vec<(u64, u64)>,
    /// The last frame of the log that is in them: what follows it in archived segments brings the snapshot forward.
    pub through: Mark,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The store takes no updates any more.
    #[error(transparent)]
    Store(#[from] WriteError),
    /// One at a time.
    #[error("another snapshot of this store is being taken")]
    Busy,
    /// Updates were not held long enough.
    #[error("what was being written did not become durable in time")]
    Late,
    /// The device refused.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// What the device said.
        source: io::Error,
    },
    /// A table cannot be asked for what belongs to it.
    #[error(transparent)]
    Read(ReadError),
    /// Its manifest cannot be written.
    #[error("cannot write the snapshot's manifest")]
    Manifest(#[source] OpenError),
}

/// Whether updates wait, and which files are kept for a snapshot.
#[derive(Default)]
pub(super) struct Hold {
    until: Cell<Option<Instant>>,
    released: Signal,
    /// A snapshot is being taken.
    is_pinned: Cell<bool>,
    /// The cut whose tables are still being written.
    awaited: Cell<Option<Cut>>,
    /// What the manifest said when they were: later flushes bring what was decided after the cut.
    captured: RefCell<Option<(Cut, State)>>,
    /// Tables and blobs that are not needed any more except for it.
    deferred: RefCell<Vec<DataFile>>,
}

impl Hold {
    /// Whether updates wait now.
    pub(super) fn is_on(&self, env: &impl Env) -> bool {
        self.until.get().is_some_and(|until| env.now() < until)
    }

    /// Completes when updates need not wait. Costs nothing when they need not.
    pub(super) async fn released(&self, env: &impl Env) {
        if self.until.get().is_some() {
            self.released
                .until(|| (!self.is_on(env)).then_some(()))
                .await;
        }
    }

    /// The files that may be removed now; `None` when they are kept for the time being.
    pub(super) fn defer<'a>(&self, files: &'a [DataFile]) -> Option<&'a [DataFile]> {
        if !self.is_pinned.get() {
            return Some(files);
        }
        self.deferred.borrow_mut().extend_from_slice(files);
        None
    }

    fn let_updates_go(&self) {
        self.until.set(None);
        self.released.ring();
    }
}

impl<E: Env> Inner<E> {
    pub(super) async fn hold(self: &Rc<Self>, patience: Duration) -> Result<(), SnapshotError> {
        self.check_open()?;
        if self.hold.is_pinned.replace(true) {
            return Err(SnapshotError::Busy);
        }
        let until = self.env.now() + patience;
        self.hold.until.set(Some(until));
        let inner = Rc::clone(self);
        self.env.spawn(Class::Control, async move {
            inner.env.sleep_until(until).await;
            inner.hold.released.ring();
        });
        let settled = self.settle().await;
        if settled.is_err() {
            self.release().await;
        }
        settled
    }

    /// Waits until everything that was decided is durable, as long as updates are held.
    async fn settle(&self) -> Result<(), SnapshotError> {
        while self.memory.borrow().pending_bytes() > 0 {
            if !self.hold.is_on(&self.env) {
                return Err(SnapshotError::Late);
            }
            self.check_open()?;
            self.env.sleep(SETTLE_INTERVAL).await;
        }
        Ok(())
    }

    /// Lets updates and the removal of files go on.
    pub(super) async fn release(&self) {
        self.hold.let_updates_go();
        self.hold.is_pinned.set(false);
        self.hold.awaited.set(None);
        self.hold.captured.replace(None);
        let deferred = std::mem::take(&mut *self.hold.deferred.borrow_mut());
        self.remove_files(&deferred).await;
    }

    pub(super) fn cut(&self) -> Result<Cut, SnapshotError> {
        let was_on = self.hold.is_on(&self.env);
        self.hold.let_updates_go();
        self.check_open()?;
        if !was_on {
            return Err(SnapshotError::Late);
        }
        let cut = Cut {
            through: self.begin_flush(),
        };
        self.hold.awaited.set(Some(cut));
        self.capture_cut();
        Ok(cut)
    }

    /// Keeps what the manifest says for the snapshot, if it has come to the cut and not gone beyond it.
    /// Called when memory is in tables as far as the manifest says.
    pub(super) fn capture_cut(&self) {
        let state = self.manifest.state();
        if let Some(cut) = self.hold.awaited.get()
            && state.flushed.sequence >= cut.through
        {
            self.hold.awaited.set(None);
            self.hold.captured.replace(Some((cut, state.clone())));
        }
    }

    pub(super) async fn snapshot(
        &self,
        cut: Cut,
        dir: &Path,
    ) -> Result<SnapshotReport, SnapshotError> {
        let outcome = self.link_into(cut, dir).await;
        self.release().await;
        outcome
    }

    async fn link_into(&self, cut: Cut, dir: &Path) -> Result<SnapshotReport, SnapshotError> {
        let state = self
            .flush
            .until(|| {
                let mut captured = self.hold.captured.borrow_mut();
                if let Some((_, state)) = captured.take_if(|(of, _)| *of == cut) {
                    return Some(Ok(state));
                }
                if self.hold.awaited.get() != Some(cut) {
                    return Some(Err(SnapshotError::Late));
                }
                self.check_open().err().map(|error| Err(error.into()))
            })
            .await?;
        let seqno = self.memory.borrow().seqno();
        let through = state.flushed;
        let listed = state.tables.values();
        let tables: BTreeMap<u64, u64> = listed.map(|table| (table.file_id, table.bytes)).collect();
        let blobs = self.blobs_of(tables.keys().copied()).await?;
        let files = tables.keys().copied().map(DataFile::Table);
        let files = files.chain(blobs.keys().copied().map(DataFile::Blob));
        let files = files.map(|file| (&*self.tables_dir, file));
        link_files(self.env.disk(), files, dir).await?;
        let state = State {
            segments: Vec::new(),
            flushed: Mark::default(),
            dropped: Default::default(),
            suspect: true,
            seqno_floor: state.seqno_floor.max(seqno),
            ..state
        };
        let keys = self.keys.borrow().clone();
        Manifest::create(&self.env, dir, state, &keys)
            .await
            .map_err(SnapshotError::Manifest)?;
        Ok(SnapshotReport {
            tables: tables.into_iter().collect(),
            blobs: blobs.into_iter().collect(),
            through,
        })
    }

    /// The blobs to which tables refer, by id with their bytes. A table that has been compacted away since the cut
    /// is asked on the disk, where it is kept.
    async fn blobs_of(
        &self,
        tables: impl Iterator<Item = u64>,
    ) -> Result<BTreeMap<u64, u64>, SnapshotError> {
        let keys = self.keys.borrow().clone();
        let mut blobs = BTreeMap::new();
        for file_id in tables {
            let in_use = self.tables.borrow().blobs_of(file_id);
            let files = match in_use {
                Some(files) => files,
                None => {
                    let (disk, dir) = (self.env.disk(), &self.tables_dir);
                    let table = Table::open_for_scan(disk, dir, file_id, &keys).await;
                    let table = table.map_err(SnapshotError::Read)?;
                    table.info().blobs.iter().map(|used| used.file).collect()
                }
            };
            blobs.extend(files.iter().map(|file| (file.file_id, file.bytes)));
        }
        Ok(blobs)
    }
}

/// Gives tables and blobs, each of the directory beside it, a name in `dir/tables`. Durable on return.
pub(super) async fn link_files<'a, D: Disk>(
    disk: &D,
    files: impl IntoIterator<Item = (&'a Path, DataFile)>,
    dir: &Path,
) -> Result<(), SnapshotError> {
    let to = dir.join("tables");
    disk.create_dir(&to).await.map_err(failed("create", &to))?;
    for (from, file) in files {
        let (old, new) = (file.path(from), file.path(&to));
        disk.hard_link(&old, &new)
            .await
            .map_err(failed("link", &new))?;
    }
    disk.sync_dir(&to).await.map_err(failed("sync", &to))
}

pub(super) fn failed(
    doing: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> SnapshotError + use<> {
    let path = path.to_owned();
    move |source| SnapshotError::Io {
        doing,
        path,
        source,
    }
}

/// Removes a directory with all that is in it, names durably gone on return. What is missing already
/// is no error.
///
/// # Errors
/// When the device refuses.
pub async fn remove_all<D: Disk>(disk: &D, dir: &Path) -> io::Result<()> {
    let mut found = vec![dir.to_owned()];
    let mut dirs = Vec::new();
    while let Some(path) = found.pop() {
        let entries = match disk.list(&path).await {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let below = path.join(&entry.name);
            if entry.is_dir {
                found.push(below);
            } else {
                disk.remove(&below).await?;
            }
        }
        dirs.push(path);
    }
    // What lies deeper was found later.
    for path in dirs.iter().rev() {
        disk.sync_dir(path).await?;
        disk.remove_dir(path).await?;
    }
    if dirs.is_empty() {
        return Ok(());
    }
    match dir.parent() {
        Some(parent) => disk.sync_dir(parent).await,
        None => Ok(()),
    }
}
