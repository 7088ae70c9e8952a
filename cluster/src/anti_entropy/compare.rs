//! Compares one run of the ring with one peer and exchanges what differs.
//!
//! On the path of repair: sums of the whole run first; where they differ, of sixteenths, down to
//! single leaves; of a leaf that differs, the hashes of its records; of a record that differs, both
//! sides' states, merged.
//!
//! Invariants: whole states are exchanged, never values without their context; what the peer has
//! purged on a floor that holds here too is not brought back.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream;
use torc_engine::ScanFrom;
use torc_env::{Address, Class, Env, Token, TokenRange};

use super::local::{self, HASHES_MAX, INTERVALS_MAX, part_of};
use crate::api::{Failure, FailureCode};
use crate::conflict::Conflict;
use crate::coordinator::get::unreadable;
use crate::coordinator::spread::call_failure;
use crate::core::Core;
use crate::hlc::stamp_millis;
use crate::membership::View;
use crate::merkle::{Leaf, hour_of, leaf_of};
use crate::message::{ArchivedAnswer, Body, Request, Response, failure_of, slice_of};
use crate::metrics::Counter;
use crate::replica;
use crate::run::Run;
use crate::target::{Target, keyspace_index};
use crate::version::State;

/// Time that one question may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Parts into which an interval that differs is cut.
const FAN_OUT: u32 = 16;
/// Records exchanged at the same time.
const IN_FLIGHT_MAX: usize = 16;
/// Leaves of which a range may have a part only.
const ENDS: usize = 2;

/// Who learns from whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Each from the other.
    Both,
    /// Only this node: it is not an owner yet, or has lost what it had.
    Pull,
}

/// What a comparison was worth. As far as it says nothing else, both sides hold, or this side holds, what either had when
/// it began.
#[derive(Debug)]
pub(crate) struct Compared {
    /// The peer lacked nothing that it should have. Where it did, the same sums say nothing.
    pub(crate) is_whole: bool,
    /// Where one of the two could not read what it has.
    pub(crate) unreadable: Vec<TokenRange>,
}

impl Compared {
    /// That nothing was left out and the peer has all that it should.
    pub(crate) fn is_all(&self) -> bool {
        self.is_whole && self.unreadable.is_empty()
    }
}

/// One comparison.
pub(crate) struct Comparison<'a, E: Env> {
    core: &'a Rc<Core<E>>,
    view: &'a Rc<View>,
    run: Run,
    peer: Address,
    direction: Direction,
    conflict: Conflict,
    /// What this shard may have purged.
    own_floor_hour: u32,
}

impl<'a, E: Env> Comparison<'a, E> {
    pub(crate) fn new(
        core: &'a Rc<Core<E>>,
        view: &'a Rc<View>,
        run: Run,
        peer: Address,
        direction: Direction,
    ) -> Self {
        let conflict = keyspace_index(view, run.tree).map_or(Conflict::Siblings, |index| {
            view.topology.keyspaces[index].conflict
        });
        Self {
            own_floor_hour: core.repairs.floor_hour(run.tree, run.range),
            core,
            view,
            run,
            peer,
            direction,
            conflict,
        }
    }

    /// Compares. Leaves that one of the two cannot read are left out.
    ///
    /// # Errors
    /// Where nothing can be said of some leaves: the peer does not answer, or knows other owners.
    pub(crate) async fn run(&self) -> Result<Compared, Failure> {
        let range = self.run.range;
        let mut open = vec![(leaf_of(range.first), leaf_of(range.last))];
        let mut differing = Vec::new();
        let mut floor_hour = self.own_floor_hour;
        let mut is_whole = true;
        let mut unreadable = Vec::new();
        let mut together = INTERVALS_MAX;
        while !open.is_empty() {
            let batch: Vec<(u32, u32)> = open.split_off(open.len().saturating_sub(together));
            let (theirs, ours, is_peer_whole) = match self.sums(&mut floor_hour, &batch).await {
                Err(failure) if failure.code == FailureCode::Unreadable => {
                    // To sum up the leaves at the ends of the range, their records are read.
                    match batch[..] {
                        [(leaf, last)] if leaf == last => {
                            if unreadable.len() == ENDS {
                                return Err(failure);
                            }
                            unreadable.push(part_of(leaf, range));
                        }
                        [(first, last)] => open.extend(split(first, last)),
                        _ => {
                            together = 1;
                            open.extend(batch);
                        }
                    }
                    continue;
                }
                asked => asked?,
            };
            is_whole &= is_peer_whole;
            for ((interval, ours), theirs) in batch.into_iter().zip(ours).zip(theirs) {
                if ours == theirs {
                    continue;
                }
                match interval {
                    (first, last) if first == last => differing.push(first),
                    (first, last) => open.extend(split(first, last)),
                }
            }
            self.core.env.give_way().await;
        }
        differing.sort_unstable();
        for leaf in differing {
            let part = part_of(leaf, range);
            match self.exchange_leaf(part, floor_hour).await {
                Err(failure) if failure.code == FailureCode::Unreadable => unreadable.push(part),
                done => done?,
            }
        }
        Ok(Compared {
            is_whole,
            unreadable,
        })
    }

