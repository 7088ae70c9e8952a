//! Lists keys, page by page, in ring order.
//!
//! On the path: [`Node::scan`](crate::node::Node::scan) → here → a page of R replicas of each run of
//! the ring → merged by key → answer with a cursor.
//!
//! Invariants: a key that R replicas agree to be live is listed once, whatever node continues with
//! the cursor; a page is bounded in entries, bytes and time, and may therefore be short or even
//! empty and still go on.
//!
//! It repairs nothing, and promises nothing about keys written while the scan runs.

use std::collections::BTreeMap;
use std::pin::pin;
use std::rc::Rc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::{FutureExt as _, LocalBoxFuture};
use futures_util::stream::FuturesUnordered;
use torc_engine::{ScanFrom, ScanLimits};
use torc_env::{Class, Env, ShardId, Token, TokenRange, TreeId};

use crate::api::{
    Failure, FailureCode, KEY_BYTES_MAX, SCAN_LIMIT_MAX, ScanAnswer, ScanEntry, ScanRequest,
    Sibling,
};
use crate::conflict::Conflict;
use crate::coordinator::get::unreadable;
use crate::coordinator::spread::call_failure;
use crate::core::{Core, deadline_passed};
use crate::membership::View;
use crate::message::{
    Answer, ArchivedAnswer, ArchivedBody, ArchivedRequest, Body, PageEntry, Request, Response,
    failure_of, slice_of,
};
use crate::quorum::{Requirement, Tracker, Verdict};
use crate::replica::read_failure;
use crate::ring::MemberIndex;
use crate::run::Run;
use crate::target::{Replicas, keyspace_index};
use crate::version::State;

/// Bytes of one replica's page: bounds the memory of both sides.
const PAGE_BYTES_MAX: usize = 1 << 20;
/// Records of one replica's page.
const PAGE_RECORDS_MAX: u32 = 1_024;
/// Bytes of one answer: a client that asked for 10,000 values of 1 MiB gets short pages. One more entry fits into a frame
/// of 8 MiB then.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// What an entry or a sibling takes in an answer beside key and values, at most but for the contexts of keys that many have
/// written.
const ENTRY_BYTES: usize = 256;
/// Runs that one request goes through, so that a scan of an empty ring of many ranges, or one
/// whose prefix fits nothing, answers in bounded time.
const RUNS_MAX: usize = 4_096;

/// Where a scan goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cursor {
    tree: TreeId,
    from: ScanFrom,
}

const CURSOR_VERSION: u8 = 1;
const CURSOR_SEED: u64 = 0x746f_7263_2d63_7572;
const CURSOR_CHARS_MAX: usize = 2 * (KEY_BYTES_MAX + 64);

impl Cursor {
    /// `version u8 │ tree u32 │ has key u8 │ token u128 │ key │ check u64`, as base64url.
    fn to_opaque(&self) -> String {
        let mut content = vec![CURSOR_VERSION];
        content.extend_from_slice(&self.tree.0.to_le_bytes());
        let (has_key, token, key) = match &self.from {
            ScanFrom::Token(token) => (0, *token, &[][..]),
            ScanFrom::After(token, key) => (1, *token, &key[..]),
        };
        content.push(has_key);
        content.extend_from_slice(&token.0.to_le_bytes());
        content.extend_from_slice(key);
        let check = xxhash_rust::xxh3::xxh3_64_with_seed(&content, CURSOR_SEED);
        content.extend_from_slice(&check.to_le_bytes());
        URL_SAFE_NO_PAD.encode(content)
    }

    fn from_opaque(string: &str) -> Option<Self> {
        if string.len() > CURSOR_CHARS_MAX {
            return None;
        }
        let content = URL_SAFE_NO_PAD.decode(string).ok()?;
        let (checked, check) = content.split_last_chunk::<8>()?;
        if xxhash_rust::xxh3::xxh3_64_with_seed(checked, CURSOR_SEED) != u64::from_le_bytes(*check)
        {
            return None;
        }
        let (&[version], rest) = checked.split_first_chunk::<1>()?;
        let (tree, rest) = rest.split_first_chunk::<4>()?;
        let (&[has_key], rest) = rest.split_first_chunk::<1>()?;
        let (token, key) = rest.split_first_chunk::<16>()?;
        let token = Token(u128::from_le_bytes(*token));
        let from = match (version, has_key) {
            (CURSOR_VERSION, 0) if key.is_empty() => ScanFrom::Token(token),
            (CURSOR_VERSION, 1) => ScanFrom::After(token, Bytes::copy_from_slice(key)),
            _ => return None,
        };
        Some(Self {
            tree: TreeId(u32::from_le_bytes(*tree)),
            from,
        })
    }
}

