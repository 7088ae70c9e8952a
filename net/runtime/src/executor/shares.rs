//! Which class runs next: weighted fair shares of the shard's time.
//!
//! Each class has an account of the time that it has used, divided by its weight; the ready class
//! with the smallest account runs next. A class that was idle rejoins at the current level, so it
//! cannot save up time and then shut the others out. Pure: the caller says what was ready and what
//! a poll cost.

use torc_env::Class;

/// Relative shares when every class always has work. Client requests get half of a busy shard;
/// the memory that flushes free is what writes wait for, so flush ranks third; gossip needs
/// little, but needs it soon.
const WEIGHTS: [u64; Class::ALL.len()] = [1000, 500, 250, 100, 150];

/// An account grows by `cost × SCALE / weight`, so that a weight above one does not round to zero.
const SCALE: u64 = 1000;

/// The accounts of all classes.
#[derive(Debug, Default)]
pub(crate) struct Shares {
    used: [u64; Class::ALL.len()],
    /// The account of the class picked last; never falls.
    level: u64,
    /// Classes that were ready at the last pick.
    was_ready: [bool; Class::ALL.len()],
}

impl Shares {
    /// The class to run next among those that are ready, or `None` when none is.
    pub(crate) fn pick(&mut self, ready: [bool; Class::ALL.len()]) -> Option<Class> {
        for class in Class::ALL {
            let index = class.index();
            if ready[index] && !self.was_ready[index] {
                self.used[index] = self.used[index].max(self.level);
            }
        }
        self.was_ready = ready;
        let next = Class::ALL
            .into_iter()
            .filter(|class| ready[class.index()])
            .min_by_key(|class| self.used[class.index()])?;
        self.level = self.level.max(self.used[next.index()]);
        Some(next)
    }

    /// Books what a poll of `class` cost. A cost of zero (a coarse clock) counts as one, so that
    /// no class runs for free for ever.
    pub(crate) fn charge(&mut self, class: Class, cost_ns: u64) {
        let index = class.index();
        let weighted = cost_ns.max(1).saturating_mul(SCALE) / WEIGHTS[index];
        self.used[index] = self.used[index].saturating_add(weighted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polls(shares: &mut Shares, ready: [bool; 5], count: usize) -> [usize; 5] {
        let mut polls = [0; 5];
        for _ in 0..count {
            let class = shares.pick(ready).expect("something is ready");
            shares.charge(class, 1000);
            polls[class.index()] += 1;
        }
        polls
    }

    #[test]
    fn always_ready_classes_share_by_weight() {
        let counted = polls(&mut Shares::default(), [true; 5], 20_000);
        for class in Class::ALL {
            let fair = 20_000 * usize::try_from(WEIGHTS[class.index()]).unwrap() / 2000;
            let got = counted[class.index()];
            assert!(
                got.abs_diff(fair) <= 10,
                "{class:?}: {got} polls, fair {fair}"
            );
        }
    }

    #[test]
    fn nothing_ready_picks_nothing() {
        assert_eq!(Shares::default().pick([false; 5]), None);
    }

    #[test]
    fn an_idle_class_does_not_save_up_time() {
        let mut shares = Shares::default();
        polls(&mut shares, [true, false, false, false, false], 10_000);
        let counted = polls(&mut shares, [true, false, false, true, false], 110);
        assert!(counted[Class::Foreground.index()] >= 98, "{counted:?}");
        assert!(counted[Class::Repair.index()] >= 8, "{counted:?}");
    }

    #[test]
    fn a_class_that_wakes_up_runs_at_once() {
        let mut shares = Shares::default();
        polls(&mut shares, [true, true, true, false, false], 1000);
        assert_eq!(
            shares
                .pick([true, true, true, false, true])
                .map(Class::index),
            Some(polls_lowest(&shares)),
        );
    }

    fn polls_lowest(shares: &Shares) -> usize {
        (0..5)
            .filter(|index| *index != Class::Repair.index())
            .min_by_key(|index| shares.used[*index])
            .unwrap()
    }
}
