//! The store: one a shard, all its trees.
//!
//! An update is decided in [`mod@write`], gathered into a frame ([`crate::commit`]), made durable by
//! the commit task ([`writer`]), and only then put into the memtable, where reads ([`read`]) see it. Full
//! memtables become tables ([`flush`]), tables are merged ([`compact`]), log segments come and go
//! ([`supply`]), a watch on the free space decides what is still accepted ([`space`]), and updates wait their turn
//! when the background is behind ([`mod@pacing`]).
//!
//! Invariants:
//!
//! - A record is visible to `get` and `scan` only when it is as durable as the fsync policy
//!   promises; the decisions of updates see pending records too, so updates of a key never
//!   overtake each other.
//! - A record is in the log, pending; or in the log and a memtable; or in a table that the
//!   manifest lists. It leaves one place only after the next one has it.
//! - After a failed write or sync of log or manifest nothing is acknowledged any more.
//! - No `RefCell` borrow of the store's state lives across an `.await`.

mod archive;
mod compact;
mod damage;
mod flush;
mod keys;
mod load;
mod memory;
mod open;
mod pacing;
mod read;
mod redistribute;
mod scrub;
mod snapshot;
mod space;
mod supply;
mod sync;
mod tables;
mod write;
mod writer;

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;

use torc_env::{Class, Disk, Env, Token, TreeId};

use crate::ahead::AheadBudget;
use crate::cache::{BlockCache, RecordCache};
use crate::compaction::Strategy;
use crate::crypt::Keys;
use crate::error::{OpenError, ReadError, WriteError};
use crate::manifest::{Change, Loss, Manifest, State};
use crate::options::Options;
use crate::record::{Record, ScanFrom};
use crate::signal::{Signal, Turn};
use crate::stats::{Counts, Stats};

use archive::Archiving;
pub use archive::{ArchiveError, NewestStamp};
use compact::ExpiryClock;
pub use damage::Damage;
use damage::Damages;
use keys::Writing;
use memory::Memory;
pub use open::Recovery;
use pacing::Pacing;
pub use read::{ScanLimits, ScanPage};
pub use redistribute::{RedistributeError, Redistribution, redistribute};
pub use scrub::ScrubReport;
use snapshot::Hold;
pub use snapshot::{Cut, SnapshotError, SnapshotReport, remove_all};
use supply::Supply;
use tables::Tables;
pub use write::{Decision, Ticket};

type FileOf<E> = <<E as Env>::Disk as Disk>::File;

/// A shard's store. Clones share it.
pub struct Store<E: Env>(Rc<Inner<E>>);

impl<E: Env> Clone for Store<E> {
    fn clone(&self) -> Self {
        Store(Rc::clone(&self.0))
    }
}

/// What the store's tasks share.
struct Inner<E: Env> {
    env: E,
    options: Options,
    /// As last given: those of the options may be older.
    keys: RefCell<Keys>,
    writing: Writing,
    wal_dir: PathBuf,
    tables_dir: PathBuf,
    manifest: Manifest<E>,
    memory: RefCell<Memory>,
    tables: RefCell<Tables<E::Disk>>,
    supply: RefCell<Supply<FileOf<E>>>,
    cache: RecordCache,
    blocks: BlockCache,
    scans: Rc<AheadBudget>,
    health: Health,
    counts: RefCell<Counts>,
    /// A batch waits for the commit task, or it is to stop.
    work: Signal,
    /// The supply of segments has changed, or should.
    segments: Signal,
    /// Synced further, or a sync is wanted.
    sync: Signal,
    /// A memtable was sealed, or one was flushed.
    flush: Signal,
    /// Tables or purge floors have changed.
    compaction: Signal,
    /// One compaction at a time.
    compacting: Turn,
    /// The tree whose turn it was last.
    compacted_last: Cell<Option<TreeId>>,
    pacing: Pacing,
    clock: ExpiryClock,
    damages: Damages,
    hold: Hold,
    archiving: Archiving,
    /// Tasks that write files or edit the manifest.
    writing_tasks: Cell<usize>,
    /// One of them has ended, or the log is closed.
    stopped: Signal,
}

