//! Addresses of shards and what can go wrong between them.

use std::net::SocketAddr;

use crate::{NodeId, ShardId};

/// Where a call goes: a shard of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// The node that must answer. `NodeId::default()` (zero) accepts whichever node listens at
    /// `host`: only for the first contact with a seed.
    pub node: NodeId,
    /// The node's internode address. Not looked at when `node` is this node.
    pub host: SocketAddr,
    /// The shard that must answer. A node that has fewer shards answers with its shard 0.
    pub shard: ShardId,
}

/// Who sent a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// The sending node, as proven by the link's handshake.
    pub node: NodeId,
    /// Its shard.
    pub shard: ShardId,
}

/// Why a call has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// There is no connection, or a bound was hit before sending: the request was not handled.
    #[error("not sent: the node is unreachable")]
    Unreachable,
    /// The queue to that shard is full: the request was not handled.
    #[error("not sent: the queue to the shard is full")]
    Overloaded,
    /// The node at that address is another one: the request was not handled.
    #[error("not sent: another node answers at this address")]
    WrongNode,
    /// The deadline passed or the connection broke after sending: the request may have been handled.
    #[error("no answer: the request may or may not have been handled")]
    Lost,
}

impl CallError {
    /// Whether the other side may have handled the request all the same.
    pub fn in_doubt(self) -> bool {
        matches!(self, CallError::Lost)
    }
}
