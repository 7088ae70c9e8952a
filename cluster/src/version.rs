//! The causal version of a key: who wrote it, what each write had seen, and what therefore stays.
//!
//! On the path of every request: a replica turns a write into one more [`Dot`] of the key's
//! [`State`] ([`State::put`]), merges the states that other replicas send ([`State::merge`]), and
//! stores the result whole, as one engine record. The client carries a [`Context`] from its read to
//! its next write, as an opaque string.
//!
//! Invariants:
//! - a write removes precisely what its context has seen, nothing more;
//! - merging is commutative, associative and idempotent: replicas that got the same writes hold the
//!   same bytes, in whatever order they came;
//! - what travels and what is stored is always the whole merged state of a key, never a lone
//!   sibling: a state's context says what is *absent* from it, so half a state would delete;
//! - bytes from disk, peers and clients never panic.
//!
//! Deliberately absent: time (stamps come from [`crate::hlc`], `now` is passed), disk, network,
//! quorums.
//!
//! Source: Preguiça, Baquero, Almeida et al., *Dotted Version Vectors*, 2010, in the form of one
//! context a state (as in dotted version vector sets, 2012) with several exact dots an actor.
//! Formats: `docs/formats/state.md`. Promises: `docs/consistency.md`.

mod actor;
mod codec;
mod context;
mod dot;
#[cfg(test)]
mod fuzz_tests;
mod opaque;
mod record;
mod state;
mod view;
mod window;

pub use actor::{Actor, BootIdentity};
pub use codec::{FORMAT_VERSION, StateError};
pub use context::{Context, EXACT_MAX};
pub use dot::{Dot, STAMP_MAX};
pub use opaque::{CONTEXT_ACTORS_MAX, ContextError};
pub(crate) use record::counted_from_arrival;
pub use record::{Applied, ApplyError, apply};
pub use state::{DotClash, Minter, Sibling, State, TooManySiblings, Write};
pub use view::{SiblingRef, StateRef};
pub use window::{Answered, Keyed, REMEMBERED_MAX, RETENTION_DEFAULT_MS};
