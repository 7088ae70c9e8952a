//! The store's view of its tables: per tree the levels, and an open handle for each file.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

use torc_env::{Disk, TokenRange, TreeId};

use super::Inner;
use crate::compaction::{Outlook, Settings, Strategy, debt_bytes, outlook};
use crate::crypt::KeyId;
use crate::levels::{Edit, Levels, TableRef};
use crate::manifest::{Change, Listed};
use crate::options::Options;
use crate::purge::PurgeFloors;
use crate::stats::Stats;
use crate::table::{Table, TableInfo, table_path};

/// One tree's tables. Immutable: a change makes a new one, readers keep the one they began with.
pub(super) struct Tree<D: Disk> {
    pub(super) levels: Levels,
    open: BTreeMap<u64, Table<D>>,
}

impl<D: Disk> Tree<D> {
    /// The open table behind a reference of these levels.
    pub(super) fn table(&self, table: &TableRef) -> &Table<D> {
        self.open
            .get(&table.info.file_id)
            .expect("levels refer to open tables")
    }
}

/// All trees.
pub(super) struct Tables<D: Disk> {
    trees: BTreeMap<TreeId, Rc<Tree<D>>>,
    floors: BTreeMap<TreeId, PurgeFloors>,
    strategies: BTreeMap<TreeId, Strategy>,
    /// What a flush wrote of a tree, on average, since the open.
    run_bytes: BTreeMap<TreeId, u64>,
    /// Counts the flushes that were applied, and the drops: what was read before one of them may
    /// no longer be the newest.
    generation: u64,
    next_file_id: u64,
}

impl<D: Disk> Tables<D> {
    pub(super) fn new(next_file_id: u64) -> Self {
        Self {
            trees: BTreeMap::new(),
            floors: BTreeMap::new(),
            strategies: BTreeMap::new(),
            run_bytes: BTreeMap::new(),
            generation: 0,
            next_file_id,
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

    /// Ids for the files of one job.
    pub(super) fn reserve_file_ids(&mut self, count: u64) -> Range<u64> {
        let first = self.next_file_id;
        self.next_file_id += count;
        first..self.next_file_id
    }

    /// Applies an edit to a tree. `opened` holds every added table that was not there before.
    /// Returns the files that are no longer part of the tree.
    pub(super) fn apply(
        &mut self,
        tree: TreeId,
        edit: &Edit,
        opened: impl IntoIterator<Item = Table<D>>,
    ) -> Vec<u64> {
        let (mut levels, mut open) = match self.trees.get(&tree) {
            Some(old) => (old.levels.clone(), old.open.clone()),
            None => (Levels::new(), BTreeMap::new()),
        };
        levels.apply(edit);
        open.extend(
            opened
                .into_iter()
                .map(|table| (table.info().file_id, table)),
        );
        let removed: BTreeSet<u64> = edit.removed.iter().map(|key| key.file_id).collect();
        let gone: Vec<u64> = removed
            .into_iter()
            .filter(|file_id| !levels.holds_file(*file_id))
            .collect();
        for file_id in &gone {
            open.remove(file_id);
        }
        if open.is_empty() {
            self.trees.remove(&tree);
        } else {
            self.trees.insert(tree, Rc::new(Tree { levels, open }));
        }
        gone
    }

    /// Forgets a tree; returns its files.
    pub(super) fn drop_tree(&mut self, tree: TreeId) -> Vec<u64> {
        self.floors.remove(&tree);
        self.strategies.remove(&tree);
        self.run_bytes.remove(&tree);
        self.generation += 1;
        match self.trees.remove(&tree) {
            Some(tree) => tree.open.keys().copied().collect(),
            None => Vec::new(),
        }
    }

    /// The master key of each table file.
    pub(super) fn keys(&self) -> impl Iterator<Item = Option<KeyId>> {
        let tables = self.trees.values().flat_map(|tree| tree.open.values());
        tables.map(|table| table.info().key)
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
        Some(Settings::new(options, strategy))
    }

    /// Notes what a flush wrote: the tables of a tree are next to each other.
    pub(super) fn note_run_bytes(&mut self, infos: &[TableInfo]) {
        for infos in infos.chunk_by(|a, b| a.tree == b.tree) {
            let bytes: u64 = infos.iter().map(|info| info.bytes).sum();
            let average = self.run_bytes.entry(infos[0].tree).or_insert(bytes);
            *average = (*average * 3 + bytes).div_ceil(4);
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
            let settings = self.settings(options, *id);
            if let Some(settings) = &settings {
                stats.compaction_debt_bytes += debt_bytes(&tree.levels, settings);
            }
            stats.base_bytes += base_bytes(&tree.levels, settings);
            stats.runs_max = stats.runs_max.max(tree.levels.runs().len());
            stats.live_bytes += tree.levels.tables().map(TableRef::bytes).sum::<u64>();
        }
        stats.level0_runs = self.level0_runs();
        stats.purge_floors = self.floors.len();
    }
}

/// See [`Stats::base_bytes`].
fn base_bytes(levels: &Levels, settings: Option<Settings>) -> u64 {
    let runs = levels
        .runs()
        .iter()
        .map(|run| run.bytes_in(&TokenRange::ALL));
    match settings.map(|settings| settings.strategy) {
        Some(Strategy::Fifo | Strategy::TimeWindow { .. }) => runs.sum(),
        _ => runs.max().unwrap_or(0),
    }
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
    /// Removes table files that no manifest lists. Best effort: the next open collects what stays.
    /// A snapshot that is being taken keeps them until it has its links.
    pub(super) async fn remove_tables(&self, file_ids: &[u64]) {
        let Some(file_ids) = self.hold.defer(file_ids) else {
            return;
        };
        for file_id in file_ids {
            let path = table_path(&self.tables_dir, *file_id);
            if let Err(error) = self.env.disk().remove(&path).await {
                tracing::warn!(%error, path = %path.display(), "an old table stays for now");
            }
        }
    }
}
