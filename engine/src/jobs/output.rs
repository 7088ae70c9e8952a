//! The tables that a job writes, one after the other, cut at a size, and the blobs beside them.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use torc_env::{Disk, TreeId};

use crate::blob::{BlobFile, BlobRef, BlobWriter, blob_path};
use crate::crypt::Sealing;
use crate::error::JobError;
use crate::record::EntryRef;
use crate::table::format::BLOCK_RAW_BYTES_MAX;
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
    /// Bytes from which on a value goes to a blob; `None` when none does.
    pub(super) separate_from: Option<usize>,
}

/// What a job wrote.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Ascending.
    pub(super) tables: Vec<TableInfo>,
    /// Those that the job made, not those that its tables refer to besides.
    pub(super) blobs: Vec<BlobFile>,
}

pub(super) struct Outputs<D: Disk> {
    disk: D,
    settings: OutputSettings,
    /// The first id of all, so that the files begun are known: `first_id..settings.file_ids.start`.
    first_id: u64,
    writer: Option<TableWriter<D>>,
    /// Takes values of the table that is being written, and ends before it.
    blob: Option<BlobWriter<D>>,
    /// Blobs to which the tables may refer.
    known: BTreeMap<u64, BlobFile>,
    done: Written,
}

impl<D: Disk> Outputs<D> {
    pub(super) fn new(disk: D, settings: OutputSettings) -> Outputs<D> {
        Outputs {
            disk,
            first_id: settings.file_ids.start,
            settings,
            writer: None,
            blob: None,
            known: BTreeMap::new(),
            done: Written::default(),
        }
    }

    /// Says what the blobs are to which records may refer that are added.
    pub(super) fn learn(&mut self, blobs: impl IntoIterator<Item = BlobFile>) {
        let by_id = blobs.into_iter().map(|blob| (blob.file_id, blob));
        self.known.extend(by_id);
    }

    /// Adds the next record of `tree`, to a new table when the current one is full (and its last
    /// token is done with: a token never spans two tables of a run) and there is an id for another,
    /// ids for `reserved` trees to come being kept. A value goes to a blob if it is large; with a `reference`, it is
    /// in one already, and stays there.
    pub(super) async fn add(
        &mut self,
        tree: TreeId,
        entry: &EntryRef<'_>,
        reference: Option<&BlobRef>,
        reserved: u64,
    ) -> Result<(), JobError> {
        if let Some(writer) = &self.writer {
            let is_full = writer.bytes() >= self.settings.table_bytes;
            let is_between = writer.last_token() != Some(entry.token);
            if is_full && is_between && self.ids_left() > self.ids_of(reserved) {
                self.end_table().await?;
            }
        }
        let written = match reference {
            None if self.is_separate(entry) => self.write_value(tree, entry, reserved).await?,
            _ => None,
        };
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => self.begin_table(tree).await?,
        };
        match reference.or(written.as_ref()) {
            Some(reference) => writer.add_separate(entry, reference).await,
            None => writer.add(entry).await,
        }
    }

    fn is_separate(&self, entry: &EntryRef<'_>) -> bool {
        let len = entry.value.len();
        let from = self.settings.separate_from;
        from.is_some_and(|from| len >= from.max(1)) && len <= BLOCK_RAW_BYTES_MAX
    }

    fn ids_left(&self) -> u64 {
        self.settings.file_ids.end - self.settings.file_ids.start
    }

    /// Ids that as many trees need at least.
    fn ids_of(&self, trees: u64) -> u64 {
        match self.settings.separate_from {
            Some(_) => 2 * trees,
            None => trees,
        }
    }

    /// Writes a value to the blob of the current table; `None` when there is no id for one.
    async fn write_value(
        &mut self,
        tree: TreeId,
        entry: &EntryRef<'_>,
        reserved: u64,
    ) -> Result<Option<BlobRef>, JobError> {
        // A table that is not begun yet needs one itself.
        let needed = self.ids_of(reserved) + u64::from(self.writer.is_none());
        let has_id = self.ids_left() > needed;
        let blob = self.blob.as_ref();
        if has_id && blob.is_some_and(|blob| blob.bytes() >= self.settings.table_bytes) {
            self.end_blob().await?;
        }
        if self.blob.is_none() && has_id {
            let file_id = self.next_id();
            let (disk, settings) = (self.disk.clone(), &self.settings);
            let blob = BlobWriter::create(disk, &settings.dir, file_id, tree, &settings.sealing);
            self.blob = Some(blob.await?);
        }
        match &mut self.blob {
            Some(blob) => blob.add(entry.value).await.map(Some),
            None => Ok(None),
        }
    }

    async fn end_blob(&mut self) -> Result<(), JobError> {
        if let Some(blob) = self.blob.take() {
            let file = blob.finish().await?;
            self.known.insert(file.file_id, file);
            self.done.blobs.push(file);
        }
        Ok(())
    }

    fn next_id(&mut self) -> u64 {
        let id = self.settings.file_ids.next();
        id.expect("the shard gives a job an id for every tree")
    }

    /// Ends the current table, if there is one.
    pub(super) async fn end_table(&mut self) -> Result<(), JobError> {
        self.end_blob().await?;
        let Some(mut writer) = self.writer.take() else {
            return Ok(());
        };
        for file_id in writer.referred() {
            if let Some(file) = self.known.get(&file_id) {
                writer.learn(*file);
            }
        }
        let info = writer.finish().await?;
        self.done.tables.push(info);
        Ok(())
    }

    /// Ends the last table and hands all over.
    pub(super) async fn finish(&mut self) -> Result<Written, JobError> {
        self.end_table().await?;
        Ok(std::mem::take(&mut self.done))
    }

    /// Removes every file of a job that failed. A file that cannot be removed stays behind as an
    /// orphan: the failure that matters is the one that led here.
    pub(super) async fn discard(self) {
        drop((self.writer, self.blob));
        let dir = &self.settings.dir;
        for file_id in self.first_id..self.settings.file_ids.start {
            // An id is a table's or a blob's.
            for path in [table_path(dir, file_id), blob_path(dir, file_id)] {
                match self.disk.remove(&path).await {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::debug!(path = %path.display(), %error, "a failed job leaves a file behind");
                    }
                    _ => {}
                }
            }
        }
        if let Err(error) = self.disk.sync_dir(dir).await {
            tracing::debug!(dir = %dir.display(), %error, "removals of a failed job not synced");
        }
    }

    async fn begin_table(&mut self, tree: TreeId) -> Result<&mut TableWriter<D>, JobError> {
        let file_id = self.next_id();
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
