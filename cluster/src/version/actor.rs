//! Who mints dots: an [`Actor`] is one boot of one node.
//!
//! A node that lost the tail of its log, restored a backup or had its directory copied no longer
//! knows which dots it has given away; going on under the old name would make new writes look like
//! old ones, and repair would delete them. So no node ever goes on: it mints under a fresh actor
//! from every start, and from every event after which its memory of a key may have holes.
//!
//! Not here: storing the identity. Whoever boots the node syncs the [`BootIdentity`] to disk
//! before the first request is served.

use std::fmt;

use torc_env::{NodeId, mutation};

/// Domain of the hash that names actors. Part of the on-disk contract.
const ACTOR_SEED: u64 = 0x746f_7263_6163_746f;

/// The name under which one boot of one node mints dots; 128 bits, written as 32 hexadecimal
/// digits.
///
/// It is a hash of (node uuid, boot counter, boot random). A collision would need two of all boots
/// of a cluster's life to meet in 128 bits (a billion boots: about 2^-69), and would still do harm
/// only if both wrote the same key with the same stamp.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Actor(pub u128);

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Actor({self})")
    }
}

/// What makes one boot of a node differ from every other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootIdentity {
    /// The node; never reused by another one.
    pub node: NodeId,
    /// How many times the node has started; synced before the node serves.
    pub boot: u64,
    /// Drawn anew at every boot, so that a directory that was copied or rolled back, counter and
    /// all, still starts under another name.
    pub random: u64,
}

impl BootIdentity {
    /// The first boot of a fresh node.
    pub fn first(node: NodeId, random: u64) -> Self {
        Self {
            node,
            boot: 1,
            random,
        }
    }

    /// The boot after this one. To be synced before it mints.
    #[must_use]
    pub fn next(self, random: u64) -> Self {
        Self {
            boot: self.boot.saturating_add(1),
            random,
            ..self
        }
    }

    /// A fresh name within the same boot, for a shard that may have forgotten what it minted: after
    /// a quarantined file, a failed sync, a restored backup, or a range that it owns again.
    #[must_use]
    pub fn renewed(self, random: u64) -> Self {
        Self { random, ..self }
    }

    /// The actor of this boot.
    pub fn actor(&self) -> Actor {
        let mut parts = [0; 32];
        parts[..16].copy_from_slice(&self.node.0.to_le_bytes());
        if mutation::on("reuse_actor_after_crash") {
            return Actor(xxhash_rust::xxh3::xxh3_128_with_seed(&parts, ACTOR_SEED));
        }
        parts[16..24].copy_from_slice(&self.boot.to_le_bytes());
        parts[24..].copy_from_slice(&self.random.to_le_bytes());
        Actor(xxhash_rust::xxh3::xxh3_128_with_seed(&parts, ACTOR_SEED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_boot_and_every_renewal_mints_under_another_name() {
        let first = BootIdentity::first(NodeId(7), 11);
        let names = [
            first,
            first.next(11),
            first.next(12),
            first.renewed(13),
            BootIdentity::first(NodeId(8), 11),
        ]
        .map(|identity| identity.actor());
        for (index, name) in names.iter().enumerate() {
            assert!(!names[..index].contains(name), "{name} was given twice");
        }
    }

    #[test]
    fn the_name_of_a_boot_is_pinned() {
        let actor = BootIdentity::first(NodeId(7), 11).actor();
        assert_eq!(actor.to_string(), "3a8413ffcab9cc20e85bf3bfd6bbec3a");
    }
}
