//! From bytes to HTTP/1.1 requests.
//!
//! On the path: the connection appends what it received to a buffer; [`Parser::advance`] takes one
//! request at a time off its front. Heads are parsed by `httparse`, once, when they are complete.
//!
//! Invariants: memory is bounded by the limits of [`crate::limits`] whatever the peer sends; a
//! request whose length two parties could read differently (both framings, two lengths, an unknown
//! coding) is refused and the connection closed, so nothing can be smuggled past a proxy.
//!
//! What it deliberately does not do: normalise paths, decode them, or know what a route means beyond
//! how large its body may be.

use bytes::{Buf, Bytes, BytesMut};
use memchr::memmem;

use crate::http::response::Problem;
use crate::input::reserve;
use crate::limits;

/// The methods that some route knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Reads.
    Get,
    /// Reads, without the body.
    Head,
    /// Writes.
    Put,
    /// Acts.
    Post,
    /// Deletes.
    Delete,
    /// Any other.
    Other,
}

impl Method {
    /// Whether it may change something.
    pub fn is_write(self) -> bool {
        !matches!(self, Method::Get | Method::Head)
    }
}

/// The headers that some route reads. Values are trimmed slices of the head.
#[derive(Clone, Debug, Default)]
pub struct Headers {
    /// `Accept`.
    pub accept: Option<Bytes>,
    /// `Content-Type`.
    pub content_type: Option<Bytes>,
    /// `Prefer`.
    pub prefer: Option<Bytes>,
    /// `If-Match`.
    pub if_match: Option<Bytes>,
    /// `If-None-Match`.
    pub if_none_match: Option<Bytes>,
    /// `Idempotency-Key`.
    pub idempotency_key: Option<Bytes>,
    /// `X-Torc-Context`.
    pub context: Option<Bytes>,
    /// `X-Torc-Session`.
    pub session: Option<Bytes>,
    /// `Host`.
    pub host: Option<Bytes>,
    /// `Origin`: a browser sends it, and says with it whose page asks.
    pub origin: Option<Bytes>,
    /// A header that may stand only once and stood twice.
    pub repeated: Option<&'static str>,
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// Its method.
    pub method: Method,
    /// The path as it came: percent-encoded, not normalised.
    pub path: Bytes,
    /// What follows `?`, as it came; empty without one.
    pub query: Bytes,
    /// Its headers.
    pub headers: Headers,
    /// Its body, without transfer coding.
    pub body: BytesMut,
    /// Whether the connection ends after the answer.
    pub close: bool,
}

impl Request {
    /// Whether the body is bytes rather than JSON.
    pub fn is_raw(&self) -> bool {
        is_octet_stream(self.headers.content_type.as_deref())
    }
}

/// Whether a media type is `application/octet-stream`, parameters aside.
pub fn is_octet_stream(value: Option<&[u8]>) -> bool {
    let Some(value) = value else { return false };
    let end = memchr::memchr(b';', value).unwrap_or(value.len());
    value[..end]
        .trim_ascii()
        .eq_ignore_ascii_case(b"application/octet-stream")
}

/// What [`Parser::advance`] found.
#[derive(Debug)]
pub enum Step {
    /// More bytes are needed.
    More,
    /// The client waits for `100 Continue` before it sends the body.
    Continue,
    /// A whole request.
    Request(Box<Request>),
    /// The request is refused; answer, and close after that.
    Refused(Problem),
}

/// Takes requests off a connection's input.
#[derive(Debug, Default)]
pub struct Parser {
    state: State,
}

#[derive(Debug)]
enum State {
    /// Waiting for a head; the first bytes were already searched for its end.
    Head { searched: usize },
    /// Receiving a body of known length.
    Length { head: Box<Request>, missing: usize },
    /// Receiving a chunked body.
    Chunked {
        head: Box<Request>,
        limit: usize,
        next: Chunk,
    },
    /// Throwing a body away that is too large.
    Discard { missing: u64, problem: Problem },
    /// Nothing more is read.
    Closed,
}

