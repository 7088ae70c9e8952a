//! A sealed memtable becomes tables of level 0.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use torc_env::{Disk, Job, TreeId};

use super::output::{OutputSettings, Outputs};
use crate::error::JobError;
use crate::memtable::Sealed;
use crate::table::{FilterBits, TableInfo};

/// Writes every record of a sealed memtable, each tree into tables of its own.
pub struct FlushJob {
    /// What to write. The shard keeps reading it meanwhile.
    pub sealed: Arc<Sealed>,
    /// The directory of tables.
    pub dir: PathBuf,
    /// Ids for the files, reserved for this job: at least [`FlushJob::file_ids_needed`].
    pub file_ids: Range<u64>,
    /// Largest body of a block before compression.
    pub block_bytes: usize,
    /// Size at which a table ends.
    pub table_bytes: u64,
}

/// What a flush wrote.
#[derive(Clone, Debug)]
pub struct FlushOutput {
    /// The tables, ascending by (tree, token): the tables of one tree are one run of level 0.
    pub tables: Vec<TableInfo>,
}

impl FlushJob {
    /// Ids that a flush of `sealed` into tables of `table_bytes` takes at most.
    pub fn file_ids_needed(sealed: &Sealed, table_bytes: u64) -> u64 {
        let trees = u64::try_from(sealed.trees().count()).expect("a count in memory");
        let bytes = u64::try_from(sealed.memory_bytes()).expect("a size in memory");
        trees + bytes / table_bytes.max(1)
    }

    async fn write<D: Disk>(&self, outputs: &mut Outputs<D>) -> Result<Vec<TableInfo>, JobError> {
        let trees: Vec<TreeId> = self.sealed.trees().collect();
        for (index, tree) in trees.iter().copied().enumerate() {
            let reserved = u64::try_from(trees.len() - index - 1).expect("a count in memory");
            for entry in self.sealed.entries(tree) {
                outputs.add(tree, &entry, reserved).await?;
            }
            outputs.end_table().await?;
        }
        outputs.finish().await
    }
}

impl Job for FlushJob {
    type Output = Result<FlushOutput, JobError>;

    async fn run<D: Disk>(self, disk: D) -> Self::Output {
        let settings = OutputSettings {
            dir: self.dir.clone(),
            file_ids: self.file_ids.clone(),
            filter: FilterBits::Sixteen,
            block_bytes: self.block_bytes,
            table_bytes: self.table_bytes,
        };
        let mut outputs = Outputs::new(disk, settings);
        match self.write(&mut outputs).await {
            Ok(tables) => Ok(FlushOutput { tables }),
            Err(error) => {
                outputs.discard().await;
                Err(error)
            }
        }
    }
}
