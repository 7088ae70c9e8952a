//! Torc's storage engine: one log-structured merge tree store a shard.
//!
//! A write goes `commit` → `wal` → `memtable` → (flush) → `table`; a read asks memtables,
//! the record cache and then tables, newest first. The engine never sees a node, a socket or a
//! clock: the world is [`torc_env::Env`], and everything of a store lives on one thread.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

pub mod cache;
pub mod compaction;
pub mod error;
pub mod jobs;
mod le;
pub mod levels;
mod memtable;
pub mod merge;
pub mod options;
pub mod purge;
pub mod record;
pub mod table;

pub use error::{JobError, OpenError, ReadError, WriteError};
pub use memtable::Sealed;
pub use options::{Fsync, Options};
pub use record::{Entry, EntryRef, Kind, Record, ScanFrom};
