//! Membership: how this node becomes part of a cluster, and what it knows about the others.
//!
//! Shard 0 runs it: it founds or joins its cluster, votes on epochs, gossips, judges who answers,
//! and publishes a [`View`] to the other shards of its node, which only keep that view and pass on
//! what concerns everybody.
//!
//! **Invariants.** A topology is used only after it is decided and stored. A vote leaves only after
//! it is stored. Nodes of different clusters exchange nothing. No `RefCell` borrow lives across an
//! `.await`; what the votes need is serialised by the store's own lock.
//!
//! **Not here:** moving data. A joining node asks its shards to pull their ranges
//! ([`Membership::to_pull`]) and enters the ring when all have said [`Membership::pulled`].

mod agreement;
mod founding;
pub(crate) mod message;
mod pulse;
mod view;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::lock::Mutex;
use torc_env::{Address, Class, Env, NodeId, Origin, ShardId};

pub use view::{Health, Liveness, Load, View};

use crate::detector::{Detector, DetectorOptions};
use crate::gossip::{Gossip, GossipOptions};
use crate::keyspace::{Compaction, Conflict, Keyspace, Mode};
use crate::ring::{MemberIndex, Ring};
use crate::topology::change::{Change, Refusal, canonical_seeds, seeds_hash};
use crate::topology::paxos::Acceptor;
use crate::topology::store::{Store, StoreError, Vote};
use crate::topology::{Description, Epoch, MemberState, Topology};
use message::{Answer, Message, WireChange, WireOutcome};

/// How long one message of the control plane may take: far above a network's round trip and a
/// synced write, far below a person's patience.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a change is retried against other changes and missing voters.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// What membership must know at start.
#[derive(Clone, Debug)]
pub struct MembershipConfig {
    /// The cluster's configured name. A cluster of another name is none of ours.
    pub cluster_name: String,
    /// Internode addresses of the seeds; empty means this node alone.
    pub seeds: Vec<SocketAddr>,
    /// This node.
    pub own: Description,
    /// How often this node has started: higher at every start.
    pub generation: u64,
    /// Whether this node may have forgotten how it voted, and so must not vote on the topology.
    pub abstains: bool,
    /// Gossip settings.
    pub gossip: GossipOptions,
    /// Detector settings.
    pub detector: DetectorOptions,
}

/// What this node is to its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has not found or founded its cluster yet.
    Outside,
    /// It is a member on its way in.
    Joining,
    /// It is in the ring.
    Up,
    /// It is in the ring, on its way out.
    Leaving,
    /// It was removed for ever.
    Left,
}

impl Standing {
    /// The name that `status` shows.
    pub fn name(self) -> &'static str {
        match self {
            Standing::Outside | Standing::Joining => "joining",
            Standing::Up => "up",
            Standing::Leaving => "leaving",
            Standing::Left => "left",
        }
    }
}

/// What a shard of a joining node has to fetch before the node may enter the ring.
#[derive(Clone, Debug)]
pub struct Pull {
    /// The epoch that this is about; goes back with [`Membership::pulled`].
    pub epoch: Epoch,
    /// The topology, which says who holds the ranges now.
    pub topology: Rc<Topology>,
    /// The ring as it is: the sources.
    pub now: Rc<Ring>,
    /// The ring with this node in it: its ranges.
    pub then: Rc<Ring>,
    /// This node.
    pub me: MemberIndex,
}

/// Why a change of the topology was not made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// It cannot be made.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// This node is in no cluster yet.
    #[error("this node is in no cluster yet")]
    Outside,
    /// Too few voters answered.
    #[error("no majority of the voters answered{}", if *in_doubt { "; the change may yet come into force" } else { "" })]
    NoMajority {
        /// Whether some voter may have accepted it.
        in_doubt: bool,
    },
    /// This node's disk does not take votes any more.
    #[error("the topology cannot be stored: {reason}")]
    Disk {
        /// Why.
        reason: String,
    },
}

