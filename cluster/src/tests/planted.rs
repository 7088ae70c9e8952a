//! Plants each bug of the request path and sees that the test that should find it does.
//!
//! Only in builds with `--cfg mutations`.

use std::panic::{UnwindSafe, catch_unwind};

use torc_env::mutation;

fn is_found(bug: &'static str, test: impl FnOnce() + UnwindSafe) {
    mutation::select(Some(bug));
    let result = catch_unwind(test);
    mutation::select(None);
    assert!(result.is_err(), "nothing noticed {bug}");
}

#[test]
fn an_ack_before_the_sync_is_found() {
    is_found(
        "ack_before_sync",
        super::an_acknowledged_write_survives_a_power_cut_of_all_nodes,
    );
}

#[test]
fn a_read_that_repairs_nothing_is_found() {
    is_found(
        "read_without_repair",
        super::a_quorum_read_that_has_shown_a_value_is_never_followed_by_an_older_one,
    );
}

#[test]
fn a_timeout_called_a_refusal_is_found() {
    is_found(
        "late_is_refused",
        super::a_write_whose_answers_are_lost_is_in_doubt_and_never_a_failure_that_did_not_happen,
    );
}

#[test]
fn an_unreadable_key_called_absent_is_found() {
    is_found(
        "unreadable_is_absent",
        super::what_cannot_be_read_is_unknown_and_never_absent,
    );
}

#[test]
fn a_hint_deleted_before_its_delivery_is_found() {
    is_found(
        "hint_deleted_before_ack",
        super::one_node_down_loses_no_write_and_gets_its_hints,
    );
}

#[test]
fn a_purge_in_spite_of_a_silent_member_is_found() {
    is_found(
        "silent_member_does_not_block",
        super::a_member_that_is_silent_with_an_old_hint_keeps_deletions_from_being_purged,
    );
}

#[test]
fn a_purge_in_spite_of_a_node_that_joins_is_found() {
    is_found(
        "joiner_does_not_block_purging",
        super::purge::a_deletion_while_a_node_joins_is_kept_until_the_newcomer_has_it,
    );
}

#[test]
fn a_purge_up_to_a_time_that_clocks_may_go_back_behind_is_found() {
    is_found(
        "civil_time_is_promised",
        super::purge::a_deletion_by_a_clock_that_was_set_back_is_kept_until_all_owners_have_it,
    );
}

#[test]
fn a_last_write_that_ignores_what_its_client_has_seen_is_found() {
    is_found(
        "lww_ignores_context",
        super::clock::a_last_write_wins_over_what_its_client_has_seen_whoever_orders_it,
    );
}

#[test]
fn a_cut_without_asking_is_found() {
    is_found(
        "damage_is_cut_unasked",
        super::damage::rot_of_the_only_copy_stays_unknown_until_somebody_accepts_the_loss,
    );
}
