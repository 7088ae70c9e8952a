//! Size-tiered, FIFO and time-window: runs of like age are merged into one, and nothing else is
//! written again for it.
//!
//! Level n holds runs of about (runs a level)^n flushes. When it has enough of them, its oldest ones
//! become a run of the next level. FIFO stops where a merged run would be too large a share of the
//! data, since only whole tables leave. By time window the bottom is not a tier but has a run for
//! each window that has passed.

use torc_env::{Token, TokenRange, mutation};

use super::piece::bytes_of;
use super::{Plan, Settings, Strategy, is_cut, piece};
use crate::levels::{BOTTOM, Levels, Run};

/// A merged run of a FIFO tree is at most this part of the data (or a full level 0): so much may
/// stay longer than its time.
const FIFO_PARTS: u64 = 8;

/// Runs of passed windows; beyond it, two neighbours of the lowest size class, the oldest, become one.
pub(super) const WINDOWS_MAX: usize = 64;

/// Runs to be merged, newest first, next to each other in age.
struct Due<'a> {
    runs: &'a [Run],
    into: Into,
    /// Runs over how many are enough, in thousandths.
    urgency: usize,
}

enum Into {
    /// A run of this level.
    Level(u8),
    /// The oldest of them.
    Oldest,
}

/// The most urgent compaction, if any is due; of equals, that of newer data, which more reads ask.
pub(super) fn pick(levels: &Levels, settings: &Settings) -> Option<Plan> {
    // From behind: of equals the last one is taken, and newer data comes first.
    let due = due(levels, settings).into_iter().rev();
    let due = due.max_by_key(|due| due.urgency)?;
    match due.into {
        Into::Level(output) => piece::new_run(levels, settings, due.runs, output),
        Into::Oldest => piece::collapse(levels, settings, due.runs),
    }
}

/// Bytes of the runs that are due.
pub(super) fn debt_bytes(levels: &Levels, settings: &Settings) -> u64 {
    due(levels, settings)
        .iter()
        .map(|due| bytes_of(due.runs, &TokenRange::ALL))
        .fold(0, u64::saturating_add)
}

/// The next piece, at `from` or behind it, of merging the oldest window above the bottom, closed or
/// not.
pub(super) fn pick_window(
    levels: &Levels,
    settings: &Settings,
    stamps: u64,
    from: Token,
) -> Option<Plan> {
    let (oldest, _) = windows(levels, stamps);
    piece::new_run_from(levels, settings, oldest, from, BOTTOM)
}

/// All that is due, that of newer data first.
fn due<'a>(levels: &'a Levels, settings: &Settings) -> Vec<Due<'a>> {
    let Strategy::TimeWindow { stamps } = settings.strategy else {
        let tiers = (0..=BOTTOM).filter_map(|level| {
            let into = if level < BOTTOM {
                Into::Level(level + 1)
            } else {
                Into::Oldest
            };
            tier(levels, settings, levels.level(level), into)
        });
        return tiers.collect();
    };
    let (oldest, is_closed) = windows(levels, stamps);
    let closed = if is_closed { oldest } else { &[] };
    let tiers = (0..BOTTOM).filter_map(|level| {
        let runs = levels.level(level);
        let of_level = closed.iter().filter(|run| run.level == level).count();
        // What is newer may not sink below older runs that stay on the level.
        let is_clear = of_level == 0 || mutation::on("sink_below_older_runs");
        let into = if is_clear && level + 1 < BOTTOM {
            Into::Level(level + 1)
        } else {
            Into::Oldest
        };
        tier(levels, settings, &runs[..runs.len() - of_level], into)
    });
    let mut due: Vec<Due<'a>> = tiers.collect();
    if !closed.is_empty() {
        due.push(Due {
            runs: closed,
            into: Into::Level(BOTTOM),
            urgency: DUE.max(closed.len() * DUE / settings.level_runs.max(1)),
        });
    }
    due.extend(pair(levels.level(BOTTOM)));
    due
}

/// Urgency of what is just due.
const DUE: usize = 1000;

/// The oldest of a level's `runs` when there are enough of them, or when their merge has begun.
fn tier<'a>(levels: &Levels, settings: &Settings, runs: &'a [Run], into: Into) -> Option<Due<'a>> {
    let level = runs.first()?.level;
    let is_top = matches!(into, Into::Oldest);
    let is_fifo = settings.strategy == Strategy::Fifo;
    let enough = if level == 0 {
        settings.level0_runs
    } else {
        settings.level_runs
    };
    let enough = enough.max(2);
    let urgency = (runs.len() * DUE / enough).max(DUE);
    // The run that takes in the others is cut by every piece.
    let taken = runs.len() - usize::from(is_top);
    let begun = runs[..taken].iter().position(is_cut);
    let runs = match begun {
        Some(begun) => &runs[begun..],
        None if runs.len() < enough => return None,
        None if is_fifo => &runs[runs.len() - enough..],
        None => runs,
    };
    if is_fifo && (is_top || begun.is_none() && level > 0 && !is_small_part(levels, runs)) {
        return None;
    }
    Some(Due {
        runs,
        into,
        urgency,
    })
}

/// Whether the runs together are a small enough part of the data for a FIFO tree.
fn is_small_part(levels: &Levels, runs: &[Run]) -> bool {
    let bytes = bytes_of(runs, &TokenRange::ALL);
    let all: u64 = levels.tables().map(|table| table.bytes()).sum();
    bytes.saturating_mul(FIFO_PARTS) <= all
}

/// The runs above the bottom that belong to the oldest window there is among them, and whether that
/// window is closed: something was stamped in a later one.
fn windows(levels: &Levels, stamps: u64) -> (&[Run], bool) {
    let above = levels.runs().partition_point(|run| run.level < BOTTOM);
    let above = &levels.runs()[..above];
    let window = |run: &Run| {
        let newest = run.tables.iter().map(|table| table.info.stamps.max).max();
        newest.unwrap_or(0) / stamps.max(1)
    };
    let Some(oldest) = above.last().map(window) else {
        return (&[], false);
    };
    // A run may hold older stamps than the one before it, when they came late: it belongs to the
    // window in which it was written.
    let later = above.iter().rposition(|run| window(run) > oldest);
    match later {
        Some(later) => (&above[later + 1..], true),
        None => (above, false),
    }
}

/// Two neighbours among the runs of the bottom, when there are too many.
fn pair(bottom: &[Run]) -> Option<Due<'_>> {
    if bottom.len() <= WINDOWS_MAX {
        return None;
    }
    let size_class = |pair: &&[Run]| bytes_of(pair, &TokenRange::ALL).checked_ilog2();
    let pairs = bottom.windows(2).rev();
    pairs.min_by_key(size_class).map(|runs| Due {
        runs,
        into: Into::Oldest,
        urgency: DUE,
    })
}
