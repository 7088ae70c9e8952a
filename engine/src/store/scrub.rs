//! Scrub: reads every table through and verifies it, so that rot is found while other copies are good.
//!
//! Not on a request's path. Reads past the caches, at a bounded rate, and notes what it finds as
//! reads do ([`super::damage`]). It looks at what is in use only: footers, filters, fences and the
//! blocks within extents; and blobs to which something refers. The log is verified whenever it is replayed, and manifest edits are too.

use std::collections::BTreeMap;
use std::time::Duration;

use torc_env::{Disk, Env, TokenRange, TreeId};

use super::Inner;
use crate::error::ReadError;
use crate::le::len64;
use crate::record::ScanFrom;
use crate::table::{ReadAhead, Table, blob_checksums_of};

/// What is read between two pauses, in bytes of keys and values.
const STRIDE_BYTES: u64 = 1 << 20;
/// The same for a record's place, which also bounds the pace of small records.
const RECORD_BYTES: usize = 32;

/// What a scrub has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Tables read.
    pub tables: u64,
    /// Blobs read.
    pub blobs: u64,
    /// Records in them.
    pub records: u64,
    /// Their bytes on the disk.
    pub bytes: u64,
    /// Parts of tables, and values in blobs, that are damaged.
    pub damaged: u64,
}

impl<E: Env> Inner<E> {
    /// See [`super::Store::scrub`].
    pub(super) async fn scrub(&self, bytes_per_s: u64) -> Result<ScrubReport, ReadError> {
        let mut report = ScrubReport::default();
        let trees = self.tables.borrow().tree_ids();
        for tree in trees {
            let files = self.extents_by_file(tree);
            for (file_id, extents) in files {
                if self.health.closing.get() {
                    return Err(ReadError::Closed);
                }
                self.scrub_file(tree, file_id, &extents, bytes_per_s, &mut report)
                    .await?;
            }
            self.scrub_blobs(tree, bytes_per_s, &mut report).await?;
        }
        Ok(report)
    }

    /// Walks over every blob of a tree. In one that is damaged, the records whose values cannot be read are looked for,
    /// and what can be read is taken out with the next compaction: dead values are of no use, but a backup would stop at
    /// them.
    async fn scrub_blobs(
        &self,
        tree: TreeId,
        bytes_per_s: u64,
        report: &mut ScrubReport,
    ) -> Result<(), ReadError> {
        let tables = self.tables.borrow().tree(tree);
        let files = tables.map_or_else(Vec::new, |tree| tree.blob_files());
        for file in files {
            if self.health.closing.get() {
                return Err(ReadError::Closed);
            }
            let is_in_use = || {
                let tree = self.tables.borrow().tree(tree);
                tree.is_some_and(|tree| tree.blob(file.file_id).is_some())
            };
            let walked = blob_checksums_of(self.env.disk(), &self.tables_dir, file.file_id).await;
            if !is_in_use() {
                continue;
            }
            match walked {
                Ok(_) => {}
                Err(error @ ReadError::Corrupt { .. }) => {
                    tracing::error!(%error, "a blob is damaged");
                    self.find_unreadable(tree, file.file_id, report).await?;
                    self.tables.borrow_mut().distrust(file.file_id);
                    self.compaction.ring();
                }
                Err(error) => return Err(error),
            }
            report.blobs += 1;
            report.bytes += file.bytes;
            self.count(|counts| counts.scrubbed_bytes += file.bytes);
            self.env.sleep(pause(file.bytes, bytes_per_s)).await;
        }
        Ok(())
    }

