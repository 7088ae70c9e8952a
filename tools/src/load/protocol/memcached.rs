//! memcached's meta commands: `mg`, `ms`, `md`. Answers come in order, misses included.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Buf, BytesMut};

use super::{Answer, Asked, ProtocolError, Request, decimal, length, line_end};

/// memcached has no settings for each request.
#[derive(Clone, Debug)]
pub struct Memcached;

impl Memcached {
    /// A command that does nothing: its answer says that the server serves a connection.
    pub fn greeting(&self, out: &mut BytesMut) {
        out.extend_from_slice(b"mn\r\n");
    }

    /// Whether that has come.
    pub fn greeted(&self, input: &mut BytesMut) -> Result<bool, ProtocolError> {
        let Some(end) = line_end(input)? else {
            return Ok(false);
        };
        let line = input.split_to(end);
        match &line[..] {
            b"MN\r\n" => Ok(true),
            other => Err(ProtocolError(format!(
                "{} (meta commands are those of memcached 1.6 and later)",
                String::from_utf8_lossy(other).trim_end()
            ))),
        }
    }

    pub fn request(&self, out: &mut BytesMut, request: &Request<'_>) {
        let mut get = |key: &[u8]| {
            out.extend_from_slice(b"mg ");
            out.extend_from_slice(key);
            out.extend_from_slice(b" v\r\n");
        };
        match request {
            Request::Read(key) => get(key),
            Request::ReadMany(keys) => keys.iter().for_each(|key| get(key)),
            Request::Write {
                key,
                value,
                ttl_seconds,
                ..
            } => {
                out.extend_from_slice(b"ms ");
                out.extend_from_slice(key);
                out.extend_from_slice(b" ");
                decimal(out, value.len());
                if let Some(seconds) = ttl_seconds {
                    out.extend_from_slice(b" T");
                    decimal(out, expiry(*seconds));
                }
                out.extend_from_slice(b"\r\n");
                out.extend_from_slice(value);
                out.extend_from_slice(b"\r\n");
            }
            Request::Delete { key, .. } => {
                out.extend_from_slice(b"md ");
                out.extend_from_slice(key);
                out.extend_from_slice(b"\r\n");
            }
            Request::Scan { .. } => unreachable!("memcached lists no keys; refused at the start"),
        }
    }

    pub fn answer(
        &self,
        input: &mut BytesMut,
        asked: Asked,
    ) -> Result<Option<Answer>, ProtocolError> {
        let Asked::ReadMany(count) = asked else {
            return one(input);
        };
        // The answers to a read of several keys come one by one; all must be there.
        let mut ahead = 0;
        for _ in 0..count {
            match end_of(&input[ahead..])? {
                Some(end) => ahead += end,
                None => return Ok(None),
            }
        }
        let answers = (0..count).filter_map(|_| one(input).transpose());
        Ok(Some(Answer::Many(answers.collect::<Result<_, _>>()?)))
    }
}

/// What memcached is told of a value that lives so long: seconds, and beyond 30 days the Unix time of
/// its end, since it takes larger numbers for one.
fn expiry(seconds: u32) -> u64 {
    const RELATIVE_MAX: u32 = 30 * 24 * 3600;
    if seconds <= RELATIVE_MAX {
        return u64::from(seconds);
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs()) + u64::from(seconds)
}

/// The first line without its end, and where the answer ends.
fn end_of(input: &[u8]) -> Result<Option<usize>, ProtocolError> {
    let Some(after) = line_end(input)? else {
        return Ok(None);
    };
    let end = match input.strip_prefix(b"VA ") {
        None => after,
        Some(rest) => after + value_length(rest)? + 2,
    };
    Ok((input.len() >= end).then_some(end))
}

fn value_length(text: &[u8]) -> Result<usize, ProtocolError> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    length(&text[..digits])
}

fn one(input: &mut BytesMut) -> Result<Option<Answer>, ProtocolError> {
    let Some(end) = end_of(input)? else {
        return Ok(None);
    };
    if input.starts_with(b"VA ") {
        let length = value_length(&input[3..])?;
        input.advance(end - length - 2);
        let value = input.split_to(length).freeze();
        input.advance(2);
        return Ok(Some(Answer::Value {
            value,
            version: None,
        }));
    }
    let line = input.split_to(end).freeze();
    let answer = match line.get(..2) {
        // Nothing to delete is as good as deleted.
        Some(b"HD" | b"NF") => Answer::Written(None),
        Some(b"EN") => Answer::Missing { version: None },
        Some(b"NS") => Answer::Refused("not stored".into()),
        _ => {
            let words = String::from_utf8_lossy(&line).trim().to_owned();
            if words.starts_with("SERVER_ERROR out of memory") || words.starts_with("CLIENT_ERROR")
            {
                Answer::Refused(words)
            } else if words.starts_with("SERVER_ERROR") {
                Answer::InDoubt(words)
            } else {
                return Err(ProtocolError(format!("memcached: {words}")));
            }
        }
    };
    Ok(Some(answer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn requests_are_meta_commands() {
        let mut out = BytesMut::new();
        Memcached.request(
            &mut out,
            &Request::ReadMany(&[b"a".to_vec(), b"b".to_vec()]),
        );
        let write = Request::Write {
            key: b"k",
            value: b"va",
            context: None,
            ttl_seconds: Some(9),
        };
        Memcached.request(&mut out, &write);
        Memcached.request(
            &mut out,
            &Request::Delete {
                key: b"k",
                context: None,
            },
        );
        assert_eq!(&out[..], b"mg a v\r\nmg b v\r\nms k 2 T9\r\nva\r\nmd k\r\n");
    }

    #[test]
    fn a_long_life_is_told_as_the_time_of_its_end() {
        assert_eq!(expiry(2_592_000), 2_592_000);
        assert!(expiry(2_592_001) > 1_700_000_000 + 2_592_001);
    }

    #[test]
    fn every_kind_of_answer_is_told_apart_at_every_cut() {
        let value = |bytes: &'static [u8]| Answer::Value {
            value: Bytes::from_static(bytes),
            version: None,
        };
        let missing = Answer::Missing { version: None };
        let answers: [(&[u8], Asked, Answer); 6] = [
            (b"VA 4\r\na\r\nb\r\n", Asked::Read, value(b"a\r\nb")),
            (b"EN\r\n", Asked::Read, missing.clone()),
            (b"HD\r\n", Asked::Write, Answer::Written(None)),
            (b"NF\r\n", Asked::Delete, Answer::Written(None)),
            (
                b"SERVER_ERROR out of memory\r\n",
                Asked::Write,
                Answer::Refused("SERVER_ERROR out of memory".into()),
            ),
            (
                b"VA 1\r\nx\r\nEN\r\n",
                Asked::ReadMany(2),
                Answer::Many(vec![value(b"x"), missing]),
            ),
        ];
        for (bytes, asked, answer) in answers {
            for cut in 0..bytes.len() {
                let mut input = BytesMut::from(&bytes[..cut]);
                assert_eq!(Memcached.answer(&mut input, asked).unwrap(), None);
                assert_eq!(input.len(), cut);
            }
            let mut input = BytesMut::from(bytes);
            assert_eq!(Memcached.answer(&mut input, asked).unwrap(), Some(answer));
            assert!(input.is_empty());
        }
        let huge = b"VA 18446744073709551615\r\n";
        for bad in [&b"WHAT\r\n"[..], b"VA x\r\n", huge] {
            assert!(
                Memcached
                    .answer(&mut BytesMut::from(bad), Asked::Read)
                    .is_err()
            );
        }
    }
}
