//! A context as bytes and as the opaque string that clients carry.
//!
//! ```text
//! bytes   count u16 │ per actor: actor u128 │ form u8 │ floor u56 if form has 0x80 │ exact u56 × (form & 0x1f)
//! string  base64url without padding of: version u8 │ bytes │ check u64
//! ```
//!
//! Little-endian; actors ascending, exact dots ascending and above the floor; a stamp fits into
//! seven bytes because it is at most [`STAMP_MAX`]. One context has one form, so equal contexts
//! are equal strings. The check is xxh3-64 over everything before it: it finds damage and tinkering,
//! it is no signature; a client that may write a key may remove its values anyway.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;

use super::context::{EXACT_MAX, Seen};
use super::{Actor, Context, STAMP_MAX};

/// First byte of the string's content.
const STRING_VERSION: u8 = 1;
/// Seed of the string's check: a context string is nothing else that happens to be hashed.
const CHECK_SEED: u64 = 0x746f_7263_2d63_7478;
/// Actors named in a string, the newest: 128 are about 3 KiB, which every HTTP stack takes in a
/// header. An actor left out claims less, which is safe.
pub const CONTEXT_ACTORS_MAX: usize = 128;
/// The longest string that is looked at.
const STRING_BYTES_MAX: usize = 32 * 1024;

const FLOOR_FLAG: u8 = 0x80;
const EXACT_MASK: u8 = 0x1f;
/// Bytes of a stored stamp.
pub(super) const STAMP_BYTES: usize = 7;
const CHECK_BYTES: usize = 8;

/// Bytes or a string that are no context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// Not base64url without padding, too long, or cut short.
    #[error("not a context string")]
    NotAString,
    /// The check does not fit: damaged or tampered with.
    #[error("the context string was changed")]
    Changed,
    /// Written by a newer Torc.
    #[error("context version {found} is unknown, known is {STRING_VERSION}")]
    Version {
        /// What the string says.
        found: u8,
    },
    /// The bytes break a rule of the format.
    #[error("malformed context: {what}")]
    Malformed {
        /// The rule.
        what: &'static str,
    },
}

impl Context {
    /// The opaque string of this context: safe in URLs and headers, the same for equal contexts.
    /// Names the [`CONTEXT_ACTORS_MAX`] actors with the newest dots.
    pub fn to_opaque(&self) -> String {
        let bytes = self.bounded_bytes();
        let mut content = Vec::with_capacity(1 + bytes.len() + CHECK_BYTES);
        content.push(STRING_VERSION);
        content.extend_from_slice(&bytes);
        let check = xxhash_rust::xxh3::xxh3_64_with_seed(&content, CHECK_SEED);
        content.extend_from_slice(&check.to_le_bytes());
        URL_SAFE_NO_PAD.encode(content)
    }

    /// The context of an opaque string.
    ///
    /// # Errors
    /// On every string that [`Context::to_opaque`] does not give.
    pub fn from_opaque(string: &str) -> Result<Context, ContextError> {
        if string.len() > STRING_BYTES_MAX {
            return Err(ContextError::NotAString);
        }
        let content = URL_SAFE_NO_PAD
            .decode(string)
            .map_err(|_| ContextError::NotAString)?;
        let (checked, check) = content
            .split_last_chunk::<CHECK_BYTES>()
            .ok_or(ContextError::NotAString)?;
        if xxhash_rust::xxh3::xxh3_64_with_seed(checked, CHECK_SEED) != u64::from_le_bytes(*check) {
            return Err(ContextError::Changed);
        }
        match checked.split_first() {
            Some((&STRING_VERSION, bytes)) => {
                let context = Context::from_bytes(bytes)?;
                if context.actor_count() > CONTEXT_ACTORS_MAX {
                    return Err(malformed("too many actors"));
                }
                Ok(context)
            }
            Some((&found, _)) => Err(ContextError::Version { found }),
            None => Err(ContextError::NotAString),
        }
    }

    /// The context as bytes, for messages and records that are checked as a whole.
    pub fn to_bytes(&self) -> Bytes {
        let mut bytes = Vec::with_capacity(self.bytes_len());
        self.write_bytes(&mut bytes);
        bytes.into()
    }

    /// The context of these bytes, all of which must belong to it.
    ///
    /// # Errors
    /// When they break a rule of the format.
    pub fn from_bytes(bytes: &[u8]) -> Result<Context, ContextError> {
        let mut rest = bytes;
        let context = Context::skip_bytes(&mut rest)?;
        if rest.is_empty() {
            Ok(context.to_context())
        } else {
            Err(malformed("bytes are left over"))
        }
    }

    /// The bytes of what [`Context::to_opaque`] says.
    pub(super) fn bounded_bytes(&self) -> Bytes {
        if self.seen.len() <= CONTEXT_ACTORS_MAX {
            self.to_bytes()
        } else {
            self.newest_actors(CONTEXT_ACTORS_MAX).to_bytes()
        }
    }

