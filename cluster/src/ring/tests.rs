use proptest::prelude::*;
use torc_env::{Token, TokenRange};

use super::assign::{Positions, VNODES_DEFAULT};
use super::{MemberIndex, Place, Ring, RingMember, Vnode};

fn member(index: usize) -> MemberIndex {
    MemberIndex(u16::try_from(index).unwrap())
}

/// Vnodes of `weights.len()` members that came one after the other.
fn assigned(weights: &[u16], cluster: u64) -> Vec<Vec<Vnode>> {
    let mut positions = Positions::default();
    let mut all = Vec::new();
    for (member, count) in weights.iter().enumerate() {
        let salt = cluster.wrapping_mul(1000) + member as u64;
        let vnodes = positions.choose(*count, salt).unwrap();
        positions.add(&vnodes).unwrap();
        all.push(vnodes);
    }
    all
}

fn ring(vnodes: &[Vec<Vnode>], racks: &[String], width: usize) -> Ring {
    let members: Vec<RingMember<'_>> = vnodes
        .iter()
        .enumerate()
        .map(|(index, vnodes)| RingMember {
            index: member(index),
            place: Place {
                rack: racks.get(index).map_or("", String::as_str),
                ..Place::default()
            },
            vnodes,
        })
        .collect();
    Ring::new(&members, width)
}

fn tokens() -> impl Iterator<Item = Token> {
    (0..2_000u128).map(|step| Token(step.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)))
}

#[test]
fn a_lone_member_holds_the_whole_ring() {
    let ring = ring(&assigned(&[VNODES_DEFAULT], 1), &[], 3);
    assert_eq!(ring.replicas(Token(0), 3), [MemberIndex(0)]);
    assert_eq!(ring.replicas(Token::MAX, 3), [MemberIndex(0)]);
    assert_eq!(ring.fallbacks(Token(7), 1).count(), 0);
}

#[test]
fn shares_are_even_at_every_size() {
    for members in [2, 3, 5, 10, 40] {
        for cluster in 0..3 {
            let ring = ring(&assigned(&vec![VNODES_DEFAULT; members], cluster), &[], 3);
            for (n, bound) in [(1, 1.10), (3, 1.20)] {
                for (member, share) in ring.shares(n) {
                    let relative = share * members as f64;
                    assert!(
                        relative < bound && relative > 2.0 - bound,
                        "{members} members, cluster {cluster}, n {n}: {member} has {relative:.3}"
                    );
                }
            }
        }
    }
}

#[test]
fn shares_follow_the_weights() {
    let weights = [128, 256, 64, 128];
    let ring = ring(&assigned(&weights, 3), &[], 1);
    for ((_, share), weight) in ring.shares(1).into_iter().zip(weights) {
        let fair = f64::from(weight) / 576.0;
        assert!((share / fair - 1.0).abs() < 0.1, "{share} for {fair}");
    }
}

/// A cluster's members: weights and racks.
fn members() -> impl Strategy<Value = (Vec<u16>, Vec<String>)> {
    (1..9_usize, 1..5_u16).prop_flat_map(|(count, racks)| {
        let weights = proptest::collection::vec(1..24_u16, count);
        let rack = (0..racks).prop_map(|rack| format!("r{rack}"));
        (weights, proptest::collection::vec(rack, count))
    })
}

