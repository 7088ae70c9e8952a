//! Damage: in what a shard keeps about itself, which no replica has; and in the data, where others have it, and where
//! nobody does.

use std::time::Duration;

use bytes::Bytes;
use torc_engine::{Fsync, Loss};
use torc_env::{Token, TokenRange, TreeId};

use super::world::World;
use crate::anti_entropy::catch_up::Pulls;
use crate::anti_entropy::compare::Compared;
use crate::anti_entropy::loss;
use crate::api::{DamagedPart, FailureCode, Level, Outlook, ScanRequest};
use crate::conflict::Conflict;
use crate::core::tree;
use crate::node::NodeConfig;
use crate::run::own_runs;

#[test]
fn a_node_that_has_lost_its_marks_starts_and_is_whole_after_it_has_asked_the_others() {
    let world = World::with(91, 3, 2, |config| config.repair.automatic = false);
    for index in 0..30 {
        world.put(0, &format!("key {index}"), "v").unwrap();
    }
    world.sleep(Duration::from_secs(3));
    world.crash(2);
    world.spoil_tables_of(0, tree::SYSTEM);
    world.crash(0);
    world.boot(0);
    world.sleep(Duration::from_secs(5));
    // A mark that it lacks data may have been among what is lost.
    assert!(!world.is_whole(0), "nobody has told it what it lacks");
    world.boot(2);
    world.wait("the node is whole", || world.is_whole(0));
    for index in 0..30 {
        let key = format!("key {index}");
        assert_eq!(world.get(0, &key, Level::One).unwrap().siblings.len(), 1);
    }
    // What was cut out is not met again.
    world.sleep(Duration::from_secs(3));
    restart(&world);
    assert!(world.is_whole(0), "nothing is missing any more");
}

#[test]
fn marks_that_rot_while_a_shard_runs_are_written_anew_and_nobody_is_asked() {
    let world = World::with(92, 3, 1, |config| config.repair.automatic = false);
    world.keyspace("last", |keyspace| keyspace.conflict = Conflict::Lww);
    world.sleep(Duration::from_secs(3));
    world.crash(2);
    world.wait_until_down(0, 2);
    world.spoil_tables_of(0, tree::SYSTEM);
    world.scrub(0);
    assert!(world.is_damaged(0));
    world.wait("the damage is cut out", || !world.is_damaged(0));
    assert!(world.is_whole(0));
    world.sleep(Duration::from_secs(2));
    world.put_in(0, "last", "k", "v").unwrap();
    let newest = world.node(0).newest_stamp();
    world.crash(0);
    // What the mark is for: the node comes back into an earlier time.
    world.set_clock(0, -3600);
    world.boot(0);
    world.wait("the node is back", || world.is_ready(0));
    assert!(world.is_whole(0), "it has not lost any data");
    assert!(world.node(0).newest_stamp() >= newest);
}

#[test]
fn hints_that_rot_keep_none_from_being_delivered_that_can_be_read() {
    let world = World::with(93, 4, 1, |config| config.repair.automatic = false);
    let (lost, key) = (
        world.key_with_replicas(&[0, 2, 3]),
        world.key_with_replicas(&[0, 1, 2]),
    );
    world.crash(2);
    world.wait_until_down(0, 2);
    world.put(0, &lost, "v").unwrap();
    world.wait("the hint is kept", || world.gauges(0).hints == 1);
    // It counts from the moment when it is on its way to the disk.
    world.sleep(Duration::from_millis(100));
    // One that stays away, so that damage in the data would wait for it.
    world.crash(3);
    world.spoil_tables_of(0, tree::HINTS);
    world.put(0, &key, "v").unwrap();
    world.boot(2);
    world.wait("the hint that can be read is delivered", || {
        world.is_ready(2) && world.gauges(0).hints == 0
    });
    assert_eq!(world.get(2, &key, Level::One).unwrap().siblings.len(), 1);
    assert!(world.is_whole(0));
}

