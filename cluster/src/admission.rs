//! Bounds on what a shard works on at one time: more is refused early, with a name.
//!
//! On the path: `Node` takes a [`Permit`] before it starts a request and
//! holds it until the answer. Classes have bounds of their own, so that a burst of client requests
//! cannot make this node fail its duties as a replica, and repair cannot push either aside.
//!
//! It does not queue: whatever would wait is told to come back.

use std::cell::Cell;
use std::rc::Rc;

use torc_env::Class;

use crate::api::{Failure, FailureCode};

/// Requests of one class in flight on one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdmissionLimits {
    /// Client requests that this shard coordinates or hands on. Default 4,096: at 5 ms each that
    /// is 800,000 a second, beyond what a shard can do, so the bound is met only when something
    /// is slow.
    pub foreground: u32,
    /// Reads, merges and hints for other coordinators. Default 8,192: refusing these wastes the
    /// work that the coordinator has done.
    pub replication: u32,
    /// Anti-entropy, streams and hint replay for other nodes. Default 64.
    pub repair: u32,
    /// Gossip, topology and admin. Default 256.
    pub control: u32,
}

impl Default for AdmissionLimits {
    fn default() -> Self {
        Self {
            foreground: 4_096,
            replication: 8_192,
            repair: 64,
            control: 256,
        }
    }
}

/// Counts what is in flight. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Admission {
    limits: AdmissionLimits,
    in_flight: Rc<[Cell<u32>; Class::ALL.len()]>,
}

/// The right to work on one request; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    in_flight: Rc<[Cell<u32>; Class::ALL.len()]>,
    class: Class,
}

impl Admission {
    /// Nothing in flight.
    pub fn new(limits: AdmissionLimits) -> Self {
        Self {
            limits,
            in_flight: Rc::default(),
        }
    }

    /// Takes a permit.
    ///
    /// # Errors
    /// [`FailureCode::Overloaded`], with advice when to come back, at the class's bound.
    pub fn enter(&self, class: Class) -> Result<Permit, Failure> {
        let count = &self.in_flight[class.index()];
        let limit = self.limit(class);
        if count.get() >= limit {
            return Err(Failure::refused(
                FailureCode::Overloaded,
                format_args!("{limit} requests of class {class:?} are in flight"),
            ));
        }
        count.set(count.get() + 1);
        Ok(Permit {
            in_flight: Rc::clone(&self.in_flight),
            class,
        })
    }

    /// Requests of a class in flight.
    pub fn in_flight(&self, class: Class) -> u32 {
        self.in_flight[class.index()].get()
    }

    fn limit(&self, class: Class) -> u32 {
        match class {
            Class::Foreground => self.limits.foreground,
            Class::Replication => self.limits.replication,
            Class::Repair | Class::Flush => self.limits.repair,
            Class::Control => self.limits.control,
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let count = &self.in_flight[self.class.index()];
        count.set(count.get().saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_class_refuses_and_leaves_the_others_alone() {
        let admission = Admission::new(AdmissionLimits {
            foreground: 2,
            ..AdmissionLimits::default()
        });
        let first = admission.enter(Class::Foreground).unwrap();
        let _second = admission.enter(Class::Foreground).unwrap();
        let refused = admission.enter(Class::Foreground).unwrap_err();
        assert_eq!(refused.code, FailureCode::Overloaded);
        assert!(refused.retryable && !refused.in_doubt && refused.retry_after_ms > 0);
        assert!(admission.enter(Class::Replication).is_ok());
        drop(first);
        assert!(admission.enter(Class::Foreground).is_ok());
        assert_eq!(admission.in_flight(Class::Foreground), 1);
    }
}