impl From<Refusal> for ChangeError {
    fn from(refusal: Refusal) -> Self {
        ChangeError::Refused {
            reason: refusal.to_string(),
        }
    }
}

impl From<StoreError> for ChangeError {
    fn from(error: StoreError) -> Self {
        ChangeError::Disk {
            reason: error.to_string(),
        }
    }
}

/// One shard's half of membership. Clones share it.
pub struct Membership<E: Env>(Rc<Inner<E>>);

impl<E: Env> Clone for Membership<E> {
    fn clone(&self) -> Self {
        Membership(self.0.clone())
    }
}

struct Inner<E: Env> {
    env: E,
    config: MembershipConfig,
    /// Canonical.
    seeds: Vec<SocketAddr>,
    seeds_hash: u64,
    /// Held over every step that votes or installs. `None` on shards other than 0.
    store: Mutex<Option<Store<E::Disk>>>,
    state: RefCell<State>,
}

struct State {
    decided: Option<Decided>,
    view: Option<Rc<View>>,
    /// This voter's memory of the instance after the decided epoch.
    vote: Vote,
    /// Highest ballot round seen in any instance: where the next attempt starts.
    round: u64,
    gossip: Gossip,
    detector: Detector,
    load: Load,
    /// Shards that have pulled their ranges, for which epoch.
    pulled: (Epoch, BTreeSet<ShardId>),
    /// By shard: the epoch that it confirmed.
    published: Vec<Epoch>,
    /// A topology is being fetched.
    fetching: bool,
    /// Why this node is not in the ring, if something is wrong.
    trouble: Option<String>,
}

/// A decided topology and what follows from it.
#[derive(Clone)]
struct Decided {
    topology: Rc<Topology>,
    encoded: Bytes,
    ring: Rc<Ring>,
    me: Option<MemberIndex>,
}

impl Decided {
    fn new(topology: Topology, node: NodeId) -> Decided {
        Decided {
            encoded: Bytes::from(topology.encode()),
            ring: Rc::new(topology.ring()),
            me: topology.index_of(node),
            topology: Rc::new(topology),
        }
    }
}

impl<E: Env> Membership<E> {
    /// Reads what this node knows and starts the tasks of its shard. On shard 0 the node then
    /// founds or joins its cluster by itself.
    ///
    /// # Errors
    /// When the stored topology or vote cannot be read: without it this node could vote twice.
    pub async fn start(env: E, config: MembershipConfig) -> Result<Membership<E>, StoreError> {
        let mut seeds = canonical_seeds(&config.seeds);
        if seeds.is_empty() {
            seeds.push(config.own.internode);
        }
        let leads = env.shard() == ShardId(0);
        let mut decided = None;
        let mut vote = None;
        let mut store = None;
        if leads {
            let (opened, found) = Store::open(env.disk().clone()).await?;
            store = Some(opened);
            decided = found
                .decided
                .map(|topology| Decided::new(topology, env.node()));
            vote = found.vote;
        }
        let next = decided
            .as_ref()
            .map_or(Epoch::FIRST, |decided| decided.topology.epoch.next());
        let vote = vote
            .filter(|vote| vote.instance == next)
            .unwrap_or_else(|| new_vote(next));
        let mut gossip = Gossip::new(env.node(), config.generation);
        if let Some(decided) = &decided {
            gossip.set_members(
                decided
                    .topology
                    .members
                    .iter()
                    .filter_map(|member| member.node),
            );
        }
        let state = State {
            round: vote.acceptor.promised().round,
            decided,
            view: None,
            vote,
            gossip,
            detector: Detector::new(config.detector, config.gossip.interval),
            load: Load::default(),
            pulled: (Epoch::default(), BTreeSet::new()),
            published: vec![Epoch::default(); usize::from(env.shard_count())],
            fetching: false,
            trouble: None,
        };
        let membership = Membership(Rc::new(Inner {
            seeds_hash: seeds_hash(&config.cluster_name, &seeds),
            seeds,
            config,
            store: Mutex::new(store),
            state: RefCell::new(state),
            env: env.clone(),
        }));
        if leads {
            membership.refresh_view();
            env.spawn(Class::Control, membership.clone().enter());
            env.spawn(Class::Control, membership.clone().beat_for_ever());
        }
        Ok(membership)
    }

