//! The protocols that can be measured, each a pair of pure functions: bytes for a request, and the
//! first answer in received bytes.

mod binary;
mod http;
mod resp;

use bytes::{Bytes, BytesMut};

/// A protocol together with the settings that go into each request.
#[derive(Clone, Debug)]
pub enum Protocol {
    /// Torc's HTTP interface, values in raw form.
    Http(http::Http),
    /// The Redis protocol: Torc, Redis, Valkey, KVRocks, Dragonfly.
    Resp(resp::Resp),
    /// Torc's binary protocol.
    Binary(binary::Binary),
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
}

/// What the server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A read found these values; more than one when they are concurrent.
    Values {
        /// The values.
        values: Vec<Bytes>,
        /// Their version, where the protocol tells it.
        version: Option<Bytes>,
    },
    /// A read found nothing.
    Missing {
        /// The version of what was deleted, where the protocol tells it.
        version: Option<Bytes>,
    },
    /// A write is done; its version, where the protocol tells it.
    Written(Option<Bytes>),
    /// Nothing happened; in the server's words.
    Refused(String),
    /// The outcome is unknown; in the server's words.
    InDoubt(String),
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
            ProtocolName::Resp => Protocol::Resp(resp::Resp),
            ProtocolName::Binary => Protocol::Binary(binary::Binary::new(levels)?),
        })
    }

    /// Whether the server speaks first or expects a greeting: the bytes that open a connection.
    pub fn greeting(&self, out: &mut BytesMut) {
        if let Protocol::Binary(binary) = self {
            binary.greeting(out);
        }
    }

    /// Takes the server's greeting off the front of `input`. `true` when it is complete.
    pub fn greeted(&self, input: &mut BytesMut) -> Result<bool, ProtocolError> {
        match self {
            Protocol::Binary(binary) => binary.greeted(input),
            Protocol::Http(_) | Protocol::Resp(_) => Ok(true),
        }
    }

    /// Appends a read of `key`. `id` comes back with the answer where the protocol has ids.
    pub fn read(&self, out: &mut BytesMut, id: u64, key: &[u8]) {
        match self {
            Protocol::Http(http) => http.read(out, key),
            Protocol::Resp(resp) => resp.read(out, key),
            Protocol::Binary(binary) => binary.read(out, id, key),
        }
    }

    /// Appends a write. `context` is what the writer has seen; `None` asks the server to read
    /// first.
    pub fn write(
        &self,
        out: &mut BytesMut,
        id: u64,
        key: &[u8],
        value: &[u8],
        context: Option<&[u8]>,
    ) {
        match self {
            Protocol::Http(http) => http.write(out, key, value, context),
            Protocol::Resp(resp) => resp.write(out, key, value),
            Protocol::Binary(binary) => binary.write(out, id, key, value, context),
        }
    }

    /// Whether a write without a context leaves what it has not seen as a sibling, so that the
    /// writer must read first.
    pub fn writer_must_read(&self) -> bool {
        matches!(self, Protocol::Http(_))
    }

    /// Takes one answer off the front of `input`; `None` when more bytes are needed. The id is
    /// that of the request, or `None` where answers come in the order of the requests.
    pub fn answer(
        &self,
        input: &mut BytesMut,
    ) -> Result<Option<(Option<u64>, Answer)>, ProtocolError> {
        match self {
            Protocol::Http(http) => Ok(http.answer(input)?.map(|answer| (None, answer))),
            Protocol::Resp(resp) => Ok(resp.answer(input)?.map(|answer| (None, answer))),
            Protocol::Binary(binary) => binary.answer(input),
        }
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
}
