//! Planted bugs: each must be found by a checker, or nothing that the checkers call good means much.

use torc_env::mutation;
use torc_world::{Options, run};

use crate::pool::first_bad;

/// Seeds within which a planted bug must be found.
const SEEDS: std::ops::Range<u64> = 0..500;

fn is_found(name: &'static str, seeds: std::ops::Range<u64>) {
    let bad = first_bad(seeds.clone(), |seed| {
        mutation::select(Some(name));
        let report = run(seed, &Options::default());
        mutation::select(None);
        report
    });
    let report = bad.unwrap_or_else(|| panic!("{name} is not found within {seeds:?}"));
    println!("{name}: seed {}: {}", report.seed, report.violations[0]);
}

macro_rules! found {
    ($($name:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                is_found(stringify!($name), SEEDS);
            }
        )*
    };
}

found!(
    ack_before_sync,
    drop_sibling,
    expiry_counted_from_arrival,
    expiry_lost_on_the_way,
    forget_requests,
    hint_counts_as_replica,
    hint_deleted_before_ack,
    hints_count_always,
    joiner_does_not_catch_up,
    keys_of_log_forgotten,
    late_is_refused,
    lww_keeps_lowest,
    merge_brings_back_superseded,
    purge_expired_early,
    purge_tombstone_early,
    put_ignores_context,
    put_removes_unseen_siblings,
    quorum_too_small_by_one,
    read_repair_overwrites,
    read_without_repair,
    recovery_stops_early,
    redistribution_forgets_a_table,
    redistribution_forgets_hints,
    remove_shared_blob,
    timeout_reported_as_success,
);

/// About one seed in 350 finds it.
#[test]
fn reuse_actor_after_crash() {
    is_found("reuse_actor_after_crash", 0..1_000);
}
