//! The state of a key as bytes: what the engine stores as a record's value and what replicas send
//! each other.
//!
//! ```text
//! version u8 │ flags u8 = 0 │ siblings u16 │ remembered u16
//! context                         (see opaque.rs)
//! per sibling, ascending by dot   actor u16 │ kind u8 │ value length u32 │ counter u56 │ expires_at_ms u64
//!                                 │ value check u64
//! per remembered, ascending       id u128 │ body u64 │ until_ms u64 │ actor u128 │ counter u56
//!                                 │ retries u8 │ (actor u128 │ counter u56) × retries
//!                                 │ version length u16 │ version (see opaque.rs)
//! check u64                       low half of xxh3-128 over everything before it
//! values, one after the other
//! ```
//!
//! Little-endian, no padding, one form for one state: equal states are equal bytes. Each value has a
//! check of its own, made when it was written, which goes wherever the value goes: a state can be
//! read, changed and compared without touching the values that it holds. The hash over what comes
//! before `check` is the state's digest. `docs/formats/state.md` has every field with its rule.
//!
//! Invariant: every byte string either decodes to a state that encodes to the same bytes, or is an
//! error; none panics.

use bytes::Bytes;

use super::opaque::{STAMP_BYTES, stamp_bytes};
use super::view::StateRef;
use super::window::{Remembered, Window};
use super::{Dot, Sibling, State};

/// The version that is written. Readers know all versions up to it.
pub const FORMAT_VERSION: u8 = 1;

pub(super) const HEADER_BYTES: usize = 6;
pub(super) const SIBLING_BYTES: usize = 2 + 1 + 4 + STAMP_BYTES + 8 + 8;
pub(super) const DOT_BYTES: usize = 16 + STAMP_BYTES;
/// A remembered request without retries and without its version.
const REMEMBERED_BYTES: usize = 16 + 8 + 8 + DOT_BYTES + 1 + 2;
pub(super) const CHECK_BYTES: usize = 8;

pub(super) const KIND_TOMBSTONE: u8 = 0;
pub(super) const KIND_VALUE: u8 = 1;

/// Bytes that are no state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Too short to hold a state at all.
    #[error("a state of {len} bytes")]
    TooShort {
        /// Bytes there are.
        len: usize,
    },
    /// A check does not fit: damaged. What the key holds is unknown, not absent.
    #[error("the state is damaged: its check is {stored:016x}, its bytes give {computed:016x}")]
    Check {
        /// In the bytes.
        stored: u64,
        /// Over the bytes.
        computed: u64,
    },
    /// Written by a newer Torc.
    #[error("state version {found} is unknown, known is {FORMAT_VERSION}")]
    Version {
        /// What the bytes say.
        found: u8,
    },
    /// The bytes break a rule of the format.
    #[error("malformed state: {what}")]
    Malformed {
        /// The rule.
        what: &'static str,
    },
}

impl State {
    /// The state of these bytes. Values share the buffer.
    ///
    /// # Errors
    /// On everything that [`State::encode`] does not give.
    pub fn decode(bytes: &Bytes) -> Result<State, StateError> {
        StateRef::parse(bytes)?.to_state(bytes)
    }

    /// The state as bytes. One allocation of the exact size, one copy of the values; no hash over them.
    ///
    /// # Panics
    /// When there are more than 65,535 siblings or a value has 4 GiB: both are bounded far below.
    pub fn encode(&self) -> Bytes {
        let mut into = Vec::with_capacity(self.encoded_len());
        let digest = self.push_head(&mut into);
        into.extend_from_slice(&low_half(digest).to_le_bytes());
        for value in self.values() {
            into.extend_from_slice(value);
        }
        debug_assert_eq!(into.len(), self.encoded_len());
        into.into()
    }

    /// 128 bits over the whole state: equal states have equal digests. Equal to
    /// [`StateRef::digest`] of the encoded state.
    pub fn digest(&self) -> u128 {
        self.push_head(&mut Vec::new())
    }

    /// Appends what comes before the check. Returns the hash over it.
    fn push_head(&self, into: &mut Vec<u8>) -> u128 {
        into.push(FORMAT_VERSION);
        into.push(0);
        push_count(into, self.siblings.len());
        push_count(into, self.window.entries.len());
        self.seen.write_bytes(into);
        for sibling in &self.siblings {
            self.push_sibling(into, sibling);
        }
        for entry in &self.window.entries {
            push_remembered(into, entry);
        }
        xxhash_rust::xxh3::xxh3_128(into)
    }

    fn values(&self) -> impl Iterator<Item = &Bytes> {
        self.siblings.iter().filter_map(|s| s.value.as_ref())
    }

    /// Bytes that [`State::encode`] gives.
    pub fn encoded_len(&self) -> usize {
        HEADER_BYTES
            + self.seen.bytes_len()
            + self.siblings.len() * SIBLING_BYTES
            + self.window.encoded_len()
            + self.values().map(Bytes::len).sum::<usize>()
            + CHECK_BYTES
    }

    fn push_sibling(&self, into: &mut Vec<u8>, sibling: &Sibling) {
        let actor = self
            .seen
            .index_of(sibling.dot.actor)
            .expect("a state's context names its siblings' actors");
        push_count(into, actor);
        let (kind, len) = match &sibling.value {
            None => (KIND_TOMBSTONE, 0),
            Some(value) => (KIND_VALUE, value.len()),
        };
        into.push(kind);
        let len = u32::try_from(len).expect("a value is below 4 GiB");
        into.extend_from_slice(&len.to_le_bytes());
        into.extend_from_slice(&stamp_bytes(sibling.dot.counter));
        into.extend_from_slice(&sibling.expires_at_ms.to_le_bytes());
        into.extend_from_slice(&sibling.value_check.to_le_bytes());
    }
}

impl Window {
    fn encoded_len(&self) -> usize {
        let entry_len = |entry: &Remembered| {
            REMEMBERED_BYTES + entry.retries.len() * DOT_BYTES + entry.version.len()
        };
        self.entries.iter().map(entry_len).sum()
    }
}

fn push_remembered(into: &mut Vec<u8>, entry: &Remembered) {
    into.extend_from_slice(&entry.request.id.to_le_bytes());
    into.extend_from_slice(&entry.request.body_hash.to_le_bytes());
    into.extend_from_slice(&entry.until_ms.to_le_bytes());
    push_dot(into, entry.dot);
    into.push(u8::try_from(entry.retries.len()).expect("few retries are remembered"));
    for retry in &entry.retries {
        push_dot(into, *retry);
    }
    push_count(into, entry.version.len());
    into.extend_from_slice(&entry.version);
}

fn push_dot(into: &mut Vec<u8>, dot: Dot) {
    into.extend_from_slice(&dot.actor.0.to_le_bytes());
    into.extend_from_slice(&stamp_bytes(dot.counter));
}

fn push_count(into: &mut Vec<u8>, count: usize) {
    let count = u16::try_from(count).expect("a state's tables have at most 65535 entries");
    into.extend_from_slice(&count.to_le_bytes());
}

/// The check of a sibling's value; 0 for a tombstone, which has none.
pub(super) fn value_check(value: Option<&[u8]>) -> u64 {
    value.map_or(0, xxhash_rust::xxh3::xxh3_64)
}

pub(super) fn low_half(hash: u128) -> u64 {
    u64::try_from(hash & u128::from(u64::MAX)).expect("64 bits are masked")
}
