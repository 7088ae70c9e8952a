//! Timers of one shard: a heap of deadlines and the wakers that wait for them.
//!
//! A cancelled timer leaves its heap entry behind until it is due or until stale entries are the
//! majority; then the heap is rebuilt. So cancelling is O(1) and the heap stays proportional to the
//! timers that are alive. Resolution is the kernel's wait timeout (tens of microseconds).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::task::Waker;

use slab::Slab;
use torc_env::Instant;

/// Below this many entries a rebuild is not worth its cost.
const REBUILD_ENTRIES_MIN: usize = 256;

/// Names a timer that was set; stale after it has fired or was cancelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TimerKey {
    slot: usize,
    /// Distinguishes successive timers in one slot, and orders timers of the same instant.
    sequence: u64,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Due {
    at: Instant,
    sequence: u64,
    slot: usize,
}

struct Waiting {
    sequence: u64,
    waker: Waker,
}

/// The timers of a shard.
#[derive(Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<Due>>,
    waiting: Slab<Waiting>,
    next_sequence: u64,
}

impl Timers {
    /// Sets a timer: `waker` is woken by the first [`Timers::fire`] at or after `at`.
    pub(crate) fn set(&mut self, at: Instant, waker: Waker) -> TimerKey {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let slot = self.waiting.insert(Waiting { sequence, waker });
        self.heap.push(Reverse(Due { at, sequence, slot }));
        TimerKey { slot, sequence }
    }

    /// Replaces the waker of a timer that has not fired. Returns false when it has.
    pub(crate) fn refresh(&mut self, key: TimerKey, waker: &Waker) -> bool {
        match self.waiting.get_mut(key.slot) {
            Some(waiting) if waiting.sequence == key.sequence => {
                waiting.waker.clone_from(waker);
                true
            }
            _ => false,
        }
    }

    /// Cancels a timer; nothing happens when it has fired.
    pub(crate) fn cancel(&mut self, key: TimerKey) {
        if self.is_waiting(key.slot, key.sequence) {
            self.waiting.remove(key.slot);
            if self.heap.len() > REBUILD_ENTRIES_MIN && self.waiting.len() * 2 < self.heap.len() {
                let waiting = &self.waiting;
                self.heap.retain(|Reverse(due)| {
                    waiting
                        .get(due.slot)
                        .is_some_and(|entry| entry.sequence == due.sequence)
                });
            }
        }
    }

    /// Moves the wakers of every timer that is due into `woken`, in order of their deadlines.
    pub(crate) fn fire(&mut self, now: Instant, woken: &mut Vec<Waker>) {
        while let Some(Reverse(due)) = self.heap.peek() {
            let live = self.is_waiting(due.slot, due.sequence);
            if live && due.at > now {
                return;
            }
            if live {
                woken.push(self.waiting.remove(due.slot).waker);
            }
            self.heap.pop();
        }
    }

    /// When the next timer is due. May name the time of a cancelled one, never a later time than
    /// the next.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse(due)| due.at)
    }

    fn is_waiting(&self, slot: usize, sequence: u64) -> bool {
        self.waiting
            .get(slot)
            .is_some_and(|waiting| waiting.sequence == sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fired(timers: &mut Timers, now: u64) -> usize {
        let mut woken = Vec::new();
        timers.fire(Instant(now), &mut woken);
        woken.len()
    }

    #[test]
    fn timers_fire_when_due_and_once() {
        let mut timers = Timers::default();
        timers.set(Instant(30), Waker::noop().clone());
        timers.set(Instant(10), Waker::noop().clone());
        assert_eq!(timers.next(), Some(Instant(10)));
        assert_eq!(fired(&mut timers, 9), 0);
        assert_eq!(fired(&mut timers, 10), 1);
        assert_eq!(timers.next(), Some(Instant(30)));
        assert_eq!(fired(&mut timers, 100), 1);
        assert_eq!(fired(&mut timers, 100), 0);
    }

    #[test]
    fn a_stale_key_neither_refreshes_nor_cancels_the_next_timer_in_its_slot() {
        let mut timers = Timers::default();
        let old = timers.set(Instant(1), Waker::noop().clone());
        assert_eq!(fired(&mut timers, 1), 1);
        timers.set(Instant(2), Waker::noop().clone());
        assert!(!timers.refresh(old, Waker::noop()));
        timers.cancel(old);
        assert_eq!(fired(&mut timers, 2), 1);
    }

    #[test]
    fn cancelled_timers_do_not_pile_up() {
        let mut timers = Timers::default();
        for at in 0..100_000 {
            let key = timers.set(Instant(at), Waker::noop().clone());
            timers.cancel(key);
        }
        assert!(timers.heap.len() <= REBUILD_ENTRIES_MIN + 1);
        assert_eq!(fired(&mut timers, u64::MAX), 0);
    }
}
