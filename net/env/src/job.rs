//! Work that leaves the shard: compaction, scrub, backup.

use std::future::Future;

use crate::Disk;

/// Which background executor a job is meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum JobClass {
    /// Flush: the memory that it frees is what writes wait for. Never runs at a low priority.
    Flush,
    /// Merging tables. Gives way to flushes and to the shards.
    Compaction,
    /// Checksum walks and backups: whatever time is left over.
    Scrub,
}

/// A piece of background work. It takes along all that it needs (file names, extents, settings, a
/// sealed memtable behind an `Arc`) and shares no mutable state with its shard, but for the counters by which the
/// shard paces it.
pub trait Job: Send + 'static {
    /// What goes back to the shard. Failures are part of it.
    type Output: Send + 'static;

    /// Does the work on the executor's own handle of the node's disk. Loops over data call
    /// [`Disk::give_way`].
    fn run<D: Disk>(self, disk: D) -> impl Future<Output = Self::Output>;
}
