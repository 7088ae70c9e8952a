//! Hints: the state of a key, kept for a replica that did not get it.
//!
//! On the path: [`Spread`](crate::coordinator::spread::Spread) stores one on the coordinator for each
//! replica that missed a write, or, under `sloppy`, has one stored on a node that is no replica;
//! [`replay`] delivers them when the replica is back.
//!
//! Kept in a tree of the engine that is no keyspace's, as durable as the data. Hints of one key for
//! one target are merged into one.
//!
//! ```text
//! key    target slot u32 BE │ tree u32 BE │ key
//! value  version u8 │ flags u8 (1 = counted) │ created ms u64 LE │ epoch u64 LE │ encoded state
//! ```
//!
//! Invariants: a hint is deleted only after the replica holds its state durably, and only if it has
//! not been merged with a newer one meanwhile; a *counted* hint is durable before it is acknowledged,
//! never expires and is never dropped; an uncounted one may be dropped for age or bytes, and
//! anti-entropy makes up for it. The owners are resolved again at delivery.
//!
//! It decides no quorum.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use torc_engine::{Decision, Entry, Kind, PurgeFloors, Record, ScanFrom, ScanLimits};
use torc_env::{Class, Env, Token, TreeId, mutation};

use crate::api::{Failure, FailureCode};
use crate::conflict::Conflict;
use crate::core::{Core, tree};
use crate::message::{ArchivedAnswer, Body, Response, failure_of};
use crate::metrics::Counter;
use crate::replica::{self, write_failure};
use crate::ring::MemberIndex;
use crate::target::Target;
use crate::topology::{Epoch, SlotId};
use crate::version::State;
use crate::walk::Walk;

/// Bounds of a shard's hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintOptions {
    /// Most bytes kept. Default 256 MiB: a minute of writes of 4 MiB/s to one dead node; what is
    /// longer is cheaper to repair by hash trees.
    pub bytes_max: u64,
    /// How long an uncounted hint is kept. Default three hours, as long as a repair of everything
    /// takes.
    pub age_max: Duration,
    /// How often it is looked whether a target is back. Default half a second.
    pub interval: Duration,
    /// Bytes delivered a second. Default 16 MiB: a fraction of what a returning node can take
    /// while it serves.
    pub replay_bytes_per_second: u64,
}

impl Default for HintOptions {
    fn default() -> Self {
        Self {
            bytes_max: 256 << 20,
            age_max: Duration::from_secs(3 * 3600),
            interval: Duration::from_millis(500),
            replay_bytes_per_second: 16 << 20,
        }
    }
}

const VERSION: u8 = 1;
const COUNTED: u8 = 1;
const HEADER_BYTES: usize = 18;
const KEY_HEADER_BYTES: usize = 8;
/// Time that one delivery may take.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(5);
/// Records looked at in one step of a replay.
const PAGE: ScanLimits = ScanLimits {
    records: 256,
    bytes: 1 << 20,
};

/// What a shard keeps for one target.
#[derive(Clone, Copy, Debug, Default)]
struct Waiting {
    count: u64,
    bytes: u64,
    /// Creation time of the oldest, in milliseconds since 1970. A lower bound: it rises only
    /// when a whole pass has found nothing older.
    oldest_ms: u64,
}

/// The books about the hints in the store.
#[derive(Debug)]
pub(crate) struct Hints {
    options: HintOptions,
    waiting: RefCell<BTreeMap<SlotId, Waiting>>,
    bytes: Cell<u64>,
    /// What brings the store into the books at the start; `None` when all of it is there.
    loading: RefCell<Option<Walk>>,
    /// Hints may have gone from the store without a word to the books.
    are_wrong: Cell<bool>,
    /// See [`Hints::clock_ms`].
    newest_ms: Cell<u64>,
}

/// A hint to be stored.
pub(crate) struct Hint<'a> {
    pub(crate) target: SlotId,
    pub(crate) tree: TreeId,
    pub(crate) key: &'a [u8],
    pub(crate) state: &'a Bytes,
    pub(crate) epoch: Epoch,
}

impl Hints {
    pub(crate) fn new(options: HintOptions) -> Self {
        Self {
            options,
            waiting: RefCell::default(),
            bytes: Cell::new(0),
            loading: RefCell::new(Some(Walk::default())),
            are_wrong: Cell::new(false),
            newest_ms: Cell::new(0),
        }
    }

