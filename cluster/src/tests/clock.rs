//! Stamps over stops, crashes and clocks that are set: what last-write-wins keyspaces rely on.

use std::time::Duration;

use torc_engine::Fsync;

use super::world::World;
use crate::api::{FailureCode, Level};
use crate::conflict::Conflict;

/// One node, which has reserved stamps for the seconds to come.
fn alone(seed: u64) -> World {
    let world = World::new(seed, 1, 2);
    world.keyspace("last", |keyspace| keyspace.conflict = Conflict::Lww);
    world.put_in(0, "last", "k", "before").unwrap();
    world.sleep(Duration::from_secs(3));
    world
}

/// The newest stamp of any shard.
fn newest(world: &World) -> Option<u64> {
    let shards = (0..2).map(|shard| world.shard(0, shard));
    shards.map(|shard| shard.newest_stamp()).max()
}

fn boot(world: &World) {
    world.boot(0);
    world.wait("the node is back", || world.is_ready(0));
}

#[test]
fn a_node_that_was_stopped_orders_writes_as_soon_as_it_is_back() {
    let world = alone(81);
    world.stop(0);
    world.slow_down_disk(0);
    boot(&world);
    for index in 0..20 {
        let key = format!("key {index}");
        world.put_in(0, "last", &key, "after").unwrap();
        assert_eq!(world.values_in(0, "last", &key), ["after"]);
    }
}

#[test]
fn a_node_that_crashed_refuses_until_the_stamps_that_it_had_reserved_are_past() {
    let world = alone(82);
    world.crash(0);
    boot(&world);
    let failure = world.put_in(0, "last", "k", "after").unwrap_err();
    assert_eq!(failure.code, FailureCode::ClockSkew);
    assert!(failure.retryable && !failure.in_doubt, "{failure:?}");
    world.sleep(Duration::from_secs(11));
    world.put_in(0, "last", "k", "after").unwrap();
    assert_eq!(world.values_in(0, "last", "k"), ["after"]);
}

#[test]
fn stamps_go_on_rising_over_a_crash_at_any_moment_after_a_clean_stop() {
    let world = alone(83);
    let mut taken = 0;
    for milliseconds in 0..40 {
        world.stop(0);
        world.set_clock(0, 0);
        // Past all that the life before had reserved.
        world.sleep(Duration::from_secs(11));
        world.slow_down_disk(0);
        boot(&world);
        let until = world.sim.now() + Duration::from_millis(milliseconds);
        while world.sim.now() < until {
            taken += usize::from(world.put_in(0, "last", "k", "v").is_ok());
        }
        let before = newest(&world);
        world.crash(0);
        // What the mark is for: the node comes back into an earlier time.
        world.set_clock(0, -3600);
        boot(&world);
        assert!(
            newest(&world) >= before,
            "crashed {milliseconds} ms after the start"
        );
    }
    assert!(taken > 0);
}

#[test]
fn a_node_that_is_stopping_lets_another_replica_order_writes() {
    let world = World::three(84);
    world.keyspace("last", |keyspace| keyspace.conflict = Conflict::Lww);
    world.end_minting(0);
    let newest = world.node(0).newest_stamp();

    for keyspace in ["default", "last"] {
        world.put_in(0, keyspace, "k", "v").unwrap();
        for host in 0..3 {
            assert_eq!(world.values_in(host, keyspace, "k"), ["v"], "host {host}");
        }
    }
    // What others have minted meanwhile is seen here, and no reason to lead again.
    assert!(world.node(0).newest_stamp() > newest);
    world.sleep(Duration::from_secs(12));
    world.close(0);
    world.boot(0);
    world.wait("node 0 is back", || world.is_ready(0));
    let forwards = world.counts(0)["forwards"];
    world.put_in(0, "last", "k", "again").unwrap();
    assert_eq!(world.counts(0)["forwards"], forwards, "ordered here");
}

/// Two clients pass a key on: the second one has seen what the first has written, and its replica, whose clock is
/// behind, has not.
#[test]
pub(super) fn a_last_write_wins_over_what_its_client_has_seen_whoever_orders_it() {
    let world = World::three(86);
    world.keyspace("last", |keyspace| keyspace.conflict = Conflict::Lww);
    world.sleep(Duration::from_secs(3));
    world.set_clock_ms(0, 400);
    world.isolate(0, true);
    let first = world.put_in_with(0, "last", "k", "first", |write| write.w = Level::One);
    let seen = first.unwrap().context;
    let second = world.put_in_with(1, "last", "k", "second", |write| write.context = Some(seen));
    assert_eq!(second.unwrap().replicas, 2);
    world.isolate(0, false);
    world.wait("every node sees the others again", || {
        (0..3).all(|host| world.sees_all_up(host) && world.gauges(host).hints == 0)
    });
    for host in 0..3 {
        assert_eq!(
            world.values_in(host, "last", "k"),
            ["second"],
            "host {host}"
        );
    }
}

#[test]
fn a_node_alone_that_is_stopping_refuses_writes_whole() {
    let world = alone(85);
    world.end_minting(0);
    let failure = world.put_in(0, "last", "k", "late").unwrap_err();
    assert_eq!(failure.code, FailureCode::NotReady);
    assert!(failure.retryable && !failure.in_doubt, "{failure:?}");
    assert_eq!(world.values_in(0, "last", "k"), ["before"]);
}

/// What a node has acknowledged may be lost with its power under these policies, but no stamp may come again.
#[test]
fn stamps_go_on_rising_over_a_power_cut_whatever_the_fsync_policy() {
    for (seed, fsync) in [
        (87, Fsync::Never),
        (88, Fsync::Interval(Duration::from_secs(1))),
    ] {
        let world = alone(seed);
        world.stop(0);
        world.set_fsync(fsync);
        boot(&world);
        world.wait("the clock leads", || {
            world.put_in(0, "last", "k", "v").is_ok()
        });
        let before = newest(&world);
        world.crash(0);
        world.set_clock(0, -3600);
        boot(&world);
        assert!(newest(&world) >= before, "{fsync:?}");
    }
}
