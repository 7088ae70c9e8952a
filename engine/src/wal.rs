//! The write-ahead log: where an update becomes durable before anyone sees it.
//!
//! Stands between the commit task, which hands it frame after frame, and the disk. Frames
//! ([`crate::frame`]) go one behind the other into *segments*: preallocated files, written ahead
//! with zeros (a synced overwrite of written blocks costs two thirds of one that allocates), and
//! recycled under a new identity when the memtables that they back are in tables.
//!
//! Invariants: a frame that says another is durable was begun after that one had been written; a sector that was acknowledged is never written
//! again during its segment's life; after a start a new segment is begun, never an old tail
//! continued; a segment holds nothing before the manifest lists it. Format and crash states:
//! `docs/formats/wal.md`.
//!
//! A sealed segment has a data key of its own, under which a sequence number is used once.
//!
//! It does not decide what to acknowledge, and does not know the keys of records.

mod chain;
#[cfg(test)]
mod format_tests;
mod log;
mod payload;
mod replay;
mod segment;

use crate::frame::Format;

pub(crate) use log::{FrameMeta, Log};
pub(crate) use payload::{decode, encode, encoded_bytes};
pub(crate) use replay::{Reader, Replayed, replay};
pub use segment::SegmentId;
pub(crate) use segment::{Segment, SegmentPlan};

/// Frames of the write-ahead log.
pub(crate) const FORMAT: Format = Format {
    magic: u32::from_le_bytes(*b"TWAL"),
    version: 1,
    sealed_version: Some(2),
};

/// Frame flag: its records were acknowledged when written, not when durable.
pub(crate) const FLAG_UNSYNCED: u16 = 1;
/// Frame flag: the store was closed with this frame; nothing follows.
pub(crate) const FLAG_CLOSED: u16 = 2;
