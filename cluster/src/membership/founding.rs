//! How a node gets into its cluster.
//!
//! A node that knows its cluster from before just goes on. A fresh one whose own address is a seed
//! is a founder: the founders decide the first epoch among exactly the seed list, by majority. Any
//! other fresh node asks the seeds for the topology and joins. A founder that meets a member learns
//! the topology from it and joins too.
//!
//! **Invariant.** No cluster id is used before a majority of the seed list has accepted it, so two
//! halves of one seed list cannot found two clusters, whatever crashes in between.

use std::time::Duration;

use bytes::Bytes;
use torc_env::{Address, Env, Instant, NodeId, ShardId};

use super::agreement::Ballots;
use super::message::{Answer, Message};
use super::{Membership, Standing};
use crate::topology::change::Change;
use crate::topology::{ClusterId, Epoch, SlotId, Topology};

/// How long founders wait for all seeds, so that those that start a little later found with them
/// instead of claiming their slot afterwards.
const FOUNDING_PATIENCE: Duration = Duration::from_secs(2);

/// Head start of each seed over the one after it in the list, so that they rarely outbid each other.
const HEAD_START: Duration = Duration::from_millis(150);

/// Pause between two looks at seeds that do not answer.
const RETRY: Duration = Duration::from_millis(500);

impl<E: Env> Membership<E> {
    /// Gets this node into its cluster, however long it takes.
    pub(super) async fn enter(self) {
        let env = self.0.env.clone();
        let started = env.now();
        if let Some(SlotId(place)) = self.own_seed()
            && self.decided().is_none()
        {
            env.sleep(HEAD_START * place).await;
        }
        while self.decided().is_none() {
            match self.own_seed() {
                Some(own) => self.found(own, started).await,
                None => self.meet_seeds().await,
            }
            if self.decided().is_none() {
                env.sleep(RETRY / 2).await;
                self.back_off().await;
            }
        }
        while self.standing() == Standing::Outside {
            let change = Change::Join {
                node: env.node(),
                description: self.0.config.own.clone(),
            };
            let result = self.propose(&change).await;
            self.note_trouble(result.err());
            env.sleep(RETRY).await;
        }
        self.keep_description().await;
    }

    /// One attempt to found the cluster.
    async fn found(&self, own: SlotId, started: Instant) {
        let anyone = NodeId::default();
        let voters = self.0.seeds.iter().zip(0..).map(|(seed, place)| {
            let address = Address {
                node: anyone,
                host: *seed,
                shard: ShardId(0),
            };
            (SlotId(place), Some(address))
        });
        let ballots = Ballots {
            cluster: ClusterId::default(),
            epoch: Epoch::FIRST,
            voters: voters.collect(),
            own: Some(own),
        };
        let promises = match self.gather(&ballots, true).await {
            Ok(promises) => promises,
            Err(error) => return self.note_trouble(Some(error)),
        };
        self.0.state.borrow_mut().trouble = promises.refusal.clone();
        if self.decided().is_some() || !promises.attempt.may_propose() {
            return;
        }
        let complete = promises.attempt.promise_count() == self.0.seeds.len();
        let patient = self.0.env.now().since(started) < FOUNDING_PATIENCE;
        let value = match promises.attempt.bound_to() {
            Some(value) => value.clone(),
            None if patient && !complete => return,
            None => {
                let founded = Topology::found(
                    self.new_cluster_id(),
                    &self.0.config.cluster_name,
                    &self.0.seeds,
                    &promises.founders,
                );
                match founded {
                    Ok(topology) => Bytes::from(topology.encode()),
                    Err(refusal) => return self.note_trouble(Some(refusal.into())),
                }
            }
        };
        let outcome = self.confirm(&ballots, promises, value).await;
        self.note_trouble(outcome.err());
    }

    /// Asks every seed for the topology of the cluster.
    async fn meet_seeds(&self) {
        for seed in &self.0.seeds {
            let address = Address {
                node: NodeId::default(),
                host: *seed,
                shard: ShardId(0),
            };
            let question = Message::Fetch {
                name: self.0.config.cluster_name.clone(),
                above: 0,
            };
            match self.ask(address, &question).await {
                Ok(Answer::Topology { topology }) => {
                    let learned = self.learn(&topology).await;
                    self.note_trouble(learned.err());
                    if self.decided().is_some() {
                        return;
                    }
                }
                Ok(Answer::Refused { reason }) => {
                    tracing::warn!(%seed, reason, "a seed refuses this node");
                    self.0.state.borrow_mut().trouble = Some(reason);
                }
                _ => {}
            }
        }
    }

    /// A node that came back with other addresses or another number of shards says so, and again whenever the
    /// topology says otherwise: what an earlier life of it had said may be decided, or become known here, only
    /// after this one has found nothing to correct.
    async fn keep_description(&self) {
        let change = Change::Describe {
            node: self.0.env.node(),
            description: self.0.config.own.clone(),
        };
        let mut settled = None;
        let mut is_refused = false;
        while self.standing() != Standing::Left {
            let known = self.decided().map(|decided| decided.topology.epoch);
            if settled != known {
                match self.propose(&change).await {
                    Ok(epoch) => {
                        settled = Some(epoch);
                        if std::mem::take(&mut is_refused) {
                            self.note_trouble(None);
                        }
                    }
                    Err(error @ super::ChangeError::Refused { .. }) => {
                        settled = known;
                        is_refused = true;
                        self.note_trouble(Some(error));
                    }
                    Err(_) => {}
                }
            }
            self.0.env.sleep(RETRY).await;
        }
    }

    fn new_cluster_id(&self) -> ClusterId {
        let random = || u128::from(self.0.env.random());
        ClusterId((random() << 64 | random()).max(1))
    }
}
