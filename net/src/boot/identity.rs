//! The file `node/identity`: who this node is, and how often it has started.
//! Format page: `docs/formats/identity.md`.
//!
//! ```text
//! byte 0       8        12       16     32     40       48       50       52        60      62
//!      | magic | format | crc32c | node | boot | random | shards | layout | lineage | flags | …
//!      … name len | cluster len | names …
//!        62         64            66
//! ```
//!
//! Invariant: bytes that are damaged, cut, or of another format are an error, never a fresh node: a
//! node that forgot who it was would be two nodes to the others.

use bytes::{Buf, BufMut};
use torc_engine::Layout;
use torc_env::NodeId;

/// First bytes of the file.
const MAGIC: [u8; 8] = *b"TORCNODE";
/// Format of the data directory that this build reads and writes.
pub const FORMAT: u32 = 2;
/// Bytes before the names.
const FIXED_BYTES: usize = 66;
/// Flag: this node has no vote about the topology.
const ABSTAINS: u16 = 1;
/// Flag: this node has taken connections.
const HAS_SERVED: u16 = 2;
/// What the checksum does not cover: everything up to and including itself.
const UNCOVERED_BYTES: usize = 16;
/// The longest name of a node or cluster, in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// Content of the identity file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The node; never reused by another one.
    pub node: NodeId,
    /// How many times the node has started, this start included.
    pub boot: u64,
    /// Drawn anew at every start.
    pub random: u64,
    /// Shards that the directory's data is divided among.
    pub shards: u16,
    /// How often that number has changed.
    pub layout: u16,
    /// Which restore from a backup the directory's data goes back to: the boot counter that the restore
    /// gave it; 0 when it was never restored. Within one lineage no id of a table is used twice.
    pub lineage: u64,
    /// Whether this node may have forgotten a vote about the topology, and so gives none.
    pub abstains: bool,
    /// Whether this node has taken connections: then it had its stores and its vote, and what is missing of them is lost.
    pub has_served: bool,
    /// The configured name of the node that made the directory.
    pub name: String,
    /// The configured name of its cluster.
    pub cluster: String,
}

/// Why bytes are no identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The file is something else.
    #[error("it does not start with {MAGIC:02x?}")]
    Magic,
    /// Another version of the program wrote the directory.
    #[error("it has format {found}, this program reads {FORMAT}")]
    Format {
        /// What the file says.
        found: u32,
    },
    /// The file is shorter or longer than it says.
    #[error("it has {found} bytes, expected {expected}")]
    Length {
        /// Length of the file.
        found: usize,
        /// Length that its content asks for.
        expected: usize,
    },
    /// The file was changed.
    #[error("its checksum is {found:#010x}, computed {expected:#010x}")]
    Checksum {
        /// The checksum of the content.
        expected: u32,
        /// The checksum in the file.
        found: u32,
    },
    /// A name is not UTF-8.
    #[error("a name in it is not UTF-8")]
    Name,
}

impl Identity {
    /// How the directory's data is divided among shards.
    pub fn layout(&self) -> Layout {
        Layout {
            number: self.layout,
            shards: self.shards,
        }
    }

