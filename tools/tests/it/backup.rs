//! Backups of real nodes: taken under load, broken off, damaged, restored.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::cluster::{Cluster, TORC, run, text, wait_until};

pub fn put(endpoint: &str, key: &str, value: &[u8]) {
    let answer = ureq::put(format!("{endpoint}/v1/keys/{key}"))
        .content_type("application/octet-stream")
        .send(value)
        .unwrap();
    assert!(answer.status().is_success());
}

pub fn get(endpoint: &str, key: &str, query: &str) -> Option<Vec<u8>> {
    let answer = ureq::get(format!("{endpoint}/v1/keys/{key}{query}"))
        .header("Accept", "application/octet-stream")
        .config()
        .http_status_as_error(false)
        .build()
        .call();
    let mut answer = answer.ok().filter(|answer| answer.status() == 200)?;
    answer.body_mut().read_to_vec().ok()
}

/// Starts a restored node and waits until its shards have all their data and answer reads.
pub fn start_restored(cluster: &mut Cluster, node: usize, shards: usize) {
    let whole = |cluster: &Cluster| {
        let log = cluster.log(node);
        log.matches("this shard has all its data").count()
    };
    let before = whole(cluster);
    cluster.spawn(node);
    cluster.wait_ready();
    wait_until(|| cluster.log(node), || whole(cluster) >= before + shards);
}

/// Bytes that do not compress, of a key.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(len).collect()
}

pub fn backup(cluster: &Cluster, node: usize, to: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(TORC);
    command
        .args(["backup", "--json", "--endpoint", &cluster.endpoint(node)])
        .arg("--to")
        .arg(to)
        .args(more);
    command
}

