//! A compaction to be done: what goes in, where it comes out, and the edit that makes it so.

use torc_env::TokenRange;

use crate::levels::{BOTTOM, Edit, Levels, Run, TableKey, TableRef, whole};
use crate::purge::Reach;
use crate::table::{FilterBits, TableInfo};

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
    /// Whether nothing is read nor written: the inputs just go.
    pub is_drop: bool,
    /// Whether no level is due for it: scans have paid for it.
    pub is_for_scans: bool,
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
    pub(super) fn new<'a>(
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
            is_drop: false,
            is_for_scans: false,
        }
    }

    /// Builds the plan that writes one table again where it is.
    pub(super) fn of_table(levels: &Levels, run: &Run, table: &TableRef) -> Plan {
        Plan::new(levels, table.extent, [run], run.level, Some(run.id))
    }

    /// Builds the plan that forgets one table.
    pub(super) fn drop(levels: &Levels, run: &Run, table: &TableRef) -> Plan {
        Plan {
            is_drop: true,
            ..Plan::of_table(levels, run, table)
        }
    }

    /// Whether a table is only written again where it is, and nothing is merged.
    pub fn is_rewrite(&self) -> bool {
        let [input] = &self.inputs[..] else {
            return false;
        };
        (input.level, Some(input.run)) == (self.output_level, self.output_run)
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
