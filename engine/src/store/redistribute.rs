//! The stores of another number of shards, made of those that there are.
//!
//! Runs at a start, before anything is served. Everything in the old stores' logs becomes tables; then each new
//! store gets hard links of the tables that hold any of its tokens, and of their blobs, listed with the part of the ring
//! that is its own. No record of a keyspace is copied; compaction later writes what is left of a table
//! that several stores share.
//!
//! Invariants: the old stores hold all they held that can be read, whatever happens; the new directories count for
//! nothing before the caller says, in one durable step, that they are the stores from now on. So
//! redistributing is repeated from its beginning after a crash.
//!
//! Trees whose records do not belong to shards by their token are left to the caller.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use torc_env::{Env, ShardId, TokenRange, TreeId, mutation};

use super::Store;
use super::snapshot::{SnapshotError, failed, link_files, remove_all};
use super::tables::DataFile;
use crate::error::{OpenError, ReadError, WriteError};
use crate::frame::Mark;
use crate::layout::Layout;
use crate::manifest::{Listed, Loss, Manifest, State};
use crate::options::Options;

/// Why data cannot be redistributed.
#[derive(Debug, thiserror::Error)]
pub enum RedistributeError {
    /// A store does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A store cannot be flushed, written or closed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A store cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The device refused.
    #[error(transparent)]
    Link(#[from] SnapshotError),
}

/// A node's data under two layouts, all stores open. Both are to be closed; see
/// [`Redistribution::finish`].
pub struct Redistribution<E: Env> {
    /// As it was, flushed, in order of shards.
    pub old: Vec<Store<E>>,
    /// As it will be.
    pub new: Vec<Store<E>>,
    /// The last frame with a record in the log of each old store: its tables hold all up to it.
    pub ends: Vec<Mark>,
}

/// Makes the stores of layout `to` from those of layout `from`. `options` gives the options of a store in
/// a directory; `is_divided` says of which trees a record belongs to the shard that owns its token. What
/// an earlier attempt has left is removed first.
///
/// # Errors
/// When a store cannot be opened or flushed, or the device refuses. The old stores are whole then.
pub async fn redistribute<E: Env>(
    env: &E,
    from: Layout,
    to: Layout,
    options: impl Fn(Layout, ShardId) -> Options,
    is_divided: impl Fn(TreeId) -> bool,
) -> Result<Redistribution<E>, RedistributeError> {
    let disk = env.disk();
    for shard in to.shards() {
        let dir = options(to, shard).dir;
        let cleared = remove_all(disk, &dir).await;
        cleared.map_err(failed("clear", &dir))?;
    }
    let mut old = Vec::new();
    let mut sources = Vec::new();
    for shard in from.shards() {
        let (store, _) = Store::open(env.clone(), settling(options(from, shard))).await?;
        store.flush().await?;
        sources.push(Source {
            tables_dir: store.0.tables_dir.clone(),
            range: TokenRange::of_shard(shard, from.shards),
            state: store.0.manifest.state().clone(),
            seqno: store.0.memory.borrow().seqno(),
            blobs: blobs_by_table(&store),
        });
        old.push(store);
    }
    let runs = Runs::of(&sources, &is_divided);
    let mut new = Vec::new();
    for shard in to.shards() {
        let options = settling(options(to, shard));
        let range = TokenRange::of_shard(shard, to.shards);
        let part = part_of(&sources, &runs, range, &is_divided);
        let files = part.files.iter();
        let files = files.map(|(file, source)| (&*sources[*source].tables_dir, *file));
        link_files(disk, files, &options.dir).await?;
        let state = State {
            tables: part.tables,
            suspect: part.suspect,
            losses: part.losses,
            file_id_floor: options.file_id_first,
            seqno_floor: part.seqno,
            ..State::default()
        };
        Manifest::create(env, &options.dir, state, &options.keys).await?;
        new.push(Store::open(env.clone(), options).await?.0);
    }
    let ends = sources.iter().map(|source| source.state.flushed).collect();
    Ok(Redistribution { old, new, ends })
}

impl<E: Env> Redistribution<E> {
    /// Has what was carried over become tables, and returns the last frame with a record in the log of each new store:
    /// what is behind it came after the division.
    ///
    /// # Errors
    /// When a store cannot be flushed.
    pub async fn begins(&self) -> Result<Vec<Mark>, RedistributeError> {
        let mut begins = Vec::new();
        for store in &self.new {
            store.flush().await?;
            begins.push(store.0.manifest.state().flushed);
        }
        Ok(begins)
    }

