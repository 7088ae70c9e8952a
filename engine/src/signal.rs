//! Waiting within one shard: a signal that tasks wait on, and a turn that one task holds at a time.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Wakes whoever waits for a condition. The condition lives elsewhere; whoever changes it rings.
#[derive(Default)]
pub(crate) struct Signal {
    wakers: RefCell<Vec<Waker>>,
    /// How often it rang: tells a waiter whether its waker is still in the list.
    rings: Cell<u64>,
}

impl Signal {
    /// Wakes every waiter to look again.
    pub(crate) fn ring(&self) {
        self.rings.set(self.rings.get().wrapping_add(1));
        let wakers = std::mem::take(&mut *self.wakers.borrow_mut());
        for waker in wakers {
            waker.wake();
        }
    }

    /// Completes with what `look` finds, looking now and after every ring.
    pub(crate) async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        // Where this waiter's waker is, and after how many rings it was put there.
        let mut place: Option<(u64, usize)> = None;
        poll_fn(|context| {
            if let Some(found) = look() {
                return Poll::Ready(found);
            }
            let mut wakers = self.wakers.borrow_mut();
            let rings = self.rings.get();
            match place {
                Some((since, index)) if since == rings => {
                    wakers[index].clone_from(context.waker());
                }
                _ => {
                    // A task that waits again and again, between rings that do not come, leaves
                    // one waker and not many.
                    let last = wakers.last();
                    if last.is_none_or(|last| !last.will_wake(context.waker())) {
                        wakers.push(context.waker().clone());
                    }
                    place = Some((rings, wakers.len() - 1));
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// The right to do something that only one task may do at a time.
#[derive(Default)]
pub(crate) struct Turn {
    taken: Cell<bool>,
    freed: Signal,
}

/// Holds the turn; dropping it passes it on.
pub(crate) struct TurnGuard<'a> {
    turn: &'a Turn,
}

impl Turn {
    /// Waits for the turn.
    pub(crate) async fn take(&self) -> TurnGuard<'_> {
        self.freed
            .until(|| (!self.taken.replace(true)).then_some(()))
            .await;
        TurnGuard { turn: self }
    }

    /// Whether somebody holds it.
    pub(crate) fn is_taken(&self) -> bool {
        self.taken.get()
    }
}

impl Drop for TurnGuard<'_> {
    fn drop(&mut self) {
        self.turn.taken.set(false);
        self.turn.freed.ring();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_turn_is_held_by_one_at_a_time() {
        let turn = Turn::default();
        let first = turn.take().now_or_never().unwrap();
        assert!(turn.take().now_or_never().is_none() && turn.is_taken());
        drop(first);
        assert!(!turn.is_taken());
        assert!(turn.take().now_or_never().is_some());
    }

    #[test]
    fn a_waiter_sees_the_condition_after_a_ring() {
        let signal = Signal::default();
        let count = Cell::new(0);
        let mut waiting = Box::pin(signal.until(|| (count.get() == 1).then_some("done")));
        assert!((&mut waiting).now_or_never().is_none());
        count.set(1);
        signal.ring();
        assert_eq!(waiting.now_or_never(), Some("done"));
    }
}
