//! The pulse: gossip rounds, probes, verdicts, and the view that follows from them.

use std::rc::Rc;

use torc_env::{Address, Class, Env, NodeId, ShardId};

use super::message::{Answer, Message, WireDigest, WireLiveness, WireState};
use super::{Decided, Health, Liveness, Load, Membership, View, refused};
use crate::detector::Evidence;
use crate::gossip::{Age, Digest, NodeState};
use crate::topology::{Epoch, Topology};

impl<E: Env> Membership<E> {
    /// One gossip round an interval, for as long as the shard runs.
    pub(super) async fn beat_for_ever(self) {
        loop {
            // Up to a tenth shorter, at random: rounds of different nodes must not march in step.
            let interval = self.0.config.gossip.interval;
            let shorter =
                interval / 10 * u32::try_from(self.0.env.random() % 100).unwrap_or(0) / 100;
            self.0.env.sleep(interval - shorter).await;
            if let Some(decided) = self.decided() {
                self.round(&decided);
            }
        }
    }

    fn round(&self, decided: &Decided) {
        let env = &self.0.env;
        let now = env.now();
        let (partners, suspects) = {
            let state = &mut *self.0.state.borrow_mut();
            for verdict in state.detector.judge(now) {
                tracing::info!(node = %verdict.node, from = ?verdict.from, to = ?verdict.to, "verdict");
            }
            state.gossip.beat(decided.topology.epoch, state.load);
            let peers = decided
                .topology
                .members
                .iter()
                .filter_map(|member| member.node);
            let (down, up): (Vec<NodeId>, Vec<NodeId>) = peers
                .filter(|node| *node != env.node())
                .partition(|node| state.detector.health(*node) == Health::Down);
            let fanout = self.0.config.gossip.fanout;
            let partners = state.gossip.partners(fanout, &up, &down, || env.random());
            let suspects: Vec<NodeId> = state.detector.suspects().collect();
            (partners, suspects)
        };
        for node in &partners {
            if let Some(address) = lead_of(&decided.topology, *node) {
                env.spawn(Class::Control, self.clone().exchange(address));
            }
        }
        for node in suspects.iter().filter(|node| !partners.contains(node)) {
            if let Some(address) = lead_of(&decided.topology, *node) {
                env.spawn(Class::Control, self.clone().probe(address));
            }
        }
        self.refresh_view();
        self.publish();
    }

    /// One gossip exchange with a member.
    async fn exchange(self, partner: Address) {
        let Some(decided) = self.decided() else {
            return;
        };
        let cluster = decided.topology.cluster.0;
        let digests = self.0.state.borrow().gossip.digests();
        let opening = Message::Gossip {
            cluster,
            epoch: decided.topology.epoch.0,
            digests: digests.iter().map(wire_digest).collect(),
        };
        let answer = self.ask(partner, &opening).await;
        self.note_contact(partner.node, &answer);
        let Ok(Answer::Gossip {
            epoch,
            newer,
            wanted,
        }) = answer
        else {
            return;
        };
        self.take_states(&newer);
        let states = {
            let wanted: Vec<NodeId> = wanted.into_iter().map(NodeId).collect();
            self.0.state.borrow().gossip.states_of(&wanted)
        };
        if !states.is_empty() {
            let closing = Message::States {
                cluster,
                states: states.iter().map(wire_state).collect(),
            };
            // What is lost here is told in a later round.
            let _answer = self.ask(partner, &closing).await;
        }
        if Epoch(epoch) > decided.topology.epoch {
            self.fetch(partner).await;
        }
    }

    /// Asks a suspect directly.
    async fn probe(self, suspect: Address) {
        let Some(decided) = self.decided() else {
            return;
        };
        let cluster = decided.topology.cluster.0;
        let answer = self.ask(suspect, &Message::Ping { cluster }).await;
        self.note_contact(suspect.node, &answer);
    }

    /// Gets the newest topology from a member that has a newer one.
    async fn fetch(&self, from: Address) {
        let Some(decided) = self.decided() else {
            return;
        };
        if std::mem::replace(&mut self.0.state.borrow_mut().fetching, true) {
            return;
        }
        let question = Message::Fetch {
            name: decided.topology.name.clone(),
            above: decided.topology.epoch.0,
        };
        if let Ok(Answer::Topology { topology }) = self.ask(from, &question).await
            && let Err(error) = self.learn(&topology).await
        {
            tracing::warn!(%error, from = %from.node, "a member's topology is refused");
        }
        self.0.state.borrow_mut().fetching = false;
    }

