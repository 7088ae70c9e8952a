//! Reads a key: asks R replicas, merges what they have, and repairs before it answers.
//!
//! On the path: [`Node::get`](crate::node::Node::get) → here → [`replica`] on this shard and on
//! others → the merged state → answer.
//!
//! Invariants: two reads at a strict quorum never go back in time: when the replicas that were asked
//! differ, R of them hold the merged state durably before it is shown. A replica that cannot read
//! the key counts as silent, never as "absent".
//!
//! It runs on any node: only writes need a replica to coordinate them.

use std::pin::pin;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::{Either, FutureExt as _, LocalBoxFuture, select};
use futures_util::stream::FuturesUnordered;
use torc_env::{CallError, Class, Env, Instant, mutation};

use crate::api::{Failure, FailureCode, GetAnswer, Level, Sibling};
use crate::coordinator::refusal::Refusal;
use crate::coordinator::spread::{Missed, Spread, call_failure};
use crate::core::{Core, deadline_passed};
use crate::membership::Health;
use crate::message::{ArchivedAnswer, Body, Response, failure_of, slice_of};
use crate::metrics::Counter;
use crate::quorum::{Requirement, Tracker, Verdict};
use crate::replica;
use crate::ring::MemberIndex;
use crate::target::{Replicas, Target};
use crate::version::{Context, State, StateRef};

/// One read.
pub(crate) struct Read<'a> {
    pub(crate) target: &'a Target,
    pub(crate) key: &'a Bytes,
    pub(crate) r: Level,
    pub(crate) id: u64,
    pub(crate) deadline: Instant,
}

/// The merged, encoded state of a key; empty when it was never written.
pub(crate) async fn read<E: Env>(core: &Rc<Core<E>>, read: &Read<'_>) -> Result<Bytes, Failure> {
    let local = read
        .target
        .me()
        .filter(|_| core.owns(read.target) && core.check_has(read.target).is_ok());
    if local.is_some() && matches!(read.r, Level::One | Level::Count(1)) {
        let tree = read.target.tree();
        let here = replica::read(core, tree, read.target.token, read.key);
        match core.until(read.deadline, pin!(here)).await {
            Some(Ok(state)) if core.check_has(read.target).is_ok() => return Ok(state),
            Some(_) => {} // Unknown here; perhaps another replica knows.
            None => return Err(deadline_passed("this node's store answered")),
        }
    }
    // Boxed, so that the future of a local read stays small: it is moved several times.
    read_quorum(core, read).boxed_local().await
}

async fn read_quorum<E: Env>(core: &Rc<Core<E>>, read: &Read<'_>) -> Result<Bytes, Failure> {
    let order = order(core, read.target);
    let requirement = read.target.requirement(read.r, order.as_slice())?;
    let round = Round {
        core,
        read,
        order,
        tracker: Tracker::new(order.as_slice().iter().copied(), requirement.clone(), false),
        answers: Vec::with_capacity(order.as_slice().len()),
        events: FuturesUnordered::new(),
        local: None,
        message: Bytes::new(),
        refusal: Refusal::default(),
    };
    round.run(requirement).await
}

/// As [`read`], and covers what the caller's session has seen: escalates to a strict quorum when the
/// replicas that were asked do not.
pub(crate) async fn read_at_least<E: Env>(
    core: &Rc<Core<E>>,
    plain: &Read<'_>,
    at_least: &Context,
) -> Result<Bytes, Failure> {
    let covers = |state: &Bytes| -> Result<bool, Failure> {
        if at_least.is_empty() {
            return Ok(true);
        }
        if state.is_empty() {
            return Ok(false);
        }
        let state = StateRef::parse(state).map_err(unreadable)?;
        Ok(state.context().includes(at_least))
    };
    let state = read(core, plain).await?;
    if covers(&state)? {
        return Ok(state);
    }
    let strict = Read {
        r: Level::Quorum,
        ..*plain
    };
    let state = read(core, &strict).await?;
    if covers(&state)? {
        return Ok(state);
    }
    Err(Failure::refused(
        FailureCode::QuorumNotMet,
        "the replicas that answer have not seen what this session has seen",
    ))
}

/// The answer that a reader gets of an encoded state. Values share its buffer.
pub(crate) fn answer(state: &Bytes, now_ms: u64) -> Result<GetAnswer, Failure> {
    if state.is_empty() {
        return Ok(GetAnswer {
            siblings: Vec::new(),
            context: Context::default(),
        });
    }
    let parsed = StateRef::parse(state).map_err(unreadable)?;
    let siblings = parsed
        .live(now_ms)
        .filter_map(|sibling| {
            sibling.value.map(|value| Sibling {
                value: slice_of(state, value),
                expires_at_ms: sibling.expires_at_ms,
            })
        })
        .collect();
    Ok(GetAnswer {
        siblings,
        context: parsed.context(),
    })
}

