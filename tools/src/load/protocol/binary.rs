//! Torc's binary protocol, with the client crate's own codec.

use bytes::{Bytes, BytesMut};
use torc_client::wire::frame;
use torc_client::wire::handshake::{Hello, Status, Welcome};
use torc_client::wire::message::{
    self, ArchivedAnswer, ArchivedFailure, ArchivedOutcome, ArchivedSibling, Delete, Get, Level,
    Operation, Put, Scan, Single, Write,
};

use super::{Answer, Entry, Levels, ProtocolError, Request};

/// The settings of every request.
#[derive(Clone, Debug)]
pub struct Binary {
    keyspace: String,
    r: Level,
    w: Level,
    timeout_ms: u32,
}

impl Binary {
    pub fn new(levels: Levels) -> Result<Self, ProtocolError> {
        Ok(Self {
            keyspace: levels.keyspace.unwrap_or_else(|| "default".into()),
            r: level(levels.r.as_deref())?,
            w: level(levels.w.as_deref())?,
            timeout_ms: levels.timeout_ms,
        })
    }

    pub fn greeting(&self, out: &mut BytesMut) {
        Hello::new(None).encode(out);
    }

    pub fn greeted(&self, input: &mut BytesMut) -> Result<bool, ProtocolError> {
        let welcome =
            Welcome::decode(input).map_err(|error| ProtocolError(format!("binary: {error}")))?;
        match welcome {
            None => Ok(false),
            Some(welcome) if matches!(welcome.status, Status::Ready) => Ok(true),
            Some(welcome) => Err(ProtocolError(format!("refused: {:?}", welcome.status))),
        }
    }

    pub fn request(&self, out: &mut BytesMut, id: u64, request: &Request<'_>) {
        let get = |key| Single::Get(Get { key, r: self.r });
        let operation = match request {
            Request::Read(key) => Operation::Single(get(*key)),
            Request::ReadMany(keys) => {
                Operation::Batch(keys.iter().map(|key| get(&key[..])).collect())
            }
            Request::Write {
                key,
                value,
                context,
                ttl_seconds,
            } => Operation::Single(Single::Put(Put {
                key,
                value,
                ttl_seconds: ttl_seconds.map(u64::from),
                write: self.write_options(*context),
            })),
            Request::Delete { key, context } => Operation::Single(Single::Delete(Delete {
                key,
                write: self.write_options(*context),
            })),
            Request::Scan { cursor, limit } => Operation::Scan(Scan {
                // Cursors come from answers, where they are text.
                cursor: cursor.and_then(|cursor| std::str::from_utf8(cursor).ok()),
                limit: *limit,
                prefix: b"",
                values: true,
                r: self.r,
            }),
        };
        let request = message::Request {
            timeout_ms: self.timeout_ms,
            keyspace: self.keyspace.as_bytes(),
            operation,
        };
        message::encode_request(out, id, &request);
    }

    fn write_options<'a>(&self, context: Option<&'a [u8]>) -> Write<'a> {
        Write {
            context,
            read_context_first: context.is_none(),
            w: self.w,
            ..Write::default()
        }
    }

    pub fn answer(
        &self,
        input: &mut BytesMut,
    ) -> Result<Option<(Option<u64>, Answer)>, ProtocolError> {
        let bad = |error: &dyn std::fmt::Display| ProtocolError(format!("binary: {error}"));
        let limit = frame::FRAME_BYTES_MAX;
        let Some(frame) = frame::decode(input, limit).map_err(|error| bad(&error))? else {
            return Ok(None);
        };
        let archived = message::answer(&frame.payload).map_err(|error| bad(&error))?;
        let answer = match archived {
            ArchivedAnswer::Single(outcome) => outcome_of(&frame.payload, outcome),
            ArchivedAnswer::Batch(outcomes) => Answer::Many(
                outcomes
                    .iter()
                    .map(|outcome| outcome_of(&frame.payload, outcome))
                    .collect(),
            ),
            ArchivedAnswer::Page(page) => Answer::Page {
                entries: page
                    .entries
                    .iter()
                    .map(|entry| Entry {
                        key: frame.payload.slice_ref(&entry.key),
                        values: values_of(&frame.payload, &entry.siblings),
                    })
                    .collect(),
                cursor: page
                    .cursor
                    .as_ref()
                    .map(|cursor| Bytes::copy_from_slice(cursor.as_bytes())),
            },
            ArchivedAnswer::Failure(failure) => failed(failure),
            _ => {
                return Err(ProtocolError(
                    "binary: an answer that was not asked for".into(),
                ));
            }
        };
        Ok(Some((Some(frame.header.request), answer)))
    }
}

