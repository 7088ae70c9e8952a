//! Integration tests: the store as a whole in the simulated world, and its tables, merges and
//! compactions by themselves.

#![expect(clippy::unwrap_used, reason = "in a test an error is a failure")]

mod archive;
mod blobs;
mod block_cache;
mod compaction;
mod damage;
mod encryption;
mod faults;
mod jobs;
mod merge;
mod model;
#[cfg(mutations)]
mod mutations;
mod newer;
mod pacing;
mod power;
mod redistribute;
mod scan_memory;
mod snapshot;
mod store;
mod support;
mod table;
mod table_damage;
mod table_support;
