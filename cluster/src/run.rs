//! Runs of the ring: as far as one set of replicas, and on each of them one shard, reaches.
//!
//! On the path of scans and of repair, which go over tokens rather than keys. Neighbouring replica
//! ranges often have the same replicas in another order; where order does not matter they are one
//! run, so that a cluster of N nodes has a handful of runs and not hundreds of ranges.

use std::rc::Rc;

use torc_env::{Address, Token, TokenRange, TreeId};

use crate::membership::View;
use crate::ring::{MemberIndex, Ring};
use crate::target::{Replicas, owners_of};
use crate::topology::Topology;

/// A run of the ring in one keyspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) tree: TreeId,
    pub(crate) range: TokenRange,
    /// Ascending.
    pub(crate) replicas: Replicas,
    /// The range epoch: a fingerprint of the replicas. Not that of a key in the run, whose replicas
    /// have an order.
    pub(crate) owners: u64,
}

impl Run {
    /// The run at `token` and behind it, of a keyspace with `n` replicas.
    pub(crate) fn at(view: &View, tree: TreeId, n: usize, token: Token) -> Self {
        let (last, replicas) = reach(&view.topology, &view.ring, n, token);
        Self {
            tree,
            range: TokenRange { first: token, last },
            owners: owners_of(view, replicas.as_slice()),
            replicas,
        }
    }

    /// The shard of `member` that owns the run; `None` while nobody has claimed its slot.
    pub(crate) fn address(&self, view: &View, member: MemberIndex) -> Option<Address> {
        view.topology.member(member).address(self.range.first)
    }
}

/// How far from `token` on the replicas and their shards stay the same.
fn reach(topology: &Topology, ring: &Ring, n: usize, token: Token) -> (Token, Replicas) {
    let sorted_at = |token| {
        let mut sorted = Replicas::of(ring.replicas(token, n));
        sorted.as_mut_slice().sort_unstable();
        sorted
    };
    let replicas = sorted_at(token);
    let mut limit = Token::MAX;
    for member in replicas.as_slice() {
        let shards = topology.member(*member).description.shards.max(1);
        limit = limit.min(TokenRange::of_shard(token.shard(shards), shards).last);
    }
    let mut last = ring.range_at(token, 1).last.min(limit);
    while last < limit && sorted_at(Token(last.0 + 1)) == replicas {
        last = ring.range_at(Token(last.0 + 1), 1).last.min(limit);
    }
    (last, replicas)
}

/// What is left of a range without `holes`, ascending.
pub(crate) fn without(range: TokenRange, mut holes: Vec<TokenRange>) -> Vec<TokenRange> {
    holes.sort_unstable_by_key(|hole| hole.first);
    let mut left = Vec::new();
    let mut next = Some(range.first);
    for hole in holes {
        let Some(first) = next.filter(|first| *first <= hole.last) else {
            continue;
        };
        if hole.first > range.last {
            break;
        }
        if first < hole.first {
            let last = Token(hole.first.0 - 1);
            left.push(TokenRange { first, last });
        }
        next = hole.last.0.checked_add(1).map(Token);
    }
    if let Some(first) = next.filter(|first| *first <= range.last) {
        left.push(TokenRange { first, ..range });
    }
    left
}

/// What of a range is in any of these, ascending, neighbours made one.
pub(crate) fn within(range: TokenRange, ranges: Vec<TokenRange>) -> Vec<TokenRange> {
    without(range, without(range, ranges))
}

/// The runs of all keyspaces within `slice` of which this node is a replica.
pub(crate) fn own_runs(view: &Rc<View>, slice: TokenRange) -> Vec<Run> {
    let Some(me) = view.me else {
        return Vec::new();
    };
    let mut runs = Vec::new();
    for keyspace in &view.topology.keyspaces {
        let n = usize::from(view.topology.effective_n(keyspace));
        let mut token = slice.first;
        loop {
            let mut run = Run::at(view, keyspace.id, n, token);
            run.range.last = run.range.last.min(slice.last);
            if run.replicas.contains(me) {
                runs.push(run);
            }
            if run.range.last >= slice.last {
                break;
            }
            token = Token(run.range.last.0 + 1);
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_range_is_what_no_hole_covers() {
        let range = |first, last| TokenRange {
            first: Token(first),
            last: Token(last),
        };
        let whole = range(10, 99);
        assert_eq!(without(whole, vec![]), [whole]);
        assert_eq!(without(whole, vec![range(100, 200), range(0, 9)]), [whole]);
        let holes = vec![range(50, 59), range(0, 14), range(55, 55), range(60, 69)];
        assert_eq!(without(whole, holes), [range(15, 49), range(70, 99)]);
        assert_eq!(without(whole, vec![range(90, 120)]), [range(10, 89)]);
        assert_eq!(without(whole, vec![TokenRange::ALL]), []);
        let holes = vec![range(50, 59), range(0, 14), range(55, 57), range(60, 69)];
        assert_eq!(within(whole, holes), [range(10, 14), range(50, 69)]);
        assert_eq!(within(whole, vec![]), []);
        let end = range(10, u128::MAX);
        let holes = vec![range(20, u128::MAX), range(30, 40)];
        assert_eq!(without(end, holes), [range(10, 19)]);
    }
}
