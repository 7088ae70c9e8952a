//! Tables: immutable sorted files of one tree's records.
//!
//! Flushes and compactions write them ([`TableWriter`]), point reads and scans read them
//! ([`Table`], [`TableIter`]). The format is `docs/formats/table.md`.
//!
//! Invariants: entries ascend by (token, key), one entry a key; a token never spans two blocks; a
//! get costs at most one device read; damaged bytes are [`ReadError::Corrupt`](crate::ReadError),
//! never "absent"; a table is only listed by a manifest after [`TableWriter::finish`] has returned.
//!
//! Nothing here knows which tables are current, or in which order they are to be asked: that is
//! [`crate::levels`].

mod block;
mod block_builder;
pub(crate) mod body;
mod checksums;
pub(crate) mod chunk;
mod elias_fano;
mod fence;
mod filter;
pub(crate) mod format;
#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod fuzz_tests;
mod iter;
mod reader;
mod writer;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use torc_env::{Token, TreeId};

use crate::blob::{BlobRef, BlobUse};
use crate::crypt::KeyId;
use crate::record::Entry;

pub(crate) use block::Block;
pub(crate) use checksums::{blob_checksums_of, checksums_of};
pub use filter::FilterBits;
pub use iter::{Ahead, ReadAhead, TableIter};
pub use reader::{Found, Table};
pub(crate) use reader::{corrupt, footer_error, read};
pub use writer::{TableOptions, TableWriter};

/// What is known of a finished table: its footer, and its bounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableInfo {
    /// Names the file ([`table_path`]); never reused within a data directory.
    pub file_id: u64,
    /// The tree whose records it holds.
    pub tree: TreeId,
    /// Length of the file.
    pub bytes: u64,
    /// The master key that it is sealed with; `None` when it is in the clear.
    pub key: Option<KeyId>,
    /// Data blocks.
    pub blocks: u64,
    /// Records, tombstones included. A table has at least one.
    pub entries: u64,
    /// Records that are tombstones.
    pub tombstones: u64,
    /// Values with an expiry.
    pub expiring: u64,
    /// Sum of the keys' lengths.
    pub key_bytes: u64,
    /// Sum of the lengths of what stands for values in the table, before compression: the values, or
    /// references to them.
    pub value_bytes: u64,
    /// Lowest and highest sequence number.
    pub seqnos: Bounds,
    /// Lowest and highest stamp.
    pub stamps: Bounds,
    /// Lowest and highest expiry in milliseconds, over the values that have one; zeros without.
    pub expiries_ms: Bounds,
    /// Lowest and highest stamp over the tombstones and the records with an expiry; zeros without.
    pub purgeable_stamps: Bounds,
    /// Token of the first record.
    pub first_token: Token,
    /// Token of the last record.
    pub last_token: Token,
    /// Key of the first record.
    pub first_key: Bytes,
    /// Key of the last record.
    pub last_key: Bytes,
    /// The blobs that it refers to, ascending by id.
    pub blobs: Vec<BlobUse>,
}

impl TableInfo {
    /// What it has of a blob.
    pub(crate) fn blob(&self, file_id: u64) -> Option<&BlobUse> {
        let at = self
            .blobs
            .binary_search_by_key(&file_id, |blob| blob.file.file_id);
        self.blobs.get(at.ok()?)
    }
}

/// A record as a table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The record; without its value when that stands in a blob.
    pub entry: Entry,
    /// Where the value is, and in which table that is said; `None` when the record has it.
    pub separate: Option<Separate>,
}

/// A value that stands in a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Separate {
    /// The table that refers to it.
    pub table: u64,
    /// Where it is.
    pub reference: BlobRef,
}

impl Stored {
    /// A record that has its value.
    pub fn whole(entry: Entry) -> Stored {
        Stored {
            entry,
            separate: None,
        }
    }

    /// Bytes of the value, wherever it is.
    pub(crate) fn value_len(&self) -> usize {
        match &self.separate {
            Some(separate) => usize::try_from(separate.reference.raw_len).unwrap_or(usize::MAX),
            None => self.entry.record.value.len(),
        }
    }
}

/// A closed interval of numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bounds {
    /// The lowest.
    pub min: u64,
    /// The highest.
    pub max: u64,
}

impl Bounds {
    /// Widens the interval so that it holds `value`; `first` says that it held nothing so far.
    fn include(&mut self, value: u64, first: bool) {
        if first {
            *self = Bounds {
                min: value,
                max: value,
            };
        } else {
            self.min = self.min.min(value);
            self.max = self.max.max(value);
        }
    }
}

/// Where the table `file_id` lies in the directory of tables `dir`.
pub fn table_path(dir: &Path, file_id: u64) -> PathBuf {
    dir.join(format!("{file_id:016x}.table"))
}

/// The file id in the name of a table file, if it is one.
pub fn table_id(name: &str) -> Option<u64> {
    let id = name.strip_suffix(".table")?;
    (id.len() == 16).then(|| u64::from_str_radix(id, 16).ok())?
}
