//! How much merging lies ahead, whether or not it is due yet.
//!
//! What is due comes in lumps: nothing for a while, then a whole level. Whoever spreads work evenly needs a
//! measure that grows with every byte flushed and shrinks with every byte merged: each byte
//! in a level owes the merges that it has still to go through until it lies where it stays, with its part of what is
//! rewritten on the way.

use super::{Settings, Strategy, leveling};
use crate::le::len64;
use crate::levels::{BOTTOM, Levels};
use crate::pacing::{ONE, mul_div};

/// The merging that lies ahead of some trees, in bytes of input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outlook {
    /// What there is owes so much.
    pub(crate) owed_bytes: u64,
    /// So much is owed when every level is just full. Merging that keeps up stays below.
    pub(crate) full_bytes: u64,
    /// So much would be owed with as many runs on level 0 as there may be.
    pub(crate) bound_bytes: u64,
    /// What a byte owes when it is flushed, in thousandths.
    pub(crate) per_flushed: u64,
}

/// The outlook of a tree of which a flush writes `run_bytes` on average. Nothing is ahead of a tree without
/// flushes: its levels are at rest.
pub(crate) fn outlook(
    levels: &Levels,
    settings: &Settings,
    run_bytes: u64,
    level0_runs_max: usize,
) -> Outlook {
    if run_bytes == 0 {
        return Outlook::default();
    }
    let shape = match settings.strategy {
        Strategy::Hybrid | Strategy::Leveled => leveling::shape(levels, settings, run_bytes),
        Strategy::SizeTiered | Strategy::Fifo | Strategy::TimeWindow { .. } => {
            tiers(levels, settings, run_bytes)
        }
    };
    let owes = |bytes: u64, level: usize| mul_div(bytes, shape[level].ahead, ONE);
    let of_level = |level: u8| owes(levels.level_bytes(level), usize::from(level));
    let full = (0..shape.len()).map(|level| owes(shape[level].full_bytes, level));
    let full_bytes = full.fold(0, u64::saturating_add);
    let more_runs = len64(level0_runs_max.saturating_sub(settings.level0_runs));
    Outlook {
        owed_bytes: (0..=BOTTOM).map(of_level).fold(0, u64::saturating_add),
        full_bytes,
        bound_bytes: full_bytes.saturating_add(owes(run_bytes.saturating_mul(more_runs), 0)),
        per_flushed: shape[0].ahead,
    }
}

impl Outlook {
    /// That of both together.
    pub(crate) fn and(self, other: Outlook) -> Outlook {
        Outlook {
            owed_bytes: self.owed_bytes.saturating_add(other.owed_bytes),
            full_bytes: self.full_bytes.saturating_add(other.full_bytes),
            bound_bytes: self.bound_bytes.saturating_add(other.bound_bytes),
            // Rather too much than too little.
            per_flushed: self.per_flushed.max(other.per_flushed),
        }
    }
}

/// A level, for the outlook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LevelShape {
    /// What it holds when it is just due.
    pub(super) full_bytes: u64,
    /// Bytes merged for each of its bytes until that lies where it stays, in thousandths.
    pub(super) ahead: u64,
}

/// The shape of every level.
pub(super) type Shape = [LevelShape; BOTTOM as usize + 1];