/// Three nodes, of which node 0 has lost its marks on a disk that takes no others.
fn without_marks_on_a_full_disk(seed: u64, loses: impl FnOnce(&World)) -> World {
    let world = World::with(seed, 3, 1, |config| config.repair.automatic = false);
    world.keyspace("last", |keyspace| keyspace.conflict = Conflict::Lww);
    world.sleep(Duration::from_secs(3));
    world.spoil_tables_of(0, tree::SYSTEM);
    loses(&world);
    world.wait("the node is whole", || {
        !world.is_damaged(0) && world.is_whole(0)
    });
    // Long enough for whoever says that all is well again.
    world.sleep(Duration::from_secs(5));
    world
}

/// Node 0 has no room any more when it finds what it lacks.
fn meet_damage_on_a_full_disk(world: &World) {
    world.fill_disk(0, true);
    world.sleep(Duration::from_secs(3));
    world.scrub(0);
}

/// The node crashes, and comes back alone into an earlier time.
fn comes_back_alone_and_is_not_whole(world: &World) {
    for host in 0..3 {
        world.crash(host);
    }
    world.fill_disk(0, false);
    world.set_clock(0, -3600);
    world.boot(0);
    world.sleep(Duration::from_secs(5));
    // Without a mark its stamps begin at civil time: it has to ask before it mints.
    assert!(!world.is_whole(0), "no mark is durable, nobody was asked");
}

#[test]
fn a_shard_whose_mark_cannot_be_written_anew_goes_on_lacking_it() {
    let world = without_marks_on_a_full_disk(94, meet_damage_on_a_full_disk);
    comes_back_alone_and_is_not_whole(&world);
}

#[test]
fn a_shard_that_has_caught_up_on_a_full_disk_goes_on_lacking_its_mark() {
    let world = without_marks_on_a_full_disk(95, |world| {
        for host in 0..3 {
            world.crash(host);
        }
        world.boot(0);
        world.sleep(Duration::from_secs(3));
        assert!(!world.is_whole(0), "nobody has told it what it lacks");
        world.spoil_tables_of(0, tree::SYSTEM);
        meet_damage_on_a_full_disk(world);
        world.wait("the damage is cut out", || !world.is_damaged(0));
        world.boot(1);
        world.boot(2);
    });
    comes_back_alone_and_is_not_whole(&world);
}

#[test]
fn a_mark_that_can_be_written_again_is_made_good() {
    let world = without_marks_on_a_full_disk(96, meet_damage_on_a_full_disk);
    world.fill_disk(0, false);
    world.sleep(Duration::from_secs(5));
    for host in 0..3 {
        world.crash(host);
    }
    world.boot(0);
    world.wait("the shard lacks nothing", || world.is_whole(0));
}

/// Keyspace `default`, of three copies where there are as many nodes.
const DEFAULT: TreeId = TreeId(1);
/// The keyspace with one copy that [`with_one_copy`] creates.
const ONE: TreeId = TreeId(2);
/// How long the shards get for what they should not do.
const LONG: Duration = Duration::from_secs(15);

/// Node 0 crashes and comes back.
fn restart(world: &World) {
    world.crash(0);
    world.boot(0);
    world.wait("the node is back", || world.is_ready(0));
}

fn key(index: usize) -> String {
    format!("key {index}")
}

/// So that a table has many blocks, whatever compresses them.
fn long_value(index: usize) -> String {
    let numbers = (0..60).map(|at| Token::of(TreeId(at), &index.to_le_bytes()));
    numbers.map(|token| token.to_string()).collect()
}

fn filled(seed: u64, nodes: usize) -> World {
    let world = World::with(seed, nodes, 1, |config| config.repair.automatic = false);
    for index in 0..60 {
        let value = long_value(index);
        let write = |write: &mut crate::api::WriteOptions| write.w = Level::All;
        world.put_with(0, &key(index), &value, write).unwrap();
    }
    world
}

/// Three nodes, of which node 0 alone has some keys of a keyspace; returns those.
fn with_one_copy(seed: u64) -> (World, Vec<String>) {
    let world = filled(seed, 3);
    world.keyspace("one", |keyspace| keyspace.n = 1);
    let view = world.node(0).0.view().unwrap();
    let is_alone = |key: &String| {
        let token = Token::of(ONE, key.as_bytes());
        view.ring.replicas(token, 1) == [view.me.unwrap()]
    };
    let keys: Vec<String> = (0..60).map(key).filter(is_alone).collect();
    for key in &keys {
        world.put_in(1, "one", key, "v").unwrap();
    }
    (world, keys)
}

