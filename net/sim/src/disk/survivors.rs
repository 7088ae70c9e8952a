//! Which unsynced changes reach the medium when power is cut.

use crate::Rng;

/// What becomes of one change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Lost,
    Torn,
    Whole,
}

/// Decides the fate of every unsynced change at a power cut. A variant names one way in which a
/// cut can turn out, so that exhaustive tests can walk through several for each operation.
pub(crate) struct Survivors {
    keep: f64,
    torn: f64,
    in_order: bool,
    ended: bool,
    rng: Rng,
}

impl Survivors {
    /// Variant 0 keeps nothing that was not synced, 1 keeps everything; 2 keeps a prefix whose
    /// last change is torn; others keep a random subset, some of it torn, by a seed of their own.
    pub(crate) fn variant(seed: u64, variant: u32) -> Self {
        let mut rng = Rng::stream(seed ^ u64::from(variant), "survivors");
        let (keep, torn, in_order) = match variant {
            0 => (0.0, 0.0, false),
            1 => (1.0, 0.0, false),
            2 => (0.8, 1.0, true),
            _ => (rng.fraction(), rng.fraction() * 0.5, rng.chance(0.3)),
        };
        Self {
            keep,
            torn,
            in_order,
            ended: false,
            rng,
        }
    }

    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self::variant(0, 0)
    }

    /// The fate of the next change, in the order of their sequence within a file.
    pub(super) fn fate(&mut self) -> Fate {
        if self.ended {
            return Fate::Lost;
        }
        if self.rng.chance(self.keep) {
            if !self.in_order && self.rng.chance(self.torn) {
                return Fate::Torn;
            }
            return Fate::Whole;
        }
        if self.in_order {
            self.ended = true;
            if self.rng.chance(self.torn) {
                return Fate::Torn;
            }
        }
        Fate::Lost
    }

    /// Begins another file: an order is kept within one file only.
    pub(super) fn next_file(&mut self) {
        self.ended = false;
    }

    /// Which of a torn write's `count` atomic units were written: often a prefix, sometimes any.
    pub(super) fn torn_units(&mut self, count: usize) -> Vec<bool> {
        if self.rng.chance(0.5) {
            let end = self.rng.index(count + 1);
            return (0..count).map(|unit| unit < end).collect();
        }
        (0..count).map(|_| self.rng.chance(0.5)).collect()
    }
}
