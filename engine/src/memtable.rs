//! The memtable: the newest durable records of every tree, in order, in memory.
//!
//! Stands behind the WAL (a record enters when its frame is durable) and before the tables (a full
//! memtable is sealed, handed to a flush behind an `Arc`, and dropped once its tables are in the
//! manifest). Holds one record a key, the newest.
//!
//! It knows nothing of trees' tables, of pending records or of the log beyond the mark up to which
//! its content is logged.

mod buckets;
mod packed;

use std::collections::BTreeMap;

use torc_env::{Token, TokenRange, TreeId};

use crate::record::{EntryRef, Record, ScanFrom};

pub(crate) use buckets::Buckets;
pub(crate) use packed::{Arena, Packed};

/// An active memtable.
pub(crate) struct Memtable {
    range: TokenRange,
    trees: BTreeMap<TreeId, Buckets>,
    bytes: usize,
    entries: usize,
    inserted_bytes: usize,
}

impl Memtable {
    /// Empty. Records should lie in `range`, the shard's slice of the ring: outside of it they
    /// are kept just as well, but found more slowly.
    pub(crate) fn new(range: TokenRange) -> Self {
        Self {
            range,
            trees: BTreeMap::new(),
            bytes: 0,
            entries: 0,
            inserted_bytes: 0,
        }
    }

    /// Puts a record in, or replaces the key's older one. No allocation beyond the growth of a
    /// bucket. Returns whether the key had none.
    pub(crate) fn insert(&mut self, tree: TreeId, packed: Packed) -> bool {
        self.bytes += packed.memory_bytes();
        self.inserted_bytes += packed.memory_bytes();
        let range = self.range;
        let buckets = self
            .trees
            .entry(tree)
            .or_insert_with(|| Buckets::new(range));
        match buckets.insert(packed) {
            Some(old) => {
                self.bytes -= old.memory_bytes();
                false
            }
            None => {
                self.entries += 1;
                true
            }
        }
    }

    /// The key's record.
    pub(crate) fn get(&self, tree: TreeId, token: Token, key: &[u8]) -> Option<&Packed> {
        self.trees.get(&tree)?.get(token, key)
    }

    /// The records of a tree from `from` to the end of `last`, in order.
    pub(crate) fn range<'a>(
        &'a self,
        tree: TreeId,
        from: &ScanFrom,
        last: Token,
    ) -> impl Iterator<Item = &'a Packed> + use<'a> {
        self.trees
            .get(&tree)
            .into_iter()
            .flat_map({
                let from = from.clone();
                move |buckets| buckets.iter_from(&from)
            })
            .take_while(move |packed| packed.token <= last)
    }

    /// Records of a tree.
    pub(crate) fn entries_of(&self, tree: TreeId) -> usize {
        self.trees.get(&tree).map_or(0, Buckets::len)
    }

    /// Forgets a tree.
    pub(crate) fn drop_tree(&mut self, tree: TreeId) {
        if let Some(buckets) = self.trees.remove(&tree) {
            for packed in buckets.iter() {
                self.bytes -= packed.memory_bytes();
                self.entries -= 1;
            }
        }
    }

    /// Memory of the records, about.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.bytes
    }

    /// Memory of all records ever put in. Replaced ones may live on in chunks that they share with
    /// others, so the true figure lies between this and [`Memtable::memory_bytes`].
    pub(crate) fn inserted_bytes(&self) -> usize {
        self.inserted_bytes
    }

    /// Records held.
    pub(crate) fn len(&self) -> usize {
        self.entries
    }

    /// Whether it holds nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Closes it for writing.
    pub(crate) fn seal(self) -> Sealed {
        Sealed { memtable: self }
    }
}

/// A memtable that no longer changes: what a flush turns into tables, one or more a tree. `Send`
/// and `Sync`; reads go on while the flush runs.
pub struct Sealed {
    memtable: Memtable,
}

