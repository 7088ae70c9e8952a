//! Small clusters in the simulated world: the request path end to end.

mod clock;
mod damage;
mod hints;
mod hostile;
#[cfg(mutations)]
mod planted;
mod purge;
mod topology;
mod world;

use std::time::Duration;

use bytes::Bytes;

use crate::api::{
    BatchRequest, Condition, Context, FailureCode, GetRequest, Idempotency, KEYSPACE_DEFAULT,
    Level, Operation, Outcome, PutRequest, WriteOptions,
};
use crate::conflict::Conflict;
use crate::version::{Actor, Dot, Minter, State, Write};
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
    let world = World::with(6, 3, 1, |config| config.repair.automatic = false);
    world.put(0, "before", "v").unwrap();
    world.sleep(Duration::from_secs(1));
    world.crash(2);
    world.wait_until_down(0, 2);
    world.wait_until_down(1, 2);
    for index in 0..10 {
        let written = world.put(index % 2, &format!("key {index}"), "v").unwrap();
        assert_eq!((written.replicas, written.hints), (2, 0));
    }
    world.sleep(Duration::from_secs(1));
    // The write before the crash may have missed the node as well.
    let hints = world.gauges(0).hints + world.gauges(1).hints;
    assert!((10..=11).contains(&hints), "{hints} hints");
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

#[test]
fn a_conditional_write_holds_on_the_version_that_was_read_and_on_no_other() {
    let world = World::three(12);
    let first = world.put(0, "k", "a").unwrap();
    let with = |context: &Context| Condition::Match(context.clone());
    let second = world
        .put_with(1, "k", "b", |write| write.condition = with(&first.context))
        .unwrap();
    let failure = world
        .put_with(2, "k", "c", |write| write.condition = with(&first.context))
        .unwrap_err();
    assert_eq!(failure.code, FailureCode::ConditionFailed);
    assert!(!failure.retryable && !failure.in_doubt);
    let failure = world
        .put_with(2, "k", "c", |write| write.condition = Condition::Absent)
        .unwrap_err();
    assert_eq!(failure.code, FailureCode::ConditionFailed);
    world
        .delete_with(0, "k", |write| write.condition = with(&second.context))
        .unwrap();
    world
        .put_with(2, "k", "d", |write| write.condition = Condition::Absent)
        .unwrap();
    assert_eq!(world.values(1, "k"), ["d"]);
    let failure = world
        .put_with(2, "other", "c", |write| {
            write.condition = with(&first.context)
        })
        .unwrap_err();
    assert_eq!(failure.code, FailureCode::ConditionFailed, "an absent key");
}

#[test]
fn conditions_need_a_strict_quorum() {
    let world = World::three(13);
    for edit in [
        |write: &mut WriteOptions| write.w = Level::One,
        |write: &mut WriteOptions| write.sloppy = true,
        |write: &mut WriteOptions| write.w = Level::Count(4),
    ] {
        let failure = world
            .put_with(0, "k", "v", |write| {
                write.condition = Condition::Absent;
                edit(write);
            })
            .unwrap_err();
        assert_eq!(failure.code, FailureCode::InvalidRequest);
    }
    assert!(world.values(0, "k").is_empty());
}

#[test]
fn of_two_conditional_writes_through_one_node_one_succeeds() {
    let world = World::three(14);
    let first = world.put(0, "k", "a").unwrap();
    let results = world.on(0, |node, deadline| async move {
        let put = |value: &'static str| {
            let mut write = WriteOptions::until(deadline);
            write.condition = Condition::Match(first.context.clone());
            node.put(PutRequest {
                keyspace: KEYSPACE_DEFAULT.clone(),
                key: Bytes::from_static(b"k"),
                value: Bytes::from_static(value.as_bytes()),
                ttl_seconds: None,
                write,
            })
        };
        futures_util::future::join_all([put("b"), put("c")]).await
    });
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    assert_eq!(world.values(1, "k").len(), 1);
}

