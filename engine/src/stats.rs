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
    /// Updates that waited because flushes or compactions were behind.
    pub delayed: u64,
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
    /// Blocks of tables that point reads had to read, each one device read.
    pub table_reads: u64,
    /// Values read from blobs, each one device read.
    pub blob_reads: u64,
    /// Those of them that point reads wanted.
    pub blob_gets: u64,
    /// Records returned by scans.
    pub scanned: u64,
    /// Parts of tables found damaged: blocks, and tables that cannot be opened. Each counts once.
    pub corrupt_blocks: u64,
    /// Bytes of tables and blobs that scrubs have read through.
    pub scrubbed_bytes: u64,
    /// Memtables turned into tables.
    pub flushes: u64,
    /// Bytes of tables and blobs written by flushes.
    pub flushed_bytes: u64,
    /// Flushes that failed and are tried again.
    pub failed_flushes: u64,
    /// Compactions applied.
    pub compactions: u64,
    /// Bytes of tables and blobs written by compactions.
    pub compacted_bytes: u64,
    /// Bytes of blobs among what flushes and compactions wrote.
    pub blob_bytes_written: u64,
    /// Tables that went as a whole because nothing in them was needed any more.
    pub dropped_tables: u64,
    /// Compactions that failed.
    pub failed_compactions: u64,
    /// Records that compactions dropped by the purge rule.
    pub purged: u64,
    /// Log segments archived.
    pub archived_segments: u64,
    /// Bytes of their frames.
    pub archived_bytes: u64,
    /// Attempts to archive a segment that failed and are repeated.
    pub archive_failures: u64,
    /// Segments that the archive lacks: given up, or damaged before they were copied.
    pub archive_gaps: u64,
}

/// What [`crate::Store::stats`] returns. Sizes are in bytes, those of memory about right.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Counts since the open.
    pub counts: Counts,
    /// The record cache.
    pub cache: CacheStats,
    /// The block cache.
    pub blocks: CacheStats,
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
    /// Memory of fences, filters and bounds of open tables, and of open blobs.
    pub table_memory_bytes: usize,
    /// Size of all tables.
    pub table_bytes: u64,
    /// Open blobs.
    pub blobs: usize,
    /// Size of all blobs.
    pub blob_bytes: u64,
    /// What values take of them to which no table refers any more.
    pub blob_dead_bytes: u64,
    /// What there would be without older versions of keys, at least: of each tree its largest run with its values, or
    /// all runs where each key is written once (FIFO, time window).
    pub base_bytes: u64,
    /// What of it still counts: the rest belongs to parts that a compaction has taken out.
    pub live_bytes: u64,
    /// Runs of the tree that has most: the most filters that a read asks.
    pub runs_max: usize,
    /// Runs on level 0 of the tree that has most.
    pub level0_runs: usize,
    /// Levels below level 0 that hold tables, of the tree that has most.
    pub levels_max: usize,
    /// Bytes to be merged until every level is in shape.
    pub compaction_debt_bytes: u64,
    /// Trees whose purge floors are known.
    pub purge_floors: usize,
    /// Log segments that hold frames.
    pub wal_segments: usize,
    /// Their size.
    pub wal_live_bytes: u64,
    /// Full log segments that are not archived yet.
    pub archive_waiting: usize,
    /// Size of those that only the archive needs.
    pub archive_held_bytes: u64,
    /// Whether the last attempt to archive a segment failed.
    pub archive_failing: bool,
    /// Up to when the log was archived since the open, in microseconds since 1970; 0 before the first segment.
    pub archive_reach_us: u64,
    /// Whether values are refused for want of space.
    pub disk_full: bool,
    /// Whether nothing is written any more.
    pub poisoned: bool,
    /// Free space of the volume when last looked at.
    pub free_bytes: u64,
}

impl Stats {
    /// Bytes of tables and blobs written for each byte that came out of memory, since the open. The log writes
    /// one more. 0 before the first flush.
    pub fn write_amplification(&self) -> f64 {
        let written = self.counts.flushed_bytes + self.counts.compacted_bytes;
        ratio(written, self.counts.flushed_bytes)
    }

    /// Device reads, of tables and of blobs, for each point read that neither memtables nor the
    /// record cache answered. 0 before the first.
    pub fn read_amplification(&self) -> f64 {
        ratio(
            self.counts.table_reads + self.counts.blob_gets,
            self.cache.misses,
        )
    }

    /// Size of tables and blobs over [`Stats::base_bytes`]: an upper bound, which counts each record
    /// outside the largest run as if it replaced one inside. 0 without tables.
    pub fn space_amplification(&self) -> f64 {
        ratio(self.table_bytes + self.blob_bytes, self.base_bytes)
    }
}

/// Precise to one in 10^15.
#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 / whole as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amplifications_are_ratios_and_zero_before_there_is_anything() {
        let mut stats = Stats::default();
        let all = |stats: &Stats| {
            [
                stats.write_amplification(),
                stats.read_amplification(),
                stats.space_amplification(),
            ]
        };
        assert_eq!(all(&stats), [0.0; 3]);
        stats.counts.flushed_bytes = 100;
        stats.counts.compacted_bytes = 250;
        (stats.counts.table_reads, stats.cache.misses) = (6, 4);
        (stats.table_bytes, stats.base_bytes) = (9, 8);
        assert_eq!(all(&stats), [3.5, 1.5, 1.125]);
    }
}
