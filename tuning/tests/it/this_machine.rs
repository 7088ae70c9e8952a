//! What can be exercised on the machine that runs the tests: real files of a real kernel, put back
//! afterwards. Without root, or where the machine lacks the thing, a test says so and passes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use torc_tuning::apply::{ApplyError, ApplyOptions, Recovered, apply, recover, rollback, verify};
use torc_tuning::change::{Change, Risk, Syntax, Target};
use torc_tuning::host::{Host, Managed};
use torc_tuning::jitter::{self, JitterError, JitterOptions};
use torc_tuning::kernel::{Kernel as _, Live};
use torc_tuning::plan::{Plan, Profile};

use crate::fake_kernel::FakeKernel;
use crate::machines::{build, shape};

/// Says why a test shows nothing here.
fn not_available(why: impl std::fmt::Display) {
    println!("not available here: {why}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Tests that change this machine take turns, so that none sees another's change.
fn turn() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn host() -> Host {
    Host::read(&Live::machine(), "this machine").unwrap()
}

fn options(confirm_before_s: Option<u64>) -> ApplyOptions {
    ApplyOptions {
        plan: "test".into(),
        confirm_before_s,
        now_s: 1,
    }
}

/// The program's output, or why there is none.
fn output(program: &str, words: &[&str]) -> Result<String, String> {
    let done = Command::new(program).args(words).output();
    let done = done.map_err(|error| format!("{program}: {error}"))?;
    if done.status.success() {
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    } else {
        let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
        Err(format!("{program} {}: {said}", words.join(" ")))
    }
}

/// Every readable file of a directory.
fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().flatten();
    let read = entries.filter_map(|entry| Some((entry.path(), std::fs::read(entry.path()).ok()?)));
    read.collect()
}

/// A loop device over a small file; both go away with it.
struct Loop {
    device: String,
    _directory: tempfile::TempDir,
}

impl Loop {
    fn new() -> Result<Self, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("backing");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(8 << 20).unwrap();
        let device = output("losetup", &["--find", "--show", path.to_str().unwrap()])?;
        Ok(Self {
            device,
            _directory: directory,
        })
    }

    fn name(&self) -> &str {
        self.device.trim_start_matches("/dev/")
    }

    fn queue(&self) -> PathBuf {
        format!("/sys/block/{}/queue", self.name()).into()
    }

    fn changes(&self) -> Vec<Change> {
        let mut changes = Plan::of(&host(), Profile::Latency).changes;
        changes.retain(|change| change.knob.split(' ').next() == Some(self.name()));
        changes
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(output("losetup", &["--detach", &self.device]));
    }
}

fn loop_device() -> Option<Loop> {
    if !is_root() {
        not_available("a loop device: this is not root");
        return None;
    }
    Loop::new()
        .map_err(|why| not_available(format!("a loop device: {why}")))
        .ok()
}

#[test]
fn settings_of_a_loop_device_are_applied_verified_and_rolled_back_byte_for_byte() {
    let _turn = turn();
    let Some(device) = loop_device() else { return };
    let (kernel, state) = (Live::machine(), tempfile::tempdir().unwrap());
    let before = files(&device.queue());
    let changes = device.changes();
    assert!(
        !changes.is_empty(),
        "a loop device has a scheduler or merges"
    );
    let writes = apply(&kernel, state.path(), &changes, &options(None)).unwrap();
    assert_eq!(writes, changes.len());
    assert_ne!(files(&device.queue()), before);
    assert_eq!(verify(&kernel, &changes), []);
    assert_eq!(device.changes(), [], "planned again after apply");
    rollback(&kernel, state.path(), 2).unwrap();
    assert_eq!(files(&device.queue()), before);
}

#[test]
fn settings_of_a_loop_device_go_away_unless_confirmed() {
    let _turn = turn();
    let Some(device) = loop_device() else { return };
    let (kernel, state) = (Live::machine(), tempfile::tempdir().unwrap());
    let before = files(&device.queue());
    apply(
        &kernel,
        state.path(),
        &device.changes(),
        &options(Some(100)),
    )
    .unwrap();
    assert_eq!(
        recover(&kernel, state.path(), 99).unwrap(),
        Recovered::Nothing
    );
    assert_ne!(files(&device.queue()), before);
    let undone = recover(&kernel, state.path(), 100).unwrap();
    assert!(matches!(undone, Recovered::Undone(_)));
    assert_eq!(files(&device.queue()), before);
}

/// A file system of a few bytes in memory, mounted until dropped.
struct Tiny(tempfile::TempDir);

impl Tiny {
    fn mount(bytes: usize) -> Result<Self, String> {
        let directory = tempfile::tempdir().unwrap();
        let (size, path) = (format!("size={bytes}"), directory.path().to_str().unwrap());
        output("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", path])?;
        Ok(Self(directory))
    }

    fn grow(&self, bytes: usize) {
        let size = format!("remount,size={bytes}");
        output("mount", &["-o", &size, self.0.path().to_str().unwrap()]).unwrap();
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        drop(output("umount", &[self.0.path().to_str().unwrap()]));
    }
}