    /// What this shard knows about the cluster; `None` before the node is in one. Cheap: a reference
    /// count.
    pub fn view(&self) -> Option<Rc<View>> {
        self.0.state.borrow().view.clone()
    }

    /// What this node is to its cluster.
    pub fn standing(&self) -> Standing {
        let state = self.0.state.borrow();
        let Some(view) = &state.view else {
            return Standing::Outside;
        };
        if view.topology.is_removed(self.0.env.node()) {
            return Standing::Left;
        }
        match view.me.map(|me| view.topology.member(me).state) {
            None => Standing::Outside,
            Some(MemberState::Joining) => Standing::Joining,
            Some(MemberState::Up) => Standing::Up,
            Some(MemberState::Leaving) => Standing::Leaving,
        }
    }

    /// Whether this node is in the ring and so may serve.
    pub fn ready(&self) -> bool {
        matches!(self.standing(), Standing::Up | Standing::Leaving)
    }

    /// What keeps this node out of the ring, for people. `None` while nothing is wrong.
    pub fn trouble(&self) -> Option<String> {
        self.0.state.borrow().trouble.clone()
    }

    /// Tells gossip this node's load (shard 0 only; others are ignored).
    pub fn set_load(&self, load: Load) {
        self.0.state.borrow_mut().load = load;
    }

    /// Reports that a connection to `member` was refused or broken. This shard suspects it at once;
    /// shard 0 asks it directly. Cheap when the member is suspected already.
    pub fn unreachable(&self, member: MemberIndex) {
        let Some(view) = self.view() else {
            return;
        };
        if view.health(member) != Health::Up {
            return;
        }
        let Some(node) = view.topology.member(member).node else {
            return;
        };
        let mut suspecting = (*view).clone();
        suspecting.liveness[member.index()].health = Health::Suspect;
        self.0.state.borrow_mut().view = Some(Rc::new(suspecting));
        if self.leads() {
            self.note_unreachable(node);
        } else {
            let membership = self.clone();
            self.0.env.spawn(Class::Control, async move {
                // What is lost here is noticed by the detector itself.
                let _answer = membership
                    .ask_lead(&Message::Unreachable { node: node.0 })
                    .await;
            });
        }
    }

    /// What this shard has to pull while the node is joining; `None` otherwise.
    pub fn to_pull(&self) -> Option<Pull> {
        let view = self.view()?;
        let me = view.me?;
        let joining = view.topology.member(me).state == MemberState::Joining;
        joining.then(|| Pull {
            epoch: view.topology.epoch,
            now: view.ring.clone(),
            then: Rc::new(view.topology.ring_with(me)),
            topology: view.topology.clone(),
            me,
        })
    }

    /// This shard has pulled all that [`Membership::to_pull`] named. When all shards have, the node
    /// enters the ring. Say it again until [`Membership::to_pull`] is `None`: repeating is harmless.
    pub async fn pulled(&self, epoch: Epoch) {
        if self.leads() {
            self.note_pulled(self.0.env.shard(), epoch).await;
        } else {
            // A lost message is repeated by the caller.
            let _answer = self.ask_lead(&Message::Pulled { epoch: epoch.0 }).await;
        }
    }

    /// Creates a keyspace, or alters what may be altered of an existing one. Returns the epoch in
    /// which it is so; repeating is harmless.
    pub async fn put_keyspace(&self, keyspace: Keyspace) -> Result<Epoch, ChangeError> {
        keyspace.validate().map_err(Refusal::from)?;
        self.change(WireChange::PutKeyspace {
            n: keyspace.n,
            serial: keyspace.mode == Mode::Serial,
            lww: keyspace.conflict == Conflict::Lww,
            ttl_default_seconds: keyspace.ttl_default_seconds,
            compaction: keyspace.compaction.code(),
            window_seconds: keyspace.compaction.window_seconds(),
            tombstone_grace_seconds: keyspace.tombstone_grace_seconds,
            name: keyspace.name,
        })
        .await
    }

