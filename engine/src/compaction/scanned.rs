//! Merges that scans have paid for.
//!
//! A filter spares a get the runs that do not have its key. A scan has to look into every run, and a device read for each is most of
//! what a page of small records costs. So what scans have read of a level is added up, and once it is as much as merging the level
//! into the next one would read and write, the level is merged, though it is not full: whoever scans on has
//! fewer runs to read. What merges write for scans is at most half of what scans have
//! read: the rule of whoever rents skis until the rent comes to their price, and then buys.

use super::{Plan, Settings, Strategy, leveling};
use crate::levels::{BOTTOM, Levels};

/// Bytes that scans have read of each level of a tree above the bottom since it was last merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scanned([u64; BOTTOM as usize]);

impl Scanned {
    /// Scans have read `bytes` of a level. What they read of the bottom is no reason to merge anything.
    pub fn add(&mut self, level: u8, bytes: u64) {
        if let Some(scanned) = self.0.get_mut(usize::from(level)) {
            *scanned = scanned.saturating_add(bytes);
        }
    }

    /// As [`Scanned::add`], of every level.
    pub(crate) fn add_all(&mut self, other: Scanned) {
        for (scanned, bytes) in self.0.iter_mut().zip(other.0) {
            *scanned = scanned.saturating_add(bytes);
        }
    }

    /// A level has been merged, or a piece of it.
    pub(crate) fn forget(&mut self, level: u8) {
        if let Some(scanned) = self.0.get_mut(usize::from(level)) {
            *scanned = 0;
        }
    }

    /// That of a level.
    pub(super) fn of(&self, level: u8) -> u64 {
        self.0.get(usize::from(level)).copied().unwrap_or(0)
    }
}

/// A compaction of the uppermost level that scans have paid for, when [`pick`](super::pick) finds nothing. None where the number
/// of runs is what the strategy is for. A merge too large for one compaction is due, like any that has begun, from its second on.
pub fn pick_scanned(levels: &Levels, settings: &Settings, scanned: &Scanned) -> Option<Plan> {
    if !settings.strategy.merges_for_scans() {
        return None;
    }
    let plan = leveling::pick_scanned(levels, settings, scanned)?;
    Some(Plan {
        is_for_scans: true,
        ..plan
    })
}

/// Whether [`pick_scanned`] would find a compaction. Costs a look at each table above the bottom.
pub(crate) fn is_paid(levels: &Levels, settings: &Settings, scanned: &Scanned) -> bool {
    settings.strategy.merges_for_scans()
        && leveling::paid_level(levels, settings, scanned).is_some()
}

impl Strategy {
    fn merges_for_scans(self) -> bool {
        matches!(self, Strategy::Hybrid | Strategy::Leveled)
    }
}
