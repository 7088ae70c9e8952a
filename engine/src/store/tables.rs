//! The store's view of its tables: per tree the levels, and an open handle for each file.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use torc_env::{Disk, TokenRange, TreeId, mutation};

use super::Inner;
use crate::blob::{Blob, BlobFile, blob_path};
use crate::compaction::{
    Outlook, Plan, Scanned, Settings, Strategy, Worn, debt_bytes, is_paid, outlook, pick_scanned,
};
use crate::crypt::KeyId;
use crate::error::ReadError;
use crate::levels::{BOTTOM, Edit, Levels, Run, TableRef};
use crate::manifest::{Change, Listed};
use crate::options::Options;
use crate::pacing::mul_div;
use crate::purge::PurgeFloors;
use crate::stats::Stats;
use crate::table::{Table, TableInfo, table_path};

/// Slots of the block cache that are looked at before somebody else has a turn.
const FORGET_AT_ONCE: usize = 4096;

/// One tree's tables. Immutable: a change makes a new one, readers keep the one they began with.
pub(super) struct Tree<D: Disk> {
    pub(super) levels: Levels,
    open: BTreeMap<u64, Table<D>>,
    /// Every blob to which an open table refers.
    blobs: BTreeMap<u64, InUse<D>>,
}

/// A blob, and what tables have of it.
struct InUse<D: Disk> {
    blob: Blob<D>,
    tables: usize,
    bytes: u64,
}

impl<D: Disk> Clone for InUse<D> {
    fn clone(&self) -> Self {
        Self {
            blob: self.blob.clone(),
            ..*self
        }
    }
}

impl<D: Disk> InUse<D> {
    /// Bytes of values to which no table refers any more.
    fn dead(&self) -> u64 {
        self.blob.file().value_bytes.saturating_sub(self.bytes)
    }
}

/// A file in the directory of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum DataFile {
    Table(u64),
    Blob(u64),
}

impl DataFile {
    /// The files that a job wrote.
    pub(super) fn of(tables: &[TableInfo], blobs: &[BlobFile]) -> Vec<DataFile> {
        let tables = tables.iter().map(|info| DataFile::Table(info.file_id));
        let blobs = blobs.iter().map(|file| DataFile::Blob(file.file_id));
        tables.chain(blobs).collect()
    }

    pub(super) fn path(self, dir: &Path) -> PathBuf {
        match self {
            DataFile::Table(id) => table_path(dir, id),
            DataFile::Blob(id) => blob_path(dir, id),
        }
    }
}

/// What was opened to be put into a tree.
pub(super) struct Opened<D: Disk> {
    pub(super) tables: Vec<Table<D>>,
    pub(super) blobs: Vec<Blob<D>>,
}

impl<D: Disk> Opened<D> {
    pub(super) fn none() -> Self {
        Self {
            tables: Vec::new(),
            blobs: Vec::new(),
        }
    }
}

impl<D: Disk> Tree<D> {
    /// The open table behind a reference of these levels.
    pub(super) fn table(&self, table: &TableRef) -> &Table<D> {
        self.open
            .get(&table.info.file_id)
            .expect("levels refer to open tables")
    }

    /// The blob of this id, when an open table refers to it.
    pub(super) fn blob(&self, file_id: u64) -> Option<&Blob<D>> {
        self.blobs.get(&file_id).map(|in_use| &in_use.blob)
    }

    /// All blobs in use.
    pub(super) fn blob_files(&self) -> Vec<BlobFile> {
        let blobs = self.blobs.values();
        blobs.map(|in_use| *in_use.blob.file()).collect()
    }
}

/// All trees.
pub(super) struct Tables<D: Disk> {
    trees: BTreeMap<TreeId, Rc<Tree<D>>>,
    floors: BTreeMap<TreeId, PurgeFloors>,
    strategies: BTreeMap<TreeId, Strategy>,
    /// What a flush wrote of a tree, on average, since the open.
    run_bytes: BTreeMap<TreeId, u64>,
    scanned: BTreeMap<TreeId, Scanned>,
    /// Counts the flushes that were applied, and the drops: what was read before one of them may
    /// no longer be the newest.
    generation: u64,
    next_file_id: u64,
    /// Blobs in which a scrub has met damage: they are emptied of what can be read.
    unsound: BTreeSet<u64>,
}

