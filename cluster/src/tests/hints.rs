//! Hints: what keeps a write for a replica that missed it.

use std::time::Duration;

use super::world::World;
use crate::api::Level;

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
fn a_counted_hint_outlives_a_crash_of_its_holder() {
    let world = World::new(27, 4, 1);
    let key = world.key_with_counted_hint();
    world.crash(3);
    world.crash(0);
    for node in [1, 2, 3] {
        world.boot(node);
    }
    world.wait("the hint is delivered", || {
        [1, 2, 3].iter().all(|node| world.is_ready(*node)) && world.gauges(3).hints == 0
    });
    assert!([1, 2].iter().any(|node| {
        !world
            .get(*node, &key, Level::One)
            .unwrap()
            .siblings
            .is_empty()
    }));
}

#[test]
fn a_hint_that_a_full_disk_has_refused_is_not_waited_for() {
    let world = World::new(38, 4, 1);
    let key = world.key_with_replicas(&[0, 1, 2]);
    world.fill_disk(3, true);
    for node in [1, 2] {
        world.crash(node);
        world.wait_until_down(0, node);
    }
    let written = world.put_with(0, &key, "v", |write| write.sloppy = true);
    assert!(written.is_err());
    assert_eq!((world.gauges(3).hints, world.gauges(3).hint_bytes), (0, 0));
}

#[test]
fn hints_end_with_their_age_and_repair_makes_up_for_them() {
    let world = World::with(32, 3, 1, |config| {
        config.hints.age_max = Duration::from_secs(5);
        config.repair.retry = Duration::from_secs(5);
    });
    world.sleep(Duration::from_secs(10));
    world.crash(2);
    world.wait_until_down(0, 2);
    world.put(0, "k", "v").unwrap();
    world.sleep(Duration::from_secs(1));
    assert_eq!(world.gauges(0).hints, 1);
    world.sleep(Duration::from_secs(10));
    assert_eq!(world.gauges(0).hints, 0);
    assert_eq!(world.counts(0)["hints_dropped"], 1);
    world.boot(2);
    world.wait("repair brings the record", || {
        world.is_ready(2) && !world.get(2, "k", Level::One).unwrap().siblings.is_empty()
    });
}
