//! One client connection: receive, start requests, collect answers, send.
//!
//! On the path: the listener hands a socket to [`serve`]; a [`Protocol`] (HTTP, RESP, binary) turns
//! bytes into requests and answers into bytes; requests of one connection run concurrently as far as
//! their keys allow, and everything that became ready in a tick leaves in one send.
//!
//! Invariants:
//! - a request starts only when no request before it touches its key in a conflicting way, so a
//!   client that pipelines sees its operations happen in the order in which it sent them;
//! - answers of an ordered protocol leave in the order of their requests;
//! - what a client can make this end hold is bounded: requests under way, bytes of answers (nothing
//!   is received while they wait), bytes of a request, and the time for each; and what all clients of the
//!   shard can together ([`Held`]).
//!
//! It deliberately knows neither protocols nor keys.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::FutureExt;
use futures_util::future::{Fuse, LocalBoxFuture};
use futures_util::stream::{FuturesOrdered, FuturesUnordered, StreamExt};
use torc_cluster::api::VALUE_BYTES_MAX;
use torc_cluster::held::{Charge, Held};
use torc_env::{Env, Instant};
use torc_runtime::{RealEnv, TcpStream};

use crate::limits::{
    IDLE_TIMEOUT, OUTPUT_BYTES_MAX, PIPELINE_ANSWER_BYTES_MAX, PIPELINE_OPERATIONS_MAX,
    RECEIVE_BYTES, REQUEST_TIMEOUT, SEND_TIMEOUT, SLOW_BYTES_PER_SECOND, TICK_BYTES_MAX,
    TICK_OPERATIONS_MAX,
};
use crate::output::Output;
use crate::signal::Flag;

/// How often a connection looks at its time limits. Coarse, so that thousands of idle connections
/// cost nothing.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// How long a refused client may go on sending before it is cut off, so that it gets to read why.
const LINGER: Duration = Duration::from_secs(2);
/// Requests up to this size are received to their end even when the shard holds too much for its clients.
const LARGE_REQUEST_BYTES: usize = 64 << 10;
/// How long a client may still send requests once the server stops. An answer says that the connection ends, where
/// its protocol can.
const STOP_GRACE: Duration = Duration::from_millis(300);
/// A connection that was silent this long gives its receive buffer back while it waits.
const SILENT: Duration = Duration::from_secs(1);

/// What a request touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touches {
    /// Nothing that another request could see.
    Nothing,
    /// One key, by its hash.
    Key {
        /// Hash of keyspace and key. Requests whose hashes collide merely wait for each other.
        hash: u128,
        /// Whether it is changed.
        write: bool,
    },
    /// Several keys, or all.
    Everything {
        /// Whether they are changed.
        write: bool,
    },
}

impl Touches {
    fn writes(self) -> bool {
        match self {
            Touches::Nothing => false,
            Touches::Key { write, .. } | Touches::Everything { write } => write,
        }
    }

    /// Whether the two must not run at the same time.
    fn conflicts(self, other: Touches) -> bool {
        if !self.writes() && !other.writes() {
            return false;
        }
        match (self, other) {
            (Touches::Nothing, _) | (_, Touches::Nothing) => false,
            (Touches::Key { hash, .. }, Touches::Key { hash: other, .. }) => hash == other,
            (Touches::Everything { .. }, _) | (_, Touches::Everything { .. }) => true,
        }
    }
}

/// What [`Protocol::parse`] found.
pub enum Parsed<P: Protocol + ?Sized> {
    /// More bytes are needed.
    More,
    /// A request to start.
    Request(P::Request, Touches),
    /// An answer that needs nothing.
    Answer(P::Answer),
}

/// What follows an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The next one.
    Next,
    /// The end: the client knows that nothing follows.
    Close,
    /// The end, while the client may still be sending.
    Linger,
}

/// What a client is told that is sent away in the middle of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastWord {
    /// It took too long to send it.
    TooSlow,
    /// It is large, and the shard holds too much for its clients.
    Overloaded,
}

