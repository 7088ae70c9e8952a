//! Histories as stories of one step a line, for the checkers' tests.
//!
//! Steps follow each other in time; one that starts with `&` begins together with the step before
//! it. Writes are numbered from 0 in order of appearance.
//!
//! ```text
//! put [sees 0,1] [w 2] [client 1] [retried] [lives 100] [refused | doubt | counts 2+1]
//! delete …
//! read shows 0,1 | shows - | shows ? | fails  [r 2] [client 1] [at_least 0,1]
//! dot 7.1 is 0 [expires 70] | dot 7.1 is tombstone
//! final 0,1 | 0,1 | 0,1 [read 0,1]
//! wait 100
//! lww
//! ```
//!
//! The last one says that writes are ordered by time. A step takes 5 and begins 10 after the one before.

use super::{Violation, check};
use crate::history::{
    DotId, DotSeen, Final, History, Holding, KeyId, Kind, Outcome, Read, Value, Write, WriteId,
};

pub(crate) fn w(number: u32) -> WriteId {
    WriteId(number)
}

/// What is found in a story of three replicas.
pub(crate) fn found(story: &str) -> Vec<Violation> {
    check(&tell(story))
}

/// Asserts that no checker objects.
pub(crate) fn accepts(story: &str) {
    let violations = found(story);
    assert!(violations.is_empty(), "{violations:?} in:\n{story}");
}

/// Asserts that this checker objects.
pub(crate) fn refuses(checker: &str, story: &str) {
    let violations = found(story);
    assert!(
        violations.iter().any(|found| found.checker == checker),
        "{checker} did not object, only {violations:?}, in:\n{story}"
    );
}

/// The history of a story of three replicas.
pub(crate) fn tell(story: &str) -> History {
    let mut history = History {
        n: 3,
        is_repaired: true,
        ..History::default()
    };
    let mut now = 0;
    for line in story.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(time) = line.strip_prefix("wait ") {
            now += time.parse::<u64>().unwrap();
            continue;
        }
        let (line, together) = match line.strip_prefix("& ") {
            Some(rest) => (rest, true),
            None => (line, false),
        };
        if !together {
            now += 10;
        }
        step(&mut history, line, now);
    }
    history
}

const KEY: KeyId = KeyId(0);

fn step(history: &mut History, line: &str, now: u64) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let after = |word: &str| {
        let at = words.iter().position(|other| *other == word)?;
        words.get(at + 1).copied()
    };
    let number =
        |word: &str, default: &str| -> u8 { after(word).unwrap_or(default).parse().unwrap() };
    let client = u16::from(number("client", "0"));
    match words[0] {
        "lww" => history.is_ordered_by_time = true,
        kind @ ("put" | "delete") => {
            let all = format!("{}+0", number("w", "2"));
            let counts = after("counts").unwrap_or(&all);
            let (replicas, hints) = counts.split_once('+').unwrap();
            let outcome = if words.contains(&"refused") {
                Outcome::Refused("refused".to_owned())
            } else if words.contains(&"doubt") {
                Outcome::InDoubt("no answer".to_owned())
            } else {
                Outcome::Done {
                    replicas: replicas.parse().unwrap(),
                    hints: hints.parse().unwrap(),
                }
            };
            history.writes.push(Write {
                client,
                key: KEY,
                kind: if kind == "put" {
                    Kind::Put
                } else {
                    Kind::Delete
                },
                seen: writes(after("sees").unwrap_or("-")),
                w: number("w", "2"),
                sloppy: words.contains(&"sloppy"),
                lives_ns: after("lives").map(|time| time.parse().unwrap()),
                is_retried: words.contains(&"retried"),
                begun_ns: now,
                ended_ns: now + 5,
                outcome,
            });
        }
        "read" => history.reads.push(Read {
            client,
            key: KEY,
            r: number("r", "2"),
            at_least: after("at_least").map(writes),
            begun_ns: now,
            ended_ns: now + 5,
            values: after("shows").map(values),
            expire_ns: Vec::new(),
        }),
        "dot" => {
            let (actor, counter) = words[1].split_once('.').unwrap();
            history.dots.push(DotSeen {
                key: KEY,
                dot: DotId {
                    actor: actor.parse().unwrap(),
                    counter: counter.parse().unwrap(),
                },
                value: (words[3] != "tombstone").then(|| Value::Of(writes(words[3])[0])),
                expires_ns: after("expires").map(|time| time.parse().unwrap()),
            });
        }
        "final" => {
            let body = line.strip_prefix("final").unwrap();
            let (body, read) = match body.split_once("read") {
                Some((body, read)) => (body, values(read.trim())),
                None => (body, values(body.split('|').next().unwrap().trim())),
            };
            let replicas = body.split('|').enumerate().map(|(index, part)| {
                let values = values(part.trim());
                Holding {
                    node: format!("n{index}"),
                    digest: values
                        .iter()
                        .filter_map(Value::write)
                        .map(|w| 1 << w.0)
                        .sum(),
                    values,
                }
            });
            history.last_look_ns = now;
            history.finals.push(Final {
                key: KEY,
                replicas: replicas.collect(),
                listed: Some(read.clone()),
                read: Some(read),
            });
        }
        other => panic!("not a step: {other}"),
    }
}

fn writes(list: &str) -> Vec<WriteId> {
    values(list).iter().filter_map(Value::write).collect()
}

fn values(list: &str) -> Vec<Value> {
    list.split(',')
        .filter(|name| *name != "-" && !name.is_empty())
        .map(|name| match name.parse() {
            Ok(number) => Value::Of(WriteId(number)),
            Err(_) => Value::Foreign(name.to_owned()),
        })
        .collect()
}