    /// Some may have been cut out of the store: the books are to be made anew, by [`replay`], so that nobody waits
    /// for what is not there.
    pub(crate) fn may_be_gone(&self) {
        self.are_wrong.set(true);
    }

    fn begin_anew(&self) {
        self.waiting.borrow_mut().clear();
        self.bytes.set(0);
        self.loading.replace(Some(Walk::default()));
    }

    /// The time by which hints are dated, in milliseconds since 1970: civil time, but it never goes back, and no hint that
    /// is in the books was created after it. So who has been told it knows of every later hint that it is later.
    pub(crate) fn clock_ms(&self, civil_ms: u64) -> u64 {
        let newest_ms = self.newest_ms.get().max(civil_ms);
        self.newest_ms.set(newest_ms);
        newest_ms
    }

    /// Hints waiting, and their bytes.
    pub(crate) fn waiting(&self) -> (u64, u64) {
        let count = self.waiting.borrow().values().map(|of| of.count).sum();
        (count, self.bytes.get())
    }

    /// Creation time of the oldest hint for anybody, in milliseconds since 1970. `None` when there
    /// is none; 0 while the store has not been looked through yet.
    pub(crate) fn oldest_ms(&self) -> Option<u64> {
        if self.loading.borrow().is_some() {
            return Some(0);
        }
        let waiting = self.waiting.borrow();
        waiting
            .values()
            .filter(|of| of.count > 0)
            .map(|of| of.oldest_ms)
            .min()
    }

    fn has_room(&self, bytes: usize) -> bool {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.bytes.get().saturating_add(bytes) <= self.options.bytes_max
    }

    /// The record of `key` has come (`before` = none) or changed.
    fn stored(
        &self,
        target: SlotId,
        key: (Token, &[u8]),
        before: Option<usize>,
        after: usize,
        created_ms: u64,
    ) {
        let mut loading = self.loading.borrow_mut();
        let is_new_here = loading
            .as_mut()
            .is_some_and(|walk| walk.written(key.0, key.1));
        // What an earlier run has left of it is not in the books yet.
        let before = before.filter(|_| !is_new_here);
        self.changed(target, before, after, created_ms);
    }

    fn changed(&self, target: SlotId, before: Option<usize>, after: usize, created_ms: u64) {
        let before_bytes = before.map_or(0, |len| u64::try_from(len).unwrap_or(0));
        let after = u64::try_from(after).unwrap_or(0);
        self.bytes
            .set(self.bytes.get().saturating_sub(before_bytes) + after);
        let mut waiting = self.waiting.borrow_mut();
        let of = waiting.entry(target).or_default();
        of.bytes = of.bytes.saturating_sub(before_bytes) + after;
        if before.is_none() {
            of.oldest_ms = match of.count {
                0 => created_ms,
                _ => of.oldest_ms.min(created_ms),
            };
            of.count += 1;
        }
    }

    /// The look through the store has come to this record.
    fn found(&self, entry: &Entry) {
        let mut loading = self.loading.borrow_mut();
        if loading
            .as_mut()
            .is_some_and(|walk| walk.reached(entry.token, &entry.key))
            && entry.record.kind == Kind::Value
            && let Some(stored) = Stored::read(&entry.key, &entry.record.value)
        {
            let len = entry.record.value.len();
            self.clock_ms(stored.created_ms);
            self.changed(stored.target, None, len, stored.created_ms);
        }
    }

    fn removed(&self, target: SlotId, len: usize) {
        let len = u64::try_from(len).unwrap_or(0);
        self.bytes.set(self.bytes.get().saturating_sub(len));
        let mut waiting = self.waiting.borrow_mut();
        if let Some(of) = waiting.get_mut(&target) {
            of.bytes = of.bytes.saturating_sub(len);
            of.count = of.count.saturating_sub(1);
            if of.count == 0 {
                waiting.remove(&target);
            }
        }
    }

    fn found_oldest(&self, target: SlotId, oldest_ms: u64) {
        if let Some(of) = self.waiting.borrow_mut().get_mut(&target) {
            of.oldest_ms = of.oldest_ms.max(oldest_ms);
        }
    }

    fn targets(&self) -> Vec<SlotId> {
        self.waiting.borrow().keys().copied().collect()
    }
}

/// What a hint's record says.
struct Stored {
    target: SlotId,
    tree: TreeId,
    key: Bytes,
    is_counted: bool,
    created_ms: u64,
    epoch: u64,
    state: Bytes,
}

