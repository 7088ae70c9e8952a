//! Agreeing on the next epoch: the voter's side, the proposer's side, and taking in what is decided.
//!
//! The decisions are [`crate::topology::paxos`]'s; this is the rim that stores and sends.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use torc_env::{Address, Class, Env, NodeId, ShardId};

use super::message::{Answer, Instance, Message, WireBallot};
use super::{CHANGE_TIMEOUT, ChangeError, Decided, Membership, new_vote, refused};
use crate::topology::change::{Change, Founder};
use crate::topology::paxos::{Attempt, Ballot};
use crate::topology::store::StoreError;
use crate::topology::{ClusterId, Description, Epoch, SlotId, Topology};

/// Longest pause between two attempts. Random below it, so that two proposers do not outbid each
/// other for ever.
const BACKOFF: Duration = Duration::from_millis(400);

/// What an attempt is about and whom it asks.
pub(super) struct Ballots {
    /// Cluster id (zero at the founding), seed-list hash, epoch.
    pub cluster: ClusterId,
    pub epoch: Epoch,
    /// Slot and address of every voter; `None` where nobody has claimed the slot.
    pub voters: Vec<(SlotId, Option<Address>)>,
    /// This node's slot among the voters.
    pub own: Option<SlotId>,
}

/// How an attempt ended.
pub(super) enum Outcome {
    /// This topology is decided (and stored here).
    Decided,
    /// Nothing is decided by it; `in_doubt` when a voter may have accepted the proposer's value.
    Open { in_doubt: bool },
}

/// What a first phase found.
pub(super) struct Promises {
    pub attempt: Attempt<Bytes>,
    /// Who promised, with what they said about themselves (at the founding).
    pub founders: Vec<Founder>,
    /// By slot: who votes there.
    pub nodes: BTreeMap<SlotId, NodeId>,
    /// Somebody refused, and why.
    pub refusal: Option<String>,
}

impl<E: Env> Membership<E> {
    /// First phase, as a voter.
    pub(super) async fn on_prepare(&self, instance: &Instance) -> Answer {
        let mut store = self.0.store.lock().await;
        let voter = match self.voter_in(instance) {
            Ok(voter) => voter,
            Err(answer) => return answer,
        };
        let mut vote = self.0.state.borrow().vote.clone();
        let accepted = match vote.acceptor.prepare(ballot_of(instance.ballot)) {
            Ok(accepted) => accepted,
            Err(outbid) => {
                return Answer::Outbid {
                    promised: wire_ballot(outbid.promised),
                };
            }
        };
        let Some(store) = store.as_mut() else {
            return refused("membership is run by shard 0");
        };
        if let Err(error) = store.save_vote(&vote).await {
            return no_vote(&error);
        }
        self.0.state.borrow_mut().vote = vote;
        let founding = instance.cluster == ClusterId::default().0;
        Answer::Promise {
            voter: voter.0,
            node: self.0.env.node().0,
            accepted: accepted.map(|(ballot, value)| (wire_ballot(ballot), value.to_vec())),
            description: founding.then(|| self.0.config.own.encode()),
        }
    }

    /// Second phase, as a voter.
    pub(super) async fn on_accept(&self, instance: &Instance, value: Vec<u8>) -> Answer {
        let mut store = self.0.store.lock().await;
        let voter = match self.voter_in(instance) {
            Ok(voter) => voter,
            Err(answer) => return answer,
        };
        // What is accepted may be decided: nothing unreadable gets that far.
        match Topology::decode(&value) {
            Ok(topology) if topology.epoch.0 == instance.epoch => {}
            Ok(_) => return refused("the topology is of another epoch"),
            Err(error) => return refused(&error.to_string()),
        }
        let mut vote = self.0.state.borrow().vote.clone();
        let accepted = vote
            .acceptor
            .accept(ballot_of(instance.ballot), Bytes::from(value));
        if let Err(outbid) = accepted {
            return Answer::Outbid {
                promised: wire_ballot(outbid.promised),
            };
        }
        let Some(store) = store.as_mut() else {
            return refused("membership is run by shard 0");
        };
        if let Err(error) = store.save_vote(&vote).await {
            return no_vote(&error);
        }
        self.0.state.borrow_mut().vote = vote;
        Answer::Accepted { voter: voter.0 }
    }

    /// A decided topology arrives.
    pub(super) async fn on_learn(&self, encoded: &[u8]) -> Answer {
        match self.learn(encoded).await {
            Ok(()) => Answer::Ok,
            Err(error) => refused(&error.to_string()),
        }
    }

    /// Somebody asks for what is decided.
    pub(super) fn on_fetch(&self, name: &str, above: Epoch) -> Answer {
        if name != self.0.config.cluster_name {
            return refused("this is a cluster of another name");
        }
        match self.decided() {
            Some(decided) if decided.topology.epoch > above => topology_answer(&decided),
            _ => Answer::Ok,
        }
    }

