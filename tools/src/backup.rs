//! Backups in a directory: what `torc backup` makes and `torc restore` reads.
//!
//! A backup is a list of files with their checksums. Tables never change, so backups of one node share
//! them. Format page: `docs/formats/backup.md`.
//!
//! Invariant: a backup counts only with its `backup.json`, which is written after all that it lists is
//! durable.

pub mod archive;
pub mod copy;
pub mod log;
pub mod moment;
pub mod restore;
