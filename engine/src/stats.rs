//! What a store counts and holds, in plain numbers.

use crate::cache::CacheStats;

/// Counts since the open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Updates accepted.
    pub updates: u64,
    /// Updates refused because the disk is nearly full.
    pub refused_full: u64,
    /// Updates refused because a queue or memory is full.
    pub refused_overload: u64,
    /// Frames written to the log. Records divided by frames is the mean batch.
    pub wal_frames: u64,
    /// Bytes of these frames.
    pub wal_bytes: u64,
    /// Records in these frames.
    pub wal_records: u64,
    /// Syncs of the log, durable writes included.
    pub wal_syncs: u64,
    /// Point reads.
    pub gets: u64,
    /// Point reads answered by a memtable.
    pub memtable_hits: u64,
    /// Tables asked by point reads, each about one device read.
    pub table_reads: u64,
    /// Records returned by scans.
    pub scanned: u64,
    /// Parts of tables found damaged: blocks, and tables that cannot be opened. Each counts once.
    pub corrupt_blocks: u64,
    /// Bytes of tables that scrubs have read through.
    pub scrubbed_bytes: u64,
    /// Memtables turned into tables.
    pub flushes: u64,
    /// Bytes of tables written by flushes.
    pub flushed_bytes: u64,
    /// Flushes that failed and are tried again.
    pub failed_flushes: u64,
    /// Compactions applied.
    pub compactions: u64,
    /// Bytes of tables written by compactions.
    pub compacted_bytes: u64,
    /// Tables that went as a whole because nothing in them was needed any more.
    pub dropped_tables: u64,
    /// Compactions that failed.
    pub failed_compactions: u64,
    /// Records that compactions dropped by the purge rule.
    pub purged: u64,
}

/// What [`crate::Store::stats`] returns. Sizes are in bytes, those of memory about right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Counts since the open.
    pub counts: Counts,
    /// The record cache.
    pub cache: CacheStats,
    /// Memory of all memtables.
    pub memtable_bytes: usize,
    /// Records in the active memtable.
    pub memtable_entries: usize,
    /// Memtables waiting for their flush.
    pub sealed_memtables: usize,
    /// Memory of updates that are not durable yet.
    pub pending_bytes: usize,
    /// Keys of such updates.
    pub pending_keys: usize,
    /// The highest sequence number given.
    pub seqno: u64,
    /// Trees with tables.
    pub trees: usize,
    /// Open tables.
    pub tables: usize,
    /// Memory of fences, filters and bounds of open tables.
    pub table_memory_bytes: usize,
    /// Size of all tables.
    pub table_bytes: u64,
    /// What of it still counts: the rest belongs to parts that a compaction has taken out.
    pub live_bytes: u64,
    /// Runs of the tree that has most: the most filters that a read asks.
    pub runs_max: usize,
    /// Runs on level 0 of the tree that has most.
    pub level0_runs: usize,
    /// Bytes to be merged until every level is in shape.
    pub compaction_debt_bytes: u64,
    /// Trees whose purge floors are known.
    pub purge_floors: usize,
    /// Log segments that hold frames.
    pub wal_segments: usize,
    /// Their size.
    pub wal_live_bytes: u64,
    /// Whether values are refused for want of space.
    pub disk_full: bool,
    /// Whether nothing is written any more.
    pub poisoned: bool,
    /// Free space of the volume when last looked at.
    pub free_bytes: u64,
}
