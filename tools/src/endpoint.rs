//! A client of one node's HTTP interface, for the command line. Blocking, one request at a time.

use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use serde_json::Value;

use crate::failure::Failure;

/// What a key in a path leaves unencoded. The dot is encoded, so that the keys `.` and `..` reach
/// the server as they are.
const KEY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'~');

/// One node's HTTP endpoint.
pub struct Endpoint {
    base: String,
    agent: ureq::Agent,
}

/// An answer with its status.
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The `X-Torc-Version` header.
    pub version: Option<String>,
    /// The body as it came.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Result<Value, Failure> {
        serde_json::from_slice(&self.body)
            .map_err(|error| Failure::new(format!("the answer is not JSON: {error}")))
    }
}

/// A request to be sent.
#[derive(Default)]
pub struct Request<'a> {
    /// `GET`, `PUT`, `POST` or `DELETE`.
    pub method: &'a str,
    /// Path with query, from `/`.
    pub path: String,
    /// Header names and values.
    pub headers: Vec<(&'a str, String)>,
    /// Body; empty for none.
    pub body: Vec<u8>,
}

impl Endpoint {
    /// An endpoint at `url`, such as `http://127.0.0.1:7480`. Nothing is sent yet.
    pub fn new(url: &str) -> Result<Self, Failure> {
        let base = url.trim_end_matches('/');
        if !base.starts_with("http://") {
            return Err(Failure::new(format!(
                "endpoint {url}: expected http://HOST:PORT of a node's HTTP listener"
            )));
        }
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(5)))
            .build()
            .new_agent();
        Ok(Self {
            base: base.into(),
            agent,
        })
    }

    /// Sends one request and returns whatever status comes back; fails when nothing comes back.
    pub fn send(&self, request: Request<'_>) -> Result<Answer, Failure> {
        let mut builder = ureq::http::Request::builder()
            .method(request.method)
            .uri(format!("{}{}", self.base, request.path));
        for (name, value) in &request.headers {
            builder = builder.header(*name, value);
        }
        let http = builder
            .body(request.body)
            .map_err(|error| Failure::new(format!("cannot form the request: {error}")))?;
        let mut response = self.agent.run(http).map_err(|error| {
            Failure::new(format!(
                "{}: {error}; is a node running there? (`torc dev` starts three)",
                self.base
            ))
        })?;
        let version = response
            .headers()
            .get("x-torc-version")
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned);
        let status = response.status().as_u16();
        let body = response
            .body_mut()
            .with_config()
            .limit(256 << 20)
            .read_to_vec()
            .map_err(|error| {
                Failure::new(format!("{}: the answer broke off: {error}", self.base))
            })?;
        Ok(Answer {
            status,
            version,
            body,
        })
    }

    /// Sends one request and fails, with the server's own words, unless the status is 2xx or
    /// `also`.
    pub fn expect(&self, request: Request<'_>, also: &[u16]) -> Result<Answer, Failure> {
        let answer = self.send(request)?;
        if (200..300).contains(&answer.status) || also.contains(&answer.status) {
            return Ok(answer);
        }
        Err(Failure::from_answer(answer.status, &answer.body))
    }

    /// GET of a JSON document.
    pub fn get_json(&self, path: &str) -> Result<Value, Failure> {
        self.expect(
            Request {
                method: "GET",
                path: path.into(),
                ..Request::default()
            },
            &[],
        )?
        .json()
    }
}

/// `/v1/keys/{key}`, or the same of a named keyspace, with the key percent-encoded.
pub fn key_path(keyspace: Option<&str>, key: &[u8]) -> String {
    let key = percent_encode(key, KEY);
    match keyspace {
        None => format!("/v1/keys/{key}"),
        Some(name) => format!(
            "/v1/keyspaces/{}/keys/{key}",
            percent_encode(name.as_bytes(), KEY)
        ),
    }
}

/// Appends `name=value` to a query under construction (`""` at first).
pub fn add_query(query: &mut String, name: &str, value: &str) {
    query.push(if query.is_empty() { '?' } else { '&' });
    query.push_str(name);
    query.push('=');
    query.extend(percent_encode(value.as_bytes(), KEY));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_reach_the_server_byte_by_byte() {
        assert_eq!(key_path(None, b"a/b c"), "/v1/keys/a%2Fb%20c");
        assert_eq!(key_path(None, b".."), "/v1/keys/%2E%2E");
        assert_eq!(key_path(Some("ks"), &[0xff]), "/v1/keyspaces/ks/keys/%FF");
    }

    #[test]
    fn queries_are_joined_and_encoded() {
        let mut query = String::new();
        add_query(&mut query, "prefix", "a&b");
        add_query(&mut query, "limit", "7");
        assert_eq!(query, "?prefix=a%26b&limit=7");
    }
}
