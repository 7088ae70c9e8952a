//! Anti-entropy: every replica range is compared with all its owners within a target interval, and
//! what differs is exchanged record by record.
//!
//! Not on a request's path. [`schedule`] runs on every shard; [`compare`] walks down the hash sums of
//! one run with one peer; [`floors`] says which deletions all owners are known to hold.
//!
//! Invariants: a run counts as repaired only when one repair of it, begun and ended under the same
//! owners, was completed with every one of them; purge floors follow from nothing else.
//!
//! It moves no ranges and judges no liveness.

pub(crate) mod catch_up;
pub(crate) mod compare;
pub(crate) mod floors;
pub(crate) mod local;
pub(crate) mod loss;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use futures_util::lock::Mutex;
use torc_engine::{Entry, PurgeFloors, ScanFrom, ScanLimits};
use torc_env::{Address, Class, Env, Instant, ShardId, Token, TokenRange, TreeId};

use crate::api::{Failure, FailureCode, RepairReport};
use crate::coordinator::spread::call_failure;
use crate::core::Core;
use crate::hlc::stamp_of_millis;
use crate::membership::View;
use crate::merkle::Sums;
use crate::message::{ArchivedAnswer, Body, Request, Response, failure_of};
use crate::metrics::Counter;
use crate::replica::read_failure;
use crate::run::{Run, own_runs};
use crate::target::keyspace_index;
use compare::{Comparison, Direction};
use floors::{Confirmed, Floor, Reports, Told};

/// How a shard repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RepairOptions {
    /// Within this time every range is repaired. Default 24 hours.
    pub target: Duration,
    /// How often it is looked for a range that is due. Default one second.
    pub tick: Duration,
    /// How long a range that could not be repaired with all its owners waits for the next attempt.
    /// Default one minute.
    pub retry: Duration,
    /// Bytes of states exchanged a second. Default 32 MiB.
    pub bytes_per_second: u64,
    /// Whether ranges are repaired without being asked to. Default true.
    pub automatic: bool,
    /// How often purge floors are thought about: each time costs a question to every shard of the cluster. Default ten
    /// minutes.
    pub floors_interval: Duration,
    /// Longer than any request lives, with what it causes. Default two minutes.
    pub requests_over: Duration,
}

impl Default for RepairOptions {
    fn default() -> Self {
        Self {
            target: Duration::from_secs(24 * 3600),
            tick: Duration::from_secs(1),
            retry: Duration::from_secs(60),
            bytes_per_second: 32 << 20,
            automatic: true,
            floors_interval: Duration::from_secs(600),
            requests_over: Duration::from_secs(120),
        }
    }
}

/// How long a shard may take to tell about its hints.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// What is known of one run.
#[derive(Clone, Copy, Debug)]
struct Progress {
    run: Run,
    /// The last repair that was completed with all owners.
    confirmed: Option<Confirmed>,
    /// Beginning of the last attempt, whatever came of it.
    attempted_ms: Option<u64>,
    /// Due before its time.
    is_marked: bool,
    /// Hour before which deletions may be purged here.
    floor_hour: u32,
}

/// A shard's repair state.
#[derive(Debug)]
pub(crate) struct Repairs {
    progress: RefCell<BTreeMap<(TreeId, Token), Progress>>,
    /// Held while a run is repaired: one at a time on a shard.
    turn: Mutex<()>,
    /// Trees whose data has been deleted in this life.
    dropped: RefCell<BTreeSet<TreeId>>,
    since_ms: u64,
    /// What was said when floors were last thought about.
    reports: RefCell<Option<Reports>>,
    floors_due: Cell<Instant>,
    epoch: Cell<Option<u64>>,
}

impl Repairs {
    pub(crate) fn new(now_ms: u64) -> Self {
        Self {
            progress: RefCell::default(),
            turn: Mutex::new(()),
            dropped: RefCell::default(),
            since_ms: now_ms,
            reports: RefCell::default(),
            floors_due: Cell::new(Instant(0)),
            epoch: Cell::new(None),
        }
    }

    /// Runs, and the time since the one that was repaired the longest ago was repaired.
    pub(crate) fn lag(&self, now_ms: u64) -> (u64, u64) {
        let progress = self.progress.borrow();
        let oldest = progress
            .values()
            .map(|of| of.confirmed.map_or(self.since_ms, |done| done.started_ms))
            .min()
            .unwrap_or(now_ms);
        let count = u64::try_from(progress.len()).unwrap_or(u64::MAX);
        (count, now_ms.saturating_sub(oldest))
    }

