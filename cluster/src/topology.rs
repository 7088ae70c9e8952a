//! The topology: what the cluster has agreed on.
//!
//! Members, their vnodes, the keyspaces and the voters, as one value per epoch. Epoch e + 1 is one
//! single-decree consensus instance among the voters that epoch e names; a node holds
//! the newest epoch that it knows to be decided and stores it before it uses it. Nothing
//! that decides ownership travels any other way: gossip only says that a newer epoch exists.
//!
//! **Invariants.** Two topologies of the same cluster and epoch are equal. Slots, keyspace ids and
//! node uuids are never reused: a removed uuid stays listed for ever. Members are sorted by slot; no
//! vnode and no name occurs twice.
//!
//! **Not here:** who is alive ([`crate::membership`]), and where replicas are
//! ([`crate::ring`], a pure function of this).

pub mod change;
mod codec;
pub mod paxos;
pub mod store;

use std::fmt;
use std::net::SocketAddr;

use torc_env::{Address, NodeId, ShardId, Token};

use crate::keyspace::Keyspace;
use crate::ring::{MemberIndex, Place, Ring, RingMember, Vnode};

pub use codec::{DecodeError, MEMBERS_MAX};

/// A generation of the topology. Zero is before the first one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a new cluster.
    pub const FIRST: Epoch = Epoch(1);

    /// The epoch after this one.
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A cluster's identity: random, chosen once by its first epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub u128);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A member's seat in the cluster: given once, never reused, the same in every epoch. A seed that
/// was absent at the founding has a slot before anyone knows its uuid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}

/// What the cluster has decided about a member. Whether it answers is another matter: see
/// [`crate::membership::View`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemberState {
    /// Has vnodes reserved but is not in the ring yet: it pulls its ranges first.
    Joining,
    /// In the ring.
    Up,
    /// In the ring, on its way out.
    Leaving,
}

impl MemberState {
    /// Whether the member is in the ring: holds ranges and counts towards N.
    pub fn in_ring(self) -> bool {
        match self {
            MemberState::Joining => false,
            MemberState::Up | MemberState::Leaving => true,
        }
    }
}

/// What a node says about itself when it founds, claims or joins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Unique among the members of an epoch.
    pub name: String,
    /// Where other nodes reach it.
    pub internode: SocketAddr,
    /// Where HTTP clients reach it.
    pub http: SocketAddr,
    /// Where binary clients reach it.
    pub client: SocketAddr,
    /// Where Redis clients reach it.
    pub resp: SocketAddr,
    /// Datacenter; the outermost level of placement.
    pub datacenter: String,
    /// Availability zone.
    pub zone: String,
    /// Rack.
    pub rack: String,
    /// Shards that it runs.
    pub shards: u16,
    /// Vnodes that it asks for when it gets its place: 128 times its weight.
    pub vnodes: u16,
}

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its seat.
    pub slot: SlotId,
    /// Its uuid; `None` while the slot of an absent seed is unclaimed.
    pub node: Option<NodeId>,
    /// What it said about itself. Of an unclaimed slot only the internode address means anything.
    pub description: Description,
    /// What was decided about it.
    pub state: MemberState,
    /// Its places on the ring, ascending.
    pub vnodes: Vec<Vnode>,
}

impl Member {
    /// Where to send a message for the shard that owns `token`; `None` while nobody has claimed
    /// the slot.
    pub fn address(&self, token: Token) -> Option<Address> {
        self.shard_address(token.shard(self.description.shards))
    }

    /// Where to send a message for `shard`; `None` while nobody has claimed the slot.
    pub fn shard_address(&self, shard: ShardId) -> Option<Address> {
        self.node.map(|node| Address {
            node,
            host: self.description.internode,
            shard,
        })
    }
}

/// A node that is out for ever.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Removed {
    /// Its uuid.
    pub node: NodeId,
    /// The slot that it had.
    pub slot: SlotId,
    /// The name that it had.
    pub name: String,
}

