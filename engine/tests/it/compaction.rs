//! Picking compactions, on levels whose tables are only described: sizes grow and shrink as merges
//! would make them, and a few sample keys show whether what is newest is still found first.

use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use proptest::prelude::*;
use torc_engine::compaction::{
    Plan, Scanned, Settings, Strategy, debt_bytes, pick, pick_dead, pick_full, pick_purge,
    pick_scanned, runs_max,
};
use torc_engine::levels::{BOTTOM, Levels, TableRef};
use torc_engine::purge::{PurgeFloors, Reach};
use torc_engine::table::{Bounds, TableInfo};
use torc_env::{Token, TokenRange, TreeId};

const MIB: u64 = 1 << 20;
/// Sample keys, spread over the ring.
const SAMPLES: u128 = 32;

/// Each table's sample keys, with the number of the flush that wrote each.
type Samples = BTreeMap<u128, u64>;

struct World {
    levels: Levels,
    settings: Settings,
    table_bytes: u64,
    samples: BTreeMap<u64, Samples>,
    file_id: u64,
    flushes: u64,
    flushed_bytes: u64,
    written_bytes: u64,
    /// Share of the source bytes that a merge into the bottom keeps, in percent.
    kept_percent: u64,
}

impl World {
    fn new(style: Strategy, kept_percent: u64) -> World {
        World {
            levels: Levels::new(),
            settings: Settings {
                strategy: style,
                level0_runs: 4,
                level_runs: 4,
                level_ratio: 8,
                flush_bytes: 32 * MIB,
                job_bytes_max: 256 * MIB,
            },
            table_bytes: 64 * MIB,
            samples: BTreeMap::new(),
            file_id: 1,
            flushes: 0,
            flushed_bytes: 0,
            written_bytes: 0,
            kept_percent,
        }
    }

    fn info(&mut self, bytes: u64, first: u128, last: u128, samples: Samples) -> TableInfo {
        let file_id = self.file_id;
        self.file_id += 1;
        let bounds = Bounds { min: 0, max: 0 };
        let flushes = samples.values().copied();
        let stamps = Bounds {
            min: flushes.clone().min().unwrap_or(self.flushes),
            max: flushes.max().unwrap_or(self.flushes),
        };
        self.samples.insert(file_id, samples);
        TableInfo {
            file_id,
            tree: TreeId(1),
            bytes,
            key: None,
            blocks: 1,
            entries: 1,
            tombstones: 1,
            expiring: 0,
            key_bytes: 0,
            value_bytes: 0,
            seqnos: bounds,
            stamps,
            expiries_ms: bounds,
            purgeable_stamps: bounds,
            first_token: Token(first),
            last_token: Token(last),
            first_key: Bytes::new(),
            last_key: Bytes::new(),
            blobs: Vec::new(),
        }
    }

    /// Flushes a memtable with every sample key.
    fn flush(&mut self, bytes: u64) {
        self.flushes += 1;
        let samples = (0..SAMPLES)
            .map(|key| (sample(key), self.flushes))
            .collect();
        // The outermost keys differ from flush to flush.
        let edge = u128::from(self.flushes) << 80;
        let info = self.info(bytes, edge, u128::MAX - edge, samples);
        self.flushed_bytes += bytes;
        self.levels.apply(&Levels::flush_edit(&[info]));
    }

    /// Does what a plan says.
    fn run(&mut self, plan: &Plan) {
        self.check_plan(plan);
        let mut merged = Samples::new();
        // Oldest first, so that newer ones replace.
        for source in plan.sources().iter().rev() {
            for (file_id, range) in source {
                for (token, flush) in &self.samples[file_id] {
                    if range.contains(Token(*token)) {
                        let before = merged.insert(*token, *flush);
                        assert!(
                            before.is_none_or(|before| before < *flush),
                            "runs in order of age"
                        );
                    }
                }
            }
        }
        let target = |input: &torc_engine::compaction::InputRun| input.level == plan.output_level;
        let bytes_of = |is_target: bool| -> u64 {
            let inputs = plan
                .inputs
                .iter()
                .filter(|input| target(input) == is_target);
            inputs
                .flat_map(|input| &input.tables)
                .map(|table| table.bytes_in(&plan.range))
                .sum()
        };
        let mut bytes = bytes_of(true) + bytes_of(false);
        if plan.output_level == BOTTOM {
            bytes = bytes_of(true) + bytes_of(false) * self.kept_percent / 100;
        }
        self.written_bytes += bytes;
        let outputs = self.outputs(plan, bytes, &merged);
        assert!(plan.is_current(&self.levels));
        self.levels.apply(&plan.edit(&outputs));
        self.check_levels();
    }

