//! Damage in what a shard keeps about itself, which no replica has.

use std::time::Duration;

use super::world::World;
use crate::api::Level;
use crate::conflict::Conflict;
use crate::core::tree;

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
    world.crash(0);
    world.boot(0);
    world.wait("the node is back", || world.is_ready(0));
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