impl Default for State {
    fn default() -> Self {
        State::Head { searched: 0 }
    }
}

/// What a chunked body continues with.
#[derive(Clone, Copy, Debug)]
enum Chunk {
    Size,
    Data { missing: usize },
    DataEnd,
    Trailer { seen: usize },
}

impl Parser {
    /// Takes the next request off the front of `input`. Call again until it says
    /// [`Step::More`]; after [`Step::Refused`] it says nothing else.
    pub fn advance(&mut self, input: &mut BytesMut) -> Step {
        loop {
            let state = std::mem::replace(&mut self.state, State::Closed);
            let (state, step) = match state {
                State::Head { searched } => read_head(input, searched),
                State::Length { head, missing } => read_length(input, head, missing),
                State::Chunked { head, limit, next } => read_chunked(input, head, limit, next),
                State::Discard { missing, problem } => discard(input, missing, problem),
                State::Closed => {
                    input.clear();
                    return Step::More;
                }
            };
            self.state = state;
            if let Some(step) = step {
                return step;
            }
        }
    }

    /// Whether a request is partly received (and so on the clock).
    pub fn in_request(&self, input: &BytesMut) -> bool {
        match self.state {
            State::Head { .. } => !input.is_empty(),
            State::Closed => false,
            _ => true,
        }
    }

    /// Whether a refused request's body is thrown away as it comes.
    pub fn is_discarding(&self) -> bool {
        matches!(self.state, State::Discard { .. })
    }
}

type Next = (State, Option<Step>);

fn refuse(problem: Problem) -> Next {
    (State::Closed, Some(Step::Refused(problem)))
}

fn bad(message: impl Into<String>) -> Next {
    refuse(Problem::bad_request(message))
}

fn read_head(input: &mut BytesMut, searched: usize) -> Next {
    // Empty lines before a request line are skipped, as RFC 9112 asks.
    if searched == 0 {
        let blank = input.iter().take_while(|b| matches!(b, b'\r' | b'\n'));
        let blank = blank.count();
        input.advance(blank);
    }
    let Some(len) = head_len(input, searched) else {
        if input.len() > limits::HEAD_BYTES_MAX {
            return refuse(Problem::head_too_large());
        }
        let searched = input.len().saturating_sub(3);
        return (State::Head { searched }, Some(Step::More));
    };
    if len > limits::HEAD_BYTES_MAX {
        return refuse(Problem::head_too_large());
    }
    let bytes = input.split_to(len).freeze();
    match parse_head(bytes) {
        Ok(parsed) => start_body(parsed),
        Err(problem) => refuse(problem),
    }
}

/// Length of the head up to and including its empty line.
fn head_len(input: &[u8], searched: usize) -> Option<usize> {
    let mut from = searched;
    while let Some(at) = memchr::memchr(b'\n', &input[from..]) {
        let line_end = from + at;
        match &input[line_end + 1..] {
            [b'\n', ..] => return Some(line_end + 2),
            [b'\r', b'\n', ..] => return Some(line_end + 3),
            [] | [b'\r'] => return None,
            _ => from = line_end + 1,
        }
    }
    None
}

