//! The bytes of a state: pinned, and hostile ones refused.

use bytes::Bytes;
use proptest::prelude::*;
use torc_cluster::api::Idempotency;
use torc_cluster::conflict::Conflict;
use torc_cluster::version::{
    Actor, Applied, ApplyError, Context, Dot, FORMAT_VERSION, Keyed, Minter, State, StateError,
    StateRef, Write, apply,
};
use torc_engine::record::{Kind, Record};

use crate::history::{World, steps};

const PAGE: &str = include_str!("../../../docs/formats/state.md");
const NOW_MS: u64 = 1_700_000_000_000;

/// A value with an expiry that a replica minted for a keyed request, a value of a guest that it
/// replaced by way of its context, and a tombstone that knows of neither.
fn sample() -> State {
    let guest = Dot {
        actor: Actor(0x1111_1111_1111_1111_1111_1111_1111_1111),
        counter: 1_700_000_000_000_001,
    };
    let context: Context = [guest].into_iter().collect();
    let write = Write {
        context: &context,
        dot: Dot {
            actor: Actor(0x2222_2222_2222_2222_2222_2222_2222_2222),
            counter: 1_700_000_000_000_002,
        },
        minter: Minter::Replica,
        value: Some(Bytes::from_static(b"hello")),
        expires_at_ms: NOW_MS + 60_000,
        keyed: Some(Keyed {
            request: Idempotency {
                id: 0x3333_3333_3333_3333_3333_3333_3333_3333,
                body_hash: 0x4444_4444_4444_4444,
            },
            until_ms: NOW_MS + 900_000,
        }),
        now_ms: NOW_MS,
        conflict: Conflict::Siblings,
        siblings_max: 10,
    };
    let mut state = State::default();
    state.put(write.clone()).unwrap();
    let nothing = Context::default();
    let deletion = Write {
        context: &nothing,
        dot: Dot {
            actor: Actor(0x5555_5555_5555_5555_5555_5555_5555_5555),
            counter: 1_700_000_000_000_003,
        },
        value: None,
        expires_at_ms: 0,
        keyed: None,
        ..write
    };
    state.put(deletion).unwrap();
    state
}

fn hexdump(bytes: &[u8]) -> String {
    bytes
        .chunks(16)
        .enumerate()
        .map(|(line, chunk)| {
            let hex: Vec<String> = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{:04x}  {}\n", line * 16, hex.join(" "))
        })
        .collect()
}

/// A head and values, with a check between them that fits the head.
fn with_check(head: &[u8], values: &[u8]) -> Bytes {
    let check = xxhash_rust::xxh3::xxh3_128(head).to_le_bytes();
    [head, &check[..8], values].concat().into()
}

/// The bytes of [`sample`], before its check and after.
fn sample_parts() -> (Vec<u8>, Vec<u8>) {
    let bytes = sample().encode();
    let values = bytes.len() - b"hello".len();
    (bytes[..values - 8].to_vec(), bytes[values..].to_vec())
}

#[test]
fn the_bytes_of_a_state_are_those_of_the_format_page() {
    let dump = hexdump(&sample().encode());
    assert!(
        PAGE.contains(&dump),
        "docs/formats/state.md lacks this dump (a change of it is a change of format):\n{dump}"
    );
    assert_eq!(State::decode(&sample().encode()), Ok(sample()));
    assert_eq!(State::default().encode().len(), 16);
}

#[test]
fn every_flipped_bit_and_every_truncation_is_an_error() {
    let sound = sample().encode();
    for place in 0..sound.len() {
        for bit in 0..8 {
            let mut bytes = sound.to_vec();
            bytes[place] ^= 1 << bit;
            let error = State::decode(&bytes.into()).unwrap_err();
            let is_version = matches!(error, StateError::Version { .. });
            assert_eq!(is_version, place == 0, "{error}");
        }
    }
    for len in 0..sound.len() {
        assert!(State::decode(&sound.slice(..len)).is_err(), "{len} bytes");
    }
}