fn parts(world: &World, host: usize) -> Vec<DamagedPart> {
    world.node(host).damaged_parts()
}

fn accept(world: &World, host: usize) -> usize {
    let accepted = world.on(host, |node, _| async move { node.accept_loss().await });
    accepted.unwrap().len()
}

fn is_healed(world: &World, host: usize) -> bool {
    world.is_whole(host) && !world.is_damaged(host)
}

/// None of the keys is called absent, and at least one cannot be read.
fn are_unknown(world: &World, host: usize, keyspace: &str, keys: &[String], r: Level) {
    let mut unknown = 0;
    for key in keys {
        match world.get_in(host, keyspace, key, r) {
            Ok(answer) => assert_eq!(answer.siblings.len(), 1, "{key} is called absent"),
            Err(failure) => {
                assert_eq!(failure.code, FailureCode::Unreadable, "{failure}");
                unknown += 1;
            }
        }
    }
    assert!(unknown > 0, "all can be read");
}

/// How many of the keys are there.
fn count(world: &World, host: usize, keyspace: &str, keys: &[String], r: Level) -> usize {
    let counts = keys.iter().map(|key| {
        let answer = world.get_in(host, keyspace, key, r).unwrap();
        answer.siblings.len()
    });
    counts.sum()
}

fn keys() -> Vec<String> {
    (0..60).map(key).collect()
}

/// Of what node 0 has lost, the operator is told, and accepts it.
fn waits_for_the_operator(world: &World, lost: &[String]) {
    are_unknown(world, 0, "one", lost, Level::Quorum);
    let listed = parts(world, 0);
    let waiting = listed.iter().filter(|part| part.outlook == Outlook::Lost);
    assert_eq!(waiting.count() as u64, world.gauges(0).damage_waiting);
    assert!(world.gauges(0).damage_waiting > 0, "{listed:?}");
    let of_one = listed.iter().filter(|part| part.outlook == Outlook::Lost);
    for part in of_one {
        assert_eq!(part.keyspace.as_deref(), Some("one"), "{part:?}");
        assert!(part.why.contains("n = 1"), "{}", part.why);
    }
    // Whatever else the node has, it goes on serving.
    for other in [1, 2] {
        world.crash(other);
    }
    assert_eq!(count(world, 0, "default", &keys(), Level::One), 60);
    for other in [1, 2] {
        world.boot(other);
    }
    world.wait("all are back", || (0..3).all(|host| world.is_ready(host)));

    assert!(accept(world, 0) > 0);
    // A crash does not take it back.
    world.crash(0);
    world.boot(0);
    world.wait("nothing is missing any more", || {
        world.is_ready(0) && is_healed(world, 0) && parts(world, 0).is_empty()
    });
    world.sleep(Duration::from_secs(3));
    assert!(count(world, 0, "one", lost, Level::Quorum) < lost.len());
    assert_eq!(count(world, 0, "default", &keys(), Level::One), 60);
    assert_eq!(world.gauges(0).damage_waiting, 0);
    world.put_in(1, "one", &lost[0], "again").unwrap();
    restart(world);
    assert!(world.is_whole(0));
    assert_eq!(world.values_in(1, "one", &lost[0]).len(), 1);
}

#[test]
pub(super) fn rot_of_the_only_copy_stays_unknown_until_somebody_accepts_the_loss() {
    let (world, lost) = with_one_copy(101);
    world.spoil_tables_of(0, ONE);
    world.scrub(0);
    world.sleep(LONG);
    assert!(world.is_damaged(0), "it is not cut out");
    assert!(parts(&world, 0)[0].file_id.is_some());
    waits_for_the_operator(&world, &lost);
}

