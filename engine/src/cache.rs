//! The caches of a store: the record cache, and beside it that of [blocks](BlockCache).
//!
//! The record cache has what recent gets found, or found absent. Neighbours in token order have nothing to do with each
//! other, so a block kept for one record is mostly waste; single records are kept instead. Stands in front of the tables (and behind the
//! memtables): a hit costs no device read and no search.
//!
//! The policy is S3-FIFO (J. Yang et al., "FIFO queues are all you need for cache eviction",
//! SOSP 2023): what is new goes through a small queue and leaves from it unless it is hit again, so
//! a scan of unrelated keys passes without pushing anything out; keys that left and return soon
//! (their hashes are remembered in a *ghost* queue) go straight to the main queue.
//!
//! A write costs the cache no copy: the written state is in a memtable, where it is found first, so
//! the cached one is only marked *outdated* and keeps its place. The flush of that memtable
//! [renews](RecordCache::renew) what has a place, so keys that are read or overwritten often are not
//! forgotten by a flush.
//!
//! Invariant: a cached state is the newest synced one. A write that becomes visible calls
//! [`RecordCache::outdate`] in the same turn; and a get that went to the device may only fill the
//! cache through the [`Fill`] it got *before* reading, which a write in between has spoilt.
//!
//! It does no I/O and is never filled by scans or compactions. What blocks take of its budget, it does without.

mod blocks;
mod places;
mod s3_fifo;

use std::cell::RefCell;
use std::rc::Rc;

use ahash::RandomState;
use hashbrown::HashTable;
use torc_env::{Token, TreeId};

use crate::record::Record;
use places::{Hashed, Place};
use s3_fifo::{Item, S3Fifo};

pub use blocks::BlockCache;
pub(crate) use blocks::BlockId;

/// A cache with a byte budget. Clones share it.
#[derive(Clone)]
pub struct RecordCache(Rc<RefCell<Inner>>);

struct Inner {
    hasher: RandomState,
    /// Memory of both caches.
    budget_bytes: usize,
    places: S3Fifo<Place>,
    /// Gets that are at the device, by the hash of their key.
    filling: HashTable<Filling>,
    stats: CacheStats,
}

/// One or more gets of keys with this hash are at the device.
struct Filling {
    hash: u64,
    gets: usize,
    /// A write has come in between: what they find is old.
    is_spoilt: bool,
}

/// Counts since the cache was made, and its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Lookups that found something.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Entries pushed out to keep the budget.
    pub evictions: u64,
    /// Entries now.
    pub entries: u64,
    /// Bytes now, keys and bookkeeping included.
    pub bytes: u64,
}

/// What the cache knows of a key.
pub enum Lookup {
    /// The newest synced state: a record (which may be a tombstone), or that there is none.
    Hit(Option<Record>),
    /// Nothing; whoever reads the device may put what it finds into the cache with this.
    Miss(Fill),
}

/// Leave to put one key into the cache. Dropping it gives it up.
pub struct Fill {
    cache: RecordCache,
    hash: u64,
    tree: TreeId,
    token: Token,
}

impl RecordCache {
    /// A cache of at most `budget_bytes`; 0 caches nothing. `hasher` comes from
    /// [`torc_env::map::hasher`], so that nobody outside can choose keys that collide.
    pub fn new(budget_bytes: usize, hasher: RandomState) -> RecordCache {
        RecordCache(Rc::new(RefCell::new(Inner {
            hasher,
            budget_bytes,
            places: S3Fifo::new(budget_bytes),
            filling: HashTable::new(),
            stats: CacheStats::default(),
        })))
    }

    /// What the cache knows of a key. A hit costs one hash, one probe, one key comparison and a
    /// reference count.
    pub fn lookup(&self, tree: TreeId, token: Token, key: &[u8]) -> Lookup {
        let inner = &mut *self.0.borrow_mut();
        let key = inner.hashed(tree, token, key);
        if let Some(record) = inner.places.state(key) {
            inner.stats.hits += 1;
            return Lookup::Hit(record);
        }
        inner.stats.misses += 1;
        inner.begin_fill(key.hash);
        Lookup::Miss(Fill {
            cache: self.clone(),
            hash: key.hash,
            tree,
            token,
        })
    }

