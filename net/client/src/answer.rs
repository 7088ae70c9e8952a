//! Answers with a life of their own: what [`Client`](crate::Client) returns. Values share the frame
//! that they came in.

use std::fmt;

use bytes::Bytes;

use crate::error::ClientError;
use crate::wire::message::{
    ArchivedAnswer, ArchivedEntry, ArchivedFailure, ArchivedGot, ArchivedOutcome, ArchivedPage,
    ArchivedSibling, ArchivedWritten,
};

/// One live value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sibling {
    /// The value.
    pub value: Bytes,
    /// Civil time of expiry in milliseconds since 1970; 0 = never.
    pub expires_at_ms: u64,
}

/// What was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Got {
    /// Live values, the newest last; none when there is no such key.
    pub siblings: Vec<Sibling>,
    /// Opaque context of all that the read has seen; goes with the write that replaces it.
    pub context: Bytes,
}

impl Got {
    /// The newest value.
    pub fn value(&self) -> Option<&Bytes> {
        self.siblings.last().map(|sibling| &sibling.value)
    }
}

/// A write that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Opaque context of the write and what it had seen.
    pub context: Bytes,
    /// Replicas that hold it durably.
    pub replicas: u8,
    /// Hints that hold it durably.
    pub hints: u8,
}

/// One key of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Bytes,
    /// Its live values, when they were asked for.
    pub siblings: Vec<Sibling>,
    /// Its context, when values were asked for.
    pub context: Bytes,
}

/// One page of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Keys with a live value, in ring order.
    pub entries: Vec<Entry>,
    /// Where the next page starts; `None` = the keyspace is through.
    pub cursor: Option<String>,
}

/// The node's word that something did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Name of the kind, as in HTTP's error answers.
    pub code: String,
    /// One sentence for people.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Whether a write may have been, or may yet be, applied.
    pub in_doubt: bool,
    /// When to try again, in milliseconds; 0 = no advice.
    pub retry_after_ms: u32,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)?;
        if self.in_doubt {
            f.write_str(" (in doubt: it may have been applied)")?;
        }
        Ok(())
    }
}

/// The answer to one operation of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// To a get.
    Got(Got),
    /// To a put or a delete.
    Written(Written),
    /// To either.
    Failed(Failure),
}

impl Got {
    pub(crate) fn of(payload: &Bytes, got: &ArchivedGot<'_>) -> Self {
        Self {
            siblings: siblings(payload, &got.siblings),
            context: payload.slice_ref(&got.context),
        }
    }
}

impl Written {
    pub(crate) fn of(payload: &Bytes, written: &ArchivedWritten<'_>) -> Self {
        Self {
            context: payload.slice_ref(&written.context),
            replicas: written.replicas,
            hints: written.hints,
        }
    }
}

impl Failure {
    pub(crate) fn of(failure: &ArchivedFailure<'_>) -> Self {
        Self {
            code: failure.code.to_string(),
            message: failure.message.to_string(),
            retryable: failure.retryable,
            in_doubt: failure.in_doubt,
            retry_after_ms: failure.retry_after_ms.to_native(),
        }
    }
}

impl Outcome {
    pub(crate) fn of(payload: &Bytes, outcome: &ArchivedOutcome<'_>) -> Self {
        match outcome {
            ArchivedOutcome::Got(got) => Outcome::Got(Got::of(payload, got)),
            ArchivedOutcome::Written(written) => Outcome::Written(Written::of(payload, written)),
            ArchivedOutcome::Failed(failure) => Outcome::Failed(Failure::of(failure)),
        }
    }
}

impl Page {
    pub(crate) fn of(payload: &Bytes, page: &ArchivedPage<'_>) -> Self {
        let entry = |entry: &ArchivedEntry<'_>| Entry {
            key: payload.slice_ref(&entry.key),
            siblings: siblings(payload, &entry.siblings),
            context: payload.slice_ref(&entry.context),
        };
        Self {
            entries: page.entries.iter().map(entry).collect(),
            cursor: page.cursor.as_ref().map(|cursor| cursor.to_string()),
        }
    }
}

fn siblings(payload: &Bytes, siblings: &[ArchivedSibling<'_>]) -> Vec<Sibling> {
    let owned = siblings.iter().map(|sibling| Sibling {
        value: payload.slice_ref(&sibling.value),
        expires_at_ms: sibling.expires_at_ms.to_native(),
    });
    owned.collect()
}

/// What an answer is, in words.
pub(crate) fn kind(answer: &ArchivedAnswer<'_>) -> &'static str {
    match answer {
        ArchivedAnswer::Pong => "pong",
        ArchivedAnswer::Route(_) => "route",
        ArchivedAnswer::Single(ArchivedOutcome::Got(_)) => "value",
        ArchivedAnswer::Single(ArchivedOutcome::Written(_)) => "written",
        ArchivedAnswer::Single(ArchivedOutcome::Failed(_)) | ArchivedAnswer::Failure(_) => {
            "failure"
        }
        ArchivedAnswer::Batch(_) => "batch",
        ArchivedAnswer::Page(_) => "page",
    }
}

/// The error for an answer that is not what was asked for: the failure that it says, or that it is
/// something else.
pub(crate) fn unexpected(asked: &'static str, answer: &ArchivedAnswer<'_>) -> ClientError {
    match answer {
        ArchivedAnswer::Single(ArchivedOutcome::Failed(failure))
        | ArchivedAnswer::Failure(failure) => ClientError::Failed(Failure::of(failure)),
        other => ClientError::Unexpected {
            asked,
            found: kind(other),
        },
    }
}
