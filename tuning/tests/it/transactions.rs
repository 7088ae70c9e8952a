//! Applying, verifying and undoing on a kernel that misbehaves.

use std::ops::Deref;
use std::path::Path;

use tempfile::TempDir;
use torc_tuning::apply::{
    self, ApplyError, ApplyOptions, Drift, Recovered, apply, confirm, in_force, recover, rollback,
};
use torc_tuning::change::{Change, Syntax, Target};
use torc_tuning::host::{Host, InterruptNumbers};
use torc_tuning::kernel::{Kernel as _, Tree};
use torc_tuning::plan::{Plan, Profile};

use crate::fake_kernel::{EIO, EPERM, FakeKernel, Temper};
use crate::machines::{Shape, build, shape, shapes};

const LATER: u64 = 1_000;

/// A machine as it stood at first, with a journal and the changes that its plan wishes.
struct Machine {
    kernel: FakeKernel,
    before: Tree,
    state: TempDir,
    changes: Vec<Change>,
}

impl Deref for Machine {
    type Target = FakeKernel;

    fn deref(&self) -> &FakeKernel {
        &self.kernel
    }
}

impl Machine {
    fn of(shape: &Shape) -> Self {
        Self::over(build(shape))
    }

    fn named(name: &str) -> Self {
        Self::of(&shape(name))
    }

    fn over(tree: Tree) -> Self {
        let kernel = FakeKernel::over(tree);
        let changes = plan(&kernel, Profile::Latency);
        Self {
            before: kernel.snapshot(),
            state: tempfile::tempdir().unwrap(),
            kernel,
            changes,
        }
    }

    fn state(&self) -> &Path {
        self.state.path()
    }

    fn apply(&self, confirm_before_s: Option<u64>) -> Result<usize, ApplyError> {
        self.apply_these(&self.changes, confirm_before_s)
    }

    fn apply_these(
        &self,
        changes: &[Change],
        confirm_before_s: Option<u64>,
    ) -> Result<usize, ApplyError> {
        let options = ApplyOptions {
            plan: "test".into(),
            confirm_before_s,
            now_s: 0,
        };
        apply(&self.kernel, self.state(), changes, &options)
    }

    fn rollback(&self) -> Result<usize, ApplyError> {
        rollback(&self.kernel, self.state(), LATER)
    }

    fn recover(&self, now_s: u64) -> Result<Recovered, ApplyError> {
        recover(&self.kernel, self.state(), now_s)
    }

    fn verify(&self) -> Vec<Drift> {
        apply::verify(&self.kernel, &self.changes)
    }

    fn path_of(&self, change: &Change) -> String {
        let numbers = InterruptNumbers::read(&self.kernel);
        change.target.path(&numbers).unwrap()
    }

    fn assert_as_it_was(&self, what: &str) {
        let after = self.snapshot();
        for ((path, was), (_, is)) in self.before.nodes().zip(after.nodes()) {
            // Follows from the affinity; not a setting.
            if !path.ends_with("effective_affinity_list") {
                assert_eq!(was, is, "{what}: {path}");
            }
        }
    }

    fn assert_untouched(&self) {
        assert_eq!(self.snapshot(), self.before);
        assert_eq!(self.writes.get(), 0);
    }
}

/// Machines on which a test can afford to try every change for itself.
fn smaller_shapes() -> impl Iterator<Item = Shape> {
    shapes().into_iter().filter(|shape| {
        let cores = shape.sockets * shape.nodes_a_socket * shape.cores_a_node;
        cores * shape.threads + shape.slow_cores <= 32
    })
}

fn plan(kernel: &FakeKernel, profile: Profile) -> Vec<Change> {
    Plan::of(&Host::read(kernel, "fake").unwrap(), profile).changes
}

#[test]
fn planning_again_after_apply_is_empty() {
    for shape in shapes() {
        let machine = Machine::of(&shape);
        for profile in Profile::ALL {
            let changes = plan(&machine, profile);
            machine.apply_these(&changes, None).unwrap();
            assert_eq!(
                plan(&machine, profile),
                [],
                "{} {}",
                shape.name,
                profile.name()
            );
            assert_eq!(apply::verify(&machine.kernel, &changes), []);
        }
    }
}

