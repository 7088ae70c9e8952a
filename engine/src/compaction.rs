//! Picking compactions: which tables to merge next, and into which level.
//!
//! Pure: levels and settings in, a [`Plan`] out. The shard runs the plan as a
//! [`CompactJob`](crate::jobs::CompactJob), then applies [`Plan::edit`] if the inputs still live.
//!
//! Two styles:
//!
//! - [`Style::LazyLeveling`] (N. Dayan, S. Idreos, "Dostoevsky", 2018): levels above the bottom
//!   collect several runs before they are merged down, the bottom is one run. Few rewrites, and one
//!   place where most keys are.
//! - [`Style::Leveled`]: every level from the first used one on is one run. More rewrites, fewer
//!   runs to ask.
//!
//! The bottom has a fixed number, and levels above it come into use from below as it grows, so that
//! neighbouring sizes keep their ratio at every size of the data.
//!
//! A level that is due is not merged as a whole but in pieces of the ring, each within
//! [`Settings::job_bytes_max`]; what is left of a table keeps a smaller extent. No state is needed
//! between the pieces: runs with a cut table are in the middle of being merged, and stay due until
//! nothing is left of them; runs that came later wait for the next time. One compaction a tree at a
//! time.

mod piece;

use torc_env::{Token, TokenRange};

use crate::levels::{BOTTOM, Edit, Levels, Run, TableKey, TableRef, whole};
use crate::options::Options;
use crate::purge::{PurgeFloors, Reach};
use crate::table::{FilterBits, TableInfo};

/// How levels are kept in shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// Several runs a level above the bottom, one run on it.
    #[default]
    LazyLeveling,
    /// One run a level, except for level 0.
    Leveled,
}

/// Settings of picking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Which style.
    pub style: Style,
    /// Runs on level 0 that make it due.
    pub level0_runs: usize,
    /// Runs on a level between 0 and the bottom that make it due (lazy leveling).
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

impl From<&Options> for Settings {
    fn from(options: &Options) -> Settings {
        Settings {
            style: Style::default(),
            level0_runs: options.level0_runs.max(1),
            level_runs: LEVEL_RUNS,
            level_ratio: options.level_ratio.max(2),
            flush_bytes: u64::try_from(options.memtable_bytes / 2).unwrap_or(u64::MAX),
            job_bytes_max: options.compaction_bytes_max,
        }
    }
}

/// A compaction to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The piece of the ring that is merged. Every input run gives up all that it has there.
    pub range: TokenRange,
    /// The tables, newest run first.
    pub inputs: Vec<InputRun>,
    /// Where the outputs go.
    pub output_level: u8,
    /// The run that they join; `None` for a new one.
    pub output_run: Option<u64>,
    /// Whether anything older lies below, for the purge rule.
    pub reach: Reach,
    /// Input bytes, about.
    pub bytes: u64,
}

/// The part of a run that a compaction takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputRun {
    /// Level of the run.
    pub level: u8,
    /// Its id.
    pub run: u64,
    /// Its tables that overlap the plan's range, ascending, with their whole extents.
    pub tables: Vec<TableRef>,
}

impl Plan {
    /// Builds the plan that merges `range` out of `runs` into `output_level`.
    fn new<'a>(
        levels: &Levels,
        range: TokenRange,
        runs: impl IntoIterator<Item = &'a Run>,
        output_level: u8,
        output_run: Option<u64>,
    ) -> Plan {
        let mut inputs: Vec<InputRun> = runs
            .into_iter()
            .map(|run| InputRun {
                level: run.level,
                run: run.id,
                tables: run.overlapping(range).to_vec(),
            })
            .filter(|input| !input.tables.is_empty())
            .collect();
        inputs.sort_by_key(|input| (input.level, std::cmp::Reverse(input.run)));
        let tables = inputs.iter().flat_map(|input| &input.tables);
        let bytes = tables.map(|table| table.bytes_in(&range)).sum();
        Plan {
            reach: reach(levels, range, &inputs),
            range,
            inputs,
            output_level,
            output_run,
            bytes,
        }
    }

    /// Every input table with the part of the ring to read from it, run by run, newest first.
    pub fn sources(&self) -> Vec<Vec<(u64, TokenRange)>> {
        let part = |table: &TableRef| {
            let part = table.extent.intersection(&self.range);
            part.map(|part| (table.info.file_id, part))
        };
        let runs = self.inputs.iter();
        runs.map(|input| input.tables.iter().filter_map(part).collect())
            .collect()
    }

    /// Filters for the outputs.
    pub fn filter(&self) -> FilterBits {
        if self.output_level == BOTTOM {
            FilterBits::Eight
        } else {
            FilterBits::Sixteen
        }
    }

    /// Whether `levels` still has every input as it was when the plan was made.
    pub fn is_current(&self, levels: &Levels) -> bool {
        self.inputs.iter().all(|input| {
            let run = levels
                .level(input.level)
                .iter()
                .find(|run| run.id == input.run);
            run.is_some_and(|run| run.overlapping(self.range) == &input.tables[..])
        })
    }

    /// The change that replaces the inputs' part in the range by `outputs`.
    pub fn edit(&self, outputs: &[TableInfo]) -> Edit {
        let mut edit = Edit::default();
        for table in self.inputs.iter().flat_map(|input| &input.tables) {
            edit.removed.push(TableKey {
                file_id: table.info.file_id,
                first: table.extent.first,
            });
            edit.added.extend(table.outside(&self.range));
        }
        let new_run = outputs.iter().map(|info| info.file_id).min().unwrap_or(0);
        let run = self.output_run.unwrap_or(new_run);
        let added = outputs
            .iter()
            .map(|info| whole(info, self.output_level, run));
        edit.added.extend(added);
        edit
    }
}

