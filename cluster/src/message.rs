//! What shards say to each other, over the mesh and between nodes.
//!
//! On the path: a coordinator builds one [`Request`] and sends the same [`Bytes`] to every replica;
//! `Node::serve` validates it ([`Request::access`]), reads it in place, and
//! answers with a [`Response`]. Keys and states come out as slices of the received buffer
//! ([`slice_of`]); nothing is deserialised.
//!
//! Format: one byte [`FAMILY`], one byte [`VERSION`] (outside the archive, so that it can be told
//! whatever later versions put inside), then an rkyv archive (little-endian, unaligned, 32-bit relative
//! pointers), checked with bytecheck before the first field is looked at. Links and mesh keep bytes
//! whole, so there is no checksum here; states carry their own.
//!
//! Invariant: bytes from outside never panic and never allocate more than their own length.
//!
//! It does not know what a state is: it travels as the opaque bytes of
//! the versions's codec.

use bytes::Bytes;
use rkyv::primitive::ArchivedU128;
use rkyv::rancor::{self, Failure as Malformed};
use rkyv::with::{InlineAsBox, Map};
use rkyv::{Archive, Serialize};
use torc_env::{Token, TokenRange};

use crate::api::{Failure, FailureCode, Level};

/// First byte of every message of this module; other families have other bytes.
pub const FAMILY: u8 = 1;

/// The protocol version that this node speaks.
pub const VERSION: u8 = 1;

/// A request to a shard.
#[derive(Archive, Serialize, Debug)]
pub struct Request<'a> {
    /// Names the client's operation; the same on all messages that it causes.
    pub id: u64,
    /// Time left until the sender stops waiting, in milliseconds: clocks of two nodes never meet.
    pub remaining_ms: u32,
    /// The newest topology epoch that the sender knows.
    pub epoch: u64,
    /// The range epoch: a fingerprint of the owners of the key's range as the sender knows them. It
    /// changes with the owners and with nothing else. 0 when the request is about no single key.
    pub owners: u64,
    /// What is wanted.
    pub body: Body<'a>,
}

