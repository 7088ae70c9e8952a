//! Simulated clusters: clients, faults, and checkers of what was promised.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

pub mod ancestry;
pub mod check;
pub mod config;
pub mod history;
pub mod nemesis;
pub mod story;
