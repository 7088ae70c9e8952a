//! What operators ask a node: status, ring, keyspaces, repair.
//!
//! Not on a request's path. Reads the shard's view; what concerns the whole node goes to each of its
//! shards over the mesh, what concerns the whole cluster becomes an epoch of the topology.

use std::rc::Rc;
use std::time::Duration;

use torc_env::{Class, Env, ShardId};

use super::Node;
use crate::anti_entropy::{self, loss};
use crate::api::{
    DamagedPart, Failure, FailureCode, NodeStatus, Owner, RepairReport, RingRange, Status,
};
use crate::core::Core;
use crate::keyspace::Keyspace;
use crate::membership::{ChangeError, Membership};
use crate::message::{ArchivedAnswer, Body, Request, Response, failure_of};
use crate::target::Target;
use crate::topology::Epoch;

/// How long a repair on demand may take.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

impl<E: Env> Node<E> {
    /// Whether this node is in the ring and serves.
    pub fn ready(&self) -> bool {
        self.0.membership.ready()
    }

    /// This shard's half of membership, for what is not wrapped here.
    pub fn membership(&self) -> &Membership<E> {
        &self.0.membership
    }

    /// The cluster, as this node sees it: its members and those that have left.
    pub fn status(&self) -> Status {
        let core = &self.0;
        let Some(view) = core.membership.view() else {
            return Status {
                epoch: 0,
                cluster: 0,
                node: core.env.node(),
                ready: false,
                nodes: Vec::new(),
            };
        };
        let mut nodes: Vec<NodeStatus> = view
            .topology
            .indexed()
            .map(|(index, member)| {
                let description = &member.description;
                NodeStatus {
                    node: member.node.unwrap_or_default(),
                    name: description.name.clone(),
                    state: view.state_name(index),
                    internode: description.internode.to_string(),
                    http: description.http.to_string(),
                    rack: description.rack.clone(),
                    zone: description.zone.clone(),
                    datacenter: description.datacenter.clone(),
                    shards: description.shards,
                    tokens: u32::try_from(member.vnodes.len()).unwrap_or(u32::MAX),
                }
            })
            .collect();
        nodes.extend(view.topology.removed.iter().map(|removed| NodeStatus {
            node: removed.node,
            name: removed.name.clone(),
            state: "left",
            internode: String::new(),
            http: String::new(),
            rack: String::new(),
            zone: String::new(),
            datacenter: String::new(),
            shards: 0,
            tokens: 0,
        }));
        nodes.sort_by(|a, b| (&a.name, a.node).cmp(&(&b.name, b.node)));
        Status {
            epoch: view.topology.epoch.0,
            cluster: view.topology.cluster.0,
            node: core.env.node(),
            ready: self.ready(),
            nodes,
        }
    }

    /// Every range of the ring and who holds it in `keyspace`.
    ///
    /// # Errors
    /// When there is no such keyspace, or no topology yet.
    pub fn ring(&self, keyspace: &str) -> Result<Vec<RingRange>, Failure> {
        let view = self.0.view()?;
        let keyspace = view.topology.keyspace(keyspace).ok_or_else(|| {
            Failure::refused(
                FailureCode::UnknownKeyspace,
                format_args!("no keyspace {keyspace:?}"),
            )
        })?;
        let n = usize::from(view.topology.effective_n(keyspace));
        let node_of = |member| view.topology.member(member).node.unwrap_or_default();
        Ok(view
            .ring
            .ranges(n, 1)
            .map(|piece| RingRange {
                range: piece.range,
                replicas: piece
                    .replicas
                    .iter()
                    .map(|member| node_of(*member))
                    .collect(),
            })
            .collect())
    }

    /// Which shard of which node answers best for a key: this node's when it is a replica, else
    /// that of the first replica that is up.
    ///
    /// # Errors
    /// When there is no such keyspace, or no replica is up.
    pub fn owner(&self, keyspace: &[u8], key: &[u8]) -> Result<Owner, Failure> {
        let core = &self.0;
        let target = Target::named(core.view()?, keyspace, key)?;
        if target.me().is_some() {
            return Ok(Owner {
                node: core.env.node(),
                shard: target.token.shard(core.env.shard_count()),
            });
        }
        target
            .replicas
            .as_slice()
            .iter()
            .filter(|member| target.is_up(**member))
            .find_map(|member| target.address(*member))
            .map(|address| Owner {
                node: address.node,
                shard: address.shard,
            })
            .ok_or_else(|| {
                Failure::refused(FailureCode::QuorumNotMet, "no replica of the key is up")
            })
    }

