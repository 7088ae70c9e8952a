//! Between the binary protocol's messages and the cluster's requests and answers.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use rkyv::option::ArchivedOption;
use torc_client::wire::frame::FRAME_BYTES_MAX;
use torc_client::wire::message::{
    self, Answer, ArchivedCondition, ArchivedLevel, ArchivedOperation, ArchivedRequest,
    ArchivedSingle, ArchivedWrite, Entry, Got, Page, RouteNode, RouteRange, Sibling,
};
use torc_cluster::api::{
    self, BATCH_OPERATIONS_MAX, Condition, Context, DeleteRequest, Failure, FailureCode, GetAnswer,
    GetRequest, KEY_BYTES_MAX, Level, Operation, Outcome, PutRequest, SCAN_LIMIT_MAX, ScanAnswer,
    ScanRequest, TTL_SECONDS_MAX, VALUE_BYTES_MAX, WriteOptions, Written,
};
use torc_cluster::membership::View;
use torc_env::{Env, Instant, TreeId};

use crate::binary::Work;
use crate::limits::TIMEOUT_MS_MAX;
use crate::service::{Service, idempotency};

/// What an answer's message may take beside its values and contexts, for each entry.
const ENTRY_BYTES: usize = 96;

fn invalid(message: impl std::fmt::Display) -> Failure {
    Failure::refused(FailureCode::InvalidRequest, message)
}

/// What a request asks for. Keys and values share `payload`.
pub(super) fn work(
    payload: &Bytes,
    request: &ArchivedRequest<'_>,
    deadline: Instant,
) -> Result<Work, Failure> {
    let timeout_ms = u64::from(request.timeout_ms.to_native());
    if !(1..=TIMEOUT_MS_MAX).contains(&timeout_ms) {
        return Err(invalid(format!(
            "timeout_ms must be from 1 to {TIMEOUT_MS_MAX}"
        )));
    }
    let reader = Reader {
        payload,
        keyspace: payload.slice_ref(&request.keyspace),
        deadline,
    };
    Ok(match &request.operation {
        ArchivedOperation::Ping => Work::Ping,
        ArchivedOperation::Route => Work::Route(reader.keyspace),
        ArchivedOperation::Single(single) => Work::One(reader.single(single)?),
        ArchivedOperation::Batch(singles) => {
            if singles.len() > BATCH_OPERATIONS_MAX {
                return Err(invalid(format!(
                    "a batch has at most {BATCH_OPERATIONS_MAX} operations"
                )));
            }
            let operations = singles.iter().map(|single| reader.single(single));
            Work::Batch(operations.collect::<Result<_, _>>()?)
        }
        ArchivedOperation::Scan(scan) => {
            let limit = scan.limit.to_native();
            if !(1..=SCAN_LIMIT_MAX).contains(&limit) {
                return Err(invalid(format!("limit must be from 1 to {SCAN_LIMIT_MAX}")));
            }
            Work::Scan(ScanRequest {
                cursor: scan.cursor.as_ref().map(|cursor| cursor.to_string()),
                limit,
                prefix: payload.slice_ref(&scan.prefix),
                values: scan.values,
                r: level(&scan.r),
                keyspace: reader.keyspace,
                deadline,
            })
        }
    })
}

struct Reader<'a> {
    payload: &'a Bytes,
    keyspace: Bytes,
    deadline: Instant,
}

