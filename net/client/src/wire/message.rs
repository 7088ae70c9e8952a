//! Requests and answers: rkyv messages, validated and read in place.
//!
//! The borrowed types below are what is written; readers see their archived form
//! ([`ArchivedRequest`], [`ArchivedAnswer`]) over the bytes of the frame. All integers are
//! little-endian and unaligned, pointers 32-bit (the features that the workspace fixes for rkyv).
//!
//! Invariant: [`request`] and [`answer`] hand out a message only after validation; a value in it is a
//! slice of the frame's payload, so `Bytes::slice_ref` shares it without a copy.
//!
//! What changes here changes the wire: raise [`VERSION`](super::frame::VERSION), extend
//! `docs/formats/binary-protocol.md`, renew the golden bytes below.

use bytes::BytesMut;
use rkyv::api::high::to_bytes_in;
use rkyv::rancor::{Failure as Invalid, Panic};
use rkyv::ser::{Positional, Writer};
use rkyv::with::{InlineAsBox, Map};
use rkyv::{Archive, Serialize};

use super::frame::{self, Header};

/// Frame kind of a request.
pub const KIND_REQUEST: u8 = 1;
/// Frame kind of an answer.
pub const KIND_ANSWER: u8 = 2;

/// How many replicas must answer.
#[derive(Archive, Serialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// One replica.
    One,
    /// More than half of the replicas.
    Quorum,
    /// Every replica.
    All,
    /// More than half of the replicas in the coordinator's data centre.
    LocalQuorum,
    /// More than half of the replicas in each data centre.
    EachQuorum,
    /// So many replicas.
    Count(u8),
}

/// A request.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Request<'a> {
    /// Time that the caller still waits, in milliseconds, 1 to 60000.
    pub timeout_ms: u32,
    /// Keyspace name.
    #[rkyv(with = InlineAsBox)]
    pub keyspace: &'a [u8],
    /// What is asked for.
    pub operation: Operation<'a>,
}

/// What is asked for.
#[derive(Archive, Serialize, Clone, Debug)]
pub enum Operation<'a> {
    /// An answer, nothing else.
    Ping,
    /// The keyspace's id and the ring.
    Route,
    /// One operation on one key.
    Single(Single<'a>),
    /// Independent operations, answered in order.
    Batch(Vec<Single<'a>>),
    /// One page of keys.
    Scan(Scan<'a>),
}

/// One operation on one key.
#[derive(Archive, Serialize, Clone, Debug)]
pub enum Single<'a> {
    /// Reads.
    Get(Get<'a>),
    /// Writes.
    Put(Put<'a>),
    /// Deletes.
    Delete(Delete<'a>),
}

/// A read of one key.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Get<'a> {
    /// Key, 1 to 1024 bytes.
    #[rkyv(with = InlineAsBox)]
    pub key: &'a [u8],
    /// Replicas that must answer.
    pub r: Level,
}

/// A write of one key.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Put<'a> {
    /// Key, 1 to 1024 bytes.
    #[rkyv(with = InlineAsBox)]
    pub key: &'a [u8],
    /// Value, up to 1 MiB.
    #[rkyv(with = InlineAsBox)]
    pub value: &'a [u8],
    /// Time to live in seconds; `None` = the keyspace's default.
    pub ttl_seconds: Option<u64>,
    /// How it is written.
    pub write: Write<'a>,
}

/// A deletion of one key.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Delete<'a> {
    /// Key, 1 to 1024 bytes.
    #[rkyv(with = InlineAsBox)]
    pub key: &'a [u8],
    /// How it is written.
    pub write: Write<'a>,
}

/// What puts and deletes have in common.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Write<'a> {
    /// The opaque context that the writer has seen.
    #[rkyv(with = Map<InlineAsBox>)]
    pub context: Option<&'a [u8]>,
    /// What must hold.
    pub condition: Condition<'a>,
    /// Reads the key first and takes what it finds as the context.
    pub read_context_first: bool,
    /// Acks that are needed.
    pub w: Level,
    /// Whether hints count as acks.
    pub sloppy: bool,
    /// Makes a retry return the first answer.
    pub idempotency: Option<Idempotency>,
}

