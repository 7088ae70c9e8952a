//! What a key remembers of keyed requests.

use bytes::Bytes;
use torc_cluster::api::Idempotency;
use torc_cluster::conflict::Conflict;
use torc_cluster::version::{
    Actor, Answered, Context, Dot, Keyed, Minter, REMEMBERED_MAX, State, Write,
};

const START: u64 = 1_700_000_000_000_000;
const RETENTION_MS: u64 = 900_000;

fn request(id: u128) -> Idempotency {
    Idempotency { id, body_hash: 7 }
}

fn dot(actor: u128, after: u64) -> Dot {
    Dot {
        actor: Actor(actor),
        counter: START + after,
    }
}

fn write(context: &Context, dot: Dot, id: Option<u128>) -> Write<'_> {
    Write {
        context,
        dot,
        minter: Minter::Replica,
        value: Some(Bytes::from_static(b"v")),
        expires_at_ms: 0,
        keyed: id.map(|id| Keyed {
            request: request(id),
            until_ms: dot.counter / 1000 + RETENTION_MS,
        }),
        now_ms: dot.counter / 1000,
        conflict: Conflict::Siblings,
        siblings_max: 100,
    }
}

fn put(state: &mut State, write: Write<'_>) -> Context {
    state.put(write).unwrap()
}

#[test]
fn a_replay_gets_the_first_answer_through_overwrite_delete_merge_and_storage() {
    let nothing = Context::default();
    let mut state = State::default();
    let answer = put(&mut state, write(&nothing, dot(1, 1), Some(5)));
    assert_eq!(state.answered(5, 7), Answered::With(answer.clone()));
    assert_eq!(state.answered(5, 8), Answered::OtherBody);
    assert_eq!(state.answered(6, 7), Answered::No);

    let seen = state.context().clone();
    put(&mut state, write(&seen, dot(2, 2), None));
    let seen = state.context().clone();
    let mut deletion = write(&seen, dot(1, 3), None);
    deletion.value = None;
    put(&mut state, deletion);
    let elsewhere = State::default().merge(&state, Conflict::Siblings).unwrap();
    let stored = State::from_record(&elsewhere.to_record()).unwrap();
    match stored.answered(5, 7) {
        Answered::With(again) => assert_eq!(again.to_opaque(), answer.to_opaque()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_request_is_forgotten_after_its_time_and_over_newer_ones() {
    let nothing = Context::default();
    let mut state = State::default();
    put(&mut state, write(&nothing, dot(1, 1), Some(5)));
    let old = state.clone();
    let late = (RETENTION_MS + 1_000) * 1000;
    let seen = state.context().clone();
    put(&mut state, write(&seen, dot(1, late), None));
    assert_eq!(state.answered(5, 7), Answered::No);
    let merged = state.merge(&old, Conflict::Siblings).unwrap();
    assert_eq!(merged, state, "merging does not bring it back");

    for id in 0..100 {
        let seen = state.context().clone();
        let after = late + 1 + u64::try_from(id).unwrap();
        put(&mut state, write(&seen, dot(1, after), Some(id)));
    }
    let remembered = (0..100).filter(|id| state.answered(*id, 7) != Answered::No);
    assert_eq!(remembered.count(), REMEMBERED_MAX);
    assert_ne!(state.answered(99, 7), Answered::No);
}

/// One request was put on two coordinators that did not know of each other.
fn overlapping() -> (State, State, Context, Context) {
    let nothing = Context::default();
    let (mut low, mut high) = (State::default(), State::default());
    let low_answer = put(&mut low, write(&nothing, dot(1, 1), Some(5)));
    let high_answer = put(&mut high, write(&nothing, dot(2, 2), Some(5)));
    (low, high, low_answer, high_answer)
}

#[test]
fn of_two_dots_of_one_request_the_lower_survives() {
    let (low, high, low_answer, _) = overlapping();
    let merged = low.merge(&high, Conflict::Siblings).unwrap();
    let dots: Vec<Dot> = merged
        .siblings()
        .iter()
        .map(|sibling| sibling.dot)
        .collect();
    assert_eq!(dots, [dot(1, 1)]);
    assert!(merged.context().covers(dot(2, 2)));
    assert_eq!(merged.answered(5, 7), Answered::With(low_answer));
    assert_eq!(State::decode(&merged.encode()), Ok(merged));
}

#[test]
fn whoever_saw_either_dot_of_a_request_replaces_the_write() {
    let (low, high, low_answer, high_answer) = overlapping();
    for answer in [&low_answer, &high_answer] {
        // The retries meet before the next write ...
        let mut met = low.merge(&high, Conflict::Siblings).unwrap();
        put(&mut met, write(answer, dot(3, 9), None));
        assert_eq!(met.siblings().len(), 1);
        // ... or after it, which went through a replica that knew one of them, or none.
        for base in [&low, &high, &State::default()] {
            let mut next = base.clone();
            put(&mut next, write(answer, dot(3, 9), None));
            let merged = next.merge(&low, Conflict::Siblings).unwrap();
            let merged = merged.merge(&high, Conflict::Siblings).unwrap();
            assert_eq!(merged.siblings().len(), 1, "over {base:?}");
            assert_eq!(merged.siblings()[0].dot, dot(3, 9));
        }
    }
}

#[test]
fn one_id_with_two_bodies_loses_neither_write() {
    let (low, _, _, _) = overlapping();
    let nothing = Context::default();
    let mut other = State::default();
    let mut body = write(&nothing, dot(2, 2), Some(5));
    body.keyed = body.keyed.map(|keyed| Keyed {
        request: Idempotency {
            id: 5,
            body_hash: 8,
        },
        ..keyed
    });
    put(&mut other, body);
    let merged = low.merge(&other, Conflict::Siblings).unwrap();
    assert_eq!(merged.siblings().len(), 2);
    assert_eq!(merged.answered(5, 8), Answered::OtherBody);
}

#[test]
fn under_last_write_the_highest_dot_stays_and_the_first_answer_is_replayed() {
    let (low, high, low_answer, _) = overlapping();
    let merged = low.merge(&high, Conflict::Lww).unwrap();
    assert_eq!(merged.siblings().len(), 1);
    assert_eq!(merged.siblings()[0].dot, dot(2, 2));
    assert_eq!(merged.answered(5, 7), Answered::With(low_answer));
}