/// Whether the store works, and how it ends.
#[derive(Default)]
struct Health {
    /// Why nothing is written any more.
    poison: RefCell<Option<Rc<str>>>,
    /// No new updates.
    closing: Cell<bool>,
    /// The last frame is written.
    closed: Cell<bool>,
    /// The log is to go on in a segment under the newest key, whether or not there is something to write.
    rekey_wanted: Cell<bool>,
    /// Values are refused.
    disk_full: Cell<bool>,
    /// Free space when last looked at.
    free_bytes: Cell<u64>,
    /// A durable frame is wanted although the policy does not ask for it.
    sync_wanted: Cell<u64>,
    /// Frames written, and frames durable.
    written: Cell<u64>,
    synced: Cell<u64>,
}

impl<E: Env> Store<E> {
    /// Opens the store in `options.dir`, or begins one there, and replays what the log holds beyond the
    /// tables. What it returns is durable already.
    ///
    /// # Errors
    /// When the device fails, or a file that must be there is damaged or missing. Nothing is
    /// deleted then. Damage in the log is not an error: see [`Recovery::amnesia`].
    pub async fn open(env: E, options: Options) -> Result<(Store<E>, Recovery), OpenError> {
        open::open(env, options).await
    }

    /// The record of a key, tombstones and expired ones included. Costs no device read when it is
    /// in a memtable, else at most one for each table whose filter says yes: usually one; and one for a value in a blob. The
    /// value is not copied.
    ///
    /// # Errors
    /// When a table cannot be read: the key may or may not have a record then.
    pub async fn get(
        &self,
        tree: TreeId,
        token: Token,
        key: &[u8],
    ) -> Result<Option<Record>, ReadError> {
        self.0.get(tree, token, key).await
    }

    /// Reads a key's newest record, pending ones included, lets `decide` judge it, and writes what
    /// it decides, as one step: nothing comes between. `decide` is called once, or not at all when
    /// this fails.
    ///
    /// The returned [`Ticket`] tells when the write is acknowledged. Dropping it does not undo
    /// the write. `token` is `Token::of(tree, key)`.
    ///
    /// # Errors
    /// Nothing was written, whichever it is.
    pub async fn update<R>(
        &self,
        tree: TreeId,
        token: Token,
        key: &[u8],
        decide: impl FnOnce(Option<&Record>) -> Decision<R>,
    ) -> Result<(R, Ticket<E>), WriteError> {
        self.0.update(tree, token, key, decide).await
    }

