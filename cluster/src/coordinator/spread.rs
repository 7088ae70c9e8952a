//! Spreads one state over the replicas of its key and says when enough of them hold it.
//!
//! On the path: a put has minted and spreads the new state; a read has found its replicas to
//! differ and spreads the merged state before it answers. The state is encoded once, when
//! the first replica is to get it, in one message whose bytes all replicas share.
//!
//! Invariants: a replica that is down is not waited for; a node that may have got the state counts
//! as doubt until it is known; what a replica missed becomes a hint.
//!
//! It never changes the state, and forwards nothing.

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::{FutureExt as _, LocalBoxFuture};
use futures_util::stream::FuturesUnordered;
use torc_engine::{Ticket, WriteError};
use torc_env::{CallError, Class, Env, Instant, mutation};

use crate::api::{Failure, FailureCode, Written};
use crate::coordinator::refusal::Refusal;
use crate::core::{Core, deadline_passed};
use crate::hint;
use crate::message::{ArchivedAnswer, Body, Response, failure_of};
use crate::quorum::{Requirement, Tracker, Verdict};
use crate::replica;
use crate::ring::MemberIndex;
use crate::target::Target;
use crate::version::Context;

/// What happened at one node.
enum Event {
    /// This shard's own copy is durable, or is not.
    Local(Result<(), WriteError>),
    /// A replica answered.
    Replica(MemberIndex, Result<Bytes, CallError>),
    /// A node answered that was asked to keep a hint.
    Holder {
        holder: MemberIndex,
        target: MemberIndex,
        answer: Result<Bytes, CallError>,
    },
}

/// What becomes of replicas that miss the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missed {
    /// They get a hint on this node, which does not count.
    Hinted,
    /// They get a hint on the next node that is no replica, which counts; else as `Hinted`.
    Sloppy,
    /// Nothing: a read repairs, it does not promise.
    Ignored,
}

/// One state on its way.
pub(crate) struct Spread<E: Env> {
    core: Rc<Core<E>>,
    target: Target,
    key: Bytes,
    state: Bytes,
    /// The state as a message; `None` until a replica is to get it.
    message: Option<Bytes>,
    class: Class,
    id: u64,
    deadline: Instant,
    missed: Missed,
    tracker: Tracker<MemberIndex>,
    events: FuturesUnordered<LocalBoxFuture<'static, Event>>,
    /// Nodes that could take a hint and were not asked yet, best first; `None` until needed.
    fallbacks: Option<std::vec::IntoIter<MemberIndex>>,
    refusal: Refusal,
}

