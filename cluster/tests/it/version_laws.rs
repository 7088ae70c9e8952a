//! What merging and writing must obey, whatever happens in whatever order.

use bytes::Bytes;
use proptest::prelude::*;
use torc_cluster::conflict::Conflict;
use torc_cluster::version::{Actor, Context, Dot, Minter, State, Write};

use crate::history::{REPLICAS, Step, World, steps};

proptest! {
    #[test]
    fn replicas_show_exactly_what_causal_history_says(steps in steps(false)) {
        let mut world = World::new(Conflict::Siblings, true);
        for step in &steps {
            world.take(step);
            for replica in 0..REPLICAS {
                prop_assert_eq!(
                    world.shown(replica),
                    world.expected(replica),
                    "replica {} after {:?}", replica, step
                );
            }
        }
    }

    #[test]
    fn beyond_the_bound_on_exact_dots_no_write_is_lost(
        steps in prop::collection::vec(many_puts(), 1..200)
    ) {
        let mut world = World::new(Conflict::Siblings, false);
        for step in &steps {
            world.take(step);
        }
        for replica in 0..REPLICAS {
            let (shown, expected) = (world.shown(replica), world.expected(replica));
            prop_assert!(shown.is_superset(&expected), "{shown:?} lacks some of {expected:?}");
        }
    }

    #[test]
    fn replicas_that_exchanged_everything_hold_the_same_bytes(
        steps in steps(true),
        lww in any::<bool>(),
    ) {
        let mut world = World::new(if lww { Conflict::Lww } else { Conflict::Siblings }, true);
        steps.iter().for_each(|step| world.take(step));
        for _ in 0..2 {
            for from in 0..REPLICAS {
                for to in 0..REPLICAS {
                    world.send(from, to);
                }
            }
        }
        for replica in 1..REPLICAS {
            prop_assert_eq!(world.state(replica), world.state(0));
            prop_assert_eq!(world.state(replica).digest(), world.state(0).digest());
        }
        if lww {
            prop_assert!(world.state(0).siblings().len() <= 1);
        }
    }

    #[test]
    fn merging_is_commutative_associative_and_idempotent(
        steps in steps(true),
        cuts in prop::array::uniform3(0.0..1.0_f64),
        replicas in prop::array::uniform3(0..REPLICAS),
        lww in any::<bool>(),
    ) {
        let conflict = if lww { Conflict::Lww } else { Conflict::Siblings };
        // Three states from three moments of one history.
        let mut world = World::new(conflict, true);
        let mut picked: [State; 3] = Default::default();
        for (index, step) in steps.iter().enumerate() {
            world.take(step);
            for (state, (cut, replica)) in picked.iter_mut().zip(cuts.iter().zip(replicas)) {
                if index as f64 <= cut * steps.len() as f64 {
                    *state = world.state(replica).clone();
                }
            }
        }
        let [a, b, c] = &picked;
        let merge = |x: &State, y: &State| x.merge(y, conflict).unwrap();
        prop_assert_eq!(merge(a, b), merge(b, a));
        prop_assert_eq!(merge(&merge(a, b), c), merge(a, &merge(b, c)));
        prop_assert_eq!(&merge(a, a), a);
        let joined = merge(a, b);
        prop_assert_eq!(&merge(&joined, a), &joined);
        prop_assert_eq!(State::decode(&joined.encode()).unwrap(), joined);
    }

    #[test]
    fn joining_contexts_is_commutative_associative_and_idempotent(
        contexts in prop::array::uniform3(context())
    ) {
        let [a, b, c] = &contexts;
        let join = |x: &Context, y: &Context| {
            let mut joined = x.clone();
            joined.join(y);
            joined
        };
        prop_assert_eq!(join(a, b), join(b, a));
        prop_assert_eq!(join(&join(a, b), c), join(a, &join(b, c)));
        prop_assert_eq!(&join(a, a), a);
        prop_assert_eq!(Context::from_opaque(&a.to_opaque()), Ok(a.clone()));
        prop_assert!(a.includes(a) && a.includes(&Context::default()));
    }
}

