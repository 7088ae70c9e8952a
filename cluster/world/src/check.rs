//! The checkers: what must hold of every history, whatever went wrong on the way.
//!
//! Each is a function from a history to what it violates, in a file of its own with stories that
//! it must accept and stories that it must refuse.

mod answers;
mod convergence;
mod dots;
mod durability;
mod expiry;
mod freshness;
mod last_write;
mod resurrection;
mod session;
mod siblings;
#[cfg(test)]
pub(crate) mod testing;

use std::fmt;

use crate::ancestry::Ancestry;
use crate::history::{History, KeyId};

/// Something that must not happen, and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The checker that found it.
    pub checker: &'static str,
    /// The key that it happened to, if it was one.
    pub key: Option<KeyId>,
    /// What happened, in one sentence.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key {
            Some(key) => write!(f, "{} of {key}: {}", self.checker, self.what),
            None => write!(f, "{}: {}", self.checker, self.what),
        }
    }
}

/// Where checkers report.
struct Findings {
    checker: &'static str,
    violations: Vec<Violation>,
}

impl Findings {
    fn add(&mut self, key: KeyId, what: String) {
        self.violations.push(Violation {
            checker: self.checker,
            key: Some(key),
            what,
        });
    }
}

type Checker = fn(&History, &Ancestry, &mut Findings);

/// Every checker by its name.
const CHECKERS: [(&str, Checker); 10] = [
    ("answers", answers::check),
    ("dots", dots::check),
    ("durability", durability::check),
    ("resurrection", resurrection::check),
    ("siblings", siblings::check),
    ("expiry", expiry::check),
    ("freshness", freshness::check),
    ("session", session::check),
    ("convergence", convergence::check),
    ("last_write", last_write::check),
];

/// Everything that the history violates.
pub fn check(history: &History) -> Vec<Violation> {
    let ancestry = Ancestry::of(history);
    let mut findings = Findings {
        checker: "",
        violations: Vec::new(),
    };
    for (name, checker) in CHECKERS {
        findings.checker = name;
        checker(history, &ancestry, &mut findings);
    }
    findings.violations
}