    /// The file's bytes.
    ///
    /// # Panics
    /// When a name is longer than [`NAME_BYTES_MAX`]; [`super::boot`] checks that before.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED_BYTES + self.name.len() + self.cluster.len());
        bytes.put_slice(&MAGIC);
        bytes.put_u32_le(FORMAT);
        bytes.put_u32_le(0);
        bytes.put_u128_le(self.node.0);
        bytes.put_u64_le(self.boot);
        bytes.put_u64_le(self.random);
        bytes.put_u16_le(self.shards);
        bytes.put_u16_le(self.layout);
        bytes.put_u64_le(self.lineage);
        let abstains = ABSTAINS * u16::from(self.abstains);
        bytes.put_u16_le(abstains | (HAS_SERVED * u16::from(self.has_served)));
        for name in [&self.name, &self.cluster] {
            assert!(
                name.len() <= NAME_BYTES_MAX,
                "a name of {} bytes",
                name.len()
            );
            bytes.put_u16_le(u16::try_from(name.len()).expect("checked by the assertion"));
        }
        bytes.put_slice(self.name.as_bytes());
        bytes.put_slice(self.cluster.as_bytes());
        let checksum = crc_fast::crc32_iscsi(&bytes[UNCOVERED_BYTES..]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The identity in a file's bytes.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn decode(bytes: &[u8]) -> Result<Identity, IdentityError> {
        let mut rest = bytes;
        if !rest.starts_with(&MAGIC) {
            return Err(IdentityError::Magic);
        }
        if bytes.len() < FIXED_BYTES {
            return Err(IdentityError::Length {
                found: bytes.len(),
                expected: FIXED_BYTES,
            });
        }
        rest.advance(MAGIC.len());
        let format = rest.get_u32_le();
        let found = rest.get_u32_le();
        let expected = crc_fast::crc32_iscsi(rest);
        if found != expected {
            return Err(IdentityError::Checksum { expected, found });
        }
        if format != FORMAT {
            return Err(IdentityError::Format { found: format });
        }
        let node = NodeId(rest.get_u128_le());
        let boot = rest.get_u64_le();
        let random = rest.get_u64_le();
        let shards = rest.get_u16_le();
        let layout = rest.get_u16_le();
        let lineage = rest.get_u64_le();
        let flags = rest.get_u16_le();
        let name_len = usize::from(rest.get_u16_le());
        let cluster_len = usize::from(rest.get_u16_le());
        if rest.len() != name_len + cluster_len {
            return Err(IdentityError::Length {
                found: bytes.len(),
                expected: FIXED_BYTES + name_len + cluster_len,
            });
        }
        let (name, cluster) = rest.split_at(name_len);
        let text = |bytes: &[u8]| {
            let text = std::str::from_utf8(bytes).map_err(|_| IdentityError::Name)?;
            Ok(text.to_owned())
        };
        Ok(Identity {
            node,
            boot,
            random,
            shards,
            layout,
            lineage,
            abstains: flags & ABSTAINS != 0,
            has_served: flags & HAS_SERVED != 0,
            name: text(name)?,
            cluster: text(cluster)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            node: NodeId(0x0102),
            boot: 3,
            random: 0x0405,
            shards: 6,
            layout: 7,
            lineage: 8,
            abstains: true,
            has_served: false,
            name: "n1".into(),
            cluster: "demo".into(),
        }
    }

    /// The bytes on the format page.
    #[test]
    fn the_layout_is_pinned() {
        let hex: String = identity()
            .encode()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            hex,
            "544f52434e4f44450200000058a39dcc020100000000000000000000000000\
             00030000000000000005040000000000000600070008000000000000000100\
             020004006e3164656d6f"
        );
    }

    #[test]
    fn an_identity_comes_back_whole() {
        assert_eq!(Identity::decode(&identity().encode()), Ok(identity()));
    }

    #[test]
    fn no_bytes_make_an_identity_panic() {
        let valid = [identity().encode()];
        crate::fuzz::parser("identity", &valid).fuzz(|bytes| {
            drop(Identity::decode(bytes));
            let mut fitting = bytes.to_vec();
            if let Some(covered) = bytes.get(UNCOVERED_BYTES..) {
                let checksum = crc_fast::crc32_iscsi(covered);
                fitting[12..16].copy_from_slice(&checksum.to_le_bytes());
            }
            if let Ok(identity) = Identity::decode(&fitting) {
                identity.layout().shards().take(3).for_each(drop);
            }
        });
    }

    #[test]
    fn a_newer_format_is_named_unless_the_rest_is_damaged() {
        let mut bytes = identity().encode();
        bytes[8] = 3;
        let refused = Identity::decode(&bytes);
        assert_eq!(refused, Err(IdentityError::Format { found: 3 }));
        bytes[20] ^= 1;
        let refused = Identity::decode(&bytes);
        assert!(matches!(refused, Err(IdentityError::Checksum { .. })));
    }

    #[test]
    fn every_flipped_bit_and_truncation_is_noticed() {
        let whole = identity().encode();
        for len in 0..whole.len() {
            assert!(Identity::decode(&whole[..len]).is_err(), "{len} bytes");
        }
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Identity::decode(&bytes).is_err(), "bit {bit}");
        }
        let mut long = whole;
        long.push(0);
        assert!(Identity::decode(&long).is_err());
    }
}