    /// The slot in which this node votes on `instance`, or the answer that says why it does not.
    fn voter_in(&self, instance: &Instance) -> Result<SlotId, Answer> {
        let inner = &self.0;
        if inner.config.abstains {
            return Err(refused(
                "this node was restored from a backup, or has lost its vote, and gives none",
            ));
        }
        if !ballot_of(instance.ballot).is_possible() {
            return Err(refused("a ballot that nobody can have come to"));
        }
        let state = inner.state.borrow();
        let Some(decided) = &state.decided else {
            if instance.epoch != Epoch::FIRST.0 || instance.cluster != ClusterId::default().0 {
                return Err(Answer::Behind { epoch: 0 });
            }
            if instance.seeds_hash != inner.seeds_hash {
                return Err(refused(
                    "founders must have the same seed list and cluster name",
                ));
            }
            return self.own_seed().ok_or_else(|| refused("not a seed"));
        };
        let topology = &decided.topology;
        if instance.epoch <= topology.epoch.0 {
            return Err(topology_answer(decided));
        }
        if instance.cluster != topology.cluster.0 || instance.seeds_hash != topology.seeds_hash {
            return Err(refused("another cluster"));
        }
        if instance.epoch != topology.epoch.next().0 {
            return Err(Answer::Behind {
                epoch: topology.epoch.0,
            });
        }
        let own = decided.me.map(|me| topology.member(me).slot);
        own.filter(|slot| topology.voters.contains(slot))
            .ok_or_else(|| refused("not a voter"))
    }

    /// This node's place in the seed list: its slot if it founds the cluster.
    pub(super) fn own_seed(&self) -> Option<SlotId> {
        let own = self.0.config.own.internode;
        let place = self.0.seeds.iter().position(|seed| *seed == own)?;
        u32::try_from(place).ok().map(SlotId)
    }

    /// Makes a change, whoever else makes changes meanwhile.
    pub(super) async fn propose(&self, change: &Change) -> Result<Epoch, ChangeError> {
        let give_up = self.0.env.now() + CHANGE_TIMEOUT;
        let mut doubt = false;
        let mut wanted: Option<Topology> = None;
        loop {
            let base = self.decided().ok_or(ChangeError::Outside)?;
            // A change that cannot be made twice (a drop) is refused once it is in force.
            if wanted.as_ref() == Some(&*base.topology) {
                return Ok(base.topology.epoch);
            }
            let Some(next) = change.apply(&base.topology)? else {
                return Ok(base.topology.epoch);
            };
            wanted = Some(next.clone());
            match self.attempt(&base, next).await? {
                Outcome::Decided => continue,
                Outcome::Open { in_doubt } => doubt |= in_doubt,
            }
            if self.0.env.now() >= give_up {
                return Err(ChangeError::NoMajority { in_doubt: doubt });
            }
            self.back_off().await;
        }
    }

    /// One attempt to make `next` the epoch after `base`. What gets decided may be another
    /// proposer's topology.
    async fn attempt(&self, base: &Decided, next: Topology) -> Result<Outcome, ChangeError> {
        let topology = &base.topology;
        let voter = |slot: &SlotId| {
            let index = topology.index_of_slot(*slot)?;
            topology.member(index).shard_address(ShardId(0))
        };
        let own = base.me.map(|me| topology.member(me).slot);
        let ballots = Ballots {
            cluster: topology.cluster,
            epoch: topology.epoch.next(),
            voters: topology
                .voters
                .iter()
                .map(|slot| (*slot, voter(slot)))
                .collect(),
            own: own.filter(|slot| topology.voters.contains(slot)),
        };
        let promises = self.gather(&ballots, false).await?;
        if !promises.attempt.may_propose() {
            return Ok(self.settled(ballots.epoch, false));
        }
        let bound = promises.attempt.bound_to().cloned();
        let value = bound.unwrap_or_else(|| Bytes::from(next.encode()));
        self.confirm(&ballots, promises, value).await
    }

