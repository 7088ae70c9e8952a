//! Torc's binary protocol, with the client crate's own codec.

use bytes::{Bytes, BytesMut};
use torc_client::wire::frame;
use torc_client::wire::handshake::{Hello, Status, Welcome};
use torc_client::wire::message::{
    self, ArchivedAnswer, ArchivedFailure, ArchivedOutcome, Get, Level, Operation, Put, Request,
    Single, Write,
};

use super::{Answer, Levels, ProtocolError};

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

    pub fn read(&self, out: &mut BytesMut, id: u64, key: &[u8]) {
        self.request(out, id, Single::Get(Get { key, r: self.r }));
    }

    pub fn write(
        &self,
        out: &mut BytesMut,
        id: u64,
        key: &[u8],
        value: &[u8],
        context: Option<&[u8]>,
    ) {
        let write = Write {
            context,
            read_context_first: context.is_none(),
            w: self.w,
            ..Write::default()
        };
        self.request(
            out,
            id,
            Single::Put(Put {
                key,
                value,
                ttl_seconds: None,
                write,
            }),
        );
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
            ArchivedAnswer::Single(ArchivedOutcome::Got(got)) if got.siblings.is_empty() => {
                Answer::Missing {
                    version: Some(Bytes::copy_from_slice(&got.context)),
                }
            }
            ArchivedAnswer::Single(ArchivedOutcome::Got(got)) => Answer::Values {
                values: got
                    .siblings
                    .iter()
                    .map(|sibling| frame.payload.slice_ref(&sibling.value))
                    .collect(),
                version: Some(Bytes::copy_from_slice(&got.context)),
            },
            ArchivedAnswer::Single(ArchivedOutcome::Written(written)) => {
                Answer::Written(Some(Bytes::copy_from_slice(&written.context)))
            }
            ArchivedAnswer::Single(ArchivedOutcome::Failed(failure))
            | ArchivedAnswer::Failure(failure) => failed(failure),
            _ => {
                return Err(ProtocolError(
                    "binary: an answer that was not asked for".into(),
                ));
            }
        };
        Ok(Some((Some(frame.header.request), answer)))
    }

    fn request(&self, out: &mut BytesMut, id: u64, single: Single<'_>) {
        let request = Request {
            timeout_ms: self.timeout_ms,
            keyspace: self.keyspace.as_bytes(),
            operation: Operation::Single(single),
        };
        message::encode_request(out, id, &request);
    }
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
                Answer::Values {
                    values: vec![Bytes::from_static(b"value")],
                    version: Some(Bytes::from_static(b"ctx")),
                }
            ))
        );
    }

    #[test]
    fn a_write_is_a_valid_request() {
        let mut bytes = BytesMut::new();
        binary().write(&mut bytes, 7, b"key", b"value", None);
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