    /// Keeps what is known of runs that still are the same, and takes up new ones.
    fn take_up(&self, runs: Vec<Run>) {
        let mut progress = self.progress.borrow_mut();
        let mut known = std::mem::take(&mut *progress);
        for run in runs {
            let key = (run.tree, run.range.first);
            let kept = known.remove(&key).filter(|of| of.run == run);
            progress.insert(
                key,
                kept.unwrap_or(Progress {
                    run,
                    confirmed: None,
                    attempted_ms: None,
                    is_marked: false,
                    floor_hour: 0,
                }),
            );
        }
    }

    fn confirmed(&self) -> Vec<(Run, Confirmed)> {
        let progress = self.progress.borrow();
        let confirmed = progress.values().map(|of| Some((of.run, of.confirmed?)));
        confirmed.flatten().collect()
    }

    fn runs(&self) -> Vec<Run> {
        self.progress.borrow().values().map(|of| of.run).collect()
    }

    /// Of the runs that are due the one whose last attempt is the longest ago: when there are more
    /// than ticks to repair them in, each still gets its turn.
    fn due(&self, now_ms: u64, options: &RepairOptions) -> Option<Run> {
        let age_max = millis(options.target) / 2;
        let retry = millis(options.retry);
        let progress = self.progress.borrow();
        let waited = |of: &Progress| match (of.confirmed, of.attempted_ms) {
            _ if of.is_marked => age_max,
            (Some(done), _) => now_ms.saturating_sub(done.started_ms),
            (None, _) => age_max,
        };
        progress
            .values()
            .filter(|of| waited(of) >= age_max)
            .filter(|of| {
                of.attempted_ms
                    .is_none_or(|attempt| now_ms.saturating_sub(attempt) >= retry)
            })
            .min_by_key(|of| of.attempted_ms)
            .map(|of| of.run)
    }

    /// Changes what is known of a run, unless the ring has changed under it.
    fn edit(&self, run: &Run, edit: impl FnOnce(&mut Progress)) {
        let mut progress = self.progress.borrow_mut();
        if let Some(of) = progress.get_mut(&(run.tree, run.range.first))
            && of.run == *run
        {
            edit(of);
        }
    }

    /// A replica has missed a write of this key and nobody keeps it for it: the key's run is due.
    pub(crate) fn mark(&self, tree: TreeId, token: Token) {
        let mut progress = self.progress.borrow_mut();
        let run = progress
            .range_mut((tree, Token(0))..=(tree, token))
            .next_back();
        if let Some((_, of)) = run
            && of.run.range.contains(token)
        {
            of.is_marked = true;
        }
    }

    /// Replicas may have missed writes of any key, and nobody keeps them any more: everything is due.
    pub(crate) fn mark_all(&self) {
        let mut progress = self.progress.borrow_mut();
        progress.values_mut().for_each(|of| of.is_marked = true);
    }

    /// Hour before which this shard may have purged what is dead in `range`.
    pub(crate) fn floor_hour(&self, tree: TreeId, range: TokenRange) -> u32 {
        let progress = self.progress.borrow();
        progress
            .range((tree, Token(0))..=(tree, range.last))
            .filter(|(_, of)| of.run.range.intersection(&range).is_some())
            .map(|(_, of)| of.floor_hour)
            .max()
            .unwrap_or(0)
    }
}

/// Repairs one range after the other for as long as the shard runs, and keeps the store in step with what
/// the topology says of keyspaces.
pub(crate) async fn schedule<E: Env>(core: Rc<Core<E>>) {
    let options = core.options.repair;
    let mut compacted_by = None;
    loop {
        core.env.sleep(options.tick).await;
        let Ok(view) = core.view() else { continue };
        if compacted_by != Some(view.topology.epoch) {
            compacted_by = Some(view.topology.epoch);
            set_strategies(&core, &view);
        }
        if !view.in_ring() {
            continue;
        }
        refresh(&core, &view).await;
        if core.lacking.is_catching_up() {
            continue;
        }
        // Before repairs: one that follows no promise raises no floor.
        raise_floors(&core).await;
        if !options.automatic {
            continue;
        }
        if let Some(run) = core.repairs.due(core.now_ms(), &options) {
            let _turn = core.repairs.turn.lock().await;
            if let Err(error) = repair_run(&core, &view, &run).await {
                tracing::debug!(%error, "a range is not repaired with all its owners yet");
            }
        }
    }
}

