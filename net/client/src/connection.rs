//! One connection to one shard: blocking, pipelined.
//!
//! [`Connection::split`] gives a half that submits and a half that receives, for two threads. Requests
//! gather in the sender until [`Sender::flush`]: what is flushed together leaves in one write.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use torc_env::ShardId;

use crate::error::ClientError;
use crate::wire::frame::{self, FRAME_BYTES_MAX};
use crate::wire::handshake::{Hello, Status, Welcome};
use crate::wire::message::{self, ArchivedAnswer, KIND_ANSWER, MessageError, Request};

/// Bytes that one read asks for at least.
const READ_BYTES: usize = 16 << 10;
/// Requests are written by themselves when so many bytes have gathered.
const GATHERED_BYTES_MAX: usize = 256 << 10;

/// A connection whose handshake is done.
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    receiver: Receiver,
    welcome: Welcome,
}

impl Connection {
    /// Connects to `address` and shakes hands. `shard` asks for the shard that shall serve the
    /// connection; a node that has no such shard serves it by another one (see
    /// [`Connection::welcome`]).
    ///
    /// # Errors
    /// When nothing listens, something else does, or the node refuses; all within `timeout`.
    pub fn connect(
        address: SocketAddr,
        shard: Option<ShardId>,
        timeout: Duration,
    ) -> Result<Connection, ClientError> {
        let connect = |source| ClientError::Connect { address, source };
        let stream = TcpStream::connect_timeout(&address, timeout).map_err(connect)?;
        stream.set_nodelay(true).map_err(connect)?;
        stream.set_read_timeout(Some(timeout)).map_err(connect)?;
        stream.set_write_timeout(Some(timeout)).map_err(connect)?;
        let mut out = BytesMut::new();
        Hello::new(shard).encode(&mut out);
        (&stream).write_all(&out).map_err(connect)?;
        let mut receiver = Receiver {
            stream: stream.try_clone().map_err(connect)?,
            input: BytesMut::new(),
        };
        let welcome = loop {
            if let Some(welcome) = Welcome::decode(&mut receiver.input)? {
                break welcome;
            }
            receiver.read().map_err(connect)?;
        };
        if welcome.status != Status::Ready {
            return Err(ClientError::Refused {
                status: welcome.status,
            });
        }
        Ok(Connection {
            sender: Sender {
                stream,
                out: BytesMut::new(),
                next_request: 1,
            },
            receiver,
            welcome,
        })
    }

    /// What the node said about itself.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// How long a read waits before it fails; `None` = for ever.
    ///
    /// # Errors
    /// Those of the system.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.receiver.stream.set_read_timeout(timeout)
    }

    /// Sends one request and waits for its answer. Not to be mixed with pipelining.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn call(&mut self, request: &Request<'_>) -> Result<Answered, ClientError> {
        let id = self.sender.submit(request)?;
        self.sender.flush()?;
        loop {
            let answered = self.receiver.receive()?;
            // An answer that an earlier call gave up on.
            if answered.id == id {
                return Ok(answered);
            }
        }
    }

    /// The two halves, for two threads.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }
}

/// The half that submits.
#[derive(Debug)]
pub struct Sender {
    stream: TcpStream,
    out: BytesMut,
    next_request: u64,
}

impl Sender {
    /// Appends a request to what the next flush sends and returns its id. Blocks only when much has
    /// gathered.
    ///
    /// # Errors
    /// When the connection breaks.
    ///
    /// # Panics
    /// When the request is larger than a frame may be.
    pub fn submit(&mut self, request: &Request<'_>) -> io::Result<u64> {
        let id = self.next_request;
        self.next_request += 1;
        message::encode_request(&mut self.out, id, request);
        if self.out.len() >= GATHERED_BYTES_MAX {
            self.flush()?;
        }
        Ok(id)
    }

    /// Sends everything that was submitted.
    ///
    /// # Errors
    /// When the connection breaks; what was submitted may have been sent in part.
    pub fn flush(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// Tells the node that nothing follows. It still answers what it has.
    ///
    /// # Errors
    /// Those of the system.
    pub fn finish(&mut self) -> io::Result<()> {
        self.flush()?;
        self.stream.shutdown(Shutdown::Write)
    }
}

/// The half that receives.
#[derive(Debug)]
pub struct Receiver {
    stream: TcpStream,
    input: BytesMut,
}

impl Receiver {
    /// Waits for the next answer, of whichever request.
    ///
    /// # Errors
    /// When the connection breaks or its bytes make no sense. After a timeout it may be called again.
    pub fn receive(&mut self) -> Result<Answered, ClientError> {
        loop {
            if let Some(answered) = self.take_received()? {
                return Ok(answered);
            }
            self.read()?;
        }
    }

    /// The next answer that is already received; does not wait.
    ///
    /// # Errors
    /// When the bytes make no sense.
    pub fn take_received(&mut self) -> Result<Option<Answered>, ClientError> {
        while let Some(frame) = frame::decode(&mut self.input, FRAME_BYTES_MAX)? {
            // Kinds of later versions are skipped.
            if frame.header.kind == KIND_ANSWER {
                return Ok(Some(Answered {
                    id: frame.header.request,
                    payload: frame.payload,
                }));
            }
        }
        Ok(None)
    }

    fn read(&mut self) -> io::Result<()> {
        let before = self.input.len();
        let room = (self.input.capacity() - before).max(READ_BYTES);
        // The standard library reads only into initialised memory.
        self.input.resize(before + room, 0);
        let read = self.stream.read(&mut self.input[before..]);
        self.input.truncate(before + *read.as_ref().unwrap_or(&0));
        match read? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

/// An answer and the request that it belongs to.
#[derive(Clone, Debug)]
pub struct Answered {
    /// What [`Sender::submit`] returned.
    pub id: u64,
    /// The message; see [`Answered::answer`].
    pub payload: Bytes,
}

impl Answered {
    /// The answer, read in place.
    ///
    /// # Errors
    /// When the payload is no valid message.
    pub fn answer(&self) -> Result<&ArchivedAnswer<'_>, MessageError> {
        message::answer(&self.payload)
    }
}