    /// The sums of the other side, those of this one, and whether the other side is whole.
    async fn sums(
        &self,
        floor_hour: &mut u32,
        intervals: &[(u32, u32)],
    ) -> Result<(Vec<u128>, Vec<u128>, bool), Failure> {
        let (their_floor_hour, theirs, is_whole) = self.their_sums(*floor_hour, intervals).await?;
        self.check_clock(their_floor_hour)?;
        let agreed = their_floor_hour.min(*floor_hour);
        *floor_hour = agreed;
        let (tree, range) = (self.run.tree, self.run.range);
        let ours = local::sums(self.core, tree, range, agreed, intervals).await?;
        Ok((theirs, ours, is_whole))
    }

    /// Who is fetching its data was not asked when the others raised their floors. Before it mints beside them it must be
    /// past these, or they would forget at once what is deleted through it.
    ///
    /// # Errors
    /// While its clock is behind.
    fn check_clock(&self, their_floor_hour: u32) -> Result<(), Failure> {
        if self.direction == Direction::Both {
            return Ok(());
        }
        let promised = self.core.clock.promise(self.core.env.wall());
        if hour_of(stamp_millis(promised)) < their_floor_hour {
            let why = "this node's clock is behind the deletions that others have forgotten";
            return Err(Failure::refused(FailureCode::ClockSkew, why));
        }
        Ok(())
    }

    async fn their_sums(
        &self,
        floor_hour: u32,
        intervals: &[(u32, u32)],
    ) -> Result<(u32, Vec<u128>, bool), Failure> {
        let body = Body::Sums {
            tree: self.run.tree.0,
            first: self.run.range.first.0,
            last: self.run.range.last.0,
            floor_hour,
            leaves: intervals.to_vec(),
        };
        let answer = self.ask(self.run.owners, body).await?;
        let response = Response::access(&answer).map_err(unreadable)?;
        match &response.answer {
            ArchivedAnswer::Sums {
                floor_hour,
                sums,
                is_whole,
            } if sums.len() == intervals.len() => Ok((
                floor_hour.to_native(),
                sums.iter().map(|sum| sum.to_native()).collect(),
                *is_whole,
            )),
            other => Err(failure_of(other)),
        }
    }

    async fn exchange_leaf(&self, part: TokenRange, floor_hour: u32) -> Result<(), Failure> {
        let theirs = self.their_hashes(part, floor_hour).await?;
        let ours = self.our_hashes(part, floor_hour).await?;
        let mut differing: Vec<(Bytes, bool, bool)> = Vec::new();
        for (key, hash) in &theirs {
            match ours.get(key) {
                Some(own) if own == hash => {}
                own => differing.push((key.clone(), true, own.is_some())),
            }
        }
        if self.direction == Direction::Both {
            for key in ours.keys().filter(|key| !theirs.contains_key(*key)) {
                differing.push((key.clone(), false, true));
            }
        }
        let results: Vec<Result<(), Failure>> = stream::iter(differing)
            .map(|(key, is_theirs, is_ours)| self.exchange(key, is_theirs, is_ours))
            .buffer_unordered(IN_FLIGHT_MAX)
            .collect()
            .await;
        results.into_iter().collect()
    }

    async fn their_hashes(
        &self,
        part: TokenRange,
        floor_hour: u32,
    ) -> Result<BTreeMap<Bytes, u128>, Failure> {
        let mut found = BTreeMap::new();
        let mut first = part.first;
        let mut after: Option<Bytes> = None;
        loop {
            let body = Body::Hashes {
                tree: self.run.tree.0,
                first: first.0,
                after: after.as_deref(),
                last: part.last.0,
                floor_hour,
                records: HASHES_MAX,
            };
            let answer = self.ask(self.run.owners, body).await?;
            let response = Response::access(&answer).map_err(unreadable)?;
            let ArchivedAnswer::Hashes { entries, looked } = &response.answer else {
                return Err(failure_of(&response.answer));
            };
            for entry in entries.iter() {
                found.insert(slice_of(&answer, &entry.key), entry.hash.to_native());
            }
            match looked.as_ref() {
                None => return Ok(found),
                Some(looked) => {
                    first = Token(looked.0.to_native());
                    after = Some(slice_of(&answer, &looked.1));
                }
            }
        }
    }

