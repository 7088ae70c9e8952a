//! Applying, verifying and undoing on a kernel that misbehaves.

use std::path::Path;

use tempfile::TempDir;
use torc_tuning::apply::{
    ApplyError, ApplyOptions, Recovered, apply, confirm, in_force, recover, rollback, verify,
};
use torc_tuning::change::{Change, Target};
use torc_tuning::host::Host;
use torc_tuning::kernel::Kernel as _;
use torc_tuning::plan::{Plan, Profile};

use crate::fake_kernel::{EIO, EPERM, FakeKernel, Temper};
use crate::machines::{build, shape, shapes};

const LATER: u64 = 1_000;

fn machine(name: &str) -> FakeKernel {
    FakeKernel::over(build(&shape(name)))
}

fn plan(kernel: &FakeKernel) -> Vec<Change> {
    Plan::of(&Host::read(kernel, "fake").unwrap(), Profile::Latency).changes
}

fn options(confirm_before_s: Option<u64>) -> ApplyOptions {
    ApplyOptions {
        plan: "test".into(),
        confirm_before_s,
        now_s: 0,
    }
}

fn state() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn path_of(kernel: &FakeKernel, change: &Change) -> String {
    change.target.path(kernel).unwrap()
}

fn assert_as_it_was(kernel: &FakeKernel, before: &torc_tuning::kernel::Tree, what: &str) {
    let after = kernel.snapshot();
    for ((path, was), (_, is)) in before.nodes().zip(after.nodes()) {
        // Follows from the affinity; not a setting.
        if !path.ends_with("effective_affinity_list") {
            assert_eq!(was, is, "{what}: {path}");
        }
    }
}

#[test]
fn planning_again_after_apply_is_empty() {
    for shape in shapes() {
        let kernel = FakeKernel::over(build(&shape));
        for profile in Profile::ALL {
            let directory = state();
            let changes = Plan::of(&Host::read(&kernel, "fake").unwrap(), profile).changes;
            apply(&kernel, directory.path(), &changes, &options(None)).unwrap();
            let again = Plan::of(&Host::read(&kernel, "fake").unwrap(), profile).changes;
            assert_eq!(again, [], "{} {}", shape.name, profile.name());
            assert_eq!(verify(&kernel, &changes), []);
        }
    }
}

#[test]
fn rollback_restores_every_byte() {
    for shape in shapes() {
        let kernel = FakeKernel::over(build(&shape));
        let before = kernel.snapshot();
        let directory = state();
        let changes = plan(&kernel);
        assert!(!changes.is_empty(), "{}", shape.name);
        apply(&kernel, directory.path(), &changes, &options(None)).unwrap();
        rollback(&kernel, directory.path(), LATER).unwrap();
        assert_as_it_was(&kernel, &before, shape.name);
        assert!(matches!(
            rollback(&kernel, directory.path(), LATER),
            Err(ApplyError::NoneInForce)
        ));
    }
}

#[test]
fn killed_after_any_write_it_recovers() {
    for name in ["one-socket-8-cores", "nvme-few-queues", "two-core-vm"] {
        let writes = {
            let kernel = machine(name);
            apply(&kernel, state().path(), &plan(&kernel), &options(None)).unwrap();
            kernel.writes.get()
        };
        for k in 0..writes {
            let kernel = machine(name);
            let before = kernel.snapshot();
            let directory = state();
            // From here on nothing gets through, neither writes nor the attempt to undo them.
            kernel.lives.set(Some(k));
            let died = apply(&kernel, directory.path(), &plan(&kernel), &options(None));
            let untouched = k == 0 && matches!(died, Err(ApplyError::NotTaken { .. }));
            assert!(
                untouched || matches!(died, Err(ApplyError::NotRestored { .. })),
                "{k}: {died:?}"
            );
            kernel.lives.set(None);
            recover(&kernel, directory.path(), 0).unwrap();
            assert_as_it_was(&kernel, &before, &format!("{name}, killed after write {k}"));
            assert_eq!(
                recover(&kernel, directory.path(), 0).unwrap(),
                Recovered::Nothing
            );
        }
    }
}

#[test]
fn killed_during_the_recovery_it_recovers_again() {
    let kernel = machine("one-socket-8-cores");
    let before = kernel.snapshot();
    let directory = state();
    kernel.lives.set(Some(9));
    apply(&kernel, directory.path(), &plan(&kernel), &options(None)).unwrap_err();
    for _ in 0..5 {
        kernel.lives.set(Some(2));
        if recover(&kernel, directory.path(), 0).is_ok() {
            break;
        }
    }
    kernel.lives.set(None);
    recover(&kernel, directory.path(), 0).unwrap();
    assert_as_it_was(&kernel, &before, "recovered in pieces");
}