/// Whether a run outside the inputs is older than one of them and may hold keys of the range.
fn reach(levels: &Levels, range: TokenRange, inputs: &[InputRun]) -> Reach {
    let is_input = |run: &Run| {
        inputs
            .iter()
            .any(|input| (input.level, input.run) == (run.level, run.id))
    };
    let mut is_below = false;
    for run in levels.runs() {
        if is_input(run) {
            is_below = true;
        } else if is_below && !run.overlapping(range).is_empty() {
            return Reach::Above;
        }
    }
    Reach::Bottom
}

/// The most urgent compaction, if any level is due.
pub fn pick(levels: &Levels, settings: &Settings) -> Option<Plan> {
    let base = base_level(levels, settings);
    let mut most_urgent: Option<(u64, u8)> = None;
    for level in 0..BOTTOM {
        let urgency = urgency(levels, settings, base, level);
        if urgency >= DUE && most_urgent.is_none_or(|(most, _)| urgency > most) {
            most_urgent = Some((urgency, level));
        }
    }
    let (_, level) = most_urgent?;
    let output = next_level(base, level);
    let sources = sources(levels, level);
    if level > 0 && settings.style == Style::Leveled {
        // The oldest run, should there be several: what is newer may not sink below it.
        return piece::one_table(levels, settings, sources.last()?, output);
    }
    if is_one_run(settings, output) {
        return piece::into_run(levels, settings, sources, output);
    }
    piece::new_run(levels, settings, sources, output)
}

/// The runs of a level that are merged together, newest first: all of them, or, when a merge has
/// begun, those that it began with.
fn sources(levels: &Levels, level: u8) -> &[Run] {
    let runs = levels.level(level);
    let begun = runs.iter().position(is_cut).unwrap_or(0);
    &runs[begun..]
}

/// Whether a part of the run was merged down already.
fn is_cut(run: &Run) -> bool {
    let is_whole = |table: &TableRef| {
        let TokenRange { first, last } = table.extent;
        first == table.info.first_token && last == table.info.last_token
    };
    !run.tables.iter().all(is_whole)
}

/// The next piece of a full compaction, which merges everything into the bottom: the piece that
/// begins at `from` or later. The caller goes on behind the plan's range until there is none.
pub fn pick_full(levels: &Levels, settings: &Settings, from: Token) -> Option<Plan> {
    piece::everything(levels, settings, from)
}

/// A compaction that only forgets: a table of the bottom in which every tombstone, and every record
/// with an expiry, may be purged by now, when they are a good part of it. For levels in shape, when
/// [`pick`] finds nothing. A table with some that must stay waits, so that none is written again and
/// again for little.
pub fn pick_purge(
    levels: &Levels,
    settings: &Settings,
    floors: &PurgeFloors,
    now_ms: u64,
) -> Option<Plan> {
    let bottom = levels.level(BOTTOM);
    let is_worth_it = |table: &&TableRef| {
        let info = &table.info;
        let dead = info.tombstones + info.expiring;
        let is_old = |floor| info.purgeable_stamps.max < floor;
        dead.saturating_mul(PURGE_SHARE) >= info.entries
            && info.expiries_ms.max <= now_ms
            && floors.lowest(table.extent).is_some_and(is_old)
            && info.bytes <= settings.job_bytes_max
    };
    let run = bottom.first()?;
    let table = run.tables.iter().find(is_worth_it)?;
    let plan = Plan::new(levels, table.extent, bottom, BOTTOM, Some(run.id));
    (plan.reach == Reach::Bottom).then_some(plan)
}

