//! Waking one task of this shard when something has happened.
//!
//! Many notifications before the waiter looks count as one: it looks at the state that they announce,
//! not at their number.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::task::{Context, Poll, Waker};

use slab::Slab;

/// A notification for one waiting task.
#[derive(Debug, Default)]
pub struct Signal {
    is_set: Cell<bool>,
    waiter: RefCell<Option<Waker>>,
}

impl Signal {
    /// Wakes the waiter, now or when it waits next.
    pub fn notify(&self) {
        self.is_set.set(true);
        let waker = self.waiter.borrow_mut().take();
        waker.into_iter().for_each(Waker::wake);
    }

    /// Completes at the next notification; at once when there was one since the last wait.
    pub fn wait(&self) -> impl Future<Output = ()> + '_ {
        poll_fn(|cx| {
            if self.is_set.replace(false) {
                return Poll::Ready(());
            }
            *self.waiter.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
    }
}

/// A flag that is raised once and that any number of tasks wait for.
#[derive(Debug, Default)]
pub struct Flag {
    is_raised: Cell<bool>,
    waiters: RefCell<Slab<Option<Waker>>>,
}

impl Flag {
    /// Raises the flag and wakes everybody.
    pub fn raise(&self) {
        self.is_raised.set(true);
        let wakers: Vec<Waker> = self
            .waiters
            .borrow_mut()
            .iter_mut()
            .filter_map(|(_, waker)| waker.take())
            .collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Whether the flag is raised.
    pub fn is_raised(&self) -> bool {
        self.is_raised.get()
    }

    /// Completes when the flag is raised.
    pub async fn wait(&self) {
        let seat = Seat {
            flag: self,
            slot: self.waiters.borrow_mut().insert(None),
        };
        poll_fn(|cx| seat.poll(cx)).await;
    }
}

/// A waiter's place in a [`Flag`].
struct Seat<'a> {
    flag: &'a Flag,
    slot: usize,
}

impl Seat<'_> {
    fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.flag.is_raised() {
            return Poll::Ready(());
        }
        self.flag.waiters.borrow_mut()[self.slot] = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        drop(self.flag.waiters.borrow_mut().remove(self.slot));
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    fn is_ready(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
        future
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_ready()
    }

    #[test]
    fn a_notification_before_the_wait_is_not_lost_and_counts_once() {
        let signal = Signal::default();
        signal.notify();
        signal.notify();
        assert!(is_ready(pin!(signal.wait())));
        let mut second = pin!(signal.wait());
        assert!(!is_ready(second.as_mut()));
        signal.notify();
        assert!(is_ready(second));
    }

    #[test]
    fn a_raised_flag_stays_raised_for_everybody() {
        let flag = Flag::default();
        let (mut first, mut second) = (pin!(flag.wait()), pin!(flag.wait()));
        assert!(!is_ready(first.as_mut()) && !is_ready(second.as_mut()));
        flag.raise();
        assert!(is_ready(first) && is_ready(second));
        assert!(is_ready(pin!(flag.wait())));
    }
}
