//! Damage that costs a shard something: cut out where others can make it good, and else left to the operator.
//!
//! Not on a request's path: a part of [`catch_up`](super::catch_up). A loss can be **made good** where fewer than a majority of a
//! token's owners have lost what they had there, this one and those that are silent included: every write that a quorum
//! took is then with one of the rest. With one copy it never can, of two or three copies one may be lost, of five two.
//! The others are asked what they have lost, and not what they hold: that they hold nothing may be right.
//!
//! - Damage that a running shard meets stays as it is, and its keys unknown, until enough other owners have answered
//!   that it can be made good; then it is cut out. What is cut out is gone, so nothing is on a mere suspicion.
//! - What a start has lost (a table that cannot be opened, damage in the log), or was cut out before, is fetched; and
//!   then looked at again, piece by piece. Where it can not be made good, its keys stay unknown.
//! - Whatever stays is listed ([`parts`]) until somebody accepts it ([`accept`]). An accepted loss is cut out, fetched from
//!   those owners that are up, and forgotten.
//!
//! An owner that catches up for another reason has lost nothing through damage: it is waited for where its data
//! is needed. What it cannot make good, since others have lost it, it has lost itself when it is done ([`settle`]): it has
//! no other word for what it may never have had. So two owners of which each would vouch for the other do not.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use torc_engine::{Damage, Loss};
use torc_env::{Address, Class, Env, Instant, Token, TokenRange, TreeId, mutation};

use super::catch_up::{Pulled, Pulls, caught_up, pull_readable};
use super::{build_missing_sums, check_current, not_yet, own_runs};
use crate::api::{DamagedPart, Failure, Outlook};
use crate::coordinator::get::unreadable;
use crate::coordinator::spread::call_failure;
use crate::core::Core;
use crate::keyspace::REPLICAS_MAX;
use crate::lacking::Cuts;
use crate::membership::View;
use crate::message::{ArchivedAnswer, Body, Request, Response, failure_of, range_of};
use crate::own_trees;
use crate::redistribute::is_divided;
use crate::replica::write_failure;
use crate::run::{Run, within, without};

/// How long an owner may take to say what it has lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long what could not be made good waits for the next look, unless something changes here.
const RETRY: Duration = Duration::from_secs(2);
/// Ranges of one answer. More of them are called everything that was asked about.
const RANGES_MAX: usize = 4_096;

/// Damage, or what it has cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    tree: Option<TreeId>,
    range: TokenRange,
    /// The table, as long as it is not cut out.
    file_id: Option<u64>,
    is_accepted: bool,
}

impl Part {
    fn of_damage(damage: &Damage) -> Self {
        Self {
            tree: Some(damage.tree),
            range: damage.range,
            file_id: Some(damage.file_id),
            is_accepted: false,
        }
    }

    fn of_loss(loss: &Loss) -> Self {
        Self {
            tree: loss.tree,
            range: loss.range,
            file_id: None,
            is_accepted: loss.is_accepted,
        }
    }

    fn in_run(&self, run: &Run) -> Option<TokenRange> {
        let is_meant = self.tree.is_none_or(|tree| tree == run.tree);
        self.range.intersection(&run.range).filter(|_| is_meant)
    }
}

/// What was found when damage was last looked at.
#[derive(Debug, Default)]
pub(crate) struct Looked {
    /// What is not cut out yet.
    damages: Seen,
    /// What is.
    lost: Seen,
    /// An operator was told that something waits for one.
    is_told: bool,
}

#[derive(Debug, Default)]
struct Seen {
    parts: Vec<(Part, Outlook, String)>,
    again_at: Option<Instant>,
}

impl Seen {
    /// Whether it is time to look at these parts: they are others than before, or it is long ago.
    fn is_due(&self, parts: &[Part], now: Instant) -> bool {
        let is_early = self.again_at.is_some_and(|at| now < at);
        let known = self.parts.iter().map(|(part, ..)| part);
        !is_early || !known.eq(parts)
    }

    fn waiting(&self) -> usize {
        let parts = self.parts.iter();
        parts
            .filter(|(_, outlook, _)| *outlook == Outlook::Lost)
            .count()
    }
}

/// What is damaged and not cut out.
fn damages<E: Env>(core: &Core<E>) -> Vec<Part> {
    let damages = core.store.damages();
    let damages = damages.iter().filter(|damage| is_divided(damage.tree));
    damages.map(Part::of_damage).collect()
}

