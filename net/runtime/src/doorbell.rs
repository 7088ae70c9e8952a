//! Waking a shard that sleeps in the kernel.
//!
//! Whoever puts something into a shard's queues calls [`Doorbell::ring`] (or, from another shard,
//! sends a message to its ring). The handshake that loses no wake-up: the producer publishes, then
//! looks whether the shard sleeps; the shard announces its sleep, then looks into its queues again.
//! A sequentially consistent fence between the two steps on each side makes sure that at least one
//! of them sees the other.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering, fence};

use crate::sys;

/// No ring is open.
const NO_RING: RawFd = -1;

/// One shard's doorbell, shared by everybody who may wake it.
pub(crate) struct Doorbell {
    asleep: AtomicBool,
    event: OwnedFd,
    /// The shard's io_uring, as the target of MSG_RING.
    ring: AtomicI32,
}

impl Doorbell {
    /// A doorbell of a shard that is awake.
    pub(crate) fn new() -> io::Result<Doorbell> {
        Ok(Doorbell {
            asleep: AtomicBool::new(false),
            event: sys::eventfd()?,
            ring: AtomicI32::new(NO_RING),
        })
    }

    /// Wakes the shard if it sleeps. Call it after the queue has been filled.
    pub(crate) fn ring(&self) {
        if self.claim() {
            self.signal();
        }
    }

    /// Whether the shard sleeps and this caller is the one who must wake it. Call it after the
    /// queue has been filled.
    pub(crate) fn claim(&self) -> bool {
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::AcqRel)
    }

    /// Wakes by eventfd, unconditionally.
    pub(crate) fn signal(&self) {
        sys::eventfd_signal(self.event.as_fd());
    }

    /// The shard is about to sleep. It must look into its queues once more before it does.
    pub(crate) fn announce_sleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The shard is awake.
    pub(crate) fn awake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// The eventfd that [`Doorbell::signal`] writes.
    pub(crate) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Publishes the shard's ring, or takes it back with `None`.
    pub(crate) fn set_ring_fd(&self, ring: Option<RawFd>) {
        self.ring.store(ring.unwrap_or(NO_RING), Ordering::Release);
    }

    /// The shard's ring while it is open.
    pub(crate) fn ring_fd(&self) -> Option<RawFd> {
        Some(self.ring.load(Ordering::Acquire)).filter(|fd| *fd != NO_RING)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sleeping_shard_is_woken_and_only_once() {
        let doorbell = Doorbell::new().unwrap();
        assert!(!doorbell.claim());
        doorbell.announce_sleep();
        assert!(doorbell.claim());
        assert!(!doorbell.claim());
        doorbell.announce_sleep();
        doorbell.awake();
        assert!(!doorbell.claim());
    }
}
