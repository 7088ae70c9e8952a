//! Tables become fewer tables one level down: the newest record of each key, less what may be
//! purged. Values in blobs stay where they are, except for those in blobs that are to be emptied.

use std::collections::{BTreeMap, BTreeSet};
use std::iter::Empty;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use torc_env::{Disk, Job, Token, TokenRange, TreeId};

use super::Pace;
use super::moved::Moved;
use super::output::{OutputSettings, Outputs, Written};
use crate::blob::BlobFile;
use crate::compaction::Plan;
use crate::crypt::{Keys, Sealing};
use crate::error::JobError;
use crate::merge::{Merge, RunIter, Source};
use crate::purge::PurgeRule;
use crate::record::{self, ScanFrom};
use crate::table::{FilterBits, ReadAhead, Stored, Table, TableInfo};

/// Merges a piece of the ring out of several runs.
pub struct CompactJob {
    /// The tree.
    pub tree: TreeId,
    /// The directory of tables.
    pub dir: PathBuf,
    /// Runs, newest first: each the tables to read, ascending, with the part to read.
    pub sources: Vec<Vec<(u64, TokenRange)>>,
    /// Which deletions to forget.
    pub purge: PurgeRule,
    /// Ids for the files, reserved for this job; [`CompactJob::file_ids_needed`] is enough. With
    /// fewer, the last table becomes larger.
    pub file_ids: Range<u64>,
    /// Width of the outputs' filters.
    pub filter: FilterBits,
    /// Largest body of a block before compression.
    pub block_bytes: usize,
    /// Size at which a table ends.
    pub table_bytes: u64,
    /// Bytes from which on a value goes to a blob; `None` when none does.
    pub separate_from: Option<usize>,
    /// Blobs that the outputs are not to refer to.
    pub emptied: BTreeSet<u64>,
    /// How inputs are, and outputs will be, encrypted.
    pub sealing: Sealing,
    /// The piece of the ring that is merged; the records in it are spread evenly.
    pub range: TokenRange,
    /// Bytes of the input tables, about.
    pub bytes: u64,
    /// How far it may go, in bytes of tables, as what is owed is counted: values come along. Counting them, a job that
    /// moves many would seem to have done all that is owed, and be held while level 0 fills up.
    pub pace: Arc<Pace>,
    /// How many bytes of values it may have taken out of blobs.
    pub moving: Arc<Pace>,
}

/// What a compaction did.
#[derive(Clone, Debug)]
pub struct CompactOutput {
    /// The tables written, ascending. None when everything was purged.
    pub tables: Vec<TableInfo>,
    /// The blobs written.
    pub blobs: Vec<BlobFile>,
    /// Records that came out of the merge.
    pub merged: u64,
    /// Records dropped because a newer one of their key was among the inputs.
    pub superseded: u64,
    /// Records dropped by the purge rule.
    pub purged: u64,
}

/// How a merge of runs alone is written: no source in memory.
type RunMerge<D> = Merge<D, Empty<record::Entry>>;

impl CompactJob {
    /// Ids that `plan` takes at most with tables of `table_bytes`, when values of `moved_bytes` come out of blobs: a blob
    /// for each table, and for as many bytes.
    pub fn file_ids_needed(plan: &Plan, table_bytes: u64, moved_bytes: u64) -> u64 {
        let (table_bytes, bytes) = (table_bytes.max(1), plan.bytes);
        bytes / table_bytes + 2 + 2 * (bytes.saturating_add(moved_bytes) / table_bytes) + 4
    }

    /// Bytes of the input that lie before `token`, from the even spread of tokens.
    fn bytes_before(&self, token: Token) -> u64 {
        // Both cut to 64 bits, so that the product fits.
        let width = self.range.last.0 - self.range.first.0;
        let part = token.0.saturating_sub(self.range.first.0).min(width);
        let shift = 64_u32.saturating_sub(width.leading_zeros());
        let bytes = u128::from(self.bytes) * (part >> shift) / (width >> shift).max(1);
        u64::try_from(bytes).unwrap_or(self.bytes)
    }

    async fn add<D: Disk>(
        &self,
        outputs: &mut Outputs<D>,
        records: impl Iterator<Item = Stored>,
    ) -> Result<(), JobError> {
        for stored in records {
            let reference = stored.separate.map(|separate| separate.reference);
            let entry = stored.entry.as_ref();
            outputs
                .add(self.tree, &entry, reference.as_ref(), 0)
                .await?;
        }
        Ok(())
    }

    async fn write<D: Disk>(
        &self,
        disk: &D,
        outputs: &mut Outputs<D>,
    ) -> Result<CompactOutput, JobError> {
        let (mut merge, known) = open(disk, &self.dir, &self.sources, self.sealing.keys()).await?;
        outputs.learn(known.values().copied());
        let mut moved = Moved::new(self, disk, known);
        let mut merged = 0;
        let mut purged = 0;
        while let Some(stored) = merge.next().await? {
            let entry = stored.entry.as_ref();
            merged += 1;
            self.pace.reach(self.bytes_before(entry.token)).await;
            if self.purge.may_purge(&entry) {
                purged += 1;
                disk.give_way().await;
            } else if moved.push(stored) {
                self.add(outputs, moved.take_out().await?).await?;
            }
        }
        self.add(outputs, moved.take_out().await?).await?;
        let Written { tables, blobs } = outputs.finish().await?;
        Ok(CompactOutput {
            tables,
            blobs,
            merged,
            superseded: merge.superseded(),
            purged,
        })
    }
}

impl Job for CompactJob {
    type Output = Result<CompactOutput, JobError>;

    async fn run<D: Disk>(self, disk: D) -> Self::Output {
        let settings = OutputSettings {
            dir: self.dir.clone(),
            file_ids: self.file_ids.clone(),
            filter: self.filter,
            block_bytes: self.block_bytes,
            table_bytes: self.table_bytes,
            sealing: self.sealing.clone(),
            separate_from: self.separate_from,
        };
        let mut outputs = Outputs::new(disk.clone(), settings);
        match self.write(&disk, &mut outputs).await {
            Ok(output) => Ok(output),
            Err(error) => {
                outputs.discard().await;
                Err(error)
            }
        }
    }
}

/// Opens the tables of every run, without their filters, and begins the merge. Returns with it the blobs to
/// which they refer.
async fn open<D: Disk>(
    disk: &D,
    dir: &Path,
    sources: &[Vec<(u64, TokenRange)>],
    keys: &Keys,
) -> Result<(RunMerge<D>, BTreeMap<u64, BlobFile>), JobError> {
    let mut blobs = BTreeMap::new();
    let mut runs = Vec::with_capacity(sources.len());
    for source in sources {
        let mut tables = Vec::with_capacity(source.len());
        for (file_id, range) in source {
            let table = Table::open_for_scan(disk, dir, *file_id, keys).await?;
            let listed = table.info().blobs.iter().map(|blob| blob.file);
            blobs.extend(listed.map(|blob| (blob.file_id, blob)));
            tables.push((table, *range));
        }
        let from = ScanFrom::Token(TokenRange::ALL.first);
        runs.push(Source::Run(RunIter::new(
            tables,
            from,
            ReadAhead::background(sources.len()),
        )));
    }
    Ok((Merge::new(runs), blobs))
}
