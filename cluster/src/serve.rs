//! Answers what other shards and nodes ask.
//!
//! On the path: [`Node::serve`](crate::node::Node::serve) → here → [`replica`], [`hint`] or, for a client's
//! request that came to the wrong shard, the coordinators.
//!
//! Invariants: what belongs to another range epoch, or cannot be finished in time, is refused before
//! anything is done; a message that is not valid never panics.

use std::pin::pin;
use std::rc::Rc;

use bytes::Bytes;
use rkyv::option::ArchivedOption;
use torc_engine::ScanFrom;
use torc_env::{Class, Env, Instant, TokenRange, TreeId};

use crate::anti_entropy::{self, local, loss};
use crate::api::{Condition, Failure, FailureCode, Idempotency, WriteOptions};
use crate::coordinator::get::{Read, read, read_at_least};
use crate::coordinator::put::{WriteOperation, write};
use crate::coordinator::scan;
use crate::core::{Core, deadline_passed};
use crate::hint;
use crate::message::{
    Answer, ArchivedBody, ArchivedRequest, HashEntry, Request, Response, flags, level_from_wire,
    range_of, slice_of,
};
use crate::metrics::Counter;
use crate::replica;
use crate::run::Run;
use crate::target::{Target, keyspace_index};
use crate::topology::SlotId;
use crate::version::{Context, StateRef};

/// The answer to a request's bytes.
pub(crate) async fn serve<E: Env>(core: Rc<Core<E>>, bytes: Bytes) -> Bytes {
    let request = match Request::access(&bytes) {
        Ok(request) => request,
        Err(error) => {
            core.count(Counter::BadMessages);
            let failure = Failure::refused(FailureCode::InvalidRequest, error);
            return respond(&core, Answer::from(&failure));
        }
    };
    match dispatch(&core, &bytes, request).await {
        Ok(response) => response,
        Err(failure) => {
            match failure.code {
                FailureCode::Overloaded => core.count(Counter::Overloads),
                FailureCode::DeadlinePassed => core.count(Counter::LateRequests),
                _ => {}
            }
            respond(&core, Answer::from(&failure))
        }
    }
}

fn respond<E: Env>(core: &Core<E>, answer: Answer<'_>) -> Bytes {
    Response {
        epoch: core.epoch(),
        answer,
    }
    .encode()
}