/// What is lost and not accepted.
fn open_losses<E: Env>(core: &Core<E>) -> Vec<Part> {
    let lost = core.lacking.lost();
    let open = lost.iter().filter(|loss| !loss.is_accepted);
    open.map(Part::of_loss).collect()
}

/// What damage has cost this shard and nobody has made good yet, and what becomes of it.
pub(crate) fn parts<E: Env>(core: &Core<E>) -> Vec<DamagedPart> {
    let view = core.view().ok();
    let looked = core.looked.borrow();
    let name = |tree: TreeId| {
        let view = view.as_ref()?;
        let mut keyspaces = view.topology.keyspaces.iter();
        let of_tree = keyspaces.find(|keyspace| keyspace.id == tree)?;
        Some(of_tree.name.clone())
    };
    let lost = core.lacking.lost();
    let lost = lost.iter().map(Part::of_loss);
    let described = damages(core).into_iter().chain(lost).map(|part| {
        let mut known = looked.damages.parts.iter().chain(&looked.lost.parts);
        let known = known.find(|(known, ..)| *known == part);
        let (outlook, why) = match known {
            _ if part.is_accepted => (
                Outlook::Accepted,
                "the loss is accepted; owners that are up are asked for what they have".to_owned(),
            ),
            Some((_, outlook, why)) => (*outlook, why.clone()),
            None => (
                Outlook::Unknown,
                "the other owners have not been asked yet".to_owned(),
            ),
        };
        DamagedPart {
            keyspace: part.tree.map(|tree| {
                let dropped = || format!("(dropped: {})", tree.0);
                name(tree).unwrap_or_else(dropped)
            }),
            range: part.range,
            file_id: part.file_id,
            outlook,
            why,
        }
    });
    described.collect()
}

/// Parts that wait for somebody to accept that they are lost.
pub(crate) fn waiting<E: Env>(core: &Core<E>) -> u64 {
    let looked = core.looked.borrow();
    let count = looked.damages.waiting() + looked.lost.waiting();
    u64::try_from(count).unwrap_or(u64::MAX)
}

/// What an owner says that it lacks of a run.
#[derive(Debug)]
struct Lacks {
    ranges: Vec<TokenRange>,
    is_catching_up: bool,
}

impl Lacks {
    fn is_in(&self, range: TokenRange) -> bool {
        let mut ranges = self.ranges.iter();
        self.is_catching_up || ranges.any(|of| of.intersection(&range).is_some())
    }
}

/// Another owner of a run. The slot of a member that has never been there holds nothing, and no quorum had an ack of it.
#[derive(Debug)]
struct Other {
    name: String,
    /// `None` of one that is silent.
    lacks: Option<Lacks>,
}

/// Some of the other owners of a run, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owners(u16);

const _: () = assert!(REPLICAS_MAX <= 16, "an owner has a bit");

/// One run, and what its other owners say.
#[derive(Debug)]
struct Surveyed {
    run: Run,
    others: Vec<Other>,
    silent: Owners,
    catching_up: Owners,
    /// The run in pieces, ascending: all tokens of one have been lost by the same owners.
    pieces: Vec<(TokenRange, Owners)>,
}

/// What the other owners of all runs that matter have said.
#[derive(Debug)]
struct Survey(Vec<Surveyed>);

impl Survey {
    /// Asks the other owners of those runs that matter. Where they have been pulled from, as `pulls` says, that counts too.
    async fn of<E: Env>(
        core: &Core<E>,
        view: &Rc<View>,
        matters: impl Fn(&Run) -> bool,
        pulls: Option<&Pulls>,
    ) -> Self {
        let mut survey = Vec::new();
        let runs = own_runs(view, core.slice()).into_iter();
        for run in runs.filter(matters) {
            let mut others = Vec::new();
            for member in run.replicas.as_slice() {
                let Some(address) = run.address(view, *member) else {
                    continue;
                };
                if Some(*member) == view.me {
                    continue;
                }
                let lacks = if view.is_up(*member) {
                    ask(core, view, &run, address).await.ok()
                } else {
                    None
                };
                let lacks = match pulls {
                    None => lacks,
                    Some(pulls) => lacks.and_then(|lacks| after(lacks, pulls.of(&run, *member))),
                };
                others.push(Other {
                    name: view.topology.member(*member).description.name.clone(),
                    lacks,
                });
            }
            survey.push(Surveyed::new(run, others));
        }
        Self(survey)
    }

