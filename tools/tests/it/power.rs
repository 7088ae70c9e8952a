//! Power cuts of a real file system below a real node: nothing acknowledged is lost, what is found is
//! what was at some time before the cut, and the node serves again soon. The simulator cuts the power
//! at every operation of a workload (`net/sim/src/power.rs`); here the kernel's own file systems say
//! what a synced write is.
//!
//! Needs root, a loop device and `mkfs.ext4` or `mkfs.xfs`; says so where they are missing.

mod history;
mod operator;
mod volume;

use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{RngCore, SeedableRng};
use torc_env::{Disk, Env, OpenMode};
use torc_runtime::{Background, Runtime, RuntimeConfig};

use crate::cluster::{Cluster, http_status, wait_until};
use history::{Survivors, Writer};
use operator::Operator;
use volume::{Cut, FileSystem, Volume};

const WRITERS: u64 = 8;

/// Writes sent and acknowledged, together, before power may go.
const EVENTS_MIN: u64 = 100;

/// Longest wait for a node that has lost power, on a machine that is busy with other tests.
const ANSWERS_WITHIN: Duration = Duration::from_secs(120);

/// The policies, and whether what they acknowledge is durable.
const POLICIES: [(&str, bool); 4] = [
    ("group", true),
    ("interval", false),
    ("always", true),
    ("never", false),
];

/// Prints past the harness, which hides what a passing test prints.
fn say(line: &str) {
    let mut terminal = std::io::stderr();
    writeln!(terminal, "{line}").unwrap();
}

fn not_available(kind: FileSystem, why: &str) {
    say(&format!(
        "power cuts of {kind} are not available here: {why}"
    ));
}

/// Whoever uses a node.
struct Users {
    writers: Vec<Writer>,
    operator: Operator,
}

/// A node on a volume of its own. The node goes first.
struct Node {
    cluster: Cluster,
    volume: Volume,
}

impl Node {
    fn configure(volume: Volume, memtable_mb: u32) -> Self {
        let memtable = format!("memory.memtable_mb={memtable_mb}");
        let policy = format!("durability.fsync=\"{}\"", POLICIES[0].0);
        // One shard, one log: the order of the acknowledgements is the order in the log.
        let cluster = Cluster::configure(1, 1, &[&memtable, &policy]);
        symlink(volume.path(), cluster.home(0).join("data")).unwrap();
        Self { cluster, volume }
    }

    fn client_address(&self) -> SocketAddr {
        self.cluster.client_address(0)
    }

    fn change_policy(&self, from: &str, to: &str) {
        let path = self.cluster.home(0).join("torc.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let line = |policy| format!("fsync = \"{policy}\"");
        assert!(text.contains(&line(from)));
        std::fs::write(&path, text.replace(&line(from), &line(to))).unwrap();
    }