#[test]
fn a_retry_gets_the_first_answer_through_any_node_and_after_restarts() {
    let world = World::three(15);
    let keyed = |write: &mut WriteOptions| {
        write.idempotency = Some(Idempotency {
            id: 7,
            body_hash: 1,
        });
    };
    let first = world.put_with(0, "k", "v", keyed).unwrap();
    let second = world.put_with(1, "k", "v", keyed).unwrap();
    assert_eq!(first.context, second.context);
    world
        .put_with(2, "k", "w", |write| write.read_context_first = true)
        .unwrap();
    for host in 0..3 {
        world.crash(host);
    }
    for host in 0..3 {
        world.boot(host);
    }
    world.wait("all are back", || (0..3).all(|host| world.is_ready(host)));
    world.sleep(Duration::from_secs(3));
    let third = world.put_with(2, "k", "v", keyed).unwrap();
    assert_eq!(first.context, third.context);
    assert_eq!(
        world.values(0, "k"),
        ["w"],
        "applied once, and overwritten since"
    );
    let failure = world
        .put_with(2, "k", "x", |write| {
            write.idempotency = Some(Idempotency {
                id: 7,
                body_hash: 2,
            });
        })
        .unwrap_err();
    assert_eq!(failure.code, FailureCode::IdempotencyMismatch);
}

#[test]
fn a_quorum_read_that_has_shown_a_value_is_never_followed_by_an_older_one() {
    let world = World::with(16, 3, 1, |config| {
        config.hints.bytes_max = 0;
        config.repair.automatic = false;
    });
    world.put(0, "k", "old").unwrap();
    world.sleep(Duration::from_secs(1));
    // Only node 0 gets the new value: its answers to the others are cut off.
    world.isolate(0, true);
    let seen = world.get(0, "k", Level::One).unwrap();
    let failure = world
        .put_with(0, "k", "new", |write| {
            write.context = Some(seen.context.clone())
        })
        .unwrap_err();
    assert!(failure.in_doubt);
    world.isolate(0, false);
    world.wait("the cluster is whole again", || {
        world.sees_all_up(0) && world.sees_all_up(1)
    });
    assert_eq!(
        world.get(1, "k", Level::One).unwrap().siblings[0].value,
        "old"
    );
    // A read through node 0 sees the new value, and leaves it on a second replica before it
    // answers: one of them answers every later quorum.
    assert_eq!(world.values(0, "k"), ["new"]);
    assert!(world.counts(0)["read_repairs"] > 0);
    world.crash(0);
    assert_eq!(world.values(1, "k"), ["new"]);
    assert_eq!(world.values(2, "k"), ["new"]);
}

#[test]
fn a_read_covers_what_the_session_has_seen_or_fails() {
    let world = World::with(17, 3, 1, |config| {
        config.hints.bytes_max = 0;
        config.repair.automatic = false;
    });
    world.crash(2);
    world.wait_until_down(0, 2);
    let written = world.put(0, "k", "v").unwrap();
    world.boot(2);
    world.wait("all are back", || world.is_ready(2) && world.sees_all_up(2));
    let read = |host, at_least: &Context| {
        let at_least = Some(at_least.clone());
        world.on(host, |node, deadline| async move {
            node.get(GetRequest {
                keyspace: KEYSPACE_DEFAULT.clone(),
                key: Bytes::from_static(b"k"),
                r: Level::One,
                at_least,
                deadline,
            })
            .await
        })
    };
    assert!(world.get(2, "k", Level::One).unwrap().siblings.is_empty());
    let answer = read(2, &written.context).unwrap();
    assert_eq!(answer.siblings.len(), 1, "escalated to a quorum");
    let mut unseen = written.context.clone();
    unseen.add(Dot {
        actor: Actor(1),
        counter: 1,
    });
    assert!(read(2, &unseen).is_err());
}

#[test]
fn last_write_wins_keeps_one_value_however_it_was_written() {
    let world = World::three(18);
    world.keyspace("last", |keyspace| keyspace.conflict = Conflict::Lww);
    for (host, value) in ["a", "b", "c"].into_iter().enumerate() {
        world.put_in(host, "last", "k", value).unwrap();
        world.sleep(Duration::from_millis(100));
    }
    for host in 0..3 {
        assert_eq!(world.values_in(host, "last", "k"), ["c"]);
    }
    let failure = world.put_in(0, "none", "k", "v").unwrap_err();
    assert_eq!(failure.code, FailureCode::UnknownKeyspace);
}

