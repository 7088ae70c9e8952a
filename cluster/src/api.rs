//! What a shard of the cluster is asked and what it answers: the types between protocols and
//! coordination.
//!
//! On the path: HTTP, RESP and the binary protocol translate their bytes into these requests, hand
//! them to a shard's `Node`, and translate the answer back. Nothing here knows a wire
//! format, and nothing here decides anything.
//!
//! Invariant: every answer says truthfully what happened. `Ok` is *done*; a [`Failure`] with
//! `in_doubt == false` is *refused*, nothing was applied anywhere; a [`Failure`] with
//! `in_doubt == true` may have been applied, wholly, later, or never.

use std::fmt;

use bytes::Bytes;
use torc_env::{Instant, NodeId, ShardId, TokenRange};

pub use crate::version::Context;

/// The longest key, in bytes. The shortest is one byte.
pub const KEY_BYTES_MAX: usize = 1024;
/// The largest value, in bytes (1 MiB).
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// The longest keyspace name, in bytes.
pub const KEYSPACE_NAME_BYTES_MAX: usize = 64;
/// The most entries of one scan page.
pub const SCAN_LIMIT_MAX: u32 = 10_000;
/// Entries of a scan page when the client does not say.
pub const SCAN_LIMIT_DEFAULT: u32 = 100;
/// The most operations of one batch: each holds a coordinator slot while it runs.
pub const BATCH_OPERATIONS_MAX: usize = 1_000;
/// Bytes of values that the reads of one batch may come to; those beyond them are refused.
pub const BATCH_VALUE_BYTES_MAX: usize = 16 << 20;
/// The longest time to live, in seconds (100 years): far from where milliseconds overflow.
pub const TTL_SECONDS_MAX: u64 = 100 * 366 * 86_400;

/// The keyspace that `/v1/keys/{key}` means.
pub static KEYSPACE_DEFAULT: Bytes = Bytes::from_static(b"default");

/// How many replicas must answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Level {
    /// One replica.
    One,
    /// More than half of the keyspace's replicas.
    #[default]
    Quorum,
    /// Every replica.
    All,
    /// More than half of the replicas in the coordinator's data centre.
    LocalQuorum,
    /// More than half of the replicas in each data centre.
    EachQuorum,
    /// So many replicas; refused when the keyspace has fewer.
    Count(u8),
}

/// A read of one key.
#[derive(Clone, Debug)]
pub struct GetRequest {
    /// Keyspace name.
    pub keyspace: Bytes,
    /// Key, 1..=[`KEY_BYTES_MAX`] bytes.
    pub key: Bytes,
    /// Replicas that must answer.
    pub r: Level,
    /// What the caller's session has seen of this key: the answer covers it, or a strict quorum is
    /// asked, or the read fails; it is never silently older.
    pub at_least: Option<Context>,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

/// One live value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sibling {
    /// The value. Shares the buffer that it was read into.
    pub value: Bytes,
    /// Civil time of expiry in milliseconds since 1970; 0 = never.
    pub expires_at_ms: u64,
}

/// The answer to a [`GetRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GetAnswer {
    /// Live values, oldest dot first; none when the key is absent, deleted or expired, more than
    /// one when writes were concurrent.
    pub siblings: Vec<Sibling>,
    /// Everything that the read has seen, tombstones included: the context of a write that
    /// replaces it.
    pub context: Context,
}

impl GetAnswer {
    /// Bytes of its values.
    pub fn value_bytes(&self) -> usize {
        self.siblings
            .iter()
            .map(|sibling| sibling.value.len())
            .sum()
    }
}

/// What must hold for a write to be carried out, checked against a strict quorum.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Condition {
    /// Nothing.
    #[default]
    None,
    /// A live value exists and this context covers every dot present, tombstones included. It is
    /// then the write's context.
    Match(Context),
    /// The key is absent, deleted or expired. The write carries the context that was checked.
    Absent,
}

/// Names one attempt of a client, so that its retries are applied once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Idempotency {
    /// Hash of the client's `Idempotency-Key`, or of its (id, sequence).
    pub id: u128,
    /// Hash of the request's body; another body under the same id is refused.
    pub body_hash: u64,
}

/// A write of one value.
#[derive(Clone, Debug)]
pub struct PutRequest {
    /// Keyspace name.
    pub keyspace: Bytes,
    /// Key, 1..=[`KEY_BYTES_MAX`] bytes.
    pub key: Bytes,
    /// Value, up to [`VALUE_BYTES_MAX`] bytes.
    pub value: Bytes,
    /// Time to live; `None` = the keyspace's default.
    pub ttl_seconds: Option<u64>,
    /// How it is written.
    pub write: WriteOptions,
}

