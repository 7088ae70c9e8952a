//! The log archive: whole segments of the log, kept in another directory after the store needs them no more, so that
//! a backup can be brought forward to any later moment.
//!
//! Not on a request's path. A store copies each segment that is full ([`crate::store`]), and does not recycle it before its copy is
//! durable; `torc restore` lists what there is ([`plan`]), and hands the records on ([`read`]).
//!
//! An archived segment is the segment's frames as they were written, sealed ones too, and a *trailer* ([`trailer`]),
//! which says whose they are and which they are. Frames of a store form one chain over all its segments,
//! so a segment that is missing is found without a list of them.
//!
//! Invariants: a file with a segment's name is whole (it is written under another name, synced and renamed); a segment of the log is
//! recycled after that, or is counted as given up.
//!
//! It does not know what a record means, nor the moment of a record: the reader of records decides which of them it takes.
//! Format: `docs/formats/archive.md`.

pub(crate) mod copy;
pub mod plan;
pub mod read;
pub mod trailer;

pub use crate::wal::SegmentId;