pub fn report(output: &Output) -> serde_json::Value {
    assert!(
        output.status.success(),
        "{}\n{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

fn verify(dir: &Path) -> Output {
    run(&["backup", "verify", dir.to_str().unwrap()])
}

pub fn restore(cluster: &Cluster, node: usize, from: &Path, more: &[&str]) -> Output {
    let config = cluster.home(node).join("torc.toml");
    let (from, config) = (from.to_str().unwrap(), config.to_str().unwrap());
    run(&[&["restore", "--from", from, "--config", config], more].concat())
}

fn tables(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.join("tables")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            if entry.path().is_dir() {
                dirs.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    found
}

#[test]
fn what_was_acknowledged_before_a_backup_under_load_is_there_after_wipe_and_restore() {
    let mut cluster = Cluster::start(1, 2, &[]);
    let endpoint = cluster.endpoint(0);
    let to = cluster.dir.path().join("backups");
    let key = |number: usize| format!("key-{number}");
    // Every fifth goes to a blob.
    let value = |number: usize| {
        noise(
            number as u64,
            if number.is_multiple_of(5) { 9000 } else { 2000 },
        )
    };
    let (acknowledged, stop) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let writer = {
        let (acknowledged, stop) = (Arc::clone(&acknowledged), Arc::clone(&stop));
        let endpoint = endpoint.clone();
        std::thread::spawn(move || {
            let mut number = 0;
            while !stop.load(Ordering::Acquire) {
                put(&endpoint, &key(number), &value(number));
                number += 1;
                acknowledged.store(number, Ordering::Release);
            }
        })
    };
    let reached = |count| {
        wait_until(
            || format!("{count} writes are not acknowledged"),
            || acknowledged.load(Ordering::Acquire) >= count,
        );
        acknowledged.load(Ordering::Acquire)
    };
    reached(200);
    let first = report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    assert_eq!(first["tables"], first["copied_tables"]);
    assert_eq!(first["blobs"], first["copied_blobs"]);
    assert!(first["blobs"].as_u64().unwrap() >= 2, "{first}");
    let before = reached(acknowledged.load(Ordering::Acquire) + 100);
    let second = report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    stop.store(true, Ordering::Release);
    writer.join().unwrap();
    let count = |report: &serde_json::Value, name: &str| report[name].as_u64().unwrap();
    assert!(count(&second, "copied_tables") >= 1);
    assert!(
        count(&second, "copied_tables") < count(&second, "tables"),
        "tables of the first backup are copied again: {second}"
    );
    assert!(count(&second, "copied_blobs") >= 1);
    assert!(
        count(&second, "copied_blobs") < count(&second, "blobs"),
        "blobs of the first backup are copied again: {second}"
    );
    assert_eq!(count(&second, "replaced_tables"), 0);
    let list = cluster.torc(&["backup", "snapshots"]);
    assert_eq!(list.trim(), r#"{"snapshots":[]}"#, "a snapshot was left");

    let refused = restore(&cluster, 0, &to, &[]);
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("is not empty"));
    cluster.kill(0);
    let data = cluster.home(0).join("data");
    std::fs::remove_dir_all(&data).unwrap();
    // What a restore that broke off leaves is no obstacle.
    std::fs::create_dir_all(data.join("shard-00/tables")).unwrap();
    std::fs::write(data.join("restoring"), "").unwrap();
    let restored = restore(&cluster, 0, &to, &[]);
    assert!(restored.status.success(), "{}", text(&restored.stderr));
    start_restored(&mut cluster, 0, 2);
    for number in 0..before {
        let found = get(&endpoint, &key(number), "");
        assert_eq!(found, Some(value(number)), "{}", key(number));
    }
    put(&endpoint, "later", b"x");
    cluster.torc(&["compact"]);
    let third = report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    assert_eq!(
        third["tables"], third["copied_tables"],
        "ids of another life are not compared"
    );
    assert!(verify(&to).status.success());
}

#[test]
fn a_backup_that_was_killed_goes_on_where_it_stopped() {
    let cluster = Cluster::start(1, 1, &[]);
    let endpoint = cluster.endpoint(0);
    let to = cluster.dir.path().join("backups");
    for number in 0..8 {
        put(&endpoint, &format!("key-{number}"), &noise(number, 900_000));
    }
    let mut slow = backup(&cluster, 0, &to, &["--rate", "1"]);
    let mut slow = slow
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let arrived = || {
        let entries = std::fs::read_dir(to.join("incoming")).into_iter().flatten();
        // One that is whole leaves the directory meanwhile.
        let found = entries.flatten().filter_map(|entry| entry.metadata().ok());
        let lens = found.map(|metadata| metadata.len());
        lens.max().unwrap_or(0)
    };
    wait_until(|| "nothing is copied".into(), || arrived() >= 2 << 20);
    slow.kill().unwrap();
    slow.wait().unwrap();
    assert!(!verify(&to).status.success(), "nothing is finished yet");
    let second = report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    assert_eq!(second["resumed"], true);
    let count = |name: &str| second[name].as_u64().unwrap();
    assert!(
        count("copied_bytes") + (2 << 20) <= count("bytes"),
        "{second}"
    );
    assert!(verify(&to).status.success());
}

#[test]
fn a_damaged_file_is_found_by_verify_refused_by_restore_and_replaced_by_the_next_backup() {
    let cluster = Cluster::start(1, 1, &[]);
    let to = cluster.dir.path().join("backups");
    put(&cluster.endpoint(0), "key", &noise(1, 100_000));
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    assert!(verify(&to).status.success());
    let blob = tables(&to)
        .into_iter()
        .find(|path| path.extension().is_some_and(|found| found == "blob"));
    let table = tables(&to)
        .into_iter()
        .find(|path| path.extension().is_some_and(|found| found == "table"));
    let blob = blob.expect("100,000 bytes go to a blob");
    for path in [&blob, &table.expect("and a table refers to it")] {
        damage(&cluster, &to, path);
    }
}

/// Damages a file of the backups in `to`: everybody notices, and the next backup makes up for it.
fn damage(cluster: &Cluster, to: &Path, file: &Path) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(file, &bytes).unwrap();
    let found = verify(to);
    assert!(!found.status.success());
    let name = file.file_name().unwrap().to_str().unwrap();
    assert!(
        text(&found.stdout).contains(name),
        "{}",
        text(&found.stdout)
    );
    let elsewhere = format!("node.data_dir={:?}", cluster.dir.path().join("elsewhere"));
    let refused = restore(cluster, 0, to, &["--set", &elsewhere]);
    assert!(!refused.status.success());
    assert!(
        text(&refused.stderr).contains("checksum"),
        "{}",
        text(&refused.stderr)
    );
    let next = report(&backup(cluster, 0, to, &[]).output().unwrap());
    let replaced = ["replaced_tables", "replaced_blobs"].map(|kind| next[kind].as_u64().unwrap());
    assert_eq!(replaced.iter().sum::<u64>(), 1, "{next}");
    assert!(verify(to).status.success());
}

#[test]
fn a_restored_node_of_a_cluster_gets_what_it_has_missed_from_the_others() {
    let mut cluster = Cluster::start(3, 1, &[]);
    let to = cluster.dir.path().join("backups");
    for number in 0..50 {
        put(&cluster.endpoint(0), &format!("old-{number}"), b"old");
    }
    report(&backup(&cluster, 1, &to, &[]).output().unwrap());
    for number in 0..50 {
        put(&cluster.endpoint(0), &format!("new-{number}"), b"new");
    }
    cluster.kill(1);
    std::fs::remove_dir_all(cluster.home(1).join("data")).unwrap();
    let restored = restore(&cluster, 1, &to, &[]);
    assert!(restored.status.success(), "{}", text(&restored.stderr));
    start_restored(&mut cluster, 1, 1);
    let endpoint = cluster.endpoint(1);
    put(&endpoint, "after", b"after");
    cluster.torc(&["repair", "--endpoint", &endpoint]);
    cluster.kill(0);
    cluster.kill(2);
    for number in 0..50 {
        for age in ["old", "new"] {
            let key = format!("{age}-{number}");
            let found = get(&endpoint, &key, "?r=1");
            assert_eq!(found.as_deref(), Some(age.as_bytes()), "{key}");
        }
    }
}