pub(crate) fn unreadable(error: impl std::fmt::Display) -> Failure {
    Failure::refused(FailureCode::Unreadable, error)
}

/// The replicas in the order in which they are asked: this shard, then those that are up, the
/// quickest first, and at last those that are not asked.
pub(crate) fn order<E: Env>(core: &Core<E>, target: &Target) -> Replicas {
    let mut order = target.replicas;
    let me = target.me();
    order.as_mut_slice().sort_by_cached_key(|member| {
        if Some(*member) == me && core.lacking.has(target.tree(), target.token) {
            return (0, 0);
        }
        let liveness = match target.view.health(*member) {
            _ if !target.is_up(*member) => 3,
            Health::Down => 3,
            Health::Suspect => 2,
            Health::Up => 1,
        };
        (liveness, core.peers.rank(target.slot(*member)))
    });
    order
}

enum Event {
    Local(Result<Bytes, Failure>),
    Remote(MemberIndex, Instant, Result<Bytes, CallError>),
}

/// The state of one read while it waits.
struct Round<'a, E: Env> {
    core: &'a Rc<Core<E>>,
    read: &'a Read<'a>,
    order: Replicas,
    tracker: Tracker<MemberIndex>,
    answers: Vec<(MemberIndex, Bytes)>,
    events: FuturesUnordered<LocalBoxFuture<'static, Event>>,
    /// This shard's own state, once known: others need only say that theirs is the same.
    local: Option<Bytes>,
    /// The request to the others, encoded at the first one.
    message: Bytes,
    refusal: Refusal,
}

