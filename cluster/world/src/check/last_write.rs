//! Where writes are ordered by time, the last one wins: no replica holds a value in the end that is stamped below a write
//! which was seen in a store before. That a write is stamped above all that it had seen is for the other checkers.

use super::Findings;
use crate::ancestry::Ancestry;
use crate::history::{DotSeen, History, KeyId, Value};

pub(super) fn check(history: &History, _ancestry: &Ancestry, findings: &mut Findings) {
    if !history.is_ordered_by_time || !history.is_repaired {
        return;
    }
    for last in &history.finals {
        for holding in &last.replicas {
            for value in &holding.values {
                let newest = newest_stamp(history, last.key, |seen| stays(history, seen));
                let own =
                    newest_stamp(history, last.key, |seen| seen.value.as_ref() == Some(value));
                if own < newest {
                    let what = losing(&holding.node, value, own, newest);
                    findings.add(last.key, what);
                }
            }
        }
    }
}

/// Whether what was seen in a store is promised to stay in one.
fn stays(history: &History, seen: &DotSeen) -> bool {
    let write = seen.value.as_ref().and_then(Value::write);
    let write = write.and_then(|id| history.writes.get(id.index()));
    !history.loses_what_is_in_doubt || write.is_some_and(|write| write.outcome.is_done())
}

fn newest_stamp(history: &History, key: KeyId, matches: impl Fn(&DotSeen) -> bool) -> Option<u64> {
    let of_key = history.dots.iter().filter(|seen| seen.key == key);
    let matching = of_key.filter(|seen| matches(seen));
    matching.map(|seen| seen.dot.counter).max()
}

fn losing(node: &str, value: &Value, own: Option<u64>, newest: Option<u64>) -> String {
    format!("{node} holds {value} of stamp {own:?}, but there was one of {newest:?}")
}

#[cfg(test)]
mod tests {
    use crate::check::check;
    use crate::check::testing::{accepts, refuses, tell};

    #[test]
    fn the_highest_stamp_wins_whoever_was_first() {
        accepts("lww \n put \n put \n dot 1.1 is 0 \n dot 2.2 is 1 \n final 1 | 1 | 1");
        accepts("lww \n put \n & put \n dot 1.9 is 0 \n dot 2.2 is 1 \n final 0 | 0 | 0");
        accepts("put \n put \n dot 1.1 is 0 \n dot 2.2 is 1 \n final 0,1 | 0,1 | 0,1");
        accepts("lww \n put \n delete \n dot 2.2 is tombstone \n final - | - | -");
    }

    #[test]
    fn where_a_disk_rots_only_what_was_acknowledged_has_to_win() {
        let found = |outcome: &str| {
            let dots = "dot 1.1 is 0 \n dot 2.2 is 1 \n final 0 | 0 | 0";
            let mut history = tell(&format!("lww \n put \n & put {outcome} \n {dots}"));
            history.loses_what_is_in_doubt = true;
            check(&history)
        };
        assert!(found("doubt").is_empty());
        assert_eq!(found("")[0].checker, "last_write");
    }

    #[test]
    fn a_lower_one_that_won_is_found() {
        for story in [
            "lww \n put \n & put \n dot 1.1 is 0 \n dot 2.2 is 1 \n final 0 | 0 | 0",
            "lww \n put \n & delete doubt \n dot 1.1 is 0 \n dot 2.2 is tombstone \n final 0 | 0 | 0",
        ] {
            refuses("last_write", story);
        }
    }
}
