//! Torc over HTTP/1.1 with values in raw form.

use bytes::{Buf, Bytes, BytesMut};

use super::{Answer, Levels, ProtocolError};
use crate::endpoint::{add_query, key_path};

/// Headers that an answer may have at most.
const HEADERS_MAX: usize = 64;

/// The parts of a request that stay the same.
#[derive(Clone, Debug)]
pub struct Http {
    keyspace: Option<String>,
    read_query: String,
    write_query: String,
}

impl Http {
    pub fn new(levels: &Levels) -> Self {
        let query = |name: &str, level: &Option<String>| {
            let mut query = String::new();
            if let Some(level) = level {
                add_query(&mut query, name, level);
            }
            add_query(&mut query, "timeout_ms", &levels.timeout_ms.to_string());
            query
        };
        Self {
            keyspace: levels.keyspace.clone(),
            read_query: query("r", &levels.r),
            write_query: query("w", &levels.w),
        }
    }

    pub fn read(&self, out: &mut BytesMut, key: &[u8]) {
        let path = key_path(self.keyspace.as_deref(), key);
        out.extend_from_slice(b"GET ");
        out.extend_from_slice(path.as_bytes());
        out.extend_from_slice(self.read_query.as_bytes());
        out.extend_from_slice(
            b" HTTP/1.1\r\nHost: torc\r\nAccept: application/octet-stream\r\n\r\n",
        );
    }

    pub fn write(&self, out: &mut BytesMut, key: &[u8], value: &[u8], context: Option<&[u8]>) {
        let path = key_path(self.keyspace.as_deref(), key);
        out.extend_from_slice(b"PUT ");
        out.extend_from_slice(path.as_bytes());
        out.extend_from_slice(self.write_query.as_bytes());
        out.extend_from_slice(
            b" HTTP/1.1\r\nHost: torc\r\nContent-Type: application/octet-stream\r\n\
              Prefer: return=minimal\r\n",
        );
        if let Some(context) = context {
            out.extend_from_slice(b"X-Torc-Context: ");
            out.extend_from_slice(context);
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(format!("Content-Length: {}\r\n\r\n", value.len()).as_bytes());
        out.extend_from_slice(value);
    }

    pub fn answer(&self, input: &mut BytesMut) -> Result<Option<Answer>, ProtocolError> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response
            .parse(input)
            .map_err(|error| ProtocolError(format!("HTTP: {error}")))?;
        let httparse::Status::Complete(head) = parsed else {
            return Ok(None);
        };
        let status = response.code.unwrap_or(0);
        let header = |name: &str| {
            let found = response
                .headers
                .iter()
                .find(|header| header.name.eq_ignore_ascii_case(name));
            found.map(|header| header.value)
        };
        let length = match header("content-length") {
            None => 0,
            Some(text) => std::str::from_utf8(text)
                .ok()
                .and_then(|text| text.trim().parse::<usize>().ok())
                .ok_or_else(|| ProtocolError("bad Content-Length".into()))?,
        };
        let version = header("x-torc-version").map(Bytes::copy_from_slice);
        if input.len() < head + length {
            return Ok(None);
        }
        input.advance(head);
        let body = input.split_to(length).freeze();
        Ok(Some(answer_of(status, version, body)?))
    }
}

fn answer_of(status: u16, version: Option<Bytes>, body: Bytes) -> Result<Answer, ProtocolError> {
    Ok(match status {
        // A write may be answered with a body or without one, and reads always have one; the
        // caller knows which of the two it asked for.
        200 => Answer::Values {
            values: vec![body],
            version,
        },
        204 => Answer::Written(version),
        300 => Answer::Values {
            values: siblings(&body)?,
            version,
        },
        404 => Answer::Missing { version },
        _ => {
            let error: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
            let field = |name: &str| error.as_ref()?.pointer(&format!("/error/{name}")).cloned();
            let words = format!(
                "{status} {}",
                field("message").map_or_else(String::new, |message| message.to_string())
            );
            let in_doubt = field("in_doubt").and_then(|flag| flag.as_bool());
            // A server that says nothing about the outcome may have done anything.
            if in_doubt.unwrap_or(status >= 500) {
                Answer::InDoubt(words)
            } else {
                Answer::Refused(words)
            }
        }
    })
}