/// Carries a scan out.
pub(crate) async fn scan<E: Env>(
    core: &Rc<Core<E>>,
    request: &ScanRequest,
) -> Result<ScanAnswer, Failure> {
    if request.limit == 0 || request.limit > SCAN_LIMIT_MAX {
        return Err(Failure::refused(
            FailureCode::InvalidRequest,
            format_args!("limit is 1 to {SCAN_LIMIT_MAX}, not {}", request.limit),
        ));
    }
    let view = core.view()?;
    let keyspace = view
        .topology
        .keyspaces
        .iter()
        .find(|known| known.name.as_bytes() == request.keyspace)
        .ok_or_else(|| Failure::refused(FailureCode::UnknownKeyspace, "no such keyspace"))?;
    let tree = keyspace.id;
    let from = match &request.cursor {
        None => ScanFrom::Token(Token(0)),
        Some(string) => match Cursor::from_opaque(string) {
            Some(cursor) if cursor.tree == tree => cursor.from,
            _ => {
                return Err(Failure::refused(
                    FailureCode::BadToken,
                    "not a cursor of this keyspace",
                ));
            }
        },
    };
    let mut scan = Scan {
        core,
        request,
        tree,
        conflict: keyspace.conflict,
        n: usize::from(view.topology.effective_n(keyspace)),
        view: Rc::clone(&view),
        entries: Vec::new(),
        bytes: 0,
        now_ms: core.now_ms(),
        id: core.next_request(),
    };
    let next = scan.run(from).await?;
    Ok(ScanAnswer {
        entries: scan.entries,
        cursor: next.map(|from| Cursor { tree, from }.to_opaque()),
    })
}

struct Scan<'a, E: Env> {
    core: &'a Rc<Core<E>>,
    request: &'a ScanRequest,
    tree: TreeId,
    conflict: Conflict,
    n: usize,
    view: Rc<View>,
    entries: Vec<ScanEntry>,
    bytes: usize,
    now_ms: u64,
    id: u64,
}

