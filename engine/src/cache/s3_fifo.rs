//! The queues of the caches: S3-FIFO over a slab, with a byte budget.

use std::collections::VecDeque;

use hashbrown::{HashTable, hash_table};

/// The small queue's share of the budget: 1/10, as in the paper.
const SMALL_SHARE: usize = 10;
/// Hits beyond this are not counted. Two bits, as in the paper.
const HITS_MAX: u8 = 3;
/// An item must have been hit so often in the small queue to move to the main one.
const HITS_TO_STAY: u8 = 1;
/// What an item costs beside its slot: its places in index and queue, and a share of the ghosts.
const PLACE_BYTES: usize = 32;

/// What a cache keeps.
pub(super) trait Item {
    /// Bytes that it holds beside itself.
    fn held_bytes(&self) -> usize;

    /// Lets go of them.
    fn strip(&mut self);
}

/// Items, an index over them, two queues, and the hashes of those that left the small one.
pub(super) struct S3Fifo<T> {
    budget_bytes: usize,
    /// What is new keeps to the small queue's share even while there is room beside it.
    is_strict: bool,
    slots: Vec<Option<Slot<T>>>,
    free: Vec<usize>,
    index: HashTable<usize>,
    small: VecDeque<usize>,
    main: VecDeque<usize>,
    small_bytes: usize,
    main_bytes: usize,
    ghosts: Ghosts,
    evictions: u64,
}

struct Slot<T> {
    hash: u64,
    item: T,
    hits: u8,
    is_main: bool,
}

impl<T: Item> Slot<T> {
    fn bytes(&self) -> usize {
        size_of::<Option<Self>>() + PLACE_BYTES + self.item.held_bytes()
    }
}

