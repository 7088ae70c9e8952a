//! Damage where nobody else has the data: never called absent, until an operator says so.

use std::os::unix::fs::FileExt as _;

use serde_json::Value;

use crate::cluster::{Cluster, http_status, wait_until};

const KEYS: usize = 40;

/// Flips a bit in the first block of every table of a node that is down.
fn spoil_tables(cluster: &Cluster, node: usize) {
    let tables = cluster.home(node).join("data/shard-00/tables");
    let mut spoiled = 0;
    for entry in std::fs::read_dir(tables).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|name| name == "table") {
            let file = std::fs::File::options().read(true).write(true).open(&path);
            let (file, mut byte) = (file.unwrap(), [0]);
            file.read_exact_at(&mut byte, 20).unwrap();
            file.write_all_at(&[byte[0] ^ 1], 20).unwrap();
            spoiled += 1;
        }
    }
    assert!(spoiled > 0, "no table to spoil");
}

/// Three nodes with all keys in two keyspaces, of which `one` has one copy of each.
fn filled() -> Cluster {
    let cluster = Cluster::start(3, 1, &[]);
    cluster.torc(&["keyspace", "set", "one", "--n", "1"]);
    for key in 0..KEYS {
        let key = format!("key{key}");
        cluster.torc(&["put", &key, "v", "--w", "all"]);
        cluster.torc(&["put", "--keyspace", "one", &key, "v"]);
    }
    cluster
}

/// The statuses of reads of all keys of a keyspace.
fn read_all(cluster: &Cluster, node: usize, keyspace: &str) -> Vec<u16> {
    let url = |key| {
        let endpoint = cluster.endpoint(node);
        format!("{endpoint}/v1/keyspaces/{keyspace}/keys/key{key}")
    };
    let statuses = (0..KEYS).map(|key| http_status(&url(key)).unwrap());
    statuses.collect()
}

#[test]
fn the_only_copy_is_unreadable_until_its_loss_is_accepted_and_absent_from_then_on() {
    let mut cluster = filled();
    cluster.torc(&["compact"]);
    cluster.kill(0);
    spoil_tables(&cluster, 0);
    cluster.spawn(0);
    cluster.wait_ready();

    let scrubbed: Value = serde_json::from_str(&cluster.torc(&["scrub", "--json"])).unwrap();
    assert!(scrubbed["damaged"].as_u64().unwrap() > 0, "{scrubbed}");
    let damage =
        || -> Value { serde_json::from_str(&cluster.torc(&["damage", "--json"])).unwrap() };
    let of = |found: &Value, keyspace: &str| -> Vec<Value> {
        let parts = found["damage"].as_array().unwrap().iter();
        let parts = parts.filter(|part| part["keyspace"] == keyspace);
        parts.cloned().collect()
    };
    // What others have is fetched; what nobody has waits.
    wait_until(
        || damage().to_string(),
        || {
            let found = damage();
            found["waiting"].as_u64() > Some(0) && of(&found, "default").is_empty()
        },
    );
    let found = damage();
    for part in of(&found, "one") {
        assert_eq!(
            (&part["state"], &part["shard"]),
            (&"lost".into(), &0.into())
        );
        let file = part["file"].as_str().unwrap();
        assert!(cluster.home(0).join("data").join(file).exists(), "{part}");
    }
    let listed = cluster.torc(&["damage"]);
    assert!(listed.contains("no other node has a copy"), "{listed}");
    let status: Value = serde_json::from_str(&cluster.torc(&["status", "--json"])).unwrap();
    assert_eq!(status["damage_waiting"], found["waiting"]);
    let metric = format!("torc_damage_waiting {}", found["waiting"]);
    assert!(cluster.metrics(0).contains(&metric), "{metric}");
    let log = cluster.log(0);
    assert_eq!(log.matches("see `torc damage`").count(), 1, "said once");

    let statuses = read_all(&cluster, 1, "one");
    assert!(
        statuses.contains(&503) && !statuses.contains(&404),
        "{statuses:?}"
    );
    assert_eq!(read_all(&cluster, 1, "default"), [200; KEYS]);

    let accepted: Value =
        serde_json::from_str(&cluster.torc(&["damage", "--accept-loss", "--json"])).unwrap();
    assert!(accepted["accepted"].as_u64() > Some(0), "{accepted}");
    cluster.kill(0);
    cluster.spawn(0);
    cluster.wait_ready();
    let damage =
        || -> Value { serde_json::from_str(&cluster.torc(&["damage", "--json"])).unwrap() };
    wait_until(
        || damage().to_string(),
        || damage()["damage"].as_array().unwrap().is_empty(),
    );
    // The others may not know yet that the node is back.
    let after = || read_all(&cluster, 1, "one");
    wait_until(|| format!("{:?}", after()), || !after().contains(&503));
    assert!(after().contains(&404));
    assert_eq!(read_all(&cluster, 1, "default"), [200; KEYS]);
    cluster.torc(&["put", "--keyspace", "one", "key0", "again"]);
}

#[test]
fn a_store_that_is_gone_is_fetched_from_others_and_what_nobody_has_is_not_absent() {
    let mut cluster = filled();
    let before = read_all(&cluster, 1, "one");
    assert_eq!(before, [200; KEYS]);
    cluster.kill(0);
    std::fs::remove_dir_all(cluster.home(0).join("data/shard-00")).unwrap();
    std::fs::remove_file(cluster.home(0).join("data/node/topology.vote")).unwrap();
    cluster.spawn(0);
    cluster.wait_ready();
    assert!(cluster.log(0).contains("node/topology.vote is missing"));
    let damage =
        || -> Value { serde_json::from_str(&cluster.torc(&["damage", "--json"])).unwrap() };
    wait_until(
        || damage().to_string(),
        || {
            let found = damage();
            let parts = found["damage"].as_array().unwrap();
            let waits = |part: &Value| part["state"] == "lost" && part["keyspace"] == "one";
            !parts.is_empty() && parts.iter().all(waits)
        },
    );
    let statuses = read_all(&cluster, 1, "one");
    assert!(
        statuses.contains(&503) && !statuses.contains(&404),
        "{statuses:?}"
    );
    cluster.torc(&["damage", "--accept-loss"]);
    wait_until(
        || damage().to_string(),
        || damage()["damage"].as_array().unwrap().is_empty(),
    );
    let after = read_all(&cluster, 1, "one");
    assert!(after.contains(&404) && !after.contains(&503), "{after:?}");
    for other in [1, 2] {
        cluster.kill(other);
    }
    let url = |key| format!("{}/v1/keys/key{key}?r=1", cluster.endpoint(0));
    let statuses: Vec<_> = (0..KEYS).map(|key| http_status(&url(key))).collect();
    assert_eq!(statuses, [Some(200); KEYS], "fetched from the others");
}
