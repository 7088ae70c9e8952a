//! One connection of the load generator: what was queued, what is outstanding, what came back.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use torc_measure::mix::Operation;

use super::ledger::{Floor, WriteTurn};
use super::protocol::{ANSWER_BYTES_MAX, Answer, Asked, Protocol, ProtocolError, Request};
use super::schedule::Due;
use super::value::{self, Sequence};
use super::world::Nanos;

/// A request without an answer yet.
pub struct Pending<'a> {
    /// What it is.
    pub operation: Operation,
    /// Its turn in the schedule.
    pub due: Due,
    /// When it was sent (its first part, when it has two).
    pub sent: Nanos,
    /// Where it goes, for the report.
    pub target: usize,
    /// The keys that it reads or writes, each with what was acknowledged of it before.
    pub keys: Keyed,
    /// The change that it makes.
    pub change: Option<Change<'a>>,
    /// Whether the key is read first; the change follows.
    pub reads_first: bool,
    /// Keys wanted, for a scan.
    pub limit: u32,
    id: u64,
}

/// The keys of a request.
pub enum Keyed {
    /// One, as nearly always.
    One(u64, Floor),
    /// Several.
    Many(Vec<(u64, Floor)>),
}

/// A change under way.
pub struct Change<'a> {
    /// The right to make it.
    pub turn: WriteTurn<'a>,
    /// What it will be known by.
    pub sequence: Sequence,
    /// Bytes of the new value; `None` deletes.
    pub value_bytes: Option<usize>,
    /// Seconds that the value lives.
    pub ttl_seconds: Option<u32>,
}

impl<'a> Pending<'a> {
    /// A request that is about to be sent.
    pub fn new(operation: Operation, due: Due, sent: Nanos, keys: Keyed) -> Self {
        Self {
            operation,
            due,
            sent,
            target: 0,
            keys,
            change: None,
            reads_first: false,
            limit: 0,
            id: 0,
        }
    }

    /// Its key, or the first of several.
    pub fn key(&self) -> u64 {
        match &self.keys {
            Keyed::One(key, _) => *key,
            Keyed::Many(keys) => keys.first().map_or(0, |(key, _)| *key),
        }
    }

    fn asked(&self) -> Asked {
        match (&self.change, &self.keys) {
            (Some(change), _) if !self.reads_first => match change.value_bytes {
                Some(_) => Asked::Write,
                None => Asked::Delete,
            },
            _ if self.operation == Operation::Scan => Asked::Scan,
            (_, Keyed::Many(keys)) => Asked::ReadMany(keys.len()),
            (_, Keyed::One(..)) => Asked::Read,
        }
    }
}

/// Buffers that requests are put together in, one set a worker.
#[derive(Default)]
pub struct Scratch {
    keys: Vec<Vec<u8>>,
    value: Vec<u8>,
}

impl Scratch {
    fn keys(&mut self, indices: impl Iterator<Item = u64>) -> usize {
        let mut count = 0;
        for index in indices {
            if self.keys.len() == count {
                self.keys.push(Vec::new());
            }
            write_key(&mut self.keys[count], index);
            count += 1;
        }
        count
    }
}

/// What a connection has queued and is waiting for.
pub struct Connection<'a> {
    /// Number of the server's address.
    pub address: usize,
    /// Bytes to be sent.
    pub output: BytesMut,
    /// Bytes that came.
    pub input: BytesMut,
    pending: VecDeque<Pending<'a>>,
    next_id: u64,
    greeted: bool,
    /// Where its last scan ended.
    cursor: Option<Bytes>,
}

impl<'a> Connection<'a> {
    /// A connection with the protocol's greeting queued.
    pub fn new(address: usize, protocol: &Protocol) -> Self {
        let mut output = BytesMut::new();
        protocol.greeting(&mut output);
        let greeted = output.is_empty();
        Self {
            address,
            output,
            input: BytesMut::new(),
            pending: VecDeque::new(),
            next_id: 0,
            greeted,
            cursor: None,
        }
    }

    /// Whether the server has greeted, where the protocol has it greet.
    pub fn greeted(&self) -> bool {
        self.greeted
    }

    /// Requests without an answer.
    pub fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// When the oldest request without an answer was sent.
    pub fn oldest_sent(&self) -> Option<Nanos> {
        self.pending.iter().map(|pending| pending.sent).min()
    }

