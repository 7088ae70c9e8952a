//! No dot is minted twice: one dot of a key never stands for two writes.

use std::collections::BTreeMap;

use super::Findings;
use crate::ancestry::Ancestry;
use crate::history::{DotId, History, KeyId, Value};

pub(super) fn check(history: &History, _ancestry: &Ancestry, findings: &mut Findings) {
    let mut first: BTreeMap<(KeyId, DotId), &Option<Value>> = BTreeMap::new();
    for seen in &history.dots {
        let known = first.entry((seen.key, seen.dot)).or_insert(&seen.value);
        if **known != seen.value {
            let name = |value: &Option<Value>| match value {
                Some(value) => value.to_string(),
                None => "a tombstone".to_owned(),
            };
            let (dot, known, other) = (seen.dot, name(known), name(&seen.value));
            findings.add(
                seen.key,
                format!(
                    "dot {:032x}.{} stands for {known} and for {other}",
                    dot.actor, dot.counter
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::check::testing::{accepts, refuses};

    #[test]
    fn one_dot_may_be_seen_often() {
        accepts("put \n dot 1.1 is 0 \n dot 1.1 is 0");
        accepts("put \n put \n dot 1.1 is 0 \n dot 1.2 is 1");
        accepts("put \n put \n dot 1.1 is 0 \n dot 2.1 is 1");
        accepts("delete \n dot 1.1 is tombstone \n dot 1.1 is tombstone");
        accepts("");
    }

    #[test]
    fn one_dot_for_two_writes_is_found() {
        refuses("dots", "put \n put \n dot 1.1 is 0 \n dot 1.1 is 1");
        refuses("dots", "put \n dot 1.1 is tombstone \n dot 1.1 is 0");
        refuses("dots", "put \n dot 1.1 is 0 \n dot 1.1 is tombstone");
        refuses(
            "dots",
            "put \n put \n dot 1.1 is 0 \n dot 2.1 is 1 \n dot 2.1 is 0",
        );
        refuses(
            "dots",
            "put \n put \n dot 9.9 is 1 \n dot 9.9 is 1 \n dot 9.9 is 0",
        );
    }
}
