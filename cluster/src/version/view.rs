//! A state read in place: for the read path, where most keys have one value and nothing needs to
//! be built to hand it out.
//!
//! [`StateRef::parse`] checks everything once (bounds, order, all checks); what comes after neither
//! fails nor copies. [`StateRef::parse_head`] leaves the values alone, for those who do not show them.

use bytes::Bytes;

use super::codec::{
    CHECK_BYTES, FORMAT_VERSION, HEADER_BYTES, KIND_TOMBSTONE, KIND_VALUE, SIBLING_BYTES, low_half,
    value_check,
};
use super::opaque::{ContextRef, STAMP_BYTES, stamp, take};
use super::state::is_expired;
use super::window::{REMEMBERED_MAX, RETRIES_MAX, Remembered, Window};
use super::{Actor, Context, ContextError, Dot, Sibling, State, StateError};
use crate::api::Idempotency;

/// A checked state in borrowed bytes.
#[derive(Clone, Copy, Debug)]
pub struct StateRef<'a> {
    digest: u128,
    seen: ContextRef<'a>,
    siblings: &'a [[u8; SIBLING_BYTES]],
    remembered: &'a [u8],
    values: &'a [u8],
}

/// One uncovered write, in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiblingRef<'a> {
    /// See [`Sibling::dot`].
    pub dot: Dot,
    /// See [`Sibling::value`].
    pub value: Option<&'a [u8]>,
    /// See [`Sibling::expires_at_ms`].
    pub expires_at_ms: u64,
    value_check: u64,
}

impl SiblingRef<'_> {
    /// Whether a reader at `now_ms` sees it.
    pub fn is_live(&self, now_ms: u64) -> bool {
        self.value.is_some() && !is_expired(self.expires_at_ms, now_ms)
    }
}

