//! What a reader or a replica has seen of one key: a set of dots, written compactly.
//!
//! A plain map actor → counter cannot say "200 but not 100". So a [`Context`] is, per actor, a
//! *floor* (every dot of that actor for this key up to it) and a few *exact* dots above the floor.
//!
//! Invariants:
//! - A context never claims a dot that was not seen or superseded: a claim too many loses a
//!   write, a claim too few only leaves a sibling. Every bound here therefore drops claims.
//! - A floor is set by the actor itself ([`Context::raise_floor`] says when); everyone else only
//!   passes it on.
//! - The form is canonical: equal sets of claims are equal values and equal bytes.

use super::{Actor, Dot};

/// Exact dots kept for each actor; beyond it the oldest are forgotten. Sixteen covers a client
/// that overwrites its own value without ever reading (it needs one) and one that writes through a
/// partition; 16 × 8 bytes keep the string small.
pub const EXACT_MAX: usize = 16;

/// What is claimed of one actor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Seen {
    pub(super) actor: Actor,
    /// Every dot of the actor for this key up to here; 0 = none.
    pub(super) floor: u64,
    /// Counters above the floor, ascending, at most [`EXACT_MAX`].
    pub(super) exact: Vec<u64>,
}

impl Seen {
    fn nothing(actor: Actor) -> Self {
        Self {
            actor,
            floor: 0,
            exact: Vec::new(),
        }
    }

    fn covers(&self, counter: u64) -> bool {
        counter <= self.floor || self.exact.binary_search(&counter).is_ok()
    }

    pub(super) fn newest(&self) -> u64 {
        self.exact.last().copied().unwrap_or(0).max(self.floor)
    }

    fn add(&mut self, counter: u64) {
        if counter <= self.floor {
            return;
        }
        if let Err(place) = self.exact.binary_search(&counter) {
            self.exact.insert(place, counter);
            if self.exact.len() > EXACT_MAX {
                self.exact.remove(0);
            }
        }
    }

    fn raise(&mut self, floor: u64) {
        if floor > self.floor {
            self.floor = floor;
            let above = self.exact.partition_point(|counter| *counter <= floor);
            self.exact.drain(..above);
        }
    }
}

/// A set of dots of one key. The default is the empty set: nothing seen.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct Context {
    /// Ascending by actor; each claims something.
    pub(super) seen: Vec<Seen>,
}

impl Context {
    /// Whether nothing is claimed.
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }

    /// Whether `dot` is claimed.
    pub fn covers(&self, dot: Dot) -> bool {
        self.find(dot.actor)
            .is_some_and(|seen| seen.covers(dot.counter))
    }

    /// Whether everything that `other` claims is claimed here. Conservative: a floor is only
    /// matched by a floor, since nobody but its actor knows which dots lie below it.
    pub fn includes(&self, other: &Context) -> bool {
        other.seen.iter().all(|theirs| {
            self.find(theirs.actor).is_some_and(|ours| {
                theirs.floor <= ours.floor
                    && theirs.exact.iter().all(|counter| ours.covers(*counter))
            })
        })
    }

    /// The highest stamp claimed; 0 when nothing is.
    pub fn newest_stamp(&self) -> u64 {
        self.seen.iter().map(Seen::newest).max().unwrap_or(0)
    }

    /// Claims one dot. Forgets the actor's oldest exact dot beyond [`EXACT_MAX`].
    pub fn add(&mut self, dot: Dot) {
        self.entry(dot.actor).add(dot.counter);
    }

    /// Claims every dot of `actor` up to `floor`.
    ///
    /// Only for the state of a replica that mints under `actor` itself: it holds, durably or in the
    /// same pending write, every dot that it ever minted for this key or what superseded it.
    pub fn raise_floor(&mut self, actor: Actor, floor: u64) {
        if floor > 0 {
            self.entry(actor).raise(floor);
        }
    }

    /// Claims what `other` claims. Commutative, associative and idempotent, the bound on exact
    /// dots included.
    pub fn join(&mut self, other: &Context) {
        for theirs in &other.seen {
            let ours = self.entry(theirs.actor);
            ours.raise(theirs.floor);
            for counter in &theirs.exact {
                ours.add(*counter);
            }
        }
    }

    /// Drops every actor whose newest claim is below `cut`, unless `is_needed` says otherwise.
    ///
    /// Safe only when anti-entropy has confirmed, with all owners, every write of this key stamped
    /// below `cut`, and nothing older (hint, stream, log) can come back: the purge rule's cut.
    pub fn prune_below(&mut self, cut: u64, is_needed: impl Fn(Actor) -> bool) {
        self.seen
            .retain(|seen| seen.newest() >= cut || is_needed(seen.actor));
    }

    /// Drops actors with the oldest newest dots, except needed ones, until at most `actors_max`
    /// are left or only needed ones. Claiming less is safe.
    pub(super) fn bound_actors(&mut self, actors_max: usize, is_needed: impl Fn(Actor) -> bool) {
        if self.seen.len() <= actors_max {
            return;
        }
        let mut ages: Vec<(u64, Actor)> = self
            .clock()
            .filter(|(actor, _)| !is_needed(*actor))
            .map(|(actor, newest)| (newest, actor))
            .collect();
        ages.sort_unstable();
        ages.truncate(self.seen.len() - actors_max);
        if let Some(oldest_kept) = ages.last().copied() {
            self.seen
                .retain(|seen| (seen.newest(), seen.actor) > oldest_kept || is_needed(seen.actor));
        }
    }

    /// The newest counter of each actor, ascending by actor. For people: it cannot say what lies
    /// below, so nothing may be decided by it.
    pub fn clock(&self) -> impl Iterator<Item = (Actor, u64)> + '_ {
        self.seen.iter().map(|seen| (seen.actor, seen.newest()))
    }

    /// How many actors are named.
    pub fn actor_count(&self) -> usize {
        self.seen.len()
    }

    /// The place of an actor in the order of actors.
    pub(super) fn index_of(&self, actor: Actor) -> Option<usize> {
        self.seen
            .binary_search_by_key(&actor, |seen| seen.actor)
            .ok()
    }

    fn find(&self, actor: Actor) -> Option<&Seen> {
        // Contexts name a handful of actors: a walk is cheaper than a binary search's branches.
        if self.seen.len() <= 8 {
            return self.seen.iter().find(|seen| seen.actor == actor);
        }
        self.index_of(actor).map(|place| &self.seen[place])
    }

    fn entry(&mut self, actor: Actor) -> &mut Seen {
        let place = match self.seen.binary_search_by_key(&actor, |seen| seen.actor) {
            Ok(place) => place,
            Err(place) => {
                self.seen.insert(place, Seen::nothing(actor));
                place
            }
        };
        &mut self.seen[place]
    }
}

impl FromIterator<Dot> for Context {
    fn from_iter<I: IntoIterator<Item = Dot>>(dots: I) -> Self {
        let mut context = Context::default();
        for dot in dots {
            context.add(dot);
        }
        context
    }
}