impl<E: Env> Scan<'_, E> {
    async fn run(&mut self, mut from: ScanFrom) -> Result<Option<ScanFrom>, Failure> {
        for _ in 0..RUNS_MAX {
            if self.is_full() {
                return Ok(Some(from));
            }
            let run = Run::at(&self.view, self.tree, self.n, from.token());
            let next = match self.pages(&run, &from).await {
                Ok(pages) => self.merge(pages, &run)?,
                // What was found so far is an answer; the rest has a cursor, and fails when it is asked for.
                Err(_) if !self.entries.is_empty() => return Ok(Some(from)),
                Err(failure) => return Err(failure),
            };
            from = match next {
                Some(next) => next,
                None if run.range.last == Token::MAX => return Ok(None),
                None => ScanFrom::Token(Token(run.range.last.0 + 1)),
            };
        }
        Ok(Some(from))
    }

    fn is_full(&self) -> bool {
        let limit = usize::try_from(self.request.limit).unwrap_or(usize::MAX);
        self.entries.len() >= limit || self.bytes >= ANSWER_BYTES_MAX
    }

    /// One page of each of enough replicas.
    async fn pages(&self, run: &Run, from: &ScanFrom) -> Result<Vec<Page>, Failure> {
        let order = self.order(&run.replicas);
        let requirement = self.requirement(&order)?;
        let mut tracker = Tracker::new(order.as_slice().iter().copied(), requirement, false);
        let mut events: FuturesUnordered<
            LocalBoxFuture<'static, (MemberIndex, Result<Page, Failure>)>,
        > = FuturesUnordered::new();
        let mut pages = Vec::new();
        for member in order.as_slice() {
            if !self.is_up(*member) {
                tracker.refused(*member);
            }
        }
        let mut refusal = None;
        let work = async {
            loop {
                while let Some(member) = tracker.next_idle() {
                    tracker.sent(member);
                    events.push(self.ask(member, run, from));
                }
                match tracker.verdict() {
                    Verdict::Waiting => {}
                    settled => return settled,
                }
                match events.next().await {
                    Some((member, Ok(page))) => {
                        pages.push(page);
                        tracker.acked(member);
                    }
                    Some((member, Err(failure))) => {
                        tracker.refused(member);
                        refusal = Some(failure);
                    }
                    None => return tracker.verdict_at_deadline(),
                }
            }
        };
        match self.core.until(self.request.deadline, pin!(work)).await {
            Some(Verdict::Done) => Ok(pages),
            Some(_) => Err(refusal.unwrap_or_else(|| {
                Failure::refused(
                    FailureCode::QuorumNotMet,
                    "too few replicas of a range answered",
                )
            })),
            None => Err(deadline_passed("enough replicas answered")),
        }
    }

    fn order(&self, replicas: &Replicas) -> Replicas {
        let mut order = *replicas;
        order.as_mut_slice().sort_by_key(|member| {
            let is_me = Some(*member) == self.view.me;
            (!is_me, !self.is_up(*member))
        });
        order
    }

    fn requirement(&self, order: &Replicas) -> Result<Requirement, Failure> {
        let places: Vec<&str> = order
            .as_slice()
            .iter()
            .map(|member| {
                let member = self.view.topology.member(*member);
                member.description.datacenter.as_str()
            })
            .collect();
        let local = self.view.me.map_or("", |me| {
            self.view
                .topology
                .member(me)
                .description
                .datacenter
                .as_str()
        });
        Requirement::of(self.request.r, &places, &local)
    }

    fn is_up(&self, member: MemberIndex) -> bool {
        Some(member) == self.view.me
            || (self.view.is_up(member) && self.view.topology.member(member).node.is_some())
    }

    fn ask(
        &self,
        member: MemberIndex,
        run: &Run,
        from: &ScanFrom,
    ) -> LocalBoxFuture<'static, (MemberIndex, Result<Page, Failure>)> {
        let ask = PageRequest {
            tree: self.tree,
            from: from.clone(),
            last: run.range.last,
            prefix: self.request.prefix.clone(),
            records: self.request.limit.min(PAGE_RECORDS_MAX),
        };
        let core = Rc::clone(self.core);
        let topology = &self.view.topology;
        let shards = topology.member(member).description.shards.max(1);
        let shard = from.token().shard(shards);
        if Some(member) == self.view.me && shard == core.env.shard() {
            return async move { (member, page_here(&core, &ask).await) }.boxed_local();
        }
        let address = if Some(member) == self.view.me {
            Some(core.own_shard(shard))
        } else {
            topology.member(member).shard_address(ShardId(shard.0))
        };
        let (id, epoch, owners) = (self.id, topology.epoch.0, run.owners);
        let deadline = self.request.deadline;
        async move {
            let Some(address) = address else {
                let failure = Failure::refused(FailureCode::QuorumNotMet, "an unclaimed slot");
                return (member, Err(failure));
            };
            let message = ask.encode(id, core.remaining_ms(deadline), epoch, owners);
            let answer = core
                .env
                .call(address, Class::Replication, message, deadline)
                .await
                .map_err(call_failure);
            (member, answer.and_then(|bytes| Page::read(&bytes)))
        }
        .boxed_local()
    }

    /// Merges pages of one run key by key; returns where it goes on within the run.
    fn merge(&mut self, pages: Vec<Page>, run: &Run) -> Result<Option<ScanFrom>, Failure> {
        // A page that ends early says nothing about what lies behind its end.
        let horizon: Option<(Token, Bytes)> =
            pages.iter().filter_map(|page| page.looked.clone()).min();
        let mut states: BTreeMap<(Token, Bytes), State> = BTreeMap::new();
        for page in pages {
            for (key, state) in page.entries {
                let token = Token::of(self.tree, &key);
                let is_sure = horizon
                    .as_ref()
                    .is_none_or(|(last, last_key)| (token, &key) <= (*last, last_key));
                if !is_sure || token > run.range.last {
                    continue;
                }
                let state = State::decode(&state).map_err(unreadable)?;
                let merged = match states.get(&(token, key.clone())) {
                    None => state,
                    Some(other) => other
                        .merge(&state, self.conflict)
                        .map_err(|clash| Failure::refused(FailureCode::DotClash, clash))?,
                };
                states.insert((token, key), merged);
            }
        }
        let mut done = None;
        for (place, state) in states {
            if self.is_full() {
                return Ok(done.map(|(token, key)| ScanFrom::After(token, key)));
            }
            self.list(&place.1, &state);
            done = Some(place);
        }
        Ok(horizon.map(|(token, key)| ScanFrom::After(token, key)))
    }

    /// Lists a key if a reader sees it.
    fn list(&mut self, key: &Bytes, state: &State) {
        if !state.has_live(self.now_ms) {
            return;
        }
        self.bytes += ENTRY_BYTES + key.len();
        let (siblings, context) = if self.request.values {
            let siblings: Vec<Sibling> = state
                .live(self.now_ms)
                .filter_map(|sibling| {
                    sibling.value.clone().map(|value| Sibling {
                        value,
                        expires_at_ms: sibling.expires_at_ms,
                    })
                })
                .collect();
            let values = siblings
                .iter()
                .map(|sibling| ENTRY_BYTES + sibling.value.len());
            self.bytes += values.sum::<usize>();
            (siblings, state.context().clone())
        } else {
            Default::default()
        };
        self.entries.push(ScanEntry {
            key: key.clone(),
            siblings,
            context,
        });
    }
}