impl<D: Disk> Tables<D> {
    pub(super) fn new(next_file_id: u64) -> Self {
        Self {
            trees: BTreeMap::new(),
            floors: BTreeMap::new(),
            strategies: BTreeMap::new(),
            run_bytes: BTreeMap::new(),
            scanned: BTreeMap::new(),
            generation: 0,
            next_file_id,
            unsound: BTreeSet::new(),
        }
    }

    /// A tree's tables, to read from. One reference count.
    pub(super) fn tree(&self, tree: TreeId) -> Option<Rc<Tree<D>>> {
        self.trees.get(&tree).cloned()
    }

    /// Trees with tables, ascending.
    pub(super) fn tree_ids(&self) -> Vec<TreeId> {
        self.trees.keys().copied().collect()
    }

    /// Rises when memory hands records over to tables.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Says that memory is about to let go of records that are in tables now.
    pub(super) fn begin_generation(&mut self) {
        self.generation += 1;
    }

    /// The tree of a table in use, and the tokens that damage at `offset` of it makes unknown.
    pub(super) fn damaged_range(&self, file_id: u64, offset: u64) -> Option<(TreeId, TokenRange)> {
        let mut trees = self.trees.iter();
        trees.find_map(|(id, tree)| {
            let table = tree.open.get(&file_id)?;
            Some((*id, table.damaged_range(offset)))
        })
    }

    /// The tree of a table in use.
    pub(super) fn tree_of(&self, file_id: u64) -> Option<TreeId> {
        let mut trees = self.trees.iter();
        trees.find_map(|(id, tree)| tree.open.contains_key(&file_id).then_some(*id))
    }

    /// The blobs to which a table in use refers.
    pub(super) fn blobs_of(&self, file_id: u64) -> Option<Vec<BlobFile>> {
        let mut trees = self.trees.values();
        let table = trees.find_map(|tree| tree.open.get(&file_id))?;
        let blobs = table.info().blobs.iter();
        Some(blobs.map(|used| used.file).collect())
    }

    /// All blobs in use.
    pub(super) fn blob_ids(&self) -> BTreeSet<u64> {
        let trees = self.trees.values();
        trees.flat_map(|tree| tree.blobs.keys().copied()).collect()
    }

    /// A blob is to be emptied whatever is left in it.
    pub(super) fn distrust(&mut self, blob: u64) {
        self.unsound.insert(blob);
    }

    /// The blobs of a tree that are worth emptying; with a `key`, also those that are not encrypted with it.
    pub(super) fn worn(
        &self,
        options: &Options,
        tree: TreeId,
        key: Option<Option<KeyId>>,
    ) -> BTreeMap<u64, Worn> {
        let Some(tree) = self.trees.get(&tree) else {
            return BTreeMap::new();
        };
        let percent = u64::from(options.blob_dead_percent.clamp(1, 100));
        let worn = tree.blobs.iter().filter_map(|(id, in_use)| {
            let file = in_use.blob.file();
            let (live, dead) = (in_use.bytes, in_use.dead());
            let is_urgent = self.unsound.contains(id);
            let is_worn =
                u128::from(dead) * 100 >= u128::from(file.value_bytes.max(1)) * u128::from(percent);
            let is_stale = key.is_some_and(|key| file.key() != key);
            let worn = Worn {
                live,
                dead,
                is_urgent,
            };
            (is_worn || is_stale || is_urgent).then_some((*id, worn))
        });
        worn.collect()
    }

    /// Bytes of a tree's dead values beyond the part of its blobs that may be dead. More than none when blobs are worn
    /// faster than they are emptied.
    pub(super) fn dead_in_excess(&self, options: &Options, tree: TreeId) -> u64 {
        let Some(tree) = self.trees.get(&tree) else {
            return 0;
        };
        let percent = u64::from(options.blob_dead_percent.clamp(1, 100));
        let blobs = tree.blobs.values();
        let (values, dead) = blobs.fold((0_u64, 0_u64), |(values, dead), in_use| {
            let of_blob = in_use.blob.file().value_bytes;
            (
                values.saturating_add(of_blob),
                dead.saturating_add(in_use.dead()),
            )
        });
        dead.saturating_sub(mul_div(values, percent, 100))
    }

    /// Whether any tree has more dead values than it may keep.
    pub(super) fn has_dead_in_excess(&self, options: &Options) -> bool {
        let mut trees = self.trees.keys();
        trees.any(|tree| self.dead_in_excess(options, *tree) > 0)
    }