async fn dispatch<E: Env>(
    core: &Rc<Core<E>>,
    bytes: &Bytes,
    request: &ArchivedRequest<'_>,
) -> Result<Bytes, Failure> {
    let class = match &request.body {
        ArchivedBody::Get { .. } | ArchivedBody::Write { .. } => Class::Foreground,
        ArchivedBody::Read { .. }
        | ArchivedBody::Merge { .. }
        | ArchivedBody::Hint { .. }
        | ArchivedBody::Scan { .. } => Class::Replication,
        ArchivedBody::Sums { .. } | ArchivedBody::Hashes { .. } => Class::Repair,
        ArchivedBody::OldestHint | ArchivedBody::Repair | ArchivedBody::Lacks { .. } => {
            Class::Control
        }
    };
    let _permit = core.admission.enter(class)?;
    let remaining_ms = request.remaining_ms.to_native();
    if remaining_ms == 0 {
        return Err(deadline_passed("the request arrived"));
    }
    let deadline = core.deadline(remaining_ms);
    match &request.body {
        ArchivedBody::Read {
            tree,
            key,
            known,
            is_repair,
        } => {
            let target = if *is_repair {
                agreed_target(core, request, tree.to_native(), key)?
            } else {
                own_target(core, request, tree.to_native(), key)?
            };
            let Some(target) = target else {
                return Ok(other_owners(core));
            };
            if !is_repair {
                core.check_has(&target)?;
            }
            core.count(Counter::ReplicaReads);
            let known = known.as_ref().map(|digest| digest.to_native());
            let answer = read_here(core, &target, key, known, deadline).await?;
            if !is_repair {
                // Damage may have been cut out meanwhile.
                core.check_has(&target)?;
            }
            Ok(answer)
        }
        ArchivedBody::Merge { tree, key, state } => {
            let Some(target) = own_target(core, request, tree.to_native(), key)? else {
                return Ok(other_owners(core));
            };
            core.count(Counter::ReplicaMerges);
            let state = slice_of(bytes, state);
            let conflict = target.keyspace().conflict;
            let merge =
                replica::merge_durably(core, target.tree(), target.token, key, &state, conflict);
            match core.until(deadline, pin!(merge)).await {
                Some(Ok(())) => {
                    core.check_current(&target)?;
                    Ok(respond(core, Answer::Acked))
                }
                Some(Err(failure)) => Err(failure),
                None => Err(deadline_passed("the state was durable").in_doubt()),
            }
        }
        ArchivedBody::Hint {
            tree,
            key,
            state,
            target: slot,
        } => {
            let tree = TreeId(tree.to_native());
            let place = Target::in_tree(core.view()?, tree, key)?;
            if place.owners() != request.owners.to_native() || place.me().is_some() {
                return Ok(other_owners(core));
            }
            check_shard(core, &place)?;
            let state = slice_of(bytes, state);
            let kept = hint::store_counted(
                core,
                hint::Hint {
                    target: SlotId(slot.to_native()),
                    tree,
                    key,
                    state: &state,
                    epoch: place.view.topology.epoch,
                },
            );
            match core.until(deadline, pin!(kept)).await {
                Some(Ok(())) => Ok(respond(core, Answer::Acked)),
                Some(Err(failure)) => Err(failure),
                None => Err(deadline_passed("the hint was durable").in_doubt()),
            }
        }
        ArchivedBody::Get {
            tree,
            key,
            r,
            at_least,
        } => {
            let key = slice_of(bytes, key);
            let target = Target::in_tree(core.view()?, TreeId(tree.to_native()), &key)?;
            let plain = Read {
                target: &target,
                key: &key,
                r: level(r.to_native())?,
                id: request.id.to_native(),
                deadline,
            };
            let state = match context(at_least)? {
                Some(at_least) => read_at_least(core, &plain, &at_least).await?,
                None => read(core, &plain).await?,
            };
            Ok(respond(core, Answer::State { state: &state }))
        }
        ArchivedBody::Write { .. } => serve_write(core, bytes, request, deadline).await,
        ArchivedBody::Scan { .. } => {
            let serving = scan::serve(core, request);
            match core.until(deadline, pin!(serving)).await {
                Some(Ok(Some(page))) => Ok(respond(core, page.answer())),
                Some(Ok(None)) => Ok(other_owners(core)),
                Some(Err(failure)) => Err(failure),
                None => Err(deadline_passed("the page was read")),
            }
        }
        ArchivedBody::Sums {
            tree,
            first,
            last,
            floor_hour,
            leaves,
        } => {
            let range = range_of(first, last);
            let tree = TreeId(tree.to_native());
            if leaves.len() > local::INTERVALS_MAX || !has_run(core, request, tree, range)? {
                return Ok(other_owners(core));
            }
            let own_floor = core.repairs.floor_hour(tree, range);
            let agreed = own_floor.min(floor_hour.to_native());
            let intervals: Vec<(u32, u32)> = leaves
                .iter()
                .map(|leaves| (leaves.0.to_native(), leaves.1.to_native()))
                .collect();
            let sums = local::sums(core, tree, range, agreed, &intervals).await?;
            // Where both lack the same, sums agree: that this shard cannot read what it has must be said.
            let is_whole =
                !core.lacking.is_catching_up() && loss::lacks(core, tree, range).is_empty();
            Ok(respond(
                core,
                Answer::Sums {
                    floor_hour: own_floor,
                    sums,
                    is_whole,
                },
            ))
        }
        ArchivedBody::Hashes {
            tree,
            first,
            after,
            last,
            floor_hour,
            records,
        } => {
            let range = range_of(first, last);
            let tree = TreeId(tree.to_native());
            if !has_run(core, request, tree, range)? {
                return Ok(other_owners(core));
            }
            let from = match after.as_ref() {
                None => ScanFrom::Token(range.first),
                Some(key) => ScanFrom::After(range.first, slice_of(bytes, key)),
            };
            let (floor_hour, records) = (floor_hour.to_native(), records.to_native());
            let page = local::hashes(core, tree, from, range.last, floor_hour, records).await?;
            let entries = page
                .entries
                .iter()
                .map(|(key, hash)| HashEntry { key, hash: *hash })
                .collect();
            let looked = page
                .looked
                .as_ref()
                .map(|(token, key)| (token.0, key.to_vec()));
            Ok(respond(core, Answer::Hashes { entries, looked }))
        }
        ArchivedBody::Lacks { tree, first, last } => {
            let range = range_of(first, last);
            let tree = TreeId(tree.to_native());
            if !has_run(core, request, tree, range)? {
                return Ok(other_owners(core));
            }
            let ranges = loss::lacks(core, tree, range);
            let is_catching_up = core.lacking.is_catching_up();
            Ok(respond(
                core,
                Answer::Lacks {
                    ranges,
                    is_catching_up,
                },
            ))
        }
        ArchivedBody::OldestHint => {
            let told = core.tell();
            let answer = Answer::OldestHint {
                oldest_ms: told.oldest_ms,
                now_ms: told.now_ms,
                promised: told.promised,
            };
            Ok(respond(core, answer))
        }
        ArchivedBody::Repair => {
            let report = anti_entropy::repair_all(core).await?;
            let counts = [
                report.ranges_repaired,
                report.ranges_failed,
                report.records_received,
                report.records_sent,
            ];
            Ok(respond(core, Answer::Repaired { counts }))
        }
    }
}

