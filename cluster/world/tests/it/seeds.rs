use std::ops::Range;

use torc_world::{Options, run};

use crate::pool::first_bad;

/// Seeds of every test run.
const SEEDS: Range<u64> = 0..1_000;

fn seeds() -> Range<u64> {
    let Ok(asked) = std::env::var("TORC_SIM_SEEDS") else {
        return SEEDS;
    };
    let (first, end) = asked.split_once("..").expect("TORC_SIM_SEEDS=FIRST..END");
    let number = |text: &str| text.parse().expect("TORC_SIM_SEEDS=FIRST..END");
    number(first)..number(end)
}

#[test]
fn no_seed_breaks_a_promise() {
    let bad = first_bad(seeds(), |seed| run(seed, &Options::default()));
    if let Some(report) = bad {
        panic!("{report}");
    }
}

/// What no test of the engine shows yet.
#[test]
fn a_flush_and_a_change_of_keys_may_let_go_of_the_same_segment() {
    let report = run(1340, &Options::default());
    assert!(report.violations.is_empty(), "{report}");
}

#[test]
fn one_seed_always_gives_one_history() {
    for seed in 0..20 {
        let [once, again] = [(); 2].map(|()| run(seed, &Options::default()));
        assert_eq!(once.hash, again.hash, "seed {seed} ran differently");
        assert_eq!(once.event_count, again.event_count);
    }
}

/// A run in which nothing is acknowledged would prove nothing.
#[test]
fn most_operations_succeed_in_most_worlds() {
    let mut poor = 0;
    for seed in 0..40 {
        let report = run(seed, &Options::default());
        let [done, refused, doubt] = report.writes;
        if done * 2 < done + refused + doubt {
            poor += 1;
        }
    }
    assert!(poor <= 20, "{poor} of 40 worlds did hardly any work");
}