    pub(super) fn bytes_len(&self) -> usize {
        let per_actor =
            |seen: &Seen| 16 + 1 + STAMP_BYTES * (usize::from(seen.floor > 0) + seen.exact.len());
        2 + self.seen.iter().map(per_actor).sum::<usize>()
    }

    /// # Panics
    /// When more than 65,535 actors are named: pruning has failed for decades.
    pub(super) fn write_bytes(&self, into: &mut Vec<u8>) {
        let count = u16::try_from(self.seen.len()).expect("a context names at most 65535 actors");
        into.extend_from_slice(&count.to_le_bytes());
        for seen in &self.seen {
            into.extend_from_slice(&seen.actor.0.to_le_bytes());
            let exact = u8::try_from(seen.exact.len()).expect("at most EXACT_MAX exact dots");
            let floor = if seen.floor > 0 { FLOOR_FLAG } else { 0 };
            into.push(floor | exact);
            if seen.floor > 0 {
                into.extend_from_slice(&stamp_bytes(seen.floor));
            }
            for counter in &seen.exact {
                into.extend_from_slice(&stamp_bytes(*counter));
            }
        }
    }

    /// Checks the context at the front of `rest` and steps over it.
    pub(super) fn skip_bytes<'a>(rest: &mut &'a [u8]) -> Result<ContextRef<'a>, ContextError> {
        let count = u16::from_le_bytes(take(rest)?);
        let start = *rest;
        let mut last = None;
        let mut newest_stamp = 0;
        for _ in 0..count {
            let claim = Claim::read(rest)?;
            if last.is_some_and(|last| last >= claim.actor) {
                return Err(malformed("actors are not ascending"));
            }
            last = Some(claim.actor);
            newest_stamp = claim.newest().max(newest_stamp);
        }
        Ok(ContextRef {
            count,
            claims: &start[..start.len() - rest.len()],
            newest_stamp,
        })
    }

    fn newest_actors(&self, actors_max: usize) -> Context {
        let mut newest: Vec<&Seen> = self.seen.iter().collect();
        newest.sort_by_key(|seen| std::cmp::Reverse((seen.newest(), seen.actor)));
        newest.truncate(actors_max);
        newest.sort_by_key(|seen| seen.actor);
        Context {
            seen: newest.into_iter().cloned().collect(),
        }
    }
}

/// A context in bytes that have been checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct ContextRef<'a> {
    count: u16,
    claims: &'a [u8],
    newest_stamp: u64,
}

impl<'a> ContextRef<'a> {
    pub(super) fn newest_stamp(&self) -> u64 {
        self.newest_stamp
    }

    pub(super) fn actor_count(&self) -> usize {
        usize::from(self.count)
    }

    /// The actor at this place. Walks: the newest of a few actors is what is asked for.
    pub(super) fn actor(&self, index: usize) -> Option<Actor> {
        self.claims().nth(index).map(|claim| claim.actor)
    }

    pub(super) fn to_context(self) -> Context {
        let mut seen = Vec::with_capacity(self.actor_count());
        seen.extend(self.claims().map(Claim::to_seen));
        Context { seen }
    }

    fn claims(&self) -> impl Iterator<Item = Claim<'a>> + use<'a> {
        let mut rest = self.claims;
        std::iter::from_fn(move || Claim::read(&mut rest).ok())
    }
}

/// What is claimed of one actor, in place.
#[derive(Clone, Copy)]
struct Claim<'a> {
    actor: Actor,
    floor: u64,
    exact: &'a [[u8; STAMP_BYTES]],
}

impl<'a> Claim<'a> {
    fn read(rest: &mut &'a [u8]) -> Result<Self, ContextError> {
        let actor = Actor(u128::from_le_bytes(take(rest)?));
        let [form] = take(rest)?;
        let exact_count = usize::from(form & EXACT_MASK);
        let has_floor = form & FLOOR_FLAG != 0;
        if form & !(FLOOR_FLAG | EXACT_MASK) != 0 || exact_count > EXACT_MAX {
            return Err(malformed("unknown form of a claim"));
        }
        if !has_floor && exact_count == 0 {
            return Err(malformed("an actor of whom nothing is claimed"));
        }
        let floor = if has_floor { stamp(take(rest)?)? } else { 0 };
        let (exact, tail) = rest
            .split_at_checked(exact_count * STAMP_BYTES)
            .ok_or(malformed("cut short"))?;
        *rest = tail;
        let (exact, _) = exact.as_chunks::<STAMP_BYTES>();
        let mut above = floor;
        for bytes in exact {
            let counter = stamp(*bytes)?;
            if counter <= above {
                return Err(malformed("exact dots are not ascending above the floor"));
            }
            above = counter;
        }
        Ok(Self {
            actor,
            floor,
            exact,
        })
    }

    fn newest(&self) -> u64 {
        self.exact.last().map_or(self.floor, |bytes| widen(*bytes))
    }

    fn to_seen(self) -> Seen {
        Seen {
            actor: self.actor,
            floor: self.floor,
            exact: self.exact.iter().map(|bytes| widen(*bytes)).collect(),
        }
    }
}

