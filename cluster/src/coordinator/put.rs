//! Writes a key: finds a replica to coordinate, mints one dot there, and spreads the new state.
//!
//! On the path: [`Node::put`](crate::node::Node::put) and `delete` → here → [`replica::update`] (mint)
//! → [`Spread`] → answer at W acks. On a shard that does not own the key the request goes to the
//! one that does, once; on a node that is no replica it is forwarded to one, once.
//!
//! Invariants: one dot a write, minted by a current replica against the newest state of the key,
//! what is still being synced included; every condition is checked in that same step; what is sent
//! is the key's whole state. A failure says *refused* only when nothing was applied anywhere.
//!
//! It knows no HTTP and no value format.

use std::pin::pin;
use std::rc::Rc;

use bytes::Bytes;
use torc_engine::{Decision, Record, Ticket};
use torc_env::{Address, Class, Env, Instant, mutation};

use crate::api::{
    Condition, Failure, FailureCode, Idempotency, Level, TTL_SECONDS_MAX, VALUE_BYTES_MAX,
    WriteOptions, Written,
};
use crate::coordinator::get::{Read, order, read, unreadable};
use crate::coordinator::spread::{Missed, Spread, call_failure};
use crate::core::{Core, deadline_passed};
use crate::message::{ArchivedAnswer, Body, Response, failure_of, flags, level_to_wire};
use crate::metrics::Counter;
use crate::quorum::Requirement;
use crate::replica::{self, write_failure};
use crate::ring::MemberIndex;
use crate::target::{Replicas, Target};
use crate::version::{Answered, Context, Dot, Keyed, Minter, State, Write};

/// One put or delete.
pub(crate) struct WriteOperation {
    pub(crate) key: Bytes,
    /// `None` deletes.
    pub(crate) value: Option<Bytes>,
    /// 0 = the keyspace's default.
    pub(crate) ttl_seconds: u64,
    pub(crate) options: WriteOptions,
    /// It has been forwarded to this node by one that is no replica.
    pub(crate) is_forwarded: bool,
    pub(crate) id: u64,
}

/// Carries a write of a client out.
pub(crate) async fn write_named<E: Env>(
    core: &Rc<Core<E>>,
    keyspace: &[u8],
    operation: &WriteOperation,
) -> Result<Written, Failure> {
    loop {
        let target = Target::named(core.view()?, keyspace, &operation.key)?;
        match write(core, &target, operation).await {
            // Nothing was applied: it is tried again by the new topology.
            Err(failure) if failure.code == FailureCode::TopologyChanging && !failure.in_doubt => {
                let epoch = target.view.topology.epoch.0;
                if !core.outlives(epoch, operation.options.deadline).await {
                    return Err(failure);
                }
            }
            result => return result,
        }
    }
}

/// Carries a write out at the place that `target` says.
pub(crate) async fn write<E: Env>(
    core: &Rc<Core<E>>,
    target: &Target,
    operation: &WriteOperation,
) -> Result<Written, Failure> {
    let order = order(core, target);
    let requirement = check(target, operation, &order)?;
    match target.me() {
        None if operation.is_forwarded => Err(Failure::refused(
            FailureCode::TopologyChanging,
            "the node that this write was forwarded to is no replica of the key",
        )),
        None => forward(core, target, &order, operation).await,
        Some(_) if !core.owns(target) => hand_over(core, target, operation).await,
        Some(me) => {
            let attempt = Attempt {
                core,
                target,
                order,
                requirement,
                operation,
                me,
            };
            match attempt.run().await {
                // Nothing was applied and the trouble is this node's own: another replica may do it.
                Err(Refused::Here(failure)) if !operation.is_forwarded => {
                    match forward(core, target, &order, operation).await {
                        Err(elsewhere) if elsewhere.code == FailureCode::QuorumNotMet => {
                            Err(Failure {
                                in_doubt: elsewhere.in_doubt,
                                ..failure
                            })
                        }
                        result => result,
                    }
                }
                Err(Refused::Here(failure) | Refused::Everywhere(failure)) => Err(failure),
                Ok(written) => Ok(written),
            }
        }
    }
}

