//! Changes of the topology: from one epoch to the next, as pure functions.
//!
//! A change is what a node or an operator wants; [`Change::apply`] says what the next epoch would
//! be. It is applied again whenever another change got in first, so it must hold against any base
//! and do nothing when it is already done.

use std::net::SocketAddr;

use torc_env::{NodeId, TreeId};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{ClusterId, Description, Epoch, MEMBERS_MAX, Member, MemberState, SlotId, Topology};
use crate::keyspace::{Keyspace, KeyspaceError};
use crate::ring::assign::{AssignError, Positions, VNODES_DEFAULT};

/// Most voters that a cluster grows to by itself: five survive two failures.
pub const VOTERS_GROW_MAX: usize = 5;

/// Most keyspaces of a cluster.
pub const KEYSPACES_MAX: usize = 1024;

/// Longest name of a node, datacenter, zone or rack, in bytes.
pub const TEXT_BYTES_MAX: usize = 256;

/// Most vnodes of one member: a weight of 16.
pub const VNODES_MAX: u16 = 2048;

/// What somebody wants to be different.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A node wants in. If its internode address is that of a seed that was absent at the founding,
    /// it takes that slot and is in the ring at once; otherwise it gets a slot and vnodes of its own
    /// and is in the ring later ([`Change::Serve`]).
    Join {
        /// Who.
        node: NodeId,
        /// What it says about itself.
        description: Description,
    },
    /// A joining node has pulled its ranges and enters the ring.
    Serve {
        /// Who.
        node: NodeId,
        /// By which epoch it has pulled them. In a later one others may own them, who took writes
        /// that it has not got: it pulls again.
        pulled: Epoch,
    },
    /// A member's addresses or shards are not what the topology says.
    Describe {
        /// Who.
        node: NodeId,
        /// What it says now. Name, datacenter, zone, rack and vnodes stay as they were: they decide
        /// placement, and moving data is not a restart's side effect.
        description: Description,
    },
    /// A keyspace is created, or its alterable settings changed. The id is ignored.
    PutKeyspace {
        /// What it shall be.
        keyspace: Keyspace,
    },
    /// A keyspace is dropped.
    DropKeyspace {
        /// Which.
        name: String,
    },
}

/// Why a change cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The uuid was removed from the cluster.
    #[error(
        "node {node} was removed from this cluster and cannot come back; start it with an empty data directory"
    )]
    Removed {
        /// Who.
        node: NodeId,
    },
    /// The node is no member.
    #[error("node {node} is not a member")]
    NotAMember {
        /// Who.
        node: NodeId,
    },
    /// The seed's slot belongs to another uuid: the seed lost its data directory.
    #[error(
        "the slot of {internode} belongs to node {holder}; a node that lost its data directory must be replaced explicitly"
    )]
    SlotTaken {
        /// The address.
        internode: SocketAddr,
        /// Who holds the slot.
        holder: NodeId,
    },
    /// Another member has this name or address.
    #[error("another member has the name {name:?} or the address {internode}")]
    Duplicate {
        /// The name.
        name: String,
        /// The address.
        internode: SocketAddr,
    },
    /// A field of the description is out of bounds.
    #[error("the {field} of the node is out of bounds")]
    Description {
        /// Which.
        field: &'static str,
    },
    /// The newcomer has pulled its ranges by an epoch that is over.
    #[error("the ranges were pulled by epoch {pulled}, which is over")]
    PulledEarlier {
        /// By which.
        pulled: Epoch,
    },
    /// The cluster is full.
    #[error("a cluster has at most {MEMBERS_MAX} members and {KEYSPACES_MAX} keyspaces")]
    Full,
    /// No vnodes can be given.
    #[error(transparent)]
    Vnodes(#[from] AssignError),
    /// The keyspace definition is wrong.
    #[error(transparent)]
    Keyspace(#[from] KeyspaceError),
    /// There is no such keyspace.
    #[error("there is no keyspace {name:?}")]
    UnknownKeyspace {
        /// The name.
        name: String,
    },
    /// This setting of an existing keyspace cannot be altered.
    #[error("the {setting} of an existing keyspace cannot be altered")]
    Fixed {
        /// Which setting.
        setting: &'static str,
    },
    /// The default keyspace is always there.
    #[error("the keyspace \"default\" cannot be dropped")]
    DefaultKeyspace,
}

impl Change {
    /// The epoch after `base` with this change in it; `None` when nothing needs to change.
    pub fn apply(&self, base: &Topology) -> Result<Option<Topology>, Refusal> {
        let mut next = base.clone();
        next.epoch = base.epoch.next();
        match self {
            Change::Join { node, description } => next.join(*node, description)?,
            Change::Serve { node, pulled } => next.serve(*node, *pulled)?,
            Change::Describe { node, description } => next.describe(*node, description)?,
            Change::PutKeyspace { keyspace } => next.put_keyspace(keyspace)?,
            Change::DropKeyspace { name } => next.drop_keyspace(name)?,
        }
        let unchanged = Topology {
            epoch: base.epoch,
            ..next.clone()
        } == *base;
        Ok((!unchanged).then_some(next))
    }
}

/// A founder that has promised to take part in the first epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Founder {
    /// Its uuid.
    pub node: NodeId,
    /// What it says about itself.
    pub description: Description,
}

