//! Tables become fewer tables.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use torc_env::{Disk, Env, Instant, JobClass, Token, TreeId, WallTime};

use super::Inner;
use super::pacing::Kind;
use super::tables::changes_of;
use crate::compaction::{
    Emptied, Plan, emptied, pick, pick_dead, pick_full, pick_purge, pick_stale, pick_worn,
};
use crate::error::{JobError, WriteError};
use crate::jobs::{CompactJob, CompactOutput, Pace};
use crate::le::len64;
use crate::pacing::mul_div;
use crate::purge::PurgeRule;

/// How long compaction rests after a failure or for want of space.
const REST: Duration = Duration::from_secs(1);
/// What a compaction moves out of blobs for each byte of its tables, where that is more than two memtables hold. Writing
/// tables again in order to empty blobs then costs at most a quarter of what is moved.
const MOVED_PER_BYTE: u64 = 4;
/// What it moves at most at once, in memory of memtables, when too much of the blobs is dead.
const EXCESS_MEMTABLES: u64 = 2;
/// Difference between civil and monotonic time beyond which the civil clock is not believed.
const JUMP_MAX: Duration = Duration::from_secs(3600);

/// Civil time for deciding what is expired, as long as the clock behaves. After a jump nothing
/// counts as expired until the next open: forgetting a record too early cannot be undone.
pub(super) struct ExpiryClock {
    wall: WallTime,
    monotonic: Instant,
    has_jumped: Cell<bool>,
}

impl ExpiryClock {
    pub(super) fn new(env: &impl Env) -> Self {
        Self {
            wall: env.wall(),
            monotonic: env.now(),
            has_jumped: Cell::new(false),
        }
    }

    /// Milliseconds of civil time, or 0 after a jump.
    fn now_ms(&self, env: &impl Env) -> u64 {
        let elapsed = env.now().since(self.monotonic).as_micros();
        let expected = u128::from(self.wall.0) + elapsed;
        let wall = env.wall();
        if expected.abs_diff(u128::from(wall.0)) > JUMP_MAX.as_micros() {
            if !self.has_jumped.replace(true) {
                tracing::error!("the clock has jumped: expired records stay until the next start");
            }
            return 0;
        }
        if self.has_jumped.get() {
            0
        } else {
            wall.millis()
        }
    }
}

/// Why a compaction did not happen.
enum Failure {
    /// It may be tried again later.
    Job(JobError),
    /// There is no room for its outputs.
    NoSpace,
    /// The store is poisoned.
    Final(WriteError),
}

impl From<Failure> for WriteError {
    fn from(failure: Failure) -> WriteError {
        match failure {
            Failure::Final(error) => error,
            Failure::NoSpace => WriteError::DiskFull,
            Failure::Job(error) => WriteError::Job(Rc::new(error)),
        }
    }
}

impl<E: Env> Inner<E> {
    /// The compacting task, until the store stops.
    pub(super) async fn run_compactions(self: Rc<Self>) {
        loop {
            let next = self
                .compaction
                .until(|| {
                    if self.is_stopping() {
                        return Some(None);
                    }
                    self.pick_compaction().map(Some)
                })
                .await;
            if next.is_none() {
                return;
            }
            let turn = self.compacting.take().await;
            if self.is_stopping() {
                return;
            }
            // Another compaction may have had the turn before.
            let Some((tree, plan)) = self.pick_compaction() else {
                continue;
            };
            let result = self.compact_piece(tree, &plan).await;
            self.compacted_last.set(Some(tree));
            drop(turn);
            match result {
                Ok(()) => {}
                Err(Failure::Final(_)) => return,
                Err(Failure::NoSpace) => self.env.sleep(REST).await,
                Err(Failure::Job(error)) => {
                    tracing::warn!(%error, "a compaction failed; trying again later");
                    self.env.sleep(REST).await;
                }
            }
        }
    }

    /// The most urgent compaction of the next tree that needs one, in turn, so that a busy tree does
    /// not keep the others from theirs. Before them, tables of which nothing is needed any more; when there is
    /// nothing else, one that forgets what may be purged, that empties blobs, or that scans have paid for. A tree with known damage waits until that is
    /// cut out.
    fn pick_compaction(&self) -> Option<(TreeId, Plan)> {
        let tables = self.tables.borrow();
        let mut trees = tables.tree_ids();
        let last = self.compacted_last.get();
        let next = trees.partition_point(|tree| Some(*tree) <= last);
        trees.rotate_left(next);
        trees.retain(|tree| !self.damages.is_in(*tree));
        let now_ms = self.clock.now_ms(&self.env);
        let first = |pick: &dyn Fn(TreeId) -> Option<Plan>| {
            trees.iter().find_map(|tree| Some((*tree, pick(*tree)?)))
        };
        let dead = |tree| {
            let levels = tables.tree(tree)?;
            pick_dead(&levels.levels, &tables.purge_floors(tree), now_ms)
        };
        let due = |tree| {
            let settings = tables.settings(&self.options, tree)?;
            pick(&tables.tree(tree)?.levels, &settings)
        };
        let purge = |tree| {
            let settings = tables.settings(&self.options, tree)?;
            let floors = tables.purge_floors(tree);
            pick_purge(&tables.tree(tree)?.levels, &settings, &floors, now_ms)
        };
        let worn = |tree| {
            let worn = tables.worn(&self.options, tree, None);
            pick_worn(&tables.tree(tree)?.levels, &worn, true)
        };
        let scanned = |tree| tables.pick_scanned(&self.options, tree);
        // On a full disk, what makes room comes first: there may not be enough for anything else.
        let is_full = self.health.disk_full.get();
        first(&dead)
            .or_else(|| is_full.then(|| first(&worn)).flatten())
            .or_else(|| first(&due))
            .or_else(|| first(&purge))
            .or_else(|| first(&worn))
            .or_else(|| first(&scanned))
    }