    /// Drops a keyspace. Its data goes when each shard sees the epoch.
    pub async fn drop_keyspace(&self, name: &str) -> Result<Epoch, ChangeError> {
        self.change(WireChange::DropKeyspace {
            name: name.to_owned(),
        })
        .await
    }

    /// Answers a message of the membership family (its first byte says so).
    pub async fn serve(&self, origin: Origin, request: Bytes) -> Bytes {
        let answer = match Message::decode(&request) {
            Some(message @ (Message::Gossip { .. } | Message::States { .. })) => {
                self.answer(origin, message).await
            }
            Some(message) => {
                let membership = self.clone();
                self.finish(async move { membership.answer(origin, message).await })
                    .await
            }
            None => refused("not a message of this protocol version"),
        };
        answer.encode()
    }

    /// Runs `work` to its end even when the returned future is dropped: a vote or a topology whose
    /// writing was abandoned midway would leave the store in an unknown state.
    fn finish<T: Clone + 'static>(
        &self,
        work: impl Future<Output = T> + 'static,
    ) -> impl Future<Output = T> + 'static {
        let shared = work.boxed_local().shared();
        self.0
            .env
            .spawn(Class::Control, shared.clone().map(|_output| ()));
        shared
    }

    async fn answer(&self, origin: Origin, message: Message) -> Answer {
        let own = origin.node == self.0.env.node();
        match message {
            Message::Publish {
                topology,
                epoch,
                liveness,
            } if own && !self.leads() => self.take_view(topology, Epoch(epoch), &liveness),
            _ if !self.leads() => refused("membership is run by shard 0"),
            Message::Change { change } if own => {
                let outcome = wire_outcome(self.change(change).await);
                Answer::Outcome { outcome }
            }
            Message::Unreachable { node } if own => {
                self.note_unreachable(NodeId(node));
                Answer::Ok
            }
            Message::Pulled { epoch } if own => {
                self.note_pulled(origin.shard, Epoch(epoch)).await;
                Answer::Ok
            }
            Message::Publish { .. }
            | Message::Change { .. }
            | Message::Unreachable { .. }
            | Message::Pulled { .. } => refused("only shards of one node say this to each other"),
            _ if self.is_removed(origin.node) => refused("the sender was removed from the cluster"),
            Message::Prepare { instance } => self.on_prepare(&instance).await,
            Message::Accept { instance, value } => self.on_accept(&instance, value).await,
            Message::Learn { topology } => self.on_learn(&topology).await,
            Message::Fetch { name, above } => self.on_fetch(&name, Epoch(above)),
            Message::Gossip {
                cluster,
                epoch,
                digests,
            } => self.on_gossip(origin.node, cluster, Epoch(epoch), &digests),
            Message::States { cluster, states } => self.on_states(origin.node, cluster, &states),
            Message::Ping { cluster } => self.on_ping(origin.node, cluster),
        }
    }

    async fn change(&self, wire: WireChange) -> Result<Epoch, ChangeError> {
        if self.leads() {
            let membership = self.clone();
            let change = change_of(wire);
            return self
                .finish(async move { membership.propose(&change).await })
                .await;
        }
        // The change runs on even when the answer is lost.
        let lost = ChangeError::NoMajority { in_doubt: true };
        match self.ask_lead(&Message::Change { change: wire }).await {
            Some(Answer::Outcome { outcome }) => match outcome {
                WireOutcome::Done { epoch } => Ok(Epoch(epoch)),
                WireOutcome::Refused { reason } => Err(ChangeError::Refused { reason }),
                WireOutcome::NoMajority { in_doubt } => Err(ChangeError::NoMajority { in_doubt }),
            },
            _ => Err(lost),
        }
    }

    async fn note_pulled(&self, shard: ShardId, epoch: Epoch) {
        let node = self.0.env.node();
        let complete = {
            let mut state = self.0.state.borrow_mut();
            if state.pulled.0 < epoch {
                state.pulled = (epoch, BTreeSet::new());
            }
            if state.pulled.0 == epoch {
                state.pulled.1.insert(shard);
            }
            state.pulled.1.len() == usize::from(self.0.env.shard_count())
        };
        if complete && self.standing() == Standing::Joining {
            let membership = self.clone();
            let change = Change::Serve {
                node,
                pulled: epoch,
            };
            let serve = async move { membership.propose(&change).await };
            let result = self.finish(serve).await;
            self.note_trouble(result.err());
        }
    }

    fn note_trouble(&self, error: Option<ChangeError>) {
        if let Some(error) = &error {
            tracing::warn!(%error, "this node is not in the ring yet");
        }
        self.0.state.borrow_mut().trouble = error.map(|error| error.to_string());
    }

    /// Whether this shard runs membership for its node.
    fn leads(&self) -> bool {
        self.0.env.shard() == ShardId(0)
    }

    fn is_removed(&self, node: NodeId) -> bool {
        let state = self.0.state.borrow();
        state
            .decided
            .as_ref()
            .is_some_and(|decided| decided.topology.is_removed(node))
    }

    fn decided(&self) -> Option<Decided> {
        self.0.state.borrow().decided.clone()
    }

    /// Asks shard 0 of this node; `None` without an answer.
    async fn ask_lead(&self, message: &Message) -> Option<Answer> {
        let env = &self.0.env;
        let lead = Address {
            node: env.node(),
            host: self.0.config.own.internode,
            shard: ShardId(0),
        };
        let deadline = env.now() + CHANGE_TIMEOUT + CALL_TIMEOUT;
        let answer = env
            .call(lead, Class::Control, message.encode(), deadline)
            .await;
        Answer::decode(&answer.ok()?)
    }

    /// Asks shard 0 of another node. `Err(true)`: certainly nobody there.
    async fn ask(&self, to: Address, message: &Message) -> Result<Answer, bool> {
        let deadline = self.0.env.now() + CALL_TIMEOUT;
        let call = self
            .0
            .env
            .call(to, Class::Control, message.encode(), deadline);
        match call.await {
            Ok(answer) => Answer::decode(&answer).ok_or(false),
            Err(error) => Err(!error.in_doubt() && error != torc_env::CallError::Overloaded),
        }
    }
}

