//! A record as the memtable holds it: key and value in one run of reference-counted memory.

use std::cmp::Ordering;

use bytes::{Bytes, BytesMut};
use torc_env::Token;

use crate::record::{Entry, EntryRef, Kind, Record};

/// An entry in 80 bytes plus its key and value.
#[derive(Clone, Debug)]
pub(crate) struct Packed {
    pub(crate) token: Token,
    pub(crate) seqno: u64,
    stamp: u64,
    expires_at_ms: u64,
    body: Bytes,
    key_len: u32,
    kind: Kind,
}

impl Packed {
    pub(crate) fn key(&self) -> &[u8] {
        &self.body[..self.key_end()]
    }

    pub(crate) fn value(&self) -> &[u8] {
        &self.body[self.key_end()..]
    }

    /// The record; its value shares this memory.
    pub(crate) fn record(&self) -> Record {
        Record {
            kind: self.kind,
            stamp: self.stamp,
            expires_at_ms: self.expires_at_ms,
            value: self.body.slice(self.key_end()..),
        }
    }

    /// The entry; key and value share this memory.
    pub(crate) fn entry(&self) -> Entry {
        Entry {
            token: self.token,
            key: self.body.slice(..self.key_end()),
            seqno: self.seqno,
            record: self.record(),
        }
    }

    pub(crate) fn as_entry_ref(&self) -> EntryRef<'_> {
        EntryRef {
            token: self.token,
            key: self.key(),
            seqno: self.seqno,
            kind: self.kind,
            stamp: self.stamp,
            expires_at_ms: self.expires_at_ms,
            value: self.value(),
        }
    }

    /// Place of this entry against another key.
    pub(crate) fn cmp_key(&self, token: Token, key: &[u8]) -> Ordering {
        // Tokens nearly always decide; the key is only touched when they are equal.
        self.token.cmp(&token).then_with(|| self.key().cmp(key))
    }

    /// What this entry costs: its bytes, its slot and half-token at the usual two-thirds fill.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.body.len() + (size_of::<Packed>() + 8) * 3 / 2
    }

    fn key_end(&self) -> usize {
        usize::try_from(self.key_len).expect("an address has at least 32 bits")
    }
}

/// Chunks of memory from which entries are cut. A chunk is freed when the last entry in it is.
#[derive(Default)]
pub(crate) struct Arena {
    chunk: BytesMut,
}

/// Large enough that the chunk's own allocation does not count, small enough that a few long-lived
/// entries do not pin much.
const CHUNK_BYTES: usize = 256 << 10;

impl Arena {
    /// Copies key and value next to each other. Allocates once a chunk.
    pub(crate) fn pack(&mut self, entry: &EntryRef<'_>) -> Packed {
        let (key, value) = (entry.key, entry.value);
        let len = key.len() + value.len();
        let body = if len > CHUNK_BYTES / 8 {
            let mut own = BytesMut::with_capacity(len);
            Self::fill(&mut own, key, value)
        } else {
            if self.chunk.capacity() < len {
                self.chunk = BytesMut::with_capacity(CHUNK_BYTES);
            }
            Self::fill(&mut self.chunk, key, value)
        };
        Packed {
            token: entry.token,
            seqno: entry.seqno,
            stamp: entry.stamp,
            expires_at_ms: entry.expires_at_ms,
            body,
            key_len: u32::try_from(key.len()).expect("the key was held against its limit"),
            kind: entry.kind,
        }
    }

    fn fill(chunk: &mut BytesMut, key: &[u8], value: &[u8]) -> Bytes {
        chunk.extend_from_slice(key);
        chunk.extend_from_slice(value);
        chunk.split().freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_entry_gives_back_what_was_put_in() {
        let mut arena = Arena::default();
        for value_len in [0, 1, 100, CHUNK_BYTES, CHUNK_BYTES / 2] {
            let record = Record {
                kind: Kind::Tombstone,
                stamp: 7,
                expires_at_ms: 9,
                value: Bytes::from(vec![5; value_len]),
            };
            let packed = arena.pack(&record.at(Token(3), b"key", 11));
            assert_eq!(packed.key(), b"key");
            assert_eq!(packed.record(), record);
            assert_eq!(packed.entry().as_ref(), packed.as_entry_ref());
        }
        assert_eq!(size_of::<Packed>(), 80);
    }
}