    /// First phase, as a proposer: asks every voter. Returns at a majority, or waits for `all`.
    pub(super) async fn gather(
        &self,
        ballots: &Ballots,
        all: bool,
    ) -> Result<Promises, ChangeError> {
        let instance = self.new_instance(ballots);
        let slots = ballots.voters.iter().map(|(slot, _)| *slot).collect();
        let mut promises = Promises {
            attempt: Attempt::new(ballot_of(instance.ballot), slots),
            founders: Vec::new(),
            nodes: BTreeMap::new(),
            refusal: None,
        };
        let message = Message::Prepare { instance };
        let mut answers = self.poll_voters(ballots, &message);
        while let Some((slot, answer)) = answers.next().await {
            match answer {
                Some(Answer::Promise {
                    voter,
                    node,
                    accepted,
                    description,
                }) if SlotId(voter) == slot => {
                    let accepted =
                        accepted.map(|(ballot, value)| (ballot_of(ballot), Bytes::from(value)));
                    promises.attempt.promise(slot, accepted);
                    promises.nodes.insert(slot, NodeId(node));
                    let description = description.and_then(|d| Description::decode(&d).ok());
                    promises
                        .founders
                        .extend(description.map(|description| Founder {
                            node: NodeId(node),
                            description,
                        }));
                }
                Some(Answer::Outbid { promised }) => self.note_outbid(ballot_of(promised)),
                Some(Answer::Topology { topology }) => {
                    if let Err(error) = self.learn(&topology).await {
                        promises.refusal = Some(error.to_string());
                    } else {
                        break;
                    }
                }
                Some(Answer::Refused { reason }) => promises.refusal = Some(reason),
                _ => {}
            }
            if !all && promises.attempt.may_propose() {
                break;
            }
        }
        Ok(promises)
    }

    /// Second phase, as a proposer; then everybody is told.
    pub(super) async fn confirm(
        &self,
        ballots: &Ballots,
        promises: Promises,
        value: Bytes,
    ) -> Result<Outcome, ChangeError> {
        let mut attempt = promises.attempt;
        let instance = self.instance(ballots, attempt.ballot());
        let message = Message::Accept {
            instance,
            value: value.to_vec(),
        };
        // At the founding nobody's uuid was known before: now the very nodes that promised are meant.
        let ballots = Ballots {
            voters: ballots
                .voters
                .iter()
                .map(|(slot, address)| {
                    let node = promises.nodes.get(slot).copied();
                    let meant = address.map(|address| Address {
                        node: node.unwrap_or(address.node),
                        ..address
                    });
                    (*slot, meant)
                })
                .collect(),
            ..*ballots
        };
        let mut answers = self.poll_voters(&ballots, &message);
        while let Some((slot, answer)) = answers.next().await {
            match answer {
                Some(Answer::Accepted { voter }) if SlotId(voter) == slot => attempt.accept(slot),
                Some(Answer::Outbid { promised }) => self.note_outbid(ballot_of(promised)),
                Some(Answer::Topology { topology }) => {
                    let known = self.learn(&topology).await;
                    if known.is_ok() {
                        break;
                    }
                }
                _ => {}
            }
            if attempt.decided() {
                break;
            }
        }
        drop(answers);
        if !attempt.decided() {
            return Ok(self.settled(ballots.epoch, true));
        }
        self.learn(&value).await?;
        self.tell_everyone().await;
        Ok(Outcome::Decided)
    }

    /// Whether `epoch` got decided meanwhile by what was learned.
    fn settled(&self, epoch: Epoch, in_doubt: bool) -> Outcome {
        let state = self.0.state.borrow();
        match &state.decided {
            Some(decided) if decided.topology.epoch >= epoch => Outcome::Decided,
            _ => Outcome::Open { in_doubt },
        }
    }

    /// Sends the newest topology to every member, and returns when a majority of its voters has
    /// stored it: from then on it outlives the voters that decided it.
    async fn tell_everyone(&self) {
        let Some(decided) = self.decided() else {
            return;
        };
        let topology = &decided.topology;
        let message = Message::Learn {
            topology: decided.encoded.to_vec(),
        };
        let mut stored = FuturesUnordered::new();
        let mut count = 0;
        for (index, member) in topology.indexed() {
            let voter = topology.voters.contains(&member.slot);
            if decided.me == Some(index) {
                count += usize::from(voter);
                continue;
            }
            let Some(address) = member.shard_address(ShardId(0)) else {
                continue;
            };
            let (membership, message) = (self.clone(), message.clone());
            if voter {
                stored.push(async move {
                    matches!(membership.ask(address, &message).await, Ok(Answer::Ok))
                });
            } else {
                // Who misses it hears of it by gossip.
                self.0.env.spawn(Class::Control, async move {
                    let _answer = membership.ask(address, &message).await;
                });
            }
        }
        while count <= topology.voters.len() / 2 {
            match stored.next().await {
                Some(yes) => count += usize::from(yes),
                None => break,
            }
        }
        // The remaining voters are still to be told, by nobody's waiting.
        self.0.env.spawn(Class::Control, async move {
            while stored.next().await.is_some() {}
        });
    }

