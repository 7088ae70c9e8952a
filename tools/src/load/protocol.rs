//! The protocols that can be measured, each a pair of pure functions: bytes for a request, and the
//! first answer in received bytes.

mod binary;
mod etcd;
mod http;
mod memcached;
mod resp;

use bytes::{Bytes, BytesMut};
use torc_measure::mix::Operation;

use super::login::Login;

/// Bytes of an answer at most: a page of 1000 keys with values of a mebibyte fits.
pub const ANSWER_BYTES_MAX: usize = 1 << 30;

/// Bytes of a line of an answer at most.
const LINE_BYTES_MAX: usize = 64 << 10;

/// A protocol together with the settings that go into each request.
#[derive(Clone, Debug)]
pub enum Protocol {
    /// Torc's HTTP interface, values in raw form.
    Http(http::Http),
    /// The Redis protocol: Torc, Redis, Valkey, KVRocks, Dragonfly.
    Resp(resp::Resp),
    /// Torc's binary protocol.
    Binary(binary::Binary),
    /// memcached's meta commands.
    Memcached(memcached::Memcached),
    /// etcd v3 over its HTTP gateway.
    Etcd(etcd::Etcd),
}

/// What goes into every request.
#[derive(Clone, Debug)]
pub struct Levels {
    /// Keyspace; `None` = `default`.
    pub keyspace: Option<String>,
    /// Read level, as on the command line.
    pub r: Option<String>,
    /// Write level, as on the command line.
    pub w: Option<String>,
    /// Deadline given to the server, in milliseconds.
    pub timeout_ms: u32,
    /// Who the load is, for RESP.
    pub login: Option<Login>,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Reads one key.
    Read(&'a [u8]),
    /// Reads several keys at once.
    ReadMany(&'a [Vec<u8>]),
    /// Writes one key.
    Write {
        /// The key.
        key: &'a [u8],
        /// The value.
        value: &'a [u8],
        /// What the writer has seen; `None` asks the server to read first.
        context: Option<&'a [u8]>,
        /// Seconds that it lives.
        ttl_seconds: Option<u32>,
    },
    /// Deletes one key.
    Delete {
        /// The key.
        key: &'a [u8],
        /// What the writer has seen.
        context: Option<&'a [u8]>,
    },
    /// Reads one page of keys.
    Scan {
        /// Where the page before ended.
        cursor: Option<&'a [u8]>,
        /// Keys wanted.
        limit: u32,
    },
}

/// What the oldest request without an answer asked for; answers in order are read by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// One key.
    Read,
    /// So many keys.
    ReadMany(usize),
    /// A write.
    Write,
    /// A deletion.
    Delete,
    /// A page.
    Scan,
}

/// What the server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A read found this value.
    Value {
        /// The value.
        value: Bytes,
        /// Its version, where the protocol tells it.
        version: Option<Bytes>,
    },
    /// A read found concurrent values.
    Siblings {
        /// The values.
        values: Vec<Bytes>,
        /// The version that covers them all.
        version: Option<Bytes>,
    },
    /// A read found nothing.
    Missing {
        /// The version of what was deleted, where the protocol tells it.
        version: Option<Bytes>,
    },
    /// A write or deletion is done; its version, where the protocol tells it.
    Written(Option<Bytes>),
    /// One answer for each key of a read of several.
    Many(Vec<Answer>),
    /// A page.
    Page {
        /// Its keys, in the order that they came in.
        entries: Vec<Entry>,
        /// Where the next one starts; `None` after the last.
        cursor: Option<Bytes>,
    },
    /// Nothing happened; in the server's words.
    Refused(String),
    /// The outcome is unknown; in the server's words.
    InDoubt(String),
}

/// A key of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: Bytes,
    /// Its values; none where the protocol tells none of them.
    pub values: Vec<Bytes>,
}

/// The server's bytes are not an answer of this protocol; the connection is of no more use.
#[derive(Debug, thiserror::Error)]
#[error("not an answer of the protocol: {0}")]
pub struct ProtocolError(pub String);

impl Protocol {
    /// A protocol by its name on the command line.
    pub fn named(name: ProtocolName, levels: Levels) -> Result<Self, ProtocolError> {
        Ok(match name {
            ProtocolName::Http => Protocol::Http(http::Http::new(&levels)),
            ProtocolName::Resp => Protocol::Resp(resp::Resp::new(levels.login)),
            ProtocolName::Binary => Protocol::Binary(binary::Binary::new(levels)?),
            ProtocolName::Memcached => Protocol::Memcached(memcached::Memcached),
            ProtocolName::Etcd => Protocol::Etcd(etcd::Etcd::new(levels.r.as_deref())),
        })
    }