    /// See [`super::Store::compact`].
    pub(super) async fn compact_all(&self) -> Result<(), WriteError> {
        self.check_open()?;
        let _wanted = self.pacing.want_compaction();
        self.rekey_log().await?;
        let trees = self.tables.borrow().tree_ids();
        for tree in trees {
            let settings = self.tables.borrow().settings(&self.options, tree);
            let mut from = Token(0);
            while let Some(settings) = &settings {
                let _turn = self.compacting.take().await;
                self.check_open()?;
                let Some(levels) = self.tables.borrow().tree(tree) else {
                    break;
                };
                let Some(plan) = pick_full(&levels.levels, settings, from) else {
                    break;
                };
                self.compact_piece(tree, &plan).await?;
                match plan.range.last.0.checked_add(1) {
                    Some(next) => from = Token(next),
                    None => break,
                }
            }
            self.rewrite_stale(tree).await?;
            self.empty_worn(tree).await?;
        }
        Ok(())
    }

    /// Writes the tables of a tree again that are not encrypted with the active key, or refer to blobs that are not.
    async fn rewrite_stale(&self, tree: TreeId) -> Result<(), WriteError> {
        loop {
            let _turn = self.compacting.take().await;
            self.check_open()?;
            let levels = self.tables.borrow().tree(tree);
            let plan = levels.and_then(|tree| pick_stale(&tree.levels, self.active_key()));
            match plan {
                Some(plan) => self.compact_piece(tree, &plan).await?,
                None => return Ok(()),
            }
        }
    }

    /// Takes what is left out of every blob that is worth emptying.
    async fn empty_worn(&self, tree: TreeId) -> Result<(), WriteError> {
        loop {
            let _turn = self.compacting.take().await;
            self.check_open()?;
            let plan = {
                let tables = self.tables.borrow();
                let worn = tables.worn(&self.options, tree, None);
                let tree = tables.tree(tree);
                tree.and_then(|tree| pick_worn(&tree.levels, &worn, false))
            };
            match plan {
                Some(plan) => self.compact_piece(tree, &plan).await?,
                None => return Ok(()),
            }
        }
    }

    async fn compact_piece(&self, tree: TreeId, plan: &Plan) -> Result<(), Failure> {
        let emptied = self.emptied_by(tree, plan);
        if !plan.is_drop && !self.has_room_for(plan, &emptied).await {
            return Err(Failure::NoSpace);
        }
        // In one step with what takes the keys for the job.
        let _written = self.writing.begin(self.active_key());
        let output = match self.merge_tables(tree, plan, emptied).await {
            Ok(output) => output,
            Err(error) => {
                self.count(|counts| counts.failed_compactions += 1);
                if let JobError::Read(error) = &error {
                    self.note_corrupt(error);
                }
                return Err(Failure::Job(error));
            }
        };
        let (tables, blobs) = (&output.tables, &output.blobs);
        let opened = match self.open_files(tree, tables).await {
            Ok(opened) => opened,
            Err(error) => {
                let discarded = self.discard(tables, blobs).await;
                discarded.map_err(Failure::Final)?;
                return Err(Failure::Job(error.into()));
            }
        };
        let edit = plan.edit(&output.tables);
        self.edit_with(|_| {
            if self.still_has(tree, plan) {
                changes_of(tree, &edit)
            } else {
                Vec::new()
            }
        })
        .await
        .map_err(Failure::Final)?;
        if !self.still_has(tree, plan) {
            // The tree was dropped meanwhile, before or after the edit.
            return self.discard(tables, blobs).await.map_err(Failure::Final);
        }
        let gone = {
            let mut tables = self.tables.borrow_mut();
            tables.forget_scanned(tree, plan);
            tables.apply(tree, &edit, opened)
        };
        self.count(|counts| {
            counts.compactions += 1;
            counts.dropped_tables += u64::from(plan.is_drop);
            counts.purged += output.purged;
            let moved = blobs.iter().map(|file| file.bytes).sum::<u64>();
            counts.compacted_bytes += tables.iter().map(|info| info.bytes).sum::<u64>() + moved;
            counts.blob_bytes_written += moved;
        });
        self.look_ahead();
        self.compaction.ring();
        self.remove_files(&gone).await;
        Ok(())
    }