    /// Takes in a decided topology if it is newer: stores it, then uses it.
    pub(super) async fn learn(&self, encoded: &[u8]) -> Result<(), ChangeError> {
        let refuse = |reason: String| ChangeError::Refused { reason };
        let topology = Topology::decode(encoded).map_err(|error| refuse(error.to_string()))?;
        let mut store = self.0.store.lock().await;
        let known = self.decided();
        let same_cluster = match &known {
            Some(known) => known.topology.cluster == topology.cluster,
            None => topology.name == self.0.config.cluster_name,
        };
        if !same_cluster {
            let (name, cluster) = (&topology.name, topology.cluster);
            return Err(refuse(format!("another cluster: {name:?} ({cluster})")));
        }
        if known.is_some_and(|known| known.topology.epoch >= topology.epoch) {
            return Ok(());
        }
        if let Some(store) = store.as_mut() {
            store.save_decided(encoded).await?;
        }
        tracing::info!(epoch = topology.epoch.0, cluster = %topology.cluster, "new epoch");
        self.install(topology);
        Ok(())
    }

    /// Uses a topology that is stored.
    fn install(&self, topology: Topology) {
        let decided = Decided::new(topology, self.0.env.node());
        let topology = decided.topology.clone();
        {
            let mut state = self.0.state.borrow_mut();
            if state.vote.instance <= topology.epoch {
                state.vote = new_vote(topology.epoch.next());
            }
            let members = || topology.members.iter().filter_map(|member| member.node);
            state.gossip.set_members(members());
            state
                .detector
                .retain(|node| members().any(|member| member == node));
            state.decided = Some(decided);
        }
        self.refresh_view();
        self.publish();
    }

    /// Asks every voter, this node by a plain call. Yields answers as they come.
    fn poll_voters(
        &self,
        ballots: &Ballots,
        message: &Message,
    ) -> FuturesUnordered<impl Future<Output = (SlotId, Option<Answer>)> + use<E>> {
        let polls = FuturesUnordered::new();
        for (slot, address) in &ballots.voters {
            let (membership, message) = (self.clone(), message.clone());
            let (slot, address) = (*slot, *address);
            let own = ballots.own == Some(slot);
            polls.push(async move {
                let answer = match address {
                    _ if own => Some(membership.vote(message).await),
                    Some(address) => membership.poll_voter(address, message).await,
                    None => None,
                };
                (slot, answer)
            });
        }
        polls
    }

    /// This node's own vote.
    async fn vote(&self, message: Message) -> Answer {
        let membership = self.clone();
        let vote = async move {
            match message {
                Message::Prepare { instance } => membership.on_prepare(&instance).await,
                Message::Accept { instance, value } => membership.on_accept(&instance, value).await,
                _ => refused("not a vote"),
            }
        };
        self.finish(vote).await
    }

    /// Asks one voter; one that lacks the epoch before gets it and is asked again.
    async fn poll_voter(&self, address: Address, message: Message) -> Option<Answer> {
        let answer = self.ask(address, &message).await.ok()?;
        let Answer::Behind { .. } = answer else {
            return Some(answer);
        };
        let topology = self.decided()?.encoded.to_vec();
        self.ask(address, &Message::Learn { topology }).await.ok()?;
        self.ask(address, &message).await.ok()
    }

    fn new_instance(&self, ballots: &Ballots) -> Instance {
        let mut state = self.0.state.borrow_mut();
        state.round = state.round.max(state.vote.acceptor.promised().round) + 1;
        let ballot = Ballot {
            round: state.round,
            node: self.0.env.node(),
        };
        drop(state);
        self.instance(ballots, ballot)
    }

    fn instance(&self, ballots: &Ballots, ballot: Ballot) -> Instance {
        let seeds_hash = match self.decided() {
            Some(decided) => decided.topology.seeds_hash,
            None => self.0.seeds_hash,
        };
        Instance {
            cluster: ballots.cluster.0,
            seeds_hash,
            epoch: ballots.epoch.0,
            ballot: wire_ballot(ballot),
        }
    }

    fn note_outbid(&self, promised: Ballot) {
        if promised.is_possible() {
            let mut state = self.0.state.borrow_mut();
            state.round = state.round.max(promised.round);
        }
    }

    pub(super) async fn back_off(&self) {
        let longest = u64::try_from(BACKOFF.as_micros()).unwrap_or(u64::MAX);
        let pause = Duration::from_micros(self.0.env.random() % longest);
        self.0.env.sleep(pause).await;
    }
}

fn topology_answer(decided: &Decided) -> Answer {
    Answer::Topology {
        topology: decided.encoded.to_vec(),
    }
}

fn no_vote(error: &StoreError) -> Answer {
    tracing::error!(%error, "this node does not vote any more");
    refused(&error.to_string())
}

fn ballot_of(wire: WireBallot) -> Ballot {
    Ballot {
        round: wire.round,
        node: NodeId(wire.node),
    }
}

fn wire_ballot(ballot: Ballot) -> WireBallot {
    WireBallot {
        round: ballot.round,
        node: ballot.node.0,
    }
}
