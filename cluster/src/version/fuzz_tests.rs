//! No bytes make the readers of states panic, also behind a check that fits.

use bytes::Bytes;

use super::{Actor, Context, Dot, Keyed, Minter, State, StateError, StateRef, Write};
use crate::api::Idempotency;
use crate::conflict::Conflict;
use crate::fuzz::parser;

const NOW_MS: u64 = 1_700_000_000_000;

/// States of one value, of several siblings, and with an answer that is remembered.
fn states() -> Vec<Vec<u8>> {
    let mut state = State::default();
    let mut states = vec![state.encode().to_vec()];
    for actor in 1..=3u8 {
        let keyed = Keyed {
            request: Idempotency {
                id: actor.into(),
                body_hash: 4,
            },
            until_ms: NOW_MS + 900_000,
        };
        let write = Write {
            context: &Context::default(),
            dot: Dot {
                actor: Actor(actor.into()),
                counter: NOW_MS * 1_000 + u64::from(actor),
            },
            minter: Minter::Replica,
            value: (actor != 2).then(|| Bytes::from_static(b"value")),
            expires_at_ms: if actor == 3 { NOW_MS } else { 0 },
            keyed: (actor == 3).then_some(keyed),
            now_ms: NOW_MS,
            conflict: Conflict::Siblings,
            siblings_max: 10,
        };
        state.put(write).unwrap();
        states.push(state.encode().to_vec());
    }
    states
}

/// `bytes` with the check that its head asks for, if it is the head's check that is wrong.
fn with_check(bytes: &[u8]) -> Option<Bytes> {
    let Err(StateError::Check { stored, computed }) = StateRef::parse_head(bytes) else {
        return None;
    };
    let wrong = stored.to_le_bytes();
    let at = bytes.windows(wrong.len()).position(|part| part == wrong)?;
    let mut fitting = bytes.to_vec();
    fitting[at..at + wrong.len()].copy_from_slice(&computed.to_le_bytes());
    Some(fitting.into())
}

#[test]
fn no_bytes_make_a_state_panic() {
    let valid = states();
    let stored = State::decode(&Bytes::copy_from_slice(&valid[2])).unwrap();
    parser("state", &valid).fuzz(|input| {
        let plain = Bytes::copy_from_slice(input);
        let fitting = with_check(input);
        for bytes in [Some(plain), fitting].into_iter().flatten() {
            let Ok(head) = StateRef::parse_head(&bytes) else {
                continue;
            };
            head.digest();
            head.leaf_hash(b"key");
            head.newest_stamp();
            head.single(NOW_MS);
            head.live(NOW_MS).for_each(drop);
            drop(head.context());
            let Ok(state) = State::decode(&bytes) else {
                continue;
            };
            assert_eq!(state.encode(), bytes, "one state, one form");
            for conflict in [Conflict::Siblings, Conflict::Lww] {
                if let Ok(merged) = stored.merge(&state, conflict) {
                    drop(merged.to_record());
                }
            }
        }
    });
}
