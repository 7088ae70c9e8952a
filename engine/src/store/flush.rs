//! Memtables become tables.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use torc_env::{Class, Env, JobClass, TreeId, mutation};

use super::memory::SealedSlot;
use super::pacing::Kind;
use super::supply::unlisting;
use super::tables::{DataFile, Opened, changes_of};
use super::{FileOf, Inner};
use crate::blob::BlobFile;
use crate::error::{JobError, WriteError};
use crate::jobs::{FlushJob, FlushOutput, Pace};
use crate::levels::{Edit, Levels};
use crate::manifest::Change;
use crate::table::TableInfo;
use crate::wal::Log;

/// How long a failed flush waits before it is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// Why a flush did not happen.
enum Failure {
    /// It may be tried again.
    Job(JobError),
    /// The store is poisoned.
    Final,
}

impl<E: Env> Inner<E> {
    /// Seals the active memtable when it has used up its half of the budget, or when too many log
    /// segments wait for it.
    pub(super) fn seal_if_due(&self, log: &Log<FileOf<E>>) {
        let mut memory = self.memory.borrow_mut();
        let is_full = memory.is_active_full(self.options.memtable_bytes);
        // One at a time: more seals would not let segments go any sooner.
        let holds_log = log.offset() > 0
            && memory.sealed_count() == 0
            && self
                .supply
                .borrow()
                .needed_count(self.manifest.state().flushed.sequence)
                > self.options.wal_segments_max;
        if (is_full || holds_log) && memory.seal() {
            drop(memory);
            self.flush.ring();
        }
    }

    /// The flushing task, until the store stops. Memtables are flushed in the order in which they
    /// were sealed.
    pub(super) async fn run_flushes(self: Rc<Self>) {
        loop {
            let next = self
                .flush
                .until(|| {
                    if self.is_stopping() {
                        return Some(None);
                    }
                    self.memory.borrow().oldest_sealed().map(Some)
                })
                .await;
            let Some(slot) = next else { return };
            match self.flush_one(&slot).await {
                Ok(flushed) => {
                    drop(slot);
                    self.free(flushed);
                }
                Err(Failure::Final) => return,
                Err(Failure::Job(error)) => {
                    // Every record is in the log still, so another attempt, into other files, is sound.
                    tracing::warn!(%error, "a flush failed; trying again");
                    self.count(|counts| counts.failed_flushes += 1);
                    self.flush_failed();
                    if let JobError::Write { source, .. } = &error {
                        self.note_disk_error(source);
                    }
                    self.env.sleep(RETRY).await;
                }
            }
        }
    }

    /// Gives a flushed memtable's memory back, in slices.
    fn free(self: &Rc<Self>, flushed: SealedSlot) {
        // Whoever else holds it, drops it.
        if let Some(sealed) = Arc::into_inner(flushed.memtable) {
            let inner = Rc::clone(self);
            self.env.spawn(Class::Flush, async move {
                for piece in sealed.into_pieces() {
                    drop(piece);
                    inner.env.give_way().await;
                }
            });
        }
    }

    /// Returns the memtable that went.
    async fn flush_one(&self, slot: &SealedSlot) -> Result<SealedSlot, Failure> {
        // In one step with what takes the keys for the job.
        let _written = self.writing.begin(self.active_key());
        let written = self.write_tables(slot).await.map_err(Failure::Job)?;
        let infos = &written.tables;
        let mut opened = match self.open_by_tree(infos).await {
            Ok(opened) => opened,
            Err(error) => {
                let files = DataFile::of(infos, &written.blobs);
                self.remove_files(&files).await;
                return Err(Failure::Job(error));
            }
        };
        self.renew_cache(slot).await;
        let retired = self.supply.borrow().retirable(slot.through.sequence);
        if mutation::on("recycle_before_edit") {
            let ids: Vec<_> = retired.iter().map(|live| live.id).collect();
            self.remove_segments(&ids).await;
        }
        let edit = self.edit_with(|state| {
            let mut changes: Vec<Change> = edits_by_tree(&self.without_dropped(infos))
                .iter()
                .flat_map(|(tree, edit)| changes_of(*tree, edit))
                .collect();
            changes.push(Change::Flushed(slot.through));
            // A change of keys may have unlisted some meanwhile.
            changes.extend(unlisting(&retired, state));
            changes
        });
        edit.await.map_err(|_| Failure::Final)?;
        self.capture_cut();

        // No waiting from here to the end of the block: a reader finds each record either in the
        // memtable or in a table.
        let (flushed, kept, dropped) = {
            let kept = self.without_dropped(infos);
            let mut tables = self.tables.borrow_mut();
            for (tree, edit) in edits_by_tree(&kept) {
                let of_tree = opened.remove(&tree).unwrap_or_else(Opened::none);
                let nothing_removed = tables.apply(tree, &edit, of_tree);
                assert!(nothing_removed.is_empty(), "a flush only adds");
            }
            tables.note_run_bytes(&kept);
            tables.begin_generation();
            let flushed = self.memory.borrow_mut().pop_sealed();
            let flushed = flushed.expect("memtables are flushed one at a time, oldest first");
            let is_kept = |info: &&TableInfo| kept.iter().any(|one| one.file_id == info.file_id);
            let dropped: Vec<_> = infos
                .iter()
                .filter(|info| !is_kept(info))
                .cloned()
                .collect();
            (flushed, kept, dropped)
        };
        self.count(|counts| {
            counts.flushes += 1;
            counts.flushed_bytes += kept.iter().map(bytes_with_values).sum::<u64>();
            counts.blob_bytes_written += kept.iter().map(value_bytes).sum::<u64>();
        });
        let table_bytes = kept.iter().map(|info| info.bytes).sum();
        self.note_flush(flushed.memtable.memory_bytes(), table_bytes);
        let surplus = self.supply.borrow_mut().retire(&retired, self.active_key());
        for signal in [&self.flush, &self.segments, &self.compaction] {
            signal.ring();
        }
        self.remove_segments(&surplus).await;
        // A flush's tables refer to blobs of their own alone.
        let blobs = dropped.iter().flat_map(|info| &info.blobs);
        let blobs: Vec<BlobFile> = blobs.map(|used| used.file).collect();
        let discarded = self.discard(&dropped, &blobs).await;
        discarded.map_err(|_| Failure::Final)?;
        Ok(flushed)
    }

