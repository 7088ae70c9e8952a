//! Torc over HTTP/1.1 with values in raw form.

use base64::Engine as _;
use bytes::{Buf, Bytes, BytesMut};
use serde_json::Value;

use super::{
    ANSWER_BYTES_MAX, Answer, Asked, Entry, Levels, ProtocolError, Request, decimal, length,
};
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
            add_query(&mut query, "timeout_ms", levels.timeout_ms.to_string());
            query
        };
        Self {
            keyspace: levels.keyspace.clone(),
            read_query: query("r", &levels.r),
            write_query: query("w", &levels.w),
        }
    }

    pub fn request(&self, out: &mut BytesMut, request: &Request<'_>) {
        match request {
            Request::Read(key) => {
                self.head(out, "GET", key, &self.read_query);
                out.extend_from_slice(b"Accept: application/octet-stream\r\n\r\n");
            }
            Request::Write {
                key,
                value,
                context,
                ttl_seconds,
            } => {
                let mut query = self.write_query.clone();
                if let Some(seconds) = ttl_seconds {
                    add_query(&mut query, "ttl_seconds", seconds.to_string());
                }
                self.head(out, "PUT", key, &query);
                out.extend_from_slice(
                    b"Content-Type: application/octet-stream\r\nPrefer: return=minimal\r\n",
                );
                add_context(out, *context);
                out.extend_from_slice(b"Content-Length: ");
                decimal(out, value.len());
                out.extend_from_slice(b"\r\n\r\n");
                out.extend_from_slice(value);
            }
            Request::Delete { key, context } => {
                self.head(out, "DELETE", key, &self.write_query);
                add_context(out, *context);
                out.extend_from_slice(b"\r\n");
            }
            Request::Scan { cursor, limit } => {
                let mut query = self.read_query.clone();
                add_query(&mut query, "limit", limit.to_string());
                add_query(&mut query, "values", "true");
                if let Some(cursor) = cursor {
                    add_query(&mut query, "cursor", cursor);
                }
                self.head(out, "GET", b"", &query);
                out.extend_from_slice(b"\r\n");
            }
            Request::ReadMany(_) => unreachable!("not measured over HTTP; refused at the start"),
        }
    }

    /// The request line and the headers of every request; an empty key is the list of keys.
    fn head(&self, out: &mut BytesMut, method: &str, key: &[u8], query: &str) {
        let path = key_path(self.keyspace.as_deref(), key);
        let path = if key.is_empty() {
            path.trim_end_matches('/')
        } else {
            &path
        };
        for part in [method, " ", path, query, " HTTP/1.1\r\nHost: torc\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
    }

    pub fn answer(
        &self,
        input: &mut BytesMut,
        asked: Asked,
    ) -> Result<Option<Answer>, ProtocolError> {
        let Some(message) = message(input)? else {
            return Ok(None);
        };
        if asked == Asked::Scan && message.status == 200 {
            return page(&message.body).map(Some);
        }
        answer_of(message.status, message.version, message.body).map(Some)
    }
}

/// An HTTP answer with the parts that matter here.
pub struct Message {
    pub status: u16,
    pub version: Option<Bytes>,
    pub body: Bytes,
}

/// Takes one whole answer off the front of `input`, with a length or in chunks.
pub fn message(input: &mut BytesMut) -> Result<Option<Message>, ProtocolError> {
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
    let version = header("x-torc-version").map(Bytes::copy_from_slice);
    if header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case(b"chunked")) {
        let Some((body, end)) = chunks(input, head)? else {
            return Ok(None);
        };
        input.advance(end);
        return Ok(Some(Message {
            status,
            version,
            body: body.into(),
        }));
    }
    let length = match header("content-length") {
        None => 0,
        Some(text) => length(text.trim_ascii())?,
    };
    if input.len() < head + length {
        return Ok(None);
    }
    input.advance(head);
    let body = input.split_to(length).freeze();
    Ok(Some(Message {
        status,
        version,
        body,
    }))
}

