//! A bound on the bytes of requests and answers that a shard holds for its clients.
//!
//! On the path of every answer: whoever holds bytes for a client has a [`Charge`] for them. Small answers are
//! always let through, so a shard whose clients take megabytes slowly goes on serving the others; a large one that
//! does not fit is refused as `overloaded`, and its memory is free at once. It does not queue.

use std::cell::Cell;
use std::rc::Rc;

use crate::api::{Failure, FailureCode};

/// Answers up to this size are never refused: there is one of them at most for each request in flight, and those
/// are bounded by their number.
const SMALL_BYTES: usize = 64 << 10;

/// What one shard holds for its clients.
#[derive(Debug)]
pub struct Held {
    bytes: Cell<usize>,
    limit: usize,
}

/// Bytes that are held, until it is dropped.
#[derive(Debug)]
pub struct Charge {
    held: Rc<Held>,
    bytes: usize,
}

impl Held {
    /// Nothing yet, of at most `limit` bytes.
    pub fn new(limit: usize) -> Rc<Self> {
        Rc::new(Self {
            bytes: Cell::new(0),
            limit,
        })
    }

    /// Bytes held now.
    pub fn bytes(&self) -> usize {
        self.bytes.get()
    }

    /// Whether nothing large fits any more.
    pub fn is_full(&self) -> bool {
        self.bytes.get() >= self.limit
    }

    /// A charge of nothing, to grow.
    pub fn charge(self: &Rc<Self>) -> Charge {
        Charge {
            held: Rc::clone(self),
            bytes: 0,
        }
    }
}

impl Charge {
    /// Adds `bytes` more.
    ///
    /// # Errors
    /// [`FailureCode::Overloaded`] when they are many and do not fit; nothing is added then.
    pub fn grow(&mut self, bytes: usize) -> Result<(), Failure> {
        let limit = self.held.limit;
        if bytes > SMALL_BYTES && self.held.bytes() + bytes > limit {
            return Err(Failure::refused(
                FailureCode::Overloaded,
                format_args!(
                    "this shard holds its {} MiB of requests and answers (memory.clients_mb): read answers faster, \
                     or ask for less at a time",
                    limit >> 20
                ),
            ));
        }
        self.set(self.bytes + bytes);
        Ok(())
    }

    /// Sets what is held, whether or not it fits.
    pub fn set(&mut self, bytes: usize) {
        let others = self.held.bytes() - self.bytes;
        self.held.bytes.set(others + bytes);
        self.bytes = bytes;
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_unless_it_is_small() {
        let held = Held::new(1 << 20);
        let mut first = held.charge();
        first.grow(900 << 10).unwrap();
        let mut second = held.charge();
        let refused = second.grow(SMALL_BYTES * 2).unwrap_err();
        assert_eq!(refused.code, FailureCode::Overloaded);
        assert_eq!(held.bytes(), 900 << 10);
        second.grow(SMALL_BYTES).unwrap();
        second.grow(SMALL_BYTES).unwrap();
        assert!(held.is_full());
        drop(first);
        assert_eq!(held.bytes(), 2 * SMALL_BYTES);
        second.grow(SMALL_BYTES * 2).unwrap();
        second.set(7);
        assert_eq!(held.bytes(), 7);
        drop(second);
        assert_eq!(held.bytes(), 0);
    }
}
