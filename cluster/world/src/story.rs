//! The story of a key: who did what to it, in order of time, for the person who reads a violation.

use std::fmt::Write as _;

use crate::check::Violation;
use crate::history::{History, KeyId, Kind, Outcome, Value, WriteId};
use crate::nemesis::Planned;

/// Everything that happened to a key, one event a line, with the faults of the run in between.
pub fn of_key(history: &History, key: KeyId, began_ns: u64, faults: &[Planned]) -> String {
    let mut lines: Vec<(u64, String)> = Vec::new();
    for (id, write) in history.numbered().filter(|(_, write)| write.key == key) {
        let kind = match write.kind {
            Kind::Put => "put",
            Kind::Delete => "delete",
        };
        let sloppy = if write.sloppy { " sloppy" } else { "" };
        let lives = match write.lives_ns {
            Some(lives_ns) => format!(" for {}", millis(lives_ns)),
            None => String::new(),
        };
        lines.push((
            write.begun_ns,
            format!(
                "{id} client {} {kind}{lives} w={}{sloppy} sees [{}]",
                write.client,
                write.w,
                ids(&write.seen)
            ),
        ));
        let outcome = match &write.outcome {
            Outcome::Done { replicas, hints } => {
                format!("done, {replicas} replicas, {hints} hints")
            }
            Outcome::Refused(why) => format!("refused: {why}"),
            Outcome::InDoubt(why) => format!("in doubt: {why}"),
        };
        lines.push((write.ended_ns, format!("{id} {outcome}")));
    }
    for read in history.reads.iter().filter(|read| read.key == key) {
        let shown = match &read.values {
            Some(values) => format!("shows [{}]", values_of(values)),
            None => "failed".to_owned(),
        };
        let session = match &read.at_least {
            Some(seen) => format!(" at least [{}]", ids(seen)),
            None => String::new(),
        };
        lines.push((
            read.ended_ns,
            format!(
                "client {} read r={}{session} since {} {shown}",
                read.client,
                read.r,
                millis(read.begun_ns)
            ),
        ));
    }
    for planned in faults {
        let begins = began_ns + u64::try_from(planned.at.as_nanos()).unwrap_or(u64::MAX);
        let text = format!("fault for {:?}: {:?}", planned.lasts, planned.fault);
        lines.push((begins, text));
    }
    lines.sort();
    let mut story = String::new();
    for (at, line) in lines {
        writeln!(story, "{:>12} {line}", millis(at)).expect("writing to a string");
    }
    for last in history.finals.iter().filter(|last| last.key == key) {
        for holding in &last.replicas {
            writeln!(
                story,
                "{:>12} {} holds [{}] digest {:032x}",
                "in the end",
                holding.node,
                values_of(&holding.values),
                holding.digest
            )
            .expect("writing to a string");
        }
    }
    story
}

/// Everything that a person needs to reproduce and understand violations.
pub(crate) fn of_violations(violations: &[Violation], story: impl Fn(KeyId) -> String) -> String {
    let mut text = String::new();
    for violation in violations {
        writeln!(text, "VIOLATION {violation}").expect("writing to a string");
    }
    let mut keys: Vec<KeyId> = violations.iter().filter_map(|found| found.key).collect();
    keys.sort();
    keys.dedup();
    for key in keys {
        writeln!(text, "the story of {key}:\n{}", story(key)).expect("writing to a string");
    }
    text
}

fn millis(at_ns: u64) -> String {
    format!("{}.{:03}ms", at_ns / 1_000_000, at_ns / 1_000 % 1_000)
}

fn ids(ids: &[WriteId]) -> String {
    let names: Vec<String> = ids.iter().map(WriteId::to_string).collect();
    names.join(" ")
}

fn values_of(values: &[Value]) -> String {
    let names: Vec<String> = values.iter().map(Value::to_string).collect();
    names.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::tell;

    #[test]
    fn a_story_is_in_order_of_time() {
        let history = tell("put \n put sees 0 \n read shows 1 \n final 1 | 1 | 1");
        let story = of_key(&history, KeyId(0), 0, &[]);
        let at = |text: &str| story.find(text).unwrap();
        assert!(at("w0 client") < at("w1 client") && at("w1 client") < at("shows [w1]"));
        assert!(story.ends_with(&format!("n2 holds [w1] digest {:032x}\n", 2)));
    }
}