    /// Tables of even size over the plan's range.
    fn outputs(&mut self, plan: &Plan, bytes: u64, merged: &Samples) -> Vec<TableInfo> {
        let tables = bytes.div_ceil(self.table_bytes).max(1);
        let span = first_to_last(plan);
        let width = (span.last.0 - span.first.0) / u128::from(tables);
        let mut outputs = vec![];
        for table in 0..tables {
            let first = span.first.0 + width * u128::from(table);
            let last = if table + 1 == tables {
                span.last.0
            } else {
                first + width - 1
            };
            let samples = merged
                .range(first..=last)
                .map(|(token, flush)| (*token, *flush));
            let samples = samples.collect();
            outputs.push(self.info((bytes / tables).max(1), first, last, samples));
        }
        outputs
    }

    fn check_plan(&self, plan: &Plan) {
        assert!(plan.bytes > 0, "a plan makes progress");
        let limit = self.settings.job_bytes_max;
        assert!(plan.bytes <= limit, "{} MiB in a job", plan.bytes / MIB);
        // The rule once more, the slow way.
        if plan.reach == Reach::Bottom {
            for key in (0..SAMPLES)
                .map(sample)
                .filter(|key| plan.range.contains(Token(*key)))
            {
                let held: Vec<u64> = self
                    .levels
                    .candidates(Token(key))
                    .map(|t| t.info.file_id)
                    .collect();
                let inputs: Vec<u64> = plan
                    .sources()
                    .iter()
                    .flatten()
                    .filter(|(_, range)| range.contains(Token(key)))
                    .map(|(file_id, _)| *file_id)
                    .collect();
                assert_eq!(
                    held[held.len() - inputs.len()..],
                    inputs,
                    "the oldest of each token"
                );
            }
        }
        let is_leveling = [Strategy::Hybrid, Strategy::Leveled].contains(&self.settings.strategy);
        if is_leveling && plan.output_level == BOTTOM && self.levels.level(BOTTOM).len() <= 1 {
            assert_eq!(plan.reach, Reach::Bottom);
        }
    }

    /// For every sample key, the first candidate has its newest record, and the ones behind are older.
    fn check_levels(&self) {
        for key in (0..SAMPLES).map(sample) {
            let found: Vec<u64> = self
                .levels
                .candidates(Token(key))
                .filter_map(|table| self.samples[&table.info.file_id].get(&key).copied())
                .collect();
            assert_eq!(found.first(), Some(&self.flushes), "key {key:x}");
            assert!(
                found.windows(2).all(|pair| pair[0] > pair[1]),
                "key {key:x}: {found:?}"
            );
        }
        for run in self.levels.runs() {
            assert!(!run.tables.is_empty());
            for pair in run.tables.windows(2) {
                assert!(pair[0].extent.last < pair[1].extent.first, "no overlap");
            }
        }
    }

    /// Compacts until nothing is due; returns how many jobs that took.
    fn settle(&mut self) -> usize {
        for jobs in 0.. {
            assert!(jobs < 10_000, "picking comes to an end");
            let Some(plan) = pick(&self.levels, &self.settings) else {
                assert_eq!(debt_bytes(&self.levels, &self.settings), 0);
                let runs = self.levels.runs().len();
                assert!(runs <= runs_max(&self.settings), "{runs} runs");
                return jobs;
            };
            assert!(debt_bytes(&self.levels, &self.settings) > 0);
            self.run(&plan);
        }
        unreachable!("the loop ends inside")
    }

