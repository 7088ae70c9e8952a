//! A client of Torc's binary protocol, and the protocol's own definition.
//!
//! [`wire`] is what both ends share: `torc-net` decodes with the very code that this client encodes
//! with. Everything else is the client: blocking, on the standard library alone. [`Connection`] is
//! pipelined, split into a half that submits and a half that receives; [`Client`] keeps one connection
//! for each shard of a node and sends every request to the shard that owns its key.
//!
//! Invariant: an answer belongs to the request whose id it carries, and a write that was submitted and
//! has no answer is *in doubt*: it is reported so and never sent again by itself. Reads are.
//!
//! What it deliberately does not do: run threads, or open connections that nobody asked for.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

mod answer;
mod client;
mod connection;
mod error;
pub mod wire;

pub use answer::{Entry, Failure, Got, Outcome, Page, Sibling, Written};
pub use client::{Client, Options};
pub use connection::{Answered, Connection, Receiver, Sender};
pub use error::ClientError;
