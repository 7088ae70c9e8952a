//! The Redis protocol, as far as GET, MGET, SET, DEL and SCAN need it.

use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};

use crate::load::login::Login;

use super::{Answer, Asked, Entry, ProtocolError, Request, decimal, length, line_end};

/// The Redis protocol has no settings for each request, only for each connection.
#[derive(Clone, Debug)]
pub struct Resp {
    login: Option<Login>,
}

/// Nesting of arrays that is read: a scan's answer has two.
const DEPTH_MAX: u32 = 4;
/// Elements of an array that are read.
const ELEMENTS_MAX: usize = 1 << 20;

/// One reply; ranges are of the received bytes.
enum Reply {
    Simple,
    Error(Range<usize>),
    Integer,
    Bulk(Range<usize>),
    Null,
    Array(Vec<Reply>),
}

impl Resp {
    pub fn new(login: Option<Login>) -> Self {
        Self { login }
    }

    /// AUTH where there is a password, else PING: it is a server's answer that says that it serves a connection.
    pub fn greeting(&self, out: &mut BytesMut) {
        let Some(login) = &self.login else {
            return out.extend_from_slice(b"*1\r\n$4\r\nPING\r\n");
        };
        let parts: &[u8] = match login.user {
            Some(_) => b"*3\r\n$4\r\nAUTH\r\n",
            None => b"*2\r\n$4\r\nAUTH\r\n",
        };
        out.extend_from_slice(parts);
        if let Some(user) = &login.user {
            bulk(out, user.as_bytes());
        }
        bulk(out, login.password.as_bytes());
    }

    /// Whether its answer has come.
    pub fn greeted(&self, input: &mut BytesMut) -> Result<bool, ProtocolError> {
        let Some((reply, end)) = parse(input, 0, 0)? else {
            return Ok(false);
        };
        if let Reply::Error(range) = reply {
            let words = String::from_utf8_lossy(&input[range]);
            // Servers that know no PING, and those that do not write just now, serve all the same.
            let serves = ["ERR unknown", "MISCONF"];
            if self.login.is_some() || !serves.iter().any(|code| words.starts_with(code)) {
                return Err(ProtocolError(words.into_owned()));
            }
        }
        input.advance(end);
        Ok(true)
    }

    pub fn request(&self, out: &mut BytesMut, request: &Request<'_>) {
        match request {
            Request::Read(key) => {
                out.extend_from_slice(b"*2\r\n$3\r\nGET\r\n");
                bulk(out, key);
            }
            Request::ReadMany(keys) => {
                out.extend_from_slice(b"*");
                decimal(out, keys.len() + 1);
                out.extend_from_slice(b"\r\n$4\r\nMGET\r\n");
                for key in *keys {
                    bulk(out, key);
                }
            }
            Request::Write {
                key,
                value,
                ttl_seconds,
                ..
            } => {
                let head: &[u8] = match ttl_seconds {
                    None => b"*3\r\n$3\r\nSET\r\n",
                    Some(_) => b"*5\r\n$3\r\nSET\r\n",
                };
                out.extend_from_slice(head);
                bulk(out, key);
                bulk(out, value);
                if let Some(seconds) = ttl_seconds {
                    out.extend_from_slice(b"$2\r\nEX\r\n");
                    bulk(out, itoa::Buffer::new().format(*seconds).as_bytes());
                }
            }
            Request::Delete { key, .. } => {
                out.extend_from_slice(b"*2\r\n$3\r\nDEL\r\n");
                bulk(out, key);
            }
            Request::Scan { cursor, limit } => {
                out.extend_from_slice(b"*4\r\n$4\r\nSCAN\r\n");
                bulk(out, cursor.unwrap_or(b"0"));
                out.extend_from_slice(b"$5\r\nCOUNT\r\n");
                bulk(out, itoa::Buffer::new().format(*limit).as_bytes());
            }
        }
    }

    pub fn answer(
        &self,
        input: &mut BytesMut,
        asked: Asked,
    ) -> Result<Option<Answer>, ProtocolError> {
        let Some((reply, end)) = parse(input, 0, 0)? else {
            return Ok(None);
        };
        let answer = match reply {
            Reply::Simple | Reply::Integer => Answer::Written(None),
            Reply::Error(range) => error(String::from_utf8_lossy(&input[range]).into_owned()),
            Reply::Null => Answer::Missing { version: None },
            Reply::Bulk(range) => {
                // Taken out of the front; the rest of the reply follows at once.
                input.advance(range.start);
                let value = input.split_to(range.len()).freeze();
                input.advance(end - range.end);
                return Ok(Some(Answer::Value {
                    value,
                    version: None,
                }));
            }
            Reply::Array(replies) => {
                let bytes = input.split_to(end).freeze();
                return array(&bytes, replies, asked).map(Some);
            }
        };
        input.advance(end);
        Ok(Some(answer))
    }
}