/// A client protocol on one connection.
pub trait Protocol: 'static {
    /// A request as parsed.
    type Request: 'static;
    /// An answer that is not bytes yet.
    type Answer: 'static;
    /// Whether answers must come in the order of their requests.
    const ORDERED: bool;

    /// Takes the next request off the front of `input`.
    fn parse(&mut self, input: &mut BytesMut) -> Parsed<Self>;
    /// Whether a request is partly received.
    fn in_request(&self, input: &BytesMut) -> bool;
    /// Whether what comes of that request is thrown away.
    fn throws_away(&self) -> bool {
        false
    }
    /// Starts a request.
    fn start(&mut self, request: Self::Request) -> LocalBoxFuture<'static, Self::Answer>;
    /// Appends an answer's bytes.
    fn write(&mut self, answer: Self::Answer, out: &mut Output) -> After;
    /// The last word to a client.
    fn last_word(&mut self, word: LastWord, out: &mut Output);
}

/// Requests under way and their answers.
struct Running<A> {
    /// The only one. Most clients have one at a time, which needs no set to be found in and no waker of its own.
    single: Option<Request<A>>,
    /// All of them, when there are several or were since the last moment without any.
    many: Many<A>,
}

enum Many<A> {
    Ordered(FuturesOrdered<Request<A>>),
    Unordered(FuturesUnordered<Request<A>>),
}

/// A request under way.
struct Request<A> {
    touches: Touches,
    /// What was received of it.
    bytes: usize,
    answer: LocalBoxFuture<'static, A>,
}

/// A request that has its answer.
struct Answered<A> {
    touches: Touches,
    bytes: usize,
    answer: A,
}

impl<A> Future for Request<A> {
    type Output = Answered<A>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answered<A>> {
        let (touches, bytes) = (self.touches, self.bytes);
        self.answer.as_mut().poll(cx).map(|answer| Answered {
            touches,
            bytes,
            answer,
        })
    }
}

impl<A: 'static> Running<A> {
    fn new(ordered: bool) -> Self {
        let many = if ordered {
            Many::Ordered(FuturesOrdered::new())
        } else {
            Many::Unordered(FuturesUnordered::new())
        };
        Self { single: None, many }
    }

    fn push(&mut self, request: Request<A>) {
        if self.len() == 0 {
            self.single = Some(request);
            return;
        }
        if let Some(older) = self.single.take() {
            self.many.push(older);
        }
        self.many.push(request);
    }

    fn len(&self) -> usize {
        usize::from(self.single.is_some()) + self.many.len()
    }

    /// The next answer that is ready; `None` when there is none now.
    fn next(&mut self, cx: &mut Context<'_>) -> Option<Answered<A>> {
        let Some(single) = &mut self.single else {
            return self.many.next(cx);
        };
        match single.poll_unpin(cx) {
            Poll::Ready(answer) => {
                self.single = None;
                Some(answer)
            }
            Poll::Pending => None,
        }
    }
}

impl<A: 'static> Many<A> {
    fn push(&mut self, request: Request<A>) {
        match self {
            Many::Ordered(running) => running.push_back(request),
            Many::Unordered(running) => running.push(request),
        }
    }

    fn len(&self) -> usize {
        match self {
            Many::Ordered(running) => running.len(),
            Many::Unordered(running) => running.len(),
        }
    }

    /// See [`Running::next`].
    fn next(&mut self, cx: &mut Context<'_>) -> Option<Answered<A>> {
        let next = match self {
            Many::Ordered(running) => running.poll_next_unpin(cx),
            Many::Unordered(running) => running.poll_next_unpin(cx),
        };
        match next {
            Poll::Ready(answer) => answer,
            Poll::Pending => None,
        }
    }
}

/// What a connection waits for.
enum Event {
    /// A receive is done.
    Received(std::io::Result<usize>, BytesMut),
    /// A send is done.
    Sent(std::io::Result<Option<BytesMut>>),
    /// Answers were written, or requests that had to wait may start.
    Progress,
    /// Time to look at the limits.
    Check,
    /// The server stops.
    Stop,
}