impl Sealed {
    /// The trees with records, ascending.
    pub fn trees(&self) -> impl Iterator<Item = TreeId> + '_ {
        self.memtable.trees.keys().copied()
    }

    /// All records of a tree, ascending by (token, key), one a key.
    pub fn entries(&self, tree: TreeId) -> impl Iterator<Item = EntryRef<'_>> {
        self.memtable
            .trees
            .get(&tree)
            .into_iter()
            .flat_map(Buckets::iter)
            .map(Packed::as_entry_ref)
    }

    /// Number of records of a tree.
    pub fn entry_count(&self, tree: TreeId) -> usize {
        self.memtable.trees.get(&tree).map_or(0, Buckets::len)
    }

    /// Memory held, about, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.memtable.memory_bytes()
    }

    /// The key's record, without a copy.
    pub fn get(&self, tree: TreeId, token: Token, key: &[u8]) -> Option<Record> {
        self.memtable.get(tree, token, key).map(Packed::record)
    }

    /// Takes it apart, so that its memory can be given back piece by piece: freeing all at once
    /// would hold up a shard for milliseconds.
    pub(crate) fn into_pieces(self) -> impl Iterator<Item = impl Sized> {
        self.memtable
            .trees
            .into_values()
            .flat_map(Buckets::into_pages)
    }

    pub(crate) fn as_memtable(&self) -> &Memtable {
        &self.memtable
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::record::Kind;

    fn packed(arena: &mut Arena, token: u128, key: &[u8], seqno: u64) -> Packed {
        let record = Record {
            kind: Kind::Value,
            stamp: seqno,
            expires_at_ms: 0,
            value: Bytes::copy_from_slice(&seqno.to_le_bytes()),
        };
        arena.pack(&record.at(Token(token), key, seqno))
    }

    proptest! {
        #[test]
        fn agrees_with_a_sorted_map(
            ops in prop::collection::vec((any::<u8>(), any::<u16>(), 0u32..2, any::<bool>()), 1..3000),
            start in any::<u128>(),
        ) {
            let mut arena = Arena::default();
            let mut memtable = Memtable::new(TokenRange { first: Token(0), last: Token(u128::MAX / 2) });
            let mut model: BTreeMap<(u32, u128, Vec<u8>), u64> = BTreeMap::new();
            for (seqno, (byte, spread, tree, uniform)) in ops.into_iter().enumerate() {
                // Half of the tokens are spread evenly, half fall on a few places.
                let token = if uniform {
                    u128::from(spread) << 112 | u128::from(spread)
                } else {
                    u128::from(byte % 3)
                };
                let key = [byte];
                let seqno = u64::try_from(seqno).unwrap();
                memtable.insert(TreeId(tree), packed(&mut arena, token, &key, seqno));
                model.insert((tree, token, key.to_vec()), seqno);
            }
            prop_assert_eq!(memtable.len(), model.len());
            for ((tree, token, key), seqno) in &model {
                let found = memtable.get(TreeId(*tree), Token(*token), key).unwrap();
                prop_assert_eq!(found.seqno, *seqno);
                prop_assert_eq!(&found.record().value[..], &seqno.to_le_bytes());
                prop_assert!(memtable.get(TreeId(*tree), Token(*token), b"absent").is_none());
            }
            let from = ScanFrom::After(Token(start), Bytes::from_static(&[100]));
            for tree in 0..2 {
                let scanned: Vec<_> = memtable
                    .range(TreeId(tree), &from, Token::MAX)
                    .map(|packed| (packed.token.0, packed.key().to_vec(), packed.seqno))
                    .collect();
                let expected: Vec<_> = model
                    .iter()
                    .filter(|((t, token, key), _)| *t == tree && (*token, &key[..]) > (start, &[100]))
                    .map(|((_, token, key), seqno)| (*token, key.clone(), *seqno))
                    .collect();
                prop_assert_eq!(scanned, expected);
            }
            let sealed = memtable.seal();
            let all: usize = sealed.trees().map(|tree| sealed.entries(tree).count()).sum();
            prop_assert_eq!(all, model.len());
        }
    }

    #[test]
    fn memory_is_given_back_when_records_are_replaced_or_their_tree_goes() {
        let mut arena = Arena::default();
        let mut memtable = Memtable::new(TokenRange::ALL);
        memtable.insert(TreeId(1), packed(&mut arena, 1, b"key", 1));
        let one = memtable.memory_bytes();
        memtable.insert(TreeId(1), packed(&mut arena, 1, b"key", 2));
        assert_eq!(memtable.memory_bytes(), one);
        memtable.drop_tree(TreeId(1));
        assert_eq!((memtable.memory_bytes(), memtable.len()), (0, 0));
        assert!(memtable.is_empty());
    }
}