/// What is wanted of a shard.
#[derive(Archive, Serialize, Debug)]
pub enum Body<'a> {
    /// The state of a key that a replica holds durably.
    Read {
        /// Keyspace id.
        tree: u32,
        /// Key.
        #[rkyv(with = InlineAsBox)]
        key: &'a [u8],
        /// Digest of the state that the sender has: the answer is then just [`Answer::Same`] if
        /// it is equal.
        known: Option<u128>,
        /// Asked by repair: a replica that has not caught up yet gives what it has.
        is_repair: bool,
    },
    /// Merge a whole state into a replica's.
    Merge {
        /// Keyspace id.
        tree: u32,
        /// Key.
        #[rkyv(with = InlineAsBox)]
        key: &'a [u8],
        /// Encoded state.
        #[rkyv(with = InlineAsBox)]
        state: &'a [u8],
    },
    /// Keep a whole state for a replica that does not answer, durably, until it has it.
    Hint {
        /// Keyspace id.
        tree: u32,
        /// Key.
        #[rkyv(with = InlineAsBox)]
        key: &'a [u8],
        /// Encoded state.
        #[rkyv(with = InlineAsBox)]
        state: &'a [u8],
        /// Slot of the replica that it is for.
        target: u32,
    },
    /// A client's read, to the shard that owns the key.
    Get {
        /// Keyspace id.
        tree: u32,
        /// Key.
        #[rkyv(with = InlineAsBox)]
        key: &'a [u8],
        /// See [`level_to_wire`].
        r: u16,
        /// What the client's session has seen: an encoded context.
        #[rkyv(with = Map<InlineAsBox>)]
        at_least: Option<&'a [u8]>,
    },
    /// A client's put or delete, to a shard that owns the key.
    Write {
        /// Keyspace id.
        tree: u32,
        /// Key.
        #[rkyv(with = InlineAsBox)]
        key: &'a [u8],
        /// The value; `None` deletes.
        #[rkyv(with = Map<InlineAsBox>)]
        value: Option<&'a [u8]>,
        /// Time to live in seconds; 0 = none.
        ttl_seconds: u64,
        /// Encoded context of the writer.
        #[rkyv(with = Map<InlineAsBox>)]
        context: Option<&'a [u8]>,
        /// Encoded context of an `If-Match`.
        #[rkyv(with = Map<InlineAsBox>)]
        if_match: Option<&'a [u8]>,
        /// Bits of [`flags`].
        flags: u8,
        /// See [`level_to_wire`].
        w: u16,
        /// Idempotency id and body hash.
        idempotency: Option<(u128, u64)>,
    },
    /// One page of a replica's keys.
    Scan {
        /// Keyspace id.
        tree: u32,
        /// First token of the run.
        first: u128,
        /// Key at `first` after which the page starts; `None` = at `first` itself.
        #[rkyv(with = Map<InlineAsBox>)]
        after: Option<&'a [u8]>,
        /// Last token of the run.
        last: u128,
        /// Only keys that start with this.
        #[rkyv(with = InlineAsBox)]
        prefix: &'a [u8],
        /// Most records of the page.
        records: u32,
    },
    /// Hash sums of a replica's records in a run of the ring.
    Sums {
        /// Keyspace id.
        tree: u32,
        /// First token of the run.
        first: u128,
        /// Last token of the run.
        last: u128,
        /// Hour before which the sender leaves out what is dead.
        floor_hour: u32,
        /// Leaves wanted, each as first and last; the run cuts those at its ends.
        leaves: Vec<(u32, u32)>,
    },
    /// One page of hashes of a replica's records.
    Hashes {
        /// Keyspace id.
        tree: u32,
        /// First token of the run.
        first: u128,
        /// Key at `first` after which the page starts; `None` = at `first` itself.
        #[rkyv(with = Map<InlineAsBox>)]
        after: Option<&'a [u8]>,
        /// Last token of the run.
        last: u128,
        /// As the sums were agreed on.
        floor_hour: u32,
        /// Most records of the page.
        records: u32,
    },
    /// When the oldest hint on this shard was created, and for how long it has been so.
    OldestHint,
    /// From a shard of the same node: repair what this shard holds.
    Repair,
    /// What a replica has lost of a run through damage.
    Lacks {
        /// Keyspace id.
        tree: u32,
        /// First token of the run.
        first: u128,
        /// Last token of the run.
        last: u128,
    },
}

/// Bits of a client's write.
pub mod flags {
    /// Hints count.
    pub const SLOPPY: u8 = 1;
    /// Read the context first.
    pub const READ_CONTEXT: u8 = 2;
    /// Only when the key is absent.
    pub const IF_ABSENT: u8 = 4;
    /// It has been forwarded to a replica once: it is not forwarded again.
    pub const FORWARDED: u8 = 8;
}

/// The answer to a [`Request`].
#[derive(Archive, Serialize, Debug)]
pub struct Response<'a> {
    /// The newest topology epoch that it knows.
    pub epoch: u64,
    /// The answer.
    pub answer: Answer<'a>,
}