/// The founders' seed list as all of them must know it: sorted, without repeats.
pub fn canonical_seeds(seeds: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut seeds = seeds.to_vec();
    seeds.sort_unstable();
    seeds.dedup();
    seeds
}

/// Names a seed list together with the cluster's name: founders with another hash have nothing to
/// do with each other.
pub fn seeds_hash(cluster_name: &str, seeds: &[SocketAddr]) -> u64 {
    let text: Vec<String> = canonical_seeds(seeds)
        .iter()
        .map(SocketAddr::to_string)
        .collect();
    xxh3_64_with_seed(format!("{cluster_name}\n{}", text.join("\n")).as_bytes(), 0)
}

impl Topology {
    /// The first epoch: every seed is a member, in the order of the canonical seed list, and votes.
    /// A seed that is not among `founders` gets its vnodes as well and a slot to claim.
    pub fn found(
        cluster: ClusterId,
        name: &str,
        seeds: &[SocketAddr],
        founders: &[Founder],
    ) -> Result<Topology, Refusal> {
        let seeds = canonical_seeds(seeds);
        let mut topology = Topology {
            epoch: Epoch::FIRST,
            cluster,
            name: name.to_owned(),
            seeds_hash: seeds_hash(name, &seeds),
            members: Vec::with_capacity(seeds.len()),
            voters: Vec::new(),
            keyspaces: vec![Keyspace::default_keyspace()],
            removed: Vec::new(),
            next_slot: SlotId(0),
            next_keyspace: Keyspace::default_keyspace().id.0 + 1,
            features: Vec::new(),
        };
        for seed in seeds {
            let founder = founders
                .iter()
                .find(|founder| founder.description.internode == seed);
            let (node, description) = match founder {
                Some(founder) => (Some(founder.node), founder.description.clone()),
                None => (None, absent(seed)),
            };
            let slot = topology.add(node, description, MemberState::Up)?;
            topology.voters.push(slot);
        }
        Ok(topology)
    }

    fn join(&mut self, node: NodeId, description: &Description) -> Result<(), Refusal> {
        self.admit(node)?;
        if self.index_of(node).is_some() {
            return Ok(());
        }
        let internode = description.internode;
        let seat = self
            .members
            .iter()
            .position(|member| member.description.internode == internode);
        let Some(seat) = seat else {
            self.add(Some(node), description.clone(), MemberState::Joining)?;
            return Ok(());
        };
        if let Some(holder) = self.members[seat].node {
            return Err(Refusal::SlotTaken { internode, holder });
        }
        self.check_description(description, Some(self.members[seat].slot))?;
        self.members[seat].node = Some(node);
        self.members[seat].description = description.clone();
        Ok(())
    }

    fn serve(&mut self, node: NodeId, pulled: Epoch) -> Result<(), Refusal> {
        let index = self.index_of(node).ok_or(Refusal::NotAMember { node })?;
        // `self` is the epoch to come.
        let is_current = pulled.next() == self.epoch;
        let member = &mut self.members[index.index()];
        if member.state == MemberState::Joining {
            if !is_current {
                return Err(Refusal::PulledEarlier { pulled });
            }
            member.state = MemberState::Up;
            self.grow_voters();
        }
        Ok(())
    }

    fn describe(&mut self, node: NodeId, description: &Description) -> Result<(), Refusal> {
        let index = self.index_of(node).ok_or(Refusal::NotAMember { node })?;
        let slot = self.member(index).slot;
        let known = &self.member(index).description;
        let merged = Description {
            internode: description.internode,
            http: description.http,
            client: description.client,
            resp: description.resp,
            shards: description.shards,
            ..known.clone()
        };
        self.check_description(&merged, Some(slot))?;
        self.members[index.index()].description = merged;
        Ok(())
    }

