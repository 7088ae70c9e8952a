//! The whole state of one key: its uncovered writes, all that they and their forerunners have
//! seen, and the answers that retries get.

use bytes::Bytes;
use torc_env::mutation;

use super::codec::value_check;
use super::window::{Answered, Keyed, Window};
use super::{Actor, Context, Dot};
use crate::conflict::Conflict;

/// Actors that a state's context names, 24 bytes each. Every boot of every replica that writes the
/// key adds one, and repair prunes them; the bound only holds against a client that invents actors
/// and a repair that never runs.
const ACTORS_MAX: usize = 1024;

/// One write that no other write has covered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sibling {
    /// Its name. Two siblings of one dot are the same write, byte for byte.
    pub dot: Dot,
    /// What was written; `None` = a tombstone.
    pub value: Option<Bytes>,
    /// Milliseconds since 1970 from which on it counts as deleted; 0 = never. 0 in tombstones.
    pub expires_at_ms: u64,
    /// Made when the value was written, and never again: a value that was damaged since does not fit.
    pub(super) value_check: u64,
}

impl Sibling {
    /// Whether a reader at `now_ms` sees it.
    pub fn is_live(&self, now_ms: u64) -> bool {
        self.value.is_some() && !is_expired(self.expires_at_ms, now_ms)
    }
}

/// The one rule of expiry, the same on every replica: an absolute time, reached or not.
pub(super) fn is_expired(expires_at_ms: u64, now_ms: u64) -> bool {
    expires_at_ms != 0 && expires_at_ms <= now_ms
}

/// Under which standing a dot is minted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Minter {
    /// The dot's actor is a current replica of the key, and the state is its complete one: every
    /// dot that this actor ever minted for the key is in it or superseded in it. The mint raises
    /// the actor's floor. The state may leave the node only after the engine took it.
    Replica,
    /// Anyone else (a coordinator of a sloppy write while no replica answers): the dot stays exact.
    Guest,
}

/// One write, ready to be applied.
#[derive(Clone, Debug)]
pub struct Write<'a> {
    /// What the writer has seen: what the write replaces.
    pub context: &'a Context,
    /// The write's own dot, minted above the newest stamps of the state and of the context.
    pub dot: Dot,
    /// Who mints it.
    pub minter: Minter,
    /// The value; `None` deletes.
    pub value: Option<Bytes>,
    /// See [`Sibling::expires_at_ms`].
    pub expires_at_ms: u64,
    /// Names the request, so that a retry finds its answer.
    pub keyed: Option<Keyed>,
    /// Civil time in milliseconds.
    pub now_ms: u64,
    /// The keyspace's policy.
    pub conflict: Conflict,
    /// The most live siblings that a value may join.
    pub siblings_max: usize,
}

/// The write would mint one sibling too many. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the key has {live} siblings, allowed are {siblings_max}: read and resolve them first")]
pub struct TooManySiblings {
    /// Live siblings that the write's context does not cover.
    pub live: usize,
    /// The bound.
    pub siblings_max: usize,
}

/// Two states hold different writes under one dot: a defect (an actor minted twice) or damage that
/// no checksum saw. Neither may overwrite the other; report it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("two different writes carry the dot {dot}")]
pub struct DotClash {
    /// The dot.
    pub dot: Dot,
}

/// The state of a key. The default is the state of a key that was never written.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct State {
    /// Uncovered writes, tombstones among them, ascending by dot.
    pub(super) siblings: Vec<Sibling>,
    /// Every dot that ever was in this state, the siblings' own included. What is claimed here and
    /// is no sibling is superseded. Names at least the siblings' actors.
    pub(super) seen: Context,
    /// Answers of keyed writes.
    pub(super) window: Window,
}

impl State {
    /// Whether nothing was ever written here.
    pub fn is_absent(&self) -> bool {
        self.siblings.is_empty() && self.seen.is_empty()
    }

    /// Uncovered writes, oldest dot first, tombstones and expired ones among them.
    pub fn siblings(&self) -> &[Sibling] {
        &self.siblings
    }