/// What a replica is asked for.
struct PageRequest {
    tree: TreeId,
    from: ScanFrom,
    last: Token,
    prefix: Bytes,
    records: u32,
}

impl PageRequest {
    fn encode(&self, id: u64, remaining_ms: u32, epoch: u64, owners: u64) -> Bytes {
        let after = match &self.from {
            ScanFrom::Token(_) => None,
            ScanFrom::After(_, key) => Some(&key[..]),
        };
        Request {
            id,
            remaining_ms,
            epoch,
            owners,
            body: Body::Scan {
                tree: self.tree.0,
                first: self.from.token().0,
                after,
                last: self.last.0,
                prefix: &self.prefix,
                records: self.records,
            },
        }
        .encode()
    }
}

/// A replica's page.
pub(crate) struct Page {
    /// Keys and encoded states, tombstones included, in (token, key) order.
    entries: Vec<(Bytes, Bytes)>,
    /// Up to where it was looked, when that is not the end of the run.
    looked: Option<(Token, Bytes)>,
}

impl Page {
    pub(crate) fn answer(&self) -> Answer<'_> {
        Answer::Page {
            entries: self
                .entries
                .iter()
                .map(|(key, state)| PageEntry { key, state })
                .collect(),
            looked: self
                .looked
                .as_ref()
                .map(|(token, key)| (token.0, key.to_vec())),
        }
    }

    fn read(bytes: &Bytes) -> Result<Self, Failure> {
        let response = Response::access(bytes).map_err(unreadable)?;
        let ArchivedAnswer::Page { entries, looked } = &response.answer else {
            return Err(failure_of(&response.answer));
        };
        Ok(Self {
            entries: entries
                .iter()
                .map(|entry| (slice_of(bytes, &entry.key), slice_of(bytes, &entry.state)))
                .collect(),
            looked: looked
                .as_ref()
                .map(|looked| (Token(looked.0.to_native()), slice_of(bytes, &looked.1))),
        })
    }
}