impl Reader<'_> {
    fn single(&self, single: &ArchivedSingle<'_>) -> Result<Operation, Failure> {
        let keyspace = self.keyspace.clone();
        Ok(match single {
            ArchivedSingle::Get(get) => Operation::Get(GetRequest {
                keyspace,
                key: self.key(&get.key)?,
                r: level(&get.r),
                at_least: None,
                deadline: self.deadline,
            }),
            ArchivedSingle::Put(put) => {
                if put.value.len() > VALUE_BYTES_MAX {
                    return Err(Failure::refused(
                        FailureCode::TooLarge,
                        format!("a value has at most {VALUE_BYTES_MAX} bytes"),
                    ));
                }
                let ttl_seconds = put.ttl_seconds.as_ref().map(|seconds| seconds.to_native());
                if ttl_seconds.is_some_and(|ttl| !(1..=TTL_SECONDS_MAX).contains(&ttl)) {
                    return Err(invalid(format!(
                        "ttl_seconds must be from 1 to {TTL_SECONDS_MAX}"
                    )));
                }
                let ttl = ttl_seconds.unwrap_or(0).to_le_bytes();
                let identity: [&[u8]; 3] = [b"PUT", &put.value, &ttl];
                Operation::Put(PutRequest {
                    keyspace,
                    key: self.key(&put.key)?,
                    value: self.payload.slice_ref(&put.value),
                    ttl_seconds,
                    write: self.write(&put.write, &identity)?,
                })
            }
            ArchivedSingle::Delete(delete) => Operation::Delete(DeleteRequest {
                keyspace,
                key: self.key(&delete.key)?,
                write: self.write(&delete.write, &[b"DELETE"])?,
            }),
        })
    }

    fn key(&self, key: &[u8]) -> Result<Bytes, Failure> {
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return Err(invalid(format!("a key has 1 to {KEY_BYTES_MAX} bytes")));
        }
        Ok(self.payload.slice_ref(key))
    }

    fn write(
        &self,
        write: &ArchivedWrite<'_>,
        identity: &[&[u8]],
    ) -> Result<WriteOptions, Failure> {
        let condition = match &write.condition {
            ArchivedCondition::None => Condition::None,
            ArchivedCondition::Absent => Condition::Absent,
            ArchivedCondition::Match(opaque) => Condition::Match(context(opaque)?),
        };
        let seen = write.context.as_ref().map(|opaque| context(opaque));
        let idempotency = match &write.idempotency {
            ArchivedOption::None => None,
            ArchivedOption::Some(id) => {
                let mut name = [0; 24];
                name[..16].copy_from_slice(&id.client.to_native().to_le_bytes());
                name[16..].copy_from_slice(&id.sequence.to_native().to_le_bytes());
                Some(idempotency(&name, identity))
            }
        };
        Ok(WriteOptions {
            context: seen.transpose()?,
            read_context_first: write.read_context_first
                && condition == Condition::None
                && write.context.is_none(),
            condition,
            w: level(&write.w),
            sloppy: write.sloppy,
            idempotency,
            ..WriteOptions::until(self.deadline)
        })
    }
}

fn level(level: &ArchivedLevel) -> Level {
    match level {
        ArchivedLevel::One => Level::One,
        ArchivedLevel::Quorum => Level::Quorum,
        ArchivedLevel::All => Level::All,
        ArchivedLevel::LocalQuorum => Level::LocalQuorum,
        ArchivedLevel::EachQuorum => Level::EachQuorum,
        ArchivedLevel::Count(count) => Level::Count(*count),
    }
}

fn context(opaque: &[u8]) -> Result<Context, Failure> {
    let text = std::str::from_utf8(opaque).ok();
    let context = text.and_then(|text| Context::from_opaque(text).ok());
    context.ok_or_else(|| {
        Failure::refused(
            FailureCode::BadToken,
            "the context is not one that this cluster gave out",
        )
    })
}

/// Writes the answer to one operation.
pub(super) fn write_outcome(out: &mut BytesMut, id: u64, outcome: &Outcome) {
    let context = outcome_context(outcome);
    let message = Answer::Single(outcome_message(outcome, &context));
    let bytes = outcome_bytes(outcome, &context);
    write_checked(out, id, bytes, &message, outcome.may_have_written());
}

/// Writes the answers to a batch.
pub(super) fn write_batch(out: &mut BytesMut, id: u64, outcomes: &[Outcome]) {
    let contexts: Vec<String> = outcomes.iter().map(outcome_context).collect();
    let pairs = || outcomes.iter().zip(&contexts);
    let bytes = pairs().map(|(outcome, context)| outcome_bytes(outcome, context));
    let in_doubt = outcomes.iter().any(Outcome::may_have_written);
    let messages = pairs().map(|(outcome, context)| outcome_message(outcome, context));
    let message = Answer::Batch(messages.collect());
    write_checked(out, id, bytes.sum(), &message, in_doubt);
}

