//! The purge rule: when a deletion may be forgotten.
//!
//! A tombstone, or a record past its expiry, hides what older sources hold of its key, here and on
//! other replicas. Dropping it too early brings deleted data back. So a merge drops one only when
//!
//! 1. its stamp lies below the *purge floor* of its token (the layer above raises a floor once every
//!    replica has everything below it, see `docs/consistency.md`), and
//! 2. no source outside the merge is older and may hold the key ([`Reach::Bottom`]).
//!
//! Pure; consulted by compaction alone, once for each record that survives a merge.

use torc_env::{Token, TokenRange, mutation};

use crate::record::{EntryRef, Kind};

/// For each piece of the ring, the stamp below which deletions may be forgotten. Tokens in no piece
/// have no floor: nothing of theirs is ever purged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PurgeFloors {
    /// Ascending, without overlap.
    pieces: Vec<(TokenRange, u64)>,
}

impl PurgeFloors {
    /// No floors: nothing may be purged.
    pub fn none() -> PurgeFloors {
        PurgeFloors::default()
    }

    /// Floors from pieces in any order. Where pieces overlap, the lowest floor holds.
    pub fn new(pieces: impl IntoIterator<Item = (TokenRange, u64)>) -> PurgeFloors {
        let given: Vec<(TokenRange, u64)> = pieces.into_iter().collect();
        // Every place where the set of covering pieces may change begins a new piece.
        let mut starts: Vec<u128> = given
            .iter()
            .flat_map(|(range, _)| [Some(range.first.0), range.last.0.checked_add(1)])
            .flatten()
            .collect();
        starts.sort_unstable();
        starts.dedup();
        let ends = starts.iter().skip(1).map(|next| next - 1);
        let ends = ends.chain(std::iter::once(u128::MAX));
        let pieces = starts.iter().zip(ends).filter_map(|(first, last)| {
            let covering = given
                .iter()
                .filter(|(range, _)| range.contains(Token(*first)));
            let floor = covering.map(|(_, floor)| *floor).min()?;
            let range = TokenRange {
                first: Token(*first),
                last: Token(last),
            };
            Some((range, floor))
        });
        PurgeFloors {
            pieces: pieces.collect(),
        }
    }

    /// One floor for the whole ring.
    pub fn everywhere(floor: u64) -> PurgeFloors {
        PurgeFloors {
            pieces: vec![(TokenRange::ALL, floor)],
        }
    }

    /// The floor that holds for `token`.
    pub fn floor(&self, token: Token) -> Option<u64> {
        let after = self
            .pieces
            .partition_point(|(range, _)| range.first <= token);
        let (range, floor) = self.pieces.get(after.checked_sub(1)?)?;
        range.contains(token).then_some(*floor)
    }

    /// The lowest floor within `range`; `None` when some token in it has no floor.
    pub fn lowest(&self, range: TokenRange) -> Option<u64> {
        let from = self
            .pieces
            .partition_point(|(piece, _)| piece.last < range.first);
        let mut lowest = u64::MAX;
        let mut next = range.first;
        for (piece, floor) in &self.pieces[from..] {
            if piece.first > next {
                return None;
            }
            lowest = lowest.min(*floor);
            if piece.last >= range.last {
                return Some(lowest);
            }
            next = Token(piece.last.0 + 1);
        }
        None
    }

    /// The pieces, ascending, without overlap.
    pub fn pieces(&self) -> &[(TokenRange, u64)] {
        &self.pieces
    }
}

/// Whether anything older than the inputs of a merge may hold one of its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The inputs include the oldest source of every token that they merge.
    Bottom,
    /// Older sources lie below.
    Above,
}

/// The rule as one merge applies it.
#[derive(Clone, Debug)]
pub struct PurgeRule {
    /// Floors of the tree.
    pub floors: PurgeFloors,
    /// The time that decides about expiry, in milliseconds since 1970-01-01 UTC. The caller answers
    /// for it: after a jump of the clock it passes 0, and nothing counts as expired.
    pub now_ms: u64,
    /// What lies below the merge.
    pub reach: Reach,
}

