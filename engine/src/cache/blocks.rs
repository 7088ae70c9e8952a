//! The block cache: blocks of tables, checked and decompressed.
//!
//! For what one block serves often: a block of references to large values serves as many gets as there are values, each
//! of which then costs one device read and not two; and scans begin in the same blocks again and again. Blocks of
//! records that have their values are of no use to gets, for the record cache holds more that is wanted in the same
//! memory.
//!
//! The policy is that of the record cache, but what was never hit keeps to a tenth of what blocks may take: what a scan
//! leaves behind that passes once takes no more, full or not. Both caches have one budget: blocks take at most
//! their share, and records have all that blocks do not.
//!
//! Invariants: what is here is what the device had when it was read, verified; tables never change, so it is never old. A
//! table that is no longer part of a tree has none here, and gets none. Jobs and scrubs read the device.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;

use ahash::RandomState;

use super::s3_fifo::{Item, S3Fifo};
use super::{CacheStats, RecordCache};
use crate::table::Block;

/// Names a block: its table, and which one it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BlockId {
    pub(crate) table: u64,
    pub(crate) index: usize,
}

/// A cache of blocks with a byte budget, which it shares with a record cache. Clones share it.
#[derive(Clone)]
pub struct BlockCache(Rc<RefCell<Inner>>);

struct Inner {
    hasher: RandomState,
    blocks: S3Fifo<Cached>,
    records: RecordCache,
    stats: CacheStats,
}

struct Cached {
    id: BlockId,
    /// `None` when its table is gone.
    block: Option<Block>,
}

impl Item for Cached {
    fn held_bytes(&self) -> usize {
        self.block.as_ref().map_or(0, Block::body_bytes)
    }

    fn strip(&mut self) {
        self.block = None;
    }
}

impl BlockCache {
    /// A cache of blocks that takes up to `percent` of the budget of `records`; 0 caches nothing.
    pub fn beside(records: &RecordCache, percent: u8) -> BlockCache {
        let of_records = records.0.borrow();
        let budget_bytes = of_records.budget_bytes / 100 * usize::from(percent.min(100));
        BlockCache(Rc::new(RefCell::new(Inner {
            hasher: of_records.hasher.clone(),
            blocks: S3Fifo::strict(budget_bytes),
            records: records.clone(),
            stats: CacheStats::default(),
        })))
    }

    /// One that caches nothing.
    pub fn none() -> BlockCache {
        let hasher = RandomState::with_seeds(0, 0, 0, 0);
        BlockCache::beside(&RecordCache::new(0, hasher), 0)
    }

    /// A block, if it is here: no more than a reference count.
    pub(crate) fn get(&self, id: BlockId) -> Option<Block> {
        let inner = &mut *self.0.borrow_mut();
        let found = inner.find(id);
        let Some(slot) = found else {
            inner.stats.misses += 1;
            return None;
        };
        inner.stats.hits += 1;
        inner.blocks.hit(slot);
        inner.blocks.get(slot)?.block.clone()
    }

    /// Whether a block is here. Counts nothing.
    pub(crate) fn has(&self, id: BlockId) -> bool {
        self.0.borrow().find(id).is_some()
    }

    /// Puts a block in. Costs a copy if it is stored as it is, neither compressed nor encrypted.
    pub(crate) fn insert(&self, id: BlockId, block: &Block) {
        let inner = &mut *self.0.borrow_mut();
        // Two reads of one block may have been under way.
        if inner.find(id).is_some() {
            return;
        }
        let cached = Cached {
            id,
            block: Some(block.apart()),
        };
        inner.blocks.insert(inner.hasher.hash_one(id), cached);
        inner.records.leave(inner.blocks.bytes());
    }

    /// Lets go of the blocks of some tables that lie in some slots of the cache.
    pub(crate) fn forget(&self, tables: &BTreeSet<u64>, slots: Range<usize>) {
        let inner = &mut *self.0.borrow_mut();
        for slot in slots {
            let cached = inner.blocks.get(slot);
            if cached.is_some_and(|cached| tables.contains(&cached.id.table)) {
                inner.blocks.discard(slot);
            }
        }
        inner.records.leave(inner.blocks.bytes());
    }

    /// Slots are numbered below this.
    pub(crate) fn slots(&self) -> usize {
        self.0.borrow().blocks.slots()
    }

    /// Counts and sizes. A get or scan asks for each block by itself.
    pub fn stats(&self) -> CacheStats {
        let inner = self.0.borrow();
        inner.stats.with_size_of(&inner.blocks)
    }
}