impl Default for Write<'_> {
    /// An unconditional write at quorum that replaces what a read would find.
    fn default() -> Self {
        Self {
            context: None,
            condition: Condition::None,
            read_context_first: true,
            w: Level::Quorum,
            sloppy: false,
            idempotency: None,
        }
    }
}

/// What must hold for a write to be carried out.
#[derive(Archive, Serialize, Clone, Debug)]
pub enum Condition<'a> {
    /// Nothing.
    None,
    /// The opaque context covers all that is there, and a live value is.
    Match(#[rkyv(with = InlineAsBox)] &'a [u8]),
    /// There is no live value.
    Absent,
}

/// Names one write of one client.
#[derive(Archive, Serialize, Clone, Copy, Debug, PartialEq, Eq)]
pub struct Idempotency {
    /// Random number of the client.
    pub client: u128,
    /// Counts its writes.
    pub sequence: u64,
}

/// A read of one page of keys.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Scan<'a> {
    /// Where the previous page ended.
    #[rkyv(with = Map<InlineAsBox>)]
    pub cursor: Option<&'a str>,
    /// Entries wanted, 1 to 10000.
    pub limit: u32,
    /// Only keys that start with this.
    #[rkyv(with = InlineAsBox)]
    pub prefix: &'a [u8],
    /// Whether values are wanted.
    pub values: bool,
    /// Replicas of each range that must answer.
    pub r: Level,
}

/// An answer.
#[derive(Archive, Serialize, Clone, Debug)]
pub enum Answer<'a> {
    /// To a ping.
    Pong,
    /// To a route.
    Route(Route<'a>),
    /// To one operation.
    Single(Outcome<'a>),
    /// To a batch, in order.
    Batch(Vec<Outcome<'a>>),
    /// To a scan.
    Page(Page<'a>),
    /// To any of them.
    Failure(Failure<'a>),
}

/// The answer to one operation on one key.
#[derive(Archive, Serialize, Clone, Debug)]
pub enum Outcome<'a> {
    /// To a get.
    Got(Got<'a>),
    /// To a put or a delete.
    Written(Written<'a>),
    /// To either.
    Failed(Failure<'a>),
}

/// What was read.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Got<'a> {
    /// Live values; none when there is no such key.
    pub siblings: Vec<Sibling<'a>>,
    /// Opaque context of all that the read has seen.
    #[rkyv(with = InlineAsBox)]
    pub context: &'a [u8],
}

/// One live value.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Sibling<'a> {
    /// The value.
    #[rkyv(with = InlineAsBox)]
    pub value: &'a [u8],
    /// Civil time of expiry in milliseconds since 1970; 0 = never.
    pub expires_at_ms: u64,
}

/// A write that is done.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Written<'a> {
    /// Opaque context of the write and what it has seen.
    #[rkyv(with = InlineAsBox)]
    pub context: &'a [u8],
    /// Replicas that hold it durably.
    pub replicas: u8,
    /// Hints that hold it durably.
    pub hints: u8,
}

/// One page of keys.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Page<'a> {
    /// Keys with a live value, in ring order.
    pub entries: Vec<Entry<'a>>,
    /// Where the next page starts; `None` = the keyspace is through.
    #[rkyv(with = Map<InlineAsBox>)]
    pub cursor: Option<&'a str>,
}

/// One key of a page.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Entry<'a> {
    /// The key.
    #[rkyv(with = InlineAsBox)]
    pub key: &'a [u8],
    /// Its live values, when they were asked for.
    pub siblings: Vec<Sibling<'a>>,
    /// Its context, when values were asked for.
    #[rkyv(with = InlineAsBox)]
    pub context: &'a [u8],
}

/// Where keys of a keyspace live.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Route<'a> {
    /// Epoch of the topology.
    pub epoch: u64,
    /// The keyspace's id, which goes into the hash of its keys.
    pub keyspace: u32,
    /// Shards of the answering node.
    pub shard_count: u16,
    /// Every member.
    pub nodes: Vec<RouteNode<'a>>,
    /// The ring, in order of `last`.
    pub ranges: Vec<RouteRange>,
}

