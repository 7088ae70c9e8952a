//! The parts of one shard's cluster half, shared by everything that runs on the shard.
//!
//! Not on the path by itself: [`Node`](crate::node::Node) owns it, coordinators and replicas borrow it.
//!
//! Invariant: no `RefCell` of it is borrowed across an `.await`.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{Either, select};
use torc_engine::Store;
use torc_env::{Address, Class, Env, Instant, ShardId, TokenRange, TreeId, mutation};

use crate::admission::Admission;
use crate::anti_entropy::floors::Told;
use crate::anti_entropy::{Repairs, loss};
use crate::api::{Failure, FailureCode};
use crate::held::Held;
use crate::hint::Hints;
use crate::hlc::{Hlc, Withheld};
use crate::lacking::Lacking;
use crate::latency::{Hedge, Peers};
use crate::membership::{Membership, View};
use crate::merkle::Sums;
use crate::message::{Body, Request};
use crate::metrics::{Counter, Metrics};
use crate::node::NodeConfig;
use crate::run::without;
use crate::target::Target;
use crate::version::Actor;

/// Trees of the store that are no keyspace's.
pub(crate) mod tree {
    use super::TreeId;

    /// Hints for other nodes.
    pub(crate) const HINTS: TreeId = TreeId(u32::MAX);
    /// What a shard must remember about itself.
    pub(crate) const SYSTEM: TreeId = TreeId(u32::MAX - 1);

    /// Whether no keyspace's: no other node has what it holds.
    pub(crate) fn is_own(tree: TreeId) -> bool {
        tree == HINTS || tree == SYSTEM
    }
}

/// How often a request that met a newer topology looks whether it has arrived here. It comes with
/// the next message of the control plane, so within a gossip interval.
const EPOCH_POLL: Duration = Duration::from_millis(10);
const EPOCH_PATIENCE: Duration = Duration::from_millis(500);

/// How often a write that must go on rising looks whether its clock is marked, and for how long. The mark is on
/// its way to the disk since the start.
const MARK_POLL: Duration = Duration::from_millis(1);
const MARK_PATIENCE: Duration = Duration::from_millis(500);

/// One shard's cluster half.
pub(crate) struct Core<E: Env> {
    pub(crate) env: E,
    pub(crate) store: Store<E>,
    pub(crate) options: NodeConfig,
    /// Under which this shard mints. Replaced when its memory of a key may have holes.
    pub(crate) actor: Cell<Actor>,
    pub(crate) clock: Hlc,
    pub(crate) admission: Admission,
    pub(crate) held: Rc<Held>,
    /// Reads of batches in flight.
    pub(crate) batch_reads: Cell<u32>,
    pub(crate) metrics: Metrics,
    pub(crate) hedge: Hedge,
    pub(crate) peers: Peers,
    pub(crate) hints: Hints,
    pub(crate) sums: RefCell<Sums>,
    pub(crate) repairs: Repairs,
    pub(crate) membership: Membership<E>,
    /// What of that which it has acknowledged, and of what it should have, this shard does not have.
    pub(crate) lacking: Lacking,
    /// What is known of damage that could not be made good yet.
    pub(crate) looked: RefCell<loss::Looked>,
    /// Since when the node keeps a snapshot, in milliseconds since 1970.
    pub(crate) snapshot_since_ms: Cell<Option<u64>>,
    /// Writes that are answered and still wait for a replica.
    pub(crate) finishing: Rc<Cell<u32>>,
    next_request: Cell<u64>,
}

impl<E: Env> Core<E> {
    /// `clock_mark`: see [`Hlc::resume`].
    pub(crate) fn new(
        env: E,
        store: Store<E>,
        membership: Membership<E>,
        options: NodeConfig,
        clock_mark: u64,
        lacking: Lacking,
    ) -> Self {
        Self {
            actor: Cell::new(options.identity.actor()),
            clock: Hlc::resume(clock_mark, options.skew_max),
            admission: Admission::new(options.admission),
            held: Held::new(options.client_bytes_max),
            batch_reads: Cell::new(0),
            metrics: Metrics::default(),
            hedge: Hedge::default(),
            peers: Peers::default(),
            hints: Hints::new(options.hints),
            sums: RefCell::default(),
            repairs: Repairs::new(env.wall().millis()),
            // Ids of two boots or shards must not meet in a log.
            next_request: Cell::new(env.random()),
            finishing: Rc::default(),
            env,
            store,
            membership,
            lacking,
            looked: RefCell::default(),
            snapshot_since_ms: Cell::new(options.snapshot_since_ms),
            options,
        }
    }

    /// What this shard knows about the cluster now.
    ///
    /// # Errors
    /// [`FailureCode::NotReady`] before there is a topology.
    pub(crate) fn view(&self) -> Result<Rc<View>, Failure> {
        self.membership.view().ok_or_else(|| {
            Failure::refused(FailureCode::NotReady, "this node knows no cluster yet")
        })
    }

    /// The epoch of the topology known here; 0 before there is one.
    pub(crate) fn epoch(&self) -> u64 {
        self.membership
            .view()
            .map_or(0, |view| view.topology.epoch.0)
    }

    /// An ack is that of a replica of the epoch in force: what became durable only after the range
    /// had other owners may have been missed by whoever took it over.
    ///
    /// # Errors
    /// [`FailureCode::TopologyChanging`], in doubt.
    pub(crate) fn check_current(&self, target: &Target) -> Result<(), Failure> {
        if target.is_current(&*self.view()?) {
            return Ok(());
        }
        let failure = Failure::refused(
            FailureCode::TopologyChanging,
            "the owners of the range changed during the write",
        );
        Err(failure.in_doubt())
    }