    /// A page of a tree's records in order of (token, key), from `from` to the last key of token
    /// `last`, tombstones included. What is written meanwhile may be in it or not.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub async fn scan(
        &self,
        tree: TreeId,
        from: ScanFrom,
        last: Token,
        limits: ScanLimits,
    ) -> Result<ScanPage, ReadError> {
        self.0.scan(tree, from, last, limits).await
    }

    /// Turns everything that was acknowledged before this call into tables.
    ///
    /// # Errors
    /// When the store is poisoned or closed first. A full disk is waited out.
    pub async fn flush(&self) -> Result<(), WriteError> {
        self.0.flush_all().await
    }

    /// Merges every tree's tables into one run, purging what the floors allow, and writes again what is not
    /// encrypted with the active key: on return, nothing that the store had written before [`Store::set_keys`]
    /// needs an older one. Does not flush otherwise.
    ///
    /// # Errors
    /// When the store is poisoned or closed first, or a table cannot be read.
    pub async fn compact(&self) -> Result<(), WriteError> {
        self.0.compact_all().await
    }

    /// Deletes a tree: every record written to it before this call is gone, durably on return.
    ///
    /// # Errors
    /// When the store is poisoned or closed. The tree is then gone from memory, and may return
    /// with the next open.
    pub async fn drop_tree(&self, tree: TreeId) -> Result<(), WriteError> {
        self.0.drop_tree(tree).await
    }

    /// Says below which stamps compaction may purge tombstones and expired records of a tree. Kept
    /// in memory only: after an open nothing is purged until this is called.
    pub fn set_purge_floors(&self, tree: TreeId, floors: crate::purge::PurgeFloors) {
        self.0.tables.borrow_mut().set_purge_floors(tree, floors);
        self.0.compaction.ring();
    }

    /// Says how a tree is compacted from now on. Kept in memory only: say it after every open, and set
    /// [`Options::strategy`] to what shall be done before.
    pub fn set_strategy(&self, tree: TreeId, strategy: Strategy) {
        if self.0.tables.borrow_mut().set_strategy(tree, strategy) {
            self.0.compaction.ring();
        }
    }

    /// How a tree is compacted; `None` while that waits to be said.
    pub fn strategy(&self, tree: TreeId) -> Option<Strategy> {
        let settings = self.0.tables.borrow().settings(&self.0.options, tree);
        settings.map(|settings| settings.strategy)
    }

    /// Says that what [`Recovery::amnesia`] reports has been made up for. Durable on return.
    ///
    /// # Errors
    /// When the store is poisoned.
    pub async fn forget_amnesia(&self) -> Result<(), WriteError> {
        if !self.0.manifest.state().suspect {
            return Ok(());
        }
        self.0.edit(&[Change::Suspect(false)]).await
    }

    /// What damage has cost this store, until [`Store::set_losses`]. Damage that is not cut out yet is none of it.
    pub fn losses(&self) -> Vec<Loss> {
        self.0.manifest.state().losses.clone()
    }

    /// Says what is lost from now on, in place of [`Store::losses`]: what is left of them, that they may stay so, or that
    /// others have lost something which this store should have. Durable on return; nothing is written where it was said
    /// already.
    ///
    /// # Errors
    /// When the store is poisoned.
    pub async fn set_losses(&self, losses: &[Loss]) -> Result<(), WriteError> {
        if self.0.manifest.state().losses == losses {
            return Ok(());
        }
        let lost = losses.iter().copied().map(Change::Lost);
        let changes: Vec<Change> = std::iter::once(Change::Found).chain(lost).collect();
        self.0.edit(&changes).await
    }

    /// The parts of tables that were found unreadable since the open and are still in use. Their keys
    /// cannot be read or updated, and their trees are not compacted.
    pub fn damages(&self) -> Vec<Damage> {
        self.0.damages.all()
    }

    /// Whether [`Store::damages`] has any.
    pub fn is_damaged(&self) -> bool {
        !self.0.damages.is_empty()
    }

    /// Reads every table through, at about `bytes_per_s` of records, and verifies what it reads. What is
    /// damaged is in [`Store::damages`] afterwards. Fills no cache.
    ///
    /// # Errors
    /// When the device refuses, or the store is closed meanwhile.
    pub async fn scrub(&self, bytes_per_s: u64) -> Result<ScrubReport, ReadError> {
        self.0.scrub(bytes_per_s).await
    }

    /// Cuts out `listed` damage as far as it is still known, and nothing that was found since, durably, and returns what that costs: its
    /// keys are absent from then on, unless something newer of them can be read. From the same moment on it is in [`Store::losses`], until
    /// [`Store::set_losses`]. For callers that can get the keys from elsewhere, or have been told to do without, and
    /// that do not read them until then.
    ///
    /// # Errors
    /// When the store is poisoned or closed.
    pub async fn quarantine(&self, listed: &[Damage]) -> Result<Vec<Loss>, WriteError> {
        self.0.quarantine(listed).await
    }

    /// Makes updates wait, for `patience` at most, until [`Store::cut`]; on return everything that was
    /// decided before is durable as far as the policy promises. For a cut over several stores: hold all
    /// of them, then cut all of them, and no update of one that follows an update of another is in
    /// without it. Must be followed by [`Store::snapshot`] or [`Store::release`]: table files are kept until
    /// then.
    ///
    /// # Errors
    /// When the store is poisoned or closed, another snapshot is being taken, or what was in flight took longer than `patience`.
    pub async fn hold(&self, patience: std::time::Duration) -> Result<(), SnapshotError> {
        self.0.hold(patience).await
    }

    /// Where the store is now, to be given to [`Store::snapshot`], and the end of a
    /// [`Store::hold`].
    ///
    /// # Errors
    /// When the store is not held any more.
    pub fn cut(&self) -> Result<Cut, SnapshotError> {
        self.0.cut()
    }

    /// Gives up the snapshot that a successful [`Store::hold`] began.
    pub async fn release(&self) {
        self.0.release().await;
    }

    /// Puts the store as of `cut` into `dir`, which must not hold anything yet: hard links of its
    /// tables, and a manifest of its own. What `dir` then is can be opened as a store; it reports
    /// [`Recovery::amnesia`], because what came after the cut is missing. Waits for the flush of what
    /// was in memory at the cut. Durable on return; a failure leaves parts of it.
    ///
    /// # Errors
    /// When the store is poisoned or closed, or the device refuses.
    pub async fn snapshot(
        &self,
        cut: Cut,
        dir: &std::path::Path,
    ) -> Result<SnapshotReport, SnapshotError> {
        self.0.snapshot(cut, dir).await
    }

    /// Says by which clock records are stamped, if it may be ahead of civil time: how far the archive reaches is told by
    /// it. Whoever stamps does so before the first update.
    pub fn set_newest_stamp(&self, newest: NewestStamp) {
        self.0.set_newest_stamp(newest);
    }

    /// Goes on in another segment of the log and waits until all before it is archived. Returns up to when everything that
    /// the store had decided is, in microseconds since 1970: neither before the call nor before the newest stamp
    /// ([`Store::set_newest_stamp`]). Durable on return.
    ///
    /// # Errors
    /// When there is no archive, it fails (it is tried again all the same), has a gap since, or the store is poisoned or closed.
    pub async fn archive_log(&self) -> Result<u64, ArchiveError> {
        self.0.archive_log().await
    }

    /// Gives a key a record without looking at what it has: for whoever writes alone, and in the order that
    /// counts. As [`Store::update`] otherwise; no device read.
    ///
    /// # Errors
    /// As for [`Store::update`].
    pub async fn append(
        &self,
        tree: TreeId,
        key: &[u8],
        record: &Record,
    ) -> Result<Ticket<E>, WriteError> {
        self.0.append(tree, key, record).await
    }

    /// Whether tables are being merged at this moment. Costs nothing.
    pub fn is_compacting(&self) -> bool {
        self.0.compacting.is_taken()
    }

    /// What the store holds and does, in plain numbers.
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// Waits until every accepted update is durable, marks the log as closed and stops the store's
    /// tasks. Updates are refused from the call on; reads go on.
    ///
    /// # Errors
    /// When the store is poisoned: what was in flight is in doubt.
    pub async fn close(&self) -> Result<(), WriteError> {
        let inner = &self.0;
        inner.health.closing.set(true);
        inner.ring_all();
        // A flush or compaction under way still edits the manifest and removes files: whoever opens the
        // store next must not meet it.
        drop(inner.compacting.take().await);
        inner
            .stopped
            .until(|| (inner.writing_tasks.get() == 0).then_some(()))
            .await;
        match inner.poison() {
            Some(cause) => Err(WriteError::Poisoned {
                cause,
                in_doubt: true,
            }),
            None => Ok(()),
        }
    }

    /// Why nothing is written any more, if so. It stays so until the store is opened again.
    pub fn failure(&self) -> Option<Rc<str>> {
        self.0.poison()
    }
}