impl Stored {
    /// `None` when the bytes are not a hint's: a defect, or a later version's.
    fn read(key: &Bytes, value: &Bytes) -> Option<Self> {
        let (target, rest) = key.split_first_chunk::<4>()?;
        let (tree, _) = rest.split_first_chunk::<4>()?;
        let (&[version, flags], rest) = value.split_first_chunk::<2>()?;
        let (created_ms, rest) = rest.split_first_chunk::<8>()?;
        let (epoch, _) = rest.split_first_chunk::<8>()?;
        (version == VERSION).then(|| Self {
            target: SlotId(u32::from_be_bytes(*target)),
            tree: TreeId(u32::from_be_bytes(*tree)),
            key: key.slice(KEY_HEADER_BYTES..),
            is_counted: flags & COUNTED != 0,
            created_ms: u64::from_le_bytes(*created_ms),
            epoch: u64::from_le_bytes(*epoch),
            state: value.slice(HEADER_BYTES..),
        })
    }
}

fn record_key(target: SlotId, tree: TreeId, key: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(KEY_HEADER_BYTES + key.len());
    bytes.extend_from_slice(&target.0.to_be_bytes());
    bytes.extend_from_slice(&tree.0.to_be_bytes());
    bytes.extend_from_slice(key);
    bytes
}

/// The token of the key that a hint's own key names; `None` when it is malformed.
pub(crate) fn token_of_key(record_key: &[u8]) -> Option<Token> {
    let (_, rest) = record_key.split_first_chunk::<4>()?;
    let (tree, key) = rest.split_first_chunk::<4>()?;
    Some(Token::of(TreeId(u32::from_be_bytes(*tree)), key))
}

/// The state that a hint keeps; `None` when it is malformed.
pub(crate) fn state_of<'a>(record_key: &[u8], value: &'a [u8]) -> Option<&'a [u8]> {
    let is_known = record_key.len() >= KEY_HEADER_BYTES && value.first() == Some(&VERSION);
    value.get(HEADER_BYTES..).filter(|_| is_known)
}

/// Two hints of one key for one target as one; `None` when one of them cannot be read.
pub(crate) fn joined(record_key: &Bytes, one: &Record, other: &Record) -> Option<Record> {
    let one = Stored::read(record_key, &one.value)?;
    let other = Stored::read(record_key, &other.value)?;
    let state = merged(&one.state, &other.state, Conflict::Siblings).ok()?;
    Some(record(
        one.is_counted || other.is_counted,
        one.created_ms.min(other.created_ms),
        one.epoch.max(other.epoch),
        &state,
    ))
}

fn record(is_counted: bool, created_ms: u64, epoch: u64, state: &[u8]) -> Record {
    let mut value = Vec::with_capacity(HEADER_BYTES + state.len());
    value.extend_from_slice(&[VERSION, if is_counted { COUNTED } else { 0 }]);
    value.extend_from_slice(&created_ms.to_le_bytes());
    value.extend_from_slice(&epoch.to_le_bytes());
    value.extend_from_slice(state);
    Record {
        kind: Kind::Value,
        stamp: 0,
        expires_at_ms: 0,
        value: Bytes::from(value),
    }
}

/// Keeps a hint that counts for nothing; drops it when there is no room.
pub(crate) async fn store_uncounted<E: Env>(core: &Core<E>, hint: Hint<'_>) {
    let (tree, token) = (hint.tree, Token::of(hint.tree, hint.key));
    let kept = if core.hints.has_room(hint.key.len() + hint.state.len()) {
        store(core, hint, false).await
    } else {
        Err(Failure::refused(
            FailureCode::Overloaded,
            "no room for another hint",
        ))
    };
    if let Err(error) = kept {
        core.count(Counter::HintsDropped);
        core.repairs.mark(tree, token);
        tracing::debug!(%error, "a hint is not kept");
    }
}

/// Keeps a hint that counts as an ack; durable on return.
///
/// # Errors
/// Refused when there is no room: then it must not count.
pub(crate) async fn store_counted<E: Env>(core: &Core<E>, hint: Hint<'_>) -> Result<(), Failure> {
    if !core.hints.has_room(hint.key.len() + hint.state.len()) {
        return Err(Failure::refused(
            FailureCode::Overloaded,
            "no room for another hint",
        ));
    }
    store(core, hint, true).await
}