fn outcome_of(payload: &Bytes, outcome: &ArchivedOutcome<'_>) -> Answer {
    match outcome {
        ArchivedOutcome::Got(got) => {
            let version = Some(Bytes::copy_from_slice(&got.context));
            match &got.siblings[..] {
                [] => Answer::Missing { version },
                [only] => Answer::Value {
                    value: payload.slice_ref(&only.value),
                    version,
                },
                several => Answer::Siblings {
                    values: values_of(payload, several),
                    version,
                },
            }
        }
        ArchivedOutcome::Written(written) => {
            Answer::Written(Some(Bytes::copy_from_slice(&written.context)))
        }
        ArchivedOutcome::Failed(failure) => failed(failure),
    }
}

fn values_of(payload: &Bytes, siblings: &[ArchivedSibling<'_>]) -> Vec<Bytes> {
    let values = siblings
        .iter()
        .map(|sibling| payload.slice_ref(&sibling.value));
    values.collect()
}

fn failed(failure: &ArchivedFailure<'_>) -> Answer {
    let words = format!("{}: {}", &*failure.code, &*failure.message);
    if failure.in_doubt {
        Answer::InDoubt(words)
    } else {
        Answer::Refused(words)
    }
}

fn level(name: Option<&str>) -> Result<Level, ProtocolError> {
    Ok(match name {
        None | Some("quorum") => Level::Quorum,
        Some("one") => Level::One,
        Some("all") => Level::All,
        Some("local_quorum") => Level::LocalQuorum,
        Some("each_quorum") => Level::EachQuorum,
        Some(count) => match count.parse::<u8>() {
            Ok(count) if count > 0 => Level::Count(count),
            _ => {
                return Err(ProtocolError(format!(
                    "level {count}: expected a number, one, quorum, all, local_quorum or \
                     each_quorum"
                )));
            }
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use torc_client::wire::message::{Got, Outcome, Sibling};

    fn binary() -> Binary {
        Binary::new(Levels {
            keyspace: None,
            r: None,
            w: Some("2".into()),
            timeout_ms: 5000,
            login: None,
        })
        .unwrap()
    }

    #[test]
    fn values_come_back_with_the_id_of_their_request() {
        let mut bytes = BytesMut::new();
        let got = Got {
            siblings: vec![Sibling {
                value: b"value",
                expires_at_ms: 0,
            }],
            context: b"ctx",
        };
        message::encode_answer(&mut bytes, 42, &message::Answer::Single(Outcome::Got(got)));
        let answer = binary().answer(&mut bytes).unwrap();
        assert_eq!(
            answer,
            Some((
                Some(42),
                Answer::Value {
                    value: Bytes::from_static(b"value"),
                    version: Some(Bytes::from_static(b"ctx")),
                }
            ))
        );
    }

    #[test]
    fn a_page_comes_with_its_values() {
        let value = |value| Sibling {
            value,
            expires_at_ms: 0,
        };
        let page = message::Page {
            entries: vec![message::Entry {
                key: b"k",
                siblings: vec![value(b"v1"), value(b"v2")],
                context: b"",
            }],
            cursor: Some("next"),
        };
        let mut bytes = BytesMut::new();
        message::encode_answer(&mut bytes, 7, &message::Answer::Page(page));
        let page = Answer::Page {
            entries: vec![Entry {
                key: Bytes::from_static(b"k"),
                values: vec![Bytes::from_static(b"v1"), Bytes::from_static(b"v2")],
            }],
            cursor: Some(Bytes::from_static(b"next")),
        };
        assert_eq!(binary().answer(&mut bytes).unwrap(), Some((Some(7), page)));
    }

    #[test]
    fn a_write_is_a_valid_request() {
        let mut bytes = BytesMut::new();
        let write = Request::Write {
            key: b"key",
            value: b"value",
            context: None,
            ttl_seconds: None,
        };
        binary().request(&mut bytes, 7, &write);
        let frame = frame::decode(&mut bytes, frame::FRAME_BYTES_MAX)
            .unwrap()
            .unwrap();
        assert_eq!(frame.header.request, 7);
        assert!(message::request(&frame.payload).is_ok());
    }

    #[test]
    fn levels_are_named_as_on_the_command_line() {
        assert!(matches!(level(Some("3")).unwrap(), Level::Count(3)));
        assert!(level(Some("0")).is_err() && level(Some("most")).is_err());
    }
}