    /// Ids for the files of one job.
    pub(super) fn reserve_file_ids(&mut self, count: u64) -> Range<u64> {
        let first = self.next_file_id;
        self.next_file_id += count;
        first..self.next_file_id
    }

    /// Applies an edit to a tree. `opened` holds every added table, and every blob to which one refers, that was not there
    /// before.
    /// Returns the files that are no longer part of the tree.
    pub(super) fn apply(&mut self, tree: TreeId, edit: &Edit, opened: Opened<D>) -> Vec<DataFile> {
        let (mut levels, mut open, mut blobs) = match self.trees.get(&tree) {
            Some(old) => (old.levels.clone(), old.open.clone(), old.blobs.clone()),
            None => (Levels::new(), BTreeMap::new(), BTreeMap::new()),
        };
        levels.apply(edit);
        for blob in opened.blobs {
            let entry = blobs.entry(blob.file().file_id);
            entry.or_insert(InUse {
                blob,
                tables: 0,
                bytes: 0,
            });
        }
        for table in opened.tables {
            for used in &table.info().blobs {
                let in_use = blobs.get_mut(&used.file.file_id);
                let in_use = in_use.expect("blobs are opened with the tables that refer to them");
                in_use.tables += 1;
                in_use.bytes += used.bytes;
            }
            open.insert(table.info().file_id, table);
        }
        let removed: BTreeSet<u64> = edit.removed.iter().map(|key| key.file_id).collect();
        let mut gone = Vec::new();
        for file_id in removed {
            if levels.holds_file(file_id) {
                continue;
            }
            gone.push(DataFile::Table(file_id));
            if let Some(table) = open.remove(&file_id) {
                table.retire();
                gone.extend(no_longer_used(&mut blobs, table.info()));
            }
        }
        for file in &gone {
            if let DataFile::Blob(file_id) = file {
                self.unsound.remove(file_id);
            }
        }
        if open.is_empty() {
            self.trees.remove(&tree);
        } else {
            let tree_now = Tree {
                levels,
                open,
                blobs,
            };
            self.trees.insert(tree, Rc::new(tree_now));
        }
        gone
    }

    /// Forgets a tree; returns its files.
    pub(super) fn drop_tree(&mut self, tree: TreeId) -> Vec<DataFile> {
        self.floors.remove(&tree);
        self.strategies.remove(&tree);
        self.run_bytes.remove(&tree);
        self.scanned.remove(&tree);
        self.generation += 1;
        match self.trees.remove(&tree) {
            Some(tree) => {
                tree.open.values().for_each(Table::retire);
                let tables = tree.open.keys().copied().map(DataFile::Table);
                let blobs = tree.blobs.keys().copied().map(DataFile::Blob);
                tables.chain(blobs).collect()
            }
            None => Vec::new(),
        }
    }

    /// The master key of each table and blob.
    pub(super) fn keys(&self) -> impl Iterator<Item = Option<KeyId>> {
        let tables = self.trees.values().flat_map(|tree| tree.open.values());
        let blobs = self.trees.values().flat_map(|tree| tree.blobs.values());
        let blobs = blobs.map(|in_use| in_use.blob.file().key());
        tables.map(|table| table.info().key).chain(blobs)
    }

    pub(super) fn set_purge_floors(&mut self, tree: TreeId, floors: PurgeFloors) {
        self.floors.insert(tree, floors);
    }

    pub(super) fn purge_floors(&self, tree: TreeId) -> PurgeFloors {
        self.floors.get(&tree).cloned().unwrap_or_default()
    }

    /// Says how a tree is compacted; true when that is news.
    pub(super) fn set_strategy(&mut self, tree: TreeId, strategy: Strategy) -> bool {
        self.strategies.insert(tree, strategy) != Some(strategy)
    }

    /// How to compact a tree; `None` when nobody has said so yet and it is to wait for that.
    pub(super) fn settings(&self, options: &Options, tree: TreeId) -> Option<Settings> {
        let strategy = self.strategies.get(&tree).copied().or(options.strategy)?;
        let settings = Settings::new(options, strategy);
        Some(match self.run_bytes.get(&tree) {
            Some(run_bytes) => settings.with_flushes_of(*run_bytes),
            None => settings,
        })
    }