/// Writes a page of keys.
pub(super) fn write_page(out: &mut BytesMut, id: u64, page: &ScanAnswer) {
    let opaque = page.entries.iter().map(|entry| entry.context.to_opaque());
    let contexts: Vec<String> = opaque.collect();
    let pairs = || page.entries.iter().zip(&contexts);
    let bytes = pairs().map(|(entry, context)| {
        ENTRY_BYTES + entry.key.len() + context.len() + siblings_bytes(&entry.siblings)
    });
    let entries = pairs().map(|(entry, context)| Entry {
        key: &entry.key,
        siblings: siblings(&entry.siblings),
        context: context.as_bytes(),
    });
    let message = Answer::Page(Page {
        entries: entries.collect(),
        cursor: page.cursor.as_deref(),
    });
    write_checked(out, id, bytes.sum(), &message, false);
}

/// Writes a failure.
pub(super) fn write_failure(out: &mut BytesMut, id: u64, failure: &Failure) {
    message::encode_answer(out, id, &Answer::Failure(failure_message(failure)));
}

/// Writes a message of about `bytes`, or says that it is too large for a frame; `in_doubt`: what it is about may have been
/// written.
fn write_checked(out: &mut BytesMut, id: u64, bytes: usize, message: &Answer<'_>, in_doubt: bool) {
    if bytes < FRAME_BYTES_MAX - ENTRY_BYTES {
        return message::encode_answer(out, id, message);
    }
    let mut failure = Failure::refused(
        FailureCode::TooLarge,
        format!("the answer is above {FRAME_BYTES_MAX} bytes; ask for less at a time"),
    );
    failure.in_doubt = in_doubt;
    write_failure(out, id, &failure);
}

fn outcome_context(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Got(Ok(GetAnswer { context, .. }))
        | Outcome::Written(Ok(Written { context, .. })) => context.to_opaque(),
        Outcome::Got(Err(_)) | Outcome::Written(Err(_)) => String::new(),
    }
}

fn outcome_message<'a>(outcome: &'a Outcome, context: &'a str) -> message::Outcome<'a> {
    let context = context.as_bytes();
    match outcome {
        Outcome::Got(Ok(answer)) => message::Outcome::Got(Got {
            siblings: siblings(&answer.siblings),
            context,
        }),
        Outcome::Written(Ok(written)) => message::Outcome::Written(message::Written {
            context,
            replicas: written.replicas,
            hints: written.hints,
        }),
        Outcome::Got(Err(failure)) | Outcome::Written(Err(failure)) => {
            message::Outcome::Failed(failure_message(failure))
        }
    }
}

fn failure_message(failure: &Failure) -> message::Failure<'_> {
    message::Failure {
        code: failure.code.name(),
        message: &failure.message,
        retryable: failure.retryable,
        in_doubt: failure.in_doubt,
        retry_after_ms: failure.retry_after_ms,
    }
}

fn siblings(siblings: &[api::Sibling]) -> Vec<Sibling<'_>> {
    let messages = siblings.iter().map(|sibling| Sibling {
        value: &sibling.value,
        expires_at_ms: sibling.expires_at_ms,
    });
    messages.collect()
}

fn siblings_bytes(siblings: &[api::Sibling]) -> usize {
    let bytes = siblings
        .iter()
        .map(|sibling| ENTRY_BYTES + sibling.value.len());
    bytes.sum()
}

fn outcome_bytes(outcome: &Outcome, context: &str) -> usize {
    let inner = match outcome {
        Outcome::Got(Ok(answer)) => siblings_bytes(&answer.siblings),
        Outcome::Written(Ok(_)) => 0,
        Outcome::Got(Err(failure)) | Outcome::Written(Err(failure)) => failure.message.len(),
    };
    ENTRY_BYTES + context.len() + inner
}

/// The ring, as a client needs it to find the owner of a key.
pub(super) struct Route {
    view: Rc<View>,
    keyspace: TreeId,
    copies: usize,
    shard_count: u16,
}