impl<T: Item> S3Fifo<T> {
    pub(super) fn new(budget_bytes: usize) -> Self {
        S3Fifo {
            budget_bytes,
            is_strict: false,
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

    /// In which what was never hit takes no more than the small queue's share, so that what passes once leaves the rest
    /// of the budget to others.
    pub(super) fn strict(budget_bytes: usize) -> Self {
        S3Fifo {
            is_strict: true,
            ..Self::new(budget_bytes)
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

    /// Gives the cache another budget and pushes out what no longer fits.
    pub(super) fn set_budget(&mut self, budget_bytes: usize) {
        self.budget_bytes = budget_bytes;
        self.shrink();
    }

    /// The slot of an item.
    pub(super) fn find(&self, hash: u64, is_it: impl Fn(&T) -> bool) -> Option<usize> {
        let is_in = |slot: &usize| self.get(*slot).is_some_and(&is_it);
        self.index.find(hash, is_in).copied()
    }

    /// What is in a slot.
    pub(super) fn get(&self, slot: usize) -> Option<&T> {
        let slot = self.slots.get(slot)?.as_ref()?;
        Some(&slot.item)
    }

    /// Counts a hit of what is in a slot.
    pub(super) fn hit(&mut self, slot: usize) {
        if let Some(slot) = &mut self.slots[slot] {
            slot.hits = (slot.hits + 1).min(HITS_MAX);
        }
    }

    /// Changes what is in a slot. One that takes too much afterwards is [discarded](Self::discard).
    pub(super) fn change(&mut self, slot: usize, change: impl FnOnce(&mut T)) {
        self.alter(slot, |found| change(&mut found.item));
        let bytes = self.slots[slot].as_ref().map_or(0, Slot::bytes);
        if bytes > self.small_bytes_max() {
            self.discard(slot);
        }
        self.shrink();
    }

    /// Puts in an item that is not there yet. One that would take more than the small queue's share is not cached: it
    /// would push out more than it can be worth.
    pub(super) fn insert(&mut self, hash: u64, item: T) {
        let mut new = Slot {
            hash,
            item,
            hits: 0,
            is_main: false,
        };
        let bytes = new.bytes();
        if bytes > self.small_bytes_max() {
            return;
        }
        new.is_main = self.ghosts.take(hash);
        let is_main = new.is_main;
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = Some(new);
                slot
            }
            None => {
                self.slots.push(Some(new));
                self.slots.len() - 1
            }
        };
        let slots = &self.slots;
        self.index
            .insert_unique(hash, slot, |slot| hash_of(slots, *slot));
        self.enqueue(slot, bytes, is_main);
        self.shrink();
    }

    /// Leaves a husk in a slot, which is found no more and goes when its queue comes to it.
    pub(super) fn discard(&mut self, slot: usize) {
        self.alter(slot, |found| {
            found.item.strip();
            found.hits = 0;
        });
        if let Some(hash) = self.slots[slot].as_ref().map(|husk| husk.hash) {
            self.unindex(hash, slot);
        }
    }

    /// Changes a slot that is in use, and what its queue holds with it.
    fn alter(&mut self, slot: usize, alter: impl FnOnce(&mut Slot<T>)) {
        let Some(found) = &mut self.slots[slot] else {
            return;
        };
        let (is_main, before) = (found.is_main, found.bytes());
        alter(found);
        let after = found.bytes();
        let queue_bytes = self.bytes_of(is_main);
        *queue_bytes = *queue_bytes - before + after;
    }

    /// Slots are numbered below this.
    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn clear(&mut self) {
        *self = S3Fifo {
            evictions: self.evictions,
            is_strict: self.is_strict,
            ..S3Fifo::new(self.budget_bytes)
        };
    }

    fn small_bytes_max(&self) -> usize {
        self.budget_bytes / SMALL_SHARE
    }

    fn unindex(&mut self, hash: u64, slot: usize) {
        if let Ok(found) = self.index.find_entry(hash, |other| *other == slot) {
            hash_table::OccupiedEntry::remove(found);
        }
    }

    /// Empties a slot that is in no queue any more.
    fn take(&mut self, slot: usize) -> Option<Slot<T>> {
        let taken = self.slots[slot].take()?;
        self.unindex(taken.hash, slot);
        self.free.push(slot);
        Some(taken)
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

    /// Pushes items out until the budget holds. Each step either ends an item, moves one to the
    /// main queue for good, or uses up one of its counted hits.
    fn shrink(&mut self) {
        loop {
            let small_is_due = self.small_bytes > self.small_bytes_max();
            let is_over = self.bytes() > self.budget_bytes;
            if !(is_over || small_is_due && self.is_strict) {
                return;
            }
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
        let Some(found) = &mut self.slots[slot] else {
            return;
        };
        let bytes = found.bytes();
        self.small_bytes -= bytes;
        if found.hits >= HITS_TO_STAY {
            found.hits = 0;
            found.is_main = true;
            self.enqueue(slot, bytes, true);
        } else if let Some(gone) = self.take(slot) {
            // As many ghosts as there are items: what returns later than that is not warm.
            self.ghosts.push(gone.hash, self.index.len().max(16));
            self.evictions += 1;
        }
    }

    fn evict_from_main(&mut self) {
        let Some(slot) = self.main.pop_front() else {
            return;
        };
        let Some(found) = &mut self.slots[slot] else {
            return;
        };
        if found.hits > 0 {
            found.hits -= 1;
            self.main.push_back(slot);
        } else if let Some(gone) = self.take(slot) {
            self.main_bytes -= gone.bytes();
            self.evictions += 1;
        }
    }
}

#[cfg(test)]
impl<T: Item> S3Fifo<T> {
    /// Queues, index, slots and sums agree.
    pub(super) fn check(&self) {
        let sum = |queue: &VecDeque<usize>, is_main: bool| -> usize {
            let slots = queue.iter().map(|slot| self.slots[*slot].as_ref().unwrap());
            slots
                .inspect(|slot| assert_eq!(slot.is_main, is_main))
                .map(Slot::bytes)
                .sum()
        };
        assert_eq!(sum(&self.small, false), self.small_bytes);
        assert_eq!(sum(&self.main, true), self.main_bytes);
        assert!(!self.is_strict || self.small_bytes <= self.small_bytes_max());
        let used = self.slots.iter().flatten().count();
        assert_eq!(used, self.small.len() + self.main.len());
        assert_eq!(used + self.free.len(), self.slots.len());
        assert!(self.index.len() <= used);
    }
}

fn hash_of<T>(slots: &[Option<Slot<T>>], slot: usize) -> u64 {
    slots[slot].as_ref().map_or(0, |slot| slot.hash)
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