#[test]
fn rollback_restores_every_byte() {
    for shape in shapes() {
        let machine = Machine::of(&shape);
        assert!(!machine.changes.is_empty(), "{}", shape.name);
        machine.apply(None).unwrap();
        machine.rollback().unwrap();
        machine.assert_as_it_was(shape.name);
        let again = machine.rollback().unwrap_err();
        assert!(
            again.to_string().ends_with("somebody asked for it"),
            "{again}"
        );
    }
}

#[test]
fn killed_after_any_write_it_recovers() {
    for shape in smaller_shapes() {
        let whole = Machine::of(&shape);
        whole.apply(None).unwrap();
        for k in 0..whole.writes.get() {
            let machine = Machine::of(&shape);
            // From here on nothing gets through, neither writes nor the attempt to undo them.
            machine.lives.set(Some(k));
            let died = machine.apply(None);
            let untouched = k == 0 && matches!(died, Err(ApplyError::NotTaken { .. }));
            assert!(
                untouched || matches!(died, Err(ApplyError::NotRestored { .. })),
                "{k}: {died:?}"
            );
            machine.lives.set(None);
            machine.recover(0).unwrap();
            machine.assert_as_it_was(&format!("{}, killed after write {k}", shape.name));
            assert_eq!(machine.recover(0).unwrap(), Recovered::Nothing);
        }
    }
}

#[test]
fn killed_during_the_recovery_it_recovers_again() {
    let machine = Machine::named("one-socket-8-cores");
    machine.lives.set(Some(9));
    machine.apply(None).unwrap_err();
    for _ in 0..5 {
        machine.lives.set(Some(2));
        if machine.recover(0).is_ok() {
            break;
        }
    }
    machine.lives.set(None);
    machine.recover(0).unwrap();
    machine.assert_as_it_was("recovered in pieces");
}

#[test]
fn every_removed_write_makes_verify_fail() {
    for shape in smaller_shapes() {
        let machine = Machine::of(&shape);
        machine.apply(None).unwrap();
        let applied = machine.snapshot();
        assert_eq!(in_force(machine.state()).unwrap(), machine.changes);
        for change in &machine.changes {
            let path = machine.path_of(change);
            let set = |tree: &Tree| {
                let bytes = tree.read(&path).unwrap();
                machine.set(&path, std::str::from_utf8(&bytes).unwrap());
            };
            set(&machine.before);
            let drifts = machine.verify();
            assert_eq!(drifts.len(), 1, "{}", change.knob);
            assert_eq!(drifts[0].knob, change.knob);
            set(&applied);
        }
        assert_eq!(machine.verify(), []);
    }
}

#[test]
fn a_file_that_refuses_or_ignores_undoes_everything() {
    for temper in [Temper::Refuse(EPERM), Temper::Refuse(EIO), Temper::Ignore] {
        for victim in Machine::named("one-socket-8-cores").changes {
            let machine = Machine::named("one-socket-8-cores");
            machine.temper(&machine.path_of(&victim), temper.clone());
            let refused = machine.apply(None).unwrap_err();
            assert!(
                matches!(&refused, ApplyError::NotTaken { knob, .. } if *knob == victim.knob),
                "{refused}"
            );
            machine.assert_as_it_was(&victim.knob);
        }
    }
}

#[test]
fn a_file_that_twists_what_it_is_given_is_noticed() {
    for temper in [Temper::Clamp(70, 90), Temper::Twist("33")] {
        let numbers = Machine::named("one-socket-8-cores").changes.into_iter();
        for victim in numbers.filter(|change| change.syntax == Syntax::Number) {
            let machine = Machine::named("one-socket-8-cores");
            machine.temper(&machine.path_of(&victim), temper.clone());
            // It also twists what is given back, so this need not end as it was: but it is said.
            assert!(machine.apply(None).is_err(), "{} {temper:?}", victim.knob);
        }
    }
}

