//! Brings a shard that lacks data up to date before it answers reads: one of a node that joins, one
//! that may have lost what it had acknowledged, and one whose tables rot.
//!
//! Not on a request's path, but it holds the gate: while [`Core::is_whole`] is false this shard
//! takes merges, and neither answers reads nor mints dots.
//!
//! A joining node first pulls its ranges from the owners that they have now
//! ([`Membership::to_pull`]). What is written between that pull and the epoch that puts the node into
//! the ring goes to the old owners only; so once in the ring it compares its ranges with all their
//! other owners again, and only then becomes whole. A write that W = a majority of the old owners
//! acknowledged is on one of those that remain; where there is one copy only, on nobody that remains,
//! so the former owner is asked too.
//!
//! Invariant: that a shard is not whole is durable before anything depends on it, so a crash in
//! between does not make it forget.
//!
//! [`Membership::to_pull`]: crate::membership::Membership::to_pull

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use torc_engine::{Decision, Kind, ReadError, Record, Store};
use torc_env::{Env, ShardId, Token, TokenRange, mutation};

use super::compare::{Comparison, Direction};
use super::{build_missing_sums, own_runs};
use crate::api::{Failure, FailureCode};
use crate::core::{Core, tree};
use crate::membership::{Pull, View};
use crate::own_trees;
use crate::redistribute::is_divided;
use crate::replica::write_failure;
use crate::run::Run;
use crate::topology::Epoch;

const INTERVAL: Duration = Duration::from_millis(200);

pub(crate) fn mark_key(shard: ShardId) -> String {
    format!("catch-up/{shard}")
}

/// Whether an earlier life of this shard was not whole yet.
pub(crate) async fn is_marked<E: Env>(shard: ShardId, store: &Store<E>) -> Result<bool, ReadError> {
    let key = mark_key(shard);
    let token = Token::of(tree::SYSTEM, key.as_bytes());
    let record = store.get(tree::SYSTEM, token, key.as_bytes()).await?;
    Ok(record.is_some_and(|record| record.kind == Kind::Value))
}

async fn set_mark<E: Env>(core: &Core<E>, is_set: bool) -> Result<(), Failure> {
    let key = mark_key(core.env.shard());
    let token = Token::of(tree::SYSTEM, key.as_bytes());
    let record = Record {
        kind: if is_set { Kind::Value } else { Kind::Tombstone },
        stamp: 0,
        expires_at_ms: 0,
        value: Bytes::new(),
    };
    let ((), ticket) = core
        .store
        .update(tree::SYSTEM, token, key.as_bytes(), |_| {
            Decision::Write(record, ())
        })
        .await
        .map_err(|error| write_failure(&error))?;
    ticket.wait().await.map_err(|error| write_failure(&error))
}

/// Pulls and catches up whenever that is needed, for as long as the shard runs.
pub(crate) async fn run<E: Env>(core: Rc<Core<E>>) {
    let mut pulled: Option<Epoch> = None;
    loop {
        if let Err(error) = step(&core, &mut pulled).await {
            tracing::debug!(%error, "this shard does not have all its data yet");
        }
        core.env.sleep(INTERVAL).await;
    }
}

async fn step<E: Env>(core: &Rc<Core<E>>, pulled: &mut Option<Epoch>) -> Result<(), Failure> {
    if core.has_damage(tree::is_own) {
        own_trees::give_up_damage(core).await?;
    }
    let Ok(view) = core.view() else {
        return Ok(());
    };
    if let Some(pull) = core.membership.to_pull() {
        if core.is_whole.get() {
            // The mark first: without it a restart would take the shard for whole.
            set_mark(core, true).await?;
            core.is_whole.set(false);
        }
        if *pulled != Some(pull.epoch) {
            pull_ranges(core, &view, &pull).await?;
            *pulled = Some(pull.epoch);
        }
        core.membership.pulled(pull.epoch).await;
        return Ok(());
    }
    if core.has_damage(is_divided) {
        give_up_damage(core, &view).await?;
    }
    if core.is_whole.get() {
        return own_trees::made_good(core).await;
    }
    if !view.in_ring() {
        return Ok(());
    }
    if !mutation::on("joiner_does_not_catch_up") {
        compare_with_all(core, &view).await?;
    }
    set_mark(core, false).await?;
    own_trees::made_good(core).await?;
    core.is_whole.set(true);
    tracing::info!(shard = %core.env.shard(), "this shard has all its data");
    Ok(())
}

/// Cuts what the store cannot read any more out of it, once all who have the keys too can be asked for
/// them; until then only those keys are unknown. The store remembers durably that it lacks something.
async fn give_up_damage<E: Env>(core: &Rc<Core<E>>, view: &View) -> Result<(), Failure> {
    let mut others = view
        .topology
        .indexed()
        .filter(|(member, _)| Some(*member) != view.me)
        .peekable();
    if others.peek().is_none() || !others.all(|(member, _)| view.is_up(member)) {
        return Ok(());
    }
    core.is_whole.set(false);
    // What was minted under the old name may be in what is lost.
    let renewed = core.options.identity.renewed(core.env.random());
    core.actor.set(renewed.actor());
    let lost = core
        .store
        .quarantine(is_divided)
        .await
        .map_err(|error| write_failure(&error))?;
    core.sums.borrow_mut().forget_all();
    tracing::warn!(
        shard = %core.env.shard(),
        parts = lost.len(),
        "damaged parts of tables are cut out and fetched from the replicas"
    );
    Ok(())
}

