//! The queues of the record cache: S3-FIFO over a slab, with a byte budget.

use std::collections::VecDeque;

use bytes::Bytes;
use hashbrown::{HashTable, hash_table};
use torc_env::{Token, TreeId};

use crate::record::Record;

/// The small queue's share of the budget: 1/10, as in the paper.
const SMALL_SHARE: usize = 10;
/// Hits beyond this are not counted. Two bits, as in the paper.
const HITS_MAX: u8 = 3;
/// A key must have been hit so often in the small queue to move to the main one.
const HITS_TO_STAY: u8 = 1;
/// What an entry costs besides its key and value: the slot, its places in index and queue, and a
/// share of the ghosts.
const ENTRY_BYTES: usize = size_of::<Option<Entry>>() + 32;

/// What an entry says about its key.
enum State {
    /// The newest synced state: a record, or that there is none.
    Known(Option<Record>),
    /// A newer one is in a memtable. The entry keeps the key's place, for when that is flushed.
    Outdated,
}

/// A key's place in the cache.
pub(super) struct Entry {
    hash: u64,
    tree: TreeId,
    token: Token,
    key: Box<[u8]>,
    state: State,
    hits: u8,
    is_main: bool,
}

impl Entry {
    /// Of a key whose newest synced state is `record`.
    pub(super) fn known(
        hash: u64,
        tree: TreeId,
        token: Token,
        key: &[u8],
        record: Option<&Record>,
    ) -> Entry {
        Entry {
            hash,
            tree,
            token,
            key: key.into(),
            state: State::Known(record.cloned()),
            hits: 0,
            is_main: false,
        }
    }

    fn is_of(&self, tree: TreeId, token: Token, key: &[u8]) -> bool {
        self.token == token && self.tree == tree && *self.key == *key
    }

    fn bytes(&self) -> usize {
        let value = match &self.state {
            State::Known(Some(record)) => record.value.len(),
            State::Known(None) | State::Outdated => 0,
        };
        ENTRY_BYTES + self.key.len() + value
    }
}

/// Entries, an index over them, two queues, and the hashes of those that left the small one.
pub(super) struct S3Fifo {
    budget_bytes: usize,
    slots: Vec<Option<Entry>>,
    free: Vec<usize>,
    index: HashTable<usize>,
    small: VecDeque<usize>,
    main: VecDeque<usize>,
    small_bytes: usize,
    main_bytes: usize,
    ghosts: Ghosts,
    evictions: u64,
}