proptest! {
    #[test]
    fn a_preference_list_is_distinct_and_extends_to_all_members(
        (weights, racks) in members(), cluster: u64, token: u128, n in 1..6_usize
    ) {
        let ring = ring(&assigned(&weights, cluster), &racks, 5);
        let token = Token(token);
        let replicas = ring.replicas(token, n);
        prop_assert_eq!(replicas.len(), n.min(weights.len()));
        let mut all: Vec<MemberIndex> = replicas.to_vec();
        all.extend(ring.fallbacks(token, n));
        prop_assert_eq!(&ring.replicas(token, 5)[..replicas.len()], replicas);
        prop_assert_eq!(&all[..ring.replicas(token, 5).len()], ring.replicas(token, 5));
        all.sort_unstable();
        let every: Vec<MemberIndex> = (0..weights.len()).map(member).collect();
        prop_assert_eq!(all, every);
    }

    #[test]
    fn replicas_use_every_rack_before_one_rack_twice(
        (weights, racks) in members(), cluster: u64, token: u128, n in 1..6_usize
    ) {
        let ring = ring(&assigned(&weights, cluster), &racks, n);
        let used = |rack: &String| ring.replicas(Token(token), n)
            .iter().filter(|member| racks[member.index()] == *rack).count();
        for rack in &racks {
            for other in &racks {
                let room = racks.iter().filter(|r| *r == other).count() > used(other);
                prop_assert!(
                    !room || used(rack) <= used(other) + 1,
                    "{rack} holds {} copies, {other} with room {}", used(rack), used(other)
                );
            }
        }
    }

    #[test]
    fn a_newcomer_displaces_at_most_one_replica_and_nothing_else_moves(
        (weights, racks) in members(), cluster: u64, n in 1..5_usize
    ) {
        let vnodes = assigned(&weights, cluster);
        let newcomer = member(weights.len() - 1);
        prop_assume!(newcomer.0 > 0);
        let after = ring(&vnodes, &racks, n);
        let before = ring(&vnodes[..newcomer.index()], &racks, n);
        for token in tokens() {
            let old = before.replicas(token, n);
            let new = after.replicas(token, n);
            let kept = new.iter().filter(|member| old.contains(member)).count();
            if new.contains(&newcomer) {
                prop_assert_eq!(kept, new.len() - 1, "{:?} became {:?}", old, new);
            } else {
                let mut sets = [old.to_vec(), new.to_vec()];
                sets.iter_mut().for_each(|set| set.sort_unstable());
                prop_assert_eq!(&sets[0], &sets[1]);
            }
        }
    }

    #[test]
    fn without_racks_a_newcomer_keeps_the_order_of_the_others(
        (weights, _) in members(), cluster: u64, n in 1..5_usize
    ) {
        let vnodes = assigned(&weights, cluster);
        let newcomer = member(weights.len() - 1);
        prop_assume!(newcomer.0 > 0);
        let after = ring(&vnodes, &[], n);
        let before = ring(&vnodes[..newcomer.index()], &[], n);
        for token in tokens() {
            let kept: Vec<MemberIndex> = after.replicas(token, n)
                .iter().copied().filter(|member| *member != newcomer).collect();
            prop_assert_eq!(&before.replicas(token, n)[..kept.len()], &kept[..]);
        }
    }

    #[test]
    fn ranges_cover_the_ring_and_never_cross_a_shard_slice(
        (weights, racks) in members(), cluster: u64, n in 1..4_usize, shards in 1..9_u16
    ) {
        let ring = ring(&assigned(&weights, cluster), &racks, n);
        let mut next = Some(Token(0));
        let mut owned = 0;
        for piece in ring.ranges(n, shards) {
            let TokenRange { first, last } = piece.range;
            prop_assert_eq!(Some(first), next);
            prop_assert_eq!(first.shard(shards), last.shard(shards));
            for token in [first, last] {
                prop_assert_eq!(ring.replicas(token, n), piece.replicas);
                prop_assert_eq!(ring.range_at(token, shards), piece.range);
            }
            owned += piece.replicas.len();
            next = last.0.checked_add(1).map(Token);
        }
        prop_assert_eq!(next, None);
        let by_member: usize = (0..weights.len())
            .map(|index| ring.ranges_of(member(index), n, shards).count()).sum();
        prop_assert_eq!(by_member, owned);
    }

    #[test]
    fn assigned_vnodes_never_clash(weights in proptest::collection::vec(1..300_u16, 1..12), cluster: u64) {
        let vnodes = assigned(&weights, cluster);
        prop_assert!(Positions::of(vnodes.iter().map(Vec::as_slice)).is_ok());
        for (vnodes, weight) in vnodes.iter().zip(&weights) {
            prop_assert_eq!(vnodes.len(), usize::from(*weight));
            prop_assert!(vnodes.is_sorted());
        }
    }
}

#[test]
fn a_clash_is_refused() {
    let vnodes = [Vnode::new(5).unwrap(), Vnode::new(9).unwrap()];
    let mut positions = Positions::of([&vnodes[..]]).unwrap();
    assert!(positions.add(&vnodes[1..]).is_err());
    assert!(Vnode::new(super::GRID_CELLS).is_none());
}