#[test]
fn every_removed_write_makes_verify_fail() {
    let kernel = machine("two-sockets-smt");
    let original = kernel.snapshot();
    let changes = plan(&kernel);
    let directory = state();
    apply(&kernel, directory.path(), &changes, &options(None)).unwrap();
    let applied = kernel.snapshot();
    assert_eq!(in_force(directory.path()).unwrap(), changes);
    for change in &changes {
        let path = path_of(&kernel, change);
        let old = original.read(&path).unwrap();
        kernel.set(&path, std::str::from_utf8(&old).unwrap());
        let drifts = verify(&kernel, &changes);
        assert_eq!(drifts.len(), 1, "{}", change.knob);
        assert_eq!(drifts[0].knob, change.knob);
        let new = applied.read(&path).unwrap();
        kernel.set(&path, std::str::from_utf8(&new).unwrap());
    }
    assert_eq!(verify(&kernel, &changes), []);
}

#[test]
fn a_file_that_refuses_ignores_or_twists_undoes_everything() {
    let tempers = [
        Temper::Refuse(EPERM),
        Temper::Refuse(EIO),
        Temper::Ignore,
        Temper::Clamp(70, 90),
        Temper::Twist("33"),
    ];
    for temper in tempers {
        let numeric = matches!(temper, Temper::Clamp(..) | Temper::Twist(_));
        let victims = plan(&machine("one-socket-8-cores"));
        for victim in victims
            .iter()
            .filter(|change| !numeric || change.want.parse::<u64>().is_ok())
        {
            let kernel = machine("one-socket-8-cores");
            let before = kernel.snapshot();
            let directory = state();
            let path = path_of(&kernel, victim);
            if numeric && path.ends_with("_list")
                || path.ends_with("_cpus")
                || path.ends_with("cpumask")
            {
                continue;
            }
            kernel.temper(&path, temper.clone());
            let outcome = apply(&kernel, directory.path(), &plan(&kernel), &options(None));
            // A file that twists what it is given also twists what is given back.
            if numeric {
                assert!(outcome.is_err(), "{} {temper:?}", victim.knob);
                continue;
            }
            let refused = outcome.unwrap_err();
            if path.ends_with("wbt_lat_usec") {
                // The scheduler reset it and it lets nobody set it back: that is said, not hidden.
                let ApplyError::NotRestored { left, .. } = &refused else {
                    panic!("{refused}");
                };
                assert!(left.len() == 1 && left[0].starts_with(&path), "{left:?}");
                continue;
            }
            assert!(
                matches!(&refused, ApplyError::NotTaken { knob, .. } if *knob == victim.knob),
                "{refused}"
            );
            assert_as_it_was(&kernel, &before, &victim.knob);
        }
    }
}

#[test]
fn a_value_rounded_within_reason_is_accepted_and_not_planned_again() {
    let kernel = machine("one-socket-8-cores");
    kernel.temper("/torc/ethtool/eth0/rx-usecs", Temper::Clamp(6, 1000));
    let directory = state();
    apply(&kernel, directory.path(), &plan(&kernel), &options(None)).unwrap();
    assert_eq!(
        kernel.text("/torc/ethtool/eth0/rx-usecs").as_deref(),
        Some("6")
    );
    assert_eq!(plan(&kernel), []);
}

#[test]
fn a_change_behind_ones_back_between_plan_and_apply_stops_it() {
    let kernel = machine("one-socket-8-cores");
    let changes = plan(&kernel);
    kernel.set("/proc/sys/vm/swappiness", "33\n");
    let before = kernel.snapshot();
    let refused = apply(&kernel, state().path(), &changes, &options(None)).unwrap_err();
    assert!(matches!(refused, ApplyError::Stale { .. }), "{refused}");
    assert_eq!(kernel.snapshot(), before);
    assert_eq!(kernel.writes.get(), 0);
}

#[test]
fn a_change_behind_ones_back_during_apply_undoes_it() {
    let writes = plan(&machine("one-socket-8-cores")).len();
    for k in 1..writes {
        let kernel = machine("one-socket-8-cores");
        let before = kernel.snapshot();
        let changes = plan(&kernel);
        let victim = path_of(&kernel, &changes[0]);
        let old = String::from_utf8(kernel.read(&victim).unwrap()).unwrap();
        *kernel.intruder.borrow_mut() = Some((k, victim, old));
        let refused = apply(&kernel, state().path(), &changes, &options(None)).unwrap_err();
        assert!(
            matches!(refused, ApplyError::NotTaken { .. }),
            "{k}: {refused}"
        );
        assert_as_it_was(&kernel, &before, &format!("intruder at write {k}"));
    }
}

#[test]
fn a_change_behind_ones_back_later_is_drift_and_still_rolled_back() {
    let kernel = machine("cloud-vm-virtio");
    let before = kernel.snapshot();
    let changes = plan(&kernel);
    let directory = state();
    apply(&kernel, directory.path(), &changes, &options(None)).unwrap();
    let moved = changes
        .iter()
        .find(|change| matches!(change.target, Target::Interrupt(_)))
        .unwrap();
    kernel.set(&path_of(&kernel, moved), "0-3\n");
    assert_eq!(verify(&kernel, &changes).len(), 1);
    rollback(&kernel, directory.path(), LATER).unwrap();
    assert_as_it_was(&kernel, &before, "after a second writer");
}