/// Runs only go down, to the deepest level in use: a byte is merged once for each level that it has before it.
fn tiers(levels: &Levels, settings: &Settings, run_bytes: u64) -> Shape {
    let mut shape = Shape::default();
    let mut ahead = 0;
    let growth = settings.growth_by_runs();
    for level in (0..BOTTOM).rev() {
        // Without a level below there will be one.
        if !levels.level(level + 1).is_empty() || level == 0 && ahead == 0 {
            ahead += ONE;
        }
        shape[usize::from(level)].ahead = ahead;
    }
    let mut full_bytes = run_bytes.saturating_mul(len64(settings.level0_runs));
    for level in &mut shape {
        level.full_bytes = full_bytes;
        full_bytes = full_bytes.saturating_mul(growth);
    }
    // What is at the bottom stays there.
    shape[usize::from(BOTTOM)] = LevelShape::default();
    shape
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::levels::whole;
    use crate::table::TableInfo;
    use torc_env::{Token, TreeId};

    const MIB: u64 = 1 << 20;

    fn settings(strategy: Strategy) -> Settings {
        Settings {
            strategy,
            level0_runs: 4,
            level_runs: 4,
            level_ratio: 8,
            flush_bytes: MIB,
            job_bytes_max: 256 * MIB,
        }
    }

    /// Runs over the whole ring: of which level, and how large.
    fn levels(runs: &[(u8, u64)]) -> Levels {
        let mut levels = Levels::new();
        for (file_id, (level, bytes)) in (1..).zip(runs) {
            let info = TableInfo {
                file_id,
                tree: TreeId(1),
                bytes: *bytes,
                first_token: Token(0),
                last_token: Token::MAX,
                ..TableInfo::default()
            };
            levels.insert(whole(&info, *level, file_id));
        }
        levels
    }

    fn of(strategy: Strategy, runs: &[(u8, u64)]) -> Outlook {
        outlook(&levels(runs), &settings(strategy), MIB, 32)
    }

    #[test]
    fn levels_are_as_many_as_what_flushes_write_makes_of_them() {
        let output = |flush_bytes: u64, run_bytes: u64| {
            let settings = Settings {
                flush_bytes,
                ..settings(Strategy::Hybrid)
            };
            let settings = settings.with_flushes_of(run_bytes);
            let runs = [(0, run_bytes); 4].into_iter().chain([(BOTTOM, 128 * MIB)]);
            let levels = levels(&runs.collect::<Vec<_>>());
            crate::compaction::pick(&levels, &settings).map(|plan| plan.output_level)
        };
        // Four flushes are more than an eighth of the bottom, or less.
        assert_eq!(output(8 * MIB, 8 * MIB), Some(BOTTOM));
        assert_eq!(output(8 * MIB, 2 * MIB), Some(BOTTOM - 1));
        // As few as an eighth of a memtable.
        assert_eq!(output(8 * MIB, MIB), Some(BOTTOM - 1));
        assert_eq!(output(8 * MIB, 1000), Some(BOTTOM - 1));
        assert_eq!(output(MIB, 1000), Some(BOTTOM - 3));
    }

    #[test]
    fn a_flushed_byte_owes_the_merges_on_its_way_and_its_part_of_what_they_rewrite() {
        // Level 0 goes straight into a bottom eight times as large as four runs.
        let small = of(Strategy::Hybrid, &[(0, MIB), (BOTTOM, 32 * MIB)]);
        assert_eq!(small.per_flushed, 9000);
        assert_eq!(small.owed_bytes, 9 * MIB);
        assert_eq!(small.full_bytes, 4 * 9 * MIB);
        assert_eq!(small.bound_bytes, 32 * 9 * MIB);
        // One level between: four flushes make a run of it, four of these a sixteenth of the bottom.
        let large = of(
            Strategy::Hybrid,
            &[(0, MIB), (6, 4 * MIB), (BOTTOM, 64 * MIB)],
        );
        assert_eq!(large.per_flushed, 1000 + 1000 + 4000);
        assert_eq!(large.owed_bytes, 6 * MIB + 4 * 5 * MIB);
        assert_eq!(large.full_bytes, 4 * 6 * MIB + 16 * 5 * MIB);
    }

    #[test]
    fn what_lies_at_the_bottom_owes_nothing() {
        for strategy in [
            Strategy::Hybrid,
            Strategy::Leveled,
            Strategy::SizeTiered,
            Strategy::Fifo,
            Strategy::TimeWindow { stamps: 10 },
        ] {
            let outlook = of(strategy, &[(BOTTOM, 100 * MIB)]);
            assert_eq!(outlook.owed_bytes, 0, "{strategy:?}");
            assert!(outlook.per_flushed >= ONE, "{strategy:?}");
            assert!(outlook.full_bytes < outlook.bound_bytes, "{strategy:?}");
        }
    }

    #[test]
    fn a_tier_owes_one_merge_for_each_tier_below() {
        let outlook = of(
            Strategy::SizeTiered,
            &[(0, MIB), (1, 4 * MIB), (2, 16 * MIB)],
        );
        assert_eq!(outlook.per_flushed, 2000);
        assert_eq!(outlook.owed_bytes, 2 * MIB + 4 * MIB);
        assert_eq!(of(Strategy::Fifo, &[(0, MIB)]).owed_bytes, MIB);
    }

    #[test]
    fn a_merge_takes_off_about_what_it_reads() {
        let before = [(0, MIB); 4];
        let before = [&before[..], &[(6, 4 * MIB), (BOTTOM, 64 * MIB)]].concat();
        let after = [(6, 4 * MIB), (6, 4 * MIB), (BOTTOM, 64 * MIB)];
        let off =
            of(Strategy::Hybrid, &before).owed_bytes - of(Strategy::Hybrid, &after).owed_bytes;
        assert_eq!(off, 4 * MIB);
    }

    #[test]
    fn a_tree_without_flushes_owes_nothing() {
        let levels = levels(&[(0, MIB), (BOTTOM, 32 * MIB)]);
        let outlook = outlook(&levels, &settings(Strategy::Leveled), 0, 32);
        assert_eq!(outlook, Outlook::default());
    }
}
