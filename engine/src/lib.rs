//! Torc's storage engine: one log-structured merge tree store a shard.
//!
//! A write goes [`store`] → `commit` → `wal` → `memtable` → (flush: [`jobs`]) → [`table`]; a read
//! asks memtables, the record [`cache`] and then tables, newest first. The engine never sees a
//! node, a socket or a clock: the world is [`torc_env::Env`], and everything of a store lives on one
//! thread.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

mod ahead;
pub mod archive;
pub mod blob;
pub mod cache;
mod codec;
mod commit;
pub mod compaction;
pub mod crypt;
#[cfg(test)]
mod dump;
pub mod error;
mod frame;
pub mod inspect;
pub mod jobs;
pub mod layout;
mod le;
pub mod levels;
mod manifest;
mod memtable;
pub mod merge;
pub mod options;
mod pacing;
mod pending;
pub mod purge;
pub mod record;
mod signal;
pub mod stats;
pub mod store;
pub mod table;
mod wal;

pub use ahead::AheadBudget;
pub use crypt::{KeyFileError, KeyId, Keys, MissingKey};
pub use error::{JobError, Newer, OpenError, ReadError, WriteError};
pub use frame::Mark;
pub use layout::Layout;
pub use manifest::Loss;
pub use memtable::Sealed;
pub use options::{ArchiveOptions, Fsync, Options};
pub use purge::PurgeFloors;
pub use record::{Entry, EntryRef, Kind, Record, ScanFrom};
pub use stats::{Counts, Stats};
pub use store::{
    ArchiveError, Cut, Damage, Decision, NewestStamp, Recovery, RedistributeError, Redistribution,
    ScanLimits, ScanPage, ScrubReport, SnapshotError, SnapshotReport, Store, Ticket, redistribute,
    remove_all,
};