    /// The bytes that open a connection.
    pub fn greeting(&self, out: &mut BytesMut) {
        match self {
            Protocol::Binary(binary) => binary.greeting(out),
            Protocol::Resp(resp) => resp.greeting(out),
            Protocol::Memcached(memcached) => memcached.greeting(out),
            Protocol::Http(_) | Protocol::Etcd(_) => {}
        }
    }

    /// Takes the server's greeting off the front of `input`. `true` when it is complete.
    pub fn greeted(&self, input: &mut BytesMut) -> Result<bool, ProtocolError> {
        match self {
            Protocol::Binary(binary) => binary.greeted(input),
            Protocol::Resp(resp) => resp.greeted(input),
            Protocol::Memcached(memcached) => memcached.greeted(input),
            Protocol::Http(_) | Protocol::Etcd(_) => Ok(true),
        }
    }

    /// Whether this operation can be asked for.
    pub fn supports(&self, operation: Operation) -> bool {
        match self {
            Protocol::Binary(_) | Protocol::Resp(_) => true,
            Protocol::Http(_) => operation != Operation::Batch,
            Protocol::Memcached(_) => operation != Operation::Scan,
            Protocol::Etcd(_) => !matches!(operation, Operation::Batch | Operation::Scan),
        }
    }

    /// Whether pages of a scan have values, and each key once: Torc's own, in the order of its ring.
    pub fn pages_are_torcs(&self) -> bool {
        matches!(self, Protocol::Binary(_) | Protocol::Http(_))
    }

    /// Appends a request. `id` comes back with the answer where the protocol has ids.
    pub fn request(&self, out: &mut BytesMut, id: u64, request: &Request<'_>) {
        match self {
            Protocol::Http(http) => http.request(out, request),
            Protocol::Resp(resp) => resp.request(out, request),
            Protocol::Binary(binary) => binary.request(out, id, request),
            Protocol::Memcached(memcached) => memcached.request(out, request),
            Protocol::Etcd(etcd) => etcd.request(out, request),
        }
    }

    /// Whether a write without a context leaves what it has not seen as a sibling, so that the
    /// writer must read first.
    pub fn writer_must_read(&self) -> bool {
        matches!(self, Protocol::Http(_))
    }

    /// Takes one answer off the front of `input`; `None` when more bytes are needed. The id is
    /// that of the request, or `None` where answers come in the order of the requests, the oldest
    /// of which `asked`.
    pub fn answer(
        &self,
        input: &mut BytesMut,
        asked: Asked,
    ) -> Result<Option<(Option<u64>, Answer)>, ProtocolError> {
        let in_order = match self {
            Protocol::Binary(binary) => return binary.answer(input),
            Protocol::Http(http) => http.answer(input, asked)?,
            Protocol::Resp(resp) => resp.answer(input, asked)?,
            Protocol::Memcached(memcached) => memcached.answer(input, asked)?,
            Protocol::Etcd(etcd) => etcd.answer(input, asked)?,
        };
        Ok(in_order.map(|answer| (None, answer)))
    }
}

/// Names of the protocols on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProtocolName {
    /// Torc's HTTP interface
    Http,
    /// The Redis protocol
    Resp,
    /// Torc's binary protocol
    Binary,
    /// memcached's meta commands
    Memcached,
    /// etcd v3 over its HTTP gateway
    Etcd,
}

impl ProtocolName {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            ProtocolName::Http => "http",
            ProtocolName::Resp => "resp",
            ProtocolName::Binary => "binary",
            ProtocolName::Memcached => "memcached",
            ProtocolName::Etcd => "etcd",
        }
    }
}

/// The length of a part of an answer, at most [`ANSWER_BYTES_MAX`].
fn length(text: &[u8]) -> Result<usize, ProtocolError> {
    let number: Option<usize> = std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok());
    number
        .filter(|number| *number <= ANSWER_BYTES_MAX)
        .ok_or_else(|| ProtocolError(format!("a length of {}", String::from_utf8_lossy(text))))
}

/// The end of the first line, its line feed included; `None` while it is not there.
fn line_end(input: &[u8]) -> Result<Option<usize>, ProtocolError> {
    match memchr::memchr(b'\n', &input[..input.len().min(LINE_BYTES_MAX)]) {
        Some(at) => Ok(Some(at + 1)),
        None if input.len() < LINE_BYTES_MAX => Ok(None),
        None => Err(ProtocolError("a line without an end".into())),
    }
}

/// Appends a number in decimal.
fn decimal(out: &mut BytesMut, number: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}