/// A head and what it says about the body.
struct ParsedHead {
    request: Box<Request>,
    framing: Framing,
    expects_continue: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Framing {
    None,
    Length(u64),
    Chunked,
}

fn parse_head(bytes: Bytes) -> Result<ParsedHead, Problem> {
    let mut slots = [httparse::EMPTY_HEADER; limits::HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut slots);
    match parsed.parse(&bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => {
            return Err(Problem::bad_request("the request head is malformed"));
        }
        Err(httparse::Error::TooManyHeaders) => return Err(Problem::head_too_large()),
        Err(error) => {
            return Err(Problem::bad_request(format!(
                "the request head is malformed: {error}"
            )));
        }
    }
    let minor = parsed.version.unwrap_or(1);
    let method = match parsed.method.unwrap_or_default() {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        "PUT" => Method::Put,
        "POST" => Method::Post,
        "DELETE" => Method::Delete,
        _ => Method::Other,
    };
    let (path, query) = split_target(&bytes, parsed.path.unwrap_or_default().as_bytes())?;
    let mut headers = Headers::default();
    let mut close = minor == 0;
    let mut length: Option<u64> = None;
    let mut chunked = false;
    let mut expects_continue = false;
    for header in parsed.headers.iter() {
        let name = header.name;
        let value = header.value.trim_ascii();
        if name.eq_ignore_ascii_case("content-length") {
            let found = parse_length(value)?;
            if length.is_some_and(|length| length != found) {
                return Err(Problem::bad_request("two different Content-Length headers"));
            }
            length = Some(found);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            if chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Problem::bad_request(
                    "the only transfer coding that is understood is one `chunked`",
                ));
            }
            chunked = true;
        } else if name.eq_ignore_ascii_case("connection") {
            for token in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                if token.eq_ignore_ascii_case(b"close") {
                    close = true;
                } else if minor == 0 && token.eq_ignore_ascii_case(b"keep-alive") {
                    close = false;
                }
            }
        } else if name.eq_ignore_ascii_case("expect") {
            if !value.eq_ignore_ascii_case(b"100-continue") {
                return Err(Problem::expectation_failed());
            }
            expects_continue = minor > 0;
        } else {
            headers.note(name, bytes.slice_ref(value));
        }
    }
    let framing = match (chunked, length) {
        (true, Some(_)) => {
            return Err(Problem::bad_request(
                "Content-Length and Transfer-Encoding exclude each other",
            ));
        }
        (true, None) => Framing::Chunked,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::None,
    };
    let request = Box::new(Request {
        method,
        path,
        query,
        headers,
        body: BytesMut::new(),
        close,
    });
    Ok(ParsedHead {
        request,
        framing,
        expects_continue,
    })
}

impl Headers {
    /// Whether a browser sends this for a page of another host.
    pub fn is_of_another_site(&self) -> bool {
        let Some(origin) = &self.origin else {
            return false;
        };
        let authority = memchr::memmem::find(origin, b"://").map(|at| &origin[at + 3..]);
        authority.is_none() || authority != self.host.as_deref()
    }

    /// The first of those that were given and mean something only to a request for one key.
    pub fn of_one_key(&self) -> Option<&'static str> {
        let given = [
            (&self.if_match, "If-Match"),
            (&self.if_none_match, "If-None-Match"),
            (&self.idempotency_key, "Idempotency-Key"),
            (&self.context, "X-Torc-Context"),
        ];
        let mut given = given.iter().filter(|(value, _)| value.is_some());
        given.next().map(|(_, name)| *name)
    }

    fn note(&mut self, name: &str, value: Bytes) {
        let (slot, name) = match name.len() {
            4 if name.eq_ignore_ascii_case("host") => (&mut self.host, "Host"),
            6 if name.eq_ignore_ascii_case("origin") => (&mut self.origin, "Origin"),
            6 if name.eq_ignore_ascii_case("accept") => (&mut self.accept, "Accept"),
            6 if name.eq_ignore_ascii_case("prefer") => (&mut self.prefer, "Prefer"),
            8 if name.eq_ignore_ascii_case("if-match") => (&mut self.if_match, "If-Match"),
            12 if name.eq_ignore_ascii_case("content-type") => {
                (&mut self.content_type, "Content-Type")
            }
            13 if name.eq_ignore_ascii_case("if-none-match") => {
                (&mut self.if_none_match, "If-None-Match")
            }
            14 if name.eq_ignore_ascii_case("x-torc-context") => {
                (&mut self.context, "X-Torc-Context")
            }
            14 if name.eq_ignore_ascii_case("x-torc-session") => {
                (&mut self.session, "X-Torc-Session")
            }
            15 if name.eq_ignore_ascii_case("idempotency-key") => {
                (&mut self.idempotency_key, "Idempotency-Key")
            }
            _ => return,
        };
        // Accept and Prefer are lists, which may be spread over several headers; the first one
        // counts. A second one of the others would change what a write means.
        if slot.is_some() {
            if !matches!(name, "Accept" | "Prefer") {
                self.repeated = Some(name);
            }
            return;
        }
        *slot = Some(value);
    }
}