#[test]
fn changes_go_away_unless_confirmed_in_time() {
    let kernel = machine("one-socket-8-cores");
    let before = kernel.snapshot();
    let directory = state();
    apply(
        &kernel,
        directory.path(),
        &plan(&kernel),
        &options(Some(120)),
    )
    .unwrap();
    assert_eq!(
        recover(&kernel, directory.path(), 119).unwrap(),
        Recovered::Nothing
    );
    assert!(matches!(
        recover(&kernel, directory.path(), 120).unwrap(),
        Recovered::Undone(_)
    ));
    assert_as_it_was(&kernel, &before, "unconfirmed");

    apply(
        &kernel,
        directory.path(),
        &plan(&kernel),
        &options(Some(120)),
    )
    .unwrap();
    confirm(&kernel, directory.path(), 60).unwrap();
    assert_eq!(
        recover(&kernel, directory.path(), 5000).unwrap(),
        Recovered::Nothing
    );
    assert_eq!(plan(&kernel), []);
}

#[test]
fn a_confirmation_that_comes_late_confirms_nothing() {
    let kernel = machine("one-socket-8-cores");
    let before = kernel.snapshot();
    let directory = state();
    apply(
        &kernel,
        directory.path(),
        &plan(&kernel),
        &options(Some(120)),
    )
    .unwrap();
    assert!(matches!(
        confirm(&kernel, directory.path(), 121),
        Err(ApplyError::NoneInForce)
    ));
    assert_as_it_was(&kernel, &before, "confirmed too late");
}

#[test]
fn a_restart_undoes_run_time_settings_and_the_journal_knows() {
    let kernel = machine("one-socket-8-cores");
    let directory = state();
    apply(&kernel, directory.path(), &plan(&kernel), &options(None)).unwrap();
    let restarted = machine("one-socket-8-cores");
    restarted.set("/proc/sys/kernel/random/boot_id", "another\n");
    let before = restarted.snapshot();
    assert!(matches!(
        recover(&restarted, directory.path(), 0).unwrap(),
        Recovered::Undone(_)
    ));
    assert_eq!(restarted.snapshot(), before);
    assert_eq!(restarted.writes.get(), 0);
}

#[test]
fn an_interrupt_that_got_another_number_is_still_found() {
    let kernel = machine("one-socket-8-cores");
    let changes = plan(&kernel);
    let directory = state();
    apply(&kernel, directory.path(), &changes, &options(None)).unwrap();
    let change = changes
        .iter()
        .find(|change| change.knob.contains("TxRx-3"))
        .unwrap();
    let old_path = path_of(&kernel, change);
    let number: u32 = old_path.split('/').nth(3).unwrap().parse().unwrap();
    // The driver was reloaded: same name, number 900, affinity as at first.
    kernel.edit(|tree| {
        let table = String::from_utf8(tree.read("/proc/interrupts").unwrap()).unwrap();
        let table = table.replace(&format!("{number:>4}:"), " 900:");
        tree.file("/proc/interrupts", table);
        tree.remove(&format!("/proc/irq/{number}"));
        tree.file("/proc/irq/900/smp_affinity_list", "5\n")
            .file("/proc/irq/900/effective_affinity_list", "5\n");
    });
    let drifts = verify(&kernel, &changes);
    assert_eq!(drifts.len(), 1);
    rollback(&kernel, directory.path(), LATER).unwrap();
    assert_eq!(
        kernel.text("/proc/irq/900/smp_affinity_list").as_deref(),
        Some("0-7")
    );
}

#[test]
fn without_rights_nothing_is_changed() {
    let kernel = machine("one-socket-8-cores");
    let changes = plan(&kernel);
    let last = path_of(&kernel, changes.last().unwrap());
    kernel.edit(|tree| {
        let real = tree.resolve(&last).unwrap();
        let bytes = tree.read(&last).unwrap();
        tree.file_with_mode(real, bytes, 0o444);
    });
    let before = kernel.snapshot();
    let refused = apply(&kernel, state().path(), &changes, &options(None)).unwrap_err();
    assert!(matches!(refused, ApplyError::Closed { .. }), "{refused}");
    assert_eq!(kernel.snapshot(), before);
    assert_eq!(kernel.writes.get(), 0);
}

#[test]
fn a_second_apply_waits_for_the_firsts_confirmation_and_rolls_back_in_order() {
    let kernel = machine("one-socket-8-cores");
    let before = kernel.snapshot();
    let state = state();
    let directory: &Path = state.path();
    let changes = plan(&kernel);
    apply(&kernel, directory, &changes[..3], &options(Some(100))).unwrap();
    let second = plan(&kernel);
    let refused = apply(&kernel, directory, &second, &options(None)).unwrap_err();
    assert!(matches!(refused, ApplyError::Unconfirmed));
    confirm(&kernel, directory, 1).unwrap();
    apply(&kernel, directory, &second, &options(None)).unwrap();
    rollback(&kernel, directory, 1).unwrap();
    rollback(&kernel, directory, 1).unwrap();
    assert_as_it_was(&kernel, &before, "two transactions");
}
