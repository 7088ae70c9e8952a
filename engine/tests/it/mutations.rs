//! Planted bugs: each must be found by the test that is there to find it.
//!
//! `RUSTFLAGS="--cfg mutations" cargo test -p torc-engine mutations`

use std::panic::{AssertUnwindSafe, catch_unwind};

use torc_env::mutation;

/// Runs `test` with a bug planted, which must fail it, and without, which must not.
fn must_find(bug: &'static str, test: impl Fn()) {
    mutation::select(Some(bug));
    let found = catch_unwind(AssertUnwindSafe(&test)).is_err();
    mutation::select(None);
    assert!(found, "the planted bug {bug} went unnoticed");
    test();
}

#[test]
fn an_acknowledgement_before_the_sync_is_found() {
    must_find(
        "ack_before_sync",
        crate::power::nothing_acknowledged_is_lost_whenever_power_is_cut,
    );
}

#[test]
fn a_log_cut_off_at_rot_is_found() {
    must_find(
        "truncate_log_at_rot",
        crate::faults::rot_within_the_log_is_remembered_and_costs_one_frame_only,
    );
}

#[test]
fn frames_applied_out_of_the_chain_are_found() {
    must_find(
        "apply_any_frame",
        crate::power::weaker_policies_lose_a_suffix_at_most,
    );
}

#[test]
fn a_frame_called_durable_on_its_way_is_found() {
    must_find(
        "call_flying_durable",
        crate::power::nothing_acknowledged_is_lost_whenever_power_is_cut,
    );
}

#[test]
fn a_life_that_does_not_say_at_once_that_it_acknowledges_early_is_found() {
    must_find(
        "early_life_is_not_said",
        crate::faults::a_life_that_acknowledges_early_is_known_to_have_lost_something_from_its_first_update_on,
    );
}

#[test]
fn a_decision_on_a_stale_base_is_found() {
    must_find(
        "decide_on_stale_base",
        crate::store::concurrent_updates_of_a_key_never_lose_one,
    );
}

#[test]
fn a_segment_that_goes_before_its_tables_are_listed_is_found() {
    must_find(
        "recycle_before_edit",
        crate::power::nothing_acknowledged_is_lost_whenever_power_is_cut,
    );
}

#[test]
fn an_archived_segment_that_was_not_synced_is_found() {
    must_find(
        "archive_without_sync",
        crate::archive::a_segment_is_archived_whole_or_still_in_the_log_whenever_power_is_cut,
    );
}

#[test]
fn a_record_shown_before_it_is_durable_is_found() {
    must_find(
        "show_unsynced",
        crate::store::an_update_is_decided_on_pending_records_that_reads_do_not_see,
    );
}

#[test]
fn newer_runs_that_sink_below_older_ones_are_found() {
    must_find(
        "sink_below_older_runs",
        crate::compaction::runs_of_the_open_window_do_not_sink_below_those_of_one_that_has_passed,
    );
}

#[test]
fn a_blob_that_goes_while_a_table_refers_to_it_is_found() {
    must_find(
        "remove_shared_blob",
        crate::blobs::a_blob_goes_with_the_last_table_that_refers_to_it_and_not_before,
    );
}

#[test]
fn updates_that_never_wait_for_a_slow_background_are_found() {
    must_find(
        "never_wait",
        crate::pacing::updates_slow_down_evenly_when_merges_cannot_follow,
    );
}