impl<'a> StateRef<'a> {
    /// Checks the bytes of [`State::encode`]. No allocation; one hash over the bytes.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StateError> {
        let state = Self::parse_head(bytes)?;
        for sibling in state.siblings() {
            check(sibling.value_check, value_check(sibling.value))?;
        }
        Ok(state)
    }

    /// As [`StateRef::parse`], but without a look at the values' bytes: for what is not shown to
    /// anybody, or shown only with the values' own checks beside it. Costs the same for any value.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn parse_head(bytes: &'a [u8]) -> Result<Self, StateError> {
        if bytes.len() < HEADER_BYTES + CHECK_BYTES {
            return Err(StateError::TooShort { len: bytes.len() });
        }
        // Before the check: another version may keep it elsewhere.
        if bytes[0] != FORMAT_VERSION {
            return Err(StateError::Version { found: bytes[0] });
        }
        // What says how long the head is has not been checked yet: only its bounds are sure.
        let mut rest = &bytes[1..];
        let [flags] = take(&mut rest)?;
        let sibling_count = usize::from(u16::from_le_bytes(take(&mut rest)?));
        let remembered_count = usize::from(u16::from_le_bytes(take(&mut rest)?));
        let seen = Context::skip_bytes(&mut rest)?;
        let (siblings, tail) = rest
            .split_at_checked(sibling_count * SIBLING_BYTES)
            .ok_or(malformed("cut short"))?;
        let (siblings, _) = siblings.as_chunks::<SIBLING_BYTES>();
        rest = tail;
        check_remembered(&mut rest, remembered_count)?;
        let remembered = &tail[..tail.len() - rest.len()];
        let digest = xxhash_rust::xxh3::xxh3_128(&bytes[..bytes.len() - rest.len()]);
        check(u64::from_le_bytes(take(&mut rest)?), low_half(digest))?;
        if flags != 0 {
            return Err(malformed("unknown flags"));
        }
        let state = Self {
            digest,
            seen,
            siblings,
            remembered,
            values: rest,
        };
        state.check_siblings()?;
        Ok(state)
    }

    /// Uncovered writes, oldest dot first, tombstones and expired ones among them.
    pub fn siblings(&self) -> impl Iterator<Item = SiblingRef<'a>> + use<'a> {
        let mut values = self.values;
        let seen = self.seen;
        self.siblings.iter().map(move |bytes| {
            let head = SiblingHead::read(bytes);
            let (value, rest) = values.split_at(head.value_len);
            values = rest;
            SiblingRef {
                dot: Dot {
                    actor: seen.actor(head.actor).unwrap_or(Actor(0)),
                    counter: head.counter,
                },
                value: (head.kind == KIND_VALUE).then_some(value),
                expires_at_ms: head.expires_at_ms,
                value_check: head.value_check,
            }
        })
    }

    /// What a reader at `now_ms` sees, oldest dot first.
    pub fn live(&self, now_ms: u64) -> impl Iterator<Item = SiblingRef<'a>> + use<'a> {
        self.siblings()
            .filter(move |sibling| sibling.is_live(now_ms))
    }

    /// The value, when the key holds one write and a reader at `now_ms` sees it: the usual case,
    /// for protocols that only want bytes.
    pub fn single(&self, now_ms: u64) -> Option<&'a [u8]> {
        let [only] = self.siblings else { return None };
        let head = SiblingHead::read(only);
        (head.kind == KIND_VALUE && !is_expired(head.expires_at_ms, now_ms)).then_some(self.values)
    }

    /// See [`State::context`]. Allocates.
    pub fn context(&self) -> Context {
        self.seen.to_context()
    }

    /// See [`State::newest_stamp`].
    pub fn newest_stamp(&self) -> u64 {
        self.seen.newest_stamp()
    }

    /// 128 bits over the whole state; computed when it was checked. Replicas of one key with equal
    /// digests hold the same state.
    pub fn digest(&self) -> u128 {
        self.digest
    }

    /// The leaf hash of this key in a hash tree: key, and of each uncovered write the dot, whether
    /// it deletes, its expiry and its value. What was superseded does not count, so replicas agree
    /// as soon as they hold the same writes, whenever they pruned what they have seen.
    pub fn leaf_hash(&self, key: &[u8]) -> u128 {
        let mut hasher = xxhash_rust::xxh3::Xxh3Default::new();
        // The length first: no key with its siblings reads like another key.
        hasher.update(&u64::try_from(key.len()).unwrap_or(u64::MAX).to_le_bytes());
        hasher.update(key);
        for sibling in self.siblings() {
            hasher.update(&sibling.dot.actor.0.to_le_bytes());
            hasher.update(&sibling.dot.counter.to_le_bytes());
            hasher.update(&sibling.expires_at_ms.to_le_bytes());
            hasher.update(&[u8::from(sibling.value.is_some())]);
            hasher.update(&sibling.value_check.to_le_bytes());
        }
        hasher.digest128()
    }

    /// The owned state. `bytes` is the buffer that was parsed; values share it.
    pub(super) fn to_state(self, bytes: &Bytes) -> Result<State, StateError> {
        let siblings = self
            .siblings()
            .map(|sibling| Sibling {
                dot: sibling.dot,
                value: sibling.value.map(|value| bytes.slice_ref(value)),
                expires_at_ms: sibling.expires_at_ms,
                value_check: sibling.value_check,
            })
            .collect();
        let mut entries = Vec::new();
        let mut rest = self.remembered;
        while !rest.is_empty() {
            entries.push(RememberedRef::read(&mut rest)?.into_remembered(bytes));
        }
        Ok(State {
            siblings,
            seen: self.seen.to_context(),
            window: Window { entries },
        })
    }

    fn check_siblings(&self) -> Result<(), StateError> {
        let mut values_len = 0_usize;
        let mut last = None;
        for bytes in self.siblings {
            let head = SiblingHead::read(bytes);
            stamp(head.counter_bytes)?;
            let actor = self
                .seen
                .actor(head.actor)
                .ok_or(malformed("a sibling of an actor that is not named"))?;
            let dot = Dot {
                actor,
                counter: head.counter,
            };
            if last.is_some_and(|last| last >= dot) {
                return Err(malformed("siblings are not ascending"));
            }
            last = Some(dot);
            match head.kind {
                KIND_VALUE => {}
                KIND_TOMBSTONE
                    if head.value_len == 0 && head.expires_at_ms == 0 && head.value_check == 0 => {}
                KIND_TOMBSTONE => return Err(malformed("a tombstone with a value or an expiry")),
                _ => return Err(malformed("unknown kind of sibling")),
            }
            values_len = values_len
                .checked_add(head.value_len)
                .ok_or(malformed("values overflow"))?;
        }
        if values_len != self.values.len() {
            return Err(malformed("the values' lengths do not add up"));
        }
        Ok(())
    }
}