/// The marks that rot too have it catch up with all owners of all its ranges.
#[test]
fn rot_of_the_only_copy_is_no_less_unknown_after_a_start() {
    let (world, lost) = with_one_copy(102);
    world.sleep(Duration::from_secs(3));
    for tree in [ONE, tree::SYSTEM] {
        world.spoil_tables_of(0, tree);
    }
    restart(&world);
    world.sleep(LONG);
    waits_for_the_operator(&world, &lost);
}

#[test]
fn the_only_copy_in_a_table_that_cannot_be_opened_stays_unknown_until_somebody_accepts_the_loss() {
    let (world, lost) = with_one_copy(103);
    world.spoil_tables_at(0, ONE, |len| len - 4096 + 40);
    restart(&world);
    are_unknown(&world, 0, "one", &lost, Level::Quorum);
    // No less after another one.
    restart(&world);
    world.sleep(LONG);
    waits_for_the_operator(&world, &lost);
}

#[test]
fn a_frame_of_the_log_that_rots_costs_nothing_that_others_have_and_else_waits_for_the_operator() {
    let (world, lost) = with_one_copy(104);
    world.sleep(Duration::from_secs(1));
    world.crash(0);
    let id = world.hosts[0];
    let log = world.sim.files(id).into_iter();
    let mut log = log.filter(|(path, _)| path.extension().is_some_and(|name| name == "wal"));
    let (path, _) = log.next().expect("there is a log");
    assert!(world.sim.flip_bits(id, &path, 40 * 4096, 4));
    world.boot(0);
    world.wait("the node is back", || world.is_ready(0));
    world.sleep(LONG);
    // It may have been any key.
    for key in &lost {
        world.get_in(0, "one", key, Level::Quorum).unwrap_err();
    }
    let listed = parts(&world, 0);
    assert!(!listed.is_empty() && listed.iter().all(|part| part.outlook == Outlook::Lost));
    for other in [1, 2] {
        world.crash(other);
    }
    assert_eq!(count(&world, 0, "default", &keys(), Level::One), 60);
    for other in [1, 2] {
        world.boot(other);
    }
    assert!(accept(&world, 0) > 0);
    world.wait("nothing is missing any more", || is_healed(&world, 0));
    // What could be read of the log, and in this case nothing was in the frame that could not.
    count(&world, 0, "one", &lost, Level::Quorum);
}

#[test]
fn where_every_copy_is_damaged_none_is_cut_out_until_somebody_accepts_the_loss() {
    let world = filled(105, 3);
    for host in 0..3 {
        world.spoil_tables_of(host, DEFAULT);
    }
    for host in 0..3 {
        world.scrub(host);
    }
    world.sleep(LONG);
    for host in 0..3 {
        assert!(world.is_damaged(host));
        are_unknown(&world, host, "default", &keys(), Level::Quorum);
        let listed = parts(&world, host);
        assert!(listed.iter().all(|part| part.outlook == Outlook::Lost));
    }
    for host in 0..3 {
        assert!(accept(&world, host) > 0);
    }
    world.wait("nothing is missing any more", || {
        (0..3).all(|host| is_healed(&world, host))
    });
    let left = count(&world, 0, "default", &keys(), Level::All);
    assert!((1..60).contains(&left), "{left}");
}

#[test]
fn where_two_of_three_copies_are_damaged_the_third_one_is_taken_when_somebody_says_so() {
    let world = filled(106, 3);
    for host in [0, 1] {
        world.spoil_tables_of(host, DEFAULT);
    }
    for host in [0, 1] {
        world.scrub(host);
    }
    world.sleep(LONG);
    // A write that the third one has missed may have been with just the other two.
    are_unknown(&world, 2, "default", &keys(), Level::Quorum);
    assert_eq!(count(&world, 2, "default", &keys(), Level::One), 60);
    for host in [0, 1] {
        assert!(parts(&world, host)[0].why.contains("has lost it too"));
        accept(&world, host);
    }
    world.wait("nothing is missing any more", || {
        (0..2).all(|host| is_healed(&world, host))
    });
    for host in 0..3 {
        assert_eq!(count(&world, host, "default", &keys(), Level::One), 60);
    }
}