/// A table is written again for the sake of purging when at least one in so many records goes.
const PURGE_SHARE: u64 = 8;

/// Bytes that would have to be merged to bring every level into shape: what the levels that are due
/// hold, and what lies below it in the way. Zero when nothing is due.
pub fn debt_bytes(levels: &Levels, settings: &Settings) -> u64 {
    let base = base_level(levels, settings);
    (0..BOTTOM)
        .filter(|level| urgency(levels, settings, base, *level) >= DUE)
        .map(|level| {
            let output = next_level(base, level);
            let bytes = levels.level_bytes(level);
            let is_too_large = level >= base && levels.level(level).len() == 1;
            let excess = if is_too_large && settings.style == Style::Leveled {
                bytes
                    .saturating_sub(capacity(levels, settings, level))
                    .max(1)
            } else {
                bytes
            };
            if !is_one_run(settings, output) {
                return excess;
            }
            let below = levels.level_bytes(output);
            excess.saturating_add(below.min(excess.saturating_mul(settings.level_ratio)))
        })
        .fold(0, u64::saturating_add)
}

/// Urgency of a level that is just due.
const DUE: u64 = 1000;

/// How much a level is over its line, in thousandths.
fn urgency(levels: &Levels, settings: &Settings, base: u8, level: u8) -> u64 {
    let runs = |limit: usize| {
        let runs = u64::try_from(levels.level(level).len()).unwrap_or(u64::MAX);
        runs.saturating_mul(DUE) / u64::try_from(limit.max(1)).unwrap_or(u64::MAX)
    };
    let collects = level == 0 || settings.style == Style::LazyLeveling;
    let begun = if collects && levels.level(level).iter().any(is_cut) {
        DUE
    } else {
        0
    };
    match settings.style {
        _ if level == 0 => runs(settings.level0_runs).max(begun),
        _ if levels.level(level).is_empty() => 0,
        Style::LazyLeveling => runs(settings.level_runs).max(begun),
        // Two runs where there should be one: the style was changed.
        Style::Leveled if levels.level(level).len() > 1 => runs(1),
        Style::Leveled if level < base => DUE,
        Style::Leveled => {
            let bytes = u128::from(levels.level_bytes(level)) * u128::from(DUE);
            let capacity = u128::from(capacity(levels, settings, level).max(1));
            // A level as large as allowed is not yet due.
            u64::try_from((bytes / capacity).saturating_sub(1)).unwrap_or(u64::MAX)
        }
    }
}

/// What a level may hold (leveled): the bottom's size divided by the ratio for each step up, but
/// at least what a full level 0 brings.
fn capacity(levels: &Levels, settings: &Settings, level: u8) -> u64 {
    let mut bytes = levels.level_bytes(BOTTOM);
    for _ in level..BOTTOM {
        bytes /= settings.level_ratio;
    }
    bytes.max(level0_bytes(settings))
}

/// The level that level 0 is merged into.
fn base_level(levels: &Levels, settings: &Settings) -> u8 {
    let growth = match settings.style {
        Style::LazyLeveling => u64::try_from(settings.level_runs)
            .unwrap_or(u64::MAX)
            .max(2),
        Style::Leveled => settings.level_ratio,
    };
    let mut base = BOTTOM;
    let mut bytes = levels.level_bytes(BOTTOM) / settings.level_ratio;
    while bytes > level0_bytes(settings) && base > 1 {
        base -= 1;
        bytes /= growth;
    }
    // Nothing may be put below older data that is in use above.
    let used = (1..BOTTOM).find(|level| !levels.level(*level).is_empty());
    base.min(used.unwrap_or(BOTTOM))
}

fn level0_bytes(settings: &Settings) -> u64 {
    let runs = u64::try_from(settings.level0_runs).unwrap_or(u64::MAX);
    settings.flush_bytes.saturating_mul(runs)
}

fn next_level(base: u8, level: u8) -> u8 {
    if level == 0 { base } else { level + 1 }
}

fn is_one_run(settings: &Settings, level: u8) -> bool {
    level == BOTTOM || settings.style == Style::Leveled
}
