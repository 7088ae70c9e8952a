//! Requests and replies between the shards of a node, without locks.
//!
//! Between any two shards run four bounded single-producer single-consumer queues: a request lane
//! and a reply lane each way. A shard has at most as many requests outstanding with another as the
//! reply lane holds, and takes a credit back only when it has taken the reply out. So pushing a
//! reply never fails, and two shards cannot block each other. A full lane refuses the request
//! early ([`CallError::Overloaded`]); nothing ever waits here.
//!
//! Whoever filled a lane rings the other shard's doorbell once, at the end of its tick.

use std::cell::RefCell;
use std::sync::Arc;

use rtrb::{Consumer, Producer, RingBuffer};
use torc_env::{Bytes, CallError, Class, Instant, ShardId};

use crate::calls::CallId;
use crate::executor::Foreign;

/// All lanes of a node together take at most this much memory (without the payloads).
const MESH_BYTES_MAX: usize = 16 << 20;
/// A lane holds at least this many messages, however many shards there are.
const LANE_MESSAGES_MIN: usize = 16;
/// More outstanding requests than this between two shards would only hide an overload.
const LANE_MESSAGES_MAX: usize = 2048;
/// A tick takes at most this many messages from one lane, so that one busy shard does not keep the
/// others' replies waiting.
const BATCH_MESSAGES_MAX: usize = 256;

/// A request on its way to another shard.
pub(crate) struct Request {
    /// The call of the sending shard.
    pub(crate) call: CallId,
    /// Class of the task that handles it.
    pub(crate) class: Class,
    /// Nobody waits for the answer any more after this.
    pub(crate) deadline: Instant,
    /// For the handler.
    pub(crate) payload: Bytes,
}

/// The answer on its way back.
pub(crate) struct Reply {
    /// The call of the receiving shard.
    pub(crate) call: CallId,
    /// For the caller.
    pub(crate) answer: Result<Bytes, CallError>,
}

/// One shard's ends of the four lanes to another shard.
struct Peer {
    requests: Producer<Request>,
    replies: Consumer<Reply>,
    incoming: Consumer<Request>,
    answers: Producer<Reply>,
    /// Requests sent whose replies have not been taken out.
    outstanding: usize,
    /// Something was pushed since the last doorbell.
    pushed: bool,
    foreign: Arc<Foreign>,
}

/// One shard's ends of all its lanes.
pub(crate) struct Mesh {
    /// By shard index; `None` at the shard's own.
    peers: RefCell<Vec<Option<Peer>>>,
}

/// What a tick took from the lanes; reused from tick to tick.
#[derive(Default)]
pub(crate) struct Inbox {
    /// Requests with their senders.
    pub(crate) requests: Vec<(ShardId, Request)>,
    /// Replies to this shard's calls.
    pub(crate) replies: Vec<Reply>,
}

/// Messages that a lane holds on a node with this many shards.
pub(crate) fn lane_messages(shards: usize) -> usize {
    let pairs = shards * shards.saturating_sub(1);
    let bytes = size_of::<Request>() + size_of::<Reply>();
    let fair = MESH_BYTES_MAX / bytes / pairs.max(1);
    let bounded = fair.clamp(LANE_MESSAGES_MIN, LANE_MESSAGES_MAX);
    1 << bounded.ilog2()
}

/// The meshes of all shards, in order.
pub(crate) fn build(shards: &[Arc<Foreign>]) -> Vec<Mesh> {
    let capacity = lane_messages(shards.len());
    let count = shards.len();
    let mut request_ends = grid(count, || RingBuffer::<Request>::new(capacity));
    let mut reply_ends = grid(count, || RingBuffer::<Reply>::new(capacity));
    (0..count)
        .map(|me| {
            let peers = (0..count)
                .map(|other| {
                    // Lane (a, b) carries requests from a to b, and the replies to them from b to a.
                    Some(Peer {
                        requests: request_ends.producers[me][other].take()?,
                        incoming: request_ends.consumers[other][me].take()?,
                        answers: reply_ends.producers[other][me].take()?,
                        replies: reply_ends.consumers[me][other].take()?,
                        outstanding: 0,
                        pushed: false,
                        foreign: Arc::clone(&shards[other]),
                    })
                })
                .collect();
            Mesh {
                peers: RefCell::new(peers),
            }
        })
        .collect()
}