    async fn our_hashes(
        &self,
        part: TokenRange,
        floor_hour: u32,
    ) -> Result<BTreeMap<Bytes, u128>, Failure> {
        let mut found = BTreeMap::new();
        let mut from = ScanFrom::Token(part.first);
        loop {
            let page = local::hashes(
                self.core,
                self.run.tree,
                from,
                part.last,
                floor_hour,
                HASHES_MAX,
            )
            .await?;
            found.extend(page.entries);
            match page.looked {
                None => return Ok(found),
                Some((token, key)) => from = ScanFrom::After(token, key),
            }
            self.core.env.give_way().await;
        }
    }

    /// Brings both sides of one record together.
    async fn exchange(&self, key: Bytes, is_theirs: bool, is_ours: bool) -> Result<(), Failure> {
        let target = Target::in_tree(Rc::clone(self.view), self.run.tree, &key)?;
        let theirs = if is_theirs {
            self.fetch(&target, &key).await?
        } else {
            Bytes::new()
        };
        // What is dead, old and no longer here was purged here: it is not taken back.
        let is_wanted = is_ours || !self.is_purged_here(&key, &theirs);
        if !theirs.is_empty() && is_wanted {
            let (tree, token) = (self.run.tree, target.token);
            replica::merge_durably(self.core, tree, token, &key, &theirs, self.conflict).await?;
            self.core.count(Counter::RecordsReceived);
            self.throttle(theirs.len()).await;
        }
        if self.direction == Direction::Both && is_ours {
            let ours = replica::read(self.core, self.run.tree, target.token, &key).await?;
            if !ours.is_empty() && ours != theirs {
                self.give(&target, &key, &ours).await?;
                self.core.count(Counter::RecordsSent);
                self.throttle(ours.len()).await;
            }
        }
        Ok(())
    }

    async fn fetch(&self, target: &Target, key: &Bytes) -> Result<Bytes, Failure> {
        let body = Body::Read {
            tree: self.run.tree.0,
            key,
            known: None,
            is_repair: true,
        };
        let answer = self.ask(target.owners(), body).await?;
        let response = Response::access(&answer).map_err(unreadable)?;
        match &response.answer {
            ArchivedAnswer::State { state } => Ok(slice_of(&answer, state)),
            other => Err(failure_of(other)),
        }
    }

    async fn give(&self, target: &Target, key: &Bytes, state: &Bytes) -> Result<(), Failure> {
        let body = Body::Merge {
            tree: self.run.tree.0,
            key,
            state,
        };
        let answer = self.ask(target.owners(), body).await?;
        let response = Response::access(&answer).map_err(unreadable)?;
        match &response.answer {
            ArchivedAnswer::Acked => Ok(()),
            other => Err(failure_of(other)),
        }
    }

    /// Whether a state is dead and so old that this shard may have purged it.
    fn is_purged_here(&self, key: &Bytes, state: &Bytes) -> bool {
        let Ok(state) = State::decode(state) else {
            return false;
        };
        Leaf::of(key, &state.to_record()).is_some_and(|leaf| !leaf.counts(self.own_floor_hour))
    }

    async fn ask(&self, owners: u64, body: Body<'_>) -> Result<Bytes, Failure> {
        let deadline = self.core.env.now() + CALL_TIMEOUT;
        let message = Request {
            id: self.core.next_request(),
            remaining_ms: self.core.remaining_ms(deadline),
            epoch: self.view.topology.epoch.0,
            owners,
            body,
        }
        .encode();
        self.core
            .env
            .call(self.peer, Class::Repair, message, deadline)
            .await
            .map_err(call_failure)
    }

    async fn throttle(&self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        let rate = self.core.options.repair.bytes_per_second.max(1);
        let nanos = bytes.saturating_mul(1_000_000_000) / rate;
        if nanos > 0 {
            self.core.env.sleep(Duration::from_nanos(nanos)).await;
        }
    }
}

/// The parts of an interval of more than one leaf.
fn split(first: u32, last: u32) -> impl Iterator<Item = (u32, u32)> {
    let step = (last - first + 1).div_ceil(FAN_OUT);
    (first..=last)
        .step_by(usize::try_from(step).unwrap_or(1))
        .map(move |start| (start, last.min(start + step - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_interval_without_overlap() {
        for (first, last) in [(0, 1), (0, 15), (0, 16), (5, 1000), (0, 65_535)] {
            let parts: Vec<_> = split(first, last).collect();
            assert!(parts.len() <= 16 && parts.len() >= 2);
            assert_eq!(parts[0].0, first);
            assert_eq!(parts[parts.len() - 1].1, last);
            assert!(parts.windows(2).all(|pair| pair[0].1 + 1 == pair[1].0));
        }
    }
}