fn parse_length(value: &[u8]) -> Result<u64, Problem> {
    // `str::parse` would take a sign as well.
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let length = digits.then(|| std::str::from_utf8(value).ok()?.parse().ok());
    length
        .flatten()
        .ok_or_else(|| Problem::bad_request("Content-Length is not a number"))
}

/// Splits the request target into path and query. An absolute target loses scheme and host.
fn split_target(head: &Bytes, target: &[u8]) -> Result<(Bytes, Bytes), Problem> {
    let target = if target.starts_with(b"/") || target == b"*" {
        target
    } else {
        let authority = memmem::find(target, b"://").map(|at| &target[at + 3..]);
        let Some(authority) = authority else {
            return Err(Problem::bad_request("the request target is not a path"));
        };
        let path = memchr::memchr(b'/', authority).unwrap_or(authority.len());
        &authority[path..]
    };
    let (path, query) = match memchr::memchr(b'?', target) {
        Some(at) => (&target[..at], &target[at + 1..]),
        None => (target, &target[target.len()..]),
    };
    Ok((head.slice_ref(path), head.slice_ref(query)))
}

/// The largest body that the request's route takes.
fn body_bytes_max(request: &Request) -> usize {
    let is_batch = request.path.starts_with(b"/v1/batch")
        || request.path.starts_with(b"/v1/keyspaces/") && request.path.ends_with(b"/batch");
    if is_batch {
        limits::BATCH_BODY_BYTES_MAX
    } else if request.path.starts_with(b"/v1/") {
        // A raw value that is a little too large is still read, so that its refusal can be a plain
        // answer on a connection that goes on.
        limits::JSON_BODY_BYTES_MAX
    } else {
        limits::ADMIN_BODY_BYTES_MAX
    }
}

fn start_body(parsed: ParsedHead) -> Next {
    let ParsedHead {
        request,
        framing,
        expects_continue,
    } = parsed;
    let limit = body_bytes_max(&request);
    let go_on = expects_continue.then_some(Step::Continue);
    match framing {
        Framing::None | Framing::Length(0) => (State::default(), Some(Step::Request(request))),
        Framing::Chunked => (
            State::Chunked {
                head: request,
                limit,
                next: Chunk::Size,
            },
            go_on,
        ),
        Framing::Length(length) => match usize::try_from(length) {
            Ok(missing) if missing <= limit => (
                State::Length {
                    head: request,
                    missing,
                },
                go_on,
            ),
            _ => {
                let problem = Problem::body_too_large(limit);
                if expects_continue || length > limits::DISCARD_BYTES_MAX {
                    return refuse(problem);
                }
                let missing = length;
                (State::Discard { missing, problem }, None)
            }
        },
    }
}

/// A body of known length stays in the input until it is whole, so that it is never copied.
fn read_length(input: &mut BytesMut, mut head: Box<Request>, missing: usize) -> Next {
    if input.len() < missing {
        reserve(input, missing);
        return (State::Length { head, missing }, Some(Step::More));
    }
    head.body = input.split_to(missing);
    (State::default(), Some(Step::Request(head)))
}

fn discard(input: &mut BytesMut, missing: u64, problem: Problem) -> Next {
    let missing = missing.saturating_sub(input.len() as u64);
    input.clear();
    if missing == 0 {
        return refuse(problem);
    }
    (State::Discard { missing, problem }, Some(Step::More))
}

