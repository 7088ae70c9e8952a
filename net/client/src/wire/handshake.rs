//! The first bytes of a connection: who speaks which version, and which shard answers.
//!
//! The client names the shard that it wants; the shard that accepted the connection hands it over,
//! so that a request for a key goes straight to the thread that owns the key. The server's answer
//! comes from the shard that will serve the connection.
//!
//! Invariant: both messages have a fixed length, so that neither side waits for bytes that the other
//! one does not know about.

use bytes::{Buf, BufMut, BytesMut};
use torc_env::{NodeId, ShardId};

use super::frame::VERSION;
use super::sealed::{SealError, open, seal};

/// First bytes of either message.
pub const MAGIC: [u8; 4] = *b"TORC";
/// Length of a [`Hello`] on the wire.
pub const HELLO_BYTES: usize = 16;
/// Length of a [`Welcome`] on the wire.
pub const WELCOME_BYTES: usize = 64;
/// The shard number that stands for "any".
const ANY_SHARD: u16 = u16::MAX;

/// What a client says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Lowest protocol version that the client speaks.
    pub version_min: u8,
    /// Highest protocol version that the client speaks.
    pub version_max: u8,
    /// The shard that should serve this connection; `None` = whichever accepted it.
    pub shard: Option<ShardId>,
}

/// What the server answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version that both speak from here on.
    pub version: u8,
    /// Whether the connection goes on.
    pub status: Status,
    /// The node.
    pub node: NodeId,
    /// The cluster; zero while it is not founded.
    pub cluster: u128,
    /// Epoch of the topology that the node knows.
    pub epoch: u64,
    /// Shards of this node: a key's shard is `Token::of(keyspace id, key).shard(shard_count)`.
    pub shard_count: u16,
    /// The shard that serves this connection.
    pub shard: ShardId,
    /// The largest frame that the server takes, in bytes.
    pub frame_bytes_max: u32,
}

/// How a handshake ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Requests may follow.
    Ready,
    /// The versions do not overlap; the server closes.
    Version,
    /// The server takes no more connections; it closes.
    Busy,
    /// A status of a later version; the server closes.
    Other(u8),
}

/// Why a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The peer speaks something else.
    #[error("handshake starts with {found:02x?}, expected {MAGIC:02x?}")]
    Magic {
        /// Its first bytes.
        found: [u8; 4],
    },
    /// The bytes were changed on the way.
    #[error("handshake checksum does not match")]
    Checksum,
}

impl From<SealError> for HandshakeError {
    fn from(error: SealError) -> Self {
        match error {
            SealError::Magic(found) => HandshakeError::Magic { found },
            SealError::Checksum => HandshakeError::Checksum,
        }
    }
}

impl Hello {
    /// A hello of this build.
    pub fn new(shard: Option<ShardId>) -> Self {
        Self {
            version_min: VERSION,
            version_max: VERSION,
            shard,
        }
    }

    /// Appends the message.
    pub fn encode(&self, out: &mut BytesMut) {
        seal(out, MAGIC, |out| {
            out.put_u8(self.version_min);
            out.put_u8(self.version_max);
            out.put_u16_le(self.shard.map_or(ANY_SHARD, |shard| shard.0));
            out.put_u32_le(0);
        });
    }

    /// Takes the message off the front of `input`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// See [`HandshakeError`]. A wrong first byte is noticed before the rest has come.
    pub fn decode(input: &mut BytesMut) -> Result<Option<Self>, HandshakeError> {
        let Some(mut bytes) = open(input, MAGIC, HELLO_BYTES)? else {
            return Ok(None);
        };
        let version_min = bytes.get_u8();
        let version_max = bytes.get_u8();
        let shard = bytes.get_u16_le();
        Ok(Some(Self {
            version_min,
            version_max,
            shard: (shard != ANY_SHARD).then_some(ShardId(shard)),
        }))
    }

    /// The version that this build and the client share.
    pub fn common_version(&self) -> Option<u8> {
        (self.version_min..=self.version_max)
            .contains(&VERSION)
            .then_some(VERSION)
    }
}