#[test]
fn two_replicas_that_have_lost_different_parts_heal_each_other() {
    for damaged_at_a_start in [false, true] {
        let world = filled(107, 2);
        world.spoil_tables_at(0, DEFAULT, |len| len / 10);
        world.spoil_tables_at(1, DEFAULT, |len| len / 10 * 6);
        for host in [0, 1] {
            if damaged_at_a_start {
                world.crash(host);
            } else {
                world.scrub(host);
            }
        }
        if damaged_at_a_start {
            for host in [0, 1] {
                world.boot(host);
            }
            world.wait("both are back", || (0..2).all(|host| world.is_ready(host)));
            for host in [0, 1] {
                world.scrub(host);
            }
        }
        world.wait("nothing is missing any more", || {
            (0..2).all(|host| is_healed(&world, host))
        });
        for host in 0..2 {
            assert_eq!(count(&world, host, "default", &keys(), Level::One), 60);
        }
    }
}

#[test]
fn one_of_two_copies_that_a_start_has_lost_is_fetched_and_the_rest_is_served_meanwhile() {
    let world = filled(108, 2);
    world.spoil_tables_at(0, DEFAULT, |len| len / 10);
    world.scrub(0);
    world.wait("it is fetched", || is_healed(&world, 0));
    world.spoil_tables_at(0, DEFAULT, |len| len - 4096 + 40);
    world.crash(0);
    world.crash(1);
    world.boot(0);
    world.sleep(LONG);
    let listed = parts(&world, 0);
    assert!(!listed.is_empty() && listed.iter().all(|part| part.outlook == Outlook::Silent));
    are_unknown(&world, 0, "default", &keys(), Level::One);
    world.boot(1);
    world.wait("it is fetched", || is_healed(&world, 0));
    world.crash(1);
    assert_eq!(count(&world, 0, "default", &keys(), Level::One), 60);
}

/// Where an owner cannot read what it has, and a newcomer has nothing yet, both have the same sums.
#[test]
fn a_newcomer_takes_over_nothing_from_an_owner_that_cannot_read_what_it_has() {
    let unaided = |config: &mut NodeConfig| config.repair.automatic = false;
    let world = World::growing(107, 3, 4, 1, unaided);
    world.keyspace("one", |keyspace| keyspace.n = 1);
    for key in keys() {
        world.put_in(1, "one", &key, &"v".repeat(20_000)).unwrap();
    }
    world.flush(0);
    let id = world.hosts[0];
    for (path, len) in world.sim.files(id) {
        if path.extension().is_some_and(|name| name == "blob") {
            // Values that lie one behind the other.
            (0..len).step_by(1000).for_each(|at| {
                world.sim.flip_bits(id, &path, at, 1);
            });
        }
    }
    restart(&world);
    are_unknown(&world, 1, "one", &keys(), Level::Quorum);
    world.boot(3);
    world.sleep(LONG);
    are_unknown(&world, 1, "one", &keys(), Level::Quorum);
    assert!(!world.is_ready(3), "it waits for what it takes over");
    assert!(accept(&world, 0) > 0);
    world.wait("the newcomer is in the ring", || world.is_ready(3));
}

/// Keeps no hint, so that what a node has missed it misses.
fn without_hints(config: &mut NodeConfig) {
    config.repair.automatic = false;
    config.hints.bytes_max = 0;
}

/// Node 2 acknowledges before it syncs, and loses the end of its log, which a quorum of nodes 0 and 2 has.
fn with_a_write_that_node_2_forgets(seed: u64) -> World {
    let world = World::with(seed, 3, 1, without_hints);
    world.crash(2);
    world.set_fsync(Fsync::Interval(Duration::from_secs(5)));
    world.boot(2);
    world.set_fsync(Fsync::Group);
    world.wait("all are back", || (0..3).all(|host| world.is_ready(host)));
    world.put(0, "before", "v").unwrap();
    world.sleep(Duration::from_secs(6));
    world.crash(1);
    world.wait_until_down(0, 1);
    world.wait_until_down(2, 1);
    let written = world.put(0, "k", "v").unwrap();
    assert_eq!(written.replicas, 2);
    world.crash(2);
    world
}