    /// Notes what a flush wrote: the tables of a tree are next to each other.
    pub(super) fn note_run_bytes(&mut self, infos: &[TableInfo]) {
        for infos in infos.chunk_by(|a, b| a.tree == b.tree) {
            let bytes: u64 = infos.iter().map(|info| info.bytes).sum();
            let average = self.run_bytes.entry(infos[0].tree).or_insert(bytes);
            *average = (*average * 3 + bytes).div_ceil(4);
        }
    }

    /// Notes what a scan has read of a tree.
    pub(super) fn note_scanned(&mut self, tree: TreeId, scanned: Scanned) {
        // It may have been dropped meanwhile.
        if self.trees.contains_key(&tree) {
            self.scanned.entry(tree).or_default().add_all(scanned);
        }
    }

    #[cfg(test)]
    pub(super) fn scanned_of(&self, tree: TreeId) -> Scanned {
        self.scanned.get(&tree).copied().unwrap_or_default()
    }

    /// Whether scans have paid for a merge.
    pub(super) fn is_scan_paid(&self, options: &Options, tree: TreeId) -> bool {
        let of_tree = || {
            let scanned = self.scanned.get(&tree)?;
            let settings = self.settings(options, tree)?;
            Some(is_paid(&self.trees.get(&tree)?.levels, &settings, scanned))
        };
        of_tree().unwrap_or(false)
    }

    /// The merge that scans have paid for, if they have.
    pub(super) fn pick_scanned(&self, options: &Options, tree: TreeId) -> Option<Plan> {
        let scanned = self.scanned.get(&tree)?;
        let settings = self.settings(options, tree)?;
        pick_scanned(&self.trees.get(&tree)?.levels, &settings, scanned)
    }

    /// A piece of these levels is merged. What only writes a table again, or drops it, leaves scans as many runs.
    pub(super) fn forget_scanned(&mut self, tree: TreeId, plan: &Plan) {
        if plan.is_rewrite() {
            return;
        }
        if let Some(scanned) = self.scanned.get_mut(&tree) {
            let inputs = plan.inputs.iter();
            inputs.for_each(|input| scanned.forget(input.level));
        }
    }

    /// The merging that lies ahead of all trees.
    pub(super) fn outlook(&self, options: &Options) -> Outlook {
        let of_tree = |(id, tree): (&TreeId, &Rc<Tree<D>>)| {
            let settings = self.settings(options, *id)?;
            let run_bytes = self.run_bytes.get(id).copied().unwrap_or(0);
            let runs_max = options.level0_runs_max;
            Some(outlook(&tree.levels, &settings, run_bytes, runs_max))
        };
        let trees = self.trees.iter().filter_map(of_tree);
        trees.fold(Outlook::default(), Outlook::and)
    }

    /// Runs on level 0 of the tree that has the most.
    pub(super) fn level0_runs(&self) -> usize {
        let trees = self.trees.values();
        trees
            .map(|tree| tree.levels.level(0).len())
            .max()
            .unwrap_or(0)
    }

    pub(super) fn add_stats(&self, options: &Options, stats: &mut Stats) {
        for (id, tree) in &self.trees {
            stats.trees += 1;
            stats.tables += tree.open.len();
            for table in tree.open.values() {
                stats.table_memory_bytes += table.memory_bytes();
                stats.table_bytes += table.info().bytes;
            }
            stats.blobs += tree.blobs.len();
            for in_use in tree.blobs.values() {
                stats.table_memory_bytes += in_use.blob.memory_bytes();
                stats.blob_bytes += in_use.blob.file().bytes;
                stats.blob_dead_bytes += in_use.dead();
            }
            let settings = self.settings(options, *id);
            if let Some(settings) = &settings {
                stats.compaction_debt_bytes += debt_bytes(&tree.levels, settings);
            }
            stats.base_bytes += base_bytes(&tree.levels, settings);
            stats.runs_max = stats.runs_max.max(tree.levels.runs().len());
            let in_use = (1..=BOTTOM).filter(|level| !tree.levels.level(*level).is_empty());
            stats.levels_max = stats.levels_max.max(in_use.count());
            stats.live_bytes += tree.levels.tables().map(TableRef::bytes).sum::<u64>();
        }
        stats.level0_runs = self.level0_runs();
        stats.purge_floors = self.floors.len();
    }
}