impl S3Fifo {
    pub(super) fn new(budget_bytes: usize) -> S3Fifo {
        S3Fifo {
            budget_bytes,
            slots: Vec::new(),
            free: Vec::new(),
            index: HashTable::new(),
            small: VecDeque::new(),
            main: VecDeque::new(),
            small_bytes: 0,
            main_bytes: 0,
            ghosts: Ghosts::default(),
            evictions: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.small_bytes + self.main_bytes
    }

    pub(super) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// The newest synced state of a key, if that is known; it counts as a hit.
    pub(super) fn hit(
        &mut self,
        hash: u64,
        tree: TreeId,
        token: Token,
        key: &[u8],
    ) -> Option<Option<Record>> {
        let slot = self.find(hash, tree, token, key)?;
        let entry = self.slots[slot].as_mut()?;
        let State::Known(record) = &entry.state else {
            return None;
        };
        entry.hits = (entry.hits + 1).min(HITS_MAX);
        Some(record.clone())
    }

    /// A newer state of a key is in a memtable: what is known of it is forgotten, its place kept.
    pub(super) fn outdate(&mut self, hash: u64, tree: TreeId, token: Token, key: &[u8]) {
        if let Some(slot) = self.find(hash, tree, token, key) {
            self.set_state(slot, State::Outdated);
        }
    }

    /// Gives an outdated key the state that `newest` says, if it says one.
    pub(super) fn renew(
        &mut self,
        hash: u64,
        tree: TreeId,
        token: Token,
        key: &[u8],
        newest: impl FnOnce() -> Option<Record>,
    ) {
        let Some(slot) = self.find(hash, tree, token, key) else {
            return;
        };
        let is_outdated = |entry: &Entry| matches!(entry.state, State::Outdated);
        if self.slots[slot].as_ref().is_some_and(is_outdated)
            && let Some(newest) = newest()
        {
            // A copy: what was written shares memory with much that is not worth keeping.
            let record = Record {
                value: Bytes::copy_from_slice(&newest.value),
                ..newest
            };
            self.set_state(slot, State::Known(Some(record)));
            self.shrink();
        }
    }

    /// Puts an entry in, or its state into the place that the key has. One that would take more than
    /// the small queue's share is not cached: it would push out more than it can be worth.
    pub(super) fn insert(&mut self, mut entry: Entry) {
        if let Some(slot) = self.find(entry.hash, entry.tree, entry.token, &entry.key) {
            self.set_state(slot, entry.state);
            self.shrink();
            return;
        }
        if entry.bytes() > self.entry_bytes_max() {
            return;
        }
        entry.is_main = self.ghosts.take(entry.hash);
        let (hash, bytes, is_main) = (entry.hash, entry.bytes(), entry.is_main);
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = Some(entry);
                slot
            }
            None => {
                self.slots.push(Some(entry));
                self.slots.len() - 1
            }
        };
        let slots = &self.slots;
        self.index
            .insert_unique(hash, slot, |slot| hash_of(slots, *slot));
        self.enqueue(slot, bytes, is_main);
        self.shrink();
    }

    pub(super) fn clear(&mut self) {
        *self = S3Fifo {
            evictions: self.evictions,
            ..S3Fifo::new(self.budget_bytes)
        };
    }

    fn find(&self, hash: u64, tree: TreeId, token: Token, key: &[u8]) -> Option<usize> {
        let is_it = |slot: &usize| {
            self.slots[*slot]
                .as_ref()
                .is_some_and(|entry| entry.is_of(tree, token, key))
        };
        self.index.find(hash, is_it).copied()
    }

    fn entry_bytes_max(&self) -> usize {
        self.budget_bytes / SMALL_SHARE
    }

    /// Gives a key another state. One that is too large to cache leaves a husk behind, which is found
    /// no more and goes when its queue comes to it.
    fn set_state(&mut self, slot: usize, state: State) {
        let bytes_max = self.entry_bytes_max();
        let Some(entry) = &mut self.slots[slot] else {
            return;
        };
        let (hash, is_main, before) = (entry.hash, entry.is_main, entry.bytes());
        entry.state = state;
        let is_husk = entry.bytes() > bytes_max;
        if is_husk {
            entry.state = State::Outdated;
            entry.key = Box::default();
            entry.hits = 0;
        }
        let after = entry.bytes();
        let queue_bytes = self.bytes_of(is_main);
        *queue_bytes = *queue_bytes - before + after;
        if is_husk {
            self.unindex(hash, slot);
        }
    }

    fn unindex(&mut self, hash: u64, slot: usize) {
        if let Ok(found) = self.index.find_entry(hash, |other| *other == slot) {
            hash_table::OccupiedEntry::remove(found);
        }
    }

    /// Empties a slot that is in no queue any more.
    fn take(&mut self, slot: usize) -> Option<Entry> {
        let entry = self.slots[slot].take()?;
        self.unindex(entry.hash, slot);
        self.free.push(slot);
        Some(entry)
    }

    fn enqueue(&mut self, slot: usize, bytes: usize, is_main: bool) {
        *self.bytes_of(is_main) += bytes;
        if is_main {
            self.main.push_back(slot);
        } else {
            self.small.push_back(slot);
        }
    }

    fn bytes_of(&mut self, is_main: bool) -> &mut usize {
        if is_main {
            &mut self.main_bytes
        } else {
            &mut self.small_bytes
        }
    }

    /// Pushes entries out until the budget holds. Each step either ends an entry, moves one to the
    /// main queue for good, or uses up one of its counted hits.
    fn shrink(&mut self) {
        while self.bytes() > self.budget_bytes {
            let small_is_due = self.small_bytes > self.entry_bytes_max();
            if (small_is_due || self.main.is_empty()) && !self.small.is_empty() {
                self.evict_from_small();
            } else {
                self.evict_from_main();
            }
        }
    }

    fn evict_from_small(&mut self) {
        let Some(slot) = self.small.pop_front() else {
            return;
        };
        let Some(entry) = &mut self.slots[slot] else {
            return;
        };
        let bytes = entry.bytes();
        self.small_bytes -= bytes;
        if entry.hits >= HITS_TO_STAY {
            entry.hits = 0;
            entry.is_main = true;
            self.enqueue(slot, bytes, true);
        } else if let Some(entry) = self.take(slot) {
            // As many ghosts as there are entries: what returns later than that is not warm.
            self.ghosts.push(entry.hash, self.index.len().max(16));
            self.evictions += 1;
        }
    }

    fn evict_from_main(&mut self) {
        let Some(slot) = self.main.pop_front() else {
            return;
        };
        let Some(entry) = &mut self.slots[slot] else {
            return;
        };
        if entry.hits > 0 {
            entry.hits -= 1;
            self.main.push_back(slot);
        } else if let Some(entry) = self.take(slot) {
            self.main_bytes -= entry.bytes();
            self.evictions += 1;
        }
    }
}

#[cfg(test)]
impl S3Fifo {
    /// Queues, index, slots and sums agree.
    pub(super) fn check(&self) {
        let sum = |queue: &VecDeque<usize>, is_main: bool| -> usize {
            let entries = queue.iter().map(|slot| self.slots[*slot].as_ref().unwrap());
            entries
                .inspect(|entry| assert_eq!(entry.is_main, is_main))
                .map(Entry::bytes)
                .sum()
        };
        assert_eq!(sum(&self.small, false), self.small_bytes);
        assert_eq!(sum(&self.main, true), self.main_bytes);
        let used = self.slots.iter().flatten().count();
        assert_eq!(used, self.small.len() + self.main.len());
        assert_eq!(used + self.free.len(), self.slots.len());
        assert!(self.index.len() <= used);
    }
}

fn hash_of(slots: &[Option<Entry>], slot: usize) -> u64 {
    slots[slot].as_ref().map_or(0, |entry| entry.hash)
}

/// Hashes of keys that left the small queue lately, oldest first.
#[derive(Default)]
struct Ghosts {
    queue: VecDeque<u64>,
    /// Those of them that have not returned.
    present: HashTable<u64>,
}

impl Ghosts {
    fn push(&mut self, hash: u64, count_max: usize) {
        if self.present.find(hash, |other| *other == hash).is_none() {
            self.present.insert_unique(hash, hash, |hash| *hash);
        }
        self.queue.push_back(hash);
        while self.queue.len() > count_max {
            if let Some(oldest) = self.queue.pop_front() {
                self.take(oldest);
            }
        }
    }

    /// Whether the hash is remembered; it is no longer then.
    fn take(&mut self, hash: u64) -> bool {
        let Ok(found) = self.present.find_entry(hash, |other| *other == hash) else {
            return false;
        };
        hash_table::OccupiedEntry::remove(found);
        true
    }
}
