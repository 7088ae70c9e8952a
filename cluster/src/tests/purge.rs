//! Deletions that are forgotten, and values that must not come back for it.

use std::time::Duration;

use super::world::World;
use crate::api::{Level, WriteOptions};

const KEYS: usize = 100;

fn key(index: usize) -> String {
    format!("key {index}")
}

fn acked_by_all(write: &mut WriteOptions) {
    write.read_context_first = true;
    write.w = Level::All;
}

/// Hours in which everything is compacted again and again.
fn let_purge(world: &World, hosts: usize) {
    for _ in 0..7 {
        world.sleep(Duration::from_secs(1200));
        for host in 0..hosts {
            world.flush(host);
            world.compact(host);
        }
    }
}

/// The newcomer has pulled a value before its deletion, and takes longer than a repair does.
#[test]
pub(super) fn a_deletion_while_a_node_joins_is_kept_until_the_newcomer_has_it() {
    let world = World::growing(91, 3, 4, 1, |config| {
        config.repair.target = Duration::from_secs(3600);
        // As slow as with much data.
        config.repair.bytes_per_second = 1;
    });
    for index in 0..KEYS {
        let written = world.put_with(index % 3, &key(index), "v", acked_by_all);
        written.unwrap();
    }
    world.sleep(Duration::from_secs(5));
    world.boot(3);
    world.sleep(Duration::from_secs(2000));
    assert!(world.records(3) > 0 && !world.is_ready(3), "it pulls");
    for index in 0..KEYS {
        let written = world.delete_with(0, &key(index), acked_by_all);
        written.unwrap();
    }
    let_purge(&world, 3);
    for _ in 0..200 {
        if world.is_ready(3) && world.is_whole(3) {
            break;
        }
        world.sleep(Duration::from_secs(600));
    }
    assert!(world.is_ready(3) && world.is_whole(3), "it has joined");
    world.sleep(Duration::from_secs(60));
    for index in 0..KEYS {
        for host in 0..4 {
            let found = world.values(host, &key(index));
            assert!(found.is_empty(), "{} is back on host {host}", key(index));
        }
    }
}

/// A node deletes by a clock that is three hours slow, while one owner is down.
fn delete_by_a_slow_clock(world: &World) {
    world.crash(2);
    world.wait_until_down(1, 2);
    world.wait_until_down(0, 2);
    let deleted = world.delete_with(1, "k", |write| write.read_context_first = true);
    assert_eq!(deleted.unwrap().replicas, 2);
    for host in 0..2 {
        world.flush(host);
        world.compact(host);
        assert_eq!(world.records(host), 1, "on host {host}");
    }
    world.boot(2);
    world.wait("all are back", || {
        world.is_ready(2) && (0..3).all(|host| world.sees_all_up(host))
    });
    world.sleep(Duration::from_secs(3));
    for host in 0..3 {
        let found = world.values(host, "k");
        assert!(found.is_empty(), "it is back on host {host}");
    }
    world.set_clock(1, 0);
    let_purge(world, 3);
    for host in 0..3 {
        assert_eq!(world.records(host), 0, "on host {host}");
    }
}

fn without_hints(seed: u64) -> World {
    World::with(seed, 3, 1, |config| {
        config.repair.target = Duration::from_secs(3600);
        config.hints.bytes_max = 0;
    })
}

/// Floors stand when the clock is set back.
#[test]
pub(super) fn a_deletion_by_a_clock_that_was_set_back_is_kept_until_all_owners_have_it() {
    let world = without_hints(92);
    world.put_with(0, "k", "v", acked_by_all).unwrap();
    let_purge(&world, 3);
    world.set_clock(1, -3 * 3600);
    delete_by_a_slow_clock(&world);
}

#[test]
fn a_deletion_by_a_clock_that_was_always_slow_is_kept_until_all_owners_have_it() {
    let world = without_hints(94);
    world.put_with(0, "k", "v", acked_by_all).unwrap();
    world.set_clock(1, -3 * 3600);
    world.crash(1);
    world.boot(1);
    world.wait("node 1 is back", || world.is_ready(1));
    let_purge(&world, 3);
    delete_by_a_slow_clock(&world);
}

/// Others have forgotten deletions up to stamps that the newcomer would mint.
#[test]
fn a_node_whose_clock_is_behind_the_floors_of_others_does_not_join_until_it_is_right() {
    let world = World::growing(95, 3, 4, 1, |config| {
        config.repair.target = Duration::from_secs(3600);
    });
    world.put_with(0, "k", "v", acked_by_all).unwrap();
    let_purge(&world, 3);
    world.set_clock(3, -6 * 3600);
    world.boot(3);
    world.sleep(Duration::from_secs(600));
    assert!(!world.is_ready(3));
    world.set_clock(3, 0);
    world.wait("it joins", || world.is_ready(3) && world.is_whole(3));
}

/// A clock that was fast when the hint was made, and is right again, makes the hint look younger than it is.
#[test]
fn an_old_hint_made_by_a_fast_clock_keeps_deletions_from_being_purged() {
    let world = World::with(93, 4, 1, |config| {
        config.repair.target = Duration::from_secs(3600);
    });
    world.set_clock(3, 6 * 3600);
    let key = world.key_with_counted_hint();
    world.set_clock(3, 0);
    let part = |is_cut| {
        for other in [1, 2] {
            let (one, other) = (world.hosts[3], world.hosts[other]);
            world.sim.set_blocked(one, other, is_cut);
            world.sim.set_blocked(other, one, is_cut);
        }
    };
    part(true);
    world.boot(1);
    world.boot(2);
    world.wait("the replicas are back", || {
        (0..3).all(|host| world.is_ready(host)) && world.gauges(0).hints == 0
    });
    world.sleep(Duration::from_secs(3));
    world.delete_with(0, &key, acked_by_all).unwrap();
    let_purge(&world, 3);
    assert_eq!(world.gauges(3).hints, 1);
    for host in 0..3 {
        let kept = world.stored(host, &key);
        assert!(!kept.is_empty(), "it is forgotten on host {host}");
    }
    part(false);
    world.wait("the hint is delivered", || world.gauges(3).hints == 0);
    world.sleep(Duration::from_secs(3));
    for host in 0..4 {
        let found = world.values(host, &key);
        assert!(found.is_empty(), "it is back on host {host}");
    }
}