/// Refuses what cannot be right, before anything is done.
fn check(
    target: &Target,
    operation: &WriteOperation,
    order: &Replicas,
) -> Result<Requirement, Failure> {
    let options = &operation.options;
    let invalid = |message: &str| Err(Failure::refused(FailureCode::InvalidRequest, message));
    if let Some(value) = &operation.value
        && value.len() > VALUE_BYTES_MAX
    {
        return Err(Failure::refused(
            FailureCode::TooLarge,
            format_args!(
                "a value has up to {VALUE_BYTES_MAX} bytes, not {}",
                value.len()
            ),
        ));
    }
    if operation.ttl_seconds > TTL_SECONDS_MAX {
        return invalid("the time to live is too long");
    }
    let requirement = target.requirement(options.w, order.as_slice())?;
    if options.condition != Condition::None {
        if options.sloppy {
            return invalid("a conditional write cannot be sloppy");
        }
        if !requirement.is_strict(order.as_slice().len()) {
            return invalid("a conditional write needs w of at least a quorum");
        }
    }
    Ok(requirement)
}

/// Why an attempt did nothing, or may have done something.
enum Refused {
    /// This node could not; nothing was applied.
    Here(Failure),
    /// It holds wherever it is tried, or something may have been applied.
    Everywhere(Failure),
}

impl From<Failure> for Refused {
    /// Of an attempt that has minted no dot, unless it is in doubt: only then may another replica mint one.
    fn from(failure: Failure) -> Self {
        if !failure.in_doubt && may_do_elsewhere(failure.code) {
            Refused::Here(failure)
        } else {
            Refused::Everywhere(failure)
        }
    }
}

/// What the mint decided.
enum Minted {
    /// A new dot.
    New { version: Context, state: Bytes },
    /// The request was applied before.
    Replay { version: Context, state: Bytes },
    /// Nothing was written.
    Not(Failure),
}

/// A write that this replica coordinates.
struct Attempt<'a, E: Env> {
    core: &'a Rc<Core<E>>,
    target: &'a Target,
    order: Replicas,
    requirement: Requirement,
    operation: &'a WriteOperation,
    me: MemberIndex,
}