    /// Reads every value that tables have in this blob, and notes those that are damaged.
    async fn find_unreadable(
        &self,
        tree: TreeId,
        blob: u64,
        report: &mut ScrubReport,
    ) -> Result<(), ReadError> {
        let Some(tables) = self.tables.borrow().tree(tree) else {
            return Ok(());
        };
        for table in tables.levels.tables() {
            if table.info.blob(blob).is_none() {
                continue;
            }
            let from = ScanFrom::Token(table.extent.first);
            let opened = tables.table(table);
            let mut records = opened.iter(&from, table.extent, ReadAhead::background(1));
            loop {
                let stored = match records.next().await {
                    Ok(Some(stored)) => stored,
                    Ok(None) => break,
                    // Noted when the table was read through.
                    Err(ReadError::Corrupt { .. }) => {
                        records.skip_block();
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let separate = stored.separate;
                let Some(separate) = separate.filter(|at| at.reference.file_id == blob) else {
                    continue;
                };
                match self.value(&tables, stored.entry.token, &separate).await {
                    Ok(_) => {}
                    Err(ReadError::CorruptValue { .. }) => report.damaged += 1,
                    Err(error) => return Err(error),
                }
                self.env.disk().give_way().await;
            }
        }
        Ok(())
    }

    fn extents_by_file(&self, tree: TreeId) -> BTreeMap<u64, Vec<TokenRange>> {
        let mut files: BTreeMap<u64, Vec<TokenRange>> = BTreeMap::new();
        if let Some(tree) = self.tables.borrow().tree(tree) {
            for table in tree.levels.tables() {
                let extents = files.entry(table.info.file_id).or_default();
                extents.push(table.extent);
            }
        }
        files
    }

    async fn scrub_file(
        &self,
        tree: TreeId,
        file_id: u64,
        extents: &[TokenRange],
        bytes_per_s: u64,
        report: &mut ScrubReport,
    ) -> Result<(), ReadError> {
        let is_in_use = || {
            let tree = self.tables.borrow().tree(tree);
            tree.is_some_and(|tree| tree.levels.holds_file(file_id))
        };
        let keys = self.keys.borrow().clone();
        // What the open one has in memory is no proof of what the disk has.
        let opened = Table::open(self.env.disk(), &self.tables_dir, file_id, &keys).await;
        // Compacted away since it was listed.
        if !is_in_use() {
            return Ok(());
        }
        let table = match opened {
            Ok(table) => table,
            Err(error @ ReadError::Corrupt { .. }) => {
                self.note_corrupt(&error);
                report.damaged += 1;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for extent in extents {
            self.scrub_extent(&table, *extent, bytes_per_s, report)
                .await?;
        }
        report.tables += 1;
        report.bytes += table.info().bytes;
        self.count(|counts| counts.scrubbed_bytes += table.info().bytes);
        Ok(())
    }

    async fn scrub_extent(
        &self,
        table: &Table<E::Disk>,
        extent: TokenRange,
        bytes_per_s: u64,
        report: &mut ScrubReport,
    ) -> Result<(), ReadError> {
        let from = ScanFrom::Token(extent.first);
        let mut records = table.iter(&from, extent, ReadAhead::background(1));
        let mut unpaid = 0;
        loop {
            match records.next().await {
                Ok(None) => break,
                Ok(Some(stored)) => {
                    let entry = &stored.entry;
                    report.records += 1;
                    unpaid += len64(entry.key.len() + entry.record.value.len() + RECORD_BYTES);
                    if unpaid >= STRIDE_BYTES {
                        self.env.sleep(pause(unpaid, bytes_per_s)).await;
                        unpaid = 0;
                    }
                }
                Err(error @ ReadError::Corrupt { .. }) => {
                    self.note_corrupt(&error);
                    report.damaged += 1;
                    records.skip_block();
                }
                Err(error) => return Err(error),
            }
            self.env.disk().give_way().await;
        }
        self.env.sleep(pause(unpaid, bytes_per_s)).await;
        Ok(())
    }
}

fn pause(bytes: u64, bytes_per_s: u64) -> Duration {
    let micros = u128::from(bytes) * 1_000_000 / u128::from(bytes_per_s.max(1));
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
}