    /// Queues a request. `context` is what the writer has seen.
    pub fn submit(
        &mut self,
        protocol: &Protocol,
        mut pending: Pending<'a>,
        context: Option<&[u8]>,
        scratch: &mut Scratch,
    ) {
        pending.id = self.next_id;
        self.next_id += 1;
        let count = match &pending.keys {
            Keyed::One(key, _) => scratch.keys(std::iter::once(*key)),
            Keyed::Many(keys) => scratch.keys(keys.iter().map(|(key, _)| *key)),
        };
        let Scratch { keys, value } = scratch;
        let key = &keys[0][..];
        let request = match (&pending.change, pending.asked()) {
            (Some(change), Asked::Write) => {
                value.resize(change.value_bytes.unwrap_or(0), 0);
                value::write(change.turn.key, change.sequence, value);
                Request::Write {
                    key,
                    value,
                    context,
                    ttl_seconds: change.ttl_seconds,
                }
            }
            (Some(_), Asked::Delete) => Request::Delete { key, context },
            (_, Asked::Scan) => Request::Scan {
                cursor: self.cursor.as_deref(),
                limit: pending.limit,
            },
            (_, Asked::ReadMany(_)) => Request::ReadMany(&keys[..count]),
            _ => Request::Read(key),
        };
        protocol.request(&mut self.output, pending.id, &request);
        self.pending.push_back(pending);
    }

    /// The next answer among the received bytes, with its request.
    pub fn answer(
        &mut self,
        protocol: &Protocol,
    ) -> Result<Option<(Pending<'a>, Answer)>, ProtocolError> {
        if !self.greeted {
            self.greeted = protocol.greeted(&mut self.input)?;
        }
        if !self.greeted || self.input.is_empty() {
            return Ok(None);
        }
        let Some(oldest) = self.pending.front() else {
            return Err(unasked(&self.input));
        };
        let Some((id, answer)) = protocol.answer(&mut self.input, oldest.asked())? else {
            if self.input.len() > 2 * ANSWER_BYTES_MAX {
                return Err(ProtocolError("an answer without an end".into()));
            }
            return Ok(None);
        };
        let position = match id {
            None => 0,
            Some(id) => self
                .pending
                .iter()
                .position(|pending| pending.id == id)
                .ok_or_else(|| ProtocolError(format!("an answer to an unknown request {id}")))?,
        };
        let pending = self
            .pending
            .remove(position)
            .ok_or_else(|| ProtocolError("an answer without a request".into()))?;
        if let Answer::Page { cursor, .. } = &answer {
            self.cursor.clone_from(cursor);
        }
        Ok(Some((pending, answer)))
    }

    /// Gives back what will never be answered.
    pub fn abandon(self) -> VecDeque<Pending<'a>> {
        self.pending
    }
}

/// What a server says before it closes a connection that it has no room for, for example.
fn unasked(input: &[u8]) -> ProtocolError {
    let line = input.split(|byte| *byte == b'\n').next().unwrap_or(input);
    let shown = &line[..line.len().min(UNASKED_BYTES_SHOWN)];
    let words = String::from_utf8_lossy(shown);
    ProtocolError(format!("an answer without a request: {}", words.trim_end()))
}

/// Bytes that are shown of an answer that nobody asked for.
const UNASKED_BYTES_SHOWN: usize = 200;

/// Digits of a key's number.
const KEY_DIGITS: usize = 12;

/// The key with this index: `key` and twelve digits.
pub fn write_key(out: &mut Vec<u8>, index: u64) {
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(index).as_bytes();
    out.clear();
    out.extend_from_slice(b"key");
    out.extend(std::iter::repeat_n(
        b'0',
        KEY_DIGITS.saturating_sub(digits.len()),
    ));
    out.extend_from_slice(digits);
}

/// The index of a key; `None` for one that the generator did not write.
pub fn read_key(key: &[u8]) -> Option<u64> {
    let digits = key.strip_prefix(b"key")?;
    // A sign would be read as part of a number.
    let number = digits.iter().all(u8::is_ascii_digit).then_some(digits)?;
    let index = std::str::from_utf8(number).ok()?.parse().ok()?;
    let mut again = Vec::with_capacity(key.len());
    write_key(&mut again, index);
    (again == key).then_some(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_of_the_generator_have_an_index() {
        for index in [0, 7, 999_999_999_999, 1_234_567_890_123] {
            let mut key = Vec::new();
            write_key(&mut key, index);
            assert_eq!(read_key(&key), Some(index));
        }
        for other in [
            "",
            "key",
            "key7",
            "key+00000000007",
            "key0123456789012",
            "yek000000000007",
        ] {
            assert_eq!(read_key(other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn keys_sort_as_their_numbers_do() {
        let mut key = Vec::new();
        write_key(&mut key, 7);
        assert_eq!(key, b"key000000000007");
        write_key(&mut key, 123_456_789_012);
        assert_eq!(key, b"key123456789012");
    }
}