fn array(bytes: &Bytes, replies: Vec<Reply>, asked: Asked) -> Result<Answer, ProtocolError> {
    if asked == Asked::Scan {
        return match &replies[..] {
            [Reply::Bulk(cursor), Reply::Array(keys)] => {
                let cursor = bytes.slice(cursor.clone());
                let entries = keys.iter().map(|key| match key {
                    Reply::Bulk(key) => Ok(Entry {
                        key: bytes.slice(key.clone()),
                        values: Vec::new(),
                    }),
                    _ => Err(ProtocolError("RESP: a key that is none".into())),
                });
                Ok(Answer::Page {
                    entries: entries.collect::<Result<_, _>>()?,
                    cursor: (cursor != "0").then_some(cursor),
                })
            }
            _ => Err(ProtocolError("RESP: not the answer of a SCAN".into())),
        };
    }
    let answers = replies.into_iter().map(|reply| match reply {
        Reply::Bulk(range) => Ok(Answer::Value {
            value: bytes.slice(range),
            version: None,
        }),
        Reply::Null => Ok(Answer::Missing { version: None }),
        _ => Err(ProtocolError("RESP: an array of something else".into())),
    });
    Ok(Answer::Many(answers.collect::<Result<_, _>>()?))
}

/// The reply at `at` and where it ends; `None` when it is not complete.
fn parse(input: &[u8], at: usize, depth: u32) -> Result<Option<(Reply, usize)>, ProtocolError> {
    let Some(line_end) = line_end(&input[at..])? else {
        return Ok(None);
    };
    let after = at + line_end;
    let line = &input[at..after];
    let (Some(kind), Some(text)) = (line.first(), line.get(1..line.len().max(3) - 2)) else {
        return Err(ProtocolError("RESP: an empty line".into()));
    };
    let reply = match kind {
        b'+' => Reply::Simple,
        b':' => Reply::Integer,
        b'_' => Reply::Null,
        b'-' => Reply::Error(at + 1..at + 1 + text.len()),
        b'$' | b'*' if text == b"-1" => Reply::Null,
        b'$' => {
            let end = after + length(text)?;
            if input.len() < end + 2 {
                return Ok(None);
            }
            return Ok(Some((Reply::Bulk(after..end), end + 2)));
        }
        b'*' if depth < DEPTH_MAX => {
            let count = length(text)?;
            if count > ELEMENTS_MAX {
                return Err(ProtocolError(format!("RESP: an array of {count}")));
            }
            let mut replies = Vec::with_capacity(count.min(1024));
            let mut next = after;
            for _ in 0..count {
                let Some((reply, end)) = parse(input, next, depth + 1)? else {
                    return Ok(None);
                };
                replies.push(reply);
                next = end;
            }
            return Ok(Some((Reply::Array(replies), next)));
        }
        other => return Err(ProtocolError(format!("RESP: a reply of type {other:#x}"))),
    };
    Ok(Some((reply, after)))
}

/// A Redis error does not say whether the write happened. Refusals before execution do.
fn error(text: String) -> Answer {
    let refused = [
        "ERR unknown",
        "OOM",
        "READONLY",
        "LOADING",
        "NOAUTH",
        "MISCONF",
        "WRONGTYPE",
        "OVERLOADED",
    ];
    if refused.iter().any(|code| text.starts_with(code)) {
        Answer::Refused(text)
    } else {
        Answer::InDoubt(text)
    }
}

