//! A value expires at one absolute time: that of its writer's wish, counted from when it was written, and the same
//! wherever it is asked for. Nobody is shown it afterwards, except by a clock that is behind.
//!
//! That it is not gone before is for the other checkers, which let it be missing from then on only.

use std::collections::BTreeMap;

use super::Findings;
use crate::ancestry::Ancestry;
use crate::history::{History, KeyId, Value, Write, WriteId};

pub(super) fn check(history: &History, _ancestry: &Ancestry, findings: &mut Findings) {
    let mut told = BTreeMap::new();
    for read in &history.reads {
        let values = read.values.as_deref().unwrap_or_default();
        for (value, expires_ns) in values.iter().zip(&read.expire_ns) {
            check_told(history, &mut told, value, *expires_ns, findings);
        }
        let whose = format!("client {}", read.client);
        check_shown(history, read.key, &whose, values, read.begun_ns, findings);
    }
    for seen in &history.dots {
        if let Some(value) = &seen.value {
            check_told(history, &mut told, value, seen.expires_ns, findings);
        }
    }
    for last in &history.finals {
        let at_ns = history.last_look_ns;
        for holding in &last.replicas {
            check_shown(
                history,
                last.key,
                &holding.node,
                &holding.values,
                at_ns,
                findings,
            );
        }
        let read = last.read.as_deref().unwrap_or_default();
        check_shown(history, last.key, "the last read", read, at_ns, findings);
    }
}

fn write_of<'a>(history: &'a History, value: &Value) -> Option<(WriteId, &'a Write)> {
    let id = value.write()?;
    Some((id, history.writes.get(id.index())?))
}

/// What an answer or a replica says of the time when a value expires.
fn check_told(
    history: &History,
    told: &mut BTreeMap<WriteId, Option<u64>>,
    value: &Value,
    expires_ns: Option<u64>,
    findings: &mut Findings,
) {
    let Some((id, write)) = write_of(history, value) else {
        return;
    };
    // One that was sent twice may have been written twice.
    let first = *told.entry(id).or_insert(expires_ns);
    if first != expires_ns && !write.is_retried {
        let what = format!(
            "{id} expires at {}, and at {}",
            time(first),
            time(expires_ns)
        );
        findings.add(write.key, what);
    }
    let (min, max) = (history.expires_ns_min(write), history.expires_ns_max(write));
    if expires_ns < min || expires_ns > max {
        let what = format!(
            "{id} expires at {}, not from {} to {}",
            time(expires_ns),
            time(min),
            time(max)
        );
        findings.add(write.key, what);
    }
}

fn check_shown(
    history: &History,
    key: KeyId,
    whose: &str,
    values: &[Value],
    at_ns: u64,
    findings: &mut Findings,
) {
    for (id, write) in values.iter().filter_map(|value| write_of(history, value)) {
        let Some(expired_ns) = history.expires_ns_max(write) else {
            continue;
        };
        if at_ns > expired_ns.saturating_add(history.times.clock_off_ns) {
            let what = format!(
                "{whose} sees {id}, which expired at {}",
                time(Some(expired_ns))
            );
            findings.add(key, what);
        }
    }
}

fn time(at_ns: Option<u64>) -> String {
    match at_ns {
        Some(at_ns) => format!("{}.{:03}ms", at_ns / 1_000_000, at_ns / 1_000 % 1_000),
        None => "no time".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use crate::check::check;
    use crate::check::testing::{accepts, found, refuses, tell};

    #[test]
    fn a_value_may_be_there_until_it_expires_and_missing_from_then_on() {
        accepts("put lives 100 \n read shows 0");
        accepts("put lives 100 \n wait 90 \n read shows 0");
        accepts("put lives 100 \n wait 90 \n read shows -");
        accepts("put lives 100 \n wait 100 \n final - | - | -");
        accepts("put \n put lives 10 sees 0 \n wait 10 \n read shows -");
        accepts("put doubt lives 100 \n final 0 | 0 | 0");
        accepts("lww \n put \n put lives 10 \n wait 10 \n read shows -");
    }

    #[test]
    fn a_value_that_is_gone_too_early_is_found() {
        refuses("freshness", "put lives 100 \n read shows -");
        refuses("freshness", "put \n put sees 0 lives 100 \n read shows -");
        refuses("durability", "put lives 100 \n final - | - | -");
        refuses(
            "freshness",
            "put \n put refused sees 0 lives 1 \n read shows -",
        );
        refuses("freshness", "put \n put lives 1 \n wait 10 \n read shows -");
    }

    #[test]
    fn a_value_that_is_there_when_it_has_expired_is_found() {
        refuses("expiry", "put lives 10 \n wait 10 \n read shows 0");
        refuses("expiry", "put lives 10 \n wait 10 \n final 0 | 0 | 0");
        refuses(
            "expiry",
            "put lives 10 \n wait 10 \n final - | - | - read 0",
        );
        refuses(
            "resurrection",
            "put \n put lives 10 sees 0 \n wait 10 \n read shows 0",
        );
    }

    #[test]
    fn clocks_and_late_writes_are_allowed_for() {
        let mut history = tell("put lives 10 \n wait 10 \n read shows 0");
        history.times.clock_off_ns = 5;
        assert!(check(&history).is_empty());
        let mut history = tell("put doubt lives 10 \n wait 10 \n read shows 0");
        assert_eq!(check(&history).len(), 1);
        history.times.late_ns = 10;
        assert!(check(&history).is_empty());
    }

    #[test]
    fn a_value_expires_at_one_time_and_at_the_right_one() {
        accepts("put lives 100 \n dot 7.1 is 0 expires 110 \n dot 7.1 is 0 expires 110");
        accepts("put retried lives 100 \n dot 7.1 is 0 expires 110 \n dot 8.1 is 0 expires 112");
        for wrong in [
            "put lives 100 \n dot 7.1 is 0 expires 110 \n dot 7.1 is 0 expires 111",
            "put lives 100 \n dot 7.1 is 0 expires 109",
            "put lives 100 \n dot 7.1 is 0 expires 116",
            "put lives 100 \n dot 7.1 is 0",
            "put \n dot 7.1 is 0 expires 110",
        ] {
            refuses("expiry", wrong);
        }
        let mut history = tell("put lives 100 \n read shows 0 \n read shows 0");
        for (read, expires_ns) in history.reads.iter_mut().zip([110, 112]) {
            read.expire_ns = vec![Some(expires_ns)];
        }
        assert_eq!(check(&history)[0].checker, "expiry");
        assert!(found("put lives 100 \n dot 7.1 is tombstone").is_empty());
    }
}