    /// Tells that a key's newest synced state is now one in a memtable. A key that has no place here
    /// gets none (what is written need not be read).
    pub fn outdate(&self, tree: TreeId, token: Token, key: &[u8]) {
        let inner = &mut *self.0.borrow_mut();
        let key = inner.hashed(tree, token, key);
        inner.spoil(key.hash);
        inner.places.outdate(key);
    }

    /// Gives an outdated key its state again, before that leaves the memtables: `newest` says what it
    /// is, unless a newer one stays in memory. Does nothing to a key without a place. Costs a copy of
    /// the value.
    pub fn renew(
        &self,
        tree: TreeId,
        token: Token,
        key: &[u8],
        newest: impl FnOnce() -> Option<Record>,
    ) {
        let inner = &mut *self.0.borrow_mut();
        let key = inner.hashed(tree, token, key);
        inner.places.renew(key, newest);
    }

    /// Forgets everything, and spoils every get that is at the device: for a tree that goes, or
    /// files whose content is no longer trusted.
    pub fn clear(&self) {
        let inner = &mut *self.0.borrow_mut();
        inner.places.clear();
        for filling in inner.filling.iter_mut() {
            filling.is_spoilt = true;
        }
    }

    /// Counts and sizes.
    pub fn stats(&self) -> CacheStats {
        let inner = self.0.borrow();
        inner.stats.with_size_of(&inner.places)
    }

    /// Leaves `bytes` of the budget to blocks, until it is told otherwise.
    fn leave(&self, bytes: usize) {
        let inner = &mut *self.0.borrow_mut();
        inner.places.set_budget(inner.budget_bytes - bytes);
    }
}

impl CacheStats {
    /// These counts, and the size of what they are of.
    fn with_size_of<T: Item>(self, cache: &S3Fifo<T>) -> CacheStats {
        let count = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        CacheStats {
            evictions: cache.evictions(),
            entries: count(cache.len()),
            bytes: count(cache.bytes()),
            ..self
        }
    }
}

impl Inner {
    fn hashed<'a>(&self, tree: TreeId, token: Token, key: &'a [u8]) -> Hashed<'a> {
        Hashed {
            hash: self.hasher.hash_one((tree, token)),
            tree,
            token,
            key,
        }
    }

    fn begin_fill(&mut self, hash: u64) {
        match self.filling.find_mut(hash, |filling| filling.hash == hash) {
            Some(filling) => filling.gets += 1,
            None => {
                let filling = Filling {
                    hash,
                    gets: 1,
                    is_spoilt: false,
                };
                self.filling
                    .insert_unique(hash, filling, |filling| filling.hash);
            }
        }
    }

    /// Ends one get of a key with this hash. Returns whether what it found is still the newest.
    fn end_fill(&mut self, hash: u64) -> bool {
        let Ok(mut entry) = self
            .filling
            .find_entry(hash, |filling| filling.hash == hash)
        else {
            return false;
        };
        let filling = entry.get_mut();
        let is_fresh = !filling.is_spoilt;
        filling.gets -= 1;
        if filling.gets == 0 {
            entry.remove();
        }
        is_fresh
    }

    fn spoil(&mut self, hash: u64) {
        if let Some(filling) = self.filling.find_mut(hash, |filling| filling.hash == hash) {
            filling.is_spoilt = true;
        }
    }
}

