//! The idempotency window of a key: which keyed requests were applied, and what they were answered.
//!
//! It lives in the key's state, so it is as durable and as replicated as the write itself, survives
//! overwrite and delete, and answers a retry through any coordinator after any restart.
//!
//! Invariant: what is kept depends only on the set of entries ever added and on the newest stamp of
//! the state, so that merging stays associative while the bounds are not reached.

use bytes::Bytes;
use torc_env::mutation;

use super::{Context, Dot};
use crate::api::Idempotency;
use crate::hlc::stamp_millis;

/// Keyed writes remembered for each key, the newest ones. Each costs about 100 bytes in every copy
/// of the state, rewritten with every write of the key; a client retries its latest write.
pub const REMEMBERED_MAX: usize = 64;
/// How long a keyed write is remembered, in milliseconds, unless configured (15 minutes).
pub const RETENTION_DEFAULT_MS: u64 = 15 * 60 * 1000;
/// Further dots of one request that are remembered: retries that overlapped on coordinators that
/// did not know of each other, so at most one a node and boot. What the count's one byte holds.
pub(super) const RETRIES_MAX: usize = 255;

/// A request that carries a name of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keyed {
    /// Its name and the hash of its body.
    pub request: Idempotency,
    /// Milliseconds since 1970 up to which it is remembered.
    pub until_ms: u64,
}

/// What is known of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answered {
    /// Nothing: it is new, or forgotten.
    No,
    /// It was applied and answered with this version.
    With(Context),
    /// Its id was used with another body.
    OtherBody,
}

/// An applied request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remembered {
    pub(super) request: Idempotency,
    pub(super) until_ms: u64,
    /// The lowest dot that the request got.
    pub(super) dot: Dot,
    /// Its other dots, ascending.
    pub(super) retries: Vec<Dot>,
    /// The version that it was answered with, in the form of [`Context::to_bytes`]: kept as bytes
    /// so that states decode and merge without copying it.
    pub(super) version: Bytes,
}

/// Applied requests, ascending by dot.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Window {
    pub(super) entries: Vec<Remembered>,
}

impl Window {
    pub(super) fn answered(&self, id: u128, body_hash: u64) -> Answered {
        // Ascending by dot: should one id have been raced with two bodies, the first one counts.
        match self.entries.iter().find(|entry| entry.request.id == id) {
            Some(_) if mutation::on("forget_requests") => Answered::No,
            None => Answered::No,
            Some(entry) if entry.request.body_hash != body_hash => Answered::OtherBody,
            Some(entry) => match Context::from_bytes(&entry.version) {
                Ok(version) => Answered::With(version),
                Err(error) => unreachable!("a version is checked when it is decoded: {error}"),
            },
        }
    }

    pub(super) fn remember(&mut self, keyed: Keyed, dot: Dot, version: &Context) {
        self.insert(Remembered {
            request: keyed.request,
            until_ms: keyed.until_ms,
            dot,
            retries: Vec::new(),
            version: version.bounded_bytes(),
        });
        self.forget_beyond_bound();
    }

    /// Both windows' entries, as far as they still count at `newest_stamp`.
    pub(super) fn union(one: &Window, two: &Window, newest_stamp: u64) -> Window {
        let now_ms = stamp_millis(newest_stamp);
        let (longer, shorter) = if one.entries.len() >= two.entries.len() {
            (one, two)
        } else {
            (two, one)
        };
        let mut union = longer.clone();
        // Before joining: an id that is used again after its time is another request.
        union.forget_before(newest_stamp);
        for entry in shorter.entries.iter().filter(|e| e.until_ms >= now_ms) {
            if union.find(entry.dot) != Ok(entry) {
                union.insert(entry.clone());
            }
        }
        union.forget_beyond_bound();
        union
    }

    /// Forgets what is past its time. The state's own newest stamp is the clock, so that every
    /// replica forgets the same.
    pub(super) fn forget_before(&mut self, newest_stamp: u64) {
        let now_ms = stamp_millis(newest_stamp);
        self.entries.retain(|entry| entry.until_ms >= now_ms);
    }

    /// When the last of the requests is forgotten; 0 when there is none.
    pub(super) fn last_until_ms(&self) -> u64 {
        self.entries
            .iter()
            .map(|entry| entry.until_ms)
            .max()
            .unwrap_or(0)
    }

    /// Whether a further dot of the request that got `dot` is covered by `context`: whoever saw
    /// one of a request's dots has seen the write.
    pub(super) fn retry_is_covered(&self, dot: Dot, context: &Context) -> bool {
        self.find(dot)
            .is_ok_and(|entry| entry.retries.iter().any(|retry| context.covers(*retry)))
    }

    /// Whether the request of these dots is remembered.
    pub(super) fn knows(&self, group: &[Dot]) -> bool {
        self.entries.iter().any(|entry| group.contains(&entry.dot))
    }

    /// Whether this is a further dot of a request whose lower dot stands for it.
    pub(super) fn gave_way(&self, dot: Dot) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.retries.contains(&dot))
    }

    /// All dots, ascending, of each request that got several.
    pub(super) fn retried(&self) -> Vec<Vec<Dot>> {
        self.entries
            .iter()
            .filter(|entry| !entry.retries.is_empty())
            .map(|entry| {
                std::iter::once(entry.dot)
                    .chain(entry.retries.iter().copied())
                    .collect()
            })
            .collect()
    }

    fn find(&self, dot: Dot) -> Result<&Remembered, usize> {
        self.entries
            .binary_search_by_key(&dot, |entry| entry.dot)
            .map(|place| &self.entries[place])
    }

    /// Adds an entry, joined with the one of the same request.
    fn insert(&mut self, mut entry: Remembered) {
        let same = self
            .entries
            .iter()
            .position(|known| known.request == entry.request);
        if let Some(place) = same {
            let known = self.entries.remove(place);
            entry = entry.joined(known);
        }
        let place = self.entries.partition_point(|known| known.dot < entry.dot);
        self.entries.insert(place, entry);
    }

    fn forget_beyond_bound(&mut self) {
        let beyond = self.entries.len().saturating_sub(REMEMBERED_MAX);
        self.entries.drain(..beyond);
    }
}

impl Remembered {
    /// One entry for two dots of one request: the lower one and its answer stand.
    fn joined(self, other: Remembered) -> Remembered {
        let (mut lower, higher) = if self.dot <= other.dot {
            (self, other)
        } else {
            (other, self)
        };
        lower.until_ms = lower.until_ms.max(higher.until_ms);
        let others = std::iter::once(higher.dot).chain(higher.retries);
        lower.retries.extend(others);
        lower.retries.sort_unstable();
        lower.retries.dedup();
        lower.retries.retain(|retry| *retry != lower.dot);
        lower.retries.truncate(RETRIES_MAX);
        lower
    }
}
