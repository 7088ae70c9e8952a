//! etcd v3 over its HTTP gateway: JSON with keys and values in base64.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};

use super::http::{message, post};
use super::{Answer, Asked, ProtocolError, Request};

/// How etcd is read.
#[derive(Clone, Debug)]
pub struct Etcd {
    serializable: bool,
}

impl Etcd {
    /// Reads at level `one` are serializable: any member answers by itself.
    pub fn new(r: Option<&str>) -> Self {
        Self {
            serializable: matches!(r, Some("one" | "1")),
        }
    }

    pub fn request(&self, out: &mut BytesMut, request: &Request<'_>) {
        let (path, body) = match request {
            Request::Read(key) => (
                "/v3/kv/range",
                json!({"key": BASE64.encode(key), "serializable": self.serializable}),
            ),
            Request::Write { key, value, .. } => (
                "/v3/kv/put",
                json!({"key": BASE64.encode(key), "value": BASE64.encode(value)}),
            ),
            Request::Delete { key, .. } => {
                ("/v3/kv/deleterange", json!({"key": BASE64.encode(key)}))
            }
            Request::ReadMany(_) | Request::Scan { .. } => {
                unreachable!("not measured on etcd; refused at the start")
            }
        };
        post(out, path, "application/json", body.to_string().as_bytes());
    }

    pub fn answer(
        &self,
        input: &mut BytesMut,
        asked: Asked,
    ) -> Result<Option<Answer>, ProtocolError> {
        let Some(message) = message(input)? else {
            return Ok(None);
        };
        if message.status != 200 {
            let words = format!(
                "{} {}",
                message.status,
                String::from_utf8_lossy(&message.body)
            );
            return Ok(Some(if message.status < 500 {
                Answer::Refused(words)
            } else {
                Answer::InDoubt(words)
            }));
        }
        if asked != Asked::Read {
            return Ok(Some(Answer::Written(None)));
        }
        let bad = |error: &dyn std::fmt::Display| ProtocolError(format!("etcd: {error}"));
        let document: Value = serde_json::from_slice(&message.body).map_err(|error| bad(&error))?;
        let value = document.pointer("/kvs/0/value").and_then(Value::as_str);
        let Some(value) = value else {
            return Ok(Some(Answer::Missing { version: None }));
        };
        let value = BASE64.decode(value).map_err(|error| bad(&error))?;
        Ok(Some(Answer::Value {
            value: Bytes::from(value),
            version: None,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_comes_back_from_base64_and_none_is_missing() {
        let etcd = Etcd::new(None);
        let mut out = BytesMut::new();
        etcd.request(&mut out, &Request::Read(b"k"));
        let text = String::from_utf8(out.to_vec()).unwrap();
        assert!(text.starts_with("POST /v3/kv/range HTTP/1.1\r\n") && text.contains("\"aw==\""));
        let answer = |body: &str| {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let mut input = BytesMut::from((head + body).as_bytes());
            etcd.answer(&mut input, Asked::Read).unwrap().unwrap()
        };
        let found = answer(r#"{"header":{},"kvs":[{"key":"aw==","value":"dmE="}],"count":"1"}"#);
        assert!(matches!(found, Answer::Value { value, .. } if value == "va"));
        assert_eq!(
            answer(r#"{"header":{}}"#),
            Answer::Missing { version: None }
        );
    }
}
