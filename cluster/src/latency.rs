//! How fast peers answer, and when it pays to ask one more. Pure: the caller brings the time.
//!
//! On the path: a read orders its replicas by [`Peers::rank`], waits [`Hedge::delay`] before it asks
//! a spare one, and pays for that from a budget of 5 %, so that hedging stops by itself when
//! everything is slow (extra load would then only make it slower).
//!
//! It decides nothing about who is alive; that is the detector's.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Duration;

use torc_env::Instant;

use crate::topology::SlotId;

/// Extra requests allowed for each hundred.
const HEDGE_PERCENT: u32 = 5;
/// Hedges that may be saved up, so that a first burst after a quiet time can use some.
const HEDGES_SAVED_MAX: u32 = 20;
/// Hundredths of a hedge.
const HEDGE_COST: u32 = 100;

/// How long a peer with a full disk is left alone: compaction or a person needs seconds at least.
const FULL_REMEMBERED: Duration = Duration::from_secs(5);

/// The delay before anything is known: about a slow disk read plus a round trip in one room.
const DELAY_FIRST: Duration = Duration::from_millis(10);
const DELAY_MIN: Duration = Duration::from_micros(500);
const DELAY_MAX: Duration = Duration::from_millis(500);

/// When to ask a spare replica.
#[derive(Debug)]
pub struct Hedge {
    /// Estimate of the 95th percentile of answers, in nanoseconds.
    p95_ns: Cell<u64>,
    saved: Cell<u32>,
}

impl Default for Hedge {
    fn default() -> Self {
        Self {
            p95_ns: Cell::new(nanos(DELAY_FIRST)),
            saved: Cell::new(HEDGES_SAVED_MAX * HEDGE_COST),
        }
    }
}

impl Hedge {
    /// How long to wait for an answer before asking one more.
    pub fn delay(&self) -> Duration {
        Duration::from_nanos(self.p95_ns.get()).clamp(DELAY_MIN, DELAY_MAX)
    }

    /// How long to wait before a replica counts as failed for this read: it is then replaced without
    /// regard to the budget.
    pub fn give_up(&self) -> Duration {
        (self.delay() * 8).clamp(Duration::from_millis(40), Duration::from_secs(1))
    }

    /// A peer has answered a read after `took`.
    pub fn answered(&self, took: Duration) {
        // A stochastic quantile: up by 19 steps when above, down by one when not, balances where
        // one of twenty is above. Steps are a share of the estimate, so it finds its scale quickly.
        let old = self.p95_ns.get();
        let step = (old / 128).max(1);
        let new = if nanos(took) > old {
            old.saturating_add(step * 19)
        } else {
            old.saturating_sub(step)
        };
        self.p95_ns
            .set(new.clamp(nanos(DELAY_MIN), nanos(DELAY_MAX)));
    }

    /// A request was sent: it earns its part of a hedge.
    pub fn earn(&self) {
        let saved = self.saved.get() + HEDGE_PERCENT;
        self.saved.set(saved.min(HEDGES_SAVED_MAX * HEDGE_COST));
    }

    /// Pays for one hedge; false when the budget is used up.
    pub fn spend(&self) -> bool {
        match self.saved.get().checked_sub(HEDGE_COST) {
            Some(rest) => {
                self.saved.set(rest);
                true
            }
            None => false,
        }
    }
}

/// A moving average for each peer.
#[derive(Debug, Default)]
pub struct Peers {
    average_ns: RefCell<BTreeMap<SlotId, u64>>,
    /// When a peer last refused a value for want of disk space.
    full_at: RefCell<BTreeMap<SlotId, Instant>>,
}

impl Peers {
    /// A peer has answered after `took`, or has not answered for that long.
    pub fn note(&self, peer: SlotId, took: Duration) {
        let took = nanos(took);
        let mut averages = self.average_ns.borrow_mut();
        let average = averages.entry(peer).or_insert(took);
        *average = *average - *average / 8 + took / 8;
    }

    /// A peer has refused a value for want of disk space.
    pub fn is_full(&self, peer: SlotId, now: Instant) {
        self.full_at.borrow_mut().insert(peer, now);
    }

    /// Whether a peer has done so lately: a write that needs it is better refused before it is
    /// applied anywhere.
    pub fn was_full(&self, peer: SlotId, now: Instant) -> bool {
        let full_at = self.full_at.borrow();
        full_at
            .get(&peer)
            .is_some_and(|at| now.since(*at) < FULL_REMEMBERED)
    }

    /// Peers of a lower rank are asked first. Ranks are coarse (powers of two), so that equally
    /// good peers keep the ring's order and share the load.
    pub fn rank(&self, peer: SlotId) -> u32 {
        let average = self.average_ns.borrow().get(&peer).copied().unwrap_or(0);
        // Below a millisecond all are equally near.
        (average >> 20).checked_ilog2().map_or(0, |log| log + 1)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_settles_where_one_of_twenty_answers_is_slower() {
        let hedge = Hedge::default();
        for round in 0..20_000u64 {
            // Uniform from 1 to 2 ms, so the 95th percentile is 1.95 ms.
            let micros = 1_000 + (round * 617) % 1_000;
            hedge.answered(Duration::from_micros(micros));
        }
        let delay = hedge.delay();
        assert!(
            delay > Duration::from_micros(1_700) && delay < Duration::from_micros(2_300),
            "{delay:?}"
        );
    }

    #[test]
    fn hedges_stay_within_five_percent() {
        let hedge = Hedge::default();
        let mut hedges = 0u32;
        for _ in 0..10_000 {
            hedge.earn();
            hedges += u32::from(hedge.spend());
        }
        assert!(hedges <= 500 + HEDGES_SAVED_MAX, "{hedges}");
        assert!(hedges >= 500);
    }

    #[test]
    fn a_silent_peer_sinks_and_comes_back_when_it_answers() {
        let peers = Peers::default();
        peers.note(SlotId(1), Duration::from_micros(200));
        peers.note(SlotId(2), Duration::from_micros(900));
        assert_eq!(peers.rank(SlotId(1)), peers.rank(SlotId(2)), "equally near");
        peers.note(SlotId(2), Duration::from_millis(500));
        assert!(peers.rank(SlotId(2)) > peers.rank(SlotId(1)));
        for _ in 0..64 {
            peers.note(SlotId(2), Duration::from_micros(300));
        }
        assert_eq!(peers.rank(SlotId(1)), peers.rank(SlotId(2)));
    }
}
