//! Torc's cluster: ring, versions, quorums, gossip, repair.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

pub mod api;
pub mod keyspace;
pub mod membership;
pub mod quorum;
pub mod ring;
pub mod topology;
