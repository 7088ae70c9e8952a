//! A replica's side of a comparison: sums and hashes of what this shard holds of a run.
//!
//! On the path of repair: asked by [`compare`](super::compare) here, and through
//! [`serve`](crate::serve) by other nodes.

use bytes::Bytes;
use torc_engine::{ScanFrom, ScanLimits};
use torc_env::{Env, Token, TokenRange, TreeId};

use crate::api::{Failure, FailureCode};
use crate::core::Core;
use crate::merkle::{Leaf, leaf_of, leaf_range};
use crate::replica::read_failure;

/// Leaf intervals of one question.
pub(crate) const INTERVALS_MAX: usize = 256;
/// Records of one page of hashes.
pub(crate) const HASHES_MAX: u32 = 1_024;

const PAGE_BYTES_MAX: usize = 4 << 20;

/// One page of hashes.
pub(crate) struct Hashes {
    pub(crate) entries: Vec<(Bytes, u128)>,
    /// Up to where it was looked, when that is not the end.
    pub(crate) looked: Option<(Token, Bytes)>,
}

/// The sum of each interval of leaves, as far as it lies in `range`. Leaves that the ends of the
/// range cut are summed up from their records.
pub(crate) async fn sums<E: Env>(
    core: &Core<E>,
    tree: TreeId,
    range: TokenRange,
    floor_hour: u32,
    intervals: &[(u32, u32)],
) -> Result<Vec<u128>, Failure> {
    let mut sums = Vec::with_capacity(intervals.len());
    for (first, last) in intervals {
        sums.push(sum(core, tree, range, floor_hour, *first, *last).await?);
        core.env.give_way().await;
    }
    Ok(sums)
}

async fn sum<E: Env>(
    core: &Core<E>,
    tree: TreeId,
    range: TokenRange,
    floor_hour: u32,
    first: u32,
    last: u32,
) -> Result<u128, Failure> {
    let mut total = 0u128;
    let mut whole_first = first.max(leaf_of(range.first));
    let mut whole_last = last.min(leaf_of(range.last));
    if whole_first > whole_last {
        return Ok(0);
    }
    if leaf_range(whole_first).first < range.first {
        let part = part_of(whole_first, range);
        total = total.wrapping_add(sum_of_records(core, tree, part, floor_hour).await?);
        whole_first += 1;
    }
    if whole_first <= whole_last && leaf_range(whole_last).last > range.last {
        let part = part_of(whole_last, range);
        total = total.wrapping_add(sum_of_records(core, tree, part, floor_hour).await?);
        let Some(before) = whole_last.checked_sub(1) else {
            return Ok(total);
        };
        whole_last = before;
    }
    if whole_first <= whole_last {
        let whole = core
            .sums
            .borrow()
            .sum(tree, whole_first, whole_last, floor_hour)
            .ok_or_else(|| {
                Failure::refused(FailureCode::NotReady, "the records are not summed up yet")
            })?;
        total = total.wrapping_add(whole);
    }
    Ok(total)
}

/// The tokens of a leaf that lie in `range`.
pub(crate) fn part_of(leaf: u32, range: TokenRange) -> TokenRange {
    leaf_range(leaf).intersection(&range).unwrap_or(range)
}

async fn sum_of_records<E: Env>(
    core: &Core<E>,
    tree: TreeId,
    range: TokenRange,
    floor_hour: u32,
) -> Result<u128, Failure> {
    let mut total = 0u128;
    let mut from = ScanFrom::Token(range.first);
    loop {
        let page = hashes(core, tree, from, range.last, floor_hour, HASHES_MAX).await?;
        for (_, hash) in &page.entries {
            total = total.wrapping_add(*hash);
        }
        match page.looked {
            Some((token, key)) => from = ScanFrom::After(token, key),
            None => return Ok(total),
        }
        core.env.give_way().await;
    }
}

/// A page of hashes of this shard's records.
pub(crate) async fn hashes<E: Env>(
    core: &Core<E>,
    tree: TreeId,
    from: ScanFrom,
    last: Token,
    floor_hour: u32,
    records: u32,
) -> Result<Hashes, Failure> {
    let limits = ScanLimits {
        records: usize::try_from(records.clamp(1, HASHES_MAX)).unwrap_or(1),
        bytes: PAGE_BYTES_MAX,
    };
    let page = core
        .store
        .scan(tree, from, last, limits)
        .await
        .map_err(|error| read_failure(&error))?;
    let looked = page
        .next
        .and_then(|_| page.entries.last())
        .map(|entry| (entry.token, entry.key.clone()));
    let entries = page
        .entries
        .into_iter()
        .filter_map(|entry| {
            // A state that cannot be parsed hashes like nothing else: the peer's is fetched.
            let hash = match Leaf::of(&entry.key, &entry.record) {
                Some(leaf) if leaf.counts(floor_hour) => leaf.hash,
                Some(_) => return None,
                None => 0,
            };
            Some((entry.key, hash))
        })
        .collect();
    Ok(Hashes { entries, looked })
}
