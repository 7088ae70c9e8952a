//! Planted bugs: each must be found by a checker, or nothing that the checkers call good means much.

use torc_env::mutation;
use torc_world::{Options, run};

use crate::pool::first_bad;

/// Seeds within which a planted bug must be found.
const SEEDS: std::ops::Range<u64> = 0..500;

fn is_found(name: &'static str) {
    let bad = first_bad(SEEDS, |seed| {
        mutation::select(Some(name));
        let report = run(seed, &Options::default());
        mutation::select(None);
        report
    });
    assert!(bad.is_some(), "{name} is not found within {SEEDS:?}");
}

macro_rules! found {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                is_found(stringify!($name));
            }
        )*
    };
}

found!(
    ack_before_sync,
    forget_requests,
    late_is_refused,
    merge_brings_back_superseded,
    put_removes_unseen_siblings,
    read_without_repair,
);