impl<E: Env> Attempt<'_, E> {
    async fn run(&self) -> Result<Written, Refused> {
        // Who is up is seen alike everywhere: nobody is asked again about that.
        self.admit().map_err(Refused::Everywhere)?;
        self.core.check_has(self.target)?;
        if self.target.keyspace().conflict.orders_by_time() {
            self.core.mark(self.operation.options.deadline).await;
        }
        // It has asked the others: where too few of them answer, none of them would hear more.
        let known = self.read_first().await.map_err(Refused::Everywhere)?;
        self.core.check_has(self.target)?;
        let (tree, token) = (self.target.tree(), self.target.token);
        let mint = replica::update(self.core, tree, token, &self.operation.key, |stored| {
            self.mint(stored, known.as_ref())
        });
        let Some(minted) = self
            .core
            .until(self.operation.options.deadline, pin!(mint))
            .await
        else {
            // The store decides and writes in one step; whether it came to it is not known.
            return Err(Refused::Everywhere(
                deadline_passed("this node's store took the write").in_doubt(),
            ));
        };
        let (minted, ticket) = minted.map_err(|error| write_failure(&error))?;
        let (version, state) = match minted {
            Minted::New { version, state } | Minted::Replay { version, state } => (version, state),
            Minted::Not(failure) => {
                // What the refusal was decided by may still be on its way to the disk.
                let durable = self
                    .core
                    .until(self.operation.options.deadline, pin!(ticket.wait()))
                    .await;
                return Err(Refused::from(match durable {
                    Some(Ok(())) => failure,
                    // Of a write that came before; this one has left nothing to be in doubt about.
                    Some(Err(error)) => Failure {
                        in_doubt: false,
                        ..write_failure(&error)
                    },
                    None => deadline_passed("the key's state was durable"),
                }));
            }
        };
        let mut spread = self.spread(self.target, &self.order, &self.requirement, state.clone());
        let mut epoch = self.target.view.topology.epoch.0;
        let mut failure = match self.settle(spread, Some(ticket), &version).await {
            Ok(written) => return Ok(written),
            Err(failure) => failure,
        };
        // The dot is minted and stays what it is: the same state goes to the new owners.
        while failure.code == FailureCode::TopologyChanging {
            let Some((target, order, requirement)) = self.moved(epoch).await else {
                break;
            };
            epoch = target.view.topology.epoch.0;
            spread = self.spread(&target, &order, &requirement, state.clone());
            failure = match self.settle(spread, None, &version).await {
                Ok(written) => return Ok(written),
                Err(again) => Failure {
                    in_doubt: failure.in_doubt || again.in_doubt,
                    ..again
                },
            };
        }
        Err(Refused::Everywhere(failure))
    }

    fn spread(
        &self,
        target: &Target,
        order: &Replicas,
        requirement: &Requirement,
        state: Bytes,
    ) -> Spread<E> {
        let missed = if self.operation.options.sloppy || mutation::on("hints_count_always") {
            Missed::Sloppy
        } else {
            Missed::Hinted
        };
        Spread::new(
            self.core,
            target,
            order.as_slice(),
            &self.operation.key,
            state,
            requirement.clone(),
            missed,
            self.operation.id,
            self.operation.options.deadline,
        )
    }

    /// Sends the state to all replicas and waits for enough of them. `ticket` is that of this
    /// shard's own copy, if it was just written.
    async fn settle(
        &self,
        mut spread: Spread<E>,
        ticket: Option<Ticket<E>>,
        version: &Context,
    ) -> Result<Written, Failure> {
        let own = ticket.is_some().then_some(self.me);
        if let Some(ticket) = ticket {
            spread.written(self.me, ticket);
        }
        spread.send_to_all_but(own);
        let settled = spread.settle().await;
        let written = spread.written_answer(version.clone());
        spread.finish();
        settled.map(|()| written)
    }

    /// The key's place in the topology that comes after `epoch`. This node need not be a replica there:
    /// the dot was minted while it was one, and whole states may come from anywhere.
    async fn moved(&self, epoch: u64) -> Option<(Target, Replicas, Requirement)> {
        let deadline = self.operation.options.deadline;
        if !self.core.outlives(epoch, deadline).await {
            return None;
        }
        let view = self.core.view().ok()?;
        let target = Target::in_tree(view, self.target.tree(), &self.operation.key).ok()?;
        let order = order(self.core, &target);
        let requirement = check(&target, self.operation, &order).ok()?;
        Some((target, order, requirement))
    }

    /// Refuses at once when too few nodes are up: nothing has been applied yet.
    fn admit(&self) -> Result<(), Failure> {
        let (mut up, mut taking) = (0u32, 0u32);
        let now = self.core.env.now();
        for (index, member) in self.order.as_slice().iter().enumerate() {
            if self.target.is_up(*member) {
                up |= 1 << index;
                if !self.core.peers.was_full(self.target.slot(*member), now) {
                    taking |= 1 << index;
                }
            }
        }
        // Deletes are taken by full disks too.
        let is_delete = self.operation.value.is_none();
        if self.requirement.is_met_by(taking) || (is_delete && self.requirement.is_met_by(up)) {
            return Ok(());
        }
        if self.requirement.is_met_by(up) {
            return Err(Failure::refused(
                FailureCode::DiskFull,
                "too many replicas have no space for values",
            ));
        }
        let n = self.order.as_slice().len();
        if self.operation.options.sloppy {
            let ring = &self.target.view.ring;
            let fallbacks = ring
                .fallbacks(self.target.token, n)
                .filter(|member| self.target.is_up(*member));
            let down: Vec<usize> = (0..n).filter(|index| up & (1 << index) == 0).collect();
            for (_, index) in fallbacks.zip(down) {
                up |= 1 << index;
            }
            if self.requirement.is_met_by(up) {
                return Ok(());
            }
        }
        Err(Failure::refused(
            FailureCode::QuorumNotMet,
            format_args!(
                "{} of {n} replicas are reachable, the write needs {}",
                up.count_ones(),
                self.requirement.need()
            ),
        ))
    }

    /// The state at a strict quorum, for writes that depend on it.
    async fn read_first(&self) -> Result<Option<State>, Failure> {
        let options = &self.operation.options;
        let depends = options.condition != Condition::None
            || options.read_context_first
            || options.idempotency.is_some();
        let is_alone = self.order.as_slice() == [self.me];
        if !depends || is_alone {
            // An only replica is its own quorum, and the mint reads its newest state.
            return Ok(None);
        }
        let first = Read {
            target: self.target,
            key: &self.operation.key,
            r: Level::Quorum,
            id: self.operation.id,
            deadline: options.deadline,
        };
        // Boxed: most writes do not read first.
        let state = Box::pin(read(self.core, &first)).await?;
        if state.is_empty() {
            return Ok(Some(State::default()));
        }
        State::decode(&state).map(Some).map_err(unreadable)
    }

    /// Decides against the newest state, in one step with the write.
    fn mint(&self, stored: Option<&Record>, known: Option<&State>) -> Decision<Minted> {
        match self.try_mint(stored, known) {
            Ok(decision) => decision,
            Err(failure) => Decision::Keep(Minted::Not(failure)),
        }
    }

    fn try_mint(
        &self,
        stored: Option<&Record>,
        known: Option<&State>,
    ) -> Result<Decision<Minted>, Failure> {
        let core = self.core;
        let withheld = |why| Failure::refused(FailureCode::NotReady, why);
        core.clock.check_open().map_err(withheld)?;
        let options = &self.operation.options;
        let keyspace = self.target.keyspace();
        let now_ms = core.now_ms();
        let base = match stored {
            Some(record) => State::from_record(record).map_err(unreadable)?,
            None => State::default(),
        };
        let mut state = match known {
            Some(known) => base
                .merge(known, keyspace.conflict)
                .map_err(|clash| Failure::refused(FailureCode::DotClash, clash))?,
            None => base.clone(),
        };
        if let Some(Idempotency { id, body_hash }) = options.idempotency {
            match state.answered(id, body_hash) {
                Answered::No => {}
                Answered::OtherBody => {
                    return Err(Failure::refused(
                        FailureCode::IdempotencyMismatch,
                        "the idempotency key was used for another write of this key",
                    ));
                }
                Answered::With(version) => return Ok(replay(&base, &state, version)),
            }
        }
        let context = self.context(&state, now_ms)?;
        let wall = core.env.wall();
        // A stamp of the key's own state is here already, whoever's clock ran ahead: a context that names
        // it is no reason to refuse the write.
        if context.newest_stamp() > state.newest_stamp() {
            core.clock
                .observe(wall, context.newest_stamp())
                .map_err(|skew| Failure::refused(FailureCode::ClockSkew, skew))?;
        }
        let above = state.newest_stamp().max(context.newest_stamp());
        if keyspace.conflict.orders_by_time() {
            core.clock
                .check(wall)
                .map_err(|skew| Failure::refused(FailureCode::ClockSkew, skew))?;
            core.clock.check_marked().map_err(withheld)?;
        }
        let dot = Dot {
            actor: core.actor.get(),
            counter: core.clock.mint(wall, above),
        };
        let version = state
            .put(Write {
                context: &context,
                dot,
                minter: Minter::Replica,
                value: self.operation.value.clone(),
                expires_at_ms: self.expires_at_ms(now_ms),
                keyed: options.idempotency.map(|request| Keyed {
                    request,
                    until_ms: now_ms.saturating_add(core.options.idempotency_window_ms),
                }),
                now_ms,
                conflict: keyspace.conflict,
                siblings_max: core.options.siblings_max,
            })
            .map_err(|error| Failure::refused(FailureCode::TooManySiblings, error))?;
        let record = state.to_record();
        let state = record.value.clone();
        Ok(Decision::Write(record, Minted::New { version, state }))
    }

    /// What the write has seen, if its condition holds.
    fn context(&self, state: &State, now_ms: u64) -> Result<Context, Failure> {
        let options = &self.operation.options;
        match &options.condition {
            Condition::Match(context) if state.matches(context, now_ms) => Ok(context.clone()),
            Condition::Match(_) => Err(Failure::refused(
                FailureCode::ConditionFailed,
                "If-Match: the key has changed, or has no value",
            )),
            Condition::Absent if state.has_live(now_ms) => Err(Failure::refused(
                FailureCode::ConditionFailed,
                "If-None-Match: the key has a value",
            )),
            Condition::Absent => Ok(state.context().clone()),
            Condition::None if options.read_context_first => Ok(state.context().clone()),
            Condition::None
                if mutation::on("put_ignores_context")
                    || mutation::on("lww_ignores_context")
                        && self.target.keyspace().conflict.orders_by_time() =>
            {
                Ok(Context::default())
            }
            Condition::None => Ok(options.context.clone().unwrap_or_default()),
        }
    }

    fn expires_at_ms(&self, now_ms: u64) -> u64 {
        if self.operation.value.is_none() {
            return 0;
        }
        let ttl_seconds = match self.operation.ttl_seconds {
            0 => self.target.keyspace().ttl_default_seconds,
            given => given,
        };
        match ttl_seconds {
            0 => 0,
            seconds => now_ms.saturating_add(seconds.saturating_mul(1_000)),
        }
    }
}