    /// What becomes of a part, and why.
    fn outlook(&self, part: &Part) -> (Outlook, String) {
        let runs = self.0.iter();
        let found = runs.filter_map(|of| Some(of.outlook(part.in_run(&of.run)?)));
        found
            .max_by_key(|(outlook, _)| *outlook)
            .unwrap_or_else(|| (Outlook::Healing, "nobody needs it here".to_owned()))
    }

    fn is_anybody_silent(&self) -> bool {
        self.0.iter().any(|of| of.silent != Owners::default())
    }
}

/// What an owner lacks that was pulled from before it was asked. One from which nothing came is as good as silent.
fn after(mut lacks: Lacks, pulled: Option<&Pulled>) -> Option<Lacks> {
    let Pulled::Range(range, compared) = pulled? else {
        return None;
    };
    if !compared.is_whole && !lacks.is_in(*range) {
        // It has got something since.
        return None;
    }
    lacks.ranges.extend(&compared.unreadable);
    Some(lacks)
}

impl Surveyed {
    fn new(run: Run, others: Vec<Other>) -> Self {
        let those = |is_one: fn(&Other) -> bool| {
            let bits = others.iter().enumerate().filter(|(_, other)| is_one(other));
            Owners(bits.fold(0, |all, (at, _)| all | 1 << at))
        };
        let silent = those(|other| other.lacks.is_none());
        let catching_up = those(|other| {
            other
                .lacks
                .as_ref()
                .is_some_and(|lacks| lacks.is_catching_up)
        });
        // Where one begins, or ends, to be among those who have lost it.
        let mut turns = BTreeMap::from([(run.range.first, 0u16)]);
        for (at, other) in others.iter().enumerate() {
            let lost = other.lacks.iter().flat_map(|lacks| &lacks.ranges).copied();
            for range in within(run.range, lost.collect()) {
                *turns.entry(range.first).or_default() ^= 1 << at;
                if range.last < run.range.last {
                    *turns.entry(Token(range.last.0 + 1)).or_default() ^= 1 << at;
                }
            }
        }
        let ends = turns.keys().skip(1).map(|next| Token(next.0 - 1));
        let ends = ends.chain([run.range.last]);
        let mut lost_by = 0;
        let pieces = turns.iter().zip(ends).map(|((first, turned), last)| {
            lost_by ^= turned;
            let first = *first;
            (TokenRange { first, last }, Owners(lost_by))
        });
        Self {
            pieces: pieces.collect(),
            run,
            silent,
            catching_up,
            others,
        }
    }

    /// The pieces of a part of the run.
    fn pieces(&self, part: TokenRange) -> impl Iterator<Item = (TokenRange, Owners)> {
        let before = self
            .pieces
            .partition_point(|(range, _)| range.last < part.first);
        let pieces = self.pieces[before..].iter();
        pieces.map_while(move |(range, lost_by)| Some((range.intersection(&part)?, *lost_by)))
    }

    /// What becomes of what this shard lacks where these have lost it too.
    fn outlook_where(&self, lost_by: Owners) -> Outlook {
        let majority = self.run.replicas.as_slice().len() / 2 + 1;
        // What a quorum took is with others than these, and this one.
        let is_enough = |owners: u16| 1 + owners.count_ones() as usize >= majority;
        let lost_or_silent = lost_by.0 | self.silent.0;
        if is_enough(lost_by.0) {
            Outlook::Lost
        } else if is_enough(lost_or_silent) {
            Outlook::Silent
        } else if is_enough(lost_or_silent | self.catching_up.0) {
            Outlook::CatchingUp
        } else {
            Outlook::Healing
        }
    }

    /// `lost`: what this shard lacks of the run.
    fn outlook(&self, lost: TokenRange) -> (Outlook, String) {
        let pieces = self.pieces(lost);
        let found = pieces.map(|(_, lost_by)| (self.outlook_where(lost_by), lost_by));
        let worst = found.max_by_key(|(outlook, lost_by)| (*outlook, lost_by.0.count_ones()));
        let (outlook, lost_by) = worst.unwrap_or((Outlook::Healing, Owners::default()));
        let copies = self.run.replicas.as_slice().len();
        let why = match outlook {
            Outlook::Lost if lost_by == Owners::default() => {
                format!("no other node has a copy (n = {copies})")
            }
            Outlook::Lost => {
                format!(
                    "{} has lost it too (of {copies} copies)",
                    self.names(lost_by)
                )
            }
            Outlook::Silent => {
                format!(
                    "{} does not answer and may have it",
                    self.names(self.silent)
                )
            }
            Outlook::CatchingUp => {
                let names = self.names(self.catching_up);
                format!("{names} is still fetching its data")
            }
            _ => "other copies are good; it is fetched from them".to_owned(),
        };
        (outlook, why)
    }

