//! A topology as bytes: on the wire, in votes, on disk.
//!
//! The layout is `docs/formats/topology.md`. Encoding is canonical, so equal topologies have equal
//! bytes and a vote can be compared as bytes. Decoding takes bytes from anywhere: it never panics,
//! allocates no more than the input justifies, and refuses what no epoch can be (unsorted members,
//! clashing vnodes, voters that are not members).

use std::net::{IpAddr, SocketAddr};

use torc_env::{NodeId, TreeId};

use super::{ClusterId, Description, Epoch, Member, MemberState, Removed, SlotId, Topology};
use crate::keyspace::{Compaction, Conflict, Keyspace, Mode};
use crate::ring::Vnode;

/// The layout's version.
const VERSION: u16 = 1;

/// Why bytes are not a topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end too early, or go on where they should end.
    #[error("topology of a wrong length (at byte {at})")]
    Length {
        /// Where.
        at: usize,
    },
    /// A later version wrote it.
    #[error(
        "topology of version {found}, this program reads up to {VERSION}; start a newer program"
    )]
    Version {
        /// The version found.
        found: u16,
    },
    /// A field has a value that it cannot have.
    #[error("topology with an invalid {field}")]
    Field {
        /// Which.
        field: &'static str,
    },
}

impl Topology {
    /// The canonical bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::with_capacity(256 + self.members.len() * 640));
        out.u16(VERSION);
        out.u64(self.epoch.0);
        out.u128(self.cluster.0);
        out.u64(self.seeds_hash);
        out.u32(self.next_slot.0);
        out.u32(self.next_keyspace);
        out.text(&self.name);
        out.list(&self.features, |out, feature| out.text(feature));
        out.list(&self.voters, |out, voter| out.u32(voter.0));
        out.list(&self.keyspaces, Writer::keyspace);
        out.list(&self.members, Writer::member);
        out.list(&self.removed, |out, removed| {
            out.u128(removed.node.0);
            out.u32(removed.slot.0);
            out.text(&removed.name);
        });
        out.0
    }

    /// Reads and checks what [`Topology::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Topology, DecodeError> {
        let mut input = Reader { bytes, at: 0 };
        let version = input.u16()?;
        if version != VERSION {
            return Err(DecodeError::Version { found: version });
        }
        let topology = Topology {
            epoch: Epoch(input.u64()?),
            cluster: ClusterId(input.u128()?),
            seeds_hash: input.u64()?,
            next_slot: SlotId(input.u32()?),
            next_keyspace: input.u32()?,
            name: input.text()?,
            features: input.list(Reader::text)?,
            voters: input.list(|input| Ok(SlotId(input.u32()?)))?,
            keyspaces: input.list(Reader::keyspace)?,
            members: input.list(Reader::member)?,
            removed: input.list(|input| {
                Ok(Removed {
                    node: NodeId(input.u128()?),
                    slot: SlotId(input.u32()?),
                    name: input.text()?,
                })
            })?,
        };
        if input.at != bytes.len() {
            return Err(DecodeError::Length { at: input.at });
        }
        topology.check()?;
        Ok(topology)
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u128(&mut self, value: u128) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Names are bounded where they are accepted ([`super::change`]), far below 64 KiB.
    fn text(&mut self, text: &str) {
        self.u16(u16::try_from(text.len()).expect("names are bounded"));
        self.0.extend_from_slice(text.as_bytes());
    }

    fn list<T>(&mut self, items: &[T], write: impl Fn(&mut Self, &T)) {
        self.u32(u32::try_from(items.len()).expect("lists are bounded"));
        for item in items {
            write(self, item);
        }
    }

    fn address(&mut self, address: SocketAddr) {
        match address.ip() {
            IpAddr::V4(ip) => {
                self.u8(4);
                self.0.extend_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                self.u8(6);
                self.0.extend_from_slice(&ip.octets());
            }
        }
        self.u16(address.port());
    }

    fn keyspace(&mut self, keyspace: &Keyspace) {
        self.u32(keyspace.id.0);
        self.u8(keyspace.n);
        self.u8(match keyspace.mode {
            Mode::Eventual => 0,
            Mode::Serial => 1,
        });
        self.u8(match keyspace.conflict {
            Conflict::Siblings => 0,
            Conflict::Lww => 1,
        });
        self.u8(keyspace.compaction.code());
        self.u32(keyspace.compaction.window_seconds());
        self.u64(keyspace.ttl_default_seconds);
        self.u64(keyspace.tombstone_grace_seconds);
        self.text(&keyspace.name);
    }

    fn member(&mut self, member: &Member) {
        self.u32(member.slot.0);
        self.u8(match member.state {
            MemberState::Joining => 0,
            MemberState::Up => 1,
            MemberState::Leaving => 2,
        });
        self.u8(u8::from(member.node.is_some()));
        self.u128(member.node.unwrap_or_default().0);
        self.description(&member.description);
        self.list(&member.vnodes, |out, vnode| {
            out.0.extend_from_slice(&vnode.cell().to_le_bytes()[..3]);
        });
    }

    fn description(&mut self, description: &Description) {
        self.u16(description.shards);
        self.u16(description.vnodes);
        self.address(description.internode);
        self.address(description.http);
        self.address(description.client);
        self.address(description.resp);
        self.text(&description.name);
        self.text(&description.datacenter);
        self.text(&description.zone);
        self.text(&description.rack);
    }
}

