//! Requests while the topology changes.

use std::ops::Range;
use std::time::Duration;

use super::world::World;
use crate::api::{Failure, FailureCode, Level, Written};
use crate::keyspace::{Compaction, DEFAULT_NAME};
use crate::node::NodeConfig;

/// Neither hints nor repair make up for what a join forgets.
fn unaided(config: &mut NodeConfig) {
    config.hints.bytes_max = 0;
    config.repair.automatic = false;
}

/// Writes through the three founders until the nodes that join are whole; returns the keys that were
/// acknowledged.
fn written_while_joining(
    world: &World,
    joining: Range<usize>,
    put: impl Fn(usize, &str) -> Result<Written, Failure>,
) -> Vec<String> {
    let mut written = Vec::new();
    while !joining
        .clone()
        .all(|host| world.is_ready(host) && world.is_whole(host))
    {
        let key = format!("key {}", written.len());
        if put(written.len() % 3, &key).is_ok() {
            written.push(key);
        }
    }
    written
}

#[test]
fn an_altered_keyspace_is_altered_on_every_shard_and_stays_so() {
    let world = World::with(23, 3, 2, unaided);
    world.put(0, "key", "v").unwrap();
    let compaction = Compaction::TimeWindow { seconds: 3600 };
    let is_known = |host: usize| world.compactions(host) == [Some(compaction.strategy()); 2];
    assert!(!is_known(0));
    world.keyspace(DEFAULT_NAME, |keyspace| {
        keyspace.compaction = compaction;
        keyspace.ttl_default_seconds = 60;
    });
    world.wait("every shard compacts so", || (0..3).all(is_known));
    world.crash(1);
    world.boot(1);
    world.wait("the node is back", || world.is_ready(1) && is_known(1));
    assert_eq!(world.values(1, "key"), ["v"]);
    let keyspace = world.node(1).keyspaces().unwrap().remove(0);
    assert_eq!(
        (keyspace.compaction, keyspace.ttl_default_seconds),
        (compaction, 60)
    );
}

#[test]
fn a_node_that_joins_has_every_key_of_its_ranges_before_it_answers() {
    let world = World::growing(24, 3, 4, 2, unaided);
    for index in 0..100 {
        world.put(index % 3, &format!("key {index}"), "v").unwrap();
    }
    world.boot(3);
    world.wait("the newcomer is in the ring", || world.is_ready(3));
    world.wait("the newcomer has its data", || world.is_whole(3));
    world.wait("all know it", || (0..4).all(|host| world.sees_all_up(host)));
    let mut own = 0;
    for index in 0..100 {
        let key = format!("key {index}");
        own += usize::from(world.is_replica(3, &key));
        assert_eq!(
            world.get(3, &key, Level::One).unwrap().siblings.len(),
            1,
            "{key}"
        );
        assert_eq!(world.values(index % 4, &key), ["v"]);
    }
    assert!(own > 30, "{own} keys are its own");
}

#[test]
fn a_newcomer_whose_disk_was_full_remembers_that_it_lacks_data() {
    let world = World::growing(28, 3, 4, 1, unaided);
    world.put(0, "k", "v").unwrap();
    // It can enter the ring, but not ask all owners.
    world.crash(2);
    world.wait_until_down(0, 2);
    world.isolate(3, true);
    world.boot(3);
    world.wait("the newcomer runs", || world.is_whole(3));
    world.fill_disk(3, true);
    // Until its store has noticed, and then until it was asked to join.
    world.sleep(Duration::from_secs(10));
    world.isolate(3, false);
    world.sleep(Duration::from_secs(20));
    world.fill_disk(3, false);
    world.wait("the newcomer is in the ring", || world.is_ready(3));
    assert!(!world.is_whole(3));
    world.crash(3);
    world.boot(3);
    world.wait("the newcomer is back", || world.is_ready(3));
    assert!(!world.is_whole(3), "nobody has told it what it lacks");
    world.boot(2);
    world.wait("the newcomer has its data", || world.is_whole(3));
}

#[test]
fn writes_go_on_while_a_node_joins_and_none_is_lost() {
    let world = World::growing(25, 3, 4, 1, unaided);
    world.boot(3);
    // None is refused either: a write that meets the new topology is led to its owners.
    let written = written_while_joining(&world, 3..4, |node, key| {
        Ok(world.put(node, key, "v").unwrap())
    });
    assert!(written.len() > 50, "{} writes", written.len());
    for (index, key) in written.iter().enumerate() {
        assert_eq!(world.values(index % 4, key), ["v"], "{key}");
    }
}

#[test]
fn with_one_copy_a_joining_node_gets_what_the_former_owner_took_last() {
    let world = World::growing(39, 3, 4, 1, unaided);
    world.keyspace("single", |keyspace| keyspace.n = 1);
    world.boot(3);
    let written = written_while_joining(&world, 3..4, |node, key| {
        world.put_in(node, "single", key, "v")
    });
    assert!(written.len() > 50, "{} writes", written.len());
    for (index, key) in written.iter().enumerate() {
        assert_eq!(world.values_in(index % 4, "single", key), ["v"], "{key}");
    }
}

#[test]
fn two_nodes_may_join_at_once_and_no_write_is_lost() {
    let world = World::growing(35, 3, 5, 1, unaided);
    world.boot(3);
    world.boot(4);
    let written = written_while_joining(&world, 3..5, |node, key| {
        Ok(world.put(node, key, "v").unwrap())
    });
    for (index, key) in written.iter().enumerate() {
        assert_eq!(world.values(index % 5, key), ["v"], "{key}");
    }
}

#[test]
fn a_dropped_keyspace_is_gone_with_its_data() {
    let world = World::three(26);
    world.keyspace("temporary", |_| {});
    world.put_in(0, "temporary", "k", "v").unwrap();
    world
        .on(
            0,
            |node, _| async move { node.keyspace_drop("temporary").await },
        )
        .unwrap();
    world.sleep(Duration::from_secs(5));
    let failure = world.put_in(1, "temporary", "k", "v").unwrap_err();
    assert_eq!(failure.code, FailureCode::UnknownKeyspace);
    world.keyspace("temporary", |_| {});
    assert!(world.values_in(2, "temporary", "k").is_empty());
}