/// Fetches what this shard will own from a majority of those who own it now, all of them whole.
async fn pull_ranges<E: Env>(
    core: &Rc<Core<E>>,
    view: &Rc<View>,
    pull: &Pull,
) -> Result<(), Failure> {
    if view.topology.epoch != pull.epoch {
        return Err(not_yet("the topology is changing"));
    }
    build_missing_sums(core, view).await;
    let members = pull.topology.ring_member_count();
    let (shard, shards) = (core.env.shard(), core.env.shard_count());
    for keyspace in &pull.topology.keyspaces {
        let n_now = usize::from(keyspace.effective_n(members));
        let n_then = usize::from(keyspace.effective_n(members + 1));
        let pieces: Vec<TokenRange> = pull
            .then
            .ranges_of_shard(pull.me, n_then, shard, shards)
            .map(|piece| piece.range)
            .collect();
        for piece in joined(pieces) {
            let mut first = piece.first;
            loop {
                let mut run = Run::at(view, keyspace.id, n_now, first);
                run.range.last = run.range.last.min(piece.last);
                pull_run(core, view, &run).await?;
                if run.range.last >= piece.last {
                    break;
                }
                first = Token(run.range.last.0 + 1);
            }
        }
    }
    Ok(())
}

/// Ranges in ring order, neighbours made one.
fn joined(pieces: Vec<TokenRange>) -> Vec<TokenRange> {
    let mut joined: Vec<TokenRange> = Vec::new();
    for piece in pieces {
        match joined.last_mut() {
            Some(last) if last.last.0.checked_add(1) == Some(piece.first.0) => {
                last.last = piece.last;
            }
            _ => joined.push(piece),
        }
    }
    joined
}

async fn pull_run<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>, run: &Run) -> Result<(), Failure> {
    let owners = run.replicas.as_slice();
    let mut done = 0;
    let mut failure = not_yet("the owners of a range do not answer");
    for member in owners {
        let Some(address) = run.address(view, *member) else {
            continue;
        };
        let comparison = Comparison::new(core, view, *run, address, Direction::Pull);
        match comparison.run().await {
            Ok(true) => done += 1,
            // It may lack what left the range with the owner whose place it took.
            Ok(false) => failure = not_yet("an owner of a range is still fetching its data"),
            Err(error) => failure = error,
        }
    }
    if done > owners.len() / 2 {
        Ok(())
    } else {
        Err(failure)
    }
}

/// Fetches what this shard lacks of its ranges from all their other owners.
async fn compare_with_all<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>) -> Result<(), Failure> {
    build_missing_sums(core, view).await;
    let slice = TokenRange::of_shard(core.env.shard(), core.env.shard_count());
    for run in own_runs(view, slice) {
        for member in run.replicas.as_slice() {
            if Some(*member) == view.me {
                continue;
            }
            // A slot that nobody has ever claimed holds nothing.
            let Some(address) = run.address(view, *member) else {
                continue;
            };
            Comparison::new(core, view, run, address, Direction::Pull)
                .run()
                .await?;
        }
        if run.replicas.as_slice().len() == 1 {
            pull_from_predecessors(core, view, &run).await?;
        }
    }
    let is_current = core.view()?.topology.epoch == view.topology.epoch;
    if is_current {
        Ok(())
    } else {
        Err(not_yet("the topology has changed"))
    }
}

/// Fetches what the former owners of a run with one copy took between the pull and the epoch that put
/// this node into the ring. Whoever is next in the preference list was the owner without this node.
async fn pull_from_predecessors<E: Env>(
    core: &Rc<Core<E>>,
    view: &Rc<View>,
    run: &Run,
) -> Result<(), Failure> {
    let mut first = run.range.first;
    loop {
        let wide = Run::at(view, run.tree, 2, first);
        let last = wide.range.last.min(run.range.last);
        let piece = Run {
            range: TokenRange { first, last },
            ..*run
        };
        let mut others = wide.replicas.as_slice().iter();
        let predecessor = others.find(|member| Some(**member) != view.me);
        if let Some(address) = predecessor.and_then(|member| piece.address(view, *member)) {
            Comparison::new(core, view, piece, address, Direction::Pull)
                .run()
                .await?;
        }
        if last >= run.range.last {
            return Ok(());
        }
        first = Token(last.0 + 1);
    }
}

fn not_yet(why: &str) -> Failure {
    Failure::refused(FailureCode::NotReady, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_ranges_become_one() {
        let range = |first, last| TokenRange {
            first: Token(first),
            last: Token(last),
        };
        let pieces = vec![
            range(0, 9),
            range(10, 19),
            range(30, 39),
            range(40, u128::MAX),
        ];
        assert_eq!(joined(pieces), [range(0, 19), range(30, u128::MAX)]);
    }
}