/// Both ends of a lane for every ordered pair of distinct shards.
struct Grid<T> {
    producers: Vec<Vec<Option<Producer<T>>>>,
    consumers: Vec<Vec<Option<Consumer<T>>>>,
}

fn grid<T>(count: usize, mut lane: impl FnMut() -> (Producer<T>, Consumer<T>)) -> Grid<T> {
    let mut grid = Grid {
        producers: Vec::with_capacity(count),
        consumers: Vec::with_capacity(count),
    };
    for from in 0..count {
        let (producers, consumers) = (0..count)
            .map(|to| (from != to).then(&mut lane).unzip())
            .unzip();
        grid.producers.push(producers);
        grid.consumers.push(consumers);
    }
    grid
}

impl Mesh {
    /// Sends a request to another shard of this node.
    pub(crate) fn send(&self, to: ShardId, request: Request) -> Result<(), CallError> {
        let mut peers = self.peers.borrow_mut();
        let peer = peers
            .get_mut(usize::from(to.0))
            .and_then(Option::as_mut)
            .ok_or(CallError::Unreachable)?;
        if peer.requests.is_abandoned() {
            return Err(CallError::Unreachable);
        }
        if peer.outstanding == peer.answers.buffer().capacity() {
            return Err(CallError::Overloaded);
        }
        let pushed = peer.requests.push(request);
        assert!(
            pushed.is_ok(),
            "a request lane holds every outstanding request"
        );
        peer.outstanding += 1;
        peer.pushed = true;
        Ok(())
    }

    /// Sends the reply to a request that came from another shard.
    pub(crate) fn reply(&self, to: ShardId, reply: Reply) {
        let mut peers = self.peers.borrow_mut();
        let peer = peers[usize::from(to.0)]
            .as_mut()
            .expect("a request came from another shard");
        if peer.answers.is_abandoned() {
            return;
        }
        let pushed = peer.answers.push(reply);
        assert!(pushed.is_ok(), "credits keep a reply lane from filling up");
        peer.pushed = true;
    }

    /// Whether a lane to this shard holds something.
    pub(crate) fn has_incoming(&self) -> bool {
        self.peers
            .borrow()
            .iter()
            .flatten()
            .any(|peer| !peer.incoming.is_empty() || !peer.replies.is_empty())
    }

    /// Takes messages out of the lanes.
    pub(crate) fn take(&self, inbox: &mut Inbox) {
        let mut peers = self.peers.borrow_mut();
        for (from, peer) in (0..).map(ShardId).zip(peers.iter_mut()) {
            let Some(peer) = peer else { continue };
            let replies = inbox.replies.len();
            pop_batch(&mut peer.replies, |reply| inbox.replies.push(reply));
            peer.outstanding -= inbox.replies.len() - replies;
            pop_batch(&mut peer.incoming, |request| {
                inbox.requests.push((from, request));
            });
        }
    }

    /// Calls `wake` for every shard that must be woken because of what was pushed since the last
    /// call: it sleeps, and this shard has claimed its wake-up.
    pub(crate) fn ring_doorbells(&self, mut wake: impl FnMut(usize, &Foreign)) {
        let mut peers = self.peers.borrow_mut();
        for (index, peer) in peers.iter_mut().enumerate() {
            let Some(peer) = peer else { continue };
            if std::mem::take(&mut peer.pushed) && peer.foreign.doorbell.claim() {
                wake(index, &peer.foreign);
            }
        }
    }

    /// Wakes a shard by eventfd.
    pub(crate) fn signal(&self, shard: usize) {
        if let Some(Some(peer)) = self.peers.borrow().get(shard) {
            peer.foreign.doorbell.signal();
        }
    }
}

