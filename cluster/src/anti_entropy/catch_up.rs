//! Brings a shard that lacks data up to date before it answers reads: one of a node that joins, and one
//! that may have lost what it had acknowledged. What damage has cost is fetched here too, as [`loss`] says.
//!
//! Not on a request's path, but it holds the gate: where this shard is [`Lacking`] something, it
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
//! [`Lacking`]: crate::lacking::Lacking

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use torc_engine::{Decision, Kind, ReadError, Record, Store};
use torc_env::{Address, Env, ShardId, Token, TokenRange, TreeId, mutation};

use super::compare::{Compared, Comparison, Direction};
use super::{build_missing_sums, check_current, loss, not_yet, own_runs};
use crate::api::Failure;
use crate::core::{Core, tree};
use crate::membership::{Pull, View};
use crate::own_trees;
use crate::replica::write_failure;
use crate::ring::MemberIndex;
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
    let durable = ticket.wait_durable().await;
    durable.map_err(|error| write_failure(&error))
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
        if !core.lacking.is_catching_up() {
            // The mark first: without it a restart would take the shard for whole.
            set_mark(core, true).await?;
            core.lacking.catch_up();
        }
        if *pulled != Some(pull.epoch) {
            pull_ranges(core, &view, &pull).await?;
            *pulled = Some(pull.epoch);
        }
        core.membership.pulled(pull.epoch).await;
        return Ok(());
    }
    if !core.lacking.is_catching_up() {
        let _turn = core.lacking.turn().await;
        own_trees::made_good(core).await?;
    }
    if !view.in_ring() {
        return Ok(());
    }
    if loss::has_damage(core) {
        loss::cut_out(core, &view).await?;
    }
    if core.lacking.is_catching_up() {
        let cuts = core.lacking.cuts();
        let pulls = match compare_with_all(core, &view).await {
            Ok(pulls) => pulls,
            Err(error) => {
                loss::look_at_lost(core, &view).await;
                return Err(error);
            }
        };
        return loss::settle(core, &view, cuts, &pulls).await;
    }
    if !core.lacking.is_whole() {
        loss::heal(core, &view).await?;
    }
    Ok(())
}

/// Forgets durably that anything may be missing. The caller says so in memory.
pub(super) async fn caught_up<E: Env>(core: &Core<E>) -> Result<(), Failure> {
    set_mark(core, false).await
}

/// What came of pulling from the other owners of runs, by run and owner.
#[derive(Debug, Default)]
pub(crate) struct Pulls(BTreeMap<(TreeId, Token, MemberIndex), Pulled>);

/// What came of pulling from one of them.
#[derive(Debug)]
pub(super) enum Pulled {
    /// This part of the run was compared.
    Range(TokenRange, Compared),
    /// Nobody knows what it has.
    Failed,
}

impl Pulls {
    /// `pulled`: what came of pulling `range` of the run from the owner.
    pub(crate) fn note(
        &mut self,
        run: &Run,
        owner: MemberIndex,
        range: TokenRange,
        pulled: Result<Compared, Failure>,
    ) {
        let pull = match pulled {
            Ok(compared) => Pulled::Range(range, compared),
            Err(error) => {
                tracing::debug!(%error, "an owner of a range cannot be pulled from");
                Pulled::Failed
            }
        };
        self.0.insert((run.tree, run.range.first, owner), pull);
    }

    /// `None` where nobody tried.
    pub(super) fn of(&self, run: &Run, owner: MemberIndex) -> Option<&Pulled> {
        self.0.get(&(run.tree, run.range.first, owner))
    }

    /// Whether one of those who were tried did not answer.
    pub(super) fn has_failed(&self, run: &Run) -> bool {
        let owners = run.replicas.as_slice().iter();
        let mut pulls = owners.filter_map(|owner| self.of(run, *owner));
        pulls.any(|pull| matches!(pull, Pulled::Failed))
    }
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
            Ok(compared) if compared.is_all() => done += 1,
            // It may lack what left the range with the owner whose place it took.
            Ok(_) => failure = not_yet("an owner of a range lacks some of its data"),
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
async fn compare_with_all<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>) -> Result<Pulls, Failure> {
    build_missing_sums(core, view).await;
    let mut pulls = Pulls::default();
    for run in own_runs(view, core.slice()) {
        for member in run.replicas.as_slice() {
            if Some(*member) == view.me {
                continue;
            }
            // A slot that nobody has ever claimed holds nothing.
            let Some(address) = run.address(view, *member) else {
                continue;
            };
            let pulled = pull_readable(core, view, run, address).await?;
            pulls.note(&run, *member, run.range, Ok(pulled));
        }
        if run.replicas.as_slice().len() == 1 {
            pull_from_predecessors(core, view, &run).await?;
        }
    }
    check_current(core, view)?;
    Ok(pulls)
}

/// Fetches from one owner what this shard lacks of a run, but for what is damaged here and not cut out: its keys stay unknown,
/// and are fetched when it is.
pub(super) async fn pull_readable<E: Env>(
    core: &Rc<Core<E>>,
    view: &Rc<View>,
    run: Run,
    owner: Address,
) -> Result<Compared, Failure> {
    let mut all = Compared {
        is_whole: true,
        unreadable: Vec::new(),
    };
    if mutation::on("joiner_does_not_catch_up") {
        return Ok(all);
    }
    for range in core.readable(run.tree, run.range) {
        let piece = Run { range, ..run };
        let comparison = Comparison::new(core, view, piece, owner, Direction::Pull);
        let compared = comparison.run().await?;
        all.is_whole &= compared.is_whole;
        all.unreadable.extend(compared.unreadable);
    }
    Ok(all)
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
            let pulled = pull_readable(core, view, piece, address).await?;
            if !pulled.unreadable.is_empty() {
                return Err(not_yet(
                    "the former owner of a range cannot read what it has",
                ));
            }
        }
        if last >= run.range.last {
            return Ok(());
        }
        first = Token(last.0 + 1);
    }
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
