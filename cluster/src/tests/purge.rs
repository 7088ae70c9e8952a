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