/// Why a connection ends.
enum End {
    /// At once: nobody listens any more.
    Now,
    /// When everything is sent.
    Flushed(After),
}

struct Connection<P: Protocol> {
    protocol: P,
    env: RealEnv,
    /// `None` while a receive has it.
    input: Option<BytesMut>,
    /// What it held when it was last here.
    input_bytes: usize,
    out: Rc<RefCell<Output>>,
    running: Running<P::Answer>,
    /// What the running requests touch.
    touched: Vec<Touches>,
    /// Bytes of the running requests.
    running_bytes: usize,
    /// How large answers are, about: the last one, or half of what it was before. The largest value, at first.
    answer_bytes: usize,
    held: Rc<Held>,
    /// What this connection holds.
    charge: Charge,
    /// A request that must wait for others, and its bytes.
    blocked: Option<(P::Request, Touches, usize)>,
    /// What is received may not start yet, so nothing more is received.
    is_held_up: bool,
    /// Nothing more is started after this.
    end: Option<End>,
    /// The client sends nothing more; what it has sent is still answered.
    is_at_end_of_stream: bool,
    /// When the request that is being received was the next one to arrive.
    request_since: Option<Instant>,
    /// How much of it has come, with what a parser has taken out of the buffer.
    request_bytes: usize,
    send_since: Option<Instant>,
    active_at: Instant,
}

/// Serves a client until it leaves, breaks the protocol or a limit, or `stop` is raised. `input` is
/// what was received already.
pub async fn serve<P: Protocol>(
    env: RealEnv,
    stream: TcpStream,
    input: BytesMut,
    protocol: P,
    stop: Rc<Flag>,
    held: Rc<Held>,
) {
    let now = env.now();
    let mut connection = Connection {
        protocol,
        env: env.clone(),
        input: None,
        input_bytes: 0,
        out: Rc::default(),
        running: Running::new(P::ORDERED),
        touched: Vec::new(),
        running_bytes: 0,
        answer_bytes: VALUE_BYTES_MAX,
        held: Rc::clone(&held),
        charge: held.charge(),
        blocked: None,
        is_held_up: false,
        end: None,
        is_at_end_of_stream: false,
        request_since: None,
        request_bytes: 0,
        send_since: None,
        active_at: now,
    };
    let mut receiving = pin!(Fuse::terminated());
    let mut sending = pin!(Fuse::terminated());
    let mut checking = pin!(env.sleep(CHECK_INTERVAL).fuse());
    let mut stopping = pin!(stop.wait().fuse());
    // Bytes that came with the handshake count as received; without any, the buffer is not needed
    // before something comes.
    let mut silent = input.is_empty();
    let mut is_stopping = false;
    connection.input = Some(input);
    loop {
        let more = connection.start_requests();
        connection.account();
        if let Some(buffer) = connection.take_input_to_receive(more) {
            receiving.set(receive(&stream, buffer, silent).fuse());
        }
        if connection.send_since.is_none() && !connection.out.borrow().is_empty() {
            connection.send_since = Some(env.now());
            // Without another request nothing can gather behind what is there.
            let gathers = more || connection.running.len() > 0;
            sending.set(flush(&env, &stream, Rc::clone(&connection.out), gathers).fuse());
        }
        if connection.is_done(more) {
            break;
        }
        let mut yielded = false;
        let event = poll_fn(|cx| {
            if connection.collect(cx) {
                return Poll::Ready(Event::Progress);
            }
            if let Poll::Ready((received, buffer)) = receiving.as_mut().poll(cx) {
                return Poll::Ready(Event::Received(received, buffer));
            }
            if let Poll::Ready(sent) = sending.as_mut().poll(cx) {
                return Poll::Ready(Event::Sent(sent));
            }
            if stopping.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Stop);
            }
            if checking.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Check);
            }
            if more {
                // The tick's share is used up: the others have their turn, then it goes on.
                if std::mem::replace(&mut yielded, true) {
                    return Poll::Ready(Event::Progress);
                }
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await;
        match event {
            Event::Progress => {}
            Event::Received(received, buffer) => {
                let now = env.now();
                silent = now.since(connection.active_at) > SILENT;
                connection.received(received, buffer, now);
                if held.is_full() {
                    connection.give_way();
                }
            }
            Event::Sent(sent) => connection.sent(sent),
            Event::Stop => {
                // A client that sends a request at this moment still has it answered.
                is_stopping = true;
                checking.set(env.sleep(STOP_GRACE).fuse());
            }
            Event::Check => {
                if is_stopping {
                    connection.stop();
                }
                connection.check();
                checking.set(env.sleep(CHECK_INTERVAL).fuse());
            }
        }
    }
    // A refusal that waited for the answers before it has left a receive behind.
    receiving.set(Fuse::terminated());
    if matches!(connection.end, Some(End::Flushed(After::Linger))) {
        linger(&env, &stream).await;
    }
}

