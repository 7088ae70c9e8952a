//! The tables that a job writes, one after the other, cut at a size.

use std::ops::Range;
use std::path::PathBuf;

use torc_env::{Disk, TreeId};

use crate::crypt::Sealing;
use crate::error::JobError;
use crate::record::EntryRef;
use crate::table::{FilterBits, TableInfo, TableOptions, TableWriter, table_path};

/// Where and how a job's tables are written.
#[derive(Clone, Debug)]
pub(super) struct OutputSettings {
    /// The directory of tables.
    pub(super) dir: PathBuf,
    /// Ids for the files, given by the shard to this job alone.
    pub(super) file_ids: Range<u64>,
    pub(super) filter: FilterBits,
    pub(super) block_bytes: usize,
    /// Size at which a table ends.
    pub(super) table_bytes: u64,
    pub(super) sealing: Sealing,
}

pub(super) struct Outputs<D: Disk> {
    disk: D,
    settings: OutputSettings,
    /// The first id of all, so that the files begun are known: `first_id..settings.file_ids.start`.
    first_id: u64,
    writer: Option<TableWriter<D>>,
    done: Vec<TableInfo>,
}

impl<D: Disk> Outputs<D> {
    pub(super) fn new(disk: D, settings: OutputSettings) -> Outputs<D> {
        Outputs {
            disk,
            first_id: settings.file_ids.start,
            settings,
            writer: None,
            done: Vec::new(),
        }
    }

    /// Adds the next record of `tree`, to a new table when the current one is full (and its last
    /// token is done with: a token never spans two tables of a run) and there is an id for another,
    /// `reserved` ids being kept for the trees to come.
    pub(super) async fn add(
        &mut self,
        tree: TreeId,
        entry: &EntryRef<'_>,
        reserved: u64,
    ) -> Result<(), JobError> {
        if let Some(writer) = &self.writer {
            let is_full = writer.bytes() >= self.settings.table_bytes;
            let is_between = writer.last_token() != Some(entry.token);
            let ids = self.settings.file_ids.end - self.settings.file_ids.start;
            if is_full && is_between && ids > reserved {
                self.end_table().await?;
            }
        }
        match &mut self.writer {
            Some(writer) => writer.add(entry).await,
            None => self.begin_table(tree).await?.add(entry).await,
        }
    }

    /// Ends the current table, if there is one.
    pub(super) async fn end_table(&mut self) -> Result<(), JobError> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        let info = writer.finish().await?;
        self.done.push(info);
        Ok(())
    }

    /// Ends the last table and hands all of them over.
    pub(super) async fn finish(&mut self) -> Result<Vec<TableInfo>, JobError> {
        self.end_table().await?;
        Ok(std::mem::take(&mut self.done))
    }

    /// Removes every file of a job that failed. A file that cannot be removed stays behind as an
    /// orphan: the failure that matters is the one that led here.
    pub(super) async fn discard(self) {
        drop(self.writer);
        let dir = &self.settings.dir;
        for file_id in self.first_id..self.settings.file_ids.start {
            let path = table_path(dir, file_id);
            if let Err(error) = self.disk.remove(&path).await {
                tracing::debug!(path = %path.display(), %error, "a failed job leaves a file behind");
            }
        }
        if let Err(error) = self.disk.sync_dir(dir).await {
            tracing::debug!(dir = %dir.display(), %error, "removals of a failed job not synced");
        }
    }

    async fn begin_table(&mut self, tree: TreeId) -> Result<&mut TableWriter<D>, JobError> {
        let file_id = self
            .settings
            .file_ids
            .next()
            .expect("the shard gives a job an id for every tree");
        let path = table_path(&self.settings.dir, file_id);
        let options = TableOptions {
            tree,
            block_bytes: self.settings.block_bytes,
            filter: self.settings.filter,
        };
        let (disk, sealing) = (self.disk.clone(), &self.settings.sealing);
        let writer = TableWriter::create(disk, &path, file_id, options, sealing).await?;
        Ok(self.writer.insert(writer))
    }
}