/// The first answer again. What this replica did not have of the state that says so is written, so
/// that the replay rests on as many replicas as the first answer.
fn replay(base: &State, state: &State, version: Context) -> Decision<Minted> {
    let record = state.to_record();
    let replay = Minted::Replay {
        version,
        state: record.value.clone(),
    };
    if base == state {
        Decision::Keep(replay)
    } else {
        Decision::Write(record, replay)
    }
}

/// To the shard of this node that owns the key.
async fn hand_over<E: Env>(
    core: &Rc<Core<E>>,
    target: &Target,
    operation: &WriteOperation,
) -> Result<Written, Failure> {
    core.count(Counter::MeshHops);
    let message = encode(core, target, operation, operation.is_forwarded);
    let address = core.own_shard(target.token.shard(core.env.shard_count()));
    remote(core, address, message, operation.options.deadline).await
}

/// To a replica of the key, which coordinates. Another one is tried only when the first has
/// certainly not handled it: two coordinators would mint two dots.
async fn forward<E: Env>(
    core: &Rc<Core<E>>,
    target: &Target,
    order: &Replicas,
    operation: &WriteOperation,
) -> Result<Written, Failure> {
    let message = encode(core, target, operation, true);
    let mut refusal = None;
    for member in order.as_slice() {
        if Some(*member) == target.view.me || !target.is_up(*member) {
            continue;
        }
        let Some(address) = target.address(*member) else {
            continue;
        };
        core.count(Counter::Forwards);
        let deadline = operation.options.deadline;
        match remote(core, address, message.clone(), deadline).await {
            Err(failure) if !failure.in_doubt && may_do_elsewhere(failure.code) => {
                refusal = Some(failure);
            }
            result => return result,
        }
    }
    Err(refusal.unwrap_or_else(|| {
        Failure::refused(
            FailureCode::QuorumNotMet,
            "no replica of the key is reachable",
        )
    }))
}