impl<P: Protocol> Connection<P> {
    /// Parses and starts what this tick allows. Returns whether there is more that could start.
    fn start_requests(&mut self) -> bool {
        let mut input = match self.input.take() {
            Some(input) if self.end.is_none() => input,
            other => {
                self.input = other;
                return false;
            }
        };
        let mut operations = 0;
        let before = input.len();
        if self.request_since.is_none() {
            self.request_bytes = before;
        }
        let more = loop {
            self.is_held_up = !self.may_start();
            if self.is_held_up {
                break false;
            }
            if operations >= TICK_OPERATIONS_MAX || before - input.len() >= TICK_BYTES_MAX {
                break !input.is_empty();
            }
            let (parsed, bytes) = match self.blocked.take() {
                Some((request, touches, bytes)) => (Parsed::Request(request, touches), bytes),
                None => {
                    let parsed = self.protocol.parse(&mut input);
                    let bytes = self.request_bytes - input.len();
                    if !matches!(parsed, Parsed::More) {
                        self.request_since = None;
                        self.request_bytes = input.len();
                    }
                    (parsed, bytes)
                }
            };
            match parsed {
                Parsed::More => break false,
                Parsed::Answer(answer) => {
                    operations += 1;
                    if self.running.len() == 0 || !P::ORDERED {
                        self.write(answer);
                        if self.end.is_some() {
                            break false;
                        }
                    } else {
                        let answer = std::future::ready(answer).boxed_local();
                        self.run(Touches::Nothing, bytes, answer);
                    }
                }
                Parsed::Request(request, touches) => {
                    if self.touched.iter().any(|other| touches.conflicts(*other)) {
                        self.blocked = Some((request, touches, bytes));
                        break false;
                    }
                    operations += 1;
                    let answer = self.protocol.start(request);
                    self.run(touches, bytes, answer);
                }
            }
        };
        self.input = Some(input);
        self.note_partial_request();
        more
    }

    /// Whether one more request may run. A pipeline of large answers goes on as they are sent; where nothing is
    /// under way, one always may.
    fn may_start(&self) -> bool {
        let running = self.running.len();
        let out = self.out.borrow();
        if running >= PIPELINE_OPERATIONS_MAX || out.len() >= OUTPUT_BYTES_MAX {
            return false;
        }
        if self.held.is_full() {
            // Small answers are never refused: whoever does not read them gets no more of them.
            return running == 0 && out.held_bytes() < LARGE_REQUEST_BYTES;
        }
        running == 0 || running * self.answer_bytes < PIPELINE_ANSWER_BYTES_MAX
    }

    fn run(&mut self, touches: Touches, bytes: usize, answer: LocalBoxFuture<'static, P::Answer>) {
        self.running.push(Request {
            touches,
            bytes,
            answer,
        });
        self.touched.push(touches);
        self.running_bytes += bytes;
    }