/// A deletion of one key.
#[derive(Clone, Debug)]
pub struct DeleteRequest {
    /// Keyspace name.
    pub keyspace: Bytes,
    /// Key, 1..=[`KEY_BYTES_MAX`] bytes.
    pub key: Bytes,
    /// How it is written.
    pub write: WriteOptions,
}

/// What puts and deletes have in common.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// What the writer has seen, and so what the write replaces. Without one it has seen nothing.
    pub context: Option<Context>,
    /// What must hold. Needs a strict quorum: `w` of at least a quorum, no `sloppy`.
    pub condition: Condition,
    /// Reads the key first and takes what it finds as the context, so that a writer who keeps no
    /// contexts leaves no siblings when nothing runs concurrently.
    pub read_context_first: bool,
    /// Acks that are needed.
    pub w: Level,
    /// Whether a hint on a node that is not a replica counts as an ack.
    pub sloppy: bool,
    /// Makes a retry of the same attempt return the first answer.
    pub idempotency: Option<Idempotency>,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

impl WriteOptions {
    /// An unconditional write at quorum without context.
    pub fn until(deadline: Instant) -> Self {
        Self {
            context: None,
            condition: Condition::None,
            read_context_first: false,
            w: Level::Quorum,
            sloppy: false,
            idempotency: None,
            deadline,
        }
    }
}

/// The answer to a write that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The write's context and its own dot; never siblings that the writer has not seen.
    pub context: Context,
    /// Replicas that hold the write durably, counted when it was answered.
    pub replicas: u8,
    /// Hints that hold it durably on nodes that are not replicas (only under `sloppy`).
    pub hints: u8,
}

/// A read of one page of keys.
#[derive(Clone, Debug)]
pub struct ScanRequest {
    /// Keyspace name.
    pub keyspace: Bytes,
    /// Where the previous page ended; `None` = from the start. Works on every node.
    pub cursor: Option<String>,
    /// Entries wanted, 1..=[`SCAN_LIMIT_MAX`]. A page may hold fewer, even none, and go on.
    pub limit: u32,
    /// Only keys that start with this.
    pub prefix: Bytes,
    /// Whether values are wanted.
    pub values: bool,
    /// Replicas of each range that must answer.
    pub r: Level,
    /// When the caller stops waiting.
    pub deadline: Instant,
}

/// One key of a scan page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanEntry {
    /// The key.
    pub key: Bytes,
    /// Live values; empty when only keys were asked for.
    pub siblings: Vec<Sibling>,
    /// What the read has seen of this key; the empty context when only keys were asked for.
    pub context: Context,
}

/// The answer to a [`ScanRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanAnswer {
    /// Keys with a live value, in ring order (not key order).
    pub entries: Vec<ScanEntry>,
    /// Where the next page starts; `None` = the keyspace is through.
    pub cursor: Option<String>,
}

impl ScanAnswer {
    /// Bytes of its values.
    pub fn value_bytes(&self) -> usize {
        let siblings = self.entries.iter().flat_map(|entry| &entry.siblings);
        siblings.map(|sibling| sibling.value.len()).sum()
    }
}

/// One operation of a batch.
#[derive(Clone, Debug)]
pub enum Operation {
    /// See [`GetRequest`].
    Get(GetRequest),
    /// See [`PutRequest`].
    Put(PutRequest),
    /// See [`DeleteRequest`].
    Delete(DeleteRequest),
}

impl Operation {
    /// The key that it is about.
    pub fn key(&self) -> &Bytes {
        match self {
            Operation::Get(get) => &get.key,
            Operation::Put(put) => &put.key,
            Operation::Delete(delete) => &delete.key,
        }
    }
}

/// The answer to one operation of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Of a get.
    Got(Result<GetAnswer, Failure>),
    /// Of a put or a delete.
    Written(Result<Written, Failure>),
}

impl Outcome {
    /// Whether it has written something, or may have.
    pub fn may_have_written(&self) -> bool {
        match self {
            Outcome::Written(Ok(_)) => true,
            Outcome::Written(Err(failure)) => failure.in_doubt,
            Outcome::Got(_) => false,
        }
    }

    /// Bytes of the values that were read.
    pub fn value_bytes(&self) -> usize {
        match self {
            Outcome::Got(Ok(answer)) => answer.value_bytes(),
            Outcome::Got(Err(_)) | Outcome::Written(_) => 0,
        }
    }
}