#[test]
fn a_disk_that_is_full_under_the_journal_leaves_everything_as_it_was() {
    const PAGE: usize = 4096;
    if !is_root() {
        return not_available("a file system of its own: this is not root");
    }
    let tree = build(&shape("two-core-vm"));
    let apply_in = |state: &Path, kernel: &FakeKernel, plan: String| {
        let changes = Plan::of(&Host::read(kernel, "fake").unwrap(), Profile::Latency).changes;
        let options = ApplyOptions {
            plan,
            ..options(None)
        };
        apply(kernel, state, &changes, &options)
    };
    // How long the first record is, which the name of the plan then fills up to whole pages.
    let (roomy, kernel) = (tempfile::tempdir().unwrap(), FakeKernel::over(tree.clone()));
    apply_in(roomy.path(), &kernel, String::new()).unwrap();
    let journal = std::fs::read(roomy.path().join("journal-0001")).unwrap();
    let first = journal.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let plan = "x".repeat(2 * PAGE - first % PAGE);
    let pages = (first + plan.len()) / PAGE;

    for room in [pages - 1, pages] {
        let disk = match Tiny::mount(room * PAGE) {
            Ok(disk) => disk,
            Err(why) => return not_available(format!("a file system of its own: {why}")),
        };
        let (state, kernel) = (disk.0.path(), FakeKernel::over(tree.clone()));
        let refused = apply_in(state, &kernel, plan.clone()).unwrap_err();
        assert!(matches!(refused, ApplyError::Unrecorded(_)), "{refused}");
        assert!(refused.to_string().starts_with("everything is as it was: "));
        assert_eq!(kernel.snapshot(), tree);
        assert_eq!(kernel.writes.get() > 0, room == pages);
        // With room again, what is unfinished is undone once more, and then there is nothing.
        disk.grow(16 * pages * PAGE);
        recover(&kernel, state, 1).unwrap();
        assert_eq!(recover(&kernel, state, 1).unwrap(), Recovered::Nothing);
        assert_eq!(kernel.snapshot(), tree);
    }
}

fn move_of(name: &str, now: &str, want: &str) -> Change {
    Change {
        knob: format!("irq {name}"),
        target: Target::Interrupt(name.to_owned()),
        syntax: Syntax::List,
        now: now.to_owned(),
        want: want.to_owned(),
        at_most: None,
        disturbs: Vec::new(),
        reason: "a test".into(),
        risk: Risk::Low,
    }
}

#[test]
fn a_movable_interrupt_is_moved_and_moved_back() {
    let _turn = turn();
    let host = host();
    if !is_root() || host.cpus.online.len() < 2 {
        return not_available("moving an interrupt: it takes root and two CPUs");
    }
    // The quietest that has one name: nobody should feel it.
    let mut movable: Vec<_> = host
        .interrupts
        .iter()
        .filter(|irq| irq.managed == Managed::No && irq.affinity.len() > 1 && !irq.name.is_empty())
        .filter(|irq| {
            let same = host
                .interrupts
                .iter()
                .filter(|other| other.name == irq.name);
            same.count() == 1
        })
        .collect();
    movable.sort_by_key(|irq| irq.counts.values().sum::<u64>());
    let Some(irq) = movable.first() else {
        return not_available("moving an interrupt: none is movable");
    };
    let (kernel, state) = (Live::machine(), tempfile::tempdir().unwrap());
    let path = format!("/proc/irq/{}/smp_affinity_list", irq.number);
    let before = kernel.read(&path).unwrap();
    let here = irq.lands_on().first();
    let there = irq.affinity.iter().find(|cpu| Some(*cpu) != here).unwrap();
    let change = move_of(&irq.name, &irq.affinity.to_string(), &there.to_string());
    match apply(
        &kernel,
        state.path(),
        std::slice::from_ref(&change),
        &options(None),
    ) {
        Ok(writes) => assert_eq!(writes, 1),
        // Some interrupts are bound to their CPU and only say so when they are moved.
        Err(error @ ApplyError::NotTaken { .. }) => return not_available(error),
        Err(error) => panic!("{error}"),
    }
    assert_eq!(verify(&kernel, std::slice::from_ref(&change)), []);
    assert_eq!(kernel.text(&path), Some(there.to_string()));
    rollback(&kernel, state.path(), 2).unwrap();
    assert_eq!(kernel.read(&path).unwrap(), before);
}