async fn store<E: Env>(core: &Core<E>, hint: Hint<'_>, is_counted: bool) -> Result<(), Failure> {
    let key = record_key(hint.target, hint.tree, hint.key);
    let token = Token::of(tree::HINTS, &key);
    let now_ms = core.hints.clock_ms(core.now_ms());
    let conflict = conflict_of(core, hint.tree);
    let (result, ticket) = core
        .store
        .update(tree::HINTS, token, &key, |stored| {
            let old = stored
                .filter(|record| record.kind == Kind::Value)
                .and_then(|record| {
                    let key = Bytes::copy_from_slice(&key);
                    Some((Stored::read(&key, &record.value)?, record.value.len()))
                });
            let Some((old, old_len)) = old else {
                let record = record(is_counted, now_ms, hint.epoch.0, hint.state);
                let change = (None, record.value.len(), now_ms);
                return Decision::Write(record, Ok(change));
            };
            match merged(&old.state, hint.state, conflict) {
                Ok(state) => {
                    let counted = is_counted || old.is_counted;
                    let record = record(counted, old.created_ms, hint.epoch.0, &state);
                    let change = (Some(old_len), record.value.len(), old.created_ms);
                    Decision::Write(record, Ok(change))
                }
                Err(failure) => Decision::Keep(Err(failure)),
            }
        })
        .await
        .map_err(|error| write_failure(&error))?;
    // Only now: the store may refuse what was decided. Nothing waits between the decision and this
    // line.
    let (before, after, created_ms) = result?;
    core.hints
        .stored(hint.target, (token, &key), before, after, created_ms);
    core.count(Counter::HintsStored);
    ticket.wait().await.map_err(|error| write_failure(&error))
}

fn merged(old: &Bytes, new: &Bytes, conflict: Conflict) -> Result<Bytes, Failure> {
    if old == new {
        return Ok(new.clone());
    }
    let unreadable = |error| Failure::refused(FailureCode::Unreadable, error);
    let old = State::decode(old).map_err(unreadable)?;
    let new = State::decode(new).map_err(unreadable)?;
    let merged = old
        .merge(&new, conflict)
        .map_err(|clash| Failure::refused(FailureCode::DotClash, clash))?;
    Ok(merged.encode())
}

fn conflict_of<E: Env>(core: &Core<E>, tree: TreeId) -> Conflict {
    let Ok(view) = core.view() else {
        return Conflict::Siblings;
    };
    crate::target::keyspace_index(&view, tree).map_or(Conflict::Siblings, |index| {
        view.topology.keyspaces[index].conflict
    })
}

/// Counts what an earlier run has left, before [`replay`]. After a failure it goes on where it was.
pub(crate) async fn load<E: Env>(core: &Core<E>) -> Result<(), Failure> {
    loop {
        let Some(from) = core.hints.loading.borrow().as_ref().map(Walk::next) else {
            return Ok(());
        };
        let page = core
            .store
            .scan(tree::HINTS, from, Token::MAX, PAGE)
            .await
            .map_err(|error| replica::read_failure(&error))?;
        for entry in &page.entries {
            core.hints.found(entry);
        }
        if page.next.is_none() {
            core.hints.loading.replace(None);
        }
        core.env.give_way().await;
    }
}

async fn load_all<E: Env>(core: &Core<E>) {
    while let Err(error) = load(core).await {
        tracing::warn!(%error, "the hints cannot be read");
        core.env.sleep(core.hints.options.interval).await;
    }
}

/// Delivers hints for as long as the shard runs.
pub(crate) async fn replay<E: Env>(core: Rc<Core<E>>) {
    // What lies here is deleted for good once it is delivered.
    core.store
        .set_purge_floors(tree::HINTS, PurgeFloors::everywhere(u64::MAX));
    load_all(&core).await;
    loop {
        core.env.sleep(core.hints.options.interval).await;
        // Not while a pass takes them out of the books one by one.
        if core.hints.are_wrong.take() {
            core.hints.begin_anew();
            load_all(&core).await;
        }
        let Ok(view) = core.view() else { continue };
        // A target that has left the topology has owners in its place.
        let is_ready = |slot: &SlotId| match view.topology.index_of_slot(*slot) {
            Some(member) => view.is_up(member) && view.topology.member(member).node.is_some(),
            None => true,
        };
        let ready: Vec<SlotId> = core.hints.targets().into_iter().filter(is_ready).collect();
        let is_aged = core
            .hints
            .oldest_ms()
            .is_some_and(|oldest_ms| is_too_old(&core, oldest_ms));
        if !ready.is_empty() || is_aged {
            pass(&core, &ready).await;
        }
    }
}

