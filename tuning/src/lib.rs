//! `torc tune`: reads a host, finds what costs latency, plans a layout of shards and interrupts,
//! applies it with a journal, undoes it byte for byte, and measures what it gained.
//!
//! The crate imports nothing else of Torc; `torc load compare` and the benchmarks take their
//! statistics ([`stats`]) from here. The way of a change reads: [`kernel`] (files) → [`host`] (facts)
//! → `plan` (wishes) → `engine` with its `journal` (writes) → `verify`.

mod calls;
pub mod cpuset;
pub mod host;
pub mod kernel;
pub mod stats;
