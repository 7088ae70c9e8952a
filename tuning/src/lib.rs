//! `torc tune`: reads a host, finds what costs latency, plans a layout of shards and interrupts,
//! applies it with a journal, undoes it byte for byte, and measures what it gained.
//!
//! The crate imports nothing else of Torc; `torc load compare` and the benchmarks take their
//! statistics ([`stats`]) from here. The way of a change reads: [`kernel`] (files) → [`host`] (facts)
//! → [`plan`] (wishes) → [`apply`] with its [`journal`] (writes, undo, verify).

pub mod apply;
mod calls;
pub mod capture;
pub mod change;
pub mod check;
pub mod cpuset;
pub mod disk;
pub mod host;
pub mod irqproof;
pub mod jitter;
pub mod journal;
pub mod kernel;
pub mod persist;
pub mod plan;
pub mod probe;
pub mod prove;
pub mod render;
pub mod server;
pub mod stats;
mod trace;