/// Few actors, so that the bound on exact dots is hit.
fn context() -> impl Strategy<Value = Context> {
    let claims = prop::collection::vec((0..3_u128, 1..60_u64, prop::bool::weighted(0.05)), 0..60);
    claims.prop_map(|claims| {
        let mut context = Context::default();
        for (actor, counter, floor) in claims {
            let actor = Actor(actor);
            if floor {
                context.raise_floor(actor, counter);
            } else {
                context.add(Dot { actor, counter });
            }
        }
        context
    })
}

fn many_puts() -> impl Strategy<Value = Step> {
    let put = (0..REPLICAS, 0..3_usize, prop::bool::weighted(0.1)).prop_map(
        |(replica, client, blind)| Step::Put {
            replica,
            client,
            blind,
            delete: false,
        },
    );
    let send = (0..REPLICAS, 0..REPLICAS).prop_map(|(from, to)| Step::Send { from, to });
    prop_oneof![8 => put, 1 => send]
}

/// Two clients take turns for 1,000 writes, each replacing only its own last value, through
/// whichever replica; everything reaches everybody.
#[test]
fn two_clients_taking_turns_never_make_more_than_two_siblings() {
    let mut world = World::new(Conflict::Siblings, false);
    for turn in 0..1_000 {
        world.take(&Step::Put {
            replica: turn * 7 % 5 % REPLICAS,
            client: turn % 2,
            blind: false,
            delete: false,
        });
        for from in 0..REPLICAS {
            for to in 0..REPLICAS {
                world.send(from, to);
            }
        }
        for replica in 0..REPLICAS {
            let siblings = world.state(replica).siblings().len();
            assert!(siblings <= 2, "{siblings} siblings after turn {turn}");
        }
    }
    let bytes = world.state(0).encoded_len();
    assert!(bytes < 400, "a state of two small values has {bytes} bytes");
}

/// The same through a partition: a replica hears nothing for all the writes.
#[test]
fn a_replica_that_missed_a_thousand_writes_brings_nothing_back() {
    let mut world = World::new(Conflict::Siblings, false);
    for turn in 0..1_000 {
        world.take(&Step::Put {
            replica: turn % 2,
            client: 0,
            blind: false,
            delete: false,
        });
        world.send(turn % 2, 1 - turn % 2);
        if turn == 10 {
            world.send(0, 2);
        }
    }
    world.send(2, 0);
    assert_eq!(world.state(0).siblings().len(), 1);
    world.send(0, 2);
    assert_eq!(world.state(2), world.state(0));
}

fn write<'a>(context: &'a Context, counter: u64, value: Option<&'static [u8]>) -> Write<'a> {
    Write {
        context,
        dot: Dot {
            actor: Actor(1),
            counter,
        },
        minter: Minter::Replica,
        value: value.map(Bytes::from_static),
        expires_at_ms: 0,
        keyed: None,
        now_ms: 1_000,
        conflict: Conflict::Siblings,
        siblings_max: 3,
    }
}

#[test]
fn the_sibling_bound_refuses_one_more_value_and_no_delete_and_no_merge() {
    let nothing = Context::default();
    let mut state = State::default();
    for counter in 1..=3 {
        state.put(write(&nothing, counter, Some(b"v"))).unwrap();
    }
    let before = state.clone();
    let refused = state.put(write(&nothing, 4, Some(b"v"))).unwrap_err();
    assert_eq!((refused.live, refused.siblings_max), (3, 3));
    assert_eq!(state, before);

    state.put(write(&nothing, 4, None)).unwrap();
    assert_eq!(
        state.live(1_000).count(),
        3,
        "a blind delete removes nothing"
    );

    let mut elsewhere = State::default();
    for counter in 1..=3 {
        let mut blind = write(&nothing, counter, Some(b"w"));
        blind.dot.actor = Actor(2);
        elsewhere.put(blind).unwrap();
    }
    let merged = state.merge(&elsewhere, Conflict::Siblings).unwrap();
    assert_eq!(merged.live(1_000).count(), 6);

    let seen = merged.context().clone();
    let mut resolved = merged;
    resolved.put(write(&seen, 9, Some(b"one"))).unwrap();
    assert_eq!(resolved.siblings().len(), 1);
}

