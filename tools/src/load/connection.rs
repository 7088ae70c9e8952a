//! One connection of the load generator: what was sent, what is outstanding, what came back.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::ledger::WriteTurn;
use super::protocol::{Answer, Protocol, ProtocolError};
use super::recorder::Operation;

/// Bytes read at a time.
const READ_BYTES: usize = 64 << 10;
/// How long a server may take to accept.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);

/// A request without an answer yet.
pub struct Pending<'a> {
    /// Read or write.
    pub operation: Operation,
    /// Index of the key.
    pub key: u64,
    /// When it was due.
    pub intended: Instant,
    /// When it was sent (its first part, when it has two).
    pub sent: Instant,
    /// For a read: the newest version acknowledged before it was sent.
    pub floor: u64,
    /// For a write: the right to it, and its sequence number.
    pub write: Option<(WriteTurn<'a>, u64)>,
    /// For a write whose context is being read.
    pub reading_context: bool,
    id: u64,
}

/// What goes into a request.
pub struct Order<'a> {
    /// Read or write.
    pub operation: Operation,
    /// Index of the key.
    pub key: u64,
    /// When it was due.
    pub intended: Instant,
    /// See [`Pending::floor`].
    pub floor: u64,
    /// See [`Pending::write`].
    pub write: Option<(WriteTurn<'a>, u64)>,
}

/// An open connection.
pub struct Connection<'a> {
    /// The server.
    pub address: SocketAddr,
    stream: TcpStream,
    input: BytesMut,
    output: BytesMut,
    pending: VecDeque<Pending<'a>>,
    next_id: u64,
    greeted: bool,
}

impl<'a> Connection<'a> {
    /// Connects and sends the protocol's greeting.
    pub fn open(address: SocketAddr, protocol: &Protocol) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, CONNECT_WITHIN)?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let mut output = BytesMut::new();
        protocol.greeting(&mut output);
        let greeted = output.is_empty();
        Ok(Self {
            address,
            stream,
            input: BytesMut::with_capacity(READ_BYTES),
            output,
            pending: VecDeque::new(),
            next_id: 0,
            greeted,
        })
    }

    /// The socket, to wait on.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Requests without an answer.
    pub fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// When the oldest request without an answer was sent.
    pub fn oldest_sent(&self) -> Option<Instant> {
        self.pending.iter().map(|pending| pending.sent).min()
    }

    /// Queues a request; [`Connection::flush`] sends it. A write without a context, in a protocol
    /// that does not read for the writer, starts with a read.
    pub fn submit(&mut self, protocol: &Protocol, order: Order<'a>, value: &mut [u8]) {
        let context = order.write.as_ref().and_then(|(turn, _)| turn.context());
        let reading_context =
            order.write.is_some() && context.is_none() && protocol.writer_must_read();
        let pending = Pending {
            operation: order.operation,
            key: order.key,
            intended: order.intended,
            sent: Instant::now(),
            floor: order.floor,
            write: order.write,
            reading_context,
            id: 0,
        };
        self.send(protocol, pending, context, value);
    }

    /// Sends the write itself, now that its context was read.
    pub fn submit_write(
        &mut self,
        protocol: &Protocol,
        mut pending: Pending<'a>,
        context: Option<Bytes>,
        value: &mut [u8],
    ) {
        pending.reading_context = false;
        self.send(protocol, pending, context, value);
    }

    fn send(
        &mut self,
        protocol: &Protocol,
        mut pending: Pending<'a>,
        context: Option<Bytes>,
        value: &mut [u8],
    ) {
        pending.id = self.next_id;
        self.next_id += 1;
        let key = key_bytes(pending.key);
        match &pending.write {
            Some((_, sequence)) if !pending.reading_context => {
                super::value::write(pending.key, *sequence, value);
                protocol.write(
                    &mut self.output,
                    pending.id,
                    &key,
                    value,
                    context.as_deref(),
                );
            }
            _ => protocol.read(&mut self.output, pending.id, &key),
        }
        self.pending.push_back(pending);
    }

    /// Writes what is queued, as far as the socket takes it.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => bytes::Buf::advance(&mut self.output, sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether bytes wait for the socket to take them.
    pub fn wants_to_write(&self) -> bool {
        !self.output.is_empty()
    }

    /// Reads what has come, until the socket has no more for now. An error when it is closed.
    pub fn fill(&mut self) -> io::Result<()> {
        loop {
            let before = self.input.len();
            self.input.resize(before + READ_BYTES, 0);
            let result = self.stream.read(&mut self.input[before..]);
            self.input.truncate(before + *result.as_ref().unwrap_or(&0));
            match result {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) if count < READ_BYTES => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The next answer among the received bytes, with its request.
    pub fn answer(
        &mut self,
        protocol: &Protocol,
    ) -> Result<Option<(Pending<'a>, Answer)>, ProtocolError> {
        if !self.greeted {
            self.greeted = protocol.greeted(&mut self.input)?;
            if !self.greeted {
                return Ok(None);
            }
        }
        let Some((id, answer)) = protocol.answer(&mut self.input)? else {
            return Ok(None);
        };
        let position = match id {
            None => 0,
            Some(id) => self
                .pending
                .iter()
                .position(|pending| pending.id == id)
                .ok_or_else(|| ProtocolError(format!("answer to an unknown request {id}")))?,
        };
        let pending = self
            .pending
            .remove(position)
            .ok_or_else(|| ProtocolError("an answer without a request".into()))?;
        Ok(Some((pending, answer)))
    }

    /// Closes it and gives back what will never be answered.
    pub fn abandon(self) -> VecDeque<Pending<'a>> {
        self.pending
    }
}

/// The key with this index.
pub fn key_bytes(index: u64) -> Vec<u8> {
    format!("key{index:012}").into_bytes()
}
