//! This shard's link to one shard of another node: queue, connect, send, match answers.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, select};
use hashbrown::HashMap;
use torc_client::wire::frame::{self, Header};
use torc_env::{CallError, Class, Env, Instant, NodeId};
use torc_runtime::{PendingCall, TcpStream};

use crate::limits::RECEIVE_BYTES;
use crate::link::handshake::{Intro, Status, VERDICT_BYTES, VERSION, Verdict};
use crate::link::{
    BACKOFF_MAX, BACKOFF_MIN, CONNECT_TIMEOUT, Host, KIND_ANSWER, KIND_PING, KIND_REQUEST,
    LINK_FRAME_BYTES_MAX, LINK_QUEUE_BYTES_MAX, LINK_REQUESTS_MAX, PING_AFTER, Peer, SILENCE_MAX,
};
use crate::output::Output;
use crate::signal::Signal;

/// A request that waits to be sent.
struct Queued {
    class: Class,
    request: Bytes,
    call: PendingCall,
}

/// How far a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not connected; a connect may start from this moment on.
    Down { retry_at: Instant },
    /// Connecting or shaking hands; requests queue.
    Connecting,
    /// Frames flow.
    Up,
}

/// An outgoing link.
pub(super) struct Outgoing {
    host: Rc<Host>,
    peer: Peer,
    phase: Cell<Phase>,
    backoff: Cell<Duration>,
    /// Why the last connect failed, for calls that come before the next one.
    refusal: Cell<CallError>,
    queue: RefCell<VecDeque<Queued>>,
    queued_bytes: Cell<usize>,
    /// Sent and not answered, by request id.
    waiting: RefCell<HashMap<u64, PendingCall>>,
    next_request: Cell<u64>,
    /// Something is in the queue, or the link is down.
    work: Signal,
    heard_at: Cell<Instant>,
    ping_wanted: Cell<bool>,
}

impl Outgoing {
    pub(super) fn new(host: Rc<Host>, peer: Peer) -> Self {
        let now = host.env.now();
        Self {
            host,
            peer,
            phase: Cell::new(Phase::Down { retry_at: now }),
            backoff: Cell::new(BACKOFF_MIN),
            refusal: Cell::new(CallError::Unreachable),
            queue: RefCell::default(),
            queued_bytes: Cell::new(0),
            waiting: RefCell::default(),
            next_request: Cell::new(1),
            work: Signal::default(),
            heard_at: Cell::new(now),
            ping_wanted: Cell::new(false),
        }
    }

    /// Queues a request, and connects when that is due.
    pub(super) fn start(self: &Rc<Self>, class: Class, request: Bytes, call: PendingCall) {
        if frame::HEADER_BYTES + request.len() > LINK_FRAME_BYTES_MAX {
            tracing::error!(bytes = request.len(), "a request is too large for a link");
            return call.complete(Err(CallError::Overloaded));
        }
        if let Phase::Down { retry_at } = self.phase.get() {
            if self.host.env.now() < retry_at {
                return call.complete(Err(self.refusal.get()));
            }
            self.phase.set(Phase::Connecting);
            let link = Rc::clone(self);
            self.host.env.spawn(Class::Foreground, link.run());
        }
        let requests = self.queue.borrow().len() + self.waiting.borrow().len();
        let bytes = self.queued_bytes.get() + request.len();
        if requests >= LINK_REQUESTS_MAX || bytes > LINK_QUEUE_BYTES_MAX {
            return call.complete(Err(CallError::Overloaded));
        }
        self.queued_bytes.set(bytes);
        self.queue.borrow_mut().push_back(Queued {
            class,
            request,
            call,
        });
        self.work.notify();
    }

