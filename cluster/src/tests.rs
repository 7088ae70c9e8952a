//! Small clusters in the simulated world: the request path end to end.

mod world;

use std::time::Duration;

use bytes::Bytes;

use crate::api::{FailureCode, Level};
use world::World;

#[test]
fn a_put_through_one_node_is_read_through_every_other() {
    let world = World::three(1);
    let written = world.put(0, "k", "v").unwrap();
    assert!(written.replicas >= 2);
    assert_eq!(written.hints, 0);
    for node in 0..3 {
        assert_eq!(world.values(node, "k"), ["v"]);
    }
    assert_eq!(world.values(1, "other"), Vec::<Bytes>::new());
}

#[test]
fn a_key_may_be_asked_for_on_any_shard() {
    let world = World::new(2, 3, 2);
    for index in 0..16 {
        let key = format!("key {index}");
        world.put(index % 3, &key, "v").unwrap();
        assert_eq!(world.values((index + 1) % 3, &key), ["v"], "{key}");
    }
}

#[test]
fn a_node_that_is_no_replica_forwards_once() {
    let world = World::new(3, 5, 1);
    for index in 0..20 {
        let key = format!("key {index}");
        world.put(0, &key, "v").unwrap();
        for node in 0..5 {
            assert_eq!(world.values(node, &key), ["v"], "{key} on {node}");
        }
    }
    assert!(world.counts(0)["forwards"] > 0);
    assert!(world.counts(0)["forwards"] < 20);
}

#[test]
fn writes_without_context_stay_side_by_side_until_one_has_seen_them() {
    let world = World::three(4);
    world.put(0, "k", "a").unwrap();
    world.put(1, "k", "b").unwrap();
    let answer = world.get(2, "k", Level::Quorum).unwrap();
    assert_eq!(answer.siblings.len(), 2);
    world
        .put_with(2, "k", "c", |write| {
            write.context = Some(answer.context.clone())
        })
        .unwrap();
    assert_eq!(world.values(0, "k"), ["c"]);
}

#[test]
fn a_delete_removes_what_it_has_seen_and_it_stays_away() {
    let world = World::three(5);
    world.put(0, "k", "v").unwrap();
    let seen = world.get(1, "k", Level::Quorum).unwrap();
    world
        .delete_with(1, "k", |write| write.context = Some(seen.context.clone()))
        .unwrap();
    world.sleep(Duration::from_secs(5));
    for node in 0..3 {
        assert_eq!(world.values(node, "k"), Vec::<Bytes>::new());
    }
}

#[test]
fn one_node_down_loses_no_write_and_gets_its_hints() {
    let world = World::three(6);
    world.put(0, "before", "v").unwrap();
    world.crash(2);
    world.wait_until_down(0, 2);
    world.wait_until_down(1, 2);
    for index in 0..10 {
        let written = world.put(index % 2, &format!("key {index}"), "v").unwrap();
        assert_eq!((written.replicas, written.hints), (2, 0));
    }
    world.sleep(Duration::from_secs(1));
    assert_eq!(world.gauges(0).hints + world.gauges(1).hints, 10);
    world.boot(2);
    world.wait("the hints are delivered", || {
        world.is_ready(2) && world.gauges(0).hints + world.gauges(1).hints == 0
    });
    for index in 0..10 {
        // Alone at the node that was down.
        let answer = world.get(2, &format!("key {index}"), Level::One).unwrap();
        assert_eq!(answer.siblings.len(), 1, "key {index}");
    }
}

#[test]
fn without_a_quorum_a_write_is_refused_at_once_and_nothing_is_applied() {
    let world = World::three(7);
    world.crash(1);
    world.crash(2);
    world.wait_until_down(0, 1);
    world.wait_until_down(0, 2);
    let failure = world.put(0, "k", "v").unwrap_err();
    assert_eq!(failure.code, FailureCode::QuorumNotMet);
    assert!(failure.retryable && !failure.in_doubt && failure.retry_after_ms > 0);
    let answer = world.get(0, "k", Level::One).unwrap();
    assert!(
        answer.siblings.is_empty(),
        "r=1 at a replica answers locally"
    );
}