/// Independent operations, answered in order; not atomic across keys.
#[derive(Clone, Debug, Default)]
pub struct BatchRequest {
    /// Up to [`BATCH_OPERATIONS_MAX`] operations.
    pub operations: Vec<Operation>,
}

/// Something that is damaged in a shard's store, or was lost that way, and is not made good yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedPart {
    /// The keyspace; `None` for all of them: it was in the log.
    pub keyspace: Option<String>,
    /// Its tokens.
    pub range: TokenRange,
    /// The table's file, as long as it is not cut out.
    pub file_id: Option<u64>,
    /// What becomes of it.
    pub outlook: Outlook,
    /// Why, for people.
    pub why: String,
}

/// What becomes of a [`DamagedPart`]; the further down, the worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outlook {
    /// Others have it: it is fetched.
    Healing,
    /// Others that may have it are catching up.
    CatchingUp,
    /// Others that may have it do not answer.
    Silent,
    /// Too many of its owners have lost it: it waits for somebody to accept that.
    Lost,
    /// Nobody has been asked yet.
    Unknown,
    /// It may stay lost.
    Accepted,
}

impl Outlook {
    /// Its name in answers.
    pub fn name(self) -> &'static str {
        match self {
            Outlook::Healing => "healing",
            Outlook::CatchingUp => "catching_up",
            Outlook::Silent => "silent",
            Outlook::Lost => "lost",
            Outlook::Unknown => "unknown",
            Outlook::Accepted => "accepted",
        }
    }
}

/// Why an operation has no good answer. Each code has one HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureCode {
    /// A field of the request is out of range, or two do not go together (400).
    InvalidRequest,
    /// A context or a cursor is malformed or tampered with (400).
    BadToken,
    /// There is no such keyspace (404).
    UnknownKeyspace,
    /// The keyspace's mode or policy does not do this (400).
    Unsupported,
    /// The key or the value is too large (413).
    TooLarge,
    /// The write's condition does not hold: this attempt did nothing (412).
    ConditionFailed,
    /// The idempotency key was used with another body (422).
    IdempotencyMismatch,
    /// The key has as many siblings as are allowed; read and resolve them first (409).
    TooManySiblings,
    /// Too few replicas answered well (503).
    QuorumNotMet,
    /// The key's replicas are changing, and this node does not know the new ones yet (503).
    TopologyChanging,
    /// A bound of this node or of a replica is reached (503).
    Overloaded,
    /// The node is not in the ring yet, or is leaving (503).
    NotReady,
    /// Clocks of the cluster are too far apart to order writes (503).
    ClockSkew,
    /// The deadline passed (504).
    DeadlinePassed,
    /// No space for writes (507).
    DiskFull,
    /// What is stored cannot be read; it is unknown, not absent (503).
    Unreadable,
    /// A defect or a disk failure of this node (500).
    Internal,
    /// Two replicas hold different writes under one name. Neither may replace the other: somebody has to look
    /// (500).
    DotClash,
}

impl FailureCode {
    /// The code's name in error answers.
    pub fn name(self) -> &'static str {
        match self {
            FailureCode::InvalidRequest => "invalid_request",
            FailureCode::BadToken => "bad_token",
            FailureCode::UnknownKeyspace => "unknown_keyspace",
            FailureCode::Unsupported => "unsupported",
            FailureCode::TooLarge => "too_large",
            FailureCode::ConditionFailed => "condition_failed",
            FailureCode::IdempotencyMismatch => "idempotency_mismatch",
            FailureCode::TooManySiblings => "too_many_siblings",
            FailureCode::QuorumNotMet => "quorum_not_met",
            FailureCode::TopologyChanging => "topology_changing",
            FailureCode::Overloaded => "overloaded",
            FailureCode::NotReady => "not_ready",
            FailureCode::ClockSkew => "clock_skew",
            FailureCode::DeadlinePassed => "deadline_passed",
            FailureCode::DiskFull => "disk_full",
            FailureCode::Unreadable => "unreadable",
            FailureCode::Internal => "internal",
            FailureCode::DotClash => "dot_clash",
        }
    }

    /// The HTTP status of an error answer.
    pub fn http_status(self) -> u16 {
        match self {
            FailureCode::InvalidRequest | FailureCode::BadToken | FailureCode::Unsupported => 400,
            FailureCode::UnknownKeyspace => 404,
            FailureCode::TooLarge => 413,
            FailureCode::ConditionFailed => 412,
            FailureCode::IdempotencyMismatch => 422,
            FailureCode::TooManySiblings => 409,
            FailureCode::QuorumNotMet
            | FailureCode::TopologyChanging
            | FailureCode::Overloaded
            | FailureCode::NotReady
            | FailureCode::ClockSkew
            | FailureCode::Unreadable => 503,
            FailureCode::DeadlinePassed => 504,
            FailureCode::DiskFull => 507,
            FailureCode::Internal | FailureCode::DotClash => 500,
        }
    }

    /// Whether the same request may succeed later.
    pub fn retryable(self) -> bool {
        match self {
            FailureCode::InvalidRequest
            | FailureCode::BadToken
            | FailureCode::UnknownKeyspace
            | FailureCode::Unsupported
            | FailureCode::TooLarge
            | FailureCode::ConditionFailed
            | FailureCode::IdempotencyMismatch
            | FailureCode::TooManySiblings
            | FailureCode::DotClash => false,
            FailureCode::QuorumNotMet
            | FailureCode::TopologyChanging
            | FailureCode::Overloaded
            | FailureCode::NotReady
            | FailureCode::ClockSkew
            | FailureCode::DeadlinePassed
            | FailureCode::DiskFull
            | FailureCode::Unreadable
            | FailureCode::Internal => true,
        }
    }
}