#[test]
fn a_file_that_another_write_reset_and_that_takes_nothing_back_is_named() {
    let throttle = "/sys/block/nvme0n1/queue/wbt_lat_usec";
    let mut tree = build(&shape("one-socket-8-cores"));
    // Not what a change of the scheduler resets it to.
    tree.file(throttle, "75\n");
    let machine = Machine::over(tree);
    machine.temper(throttle, Temper::Refuse(EPERM));
    let refused = machine.apply(None).unwrap_err();
    let ApplyError::NotRestored { left, .. } = &refused else {
        panic!("{refused}");
    };
    assert!(left.len() == 1 && left[0].starts_with(throttle), "{left:?}");
}

#[test]
fn a_value_rounded_within_reason_is_accepted_and_not_planned_again() {
    let machine = Machine::named("one-socket-8-cores");
    machine.temper("/torc/ethtool/eth0/rx-usecs", Temper::Clamp(6, 1000));
    machine.apply(None).unwrap();
    let rounded = machine.text("/torc/ethtool/eth0/rx-usecs");
    assert_eq!(rounded.as_deref(), Some("6"));
    assert_eq!(plan(&machine, Profile::Latency), []);
}

#[test]
fn a_change_behind_ones_back_between_plan_and_apply_stops_it() {
    let machine = Machine::named("one-socket-8-cores");
    machine.set("/proc/sys/vm/swappiness", "33\n");
    let refused = machine.apply(None).unwrap_err();
    assert!(matches!(refused, ApplyError::Stale { .. }), "{refused}");
    machine.set("/proc/sys/vm/swappiness", "60\n");
    machine.assert_untouched();
}

#[test]
fn a_change_behind_ones_back_during_apply_undoes_it() {
    let writes = Machine::named("one-socket-8-cores").changes.len();
    for k in 1..writes {
        let machine = Machine::named("one-socket-8-cores");
        let victim = machine.path_of(&machine.changes[0]);
        let old = String::from_utf8(machine.read(&victim).unwrap()).unwrap();
        *machine.intruder.borrow_mut() = Some((k, victim, old));
        let refused = machine.apply(None).unwrap_err();
        assert!(
            matches!(refused, ApplyError::NotTaken { .. }),
            "{k}: {refused}"
        );
        machine.assert_as_it_was(&format!("intruder at write {k}"));
    }
}

#[test]
fn a_change_behind_ones_back_later_is_drift_and_still_rolled_back() {
    let machine = Machine::named("cloud-vm-virtio");
    machine.apply(None).unwrap();
    let mut changes = machine.changes.iter();
    let moved = changes.find(|change| matches!(change.target, Target::Interrupt(_)));
    machine.set(&machine.path_of(moved.unwrap()), "0-3\n");
    assert_eq!(machine.verify().len(), 1);
    machine.rollback().unwrap();
    machine.assert_as_it_was("after a second writer");
}

#[test]
fn changes_go_away_unless_confirmed_in_time() {
    let machine = Machine::named("one-socket-8-cores");
    machine.apply(Some(120)).unwrap();
    assert_eq!(machine.recover(119).unwrap(), Recovered::Nothing);
    assert!(matches!(
        machine.recover(120).unwrap(),
        Recovered::Undone(_)
    ));
    machine.assert_as_it_was("unconfirmed");

    machine.apply(Some(120)).unwrap();
    confirm(&machine.kernel, machine.state(), 60).unwrap();
    assert_eq!(machine.recover(5000).unwrap(), Recovered::Nothing);
    assert_eq!(plan(&machine, Profile::Latency), []);
}

#[test]
fn a_confirmation_that_comes_late_confirms_nothing() {
    let machine = Machine::named("one-socket-8-cores");
    machine.apply(Some(120)).unwrap();
    let late = confirm(&machine.kernel, machine.state(), 121);
    let late = late.unwrap_err().to_string();
    assert!(late.ends_with("nobody confirmed it in time"), "{late}");
    machine.assert_as_it_was("confirmed too late");
}