impl<E: Env> Spread<E> {
    /// Of the encoded `state` over `order`, the replicas of the target in the order in which
    /// `requirement` counts them.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is said once, by name, at two places"
    )]
    pub(crate) fn new(
        core: &Rc<Core<E>>,
        target: &Target,
        order: &[MemberIndex],
        key: &Bytes,
        state: Bytes,
        requirement: Requirement,
        missed: Missed,
        id: u64,
        deadline: Instant,
    ) -> Self {
        Self {
            core: Rc::clone(core),
            target: target.clone(),
            key: key.clone(),
            state,
            message: None,
            class: Class::Replication,
            id,
            deadline,
            missed,
            tracker: Tracker::new(order.iter().copied(), requirement, missed == Missed::Sloppy),
            events: FuturesUnordered::new(),
            fallbacks: None,
            refusal: Refusal::default(),
        }
    }

    /// A replica is known to hold the state.
    pub(crate) fn holds(&mut self, member: MemberIndex) {
        self.tracker.acked(member);
    }

    /// This shard has written the state; `ticket` says when it is durable.
    pub(crate) fn written(&mut self, member: MemberIndex, ticket: Ticket<E>) {
        self.tracker.sent(member);
        self.events
            .push(async move { Event::Local(ticket.wait().await) }.boxed_local());
    }

    /// Sends the state to every replica but `own`.
    pub(crate) fn send_to_all_but(&mut self, own: Option<MemberIndex>) {
        let replicas = self.target.replicas;
        for member in replicas.as_slice() {
            if Some(*member) != own {
                self.send(*member);
            }
        }
    }

    /// Sends the state to one replica (writes it, when that is this node).
    pub(crate) fn send(&mut self, member: MemberIndex) {
        if Some(member) == self.target.view.me {
            self.write_here(member);
            return;
        }
        let address = self.target.address(member);
        match address.filter(|_| self.target.is_up(member)) {
            Some(address) => {
                self.tracker.sent(member);
                let message = self.message();
                let call = self
                    .core
                    .env
                    .call(address, self.class, message, self.deadline);
                self.events.push(
                    call.map(move |answer| Event::Replica(member, answer))
                        .boxed_local(),
                );
            }
            None => {
                self.tracker.refused(member);
                self.hint_elsewhere(member);
            }
        }
    }

    fn message(&mut self) -> Bytes {
        let message = self.message.get_or_insert_with(|| {
            let merge = Body::Merge {
                tree: self.target.tree().0,
                key: &self.key,
                state: &self.state,
            };
            self.core
                .encode(&self.target, self.id, self.deadline, merge)
        });
        message.clone()
    }

    fn write_here(&mut self, member: MemberIndex) {
        self.tracker.sent(member);
        let core = Rc::clone(&self.core);
        let (tree, token) = (self.target.tree(), self.target.token);
        let conflict = self.target.keyspace().conflict;
        let (key, state) = (self.key.clone(), self.state.clone());
        let write = async move {
            let written = replica::merge(&core, tree, token, &key, &state, conflict).await;
            match written {
                Ok(ticket) => Event::Local(ticket.wait().await),
                Err(failure) => Event::Local(Err(WriteError::Poisoned {
                    cause: failure.message.into(),
                    in_doubt: failure.in_doubt,
                })),
            }
        };
        self.events.push(write.boxed_local());
    }

    /// Waits until enough replicas hold the state, or cannot any more, or the deadline passes.
    ///
    /// # Errors
    /// In doubt exactly when some node may have, or may yet get, the state.
    pub(crate) async fn settle(&mut self) -> Result<(), Failure> {
        let (core, deadline) = (Rc::clone(&self.core), self.deadline);
        let mut verdict = None;
        if self.missed == Missed::Sloppy {
            // A replica that keeps the writer waiting is as good as down.
            let patience = core.env.now() + core.hedge.give_up();
            verdict = core
                .until(patience.min(deadline), pin!(self.collect()))
                .await;
            if verdict.is_none() {
                let replicas = self.target.replicas;
                for member in replicas.as_slice().iter().copied() {
                    if self.tracker.is_pending(member) && Some(member) != self.target.view.me {
                        self.hint_elsewhere(member);
                    }
                }
            }
        }
        if verdict.is_none() {
            verdict = core.until(deadline, pin!(self.collect())).await;
        }
        let is_late = verdict.is_none();
        match verdict.unwrap_or_else(|| self.tracker.verdict_at_deadline()) {
            Verdict::Done => Ok(()),
            Verdict::Waiting => unreachable!("neither an end nor a deadline leaves it waiting"),
            Verdict::Unmet { in_doubt } => {
                if is_late && mutation::on("timeout_reported_as_success") {
                    return Ok(());
                }
                let in_doubt = in_doubt && !mutation::on("late_is_refused");
                let failure = if is_late {
                    deadline_passed("enough replicas acknowledged")
                } else {
                    self.unmet()
                };
                Err(marked(failure, in_doubt))
            }
        }
    }

    /// Takes in what comes until it can be told.
    async fn collect(&mut self) -> Verdict {
        loop {
            match self.tracker.verdict() {
                Verdict::Waiting => {}
                settled => return settled,
            }
            match self.events.next().await {
                Some(event) => self.note(event),
                None => return self.tracker.verdict_at_deadline(),
            }
        }
    }

    /// The answer of a write of `version` that is done.
    pub(crate) fn written_answer(&self, version: Context) -> Written {
        Written {
            context: version,
            replicas: self.tracker.replicas(),
            hints: self.tracker.hints(),
        }
    }

    /// Lets what is still on its way come to its end, and keeps hints for those that miss it.
    pub(crate) fn finish(mut self) {
        let has_missed = self.tracker.missed().next().is_some();
        if self.events.is_empty() && !(has_missed && self.missed != Missed::Ignored) {
            return;
        }
        let core = Rc::clone(&self.core);
        let place = Finishing::enter(&core.finishing);
        core.spawn(Class::Replication, async move {
            // Beyond the bound nothing is waited for: who has not answered by now gets a hint.
            if place.is_some() {
                while let Some(event) = self.events.next().await {
                    self.note(event);
                }
            } else {
                self.events.clear();
            }
            if self.missed == Missed::Ignored || !self.tracker.may_be_applied() {
                return;
            }
            for member in self.tracker.missed() {
                let slot = self.target.slot(member);
                let hint = hint::Hint {
                    target: slot,
                    tree: self.target.tree(),
                    key: &self.key,
                    state: &self.state,
                    epoch: self.target.view.topology.epoch,
                };
                hint::store_uncounted(&self.core, hint).await;
            }
        });
    }

    fn note(&mut self, event: Event) {
        match event {
            Event::Local(result) => {
                let Some(me) = self.target.view.me else {
                    return;
                };
                let durable = result.map_err(|error| replica::write_failure(&error));
                match durable.and_then(|()| self.core.check_current(&self.target)) {
                    Ok(()) => self.tracker.acked(me),
                    Err(failure) => self.failed(me, failure),
                }
            }
            Event::Replica(member, answer) => match ack_of(&answer) {
                Ok(()) => self.tracker.acked(member),
                Err(failure) => {
                    self.failed(member, failure);
                    self.hint_elsewhere(member);
                }
            },
            Event::Holder {
                holder,
                target,
                answer,
            } => match ack_of(&answer) {
                Ok(()) => self.tracker.hint_acked(holder, target),
                Err(failure) => {
                    self.tracker.hint_failed(holder, target, failure.in_doubt);
                    self.hint_elsewhere(target);
                }
            },
        }
    }

    fn failed(&mut self, member: MemberIndex, failure: Failure) {
        if failure.code == FailureCode::DiskFull {
            let now = self.core.env.now();
            self.core.peers.is_full(self.target.slot(member), now);
        }
        if failure.in_doubt {
            self.tracker.lost(member);
        } else {
            self.tracker.refused(member);
        }
        self.refusal.note(failure);
    }

    /// Under `sloppy`: asks the next node that is no replica to keep the state for `member`.
    fn hint_elsewhere(&mut self, member: MemberIndex) {
        if self.missed != Missed::Sloppy {
            return;
        }
        let target = &self.target;
        let fallbacks = self.fallbacks.get_or_insert_with(|| {
            let n = target.replicas.as_slice().len();
            let up: Vec<MemberIndex> = target
                .view
                .ring
                .fallbacks(target.token, n)
                .filter(|member| target.is_up(*member))
                .collect();
            up.into_iter()
        });
        for holder in fallbacks.by_ref() {
            let Some(address) = target.address(holder) else {
                continue;
            };
            if !self.tracker.hint_sent(holder, member) {
                continue;
            }
            let message = self.core.encode(
                target,
                self.id,
                self.deadline,
                Body::Hint {
                    tree: target.tree().0,
                    key: &self.key,
                    state: &self.state,
                    target: target.slot(member).0,
                },
            );
            let call = self
                .core
                .env
                .call(address, self.class, message, self.deadline);
            let event = call.map(move |answer| Event::Holder {
                holder,
                target: member,
                answer,
            });
            self.events.push(event.boxed_local());
            return;
        }
    }

    fn unmet(&self) -> Failure {
        let reached = self.tracker.replicas();
        self.refusal
            .unmet(format_args!("{reached} replicas acknowledged"))
    }
}

