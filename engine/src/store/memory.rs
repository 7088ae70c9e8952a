//! What the store holds in memory: pending batches, the active memtable, the sealed ones.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use ahash::RandomState;
use torc_env::{Token, TokenRange, TreeId, mutation};

use crate::cache::RecordCache;
use crate::commit::{Batch, Fate, Gather};
use crate::frame::Mark;
use crate::le::len64;
use crate::memtable::{Arena, Memtable, Packed, Sealed};
use crate::options::Options;
use crate::pending::Pending;
use crate::record::{Entry, EntryRef, Record, ScanFrom};
use crate::stats::Stats;

/// What updates may fill of a budget for memtables when they come as fast as these are flushed. The rest is for those that come
/// before it is noticed that a flush takes longer than was expected: without it all would have to stop then.
pub(super) fn fillable(budget_bytes: usize) -> usize {
    budget_bytes - budget_bytes / 16
}

/// A memtable on its way into tables.
#[derive(Clone)]
pub(super) struct SealedSlot {
    pub(super) memtable: Arc<Sealed>,
    /// All frames up to here are in it, in older ones, or in tables.
    pub(super) through: Mark,
}

/// The state. Records enter as pending, move to the active memtable when durable, and leave with
/// a sealed one.
pub(super) struct Memory {
    range: TokenRange,
    arena: Arena,
    pub(super) gather: Gather,
    pending: Pending,
    active: Memtable,
    /// Oldest first.
    sealed: VecDeque<SealedSlot>,
    /// The last frame whose records are in the active memtable, or before.
    through: Mark,
    /// The last frame whose records are in sealed memtables or tables.
    covered: Mark,
    /// The highest number given to a record.
    seqno: u64,
    /// Records of these trees up to these numbers are gone.
    dropped: BTreeMap<TreeId, u64>,
    /// Batches taken by the commit task and not yet completed.
    in_flight_bytes: usize,
}

/// The newest state of a key in memory, pending records included.
pub(super) enum Newest {
    /// Not durable yet.
    Pending(Record, Rc<Fate>),
    /// Durable.
    Durable(Record),
    /// Not in memory.
    Absent,
}

impl Memory {
    pub(super) fn new(
        range: TokenRange,
        hasher: RandomState,
        through: Mark,
        seqno: u64,
        dropped: BTreeMap<TreeId, u64>,
        memtable_bytes: usize,
    ) -> Self {
        Self {
            range,
            arena: Arena::keeping(memtable_bytes),
            gather: Gather::default(),
            pending: Pending::new(hasher),
            active: Memtable::new(range),
            sealed: VecDeque::new(),
            through,
            covered: through,
            seqno,
            dropped,
            in_flight_bytes: 0,
        }
    }

    /// Numbers and gathers a record.
    pub(super) fn submit(
        &mut self,
        tree: TreeId,
        token: Token,
        key: &[u8],
        record: &Record,
        options: &Options,
    ) -> Rc<Fate> {
        self.seqno += 1;
        let packed = self.arena.pack(&record.at(token, key, self.seqno));
        let fate = self
            .gather
            .push(tree, packed.clone(), options.wal_batch_bytes_max);
        if mutation::on("show_unsynced") {
            self.active.insert(tree, packed.clone());
        }
        self.pending.insert(tree, packed, Rc::clone(&fate));
        fate
    }

    /// The oldest gathered batch, to be written now.
    pub(super) fn take_batch(&mut self) -> Option<Batch> {
        let batch = self.gather.pop()?;
        self.in_flight_bytes += batch.payload_len();
        Some(batch)
    }

    /// Makes the records of a batch visible, now that its frame `mark` is as durable as promised.
    pub(super) fn complete(&mut self, batch: &mut Batch, mark: Mark, cache: &RecordCache) {
        for (tree, packed) in batch.entries.drain(..) {
            self.pending.remove(tree, &packed);
            if self.is_current(tree, packed.seqno) {
                let (token, body) = (packed.token, packed.clone());
                // Once for each memtable: as long as the key is in one, nothing of it is cached.
                if self.active.insert(tree, packed) {
                    cache.outdate(tree, token, body.key());
                }
            }
        }
        self.through = mark;
        self.in_flight_bytes -= batch.payload_len();
    }

    /// Takes a record from the log, at open.
    pub(super) fn replay(&mut self, tree: TreeId, entry: &EntryRef<'_>) {
        self.seqno = self.seqno.max(entry.seqno);
        let packed = self.arena.pack(entry);
        self.apply(tree, packed);
    }

    /// The log was replayed through this frame, or went on to it without a record.
    pub(super) fn passed(&mut self, mark: Mark) {
        self.through = mark;
    }

    fn apply(&mut self, tree: TreeId, packed: Packed) {
        if self.is_current(tree, packed.seqno) {
            self.active.insert(tree, packed);
        }
    }

    fn is_current(&self, tree: TreeId, seqno: u64) -> bool {
        self.dropped.is_empty() || self.dropped.get(&tree).is_none_or(|last| seqno > *last)
    }

    /// The durable record of a key, if it is in memory.
    pub(super) fn get(&self, tree: TreeId, token: Token, key: &[u8]) -> Option<Record> {
        self.find(tree, token, key).map(Packed::record)
    }

    /// The record of an entry that was found in a memtable, if it is still its key's newest durable one.
    pub(super) fn still_newest(&self, tree: TreeId, entry: &EntryRef<'_>) -> Option<Record> {
        self.find(tree, entry.token, entry.key)
            .filter(|packed| packed.seqno == entry.seqno)
            .map(Packed::record)
    }

