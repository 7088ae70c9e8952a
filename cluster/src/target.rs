//! Where a key belongs: its keyspace, token and replicas, as one request sees them.
//!
//! On the path: resolved once at the start of a request, from one [`View`] that the request keeps
//! until its end, so that no request mixes two topologies.
//!
//! Invariant: the replicas are distinct members in preference order; [`Target::owners`] is equal on two
//! nodes exactly when they name the same replicas.

use std::rc::Rc;

use torc_env::{Address, Token, TreeId};

use crate::api::{Failure, FailureCode, KEY_BYTES_MAX, Level};
use crate::keyspace::{Keyspace, Mode, REPLICAS_MAX};
use crate::membership::View;
use crate::quorum::Requirement;
use crate::ring::MemberIndex;
use crate::topology::SlotId;

/// The replicas of a key, in some order. Inline: resolving a key allocates nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Replicas {
    list: [MemberIndex; REPLICAS_MAX as usize],
    len: usize,
}

impl Replicas {
    pub(crate) fn of(members: &[MemberIndex]) -> Self {
        let mut list = [MemberIndex(0); REPLICAS_MAX as usize];
        let len = members.len().min(list.len());
        list[..len].copy_from_slice(&members[..len]);
        Self { list, len }
    }

    pub(crate) fn as_slice(&self) -> &[MemberIndex] {
        &self.list[..self.len]
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [MemberIndex] {
        &mut self.list[..self.len]
    }

    pub(crate) fn contains(&self, member: MemberIndex) -> bool {
        self.as_slice().contains(&member)
    }
}

/// A key's place.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) view: Rc<View>,
    keyspace: usize,
    pub(crate) token: Token,
    pub(crate) replicas: Replicas,
}

impl Target {
    /// The place of `key` in the keyspace of that name.
    pub(crate) fn named(view: Rc<View>, keyspace: &[u8], key: &[u8]) -> Result<Self, Failure> {
        let Some(index) = view
            .topology
            .keyspaces
            .iter()
            .position(|known| known.name.as_bytes() == keyspace)
        else {
            return Err(Failure::refused(
                FailureCode::UnknownKeyspace,
                format_args!("no keyspace {:?}", String::from_utf8_lossy(keyspace)),
            ));
        };
        Self::at(view, index, key)
    }

    /// The place of `key` in the keyspace whose tree is `tree`.
    pub(crate) fn in_tree(view: Rc<View>, tree: TreeId, key: &[u8]) -> Result<Self, Failure> {
        let Some(index) = keyspace_index(&view, tree) else {
            return Err(Failure::refused(
                FailureCode::UnknownKeyspace,
                format_args!("no keyspace with id {}", tree.0),
            ));
        };
        Self::at(view, index, key)
    }

    fn at(view: Rc<View>, keyspace: usize, key: &[u8]) -> Result<Self, Failure> {
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return Err(Failure::refused(
                FailureCode::InvalidRequest,
                format_args!("a key has 1 to {KEY_BYTES_MAX} bytes, not {}", key.len()),
            ));
        }
        let definition = &view.topology.keyspaces[keyspace];
        if definition.mode == Mode::Serial {
            return Err(Failure::refused(
                FailureCode::Unsupported,
                "serial keyspaces are not served by this version",
            ));
        }
        let token = Token::of(definition.id, key);
        let n = usize::from(view.topology.effective_n(definition));
        let replicas = Replicas::of(view.ring.replicas(token, n));
        if replicas.as_slice().is_empty() {
            return Err(Failure::refused(
                FailureCode::NotReady,
                "the ring has no members",
            ));
        }
        Ok(Self {
            view,
            keyspace,
            token,
            replicas,
        })
    }

    pub(crate) fn keyspace(&self) -> &Keyspace {
        &self.view.topology.keyspaces[self.keyspace]
    }

    pub(crate) fn tree(&self) -> TreeId {
        self.keyspace().id
    }

    /// The range epoch: a fingerprint of the replicas' slots.
    pub(crate) fn owners(&self) -> u64 {
        owners_of(&self.view, self.replicas.as_slice())
    }

    /// Whether `view`, a later one, still names the same replicas.
    pub(crate) fn is_current(&self, view: &View) -> bool {
        if view.topology.epoch == self.view.topology.epoch {
            return true;
        }
        let Some(index) = keyspace_index(view, self.tree()) else {
            return false;
        };
        let n = usize::from(view.topology.effective_n(&view.topology.keyspaces[index]));
        owners_of(view, view.ring.replicas(self.token, n)) == self.owners()
    }

    /// This node, when it is a replica of the key.
    pub(crate) fn me(&self) -> Option<MemberIndex> {
        self.view.me.filter(|me| self.replicas.contains(*me))
    }

    /// The shard of `member` that owns the key; `None` while nobody has claimed the member's slot.
    pub(crate) fn address(&self, member: MemberIndex) -> Option<Address> {
        self.view.topology.member(member).address(self.token)
    }

    pub(crate) fn slot(&self, member: MemberIndex) -> SlotId {
        self.view.topology.member(member).slot
    }

    /// Whether to ask `member` at all: it is up and somebody has claimed its slot.
    pub(crate) fn is_up(&self, member: MemberIndex) -> bool {
        Some(member) == self.view.me
            || (self.view.is_up(member) && self.view.topology.member(member).node.is_some())
    }

    /// What `level` means for `order`, some order of this key's replicas.
    pub(crate) fn requirement(
        &self,
        level: Level,
        order: &[MemberIndex],
    ) -> Result<Requirement, Failure> {
        let datacenter = |member: MemberIndex| {
            self.view
                .topology
                .member(member)
                .description
                .datacenter
                .as_str()
        };
        let mut places = [""; REPLICAS_MAX as usize];
        for (place, member) in places.iter_mut().zip(order) {
            *place = datacenter(*member);
        }
        let local = self.view.me.map_or("", datacenter);
        Requirement::of(level, &places[..order.len()], &local)
    }
}

/// Which entry of the topology's keyspaces has this tree.
pub(crate) fn keyspace_index(view: &View, tree: TreeId) -> Option<usize> {
    view.topology
        .keyspaces
        .binary_search_by_key(&tree, |keyspace| keyspace.id)
        .ok()
}

/// The fingerprint of these replicas: a hash of their slots, in order. Never 0.
pub(crate) fn owners_of(view: &View, replicas: &[MemberIndex]) -> u64 {
    let mut slots = [0; 4 * REPLICAS_MAX as usize];
    let (chunks, _) = slots.as_chunks_mut::<4>();
    for (chunk, member) in chunks.iter_mut().zip(replicas) {
        *chunk = view.topology.member(*member).slot.0.to_le_bytes();
    }
    let len = 4 * replicas.len().min(usize::from(REPLICAS_MAX));
    xxhash_rust::xxh3::xxh3_64(&slots[..len]).max(1)
}