impl Inner {
    fn find(&self, id: BlockId) -> Option<usize> {
        let hash = self.hasher.hash_one(id);
        self.blocks.find(hash, |cached| cached.id == id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use torc_env::{Token, TreeId};

    use super::*;
    use crate::cache::Lookup;

    const BUDGET: usize = 400_000;

    fn caches(budget_bytes: usize, percent: u8) -> (RecordCache, BlockCache) {
        let hasher = RandomState::with_seeds(1, 2, 3, 4);
        let records = RecordCache::new(budget_bytes, hasher);
        let blocks = BlockCache::beside(&records, percent);
        (records, blocks)
    }

    fn id(table: u64, index: usize) -> BlockId {
        BlockId { table, index }
    }

    fn bytes(stats: CacheStats) -> usize {
        usize::try_from(stats.bytes).unwrap()
    }

    /// Looks for a block and puts it in when it is not there; whether it was.
    fn read(blocks: &BlockCache, id: BlockId, value_bytes: usize) -> bool {
        match blocks.get(id) {
            Some(found) => {
                assert_eq!(
                    found.body_bytes(),
                    Block::of_value(value_bytes).body_bytes()
                );
                true
            }
            None => {
                blocks.insert(id, &Block::of_value(value_bytes));
                false
            }
        }
    }

    /// Remembers that a key is absent.
    fn look_up(records: &RecordCache, number: u32) {
        let key = number.to_le_bytes();
        let token = Token::of(TreeId(1), &key);
        if let Lookup::Miss(fill) = records.lookup(TreeId(1), token, &key) {
            fill.fill(&key, None);
        }
    }

    #[test]
    fn what_passes_once_takes_a_tenth_of_the_share_and_pushes_nothing_out() {
        let (_, blocks) = caches(BUDGET, 50);
        let hot = |expected: usize| {
            let hits = (0..20).filter(|index| read(&blocks, id(1, *index), 500));
            assert_eq!(hits.count(), expected);
        };
        hot(0);
        hot(20);
        let hot_bytes = bytes(blocks.stats());
        for index in 0..5000 {
            read(&blocks, id(2, index), 500);
            assert!(bytes(blocks.stats()) <= BUDGET / 20 + hot_bytes);
        }
        hot(20);
    }

    #[test]
    fn blocks_that_are_wanted_again_fill_the_share_and_records_have_the_rest() {
        let (records, blocks) = caches(BUDGET, 50);
        (0..10_000).for_each(|number| look_up(&records, number));
        assert!(bytes(records.stats()) > BUDGET * 9 / 10);
        for index in 0..1000 {
            read(&blocks, id(1, index), 500);
            assert!(read(&blocks, id(1, index), 500));
        }
        let (of_blocks, of_records) = (bytes(blocks.stats()), bytes(records.stats()));
        assert!((BUDGET * 4 / 10..=BUDGET / 2).contains(&of_blocks));
        assert!((BUDGET * 4 / 10..=BUDGET - of_blocks).contains(&of_records));
        blocks.forget(&BTreeSet::from([1]), 0..blocks.slots());
        assert_eq!(blocks.stats().entries, 0);
        (0..10_000).for_each(|number| look_up(&records, number));
        assert!(bytes(records.stats()) > of_records);
    }

    #[test]
    fn a_block_that_two_have_read_is_kept_once_and_a_look_counts_nothing() {
        let (_, blocks) = caches(BUDGET, 50);
        blocks.insert(id(1, 0), &Block::of_value(100));
        blocks.insert(id(1, 0), &Block::of_value(100));
        assert_eq!(blocks.stats().entries, 1);
        assert!(blocks.has(id(1, 0)) && !blocks.has(id(1, 1)));
        assert_eq!((blocks.stats().hits, blocks.stats().misses), (0, 0));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Read(u64, usize),
        LookUp(u32),
        Forget(u64),
        Clear,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            10 => (0..4u64, 0..40usize).prop_map(|(table, index)| Op::Read(table, index)),
            5 => (0..200u32).prop_map(Op::LookUp),
            1 => (0..4u64).prop_map(Op::Forget),
            1 => Just(Op::Clear),
        ]
    }

    proptest! {
        #[test]
        fn gives_the_block_that_was_asked_for_and_keeps_the_common_budget(
            ops in prop::collection::vec(op(), 1..500),
            budget_bytes in 0..60_000usize,
            percent in 0..=100u8,
        ) {
            let (records, blocks) = caches(budget_bytes, percent);
            let mut there = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Read(table, index) => {
                        let value_bytes = usize::try_from(table).unwrap() * 400 + index;
                        let was_there = read(&blocks, id(table, index), value_bytes);
                        prop_assert!(!was_there || there.contains(&(table, index)));
                        there.insert((table, index));
                    }
                    Op::LookUp(number) => look_up(&records, number),
                    Op::Forget(gone) => {
                        let slots = blocks.slots();
                        blocks.forget(&BTreeSet::from([gone]), 0..slots / 2);
                        blocks.forget(&BTreeSet::from([gone]), slots / 2..slots);
                        there.retain(|(table, _)| *table != gone);
                    }
                    Op::Clear => records.clear(),
                }
                blocks.0.borrow().blocks.check();
                records.0.borrow().places.check();
                let (of_blocks, of_records) = (bytes(blocks.stats()), bytes(records.stats()));
                prop_assert!(of_blocks + of_records <= budget_bytes);
                prop_assert!(of_blocks <= budget_bytes * usize::from(percent) / 100);
            }
        }
    }
}