#[test]
fn a_last_write_through_a_node_that_was_just_restarted_is_ordered_by_another_replica() {
    let world = World::three(21);
    world.keyspace("last", |keyspace| keyspace.conflict = Conflict::Lww);
    world.put_in(0, "last", "k", "before").unwrap();
    // By now node 0 has reserved stamps for the seconds to come.
    world.sleep(Duration::from_secs(3));
    world.crash(0);
    world.boot(0);
    world.wait("node 0 is back", || {
        world.is_ready(0) && world.sees_all_up(0)
    });

    world.put_in(0, "last", "k", "after").unwrap();

    for host in 0..3 {
        assert_eq!(world.values_in(host, "last", "k"), ["after"], "host {host}");
    }
}

#[test]
fn values_end_with_their_time_to_live() {
    let world = World::three(19);
    world.keyspace("short", |keyspace| keyspace.ttl_default_seconds = 2);
    world.put_in(0, "short", "k", "v").unwrap();
    assert_eq!(world.values_in(1, "short", "k"), ["v"]);
    world.sleep(Duration::from_secs(3));
    assert!(world.values_in(2, "short", "k").is_empty());
}

#[test]
fn a_scan_lists_every_live_key_once_whatever_node_goes_on() {
    let world = World::new(20, 4, 2);
    let mut expected = Vec::new();
    for index in 0..60 {
        let key = format!("{} {index}", if index % 3 == 0 { "a" } else { "b" });
        world.put(index % 4, &key, "v").unwrap();
        expected.push(key);
    }
    let seen = world.get(0, "b 1", Level::Quorum).unwrap();
    world
        .delete_with(0, "b 1", |write| write.context = Some(seen.context.clone()))
        .unwrap();
    expected.retain(|key| key != "b 1");
    expected.sort_unstable();
    for limit in [1, 7, 100] {
        let entries = world.scan(limit, "", false);
        let mut found: Vec<String> = entries
            .iter()
            .map(|entry| String::from_utf8(entry.key.to_vec()).unwrap())
            .collect();
        found.sort_unstable();
        assert_eq!(found, expected, "pages of {limit}");
        assert!(entries.iter().all(|entry| entry.siblings.is_empty()));
    }
    let entries = world.scan(10, "a", true);
    assert_eq!(entries.len(), 20);
    assert!(entries.iter().all(|entry| entry.siblings[0].value == "v"));
}

#[test]
fn a_batch_answers_each_operation_on_its_own() {
    let world = World::three(21);
    world.put(0, "there", "v").unwrap();
    let outcomes = world
        .on(1, |node, deadline| async move {
            let get = |key: &'static str, keyspace: &Bytes| {
                Operation::Get(GetRequest {
                    keyspace: keyspace.clone(),
                    key: Bytes::from_static(key.as_bytes()),
                    r: Level::Quorum,
                    at_least: None,
                    deadline,
                })
            };
            let put = Operation::Put(PutRequest {
                keyspace: KEYSPACE_DEFAULT.clone(),
                key: Bytes::from_static(b"new"),
                value: Bytes::from_static(b"w"),
                ttl_seconds: None,
                write: WriteOptions::until(deadline),
            });
            let operations = vec![
                get("there", &KEYSPACE_DEFAULT),
                put,
                get("there", &Bytes::from_static(b"none")),
            ];
            node.batch(BatchRequest { operations }).await
        })
        .unwrap();
    assert!(matches!(&outcomes[0], Outcome::Got(Ok(answer)) if answer.siblings.len() == 1));
    assert!(matches!(&outcomes[1], Outcome::Written(Ok(_))));
    assert!(matches!(&outcomes[2], Outcome::Got(Err(failure))
        if failure.code == FailureCode::UnknownKeyspace));
}

#[test]
fn beyond_its_bound_a_shard_refuses_and_says_when_to_come_back() {
    let world = World::with(22, 3, 1, |config| config.admission.foreground = 4);
    let results = world.on(0, |node, deadline| async move {
        let puts = (0..16).map(|index| {
            node.put(PutRequest {
                keyspace: KEYSPACE_DEFAULT.clone(),
                key: Bytes::from(format!("key {index}")),
                value: Bytes::from_static(b"v"),
                ttl_seconds: None,
                write: WriteOptions::until(deadline),
            })
        });
        futures_util::future::join_all(puts).await
    });
    let refused: Vec<_> = results
        .iter()
        .filter_map(|result| result.as_ref().err())
        .collect();
    assert_eq!(refused.len(), 12);
    for failure in refused {
        assert_eq!(failure.code, FailureCode::Overloaded);
        assert!(failure.retryable && !failure.in_doubt && failure.retry_after_ms > 0);
    }
    assert!(world.put(0, "later", "v").is_ok());
}

