//! The state of a key as bytes: what the engine stores as a record's value and what replicas send
//! each other.
//!
//! ```text
//! version u8 │ flags u8 = 0 │ siblings u16 │ remembered u16
//! context                         (see opaque.rs)
//! per sibling, ascending by dot   actor u16 │ kind u8 │ value length u32 │ counter u56 │ expires_at_ms u64
//! per remembered, ascending       id u128 │ body u64 │ until_ms u64 │ actor u128 │ counter u56
//!                                 │ retries u8 │ (actor u128 │ counter u56) × retries
//!                                 │ version length u16 │ version (see opaque.rs)
//! values, one after the other
//! check u64                       low half of xxh3-128 over everything before it
//! ```
//!
//! Little-endian, no padding, one form for one state: equal states are equal bytes, so the hash
//! over the bytes is the state's digest. `docs/formats/state.md` has every field with its rule.
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
pub(super) const SIBLING_BYTES: usize = 2 + 1 + 4 + STAMP_BYTES + 8;
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
    /// The check does not fit: damaged. What the key holds is unknown, not absent.
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

    /// The state as bytes. One allocation of the exact size, one copy of the values, one hash.
    ///
    /// # Panics
    /// When there are more than 65,535 siblings or a value has 4 GiB: both are bounded far below.
    pub fn encode(&self) -> Bytes {
        let mut into = Vec::with_capacity(self.encoded_len());
        into.push(FORMAT_VERSION);
        into.push(0);
        push_count(&mut into, self.siblings.len());
        push_count(&mut into, self.window.entries.len());
        self.seen.write_bytes(&mut into);
        for sibling in &self.siblings {
            self.push_sibling(&mut into, sibling);
        }
        for entry in &self.window.entries {
            push_remembered(&mut into, entry);
        }
        for value in self.siblings.iter().filter_map(|s| s.value.as_ref()) {
            into.extend_from_slice(value);
        }
        let check = low_half(xxhash_rust::xxh3::xxh3_128(&into));
        into.extend_from_slice(&check.to_le_bytes());
        debug_assert_eq!(into.len(), self.encoded_len());
        into.into()
    }

    /// 128 bits over the whole state: equal states have equal digests. Equal to
    /// [`StateRef::digest`] of the encoded state, which costs nothing.
    pub fn digest(&self) -> u128 {
        let encoded = self.encode();
        xxhash_rust::xxh3::xxh3_128(&encoded[..encoded.len() - CHECK_BYTES])
    }

    /// Bytes that [`State::encode`] gives.
    pub fn encoded_len(&self) -> usize {
        let values = self.siblings.iter().filter_map(|s| s.value.as_ref());
        HEADER_BYTES
            + self.seen.bytes_len()
            + self.siblings.len() * SIBLING_BYTES
            + self.window.encoded_len()
            + values.map(Bytes::len).sum::<usize>()
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

pub(super) fn low_half(hash: u128) -> u64 {
    u64::try_from(hash & u128::from(u64::MAX)).expect("64 bits are masked")
}
