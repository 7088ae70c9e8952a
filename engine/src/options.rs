//! Every bound of a store, with unit, default and reason.

use std::path::PathBuf;
use std::time::Duration;

use crate::archive::trailer::Origin;
use crate::compaction::Strategy;
use crate::crypt::Keys;

/// When an update counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    /// Each acknowledgement waits for a durable frame that holds its update. Updates that come
    /// while a frame is being written still share the next one.
    Always,
    /// The same promise. The difference is in how the writer gathers: it lets everything that is
    /// runnable in this turn of the shard join the frame before it is submitted.
    Group,
    /// Acknowledged once written; synced at least this often. A power cut loses at most the last
    /// interval.
    Interval(Duration),
    /// Acknowledged once written; the device decides when it is durable.
    Never,
}

impl Fsync {
    /// Whether an acknowledgement means durable.
    pub fn is_synced(self) -> bool {
        matches!(self, Fsync::Always | Fsync::Group)
    }
}

/// Where and how full segments of the log are archived.
#[derive(Clone, Debug)]
pub struct ArchiveOptions {
    /// Directory of this store's segments below the data directory. Made when it is missing.
    pub dir: PathBuf,
    /// What each archived segment says of its origin.
    pub origin: Origin,
    /// Segments that are kept only because they are not archived yet, in bytes; beyond it the oldest is given up.
    /// Default 1 GiB.
    pub held_bytes_max: u64,
    /// The segment that is written is archived at least this often, full or not, used or not. Default: only full ones.
    pub interval: Option<Duration>,
}

impl ArchiveOptions {
    /// Defaults, for segments in `dir`.
    pub fn new(dir: impl Into<PathBuf>, origin: Origin) -> Self {
        Self {
            dir: dir.into(),
            origin,
            held_bytes_max: 1 << 30,
            interval: None,
        }
    }
}

/// Settings of one store. Sizes are clamped at open to what the volume allows (see
/// [`Options::clamped`]).
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of this store below the data directory, as in `shard-00`.
    pub dir: PathBuf,
    /// The lowest id that a table file gets; see [`Layout`](crate::Layout). Default 1.
    pub file_id_first: u64,
    /// Whether this store has been opened before, as its owner remembers: where nothing of it is found, everything is
    /// lost then ([`crate::Store::losses`]), and it is no fresh one. Default false.
    pub was_here: bool,
    /// When an update counts as done. Default: group.
    pub fsync: Fsync,
    /// Master keys. What the store writes is encrypted with the active one; [`crate::Store::set_keys`]
    /// changes them later. Default: none, everything is written in the clear.
    pub keys: Keys,
    /// Memory of all memtables, active and sealed. The active one is sealed when it has 15/32 of it: as much may come
    /// while that is flushed, and 1/16 is left for when that takes longer than was expected. Default 64 MiB.
    pub memtable_bytes: usize,
    /// Memory of the record and block caches. Default 64 MiB.
    pub cache_bytes: usize,
    /// Percent of it that blocks may take, 0 to 100; records have what blocks do not take. Default 50.
    pub cache_blocks_percent: u8,
    /// Memory of what scans read, all of them together, with the records of their pages until these are returned: those that would
    /// need more wait, and pages end early. Default 16 MiB: as much as four of them read of 32 runs at full width, or 32 of them
    /// block by block.
    pub scan_bytes_max: usize,
    /// Size of a WAL segment. Default 64 MiB.
    pub wal_segment_bytes: u64,
    /// Live WAL segments above which the active memtable is sealed so that the oldest can go.
    /// Default 4.
    pub wal_segments_max: usize,
    /// Largest payload of a WAL frame with more than one record. Default 1 MiB: beyond it the
    /// device gains nothing, and waiting grows.
    pub wal_batch_bytes_max: usize,
    /// Records accepted but not yet durable, in bytes; beyond it updates are refused.
    /// Default 32 MiB.
    pub pending_bytes_max: usize,
    /// Largest key. Default 64 KiB - 1.
    pub key_bytes_max: usize,
    /// Largest value. Default 16 MiB.
    pub value_bytes_max: usize,
    /// What a table block is filled towards before compression. Default 8 KiB.
    pub block_bytes: usize,
    /// Largest table. Default 64 MiB.
    pub table_bytes_max: u64,
    /// Values of at least so many bytes go to blobs when they are flushed or merged; `None`: none does. Default
    /// 8 KiB: two pages, from where on the second read that a separated value costs is no more than what
    /// the value alone takes, and merging it again and again costs more than that.
    pub separate_from: Option<usize>,
    /// A blob is emptied when so many percent of what its values take are dead, 1 to 100. Default 50: at worst each
    /// value is written once more for each that was overwritten.
    pub blob_dead_percent: u8,
    /// How a tree is compacted whose strategy nobody has set; `None` leaves it alone until somebody
    /// has. Default hybrid.
    pub strategy: Option<Strategy>,
    /// Runs on level 0 that start a compaction. Default 4.
    pub level0_runs: usize,
    /// Runs on level 0 at which updates are refused. Default 32.
    pub level0_runs_max: usize,
    /// Size ratio between neighbouring levels. Default 8.
    pub level_ratio: u64,
    /// Largest input of one compaction. Default 256 MiB.
    pub compaction_bytes_max: u64,
    /// Longest time that an update waits for its turn when flushes and compactions are behind, and again, before it and after
    /// it has read, for room in memory; one that would wait longer is refused. Default 500 ms: longer would only hide the
    /// overload from whoever can send less.
    pub wait_max: Duration,
    /// Free space below which values are refused, in bytes; raised at open to what one flush of
    /// every shard needs. Default 0 (only what is needed).
    pub reserve_bytes: u64,
    /// Where full segments of the log are archived. Default: nowhere, they are recycled.
    pub archive: Option<ArchiveOptions>,
}