#[test]
fn too_many_siblings_are_refused_and_a_delete_is_not() {
    let world = World::with(23, 3, 1, |config| config.siblings_max = 3);
    for value in ["a", "b", "c"] {
        world.put(0, "k", value).unwrap();
    }
    let failure = world.put(0, "k", "d").unwrap_err();
    assert_eq!(failure.code, FailureCode::TooManySiblings);
    assert!(!failure.in_doubt);
    assert!(world.delete_with(0, "k", |_| {}).is_ok());
    assert_eq!(world.values(0, "k").len(), 3, "it has seen nothing");
}

#[test]
fn two_runs_of_one_seed_are_the_same() {
    let run = || {
        let world = World::three(28);
        for index in 0..20 {
            world.put(index % 3, &format!("key {index}"), "v").unwrap();
        }
        world.crash(1);
        world.sleep(Duration::from_secs(10));
        world.boot(1);
        world.sleep(Duration::from_secs(10));
        world.sim.hash()
    };
    assert_eq!(run(), run());
}

#[test]
fn a_replica_alone_answers_a_read_of_one_at_once() {
    let world = World::three(29);
    world.put(0, "k", "v").unwrap();
    world.sleep(Duration::from_secs(1));
    // Nobody has noticed yet that the others are gone.
    world.isolate(0, true);
    let before = world.sim.now();
    assert_eq!(world.get(0, "k", Level::One).unwrap().siblings.len(), 1);
    assert!(world.sim.now() - before < Duration::from_millis(5));
}

#[test]
fn a_read_is_hedged_when_a_replica_is_late() {
    let world = World::three(30);
    world.put(0, "k", "v").unwrap();
    world.sleep(Duration::from_secs(1));
    world.pause(1, true);
    let before = world.sim.now();
    for _ in 0..10 {
        assert_eq!(world.values(0, "k"), ["v"]);
    }
    assert!(world.sim.now() - before < Duration::from_secs(1));
    assert!(world.counts(0)["hedges"] > 0);
}

#[test]
fn what_cannot_be_read_is_unknown_and_never_absent() {
    let world = World::with(31, 3, 1, |config| {
        config.repair.automatic = false;
    });
    for index in 0..50 {
        world.put(0, &format!("key {index}"), "v").unwrap();
    }
    world.sleep(Duration::from_secs(1));
    world.flush(0);
    world.crash(0);
    world.spoil_tables(0);
    // The damage stays while a member is away: it may be the only one that knows more.
    world.crash(2);
    world.boot(0);
    world.wait("the node is back", || world.is_ready(0));
    for index in 0..50 {
        let key = format!("key {index}");
        // Another replica knows it, and is asked although one answer would do.
        assert_eq!(world.get(0, &key, Level::One).unwrap().siblings.len(), 1);
    }
    assert!(world.counts(0)["unreadable_records"] > 0);
    world.boot(2);
    world.wait("all are back", || world.is_ready(2));
    world.sleep(Duration::from_secs(10));
    // The damage is cut out and fetched from the others.
    world.wait("the node has its data again", || {
        world.is_whole(0) && world.records(0) == 50
    });
    world.flush(0);
    world.crash(1);
    world.crash(2);
    for index in 0..50 {
        let key = format!("key {index}");
        assert_eq!(world.get(0, &key, Level::One).unwrap().siblings.len(), 1);
    }
}

/// No state of any format.
const JUNK: Bytes = Bytes::from_static(b"\0no state");

/// Three nodes, of which node 0 can make nothing of what it has stored for "k".
fn with_a_record_that_node_0_cannot_read(seed: u64) -> World {
    let world = World::with(seed, 3, 1, |config| config.repair.automatic = false);
    world.put(0, "k", "before").unwrap();
    world.sleep(Duration::from_secs(1));
    world.spoil_record(0, "k", |_| JUNK);
    world
}

#[test]
fn a_record_that_one_replica_cannot_decode_is_read_from_the_others() {
    let world = with_a_record_that_node_0_cannot_read(38);
    for host in 0..3 {
        for level in [Level::One, Level::Quorum] {
            let answer = world.get(host, "k", level).unwrap();
            assert_eq!(answer.siblings.len(), 1, "{level:?} through host {host}");
        }
    }
    assert!(world.counts(0)["unreadable_records"] > 0);
    let failure = world.get(0, "k", Level::All).unwrap_err();
    assert_eq!(failure.code, FailureCode::Unreadable);
}

