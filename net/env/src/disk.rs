//! The disk: files inside one node's data directory.
//!
//! Data goes past the page cache (O_DIRECT): buffers, offsets and lengths are whole sectors of
//! [`SECTOR_BYTES`](crate::SECTOR_BYTES). Nothing is durable before a sync says so; a new name is durable only
//! after [`Disk::sync_dir`] of its directory.

use std::future::Future;
use std::io;
use std::path::Path;

use crate::AlignedBuf;

/// How a file is opened. Every mode can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// The file must exist and cannot be written.
    Read,
    /// The file must exist.
    Write,
    /// The file must not exist.
    CreateNew,
    /// As [`OpenMode::Write`], and [`File::write_at`] returns only when its bytes are durable
    /// (O_DSYNC).
    WriteDurable,
    /// As [`OpenMode::CreateNew`], and [`File::write_at`] returns only when its bytes are durable.
    CreateNewDurable,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirEntry {
    /// File name without its directory.
    pub name: String,
    /// Length in bytes; 0 for a directory.
    pub len: u64,
    /// Whether this is a directory.
    pub is_dir: bool,
}

/// A node's data directory. Paths are relative to it. Cheap to clone.
///
/// Errors are those of the operating system. A full disk is
/// [`io::ErrorKind::StorageFull`].
pub trait Disk: Clone + 'static {
    /// An open file.
    type File: File;

    /// Opens a file. A created name is not durable before [`Disk::sync_dir`].
    fn open(&self, path: &Path, mode: OpenMode) -> impl Future<Output = io::Result<Self::File>>;

    /// Removes a file. Durable after [`Disk::sync_dir`]. Whoever has it open reads on; its space is free some time later.
    fn remove(&self, path: &Path) -> impl Future<Output = io::Result<()>>;

    /// Renames a file over whatever has the new name. Durable after [`Disk::sync_dir`].
    fn rename(&self, from: &Path, to: &Path) -> impl Future<Output = io::Result<()>>;

    /// Gives a file another name, which must not exist. Both names share the content until one of
    /// them is removed. Durable after [`Disk::sync_dir`] of the new name's directory.
    fn hard_link(&self, from: &Path, to: &Path) -> impl Future<Output = io::Result<()>>;

    /// The entries of a directory, sorted by name.
    fn list(&self, dir: &Path) -> impl Future<Output = io::Result<Vec<DirEntry>>>;

    /// Removes an empty directory. Durable after [`Disk::sync_dir`] of its parent.
    fn remove_dir(&self, dir: &Path) -> impl Future<Output = io::Result<()>>;

    /// Creates a directory and its parents; no error when it exists. Syncs the parents.
    fn create_dir(&self, dir: &Path) -> impl Future<Output = io::Result<()>>;

    /// Makes every creation, removal and rename in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> impl Future<Output = io::Result<()>>;

    /// Bytes of the file system, and bytes of it that are free to this process.
    fn space(&self) -> impl Future<Output = io::Result<Space>>;

    /// Lets other work of this executor run when the quantum is used up. Loops over data call it
    /// at least once for every 64 KiB.
    fn give_way(&self) -> impl Future<Output = ()>;
}

/// Size of a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Size of the file system.
    pub total_bytes: u64,
    /// What this process may still write.
    pub free_bytes: u64,
}

/// An open file. Clones share it; it is closed when the last one is dropped and its last operation
/// is done.
#[expect(
    clippy::len_without_is_empty,
    reason = "a question to the disk, not to a collection"
)]
pub trait File: Clone + 'static {
    /// Reads up to `buf.len()` bytes at `offset` into `buf` and returns how many; fewer only at the
    /// end of the file. `offset` and `buf.len()` are whole sectors.
    fn read_at(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> impl Future<Output = (io::Result<usize>, AlignedBuf)>;

    /// Writes all of `buf` at `offset`, or fails; after a failure any part of it may have been
    /// written. `offset` and `buf.len()` are whole sectors. Durable on return only in the durable
    /// modes.
    fn write_at(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> impl Future<Output = (io::Result<()>, AlignedBuf)>;

    /// Makes everything written before the call durable (fdatasync: content and length). After a
    /// failure nothing may be assumed about any earlier write, and a retry proves nothing.
    fn sync(&self) -> impl Future<Output = io::Result<()>>;

    /// Reserves space for `len` bytes from the start and extends the file to it, zero-filled.
    fn allocate(&self, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Cuts or extends the file to `len` bytes.
    fn set_len(&self, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Length in bytes.
    fn len(&self) -> impl Future<Output = io::Result<u64>>;
}