/// Writes that are answered and still wait for a replica. One lives up to its deadline when a peer
/// hangs, and takes about a kilobyte.
const FINISHING_MAX: u32 = 16_384;

/// A place among them; given back when dropped.
struct Finishing(Rc<Cell<u32>>);

impl Finishing {
    fn enter(count: &Rc<Cell<u32>>) -> Option<Self> {
        (count.get() < FINISHING_MAX).then(|| {
            count.set(count.get() + 1);
            Self(Rc::clone(count))
        })
    }
}

impl Drop for Finishing {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
}

fn marked(failure: Failure, in_doubt: bool) -> Failure {
    if in_doubt {
        failure.in_doubt()
    } else {
        failure
    }
}

/// What an answer to a merge or a hint says.
fn ack_of(answer: &Result<Bytes, CallError>) -> Result<(), Failure> {
    let bytes = answer.as_ref().map_err(|error| call_failure(*error))?;
    match Response::access(bytes) {
        Ok(response) => match &response.answer {
            ArchivedAnswer::Acked => Ok(()),
            other => Err(failure_of(other)),
        },
        // It was handled by somebody; how, nobody can tell.
        Err(error) => Err(Failure::refused(FailureCode::Internal, error).in_doubt()),
    }
}

/// What a call without answer means.
pub(crate) fn call_failure(error: CallError) -> Failure {
    let code = match error {
        CallError::Overloaded => FailureCode::Overloaded,
        CallError::Unreachable | CallError::WrongNode | CallError::Lost => {
            FailureCode::QuorumNotMet
        }
    };
    marked(Failure::refused(code, error), error.in_doubt())
}