    pub(super) fn on_gossip(
        &self,
        from: NodeId,
        cluster: u128,
        epoch: Epoch,
        digests: &[WireDigest],
    ) -> Answer {
        let decided = match self.same_cluster(from, cluster) {
            Ok(decided) => decided,
            Err(answer) => return answer,
        };
        self.note_alive(from);
        if epoch > decided.topology.epoch
            && let Some(address) = lead_of(&decided.topology, from)
        {
            let membership = self.clone();
            self.0.env.spawn(Class::Control, async move {
                membership.fetch(address).await;
            });
        }
        let digests: Vec<Digest> = digests.iter().map(digest_of).collect();
        let reply = self.0.state.borrow().gossip.answer(&digests);
        Answer::Gossip {
            epoch: decided.topology.epoch.0,
            newer: reply.newer.iter().map(wire_state).collect(),
            wanted: reply.wanted.iter().map(|node| node.0).collect(),
        }
    }

    pub(super) fn on_states(&self, from: NodeId, cluster: u128, states: &[WireState]) -> Answer {
        if let Err(answer) = self.same_cluster(from, cluster) {
            return answer;
        }
        self.note_alive(from);
        self.take_states(states);
        Answer::Ok
    }

    pub(super) fn on_ping(&self, from: NodeId, cluster: u128) -> Answer {
        if let Err(answer) = self.same_cluster(from, cluster) {
            return answer;
        }
        self.note_alive(from);
        Answer::Ok
    }

    /// The decided topology, if the sender's cluster is the same one. A sender that is no member
    /// here may be newer than this node's epoch: it gets an answer, but no state is kept of it.
    fn same_cluster(&self, from: NodeId, cluster: u128) -> Result<Decided, Answer> {
        let decided = self.decided().ok_or_else(|| refused("in no cluster yet"))?;
        if decided.topology.cluster.0 != cluster {
            tracing::warn!(%from, "a node of another cluster talks to this one");
            return Err(refused("another cluster"));
        }
        Ok(decided)
    }

    fn take_states(&self, states: &[WireState]) {
        let states: Vec<NodeState> = states.iter().map(state_of).collect();
        let now = self.0.env.now();
        let state = &mut *self.0.state.borrow_mut();
        for node in state.gossip.learn(&states) {
            state.detector.heard(node, Evidence::Hearsay, now);
        }
    }

    fn note_contact(&self, node: NodeId, answer: &Result<Answer, bool>) {
        match answer {
            Ok(Answer::Refused { reason }) => {
                tracing::debug!(%node, reason, "a member refuses gossip");
            }
            Ok(_) => self.note_alive(node),
            Err(true) => self.note_unreachable(node),
            Err(false) => {}
        }
    }

    /// Nothing listens where `node` should be.
    pub(super) fn note_unreachable(&self, node: NodeId) {
        let now = self.0.env.now();
        self.0.state.borrow_mut().detector.failed(node, now);
    }

    /// A member talked to this node itself.
    fn note_alive(&self, node: NodeId) {
        let now = self.0.env.now();
        let state = &mut *self.0.state.borrow_mut();
        if state.gossip.state(node).is_some() {
            state.detector.heard(node, Evidence::Direct, now);
        }
    }

    /// Makes this shard's view from what shard 0 knows.
    pub(super) fn refresh_view(&self) {
        let env = &self.0.env;
        let now = env.now();
        let state = &mut *self.0.state.borrow_mut();
        let Some(decided) = &state.decided else {
            return;
        };
        let nodes = decided.topology.members.iter();
        for node in nodes.filter_map(|member| member.node) {
            if node != env.node() {
                state.detector.expect(node, now);
            }
        }
        let judge = |node: NodeId| {
            let load = state.gossip.state(node).map(|row| row.load);
            if node == env.node() {
                return Liveness {
                    health: Health::Up,
                    phi: 0.0,
                    load: state.load,
                };
            }
            Liveness {
                health: state.detector.health(node),
                phi: state.detector.phi(node, now),
                load: load.unwrap_or_default(),
            }
        };
        let members = decided.topology.members.iter();
        let liveness = members
            .map(|member| member.node.map_or(UNCLAIMED, judge))
            .collect();
        state.view = Some(Rc::new(View {
            topology: decided.topology.clone(),
            ring: decided.ring.clone(),
            me: decided.me,
            liveness,
        }));
    }