/// Smallest WAL segment, in bytes.
pub const WAL_SEGMENT_BYTES_MIN: u64 = 1 << 20;
/// Smallest memtable budget on a small volume, in bytes.
pub const MEMTABLE_BYTES_MIN: usize = 1 << 20;

impl Options {
    /// Defaults, for a store in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            file_id_first: 1,
            was_here: false,
            fsync: Fsync::Group,
            keys: Keys::default(),
            memtable_bytes: 64 << 20,
            cache_bytes: 64 << 20,
            cache_blocks_percent: 50,
            scan_bytes_max: 16 << 20,
            wal_segment_bytes: 64 << 20,
            wal_segments_max: 4,
            wal_batch_bytes_max: 1 << 20,
            pending_bytes_max: 32 << 20,
            key_bytes_max: 65_535,
            value_bytes_max: 16 << 20,
            block_bytes: 8 << 10,
            table_bytes_max: 64 << 20,
            separate_from: Some(8 << 10),
            blob_dead_percent: 50,
            strategy: Some(Strategy::Hybrid),
            level0_runs: 4,
            level0_runs_max: 32,
            level_ratio: 8,
            compaction_bytes_max: 256 << 20,
            wait_max: Duration::from_millis(500),
            reserve_bytes: 0,
            archive: None,
        }
    }

    /// These settings made to fit a volume of `total_bytes` shared by `shard_count` stores: a
    /// segment takes at most 1/64 of a shard's part and the memtables 1/32 (a flush needs as much
    /// again), the reserve covers a new segment and a flush of every shard, and what waits for the archive alone
    /// takes at most 1/16.
    pub fn clamped(mut self, total_bytes: u64, shard_count: u16) -> Self {
        let share = total_bytes / u64::from(shard_count.max(1));
        self.wal_segment_bytes = self
            .wal_segment_bytes
            .min(share / 64)
            .max(WAL_SEGMENT_BYTES_MIN)
            .next_multiple_of(1 << 16);
        let memtable = usize::try_from(share / 32).unwrap_or(usize::MAX);
        // The least is for small volumes; who asks for less, gets it.
        self.memtable_bytes = self.memtable_bytes.min(memtable.max(MEMTABLE_BYTES_MIN));
        let flush_bytes = u64::try_from(self.memtable_bytes).unwrap_or(u64::MAX);
        let needed = self
            .wal_segment_bytes
            .saturating_add(flush_bytes)
            .saturating_mul(u64::from(shard_count.max(1)));
        self.reserve_bytes = self.reserve_bytes.max(needed.min(total_bytes / 4));
        if let Some(archive) = &mut self.archive {
            archive.held_bytes_max = archive.held_bytes_max.min(share / 16);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_volume_gets_small_segments_and_memtables() {
        let options = Options::new("shard-00").clamped(256 << 20, 2);
        assert_eq!(options.wal_segment_bytes, 2 << 20);
        assert_eq!(options.memtable_bytes, 4 << 20);
        assert!(options.reserve_bytes >= 12 << 20 && options.reserve_bytes <= 64 << 20);
        let options = Options::new("shard-00").clamped(1 << 40, 2);
        assert_eq!(options.wal_segment_bytes, 64 << 20);
        assert_eq!(options.memtable_bytes, 64 << 20);
        let asked = Options {
            memtable_bytes: 16 << 10,
            ..Options::new("shard-00")
        };
        assert_eq!(asked.clamped(256 << 20, 2).memtable_bytes, 16 << 10);
    }
}