fn read_chunked(
    input: &mut BytesMut,
    mut head: Box<Request>,
    limit: usize,
    mut next: Chunk,
) -> Next {
    loop {
        next = match next {
            Chunk::Size => {
                let line = match take_line(input) {
                    Ok(Some(line)) => line,
                    Ok(None) => break,
                    Err(problem) => return refuse(problem),
                };
                let size = match chunk_size(&line) {
                    Some(size) => size,
                    None => return bad("a chunk size is malformed"),
                };
                if size > limit - head.body.len() {
                    return refuse(Problem::body_too_large(limit));
                }
                match size {
                    0 => Chunk::Trailer { seen: 0 },
                    missing => Chunk::Data { missing },
                }
            }
            Chunk::Data { missing } => {
                let part = input.split_to(input.len().min(missing));
                head.body.extend_from_slice(&part);
                match missing - part.len() {
                    0 => Chunk::DataEnd,
                    missing => {
                        next = Chunk::Data { missing };
                        break;
                    }
                }
            }
            Chunk::DataEnd => match input[..] {
                [b'\r', b'\n', ..] => {
                    input.advance(2);
                    Chunk::Size
                }
                [] | [b'\r'] => break,
                _ => return bad("a chunk is longer than its size"),
            },
            Chunk::Trailer { seen } => {
                let line = match take_line(input) {
                    Ok(Some(line)) => line,
                    Ok(None) => break,
                    Err(problem) => return refuse(problem),
                };
                if line.is_empty() {
                    return (State::default(), Some(Step::Request(head)));
                }
                if seen == limits::HEADERS_MAX {
                    return refuse(Problem::head_too_large());
                }
                Chunk::Trailer { seen: seen + 1 }
            }
        };
    }
    (State::Chunked { head, limit, next }, Some(Step::More))
}

/// Takes a line off the input, without its end.
fn take_line(input: &mut BytesMut) -> Result<Option<BytesMut>, Problem> {
    let Some(at) = memchr::memchr(b'\n', input) else {
        if input.len() > limits::CHUNK_LINE_BYTES_MAX {
            return Err(Problem::bad_request("a line of a chunked body is too long"));
        }
        return Ok(None);
    };
    if at > limits::CHUNK_LINE_BYTES_MAX {
        return Err(Problem::bad_request("a line of a chunked body is too long"));
    }
    let mut line = input.split_to(at + 1);
    line.truncate(at);
    if line.last() != Some(&b'\r') {
        return Err(Problem::bad_request(
            "a line of a chunked body does not end in CRLF",
        ));
    }
    line.truncate(at - 1);
    Ok(Some(line))
}

