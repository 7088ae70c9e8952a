//! HTTP answers, and their bytes.
//!
//! On the path: a handler returns a [`Response`]; the connection writes it behind the answers before
//! it. Head and small bodies are copied together, so that everything of a tick leaves in one send;
//! large bodies are sent from where they are.
//!
//! Invariant: whatever is put into a header is free of control characters (contexts and codes are
//! ours; nothing that a client sent is echoed in a head).

use bytes::{BufMut, Bytes, BytesMut};
use torc_cluster::api::Failure;

use crate::http::json;
use crate::output::Output;

/// What a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentType {
    /// `application/json`.
    Json,
    /// `application/octet-stream`.
    Octets,
    /// Prometheus' text format.
    Metrics,
    /// `text/html`.
    Html,
    /// No body.
    None,
}

impl ContentType {
    fn header(self) -> &'static [u8] {
        match self {
            ContentType::Json => b"Content-Type: application/json\r\n",
            ContentType::Octets => b"Content-Type: application/octet-stream\r\n",
            ContentType::Metrics => b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n",
            ContentType::Html => b"Content-Type: text/html; charset=utf-8\r\n",
            ContentType::None => b"",
        }
    }
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// What the body is.
    pub content_type: ContentType,
    /// The body.
    pub body: Bytes,
    /// `X-Torc-Version`.
    pub version: Option<String>,
    /// `X-Torc-Session`.
    pub session: Option<String>,
    /// `Retry-After`, in milliseconds; rounded up to seconds.
    pub retry_after_ms: Option<u32>,
    /// `Allow`, for 405.
    pub allow: Option<&'static str>,
}

impl Response {
    /// An answer without a body.
    pub fn empty(status: u16) -> Self {
        Self {
            status,
            content_type: ContentType::None,
            body: Bytes::new(),
            version: None,
            session: None,
            retry_after_ms: None,
            allow: None,
        }
    }

    /// An answer with a body.
    pub fn with_body(status: u16, content_type: ContentType, body: impl Into<Bytes>) -> Self {
        Self {
            content_type,
            body: body.into(),
            ..Self::empty(status)
        }
    }

    /// An answer in JSON.
    pub fn json(status: u16, body: impl Into<Bytes>) -> Self {
        Self::with_body(status, ContentType::Json, body)
    }

    /// Names the version that a successful answer carries.
    #[must_use]
    pub fn version(mut self, version: String) -> Self {
        self.version = Some(version);
        self
    }

    /// Appends the answer's bytes. `head_only` leaves the body out but says its length (HEAD).
    pub fn write(&self, out: &mut Output, close: bool, head_only: bool) {
        let head = out.buffer();
        head.reserve(256);
        head.put_slice(b"HTTP/1.1 ");
        head.put_slice(itoa::Buffer::new().format(self.status).as_bytes());
        head.put_u8(b' ');
        head.put_slice(reason(self.status).as_bytes());
        head.put_slice(b"\r\n");
        head.put_slice(self.content_type.header());
        // A 204 has no length (RFC 9110, 8.6).
        if self.status != 204 {
            head.put_slice(b"Content-Length: ");
            head.put_slice(itoa::Buffer::new().format(self.body.len()).as_bytes());
            head.put_slice(b"\r\n");
        }
        if let Some(version) = &self.version {
            put_header(head, "X-Torc-Version", version);
        }
        if let Some(session) = &self.session {
            put_header(head, "X-Torc-Session", session);
        }
        if let Some(after_ms) = self.retry_after_ms {
            let seconds = after_ms.div_ceil(1000).max(1);
            put_header(head, "Retry-After", itoa::Buffer::new().format(seconds));
        }
        if let Some(allow) = self.allow {
            put_header(head, "Allow", allow);
        }
        if close {
            put_header(head, "Connection", "close");
        }
        head.put_slice(b"\r\n");
        if !head_only {
            out.append(self.body.clone());
        }
    }
}

fn put_header(head: &mut BytesMut, name: &str, value: &str) {
    debug_assert!(!value.bytes().any(|byte| byte.is_ascii_control()));
    head.put_slice(name.as_bytes());
    head.put_slice(b": ");
    head.put_slice(value.as_bytes());
    head.put_slice(b"\r\n");
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        300 => "Multiple Choices",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        422 => "Unprocessable Content",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        507 => "Insufficient Storage",
        _ => "Unknown",
    }
}

/// A refusal or failure, before it is written as JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Status code.
    pub status: u16,
    /// Name of the kind.
    pub code: &'static str,
    /// One sentence for people.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Whether a write may have happened all the same.
    pub in_doubt: bool,
    /// When to try again, in milliseconds; 0 = no advice.
    pub retry_after_ms: u32,
    /// The methods that the path takes, when the request used another.
    pub allow: Option<&'static str>,
}