/// What a shard answers.
#[derive(Archive, Serialize, Debug)]
pub enum Answer<'a> {
    /// Merged or kept, durably by this node's fsync policy.
    Acked,
    /// The state is the one whose digest the sender gave.
    Same,
    /// An encoded state; empty = absent.
    State {
        /// Encoded.
        #[rkyv(with = InlineAsBox)]
        state: &'a [u8],
    },
    /// The client's write is done.
    Written {
        /// The write's context and its own dot, encoded.
        #[rkyv(with = InlineAsBox)]
        context: &'a [u8],
        /// Replicas that acked.
        replicas: u8,
        /// Hints that count.
        hints: u8,
    },
    /// One page of keys in (token, key) order.
    Page {
        /// The entries.
        entries: Vec<PageEntry<'a>>,
        /// Token and key up to which was looked, when the run goes on behind them.
        looked: Option<(u128, Vec<u8>)>,
    },
    /// Hash sums, in the order of the leaves asked for.
    Sums {
        /// The hour before which this side may have purged what is dead. The sums leave out what is dead before the lower one
        /// of both sides' hours.
        floor_hour: u32,
        /// The sums.
        sums: Vec<u128>,
        /// Whether the shard has all that it should have.
        is_whole: bool,
    },
    /// One page of hashes in (token, key) order.
    Hashes {
        /// The entries.
        entries: Vec<HashEntry<'a>>,
        /// Token and key up to which was looked, when the run goes on behind them.
        looked: Option<(u128, Vec<u8>)>,
    },
    /// Creation time of the oldest hint or snapshot in milliseconds since 1970; `None` = there is none. 0 while the
    /// shard lacks data.
    OldestHint {
        /// See above.
        oldest_ms: Option<u64>,
        /// The time by which the shard dates its hints. It never goes back.
        now_ms: u64,
        /// A stamp below which it mints none any more.
        promised: u64,
    },
    /// What a repair has done.
    Repaired {
        /// See [`crate::api::RepairReport`], in order of its fields.
        counts: [u64; 4],
    },
    /// It was not done, or may not have been.
    Failed {
        /// See [`code_to_wire`].
        code: u8,
        /// For people.
        #[rkyv(with = InlineAsBox)]
        message: &'a str,
        /// Whether it may have been done.
        in_doubt: bool,
        /// Advice; 0 = none.
        retry_after_ms: u32,
    },
    /// The receiver knows other owners of this range: nothing was done. `epoch` of the response
    /// says how new its knowledge is.
    OtherOwners,
    /// What is lost of a run.
    Lacks {
        /// Each as first and last token; they may overlap.
        ranges: Vec<(u128, u128)>,
        /// Anything else may lack as well, for another reason, until the replica has caught up.
        is_catching_up: bool,
    },
}

/// A record of a [`Answer::Page`].
#[derive(Archive, Serialize, Debug)]
pub struct PageEntry<'a> {
    /// Key.
    #[rkyv(with = InlineAsBox)]
    pub key: &'a [u8],
    /// Encoded state.
    #[rkyv(with = InlineAsBox)]
    pub state: &'a [u8],
}

/// A record of a [`Answer::Hashes`].
#[derive(Archive, Serialize, Debug)]
pub struct HashEntry<'a> {
    /// Key.
    #[rkyv(with = InlineAsBox)]
    pub key: &'a [u8],
    /// Leaf hash of its state.
    pub hash: u128,
}

/// Why received bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Not of this family, or not a valid archive.
    #[error("malformed message")]
    Malformed,
    /// Of a protocol version that this node does not speak.
    #[error("protocol version {found}, this node speaks {VERSION}")]
    Version {
        /// The sender's version.
        found: u8,
    },
}

impl Request<'_> {
    /// The message's bytes: one buffer, to be cloned for every receiver.
    pub fn encode(&self) -> Bytes {
        encode(self)
    }

    /// Checks received bytes and gives the request within them.
    pub fn access(bytes: &[u8]) -> Result<&ArchivedRequest<'_>, MessageError> {
        let archive = payload(bytes)?;
        let request = rkyv::access::<ArchivedRequest<'_>, Malformed>(archive)
            .map_err(|_| MessageError::Malformed)?;
        Ok(request)
    }
}

impl Response<'_> {
    /// The message's bytes.
    pub fn encode(&self) -> Bytes {
        encode(self)
    }

    /// Checks received bytes and gives the answer within them.
    pub fn access(bytes: &[u8]) -> Result<&ArchivedResponse<'_>, MessageError> {
        let archive = payload(bytes)?;
        let response = rkyv::access::<ArchivedResponse<'_>, Malformed>(archive)
            .map_err(|_| MessageError::Malformed)?;
        Ok(response)
    }
}

/// `part` of the message `whole`, sharing its buffer.
pub fn slice_of(whole: &Bytes, part: &[u8]) -> Bytes {
    whole.slice_ref(part)
}

/// A range as messages have it.
pub fn range_of(first: &ArchivedU128, last: &ArchivedU128) -> TokenRange {
    TokenRange {
        first: Token(first.to_native()),
        last: Token(last.to_native()),
    }
}

fn encode<T>(message: &T) -> Bytes
where
    T: for<'a> Serialize<
        rkyv::api::high::HighSerializer<
            Vec<u8>,
            rkyv::ser::allocator::ArenaHandle<'a>,
            rancor::Panic,
        >,
    >,
{
    // `Panic` is sound as the error: writing into memory fails only on a size above 4 GiB, and every
    // part of a message is bounded far below.
    let Ok(buffer) =
        rkyv::api::high::to_bytes_in::<_, rancor::Panic>(message, vec![FAMILY, VERSION]);
    Bytes::from(buffer)
}

