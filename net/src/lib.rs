//! Torc's network shell: client protocols, connections, links between nodes, and the assembly of a
//! shard on the real runtime.
//!
//! On the path of a write: listener ([`server`]) → [`connection`] → protocol ([`http`], [`resp`] or
//! [`binary`]) → `torc-cluster`'s node → … → answer. A request from another node comes in over a
//! [`link`] and goes to the same place.
//!
//! What this crate deliberately does not know: quorums, versions, replicas. It translates.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

pub mod archive;
pub mod binary;
pub mod boot;
pub mod config;
pub mod connection;
mod damage;
#[cfg(test)]
mod fuzz;
pub mod gather;
pub mod http;
mod input;
pub mod keys;
pub mod limits;
pub mod link;
pub mod metrics;
pub mod output;
mod redistribute;
pub mod replay;
pub mod resp;
pub mod sealed;
pub mod server;
pub mod service;
pub mod shard;
pub mod signal;
mod snapshot;

pub use config::ServerConfig;
pub use server::{Addresses, Server, ServerError};