fn bulk(out: &mut BytesMut, bytes: &[u8]) {
    out.extend_from_slice(b"$");
    decimal(out, bytes.len());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_arrays_of_bulk_strings() {
        let resp = Resp::new(None);
        let mut out = BytesMut::new();
        let write = |ttl_seconds| Request::Write {
            key: b"k",
            value: b"va",
            context: None,
            ttl_seconds,
        };
        resp.request(&mut out, &write(None));
        assert_eq!(&out[..], b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2\r\nva\r\n");
        out.clear();
        resp.request(&mut out, &write(Some(60)));
        assert!(out.ends_with(b"$2\r\nva\r\n$2\r\nEX\r\n$2\r\n60\r\n"));
        out.clear();
        resp.request(
            &mut out,
            &Request::ReadMany(&[b"a".to_vec(), b"b".to_vec()]),
        );
        assert_eq!(&out[..], b"*3\r\n$4\r\nMGET\r\n$1\r\na\r\n$1\r\nb\r\n");
    }

    #[test]
    fn a_connection_begins_with_a_password_or_a_question_that_shows_that_it_is_served() {
        let login = |user: Option<&str>| {
            Resp::new(Some(Login {
                user: user.map(str::to_owned),
                password: "s3".into(),
            }))
        };
        let mut out = BytesMut::new();
        Resp::new(None).greeting(&mut out);
        assert_eq!(&out[..], b"*1\r\n$4\r\nPING\r\n");
        let greeted = |answer: &'static [u8]| Resp::new(None).greeted(&mut BytesMut::from(answer));
        assert!(greeted(b"+PONG\r\n").unwrap() && !greeted(b"+PONG").unwrap());
        assert!(greeted(b"-ERR unknown command\r\n").unwrap());
        let refused = greeted(b"-NOAUTH Authentication required.\r\n");
        assert!(refused.unwrap_err().0.starts_with("NOAUTH"));
        out.clear();
        login(None).greeting(&mut out);
        assert_eq!(&out[..], b"*2\r\n$4\r\nAUTH\r\n$2\r\ns3\r\n");
        out.clear();
        let resp = login(Some("ann"));
        resp.greeting(&mut out);
        assert_eq!(&out[..], b"*3\r\n$4\r\nAUTH\r\n$3\r\nann\r\n$2\r\ns3\r\n");
        let mut input = BytesMut::from(&b"+OK"[..]);
        assert!(!resp.greeted(&mut input).unwrap());
        input.extend_from_slice(b"\r\n$-1\r\n");
        assert!(resp.greeted(&mut input).unwrap());
        assert_eq!(&input[..], b"$-1\r\n", "an answer may follow at once");
        let mut input = BytesMut::from(&b"-WRONGPASS invalid\r\n"[..]);
        let refused = resp.greeted(&mut input).unwrap_err();
        assert!(refused.0.contains("WRONGPASS invalid"), "{refused}");
    }

    #[test]
    fn every_kind_of_reply_is_told_apart_at_every_cut() {
        let resp = Resp::new(None);
        let value = |bytes: &'static [u8]| Answer::Value {
            value: Bytes::from_static(bytes),
            version: None,
        };
        let replies: [(&[u8], Asked, Answer); 7] = [
            (b"+OK\r\n", Asked::Write, Answer::Written(None)),
            (b":1\r\n", Asked::Delete, Answer::Written(None)),
            (b"$-1\r\n", Asked::Read, Answer::Missing { version: None }),
            (b"$2\r\n\r\n\r\n", Asked::Read, value(b"\r\n")),
            (
                b"-OOM no room\r\n",
                Asked::Write,
                Answer::Refused("OOM no room".into()),
            ),
            (
                b"*2\r\n$1\r\nv\r\n$-1\r\n",
                Asked::ReadMany(2),
                Answer::Many(vec![value(b"v"), Answer::Missing { version: None }]),
            ),
            (
                b"*2\r\n$2\r\n17\r\n*1\r\n$1\r\nk\r\n",
                Asked::Scan,
                Answer::Page {
                    entries: vec![Entry {
                        key: Bytes::from_static(b"k"),
                        values: Vec::new(),
                    }],
                    cursor: Some(Bytes::from_static(b"17")),
                },
            ),
        ];
        for (bytes, asked, answer) in replies {
            for cut in 0..bytes.len() {
                let mut input = BytesMut::from(&bytes[..cut]);
                assert_eq!(resp.answer(&mut input, asked).unwrap(), None);
                assert_eq!(input.len(), cut);
            }
            let mut input = BytesMut::from(bytes);
            assert_eq!(resp.answer(&mut input, asked).unwrap(), Some(answer));
            assert!(input.is_empty());
        }
        let huge = b"$18446744073709551615\r\n";
        let endless = [b'+'; 64 << 10];
        let no_key = b"*2\r\n$1\r\n0\r\n*1\r\n:7\r\n";
        assert!(
            resp.answer(&mut BytesMut::from(&no_key[..]), Asked::Scan)
                .is_err()
        );
        for bad in [&b"?\r\n"[..], b"\n", b"$x\r\n", huge, &endless] {
            assert!(resp.answer(&mut BytesMut::from(bad), Asked::Read).is_err());
        }
    }
}