#[test]
fn a_write_to_a_record_that_this_node_cannot_read_is_coordinated_by_another_replica() {
    let world = with_a_record_that_node_0_cannot_read(32);

    let written = world.put(0, "k", "beside").unwrap();

    assert_eq!((written.replicas, written.hints), (2, 0));
    world.sleep(Duration::from_secs(1));
    assert_eq!(world.stored(0, "k"), JUNK, "left as it was found");
    assert_eq!(world.stored(1, "k"), world.stored(2, "k"));
    for host in [1, 2] {
        let answer = world.get(host, "k", Level::One).unwrap();
        let values: Vec<Bytes> = answer.siblings.into_iter().map(|of| of.value).collect();
        assert_eq!(values, ["before", "beside"], "minted once, host {host}");
    }
}

#[test]
fn a_write_that_reads_first_goes_round_a_record_that_this_node_cannot_read() {
    let world = with_a_record_that_node_0_cannot_read(35);
    let keyed = |write: &mut WriteOptions| {
        write.read_context_first = true;
        write.idempotency = Some(Idempotency {
            id: 7,
            body_hash: 1,
        });
    };

    let first = world.put_with(0, "k", "after", keyed).unwrap();
    let again = world.put_with(0, "k", "after", keyed).unwrap();

    assert_eq!(first.context, again.context, "one request, one write");
    assert_eq!(world.values(1, "k"), ["after"]);
    let failure = world
        .put_with(0, "k", "other", |write| write.condition = Condition::Absent)
        .unwrap_err();
    assert_eq!(failure.code, FailureCode::ConditionFailed);
}

#[test]
fn a_write_that_no_replica_can_read_the_record_for_is_refused_whole() {
    let world = with_a_record_that_node_0_cannot_read(36);
    world.spoil_record(1, "k", |_| JUNK);
    world.spoil_record(2, "k", |_| JUNK);

    let failure = world.put(0, "k", "after").unwrap_err();

    assert_eq!(failure.code, FailureCode::Unreadable);
    assert!(!failure.in_doubt, "{failure:?}");
    world.sleep(Duration::from_secs(1));
    for host in 0..3 {
        assert_eq!(world.stored(host, "k"), JUNK, "host {host}");
    }
}

#[test]
fn a_write_does_not_go_round_a_replica_with_another_write_of_the_same_name() {
    let world = World::with(37, 3, 1, |config| config.repair.automatic = false);
    world.put(0, "k", "one").unwrap();
    world.sleep(Duration::from_secs(1));
    world.spoil_record(0, "k", |stored| {
        let state = State::from_record(stored).unwrap();
        let mut other = State::default();
        let write = Write {
            context: &Context::default(),
            dot: state.siblings()[0].dot,
            minter: Minter::Replica,
            value: Some(Bytes::from_static(b"other")),
            expires_at_ms: 0,
            keyed: None,
            now_ms: 0,
            conflict: Conflict::Siblings,
            siblings_max: 1,
        };
        other.put(write).unwrap();
        other.encode()
    });
    let stored = || (0..3).map(|host| world.stored(host, "k"));
    let before: Vec<Bytes> = stored().collect();
    // The node's own state comes so late that the write knows only those of the others when it meets it.
    world.flush(0);
    world.crash(0);
    world.boot(0);
    world.wait("node 0 is back", || {
        world.is_ready(0) && world.sees_all_up(0)
    });
    world.slow_down_reads(0);

    let failure = world
        .put_with(0, "k", "new", |write| write.read_context_first = true)
        .unwrap_err();

    assert_eq!(failure.code, FailureCode::DotClash);
    assert!(world.counts(0)["hedges"] > 0);
    assert!(!failure.in_doubt && !failure.retryable, "{failure:?}");
    assert!(stored().eq(before), "neither write has replaced the other");
}