    /// One life of the connection: connect, then send and receive until it breaks.
    async fn run(self: Rc<Self>) {
        match self.connect().await {
            Ok((stream, input)) => {
                self.backoff.set(BACKOFF_MIN);
                self.refusal.set(CallError::Unreachable);
                self.heard_at.set(self.host.env.now());
                self.phase.set(Phase::Up);
                let receiving = self.receive(&stream, input);
                let sending = self.send(&stream);
                let watching = self.watch();
                let broken = select(
                    Box::pin(receiving),
                    select(Box::pin(sending), Box::pin(watching)),
                );
                let error = match broken.await {
                    Either::Left((error, _)) => error,
                    Either::Right((Either::Left((error, _)) | Either::Right((error, _)), _)) => {
                        error
                    }
                };
                tracing::info!(peer = %self.peer.host, node = %self.peer.node, "a link broke: {error}");
                // The peer learns of it at once instead of at its next send.
                drop(stream.shutdown(Shutdown::Both));
            }
            Err(refused) => {
                self.refusal.set(refused.as_call_error());
                tracing::debug!(peer = %self.peer.host, node = %self.peer.node, "no link: {refused}");
            }
        }
        self.fail_all();
    }

    /// The link is down: what was sent may have been handled, what was not was not.
    fn fail_all(&self) {
        let backoff = self.backoff.get();
        // Spread, so that the shards of a node do not knock all at once.
        let spread = backoff.mul_f64(jitter(self.host.env.random()));
        self.backoff.set((backoff * 2).min(BACKOFF_MAX));
        self.phase.set(Phase::Down {
            retry_at: self.host.env.now() + spread,
        });
        let sent = std::mem::take(&mut *self.waiting.borrow_mut());
        let unsent = std::mem::take(&mut *self.queue.borrow_mut());
        self.queued_bytes.set(0);
        for queued in unsent {
            queued.call.complete(Err(self.refusal.get()));
        }
        // Dropping a call that was sent ends it with `Lost`.
        drop(sent);
    }

    async fn connect(&self) -> Result<(TcpStream, BytesMut), Refused> {
        let env = &self.host.env;
        let until = env.now() + CONNECT_TIMEOUT;
        let stream = TcpStream::connect(env, self.peer.host, CONNECT_TIMEOUT).await?;
        stream.set_nodelay(true)?;
        stream.set_keepalive(Duration::from_secs(10), Duration::from_secs(5))?;
        let shake = Box::pin(self.shake_hands(&stream));
        match select(shake, Box::pin(env.sleep_until(until))).await {
            Either::Left((shaken, _)) => shaken.map(|input| (stream.clone(), input)),
            Either::Right(_) => Err(Refused::Io(io::ErrorKind::TimedOut.into())),
        }
    }