    /// What a reader at `now_ms` sees, oldest dot first.
    pub fn live(&self, now_ms: u64) -> impl Iterator<Item = &Sibling> {
        self.siblings
            .iter()
            .filter(move |sibling| sibling.is_live(now_ms))
    }

    /// Whether a reader at `now_ms` sees anything: the opposite of `If-None-Match: *`.
    pub fn has_live(&self, now_ms: u64) -> bool {
        self.live(now_ms).next().is_some()
    }

    /// Whether `If-Match` with this context holds: a live value exists, and the context covers
    /// every write present, tombstones included.
    pub fn matches(&self, context: &Context, now_ms: u64) -> bool {
        self.has_live(now_ms)
            && self
                .siblings
                .iter()
                .all(|sibling| context.covers(sibling.dot))
    }

    /// The context of a reader of this state: a write that carries it replaces everything here.
    pub fn context(&self) -> &Context {
        &self.seen
    }

    /// The newest stamp in it, superseded writes included; 0 when absent. Mint above it.
    pub fn newest_stamp(&self) -> u64 {
        self.seen.newest_stamp()
    }

    /// What the request of this id was answered, if a keyed write of it is remembered.
    pub fn answered(&self, id: u128, body_hash: u64) -> Answered {
        self.window.answered(id, body_hash)
    }

    /// Applies a write and returns its version: the write's context and its own dot, never
    /// siblings that it has not seen.
    ///
    /// # Errors
    /// [`TooManySiblings`] for a value that would join too many live ones. Deletes are never
    /// refused. When the bound is reached by dead siblings (tombstones, expired values), these give
    /// way: they hold nothing that could be lost.
    ///
    /// # Panics
    /// When the dot is not above everything in the state and the context, or a tombstone expires:
    /// the caller's mistake.
    pub fn put(&mut self, write: Write<'_>) -> Result<Context, TooManySiblings> {
        let newest = self.newest_stamp().max(write.context.newest_stamp());
        assert!(
            write.dot.counter > newest,
            "dot {} is not above stamp {newest}",
            write.dot
        );
        assert!(
            write.value.is_some() || write.expires_at_ms == 0,
            "a tombstone does not expire"
        );

        let stays = |sibling: &Sibling| {
            write.conflict == Conflict::Siblings
                && !mutation::on("put_removes_unseen_siblings")
                && !write.context.covers(sibling.dot)
                && !self.window.retry_is_covered(sibling.dot, write.context)
        };
        let mut kept = 0;
        let mut live = 0;
        for sibling in self.siblings.iter().filter(|sibling| stays(sibling)) {
            kept += 1;
            live += usize::from(sibling.is_live(write.now_ms));
        }
        if write.value.is_some() && live >= write.siblings_max {
            return Err(TooManySiblings {
                live,
                siblings_max: write.siblings_max,
            });
        }
        let dead_stay = kept < write.siblings_max;
        self.siblings
            .retain(|sibling| stays(sibling) && (dead_stay || sibling.is_live(write.now_ms)));

        self.seen.join(write.context);
        match write.minter {
            Minter::Replica => self.seen.raise_floor(write.dot.actor, write.dot.counter),
            Minter::Guest => self.seen.add(write.dot),
        }
        // The highest dot of all, so the order holds.
        self.siblings.push(Sibling {
            dot: write.dot,
            value_check: value_check(write.value.as_deref()),
            value: write.value,
            expires_at_ms: write.expires_at_ms,
        });

        let mut version = write.context.clone();
        version.add(write.dot);
        if let Some(keyed) = write.keyed {
            self.window.remember(keyed, write.dot, &version);
        }
        self.window.forget_before(self.seen.newest_stamp());
        self.bound_actors();
        Ok(version)
    }