/// One epoch's agreement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Which epoch this is.
    pub epoch: Epoch,
    /// The cluster.
    pub cluster: ClusterId,
    /// The cluster's name, as its founders were configured.
    pub name: String,
    /// Hash of the founders' seed list.
    pub seeds_hash: u64,
    /// Sorted by slot.
    pub members: Vec<Member>,
    /// The slots that decide the next epoch, ascending.
    pub voters: Vec<SlotId>,
    /// Sorted by id.
    pub keyspaces: Vec<Keyspace>,
    /// Sorted by uuid.
    pub removed: Vec<Removed>,
    /// The slot that the next new member gets.
    pub next_slot: SlotId,
    /// The id that the next new keyspace gets.
    pub next_keyspace: u32,
    /// What every member understands; sorted.
    pub features: Vec<String>,
}

impl Topology {
    /// The members with their indices.
    pub fn indexed(&self) -> impl Iterator<Item = (MemberIndex, &Member)> {
        self.members.iter().enumerate().map(|(index, member)| {
            let index = u16::try_from(index).expect("members are at most 65,535");
            (MemberIndex(index), member)
        })
    }

    /// The member at `index` of this epoch.
    pub fn member(&self, index: MemberIndex) -> &Member {
        &self.members[index.index()]
    }

    /// The member that is `node`.
    pub fn index_of(&self, node: NodeId) -> Option<MemberIndex> {
        self.indexed()
            .find(|(_, member)| member.node == Some(node))
            .map(|(index, _)| index)
    }

    /// The member with this slot.
    pub fn index_of_slot(&self, slot: SlotId) -> Option<MemberIndex> {
        let position = self
            .members
            .binary_search_by_key(&slot, |member| member.slot)
            .ok()?;
        Some(MemberIndex(u16::try_from(position).ok()?))
    }

    /// The member with this name.
    pub fn index_of_name(&self, name: &str) -> Option<MemberIndex> {
        self.indexed()
            .find(|(_, member)| member.description.name == name)
            .map(|(index, _)| index)
    }

    /// The keyspace with this name.
    pub fn keyspace(&self, name: &str) -> Option<&Keyspace> {
        self.keyspaces.iter().find(|keyspace| keyspace.name == name)
    }

    /// Whether `node` was removed for ever.
    pub fn is_removed(&self, node: NodeId) -> bool {
        self.removed.iter().any(|removed| removed.node == node)
    }

    /// Members in the ring, alive or not.
    pub fn ring_member_count(&self) -> usize {
        self.members
            .iter()
            .filter(|member| member.state.in_ring())
            .count()
    }

    /// Copies that a key of `keyspace` has in this epoch.
    pub fn effective_n(&self, keyspace: &Keyspace) -> u8 {
        keyspace.effective_n(self.ring_member_count())
    }

    /// The ring of this epoch.
    pub fn ring(&self) -> Ring {
        self.ring_where(|member| member.state.in_ring())
    }

    /// The ring as it will be once `joiner` is in it: what a joining member pulls its ranges by.
    pub fn ring_with(&self, joiner: MemberIndex) -> Ring {
        let slot = self.member(joiner).slot;
        self.ring_where(|member| member.state.in_ring() || member.slot == slot)
    }

    fn ring_where(&self, include: impl Fn(&Member) -> bool) -> Ring {
        let members: Vec<RingMember<'_>> = self
            .indexed()
            .filter(|(_, member)| include(member))
            .map(|(index, member)| RingMember {
                index,
                place: Place {
                    datacenter: &member.description.datacenter,
                    zone: &member.description.zone,
                    rack: &member.description.rack,
                },
                vnodes: &member.vnodes,
            })
            .collect();
        let width = self.keyspaces.iter().map(|keyspace| keyspace.n).max();
        Ring::new(&members, usize::from(width.unwrap_or(1)))
    }
}

#[cfg(test)]
mod tests;
