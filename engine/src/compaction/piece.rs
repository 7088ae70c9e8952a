//! Choosing the piece of the ring that one compaction merges.
//!
//! A piece begins where merging pays most, and ends where the inputs reach the limit of a job. Its
//! bytes are estimates, from the even spread of tokens.

use torc_env::{Token, TokenRange};

use super::{Plan, Settings, is_cut};
use crate::levels::{BOTTOM, Levels, Run, TableRef};

/// A piece may end this much below the limit: the search for its end stops there.
const SLACK: u64 = 16;

/// Merges a piece of `sources` with what `targets`, which are on level `output` and next in age, have
/// there, into the oldest of them. The piece begins at the first table of the output above which nearly as much lies, for its size, as anywhere: so
/// pieces go around the ring, and what a piece before has already taken is not looked for again.
pub(super) fn into_run(
    levels: &Levels,
    settings: &Settings,
    sources: &[Run],
    targets: &[Run],
    output: u8,
) -> Option<Plan> {
    let all = hull(sources)?;
    let bytes = |range: &TokenRange| bytes_of(sources, range) + bytes_of(targets, range);
    let whole = closed(all, targets);
    if bytes(&whole) <= settings.job_bytes_max {
        return plan(levels, sources, targets, whole, output);
    }
    let tables = || targets.iter().flat_map(|run| run.overlapping(all));
    let density_of = |table: &TableRef| density(bytes_of(sources, &table.extent), table.bytes());
    let most = tables().map(density_of).max().unwrap_or(0);
    let dense = tables().filter(|table| density_of(table) >= most - most / 4);
    let start = dense
        .map(|table| table.extent.first)
        .min()
        .unwrap_or(all.first);
    // Data before the first table of the output belongs to the first piece.
    let is_first = tables().all(|table| start <= table.extent.first);
    let first = first_data(sources, if is_first { all.first } else { start })?;
    let first = closed_in_front(first, targets, settings);
    let range = piece(first, whole.last, settings.job_bytes_max, targets, &bytes);
    plan(levels, sources, targets, range, output)
}

/// Merges a piece of `runs`, which are next to each other on one level, into the oldest of them.
pub(super) fn collapse(levels: &Levels, settings: &Settings, runs: &[Run]) -> Option<Plan> {
    let (oldest, newer) = runs.split_last()?;
    let oldest = std::slice::from_ref(oldest);
    into_run(levels, settings, newer, oldest, oldest[0].level)
}

/// What [`collapse`] has to merge, in bytes; zero for a single run.
pub(super) fn collapse_bytes(runs: &[Run]) -> u64 {
    match runs {
        [] | [_] => 0,
        several => bytes_of(several, &TokenRange::ALL),
    }
}

/// Merges a piece of `sources` into a run of level `output` that holds nothing there: the newest
/// one, or one that begins with this piece.
pub(super) fn new_run(
    levels: &Levels,
    settings: &Settings,
    sources: &[Run],
    output: u8,
) -> Option<Plan> {
    let all = hull(sources)?;
    let newest = levels.level(output).first();
    let bytes = |range: &TokenRange| bytes_of(sources, range);
    let range = if bytes(&all) <= settings.job_bytes_max {
        all
    } else {
        let deepest = deepest(sources, newest)?;
        let in_front = TokenRange {
            first: all.first,
            last: deepest,
        };
        // The runs do not begin at quite the same token; nothing small is left in front.
        let is_small = bytes(&in_front) <= settings.job_bytes_max / SLACK;
        let first = if is_small { all.first } else { deepest };
        let limit = even_share(bytes(&all), settings.job_bytes_max);
        piece(first, all.last, limit, &[], &bytes)
    };
    Some(into_newest(levels, sources, range, output))
}

/// As [`new_run`], of what lies at `from` or behind it.
pub(super) fn new_run_from(
    levels: &Levels,
    settings: &Settings,
    sources: &[Run],
    from: Token,
    output: u8,
) -> Option<Plan> {
    let first = first_data(sources, from)?;
    let last = hull(sources)?.last;
    let bytes = |range: &TokenRange| bytes_of(sources, range);
    let range = piece(first, last, settings.job_bytes_max, &[], &bytes);
    Some(into_newest(levels, sources, range, output))
}