impl Description {
    /// The bytes of a description alone, as a promise carries it.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::with_capacity(96));
        out.description(self);
        out.0
    }

    /// Reads what [`Description::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Description, DecodeError> {
        let mut input = Reader { bytes, at: 0 };
        let description = input.description()?;
        if input.at != bytes.len() {
            return Err(DecodeError::Length { at: input.at });
        }
        if description.shards == 0 {
            return Err(DecodeError::Field { field: "shards" });
        }
        Ok(description)
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn array<const LEN: usize>(&mut self) -> Result<[u8; LEN], DecodeError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let (array, _) = rest
            .split_first_chunk::<LEN>()
            .ok_or(DecodeError::Length { at: self.at })?;
        self.at += LEN;
        Ok(*array)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn u128(&mut self) -> Result<u128, DecodeError> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String, DecodeError> {
        let len = usize::from(self.u16()?);
        let end = self.at + len;
        let bytes = self
            .bytes
            .get(self.at..end)
            .ok_or(DecodeError::Length { at: self.at })?;
        self.at = end;
        let text = std::str::from_utf8(bytes).map_err(|_| DecodeError::Field { field: "text" })?;
        Ok(text.to_owned())
    }

    /// Grows with what is really there, so that a wild count allocates nothing.
    fn list<T>(
        &mut self,
        read: impl Fn(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let count = self.u32()?;
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(read(self)?);
        }
        Ok(items)
    }

    fn address(&mut self) -> Result<SocketAddr, DecodeError> {
        let ip = match self.u8()? {
            4 => IpAddr::from(self.array::<4>()?),
            6 => IpAddr::from(self.array::<16>()?),
            _ => return Err(DecodeError::Field { field: "address" }),
        };
        Ok(SocketAddr::new(ip, self.u16()?))
    }

    fn keyspace(&mut self) -> Result<Keyspace, DecodeError> {
        Ok(Keyspace {
            id: TreeId(self.u32()?),
            n: self.u8()?,
            mode: match self.u8()? {
                0 => Mode::Eventual,
                1 => Mode::Serial,
                _ => return Err(DecodeError::Field { field: "mode" }),
            },
            conflict: match self.u8()? {
                0 => Conflict::Siblings,
                1 => Conflict::Lww,
                _ => return Err(DecodeError::Field { field: "conflict" }),
            },
            compaction: {
                let code = self.u8()?;
                Compaction::from_code(code, self.u32()?).ok_or(DecodeError::Field {
                    field: "compaction",
                })?
            },
            ttl_default_seconds: self.u64()?,
            tombstone_grace_seconds: self.u64()?,
            name: self.text()?,
        })
    }

    fn member(&mut self) -> Result<Member, DecodeError> {
        let slot = SlotId(self.u32()?);
        let state = match self.u8()? {
            0 => MemberState::Joining,
            1 => MemberState::Up,
            2 => MemberState::Leaving,
            _ => return Err(DecodeError::Field { field: "state" }),
        };
        let claimed = self.u8()?;
        let node = NodeId(self.u128()?);
        let node = match (claimed, node.0) {
            (0, 0) => None,
            (1, 1..) => Some(node),
            _ => return Err(DecodeError::Field { field: "node" }),
        };
        let description = self.description()?;
        let vnodes = self.list(|input| {
            let [a, b, c] = input.array()?;
            Vnode::new(u32::from_le_bytes([a, b, c, 0]))
                .ok_or(DecodeError::Field { field: "vnode" })
        })?;
        Ok(Member {
            slot,
            node,
            description,
            state,
            vnodes,
        })
    }

    fn description(&mut self) -> Result<Description, DecodeError> {
        Ok(Description {
            shards: self.u16()?,
            vnodes: self.u16()?,
            internode: self.address()?,
            http: self.address()?,
            client: self.address()?,
            resp: self.address()?,
            name: self.text()?,
            datacenter: self.text()?,
            zone: self.text()?,
            rack: self.text()?,
        })
    }
}