/// Whether the run lies in this shard's slice, with the owners that the sender knows. It need not be
/// one of them: a former owner tells what it has.
fn has_run<E: Env>(
    core: &Core<E>,
    request: &ArchivedRequest<'_>,
    tree: TreeId,
    range: TokenRange,
) -> Result<bool, Failure> {
    let view = core.view()?;
    let Some(index) = keyspace_index(&view, tree) else {
        return Ok(false);
    };
    let n = usize::from(view.topology.effective_n(&view.topology.keyspaces[index]));
    let run = Run::at(&view, tree, n, range.first);
    let is_here = range.first.shard(core.env.shard_count()) == core.env.shard();
    Ok(is_here
        && run.owners == request.owners.to_native()
        && range.first <= range.last
        && range.last <= run.range.last)
}

async fn read_here<E: Env>(
    core: &Core<E>,
    target: &Target,
    key: &[u8],
    known: Option<u128>,
    deadline: Instant,
) -> Result<Bytes, Failure> {
    let stored = replica::read(core, target.tree(), target.token, key);
    let Some(state) = core.until(deadline, pin!(stored)).await else {
        return Err(deadline_passed("the store answered"));
    };
    let state = state?;
    let is_known =
        known.is_some() && StateRef::parse(&state).ok().map(|parsed| parsed.digest()) == known;
    let answer = if is_known {
        Answer::Same
    } else {
        Answer::State { state: &state }
    };
    Ok(respond(core, answer))
}

async fn serve_write<E: Env>(
    core: &Rc<Core<E>>,
    bytes: &Bytes,
    request: &ArchivedRequest<'_>,
    deadline: Instant,
) -> Result<Bytes, Failure> {
    let ArchivedBody::Write {
        tree,
        key,
        value,
        ttl_seconds,
        context: seen,
        if_match,
        flags: bits,
        w,
        idempotency,
    } = &request.body
    else {
        return Err(Failure::refused(FailureCode::InvalidRequest, "not a write"));
    };
    let has = |bit: u8| bits & bit != 0;
    let condition = match context(if_match)? {
        Some(if_match) => Condition::Match(if_match),
        None if has(flags::IF_ABSENT) => Condition::Absent,
        None => Condition::None,
    };
    let operation = WriteOperation {
        key: slice_of(bytes, key),
        value: value.as_ref().map(|value| slice_of(bytes, value)),
        ttl_seconds: ttl_seconds.to_native(),
        options: WriteOptions {
            context: context(seen)?,
            condition,
            read_context_first: has(flags::READ_CONTEXT),
            w: level(w.to_native())?,
            sloppy: has(flags::SLOPPY),
            idempotency: idempotency.as_ref().map(|pair| Idempotency {
                id: pair.0.to_native(),
                body_hash: pair.1.to_native(),
            }),
            deadline,
        },
        is_forwarded: has(flags::FORWARDED),
        id: request.id.to_native(),
    };
    let target = Target::in_tree(core.view()?, TreeId(tree.to_native()), &operation.key)?;
    let written = write(core, &target, &operation).await?;
    let context = written.context.to_bytes();
    Ok(respond(
        core,
        Answer::Written {
            context: &context,
            replicas: written.replicas,
            hints: written.hints,
        },
    ))
}

/// The place of a key of which this shard is a replica by the sender's range epoch; `None` when
/// the two know different owners.
fn own_target<E: Env>(
    core: &Core<E>,
    request: &ArchivedRequest<'_>,
    tree: u32,
    key: &[u8],
) -> Result<Option<Target>, Failure> {
    let agreed = agreed_target(core, request, tree, key)?;
    let own = agreed.filter(|target| target.me().is_some());
    if own.is_none() {
        core.count(Counter::OtherOwners);
    }
    Ok(own)
}

/// The place of a key about whose owners the sender and this shard agree, whether it is one of them
/// or not.
fn agreed_target<E: Env>(
    core: &Core<E>,
    request: &ArchivedRequest<'_>,
    tree: u32,
    key: &[u8],
) -> Result<Option<Target>, Failure> {
    let target = Target::in_tree(core.view()?, TreeId(tree), key)?;
    if target.owners() != request.owners.to_native() {
        return Ok(None);
    }
    check_shard(core, &target)?;
    Ok(Some(target))
}

/// The sender believes in another number of shards: nothing is done on the wrong one.
fn check_shard<E: Env>(core: &Core<E>, target: &Target) -> Result<(), Failure> {
    if core.owns(target) {
        return Ok(());
    }
    Err(Failure::refused(
        FailureCode::NotReady,
        "another shard of this node owns the key",
    ))
}

fn other_owners<E: Env>(core: &Core<E>) -> Bytes {
    respond(core, Answer::OtherOwners)
}

fn level(number: u16) -> Result<crate::api::Level, Failure> {
    level_from_wire(number)
        .ok_or_else(|| Failure::refused(FailureCode::InvalidRequest, "unknown level"))
}

fn context(
    bytes: &ArchivedOption<rkyv::boxed::ArchivedBox<[u8]>>,
) -> Result<Option<Context>, Failure> {
    match bytes.as_ref() {
        None => Ok(None),
        Some(bytes) => Context::from_bytes(bytes)
            .map(Some)
            .map_err(|error| Failure::refused(FailureCode::BadToken, error)),
    }
}