    /// Closes all stores. On return the new ones are durable, and the caller may say that they are the
    /// stores.
    ///
    /// # Errors
    /// When one of them is poisoned.
    pub async fn finish(self) -> Result<(), RedistributeError> {
        for store in self.old.iter().chain(&self.new) {
            store.close().await?;
        }
        Ok(())
    }
}

/// The tables stay as they are meanwhile, however many there come to be.
fn settling(options: Options) -> Options {
    Options {
        strategy: None,
        level0_runs_max: usize::MAX,
        ..options
    }
}

/// An old store.
struct Source {
    tables_dir: PathBuf,
    range: TokenRange,
    state: State,
    seqno: u64,
    blobs: BTreeMap<u64, Vec<u64>>,
}

/// The blobs to which each table refers.
fn blobs_by_table<E: Env>(store: &Store<E>) -> BTreeMap<u64, Vec<u64>> {
    let tables = store.0.tables.borrow();
    let state = store.0.manifest.state();
    let ids = state.tables.values().map(|table| table.file_id);
    let blobs_of = |id| {
        let blobs = tables.blobs_of(id).unwrap_or_default();
        blobs.iter().map(|file| file.file_id).collect()
    };
    ids.map(|id| (id, blobs_of(id))).collect()
}

/// What a new store begins with.
#[derive(Default)]
struct Part {
    tables: BTreeMap<crate::levels::TableKey, Listed>,
    /// Index of the source that has each file.
    files: BTreeMap<DataFile, usize>,
    suspect: bool,
    losses: Vec<Loss>,
    seqno: u64,
}

/// What of the old stores' divided trees lies in `range`.
fn part_of(
    sources: &[Source],
    runs: &Runs,
    range: TokenRange,
    is_divided: &impl Fn(TreeId) -> bool,
) -> Part {
    let mut part = Part::default();
    for (index, source) in sources.iter().enumerate() {
        let Some(common) = source.range.intersection(&range) else {
            continue;
        };
        part.suspect |= source.state.suspect;
        let losses = source.state.losses.iter();
        let losses = losses.filter(|loss| loss.tree.is_none_or(is_divided));
        part.losses.extend(losses.filter_map(|loss| {
            let range = loss.range.intersection(&common)?;
            Some(Loss { range, ..*loss })
        }));
        part.seqno = part.seqno.max(source.seqno);
        let tables = source.state.tables.values();
        let forgotten = usize::from(mutation::on("redistribution_forgets_a_table"));
        let tables = tables.filter(|table| is_divided(table.tree));
        for table in tables.skip(forgotten) {
            let Some(extent) = table.extent.intersection(&common) else {
                continue;
            };
            let listed = Listed {
                extent,
                run: runs.joined(index, table),
                ..*table
            };
            part.tables.insert(listed.key(), listed);
            part.files.insert(DataFile::Table(table.file_id), index);
            let blobs = source.blobs.get(&table.file_id).into_iter().flatten();
            part.files
                .extend(blobs.map(|blob| (DataFile::Blob(*blob), index)));
        }
    }
    part
}

/// The runs of each level of each tree, by source, newest first. The sources' tokens are apart from each other,
/// so runs of the same age among their level's become one, and a level has no more of them than before.
struct Runs(BTreeMap<(TreeId, u8), Vec<Vec<u64>>>);

impl Runs {
    fn of(sources: &[Source], is_divided: &impl Fn(TreeId) -> bool) -> Self {
        let mut levels: BTreeMap<(TreeId, u8), Vec<BTreeSet<u64>>> = BTreeMap::new();
        for (index, source) in sources.iter().enumerate() {
            let tables = source.state.tables.values();
            for table in tables.filter(|table| is_divided(table.tree)) {
                let level = levels.entry((table.tree, table.level)).or_default();
                level.resize(sources.len(), BTreeSet::new());
                level[index].insert(table.run);
            }
        }
        let newest_first = |runs: BTreeSet<u64>| runs.into_iter().rev().collect();
        Self(
            levels
                .into_iter()
                .map(|(key, level)| (key, level.into_iter().map(newest_first).collect()))
                .collect(),
        )
    }

    /// The run that a table's run becomes part of: named as the highest of its rank, which keeps the order of
    /// each source's runs.
    fn joined(&self, source: usize, table: &Listed) -> u64 {
        let Some(level) = self.0.get(&(table.tree, table.level)) else {
            return table.run;
        };
        let rank = level[source].iter().position(|run| *run == table.run);
        let of_rank = rank.map(|rank| level.iter().filter_map(move |runs| runs.get(rank)));
        of_rank
            .and_then(|runs| runs.max().copied())
            .unwrap_or(table.run)
    }
}