/// The fixed part of a sibling.
struct SiblingHead {
    actor: usize,
    kind: u8,
    value_len: usize,
    counter_bytes: [u8; STAMP_BYTES],
    counter: u64,
    expires_at_ms: u64,
    value_check: u64,
}

impl SiblingHead {
    fn read(bytes: &[u8; SIBLING_BYTES]) -> Self {
        let [a0, a1, kind, l0, l1, l2, l3, rest @ ..] = *bytes;
        let [c0, c1, c2, c3, c4, c5, c6, rest @ ..] = rest;
        let [e0, e1, e2, e3, e4, e5, e6, e7, check @ ..] = rest;
        Self {
            actor: usize::from(u16::from_le_bytes([a0, a1])),
            kind,
            value_len: usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX),
            counter_bytes: [c0, c1, c2, c3, c4, c5, c6],
            counter: u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, 0]),
            expires_at_ms: u64::from_le_bytes([e0, e1, e2, e3, e4, e5, e6, e7]),
            value_check: u64::from_le_bytes(check),
        }
    }
}

/// A remembered request, in place.
struct RememberedRef<'a> {
    request: Idempotency,
    until_ms: u64,
    dot: Dot,
    retries: Vec<Dot>,
    version: &'a [u8],
}

impl<'a> RememberedRef<'a> {
    fn read(rest: &mut &'a [u8]) -> Result<Self, StateError> {
        let request = Idempotency {
            id: u128::from_le_bytes(take(rest)?),
            body_hash: u64::from_le_bytes(take(rest)?),
        };
        let until_ms = u64::from_le_bytes(take(rest)?);
        let dot = read_dot(rest)?;
        let [retry_count] = take(rest)?;
        if usize::from(retry_count) > RETRIES_MAX {
            return Err(malformed("too many retries"));
        }
        let mut retries = Vec::with_capacity(usize::from(retry_count));
        let mut last = dot;
        for _ in 0..retry_count {
            let retry = read_dot(rest)?;
            if retry <= last {
                return Err(malformed("retries are not ascending"));
            }
            last = retry;
            retries.push(retry);
        }
        let version_len = usize::from(u16::from_le_bytes(take(rest)?));
        let (version, tail) = rest
            .split_at_checked(version_len)
            .ok_or(malformed("cut short"))?;
        *rest = tail;
        let mut unread = version;
        Context::skip_bytes(&mut unread)?;
        if !unread.is_empty() {
            return Err(malformed("bytes are left over in a remembered version"));
        }
        Ok(Self {
            request,
            until_ms,
            dot,
            retries,
            version,
        })
    }

    fn into_remembered(self, bytes: &Bytes) -> Remembered {
        Remembered {
            request: self.request,
            until_ms: self.until_ms,
            dot: self.dot,
            retries: self.retries,
            version: bytes.slice_ref(self.version),
        }
    }
}

fn check_remembered(rest: &mut &[u8], count: usize) -> Result<(), StateError> {
    if count > REMEMBERED_MAX {
        return Err(malformed("too many remembered requests"));
    }
    let mut last = None;
    for _ in 0..count {
        let entry = RememberedRef::read(rest)?;
        if last.is_some_and(|last| last >= entry.dot) {
            return Err(malformed("remembered requests are not ascending"));
        }
        last = Some(entry.dot);
    }
    Ok(())
}

fn read_dot(rest: &mut &[u8]) -> Result<Dot, StateError> {
    Ok(Dot {
        actor: Actor(u128::from_le_bytes(take(rest)?)),
        counter: stamp(take(rest)?)?,
    })
}

fn check(stored: u64, computed: u64) -> Result<(), StateError> {
    if stored == computed {
        Ok(())
    } else {
        Err(StateError::Check { stored, computed })
    }
}

fn malformed(what: &'static str) -> StateError {
    StateError::Malformed { what }
}

impl From<ContextError> for StateError {
    fn from(error: ContextError) -> Self {
        match error {
            ContextError::Malformed { what } => StateError::Malformed { what },
            ContextError::NotAString | ContextError::Changed | ContextError::Version { .. } => {
                malformed("a context string inside a state")
            }
        }
    }
}