/// Why an operation has no good answer, and whether it may have happened all the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", code.name())]
pub struct Failure {
    /// The kind.
    pub code: FailureCode,
    /// One sentence for people.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Whether the write may have been, or may yet be, applied. Never true for a read.
    pub in_doubt: bool,
    /// When to try again, in milliseconds; 0 = no advice.
    pub retry_after_ms: u32,
}

impl Failure {
    /// A failure after which nothing has been applied anywhere.
    pub fn refused(code: FailureCode, message: impl fmt::Display) -> Self {
        Self {
            code,
            message: message.to_string(),
            retryable: code.retryable(),
            in_doubt: false,
            retry_after_ms: if code.http_status() == 503 {
                RETRY_AFTER_MS
            } else {
                0
            },
        }
    }

    /// The same failure of a write that may have been applied somewhere.
    pub fn in_doubt(mut self) -> Self {
        self.in_doubt = true;
        self
    }
}

/// Retry advice of failures that time heals, in milliseconds: long enough that retries of many
/// clients do not add up to the overload, shorter than a detector needs to notice a dead node.
pub const RETRY_AFTER_MS: u32 = 1_000;

/// A node, as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeStatus {
    /// Identity.
    pub node: NodeId,
    /// Configured name.
    pub name: String,
    /// `joining`, `up`, `leaving`, `left` or `down`.
    pub state: &'static str,
    /// Internode address.
    pub internode: String,
    /// HTTP address.
    pub http: String,
    /// Rack.
    pub rack: String,
    /// Zone.
    pub zone: String,
    /// Data centre.
    pub datacenter: String,
    /// Shards.
    pub shards: u16,
    /// Virtual nodes on the ring.
    pub tokens: u32,
}

/// The cluster, as this node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Epoch of the topology in force; 0 before the cluster is founded.
    pub epoch: u64,
    /// Cluster id; zero before the cluster is founded.
    pub cluster: u128,
    /// The node that answers.
    pub node: NodeId,
    /// Whether it serves (see `/ready`).
    pub ready: bool,
    /// Every member, in order of name.
    pub nodes: Vec<NodeStatus>,
}

/// One range of the ring and who holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingRange {
    /// The range.
    pub range: TokenRange,
    /// Replicas, in preference order.
    pub replicas: Vec<NodeId>,
}

/// What a repair on demand did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RepairReport {
    /// Ranges compared with all their owners.
    pub ranges_repaired: u64,
    /// Ranges that could not be compared with all their owners.
    pub ranges_failed: u64,
    /// Records taken from other replicas.
    pub records_received: u64,
    /// Records sent to other replicas.
    pub records_sent: u64,
}

/// Which shard answers for a key, for protocols that steer connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// A replica that is up, this node when it is one.
    pub node: NodeId,
    /// Its shard that owns the key.
    pub shard: ShardId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_never_in_doubt_and_says_when_to_come_back() {
        let refused = Failure::refused(FailureCode::Overloaded, "too many writes in flight");
        assert!(refused.retryable && !refused.in_doubt);
        assert_eq!(refused.retry_after_ms, RETRY_AFTER_MS);
        assert_eq!(refused.to_string(), "overloaded: too many writes in flight");
        assert!(refused.in_doubt().in_doubt);
        assert!(!Failure::refused(FailureCode::ConditionFailed, "changed").retryable);
    }
}