fn pop_batch<T>(lane: &mut Consumer<T>, mut each: impl FnMut(T)) {
    let waiting = lane.slots().min(BATCH_MESSAGES_MAX);
    if waiting == 0 {
        return;
    }
    if let Ok(chunk) = lane.read_chunk(waiting) {
        chunk.into_iter().for_each(&mut each);
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::calls::Calls;
    use crate::doorbell::Doorbell;

    fn meshes(count: usize) -> Vec<Mesh> {
        let shards: Vec<_> = (0..count)
            .map(|_| Arc::new(Foreign::new(Doorbell::new().unwrap())))
            .collect();
        build(&shards)
    }

    fn request(payload: &'static str) -> Request {
        let (call, _) = Rc::new(Calls::default()).open(Instant(0), Instant(1));
        Request {
            call,
            class: Class::Foreground,
            deadline: Instant(1),
            payload: Bytes::from(payload),
        }
    }

    #[test]
    fn a_message_arrives_where_it_was_sent_and_nowhere_else() {
        let meshes = meshes(3);
        meshes[0].send(ShardId(2), request("to 2")).unwrap();
        meshes[1].send(ShardId(2), request("from 1")).unwrap();
        assert!(!meshes[1].has_incoming());
        let mut inbox = Inbox::default();
        meshes[2].take(&mut inbox);
        let got: Vec<_> = inbox
            .requests
            .iter()
            .map(|(from, request)| (from.0, &request.payload[..]))
            .collect();
        assert_eq!(got, [(0, &b"to 2"[..]), (1, &b"from 1"[..])]);
    }

    #[test]
    fn requests_beyond_the_credits_are_refused_until_replies_are_taken() {
        let meshes = meshes(2);
        let credits = lane_messages(2);
        for _ in 0..credits {
            meshes[0].send(ShardId(1), request("")).unwrap();
        }
        assert_eq!(
            meshes[0].send(ShardId(1), request("")),
            Err(CallError::Overloaded)
        );
        let mut inbox = Inbox::default();
        while meshes[1].has_incoming() {
            meshes[1].take(&mut inbox);
        }
        assert_eq!(inbox.requests.len(), credits);
        for (from, request) in inbox.requests.drain(..) {
            let answer = Ok(request.payload);
            let call = request.call;
            meshes[1].reply(from, Reply { call, answer });
        }
        assert_eq!(
            meshes[0].send(ShardId(1), request("")),
            Err(CallError::Overloaded)
        );
        meshes[0].take(&mut inbox);
        assert_eq!(inbox.replies.len(), credits.min(BATCH_MESSAGES_MAX));
        meshes[0].send(ShardId(1), request("")).unwrap();
    }

    #[test]
    fn a_sleeping_shard_is_woken_once_for_a_whole_batch() {
        let meshes = meshes(2);
        let doorbell = |mesh: &Mesh| {
            let mut rung = 0;
            mesh.ring_doorbells(|_, _| rung += 1);
            rung
        };
        let foreign = Arc::clone(&meshes[0].peers.borrow()[1].as_ref().unwrap().foreign);
        foreign.doorbell.announce_sleep();
        for _ in 0..10 {
            meshes[0].send(ShardId(1), request("")).unwrap();
        }
        assert_eq!(doorbell(&meshes[0]), 1);
        meshes[0].send(ShardId(1), request("")).unwrap();
        assert_eq!(doorbell(&meshes[0]), 0, "awake already");
    }

    #[test]
    fn a_stopped_shard_is_unreachable() {
        let mut meshes = meshes(2);
        drop(meshes.pop());
        assert_eq!(
            meshes[0].send(ShardId(1), request("")),
            Err(CallError::Unreachable)
        );
        assert_eq!(
            meshes[0].send(ShardId(9), request("")),
            Err(CallError::Unreachable)
        );
    }

    #[test]
    fn the_mesh_of_a_large_node_stays_within_its_budget() {
        for shards in [2, 8, 64, 128] {
            let lanes = shards * (shards - 1);
            let bytes = lane_messages(shards) * (size_of::<Request>() + size_of::<Reply>());
            assert!(
                lanes * bytes <= MESH_BYTES_MAX || lane_messages(shards) == LANE_MESSAGES_MIN,
                "{shards} shards"
            );
        }
    }
}
