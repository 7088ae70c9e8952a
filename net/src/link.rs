//! Links between nodes: the remote half of `Env::call`.
//!
//! On the path: the runtime hands a call to another node to [`Links`]; the link to that node's shard
//! queues it, sends it with everything else of the tick, and completes it when its answer arrives.
//! On the other side [`incoming`] hands it to the cluster and sends the answer back.
//!
//! A link is one TCP connection for (this shard, that node, that shard); it carries this side's
//! requests and that side's answers. Requests the other way have a link of their own, so no answer
//! ever waits behind a request.
//!
//! Invariants:
//! - a call ends with an error that is true: [`CallError::Unreachable`], [`CallError::WrongNode`] and
//!   [`CallError::Overloaded`] only while its frame was not given to the socket, [`CallError::Lost`]
//!   after that;
//! - queues are bounded, and a link that is down refuses at once instead of queueing;
//! - a request id is never used twice on a connection.

pub mod handshake;
pub mod incoming;
mod outgoing;

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use hashbrown::HashMap;
use torc_env::{Address, CallError, Class, Env, Instant, NodeId, Origin, ShardId};
use torc_runtime::{PendingCall, RealEnv, RemoteCaller};

use crate::link::outgoing::Outgoing;

/// Frame kind of a request; the flags hold its class.
const KIND_REQUEST: u8 = 1;
/// Frame kind of an answer.
const KIND_ANSWER: u8 = 2;
/// Frame kind of a question whether the other side is there.
const KIND_PING: u8 = 3;
/// Frame kind of the answer to it.
const KIND_PONG: u8 = 4;

/// The largest frame between nodes, in bytes: a page of the largest values, streamed state.
pub const LINK_FRAME_BYTES_MAX: usize = torc_client::wire::frame::FRAME_BYTES_MAX;
/// Requests that wait on one link to be sent, or for their answers.
const LINK_REQUESTS_MAX: usize = 8 << 10;
/// Bytes of requests that wait on one link to be sent.
const LINK_QUEUE_BYTES_MAX: usize = 32 << 20;
/// Connecting and shaking hands take at most this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The first pause after a failed connect; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// The longest pause between connects: short enough that a node that is back is used at once.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A link that waits for answers and hears nothing asks whether the other side is there.
const PING_AFTER: Duration = Duration::from_secs(1);
/// A link that hears nothing for this long, although it asked, is broken.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// What links must know about this node, and who answers its peers.
pub struct Host {
    /// The shard's world.
    pub env: RealEnv,
    /// The cluster's id; zero while this node is in none.
    pub cluster: Box<dyn Fn() -> u128>,
    /// Whether a node was removed from the cluster.
    pub is_removed: Box<dyn Fn(NodeId) -> bool>,
    /// Answers a request.
    pub serve: Box<dyn Fn(Origin, Bytes) -> LocalBoxFuture<'static, Bytes>>,
}

/// The outgoing links of one shard.
pub struct Links {
    host: Rc<Host>,
    links: RefCell<HashMap<Peer, Rc<Outgoing>>>,
}

/// The far end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Peer {
    node: NodeId,
    host: SocketAddr,
    shard: ShardId,
}

impl Links {
    /// A shard without links; they are made when they are first needed.
    pub fn new(host: Rc<Host>) -> Self {
        Self {
            host,
            links: RefCell::default(),
        }
    }

    fn link(&self, to: Address) -> Rc<Outgoing> {
        let peer = Peer {
            node: to.node,
            host: to.host,
            shard: to.shard,
        };
        let mut links = self.links.borrow_mut();
        let link = links
            .entry(peer)
            .or_insert_with(|| Rc::new(Outgoing::new(Rc::clone(&self.host), peer)));
        Rc::clone(link)
    }
}

impl RemoteCaller for Links {
    fn start(
        &self,
        to: Address,
        class: Class,
        request: Bytes,
        deadline: Instant,
        call: PendingCall,
    ) {
        if self.host.env.now() >= deadline {
            return call.complete(Err(CallError::Unreachable));
        }
        self.link(to).start(class, request, call);
    }
}
