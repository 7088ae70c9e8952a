//! Damage that costs a shard something: cut out where others can make it good, and else left to the operator.
//!
//! Not on a request's path: a part of [`catch_up`](super::catch_up). A loss can be **made good** where fewer than a majority of a
//! token's owners have lost what they had there, this one included: every write that a quorum took is then with one
//! of the rest. With one copy it never can, of two or three copies one may be lost, of five two. The others are asked
//! what they have lost, and not what they hold: that they hold nothing may be right.
//!
//! - Damage that a running shard meets stays as it is, and its keys unknown, until all other owners have answered
//!   and it can be made good; then it is cut out. What is cut out is gone, so nothing is on a mere suspicion.
//! - What a start has lost (a table that cannot be opened, damage in the log), or was cut out before, is fetched; and
//!   then looked at again. Where it can not be made good, its keys stay unknown.
//! - Whatever stays is listed ([`parts`]) until somebody accepts it ([`accept`]). An accepted loss is cut out, fetched from
//!   those owners that are up, and forgotten.
//!
//! An owner that catches up for another reason has lost nothing through damage: it is waited for where its data
//! is needed, and it does not need an operator.

use std::rc::Rc;
use std::time::Duration;

use torc_engine::{Damage, Loss};
use torc_env::{Address, Class, Env, Instant, Token, TokenRange, TreeId, mutation};

use super::catch_up::{lacks_nothing, pull_readable};
use super::{build_missing_sums, check_current, not_yet, own_runs};
use crate::api::{DamagedPart, Failure, Outlook};
use crate::coordinator::get::unreadable;
use crate::coordinator::spread::call_failure;
use crate::core::Core;
use crate::lacking::Cuts;
use crate::membership::View;
use crate::message::{ArchivedAnswer, Body, Request, Response, failure_of, range_of};
use crate::redistribute::is_divided;
use crate::replica::write_failure;
use crate::run::Run;

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

/// One run, and what its other owners say; `None` of one that is silent. The slot of a member that has never been there
/// holds nothing, and no quorum had an ack of it.
#[derive(Debug)]
struct Surveyed {
    run: Run,
    others: Vec<(String, Option<Lacks>)>,
}

/// What the other owners of all runs that matter have said.
#[derive(Debug)]
struct Survey(Vec<Surveyed>);

