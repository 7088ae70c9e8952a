//! What the engine stores: one record a key, ordered by (token, key) within a tree.
//!
//! The engine never looks into a value and never merges two: of two records of one key the one
//! with the higher sequence number wins, whole.

use bytes::Bytes;
use torc_env::Token;

/// Whether a record holds something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A live value.
    Value,
    /// A deletion. Kept, and returned by reads, until compaction may purge it.
    Tombstone,
}

/// The state of a key, as the layer above wrote it. A tombstone may carry a value too (its
/// causal history, for instance).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Value or tombstone.
    pub kind: Kind,
    /// The writer's time stamp. The engine only compares it with purge floors.
    pub stamp: u64,
    /// Milliseconds since 1970-01-01 UTC from which on this record counts as deleted; 0 = never.
    /// Reads return an expired record until compaction purges it: whoever reads decides with the
    /// clock that it trusts.
    pub expires_at_ms: u64,
    /// Opaque to the engine.
    pub value: Bytes,
}

impl Record {
    /// This record at its place, borrowed.
    pub fn at<'a>(&'a self, token: Token, key: &'a [u8], seqno: u64) -> EntryRef<'a> {
        EntryRef {
            token,
            key,
            seqno,
            kind: self.kind,
            stamp: self.stamp,
            expires_at_ms: self.expires_at_ms,
            value: &self.value,
        }
    }
}

/// A record with its place and age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `Token::of(tree, key)`. Recomputed from the key wherever it is not at hand; not stored.
    pub token: Token,
    /// The key.
    pub key: Bytes,
    /// Order of writing within the store: of two records of one key, the higher one is current.
    pub seqno: u64,
    /// What is stored.
    pub record: Record,
}

/// A borrowed [`Entry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryRef<'a> {
    /// See [`Entry::token`].
    pub token: Token,
    /// The key.
    pub key: &'a [u8],
    /// See [`Entry::seqno`].
    pub seqno: u64,
    /// See [`Record::kind`].
    pub kind: Kind,
    /// See [`Record::stamp`].
    pub stamp: u64,
    /// See [`Record::expires_at_ms`].
    pub expires_at_ms: u64,
    /// See [`Record::value`].
    pub value: &'a [u8],
}

impl Entry {
    /// This entry, borrowed.
    pub fn as_ref(&self) -> EntryRef<'_> {
        self.record.at(self.token, &self.key, self.seqno)
    }
}

impl EntryRef<'_> {
    /// An owned copy. Two allocations.
    pub fn to_entry(&self) -> Entry {
        Entry {
            token: self.token,
            key: Bytes::copy_from_slice(self.key),
            seqno: self.seqno,
            record: Record {
                kind: self.kind,
                stamp: self.stamp,
                expires_at_ms: self.expires_at_ms,
                value: Bytes::copy_from_slice(self.value),
            },
        }
    }
}

/// Where a scan begins, in the order (token, key) of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScanFrom {
    /// At the first key of this token or a later one.
    Token(Token),
    /// Behind this key.
    After(Token, Bytes),
}

impl ScanFrom {
    /// The token at which to start looking.
    pub fn token(&self) -> Token {
        match self {
            ScanFrom::Token(token) | ScanFrom::After(token, _) => *token,
        }
    }

    /// Whether the scan has not yet begun at this place.
    pub fn is_after(&self, token: Token, key: &[u8]) -> bool {
        match self {
            ScanFrom::Token(first) => token < *first,
            ScanFrom::After(last_token, last_key) => (token, key) <= (*last_token, last_key),
        }
    }
}
