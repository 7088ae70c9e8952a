//! Picking compactions: which tables to merge next, and into which level.
//!
//! Pure: levels and settings in, a [`Plan`] out. The shard runs the plan as a
//! [`CompactJob`](crate::jobs::CompactJob), then applies [`Plan::edit`] if the inputs still live.
//!
//! Each [`Strategy`] takes the levels as they are and works them into its shape, so a tree may change
//! its strategy at any time. [`leveling`] keeps the bottom as one run, [`tiering`] only merges runs of
//! like age.
//!
//! A merge is not done as a whole but in pieces of the ring, each within [`Settings::job_bytes_max`];
//! what is left of a table keeps a smaller extent. No state is needed between the pieces: runs with a
//! cut table are in the middle of being merged, and stay due until nothing is left of them; runs that
//! came later wait for the next time. One compaction a tree at a time.
//!
//! Invariants, whatever the strategy: the inputs of a plan are next to each other in age for each
//! token of its range, and its output takes their place; so the first hit of
//! [`Levels::candidates`] stays the newest record. The number of runs is bounded by [`runs_max`].

mod leveling;
mod outlook;
mod piece;
mod plan;
mod scanned;
mod tiering;
mod worn;

use torc_env::Token;

use crate::crypt::KeyId;
use crate::le::len64;
use crate::levels::{BOTTOM, Levels, Run, TableRef};
use crate::options::Options;
use crate::purge::{PurgeFloors, Reach};
use crate::table::TableInfo;

pub(crate) use outlook::{Outlook, outlook};
pub use plan::{InputRun, Plan};
pub(crate) use scanned::is_paid;
pub use scanned::{Scanned, pick_scanned};
pub use worn::{Emptied, Worn, emptied, pick_worn};

/// How the tables of a tree are kept in shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// Lazy leveling (N. Dayan, S. Idreos, "Dostoevsky", 2018): several runs a level above the bottom,
    /// one run on it. Few rewrites, and one place where most keys are.
    #[default]
    Hybrid,
    /// One run a level, except for level 0. More rewrites, fewer runs to ask.
    Leveled,
    /// Runs of like size are merged, nothing else: fewest rewrites, most runs, and up to
    /// [`Settings::level_runs`] versions of a key.
    SizeTiered,
    /// Runs only grow to a share of the data and leave as whole tables when all they hold may be
    /// forgotten. For records that all expire after the same time.
    Fifo,
    /// As size-tiered among records stamped in the same window; the runs of a window that has passed
    /// become one, and leave as whole tables.
    TimeWindow {
        /// Width of a window, in units of the records' stamps. At least 1.
        stamps: u64,
    },
}

/// Settings of picking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Which strategy.
    pub strategy: Strategy,
    /// Runs on level 0 that make it due.
    pub level0_runs: usize,
    /// Runs on a level between 0 and the bottom that make it due (all but leveled).
    pub level_runs: usize,
    /// Size of the bottom over that of everything above it.
    pub level_ratio: u64,
    /// What one flush writes, about, in bytes.
    pub flush_bytes: u64,
    /// Largest input of one compaction, in bytes. Exceeded only by a single pair of tables.
    pub job_bytes_max: u64,
}

/// Runs of a middle level that make it due: four filters more to ask a level, and a quarter of
/// leveling's rewrites.
const LEVEL_RUNS: usize = 4;

/// A flush is taken to write at least this part of the memtable.
const FLUSH_PART_MAX: u64 = 8;

impl Settings {
    /// Those of a tree with this strategy.
    pub fn new(options: &Options, strategy: Strategy) -> Settings {
        Settings {
            strategy,
            level0_runs: options.level0_runs.max(1),
            level_runs: LEVEL_RUNS,
            level_ratio: options.level_ratio.max(2),
            flush_bytes: u64::try_from(options.memtable_bytes / 2).unwrap_or(u64::MAX),
            job_bytes_max: options.compaction_bytes_max,
        }
    }

    /// For a tree of which a flush writes `run_bytes` on average: less than the memtable has, for tables are compressed and records
    /// take more in memory. Small flushes that were asked for do not make levels without end.
    pub fn with_flushes_of(self, run_bytes: u64) -> Settings {
        let lowest = self.flush_bytes / FLUSH_PART_MAX;
        Settings {
            flush_bytes: run_bytes.clamp(lowest, self.flush_bytes),
            ..self
        }
    }

    /// How much larger each middle level is than the one above it, where levels hold several runs.
    fn growth_by_runs(&self) -> u64 {
        len64(self.level_runs).max(2)
    }
}

/// The most urgent compaction, if any is due.
pub fn pick(levels: &Levels, settings: &Settings) -> Option<Plan> {
    match settings.strategy {
        Strategy::Hybrid | Strategy::Leveled => leveling::pick(levels, settings),
        Strategy::SizeTiered | Strategy::Fifo | Strategy::TimeWindow { .. } => {
            tiering::pick(levels, settings)
        }
    }
}