impl Survey {
    async fn of<E: Env>(core: &Core<E>, view: &Rc<View>, parts: &[Part]) -> Self {
        let mut survey = Vec::new();
        let runs = own_runs(view, core.slice()).into_iter();
        for run in runs.filter(|run| parts.iter().any(|part| part.in_run(run).is_some())) {
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
                let name = view.topology.member(*member).description.name.clone();
                others.push((name, lacks));
            }
            survey.push(Surveyed { run, others });
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

    /// What of a part is not made good by now.
    fn left(&self, part: &Part) -> Vec<Loss> {
        let runs = self.0.iter();
        let left = runs.filter_map(|of| {
            let range = part.in_run(&of.run)?;
            let (outlook, _) = of.outlook(range);
            (outlook > Outlook::Healing).then_some(Loss {
                tree: Some(of.run.tree),
                range,
                is_accepted: false,
            })
        });
        left.collect()
    }
}

impl Surveyed {
    /// `lost`: what this shard lacks of the run.
    fn outlook(&self, lost: TokenRange) -> (Outlook, String) {
        let owners = self.run.replicas.as_slice().len();
        let majority = owners / 2 + 1;
        let answers = self.others.iter();
        let answers: Vec<(&String, &Lacks)> = answers
            .filter_map(|(name, lacks)| Some((name, lacks.as_ref()?)))
            .collect();
        // The number of owners that lack a token grows where a range begins, and nowhere else.
        let ranges = answers.iter().flat_map(|(_, lacks)| &lacks.ranges);
        let begins = ranges.filter_map(|range| Some(range.intersection(&lost)?.first));
        let tokens = begins.chain([lost.first]);
        let has_lost =
            |lacks: &Lacks, token: Token| lacks.ranges.iter().any(|of| of.contains(token));
        let names_at = |token: Token, with_catching_up: bool| -> Vec<&str> {
            let lacking = answers.iter().filter(|(_, lacks)| {
                has_lost(lacks, token) || (with_catching_up && lacks.is_catching_up)
            });
            lacking.map(|(name, _)| name.as_str()).collect()
        };
        let tokens: Vec<Token> = tokens.collect();
        let most = |with_catching_up: bool| {
            let all = tokens
                .iter()
                .map(|token| names_at(*token, with_catching_up));
            all.max_by_key(Vec::len).unwrap_or_default()
        };
        let others = most(false);
        if 1 + others.len() >= majority {
            let why = match (owners, others.is_empty()) {
                (1, _) => "no other node has a copy (n = 1)".to_owned(),
                _ => format!("{} has lost it too (of {owners} copies)", others.join(", ")),
            };
            return (Outlook::Lost, why);
        }
        let silent = self.others.iter().filter(|(_, lacks)| lacks.is_none());
        let silent: Vec<&str> = silent.map(|(name, _)| name.as_str()).collect();
        if !silent.is_empty() {
            let why = format!("{} does not answer and may have it", silent.join(", "));
            return (Outlook::Silent, why);
        }
        let lacking = most(true);
        if 1 + lacking.len() >= majority {
            let why = format!("{} is still fetching its data", lacking.join(", "));
            return (Outlook::CatchingUp, why);
        }
        (
            Outlook::Healing,
            "other copies are good; it is fetched from them".to_owned(),
        )
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
            && (outlook <= Outlook::CatchingUp || mutation::on("damage_is_cut_unasked"))
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
    let before = core.lacking.lost();
    core.lacking
        .lose(before.iter().copied().chain(at_most).collect());
    let lost = core.store.quarantine(&damages).await;
    let lost = lost.map_err(|error| write_failure(&error))?;
    core.lacking.lose([before, lost.clone()].concat());
    core.sums.borrow_mut().forget_all();
    tracing::warn!(
        shard = %core.env.shard(),
        parts = lost.len(),
        "damaged parts of tables are cut out and fetched from the replicas"
    );
    Ok(())
}

/// Fetches what was lost from the other owners.
pub(crate) async fn heal<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>) -> Result<(), Failure> {
    let lost = core.lacking.lost();
    let parts: Vec<Part> = lost.iter().map(Part::of_loss).collect();
    if !core
        .looked
        .borrow()
        .lost
        .is_due(&open_losses(core), core.env.now())
    {
        return Ok(());
    }
    let cuts = core.lacking.cuts();
    match fetch(core, view, &parts).await {
        Ok(()) => settle(core, view, cuts).await,
        Err(error) => {
            look_at_lost(core, view).await;
            Err(error)
        }
    }
}

/// Asks the other owners about what is lost, for whoever wants to know what becomes of it.
pub(crate) async fn look_at_lost<E: Env>(core: &Core<E>, view: &Rc<View>) {
    let open = open_losses(core);
    if core.looked.borrow().lost.is_due(&open, core.env.now()) {
        look(core, view, &open, |looked| &mut looked.lost).await;
    }
}

/// Compares these parts with all their other owners. Of what may stay lost, with those that are up.
async fn fetch<E: Env>(core: &Rc<Core<E>>, view: &Rc<View>, parts: &[Part]) -> Result<(), Failure> {
    build_missing_sums(core, view).await;
    for run in own_runs(view, core.slice()) {
        let of_run = parts
            .iter()
            .filter_map(|part| Some((part, part.in_run(&run)?)));
        let of_run: Vec<(&Part, TokenRange)> = of_run.collect();
        let first = of_run.iter().map(|(_, range)| range.first).min();
        let last = of_run.iter().map(|(_, range)| range.last).max();
        let (Some(first), Some(last)) = (first, last) else {
            continue;
        };
        let all_accepted = of_run.iter().all(|(part, _)| part.is_accepted);
        let piece = Run {
            range: TokenRange { first, last },
            ..run
        };
        for member in run.replicas.as_slice() {
            let address = piece.address(view, *member);
            let address = address.filter(|_| Some(*member) != view.me);
            let Some(address) = address.filter(|_| view.is_up(*member) || !all_accepted) else {
                continue;
            };
            pull_readable(core, view, piece, address).await?;
        }
    }
    check_current(core, view)
}

/// After this shard has compared, since it had `cuts`, all that it lacks with all who should have it: what cannot be
/// made good stays lost, and nothing else lacks any more.
pub(crate) async fn settle<E: Env>(
    core: &Rc<Core<E>>,
    view: &Rc<View>,
    cuts: Cuts,
) -> Result<(), Failure> {
    let survey = look(core, view, &open_losses(core), |looked| &mut looked.lost).await;
    let _turn = core.lacking.turn().await;
    if core.lacking.cuts() != cuts {
        return Err(not_yet("more was lost meanwhile"));
    }
    // Once more, since some may have been accepted meanwhile.
    let lost = core.lacking.lost().into_iter();
    let open = lost.filter(|loss| !loss.is_accepted && !mutation::on("damage_is_cut_unasked"));
    let left: Vec<Loss> = open
        .flat_map(|loss| survey.left(&Part::of_loss(&loss)))
        .collect();
    if left.is_empty() {
        lacks_nothing(core).await?;
        core.looked.borrow_mut().lost = Seen::default();
    }
    core.lacking.found(left);
    Ok(())
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
    let done = core.store.accept_losses().await;
    done.map_err(|error| write_failure(&error))?;
    core.lacking.accept();
    *core.looked.borrow_mut() = Looked::default();
    tracing::warn!(
        shard = %core.env.shard(),
        parts = accepted.len(),
        "an operator has accepted that what is lost through damage stays lost where no other owner has it"
    );
    Ok(accepted)
}

/// Asks the other owners about these parts, and keeps what they say where `place` says. Tells the operator, once, when
/// something begins to wait for one.
async fn look<E: Env>(
    core: &Core<E>,
    view: &Rc<View>,
    parts: &[Part],
    place: impl FnOnce(&mut Looked) -> &mut Seen,
) -> Survey {
    let survey = Survey::of(core, view, parts).await;
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
    drop(looked);
    survey
}
