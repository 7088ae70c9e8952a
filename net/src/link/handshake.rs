//! The first bytes of a link between two nodes. Format page: `docs/formats/internode.md`.
//!
//! Invariant: both messages have a fixed length, and nothing else travels before both sides know who
//! the other one is: a request never reaches a node or a cluster that it was not meant for.

use bytes::{Buf, BufMut, BytesMut};
use torc_client::wire::sealed::{SealError, open, seal};
use torc_env::{NodeId, ShardId};

/// First bytes of either message.
const MAGIC: [u8; 4] = *b"TLNK";
/// The version of links that this build speaks.
pub const VERSION: u8 = 1;
/// Length of an [`Intro`] on the wire.
pub const INTRO_BYTES: usize = 64;
/// Length of a [`Verdict`] on the wire.
pub const VERDICT_BYTES: usize = 48;

/// What the connecting side says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intro {
    /// Lowest version that it speaks.
    pub version_min: u8,
    /// Highest version that it speaks.
    pub version_max: u8,
    /// The connecting node.
    pub node: NodeId,
    /// Its shard.
    pub shard: ShardId,
    /// Its cluster; zero when it is in none yet.
    pub cluster: u128,
    /// The node that it wants; zero takes whichever answers.
    pub to_node: NodeId,
    /// The shard that it wants.
    pub to_shard: ShardId,
}

/// What the accepting side answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The version that both speak from here on.
    pub version: u8,
    /// Whether the link goes on.
    pub status: Status,
    /// The accepting node.
    pub node: NodeId,
    /// Its shard that serves the link.
    pub shard: ShardId,
    /// Its shards.
    pub shard_count: u16,
    /// Its cluster; zero when it is in none yet.
    pub cluster: u128,
}

/// How a handshake ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Frames may follow.
    Ready,
    /// The versions do not overlap.
    Version,
    /// Another node was wanted.
    WrongNode,
    /// The nodes belong to two clusters.
    WrongCluster,
    /// The connecting node was removed from the cluster, for ever.
    Removed,
    /// The accepting node takes no more links.
    Busy,
    /// A status of a later version.
    Other(u8),
}

/// The bytes are no handshake, or were changed on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer does not speak the protocol between Torc's nodes")]
pub struct HandshakeError;

impl From<SealError> for HandshakeError {
    fn from(_: SealError) -> Self {
        Self
    }
}

impl Intro {
    /// Appends the message.
    pub fn encode(&self, out: &mut BytesMut) {
        seal(out, MAGIC, |out| {
            out.put_u8(self.version_min);
            out.put_u8(self.version_max);
            out.put_u16_le(self.shard.0);
            out.put_u16_le(self.to_shard.0);
            out.put_u16_le(0);
            out.put_u128_le(self.node.0);
            out.put_u128_le(self.to_node.0);
            out.put_u128_le(self.cluster);
        });
    }

    /// Takes the message off the front of `input`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// When the peer speaks something else; noticed at the first wrong byte.
    pub fn decode(input: &mut BytesMut) -> Result<Option<Self>, HandshakeError> {
        let Some(mut bytes) = open(input, MAGIC, INTRO_BYTES)? else {
            return Ok(None);
        };
        let (version_min, version_max) = (bytes.get_u8(), bytes.get_u8());
        let (shard, to_shard) = (ShardId(bytes.get_u16_le()), ShardId(bytes.get_u16_le()));
        bytes.advance(2);
        Ok(Some(Self {
            version_min,
            version_max,
            shard,
            to_shard,
            node: NodeId(bytes.get_u128_le()),
            to_node: NodeId(bytes.get_u128_le()),
            cluster: bytes.get_u128_le(),
        }))
    }

    /// How the accepting side judges it. `is_removed` says whether a node was removed.
    pub fn judge(
        &self,
        own: NodeId,
        own_cluster: u128,
        is_removed: impl FnOnce(NodeId) -> bool,
    ) -> Status {
        if !(self.version_min..=self.version_max).contains(&VERSION) {
            Status::Version
        } else if self.to_node != NodeId::default() && self.to_node != own {
            Status::WrongNode
        } else if self.cluster != 0 && own_cluster != 0 && self.cluster != own_cluster {
            Status::WrongCluster
        } else if is_removed(self.node) {
            Status::Removed
        } else {
            Status::Ready
        }
    }
}

impl Verdict {
    /// Appends the message.
    pub fn encode(&self, out: &mut BytesMut) {
        seal(out, MAGIC, |out| {
            out.put_u8(self.version);
            out.put_u8(match self.status {
                Status::Ready => 0,
                Status::Version => 1,
                Status::WrongNode => 2,
                Status::WrongCluster => 3,
                Status::Removed => 4,
                Status::Busy => 5,
                Status::Other(other) => other,
            });
            out.put_u16_le(self.shard_count);
            out.put_u16_le(self.shard.0);
            out.put_u16_le(0);
            out.put_u128_le(self.node.0);
            out.put_u128_le(self.cluster);
        });
    }