/// Takes up the runs of the newest topology, and sums up trees that are not yet.
async fn refresh<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>) {
    if core.repairs.epoch.get() != Some(view.topology.epoch.0) {
        core.repairs.take_up(own_runs(view, core.slice()));
        // Who is an owner since has promised nothing to those who were. What stays as it was rises again.
        for keyspace in &view.topology.keyspaces {
            core.store
                .set_purge_floors(keyspace.id, PurgeFloors::none());
        }
        drop_trees(core, view).await;
        core.repairs.epoch.set(Some(view.topology.epoch.0));
    }
    build_missing_sums(core, view).await;
}

/// Deletes the data of keyspaces that the topology has dropped. Their ids are never used again, and
/// a node uses no topology before it is stored, so what is missing in it is gone for good.
async fn drop_trees<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>) {
    for id in (1..view.topology.next_keyspace).map(TreeId) {
        let is_kept = keyspace_index(view, id).is_some();
        if is_kept || !core.repairs.dropped.borrow_mut().insert(id) {
            continue;
        }
        core.sums.borrow_mut().forget(id);
        if let Err(error) = core.store.drop_tree(id).await {
            core.repairs.dropped.borrow_mut().remove(&id);
            tracing::warn!(%error, tree = id.0, "a dropped keyspace's data is not deleted yet");
        }
    }
}

fn set_strategies<E: Env>(core: &Core<E>, view: &View) {
    for keyspace in &view.topology.keyspaces {
        let strategy = keyspace.compaction.strategy();
        core.store.set_strategy(keyspace.id, strategy);
    }
}

/// Sums up the trees that are not yet.
async fn build_missing_sums<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>) {
    for keyspace in &view.topology.keyspaces {
        let is_built = core.sums.borrow().is_built(keyspace.id);
        if !is_built && let Err(error) = build_sums(core, keyspace.id).await {
            tracing::warn!(%error, "the records of a keyspace cannot be summed up");
        }
    }
}

/// Reads a tree through, but for what is known to be damaged, and sums its records up. Where a replica lacks the same,
/// sums agree over it: whoever compares is told whether the other is whole.
async fn build_sums<E: Env>(core: &Core<E>, tree: TreeId) -> Result<(), Failure> {
    let limits = ScanLimits {
        records: 256,
        bytes: 1 << 20,
    };
    let mut rest = core.sums.borrow_mut().build_from(tree);
    for stretch in core.readable(tree, TokenRange::ALL) {
        while let Some(reached) = rest.clone() {
            let from = match reached.token() {
                token if token > stretch.last => break,
                token if token < stretch.first => ScanFrom::Token(stretch.first),
                _ => reached.clone(),
            };
            let page = core
                .store
                .scan(tree, from, stretch.last, limits)
                .await
                .map_err(|error| read_failure(&error))?;
            rest = take_in(&mut core.sums.borrow_mut(), tree, &page.entries, &reached)?;
            if page.next.is_none() {
                break;
            }
            core.env.give_way().await;
        }
    }
    core.sums.borrow_mut().built(tree);
    Ok(())
}

/// Sums the next records up, which the store has from `from` on; returns where it goes on.
fn take_in(
    sums: &mut Sums,
    tree: TreeId,
    entries: &[Entry],
    from: &ScanFrom,
) -> Result<Option<ScanFrom>, Failure> {
    if sums.build_from(tree).as_ref() != Some(from) {
        let why = "the sums were begun anew, or by somebody else";
        return Err(Failure::refused(FailureCode::NotReady, why));
    }
    for entry in entries {
        sums.build(tree, entry.token, &entry.key, &entry.record);
    }
    Ok(sums.build_from(tree))
}