impl Problem {
    /// A fault of the request.
    pub fn new(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            retryable: false,
            in_doubt: false,
            retry_after_ms: 0,
            allow: None,
        }
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "invalid_request", message)
    }

    /// 404 of a path that nothing serves.
    pub fn no_route() -> Self {
        Self::new(404, "no_such_route", "nothing is served at this path")
    }

    /// 404 of a key without a live value.
    pub fn no_such_key() -> Self {
        Self::new(404, "not_found", "there is no value under this key")
    }

    /// 405.
    pub fn method_not_allowed(allow: &'static str) -> Self {
        Self {
            allow: Some(allow),
            ..Self::new(
                405,
                "method_not_allowed",
                format!("this path takes {allow}"),
            )
        }
    }

    /// 408.
    pub fn too_slow() -> Self {
        Self {
            retryable: true,
            ..Self::new(
                408,
                "request_timeout",
                "the request took too long to arrive",
            )
        }
    }

    /// 431.
    pub fn head_too_large() -> Self {
        let limit = crate::limits::HEAD_BYTES_MAX;
        let headers = crate::limits::HEADERS_MAX;
        Self::new(
            431,
            "head_too_large",
            format!("the request head is above {limit} bytes or {headers} headers"),
        )
    }

    /// 413.
    pub fn body_too_large(limit: usize) -> Self {
        Self::new(413, "too_large", format!("the body is above {limit} bytes"))
    }

    /// 417.
    pub fn expectation_failed() -> Self {
        Self::new(
            417,
            "expectation_failed",
            "the only expectation that is understood is 100-continue",
        )
    }

    /// 503 of a node that does not serve yet, or any more.
    pub fn not_ready(message: impl Into<String>) -> Self {
        Self {
            retryable: true,
            retry_after_ms: torc_cluster::api::RETRY_AFTER_MS,
            ..Self::new(503, "not_ready", message)
        }
    }

    /// 503 of a node of which a part has failed: asking again does not help.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(503, "failed", message)
    }

    /// 503 of a bound of this node.
    pub fn overloaded(message: impl Into<String>) -> Self {
        Self {
            retryable: true,
            retry_after_ms: torc_cluster::api::RETRY_AFTER_MS,
            ..Self::new(503, "overloaded", message)
        }
    }

    /// The error object: `{"code": …, "message": …, "retryable": …, "in_doubt": …}`.
    pub fn write_object(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"code\":");
        json::write_string(out, self.code);
        out.extend_from_slice(b",\"message\":");
        json::write_string(out, &self.message);
        out.extend_from_slice(b",\"retryable\":");
        json::write_bool(out, self.retryable);
        out.extend_from_slice(b",\"in_doubt\":");
        json::write_bool(out, self.in_doubt);
        out.push(b'}');
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        Self {
            status: failure.code.http_status(),
            code: failure.code.name(),
            message: failure.message,
            retryable: failure.retryable,
            in_doubt: failure.in_doubt,
            retry_after_ms: failure.retry_after_ms,
            allow: None,
        }
    }
}

impl From<Problem> for Response {
    fn from(problem: Problem) -> Self {
        let mut body = Vec::with_capacity(128 + problem.message.len());
        body.extend_from_slice(b"{\"error\":");
        problem.write_object(&mut body);
        body.push(b'}');
        let mut response = Response::json(problem.status, body);
        response.allow = problem.allow;
        // Every 503 says when to come back: clients without the advice hammer.
        if problem.status == 503 || problem.retry_after_ms > 0 {
            response.retry_after_ms = Some(problem.retry_after_ms);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use torc_cluster::api::FailureCode;

    use super::*;

    fn text(response: &Response, close: bool, head_only: bool) -> String {
        let mut out = Output::default();
        response.write(&mut out, close, head_only);
        String::from_utf8(out.to_vec()).expect("ASCII")
    }

    #[test]
    fn an_answer_is_written_to_the_byte() {
        let response = Response::json(200, "{}").version("abc".into());
        assert_eq!(
            text(&response, false, false),
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\
             X-Torc-Version: abc\r\n\r\n{}"
        );
        assert!(
            text(&response, false, true)
                .ends_with("Content-Length: 2\r\nX-Torc-Version: abc\r\n\r\n")
        );
        assert_eq!(
            text(&Response::empty(204), true, false),
            "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
        );
    }

    #[test]
    fn a_failure_says_all_four_things_and_when_to_come_back() {
        let failure = Failure::refused(FailureCode::QuorumNotMet, "1 of 2 replicas \"answered\"");
        let response = Response::from(Problem::from(failure.in_doubt()));
        assert_eq!(response.status, 503);
        assert_eq!(
            &response.body[..],
            br#"{"error":{"code":"quorum_not_met","message":"1 of 2 replicas \"answered\"","retryable":true,"in_doubt":true}}"#
        );
        assert!(text(&response, false, false).contains("Retry-After: 1\r\n"));
    }
}
