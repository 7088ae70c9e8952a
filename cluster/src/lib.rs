//! Torc's cluster: ring, versions, quorums, gossip, repair.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

mod admission;
mod anti_entropy;
pub mod api;
mod clock_mark;
pub mod conflict;
mod coordinator;
mod core;
pub mod detector;
#[cfg(test)]
mod fuzz;
pub mod gossip;
pub mod held;
mod hint;
pub mod hlc;
pub mod keyspace;
mod lacking;
mod latency;
pub mod membership;
mod merkle;
mod message;
pub mod metrics;
pub mod node;
mod own_trees;
pub mod quorum;
pub mod redistribute;
mod replica;
pub mod restore;
pub mod ring;
mod run;
mod serve;
mod target;
#[cfg(test)]
mod tests;
pub mod topology;
pub mod version;
mod walk;