    /// Tells the other shards of this node what the cluster looks like.
    pub(super) fn publish(&self) {
        let env = &self.0.env;
        if !self.leads() || env.shard_count() == 1 {
            return;
        }
        let Some(view) = self.view() else {
            return;
        };
        let liveness: Vec<WireLiveness> = view.liveness.iter().map(wire_liveness).collect();
        for shard in (1..env.shard_count()).map(ShardId) {
            let to = Address {
                node: env.node(),
                host: self.0.config.own.internode,
                shard,
            };
            let known = self.0.state.borrow().published[usize::from(shard.0)];
            let epoch = view.topology.epoch;
            let topology = (known < epoch).then(|| self.decided()).flatten();
            let message = Message::Publish {
                topology: topology.map(|decided| decided.encoded.to_vec()),
                epoch: epoch.0,
                liveness: liveness.clone(),
            };
            let membership = self.clone();
            env.spawn(Class::Control, async move {
                if let Ok(Answer::Ok) = membership.ask(to, &message).await {
                    let published = &mut membership.0.state.borrow_mut().published;
                    let confirmed = &mut published[usize::from(shard.0)];
                    *confirmed = epoch.max(*confirmed);
                }
            });
        }
    }

    /// Takes the view that shard 0 has published (on the other shards).
    pub(super) fn take_view(
        &self,
        topology: Option<Vec<u8>>,
        epoch: Epoch,
        liveness: &[WireLiveness],
    ) -> Answer {
        let known = self.decided();
        let decided = match (topology, known) {
            // Messages may overtake each other: an older view is old news.
            (_, Some(known)) if known.topology.epoch > epoch => return Answer::Ok,
            (_, Some(known)) if known.topology.epoch == epoch => known,
            (Some(encoded), _) => match Topology::decode(&encoded) {
                Ok(topology) => Decided::new(topology, self.0.env.node()),
                Err(error) => return refused(&error.to_string()),
            },
            (None, _) => return refused("the topology is missing"),
        };
        if liveness.len() != decided.topology.members.len() {
            return refused("liveness of another topology");
        }
        let view = View {
            topology: decided.topology.clone(),
            ring: decided.ring.clone(),
            me: decided.me,
            liveness: liveness.iter().map(liveness_of).collect(),
        };
        let state = &mut *self.0.state.borrow_mut();
        state.decided = Some(decided);
        state.view = Some(Rc::new(view));
        Answer::Ok
    }
}

/// Of a slot that nobody has claimed.
const UNCLAIMED: Liveness = Liveness {
    health: Health::Down,
    phi: crate::detector::PHI_MAX,
    load: Load {
        disk_bytes: 0,
        disk_free_bytes: 0,
        requests: 0,
        backlog_bytes: 0,
    },
};

/// Shard 0 of a member.
fn lead_of(topology: &Topology, node: NodeId) -> Option<Address> {
    let index = topology.index_of(node)?;
    topology.member(index).shard_address(ShardId(0))
}

fn wire_digest(digest: &Digest) -> WireDigest {
    WireDigest {
        node: digest.node.0,
        generation: digest.age.generation,
        heartbeat: digest.age.heartbeat,
    }
}

fn digest_of(wire: &WireDigest) -> Digest {
    Digest {
        node: NodeId(wire.node),
        age: Age {
            generation: wire.generation,
            heartbeat: wire.heartbeat,
        },
    }
}

fn wire_state(state: &NodeState) -> WireState {
    WireState {
        node: state.node.0,
        generation: state.age.generation,
        heartbeat: state.age.heartbeat,
        epoch: state.epoch.0,
        disk_bytes: state.load.disk_bytes,
        disk_free_bytes: state.load.disk_free_bytes,
        requests: state.load.requests,
        backlog_bytes: state.load.backlog_bytes,
    }
}

fn state_of(wire: &WireState) -> NodeState {
    NodeState {
        node: NodeId(wire.node),
        age: Age {
            generation: wire.generation,
            heartbeat: wire.heartbeat,
        },
        epoch: Epoch(wire.epoch),
        load: Load {
            disk_bytes: wire.disk_bytes,
            disk_free_bytes: wire.disk_free_bytes,
            requests: wire.requests,
            backlog_bytes: wire.backlog_bytes,
        },
    }
}

fn wire_liveness(liveness: &Liveness) -> WireLiveness {
    let state = NodeState {
        node: NodeId::default(),
        age: Age::default(),
        epoch: Epoch::default(),
        load: liveness.load,
    };
    WireLiveness {
        health: match liveness.health {
            Health::Up => 0,
            Health::Suspect => 1,
            Health::Down => 2,
        },
        phi: liveness.phi,
        state: wire_state(&state),
    }
}

fn liveness_of(wire: &WireLiveness) -> Liveness {
    Liveness {
        health: match wire.health {
            0 => Health::Up,
            1 => Health::Suspect,
            _ => Health::Down,
        },
        phi: wire.phi,
        load: state_of(&wire.state).load,
    }
}
