//! A link that another node opened: its requests in, this node's answers out.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, select};
use torc_client::wire::frame::{self, FrameError, Header};
use torc_env::{Class, Env, Origin, ShardId};
use torc_runtime::{RealEnv, TcpStream};

use crate::limits::RECEIVE_BYTES;
use crate::link::handshake::{INTRO_BYTES, Intro, Status, VERSION, Verdict};
use crate::link::outgoing::append_frame;
use crate::link::{
    CONNECT_TIMEOUT, Host, KIND_ANSWER, KIND_PING, KIND_PONG, KIND_REQUEST, LINK_FRAME_BYTES_MAX,
};
use crate::output::Output;
use crate::signal::{Flag, Signal};

/// Requests of one link that are handled at a time; nothing is received while there are so many.
const LINK_RUNNING_MAX: usize = 1 << 10;
/// Bytes of answers of one link above which nothing is received.
const LINK_OUTPUT_BYTES_MAX: usize = 16 << 20;
/// A link without a request is closed after this time; its peer opens another when it needs one.
const LINK_IDLE_MAX: Duration = Duration::from_secs(600);

/// Receives the introduction of whoever connected to the internode port. Returns it with what was
/// received behind it; `None` when it is no node or too slow.
pub async fn receive_intro(env: &RealEnv, stream: &TcpStream) -> Option<(Intro, BytesMut)> {
    let receiving = Box::pin(async {
        let mut input = BytesMut::with_capacity(INTRO_BYTES * 2);
        loop {
            let (received, buffer) = stream.recv(input).await;
            input = buffer;
            if !received.is_ok_and(|bytes| bytes > 0) {
                return None;
            }
            match Intro::decode(&mut input) {
                Ok(Some(intro)) => return Some((intro, input)),
                Ok(None) => input.reserve(INTRO_BYTES),
                Err(error) => {
                    tracing::debug!("a connection to the internode port is dropped: {error}");
                    return None;
                }
            }
        }
    });
    match select(receiving, Box::pin(env.sleep(CONNECT_TIMEOUT))).await {
        Either::Left((intro, _)) => intro,
        Either::Right(_) => None,
    }
}

/// The shard that serves a link; a node that has fewer shards answers with its shard 0.
pub fn serving_shard(env: &RealEnv, intro: &Intro) -> ShardId {
    if intro.to_shard.0 < env.shard_count() {
        intro.to_shard
    } else {
        ShardId(0)
    }
}

struct Incoming {
    host: Rc<Host>,
    origin: Origin,
    out: RefCell<Output>,
    running: Cell<usize>,
    /// Answers wait to be sent.
    answers: Signal,
    /// Room was made: an answer is done or was sent.
    room: Signal,
}

/// Serves a link on the shard that it is meant for, until it breaks or `stop` is raised. `input` is
/// what was received behind the introduction.
pub async fn serve(
    host: Rc<Host>,
    stream: TcpStream,
    intro: Intro,
    input: BytesMut,
    stop: Rc<Flag>,
) {
    let env = host.env.clone();
    let cluster = (host.cluster)();
    let status = intro.judge(env.node(), cluster, |node| (host.is_removed)(node));
    let verdict = Verdict {
        version: VERSION,
        status,
        node: env.node(),
        shard: env.shard(),
        shard_count: env.shard_count(),
        cluster,
    };
    let mut out = BytesMut::new();
    verdict.encode(&mut out);
    let (sent, _) = stream.send_buffer(out).await;
    if status != Status::Ready || sent.is_err() {
        tracing::info!(node = %intro.node, ?status, "a node is refused");
        return;
    }
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!("a link without TCP_NODELAY: {error}");
    }
    let link = Rc::new(Incoming {
        host,
        origin: Origin {
            node: intro.node,
            shard: intro.shard,
        },
        out: RefCell::default(),
        running: Cell::new(0),
        answers: Signal::default(),
        room: Signal::default(),
    });
    let receiving = Rc::clone(&link).receive(&stream, input);
    let sending = link.send(&stream);
    let ended = select(
        Box::pin(stop.wait()),
        select(Box::pin(receiving), Box::pin(sending)),
    );
    match ended.await {
        Either::Left(_) => {}
        Either::Right((Either::Left((end, _)) | Either::Right((end, _)), _)) => {
            tracing::debug!(node = %intro.node, "a link of a peer ended: {end}");
        }
    }
}