/// Repairs everything that this shard holds, once, now.
pub(crate) async fn repair_all<E: Env>(core: &Rc<Core<E>>) -> Result<RepairReport, Failure> {
    let view = core.view()?;
    refresh(core, &view).await;
    let mut report = RepairReport::default();
    for run in core.repairs.runs() {
        let _turn = core.repairs.turn.lock().await;
        let view = core.view()?;
        let before = report_of(core);
        match repair_run(core, &view, &run).await {
            Ok(()) => report.ranges_repaired += 1,
            Err(error) => {
                tracing::info!(%error, "a range is not repaired with all its owners");
                report.ranges_failed += 1;
            }
        }
        let after = report_of(core);
        report.records_received += after.records_received - before.records_received;
        report.records_sent += after.records_sent - before.records_sent;
    }
    Ok(report)
}

fn report_of<E: Env>(core: &Core<E>) -> RepairReport {
    RepairReport {
        records_received: core.metrics.get(Counter::RecordsReceived),
        records_sent: core.metrics.get(Counter::RecordsSent),
        ..RepairReport::default()
    }
}

/// Compares a run with all its other owners, those that are up first of all: one that is silent
/// makes it fail in the end, and the others are healed all the same.
async fn repair_run<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>, run: &Run) -> Result<(), Failure> {
    let started_ms = core.now_ms();
    let promised = core.repairs.reports.borrow().as_ref().and_then(|reports| {
        let is_of_all = reports.epoch == view.topology.epoch;
        reports.promised().filter(|_| is_of_all)
    });
    core.repairs.edit(run, |of| {
        of.attempted_ms = Some(started_ms);
        // What is missed from now on is not covered by this repair.
        of.is_marked = false;
    });
    let mut failure = None;
    // After the first round this shard holds what any owner held at the start; the second one gives it to
    // all of them, also what came from a later peer, or from elsewhere, after an earlier one was
    // compared. Where all are equal it costs one question a peer.
    let rounds = if run.replicas.as_slice().len() > 2 {
        2
    } else {
        1
    };
    for _ in 0..rounds {
        for member in run.replicas.as_slice() {
            if Some(*member) == view.me {
                continue;
            }
            let Some(address) = run.address(view, *member).filter(|_| view.is_up(*member)) else {
                failure = Some(Failure::refused(
                    FailureCode::QuorumNotMet,
                    "an owner of the range is not up",
                ));
                continue;
            };
            let comparison = Comparison::new(core, view, *run, address, Direction::Both);
            match comparison.run().await {
                Ok(compared) if compared.unreadable.is_empty() => {}
                Ok(_) => {
                    let why = "one of two owners cannot read what it has of the range";
                    failure = Some(Failure::refused(FailureCode::Unreadable, why));
                }
                Err(error) => failure = Some(error),
            }
        }
        if failure.is_some() {
            break;
        }
    }
    let is_current = core
        .view()
        .is_ok_and(|now| now.topology.epoch == view.topology.epoch);
    if failure.is_none() && !is_current {
        failure = Some(Failure::refused(
            FailureCode::NotReady,
            "the topology changed during the repair",
        ));
    }
    match failure {
        Some(failure) => {
            core.count(Counter::RangeRepairFailures);
            core.repairs.edit(run, |of| of.is_marked = true);
            Err(failure)
        }
        None => {
            core.count(Counter::RangesRepaired);
            let confirmed = Confirmed {
                started_ms,
                completed: core.env.now(),
                promised,
            };
            core.repairs.edit(run, |of| of.confirmed = Some(confirmed));
            Ok(())
        }
    }
}