fn widen(bytes: [u8; STAMP_BYTES]) -> u64 {
    let mut wide = [0; 8];
    wide[..STAMP_BYTES].copy_from_slice(&bytes);
    u64::from_le_bytes(wide)
}

/// A stamp in its stored form.
pub(super) fn stamp_bytes(stamp: u64) -> [u8; STAMP_BYTES] {
    let [a, b, c, d, e, f, g, top] = stamp.to_le_bytes();
    assert_eq!(top, 0, "stamp {stamp} needs more than seven bytes");
    [a, b, c, d, e, f, g]
}

/// A stored stamp, if it is one.
pub(super) fn stamp(bytes: [u8; STAMP_BYTES]) -> Result<u64, ContextError> {
    match widen(bytes) {
        0 => Err(malformed("a stamp of zero")),
        stamp if stamp > STAMP_MAX => Err(malformed("a stamp beyond the last one")),
        stamp => Ok(stamp),
    }
}

/// The next `N` bytes.
pub(super) fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], ContextError> {
    let (head, tail) = rest
        .split_first_chunk::<N>()
        .ok_or(malformed("cut short"))?;
    *rest = tail;
    Ok(*head)
}

fn malformed(what: &'static str) -> ContextError {
    ContextError::Malformed { what }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::version::Dot;

    fn sample() -> Context {
        let mut context = Context::default();
        context.raise_floor(Actor(7), 1_700_000_000_000_000);
        for counter in [1_700_000_000_000_005, 1_700_000_000_000_009] {
            context.add(Dot {
                actor: Actor(7),
                counter,
            });
        }
        context.add(Dot {
            actor: Actor(u128::MAX),
            counter: 3,
        });
        context
    }

    #[test]
    fn the_string_is_pinned_and_safe_in_headers_and_urls() {
        let string = sample().to_opaque();
        assert_eq!(
            string,
            "AQIABwAAAAAAAAAAAAAAAAAAAIIAQB4YJAoGBUAeGCQKBglAHhgkCgb_____________________AQMAAAAAAABwUchVWDvqpQ"
        );
        assert!(
            string
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        );
        assert_eq!(Context::from_opaque(&string), Ok(sample()));
        let nothing = Context::default();
        assert_eq!(Context::from_opaque(&nothing.to_opaque()), Ok(nothing));
    }

    #[test]
    fn no_bytes_make_a_context_panic() {
        let valid = [sample(), Context::default()].map(|context| context.to_bytes().to_vec());
        crate::fuzz::parser("context", &valid).fuzz(|bytes| {
            if let Ok(text) = std::str::from_utf8(bytes) {
                drop(Context::from_opaque(text));
            }
            let mut content = vec![STRING_VERSION];
            content.extend_from_slice(bytes);
            let check = xxhash_rust::xxh3::xxh3_64_with_seed(&content, CHECK_SEED);
            content.extend_from_slice(&check.to_le_bytes());
            let string = URL_SAFE_NO_PAD.encode(content);
            if let Ok(context) = Context::from_opaque(&string) {
                assert_eq!(context.to_opaque(), string, "one context, one form");
                assert!(context.includes(&context));
                let mut joined = sample();
                joined.join(&context);
                assert!(joined.includes(&context));
            }
        });
    }

    #[test]
    fn every_changed_character_and_every_truncation_is_an_error() {
        let string = sample().to_opaque();
        for length in 0..string.len() {
            assert!(Context::from_opaque(&string[..length]).is_err(), "{length}");
        }
        for place in 0..string.len() {
            for replacement in (0..=127_u8).map(char::from) {
                let mut changed = string.clone();
                changed.replace_range(place..=place, &replacement.to_string());
                if changed != string {
                    assert!(Context::from_opaque(&changed).is_err(), "{changed}");
                }
            }
        }
        assert!(Context::from_opaque(&format!("{string}A")).is_err());
        assert!(Context::from_opaque(&format!("{string}=")).is_err());
        assert!(Context::from_opaque("").is_err());
    }

    #[test]
    fn bytes_that_break_a_rule_are_errors_even_with_a_right_check() {
        let sound = sample().to_bytes();
        for place in 0..sound.len() {
            for bit in 0..8 {
                let mut bytes = sound.to_vec();
                bytes[place] ^= 1 << bit;
                if let Ok(context) = Context::from_bytes(&bytes) {
                    assert_eq!(context.to_bytes(), bytes, "one context has one form");
                }
            }
        }
        for length in 0..sound.len() {
            assert!(Context::from_bytes(&sound[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn a_string_names_the_newest_actors_only() {
        let dots = (1..=300).map(|counter| Dot {
            actor: Actor(u128::from(counter % 7 * 1000 + counter)),
            counter,
        });
        let all: Context = dots.collect();
        let named = Context::from_opaque(&all.to_opaque()).expect("its own string");
        assert_eq!(named.actor_count(), CONTEXT_ACTORS_MAX);
        assert!(all.includes(&named));
        assert_eq!(named.newest_stamp(), 300);
        assert!(named.clock().all(|(_, newest)| newest > 300 - 128));
    }
}
