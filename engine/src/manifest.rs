//! The manifest: which tables and log segments are the store, durably.
//!
//! Stands between whoever changes that set (flush, compaction, the supply of segments) and the
//! disk. An edit is one frame of the manifest's log; a new log, begun with a snapshot, takes over
//! when the old one is used up, by a write to the older of two root slots. Nothing is renamed.
//!
//! Invariants: an edit is in force only when durable, and then wholly; files are deleted only after the
//! edit that unlists them is durable, and used only after the one that lists them; a listed file
//! that is missing is corruption. Format and crash states: `docs/formats/manifest.md`.
//!
//! It opens no table and reads no segment.

mod change;
mod files;
#[cfg(test)]
mod format_tests;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use torc_env::{Disk, Env};

pub use change::Loss;
pub(crate) use change::{Change, Listed, State};
pub(crate) use files::{LOG_FORMAT, ROOT_FORMAT, log_id, parse_slot};
use files::{LogFile, RootFile};

use crate::crypt::{DataKey, FileUse, KeyId, Keys, WriterSalt};
use crate::error::{OpenError, PUT_BACK};
use crate::signal::Turn;

/// How long an edit waits before it asks a full disk again.
const FULL_RETRY: Duration = Duration::from_millis(250);

/// The open manifest of a store.
pub(crate) struct Manifest<E: Env> {
    env: E,
    dir: PathBuf,
    keys: RefCell<Keys>,
    state: RefCell<State>,
    turn: Turn,
    files: RefCell<Option<Files<E>>>,
    /// Keys that the log may need when the edit that is being written is done.
    written_under: RefCell<BTreeSet<Option<KeyId>>>,
}

type FileOf<E> = <<E as Env>::Disk as Disk>::File;

struct Files<E: Env> {
    root: RootFile<FileOf<E>>,
    log: LogFile<FileOf<E>>,
}

impl<E: Env> Manifest<E> {
    /// Reads the manifest in `dir`, or begins one with the state `fresh` (given if no segment and no table exists). Changes nothing
    /// of one that is there: see [`Manifest::take_over`]. What it writes is sealed with the active one of `keys`.
    pub(crate) async fn open(
        env: &E,
        dir: &Path,
        fresh: Option<State>,
        keys: &Keys,
    ) -> Result<Self, OpenError> {
        let disk = env.disk();
        let (files, state) = match (RootFile::read(disk, dir).await?, fresh) {
            (Some((root, pointer)), _) => {
                let salt = || WriterSalt::draw(env);
                let (log, state) = LogFile::read(disk, dir, pointer, keys, salt).await?;
                (Files { root, log }, state)
            }
            (None, Some(fresh)) => Self::begin(env, dir, fresh, keys).await?,
            (None, None) => {
                return Err(OpenError::Corrupt {
                    path: files::root_path(dir),
                    offset: 0,
                    detail: format!(
                        "no valid root, but there are tables or log segments: {PUT_BACK}"
                    ),
                });
            }
        };
        Ok(Self {
            env: env.clone(),
            dir: dir.to_owned(),
            keys: RefCell::new(keys.clone()),
            state: RefCell::new(state),
            turn: Turn::default(),
            files: RefCell::new(Some(files)),
            written_under: RefCell::default(),
        })
    }

    /// Removes what crashes have left beside the log, and replaces a log that is not sealed with the active key. For a store of
    /// which everything was read: one that does not open stays as it is.
    pub(crate) async fn take_over(&self) -> Result<(), OpenError> {
        let log = self.files.borrow().as_ref().map(|files| files.log.id);
        if let Some(log) = log {
            files::remove_other_logs(self.env.disk(), &self.dir, log).await?;
        }
        self.rekey().await.map_err(|cause| OpenError::Io {
            path: self.dir.clone(),
            doing: "begin a manifest log under the newest key",
            source: io::Error::other(cause.to_string()),
        })
    }

    /// Begins a manifest in `dir`, which has none, that says `state` from the start. Durable on
    /// return, except for the directory's own name.
    pub(crate) async fn create(
        env: &E,
        dir: &Path,
        state: State,
        keys: &Keys,
    ) -> Result<(), OpenError> {
        Self::begin(env, dir, state, keys).await.map(drop)
    }

    async fn begin(
        env: &E,
        dir: &Path,
        state: State,
        keys: &Keys,
    ) -> Result<(Files<E>, State), OpenError> {
        let begin = async {
            let disk = env.disk();
            let id = env.random();
            let key = log_key(env, keys, id);
            let log = LogFile::create(disk, dir, id, &state.snapshot(), key).await?;
            let mut root = RootFile::create(disk, dir).await?;
            root.point_to(log.pointer()).await?;
            disk.sync_dir(dir).await?;
            Ok((root, log))
        };
        let (root, log) = begin.await.map_err(|source| OpenError::Io {
            path: dir.to_owned(),
            doing: "begin a manifest",
            source,
        })?;
        Ok((Files { root, log }, state))
    }