/// The size at the start of a chunk's first line; extensions are ignored.
fn chunk_size(line: &[u8]) -> Option<usize> {
    let end = memchr::memchr(b';', line).unwrap_or(line.len());
    let digits = line[..end].trim_ascii_end();
    // Eight digits are 4 GiB, far above every limit, and cannot overflow.
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::query::Query;
    use crate::http::route::Route;

    /// Feeds `bytes` in parts of `step` bytes and returns everything that came out.
    fn feed(bytes: &[u8], step: usize) -> Vec<Step> {
        let mut parser = Parser::default();
        let mut input = BytesMut::new();
        let mut steps = Vec::new();
        for part in bytes.chunks(step) {
            input.extend_from_slice(part);
            loop {
                match parser.advance(&mut input) {
                    Step::More => break,
                    step => steps.push(step),
                }
            }
        }
        steps
    }

    fn one(bytes: &[u8]) -> Request {
        let mut steps = feed(bytes, bytes.len());
        assert_eq!(steps.len(), 1, "{steps:?}");
        match steps.remove(0) {
            Step::Request(request) => *request,
            step => panic!("{step:?}"),
        }
    }

    fn refusal(bytes: &[u8]) -> u16 {
        match feed(bytes, bytes.len()).pop() {
            Some(Step::Refused(problem)) => problem.status,
            step => panic!("{step:?}"),
        }
    }

    #[test]
    fn a_pipeline_comes_out_request_by_request_however_it_is_cut() {
        let bytes = b"PUT /v1/keys/a?w=2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello\
            \r\nGET /v1/keys/%2e HTTP/1.1\r\nif-match: \"abc\" \r\n\r\n\
            PUT /v1/keys/b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
            3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n\
            DELETE /v1/keys/c HTTP/1.1\nConnection: close\n\n";
        for step in [1, 2, 7, 64, bytes.len()] {
            let steps = feed(bytes, step);
            let requests: Vec<&Request> = steps
                .iter()
                .map(|step| match step {
                    Step::Request(request) => &**request,
                    step => panic!("{step:?}"),
                })
                .collect();
            assert_eq!(requests.len(), 4);
            assert_eq!(requests[0].method, Method::Put);
            assert_eq!(&requests[0].path[..], b"/v1/keys/a");
            assert_eq!(&requests[0].query[..], b"w=2");
            assert_eq!(&requests[0].body[..], b"hello");
            assert_eq!(&requests[1].path[..], b"/v1/keys/%2e");
            assert_eq!(
                requests[1].headers.if_match.as_deref(),
                Some(&b"\"abc\""[..])
            );
            assert_eq!(&requests[2].body[..], b"abc0123456789");
            assert!(!requests[2].close && requests[3].close);
        }
    }

    #[test]
    fn keep_alive_follows_the_version() {
        assert!(!one(b"GET / HTTP/1.1\r\n\r\n").close);
        assert!(one(b"GET / HTTP/1.1\r\nConnection: foo, Close\r\n\r\n").close);
        assert!(one(b"GET / HTTP/1.0\r\n\r\n").close);
        assert!(!one(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").close);
    }

    #[test]
    fn a_waiting_client_is_told_to_go_on() {
        let steps = feed(
            b"PUT /v1/keys/a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
            usize::MAX,
        );
        assert!(matches!(steps[..], [Step::Continue, Step::Request(_)]));
        assert_eq!(refusal(b"PUT / HTTP/1.1\r\nExpect: tea\r\n\r\n"), 417);
    }

    #[test]
    fn ambiguous_lengths_are_refused() {
        for head in [
            "Content-Length: 1\r\nContent-Length: 2",
            "Content-Length: 1\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Content-Length: +1",
            "Content-Length: -1",
            "Content-Length: 1x",
            "Content-Length:",
            "Content-Length: 99999999999999999999999",
        ] {
            let bytes = format!("PUT /v1/keys/a HTTP/1.1\r\n{head}\r\n\r\n");
            assert_eq!(refusal(bytes.as_bytes()), 400, "{head}");
        }
        assert_eq!(
            one(b"PUT /a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx").body[..],
            b"x"[..]
        );
    }

    #[test]
    fn malformed_chunks_are_refused() {
        for body in [
            "x\r\n",
            "\r\n",
            "-1\r\n",
            "123456789\r\n",
            "1\r\nab\r\n",
            "1\nab",
        ] {
            let bytes = format!("PUT /v1/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
            assert_eq!(refusal(bytes.as_bytes()), 400, "{body:?}");
        }
    }

    #[test]
    fn large_heads_and_bodies_are_refused_without_keeping_them() {
        let mut head = b"GET / HTTP/1.1\r\nX: ".to_vec();
        head.resize(limits::HEAD_BYTES_MAX + 10, b'x');
        assert_eq!(refusal(&head), 431);
        let many = "a: b\r\n".repeat(limits::HEADERS_MAX + 1);
        assert_eq!(
            refusal(format!("GET / HTTP/1.1\r\n{many}\r\n").as_bytes()),
            431
        );

        let length = limits::JSON_BODY_BYTES_MAX + 1;
        let head = format!("PUT /v1/keys/a HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
        let mut parser = Parser::default();
        let mut input = BytesMut::from(head.as_bytes());
        let mut sent = 0;
        let refused = loop {
            match parser.advance(&mut input) {
                Step::More => {
                    assert!(input.is_empty(), "the body is thrown away as it comes");
                    let part = (length - sent).min(1 << 20);
                    assert!(part > 0);
                    input.extend_from_slice(&vec![0; part]);
                    sent += part;
                }
                Step::Refused(problem) => break problem,
                step => panic!("{step:?}"),
            }
        };
        assert_eq!((refused.status, sent), (413, length));

        let chunk =
            format!("PUT /v1/k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n");
        assert_eq!(refusal(chunk.as_bytes()), 413);
        assert_eq!(
            refusal(b"PUT /v1/k HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n"),
            413
        );
    }

    #[test]
    fn every_truncation_of_a_request_waits() {
        let bytes =
            b"PUT /v1/keys/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n";
        for len in 0..bytes.len() {
            assert!(feed(&bytes[..len], usize::MAX).is_empty(), "{len}");
        }
    }

    #[test]
    fn other_protocols_and_absolute_targets_are_told_apart() {
        assert_eq!(refusal(b"\x16\x03\x01\x02\x00\n\r\n"), 400);
        assert_eq!(refusal(b"GET nonsense HTTP/1.1\r\n\r\n"), 400);
        let request = one(b"GET http://host:1/v1/keys/a?r=1 HTTP/1.1\r\n\r\n");
        assert_eq!(&request.path[..], b"/v1/keys/a");
        assert_eq!(&request.query[..], b"r=1");
    }

    #[test]
    fn no_bytes_make_a_request_panic() {
        let valid = [
            "GET /v1/keys/a%20b?r=one&timeout_ms=5&sloppy=true HTTP/1.1\r\nHost: x\r\n\r\n",
            "PUT /v1/keyspaces/k/keys/a?w=2&ttl_seconds=60 HTTP/1.1\r\nContent-Length: 11\r\n\
             If-None-Match: *\r\nPrefer: return=minimal\r\n\r\n{\"value\":1}",
            "POST /v1/batch HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n\
             3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n",
            "GET http://h/admin/snapshots/0123456789abcdef/shard-00/x?offset=1&length=2 HTTP/1.0\r\n\
             Connection: keep-alive\r\nAccept: application/octet-stream\r\n\r\n",
            "DELETE /admin/keyspaces/k HTTP/1.1\nIf-Match: \"a\"\nX-Torc-Session: b\n\n",
        ];
        let valid = valid.map(|text| text.as_bytes().to_vec());
        crate::fuzz::parser("HTTP request", &valid).fuzz(|bytes| {
            for step in [7, bytes.len().max(1)] {
                let (mut parser, mut input) = (Parser::default(), BytesMut::new());
                for part in bytes.chunks(step) {
                    input.extend_from_slice(part);
                    loop {
                        match parser.advance(&mut input) {
                            Step::More => break,
                            Step::Request(request) => look_at(&request),
                            Step::Continue | Step::Refused(_) => {}
                        }
                    }
                }
                parser.in_request(&input);
            }
        });
    }

    /// What every route does with a request.
    fn look_at(request: &Request) {
        request.is_raw();
        drop(Route::of(&request.path));
        if let Ok(query) = Query::parse(&request.query) {
            drop((query.level("r"), query.level("w")));
            drop((query.timeout_ms(), query.ttl_seconds()));
            drop((query.boolean("sloppy"), query.number("offset", 0, u64::MAX)));
        }
    }

    #[test]
    fn a_header_that_decides_a_write_may_stand_only_once() {
        let request = one(b"PUT / HTTP/1.1\r\nIf-Match: a\r\nif-match: b\r\n\r\n");
        assert_eq!(request.headers.repeated, Some("If-Match"));
        let request = one(b"GET / HTTP/1.1\r\nAccept: a\r\nAccept: b\r\n\r\n");
        assert_eq!(request.headers.repeated, None);
    }
}
