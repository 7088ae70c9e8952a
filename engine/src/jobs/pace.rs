//! How far a job may go for now.
//!
//! The one thing that a running job shares with its shard: two numbers. The job says how far it has come, the
//! shard how far it may come. A job that nobody holds has no bound.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;

use futures_util::task::AtomicWaker;

/// A job's bound and progress, in bytes of its input.
#[derive(Debug)]
pub struct Pace {
    allowed: AtomicU64,
    done: AtomicU64,
    waker: AtomicWaker,
}

impl Default for Pace {
    /// Without a bound.
    fn default() -> Pace {
        Pace {
            allowed: AtomicU64::new(u64::MAX),
            done: AtomicU64::new(0),
            waker: AtomicWaker::new(),
        }
    }
}

impl Pace {
    /// Lets the job come as far as `bytes`.
    pub fn allow(&self, bytes: u64) {
        self.allowed.store(bytes, Ordering::Release);
        self.waker.wake();
    }

    /// How far it may come.
    pub fn allowed(&self) -> u64 {
        self.allowed.load(Ordering::Relaxed)
    }

    /// How far it has come.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// The job has come as far as `bytes`. Completes when it may go on.
    pub(super) async fn reach(&self, bytes: u64) {
        self.done.store(bytes, Ordering::Relaxed);
        if bytes <= self.allowed.load(Ordering::Acquire) {
            return;
        }
        poll_fn(|context| {
            self.waker.register(context.waker());
            // Only now: what was allowed before the registration has woken nobody.
            if bytes <= self.allowed.load(Ordering::Acquire) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_job_waits_at_its_bound_until_that_is_moved() {
        let pace = Pace::default();
        assert!(pace.reach(1 << 40).now_or_never().is_some());
        pace.allow(10);
        assert!(pace.reach(10).now_or_never().is_some());
        let mut waiting = Box::pin(pace.reach(11));
        assert!((&mut waiting).now_or_never().is_none());
        assert_eq!(pace.done(), 11);
        pace.allow(11);
        assert!(waiting.now_or_never().is_some());
    }
}