/// Raises the purge floors as far as the repairs done and what still waits anywhere allow.
async fn raise_floors<E: Env>(core: &Rc<Core<E>>) {
    // The newest members: one that came while ranges were repaired is asked too.
    let Ok(view) = core.view() else { return };
    let (now, options) = (core.env.now(), &core.options.repair);
    if now < core.repairs.floors_due.get() {
        return;
    }
    core.repairs.floors_due.set(now + options.floors_interval);
    let reports = ask_all(core, &view, now).await;
    let before = core.repairs.reports.replace(Some(reports.clone()));
    let Some(before) = before.filter(|before| reports.are_clear_since(before)) else {
        return;
    };
    // What was repaired under other owners says nothing of those that there are now.
    if core.repairs.epoch.get() != Some(core.epoch()) {
        return;
    }
    let now_ms = core.now_ms();
    let mut pieces: BTreeMap<TreeId, Vec<(TokenRange, u64)>> = BTreeMap::new();
    for (run, confirmed) in core.repairs.confirmed() {
        // What was in flight during the repair has become a hint by then, or is nowhere.
        let was_over = before.asked >= confirmed.completed + options.requests_over;
        let Some(floor) = confirmed
            .promised
            .and_then(Floor::below)
            .filter(|_| was_over)
        else {
            continue;
        };
        core.repairs
            .edit(&run, |of| of.floor_hour = of.floor_hour.max(floor.hour()));
        let Some(keyspace) = keyspace_index(&view, run.tree) else {
            continue;
        };
        let grace_seconds = view.topology.keyspaces[keyspace].tombstone_grace_seconds;
        let grace_ms = grace_seconds.saturating_mul(1000);
        let kept = stamp_of_millis(now_ms.saturating_sub(grace_ms));
        pieces
            .entry(run.tree)
            .or_default()
            .push((run.range, floor.stamp().min(kept)));
    }
    for (tree, pieces) in pieces {
        core.store.set_purge_floors(tree, PurgeFloors::new(pieces));
    }
}

/// What every shard of every member promises, and says of the old values that wait at it.
async fn ask_all<E: Env>(core: &Rc<Core<E>>, view: &View, asked: Instant) -> Reports {
    let mut told = BTreeMap::new();
    for (_, member) in view.topology.indexed() {
        for shard in (0..member.description.shards).map(ShardId) {
            // In a slot that nobody has ever claimed nothing waits, and nobody mints.
            if let Some(address) = member.shard_address(shard) {
                told.insert(address, ask(core, address).await.ok());
            }
        }
    }
    Reports {
        epoch: view.topology.epoch,
        asked,
        told,
    }
}

async fn ask<E: Env>(core: &Core<E>, address: Address) -> Result<Told, Failure> {
    if address.node == core.env.node() && address.shard == core.env.shard() {
        return Ok(core.tell());
    }
    let deadline = core.env.now() + REPORT_TIMEOUT;
    let message = Request {
        id: core.next_request(),
        remaining_ms: core.remaining_ms(deadline),
        epoch: core.view()?.topology.epoch.0,
        owners: 0,
        body: Body::OldestHint,
    }
    .encode();
    let answer = core
        .env
        .call(address, Class::Repair, message, deadline)
        .await
        .map_err(call_failure)?;
    let response = Response::access(&answer)
        .map_err(|error| Failure::refused(FailureCode::Internal, error))?;
    match &response.answer {
        ArchivedAnswer::OldestHint {
            oldest_ms,
            now_ms,
            promised,
        } => Ok(Told {
            oldest_ms: oldest_ms.as_ref().map(|oldest_ms| oldest_ms.to_native()),
            now_ms: now_ms.to_native(),
            promised: promised.to_native(),
        }),
        other => Err(failure_of(other)),
    }
}

fn not_yet(why: &str) -> Failure {
    Failure::refused(FailureCode::NotReady, why)
}

/// # Errors
/// When the topology is not that of `view` any more.
fn check_current<E: Env>(core: &Core<E>, view: &View) -> Result<(), Failure> {
    if core.view()?.topology.epoch == view.topology.epoch {
        return Ok(());
    }
    Err(not_yet("the topology has changed"))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::Replicas;

    #[test]
    fn with_more_ranges_due_than_ticks_each_still_gets_its_turn() {
        let repairs = Repairs::new(0);
        let runs = (0..100).map(|number| Run {
            tree: TreeId(1),
            range: TokenRange {
                first: Token(number),
                last: Token(number),
            },
            replicas: Replicas::of(&[]),
            owners: 0,
        });
        repairs.take_up(runs.collect());
        let options = RepairOptions {
            target: Duration::from_secs(2),
            tick: Duration::from_secs(1),
            retry: Duration::from_secs(1),
            ..RepairOptions::default()
        };
        let mut seen = BTreeSet::new();
        for tick in 1..=100 {
            let now_ms = tick * 1000;
            let run = repairs.due(now_ms, &options).expect("some are always due");
            repairs.edit(&run, |of| {
                of.attempted_ms = Some(now_ms);
                of.confirmed = Some(Confirmed {
                    started_ms: now_ms,
                    completed: Instant(0),
                    promised: None,
                });
            });
            seen.insert(run.range.first);
        }
        assert_eq!(seen.len(), 100);
    }
}
