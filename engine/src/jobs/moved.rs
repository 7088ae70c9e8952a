//! Takes values out of blobs that are to be emptied, several reads at a time.
//!
//! One after the other, each value would cost a round trip to the disk and, where the shard and its background share a
//! core, a turn of that: a compaction that moves thousands would take seconds, while level 0 fills up behind it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::vec::Drain;

use futures_util::future::try_join_all;
use torc_env::Disk;

use super::CompactJob;
use crate::blob::{Blob, BlobFile};
use crate::error::ReadError;
use crate::table::{Separate, Stored};

/// Values that are read at the same time, at most.
const VALUES_MAX: usize = 16;
/// Bytes of values in memory, after which no more join.
const VALUE_BYTES: usize = 1 << 20;
/// Records that wait for those values, at most. Each may hold a block in memory.
const RECORDS_MAX: usize = 64;

/// Records in order, of which some get their values back.
pub(super) struct Moved<'a, D: Disk> {
    job: &'a CompactJob,
    disk: &'a D,
    known: BTreeMap<u64, BlobFile>,
    open: BTreeMap<u64, Blob<D>>,
    waiting: Vec<Stored>,
    /// Of those that wait, the values to be read.
    values: usize,
    /// Of all that wait.
    value_bytes: usize,
    /// Bytes taken out so far, with what waits.
    moved_bytes: u64,
}

impl<'a, D: Disk> Moved<'a, D> {
    /// `known` are the blobs to which records may refer.
    pub(super) fn new(job: &'a CompactJob, disk: &'a D, known: BTreeMap<u64, BlobFile>) -> Self {
        Self {
            job,
            disk,
            known,
            open: BTreeMap::new(),
            waiting: Vec::new(),
            values: 0,
            value_bytes: 0,
            moved_bytes: 0,
        }
    }

    /// Takes the next record. True when what waits is to be [taken out](Moved::take_out) before the next one comes.
    pub(super) fn push(&mut self, stored: Stored) -> bool {
        self.value_bytes += stored.value_len();
        if let Some(separate) = self.to_empty(&stored) {
            self.values += 1;
            self.moved_bytes += u64::from(separate.reference.stored_len);
        }
        self.waiting.push(stored);
        self.values == 0
            || self.values == VALUES_MAX
            || self.value_bytes >= VALUE_BYTES
            || self.waiting.len() == RECORDS_MAX
    }

    /// The records that wait, each that was in a blob to be emptied with its value.
    pub(super) async fn take_out(&mut self) -> Result<Drain<'_, Stored>, ReadError> {
        if self.values > 0 {
            self.job.moving.reach(self.moved_bytes).await;
            let mut records = std::mem::take(&mut self.waiting);
            for stored in &records {
                self.open_blob(stored).await?;
            }
            let values = records.iter_mut().map(|stored| self.give_back(stored));
            try_join_all(values).await?;
            self.waiting = records;
        }
        self.values = 0;
        self.value_bytes = 0;
        Ok(self.waiting.drain(..))
    }

    /// Where the record's value is, if the blob there shall be emptied.
    fn to_empty(&self, stored: &Stored) -> Option<Separate> {
        let emptied = &self.job.emptied;
        stored
            .separate
            .filter(|separate| emptied.contains(&separate.reference.file_id))
    }

    async fn open_blob(&mut self, stored: &Stored) -> Result<(), ReadError> {
        let Some(Separate { reference, .. }) = self.to_empty(stored) else {
            return Ok(());
        };
        if let Entry::Vacant(none) = self.open.entry(reference.file_id) {
            let file = self.known.get(&reference.file_id);
            let file = file.expect("an input refers to blobs that it lists");
            let (dir, keys) = (&self.job.dir, self.job.sealing.keys());
            none.insert(Blob::open(self.disk, dir, file, keys).await?);
        }
        Ok(())
    }

    async fn give_back(&self, stored: &mut Stored) -> Result<(), ReadError> {
        let Some(Separate { table, reference }) = self.to_empty(stored) else {
            return Ok(());
        };
        let value = self.open[&reference.file_id].get(&reference).await;
        let token = stored.entry.token;
        stored.entry.record.value = value.map_err(|error| error.of_value(table, token))?;
        stored.separate = None;
        Ok(())
    }
}