impl Welcome {
    /// Appends the message.
    pub fn encode(&self, out: &mut BytesMut) {
        seal(out, MAGIC, |out| {
            out.put_u8(self.version);
            out.put_u8(match self.status {
                Status::Ready => 0,
                Status::Version => 1,
                Status::Busy => 2,
                Status::Other(other) => other,
            });
            out.put_u16_le(self.shard_count);
            out.put_u16_le(self.shard.0);
            out.put_u16_le(0);
            out.put_u128_le(self.node.0);
            out.put_u128_le(self.cluster);
            out.put_u64_le(self.epoch);
            out.put_u32_le(self.frame_bytes_max);
            out.put_u32_le(0);
        });
    }

    /// Takes the message off the front of `input`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// See [`HandshakeError`].
    pub fn decode(input: &mut BytesMut) -> Result<Option<Self>, HandshakeError> {
        let Some(mut bytes) = open(input, MAGIC, WELCOME_BYTES)? else {
            return Ok(None);
        };
        let version = bytes.get_u8();
        let status = match bytes.get_u8() {
            0 => Status::Ready,
            1 => Status::Version,
            2 => Status::Busy,
            other => Status::Other(other),
        };
        let shard_count = bytes.get_u16_le();
        let shard = ShardId(bytes.get_u16_le());
        bytes.advance(2);
        Ok(Some(Self {
            version,
            status,
            shard_count,
            shard,
            node: NodeId(bytes.get_u128_le()),
            cluster: bytes.get_u128_le(),
            epoch: bytes.get_u64_le(),
            frame_bytes_max: bytes.get_u32_le(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> BytesMut {
        let mut out = BytesMut::new();
        Hello::new(Some(ShardId(5))).encode(&mut out);
        out
    }

    fn welcome() -> (Welcome, BytesMut) {
        let welcome = Welcome {
            version: 1,
            status: Status::Ready,
            node: NodeId(0x0102),
            cluster: 0x0304,
            epoch: 9,
            shard_count: 4,
            shard: ShardId(3),
            frame_bytes_max: 1 << 20,
        };
        let mut out = BytesMut::new();
        welcome.encode(&mut out);
        (welcome, out)
    }

    #[test]
    fn both_messages_have_their_fixed_length_and_come_back_whole() {
        let mut bytes = hello();
        assert_eq!(bytes.len(), HELLO_BYTES);
        let back = Hello::decode(&mut bytes).expect("good").expect("whole");
        assert_eq!(back, Hello::new(Some(ShardId(5))));
        assert!(bytes.is_empty());

        let (welcome, mut bytes) = welcome();
        assert_eq!(bytes.len(), WELCOME_BYTES);
        assert_eq!(Welcome::decode(&mut bytes), Ok(Some(welcome)));
    }

    #[test]
    fn truncations_wait_and_flipped_bits_are_noticed() {
        let whole = hello();
        for len in 0..whole.len() {
            assert_eq!(Hello::decode(&mut BytesMut::from(&whole[..len])), Ok(None));
        }
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Hello::decode(&mut bytes).is_err(), "bit {bit}");
        }
        let (_, whole) = welcome();
        for len in 0..whole.len() {
            assert_eq!(
                Welcome::decode(&mut BytesMut::from(&whole[..len])),
                Ok(None)
            );
        }
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Welcome::decode(&mut bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn another_protocol_is_told_apart_by_its_first_byte() {
        assert_eq!(
            Hello::decode(&mut BytesMut::from(&b"G"[..])),
            Err(HandshakeError::Magic {
                found: [b'G', 0, 0, 0]
            })
        );
    }

    #[test]
    fn versions_that_do_not_overlap_have_none_in_common() {
        let mut hello = Hello::new(None);
        assert_eq!(hello.common_version(), Some(VERSION));
        hello.version_min = VERSION + 1;
        hello.version_max = VERSION + 3;
        assert_eq!(hello.common_version(), None);
    }
}