    /// Compacts as long as scans pay, whatever it costs.
    fn settle_for_scans(&mut self) {
        let mut all = Scanned::default();
        (0..BOTTOM).for_each(|level| all.add(level, u64::MAX));
        for jobs in 0.. {
            assert!(jobs < 10_000, "picking comes to an end");
            self.settle();
            let runs = self.levels.runs().len();
            let Some(plan) = pick_scanned(&self.levels, &self.settings, &all) else {
                return;
            };
            self.run(&plan);
            self.settle();
            assert!(self.levels.runs().len() < runs, "fewer runs to read");
        }
    }

    /// Runs that a get of the worst sample key asks.
    fn depth(&self) -> usize {
        let keys = (0..SAMPLES).map(sample);
        keys.map(|key| self.levels.candidates(Token(key)).count())
            .max()
            .unwrap()
    }

    /// Bytes of files over bytes of extents, in percent.
    fn files_percent(&self) -> u64 {
        let files: BTreeMap<u64, u64> = self
            .levels
            .tables()
            .map(|table| (table.info.file_id, table.info.bytes))
            .collect();
        let extents: u64 = self.levels.tables().map(|table| table.bytes()).sum();
        files.values().sum::<u64>() * 100 / extents.max(1)
    }
}

fn sample(key: u128) -> u128 {
    (key * 2 + 1) * (u128::MAX / (2 * SAMPLES))
}

/// From the first to the last token that the inputs have in the range.
fn first_to_last(plan: &Plan) -> TokenRange {
    let ranges: Vec<TokenRange> = plan
        .sources()
        .into_iter()
        .flatten()
        .map(|(_, range)| range)
        .collect();
    TokenRange {
        first: ranges.iter().map(|range| range.first).min().unwrap(),
        last: ranges.iter().map(|range| range.last).max().unwrap(),
    }
}

pub const EVERY_STRATEGY: [Strategy; 5] = [
    Strategy::Hybrid,
    Strategy::Leveled,
    Strategy::SizeTiered,
    Strategy::Fifo,
    Strategy::TimeWindow { stamps: 30 },
];

#[test]
fn nothing_is_due_in_an_empty_tree() {
    for style in EVERY_STRATEGY {
        let world = World::new(style, 100);
        assert_eq!(pick(&world.levels, &world.settings), None);
        assert_eq!(pick_full(&world.levels, &world.settings, Token(0)), None);
        assert_eq!(debt_bytes(&world.levels, &world.settings), 0);
    }
}

#[test]
fn four_runs_on_level_0_are_merged_into_the_bottom_of_a_small_tree() {
    let mut world = World::new(Strategy::Hybrid, 100);
    for _ in 0..3 {
        world.flush(32 * MIB);
        assert_eq!(world.settle(), 0);
    }
    world.flush(32 * MIB);
    assert_eq!(world.settle(), 1);
    assert_eq!(world.levels.runs().len(), 1);
    assert_eq!(world.levels.level_bytes(BOTTOM), 128 * MIB);
}

#[test]
fn scans_pay_for_a_merge_when_they_have_read_what_it_reads_and_writes() {
    let mut world = World::new(Strategy::Hybrid, 100);
    let picked = |world: &World, level, bytes| {
        let mut scanned = Scanned::default();
        scanned.add(level, bytes);
        pick_scanned(&world.levels, &world.settings, &scanned)
    };
    world.flush(32 * MIB);
    assert_eq!(picked(&world, 0, u64::MAX), None, "one run stays one");
    world.flush(32 * MIB);
    assert_eq!(picked(&world, 0, 128 * MIB - 1), None);
    assert_eq!(picked(&world, BOTTOM, u64::MAX), None);
    let plan = picked(&world, 0, 128 * MIB).expect("two runs become one");
    world.run(&plan);
    assert_eq!(world.levels.level(BOTTOM).len(), 1);
    // A run into the bottom reads and writes the bottom too.
    world.flush(32 * MIB);
    assert_eq!(picked(&world, 0, 192 * MIB - 1), None);
    assert!(picked(&world, 0, 192 * MIB).is_some());
}

#[test]
fn who_scans_on_comes_to_one_run_where_the_number_of_runs_is_not_what_the_strategy_is_for() {
    for style in EVERY_STRATEGY {
        let mut world = World::new(style, 100);
        for _ in 0..300 {
            world.flush(32 * MIB);
            world.settle();
        }
        let before = world.levels.runs().len();
        world.settle_for_scans();
        let after = world.levels.runs().len();
        match style {
            Strategy::Hybrid => assert_eq!(after, 1, "of {before}"),
            // One run a level stays.
            Strategy::Leveled => assert!(world.levels.level(0).is_empty()),
            _ => assert_eq!(after, before),
        }
    }
}

