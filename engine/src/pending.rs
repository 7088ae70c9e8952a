//! Records whose frame is not durable yet: what the next decision about their keys must build on,
//! and what no reader may see.

use std::rc::Rc;

use ahash::RandomState;
use hashbrown::HashTable;
use torc_env::{Token, TreeId};

use crate::commit::Fate;
use crate::memtable::Packed;

/// The newest pending record of each key that has one.
pub(crate) struct Pending {
    table: HashTable<Waiting>,
    hasher: RandomState,
    bytes: usize,
}

/// A pending record and the fate of its batch.
pub(crate) struct Waiting {
    tree: TreeId,
    pub(crate) packed: Packed,
    pub(crate) fate: Rc<Fate>,
}

impl Pending {
    /// Empty. `hasher` is keyed by the environment, so that nobody can choose keys that collide.
    pub(crate) fn new(hasher: RandomState) -> Self {
        Self {
            table: HashTable::new(),
            hasher,
            bytes: 0,
        }
    }

    /// The pending record of a key.
    pub(crate) fn get(&self, tree: TreeId, token: Token, key: &[u8]) -> Option<&Waiting> {
        let hash = self.hasher.hash_one((tree, token));
        self.table
            .find(hash, |waiting| waiting.is_of(tree, token, key))
    }

    /// Makes `packed` its key's pending record.
    pub(crate) fn insert(&mut self, tree: TreeId, packed: Packed, fate: Rc<Fate>) {
        let hash = self.hasher.hash_one((tree, packed.token));
        self.bytes += packed.memory_bytes();
        let waiting = Waiting { tree, packed, fate };
        let found = self.table.find_mut(hash, |old| {
            old.is_of(tree, waiting.packed.token, waiting.packed.key())
        });
        match found {
            Some(old) => {
                self.bytes -= old.packed.memory_bytes();
                *old = waiting;
            }
            None => {
                let hasher = &self.hasher;
                self.table.insert_unique(hash, waiting, |waiting| {
                    hasher.hash_one((waiting.tree, waiting.packed.token))
                });
            }
        }
    }

    /// Forgets a record that is no longer pending, unless a newer one of its key is.
    pub(crate) fn remove(&mut self, tree: TreeId, packed: &Packed) {
        let hash = self.hasher.hash_one((tree, packed.token));
        let found = self.table.find_entry(hash, |waiting| {
            waiting.tree == tree && waiting.packed.seqno == packed.seqno
        });
        if let Ok(entry) = found {
            self.bytes -= entry.get().packed.memory_bytes();
            entry.remove();
        }
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.table.clear();
        self.bytes = 0;
    }

    /// Memory held, about, in bytes.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.bytes
    }

    /// Keys with a pending record.
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }
}

impl Waiting {
    fn is_of(&self, tree: TreeId, token: Token, key: &[u8]) -> bool {
        self.packed.token == token && self.tree == tree && self.packed.key() == key
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::memtable::Arena;
    use crate::record::{Kind, Record};

    #[test]
    fn only_the_newest_record_of_a_key_is_pending() {
        let mut pending = Pending::new(RandomState::with_seeds(1, 2, 3, 4));
        let packed = |seqno| {
            let record = Record {
                kind: Kind::Value,
                stamp: 0,
                expires_at_ms: 0,
                value: Bytes::new(),
            };
            Arena::default().pack(&record.at(Token(1), b"key", seqno))
        };
        pending.insert(TreeId(1), packed(1), Rc::default());
        pending.insert(TreeId(1), packed(2), Rc::default());
        pending.remove(TreeId(1), &packed(1));
        let found = pending.get(TreeId(1), Token(1), b"key").unwrap();
        assert_eq!(found.packed.seqno, 2);
        assert!(pending.get(TreeId(2), Token(1), b"key").is_none());
        assert!(pending.get(TreeId(1), Token(1), b"other").is_none());
        pending.remove(TreeId(1), &packed(2));
        assert_eq!((pending.len(), pending.memory_bytes()), (0, 0));
    }
}