/// The body in chunks from `at` on, and where it ends.
fn chunks(input: &[u8], mut at: usize) -> Result<Option<(Vec<u8>, usize)>, ProtocolError> {
    let mut body = Vec::new();
    loop {
        let parsed = httparse::parse_chunk_size(&input[at..])
            .map_err(|_| ProtocolError("HTTP: a bad chunk".into()))?;
        let httparse::Status::Complete((head, size)) = parsed else {
            return Ok(None);
        };
        let start = at + head;
        let size = usize::try_from(size)
            .ok()
            .filter(|size| *size <= ANSWER_BYTES_MAX)
            .ok_or_else(|| ProtocolError(format!("HTTP: a chunk of {size}")))?;
        // Each chunk ends with an empty line, the last, empty one too (no trailers are sent).
        let Some(chunk) = input.get(start..start + size + 2) else {
            return Ok(None);
        };
        body.extend_from_slice(&chunk[..size]);
        at = start + size + 2;
        if size == 0 {
            return Ok(Some((body, at)));
        }
    }
}

/// Appends a POST.
pub fn post(out: &mut BytesMut, path: &str, content_type: &str, body: &[u8]) {
    for part in [
        "POST ",
        path,
        " HTTP/1.1\r\nHost: server\r\nContent-Type: ",
        content_type,
        "\r\nContent-Length: ",
    ] {
        out.extend_from_slice(part.as_bytes());
    }
    decimal(out, body.len());
    out.extend_from_slice(b"\r\n\r\n");
    out.extend_from_slice(body);
}

fn add_context(out: &mut BytesMut, context: Option<&[u8]>) {
    if let Some(context) = context {
        out.extend_from_slice(b"X-Torc-Context: ");
        out.extend_from_slice(context);
        out.extend_from_slice(b"\r\n");
    }
}

fn page(body: &[u8]) -> Result<Answer, ProtocolError> {
    let bad = |what: &str| ProtocolError(format!("a page: {what}"));
    let document: Value = serde_json::from_slice(body).map_err(|error| bad(&error.to_string()))?;
    let keys = document.get("keys").and_then(Value::as_array);
    let entry = |listed: &Value| {
        let key = match listed {
            Value::String(key) => Bytes::copy_from_slice(key.as_bytes()),
            listed => bytes_of(listed, "key", "encoding")?,
        };
        let values = match listed.get("siblings").and_then(Value::as_array) {
            Some(siblings) => values_of(siblings)?,
            None if listed.get("value").is_none() => Vec::new(),
            None => vec![bytes_of(listed, "value", "value_encoding")?],
        };
        Ok(Entry { key, values })
    };
    let cursor = document.get("cursor").and_then(Value::as_str);
    Ok(Answer::Page {
        entries: keys
            .ok_or_else(|| bad("no keys"))?
            .iter()
            .map(entry)
            .collect::<Result<_, _>>()?,
        cursor: cursor.map(|cursor| Bytes::copy_from_slice(cursor.as_bytes())),
    })
}

fn answer_of(status: u16, version: Option<Bytes>, body: Bytes) -> Result<Answer, ProtocolError> {
    Ok(match status {
        // A write may be answered with a body or without one, and reads always have one; the
        // caller knows which of the two it asked for.
        200 => Answer::Value {
            value: body,
            version,
        },
        204 => Answer::Written(version),
        300 => Answer::Siblings {
            values: siblings(&body)?,
            version,
        },
        _ => failure_of(status, version, &body),
    })
}

/// What a status says that is none of the good ones.
fn failure_of(status: u16, version: Option<Bytes>, body: &[u8]) -> Answer {
    let error: Option<Value> = serde_json::from_slice(body).ok();
    let field = |name: &str| error.as_ref()?.pointer(&format!("/error/{name}"));
    // Where something else than the key is missing, such as its keyspace, neither was a read answered nor a write
    // carried out.
    let code = field("code").and_then(Value::as_str);
    if status == 404 && code.is_none_or(|code| code == "not_found") {
        return Answer::Missing { version };
    }
    let words = format!(
        "{status} {}",
        field("message").map_or_else(String::new, Value::to_string)
    );
    // A server that says nothing about the outcome may have done anything.
    let in_doubt = field("in_doubt").and_then(Value::as_bool);
    if in_doubt.unwrap_or(status >= 500) {
        Answer::InDoubt(words)
    } else {
        Answer::Refused(words)
    }
}

fn siblings(body: &[u8]) -> Result<Vec<Bytes>, ProtocolError> {
    let bad = |what: &str| ProtocolError(format!("siblings: {what}"));
    let document: Value = serde_json::from_slice(body).map_err(|error| bad(&error.to_string()))?;
    let list = document.get("siblings").and_then(Value::as_array);
    values_of(list.ok_or_else(|| bad("no list"))?)
}

