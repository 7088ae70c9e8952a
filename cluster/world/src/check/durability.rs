//! No acknowledged write is lost: in the end each replica of its key holds it, or a write that
//! replaced it. Without repair as many replicas hold it as its answer counted, hints included: a
//! hint that counted is delivered.

use super::Findings;
use crate::ancestry::Ancestry;
use crate::history::{Final, History, Kind, Outcome, Value, Write, WriteId};

pub(super) fn check(history: &History, ancestry: &Ancestry, findings: &mut Findings) {
    for last in &history.finals {
        let shown = |values: &Vec<Value>| ancestry.shown(values, history.last_look_ns);
        let held = last.replicas.iter().map(|holding| &holding.values);
        let held: Vec<_> = held.map(shown).collect();
        let read = last.read.as_ref().map(shown);
        let of_key = history
            .numbered()
            .filter(|(_, write)| write.key == last.key);
        for (id, write) in of_key {
            let Some(holders) = promised(history, last, write) else {
                continue;
            };
            let found = held.iter().filter(|held| held.accounts_for(id)).count();
            if found < holders {
                findings.add(last.key, lost(last, id, found, holders));
            }
            if let (Some(shown), Some(values)) = (&read, &last.read)
                && !shown.accounts_for(id)
            {
                let shown = list(values);
                findings.add(
                    last.key,
                    format!("acknowledged {id} is lost: a read of all shows {shown}"),
                );
            }
        }
    }
}

/// How many replicas must hold the write in the end; `None` when nothing was promised.
fn promised(history: &History, last: &Final, write: &Write) -> Option<usize> {
    match write.outcome {
        Outcome::Done { .. } if write.kind == Kind::Delete => None,
        Outcome::Done { .. } if history.is_repaired => Some(last.replicas.len()),
        Outcome::Done { replicas, hints } => Some(usize::from(replicas) + usize::from(hints)),
        Outcome::Refused(_) | Outcome::InDoubt(_) => None,
    }
}

fn lost(last: &Final, id: WriteId, found: usize, holders: usize) -> String {
    let holdings = last.replicas.iter();
    let held: Vec<String> = holdings
        .map(|holding| format!("{} holds {}", holding.node, list(&holding.values)))
        .collect();
    let held = held.join("; ");
    format!("acknowledged {id} is lost: {found} of {holders} replicas have it: {held}")
}

/// Values for people.
pub(super) fn list(values: &[Value]) -> String {
    if values.is_empty() {
        return "nothing".to_owned();
    }
    let names: Vec<String> = values.iter().map(Value::to_string).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use crate::check::check;
    use crate::check::testing::{accepts, refuses, tell};

    #[test]
    fn a_write_that_is_there_or_was_replaced_is_not_lost() {
        accepts("put \n final 0 | 0 | 0");
        accepts("put \n put sees 0 \n final 1 | 1 | 1");
        accepts("put \n put \n final 0,1 | 0,1 | 0,1");
        accepts("put \n delete sees 0 \n final - | - | -");
        accepts("put \n put sees 0 doubt \n put sees 1 \n final 2 | 2 | 2");
        accepts("put \n delete sees 0 doubt \n final - | - | -");
        accepts("put doubt \n final - | - | -");
        accepts("put refused \n final - | - | -");
    }

    #[test]
    fn without_repair_as_many_hold_a_write_as_its_answer_counted() {
        let found = |story: &str| {
            let mut history = tell(story);
            history.is_repaired = false;
            check(&history)
        };
        assert!(found("put \n final 0 | - | 0").is_empty());
        assert!(found("put w 2 sloppy counts 1+1 \n final - | 0 | 0 read 0").is_empty());
        for story in [
            "put \n final 0 | - | - read 0",
            "put w 2 sloppy counts 1+1 \n final 0 | - | - read 0",
            "put w 1 \n final - | - | - read -",
        ] {
            assert_eq!(found(story)[0].checker, "durability", "{story}");
        }
    }

    #[test]
    fn a_write_that_nothing_replaced_is_lost() {
        refuses("durability", "put \n final - | - | -");
        refuses("durability", "put \n final 0 | - | 0");
        refuses("durability", "put \n put \n final 1 | 1 | 1");
        refuses("durability", "put \n delete \n final - | - | -");
        refuses(
            "durability",
            "put \n delete sees 0 refused \n final - | - | -",
        );
        refuses("durability", "put \n put sees 0 \n final - | - | -");
        refuses("durability", "put \n final 0 | 0 | 0 read -");
        refuses(
            "durability",
            "put doubt \n put \n put sees 0 \n final 2 | 2 | 2",
        );
    }
}
