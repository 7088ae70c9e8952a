//! The role of a coordinator: one file for each kind of request.
//!
//! `put` and `delete` find a replica, mint there and spread the new state; `get` asks R replicas,
//! merges and repairs; `scan` does so for a page of keys; `batch` runs many of them at once.

pub(crate) mod batch;
pub(crate) mod delete;
pub(crate) mod get;
pub(crate) mod put;
mod refusal;
pub(crate) mod scan;
pub(crate) mod spread;