    /// Hands the record cache what it has a place for, while the records are still found in memory.
    async fn renew_cache(&self, slot: &SealedSlot) {
        for tree in slot.memtable.trees() {
            for entry in slot.memtable.entries(tree) {
                self.cache.renew(tree, entry.token, entry.key, || {
                    self.memory.borrow().still_newest(tree, &entry)
                });
                self.env.give_way().await;
            }
        }
    }

    async fn write_tables(&self, slot: &SealedSlot) -> Result<FlushOutput, JobError> {
        if slot.memtable.as_memtable().is_empty() {
            return Ok(FlushOutput::default());
        }
        let table_bytes = self.options.table_bytes_max;
        let needed = FlushJob::file_ids_needed(&slot.memtable, table_bytes);
        let pace = Arc::new(Pace::default());
        let job = FlushJob {
            sealed: slot.memtable.clone(),
            dir: self.tables_dir.clone(),
            file_ids: self.tables.borrow_mut().reserve_file_ids(needed),
            block_bytes: self.options.block_bytes,
            separate_from: self.options.separate_from,
            table_bytes,
            sealing: self.sealing(),
            pace: Arc::clone(&pace),
        };
        let running = self.env.background(JobClass::Flush, job);
        self.guide(&[(Kind::Flush, pace)], running).await
    }

    async fn open_by_tree(
        &self,
        infos: &[TableInfo],
    ) -> Result<BTreeMap<TreeId, Opened<E::Disk>>, JobError> {
        let mut opened = BTreeMap::new();
        for of_tree in infos.chunk_by(|a, b| a.tree == b.tree) {
            let tree = of_tree[0].tree;
            opened.insert(tree, self.open_files(tree, of_tree).await?);
        }
        Ok(opened)
    }

    /// The tables whose tree was not dropped since their records were written.
    fn without_dropped(&self, infos: &[TableInfo]) -> Vec<TableInfo> {
        let memory = self.memory.borrow();
        let is_current = |info: &&TableInfo| info.seqnos.max > memory.dropped_through(info.tree);
        infos.iter().filter(is_current).cloned().collect()
    }

    /// Takes tables that turned out to be useless out of the manifest, should they be in it, and
    /// removes their files, and blobs that were written with them.
    pub(super) async fn discard(
        &self,
        infos: &[TableInfo],
        blobs: &[BlobFile],
    ) -> Result<(), WriteError> {
        if infos.is_empty() {
            return Ok(());
        }
        let ids = file_ids(infos);
        self.edit_with(|state| {
            let listed = state.tables.keys();
            let useless = listed.filter(|key| ids.contains(&key.file_id));
            useless.copied().map(Change::RemoveTable).collect()
        })
        .await?;
        self.remove_files(&DataFile::of(infos, blobs)).await;
        Ok(())
    }

    /// Has all that is in memory flushed; returns the frame through which that is.
    pub(super) fn begin_flush(&self) -> u64 {
        let through = {
            let mut memory = self.memory.borrow_mut();
            memory.seal();
            memory.through().sequence
        };
        self.pacing.want_flush(through);
        self.flush.ring();
        through
    }

    /// See [`super::Store::flush`].
    pub(super) async fn flush_all(&self) -> Result<(), WriteError> {
        self.check_open()?;
        let through = self.begin_flush();
        self.flush
            .until(|| {
                if self.manifest.state().flushed.sequence >= through {
                    return Some(Ok(()));
                }
                self.check_open().err().map(Err)
            })
            .await
    }
}

fn file_ids(infos: &[TableInfo]) -> Vec<u64> {
    infos.iter().map(|info| info.file_id).collect()
}

/// What a flush or compaction has written to blobs for a table of its own.
fn value_bytes(info: &TableInfo) -> u64 {
    info.blobs.iter().map(|used| used.file.bytes).sum()
}

fn bytes_with_values(info: &TableInfo) -> u64 {
    info.bytes + value_bytes(info)
}

/// The edit of each tree that adds its tables as the newest run.
fn edits_by_tree(infos: &[TableInfo]) -> Vec<(TreeId, Edit)> {
    infos
        .chunk_by(|a, b| a.tree == b.tree)
        .map(|tables| (tables[0].tree, Levels::flush_edit(tables)))
        .collect()
}