    fn find(&self, tree: TreeId, token: Token, key: &[u8]) -> Option<&Packed> {
        if let Some(packed) = self.active.get(tree, token, key) {
            return Some(packed);
        }
        let mut sealed = self.sealed.iter().rev();
        sealed
            .find_map(|slot| slot.memtable.as_memtable().get(tree, token, key))
            .filter(|packed| self.is_current(tree, packed.seqno))
    }

    /// The newest record of a key that is in memory.
    pub(super) fn newest(&self, tree: TreeId, token: Token, key: &[u8]) -> Newest {
        if let Some(waiting) = self.pending.get(tree, token, key) {
            // A record from before its tree was dropped no longer counts, but is still written.
            if self.is_current(tree, waiting.packed.seqno) {
                return Newest::Pending(waiting.packed.record(), Rc::clone(&waiting.fate));
            }
        }
        match self.find(tree, token, key) {
            Some(packed) => Newest::Durable(packed.record()),
            None => Newest::Absent,
        }
    }

    /// The first `count` durable records in memory from `from` to the end of `last`, ascending,
    /// one a key.
    pub(super) fn range(
        &self,
        tree: TreeId,
        from: &ScanFrom,
        last: Token,
        count: usize,
    ) -> Vec<Entry> {
        let mut tables: Vec<_> = self
            .sealed
            .iter()
            .map(|slot| slot.memtable.as_memtable())
            .chain([&self.active])
            .map(|memtable| memtable.range(tree, from, last).peekable())
            .collect();
        let mut entries = Vec::new();
        while entries.len() < count {
            // Younger memtables stand behind older ones, so the last of several equals is newest.
            let mut best: Option<&Packed> = None;
            for table in &mut tables {
                if let Some(packed) = table.peek()
                    && best.is_none_or(|best| packed.cmp_key(best.token, best.key()).is_le())
                {
                    best = Some(packed);
                }
            }
            let Some(best) = best else { break };
            for table in &mut tables {
                table.next_if(|packed| packed.cmp_key(best.token, best.key()).is_eq());
            }
            if self.is_current(tree, best.seqno) {
                entries.push(best.entry());
            }
        }
        entries
    }

    /// Records of a tree in memory for each that a whole ring of them would hold, were they all over it as in the shard's slice.
    pub(super) fn per_ring(&self, tree: TreeId) -> u128 {
        let sealed = self.sealed.iter().map(|slot| slot.memtable.as_memtable());
        let entries = sealed
            .chain([&self.active])
            .map(|memtable| memtable.entries_of(tree));
        let width = ((self.range.last.0 - self.range.first.0) >> 64) + 1;
        (u128::from(len64(entries.sum())) << 64) / width
    }

    /// Forgets a tree; returns the number up to which its records are gone.
    pub(super) fn drop_tree(&mut self, tree: TreeId) -> u64 {
        self.dropped.insert(tree, self.seqno);
        self.active.drop_tree(tree);
        self.seqno
    }

    /// The number up to which a tree's records are gone; 0 when it was not dropped.
    pub(super) fn dropped_through(&self, tree: TreeId) -> u64 {
        self.dropped.get(&tree).copied().unwrap_or(0)
    }

    /// Closes the active memtable, even an empty one when it covers frames: flushing that lets
    /// their segments go. Returns whether there was anything to close.
    pub(super) fn seal(&mut self) -> bool {
        if self.active.is_empty() && self.covered == self.through {
            return false;
        }
        self.covered = self.through;
        let full = std::mem::replace(&mut self.active, Memtable::new(self.range));
        self.sealed.push_back(SealedSlot {
            memtable: Arc::new(full.seal()),
            through: self.through,
        });
        true
    }

    /// The sealed memtable that is flushed first.
    pub(super) fn oldest_sealed(&self) -> Option<SealedSlot> {
        self.sealed.front().cloned()
    }

    /// Lets go of the oldest sealed memtable: its records are in tables. The caller drops it.
    pub(super) fn pop_sealed(&mut self) -> Option<SealedSlot> {
        self.sealed.pop_front()
    }

    /// Frames up to here are in memtables or tables.
    pub(super) fn through(&self) -> Mark {
        self.through
    }

    /// The highest number given to a record.
    pub(super) fn seqno(&self) -> u64 {
        self.seqno
    }

    /// Memtables waiting for their flush.
    pub(super) fn sealed_count(&self) -> usize {
        self.sealed.len()
    }

    /// Whether the active memtable has used up its half of what updates may fill, or the whole of it with
    /// what was replaced.
    pub(super) fn is_active_full(&self, budget_bytes: usize) -> bool {
        let bytes = fillable(budget_bytes);
        self.active.memory_bytes() >= bytes / 2 || self.active.inserted_bytes() >= bytes
    }

    /// Memory of all memtables.
    pub(super) fn memtable_bytes(&self) -> usize {
        self.active.memory_bytes() + self.sealed_bytes()
    }

    /// Memory of those that wait for their flush.
    pub(super) fn sealed_bytes(&self) -> usize {
        let sealed = self.sealed.iter();
        sealed.map(|slot| slot.memtable.memory_bytes()).sum()
    }

    /// Bytes of records accepted and not yet durable.
    pub(super) fn pending_bytes(&self) -> usize {
        self.gather.bytes() + self.in_flight_bytes
    }

    /// Gives up all that waits; returns the batches, to be failed.
    pub(super) fn drain_pending(&mut self) -> Vec<Batch> {
        self.pending.clear();
        std::iter::from_fn(|| self.gather.pop()).collect()
    }

    pub(super) fn add_stats(&self, stats: &mut Stats) {
        stats.memtable_bytes = self.memtable_bytes();
        stats.memtable_entries = self.active.len();
        stats.sealed_memtables = self.sealed.len();
        stats.pending_bytes = self.pending.memory_bytes() + self.pending_bytes();
        stats.pending_keys = self.pending.len();
        stats.seqno = self.seqno;
    }
}