/// A member.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct RouteNode<'a> {
    /// Its identity.
    pub node: u128,
    /// Its configured name.
    #[rkyv(with = InlineAsBox)]
    pub name: &'a str,
    /// Where it takes connections of this protocol.
    #[rkyv(with = InlineAsBox)]
    pub client: &'a str,
    /// Its shards.
    pub shard_count: u16,
    /// Whether it is believed to be up.
    pub up: bool,
}

/// A piece of the ring, from the end of the one before it to `last`.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct RouteRange {
    /// Last token, included.
    pub last: u128,
    /// Positions of the replicas in [`Route::nodes`], in preference order.
    pub replicas: Vec<u16>,
}

/// Why there is no good answer.
#[derive(Archive, Serialize, Clone, Debug)]
pub struct Failure<'a> {
    /// Name of the kind, as in HTTP's error answers.
    #[rkyv(with = InlineAsBox)]
    pub code: &'a str,
    /// One sentence for people.
    #[rkyv(with = InlineAsBox)]
    pub message: &'a str,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Whether a write may have been, or may yet be, applied.
    pub in_doubt: bool,
    /// When to try again, in milliseconds; 0 = no advice.
    pub retry_after_ms: u32,
}

/// The payload is not a message of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the payload is not a valid message")]
pub struct MessageError;

/// Reads a request in place.
///
/// # Errors
/// [`MessageError`] when validation fails.
pub fn request(payload: &[u8]) -> Result<&ArchivedRequest<'_>, MessageError> {
    rkyv::access::<ArchivedRequest<'_>, Invalid>(payload).map_err(|_| MessageError)
}

/// Reads an answer in place.
///
/// # Errors
/// [`MessageError`] when validation fails.
pub fn answer(payload: &[u8]) -> Result<&ArchivedAnswer<'_>, MessageError> {
    rkyv::access::<ArchivedAnswer<'_>, Invalid>(payload).map_err(|_| MessageError)
}

/// Appends a request as a whole frame. One copy of keys and values.
///
/// # Panics
/// When the frame is above [`frame::FRAME_BYTES_MAX`].
pub fn encode_request(out: &mut BytesMut, id: u64, request: &Request<'_>) {
    let start = frame::begin(out, header(KIND_REQUEST, id));
    let position = out.len();
    to_bytes_in::<_, Panic>(request, Append { out, position })
        .expect("writing to memory does not fail");
    frame::finish(out, start);
}

/// Appends an answer as a whole frame. One copy of keys and values.
///
/// # Panics
/// When the frame is above [`frame::FRAME_BYTES_MAX`].
pub fn encode_answer(out: &mut BytesMut, id: u64, answer: &Answer<'_>) {
    let start = frame::begin(out, header(KIND_ANSWER, id));
    let position = out.len();
    to_bytes_in::<_, Panic>(answer, Append { out, position })
        .expect("writing to memory does not fail");
    frame::finish(out, start);
}

fn header(kind: u8, request: u64) -> Header {
    Header {
        kind,
        flags: 0,
        request,
    }
}

/// Lets rkyv write at the end of a buffer that already holds the frame's header.
struct Append<'a> {
    out: &'a mut BytesMut,
    /// Where the payload starts; rkyv counts from there.
    position: usize,
}

impl Positional for Append<'_> {
    fn pos(&self) -> usize {
        self.out.len() - self.position
    }
}

impl<E> Writer<E> for Append<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), E> {
        self.out.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::frame::{FRAME_BYTES_MAX, decode};
    use super::*;