#[test]
fn a_managed_interrupt_refuses_and_takes_the_whole_transaction_with_it() {
    let _turn = turn();
    let host = host();
    let mut managed = host.interrupts.iter();
    let Some(irq) = managed.find(|irq| irq.managed == Managed::Yes) else {
        return not_available("a managed interrupt: this machine has none that says so");
    };
    let plan = Plan::of(&host, Profile::Latency);
    let target = Target::Interrupt(irq.name.clone());
    assert!(plan.changes.iter().all(|change| change.target != target));
    let Some(device) = loop_device() else { return };
    let (kernel, state) = (Live::machine(), tempfile::tempdir().unwrap());
    let before = files(&device.queue());
    let path = format!("/proc/irq/{}/smp_affinity_list", irq.number);
    let affinity = kernel.read(&path).unwrap();
    let mut changes = device.changes();
    let one = irq.affinity.first().unwrap().to_string();
    if irq.affinity.to_string() == one {
        return not_available("moving a managed interrupt: it has one CPU only");
    }
    changes.push(move_of(&irq.name, &irq.affinity.to_string(), &one));
    let refused = apply(&kernel, state.path(), &changes, &options(None)).unwrap_err();
    assert!(
        matches!(
            refused,
            ApplyError::NotTaken { .. } | ApplyError::Closed { .. }
        ),
        "{refused}"
    );
    assert_eq!(files(&device.queue()), before);
    assert_eq!(kernel.read(&path).unwrap(), affinity);
}

const INSIDE: &str = "TORC_TEST_INSIDE_NAMESPACE";

/// Runs the test `name` of this binary in a network namespace with a pair of cards of four queues
/// each; everything goes away with the process.
#[test]
fn queues_of_a_veth_pair_are_planned_applied_and_rolled_back() {
    if std::env::var_os(INSIDE).is_some() {
        return inside_the_namespace();
    }
    if !is_root() {
        return not_available("a network namespace: this is not root");
    }
    let script = format!(
        "mount -t sysfs sysfs /sys && \
         ip link add torc-a numrxqueues 4 numtxqueues 4 type veth \
            peer name torc-b numrxqueues 4 numtxqueues 4 && \
         ip link set torc-a up && ip link set torc-b up && \
         {INSIDE}=1 exec \"$0\" --exact --nocapture \
            this_machine::queues_of_a_veth_pair_are_planned_applied_and_rolled_back"
    );
    let binary = std::env::current_exe().unwrap();
    let probe = ["--net", "--mount", "--propagation", "private", "sh", "-c"];
    let mut words = probe.to_vec();
    words.extend(["mount -t sysfs sysfs /sys && command -v ip"]);
    if let Err(why) = output("unshare", &words) {
        return not_available(format!("a network namespace: {why}"));
    }
    let mut words = probe.to_vec();
    words.extend([script.as_str(), binary.to_str().unwrap()]);
    let said = output("unshare", &words).unwrap_or_else(|why| panic!("{why}"));
    assert!(said.contains("1 passed"), "{said}");
}

fn inside_the_namespace() {
    let plan = || {
        let mut changes = Plan::of(&host(), Profile::Latency).changes;
        changes.retain(|change| change.knob.starts_with("torc-a "));
        changes
    };
    let (kernel, state) = (Live::machine(), tempfile::tempdir().unwrap());
    let nic = host()
        .nics
        .into_iter()
        .find(|nic| nic.name == "torc-a")
        .unwrap();
    assert_eq!((nic.receive.len(), nic.transmit.len()), (4, 4));
    let queues: Vec<PathBuf> = (0..4)
        .flat_map(|at| [format!("rx-{at}"), format!("tx-{at}")])
        .map(|queue| format!("/sys/class/net/torc-a/queues/{queue}").into())
        .collect();
    let read = || queues.iter().map(|queue| files(queue)).collect::<Vec<_>>();
    let before = read();
    let changes = plan();
    if changes.is_empty() {
        return not_available("queues of their own: more shards than the four queues");
    }
    apply(&kernel, state.path(), &changes, &options(None)).unwrap();
    assert_ne!(read(), before);
    assert_eq!(verify(&kernel, &changes), []);
    assert_eq!(plan(), []);
    rollback(&kernel, state.path(), 2).unwrap();
    assert_eq!(read(), before);
}

#[test]
fn limits_are_those_that_the_kernel_holds_this_process_to() {
    use rustix::process::{Resource, getrlimit};
    let limits = host().limits;
    assert!(limits.known);
    assert_eq!(limits.open_files, getrlimit(Resource::Nofile).current);
    assert_eq!(limits.locked_bytes, getrlimit(Resource::Memlock).current);
    assert_eq!(
        limits.realtime_priority,
        getrlimit(Resource::Rtprio).current
    );
}

#[test]
fn real_time_priority_is_taken_where_the_kernel_gives_it() {
    let cpus = host().usable();
    let options = JitterOptions {
        cpus: cpus.iter().take(1).collect(),
        duration: std::time::Duration::from_millis(20),
        realtime: true,
        trace: true,
    };
    match jitter::measure(&options) {
        Ok(jitter) => {
            assert_eq!(jitter.cores.len(), 1);
            for missing in &jitter.unavailable {
                not_available(format!("{}: {}", missing.what, missing.reason));
            }
        }
        Err(error @ JitterError::Realtime { .. }) => not_available(error),
        Err(error) => panic!("{error}"),
    }
}
