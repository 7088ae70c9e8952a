//! Hybrid and leveled: the bottom is one run.
//!
//! The bottom has a fixed number, and levels above it come into use from below as it grows, so that
//! neighbouring sizes keep their ratio at every size of the data.

use super::outlook::Shape;
use super::{Plan, Scanned, Settings, Strategy, is_cut, piece};
use crate::le::len64;
use crate::levels::{BOTTOM, Levels, Run};
use crate::pacing::{ONE, mul_div};

/// The most urgent compaction, if any level is due.
pub(super) fn pick(levels: &Levels, settings: &Settings) -> Option<Plan> {
    let base = base_level(levels, settings);
    let mut most_urgent: Option<(u64, u8)> = None;
    for level in 0..BOTTOM {
        let urgency = urgency(levels, settings, base, level);
        if urgency >= DUE && most_urgent.is_none_or(|(most, _)| urgency > most) {
            most_urgent = Some((urgency, level));
        }
    }
    let Some((_, level)) = most_urgent else {
        // Several runs at the bottom: the tree had another strategy.
        return piece::collapse(levels, settings, levels.level(BOTTOM));
    };
    merge(levels, settings, base, level)
}

/// A compaction of the uppermost level that scans have paid for.
pub(super) fn pick_scanned(
    levels: &Levels,
    settings: &Settings,
    scanned: &Scanned,
) -> Option<Plan> {
    let level = paid_level(levels, settings, scanned)?;
    merge(levels, settings, base_level(levels, settings), level)
}

/// The uppermost level that scans have read as much of as merging it costs.
pub(super) fn paid_level(levels: &Levels, settings: &Settings, scanned: &Scanned) -> Option<u8> {
    let base = base_level(levels, settings);
    let is_paid = |level: &u8| {
        let price = price_for_scans(levels, settings, base, *level);
        price.is_some_and(|price| scanned.of(*level) >= price)
    };
    (0..BOTTOM).find(is_paid)
}

/// Bytes read and written to merge a whole level into the next; `None` when that leaves scans as many runs as there are.
fn price_for_scans(levels: &Levels, settings: &Settings, base: u8, level: u8) -> Option<u64> {
    let output = next_level(base, level);
    let mut runs = levels.level(level).len();
    let mut bytes = levels.level_bytes(level);
    if is_one_run(settings, output) {
        runs += levels.level(output).len();
        bytes = bytes.saturating_add(levels.level_bytes(output));
    }
    let is_one_table_at_a_time = level > 0 && settings.strategy == Strategy::Leveled;
    let leaves_fewer = !levels.level(level).is_empty() && runs > 1;
    (leaves_fewer && !is_one_table_at_a_time).then(|| bytes.saturating_mul(2))
}

/// The next compaction of a level.
fn merge(levels: &Levels, settings: &Settings, base: u8, level: u8) -> Option<Plan> {
    let output = next_level(base, level);
    let sources = sources(levels, level);
    if level > 0 && settings.strategy == Strategy::Leveled {
        // The oldest run, should there be several: what is newer may not sink below it.
        return piece::one_table(levels, settings, sources.last()?, output);
    }
    if is_one_run(settings, output) {
        return piece::into_run(levels, settings, sources, levels.level(output), output);
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

/// Bytes that would have to be merged to bring every level into shape: what the levels that are due
/// hold, and what lies below it in the way. Zero when nothing is due.
pub(super) fn debt_bytes(levels: &Levels, settings: &Settings) -> u64 {
    let base = base_level(levels, settings);
    (0..BOTTOM)
        .filter(|level| urgency(levels, settings, base, *level) >= DUE)
        .map(|level| {
            let output = next_level(base, level);
            let bytes = levels.level_bytes(level);
            let is_too_large = level >= base && levels.level(level).len() == 1;
            let excess = if is_too_large && settings.strategy == Strategy::Leveled {
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
        .fold(
            piece::collapse_bytes(levels.level(BOTTOM)),
            u64::saturating_add,
        )
}

/// The levels as the outlook sees them, when a flush writes `run_bytes`.
pub(super) fn shape(levels: &Levels, settings: &Settings, run_bytes: u64) -> Shape {
    /// What of the next level is in the way can be many times the level, but not without end.
    const REWRITES_MAX: u64 = 100;
    let base = base_level(levels, settings);
    let is_leveled = settings.strategy == Strategy::Leveled;
    let mut shape = Shape::default();
    let mut full_bytes = run_bytes.saturating_mul(len64(settings.level0_runs));
    shape[0].full_bytes = full_bytes;
    for level in base..BOTTOM {
        full_bytes = if is_leveled {
            capacity(levels, settings, level)
        } else {
            full_bytes.saturating_mul(len64(settings.level_runs))
        };
        shape[usize::from(level)].full_bytes = full_bytes;
    }
    for level in (base..BOTTOM).rev().chain([0]) {
        let output = next_level(base, level);
        let source = levels
            .level_bytes(level)
            .max(shape[usize::from(level)].full_bytes);
        let rewrites = if is_one_run(settings, output) {
            mul_div(levels.level_bytes(output), ONE, source).min(REWRITES_MAX * ONE)
        } else {
            0
        };
        shape[usize::from(level)].ahead = ONE + rewrites + shape[usize::from(output)].ahead;
    }
    shape
}

/// Urgency of a level that is just due.
const DUE: u64 = 1000;

/// How much a level is over its line, in thousandths.
fn urgency(levels: &Levels, settings: &Settings, base: u8, level: u8) -> u64 {
    let runs = |limit: usize| {
        let runs = u64::try_from(levels.level(level).len()).unwrap_or(u64::MAX);
        runs.saturating_mul(DUE) / u64::try_from(limit.max(1)).unwrap_or(u64::MAX)
    };
    let is_leveled = settings.strategy == Strategy::Leveled;
    let of_level = levels.level(level);
    let begun = if (level == 0 || !is_leveled) && of_level.iter().any(is_cut) {
        DUE
    } else {
        0
    };
    if level == 0 {
        return runs(settings.level0_runs).max(begun);
    }
    if of_level.is_empty() {
        return 0;
    }
    if !is_leveled {
        return runs(settings.level_runs).max(begun);
    }
    if of_level.len() > 1 {
        // Two runs where there should be one: the strategy was changed.
        return runs(1);
    }
    if level < base {
        return DUE;
    }
    let bytes = u128::from(levels.level_bytes(level)) * u128::from(DUE);
    let capacity = u128::from(capacity(levels, settings, level).max(1));
    // A level as large as allowed is not yet due.
    u64::try_from((bytes / capacity).saturating_sub(1)).unwrap_or(u64::MAX)
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
    let growth = if settings.strategy == Strategy::Leveled {
        settings.level_ratio
    } else {
        settings.growth_by_runs()
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
    level == BOTTOM || settings.strategy == Strategy::Leveled
}