impl Route {
    /// The ring of a keyspace.
    ///
    /// # Errors
    /// When there is no such keyspace, or no ring yet.
    pub(super) fn of(service: &Service, name: &[u8]) -> Result<Route, Failure> {
        let view = service.view().ok_or_else(|| {
            Failure::refused(FailureCode::NotReady, "this node is in no cluster yet")
        })?;
        let keyspace = std::str::from_utf8(name)
            .ok()
            .and_then(|name| view.topology.keyspace(name));
        let keyspace = keyspace.ok_or_else(|| {
            Failure::refused(FailureCode::UnknownKeyspace, "there is no such keyspace")
        })?;
        Ok(Route {
            keyspace: keyspace.id,
            copies: usize::from(view.topology.effective_n(keyspace)),
            shard_count: service.env.shard_count(),
            view,
        })
    }

    /// Writes the answer.
    pub(super) fn write(&self, out: &mut BytesMut, id: u64) {
        let topology = &self.view.topology;
        let addresses = topology.members.iter();
        let addresses: Vec<String> = addresses
            .map(|member| member.description.client.to_string())
            .collect();
        let nodes = topology.indexed().zip(&addresses);
        let nodes = nodes.map(|((index, member), client)| RouteNode {
            node: member.node.map_or(0, |node| node.0),
            name: &member.description.name,
            client,
            shard_count: member.description.shards,
            up: member.node.is_some() && self.view.is_up(index),
        });
        let ranges = self.view.ring.ranges(self.copies, 1);
        let ranges: Vec<RouteRange> = ranges
            .map(|piece| RouteRange {
                last: piece.range.last.0,
                replicas: piece.replicas.iter().map(|index| index.0).collect(),
            })
            .collect();
        let bytes = ranges.iter().map(|range| 32 + 2 * range.replicas.len());
        let bytes = bytes.sum::<usize>() + ENTRY_BYTES * topology.members.len();
        let message = Answer::Route(message::Route {
            epoch: topology.epoch.0,
            keyspace: self.keyspace.0,
            shard_count: self.shard_count,
            nodes: nodes.collect(),
            ranges,
        });
        write_checked(out, id, bytes, &message, false);
    }
}

#[cfg(test)]
mod tests {
    use torc_client::wire::frame::HEADER_BYTES;
    use torc_client::wire::message as wire;

    use super::*;

    fn payload(operation: wire::Operation<'_>) -> Vec<u8> {
        let mut out = BytesMut::new();
        let request = wire::Request {
            timeout_ms: 5000,
            keyspace: b"default",
            operation,
        };
        wire::encode_request(&mut out, 7, &request);
        out[HEADER_BYTES..].to_vec()
    }

    #[test]
    fn no_bytes_make_a_request_panic() {
        let opaque = Context::default().to_opaque();
        let get = || {
            wire::Single::Get(wire::Get {
                key: b"key",
                r: wire::Level::Count(2),
            })
        };
        let put = || {
            wire::Single::Put(wire::Put {
                key: b"key",
                value: b"value",
                ttl_seconds: Some(60),
                write: wire::Write {
                    context: Some(opaque.as_bytes()),
                    condition: wire::Condition::Match(opaque.as_bytes()),
                    ..wire::Write::default()
                },
            })
        };
        let delete = wire::Single::Delete(wire::Delete {
            key: b"key",
            write: wire::Write::default(),
        });
        let scan = wire::Scan {
            cursor: Some("cursor"),
            limit: 100,
            prefix: b"prefix",
            values: true,
            r: wire::Level::Quorum,
        };
        let valid = [
            payload(wire::Operation::Ping),
            payload(wire::Operation::Route),
            payload(wire::Operation::Single(put())),
            payload(wire::Operation::Batch(vec![get(), put(), delete])),
            payload(wire::Operation::Scan(scan)),
        ];
        crate::fuzz::parser("request of the binary protocol", &valid).fuzz(|bytes| {
            let payload = Bytes::copy_from_slice(bytes);
            if let Ok(request) = wire::request(&payload) {
                drop(work(&payload, request, Instant(1)));
            }
        });
    }
}
