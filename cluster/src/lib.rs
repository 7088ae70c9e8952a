//! Torc's cluster: ring, versions, quorums, gossip, repair.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

pub mod api;
pub mod quorum;