    /// What is in force.
    pub(crate) fn state(&self) -> std::cell::Ref<'_, State> {
        self.state.borrow()
    }

    /// Seals with other keys from the next edit or [`Manifest::rekey`] on.
    pub(crate) fn set_keys(&self, keys: &Keys) {
        self.keys.replace(keys.clone());
        self.written_under.borrow_mut().insert(keys.active());
    }

    /// The key that is sealed with.
    pub(crate) fn active_key(&self) -> Option<KeyId> {
        self.keys.borrow().active()
    }

    /// The master keys of the log's frames, and of those that are being written; `None` stands for frames in the clear.
    pub(crate) fn key_ids(&self) -> BTreeSet<Option<KeyId>> {
        match &*self.files.borrow() {
            Some(files) => files.log.key_ids().clone(),
            None => self.written_under.borrow().clone(),
        }
    }

    /// The files, for whoever has the turn; `None` when an edit has failed.
    fn take_files(&self) -> Option<Files<E>> {
        let files = self.files.take()?;
        let mut keys = files.log.key_ids().clone();
        keys.insert(self.active_key());
        self.written_under.replace(keys);
        Some(files)
    }

    /// Goes over to a new log if the one there is not sealed with the active key, or not sealed though it
    /// should be. On a full disk that waits for a later edit.
    pub(crate) async fn rekey(&self) -> Result<(), Rc<str>> {
        let _turn = self.turn.take().await;
        let Some(mut files) = self.take_files() else {
            return Err("the manifest failed before".into());
        };
        if self.is_stale(&files) {
            self.rotate(&mut files)
                .await
                .map_err(|error| format!("manifest: {error}"))?;
        }
        self.files.replace(Some(files));
        Ok(())
    }

    fn is_stale(&self, files: &Files<E>) -> bool {
        let active = self.active_key();
        let mut ids = files.log.key_ids().iter();
        ids.any(|id| *id != active)
    }

    /// As [`Manifest::commit_with`], for an edit that fits whatever came before it.
    pub(crate) async fn commit(&self, changes: &[Change]) -> Result<(), Rc<str>> {
        self.commit_with(|_| changes.to_vec()).await
    }

    /// Makes an edit durable, then puts it in force. Edits follow one another; `build` is called
    /// when it is this one's turn, and may return no changes. A full disk is waited out. After any
    /// other failure it is unknown whether the edit took force: the store must stop, and this and
    /// every later call fail.
    ///
    /// # Panics
    /// When the edit does not fit the state: the caller's fault.
    pub(crate) async fn commit_with(
        &self,
        build: impl FnOnce(&State) -> Vec<Change>,
    ) -> Result<(), Rc<str>> {
        let _turn = self.turn.take().await;
        let changes = build(&self.state.borrow());
        if changes.is_empty() {
            return Ok(());
        }
        let Some(mut files) = self.take_files() else {
            return Err("the manifest failed before".into());
        };
        // On failure `files` is dropped and stays taken: no later edit can be written.
        self.write(&mut files, &changes)
            .await
            .map_err(|error| format!("manifest: {error}"))?;
        self.files.replace(Some(files));
        let mut state = self.state.borrow_mut();
        for change in &changes {
            if let Err(detail) = state.apply(change) {
                panic!("an edit that does not fit the manifest: {detail}");
            }
        }
        Ok(())
    }

    async fn write(&self, files: &mut Files<E>, changes: &[Change]) -> io::Result<()> {
        loop {
            if files.log.is_used_up() || self.is_stale(files) {
                self.rotate(files).await?;
            }
            match files.log.append(changes).await {
                Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                    tracing::warn!("the disk is full: a manifest edit waits");
                    self.env.sleep(FULL_RETRY).await;
                }
                result => return result,
            }
        }
    }

    /// Goes over to a new log. When the new log cannot be written, the old one goes on.
    async fn rotate(&self, files: &mut Files<E>) -> io::Result<()> {
        let disk = self.env.disk();
        let snapshot = self.state.borrow().snapshot();
        let id = self.env.random();
        let key = log_key(&self.env, &self.keys.borrow(), id);
        let new = match LogFile::create(disk, &self.dir, id, &snapshot, key).await {
            Ok(new) => new,
            Err(error) => {
                tracing::warn!(%error, "cannot begin a new manifest log; the old one goes on");
                return Ok(());
            }
        };
        // From here on the new log may be the one that the next open reads: failing is final.
        files.root.point_to(new.pointer()).await?;
        let old = std::mem::replace(&mut files.log, new);
        if let Err(error) = disk.remove(&files::log_path(&self.dir, old.id)).await {
            tracing::debug!(%error, "an old manifest log stays until the next start");
        }
        Ok(())
    }
}

fn log_key(env: &impl Env, keys: &Keys, id: u64) -> Option<DataKey> {
    keys.begin(|| WriterSalt::draw(env), FileUse::Manifest(id))
}
