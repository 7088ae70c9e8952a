//! One shard's cluster half, as protocols and links see it.
//!
//! On the path: a connection's shard calls [`Node::get`], [`Node::put`], …; a link hands what other
//! shards and nodes ask to [`Node::serve`]. Any shard of any node takes any request: what belongs to
//! another shard goes over the mesh once, what belongs to another node is forwarded once.
//!
//! Invariants: every request is admitted within the bounds of its class, and every answer says
//! truthfully what happened (see [`crate::api`]).
//!
//! It knows no sockets and no wire format of clients.

mod admin;

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::FutureExt as _;
use torc_engine::compaction::Strategy;
use torc_engine::{Store, WriteError};
use torc_env::{Class, Env, Origin};

pub use crate::admission::AdmissionLimits;
use crate::admission::Permit;
pub use crate::anti_entropy::RepairOptions;
use crate::anti_entropy::{self, catch_up, loss};
use crate::api::{
    BatchRequest, DeleteRequest, Failure, FailureCode, GetAnswer, GetRequest, Outcome, PutRequest,
    ScanAnswer, ScanRequest, Written,
};
use crate::clock_mark;
use crate::coordinator::put::{WriteOperation, write_named};
use crate::coordinator::{batch, delete, get, scan};
use crate::core::{Core, deadline_passed, tree};
use crate::held::Held;
use crate::hint;
pub use crate::hint::HintOptions;
use crate::hlc::SKEW_MAX_DEFAULT;
use crate::lacking::Lacking;
use crate::membership::{self, Membership, MembershipConfig};
use crate::message::{self, ArchivedAnswer, Body, Response, failure_of, level_to_wire, slice_of};
use crate::metrics::{Counter, Gauges};
use crate::own_trees;
use crate::serve;
use crate::target::Target;
use crate::topology::store::StoreError;
use crate::version::{BootIdentity, Context, RETENTION_DEFAULT_MS};

/// The most live siblings of a key that a further write may join, unless configured: far above
/// what conflicts make, and a client that never reads is told before it has filled a record.
pub const SIBLINGS_MAX_DEFAULT: usize = 100;

/// What a shard holds for its clients at most when the configuration does not say, in bytes.
pub const CLIENT_BYTES_MAX_DEFAULT: usize = 128 << 20;

/// Settings of a node's cluster half; the same on all its shards.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// This boot of this node, synced to disk before the start.
    pub identity: BootIdentity,
    /// How far clocks may be apart; see [`crate::hlc`].
    pub skew_max: Duration,
    /// The most siblings of a key; see [`SIBLINGS_MAX_DEFAULT`].
    pub siblings_max: usize,
    /// How long a keyed write is remembered, in milliseconds.
    pub idempotency_window_ms: u64,
    /// Bounds of what is in flight.
    pub admission: AdmissionLimits,
    /// The most bytes of requests and answers that a shard holds for its clients; see [`crate::held`].
    pub client_bytes_max: usize,
    /// Bounds of hints.
    pub hints: HintOptions,
    /// How ranges are repaired.
    pub repair: RepairOptions,
    /// Whether the store may have lost what it had acknowledged, and does not know what: `amnesia` of its recovery. The
    /// shard then fetches what its ranges should hold before it answers reads. What it does know of, it says itself.
    pub amnesia: bool,
    /// When the oldest snapshot that this node keeps was taken, in milliseconds since 1970.
    pub snapshot_since_ms: Option<u64>,
    /// How the node finds its cluster.
    pub membership: MembershipConfig,
}

impl NodeConfig {
    /// Defaults, for this boot.
    pub fn new(identity: BootIdentity, membership: MembershipConfig) -> Self {
        Self {
            identity,
            membership,
            skew_max: SKEW_MAX_DEFAULT,
            siblings_max: SIBLINGS_MAX_DEFAULT,
            idempotency_window_ms: RETENTION_DEFAULT_MS,
            admission: AdmissionLimits::default(),
            client_bytes_max: CLIENT_BYTES_MAX_DEFAULT,
            amnesia: false,
            snapshot_since_ms: None,
            hints: HintOptions::default(),
            repair: RepairOptions::default(),
        }
    }
}