fn is_too_old<E: Env>(core: &Core<E>, created_ms: u64) -> bool {
    let age_max = u64::try_from(core.hints.options.age_max.as_millis()).unwrap_or(u64::MAX);
    core.now_ms().saturating_sub(created_ms) > age_max
}

/// Goes through all hints once: delivers those for `ready`, drops those too old.
async fn pass<E: Env>(core: &Rc<Core<E>>, ready: &[SlotId]) {
    let mut oldest: BTreeMap<SlotId, u64> = BTreeMap::new();
    let mut failed: Vec<SlotId> = Vec::new();
    let started_ms = core.hints.clock_ms(core.now_ms());
    let mut from = ScanFrom::Token(Token(0));
    loop {
        let page = match core.store.scan(tree::HINTS, from, Token::MAX, PAGE).await {
            Ok(page) => page,
            Err(error) => {
                tracing::warn!(%error, "the hints cannot be read");
                return;
            }
        };
        for entry in page.entries {
            if entry.record.kind != Kind::Value {
                continue;
            }
            let Some(stored) = Stored::read(&entry.key, &entry.record.value) else {
                continue;
            };
            let is_wanted = ready.contains(&stored.target) && !failed.contains(&stored.target);
            let is_gone = if is_wanted {
                let delivered = match mutation::on("hint_deleted_before_ack") {
                    true => Ok(()),
                    false => deliver(core, &entry, &stored).await,
                };
                match delivered {
                    Ok(()) => remove(core, &entry, stored.target, Counter::HintsReplayed).await,
                    Err(error) => {
                        tracing::debug!(%error, target_slot = %stored.target, "a hint waits on");
                        failed.push(stored.target);
                        false
                    }
                }
            } else if !stored.is_counted && is_too_old(core, stored.created_ms) {
                let token = Token::of(stored.tree, &stored.key);
                core.repairs.mark(stored.tree, token);
                remove(core, &entry, stored.target, Counter::HintsDropped).await
            } else {
                false
            };
            if !is_gone {
                let known = oldest.entry(stored.target).or_insert(u64::MAX);
                *known = (*known).min(stored.created_ms);
            }
        }
        match page.next {
            Some(next) => from = next,
            None => break,
        }
        core.env.give_way().await;
    }
    for target in core.hints.targets() {
        // Hints stored during the pass may have been missed: they are not older than its start.
        let found = oldest.get(&target).copied().unwrap_or(u64::MAX);
        core.hints.found_oldest(target, found.min(started_ms));
    }
}

/// Brings a hint's state to its target, or to the owners that have taken its place.
async fn deliver<E: Env>(
    core: &Rc<Core<E>>,
    entry: &Entry,
    stored: &Stored,
) -> Result<(), Failure> {
    let view = core.view()?;
    if crate::target::keyspace_index(&view, stored.tree).is_none() {
        // Dropped, or not known here yet.
        return if stored.epoch <= view.topology.epoch.0 {
            Ok(())
        } else {
            Err(Failure::refused(FailureCode::NotReady, "an older topology"))
        };
    }
    let target = Target::in_tree(view, stored.tree, &stored.key)?;
    let named = target.view.topology.index_of_slot(stored.target);
    let owners: Vec<MemberIndex> = match named.filter(|named| target.replicas.contains(*named)) {
        Some(named) => vec![named],
        None => target.replicas.as_slice().to_vec(),
    };
    let deadline = core.env.now() + DELIVERY_TIMEOUT;
    let message = core.encode(
        &target,
        core.next_request(),
        deadline,
        Body::Merge {
            tree: stored.tree.0,
            key: &stored.key,
            state: &stored.state,
        },
    );
    for owner in owners {
        if Some(owner) == target.view.me && core.owns(&target) {
            let conflict = target.keyspace().conflict;
            replica::merge_durably(
                core,
                stored.tree,
                target.token,
                &stored.key,
                &stored.state,
                conflict,
            )
            .await?;
            continue;
        }
        let Some(address) = target.address(owner) else {
            return Err(Failure::refused(
                FailureCode::QuorumNotMet,
                "an owner's slot is unclaimed",
            ));
        };
        let answer = core
            .env
            .call(address, Class::Repair, message.clone(), deadline)
            .await
            .map_err(crate::coordinator::spread::call_failure)?;
        let response = Response::access(&answer)
            .map_err(|error| Failure::refused(FailureCode::Internal, error))?;
        match &response.answer {
            ArchivedAnswer::Acked => {}
            other => return Err(failure_of(other)),
        }
    }
    throttle(core, entry.record.value.len()).await;
    Ok(())
}

