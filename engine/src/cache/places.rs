//! The places that keys have in the record cache.

use bytes::Bytes;
use torc_env::{Token, TreeId};

use super::s3_fifo::{Item, S3Fifo};
use crate::record::Record;

/// A key's place.
pub(super) struct Place {
    tree: TreeId,
    token: Token,
    key: Box<[u8]>,
    state: State,
}

/// What a place says about its key.
enum State {
    /// The newest synced state: a record, or that there is none.
    Known(Option<Record>),
    /// A newer one is in a memtable. The key keeps its place, for when that is flushed.
    Outdated,
}

impl Item for Place {
    fn held_bytes(&self) -> usize {
        let value = match &self.state {
            State::Known(Some(record)) => record.value.len(),
            State::Known(None) | State::Outdated => 0,
        };
        self.key.len() + value
    }

    fn strip(&mut self) {
        self.key = Box::default();
        self.state = State::Outdated;
    }
}

/// A key and its hash.
#[derive(Clone, Copy)]
pub(super) struct Hashed<'a> {
    pub(super) hash: u64,
    pub(super) tree: TreeId,
    pub(super) token: Token,
    pub(super) key: &'a [u8],
}

impl Hashed<'_> {
    fn is_at(&self, place: &Place) -> bool {
        place.token == self.token && place.tree == self.tree && *place.key == *self.key
    }
}

impl S3Fifo<Place> {
    /// The newest synced state of a key, if that is known; it counts as a hit.
    pub(super) fn state(&mut self, key: Hashed<'_>) -> Option<Option<Record>> {
        let slot = self.place(key)?;
        let State::Known(record) = &self.get(slot)?.state else {
            return None;
        };
        let record = record.clone();
        self.hit(slot);
        Some(record)
    }

    /// A newer state of a key is in a memtable: what is known of it is forgotten, its place kept.
    pub(super) fn outdate(&mut self, key: Hashed<'_>) {
        if let Some(slot) = self.place(key) {
            self.change(slot, |place| place.state = State::Outdated);
        }
    }

    /// Gives an outdated key the state that `newest` says, if it says one.
    pub(super) fn renew(&mut self, key: Hashed<'_>, newest: impl FnOnce() -> Option<Record>) {
        let Some(slot) = self.place(key) else {
            return;
        };
        let is_outdated = |place: &Place| matches!(place.state, State::Outdated);
        if self.get(slot).is_some_and(is_outdated)
            && let Some(newest) = newest()
        {
            // A copy: what was written shares memory with much that is not worth keeping.
            let record = Record {
                value: Bytes::copy_from_slice(&newest.value),
                ..newest
            };
            self.change(slot, |place| place.state = State::Known(Some(record)));
        }
    }

    /// Gives a key a place with its newest synced state, or its place that state.
    pub(super) fn fill(&mut self, key: Hashed<'_>, record: Option<&Record>) {
        let state = State::Known(record.cloned());
        match self.place(key) {
            Some(slot) => self.change(slot, |place| place.state = state),
            None => self.insert(
                key.hash,
                Place {
                    tree: key.tree,
                    token: key.token,
                    key: key.key.into(),
                    state,
                },
            ),
        }
    }

    fn place(&self, key: Hashed<'_>) -> Option<usize> {
        self.find(key.hash, |place| key.is_at(place))
    }
}