fn values_of(siblings: &[Value]) -> Result<Vec<Bytes>, ProtocolError> {
    siblings
        .iter()
        .map(|sibling| bytes_of(sibling, "value", "encoding"))
        .collect()
}

/// The bytes of a field of JSON, which are text unless the field `encoding` says otherwise.
fn bytes_of(object: &Value, name: &str, encoding: &str) -> Result<Bytes, ProtocolError> {
    let bad = |what: &str| ProtocolError(format!("the field {name}: {what}"));
    let text = object
        .get(name)
        .and_then(Value::as_str)
        .ok_or_else(|| bad("no text"))?;
    match object.get(encoding).and_then(Value::as_str) {
        Some("base64") => base64::engine::general_purpose::STANDARD
            .decode(text)
            .map(Bytes::from)
            .map_err(|error| bad(&error.to_string())),
        _ => Ok(Bytes::copy_from_slice(text.as_bytes())),
    }
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
            login: None,
        })
    }

    #[test]
    fn requests_are_complete_and_pipelined() {
        let mut out = BytesMut::new();
        http().request(&mut out, &Request::Read(b"k1"));
        let write = Request::Write {
            key: b"k2",
            value: b"value",
            context: Some(b"ctx"),
            ttl_seconds: None,
        };
        http().request(&mut out, &write);
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
            assert_eq!(
                http().answer(&mut input, Asked::Read).unwrap(),
                None,
                "cut at {cut}"
            );
            assert_eq!(
                input.len(),
                cut,
                "nothing is taken from an incomplete answer"
            );
        }
        let mut input = BytesMut::from(&bytes[..]);
        let first = http().answer(&mut input, Asked::Read).unwrap();
        assert_eq!(
            first,
            Some(Answer::Value {
                value: Bytes::from_static(b"value"),
                version: None
            })
        );
        let second = http().answer(&mut input, Asked::Read).unwrap();
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
        let nowhere = answer(
            404,
            r#"{"error":{"code":"unknown_keyspace","message":"no keyspace \"k\"","in_doubt":false}}"#,
        );
        assert!(matches!(nowhere, Answer::Refused(words) if words.contains("no keyspace")));
        for missing in ["", r#"{"error":{"code":"not_found","in_doubt":false}}"#] {
            assert_eq!(answer(404, missing), Answer::Missing { version: None });
        }
    }

    fn entry(key: &'static [u8], values: &[&'static [u8]]) -> Entry {
        Entry {
            key: Bytes::from_static(key),
            values: values
                .iter()
                .map(|value| Bytes::from_static(value))
                .collect(),
        }
    }

    #[test]
    fn pages_and_chunks_are_taken_whole() {
        let body = r#"{"keys":["a",{"key":"Yg==","encoding":"base64","value":"v"},
            {"key":"c","value":"/w==","value_encoding":"base64"},
            {"key":"d","value":"v","siblings":[{"value":"v"},{"value":"/w==","encoding":"base64"}]}
            ],"cursor":"c1"}"#;
        let (one, two) = body.split_at(7);
        let bytes = format!(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n{one}\r\n{:x}\r\n{two}\r\n\
             0\r\n\r\n",
            two.len()
        );
        for cut in 0..bytes.len() {
            let mut input = BytesMut::from(&bytes.as_bytes()[..cut]);
            assert_eq!(
                http().answer(&mut input, Asked::Scan).unwrap(),
                None,
                "{cut}"
            );
        }
        let mut input = BytesMut::from(bytes.as_bytes());
        let page = http().answer(&mut input, Asked::Scan).unwrap();
        assert_eq!(
            page,
            Some(Answer::Page {
                entries: vec![
                    entry(b"a", &[]),
                    entry(b"b", &[b"v"]),
                    entry(b"c", &[&[0xff]]),
                    entry(b"d", &[b"v", &[0xff]]),
                ],
                cursor: Some(Bytes::from_static(b"c1")),
            })
        );
        assert!(input.is_empty());
    }

    #[test]
    fn absurd_lengths_are_refused() {
        for head in [
            "Content-Length: 18446744073709551615",
            "Transfer-Encoding: chunked",
        ] {
            let bytes = format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\nffffffffffffffff\r\n");
            let mut input = BytesMut::from(bytes.as_bytes());
            assert!(http().answer(&mut input, Asked::Read).is_err(), "{head}");
        }
    }
}