/// Serves a page of this shard's keys; `None` when the sender knows other owners of the run.
pub(crate) async fn serve<E: Env>(
    core: &Core<E>,
    request: &ArchivedRequest<'_>,
) -> Result<Option<Page>, Failure> {
    let ArchivedBody::Scan {
        tree,
        first,
        after,
        last,
        prefix,
        records,
    } = &request.body
    else {
        return Err(Failure::refused(FailureCode::InvalidRequest, "not a scan"));
    };
    let view = core.view()?;
    let tree = TreeId(tree.to_native());
    let Some(index) = keyspace_index(&view, tree) else {
        return Ok(None);
    };
    let first = Token(first.to_native());
    let ask = PageRequest {
        tree,
        from: match after.as_ref() {
            None => ScanFrom::Token(first),
            Some(key) => ScanFrom::After(first, Bytes::copy_from_slice(key)),
        },
        last: Token(last.to_native()),
        prefix: Bytes::copy_from_slice(prefix),
        records: records.to_native().min(PAGE_RECORDS_MAX),
    };
    let n = usize::from(view.topology.effective_n(&view.topology.keyspaces[index]));
    let run = Run::at(&view, tree, n, first);
    let is_ours = view.me.is_some_and(|me| run.replicas.contains(me))
        && first.shard(core.env.shard_count()) == core.env.shard();
    if !is_ours || run.owners != request.owners.to_native() || run.range.last < ask.last {
        return Ok(None);
    }
    page_here(core, &ask).await.map(Some)
}

/// A page of this shard's keys, as far as it lacks none.
async fn page_here<E: Env>(core: &Core<E>, ask: &PageRequest) -> Result<Page, Failure> {
    let range = TokenRange {
        first: ask.from.token(),
        last: ask.last,
    };
    if !core.lacking.is_catching_up() {
        let lost = core.lacking.lost_in(&core.store.damages(), ask.tree, range);
        let first = lost.iter().map(|range| range.first).min();
        if let Some(first) = first.filter(|first| *first > range.first) {
            let page = page_to(core, ask, Token(first.0 - 1)).await?;
            // Without a key there is nowhere to go on from.
            if page.looked.is_some() {
                return Ok(page);
            }
        }
    }
    page_to(core, ask, ask.last).await
}

/// A page up to `last`, if this shard lacks no key up to there.
async fn page_to<E: Env>(core: &Core<E>, ask: &PageRequest, last: Token) -> Result<Page, Failure> {
    let range = TokenRange {
        first: ask.from.token(),
        last,
    };
    core.lacking.check_in(ask.tree, range)?;
    let limits = ScanLimits {
        records: usize::try_from(ask.records.max(1)).unwrap_or(usize::MAX),
        bytes: PAGE_BYTES_MAX,
    };
    let page = core
        .store
        .scan(ask.tree, ask.from.clone(), last, limits)
        .await
        .map_err(|error| read_failure(&error))?;
    // Damage may have been cut out meanwhile.
    core.lacking.check_in(ask.tree, range)?;
    let looked = (page.next.is_some() || last < ask.last)
        .then(|| page.entries.last())
        .flatten()
        .map(|entry| (entry.token, entry.key.clone()));
    Ok(Page {
        entries: page
            .entries
            .into_iter()
            .filter(|entry| entry.key.starts_with(&ask.prefix))
            .map(|entry| (entry.key, entry.record.value))
            .collect(),
        looked,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_comes_back_as_it_went() {
        for from in [
            ScanFrom::Token(Token(7)),
            ScanFrom::After(Token(u128::MAX), Bytes::from_static(b"key")),
            ScanFrom::After(Token(0), Bytes::new()),
        ] {
            let cursor = Cursor {
                tree: TreeId(3),
                from,
            };
            assert_eq!(Cursor::from_opaque(&cursor.to_opaque()), Some(cursor));
        }
    }

    #[test]
    fn a_changed_cursor_is_none() {
        let good = Cursor {
            tree: TreeId(3),
            from: ScanFrom::After(Token(9), Bytes::from_static(b"key")),
        }
        .to_opaque();
        for index in 0..good.len() {
            let mut bad = good.clone().into_bytes();
            bad[index] = if bad[index] == b'A' { b'B' } else { b'A' };
            let bad = String::from_utf8(bad).unwrap();
            assert_eq!(Cursor::from_opaque(&bad), None, "{bad}");
            assert_eq!(Cursor::from_opaque(&good[..index]), None);
        }
        assert_eq!(Cursor::from_opaque("not a cursor"), None);
    }
}
