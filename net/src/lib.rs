//! Torc's network shell: client protocols, connections, links between nodes, and the assembly of a
//! shard on the real runtime.
//!
//! On the path of a write: listener → connection → protocol (HTTP, RESP or binary) →
//! `torc-cluster`'s node → … → answer. A request from another node comes in over a
//! link and goes to the same place.
//!
//! What this crate deliberately does not know: quorums, versions, replicas. It translates.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

pub mod boot;
pub mod http;
pub mod limits;
pub mod output;
pub mod resp;
