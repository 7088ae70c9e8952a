//! Background jobs: a sealed memtable into tables ([`FlushJob`]), tables into tables
//! ([`CompactJob`]).
//!
//! Both run off the shard, on any executor that has the node's disk, and share nothing with it but how far
//! they may go ([`Pace`]): the shard reserves file ids beforehand, and puts the outputs into its levels and manifest afterwards.
//! When a job has succeeded, its outputs and their names are durable. When it has failed, nothing
//! counts, and what it had written is removed; names that even a removal left behind are orphans,
//! which the next open collects.

mod compact;
mod flush;
mod moved;
mod output;
mod pace;

pub use compact::{CompactJob, CompactOutput};
pub use flush::{FlushJob, FlushOutput};
pub use pace::Pace;