/// Sixty-four gigabytes in flushes of 32 MiB, settled after each.
fn grow(style: Strategy) -> World {
    let mut world = World::new(style, 100);
    for _ in 0..2048 {
        world.flush(32 * MIB);
        world.settle();
    }
    world
}

#[test]
fn lazy_leveling_keeps_its_shape_and_its_write_amplification() {
    let world = grow(Strategy::Hybrid);
    assert_eq!(world.levels.level(BOTTOM).len(), 1);
    for level in 0..BOTTOM {
        assert!(world.levels.level(level).len() < 4, "level {level}");
    }
    let amplification = world.written_bytes * 10 / world.flushed_bytes;
    assert!(amplification <= 80, "{amplification} tenths");
    assert!(world.depth() <= 13, "{} runs", world.depth());
    let bottom = world.levels.level_bytes(BOTTOM);
    assert!(
        bottom * 100 / world.flushed_bytes >= 75,
        "most is at the bottom"
    );
    assert!(
        world.files_percent() <= 105,
        "{} % of files",
        world.files_percent()
    );
}

#[test]
fn leveling_asks_few_runs() {
    let world = grow(Strategy::Leveled);
    for level in 1..=BOTTOM {
        assert!(world.levels.level(level).len() <= 1, "level {level}");
    }
    let amplification = world.written_bytes * 10 / world.flushed_bytes;
    assert!(amplification <= 170, "{amplification} tenths");
    assert!(world.depth() <= 8, "{} runs", world.depth());
    assert!(
        world.files_percent() <= 125,
        "{} % of files",
        world.files_percent()
    );
}

#[test]
fn tiering_writes_each_byte_once_a_tier() {
    let world = grow(Strategy::SizeTiered);
    // 2,048 flushes are five tiers of four and a half.
    let amplification = world.written_bytes * 10 / world.flushed_bytes;
    assert!(amplification <= 55, "{amplification} tenths");
    assert!(world.depth() <= 20, "{} runs", world.depth());
}

#[test]
fn a_fifo_tree_keeps_its_runs_small_beside_the_whole() {
    let world = grow(Strategy::Fifo);
    let amplification = world.written_bytes * 10 / world.flushed_bytes;
    assert!(amplification <= 45, "{amplification} tenths");
    let all: u64 = world.levels.tables().map(TableRef::bytes).sum();
    for run in world.levels.runs() {
        assert!(
            run.bytes_in(&TokenRange::ALL) <= all / 8,
            "level {}",
            run.level
        );
    }
}

#[test]
fn every_window_that_has_passed_is_one_run() {
    let world = grow(Strategy::TimeWindow { stamps: 30 });
    // 2,048 flushes are 69 windows; the one that is open is above the bottom.
    let bottom = world.levels.level(BOTTOM);
    assert_eq!(bottom.len(), 64);
    for run in &bottom[..50] {
        let stamps = run.tables.iter().map(|table| table.info.stamps);
        let windows: Vec<u64> = stamps.flat_map(|s| [s.min / 30, s.max / 30]).collect();
        assert!(
            windows.iter().all(|window| *window == windows[0]),
            "{windows:?}"
        );
    }
    let amplification = world.written_bytes * 10 / world.flushed_bytes;
    assert!(amplification <= 35, "{amplification} tenths");
}

#[test]
pub fn runs_of_the_open_window_do_not_sink_below_those_of_one_that_has_passed() {
    let mut world = World::new(Strategy::TimeWindow { stamps: 5 }, 100);
    // Four of the first window and five of the next, all on level 0.
    for _ in 0..9 {
        world.flush(32 * MIB);
    }
    assert_eq!(world.settle(), 2);
    assert_eq!(world.levels.level(BOTTOM).len(), 1);
}