impl Fill {
    /// Puts what the device had of the key into the cache, unless a write has come in between.
    pub fn fill(self, key: &[u8], record: Option<&Record>) {
        let inner = &mut *self.cache.0.borrow_mut();
        // The end of this get is counted when `self` is dropped; the mark is read here.
        let is_fresh = inner
            .filling
            .find(self.hash, |filling| filling.hash == self.hash)
            .is_some_and(|filling| !filling.is_spoilt);
        if is_fresh {
            let key = Hashed {
                hash: self.hash,
                tree: self.tree,
                token: self.token,
                key,
            };
            inner.places.fill(key, record);
        }
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        self.cache.0.borrow_mut().end_fill(self.hash);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    use crate::record::Kind;

    const TREE: TreeId = TreeId(1);

    fn cache(budget_bytes: usize) -> RecordCache {
        RecordCache::new(budget_bytes, RandomState::with_seeds(1, 2, 3, 4))
    }

    fn record(stamp: u64, len: usize) -> Record {
        Record {
            kind: Kind::Value,
            stamp,
            expires_at_ms: 0,
            value: Bytes::from(vec![7; len]),
        }
    }

    fn key(number: u32) -> (Token, [u8; 4]) {
        let key = number.to_le_bytes();
        (Token::of(TREE, &key), key)
    }

    /// Reads through the cache: whether it was a hit.
    fn get(cache: &RecordCache, number: u32, stored: Option<&Record>) -> bool {
        let (token, key) = key(number);
        match cache.lookup(TREE, token, &key) {
            Lookup::Hit(found) => {
                assert_eq!(found.as_ref(), stored, "key {number}");
                true
            }
            Lookup::Miss(fill) => {
                fill.fill(&key, stored);
                false
            }
        }
    }

    fn overwrite(cache: &RecordCache, number: u32) {
        let (token, key) = key(number);
        cache.outdate(TREE, token, &key);
    }

    fn renew(cache: &RecordCache, number: u32, newest: &Record) {
        let (token, key) = key(number);
        cache.renew(TREE, token, &key, || Some(newest.clone()));
    }

    #[test]
    fn records_and_absence_are_remembered() {
        let cache = cache(1 << 20);
        assert!(!get(&cache, 1, Some(&record(1, 10))));
        assert!(get(&cache, 1, Some(&record(1, 10))));
        assert!(!get(&cache, 2, None));
        assert!(get(&cache, 2, None));
        assert_eq!(cache.stats().hits, 2);
        assert_eq!(cache.stats().misses, 2);
        cache.clear();
        assert!(!get(&cache, 1, None));
    }

    #[test]
    fn one_key_in_two_trees_is_two_entries() {
        let cache = cache(1 << 20);
        let (token, key) = key(1);
        for tree in [TreeId(1), TreeId(2)] {
            let Lookup::Miss(fill) = cache.lookup(tree, token, &key) else {
                panic!("nothing was filled for {tree:?}");
            };
            fill.fill(&key, Some(&record(tree.0.into(), 1)));
        }
        for tree in [TreeId(1), TreeId(2)] {
            let Lookup::Hit(Some(found)) = cache.lookup(tree, token, &key) else {
                panic!("filled for {tree:?}");
            };
            assert_eq!(found.stamp, u64::from(tree.0));
        }
    }

    #[test]
    fn a_write_during_the_device_read_spoils_the_fill() {
        let cache = cache(1 << 20);
        let (token, key_bytes) = key(1);
        let Lookup::Miss(early) = cache.lookup(TREE, token, &key_bytes) else {
            panic!("empty");
        };
        let Lookup::Miss(given_up) = cache.lookup(TREE, token, &key_bytes) else {
            panic!("empty");
        };
        cache.outdate(TREE, token, &key_bytes);
        drop(given_up);
        early.fill(&key_bytes, Some(&record(1, 5)));
        assert!(
            !get(&cache, 1, Some(&record(2, 5))),
            "the old state stayed out"
        );
        assert!(get(&cache, 1, Some(&record(2, 5))));
        assert_eq!(cache.0.borrow().filling.len(), 0);
    }

    #[test]
    fn an_overwritten_key_keeps_its_place_and_gets_its_state_from_the_flush() {
        let cache = cache(1 << 20);
        assert!(!get(&cache, 1, Some(&record(1, 10))));
        overwrite(&cache, 1);
        renew(&cache, 1, &record(2, 10));
        assert!(get(&cache, 1, Some(&record(2, 10))));
        renew(&cache, 1, &record(1, 10));
        assert!(
            get(&cache, 1, Some(&record(2, 10))),
            "what is known is not replaced by a flush"
        );
        renew(&cache, 2, &record(2, 10));
        assert!(!get(&cache, 2, None), "nobody asked for this key");
    }

    #[test]
    fn an_outdated_state_is_not_shown() {
        let cache = cache(1 << 20);
        assert!(!get(&cache, 1, Some(&record(1, 10))));
        overwrite(&cache, 1);
        assert!(
            !get(&cache, 1, Some(&record(2, 10))),
            "it is found elsewhere"
        );
        assert!(get(&cache, 1, Some(&record(2, 10))));
    }

    #[test]
    fn a_value_too_large_to_cache_leaves_no_older_one_behind() {
        let cache = cache(100_000);
        assert!(!get(&cache, 1, Some(&record(1, 10))));
        overwrite(&cache, 1);
        renew(&cache, 1, &record(2, 50_000));
        assert!(!get(&cache, 1, Some(&record(2, 50_000))));
        assert!(!get(&cache, 1, Some(&record(2, 50_000))), "not cached");
        assert!(!get(&cache, 1, Some(&record(3, 10))));
        assert!(get(&cache, 1, Some(&record(3, 10))));
    }

    #[test]
    fn a_scan_of_cold_keys_does_not_push_the_hot_ones_out() {
        let cache = cache(200 * 1024);
        let hot = |cache: &RecordCache| {
            let hits = (0..50).filter(|number| get(cache, *number, Some(&record(1, 1000))));
            hits.count()
        };
        hot(&cache);
        hot(&cache);
        for number in 1000..11_000 {
            get(&cache, number, Some(&record(1, 1000)));
        }
        assert_eq!(hot(&cache), 50);
        assert!(cache.stats().evictions > 9000);
    }

    #[test]
    fn a_key_that_returns_soon_after_it_left_goes_to_the_main_queue() {
        let cache = cache(100 * 1024);
        for number in 0..200 {
            get(&cache, number, Some(&record(1, 1000)));
        }
        // Some 85 fit, so this one has left not long ago.
        let gone = 100;
        assert!(!get(&cache, gone, Some(&record(1, 1000))));
        for number in 1000..2000 {
            get(&cache, number, Some(&record(1, 1000)));
        }
        assert!(get(&cache, gone, Some(&record(1, 1000))));
    }

    #[test]
    fn without_a_budget_nothing_is_cached() {
        let cache = cache(0);
        assert!(!get(&cache, 1, None));
        assert!(!get(&cache, 1, None));
        assert_eq!(cache.stats().bytes, 0);
    }

    #[derive(Debug, Clone)]
    enum Op {
        Get(u32),
        Put(u32, usize),
        /// Begins a get, writes the key, ends the get.
        Race(u32, usize),
        /// What was written so far leaves the memtable.
        Flush,
        Clear,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            10 => (0u32..60).prop_map(Op::Get),
            4 => (0u32..60, 0usize..3000).prop_map(|(key, len)| Op::Put(key, len)),
            2 => (0u32..60, 0usize..3000).prop_map(|(key, len)| Op::Race(key, len)),
            2 => Just(Op::Flush),
            1 => Just(Op::Clear),
        ]
    }