#[test]
fn a_write_whose_answers_are_lost_is_in_doubt_and_never_a_failure_that_did_not_happen() {
    let world = World::three(8);
    world.put(0, "k", "v").unwrap();
    world.isolate(0, true);
    let failure = world.put(0, "k", "w").unwrap_err();
    assert!(failure.in_doubt, "{failure:?}");
    world.isolate(0, false);
    world.sleep(Duration::from_secs(20));
    assert!(!world.values(1, "k").is_empty());
}

#[test]
fn sloppy_writes_count_hints_on_other_nodes_only() {
    let world = World::new(9, 4, 1);
    let key = world.key_with_replicas(&[0, 1, 2]);
    world.crash(1);
    world.crash(2);
    for node in [1, 2] {
        world.wait_until_down(0, node);
    }
    assert!(world.put(0, &key, "v").is_err());
    let written = world
        .put_with(0, &key, "v", |write| write.sloppy = true)
        .unwrap();
    assert_eq!((written.replicas, written.hints), (1, 1));
    world.boot(1);
    world.boot(2);
    world.wait("the hints are delivered", || {
        let hints = world.gauges(0).hints + world.gauges(3).hints;
        world.is_ready(1) && world.is_ready(2) && hints == 0
    });
    for node in [1, 2] {
        assert_eq!(world.get(node, &key, Level::One).unwrap().siblings.len(), 1);
    }
}

#[test]
fn anti_entropy_alone_brings_a_node_up_to_date() {
    let world = World::with(10, 3, 1, |config| {
        config.hints.bytes_max = 0;
        config.repair.automatic = false;
    });
    for index in 0..50 {
        world.put(0, &format!("key {index}"), "old").unwrap();
    }
    world.crash(2);
    world.wait_until_down(0, 2);
    for index in 25..75 {
        let key = format!("key {index}");
        world
            .put_with(0, &key, "new", |write| write.read_context_first = true)
            .unwrap();
    }
    let seen = world.get(0, "key 0", Level::Quorum).unwrap();
    world
        .delete_with(0, "key 0", |write| {
            write.context = Some(seen.context.clone())
        })
        .unwrap();
    world.boot(2);
    world.wait("the node is back", || world.is_ready(2));
    world.sleep(Duration::from_secs(3));
    assert_eq!(world.get(2, "key 74", Level::One).unwrap().siblings, []);
    let report = world
        .on(2, |node, _| async move { node.repair().await })
        .unwrap();
    assert_eq!(report.ranges_failed, 0);
    assert_eq!((report.records_received, report.records_sent), (51, 0));
    for index in 0..75 {
        let answer = world.get(2, &format!("key {index}"), Level::One).unwrap();
        let values: Vec<&[u8]> = answer.siblings.iter().map(|of| &of.value[..]).collect();
        let expected: &[&[u8]] = match index {
            0 => &[],
            1..25 => &[b"old"],
            _ => &[b"new"],
        };
        assert_eq!(values, expected, "key {index}");
    }
    let again = world
        .on(2, |node, _| async move { node.repair().await })
        .unwrap();
    assert_eq!((again.records_received, again.records_sent), (0, 0));
    assert!(again.ranges_repaired > 0 && again.ranges_failed == 0);
}

#[test]
fn ranges_are_repaired_without_being_asked_to() {
    let world = World::with(11, 3, 2, |config| {
        config.hints.bytes_max = 0;
        config.repair.target = Duration::from_secs(60);
    });
    world.crash(2);
    world.wait_until_down(0, 2);
    world.put(0, "k", "v").unwrap();
    world.boot(2);
    world.wait("the record has come", || {
        world.is_ready(2) && !world.get(2, "k", Level::One).unwrap().siblings.is_empty()
    });
}
