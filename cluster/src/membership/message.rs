//! What the membership of one node says to that of another, and what shard 0 tells its siblings.
//!
//! Format: one byte [`FAMILY`], one byte [`VERSION`], then an rkyv archive (little-endian, unaligned,
//! 32-bit relative pointers), checked before its first field is looked at. A topology travels as the
//! bytes of its own codec, because a vote compares and stores them.
//!
//! Invariant: bytes from outside never panic and never allocate more than in proportion to their
//! own length.

use bytes::Bytes;
use rkyv::rancor::{self, Failure as Malformed};
use rkyv::{Archive, Deserialize, Serialize};

/// First byte of every message of this module: how a shard tells them from requests.
pub const FAMILY: u8 = 2;

/// The protocol version that this node speaks.
pub const VERSION: u8 = 1;

/// A ballot on the wire.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireBallot {
    /// Counts attempts.
    pub round: u64,
    /// Who attempts.
    pub node: u128,
}

/// Which consensus instance a message belongs to.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instance {
    /// The cluster; zero at its founding.
    pub cluster: u128,
    /// At the founding, the hash of the seed list; later the one that founded the cluster.
    pub seeds_hash: u64,
    /// The epoch to decide.
    pub epoch: u64,
    /// The attempt.
    pub ballot: WireBallot,
}

/// A node's state in gossip.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireState {
    /// Who.
    pub node: u128,
    /// Its starts.
    pub generation: u64,
    /// Its rounds.
    pub heartbeat: u64,
    /// The newest epoch that it has stored.
    pub epoch: u64,
    /// Bytes that its stores hold on disk.
    pub disk_bytes: u64,
    /// Bytes that the disk still has.
    pub disk_free_bytes: u64,
    /// Requests in flight.
    pub requests: u32,
    /// Compaction backlog.
    pub backlog_bytes: u64,
}

/// A digest in gossip.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireDigest {
    /// Who.
    pub node: u128,
    /// Its starts, as the sender knows them.
    pub generation: u64,
    /// Its rounds.
    pub heartbeat: u64,
}

/// A member's liveness, as shard 0 tells its siblings.
#[derive(Archive, Serialize, Deserialize, Clone, Copy, Debug, PartialEq)]
pub struct WireLiveness {
    /// 0 up, 1 suspect, 2 down.
    pub health: u8,
    /// The detector's phi.
    pub phi: f64,
    /// Its state in gossip; only the load counts.
    pub state: WireState,
}

/// A question.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum Message {
    /// First phase of an epoch's consensus.
    Prepare {
        /// Which.
        instance: Instance,
    },
    /// Second phase.
    Accept {
        /// Which.
        instance: Instance,
        /// The encoded topology.
        value: Vec<u8>,
    },
    /// A decided topology, to be stored.
    Learn {
        /// Encoded.
        topology: Vec<u8>,
    },
    /// Asks for the decided topology, if it is newer.
    Fetch {
        /// The cluster's configured name: a node that is in no cluster yet knows nothing else.
        name: String,
        /// The epoch that the sender has.
        above: u64,
    },
    /// Opens a gossip exchange.
    Gossip {
        /// The cluster.
        cluster: u128,
        /// The newest epoch that the sender has stored.
        epoch: u64,
        /// Sorted by node.
        digests: Vec<WireDigest>,
    },
    /// Closes a gossip exchange: what was asked for.
    States {
        /// The cluster.
        cluster: u128,
        /// The states.
        states: Vec<WireState>,
    },
    /// Are you there?
    Ping {
        /// The cluster.
        cluster: u128,
    },
    /// Shard 0 to another shard of its node: what the cluster looks like now.
    Publish {
        /// The decided topology, encoded; `None` when it is the one that was sent last.
        topology: Option<Vec<u8>>,
        /// Its epoch.
        epoch: u64,
        /// By member.
        liveness: Vec<WireLiveness>,
    },
    /// A shard to shard 0 of its node: a change that its caller wants.
    Change {
        /// What.
        change: WireChange,
    },
    /// A shard to shard 0 of its node: a connection to this member was refused or broken.
    Unreachable {
        /// Who.
        node: u128,
    },
    /// A shard to shard 0 of its node: the shard has pulled its ranges for `epoch`.
    Pulled {
        /// The epoch that made this node a joining member.
        epoch: u64,
    },
}

/// Changes that a shard may hand to shard 0.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum WireChange {
    /// Create or alter a keyspace.
    PutKeyspace {
        /// Name.
        name: String,
        /// Copies.
        n: u8,
        /// Serial instead of eventual.
        serial: bool,
        /// Last write wins instead of siblings.
        lww: bool,
        /// Default time to live.
        ttl_default_seconds: u64,
        /// Code of the compaction strategy.
        compaction: u8,
        /// Width of its time windows; 0 without.
        window_seconds: u32,
        /// Least age of a deletion that is forgotten.
        tombstone_grace_seconds: u64,
    },
    /// Drop a keyspace.
    DropKeyspace {
        /// Name.
        name: String,
    },
}

/// What came of a change.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub enum WireOutcome {
    /// It is in force as of this epoch.
    Done {
        /// The epoch.
        epoch: u64,
    },
    /// It cannot be.
    Refused {
        /// Why.
        reason: String,
    },
    /// No majority answered. `in_doubt`: it may yet come into force.
    NoMajority {
        /// Whether it may.
        in_doubt: bool,
    },
}