fn siblings(body: &[u8]) -> Result<Vec<Bytes>, ProtocolError> {
    use base64::Engine as _;
    let bad = |what: &str| ProtocolError(format!("siblings: {what}"));
    let document: serde_json::Value =
        serde_json::from_slice(body).map_err(|error| bad(&error.to_string()))?;
    let list = document
        .get("siblings")
        .and_then(serde_json::Value::as_array);
    list.ok_or_else(|| bad("no list"))?
        .iter()
        .map(|sibling| {
            let text = sibling.get("value").and_then(serde_json::Value::as_str);
            let text = text.ok_or_else(|| bad("no value"))?;
            match sibling.get("encoding").and_then(serde_json::Value::as_str) {
                Some("base64") => base64::engine::general_purpose::STANDARD
                    .decode(text)
                    .map(Bytes::from)
                    .map_err(|error| bad(&error.to_string())),
                _ => Ok(Bytes::copy_from_slice(text.as_bytes())),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http() -> Http {
        Http::new(&Levels {
            keyspace: None,
            r: Some("2".into()),
            w: Some("2".into()),
            timeout_ms: 5000,
        })
    }

    #[test]
    fn requests_are_complete_and_pipelined() {
        let mut out = BytesMut::new();
        http().read(&mut out, b"k1");
        http().write(&mut out, b"k2", b"value", Some(b"ctx"));
        let text = String::from_utf8(out.to_vec()).unwrap();
        assert!(
            text.starts_with("GET /v1/keys/k1?r=2&timeout_ms=5000 HTTP/1.1\r\n"),
            "{text}"
        );
        assert!(
            text.contains("PUT /v1/keys/k2?w=2&timeout_ms=5000 HTTP/1.1\r\n"),
            "{text}"
        );
        assert!(
            text.ends_with("X-Torc-Context: ctx\r\nContent-Length: 5\r\n\r\nvalue"),
            "{text}"
        );
    }

    #[test]
    fn an_answer_is_taken_only_when_it_is_whole() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nvalueHTTP/1.1 204 No Content\r\nX-Torc-Version: v1\r\n\r\n";
        for cut in 0..43 {
            let mut input = BytesMut::from(&bytes[..cut]);
            assert_eq!(http().answer(&mut input).unwrap(), None, "cut at {cut}");
            assert_eq!(
                input.len(),
                cut,
                "nothing is taken from an incomplete answer"
            );
        }
        let mut input = BytesMut::from(&bytes[..]);
        let first = http().answer(&mut input).unwrap();
        assert_eq!(
            first,
            Some(Answer::Values {
                values: vec![Bytes::from_static(b"value")],
                version: None
            })
        );
        let second = http().answer(&mut input).unwrap();
        assert_eq!(
            second,
            Some(Answer::Written(Some(Bytes::from_static(b"v1"))))
        );
        assert!(input.is_empty());
    }

    #[test]
    fn errors_keep_the_servers_word_on_the_outcome() {
        let answer = |status, body: &'static str| {
            answer_of(status, None, Bytes::from_static(body.as_bytes())).unwrap()
        };
        let refused = answer(503, r#"{"error":{"message":"full","in_doubt":false}}"#);
        assert!(matches!(refused, Answer::Refused(words) if words.contains("full")));
        let doubt = answer(504, r#"{"error":{"message":"late","in_doubt":true}}"#);
        assert!(matches!(doubt, Answer::InDoubt(_)));
        assert!(matches!(answer(500, "?"), Answer::InDoubt(_)));
    }
}