    /// The keyspaces of the topology in force.
    ///
    /// # Errors
    /// Before there is a topology.
    pub fn keyspaces(&self) -> Result<Vec<Keyspace>, Failure> {
        Ok(self.0.view()?.topology.keyspaces.clone())
    }

    /// Creates a keyspace, or alters what may be altered of an existing one; in force on return.
    /// The id in `keyspace` is not looked at.
    ///
    /// # Errors
    /// In doubt when it may yet come into force.
    pub async fn keyspace_put(&self, keyspace: Keyspace) -> Result<Epoch, Failure> {
        let changed = self.0.membership.put_keyspace(keyspace).await;
        changed.map_err(|error| change_failure(&error))
    }

    /// Drops a keyspace with all its data.
    ///
    /// # Errors
    /// As for [`Node::keyspace_put`].
    pub async fn keyspace_drop(&self, name: &str) -> Result<Epoch, Failure> {
        let changed = self.0.membership.drop_keyspace(name).await;
        changed.map_err(|error| change_failure(&error))
    }

    /// What damage has cost this shard and nobody has made good yet.
    pub fn damaged_parts(&self) -> Vec<DamagedPart> {
        loss::parts(&self.0)
    }

    /// Accepts that what [`Node::damaged_parts`] lists stays lost where no other owner that is up has it, and returns it. Durable
    /// on return.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub async fn accept_loss(&self) -> Result<Vec<DamagedPart>, Failure> {
        loss::accept(&self.0).await
    }

    /// Repairs everything that this node holds, on all its shards, and returns when it is done.
    ///
    /// # Errors
    /// When a shard of this node does not answer. Ranges that could not be repaired with all their
    /// owners are counted in the report.
    pub async fn repair(&self) -> Result<RepairReport, Failure> {
        let core = &self.0;
        let shards = (0..core.env.shard_count()).map(|shard| repair_shard(core, ShardId(shard)));
        let mut total = RepairReport::default();
        for report in futures_util::future::join_all(shards).await {
            let report = report?;
            total.ranges_repaired += report.ranges_repaired;
            total.ranges_failed += report.ranges_failed;
            total.records_received += report.records_received;
            total.records_sent += report.records_sent;
        }
        Ok(total)
    }
}

async fn repair_shard<E: Env>(core: &Rc<Core<E>>, shard: ShardId) -> Result<RepairReport, Failure> {
    if shard == core.env.shard() {
        return anti_entropy::repair_all(core).await;
    }
    let deadline = core.env.now() + REPAIR_TIMEOUT;
    let message = Request {
        id: core.next_request(),
        remaining_ms: core.remaining_ms(deadline),
        epoch: core.view()?.topology.epoch.0,
        owners: 0,
        body: Body::Repair,
    }
    .encode();
    let answer = core
        .env
        .call(core.own_shard(shard), Class::Control, message, deadline)
        .await
        .map_err(|error| Failure::refused(FailureCode::Overloaded, error))?;
    let response = Response::access(&answer)
        .map_err(|error| Failure::refused(FailureCode::Internal, error))?;
    match &response.answer {
        ArchivedAnswer::Repaired { counts } => {
            let [
                ranges_repaired,
                ranges_failed,
                records_received,
                records_sent,
            ] = counts.each_ref().map(|count| count.to_native());
            Ok(RepairReport {
                ranges_repaired,
                ranges_failed,
                records_received,
                records_sent,
            })
        }
        other => Err(failure_of(other)),
    }
}

fn change_failure(error: &ChangeError) -> Failure {
    match error {
        ChangeError::Refused { .. } => Failure::refused(FailureCode::InvalidRequest, error),
        ChangeError::Outside => Failure::refused(FailureCode::NotReady, error),
        ChangeError::NoMajority { in_doubt } => {
            let failure = Failure::refused(FailureCode::QuorumNotMet, error);
            if *in_doubt {
                failure.in_doubt()
            } else {
                failure
            }
        }
        ChangeError::Disk { .. } => Failure::refused(FailureCode::Internal, error),
    }
}