/// An answer.
#[derive(Archive, Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum Answer {
    /// To [`Message::Prepare`]: promised.
    Promise {
        /// The slot that votes; at the founding, its place in the seed list.
        voter: u32,
        /// Who votes.
        node: u128,
        /// What was accepted before, with its ballot.
        accepted: Option<(WireBallot, Vec<u8>)>,
        /// At the founding, what the voter says about itself, encoded.
        description: Option<Vec<u8>>,
    },
    /// To [`Message::Accept`]: accepted.
    Accepted {
        /// The slot that votes.
        voter: u32,
    },
    /// To both: a higher ballot was promised.
    Outbid {
        /// The highest.
        promised: WireBallot,
    },
    /// To both: the receiver lacks the epoch before; send it.
    Behind {
        /// What it has.
        epoch: u64,
    },
    /// The decided topology of the receiver, which is newer than what the sender has.
    Topology {
        /// Encoded.
        topology: Vec<u8>,
    },
    /// To [`Message::Fetch`]: nothing newer. To others: done.
    Ok,
    /// To [`Message::Gossip`].
    Gossip {
        /// The newest epoch that the receiver has stored.
        epoch: u64,
        /// What it knows better.
        newer: Vec<WireState>,
        /// Whom it wants to hear about.
        wanted: Vec<u128>,
    },
    /// To [`Message::Change`].
    Outcome {
        /// What came of it.
        outcome: WireOutcome,
    },
    /// The receiver has nothing to do with the sender, or cannot answer.
    Refused {
        /// Why, for the log.
        reason: String,
    },
}

impl Message {
    /// The bytes to send. One allocation.
    pub fn encode(&self) -> Bytes {
        frame(
            rkyv::to_bytes::<rancor::Panic>(self)
                .expect("memory writer")
                .as_slice(),
        )
    }

    /// Reads and checks a message.
    pub fn decode(bytes: &[u8]) -> Option<Message> {
        rkyv::from_bytes::<Message, Malformed>(unframe(bytes)?).ok()
    }
}

impl Answer {
    /// The bytes to send. One allocation.
    pub fn encode(&self) -> Bytes {
        frame(
            rkyv::to_bytes::<rancor::Panic>(self)
                .expect("memory writer")
                .as_slice(),
        )
    }

    /// Reads and checks an answer.
    pub fn decode(bytes: &[u8]) -> Option<Answer> {
        rkyv::from_bytes::<Answer, Malformed>(unframe(bytes)?).ok()
    }
}

fn frame(archive: &[u8]) -> Bytes {
    let mut bytes = Vec::with_capacity(2 + archive.len());
    bytes.extend_from_slice(&[FAMILY, VERSION]);
    bytes.extend_from_slice(archive);
    Bytes::from(bytes)
}

fn unframe(bytes: &[u8]) -> Option<&[u8]> {
    bytes.strip_prefix(&[FAMILY, VERSION])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Message> {
        let ballot = WireBallot { round: 3, node: 7 };
        let instance = Instance {
            cluster: 1,
            seeds_hash: 2,
            epoch: 3,
            ballot,
        };
        vec![
            Message::Prepare { instance },
            Message::Accept {
                instance,
                value: b"value".to_vec(),
            },
            Message::Fetch {
                name: "demo".to_owned(),
                above: 4,
            },
            Message::Gossip {
                cluster: 1,
                epoch: 2,
                digests: vec![WireDigest {
                    node: 5,
                    generation: 6,
                    heartbeat: 7,
                }],
            },
            Message::Change {
                change: WireChange::DropKeyspace {
                    name: "k".to_owned(),
                },
            },
        ]
    }

    #[test]
    fn messages_come_back_as_they_went() {
        for message in samples() {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
    }

    #[test]
    fn no_bytes_make_a_message_panic() {
        let ballot = WireBallot { round: 3, node: 7 };
        let answers = [
            Answer::Promise {
                voter: 1,
                node: 2,
                accepted: Some((ballot, b"value".to_vec())),
                description: Some(b"description".to_vec()),
            },
            Answer::Gossip {
                epoch: 1,
                newer: Vec::new(),
                wanted: vec![1, 2],
            },
            Answer::Outcome {
                outcome: WireOutcome::Refused {
                    reason: "why".to_owned(),
                },
            },
        ];
        let mut valid: Vec<Vec<u8>> = answers.map(|answer| answer.encode().to_vec()).to_vec();
        valid.extend(samples().iter().map(|message| message.encode().to_vec()));
        crate::fuzz::parser("message of a membership", &valid).fuzz(|bytes| {
            drop(Message::decode(bytes));
            drop(Answer::decode(bytes));
        });
    }

    #[test]
    fn damaged_messages_never_panic() {
        for message in samples() {
            let good = message.encode();
            for cut in 0..good.len() {
                let _unread = Message::decode(&good[..cut]);
                for bit in 0..8 {
                    let mut bad = good.to_vec();
                    bad[cut] ^= 1 << bit;
                    let _unread = (Message::decode(&bad), Answer::decode(&bad));
                }
            }
        }
    }

    #[test]
    fn the_wire_form_is_pinned() {
        let ping = Message::Ping { cluster: 0x0102 }.encode();
        let hex: String = ping.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, PING);
    }

    /// A change of this value is a change of the protocol: raise [`VERSION`].
    const PING: &str = concat!(
        "0201",
        "06020100000000000000000000000000000000000000000000000000000000000000000000",
        "00000000000000000000000000000000000000000000000000000000"
    );
}