    fn names(&self, owners: Owners) -> String {
        let others = self.others.iter().enumerate();
        let meant = others.filter(|(at, _)| owners.0 & 1 << at != 0);
        let names: Vec<&str> = meant.map(|(_, other)| other.name.as_str()).collect();
        names.join(", ")
    }

    /// Where nobody can make good what this shard lacks in `lost`.
    fn stuck(&self, lost: TokenRange) -> impl Iterator<Item = (TokenRange, Owners)> {
        let pieces = self.pieces(lost);
        pieces.filter(|(_, lost_by)| self.outlook_where(*lost_by) > Outlook::Healing)
    }
}

async fn ask<E: Env>(
    core: &Core<E>,
    view: &View,
    run: &Run,
    address: Address,
) -> Result<Lacks, Failure> {
    let deadline = core.env.now() + ANSWER_TIMEOUT;
    let message = Request {
        id: core.next_request(),
        remaining_ms: core.remaining_ms(deadline),
        epoch: view.topology.epoch.0,
        owners: run.owners,
        body: Body::Lacks {
            tree: run.tree.0,
            first: run.range.first.0,
            last: run.range.last.0,
        },
    }
    .encode();
    let call = core.env.call(address, Class::Repair, message, deadline);
    let answer = call.await.map_err(call_failure)?;
    let response = Response::access(&answer).map_err(unreadable)?;
    match &response.answer {
        ArchivedAnswer::Lacks {
            ranges,
            is_catching_up,
        } => Ok(Lacks {
            ranges: ranges
                .iter()
                .map(|range| range_of(&range.0, &range.1))
                .collect(),
            is_catching_up: *is_catching_up,
        }),
        other => Err(failure_of(other)),
    }
}

/// What this shard tells another owner that it has lost in `range`, as first and last tokens.
pub(crate) fn lacks<E: Env>(core: &Core<E>, tree: TreeId, range: TokenRange) -> Vec<(u128, u128)> {
    let ranges = core.lacking.lost_in(&core.store.damages(), tree, range);
    if ranges.len() > RANGES_MAX {
        return vec![(range.first.0, range.last.0)];
    }
    let ranges = ranges.iter().map(|range| (range.first.0, range.last.0));
    ranges.collect()
}

/// Looks at the damage that is not cut out yet, and cuts out what others can make good.
pub(crate) async fn cut_out<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>) -> Result<(), Failure> {
    let parts = damages(core);
    if !core.looked.borrow().damages.is_due(&parts, core.env.now()) {
        return Ok(());
    }
    let survey = look(core, view, &parts, |looked| &mut looked.damages).await;
    let can_go = |damage: &Damage| {
        let part = Part::of_damage(damage);
        let (outlook, _) = survey.outlook(&part);
        parts.contains(&part)
            && (outlook == Outlook::Healing || mutation::on("damage_is_cut_unasked"))
    };
    if !core.store.damages().iter().any(can_go) {
        return Ok(());
    }
    let _turn = core.lacking.turn().await;
    cut(core, can_go).await
}

/// Whether there is anything to look at.
pub(crate) fn has_damage<E: Env>(core: &Core<E>) -> bool {
    // What was seen and is gone is seen to be gone.
    core.has_damage(is_divided) || !core.looked.borrow().damages.parts.is_empty()
}

/// Cuts out the damage that is meant. The caller has the [`turn`](crate::lacking::Lacking::turn).
async fn cut<E: Env>(core: &Core<E>, is_meant: impl Fn(&Damage) -> bool) -> Result<(), Failure> {
    // What was minted under the old name may be in what is lost.
    let renewed = core.options.identity.renewed(core.env.random());
    core.actor.set(renewed.actor());
    // Nothing of it is called absent while the cut is under way, and nothing else is cut, whatever is found meanwhile.
    let mut damages = core.store.damages();
    damages.retain(is_meant);
    let at_most = damages.iter().map(|damage| Loss {
        tree: Some(damage.tree),
        range: damage.range,
        is_accepted: false,
    });
    core.lacking
        .lose(core.lacking.lost().into_iter().chain(at_most).collect());
    let lost = core.store.quarantine(&damages).await;
    let lost = lost.map_err(|error| write_failure(&error))?;
    core.lacking.lose(core.store.losses());
    for damage in &damages {
        core.sums.borrow_mut().forget(damage.tree);
    }
    tracing::warn!(
        shard = %core.env.shard(),
        parts = lost.len(),
        "damaged parts of tables are cut out and fetched from the replicas"
    );
    Ok(())
}