#[test]
fn only_those_who_show_a_value_notice_its_damage() {
    let mut bytes = sample().encode().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    assert!(matches!(
        StateRef::parse(&bytes),
        Err(StateError::Check { .. })
    ));
    let head = StateRef::parse_head(&bytes).unwrap();
    assert_eq!(head.digest(), sample().digest());
    // Written again beside another state, the value is as damaged as before, and found to be.
    let record = Record {
        value: bytes.into(),
        ..sample().to_record()
    };
    let carried = State::from_record(&record).unwrap();
    assert!(matches!(
        State::decode(&carried.encode()),
        Err(StateError::Check { .. })
    ));
}

#[test]
fn behind_a_fitting_check_every_flip_is_an_error_or_another_state_with_those_bytes() {
    let (head, values) = sample_parts();
    let mut refused = 0;
    for place in 0..head.len() {
        for bit in 0..8 {
            let mut head = head.clone();
            head[place] ^= 1 << bit;
            let bytes = with_check(&head, &values);
            match State::decode(&bytes) {
                Ok(state) => assert_eq!(state.encode(), bytes, "flip of bit {bit} at {place}"),
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > 100, "only {refused} flips broke a rule");
    for cut in 0..head.len() {
        let bytes = with_check(&head[..cut], &values);
        assert!(State::decode(&bytes).is_err(), "cut at {cut}");
    }
}

#[test]
fn a_newer_version_says_so() {
    let (mut head, values) = sample_parts();
    head[0] = FORMAT_VERSION + 1;
    let found = FORMAT_VERSION + 1;
    assert_eq!(
        State::decode(&with_check(&head, &values)),
        Err(StateError::Version { found })
    );
}

#[test]
fn the_view_shows_what_the_state_holds_without_copying() {
    let state = sample();
    let encoded = state.encode();
    let view = StateRef::parse(&encoded).unwrap();
    assert_eq!(view.context(), *state.context());
    assert_eq!(view.newest_stamp(), state.newest_stamp());
    assert_eq!(view.digest(), state.digest());
    assert_eq!(view.single(NOW_MS), None, "there is a tombstone beside it");
    let live: Vec<_> = view.live(NOW_MS).collect();
    assert_eq!(live.len(), 1);
    assert_eq!(live[0].value, Some(&b"hello"[..]));
    let place = live[0].value.unwrap().as_ptr() as usize - encoded.as_ptr() as usize;
    assert!(place < encoded.len());
    assert_eq!(view.live(NOW_MS + 60_000).count(), 0);

    let decoded = State::decode(&encoded).unwrap();
    let value = decoded.siblings()[0].value.clone().unwrap();
    assert_eq!(value.as_ptr(), encoded[place..].as_ptr());
}

#[test]
fn the_leaf_hash_counts_writes_and_not_what_was_superseded() {
    let leaf = |state: &State, key: &[u8]| {
        let encoded = state.encode();
        StateRef::parse(&encoded).unwrap().leaf_hash(key)
    };
    let state = sample();
    assert_ne!(leaf(&state, b"a"), leaf(&state, b"b"));
    assert_ne!(leaf(&state, b"a"), leaf(&State::default(), b"a"));
    let mut pruned = state.clone();
    pruned.prune_below(1_700_000_000_000_002);
    assert_ne!(pruned, state);
    assert_eq!(leaf(&pruned, b"a"), leaf(&state, b"a"));
    let pinned = format!("{:032x}", leaf(&state, b"greeting"));
    assert_eq!(
        pinned, "fc2394513fc54b74e614f601b8cc73c2",
        "every hash tree on disk would differ"
    );
}

#[test]
fn a_record_lives_as_long_as_its_state_needs() {
    let record = sample().to_record();
    assert_eq!(record.kind, Kind::Value);
    assert_eq!(record.stamp, 1_700_000_000_000_003);
    // Expires with its value, but not before the answer is forgotten.
    assert_eq!(record.expires_at_ms, NOW_MS + 900_000);

    let mut deleted = sample();
    let seen = deleted.context().clone();
    let deletion = Write {
        context: &seen,
        dot: Dot {
            actor: Actor(1),
            counter: 1_700_000_000_000_010,
        },
        minter: Minter::Replica,
        value: None,
        expires_at_ms: 0,
        keyed: None,
        now_ms: NOW_MS,
        conflict: Conflict::Siblings,
        siblings_max: 10,
    };
    deleted.put(deletion.clone()).unwrap();
    let record = deleted.to_record();
    assert_eq!(record.kind, Kind::Tombstone);
    assert_eq!(record.stamp, (NOW_MS + 900_000) * 1000);
    assert_eq!(record.expires_at_ms, 0);
    assert_eq!(State::from_record(&record), Ok(deleted.clone()));

    // A value without expiry keeps the record for ever; one write later the stamp is plain again.
    let later = Write {
        dot: Dot {
            actor: Actor(1),
            counter: (NOW_MS + 900_001) * 1000,
        },
        value: Some(Bytes::from_static(b"v")),
        ..deletion
    };
    deleted.put(later).unwrap();
    let record = deleted.to_record();
    assert_eq!((record.kind, record.expires_at_ms), (Kind::Value, 0));
    assert_eq!(record.stamp, (NOW_MS + 900_001) * 1000);
}

#[test]
fn a_damaged_record_is_unknown_and_is_not_overwritten() {
    let incoming = sample().encode();
    let mut record = sample().to_record();
    let mut damaged = record.value.to_vec();
    damaged[20] ^= 1;
    record.value = damaged.clone().into();
    assert!(matches!(
        apply(Some(&record), &incoming, Conflict::Siblings),
        Err(ApplyError::Stored(StateError::Check { .. }))
    ));
    assert!(matches!(
        apply(None, &damaged.into(), Conflict::Siblings),
        Err(ApplyError::Incoming(StateError::Check { .. }))
    ));
}

proptest! {
    #[test]
    fn applying_is_merging_and_takes_incoming_bytes_as_they_are_when_it_can(
        steps in steps(true)
    ) {
        let mut world = World::new(Conflict::Siblings, true);
        for step in &steps {
            world.take(step);
            let (ours, theirs) = (world.state(0), world.state(1));
            let merged = ours.merge(theirs, Conflict::Siblings).unwrap();
            let stored = ours.to_record();
            let incoming = theirs.encode();
            match apply(Some(&stored), &incoming, Conflict::Siblings).unwrap() {
                Applied::Unchanged => prop_assert_eq!(&merged, ours),
                Applied::Write(record) => {
                    prop_assert_eq!(&record, &merged.to_record());
                    if merged == *theirs {
                        prop_assert_eq!(record.value.as_ptr(), incoming.as_ptr());
                    }
                }
            }
            let first = apply(None, &incoming, Conflict::Siblings).unwrap();
            prop_assert_eq!(first, Applied::Write(theirs.to_record()));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(State::decode(&bytes.clone().into()).is_err());
        if bytes.len() >= 14 {
            let mut near = bytes.clone();
            near[..6].copy_from_slice(&[FORMAT_VERSION, 0, bytes[2] % 4, 0, bytes[4] % 4, 0]);
            let near = with_check(&near, &bytes[..bytes.len() % 3]);
            if let Ok(state) = State::decode(&near) {
                prop_assert_eq!(state.encode(), near);
            }
        }
        if let Ok(context) = Context::from_bytes(&bytes) {
            prop_assert_eq!(context.to_bytes(), bytes.clone());
        }
        prop_assert!(Context::from_opaque(&String::from_utf8_lossy(&bytes)).is_err());
    }
}