impl PurgeRule {
    /// A rule that keeps everything.
    pub fn keep_all() -> PurgeRule {
        PurgeRule {
            floors: PurgeFloors::none(),
            now_ms: 0,
            reach: Reach::Above,
        }
    }

    /// Whether this record, the newest of its key among the inputs, may be dropped.
    pub fn may_purge(&self, entry: &EntryRef<'_>) -> bool {
        is_dead(entry, self.now_ms)
            && self.reach == Reach::Bottom
            && self
                .floors
                .floor(entry.token)
                .is_some_and(|floor| entry.stamp < floor)
            || mutation::on("purge_tombstone_early") && entry.kind == Kind::Tombstone
            || mutation::on("purge_expired_early")
                && entry.kind == Kind::Value
                && is_dead(entry, self.now_ms)
    }
}

/// Whether a record counts as deleted at `now_ms`.
fn is_dead(entry: &EntryRef<'_>, now_ms: u64) -> bool {
    let is_expired = entry.expires_at_ms != 0 && entry.expires_at_ms <= now_ms;
    entry.kind == Kind::Tombstone || is_expired
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(first: u128, last: u128) -> TokenRange {
        TokenRange {
            first: Token(first),
            last: Token(last),
        }
    }

    /// Every combination of kind, expiry, stamp, floor, reach: 2·4·3·2·2 cases, judged by the
    /// sentence of the module documentation written out a second time.
    #[test]
    fn a_record_goes_only_when_dead_below_its_floor_and_at_the_bottom() {
        let now_ms = 100;
        let mut purged = 0;
        for kind in [Kind::Value, Kind::Tombstone] {
            for expires_at_ms in [0, 99, 100, 101] {
                for stamp in [49, 50, 51] {
                    for reach in [Reach::Bottom, Reach::Above] {
                        for token in [5, 15] {
                            let rule = PurgeRule {
                                floors: PurgeFloors::new([(range(0, 9), 50)]),
                                now_ms,
                                reach,
                            };
                            let entry = EntryRef {
                                token: Token(token),
                                key: b"key",
                                seqno: 1,
                                kind,
                                stamp,
                                expires_at_ms,
                                value: b"",
                            };
                            let is_dead =
                                kind == Kind::Tombstone || [99, 100].contains(&expires_at_ms);
                            let below = stamp == 49 && token == 5;
                            let expected = is_dead && below && reach == Reach::Bottom;
                            assert_eq!(rule.may_purge(&entry), expected, "{entry:?} {reach:?}");
                            purged += u32::from(expected);
                        }
                    }
                }
            }
        }
        assert_eq!(purged, 6, "four tombstones and two expired values");
    }

    #[test]
    fn without_a_floor_nothing_is_purged() {
        assert_eq!(PurgeFloors::none().floor(Token(0)), None);
        assert_eq!(PurgeFloors::everywhere(7).floor(Token::MAX), Some(7));
    }

    proptest! {
        #[test]
        fn the_lowest_floor_of_the_covering_pieces_holds(
            pieces in prop::collection::vec((0u128..64, 0u128..64, 0u64..10), 0..8),
            at_end in any::<bool>(),
        ) {
            // Half of the cases lie at the end of the ring.
            let base = if at_end { u128::MAX - 63 } else { 0 };
            let given: Vec<(TokenRange, u64)> = pieces
                .iter()
                .map(|(a, b, floor)| (range(base + a.min(b), base + a.max(b)), *floor))
                .collect();
            let floors = PurgeFloors::new(given.clone());
            for token in (0..64).map(|token| Token(base + token)) {
                let covering = given.iter().filter(|(range, _)| range.contains(token));
                let expected = covering.map(|(_, floor)| *floor).min();
                prop_assert_eq!(floors.floor(token), expected);
            }
            for first in 0..64 {
                for last in first..64 {
                    let all = (first..=last).map(|token| floors.floor(Token(base + token)));
                    let lowest = all.collect::<Option<Vec<u64>>>().and_then(|all| all.into_iter().min());
                    prop_assert_eq!(floors.lowest(range(base + first, base + last)), lowest);
                }
            }
            for pair in floors.pieces().windows(2) {
                prop_assert!(pair[0].0.last < pair[1].0.first);
            }
        }
    }
}