/// The plan whose output joins the newest run of level `output` if that has nothing in `range` and is
/// not being merged itself, and begins one otherwise.
fn into_newest(levels: &Levels, sources: &[Run], range: TokenRange, output: u8) -> Plan {
    let newest = levels.level(output).first();
    let joined = newest.filter(|run| run.overlapping(range).is_empty() && !is_cut(run));
    Plan::new(levels, range, sources, output, joined.map(|run| run.id))
}

/// Merges one table of a leveled run into the next level: the one with the fewest bytes in its way.
pub(super) fn one_table(
    levels: &Levels,
    settings: &Settings,
    source: &Run,
    output: u8,
) -> Option<Plan> {
    let targets = levels.level(output);
    let sources = std::slice::from_ref(source);
    let bytes = |range: &TokenRange| bytes_of(sources, range) + bytes_of(targets, range);
    let cost = |table: &TableRef| {
        let range = closed(table.extent, targets);
        density(source.bytes_in(&range), bytes_of(targets, &range))
    };
    let table = source.tables.iter().reduce(|best, other| {
        if cost(other) > cost(best) {
            other
        } else {
            best
        }
    })?;
    let first = closed_in_front(table.extent.first, targets, settings);
    let range = piece(
        first,
        table.extent.last,
        settings.job_bytes_max,
        targets,
        &bytes,
    );
    plan(levels, sources, targets, range, output)
}

/// Merges a piece of every run into the bottom, beginning at `from`. Bottom tables with nothing
/// above them and nothing to purge are left alone.
pub(super) fn everything(levels: &Levels, settings: &Settings, from: Token) -> Option<Plan> {
    let all = hull(levels.runs())?;
    let bottom = levels.level(BOTTOM);
    // Of several runs at the bottom, the oldest takes in the others.
    let targets = &bottom[bottom.len().saturating_sub(1)..];
    let above = levels.runs().len() - targets.len();
    let bytes = |range: &TokenRange| bytes_of(levels.runs(), range);
    let purgeable = targets.iter().flat_map(|run| &run.tables).filter(|table| {
        table.extent.last >= from && table.info.tombstones + table.info.expiring > 0
    });
    let firsts = purgeable.map(|table| table.extent.first.max(from));
    let first = firsts
        .chain(first_data(&levels.runs()[..above], from))
        .min()?;
    let first = closed_in_front(first, targets, settings).max(from);
    let range = piece(first, all.last, settings.job_bytes_max, targets, &bytes);
    let output_run = targets.last().map(|run| run.id);
    Some(Plan::new(levels, range, levels.runs(), BOTTOM, output_run))
}

fn plan(
    levels: &Levels,
    sources: &[Run],
    targets: &[Run],
    range: TokenRange,
    output: u8,
) -> Option<Plan> {
    let output_run = targets.last().map(|run| run.id);
    let runs = sources.iter().chain(targets);
    Some(Plan::new(levels, range, runs, output, output_run))
}

/// The largest piece from `first` on, up to `last`, within the limit of a job. It ends with a
/// target table if one ends in its second half, and within one otherwise.
fn piece(
    first: Token,
    last: Token,
    limit: u64,
    targets: &[Run],
    bytes: &impl Fn(&TokenRange) -> u64,
) -> TokenRange {
    let upto = |last: Token| TokenRange { first, last };
    if bytes(&upto(last)) <= limit {
        return closed_behind(upto(last), targets, bytes, limit);
    }
    // `low` is within the limit, `high` beyond it.
    let (mut low, mut high) = (first.0, last.0);
    while high - low > 1 && bytes(&upto(Token(low))) < limit - limit / SLACK {
        let middle = low.midpoint(high);
        if bytes(&upto(Token(middle))) <= limit {
            low = middle;
        } else {
            high = middle;
        }
    }
    let half = bytes(&upto(Token(low))) / 2;
    let tables = targets
        .iter()
        .flat_map(|run| run.overlapping(upto(Token(low))));
    let ends = tables.map(|table| table.extent.last);
    let whole_end = ends
        .filter(|end| *end <= Token(low) && bytes(&upto(*end)) >= half)
        .max();
    upto(whole_end.unwrap_or(Token(low)))
}