    fn put() -> BytesMut {
        let mut out = BytesMut::new();
        let request = Request {
            timeout_ms: 5000,
            keyspace: b"default",
            operation: Operation::Single(Single::Put(Put {
                key: b"k",
                value: b"value",
                ttl_seconds: Some(60),
                write: Write {
                    context: Some(b"ctx"),
                    ..Write::default()
                },
            })),
        };
        encode_request(&mut out, 7, &request);
        out
    }

    #[test]
    fn a_request_is_read_where_it_lies() {
        let frame = decode(&mut put(), FRAME_BYTES_MAX)
            .expect("good")
            .expect("whole");
        assert_eq!(frame.header, header(KIND_REQUEST, 7));
        let request = request(&frame.payload).expect("valid");
        assert_eq!(request.timeout_ms.to_native(), 5000);
        assert_eq!(&request.keyspace[..], b"default");
        let ArchivedOperation::Single(ArchivedSingle::Put(put)) = &request.operation else {
            panic!("another operation")
        };
        assert_eq!(&put.key[..], b"k");
        let value = frame.payload.slice_ref(&put.value);
        assert_eq!(&value[..], b"value");
        assert_eq!(put.ttl_seconds.as_ref().map(|s| s.to_native()), Some(60));
        assert_eq!(
            put.write.context.as_ref().map(|context| &context[..]),
            Some(&b"ctx"[..])
        );
    }

    #[test]
    fn an_answer_is_read_where_it_lies() {
        let mut out = BytesMut::new();
        let answer_out = Answer::Batch(vec![
            Outcome::Got(Got {
                siblings: vec![Sibling {
                    value: b"v",
                    expires_at_ms: 0,
                }],
                context: b"c",
            }),
            Outcome::Failed(Failure {
                code: "overloaded",
                message: "busy",
                retryable: true,
                in_doubt: false,
                retry_after_ms: 100,
            }),
        ]);
        encode_answer(&mut out, 1, &answer_out);
        let frame = decode(&mut out, FRAME_BYTES_MAX)
            .expect("good")
            .expect("whole");
        let ArchivedAnswer::Batch(outcomes) = answer(&frame.payload).expect("valid") else {
            panic!("another answer")
        };
        let ArchivedOutcome::Got(got) = &outcomes[0] else {
            panic!("another outcome")
        };
        assert_eq!(&got.siblings[0].value[..], b"v");
        let ArchivedOutcome::Failed(failure) = &outcomes[1] else {
            panic!("another outcome")
        };
        assert_eq!(&*failure.code, "overloaded");
    }

    /// The payload on the format page. A change here breaks every client in the field.
    #[test]
    fn the_layout_is_pinned() {
        let hex: String = put()[frame::HEADER_BYTES..]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, GOLDEN_PUT);
    }

    const GOLDEN_PUT: &str = concat!(
        "64656661756c746b76616c756563747888130000ecffffff070000000201e9ff",
        "ffff01000000e2ffffff05000000013c0000000000000001d5ffffff03000000",
        "0000000000000000000101000000000000000000000000000000000000000000",
        "000000000000",
    );

    #[test]
    fn no_bytes_make_the_reader_panic() {
        let whole = put();
        let payload = &whole[frame::HEADER_BYTES..];
        for len in 0..payload.len() {
            // A cut from the front may still be a valid message: rkyv's root is at the end.
            assert!(request(&payload[..len]).is_err() || len == payload.len());
        }
        for bit in 0..payload.len() * 8 {
            let mut bytes = payload.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(request) = request(&bytes) {
                touch(request);
            }
            if let Ok(ArchivedAnswer::Batch(outcomes)) = answer(&bytes) {
                assert!(outcomes.len() <= bytes.len());
            }
        }
    }

    fn touch(request: &ArchivedRequest<'_>) {
        if let ArchivedOperation::Single(ArchivedSingle::Put(put)) = &request.operation {
            assert!(put.key.len() + put.value.len() < 4096);
        }
    }
}
