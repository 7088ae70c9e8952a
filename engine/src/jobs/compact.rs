//! Tables become fewer tables one level down: the newest record of each key, less what may be
//! purged.

use std::iter::Empty;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use torc_env::{Disk, Job, Token, TokenRange, TreeId};

use super::Pace;
use super::output::{OutputSettings, Outputs};
use crate::compaction::Plan;
use crate::crypt::{Keys, Sealing};
use crate::error::JobError;
use crate::merge::{Merge, RunIter, Source};
use crate::purge::PurgeRule;
use crate::record::{Entry, ScanFrom};
use crate::table::{FilterBits, ReadAhead, Table, TableInfo};

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
    /// How inputs are, and outputs will be, encrypted.
    pub sealing: Sealing,
    /// The piece of the ring that is merged; the records in it are spread evenly.
    pub range: TokenRange,
    /// Bytes of the input, about.
    pub bytes: u64,
    /// How far it may go.
    pub pace: Arc<Pace>,
}

/// What a compaction did.
#[derive(Clone, Debug)]
pub struct CompactOutput {
    /// The tables written, ascending. None when everything was purged.
    pub tables: Vec<TableInfo>,
    /// Records that came out of the merge.
    pub merged: u64,
    /// Records dropped because a newer one of their key was among the inputs.
    pub superseded: u64,
    /// Records dropped by the purge rule.
    pub purged: u64,
}

/// How a merge of runs alone is written: no source in memory.
type RunMerge<D> = Merge<D, Empty<Entry>>;

impl CompactJob {
    /// Ids that `plan` takes at most with tables of `table_bytes`.
    pub fn file_ids_needed(plan: &Plan, table_bytes: u64) -> u64 {
        plan.bytes / table_bytes.max(1) + 2
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

    async fn write<D: Disk>(
        &self,
        disk: &D,
        outputs: &mut Outputs<D>,
    ) -> Result<CompactOutput, JobError> {
        let mut merge: RunMerge<D> =
            open(disk, &self.dir, &self.sources, self.sealing.keys()).await?;
        let mut merged = 0;
        let mut purged = 0;
        while let Some(entry) = merge.next().await? {
            let entry = entry.as_ref();
            merged += 1;
            self.pace.reach(self.bytes_before(entry.token)).await;
            if self.purge.may_purge(&entry) {
                purged += 1;
                disk.give_way().await;
            } else {
                outputs.add(self.tree, &entry, 0).await?;
            }
        }
        Ok(CompactOutput {
            tables: outputs.finish().await?,
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

/// Opens the tables of every run, without their filters, and begins the merge.
async fn open<D: Disk>(
    disk: &D,
    dir: &Path,
    sources: &[Vec<(u64, TokenRange)>],
    keys: &Keys,
) -> Result<RunMerge<D>, JobError> {
    let mut runs = Vec::with_capacity(sources.len());
    for source in sources {
        let mut tables = Vec::with_capacity(source.len());
        for (file_id, range) in source {
            let table = Table::open_for_scan(disk, dir, *file_id, keys).await?;
            tables.push((table, *range));
        }
        let from = ScanFrom::Token(TokenRange::ALL.first);
        runs.push(Source::Run(RunIter::new(
            tables,
            from,
            ReadAhead::Background,
        )));
    }
    Ok(Merge::new(runs))
}