#[test]
fn an_owner_that_forgot_a_write_does_not_vouch_for_one_that_has_lost_it() {
    let world = with_a_write_that_node_2_forgets(111);
    world.wait_until_down(0, 2);
    world.spoil_tables_of(0, DEFAULT);
    world.scrub(0);
    world.boot(1);
    world.boot(2);
    let key = ["k".to_owned()];
    for host in [1, 2] {
        world.wait("all are back", || world.is_ready(host));
    }
    world.wait("the operator is asked", || {
        (0..3).any(|host| world.gauges(host).damage_waiting > 0)
    });
    world.sleep(LONG);
    are_unknown(&world, 1, "default", &key, Level::Quorum);
    // Whatever else there is, is served, also after a restart.
    world.put(1, "other", "v").unwrap();
    for host in [0, 2] {
        let listed = parts(&world, host);
        assert!(!listed.is_empty() && listed.iter().all(|part| part.outlook == Outlook::Lost));
        world.crash(host);
        world.boot(host);
        world.wait("the node is back", || world.is_ready(host));
        world.sleep(LONG);
    }
    are_unknown(&world, 1, "default", &key, Level::Quorum);
    assert_eq!(world.values(1, "other").len(), 1);
    for host in [0, 2] {
        assert!(accept(&world, host) > 0);
    }
    world.wait("nothing is missing any more", || {
        (0..3).all(|host| is_healed(&world, host))
    });
    assert_eq!(count(&world, 1, "default", &key, Level::Quorum), 0);
}

#[test]
fn an_owner_that_forgot_a_write_fetches_it_from_those_that_have_it() {
    let world = with_a_write_that_node_2_forgets(112);
    world.boot(1);
    world.boot(2);
    world.wait("it has what it forgot", || {
        world.is_ready(2) && is_healed(&world, 2)
    });
    assert_eq!(world.values(2, "k").len(), 1);
}

/// What one node keeps from another is no reason to keep it from a third one too.
#[test]
fn what_can_be_fetched_is_served_though_the_owner_of_something_else_is_away_and_stays_so() {
    let world = filled(113, 3);
    world.keyspace("two", |keyspace| keyspace.n = 2);
    for key in keys() {
        let all = |write: &mut crate::api::WriteOptions| write.w = Level::All;
        world.put_in_with(0, "two", &key, "v", all).unwrap();
    }
    let tree = TreeId(2);
    world.spoil_tables_at(0, tree, |len| len - 4096 + 40);
    world.crash(1);
    world.crash(0);
    world.boot(0);
    world.wait("the node is back", || world.is_ready(0));
    world.wait_until_down(0, 1);
    world.sleep(LONG);
    let with = |other: usize| -> Vec<Token> {
        let view = world.node(0).0.view().unwrap();
        let member = |host: usize| view.find(world.sim.node(world.hosts[host])).unwrap();
        let tokens = keys()
            .into_iter()
            .map(|key| Token::of(tree, key.as_bytes()));
        let shared = tokens.filter(|token| {
            let replicas = view.ring.replicas(*token, 2);
            replicas.contains(&member(0)) && replicas.contains(&member(other))
        });
        shared.collect()
    };
    let (away, here) = (with(1), with(2));
    assert!(!away.is_empty() && !here.is_empty());
    let has = |token: &Token| world.node(0).0.lacking.has(tree, *token);
    assert!(here.iter().all(has) && !away.iter().any(has));
    // What is known to be there again is not asked for at each start.
    world.crash(2);
    restart(&world);
    assert!(here.iter().all(has) && !away.iter().any(has));
    world.boot(1);
    world.wait("it is fetched", || is_healed(&world, 0));
}

#[test]
fn a_loss_that_is_accepted_on_one_node_does_not_wait_for_the_other() {
    let world = filled(114, 3);
    for host in [0, 1] {
        world.spoil_tables_of(host, DEFAULT);
    }
    for host in [0, 1] {
        world.scrub(host);
    }
    world.sleep(LONG);
    assert!(
        parts(&world, 0)
            .iter()
            .all(|part| part.outlook == Outlook::Lost)
    );
    assert!(accept(&world, 0) > 0);
    world.wait("the node is whole", || is_healed(&world, 0));
    world.wait("so is the other one then", || is_healed(&world, 1));
    for host in 0..3 {
        assert_eq!(count(&world, host, "default", &keys(), Level::One), 60);
    }
}