fn payload(bytes: &[u8]) -> Result<&[u8], MessageError> {
    match bytes {
        [FAMILY, VERSION, archive @ ..] => Ok(archive),
        [FAMILY, found, ..] => Err(MessageError::Version { found: *found }),
        _ => Err(MessageError::Malformed),
    }
}

/// The wire's number of a failure code.
pub fn code_to_wire(code: FailureCode) -> u8 {
    match code {
        FailureCode::InvalidRequest => 1,
        FailureCode::BadToken => 2,
        FailureCode::UnknownKeyspace => 3,
        FailureCode::Unsupported => 4,
        FailureCode::TooLarge => 5,
        FailureCode::ConditionFailed => 6,
        FailureCode::IdempotencyMismatch => 7,
        FailureCode::TooManySiblings => 8,
        FailureCode::QuorumNotMet => 9,
        FailureCode::Overloaded => 10,
        FailureCode::NotReady => 11,
        FailureCode::ClockSkew => 12,
        FailureCode::DeadlinePassed => 13,
        FailureCode::DiskFull => 14,
        FailureCode::Unreadable => 15,
        FailureCode::Internal => 16,
        FailureCode::TopologyChanging => 17,
        FailureCode::DotClash => 18,
    }
}

/// The failure code of a wire number. Numbers of later versions are [`FailureCode::Internal`].
pub fn code_from_wire(number: u8) -> FailureCode {
    match number {
        1 => FailureCode::InvalidRequest,
        2 => FailureCode::BadToken,
        3 => FailureCode::UnknownKeyspace,
        4 => FailureCode::Unsupported,
        5 => FailureCode::TooLarge,
        6 => FailureCode::ConditionFailed,
        7 => FailureCode::IdempotencyMismatch,
        8 => FailureCode::TooManySiblings,
        9 => FailureCode::QuorumNotMet,
        10 => FailureCode::Overloaded,
        11 => FailureCode::NotReady,
        12 => FailureCode::ClockSkew,
        13 => FailureCode::DeadlinePassed,
        14 => FailureCode::DiskFull,
        15 => FailureCode::Unreadable,
        17 => FailureCode::TopologyChanging,
        18 => FailureCode::DotClash,
        _ => FailureCode::Internal,
    }
}

/// The failure that an answer means to whoever expected another one.
pub fn failure_of(answer: &ArchivedAnswer<'_>) -> Failure {
    match answer {
        ArchivedAnswer::Failed {
            code,
            message,
            in_doubt,
            retry_after_ms,
        } => {
            let code = code_from_wire(*code);
            Failure {
                code,
                message: message.as_ref().to_owned(),
                retryable: code.retryable(),
                in_doubt: *in_doubt,
                retry_after_ms: retry_after_ms.to_native(),
            }
        }
        ArchivedAnswer::OtherOwners => Failure::refused(
            FailureCode::TopologyChanging,
            "a replica knows other owners of the range",
        ),
        ArchivedAnswer::Acked
        | ArchivedAnswer::Same
        | ArchivedAnswer::State { .. }
        | ArchivedAnswer::Written { .. }
        | ArchivedAnswer::Page { .. }
        | ArchivedAnswer::Sums { .. }
        | ArchivedAnswer::Hashes { .. }
        | ArchivedAnswer::OldestHint { .. }
        | ArchivedAnswer::Lacks { .. }
        | ArchivedAnswer::Repaired { .. } => {
            Failure::refused(FailureCode::Internal, "an answer to another question").in_doubt()
        }
    }
}

impl<'a> From<&'a Failure> for Answer<'a> {
    fn from(failure: &'a Failure) -> Self {
        Answer::Failed {
            code: code_to_wire(failure.code),
            message: &failure.message,
            in_doubt: failure.in_doubt,
            retry_after_ms: failure.retry_after_ms,
        }
    }
}