/// Fetches what was lost from the other owners.
pub(crate) async fn heal<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>) -> Result<(), Failure> {
    let open = open_losses(core);
    if !core.looked.borrow().lost.is_due(&open, core.env.now()) {
        return Ok(());
    }
    let cuts = core.lacking.cuts();
    let pulls = fetch(core, view).await;
    check_current(core, view)?;
    settle(core, view, cuts, &pulls).await
}

/// Asks the other owners about what is lost, for whoever wants to know what becomes of it.
pub(crate) async fn look_at_lost<E: Env>(core: &Core<E>, view: &Rc<View>) {
    let open = open_losses(core);
    if core.looked.borrow().lost.is_due(&open, core.env.now()) {
        look(core, view, &open, |looked| &mut looked.lost).await;
    }
}

/// Compares what is lost with its other owners, as far as they are up.
async fn fetch<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>) -> Pulls {
    build_missing_sums(core, view).await;
    let lost = core.lacking.lost();
    let parts: Vec<Part> = lost.iter().map(Part::of_loss).collect();
    let mut pulls = Pulls::default();
    for run in own_runs(view, core.slice()) {
        let of_run = parts.iter().filter_map(|part| part.in_run(&run));
        let of_run: Vec<TokenRange> = of_run.collect();
        let first = of_run.iter().map(|range| range.first).min();
        let last = of_run.iter().map(|range| range.last).max();
        let (Some(first), Some(last)) = (first, last) else {
            continue;
        };
        let piece = Run {
            range: TokenRange { first, last },
            ..run
        };
        for member in run.replicas.as_slice() {
            let address = piece.address(view, *member);
            let is_asked = view.is_up(*member) && Some(*member) != view.me;
            if let Some(address) = address.filter(|_| is_asked) {
                let pulled = pull_readable(core, view, piece, address).await;
                pulls.note(&run, *member, piece.range, pulled);
            }
        }
    }
    pulls
}

/// After this shard has compared, since it had `cuts`, all that it lacks with those who should have it: what cannot be
/// made good stays lost, and nothing else lacks any more.
///
/// A shard that was catching up may never have had what others have lost. Where they and it are too many, that is lost
/// here as well: it would have made up for what they have lost, and it cannot.
pub(crate) async fn settle<E: Env>(
    core: &Rc<Core<E>>,
    view: &Rc<View>,
    cuts: Cuts,
    pulls: &Pulls,
) -> Result<(), Failure> {
    let is_catching_up = core.lacking.is_catching_up();
    let lost = core.lacking.lost();
    let parts: Vec<Part> = lost.iter().map(Part::of_loss).collect();
    let matters = |run: &Run| is_catching_up || parts.iter().any(|part| part.in_run(run).is_some());
    let survey = Survey::of(core, view, matters, Some(pulls)).await;
    if is_catching_up && survey.is_anybody_silent() {
        return Err(not_yet("an owner of a range does not say what it lacks"));
    }
    let _turn = core.lacking.turn().await;
    if core.lacking.cuts() != cuts {
        return Err(not_yet("more was lost meanwhile"));
    }
    let left = left(core, &survey, pulls);
    // First what is lost: without it a restart would take the shard for one that has everything else.
    let known: Vec<Loss> = own_trees::losses(core)
        .chain(left.iter().copied())
        .collect();
    let said = core.store.set_losses(&known).await;
    said.map_err(|error| write_failure(&error))?;
    if is_catching_up {
        caught_up(core).await?;
    }
    if left.is_empty() {
        tracing::info!(shard = %core.env.shard(), "this shard has all its data");
    }
    core.lacking.found(left);
    note(core, &survey, &open_losses(core), |looked| &mut looked.lost);
    own_trees::made_good(core).await
}

