//! Before and after, interleaved, with a verdict for each knob.
//!
//! Each group of changes is switched on and off in the order of [`abba`]; a
//! measurement follows each switch, and the statistics that `torc load compare` uses judge it. One group
//! at a time, so a gain has a name.

use serde::{Deserialize, Serialize};

use crate::change::Change;
use crate::stats::{Arm, CompareOptions, Comparison, Good, Metric, abba, compare};

/// Changes that are judged together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// What they have in common, e.g. `interrupts of eth0`.
    pub name: String,
    /// The changes.
    pub changes: Vec<Change>,
}

/// One figure of one measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Name with unit.
    pub name: String,
    /// Which way is good.
    pub good: Good,
    /// Value.
    pub value: f64,
}

/// The figures of all runs of one group.
#[derive(Clone, Debug, PartialEq)]
pub struct Runs {
    /// The group's name.
    pub group: String,
    /// By figure.
    pub metrics: Vec<Metric>,
}

/// What came out for a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// The group's name.
    pub group: String,
    /// One comparison a figure.
    pub comparisons: Vec<Comparison>,
}

/// Sorts changes into groups by device and kind: all interrupts and queues of a card, all switches of
/// a disk, and every switch of the host by itself.
pub fn groups(changes: &[Change]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for change in changes {
        let name = group_name(change);
        match groups.iter_mut().find(|group| group.name == name) {
            Some(group) => group.changes.push(change.clone()),
            None => groups.push(Group {
                name,
                changes: vec![change.clone()],
            }),
        }
    }
    groups
}

fn group_name(change: &Change) -> String {
    let first = change.knob.split(' ').next().unwrap_or(&change.knob);
    if first == "irq" {
        "interrupts".into()
    } else if change.knob.ends_with(" governor") {
        "governor".into()
    } else if change.knob.ends_with(" flows") || change.knob.ends_with("rps_sock_flow_entries") {
        // Neither table does anything without the other.
        "packets follow their readers".into()
    } else if change.knob.contains(" steering") || change.knob.contains(" senders") {
        format!("{first} queues")
    } else if change.knob.starts_with("transparent") || change.knob.starts_with("kernel work") {
        change.knob.clone()
    } else {
        first.to_owned()
    }
}

/// Runs `repeats` pairs for one group. `switch` makes the host as the arm says, `measure` gives the
/// same figures each time; the first error ends it.
pub fn run<E>(
    name: &str,
    repeats: usize,
    mut switch: impl FnMut(Arm) -> Result<(), E>,
    mut measure: impl FnMut() -> Result<Vec<Figure>, E>,
) -> Result<Runs, E> {
    let mut metrics: Vec<Metric> = Vec::new();
    for arm in abba(repeats) {
        switch(arm)?;
        for figure in measure()? {
            let at = metrics.iter().position(|metric| metric.name == figure.name);
            let at = at.unwrap_or_else(|| {
                metrics.push(Metric {
                    name: figure.name.clone(),
                    good: figure.good,
                    before: Vec::new(),
                    after: Vec::new(),
                });
                metrics.len() - 1
            });
            match arm {
                Arm::Before => metrics[at].before.push(figure.value),
                Arm::After => metrics[at].after.push(figure.value),
            }
        }
    }
    Ok(Runs {
        group: name.to_owned(),
        metrics,
    })
}

/// Judges all groups together: the more figures are looked at, the more of them chance would move.
pub fn judge(runs: &[Runs], options: CompareOptions) -> Vec<Proof> {
    let all: Vec<Metric> = runs.iter().flat_map(|runs| runs.metrics.clone()).collect();
    let mut comparisons = compare(&all, options).into_iter();
    runs.iter()
        .map(|runs| Proof {
            group: runs.group.clone(),
            comparisons: comparisons.by_ref().take(runs.metrics.len()).collect(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{Figure, judge, run};
    use crate::stats::{Arm, CompareOptions, Good, Random, Verdict};

    /// A modelled host on which "after" multiplies the latency; returns the verdict.
    fn verdict(effect: f64, seed: u64) -> Verdict {
        let mut random = Random::new(seed);
        let arm = std::cell::Cell::new(Arm::Before);
        let runs = run::<()>(
            "knob",
            5,
            |next| {
                arm.set(next);
                Ok(())
            },
            || {
                let noise = 1.0 + 0.1 * random.unit();
                let value = noise * if arm.get() == Arm::After { effect } else { 1.0 };
                Ok(vec![Figure {
                    name: "lost us".into(),
                    good: Good::Lower,
                    value,
                }])
            },
        );
        let proofs = judge(&[runs.unwrap()], CompareOptions::default());
        proofs[0].comparisons[0].verdict.clone()
    }

    #[test]
    fn equal_arms_are_better_at_most_one_time_in_twenty() {
        let better = (0..400)
            .filter(|seed| verdict(1.0, *seed) == Verdict::Better)
            .count();
        assert!(better <= 20, "{better} of 400");
    }

    #[test]
    fn noise_put_in_is_worse_and_taken_out_is_better() {
        for seed in 0..20 {
            assert_eq!(verdict(1.5, seed), Verdict::Worse);
            assert_eq!(verdict(0.5, seed), Verdict::Better);
        }
    }

    #[test]
    fn many_equal_knobs_are_not_one_of_them_better_by_chance() {
        let mut random = Random::new(3);
        let mut families = 0;
        for _ in 0..200 {
            let groups: Vec<_> = (0..10)
                .map(|knob| {
                    let measure = || {
                        Ok::<_, ()>(vec![Figure {
                            name: "lost us".into(),
                            good: Good::Lower,
                            value: 1.0 + 0.1 * random.unit(),
                        }])
                    };
                    run(&knob.to_string(), 7, |_| Ok(()), measure).unwrap()
                })
                .collect();
            let proofs = judge(&groups, CompareOptions::default());
            assert_eq!(proofs.len(), 10);
            let mut verdicts = proofs.iter().flat_map(|proof| &proof.comparisons);
            families += usize::from(verdicts.any(|one| one.verdict == Verdict::Better));
        }
        assert!(families <= 10, "{families} of 200");
    }

    #[test]
    fn the_first_failure_ends_it() {
        let outcome = run("knob", 5, |_| Err("no"), || Ok(Vec::new()));
        assert_eq!(outcome.unwrap_err(), "no");
    }
}