impl<E: Env> Inner<E> {
    /// Why nothing is written any more, if so.
    fn poison(&self) -> Option<Rc<str>> {
        self.health.poison.borrow().clone()
    }

    /// Whether the store's tasks are to end.
    fn is_stopping(&self) -> bool {
        self.health.closing.get() || self.health.poison.borrow().is_some()
    }

    /// Refuses when nothing is written any more.
    fn check_open(&self) -> Result<(), WriteError> {
        if let Some(cause) = self.poison() {
            return Err(WriteError::Poisoned {
                cause,
                in_doubt: false,
            });
        }
        if self.health.closing.get() {
            return Err(WriteError::Closed);
        }
        Ok(())
    }

    /// Ends all writing, for good: a device that failed once cannot be believed when it says that
    /// a retry succeeded. Every gathered batch fails; the caller fails the one in flight.
    fn poison_with(&self, cause: &str) {
        let cause: Rc<str> = cause.into();
        if self.health.poison.borrow().is_none() {
            tracing::error!(%cause, "the store writes nothing more");
            self.health.poison.replace(Some(Rc::clone(&cause)));
        }
        let batches = self.memory.borrow_mut().drain_pending();
        for batch in batches {
            batch.fate.decide(Err(WriteError::Poisoned {
                cause: Rc::clone(&cause),
                in_doubt: false,
            }));
        }
        self.ring_all();
    }

