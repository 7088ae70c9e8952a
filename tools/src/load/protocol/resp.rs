//! The Redis protocol, as far as GET and SET need it.

use bytes::{Buf, Bytes, BytesMut};

use super::{Answer, ProtocolError};

/// The Redis protocol has no settings for each request.
#[derive(Clone, Debug)]
pub struct Resp;

impl Resp {
    pub fn read(&self, out: &mut BytesMut, key: &[u8]) {
        out.extend_from_slice(b"*2\r\n$3\r\nGET\r\n");
        bulk(out, key);
    }

    pub fn write(&self, out: &mut BytesMut, key: &[u8], value: &[u8]) {
        out.extend_from_slice(b"*3\r\n$3\r\nSET\r\n");
        bulk(out, key);
        bulk(out, value);
    }

    pub fn answer(&self, input: &mut BytesMut) -> Result<Option<Answer>, ProtocolError> {
        let Some(end) = memchr::memmem::find(input, b"\r\n") else {
            return Ok(None);
        };
        let line = &input[..end];
        let Some((kind, rest)) = line.split_first() else {
            return Err(ProtocolError("RESP: an empty line".into()));
        };
        let text = String::from_utf8_lossy(rest).into_owned();
        let answer = match kind {
            b'+' => Answer::Written(None),
            b'_' => Answer::Missing { version: None },
            b'-' => error(text),
            b'$' if text == "-1" => Answer::Missing { version: None },
            b'$' => {
                let length: usize = text
                    .parse()
                    .map_err(|_| ProtocolError(format!("RESP: a bulk string of length {text}")))?;
                if input.len() < end + 2 + length + 2 {
                    return Ok(None);
                }
                input.advance(end + 2);
                let value: Bytes = input.split_to(length).freeze();
                input.advance(2);
                return Ok(Some(Answer::Values {
                    values: vec![value],
                    version: None,
                }));
            }
            other => return Err(ProtocolError(format!("RESP: a reply of type {other:#x}"))),
        };
        input.advance(end + 2);
        Ok(Some(answer))
    }
}

/// A Redis error does not say whether the write happened. Refusals before execution do.
fn error(text: String) -> Answer {
    let refused = [
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
    let mut length = itoa::Buffer::new();
    out.extend_from_slice(b"$");
    out.extend_from_slice(length.format(bytes.len()).as_bytes());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_an_array_of_bulk_strings() {
        let mut out = BytesMut::new();
        Resp.write(&mut out, b"k", b"va");
        assert_eq!(&out[..], b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$2\r\nva\r\n");
    }

    #[test]
    fn every_kind_of_reply_is_told_apart_at_every_cut() {
        let replies: [(&[u8], Answer); 5] = [
            (b"+OK\r\n", Answer::Written(None)),
            (b"$-1\r\n", Answer::Missing { version: None }),
            (b"_\r\n", Answer::Missing { version: None }),
            (
                b"$2\r\n\r\n\r\n",
                Answer::Values {
                    values: vec![Bytes::from_static(b"\r\n")],
                    version: None,
                },
            ),
            (b"-OOM no room\r\n", Answer::Refused("OOM no room".into())),
        ];
        for (bytes, answer) in replies {
            for cut in 0..bytes.len() {
                let mut input = BytesMut::from(&bytes[..cut]);
                assert_eq!(Resp.answer(&mut input).unwrap(), None);
                assert_eq!(input.len(), cut);
            }
            let mut input = BytesMut::from(bytes);
            assert_eq!(Resp.answer(&mut input).unwrap(), Some(answer));
            assert!(input.is_empty());
        }
        assert!(Resp.answer(&mut BytesMut::from(&b"?\r\n"[..])).is_err());
    }
}