fn new_vote(instance: Epoch) -> Vote {
    Vote {
        instance,
        acceptor: Acceptor::default(),
    }
}

fn refused(reason: &str) -> Answer {
    Answer::Refused {
        reason: reason.to_owned(),
    }
}

fn change_of(wire: WireChange) -> Change {
    match wire {
        WireChange::PutKeyspace {
            name,
            n,
            serial,
            lww,
            ttl_default_seconds,
            compaction,
            window_seconds,
            tombstone_grace_seconds,
        } => Change::PutKeyspace {
            keyspace: Keyspace {
                name,
                n,
                mode: if serial { Mode::Serial } else { Mode::Eventual },
                conflict: if lww {
                    Conflict::Lww
                } else {
                    Conflict::Siblings
                },
                ttl_default_seconds,
                // What no code stands for is refused, as a window of nothing is.
                compaction: Compaction::from_code(compaction, window_seconds)
                    .unwrap_or(Compaction::TimeWindow { seconds: 0 }),
                tombstone_grace_seconds,
                // Given by the epoch.
                id: torc_env::TreeId::default(),
            },
        },
        WireChange::DropKeyspace { name } => Change::DropKeyspace { name },
    }
}

fn wire_outcome(result: Result<Epoch, ChangeError>) -> WireOutcome {
    match result {
        Ok(epoch) => WireOutcome::Done { epoch: epoch.0 },
        Err(ChangeError::NoMajority { in_doubt }) => WireOutcome::NoMajority { in_doubt },
        Err(error) => WireOutcome::Refused {
            reason: error.to_string(),
        },
    }
}

#[cfg(test)]
mod tests;
