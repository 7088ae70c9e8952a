//! Membership: what this node knows about the cluster, and how it came to be part of it.
//!
//! [`View`] is what the request path reads: the decided topology, its ring, and who answers right
//! now. The liveness half only steers routing; it never decides ownership.

use std::rc::Rc;

use torc_env::NodeId;

use crate::ring::{MemberIndex, Ring};
use crate::topology::Topology;

/// Whether a member answers, as this node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Health {
    /// It answers.
    Up,
    /// It is late. Still asked, but not first.
    Suspect,
    /// It does not answer: its writes become hints.
    Down,
}

/// A member's liveness and load, as this node sees them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Liveness {
    /// The verdict.
    pub health: Health,
    /// How unlikely its silence is: the detector's phi, 0 for this node itself.
    pub phi: f64,
    /// What it said about its load.
    pub load: Load,
}

/// What a member says about itself in gossip. Zero when unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Bytes that its stores hold on disk.
    pub disk_bytes: u64,
    /// Bytes that the disk still has.
    pub disk_free_bytes: u64,
    /// Requests in flight.
    pub requests: u32,
    /// Compaction backlog.
    pub backlog_bytes: u64,
}

/// What a shard knows about the cluster at one moment. Immutable; a newer one replaces it.
#[derive(Clone, Debug)]
pub struct View {
    /// The newest decided topology that this node has stored.
    pub topology: Rc<Topology>,
    /// Its ring.
    pub ring: Rc<Ring>,
    /// This node's index, while it is a member.
    pub me: Option<MemberIndex>,
    /// By member index.
    pub liveness: Vec<Liveness>,
}

impl View {
    /// Whether to send `member` requests: it is up or merely late.
    pub fn is_up(&self, member: MemberIndex) -> bool {
        self.health(member) != Health::Down
    }

    /// The verdict on `member`.
    pub fn health(&self, member: MemberIndex) -> Health {
        self.liveness[member.index()].health
    }

    /// How unlikely the silence of `member` is.
    pub fn phi(&self, member: MemberIndex) -> f64 {
        self.liveness[member.index()].phi
    }

    /// The member that is `node`, and whether it is up.
    pub fn find(&self, node: NodeId) -> Option<MemberIndex> {
        self.topology.index_of(node)
    }
}