#[test]
fn of_five_owners_one_may_be_silent_while_another_is_healed() {
    let world = filled(115, 5);
    world.keyspace("five", |keyspace| keyspace.n = 5);
    for key in keys() {
        let all = |write: &mut crate::api::WriteOptions| write.w = Level::All;
        world.put_in_with(0, "five", &key, "v", all).unwrap();
    }
    let tree = TreeId(2);
    for other in [3, 4] {
        world.crash(other);
        world.wait_until_down(0, other);
    }
    world.spoil_tables_of(0, tree);
    world.scrub(0);
    world.sleep(LONG);
    let listed = parts(&world, 0);
    assert!(!listed.is_empty() && listed.iter().all(|part| part.outlook == Outlook::Silent));
    world.boot(3);
    world.wait("it is fetched from the rest", || is_healed(&world, 0));
    let view = world.node(0).0.view().unwrap();
    let away = view.find(world.sim.node(world.hosts[4])).unwrap();
    assert!(!view.is_up(away));
    for key in keys() {
        assert!(!world.stored_in(0, tree, &key).is_empty(), "{key}");
    }
}

/// While what is damaged is not cut out, nobody fetches anything there.
#[test]
fn what_was_lost_where_something_is_damaged_stays_lost_when_the_rest_is_found() {
    let world = filled(116, 2);
    world.spoil_tables_at(0, DEFAULT, |len| len / 2);
    let (damaged, left) = world.on(0, |node, _| async move {
        let core = &node.0;
        core.store.scrub(1 << 30).await.unwrap();
        let damaged = core.store.damages();
        let view = core.view().unwrap();
        core.lacking.know(vec![Loss {
            tree: Some(DEFAULT),
            range: TokenRange::ALL,
            is_accepted: false,
        }]);
        let mut pulls = Pulls::default();
        for run in own_runs(&view, core.slice()) {
            for owner in run.replicas.as_slice() {
                let compared = Compared {
                    is_whole: true,
                    unreadable: Vec::new(),
                };
                pulls.note(&run, *owner, run.range, Ok(compared));
            }
        }
        let cuts = core.lacking.cuts();
        loss::settle(core, &view, cuts, &pulls).await.unwrap();
        (damaged, core.lacking.lost())
    });
    assert_eq!((damaged.len(), left.len()), (1, 1));
    assert_eq!(left[0].range, damaged[0].range);
    world.wait("it is fetched", || is_healed(&world, 0));
    assert_eq!(count(&world, 0, "default", &keys(), Level::One), 60);
}

#[test]
fn a_scan_goes_as_far_as_a_replica_has_all() {
    let (world, lost) = with_one_copy(117);
    world.flush(0);
    let mut tokens: Vec<Token> = lost
        .iter()
        .map(|key| Token::of(ONE, key.as_bytes()))
        .collect();
    tokens.sort_unstable();
    let at = tokens[tokens.len() / 2];
    let page = |limit: u32, cursor| {
        world.on(0, |node, deadline| async move {
            let request = ScanRequest {
                keyspace: Bytes::from_static(b"one"),
                cursor,
                limit,
                prefix: Bytes::new(),
                values: false,
                r: Level::One,
                deadline,
            };
            node.scan(request).await
        })
    };
    world.node(0).0.lacking.know(vec![Loss {
        tree: Some(ONE),
        range: TokenRange {
            first: at,
            last: at,
        },
        is_accepted: false,
    }]);
    let mut listed = Vec::new();
    let mut cursor = None;
    let failure = loop {
        match page(5, cursor) {
            Ok(answer) => {
                listed.extend(answer.entries.into_iter().map(|entry| entry.key));
                cursor = Some(answer.cursor.expect("the scan cannot end"));
            }
            Err(failure) => break failure,
        }
    };
    assert_eq!(failure.code, FailureCode::Unreadable);
    assert_eq!(listed.len(), tokens.len() / 2);
}