    /// Introduces this node and reads the verdict. Returns what was received behind it.
    async fn shake_hands(&self, stream: &TcpStream) -> Result<BytesMut, Refused> {
        let env = &self.host.env;
        let intro = Intro {
            version_min: VERSION,
            version_max: VERSION,
            node: env.node(),
            shard: env.shard(),
            cluster: (self.host.cluster)(),
            to_node: self.peer.node,
            to_shard: self.peer.shard,
        };
        let mut out = BytesMut::new();
        intro.encode(&mut out);
        stream.send_buffer(out).await.0?;
        let mut input = BytesMut::with_capacity(VERDICT_BYTES);
        loop {
            let (received, buffer) = stream.recv(input).await;
            input = buffer;
            if received? == 0 {
                return Err(Refused::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            match Verdict::decode(&mut input) {
                Ok(Some(verdict)) => {
                    self.judge(&intro, &verdict)?;
                    return Ok(input);
                }
                Ok(None) => input.reserve(VERDICT_BYTES),
                Err(error) => return Err(Refused::Protocol(error.to_string())),
            }
        }
    }

    fn judge(&self, intro: &Intro, verdict: &Verdict) -> Result<(), Refused> {
        match verdict.status {
            Status::Ready => {}
            Status::WrongNode => return Err(Refused::WrongNode),
            Status::Removed => {
                tracing::warn!(peer = %self.peer.host, "this node was removed from the cluster");
                return Err(Refused::Status(verdict.status));
            }
            other => return Err(Refused::Status(other)),
        }
        // The peer has judged; this side does not take its word for it.
        let wanted = self.peer.node;
        if wanted != NodeId::default() && wanted != verdict.node {
            return Err(Refused::WrongNode);
        }
        let clusters = [intro.cluster, verdict.cluster];
        if clusters[0] != clusters[1] && !clusters.contains(&0) {
            return Err(Refused::Status(Status::WrongCluster));
        }
        if (self.host.is_removed)(verdict.node) {
            return Err(Refused::Status(Status::Removed));
        }
        Ok(())
    }

    /// Sends what queues, once a tick, until the connection breaks.
    async fn send(&self, stream: &TcpStream) -> io::Error {
        let mut out = Output::default();
        loop {
            if self.queue.borrow().is_empty() && !self.ping_wanted.get() {
                self.work.wait().await;
            }
            self.host.env.end_of_tick().await;
            self.frame_queue(&mut out);
            if out.is_empty() {
                continue;
            }
            match out.take().send(stream).await {
                Ok(Some(buffer)) => out.recycle(buffer),
                Ok(None) => {}
                Err(error) => return error,
            }
        }
    }

    /// Moves the queue into frames. From here on the calls are in doubt until they are answered.
    fn frame_queue(&self, out: &mut Output) {
        if self.ping_wanted.take() {
            let header = Header {
                kind: KIND_PING,
                flags: 0,
                request: 0,
            };
            frame::encode(out.buffer(), header, &[]);
        }
        let mut queue = self.queue.borrow_mut();
        let mut waiting = self.waiting.borrow_mut();
        for queued in queue.drain(..) {
            if !queued.call.is_wanted() {
                // Its caller has gone or its time is up: the answer would be thrown away.
                continue;
            }
            let id = self.next_request.get();
            self.next_request.set(id + 1);
            let header = Header {
                kind: KIND_REQUEST,
                flags: u16::try_from(queued.class.index()).expect("there are five classes"),
                request: id,
            };
            append_frame(out, header, queued.request);
            waiting.insert(id, queued.call);
        }
        self.queued_bytes.set(0);
    }

    /// Receives answers until the connection breaks.
    async fn receive(&self, stream: &TcpStream, mut input: BytesMut) -> io::Error {
        loop {
            loop {
                match frame::decode(&mut input, LINK_FRAME_BYTES_MAX) {
                    Ok(None) => break,
                    Ok(Some(frame)) if frame.header.kind == KIND_ANSWER => {
                        let call = self.waiting.borrow_mut().remove(&frame.header.request);
                        if let Some(call) = call {
                            call.complete(Ok(frame.payload));
                        }
                    }
                    // A pong, or something of a later version.
                    Ok(Some(_)) => {}
                    Err(error) => return io::Error::new(io::ErrorKind::InvalidData, error),
                }
            }
            if input.capacity() - input.len() < RECEIVE_BYTES / 4 {
                input.reserve(RECEIVE_BYTES);
            }
            let (received, buffer) = stream.recv(input).await;
            input = buffer;
            match received {
                Ok(0) => return io::ErrorKind::UnexpectedEof.into(),
                Ok(_) => self.heard_at.set(self.host.env.now()),
                Err(error) => return error,
            }
        }
    }

    /// Notices a peer that has gone silent, and forgets calls that nobody waits for any more.
    async fn watch(&self) -> io::Error {
        let env = &self.host.env;
        loop {
            env.sleep(PING_AFTER).await;
            self.waiting.borrow_mut().retain(|_, call| call.is_wanted());
            let silence = env.now() - self.heard_at.get();
            if silence > SILENCE_MAX {
                return io::Error::new(io::ErrorKind::TimedOut, "the peer has gone silent");
            }
            if silence > PING_AFTER {
                self.ping_wanted.set(true);
                self.work.notify();
            }
        }
    }
}

/// Appends a frame: small payloads are copied together, large ones sent from where they are.
pub(super) fn append_frame(out: &mut Output, header: Header, payload: Bytes) {
    let buffer = out.buffer();
    let start = frame::begin(buffer, header);
    frame::finish_with(buffer, start, &payload);
    out.append(payload);
}

/// A factor between one half and one and a half.
fn jitter(random: u64) -> f64 {
    let part = u32::try_from(random >> 32).expect("half of 64 bits");
    0.5 + f64::from(part) / f64::from(u32::MAX)
}

/// Why a connection did not come about. Nothing was sent over it.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Protocol(String),
    #[error("another node answers at this address")]
    WrongNode,
    #[error("the peer refuses the link: {0:?}")]
    Status(Status),
}

impl Refused {
    fn as_call_error(&self) -> CallError {
        match self {
            Refused::WrongNode => CallError::WrongNode,
            Refused::Io(_) | Refused::Protocol(_) | Refused::Status(_) => CallError::Unreachable,
        }
    }
}