/// Why a shard's cluster half cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The shard's store fails.
    #[error("the store cannot be read: {0}")]
    Store(#[from] torc_engine::ReadError),
    /// Damage in the shard's store cannot be cut out.
    #[error("the store cannot be written: {cause}")]
    Write {
        /// What the store says. (A text, since errors of writes are of one thread, and this one is of the process.)
        cause: String,
    },
    /// What the node knows of its cluster cannot be read.
    #[error("the topology cannot be read: {0}")]
    Topology(#[from] StoreError),
}

impl From<WriteError> for StartError {
    fn from(error: WriteError) -> Self {
        StartError::Write {
            cause: error.to_string(),
        }
    }
}

/// One shard's cluster half. Clones share it.
pub struct Node<E: Env>(pub(crate) Rc<Core<E>>);

impl<E: Env> Clone for Node<E> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<E: Env> Node<E> {
    /// Starts the cluster half of one shard on its open store. Damage in what the shard keeps for itself is cut out of it,
    /// and the shard then asks its replicas what it lacks.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn start(env: E, config: NodeConfig, store: Store<E>) -> Result<Self, StartError> {
        let remembered = own_trees::remembered::<E, StartError>(&env, env.shard(), &store).await?;
        let membership = Membership::start(env.clone(), config.membership.clone()).await?;
        let is_catching_up = config.amnesia || remembered.lacks_data;
        let lacking = Lacking::new(is_catching_up, store.losses());
        let core = Core::new(
            env,
            store,
            membership,
            config,
            remembered.clock_mark,
            lacking,
        );
        let core = Rc::new(core);
        let stamps = Rc::downgrade(&core);
        core.store.set_newest_stamp(Box::new(move || {
            stamps.upgrade().map_or(0, |core| core.clock.last())
        }));
        for tree in [tree::HINTS, tree::SYSTEM] {
            core.store.set_strategy(tree, Strategy::Hybrid);
        }
        core.spawn(Class::Control, clock_mark::keep(Rc::clone(&core)));
        core.spawn(Class::Repair, hint::replay(Rc::clone(&core)));
        core.spawn(Class::Repair, anti_entropy::schedule(Rc::clone(&core)));
        core.spawn(Class::Repair, catch_up::run(Rc::clone(&core)));
        Ok(Self(core))
    }

    /// Says since when this node keeps a snapshot that could be restored, if it does: from then on no
    /// deletion is forgotten anywhere that the snapshot does not know of.
    pub fn set_snapshot_since_ms(&self, since_ms: Option<u64>) {
        self.0.snapshot_since_ms.set(since_ms);
    }

    /// The newest stamp of this shard's hybrid clock: microseconds since 1970, above every stamp that it
    /// has minted or seen.
    pub fn newest_stamp(&self) -> u64 {
        self.0.clock.last()
    }

    /// Ends this shard's minting for a stop. Comes after the last client; writes that other nodes still pass on
    /// are refused, and they try elsewhere.
    pub fn end_minting(&self) {
        self.0.clock.seal();
    }

    /// Leaves word that this shard's next life may go on at the last stamp of this one. Comes after
    /// [`Node::end_minting`] and the last archiving of the log, and before the store is closed.
    ///
    /// # Errors
    /// When the store does not take it. The next start then waits for stamps that were only reserved.
    pub async fn leave_clock_mark(&self) -> Result<(), WriteError> {
        clock_mark::leave(&self.0).await
    }

    /// Answers a request of another shard or node.
    pub fn serve(
        &self,
        origin: Origin,
        request: Bytes,
    ) -> impl Future<Output = Bytes> + use<E> + 'static {
        let core = Rc::clone(&self.0);
        async move {
            match request.first() {
                Some(&message::FAMILY) => serve::serve(core, request).await,
                Some(&membership::message::FAMILY) => {
                    let membership = core.membership.clone();
                    membership.serve(origin, request).await
                }
                _ => {
                    tracing::debug!(node = %origin.node, "a message of an unknown family");
                    core.count(Counter::BadMessages);
                    Bytes::new()
                }
            }
        }
    }

    /// Reads a key.
    ///
    /// # Errors
    /// Never in doubt; see [`FailureCode`].
    pub async fn get(&self, request: GetRequest) -> Result<GetAnswer, Failure> {
        let core = &self.0;
        let result = match self.admit() {
            Ok(_place) => loop {
                let epoch = core.epoch();
                match self.try_get(&request).await {
                    Err(failure) if failure.code == FailureCode::TopologyChanging => {
                        if !core.outlives(epoch, request.deadline).await {
                            break Err(failure);
                        }
                    }
                    result => break result,
                }
            },
            Err(failure) => Err(failure),
        };
        core.count(match result {
            Ok(_) => Counter::Reads,
            Err(_) => Counter::ReadFailures,
        });
        result
    }

    async fn try_get(&self, request: &GetRequest) -> Result<GetAnswer, Failure> {
        let core = &self.0;
        let target = Target::named(core.view()?, &request.keyspace, &request.key)?;
        let plain = get::Read {
            target: &target,
            key: &request.key,
            r: request.r,
            id: core.next_request(),
            deadline: request.deadline,
        };
        let state = if target.me().is_some() && !core.owns(&target) {
            self.get_over_mesh(&plain, request.at_least.as_ref())
                .boxed_local()
                .await?
        } else {
            match &request.at_least {
                None => get::read(core, &plain).await?,
                Some(at_least) => {
                    get::read_at_least(core, &plain, at_least)
                        .boxed_local()
                        .await?
                }
            }
        };
        get::answer(&state, core.now_ms())
    }

    /// The shard of this node that owns the key coordinates: it reads its own copy without a call.
    async fn get_over_mesh(
        &self,
        read: &get::Read<'_>,
        at_least: Option<&Context>,
    ) -> Result<Bytes, Failure> {
        let core = &self.0;
        core.count(Counter::MeshHops);
        let at_least = at_least.map(Context::to_bytes);
        let message = core.encode(
            read.target,
            read.id,
            read.deadline,
            Body::Get {
                tree: read.target.tree().0,
                key: read.key,
                r: level_to_wire(read.r),
                at_least: at_least.as_deref(),
            },
        );
        let address = core.own_shard(read.target.token.shard(core.env.shard_count()));
        let call = core
            .env
            .call(address, Class::Foreground, message, read.deadline);
        let bytes = call.await.map_err(|error| {
            if core.env.now() >= read.deadline {
                deadline_passed("the owning shard answered")
            } else {
                Failure::refused(FailureCode::Overloaded, error)
            }
        })?;
        let response = Response::access(&bytes)
            .map_err(|error| Failure::refused(FailureCode::Internal, error))?;
        match &response.answer {
            ArchivedAnswer::State { state } => Ok(slice_of(&bytes, state)),
            other => Err(Failure {
                in_doubt: false,
                ..failure_of(other)
            }),
        }
    }

    /// Writes a key.
    ///
    /// # Errors
    /// In doubt exactly when it may have been applied; see [`FailureCode`].
    pub async fn put(&self, request: PutRequest) -> Result<Written, Failure> {
        let operation = WriteOperation {
            key: request.key,
            value: Some(request.value),
            ttl_seconds: request.ttl_seconds.unwrap_or(0),
            options: request.write,
            is_forwarded: false,
            id: self.0.next_request(),
        };
        let result = match self.admit() {
            Ok(_place) => write_named(&self.0, &request.keyspace, &operation).await,
            Err(failure) => Err(failure),
        };
        self.count_write(result)
    }

    /// Deletes a key, whether or not it exists.
    ///
    /// # Errors
    /// As for [`Node::put`].
    pub async fn delete(&self, request: DeleteRequest) -> Result<Written, Failure> {
        let result = match self.admit() {
            Ok(_place) => delete::delete(&self.0, request).await,
            Err(failure) => Err(failure),
        };
        self.count_write(result)
    }

    /// Lists one page of keys.
    ///
    /// # Errors
    /// Never in doubt.
    pub async fn scan(&self, request: ScanRequest) -> Result<ScanAnswer, Failure> {
        let _place = self.admit()?;
        scan::scan(&self.0, &request).await
    }

    /// Runs many operations; each has its own outcome, in order.
    ///
    /// # Errors
    /// When there are too many: then none was carried out.
    pub async fn batch(&self, request: BatchRequest) -> Result<Vec<Outcome>, Failure> {
        batch::batch(self, request).await
    }

    /// What this shard holds for its clients.
    pub fn held(&self) -> &Rc<Held> {
        &self.0.held
    }

    /// What this shard has counted since it started.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        self.0.metrics.counts()
    }

    /// What is now on this shard.
    pub fn gauges(&self) -> Gauges {
        let core = &self.0;
        let (hints, hint_bytes) = core.hints.waiting();
        let (ranges, oldest_unrepaired_ms) = core.repairs.lag(core.now_ms());
        let hint_age_ms = core
            .hints
            .oldest_ms()
            .map_or(0, |oldest_ms| core.now_ms().saturating_sub(oldest_ms));
        Gauges {
            requests_in_flight: core.admission.in_flight(Class::Foreground),
            replica_requests_in_flight: core.admission.in_flight(Class::Replication),
            hints,
            hint_bytes,
            hint_age_ms,
            ranges,
            oldest_unrepaired_ms,
            hedge_delay_us: micros(core.hedge.delay()),
            clock_ahead_us: micros(core.clock.ahead(core.env.wall())),
            damage_waiting: loss::waiting(core),
            client_bytes: u64::try_from(core.held.bytes()).unwrap_or(u64::MAX),
        }
    }

    /// A place among the requests of clients. (A guard rather than a wrapper around the work: an
    /// async function's argument takes its space twice.)
    fn admit(&self) -> Result<Permit, Failure> {
        let place = self.0.admission.enter(Class::Foreground);
        place.inspect_err(|_| self.0.count(Counter::Overloads))
    }

    fn count_write(&self, result: Result<Written, Failure>) -> Result<Written, Failure> {
        self.0.count(match &result {
            Ok(_) => Counter::Writes,
            Err(failure) if failure.in_doubt => Counter::WriteDoubts,
            Err(_) => Counter::WriteRefusals,
        });
        result
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