    /// The state of a replica that has both: a write stays unless the other side has seen it and
    /// no longer holds it.
    ///
    /// Commutative, associative and idempotent, as long as no bound drops a claim
    /// ([`super::EXACT_MAX`], [`super::REMEMBERED_MAX`]); beyond it a superseded write may
    /// reappear, none is lost. Costs a few small allocations; values are shared, not copied.
    ///
    /// # Errors
    /// [`DotClash`] when both sides hold different writes under one dot.
    pub fn merge(&self, other: &State, conflict: Conflict) -> Result<State, DotClash> {
        let has_seen = |state: &State, dot: Dot| {
            state.seen.covers(dot) && !mutation::on("merge_brings_back_superseded")
        };
        let mut seen = self.seen.clone();
        seen.join(&other.seen);
        let mut siblings = Vec::with_capacity(self.siblings.len().max(other.siblings.len()));
        let (mut ours, mut theirs) = (self.siblings.as_slice(), other.siblings.as_slice());
        loop {
            match (ours, theirs) {
                ([], []) => break,
                ([a, rest_a @ ..], [b, rest_b @ ..]) if a.dot == b.dot => {
                    if a != b {
                        return Err(DotClash { dot: a.dot });
                    }
                    siblings.push(a.clone());
                    (ours, theirs) = (rest_a, rest_b);
                }
                ([a, rest @ ..], others) if others.first().is_none_or(|b| a.dot < b.dot) => {
                    if !has_seen(other, a.dot) {
                        siblings.push(a.clone());
                    }
                    ours = rest;
                }
                (_, [b, rest @ ..]) => {
                    if !has_seen(self, b.dot) {
                        siblings.push(b.clone());
                    }
                    theirs = rest;
                }
                ([_, ..], []) => unreachable!("the arm above takes what has nothing to compare"),
            }
        }
        let window = Window::union(&self.window, &other.window, seen.newest_stamp());
        let mut merged = State {
            siblings,
            seen,
            window,
        };
        if conflict.joins_retries() {
            merged.join_retries(self, other);
        }
        if conflict.orders_by_time() && mutation::on("lww_keeps_lowest") {
            merged.siblings.truncate(1);
        }
        let dropped = conflict.first_kept(merged.siblings.len());
        merged.siblings.drain(..dropped);
        if mutation::on("drop_sibling") && merged.siblings.len() > 1 {
            merged.siblings.pop();
        }
        merged.bound_actors();
        Ok(merged)
    }

    /// Makes one write of the dots that retries of one request got on different coordinators: the
    /// lowest one stands for all, and a write that has seen any of them has seen them all.
    fn join_retries(&mut self, one: &State, two: &State) {
        for group in self.window.retried() {
            // What is to be found first is the lowest dot; all that follow are doubles.
            let mut is_double = one.has_superseded(&group) || two.has_superseded(&group);
            self.siblings.retain(|sibling| {
                let is_retry = group.contains(&sibling.dot);
                let stays = !(is_retry && is_double);
                is_double |= is_retry;
                stays
            });
            for dot in group {
                self.seen.add(dot);
            }
        }
    }

    /// Whether a write that saw one of these dots, all of one request, has replaced it here: then
    /// the dot is gone, and not because it gave way to a lower one.
    fn has_superseded(&self, group: &[Dot]) -> bool {
        let holds = |dot: &Dot| self.siblings.iter().any(|sibling| sibling.dot == *dot);
        // Without its entry (forgotten over newer ones) nothing tells who gave way: keep the write.
        if !self.window.knows(group) && group.iter().any(holds) {
            return false;
        }
        group
            .iter()
            .any(|dot| self.seen.covers(*dot) && !holds(dot) && !self.window.gave_way(*dot))
    }

    /// Forgets actors whose newest dot is below `cut` and who have no sibling here. Under the
    /// condition of [`Context::prune_below`] only.
    pub fn prune_below(&mut self, cut: u64) {
        let siblings = &self.siblings;
        self.seen.prune_below(cut, |actor| names(siblings, actor));
    }

    fn bound_actors(&mut self) {
        let siblings = &self.siblings;
        self.seen
            .bound_actors(ACTORS_MAX, |actor| names(siblings, actor));
    }
}

fn names(siblings: &[Sibling], actor: Actor) -> bool {
    siblings.iter().any(|sibling| sibling.dot.actor == actor)
}