/// The limit of a piece when `bytes` are to be merged in pieces below `limit`: even ones, so that no
/// sliver remains for the last.
fn even_share(bytes: u64, limit: u64) -> u64 {
    let pieces = bytes.div_ceil((limit - limit / SLACK).max(1)).max(1);
    bytes
        .div_ceil(pieces)
        .saturating_add(limit / SLACK)
        .min(limit)
}

/// Where a piece that should begin at `first` begins: at the front of the target table there, unless
/// that would take half of the job.
fn closed_in_front(first: Token, targets: &[Run], settings: &Settings) -> Token {
    let closed = TokenRange {
        first: closed(point(first), targets).first,
        last: first,
    };
    if bytes_of(targets, &closed) <= settings.job_bytes_max / 2 {
        closed.first
    } else {
        first
    }
}

/// `range` made longer to the end of the target table in which it ends, if the limit allows.
fn closed_behind(
    range: TokenRange,
    targets: &[Run],
    bytes: &impl Fn(&TokenRange) -> u64,
    limit: u64,
) -> TokenRange {
    let longer = TokenRange {
        first: range.first,
        last: closed(point(range.last), targets).last,
    };
    if bytes(&longer) <= limit {
        longer
    } else {
        range
    }
}

/// Where the most runs of `sources` lie above each other: behind the newest output run if such a
/// place is there, so that pieces go around the ring and fill that run.
fn deepest(sources: &[Run], newest: Option<&Run>) -> Option<Token> {
    let tables = || sources.iter().flat_map(|run| &run.tables);
    let depth = |token: Token| {
        sources
            .iter()
            .filter(|run| run.table(token).is_some())
            .count()
    };
    let depth_max = tables().map(|table| depth(table.extent.first)).max()?;
    let places = || {
        let firsts = tables().map(|table| table.extent.first);
        firsts.filter(|first| depth(*first) == depth_max)
    };
    let behind = newest.and_then(|run| run.tables.last());
    let behind = behind.and_then(|table| places().filter(|first| *first > table.extent.last).min());
    behind.or_else(|| places().min())
}

/// The first token at or behind `from` for which a run has data.
fn first_data(runs: &[Run], from: Token) -> Option<Token> {
    let rest = TokenRange {
        first: from,
        last: Token::MAX,
    };
    let firsts = runs.iter().filter_map(|run| run.overlapping(rest).first());
    firsts.map(|table| table.extent.first.max(from)).min()
}

/// The tokens from the first to the last for which a run has data.
fn hull(runs: &[Run]) -> Option<TokenRange> {
    let first = runs.iter().filter_map(|run| run.tables.first());
    let last = runs.iter().filter_map(|run| run.tables.last());
    Some(TokenRange {
        first: first.map(|table: &TableRef| table.extent.first).min()?,
        last: last.map(|table: &TableRef| table.extent.last).max()?,
    })
}

/// `range` made longer on both sides to the borders of the target tables that it cuts: a table
/// whose edges are cut off keeps its whole file for them.
fn closed(range: TokenRange, targets: &[Run]) -> TokenRange {
    let mut closed = range;
    for table in targets.iter().flat_map(|run| run.overlapping(range)) {
        closed.first = closed.first.min(table.extent.first);
        closed.last = closed.last.max(table.extent.last);
    }
    closed
}

fn point(token: Token) -> TokenRange {
    TokenRange {
        first: token,
        last: token,
    }
}

/// Bytes of the runs' parts in `range`.
pub(super) fn bytes_of(runs: &[Run], range: &TokenRange) -> u64 {
    runs.iter().map(|run| run.bytes_in(range)).sum()
}

/// Source bytes a target byte, in 1/1024; the highest for a piece with no target bytes.
fn density(source_bytes: u64, target_bytes: u64) -> u128 {
    u128::from(source_bytes) * 1024 / u128::from(target_bytes.max(1))
}