    /// Makes a manifest edit; a failure poisons the store.
    async fn edit(&self, changes: &[Change]) -> Result<(), WriteError> {
        self.edit_with(|_| changes.to_vec()).await
    }

    /// Makes the manifest edit that `build` wants when it is this edit's turn.
    async fn edit_with(&self, build: impl FnOnce(&State) -> Vec<Change>) -> Result<(), WriteError> {
        match self.manifest.commit_with(build).await {
            Ok(()) => Ok(()),
            Err(cause) => {
                self.poison_with(&cause);
                Err(WriteError::Poisoned {
                    cause,
                    in_doubt: true,
                })
            }
        }
    }

    /// Starts a task that [`Store::close`] waits for.
    fn spawn(self: &Rc<Self>, class: Class, task: impl Future<Output = ()> + 'static) {
        self.writing_tasks.set(self.writing_tasks.get() + 1);
        let inner = Rc::clone(self);
        self.env.spawn(class, async move {
            task.await;
            inner.writing_tasks.set(inner.writing_tasks.get() - 1);
            inner.stopped.ring();
        });
    }

    fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.counts.borrow_mut());
    }

    fn ring_all(&self) {
        for signal in [
            &self.work,
            &self.segments,
            &self.sync,
            &self.flush,
            &self.compaction,
            &self.stopped,
        ] {
            signal.ring();
        }
        self.pacing.ring();
    }

    async fn drop_tree(&self, tree: TreeId) -> Result<(), WriteError> {
        self.check_open()?;
        let seqno = self.memory.borrow_mut().drop_tree(tree);
        let files = self.tables.borrow_mut().drop_tree(tree);
        self.damages.keep(|damage| damage.tree != tree);
        self.look_ahead();
        self.cache.clear();
        self.edit(&[Change::DropTree { tree, seqno }]).await?;
        self.remove_files(&files).await;
        Ok(())
    }

    fn stats(&self) -> Stats {
        let mut stats = Stats {
            counts: self.counts.borrow().clone(),
            poisoned: self.health.poison.borrow().is_some(),
            disk_full: self.health.disk_full.get(),
            free_bytes: self.health.free_bytes.get(),
            ..Stats::default()
        };
        stats.cache = self.cache.stats();
        stats.blocks = self.blocks.stats();
        self.memory.borrow().add_stats(&mut stats);
        self.tables.borrow().add_stats(&self.options, &mut stats);
        let flushed = self.manifest.state().flushed.sequence;
        self.supply.borrow().add_stats(flushed, &mut stats);
        stats.archive_failing = self.archiving.is_failing();
        stats.archive_reach_us = self.archiving.reach_us();
        stats
    }
}