#[test]
fn a_restart_undoes_run_time_settings_and_the_journal_knows() {
    let machine = Machine::named("one-socket-8-cores");
    machine.apply(None).unwrap();
    let restarted = Machine::named("one-socket-8-cores");
    restarted.set("/proc/sys/kernel/random/boot_id", "another\n");
    let recovered = recover(&restarted.kernel, machine.state(), 0).unwrap();
    assert!(matches!(recovered, Recovered::Undone(_)));
    assert_eq!(restarted.writes.get(), 0);
}

#[test]
fn an_interrupt_that_got_another_number_is_still_found() {
    let machine = Machine::named("one-socket-8-cores");
    machine.apply(None).unwrap();
    let mut changes = machine.changes.iter();
    let change = changes
        .find(|change| change.knob.contains("TxRx-3"))
        .unwrap();
    let path = machine.path_of(change);
    let number: u32 = path.split('/').nth(3).unwrap().parse().unwrap();
    // The driver was reloaded: same name, number 900, another affinity.
    machine.edit(|tree| {
        let table = String::from_utf8(tree.read("/proc/interrupts").unwrap()).unwrap();
        let table = table.replace(&format!("{number:>4}:"), " 900:");
        tree.file("/proc/interrupts", table);
        tree.remove(&format!("/proc/irq/{number}"));
        tree.file("/proc/irq/900/smp_affinity_list", "5\n")
            .file("/proc/irq/900/effective_affinity_list", "5\n");
    });
    assert_eq!(machine.verify().len(), 1);
    machine.rollback().unwrap();
    let restored = machine.text("/proc/irq/900/smp_affinity_list");
    assert_eq!(restored.as_deref(), Some("0-7"));
}

#[test]
fn without_rights_nothing_is_changed() {
    let mut machine = Machine::named("one-socket-8-cores");
    let last = machine.path_of(machine.changes.last().unwrap());
    machine.edit(|tree| {
        let real = tree.resolve(&last).unwrap();
        let bytes = tree.read(&last).unwrap();
        tree.file_with_mode(real, bytes, 0o444);
    });
    machine.before = machine.snapshot();
    let refused = machine.apply(None).unwrap_err();
    assert!(matches!(refused, ApplyError::Closed { .. }), "{refused}");
    assert_eq!(refused.to_string().lines().count(), 1);
    machine.assert_untouched();
}

#[test]
fn rights_that_are_lost_halfway_leave_what_any_later_command_restores() {
    let machine = Machine::named("two-sockets-smt");
    let half = machine.changes.len() / 2;
    machine.lives.set(Some(half));
    let refused = machine.apply(None).unwrap_err();
    let ApplyError::NotRestored { left, .. } = &refused else {
        panic!("{refused}");
    };
    assert!(!left.is_empty());
    assert_eq!(refused.to_string().lines().count(), 1, "{refused}");
    machine.lives.set(None);
    // Not only `recover`: whoever comes next with the rights cleans up first.
    let nothing = confirm(&machine.kernel, machine.state(), 0);
    assert!(matches!(nothing, Err(ApplyError::NoneInForce { .. })));
    machine.assert_as_it_was("rights lost halfway");
}

#[test]
fn a_second_apply_waits_for_the_firsts_confirmation_and_rolls_back_in_order() {
    let machine = Machine::named("one-socket-8-cores");
    machine
        .apply_these(&machine.changes[..3], Some(100))
        .unwrap();
    let second = plan(&machine, Profile::Latency);
    let refused = machine.apply_these(&second, None).unwrap_err();
    assert!(matches!(refused, ApplyError::Unconfirmed));
    confirm(&machine.kernel, machine.state(), 1).unwrap();
    machine.apply_these(&second, None).unwrap();
    rollback(&machine.kernel, machine.state(), 1).unwrap();
    rollback(&machine.kernel, machine.state(), 1).unwrap();
    machine.assert_as_it_was("two transactions");
}
