//! Torc's cluster: ring, versions, quorums, gossip, repair.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

pub mod admission;
pub mod api;
pub mod conflict;
pub mod detector;
pub mod gossip;
pub mod hlc;
pub mod keyspace;
pub mod latency;
pub mod membership;
mod message;
pub mod metrics;
pub mod quorum;
pub mod ring;
pub mod topology;
pub mod version;