    async fn merge_tables(
        &self,
        tree: TreeId,
        plan: &Plan,
        emptied: Emptied,
    ) -> Result<CompactOutput, JobError> {
        if plan.is_drop {
            let tables = plan.inputs.iter().flat_map(|input| &input.tables);
            return Ok(CompactOutput {
                tables: Vec::new(),
                blobs: Vec::new(),
                merged: 0,
                superseded: 0,
                purged: tables.map(|table| table.info.entries).sum(),
            });
        }
        let job = self.merge_job(tree, plan, emptied);
        // What is written again where it is was not owed, and scans wait for no level.
        let kind = if plan.is_rewrite() || plan.is_for_scans {
            Kind::Moving
        } else {
            Kind::Compaction
        };
        let paces = [
            (kind, Arc::clone(&job.pace)),
            (Kind::Moving, Arc::clone(&job.moving)),
        ];
        let running = self.env.background(JobClass::Compaction, job);
        self.guide(&paces, running).await
    }

    /// The blobs that a compaction takes values out of: those with little left in them, and those that are not
    /// encrypted with the active key. More of them than it may empty at once are left to those that follow, so that none
    /// holds up the ones that are due; what goes beyond what a tree may keep of the dead is not left.
    fn emptied_by(&self, tree: TreeId, plan: &Plan) -> Emptied {
        let key = Some(self.active_key());
        let tables = self.tables.borrow();
        let worn = tables.worn(&self.options, tree, key);
        let memtables = len64(self.options.memtable_bytes);
        let by_tables = plan.bytes.saturating_mul(MOVED_PER_BYTE);
        let in_excess = tables.dead_in_excess(&self.options, tree);
        let wanted = memtables
            .max(by_tables)
            .max(in_excess.min(memtables.saturating_mul(EXCESS_MEMTABLES)));
        let wanted = match self.health.disk_full.get() {
            true => wanted,
            false => self.beside_level0(wanted, tables.level0_runs()),
        };
        // What is taken out needs room until its blob goes.
        let free = self.health.free_bytes.get();
        let room = free.saturating_sub(self.options.reserve_bytes) / 2;
        emptied(
            plan,
            &worn,
            wanted.min(self.options.compaction_bytes_max).min(room),
        )
    }

    /// The part of `bytes` that may be moved while level 0 has so many runs: nothing from half of the most on, for until a
    /// compaction ends none of them goes, flushes add more, and with the most of them all updates stand.
    fn beside_level0(&self, bytes: u64, runs: usize) -> u64 {
        let half = len64(self.options.level0_runs_max / 2).max(1);
        mul_div(bytes, half.saturating_sub(len64(runs)), half)
    }

    fn merge_job(&self, tree: TreeId, plan: &Plan, emptied: Emptied) -> CompactJob {
        let table_bytes = self.options.table_bytes_max;
        let needed = CompactJob::file_ids_needed(plan, table_bytes, emptied.bytes);
        let mut tables = self.tables.borrow_mut();
        CompactJob {
            tree,
            dir: self.tables_dir.clone(),
            sources: plan.sources(),
            purge: PurgeRule {
                floors: tables.purge_floors(tree),
                now_ms: self.clock.now_ms(&self.env),
                reach: plan.reach,
            },
            file_ids: tables.reserve_file_ids(needed),
            filter: plan.filter(),
            block_bytes: self.options.block_bytes,
            table_bytes,
            separate_from: self.options.separate_from,
            emptied: emptied.blobs,
            sealing: self.sealing(),
            range: plan.range,
            bytes: plan.bytes,
            pace: Arc::new(Pace::default()),
            moving: Arc::new(Pace::default()),
        }
    }

    fn still_has(&self, tree: TreeId, plan: &Plan) -> bool {
        let tables = self.tables.borrow().tree(tree);
        tables.is_some_and(|tables| plan.is_current(&tables.levels))
    }

    /// Whether the outputs fit without touching what flush, log and manifest need.
    async fn has_room_for(&self, plan: &Plan, emptied: &Emptied) -> bool {
        let Ok(space) = self.env.disk().space().await else {
            return true;
        };
        let outputs = plan.bytes.saturating_add(emptied.bytes);
        space.free_bytes >= outputs.saturating_add(self.options.reserve_bytes / 2)
    }
}

#[cfg(test)]
mod tests {
    use torc_sim::SimEnv;

    use crate::options::Options;
    use crate::store::Store;

    #[test]
    fn the_more_runs_level_0_has_the_less_is_moved_out_of_blobs() {
        torc_sim::run(1, |env: SimEnv| async move {
            let options = Options::new("shard-00");
            let (store, _) = Store::open(env, options.clone()).await.unwrap();
            let moved = |runs| store.0.beside_level0(1000, runs);
            let half = options.level0_runs_max / 2;
            assert_eq!((moved(0), moved(half / 2)), (1000, 500));
            assert!((0..half).all(|runs| moved(runs) > moved(runs + 1)));
            assert_eq!((moved(half), moved(usize::MAX)), (0, 0));
        });
    }
}
