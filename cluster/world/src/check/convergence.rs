//! Replicas converge: when all faults are healed and repair had its time, every replica of a key
//! holds the same, and a read and a scan show just that. Without repair, read and scan still agree.

use std::collections::BTreeSet;

use super::Findings;
use super::durability::list;
use crate::ancestry::Ancestry;
use crate::history::{History, Value};

pub(super) fn check(history: &History, _ancestry: &Ancestry, findings: &mut Findings) {
    for last in &history.finals {
        let set = |values: &[Value]| values.iter().cloned().collect::<BTreeSet<_>>();
        let compared = if history.is_repaired {
            last.replicas.as_slice()
        } else {
            &[]
        };
        for pair in compared.windows(2) {
            let [a, b] = pair else { continue };
            if set(&a.values) != set(&b.values) {
                findings.add(
                    last.key,
                    format!(
                        "{} holds {} and {} holds {}",
                        a.node,
                        list(&a.values),
                        b.node,
                        list(&b.values)
                    ),
                );
            } else if a.digest != b.digest {
                findings.add(
                    last.key,
                    format!(
                        "{} and {} hold the same values in unequal states",
                        a.node, b.node
                    ),
                );
            }
        }
        let Some(read) = &last.read else {
            findings.add(last.key, "cannot be read although all is healed".to_owned());
            continue;
        };
        match &last.listed {
            Some(listed) if listed.len() == read.len() && set(listed) == set(read) => {}
            Some(listed) => findings.add(
                last.key,
                format!("a scan shows {}, a read {}", list(listed), list(read)),
            ),
            None => findings.add(
                last.key,
                "cannot be listed although all is healed".to_owned(),
            ),
        }
        if let Some(first) = compared.first()
            && set(&first.values) != set(read)
        {
            findings.add(
                last.key,
                format!(
                    "a read shows {}, replicas hold {}",
                    list(read),
                    list(&first.values)
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::check::testing::{accepts, found, refuses, tell};

    #[test]
    fn equal_replicas_have_converged() {
        accepts("put \n final 0 | 0 | 0");
        accepts("put doubt \n final - | - | -");
        accepts("put \n put \n final 0,1 | 1,0 | 0,1");
        accepts("put \n final 0 | 0 | 0 read 0");
        accepts("");
    }

    #[test]
    fn unequal_replicas_have_not() {
        refuses("convergence", "put doubt \n final 0 | - | 0");
        refuses("convergence", "put doubt \n put \n final 0,1 | 0,1 | 1");
        refuses("convergence", "put doubt \n final - | - | - read 0");
        refuses("convergence", "put doubt \n final 0 | 0 | 0 read -");
        assert_eq!(found("put doubt \n final - | - | 0").len(), 1);
    }

    #[test]
    fn without_repair_replicas_may_differ_but_not_a_read_and_a_scan() {
        let mut history = tell("put w 1 \n final 0 | - | - read 0");
        history.is_repaired = false;
        assert!(crate::check::check(&history).is_empty());
        history.finals[0].listed = Some(Vec::new());
        assert_eq!(crate::check::check(&history)[0].checker, "convergence");
    }

    #[test]
    fn equal_values_in_unequal_states_have_not_converged() {
        let mut history = tell("put \n final 0 | 0 | 0");
        history.finals[0].replicas[1].digest += 1;
        assert_eq!(crate::check::check(&history).len(), 2);
    }

    #[test]
    fn a_scan_that_misses_a_key_or_lists_it_twice_is_found() {
        let mut history = tell("put \n final 0 | 0 | 0");
        assert!(crate::check::check(&history).is_empty());
        let value = history.finals[0].replicas[0].values[0].clone();
        for wrong in [None, Some(Vec::new()), Some(vec![value; 2])] {
            history.finals[0].listed = wrong;
            assert_eq!(crate::check::check(&history)[0].checker, "convergence");
        }
    }

    #[test]
    fn a_key_that_cannot_be_read_after_healing_is_found() {
        let mut history = tell("put \n final 0 | 0 | 0");
        history.finals[0].read = None;
        assert_eq!(crate::check::check(&history)[0].checker, "convergence");
    }
}