impl<E: Env> Round<'_, E> {
    async fn run(mut self, requirement: Requirement) -> Result<Bytes, Failure> {
        self.skip_the_dead();
        while let Some(member) = self.tracker.next_idle() {
            self.ask(member);
        }
        let core = Rc::clone(self.core);
        let waited = core.until(self.read.deadline, pin!(self.wait())).await;
        match waited.unwrap_or_else(|| self.tracker.verdict_at_deadline()) {
            Verdict::Done => self.conclude(requirement).await,
            Verdict::Waiting | Verdict::Unmet { .. } => Err(match waited {
                None => deadline_passed("enough replicas answered"),
                Some(_) => self.unmet(),
            }),
        }
    }

    fn skip_the_dead(&mut self) {
        for member in self.order.as_slice() {
            if !self.read.target.is_up(*member) {
                self.tracker.refused(*member);
            }
        }
    }

    fn ask(&mut self, member: MemberIndex) {
        let target = self.read.target;
        self.tracker.sent(member);
        if target.me() == Some(member) && self.core.owns(target) {
            match self.core.check_has(target) {
                Ok(()) => self.ask_here(member),
                Err(failure) => self.failed(member, failure),
            }
            return;
        }
        let Some(address) = target.address(member) else {
            self.tracker.refused(member);
            return;
        };
        if self.message.is_empty() {
            let known = self
                .local
                .as_ref()
                .and_then(|state| StateRef::parse(state).ok().map(|parsed| parsed.digest()));
            self.message = self.core.encode(
                target,
                self.read.id,
                self.read.deadline,
                Body::Read {
                    tree: target.tree().0,
                    key: self.read.key,
                    known,
                    is_repair: false,
                },
            );
        }
        self.core.hedge.earn();
        let since = self.core.env.now();
        let call = self.core.env.call(
            address,
            Class::Replication,
            self.message.clone(),
            self.read.deadline,
        );
        self.events.push(
            call.map(move |answer| Event::Remote(member, since, answer))
                .boxed_local(),
        );
    }

    fn ask_here(&mut self, member: MemberIndex) {
        let core = Rc::clone(self.core);
        let (tree, token) = (self.read.target.tree(), self.read.target.token);
        let key = self.read.key.clone();
        let mut work = async move { replica::read(&core, tree, token, &key).await }.boxed_local();
        // What memory holds is there at once, and then the others need not send theirs.
        match (&mut work).now_or_never() {
            Some(Ok(state)) => {
                self.local = Some(state.clone());
                self.answers.push((member, state));
                self.tracker.acked(member);
            }
            Some(Err(failure)) => self.failed(member, failure),
            None => self.events.push(work.map(Event::Local).boxed_local()),
        }
    }

    /// Waits until enough have answered; asks one more when an answer is late or missing.
    async fn wait(&mut self) -> Verdict {
        let mut patience = self.core.hedge.delay();
        let mut is_hedged = false;
        let mut timer = self.core.env.sleep(patience).boxed_local();
        loop {
            match self.tracker.verdict() {
                Verdict::Waiting => {}
                settled => return settled,
            }
            match select(self.events.next(), timer).await {
                Either::Left((None, _)) => return self.tracker.verdict_at_deadline(),
                Either::Left((Some(event), running)) => {
                    timer = running;
                    self.note(event);
                    while let Some(member) = self.tracker.next_idle() {
                        self.ask(member);
                    }
                }
                Either::Right(_) => {
                    // The first time it is a hedge and has a budget; a replica that is much later
                    // than that is as good as gone.
                    if let Some(member) = self.tracker.next_spare()
                        && (is_hedged || self.core.hedge.spend())
                    {
                        self.core.count(Counter::Hedges);
                        self.ask(member);
                    }
                    is_hedged = true;
                    patience = self.core.hedge.give_up();
                    self.note_the_silent(patience);
                    timer = self.core.env.sleep(patience).boxed_local();
                }
            }
        }
    }

    /// Lets peers that keep a reader waiting sink in the order.
    fn note_the_silent(&self, waited: std::time::Duration) {
        for member in self.order.as_slice() {
            if self.tracker.is_pending(*member) {
                self.core.peers.note(self.read.target.slot(*member), waited);
            }
        }
    }

    fn note(&mut self, event: Event) {
        match event {
            Event::Local(result) => {
                let Some(me) = self.read.target.me() else {
                    return;
                };
                match result {
                    Ok(state) => {
                        self.answers.push((me, state));
                        self.tracker.acked(me);
                    }
                    Err(failure) => self.failed(me, failure),
                }
            }
            Event::Remote(member, since, answer) => {
                let took = self.core.env.now() - since;
                match self.state_of(answer) {
                    Ok(state) => {
                        self.core.hedge.answered(took);
                        self.core.peers.note(self.read.target.slot(member), took);
                        self.answers.push((member, state));
                        self.tracker.acked(member);
                    }
                    Err(failure) => self.failed(member, failure),
                }
            }
        }
    }

    fn state_of(&self, answer: Result<Bytes, CallError>) -> Result<Bytes, Failure> {
        let bytes = answer.map_err(call_failure)?;
        let response = Response::access(&bytes).map_err(unreadable)?;
        match (&response.answer, &self.local) {
            (ArchivedAnswer::State { state }, _) => Ok(slice_of(&bytes, state)),
            (ArchivedAnswer::Same, Some(local)) => Ok(local.clone()),
            (other, _) => Err(failure_of(other)),
        }
    }

    fn failed(&mut self, member: MemberIndex, failure: Failure) {
        self.tracker.refused(member);
        self.refusal.note(failure);
    }

    fn unmet(&self) -> Failure {
        let answered = self.answers.len();
        self.refusal
            .unmet(format_args!("{answered} replicas answered"))
    }

    /// Merges the answers and brings those who gave them up to date.
    async fn conclude(self, requirement: Requirement) -> Result<Bytes, Failure> {
        let first = &self.answers[0].1;
        if self.answers.iter().all(|(_, state)| state == first) {
            return Ok(first.clone());
        }
        let merged = self.merged()?;
        if mutation::on("read_without_repair") {
            return Ok(merged);
        }
        self.core.count(Counter::ReadRepairs);
        let mut spread = Spread::new(
            self.core,
            self.read.target,
            self.order.as_slice(),
            self.read.key,
            merged.clone(),
            requirement,
            Missed::Ignored,
            self.read.id,
            self.read.deadline,
        );
        for (member, state) in &self.answers {
            if *state == merged {
                spread.holds(*member);
            } else {
                spread.send(*member);
            }
        }
        let asked = |member: &MemberIndex| self.answers.iter().any(|(other, _)| other == member);
        let others = self.order.as_slice().iter().filter(|member| !asked(member));
        for member in others {
            if self.read.target.is_up(*member) {
                spread.send(*member);
            }
        }
        let settled = spread.settle().await;
        spread.finish();
        // A read applies nothing of its own: what the repair has left behind is no doubt of it.
        settled.map_err(|failure| Failure {
            in_doubt: false,
            ..failure
        })?;
        Ok(merged)
    }

    fn merged(&self) -> Result<Bytes, Failure> {
        let conflict = self.read.target.keyspace().conflict;
        let mut merged = State::default();
        for (_, bytes) in &self.answers {
            if !bytes.is_empty() {
                let state = State::decode(bytes).map_err(unreadable)?;
                merged = merged.merge(&state, conflict).map_err(|clash| {
                    tracing::error!(%clash, "replicas disagree about one write");
                    Failure::refused(FailureCode::DotClash, clash)
                })?;
            }
        }
        Ok(merged.encode())
    }
}