#[test]
fn a_table_goes_unread_when_all_of_it_may_be_forgotten() {
    for style in [Strategy::Fifo, Strategy::TimeWindow { stamps: 10 }] {
        let mut world = World::new(style, 100);
        for _ in 0..40 {
            world.flush(32 * MIB);
            world.settle();
        }
        let dead = |until: u64, floor: u64| {
            let mut levels = Levels::new();
            for table in world.levels.tables() {
                let mut info = (*table.info).clone();
                (info.entries, info.tombstones, info.expiring) = (10, 2, 8);
                info.purgeable_stamps = info.stamps;
                info.expiries_ms = info.stamps;
                levels.insert(TableRef {
                    info: Rc::new(info),
                    ..table.clone()
                });
            }
            let floors = PurgeFloors::everywhere(floor);
            let mut dropped = 0;
            while let Some(plan) = pick_dead(&levels, &floors, until) {
                assert!(plan.is_drop && plan.inputs.len() == 1);
                levels.apply(&plan.edit(&[]));
                dropped += 1;
            }
            (dropped, levels)
        };
        let (dropped, left) = dead(20, u64::MAX);
        assert!(dropped > 0, "{style:?}");
        assert!(left.tables().all(|table| table.info.stamps.max > 20));
        assert_eq!(dead(20, 0).0, 0, "nothing is below the floor");
        assert_eq!(dead(0, u64::MAX).0, 0, "nothing has expired");
        assert_eq!(dead(u64::MAX, u64::MAX).1.runs().len(), 0);
    }
}

#[test]
fn a_dead_table_stays_while_older_data_of_its_keys_is_alive() {
    let mut world = World::new(Strategy::Fifo, 100);
    world.flush(32 * MIB);
    world.flush(32 * MIB);
    let mut levels = Levels::new();
    for table in world.levels.tables() {
        let mut info = (*table.info).clone();
        // The older one is alive.
        (info.entries, info.tombstones) = (10, if info.stamps.max == 2 { 10 } else { 0 });
        levels.insert(TableRef {
            info: Rc::new(info),
            ..table.clone()
        });
    }
    assert_eq!(
        pick_dead(&levels, &PurgeFloors::everywhere(u64::MAX), 9),
        None
    );
}

#[test]
fn a_backlog_is_worked_off_in_jobs_within_their_bound() {
    for style in EVERY_STRATEGY {
        let mut world = World::new(style, 100);
        for _ in 0..100 {
            world.flush(32 * MIB);
        }
        let debt = debt_bytes(&world.levels, &world.settings);
        let due = if style == Strategy::Fifo { 4 } else { 30 };
        assert!(debt >= due * 32 * MIB);
        assert!(world.settle() > 12, "several pieces");
    }
}

#[test]
fn flushes_between_the_pieces_of_a_merge_do_no_harm() {
    for style in EVERY_STRATEGY {
        let mut world = World::new(style, 100);
        for _ in 0..1000 {
            world.flush(32 * MIB);
            // One job a flush is not quite enough, so levels are over their line for long.
            if let Some(plan) = pick(&world.levels, &world.settings) {
                world.run(&plan);
            }
        }
        world.settle();
        if [Strategy::Hybrid, Strategy::Leveled].contains(&style) {
            assert!(world.depth() <= 16, "{style:?}: {} runs", world.depth());
        }
    }
}

#[test]
fn a_full_compaction_leaves_one_run() {
    for style in [Strategy::Hybrid, Strategy::Leveled, Strategy::SizeTiered] {
        let mut world = World::new(style, 80);
        for _ in 0..300 {
            world.flush(32 * MIB);
            world.settle();
        }
        let mut from = Some(Token(0));
        while let Some(first) = from {
            let Some(plan) = pick_full(&world.levels, &world.settings, first) else {
                break;
            };
            assert!(plan.range.first >= first, "goes forward");
            from = plan.range.last.0.checked_add(1).map(Token);
            world.run(&plan);
        }
        assert_eq!(world.levels.runs().len(), 1, "{style:?}");
    }
}

#[test]
fn a_full_compaction_by_time_window_closes_the_open_one() {
    let mut world = World::new(Strategy::TimeWindow { stamps: 30 }, 100);
    for _ in 0..80 {
        world.flush(32 * MIB);
        world.settle();
    }
    let mut from = Token(0);
    while let Some(plan) = pick_full(&world.levels, &world.settings, from) {
        assert!(plan.range.first >= from, "goes forward");
        from = Token(plan.range.last.0.saturating_add(1));
        world.run(&plan);
    }
    assert_eq!(world.levels.level(BOTTOM).len(), world.levels.runs().len());
    assert_eq!(world.levels.runs().len(), 3);
}