async fn throttle<E: Env>(core: &Core<E>, bytes: usize) {
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
    let rate = core.hints.options.replay_bytes_per_second.max(1);
    let nanos = bytes.saturating_mul(1_000_000_000) / rate;
    if nanos > 0 {
        core.env.sleep(Duration::from_nanos(nanos)).await;
    }
}

/// Deletes a hint unless it has changed. Returns whether it is gone.
async fn remove<E: Env>(core: &Core<E>, entry: &Entry, target: SlotId, why: Counter) -> bool {
    let removed = core
        .store
        .update(tree::HINTS, entry.token, &entry.key, |stored| {
            let is_same = stored.is_some_and(|record| {
                record.kind == Kind::Value && record.value == entry.record.value
            });
            if !is_same {
                return Decision::Keep(false);
            }
            let tombstone = Record {
                kind: Kind::Tombstone,
                stamp: 0,
                expires_at_ms: 0,
                value: Bytes::new(),
            };
            Decision::Write(tombstone, true)
        })
        .await;
    match removed {
        Ok((true, _)) => {
            core.hints.removed(target, entry.record.value.len());
            core.count(why);
            true
        }
        Ok((false, _)) => false,
        Err(error) => {
            tracing::debug!(%error, "a hint is not deleted yet");
            false
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Token, key and record of a hint for `key` with a state of so many bytes.
    pub(crate) fn stored_hint(key: &str, bytes: usize) -> (Token, Vec<u8>, Record) {
        let key = record_key(TARGET, TreeId(1), key.as_bytes());
        let record = record(false, 7, 1, &vec![7; bytes]);
        (Token::of(tree::HINTS, &key), key, record)
    }

    const TARGET: SlotId = SlotId(3);

    fn entry(key: &'static str) -> Entry {
        let key = record_key(TARGET, TreeId(1), key.as_bytes());
        Entry {
            token: Token::of(tree::HINTS, &key),
            key: key.into(),
            seqno: 1,
            record: record(false, 7, 1, b"state"),
        }
    }

    fn store(hints: &Hints, entry: &Entry, is_there: bool) {
        let len = entry.record.value.len();
        let key = (entry.token, entry.key.as_ref());
        hints.stored(TARGET, key, is_there.then_some(len), len, 7);
    }

    #[test]
    fn no_bytes_make_a_hint_panic() {
        let key = record_key(TARGET, TreeId(1), b"key");
        let value = record(true, 7, 1, b"state").value;
        let valid = [key, value.to_vec()];
        crate::fuzz::parser("hint", &valid).fuzz(|bytes| {
            let bytes = Bytes::copy_from_slice(bytes);
            token_of_key(&bytes);
            let hint = Record {
                value: bytes.clone(),
                ..record(false, 7, 1, b"")
            };
            for key in [&bytes, &Bytes::copy_from_slice(&valid[0])] {
                if let Some(stored) = Stored::read(key, &bytes) {
                    assert!(stored.key.len() + stored.state.len() < key.len() + bytes.len());
                }
                drop(joined(key, &hint, &hint));
            }
        });
    }

    #[test]
    fn a_hint_stored_while_the_store_is_looked_through_counts_once() {
        let mut entries = ["a", "b", "c", "d", "e"].map(entry);
        entries.sort_by(|a, b| (a.token, &a.key).cmp(&(b.token, &b.key)));
        for stored_before in 0..=entries.len() {
            for is_there in [false, true] {
                let hints = Hints::new(HintOptions::default());
                for (index, entry) in entries.iter().enumerate() {
                    if index == stored_before {
                        // All of them: what is behind, what is ahead.
                        for (place, entry) in entries.iter().enumerate() {
                            store(&hints, entry, is_there || place < stored_before);
                        }
                    }
                    hints.found(entry);
                }
                let bytes = entries
                    .iter()
                    .map(|entry| entry.record.value.len())
                    .sum::<usize>();
                assert_eq!(
                    hints.waiting(),
                    (5, u64::try_from(bytes).unwrap()),
                    "stored before record {stored_before}"
                );
            }
        }
    }
}
