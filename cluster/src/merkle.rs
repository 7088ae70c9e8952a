//! Hash sums over a shard's records, kept in step with every write.
//!
//! On the path: [`replica::update`](crate::replica::update) reports each change; anti-entropy compares
//! the sums of two replicas and looks closer only where they differ.
//!
//! The ring is cut into 2^16 *leaves* by the first bits of the token, the same on every node. A leaf
//! is the sum, modulo 2^128, of the hashes of its records, so a change subtracts the old hash
//! and adds the new one, and a run of leaves is a sum of sums: there is no tree to rebuild.
//! 2^16 leaves take 1 MiB a keyspace and leave 150 records a leaf at ten million keys.
//!
//! Dead records (tombstones, and records whose values all expire) are summed apart, by the hour in
//! which they may be purged at the earliest: a replica that has purged them and one that has not agree
//! as soon as both leave out the hours before a common floor.
//!
//! Invariant: once built, the sums are those of the newest states, what is still being synced
//! included.
//!
//! Source: the additive trees of Riak's TicTac active anti-entropy, with a 128-bit sum in place of an
//! exclusive or.

use std::collections::BTreeMap;

use bytes::Bytes;
use torc_engine::{Kind, Record, ScanFrom};
use torc_env::{Token, TokenRange, TreeId};

use crate::hlc::stamp_millis;
use crate::version::StateRef;
use crate::walk::Walk;

/// Leaves of the whole ring.
pub(crate) const LEAF_COUNT: u32 = 1 << 16;
const LEAF_SHIFT: u32 = 112;
const PAGE_LEAVES: usize = 256;
const MILLIS_PER_HOUR: u64 = 3_600_000;

/// A leaf's number.
pub(crate) fn leaf_of(token: Token) -> u32 {
    u32::try_from(token.0 >> LEAF_SHIFT).expect("sixteen bits fit")
}

/// The tokens of a leaf.
pub(crate) fn leaf_range(leaf: u32) -> TokenRange {
    let first = u128::from(leaf) << LEAF_SHIFT;
    TokenRange {
        first: Token(first),
        last: Token(first | (u128::MAX >> (128 - LEAF_SHIFT))),
    }
}

/// What one record adds to its leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) hash: u128,
    /// Hour since 1970 from which on the record may be purged; `None` while it lives.
    pub(crate) dead_hour: Option<u32>,
}

impl Leaf {
    /// `None` when the record cannot be parsed: it is then left out, and differs from every replica
    /// that can.
    pub(crate) fn of(key: &[u8], record: &Record) -> Option<Self> {
        let state = StateRef::parse_head(&record.value).ok()?;
        let dead_ms = match record.kind {
            Kind::Tombstone => Some(stamp_millis(record.stamp)),
            Kind::Value if record.expires_at_ms != 0 => {
                Some(record.expires_at_ms.max(stamp_millis(record.stamp)))
            }
            Kind::Value => None,
        };
        Some(Self {
            hash: state.leaf_hash(key),
            dead_hour: dead_ms.map(hour_of),
        })
    }

    /// Whether it counts in a comparison that leaves out what is dead before `floor_hour`.
    pub(crate) fn counts(&self, floor_hour: u32) -> bool {
        self.dead_hour.is_none_or(|hour| hour >= floor_hour)
    }
}

/// Whole hours of milliseconds since 1970.
pub(crate) fn hour_of(millis: u64) -> u32 {
    u32::try_from(millis / MILLIS_PER_HOUR).unwrap_or(u32::MAX)
}

/// The sums of one tree.
#[derive(Debug)]
struct TreeSums {
    /// Pages of [`PAGE_LEAVES`] leaves; a page without records is not there.
    live: Vec<Option<Box<[u128; PAGE_LEAVES]>>>,
    /// By leaf and hour. Only sums that are not zero.
    dead: BTreeMap<(u32, u32), u128>,
    /// What is not summed up yet.
    rest: Option<Walk>,
}

impl TreeSums {
    fn new() -> Self {
        let pages = usize::try_from(LEAF_COUNT).unwrap_or(0) / PAGE_LEAVES;
        Self {
            live: vec![None; pages],
            dead: BTreeMap::new(),
            rest: Some(Walk::default()),
        }
    }