    proptest! {
        #[test]
        fn never_answers_with_an_old_state_and_keeps_its_budget(
            ops in prop::collection::vec(op(), 1..600),
            budget_bytes in 0usize..40_000,
        ) {
            let cache = cache(budget_bytes);
            let mut model: BTreeMap<u32, Record> = BTreeMap::new();
            for (stamp, op) in (1..).zip(ops) {
                match op {
                    Op::Get(number) => {
                        get(&cache, number, model.get(&number));
                    }
                    Op::Put(number, len) => {
                        overwrite(&cache, number);
                        model.insert(number, record(stamp, len));
                    }
                    Op::Race(number, len) => {
                        let (token, key) = key(number);
                        let before = model.get(&number).cloned();
                        let lookup = cache.lookup(TREE, token, &key);
                        overwrite(&cache, number);
                        model.insert(number, record(stamp, len));
                        if let Lookup::Miss(fill) = lookup {
                            fill.fill(&key, before.as_ref());
                        }
                    }
                    Op::Flush => model.iter().for_each(|(number, newest)| {
                        renew(&cache, *number, newest);
                    }),
                    Op::Clear => cache.clear(),
                }
                cache.0.borrow().places.check();
                prop_assert!(cache.stats().bytes <= u64::try_from(budget_bytes).unwrap());
            }
            prop_assert_eq!(cache.0.borrow().filling.len(), 0);
        }
    }
}