    /// Takes the message off the front of `input`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// When the peer speaks something else; noticed at the first wrong byte.
    pub fn decode(input: &mut BytesMut) -> Result<Option<Self>, HandshakeError> {
        let Some(mut bytes) = open(input, MAGIC, VERDICT_BYTES)? else {
            return Ok(None);
        };
        let version = bytes.get_u8();
        let status = match bytes.get_u8() {
            0 => Status::Ready,
            1 => Status::Version,
            2 => Status::WrongNode,
            3 => Status::WrongCluster,
            4 => Status::Removed,
            5 => Status::Busy,
            other => Status::Other(other),
        };
        let shard_count = bytes.get_u16_le();
        let shard = ShardId(bytes.get_u16_le());
        bytes.advance(2);
        Ok(Some(Self {
            version,
            status,
            shard,
            shard_count,
            node: NodeId(bytes.get_u128_le()),
            cluster: bytes.get_u128_le(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torc_client::wire::sealed::reseal;

    const INTRO: Intro = Intro {
        version_min: 1,
        version_max: 1,
        node: NodeId(0x0a),
        shard: ShardId(2),
        cluster: 0x0c,
        to_node: NodeId(0x0b),
        to_shard: ShardId(3),
    };

    fn verdict(status: Status) -> Verdict {
        Verdict {
            version: 1,
            status,
            node: NodeId(0x0b),
            shard: ShardId(0),
            shard_count: 1,
            cluster: 0x0c,
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The bytes on the format page.
    #[test]
    fn the_layout_is_pinned() {
        let mut out = BytesMut::new();
        INTRO.encode(&mut out);
        assert_eq!(hex(&out), INTRO_HEX);
        out.clear();
        verdict(Status::Ready).encode(&mut out);
        assert_eq!(hex(&out), VERDICT_HEX);
    }

    const INTRO_HEX: &str = concat!(
        "544c4e4b01010200030000000a0000000000000000000000000000000b000000",
        "0000000000000000000000000c0000000000000000000000000000002c68c0a3"
    );
    const VERDICT_HEX: &str = concat!(
        "544c4e4b01000100000000000b0000000000000000000000000000000c000000",
        "000000000000000000000000d1e5f078"
    );

    #[test]
    fn both_messages_come_back_whole_or_are_refused() {
        let mut whole = BytesMut::new();
        INTRO.encode(&mut whole);
        assert_eq!(whole.len(), INTRO_BYTES);
        assert_eq!(Intro::decode(&mut whole.clone()), Ok(Some(INTRO)));
        for len in 0..whole.len() {
            assert_eq!(Intro::decode(&mut BytesMut::from(&whole[..len])), Ok(None));
        }
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Intro::decode(&mut bytes).is_err(), "bit {bit}");
        }
        for status in [
            Status::Ready,
            Status::Version,
            Status::WrongNode,
            Status::WrongCluster,
            Status::Removed,
            Status::Busy,
            Status::Other(99),
        ] {
            let mut bytes = BytesMut::new();
            verdict(status).encode(&mut bytes);
            assert_eq!(bytes.len(), VERDICT_BYTES);
            assert_eq!(Verdict::decode(&mut bytes), Ok(Some(verdict(status))));
        }
    }

    #[test]
    fn no_bytes_make_a_handshake_panic() {
        let (mut intro, mut answer) = (BytesMut::new(), BytesMut::new());
        INTRO.encode(&mut intro);
        verdict(Status::Ready).encode(&mut answer);
        let valid = [intro.to_vec(), answer.to_vec()];
        crate::fuzz::parser("handshake of a link", &valid).fuzz(|bytes| {
            let mut fitting = BytesMut::from(bytes);
            fitting.truncate(bytes.len().saturating_sub(4));
            reseal(&mut fitting, 0);
            for input in [BytesMut::from(bytes), fitting] {
                if let Ok(Some(intro)) = Intro::decode(&mut input.clone()) {
                    intro.judge(NodeId(1), 1, |_| false);
                }
                let _unread = Verdict::decode(&mut input.clone());
            }
        });
    }

    #[test]
    fn a_link_reaches_only_whom_it_is_meant_for() {
        let own = NodeId(0x0b);
        let nobody = |_| false;
        assert_eq!(INTRO.judge(own, 0x0c, nobody), Status::Ready);
        assert_eq!(INTRO.judge(NodeId(1), 0x0c, nobody), Status::WrongNode);
        assert_eq!(INTRO.judge(own, 0x0d, nobody), Status::WrongCluster);
        assert_eq!(
            INTRO.judge(own, 0x0c, |node| node == INTRO.node),
            Status::Removed
        );
        // Before either side is in a cluster there is nothing to compare.
        assert_eq!(INTRO.judge(own, 0, nobody), Status::Ready);
        let first_contact = Intro {
            to_node: NodeId::default(),
            cluster: 0,
            ..INTRO
        };
        assert_eq!(first_contact.judge(own, 0x0d, nobody), Status::Ready);
        let newer = Intro {
            version_min: 2,
            version_max: 3,
            ..INTRO
        };
        assert_eq!(newer.judge(own, 0x0c, nobody), Status::Version);
    }
}
