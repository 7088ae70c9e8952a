//! Merges that scans have paid for.
//!
//! A filter spares a get the runs that do not have its key. A scan has to look into every run, and a device read for each is most of
//! what a page of small records costs. So what scans have read of a level is added up, and once it is as much as merging the level
//! into the next one would read and write, the level is merged, though it is not full: whoever scans on has
//! fewer runs to read. Who scans little never pays for a merge, and what merges write for scans is at most half of what scans have
//! read: the rule of whoever rents skis until the rent comes to their price, and then buys.

use super::{Plan, Settings, Strategy, leveling};
use crate::ahead::Scanned;
use crate::levels::Levels;

/// A compaction of the uppermost level that scans have paid for, when [`pick`](super::pick) finds nothing. None where the number of runs is what
/// the strategy is for.
pub fn pick_scanned(levels: &Levels, settings: &Settings, scanned: &Scanned) -> Option<Plan> {
    let plan = match settings.strategy {
        Strategy::Hybrid | Strategy::Leveled => leveling::pick_scanned(levels, settings, scanned)?,
        Strategy::SizeTiered | Strategy::Fifo | Strategy::TimeWindow { .. } => return None,
    };
    Some(Plan {
        is_for_scans: true,
        ..plan
    })
}