    /// Says what this connection holds: requests, as far as they were received, and answers that are not sent.
    fn account(&mut self) {
        // A receive that has the buffer adds to what was there before it.
        if let Some(input) = &self.input {
            self.input_bytes = input.len();
        }
        let blocked = self.blocked.as_ref().map_or(0, |(.., bytes)| *bytes);
        let out = self.out.borrow().held_bytes();
        self.charge
            .set(self.partial_bytes() + blocked + self.running_bytes + out);
    }

    /// What is there of requests that have not begun. A parser may have taken it out of the buffer already.
    fn partial_bytes(&self) -> usize {
        let of_request = match self.request_since {
            Some(_) if !self.protocol.throws_away() => self.request_bytes,
            _ => 0,
        };
        self.input_bytes.max(of_request)
    }

    /// Keeps the clock of a request that is partly received.
    fn note_partial_request(&mut self) {
        let Some(input) = &self.input else { return };
        if self.end.is_none() && self.blocked.is_none() && self.protocol.in_request(input) {
            self.request_since.get_or_insert_with(|| self.env.now());
        } else {
            self.request_since = None;
        }
    }

    /// The input buffer, when the next thing to do with it is to receive into it: `more` requests in it could not start
    /// while a receive has it.
    fn take_input_to_receive(&mut self, more: bool) -> Option<BytesMut> {
        let may_receive = !more
            && self.end.is_none()
            && !self.is_at_end_of_stream
            && self.blocked.is_none()
            && !self.is_held_up;
        if may_receive { self.input.take() } else { None }
    }

    /// Writes the answers that are ready. Returns whether there was one.
    fn collect(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        while let Some(answered) = self.running.next(cx) {
            progress = true;
            let touches = answered.touches;
            if let Some(at) = self.touched.iter().position(|other| *other == touches) {
                self.touched.swap_remove(at);
            }
            self.running_bytes -= answered.bytes;
            self.write(answered.answer);
        }
        progress
    }

    fn write(&mut self, answer: P::Answer) {
        if !matches!(self.end, None | Some(End::Flushed(After::Next))) {
            // Nothing follows the answer that closes.
            return;
        }
        let mut out = self.out.borrow_mut();
        let before = out.len();
        let after = self.protocol.write(answer, &mut out);
        self.answer_bytes = (self.answer_bytes / 2).max(out.len() - before);
        drop(out);
        if after != After::Next {
            self.end = Some(End::Flushed(after));
        }
    }

    fn received(&mut self, received: std::io::Result<usize>, buffer: BytesMut, now: Instant) {
        self.active_at = now;
        self.input = Some(buffer);
        match received {
            Ok(0) => self.is_at_end_of_stream = true,
            Ok(bytes) => self.request_bytes += bytes,
            Err(_) => self.end = Some(End::Now),
        }
    }

    /// Ends the connection if it is in the middle of sending a large request: the shard holds too much.
    fn give_way(&mut self) {
        // Behind requests under way a refusal would be taken for their answer.
        if self.partial_bytes() > LARGE_REQUEST_BYTES && self.running.len() == 0 {
            self.send_away(LastWord::Overloaded);
        }
    }

    fn send_away(&mut self, word: LastWord) {
        if self.end.is_none() {
            self.protocol.last_word(word, &mut self.out.borrow_mut());
            self.end = Some(End::Flushed(After::Linger));
            self.input = None;
        }
    }

    fn sent(&mut self, sent: std::io::Result<Option<BytesMut>>) {
        self.send_since = None;
        self.out.borrow_mut().sent();
        self.active_at = self.env.now();
        match sent {
            Ok(Some(buffer)) => self.out.borrow_mut().recycle(buffer),
            Ok(None) => {}
            Err(_) => self.end = Some(End::Now),
        }
    }

    /// The server stops: what runs is answered, nothing else is started.
    fn stop(&mut self) {
        self.end.get_or_insert(End::Flushed(After::Next));
    }

