//! What a shard knows about the cluster at one moment.
//!
//! On the path: every request reads the shard's [`View`] to find replicas and to decide whom to ask.
//! The topology half is decided and durable; the liveness half is this node's opinion and only
//! steers routing.

use std::rc::Rc;

use torc_env::{Address, NodeId, Token};

use crate::ring::{MemberIndex, Ring};
use crate::topology::{MemberState, Topology};

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

    /// Where to send a message about `token` to `member`: its shard that owns the token. `None`
    /// while nobody has claimed the member's slot.
    pub fn address(&self, member: MemberIndex, token: Token) -> Option<Address> {
        self.topology.member(member).address(token)
    }

    /// The state of `member` as `status` shows it: what is decided, unless it does not answer.
    pub fn state_name(&self, member: MemberIndex) -> &'static str {
        match (self.health(member), self.topology.member(member).state) {
            (Health::Down, _) => "down",
            (_, MemberState::Joining) => "joining",
            (_, MemberState::Up) => "up",
            (_, MemberState::Leaving) => "leaving",
        }
    }

    /// Whether this node is in the ring.
    pub fn in_ring(&self) -> bool {
        self.me
            .is_some_and(|me| self.topology.member(me).state.in_ring())
    }

    /// The member that is `node`.
    pub fn find(&self, node: NodeId) -> Option<MemberIndex> {
        self.topology.index_of(node)
    }
}