/// Whether a refusal may come from the state of the node rather than of the key: from its clock, which runs
/// ahead for seconds after a restart, its disk, what it can read, whom it reaches.
fn may_do_elsewhere(code: FailureCode) -> bool {
    match code {
        FailureCode::QuorumNotMet
        | FailureCode::TopologyChanging
        | FailureCode::Overloaded
        | FailureCode::NotReady
        | FailureCode::DiskFull
        | FailureCode::Unreadable
        | FailureCode::ClockSkew
        | FailureCode::Internal => true,
        FailureCode::InvalidRequest
        | FailureCode::BadToken
        | FailureCode::UnknownKeyspace
        | FailureCode::Unsupported
        | FailureCode::TooLarge
        | FailureCode::ConditionFailed
        | FailureCode::IdempotencyMismatch
        | FailureCode::TooManySiblings
        // Only who does not meet one of the two writes could do it, and might replace that one unseen.
        | FailureCode::DotClash
        | FailureCode::DeadlinePassed => false,
    }
}

async fn remote<E: Env>(
    core: &Rc<Core<E>>,
    address: Address,
    message: Bytes,
    deadline: Instant,
) -> Result<Written, Failure> {
    let answer = core
        .env
        .call(address, Class::Foreground, message, deadline)
        .await;
    let bytes = answer.map_err(|error| {
        let failure = call_failure(error);
        if failure.in_doubt && core.env.now() >= deadline {
            return deadline_passed("the replica that coordinates answered").in_doubt();
        }
        failure
    })?;
    let response = Response::access(&bytes)
        .map_err(|error| Failure::refused(FailureCode::Internal, error).in_doubt())?;
    match &response.answer {
        ArchivedAnswer::Written {
            context,
            replicas,
            hints,
        } => {
            let context = Context::from_bytes(context)
                .map_err(|error| Failure::refused(FailureCode::Internal, error).in_doubt())?;
            Ok(Written {
                context,
                replicas: *replicas,
                hints: *hints,
            })
        }
        other => Err(failure_of(other)),
    }
}

fn encode<E: Env>(
    core: &Core<E>,
    target: &Target,
    operation: &WriteOperation,
    is_forwarded: bool,
) -> Bytes {
    let options = &operation.options;
    let context = options.context.as_ref().map(Context::to_bytes);
    let if_match = match &options.condition {
        Condition::Match(context) => Some(context.to_bytes()),
        Condition::None | Condition::Absent => None,
    };
    let mut bits = 0;
    for (bit, is_set) in [
        (flags::SLOPPY, options.sloppy),
        (flags::READ_CONTEXT, options.read_context_first),
        (flags::IF_ABSENT, options.condition == Condition::Absent),
        (flags::FORWARDED, is_forwarded),
    ] {
        if is_set {
            bits |= bit;
        }
    }
    core.encode(
        target,
        operation.id,
        options.deadline,
        Body::Write {
            tree: target.tree().0,
            key: &operation.key,
            value: operation.value.as_deref(),
            ttl_seconds: match mutation::on("expiry_lost_on_the_way") {
                true => 0,
                false => operation.ttl_seconds,
            },
            context: context.as_deref(),
            if_match: if_match.as_deref(),
            flags: bits,
            w: level_to_wire(options.w),
            idempotency: options
                .idempotency
                .map(|idempotency| (idempotency.id, idempotency.body_hash)),
        },
    )
}