#[test]
fn hints_that_were_cut_out_with_damage_are_not_waited_for() {
    let world = World::three(75);
    world.crash(2);
    for index in 0..10 {
        world.put(0, &format!("key {index}"), "v").unwrap();
    }
    world.wait("the hints are kept", || world.gauges(0).hints >= 10);
    world.flush(0);
    world.spoil_tables(0);
    world.scrub(0);
    world.boot(2);
    world.wait("all are back", || world.is_ready(2));
    world.wait("no hint is left in the books", || {
        !world.is_damaged(0) && world.is_whole(0) && world.gauges(0).hints == 0
    });
    for index in 0..10 {
        let key = format!("key {index}");
        assert_eq!(world.get(0, &key, Level::All).unwrap().siblings.len(), 1);
    }
}

#[test]
fn deletions_are_purged_once_all_owners_have_them_and_do_not_come_back() {
    let world = World::with(33, 3, 1, |config| {
        config.repair.target = Duration::from_secs(3600);
    });
    for index in 0..20 {
        let key = format!("key {index}");
        world.put(0, &key, "v").unwrap();
        let remove = |write: &mut WriteOptions| write.read_context_first = true;
        world.delete_with(1, &key, remove).unwrap();
    }
    assert_eq!(world.records(0), 20);
    for _ in 0..12 {
        world.sleep(Duration::from_secs(1200));
    }
    for host in 0..3 {
        world.flush(host);
        world.compact(host);
        assert_eq!(world.records(host), 0, "on node {host}");
    }
    world.sleep(Duration::from_secs(7200));
    for host in 0..3 {
        assert_eq!(world.records(host), 0, "nothing came back to node {host}");
        assert!(world.values(host, "key 3").is_empty());
    }
}

#[test]
fn a_member_that_is_silent_with_an_old_hint_keeps_deletions_from_being_purged() {
    let world = World::with(34, 4, 1, |config| {
        config.repair.target = Duration::from_secs(3600);
    });
    let key = world.key_with_counted_hint();
    world.crash(3);
    world.boot(1);
    world.boot(2);
    world.wait("the replicas are back", || {
        (0..3).all(|host| world.is_ready(host)) && world.gauges(0).hints == 0
    });
    world.sleep(Duration::from_secs(3));
    let remove = |write: &mut WriteOptions| write.read_context_first = true;
    world.delete_with(0, &key, remove).unwrap();
    for _ in 0..12 {
        world.sleep(Duration::from_secs(1200));
    }
    for host in 0..3 {
        assert!(world.counts(host)["ranges_repaired"] > 0);
        world.flush(host);
        world.compact(host);
    }
    // The hint brings the value to replicas that must still know of its end.
    world.boot(3);
    world.wait("the hint is delivered", || {
        world.is_ready(3) && world.gauges(3).hints == 0
    });
    world.sleep(Duration::from_secs(3));
    for host in 0..4 {
        assert!(world.values(host, &key).is_empty());
    }
}

#[test]
fn an_acknowledged_write_survives_a_power_cut_of_all_nodes() {
    let world = World::with(36, 3, 1, |config| config.repair.automatic = false);
    // So that an ack that did not wait for its sync is far ahead of it.
    world.slow_down_disk(1);
    world.slow_down_disk(2);
    for index in 0..20 {
        let key = format!("key {index}");
        world
            .put_with(0, &key, "v", |write| write.w = Level::All)
            .unwrap();
    }
    for host in 0..3 {
        world.crash(host);
    }
    for host in 0..3 {
        world.boot(host);
    }
    world.wait("all are back", || (0..3).all(|host| world.is_ready(host)));
    world.sleep(Duration::from_secs(3));
    for index in 0..20 {
        let key = format!("key {index}");
        for host in 0..3 {
            let answer = world.get(host, &key, Level::One).unwrap();
            assert_eq!(answer.siblings.len(), 1, "{key} on node {host}");
        }
    }
}

/// A store that refuses a state has decided about it before: what was decided must not count in the
/// hash sums, or they say for ever that the replica has it.
#[test]
fn what_a_full_disk_has_refused_is_repaired_when_there_is_room_again() {
    let world = World::with(37, 3, 1, |config| {
        config.hints.bytes_max = 0;
        config.repair.retry = Duration::from_secs(1);
    });
    world.fill_disk(2, true);
    world.sleep(Duration::from_secs(5));
    for index in 0..10 {
        world.put(0, &format!("key {index}"), "v").unwrap();
    }
    world.sleep(Duration::from_secs(5));
    assert_eq!(world.records(2), 0, "nothing gets onto a full disk");
    world.fill_disk(2, false);
    world.sleep(Duration::from_secs(60));
    assert_eq!(world.records(2), 10);
}