impl Topology {
    /// Refuses what no epoch can be.
    fn check(&self) -> Result<(), DecodeError> {
        let refuse = |field| Err(DecodeError::Field { field });
        if self.epoch == Epoch::default() || self.cluster == ClusterId::default() {
            return refuse("epoch or cluster id");
        }
        let is_spent = self.epoch.0 > u64::MAX / 2
            || [self.next_slot.0, self.next_keyspace]
                .iter()
                .any(|next| *next > u32::MAX / 2);
        if is_spent {
            return refuse("epoch, slot or keyspace id: nothing can have counted that far");
        }
        if !rising(self.members.iter().map(|member| member.slot.0)) {
            return refuse("order of members");
        }
        if self.members.len() > MEMBERS_MAX || self.ring_member_count() == 0 {
            return refuse("number of members");
        }
        if self.members.iter().any(|member| {
            member.slot >= self.next_slot
                || member.vnodes.is_empty()
                || member.description.shards == 0
                || !rising(member.vnodes.iter().map(|vnode| vnode.cell()))
        }) {
            return refuse("member");
        }
        if !rising(self.voters.iter().map(|voter| voter.0))
            || self.voters.is_empty()
            || self
                .voters
                .iter()
                .any(|voter| self.index_of_slot(*voter).is_none())
        {
            return refuse("voters");
        }
        if !rising(self.keyspaces.iter().map(|keyspace| keyspace.id.0))
            || self
                .keyspaces
                .iter()
                .any(|keyspace| keyspace.id.0 >= self.next_keyspace || keyspace.validate().is_err())
        {
            return refuse("keyspaces");
        }
        let mut vnodes: Vec<Vnode> = self
            .members
            .iter()
            .flat_map(|member| member.vnodes.iter().copied())
            .collect();
        vnodes.sort_unstable();
        if vnodes.windows(2).any(|pair| pair[0] == pair[1]) {
            return refuse("vnodes: two members claim one position");
        }
        let mut names: Vec<&str> = self
            .members
            .iter()
            .map(|member| member.description.name.as_str())
            .collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return refuse("names: two members have the same");
        }
        let mut nodes: Vec<NodeId> = self
            .members
            .iter()
            .filter_map(|member| member.node)
            .collect();
        nodes.extend(self.removed.iter().map(|removed| removed.node));
        nodes.sort_unstable();
        if nodes.windows(2).any(|pair| pair[0] == pair[1]) {
            return refuse("nodes: one uuid twice");
        }
        Ok(())
    }
}

/// Whether numbers ascend without repeats.
fn rising(ids: impl Iterator<Item = u32>) -> bool {
    let mut last = None;
    let mut ids = ids;
    ids.all(|id| last.replace(id).is_none_or(|before| before < id))
}

/// Most members of a cluster.
pub const MEMBERS_MAX: usize = 4096;
