//! A sealed memtable becomes tables of level 0.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use torc_env::{Disk, Job, TreeId};

use super::Pace;
use super::output::{OutputSettings, Outputs, Written};
use crate::blob::BlobFile;
use crate::crypt::Sealing;
use crate::error::JobError;
use crate::le::len64;
use crate::memtable::Sealed;
use crate::pacing::mul_div;
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
    /// Bytes from which on a value goes to a blob; `None` when none does.
    pub separate_from: Option<usize>,
    /// How they are encrypted.
    pub sealing: Sealing,
    /// How far it may go.
    pub pace: Arc<Pace>,
}

/// What a flush wrote.
#[derive(Clone, Debug, Default)]
pub struct FlushOutput {
    /// The tables, ascending by (tree, token): the tables of one tree are one run of level 0.
    pub tables: Vec<TableInfo>,
    /// The blobs to which they refer.
    pub blobs: Vec<BlobFile>,
}

impl FlushJob {
    /// Ids that a flush of `sealed` into tables of `table_bytes` takes at most: half of them for blobs.
    pub fn file_ids_needed(sealed: &Sealed, table_bytes: u64) -> u64 {
        let trees = len64(sealed.trees().count());
        let bytes = len64(sealed.memory_bytes());
        2 * (trees + bytes / table_bytes.max(1))
    }

    async fn write<D: Disk>(&self, outputs: &mut Outputs<D>) -> Result<Written, JobError> {
        let trees: Vec<TreeId> = self.sealed.trees().collect();
        let records = len64(self.sealed.as_memtable().len());
        let bytes = len64(self.sealed.memory_bytes());
        let mut written = 0;
        for (index, tree) in trees.iter().copied().enumerate() {
            let reserved = len64(trees.len() - index - 1);
            for entry in self.sealed.entries(tree) {
                outputs.add(tree, &entry, None, reserved).await?;
                written += 1;
                self.pace.reach(mul_div(bytes, written, records)).await;
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
            sealing: self.sealing.clone(),
            separate_from: self.separate_from,
        };
        let mut outputs = Outputs::new(disk, settings);
        match self.write(&mut outputs).await {
            Ok(Written { tables, blobs }) => Ok(FlushOutput { tables, blobs }),
            Err(error) => {
                outputs.discard().await;
                Err(error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use torc_env::{Env, JobClass, ShardId, Token, TokenRange};
    use torc_sim::{DiskOptions, SimEnv, Simulation};

    use super::*;
    use crate::crypt::Keys;
    use crate::memtable::{Arena, Memtable};
    use crate::record::{EntryRef, Kind, ScanFrom};
    use crate::table::{ReadAhead, Table, table_id};

    const KEYS: u32 = 500;

    fn dir() -> PathBuf {
        PathBuf::from("tables")
    }

    /// Three trees with the same keys; the one in the middle has a single key.
    fn sealed() -> Arc<Sealed> {
        let mut arena = Arena::default();
        let mut memtable = Memtable::new(TokenRange::ALL);
        for tree in 1..=3 {
            for number in 0..if tree == 2 { 1 } else { KEYS } {
                let key = number.to_be_bytes();
                let tree = TreeId(tree);
                // Does not compress.
                let value: Vec<u8> = (0..20u8)
                    .flat_map(|part| Token::of(tree, &[key[2], key[3], part]).0.to_le_bytes())
                    .collect();
                let packed = arena.pack(&EntryRef {
                    token: Token::of(tree, &key),
                    key: &key,
                    seqno: number.into(),
                    kind: Kind::Value,
                    stamp: 7,
                    expires_at_ms: 0,
                    value: &value,
                });
                memtable.insert(tree, packed);
            }
        }
        Arc::new(memtable.seal())
    }

    fn job(sealed: &Arc<Sealed>, table_bytes: u64, file_ids: Range<u64>) -> FlushJob {
        FlushJob {
            sealed: sealed.clone(),
            dir: dir(),
            file_ids,
            block_bytes: 8192,
            table_bytes,
            separate_from: None,
            sealing: Sealing::default(),
            pace: Arc::default(),
        }
    }

    async fn check(env: &SimEnv, output: &FlushOutput) {
        let sealed = sealed();
        let mut found: Vec<(TreeId, Bytes)> = vec![];
        for info in &output.tables {
            let table = Table::open(env.disk(), &dir(), info.file_id, &Keys::default())
                .await
                .unwrap();
            let from = ScanFrom::Token(Token(0));
            let mut iter = table.iter(&from, TokenRange::ALL, ReadAhead::background(1));
            while let Some(stored) = iter.next().await.unwrap() {
                let entry = stored.entry;
                assert_eq!(entry.record.value.len(), 320);
                found.push((info.tree, entry.key));
            }
        }
        let expected: Vec<(TreeId, Bytes)> = sealed
            .trees()
            .flat_map(|tree| {
                sealed
                    .entries(tree)
                    .map(move |entry| (tree, entry.to_entry().key))
            })
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn every_tree_gets_tables_of_its_own() {
        torc_sim::run(1, |env| async move {
            env.disk().create_dir(&dir()).await.unwrap();
            let sealed = sealed();
            let needed = FlushJob::file_ids_needed(&sealed, 1 << 20);
            let output = env
                .background(JobClass::Flush, job(&sealed, 1 << 20, 5..5 + needed))
                .await
                .unwrap();
            let trees: Vec<u32> = output.tables.iter().map(|info| info.tree.0).collect();
            assert_eq!(trees, [1, 2, 3]);
            check(&env, &output).await;
        });
    }

    #[test]
    fn small_tables_are_cut_while_ids_last_for_the_trees_to_come() {
        torc_sim::run(1, |env| async move {
            env.disk().create_dir(&dir()).await.unwrap();
            let sealed = sealed();
            let output = env
                .background(JobClass::Flush, job(&sealed, 4096, 5..10))
                .await
                .unwrap();
            let trees: Vec<u32> = output.tables.iter().map(|info| info.tree.0).collect();
            assert_eq!(trees, [1, 1, 1, 2, 3]);
            check(&env, &output).await;
        });
    }

    #[test]
    fn a_full_disk_ends_a_flush_typed_and_without_leftovers() {
        let simulation = Simulation::new(1, torc_sim::Options::default());
        let host = simulation.add_host(1);
        for capacity_bytes in [0, 4096, 50_000, 90_000] {
            let disk = DiskOptions {
                capacity_bytes,
                ..DiskOptions::default()
            };
            simulation.set_disk(host, disk);
            let left = simulation.run_on(host, ShardId(0), |env| async move {
                env.disk().create_dir(&dir()).await.unwrap();
                let job = job(&sealed(), 16 << 10, 5..500);
                let error = env.background(JobClass::Flush, job).await.unwrap_err();
                assert!(error.is_disk_full(), "{error:?}");
                env.disk().list(&dir()).await.unwrap()
            });
            let left = left.unwrap();
            assert!(
                left.iter().all(|entry| table_id(&entry.name).is_none()),
                "{left:?}"
            );
        }
    }
}
