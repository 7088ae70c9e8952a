//! A client of one node's HTTP interface, for the command line. Blocking, one request at a time.
//!
//! No request waits for ever: a node that is stopped or stuck keeps its connections open and answers
//! nothing on them.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use serde_json::Value;

use crate::failure::Failure;

/// What a key in a path leaves unencoded. The dot is encoded, so that the keys `.` and `..` reach
/// the server as they are.
const KEY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'~');

/// How long connecting may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// How long a node may be silent that does nothing long.
const SILENT_AT_MOST: Duration = Duration::from_secs(30);
/// How often a node that carries out a long order is asked whether it is still alive.
const ALIVE_EVERY: Duration = Duration::from_secs(5);

/// One node's HTTP endpoint.
#[derive(Clone)]
pub struct Endpoint {
    base: String,
    agent: ureq::Agent,
    /// How long it may be silent; `None` for as long as it likes.
    patience: Option<Duration>,
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
            // 300 is how a node answers with siblings.
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_WITHIN))
            .build()
            .new_agent();
        Ok(Self {
            base: base.into(),
            agent,
            patience: Some(SILENT_AT_MOST),
        })
    }

    /// The same endpoint, which may be silent for `patience`.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self {
            patience: Some(patience),
            ..self
        }
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
        let is_read = request.method == "GET";
        let http = self
            .agent
            .configure_request(http)
            .timeout_per_read(self.patience)
            .timeout_per_write(self.patience)
            .build();
        let mut response = self
            .agent
            .run(http)
            .map_err(|error| self.silent(&error, is_read))?;
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
            .map_err(|error| match error {
                ureq::Error::Timeout(_) => self.silent(&error, is_read),
                _ => Failure::new(format!("{}: the answer broke off: {error}", self.base)),
            })?;
        Ok(Answer {
            status,
            version,
            body,
        })
    }

    /// Why nothing came back.
    fn silent(&self, error: &ureq::Error, is_read: bool) -> Failure {
        let base = &self.base;
        let ureq::Error::Timeout(timeout) = error else {
            return Failure::new(format!(
                "{base}: {error}; is a node running there? (`torc dev` starts three)"
            ));
        };
        if matches!(timeout, ureq::Timeout::Connect) {
            return Failure::new(format!(
                "{base}: no connection within {} s; is a node running there?",
                CONNECT_WITHIN.as_secs()
            ));
        }
        let patience = self.patience.unwrap_or_default().as_secs_f64();
        let doubt = match is_read {
            true => "",
            false => "; in doubt: it may have been applied",
        };
        Failure::new(format!(
            "{base}: no answer within {patience} s: the node there is stopped, stuck or overloaded; ask \
             another one{doubt}"
        ))
    }

    /// As [`Endpoint::expect`] for 2xx, of an order that may take hours: waits for as long as the node
    /// is alive.
    pub fn expect_long(&self, request: Request<'static>) -> Result<Answer, Failure> {
        let (answered, answer) = mpsc::channel();
        let patient = Self {
            patience: None,
            ..self.clone()
        };
        thread::spawn(move || {
            // Nobody listens any more when the node was given up.
            answered.send(patient.expect(request, &[])).ok();
        });
        loop {
            match answer.recv_timeout(ALIVE_EVERY) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) => {
                    let health = Request {
                        method: "GET",
                        path: "/health".into(),
                        ..Request::default()
                    };
                    if let Err(failure) = self.send(health) {
                        return Err(Failure::new(format!(
                            "{failure}; the order is in doubt: it may be carried out"
                        )));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::new("the request ended without an outcome"));
                }
            }
        }
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
pub fn add_query(query: &mut String, name: &str, value: impl AsRef<[u8]>) {
    query.push(if query.is_empty() { '?' } else { '&' });
    query.push_str(name);
    query.push('=');
    query.extend(percent_encode(value.as_ref(), KEY));
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    /// An endpoint that answers one request with `answer` and keeps its connection open.
    fn answering(answer: &'static str) -> Endpoint {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            while stream.read(&mut request).unwrap_or(0) > 0 {
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        Endpoint::new(&url).unwrap()
    }

    fn read() -> Request<'static> {
        Request {
            method: "GET",
            path: "/v1/keys/k".into(),
            ..Request::default()
        }
    }

    #[test]
    fn siblings_are_an_answer_and_no_redirect() {
        let endpoint = answering(
            "HTTP/1.1 300 Multiple Choices\r\nX-Torc-Version: v\r\nContent-Length: 2\r\n\r\n{}",
        );
        let answer = endpoint.expect(read(), &[300]).unwrap();
        assert_eq!((answer.status, &answer.body[..]), (300, &b"{}"[..]));
        assert_eq!(answer.version.as_deref(), Some("v"));
    }

    #[test]
    fn a_node_that_is_silent_is_given_up() {
        for answer in ["", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"] {
            let endpoint = answering(answer).with_patience(Duration::from_millis(50));
            let failure = endpoint.send(read()).err().unwrap().to_string();
            assert!(failure.contains("no answer within 0.05 s"), "{failure}");
            assert!(!failure.contains("in doubt"), "{failure}");
        }
        let endpoint = answering("").with_patience(Duration::from_millis(50));
        let order = Request {
            method: "PUT",
            body: b"value".to_vec(),
            ..read()
        };
        let failure = endpoint.send(order).err().unwrap().to_string();
        assert!(failure.contains("in doubt"), "{failure}");
    }

    #[test]
    fn a_long_order_is_answered_when_it_is_done() {
        let endpoint = answering("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
        assert_eq!(endpoint.expect_long(read()).unwrap().body, b"{}");
        let endpoint = answering("HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno");
        let failure = endpoint.expect_long(read()).err().unwrap().to_string();
        assert!(failure.contains("503"), "{failure}");
    }

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