/// See [`Stats::base_bytes`].
fn base_bytes(levels: &Levels, settings: Option<Settings>) -> u64 {
    let runs = levels.runs().iter().map(bytes_with_values);
    match settings.map(|settings| settings.strategy) {
        Some(Strategy::Fifo | Strategy::TimeWindow { .. }) => runs.sum(),
        _ => runs.max().unwrap_or(0),
    }
}

/// Bytes of a run's tables, and of the values in blobs to which they refer.
fn bytes_with_values(run: &Run) -> u64 {
    let tables = run.tables.iter();
    let values = tables.flat_map(|table| &table.info.blobs);
    run.bytes_in(&TokenRange::ALL) + values.map(|used| used.bytes).sum::<u64>()
}

/// Takes what `table` has of blobs out of the account; returns the blobs to which no other table refers.
fn no_longer_used<D: Disk>(
    blobs: &mut BTreeMap<u64, InUse<D>>,
    table: &TableInfo,
) -> Vec<DataFile> {
    let mut gone = Vec::new();
    for used in &table.blobs {
        let file_id = used.file.file_id;
        let Entry::Occupied(mut entry) = blobs.entry(file_id) else {
            continue;
        };
        let in_use = entry.get_mut();
        in_use.tables -= 1;
        in_use.bytes -= used.bytes;
        if in_use.tables == 0 {
            entry.remove();
            gone.push(DataFile::Blob(file_id));
        } else if mutation::on("remove_shared_blob") {
            // Whoever has it open reads on; the next open misses it.
            gone.push(DataFile::Blob(file_id));
        }
    }
    gone
}

/// The manifest's changes for an edit of a tree.
pub(super) fn changes_of(tree: TreeId, edit: &Edit) -> Vec<Change> {
    let removed = edit.removed.iter().copied().map(Change::RemoveTable);
    let added = edit.added.iter().map(|table| {
        Change::AddTable(Listed {
            tree,
            file_id: table.info.file_id,
            level: table.level,
            run: table.run,
            extent: table.extent,
            bytes: table.info.bytes,
        })
    });
    removed.chain(added).collect()
}

impl<E: torc_env::Env> Inner<E> {
    /// Removes tables that no manifest lists, and blobs to which none of the listed refers. Best effort: the next
    /// open collects what stays. A snapshot that is being taken keeps them until it has its links.
    pub(super) async fn remove_files(&self, files: &[DataFile]) {
        self.forget_blocks(files).await;
        let Some(files) = self.hold.defer(files) else {
            return;
        };
        for file in files {
            let path = file.path(&self.tables_dir);
            if let Err(error) = self.env.disk().remove(&path).await {
                tracing::warn!(%error, path = %path.display(), "an old file stays for now");
            }
        }
    }

    /// Takes the blocks of tables that are no longer part of a tree out of their cache.
    pub(super) async fn forget_blocks(&self, files: &[DataFile]) {
        let id = |file: &DataFile| match file {
            DataFile::Table(id) => Some(*id),
            DataFile::Blob(_) => None,
        };
        let tables: BTreeSet<u64> = files.iter().filter_map(id).collect();
        if tables.is_empty() {
            return;
        }
        let slots = self.blocks.slots();
        for from in (0..slots).step_by(FORGET_AT_ONCE) {
            let to = slots.min(from + FORGET_AT_ONCE);
            self.blocks.forget(&tables, from..to);
            self.env.give_way().await;
        }
    }

    /// Opens what a job has written for `tree`, and the blobs to which it refers and which the tree has not open.
    pub(super) async fn open_files<'a>(
        &self,
        tree: TreeId,
        infos: impl IntoIterator<Item = &'a TableInfo>,
    ) -> Result<Opened<E::Disk>, ReadError> {
        let mut opened = Opened::none();
        let keys = self.keys.borrow().clone();
        let (disk, dir) = (self.env.disk(), &self.tables_dir);
        let before = self.tables.borrow().tree(tree);
        let mut known = BTreeSet::new();
        for info in infos {
            opened
                .tables
                .push(Table::open(disk, dir, info.file_id, &keys).await?);
            for used in &info.blobs {
                let file_id = used.file.file_id;
                let has = before
                    .as_ref()
                    .is_some_and(|tree| tree.blob(file_id).is_some());
                if !has && known.insert(file_id) {
                    opened
                        .blobs
                        .push(Blob::open(disk, dir, &used.file, &keys).await?);
                }
            }
        }
        Ok(opened)
    }
}