/// What is not made good of what this shard has lost, or would have to have.
fn left<E: Env>(core: &Core<E>, survey: &Survey, pulls: &Pulls) -> Vec<Loss> {
    // Now, since some may have been accepted meanwhile.
    let (accepted, open): (Vec<Loss>, Vec<Loss>) = core
        .lacking
        .lost()
        .into_iter()
        .partition(|loss| loss.is_accepted);
    let damages = core.store.damages();
    let mut left = Vec::new();
    for of in &survey.0 {
        let (tree, run) = (of.run.tree, of.run.range);
        let in_run = |losses: &[Loss]| {
            let losses = losses.iter().map(Part::of_loss);
            let ranges = losses.filter_map(|part| part.in_run(&of.run));
            within(run, ranges.collect())
        };
        let (accepted, open) = (in_run(&accepted), in_run(&open));
        // What is damaged and not cut out was left out.
        let skipped = damages.iter().filter(|damage| damage.tree == tree);
        let skipped: Vec<TokenRange> = skipped.map(|damage| damage.range).collect();
        let skipped_of = |ranges: &[TokenRange]| {
            let each = ranges.iter().map(|range| within(*range, skipped.clone()));
            each.flatten().collect::<Vec<TokenRange>>()
        };
        let mut open_left = skipped_of(&open);
        let stuck = open.iter().flat_map(|range| of.stuck(*range));
        open_left.extend(stuck.map(|(range, _)| range));
        if core.lacking.is_catching_up() {
            let others = without(run, accepted.clone()).into_iter();
            let stuck = others.flat_map(|range| of.stuck(range));
            let lost_by_some = stuck.filter(|(_, lost_by)| *lost_by != Owners::default());
            open_left.extend(lost_by_some.map(|(range, _)| range));
        }
        let accepted_left = if pulls.has_failed(&of.run) {
            accepted
        } else {
            skipped_of(&accepted)
        };
        if mutation::on("damage_is_cut_unasked") {
            open_left.clear();
        }
        for (ranges, is_accepted) in [(open_left, false), (accepted_left, true)] {
            left.extend(within(run, ranges).into_iter().map(|range| Loss {
                tree: Some(tree),
                range,
                is_accepted,
            }));
        }
    }
    left
}

/// Says that what damage has cost until now may stay lost: what is not cut out yet is. Durable on return. Returns
/// what it was.
pub(crate) async fn accept<E: Env>(core: &Rc<Core<E>>) -> Result<Vec<DamagedPart>, Failure> {
    let _turn = core.lacking.turn().await;
    let accepted = parts(core).into_iter();
    let accepted: Vec<DamagedPart> = accepted
        .filter(|part| part.outlook != Outlook::Accepted)
        .collect();
    if accepted.is_empty() {
        return Ok(accepted);
    }
    if core.has_damage(is_divided) {
        cut(core, |damage| is_divided(damage.tree)).await?;
    }
    let losses = core.store.losses().into_iter().map(|loss| Loss {
        is_accepted: true,
        ..loss
    });
    let losses: Vec<Loss> = losses.collect();
    let done = core.store.set_losses(&losses).await;
    done.map_err(|error| write_failure(&error))?;
    core.lacking.know(core.store.losses());
    *core.looked.borrow_mut() = Looked::default();
    tracing::warn!(
        shard = %core.env.shard(),
        parts = accepted.len(),
        "an operator has accepted that what is lost through damage stays lost where no other owner has it"
    );
    Ok(accepted)
}

/// Asks the other owners about these parts, and keeps what they say where `place` says.
async fn look<E: Env>(
    core: &Core<E>,
    view: &Rc<View>,
    parts: &[Part],
    place: impl FnOnce(&mut Looked) -> &mut Seen,
) -> Survey {
    let matters = |run: &Run| parts.iter().any(|part| part.in_run(run).is_some());
    let survey = Survey::of(core, view, matters, None).await;
    note(core, &survey, parts, place);
    survey
}

/// Keeps what a survey says of these parts where `place` says. Tells the operator, once, when something begins to wait for
/// one.
fn note<E: Env>(
    core: &Core<E>,
    survey: &Survey,
    parts: &[Part],
    place: impl FnOnce(&mut Looked) -> &mut Seen,
) {
    let mut looked = core.looked.borrow_mut();
    let seen = parts.iter().map(|part| {
        let (outlook, why) = survey.outlook(part);
        (*part, outlook, why)
    });
    *place(&mut looked) = Seen {
        parts: seen.collect(),
        again_at: Some(core.env.now() + RETRY),
    };
    let mut all = looked.damages.parts.iter().chain(&looked.lost.parts);
    let waits = all.find(|(_, outlook, _)| *outlook == Outlook::Lost);
    if let Some((_, _, why)) = waits.filter(|_| !looked.is_told) {
        tracing::error!(
            shard = %core.env.shard(),
            "damage has cost data that other nodes cannot make good ({why}): its keys cannot be read until the loss is \
             accepted; see `torc damage`"
        );
    }
    let is_told = waits.is_some();
    looked.is_told = is_told;
}