/// The wire's number of a level: counts are themselves, names are above 255.
pub fn level_to_wire(level: Level) -> u16 {
    match level {
        Level::Count(count) => u16::from(count),
        Level::One => 256,
        Level::Quorum => 257,
        Level::All => 258,
        Level::LocalQuorum => 259,
        Level::EachQuorum => 260,
    }
}

/// The level of a wire number.
pub fn level_from_wire(number: u16) -> Option<Level> {
    match number {
        256 => Some(Level::One),
        257 => Some(Level::Quorum),
        258 => Some(Level::All),
        259 => Some(Level::LocalQuorum),
        260 => Some(Level::EachQuorum),
        count => u8::try_from(count).ok().map(Level::Count),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge<'a>() -> Request<'a> {
        Request {
            id: 0x0102_0304_0506_0708,
            remaining_ms: 5_000,
            epoch: 7,
            owners: 0xaabb,
            body: Body::Merge {
                tree: 1,
                key: b"key",
                state: b"state",
            },
        }
    }

    /// A change of these bytes is a change of the protocol: it needs a new [`VERSION`].
    const MERGE_GOLDEN: &str = "01016b657973746174650807060504030201881300000700000000000000bbaa0000000000000101000000d7ffffff03000000d2ffffff0500000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000";

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_bytes_of_a_merge_are_pinned() {
        assert_eq!(hex(&merge().encode()), MERGE_GOLDEN);
    }

    #[test]
    fn what_was_written_is_read_in_place() {
        let bytes = merge().encode();
        let request = Request::access(&bytes).unwrap();
        assert_eq!(request.remaining_ms, 5_000);
        let ArchivedBody::Merge { tree, key, state } = &request.body else {
            panic!("another body");
        };
        assert_eq!(tree.to_native(), 1);
        assert_eq!(&key[..], b"key");
        let state = slice_of(&bytes, state);
        assert_eq!(&state[..], b"state");
        assert!(bytes.as_ptr_range().contains(&state.as_ptr()), "not copied");
    }

    #[test]
    fn optional_fields_survive() {
        let request = Request {
            body: Body::Write {
                tree: 1,
                key: b"k",
                value: None,
                ttl_seconds: 0,
                context: Some(b"ctx"),
                if_match: None,
                flags: flags::SLOPPY,
                w: level_to_wire(Level::Quorum),
                idempotency: Some((9, 8)),
            },
            ..merge()
        };
        let bytes = request.encode();
        let ArchivedBody::Write {
            value,
            context,
            idempotency,
            ..
        } = &Request::access(&bytes).unwrap().body
        else {
            panic!("another body");
        };
        assert!(value.is_none());
        assert_eq!(
            context.as_ref().map(|context| &context[..]),
            Some(&b"ctx"[..])
        );
        assert_eq!(idempotency.as_ref().map(|pair| pair.0.to_native()), Some(9));
    }

    #[test]
    fn truncated_or_flipped_bytes_never_panic() {
        let whole = merge().encode();
        for len in 0..whole.len() {
            assert!(Request::access(&whole[..len]).is_err() || len > 0);
        }
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            // Flips inside numbers and payloads go through: states carry a checksum of their own.
            if let Ok(request) = Request::access(&bytes)
                && let ArchivedBody::Merge { key, state, .. } = &request.body
            {
                assert!(key.len() + state.len() <= bytes.len());
            }
        }
    }

    #[test]
    fn another_version_or_family_is_named() {
        let mut newer = merge().encode().to_vec();
        newer[1] = VERSION + 1;
        assert_eq!(
            Request::access(&newer).err(),
            Some(MessageError::Version { found: VERSION + 1 })
        );
        assert_eq!(
            Request::access(&[FAMILY + 1, 0, 0]).err(),
            Some(MessageError::Malformed)
        );
    }

    #[test]
    fn levels_and_codes_survive_the_wire() {
        for level in [
            Level::One,
            Level::Quorum,
            Level::All,
            Level::LocalQuorum,
            Level::EachQuorum,
            Level::Count(0),
            Level::Count(255),
        ] {
            assert_eq!(level_from_wire(level_to_wire(level)), Some(level));
        }
        assert_eq!(level_from_wire(261), None);
        for number in 1..=18 {
            assert_eq!(code_to_wire(code_from_wire(number)), number);
        }
    }
}