/// The next piece of a full compaction, which merges everything into the bottom: the piece that
/// begins at `from` or later. The caller goes on behind the plan's range until there is none. By
/// time window, only the window still open is merged; by FIFO, nothing is.
pub fn pick_full(levels: &Levels, settings: &Settings, from: Token) -> Option<Plan> {
    match settings.strategy {
        Strategy::Hybrid | Strategy::Leveled | Strategy::SizeTiered => {
            piece::everything(levels, settings, from)
        }
        Strategy::TimeWindow { stamps } => tiering::pick_window(levels, settings, stamps, from),
        Strategy::Fifo => None,
    }
}

/// Bytes that would have to be merged to bring every level into shape: what the levels that are due
/// hold, and what lies below it in the way. Zero when nothing is due.
pub fn debt_bytes(levels: &Levels, settings: &Settings) -> u64 {
    match settings.strategy {
        Strategy::Hybrid | Strategy::Leveled => leveling::debt_bytes(levels, settings),
        Strategy::SizeTiered | Strategy::Fifo | Strategy::TimeWindow { .. } => {
            tiering::debt_bytes(levels, settings)
        }
    }
}

/// The most runs that a tree in shape has.
pub fn runs_max(settings: &Settings) -> usize {
    let middle = usize::from(BOTTOM) - 1;
    let tiers = settings.level0_runs + middle * settings.level_runs;
    match settings.strategy {
        Strategy::Hybrid => tiers + 1,
        Strategy::Leveled => settings.level0_runs + middle + 1,
        Strategy::SizeTiered => tiers + settings.level_runs,
        Strategy::Fifo => tiers + settings.level_runs * (FIFO_GROUPS_MAX + 1),
        Strategy::TimeWindow { .. } => tiers + tiering::WINDOWS_MAX,
    }
}

/// Groups of runs that a FIFO tree does not merge, because each is more than a part of the data.
const FIFO_GROUPS_MAX: usize = 8;

/// Whether a part of the run was merged away already.
fn is_cut(run: &Run) -> bool {
    run.tables.iter().any(|table| {
        let (first, last) = (table.info.first_token, table.info.last_token);
        table.extent.first != first || table.extent.last != last
    })
}

/// A compaction that reads and writes nothing: a table of which every record may be forgotten by now
/// goes as a whole.
pub fn pick_dead(levels: &Levels, floors: &PurgeFloors, now_ms: u64) -> Option<Plan> {
    let runs = levels.runs().iter().rev();
    let tables = runs.flat_map(|run| run.tables.iter().map(move |table| (run, table)));
    tables
        .filter(|(_, table)| {
            let info = &table.info;
            info.tombstones + info.expiring == info.entries && may_be_purged(table, floors, now_ms)
        })
        .map(|(run, table)| Plan::drop(levels, run, table))
        .find(|plan| plan.reach == Reach::Bottom)
}

/// A compaction that only forgets: a table of the oldest run in which every tombstone, and every
/// record with an expiry, may be purged by now, when they are a good part of it. For levels in shape,
/// when [`pick`] finds nothing. A table with some that must stay waits, so that none is written again
/// and again for little.
pub fn pick_purge(
    levels: &Levels,
    settings: &Settings,
    floors: &PurgeFloors,
    now_ms: u64,
) -> Option<Plan> {
    if settings.strategy == Strategy::Fifo {
        return None;
    }
    let run = levels.runs().last()?;
    let table = run.tables.iter().find(|table| {
        let info = &table.info;
        let dead = info.tombstones + info.expiring;
        dead.saturating_mul(PURGE_SHARE) >= info.entries
            && may_be_purged(table, floors, now_ms)
            && info.bytes <= settings.job_bytes_max
    })?;
    let plan = Plan::of_table(levels, run, table);
    (plan.reach == Reach::Bottom).then_some(plan)
}

/// A compaction that writes a table again, as it is and where it is, because it, or a blob to which it refers, is not
/// encrypted with `key`. None when all are.
pub fn pick_stale(levels: &Levels, key: Option<KeyId>) -> Option<Plan> {
    levels.runs().iter().find_map(|run| {
        let is_stale = |info: &TableInfo| {
            let mut blobs = info.blobs.iter();
            info.key != key || blobs.any(|blob| blob.file.key() != key)
        };
        let table = run.tables.iter().find(|table| is_stale(&table.info))?;
        Some(Plan::of_table(levels, run, table))
    })
}

/// A table is written again for the sake of purging when at least one in so many records goes.
const PURGE_SHARE: u64 = 8;

/// Whether every tombstone of the table, and every record with an expiry, may be forgotten by now.
fn may_be_purged(table: &TableRef, floors: &PurgeFloors, now_ms: u64) -> bool {
    let info = &table.info;
    let is_old = |floor| info.purgeable_stamps.max < floor;
    info.expiries_ms.max <= now_ms && floors.lowest(table.extent).is_some_and(is_old)
}