impl Incoming {
    async fn receive(self: Rc<Self>, stream: &TcpStream, mut input: BytesMut) -> io::Error {
        loop {
            if let Err(error) = self.handle_frames(&mut input) {
                tracing::warn!(node = %self.origin.node, "a link carries damaged frames: {error}");
                return io::Error::new(io::ErrorKind::InvalidData, error);
            }
            while self.is_full() {
                self.room.wait().await;
            }
            if frame::HEADER_BYTES <= input.len() && self.has_frame(&input) {
                continue;
            }
            if input.capacity() - input.len() < RECEIVE_BYTES / 4 {
                input.reserve(RECEIVE_BYTES);
            }
            let receiving = Box::pin(stream.recv(input));
            let idle = Box::pin(self.host.env.sleep(LINK_IDLE_MAX));
            let (received, buffer) = match select(receiving, idle).await {
                Either::Left((received, _)) => received,
                Either::Right(_) => return io::Error::new(io::ErrorKind::TimedOut, "idle"),
            };
            input = buffer;
            match received {
                Ok(0) => return io::ErrorKind::UnexpectedEof.into(),
                Ok(_) => {}
                Err(error) => return error,
            }
        }
    }

    fn is_full(&self) -> bool {
        self.running.get() >= LINK_RUNNING_MAX || self.out.borrow().len() >= LINK_OUTPUT_BYTES_MAX
    }

    /// Whether a whole frame waits in `input`.
    fn has_frame(&self, input: &BytesMut) -> bool {
        let length = input.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        length.is_some_and(|length| input.len() as u64 >= u64::from(length) + 4)
    }

    /// Starts what came, as far as there is room.
    fn handle_frames(self: &Rc<Self>, input: &mut BytesMut) -> Result<(), FrameError> {
        while !self.is_full() {
            let Some(frame) = frame::decode(input, LINK_FRAME_BYTES_MAX)? else {
                break;
            };
            match frame.header.kind {
                KIND_REQUEST => self.start(frame.header, frame.payload),
                KIND_PING => self.respond(KIND_PONG, frame.header.request, Bytes::new()),
                // Kinds of later versions.
                _ => {}
            }
        }
        Ok(())
    }

    fn start(self: &Rc<Self>, header: Header, request: Bytes) {
        self.running.set(self.running.get() + 1);
        let answer = (self.host.serve)(self.origin, request);
        let link = Rc::clone(self);
        self.host.env.spawn(served_class(header.flags), async move {
            let answer = answer.await;
            link.running.set(link.running.get() - 1);
            link.respond(KIND_ANSWER, header.request, answer);
            link.room.notify();
        });
    }

    fn respond(&self, kind: u8, request: u64, payload: Bytes) {
        if frame::HEADER_BYTES + payload.len() > LINK_FRAME_BYTES_MAX {
            // No answer: the caller's deadline says what there is to say.
            tracing::error!(bytes = payload.len(), "an answer is too large for a link");
            return;
        }
        let header = Header {
            kind,
            flags: 0,
            request,
        };
        append_frame(&mut self.out.borrow_mut(), header, payload);
        self.answers.notify();
    }

    async fn send(&self, stream: &TcpStream) -> io::Error {
        loop {
            self.answers.wait().await;
            self.host.env.end_of_tick().await;
            let sending = self.out.borrow_mut().take();
            match sending.send(stream).await {
                Ok(Some(buffer)) => self.out.borrow_mut().recycle(buffer),
                Ok(None) => {}
                Err(error) => return error,
            }
            self.room.notify();
        }
    }
}

/// The class in which a peer's request is handled: what is foreground there is replication here, so
/// that this node's own clients and its peers share the time.
fn served_class(flags: u16) -> Class {
    match Class::ALL.get(usize::from(flags)) {
        Some(Class::Control) => Class::Control,
        Some(Class::Repair) => Class::Repair,
        _ => Class::Replication,
    }
}