#[test]
fn blind_deletes_and_expired_values_do_not_pile_up() {
    let nothing = Context::default();
    let mut state = State::default();
    state.put(write(&nothing, 1, Some(b"v"))).unwrap();
    for counter in 2..100 {
        let mut expiring = write(&nothing, counter, Some(b"gone"));
        if counter % 2 == 0 {
            expiring.expires_at_ms = 1;
        } else {
            expiring.value = None;
        }
        state.put(expiring).unwrap();
        assert!(state.siblings().len() <= 4);
    }
    let live: Vec<_> = state.live(1_000).collect();
    assert_eq!(live.len(), 1);
    assert_eq!(live[0].dot.counter, 1);
}

#[test]
fn if_match_wants_every_present_write_covered_and_a_live_value() {
    let nothing = Context::default();
    let mut state = State::default();
    let first = state.put(write(&nothing, 1, Some(b"v"))).unwrap();
    assert!(state.matches(&first, 1_000));
    assert!(!state.matches(&nothing, 1_000));

    let mut deleted = state.clone();
    let deletion = deleted.put(write(&first, 2, None)).unwrap();
    assert!(!deleted.matches(&deletion, 1_000), "nothing is live");
    // Concurrent with the deletion:
    let mut also = write(&first, 3, Some(b"w"));
    also.dot.actor = Actor(2);
    let version = deleted.put(also).unwrap();
    assert_eq!(deleted.live(1_000).count(), 1);
    assert!(!deleted.matches(&version, 1_000), "the tombstone is unseen");
    assert!(deleted.matches(deleted.context(), 1_000));
}

#[test]
fn an_expired_value_is_gone_by_rule_and_a_version_says_no_more_than_was_seen() {
    let nothing = Context::default();
    let mut state = State::default();
    let mut expiring = write(&nothing, 1, Some(b"v"));
    expiring.expires_at_ms = 2_000;
    let version = state.put(expiring).unwrap();
    assert!(state.has_live(1_999) && !state.has_live(2_000));
    assert!(!state.matches(&version, 2_000));

    let blind = state.put(write(&nothing, 2, Some(b"w"))).unwrap();
    let dot = |counter| Dot {
        actor: Actor(1),
        counter,
    };
    assert!(blind.covers(dot(2)) && !blind.covers(dot(1)));
}

#[test]
fn two_writes_under_one_dot_are_reported() {
    let nothing = Context::default();
    let put = |value| {
        let mut state = State::default();
        state.put(write(&nothing, 1, Some(value))).unwrap();
        state
    };
    let clash = put(b"a").merge(&put(b"b"), Conflict::Siblings).unwrap_err();
    assert_eq!(clash.dot.counter, 1);
}

#[test]
fn pruned_actors_do_not_bring_back_what_everyone_has_dropped() {
    let nothing = Context::default();
    let mut state = State::default();
    let first = state.put(write(&nothing, 100, Some(b"old boot"))).unwrap();
    let mut next = write(&first, 200, Some(b"new boot"));
    next.dot.actor = Actor(2);
    state.put(next).unwrap();
    assert_eq!(state.context().actor_count(), 2);

    let behind = state.clone();
    state.prune_below(150);
    assert_eq!(state.context().actor_count(), 1);
    let merged = behind.merge(&state, Conflict::Siblings).unwrap();
    assert_eq!(merged.siblings(), state.siblings());
    state.prune_below(1_000);
    assert_eq!(state.context().actor_count(), 1, "its value is still here");
}