#[test]
fn a_change_of_strategy_is_worked_in() {
    for before in EVERY_STRATEGY {
        for after in EVERY_STRATEGY {
            let mut world = World::new(before, 100);
            for _ in 0..300 {
                world.flush(32 * MIB);
                world.settle();
            }
            world.settings.strategy = after;
            // In the middle of a merge, too.
            world.flush(32 * MIB);
            world.settle();
            if after == Strategy::Leveled {
                for level in 1..=BOTTOM {
                    assert!(world.levels.level(level).len() <= 1, "level {level}");
                }
            }
            if after == Strategy::Hybrid {
                assert!(world.levels.level(BOTTOM).len() <= 1);
            }
            for _ in 0..50 {
                world.flush(32 * MIB);
                world.settle();
            }
        }
    }
}

#[test]
fn a_bottom_table_is_written_again_once_all_its_deletions_may_be_forgotten() {
    let mut world = World::new(Strategy::Hybrid, 100);
    for _ in 0..4 {
        world.flush(32 * MIB);
    }
    world.settle();
    world.flush(32 * MIB);
    let edit = |change: &dyn Fn(&mut TableInfo)| {
        let mut levels = Levels::new();
        for table in world.levels.tables() {
            let mut info = (*table.info).clone();
            (info.entries, info.tombstones, info.expiring) = (100, 10, 10);
            info.purgeable_stamps = Bounds { min: 3, max: 7 };
            info.expiries_ms = Bounds { min: 50, max: 90 };
            change(&mut info);
            levels.insert(TableRef {
                info: Rc::new(info),
                ..table.clone()
            });
        }
        levels
    };
    let pick = |levels: &Levels, floors: &PurgeFloors, now_ms| {
        pick_purge(levels, &world.settings, floors, now_ms)
    };
    let floors = PurgeFloors::everywhere(8);
    let levels = edit(&|_| {});
    let plan = pick(&levels, &floors, 90).expect("everything may go");
    assert_eq!(plan.reach, Reach::Bottom);
    assert_eq!((plan.output_level, plan.inputs.len()), (BOTTOM, 1));
    assert_eq!(plan.inputs[0].level, BOTTOM);

    assert_eq!(
        pick(&levels, &floors, 89),
        None,
        "one may not yet have expired"
    );
    assert_eq!(
        pick(&levels, &PurgeFloors::everywhere(7), 90),
        None,
        "one is above the floor"
    );
    assert_eq!(pick(&levels, &PurgeFloors::none(), 90), None);
    let half = TokenRange {
        first: Token(0),
        last: Token(u128::MAX / 2),
    };
    let first_half = PurgeFloors::new([(half, 8)]);
    let plan = pick(&levels, &first_half, 90).expect("the first table of two");
    assert!(plan.range.last <= half.last);
    let few = edit(&|info| info.tombstones = 2);
    assert_eq!(pick(&few, &floors, 90), None, "not worth it");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn levels_end_in_shape_whatever_is_flushed(
        flushes in prop::collection::vec((1u64..200, 0usize..4), 1..120),
        strategies in prop::collection::vec(0usize..5, 1..4),
        kept_percent in 0u64..=100,
        job_mib in 16u64..512,
        ratio in 2u64..10,
    ) {
        let mut world = World::new(EVERY_STRATEGY[strategies[0]], kept_percent);
        world.settings.job_bytes_max = job_mib * MIB;
        world.settings.level_ratio = ratio;
        for (number, (mib, jobs)) in flushes.into_iter().enumerate() {
            // Every twenty flushes another one, whatever is half done.
            let strategy = strategies[number / 20 % strategies.len()];
            world.settings.strategy = EVERY_STRATEGY[strategy];
            world.flush(mib * MIB);
            for _ in 0..jobs {
                if let Some(plan) = pick(&world.levels, &world.settings) {
                    world.run(&plan);
                }
            }
        }
        world.settle();
        world.check_levels();
    }
}
