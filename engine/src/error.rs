//! What can go wrong outside the program: disk faults and limits. Absence is a value, not an error.

use std::io;
use std::path::PathBuf;
use std::rc::Rc;

use torc_env::Token;

use crate::crypt::MissingKey;

/// What only a newer version of the program reads: whole, as its checksum says, and so no damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Newer {
    /// Another format.
    #[error("format version {found}, this program reads up to {known}")]
    Version {
        /// The version in the file.
        found: u16,
        /// The newest version that this program reads.
        known: u16,
    },
    /// Features that a reader must know.
    #[error(
        "features {found:04x} in format version {version}, this program does not know all of them"
    )]
    Features {
        /// The version in the file.
        version: u16,
        /// A bit for each feature.
        found: u16,
    },
}

/// Why a read has no answer. Never to be taken for "absent".
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Bytes on disk are not what was written there.
    #[error("{}: corrupt at offset {offset}: {detail}", path.display())]
    Corrupt {
        /// The file, relative to the data directory.
        path: PathBuf,
        /// Where in it, in bytes.
        offset: u64,
        /// What was expected and what was found.
        detail: String,
    },
    /// A record's value, which stands in a blob, is not what was written there.
    #[error("{}: corrupt value at offset {offset}, of table {table:016x}: {detail}", path.display())]
    CorruptValue {
        /// The blob, relative to the data directory.
        path: PathBuf,
        /// Where in it, in bytes.
        offset: u64,
        /// What was expected and what was found.
        detail: String,
        /// The table that refers to it.
        table: u64,
        /// The record's token.
        token: Token,
    },
    /// The device refused.
    #[error("{}: cannot read at offset {offset}", path.display())]
    Io {
        /// The file, relative to the data directory.
        path: PathBuf,
        /// Where in it, in bytes.
        offset: u64,
        /// What the device said.
        source: io::Error,
    },
    /// Encrypted with a key that was not given.
    #[error("{}: {source}", path.display())]
    Key {
        /// The file, relative to the data directory.
        path: PathBuf,
        /// Which key is missing.
        source: MissingKey,
    },
    /// Written by a newer version of the program.
    #[error("{}: {newer}", path.display())]
    Newer {
        /// The file, relative to the data directory.
        path: PathBuf,
        /// What is new.
        newer: Newer,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl ReadError {
    /// Whether the device gave something, and it is not what was written.
    pub fn is_corrupt(&self) -> bool {
        matches!(
            self,
            ReadError::Corrupt { .. } | ReadError::CorruptValue { .. }
        )
    }

    /// This error, met with the value of a record with this token that `table` has.
    pub(crate) fn of_value(self, table: u64, token: Token) -> ReadError {
        match self {
            ReadError::Corrupt {
                path,
                offset,
                detail,
            } => ReadError::CorruptValue {
                path,
                offset,
                detail,
                table,
                token,
            },
            other => other,
        }
    }
}

/// Why a background job (flush, compaction) gave up. Its inputs are untouched.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// An input cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// An output cannot be written.
    #[error("{}: cannot write", path.display())]
    Write {
        /// The file, relative to the data directory.
        path: PathBuf,
        /// What the device said.
        source: io::Error,
    },
}

impl JobError {
    /// Whether the only trouble is a full disk, which passes.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, JobError::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }
}

/// Why an update is not acknowledged.
#[derive(Clone, Debug, thiserror::Error)]
pub enum WriteError {
    /// The disk is nearly full: values are refused, deletions are not. Nothing was written.
    #[error("the disk is nearly full")]
    DiskFull,
    /// More work is queued than the store may hold. Nothing was written; later it may be.
    #[error("overloaded: {what}")]
    Overloaded {
        /// Which bound was met.
        what: &'static str,
    },
    /// A write or sync of the log or manifest failed. The store writes nothing more until it is
    /// opened again.
    #[error("the store is poisoned: {cause}")]
    Poisoned {
        /// The first failure.
        cause: Rc<str>,
        /// Whether this update had been handed to the device before.
        in_doubt: bool,
    },
    /// Key or value is above its limit. Nothing was written.
    #[error("record of {bytes} bytes is above the limit of {bytes_max}")]
    TooLarge {
        /// Size of key and value.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The current state of the key cannot be read, so nothing was decided and nothing written.
    #[error("cannot read the current state: {0}")]
    Read(Rc<ReadError>),
    /// A background job asked for could not be done. Nothing is lost, and it may be asked for
    /// again.
    #[error("cannot write tables: {0}")]
    Job(Rc<JobError>),
    /// The store was closed before this update was handed to the device.
    #[error("the store is closed")]
    Closed,
}

impl WriteError {
    /// Whether the update may have become (or may yet become) part of the store all the same.
    pub fn in_doubt(&self) -> bool {
        matches!(self, WriteError::Poisoned { in_doubt: true, .. })
    }
}

/// What to do about a file without which nobody can say what a store holds.
pub(crate) const PUT_BACK: &str = "put it back, or restore this node from a backup (`torc restore`): a start without it would lose acknowledged writes";

/// Why a store cannot be opened. Nothing was deleted.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device refused. An unreadable log is not an empty one.
    #[error("{}: cannot {doing}", path.display())]
    Io {
        /// The file or directory, relative to the data directory.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the device said.
        source: io::Error,
    },
    /// The manifest, or a file that it lists, is damaged or missing.
    #[error("{}: corrupt at offset {offset}: {detail}", path.display())]
    Corrupt {
        /// The file, relative to the data directory.
        path: PathBuf,
        /// Where in it, in bytes.
        offset: u64,
        /// What was expected and what was found.
        detail: String,
    },
    /// Written by a newer version of the program.
    #[error("{}: {newer}; start a newer program: nothing was changed", path.display())]
    Newer {
        /// The file, relative to the data directory.
        path: PathBuf,
        /// What is new.
        newer: Newer,
    },
    /// Encrypted with a key that was not given.
    #[error("{}: {source}", path.display())]
    Key {
        /// The file, relative to the data directory.
        path: PathBuf,
        /// Which key is missing.
        source: MissingKey,
    },
}

impl From<ReadError> for OpenError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Corrupt {
                path,
                offset,
                detail,
            }
            | ReadError::CorruptValue {
                path,
                offset,
                detail,
                ..
            } => OpenError::Corrupt {
                path,
                offset,
                detail,
            },
            ReadError::Io { path, source, .. } => OpenError::Io {
                path,
                doing: "read",
                source,
            },
            ReadError::Key { path, source } => OpenError::Key { path, source },
            ReadError::Newer { path, newer } => OpenError::Newer { path, newer },
            ReadError::Closed => unreachable!("an opening store is not closed"),
        }
    }
}
