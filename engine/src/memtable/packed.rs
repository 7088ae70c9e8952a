//! A record as the memtable holds it: key and value in one run of reference-counted memory.

use std::cmp::Ordering;
use std::collections::VecDeque;

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

/// Chunks of memory from which entries are cut. A chunk is used again when the last entry in it is
/// gone: memory fresh from the kernel would have to be zeroed first, which costs as much as the copy.
#[derive(Default)]
pub(crate) struct Arena {
    chunk: BytesMut,
    /// Chunks that are full, oldest first.
    full: VecDeque<BytesMut>,
    full_max: usize,
}

/// Large enough that the chunk's own allocation does not count, small enough that a few long-lived
/// entries do not pin much.
const CHUNK_BYTES: usize = 256 << 10;
/// Full chunks that are looked at before a new one is allocated.
const LOOKS: usize = 4;

impl Arena {
    /// An arena that keeps up to `bytes` of memory for new entries after old ones are gone.
    pub(crate) fn keeping(bytes: usize) -> Arena {
        Arena {
            chunk: BytesMut::with_capacity(CHUNK_BYTES),
            full_max: bytes / CHUNK_BYTES,
            ..Arena::default()
        }
    }

    /// Copies key and value next to each other. Allocates at most once a chunk.
    pub(crate) fn pack(&mut self, entry: &EntryRef<'_>) -> Packed {
        let (key, value) = (entry.key, entry.value);
        let len = key.len() + value.len();
        let body = if len > CHUNK_BYTES / 8 {
            let mut own = BytesMut::with_capacity(len);
            Self::fill(&mut own, key, value)
        } else {
            if self.chunk.capacity() < len {
                self.next_chunk();
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

    fn next_chunk(&mut self) {
        if self.full.len() < self.full_max {
            self.full.push_back(std::mem::take(&mut self.chunk));
        }
        for _ in 0..LOOKS.min(self.full.len()) {
            let Some(mut oldest) = self.full.pop_front() else {
                break;
            };
            if oldest.try_reclaim(CHUNK_BYTES) {
                self.chunk = oldest;
                return;
            }
            self.full.push_back(oldest);
        }
        self.chunk = BytesMut::with_capacity(CHUNK_BYTES);
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

    #[test]
    fn a_chunk_is_used_again_only_when_no_entry_in_it_is_left() {
        let mut arena = Arena::keeping(4 * CHUNK_BYTES);
        let mut seqno = 0;
        let mut pack = |fill: u8| {
            seqno += 1;
            let record = Record {
                kind: Kind::Value,
                stamp: 0,
                expires_at_ms: 0,
                value: Bytes::from(vec![fill; CHUNK_BYTES / 8 - 3]),
            };
            arena.pack(&record.at(Token(1), b"key", seqno))
        };
        let kept = pack(1);
        let first_chunk = kept.body.as_ptr();
        let others: Vec<Packed> = (0..7).map(|_| pack(2)).collect();
        let second = pack(3);
        drop(others);
        (0..7).for_each(|_| drop(pack(4)));
        assert_ne!(pack(5).body.as_ptr(), first_chunk);
        assert!(kept.value().iter().all(|byte| *byte == 1));
        assert!(second.value().iter().all(|byte| *byte == 3));
        drop(kept);
        let reused = (0..32).any(|_| pack(6).body.as_ptr() == first_chunk);
        assert!(reused, "the first chunk is free");
    }
}