    /// Ends connections that are idle, send a request too slowly, or do not take their answers.
    fn check(&mut self) {
        let now = self.env.now();
        if self
            .send_since
            .is_some_and(|since| now.since(since) > SEND_TIMEOUT)
        {
            self.end = Some(End::Now);
            return;
        }
        if let Some(since) = self.request_since {
            let paced = Duration::from_secs(self.request_bytes as u64 / SLOW_BYTES_PER_SECOND);
            // Behind requests under way a refusal would be taken for their answer.
            if now.since(since) > REQUEST_TIMEOUT + paced && self.running.len() == 0 {
                self.send_away(LastWord::TooSlow);
            }
            return;
        }
        let is_idle = self.running.len() == 0 && self.out.borrow().is_empty();
        if is_idle && self.send_since.is_none() && now.since(self.active_at) > IDLE_TIMEOUT {
            self.end.get_or_insert(End::Now);
        }
    }

    /// `more`: whether something that was received could still start.
    fn is_done(&self, more: bool) -> bool {
        let is_sent = self.send_since.is_none() && self.out.borrow().is_empty();
        let is_answered = self.running.len() == 0;
        match self.end {
            None => {
                let is_heard = self.is_at_end_of_stream && self.blocked.is_none() && !more;
                is_heard && is_answered && is_sent
            }
            Some(End::Now) => true,
            // Behind the answer that closes nothing is awaited.
            Some(End::Flushed(After::Close | After::Linger)) => is_sent,
            Some(End::Flushed(After::Next)) => is_answered && is_sent,
        }
    }
}

/// Receives behind the content of `buffer`. A silent connection holds no buffer while it waits.
async fn receive(
    stream: &TcpStream,
    mut buffer: BytesMut,
    silent: bool,
) -> (std::io::Result<usize>, BytesMut) {
    if silent && buffer.is_empty() {
        buffer = BytesMut::new();
        if let Err(error) = stream.readable().await {
            return (Err(error), buffer);
        }
    }
    // A parser that waits for a large message has made room already.
    if buffer.capacity() - buffer.len() < RECEIVE_BYTES / 4 {
        buffer.reserve(RECEIVE_BYTES);
    }
    stream.recv(buffer).await
}

/// Sends what is there, with what `gathers` behind it until the end of the tick.
async fn flush(
    env: &RealEnv,
    stream: &TcpStream,
    out: Rc<RefCell<Output>>,
    gathers: bool,
) -> std::io::Result<Option<BytesMut>> {
    if gathers {
        env.end_of_tick().await;
    }
    let sending = out.borrow_mut().take();
    sending.send(stream).await
}

/// Lets the peer finish sending, unheard, so that it reads the last answer instead of a reset.
async fn linger(env: &RealEnv, stream: &TcpStream) {
    if stream.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let drain = async {
        let mut buffer = BytesMut::with_capacity(RECEIVE_BYTES);
        loop {
            buffer.clear();
            let (received, back) = stream.recv(buffer).await;
            buffer = back;
            if !received.is_ok_and(|bytes| bytes > 0) {
                return;
            }
        }
    };
    let mut drain = pin!(drain);
    let mut patience = pin!(env.sleep(LINGER));
    poll_fn(|cx| {
        let drained = drain.as_mut().poll(cx).is_ready();
        if drained || patience.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_that_could_see_each_other_wait_for_each_other() {
        let key = |hash, write| Touches::Key { hash, write };
        assert!(!key(1, false).conflicts(key(1, false)));
        assert!(key(1, true).conflicts(key(1, false)));
        assert!(key(1, false).conflicts(key(1, true)));
        assert!(!key(1, true).conflicts(key(2, true)));
        let all = |write| Touches::Everything { write };
        assert!(all(false).conflicts(key(1, true)));
        assert!(!all(false).conflicts(key(1, false)));
        assert!(all(true).conflicts(all(false)));
        assert!(!all(true).conflicts(Touches::Nothing));
    }
}