    fn add(&mut self, token: Token, leaf: Leaf, is_added: bool) {
        let change = if is_added {
            leaf.hash
        } else {
            leaf.hash.wrapping_neg()
        };
        let number = leaf_of(token);
        if let Some(hour) = leaf.dead_hour {
            let sum = self.dead.entry((number, hour)).or_insert(0);
            *sum = sum.wrapping_add(change);
            if *sum == 0 {
                self.dead.remove(&(number, hour));
            }
            return;
        }
        let place = usize::try_from(number).unwrap_or(0);
        let page = self.live[place / PAGE_LEAVES].get_or_insert_with(|| Box::new([0; PAGE_LEAVES]));
        let sum = &mut page[place % PAGE_LEAVES];
        *sum = sum.wrapping_add(change);
    }

    fn sum(&self, first: u32, last: u32, floor_hour: u32) -> u128 {
        let mut total = 0u128;
        for leaf in first..=last {
            let place = usize::try_from(leaf).unwrap_or(0);
            if let Some(page) = &self.live[place / PAGE_LEAVES] {
                total = total.wrapping_add(page[place % PAGE_LEAVES]);
            }
        }
        for ((_, hour), sum) in self.dead.range((first, 0)..=(last, u32::MAX)) {
            if *hour >= floor_hour {
                total = total.wrapping_add(*sum);
            }
        }
        total
    }
}

/// The sums of all trees of a shard.
#[derive(Debug, Default)]
pub(crate) struct Sums {
    trees: BTreeMap<TreeId, TreeSums>,
}

impl Sums {
    /// A record of `tree` is about to be replaced.
    pub(crate) fn changed(
        &mut self,
        tree: TreeId,
        token: Token,
        key: &[u8],
        stored: Option<&Record>,
        record: &Record,
    ) {
        let sums = self.trees.entry(tree).or_insert_with(TreeSums::new);
        // What lies ahead of a build enters with its new state, and the build leaves it out.
        let rest = sums.rest.as_mut();
        let is_unsummed = rest.is_some_and(|rest| rest.written(token, key));
        if !is_unsummed && let Some(old) = stored.and_then(|stored| Leaf::of(key, stored)) {
            sums.add(token, old, false);
        }
        if let Some(new) = Leaf::of(key, record) {
            sums.add(token, new, true);
        }
    }

    /// Where a build of `tree` goes on; `None` when it is built.
    pub(crate) fn build_from(&mut self, tree: TreeId) -> Option<ScanFrom> {
        let sums = self.trees.entry(tree).or_insert_with(TreeSums::new);
        sums.rest.as_ref().map(Walk::next)
    }

    /// Takes a record of the store into a build in progress. Records come in order.
    pub(crate) fn build(&mut self, tree: TreeId, token: Token, key: &Bytes, record: &Record) {
        let sums = self.trees.entry(tree).or_insert_with(TreeSums::new);
        let Some(rest) = &mut sums.rest else { return };
        if rest.reached(token, key)
            && let Some(leaf) = Leaf::of(key, record)
        {
            sums.add(token, leaf, true);
        }
    }

    /// The store has been read through.
    pub(crate) fn built(&mut self, tree: TreeId) {
        self.trees.entry(tree).or_insert_with(TreeSums::new).rest = None;
    }

    /// Whether the sums of `tree` are complete.
    pub(crate) fn is_built(&self, tree: TreeId) -> bool {
        self.trees
            .get(&tree)
            .is_some_and(|sums| sums.rest.is_none())
    }

    /// Records of the tree are gone that were not replaced: it is to be summed up again, if it is still there.
    pub(crate) fn forget(&mut self, tree: TreeId) {
        self.trees.remove(&tree);
    }

    /// The sum of the leaves `first..=last`, without what is dead before `floor_hour`. `None` while
    /// the sums are being built.
    pub(crate) fn sum(&self, tree: TreeId, first: u32, last: u32, floor_hour: u32) -> Option<u128> {
        let sums = self.trees.get(&tree)?;
        sums.rest
            .is_none()
            .then(|| sums.sum(first, last, floor_hour))
    }
}