    fn put_keyspace(&mut self, wanted: &Keyspace) -> Result<(), Refusal> {
        wanted.validate()?;
        let existing = self
            .keyspaces
            .iter_mut()
            .find(|keyspace| keyspace.name == wanted.name);
        let Some(existing) = existing else {
            if self.keyspaces.len() >= KEYSPACES_MAX {
                return Err(Refusal::Full);
            }
            let id = TreeId(self.next_keyspace);
            self.next_keyspace += 1;
            self.keyspaces.push(Keyspace {
                id,
                ..wanted.clone()
            });
            return Ok(());
        };
        // Each of these would change what data already written means or where it must be.
        let fixed = [
            ("n", existing.n == wanted.n),
            ("mode", existing.mode == wanted.mode),
            ("conflict policy", existing.conflict == wanted.conflict),
        ];
        if let Some((setting, _)) = fixed.into_iter().find(|(_, same)| !same) {
            return Err(Refusal::Fixed { setting });
        }
        existing.ttl_default_seconds = wanted.ttl_default_seconds;
        existing.compaction = wanted.compaction;
        existing.tombstone_grace_seconds = wanted.tombstone_grace_seconds;
        Ok(())
    }

    fn drop_keyspace(&mut self, name: &str) -> Result<(), Refusal> {
        let position = self
            .keyspaces
            .iter()
            .position(|keyspace| keyspace.name == name);
        let position = position.ok_or_else(|| Refusal::UnknownKeyspace {
            name: name.to_owned(),
        })?;
        if name == crate::keyspace::DEFAULT_NAME {
            return Err(Refusal::DefaultKeyspace);
        }
        self.keyspaces.remove(position);
        Ok(())
    }

    fn admit(&self, node: NodeId) -> Result<(), Refusal> {
        if node == NodeId::default() {
            return Err(Refusal::Description { field: "uuid" });
        }
        if self.is_removed(node) {
            return Err(Refusal::Removed { node });
        }
        Ok(())
    }

    /// Appends a member with vnodes of its own.
    fn add(
        &mut self,
        node: Option<NodeId>,
        description: Description,
        state: MemberState,
    ) -> Result<SlotId, Refusal> {
        self.check_description(&description, None)?;
        if self.members.len() >= MEMBERS_MAX {
            return Err(Refusal::Full);
        }
        let slot = self.next_slot;
        let positions = Positions::of(self.members.iter().map(|member| member.vnodes.as_slice()))?;
        let salt = xxh3_64_with_seed(&self.cluster.0.to_le_bytes(), u64::from(slot.0));
        let vnodes = positions.choose(description.vnodes, salt)?;
        self.next_slot = SlotId(slot.0 + 1);
        self.members.push(Member {
            slot,
            node,
            description,
            state,
            vnodes,
        });
        Ok(slot)
    }

    /// Checks bounds, and that nobody else (than `own`) has the name or the address.
    fn check_description(
        &self,
        description: &Description,
        own: Option<SlotId>,
    ) -> Result<(), Refusal> {
        let texts = [
            ("name", &description.name),
            ("datacenter", &description.datacenter),
            ("zone", &description.zone),
            ("rack", &description.rack),
        ];
        if let Some((field, _)) = texts.iter().find(|(_, text)| text.len() > TEXT_BYTES_MAX) {
            return Err(Refusal::Description { field });
        }
        if description.name.is_empty() {
            return Err(Refusal::Description { field: "name" });
        }
        if description.shards == 0 {
            return Err(Refusal::Description {
                field: "shard count",
            });
        }
        if description.vnodes == 0 || description.vnodes > VNODES_MAX {
            return Err(Refusal::Description { field: "weight" });
        }
        let taken = self.members.iter().any(|member| {
            Some(member.slot) != own
                && (member.description.name == description.name
                    || member.description.internode == description.internode)
        });
        if taken {
            return Err(Refusal::Duplicate {
                name: description.name.clone(),
                internode: description.internode,
            });
        }
        Ok(())
    }

    /// Lets the voters grow to an odd number with the members. They never shrink by themselves.
    fn grow_voters(&mut self) {
        let able: Vec<SlotId> = self
            .members
            .iter()
            .filter(|member| member.node.is_some() && member.state == MemberState::Up)
            .map(|member| member.slot)
            .collect();
        let odd = |count: usize| {
            if count.is_multiple_of(2) {
                count.saturating_sub(1)
            } else {
                count
            }
        };
        let target = odd(able.len().min(VOTERS_GROW_MAX));
        let missing = target.saturating_sub(self.voters.len());
        let new: Vec<SlotId> = able
            .into_iter()
            .filter(|slot| !self.voters.contains(slot))
            .take(missing)
            .collect();
        self.voters.extend(new);
        self.voters.sort_unstable();
    }
}

/// What is known about a seed that nobody has heard.
fn absent(seed: SocketAddr) -> Description {
    Description {
        name: seed.to_string(),
        internode: seed,
        http: seed,
        client: seed,
        resp: seed,
        datacenter: String::new(),
        zone: String::new(),
        rack: String::new(),
        shards: 1,
        vnodes: VNODES_DEFAULT,
    }
}