    /// Waits until the topology known here is not that of `epoch` any more, or for a while: it may
    /// have been another shard of this node that was behind. False at the deadline.
    pub(crate) async fn outlives(&self, epoch: u64, deadline: Instant) -> bool {
        let patience = self.env.now() + EPOCH_PATIENCE;
        while self.epoch() == epoch && self.env.now() < patience.min(deadline) {
            self.env.sleep(EPOCH_POLL).await;
        }
        self.env.now() < deadline
    }

    /// Waits until a mark of this life is durable, or for a while, if that is all that keeps stamps from being
    /// given out; see [`Withheld::NoMark`].
    pub(crate) async fn mark(&self, deadline: Instant) {
        let patience = deadline.min(self.env.now() + MARK_PATIENCE);
        while self.clock.check_marked() == Err(Withheld::NoMark)
            && self.clock.check(self.env.wall()).is_ok()
            && self.env.now() < patience
        {
            self.env.sleep(MARK_POLL).await;
        }
    }

    /// # Errors
    /// While this shard may lack something of the target's key.
    pub(crate) fn check_has(&self, target: &Target) -> Result<(), Failure> {
        self.lacking.check(target.tree(), target.token)
    }

    pub(crate) fn next_request(&self) -> u64 {
        let id = self.next_request.get();
        self.next_request.set(id.wrapping_add(1));
        id
    }

    /// Civil time in milliseconds.
    pub(crate) fn now_ms(&self) -> u64 {
        self.env.wall().millis()
    }

    /// Whether this shard is the one of its node that owns the target's key.
    pub(crate) fn owns(&self, target: &Target) -> bool {
        target.token.shard(self.env.shard_count()) == self.env.shard()
    }

    /// The part of the ring that is this shard's on its node.
    pub(crate) fn slice(&self) -> TokenRange {
        TokenRange::of_shard(self.env.shard(), self.env.shard_count())
    }

    /// The bytes of a request about the target's key.
    pub(crate) fn encode(
        &self,
        target: &Target,
        id: u64,
        deadline: Instant,
        body: Body<'_>,
    ) -> Bytes {
        Request {
            id,
            remaining_ms: self.remaining_ms(deadline),
            epoch: target.view.topology.epoch.0,
            owners: target.owners(),
            body,
        }
        .encode()
    }

    pub(crate) fn remaining_ms(&self, deadline: Instant) -> u32 {
        let left = deadline.since(self.env.now()).as_millis();
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    /// The deadline of a received request.
    pub(crate) fn deadline(&self, remaining_ms: u32) -> Instant {
        self.env.now() + Duration::from_millis(u64::from(remaining_ms))
    }

    /// `work`, or `None` when the deadline comes first. Costs no timer when the work is done at
    /// once. The caller pins the work: an async function's argument takes its space twice.
    pub(crate) async fn until<F: Future>(
        &self,
        deadline: Instant,
        mut work: Pin<&mut F>,
    ) -> Option<F::Output> {
        if let std::task::Poll::Ready(output) = futures_util::poll!(work.as_mut()) {
            return Some(output);
        }
        match select(work, pin!(self.env.sleep_until(deadline))).await {
            Either::Left((output, _)) => Some(output),
            Either::Right(_) => None,
        }
    }

    /// Whether what is known of the store's damage is in a tree that is meant.
    pub(crate) fn has_damage(&self, is_meant: impl Fn(TreeId) -> bool) -> bool {
        let damages = self.store.damages();
        damages.iter().any(|damage| is_meant(damage.tree))
    }

    /// What of a range is outside of the damage that is known and not cut out.
    pub(crate) fn readable(&self, tree: TreeId, range: TokenRange) -> Vec<TokenRange> {
        let damages = self.store.damages();
        let of_tree = damages.iter().filter(|damage| damage.tree == tree);
        without(range, of_tree.map(|damage| damage.range).collect())
    }

    /// Runs a task that nobody waits for.
    pub(crate) fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) {
        self.env.spawn(class, task);
    }

    /// A shard of this node.
    pub(crate) fn own_shard(&self, shard: ShardId) -> Address {
        Address {
            node: self.env.node(),
            host: SocketAddr::from(([0, 0, 0, 0], 0)),
            shard,
        }
    }

    /// What those must know who forget deletions. What waits here is a hint, or a snapshot. A shard that lacks data counts as
    /// one with a hint of any age: what it has fetched, or has kept where newer things were lost, may have been deleted
    /// since, and it only learns so while the others still know.
    pub(crate) fn tell(&self) -> Told {
        let snapshot_ms = self.snapshot_since_ms.get();
        let since = [self.hints.oldest_ms(), snapshot_ms];
        let is_whole = self.lacking.is_whole() || mutation::on("joiner_does_not_block_purging");
        let clock_ms = self.hints.clock_ms(self.now_ms());
        Told {
            oldest_ms: match is_whole {
                true => since.into_iter().flatten().min(),
                false => Some(0),
            },
            now_ms: clock_ms.max(snapshot_ms.unwrap_or(0)),
            promised: match mutation::on("civil_time_is_promised") {
                true => self.env.wall().0,
                false => self.clock.promise(self.env.wall()),
            },
        }
    }

    pub(crate) fn count(&self, counter: Counter) {
        self.metrics.add(counter, 1);
    }
}

/// The deadline has passed.
pub(crate) fn deadline_passed(what: &str) -> Failure {
    Failure::refused(
        FailureCode::DeadlinePassed,
        format_args!("the deadline passed before {what}"),
    )
}