    /// Loads the node, cuts the power at some moment, and mounts the volume again.
    fn lose_power(&mut self, users: &mut Users, cut: Cut, rng: &mut Xoshiro256PlusPlus) {
        let (events, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let (address, endpoint) = (self.client_address(), self.cluster.endpoint(0));
        let mut up_to_ms = |ms: u64| Duration::from_millis(rng.next_u64() % ms);
        let (loaded, dying) = (up_to_ms(1_500), up_to_ms(50));
        let is_loaded = std::thread::scope(|scope| {
            for writer in &mut users.writers {
                scope.spawn(|| writer.write(address, &events, &stop));
            }
            scope.spawn(|| users.operator.work(&endpoint, &stop));
            let begun = Instant::now();
            while events.load(Ordering::Relaxed) < EVENTS_MIN && begun.elapsed() < ANSWERS_WITHIN {
                std::thread::sleep(Duration::from_millis(1));
            }
            let is_loaded = events.load(Ordering::Relaxed) >= EVENTS_MIN;
            std::thread::sleep(loaded);
            self.volume.cut(cut);
            // What it acknowledges now must hold as well.
            std::thread::sleep(dying);
            self.cluster.kill(0);
            stop.store(true, Ordering::Relaxed);
            is_loaded
        });
        let ends: Vec<_> = users.writers.iter().map(|writer| &writer.ended).collect();
        assert!(is_loaded, "no load; the writers ended: {ends:?}");
        self.volume.unmount().unwrap();
        self.volume.mount().unwrap();
    }

    /// Starts the node and says how long it takes until it answers a read.
    fn recover(&mut self) -> Duration {
        let begun = Instant::now();
        self.cluster.spawn(0);
        let mut client = history::client(self.client_address());
        while let Err(error) = client.get(b"any") {
            let elapsed = begun.elapsed();
            assert!(elapsed < ANSWERS_WITHIN, "no answer: {error}");
            std::thread::sleep(Duration::from_millis(1));
        }
        let taken = begun.elapsed();
        self.cluster.wait_ready();
        taken
    }

    fn metric(&self, name: &str) -> u64 {
        let text = self.cluster.metrics(0);
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        let value = value.unwrap_or_else(|| panic!("no {name} in:\n{text}"));
        value.parse().unwrap()
    }
}

/// Cuts the power of a node on `kind` `rounds` times, under every policy in turn.
fn cut_power(kind: FileSystem, memtable_mb: u32, rounds: usize) {
    let volume = match Volume::create(kind) {
        Ok(volume) => volume,
        Err(why) => return not_available(kind, &why),
    };
    let mut node = Node::configure(volume, memtable_mb);
    node.recover();
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(u64::from(memtable_mb));
    let mut users = Users {
        writers: (0..WRITERS).map(Writer::new).collect(),
        operator: Operator::default(),
    };
    let mut recoveries = Vec::new();
    let (mut acked, mut lost, mut tables_max) = (0, 0, 0);
    for round in 0..rounds {
        let (policy, is_synced) = POLICIES[round % POLICIES.len()];
        let (next, _) = POLICIES[(round + 1) % POLICIES.len()];
        // Three and four have no common factor: every policy meets both.
        let cut = if round % 3 == 2 {
            Cut::FlushJournal
        } else {
            Cut::Hard
        };
        tables_max = tables_max.max(node.metric("torc_tables"));
        node.lose_power(&mut users, cut, &mut rng);
        node.change_policy(policy, next);
        recoveries.push(node.recover());
        let address = node.client_address();
        let writers = users.writers.iter_mut();
        let found: Vec<_> = writers.map(|writer| writer.check(address)).collect();
        users.operator.check(&node.cluster.endpoint(0));
        let what = format!("{kind}, round {round}, {policy}, {cut:?}: {found:?}");
        check(&found, is_synced, &what);
        assert_eq!(node.metric("torc_corrupt_blocks_total"), 0, "{what}");
        acked += found.iter().map(|one| one.acked).sum::<usize>();
        lost += found
            .iter()
            .map(|one| one.acked.saturating_sub(one.kept))
            .sum::<usize>();
    }
    recoveries.sort();
    let Operator {
        ordered,
        snapshots_taken,
        ..
    } = users.operator;
    say(&format!(
        "{rounds} power cuts of {kind}, memtable {memtable_mb} MiB: {acked} writes acknowledged, {lost} of \
         them lost under policies that do not sync first; {ordered} orders done, {snapshots_taken} of them \
         snapshots; up to {tables_max} tables; answering again after {:?}, at worst {:?}",
        recoveries[recoveries.len() / 2],
        recoveries[recoveries.len() - 1]
    ));
}

/// What holds for all writers together.
fn check(found: &[Survivors], is_synced: bool, what: &str) {
    assert!(found.iter().any(|one| one.acked > 0), "no load: {what}");
    if is_synced {
        let lost = found.iter().find(|one| one.kept < one.acked);
        assert_eq!(lost, None, "acknowledged writes are lost: {what}");
    }
    // A write that was sent after another was acknowledged comes after it in the log.
    let last_sent_at = found.iter().filter_map(|one| one.last_sent_at).max();
    let lost_acked_at = found.iter().filter_map(|one| one.lost_acked_at).min();
    if let (Some(sent), Some(acked)) = (last_sent_at, lost_acked_at) {
        assert!(
            sent < acked,
            "a later write outlived an earlier one: {what}"
        );
    }
}

#[test]
fn a_directory_of_a_file_system_that_has_shut_down_is_not_called_synced() {
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        let volume = match Volume::create(kind) {
            Ok(volume) => Arc::new(volume),
            Err(why) => return not_available(kind, &why),
        };
        let config = RuntimeConfig {
            background: Background::Shard,
            ..RuntimeConfig::new(volume.path())
        };
        let power = Arc::clone(&volume);
        let synced = Runtime::block_on(&config, move |shard| {
            let power = Arc::clone(&power);
            async move {
                let disk = shard.env().disk();
                let [root, old, new] = ["", "old", "new"].map(Path::new);
                drop(disk.open(old, OpenMode::CreateNew).await.unwrap());
                disk.sync_dir(root).await.unwrap();
                disk.rename(old, new).await.unwrap();
                power.cut(Cut::Hard);
                disk.sync_dir(root).await.is_ok()
            }
        });
        assert!(!synced.unwrap(), "{kind}");
    }
}

#[test]
fn a_node_that_cannot_write_any_more_says_so_until_it_is_started_again() {
    let volume = match Volume::create(FileSystem::Ext4) {
        Ok(volume) => volume,
        Err(why) => return not_available(FileSystem::Ext4, &why),
    };
    let mut node = Node::configure(volume, 1);
    node.recover();
    let endpoint = node.cluster.endpoint(0);
    let asked = |path: &str| http_status(&format!("{endpoint}{path}"));
    assert_eq!((asked("/health"), asked("/ready")), (Some(200), Some(200)));

    node.volume.cut(Cut::Hard);
    let put = node.cluster.command(&["put", "key", "value"]).output();
    assert!(!put.unwrap().status.success());
    wait_until(
        || format!("no word of it:\n{}", node.cluster.torc(&["status"])),
        || asked("/health") == Some(503),
    );
    assert_eq!(asked("/ready"), Some(503));
    let status = node.cluster.torc(&["status"]);
    let trouble = "trouble: shard 0 writes nothing more until this process is started again: ";
    assert!(status.contains(trouble), "{status}");
    assert!(status.contains("ready: false"), "{status}");
    assert_eq!(node.metric("torc_store_poisoned"), 1);
    assert_eq!(node.metric("torc_ready"), 0);

    node.cluster.kill(0);
    node.volume.unmount().unwrap();
    node.volume.mount().unwrap();
    node.recover();
    assert_eq!((asked("/health"), asked("/ready")), (Some(200), Some(200)));
    node.cluster.torc(&["put", "key", "value"]);
}

#[test]
fn power_cuts_under_load_lose_nothing_that_was_synced() {
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        cut_power(kind, 1, 4);
    }
}

#[test]
#[ignore = "takes minutes; part of .ci/night"]
fn a_hundred_and_twenty_power_cuts_under_load_lose_nothing_that_was_synced() {
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        for memtable_mb in [1, 64] {
            cut_power(kind, memtable_mb, 30);
        }
    }
}
