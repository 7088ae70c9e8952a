//! A client of Torc's binary protocol, and the protocol's own definition.
//!
//! [`wire`] is what both ends share: `torc-net` decodes with the very code that this client encodes
//! with. Everything else is the client: blocking, on the standard library alone, pipelined by
//! splitting a connection into a half that submits and a half that receives.
//!
//! Invariant: an answer belongs to the request whose id it carries, and a request that was submitted
//! and has no answer is *in doubt*; nothing here retries such a request by itself.
//!
//! What it deliberately does not do: open more connections than it is told to, or run threads.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

pub mod wire;
