//! Restores of real nodes to a moment: a backup and the archived log give what was there at each noted time, or say why not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use crate::backup::{backup, get, put, report, restore, start_restored};
use crate::cluster::{Cluster, TORC, run, text, wait_until};

/// What the keys of a node held.
type Content = BTreeMap<String, Option<String>>;

fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    u64::try_from(now.unwrap().as_micros()).unwrap()
}

/// A moment that no write is at.
fn note() -> u64 {
    std::thread::sleep(Duration::from_millis(3));
    let noted = now_us();
    std::thread::sleep(Duration::from_millis(3));
    noted
}

/// A cluster whose nodes have an archive each, made before they start.
fn archiving(nodes: u16, shards: u16, sets: &[&str]) -> Cluster {
    let mut cluster = Cluster::configure(nodes, shards, sets);
    for node in 0..usize::from(nodes) {
        let dir = archive(&cluster);
        std::fs::create_dir_all(&dir).unwrap();
        configure(&cluster, node, &format!("[archive]\ndir = {dir:?}\n"));
        cluster.spawn(node);
    }
    cluster.wait_ready();
    cluster
}

/// All nodes share a directory: each has its own below it.
fn archive(cluster: &Cluster) -> PathBuf {
    cluster.dir.path().join("archive")
}

fn configure(cluster: &Cluster, node: usize, more: &str) {
    let path = cluster.home(node).join("torc.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(path, text + more).unwrap();
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(segments(&path));
        } else if path.extension().is_some_and(|ext| ext == "wal") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn refused(output: &Output) -> String {
    assert!(!output.status.success(), "{}", text(&output.stdout));
    text(&output.stderr)
}

/// Writes a round: some keys anew, some over others, some deleted.
fn round(endpoint: &str, content: &mut Content, round: usize) {
    for number in 0..30 {
        let key = format!("key-{}", (number * 7 + round * 11) % 60);
        if number % 6 == 5 {
            let url = format!("{endpoint}/v1/keys/{key}");
            // A deletion removes what it has seen.
            let seen = ureq::get(&url)
                .config()
                .http_status_as_error(false)
                .build()
                .call();
            let version = seen.unwrap().headers().get("X-Torc-Version").cloned();
            let delete = ureq::delete(&url);
            let delete = match version {
                Some(version) => delete.header("X-Torc-Context", version),
                None => delete,
            };
            delete.call().unwrap();
            content.insert(key, None);
            continue;
        }
        let value = format!("{round} {number} {}", "x".repeat(number * 100));
        write(endpoint, &key, &value);
        content.insert(key, Some(value));
    }
}

/// Overwrites whatever a key has.
fn write(endpoint: &str, key: &str, value: &str) {
    let url = format!("{endpoint}/v1/keys/{key}");
    let seen = ureq::get(&url)
        .config()
        .http_status_as_error(false)
        .build()
        .call();
    let version = seen.unwrap().headers().get("X-Torc-Version").cloned();
    let put = ureq::put(&url).content_type("application/octet-stream");
    let put = match version {
        Some(version) => put.header("X-Torc-Context", version),
        None => put,
    };
    assert!(put.send(value.as_bytes()).unwrap().status().is_success());
}

fn check(endpoint: &str, content: &Content, what: &str) {
    for number in 0..60 {
        let key = format!("key-{number}");
        let found = get(endpoint, &key, "").map(|bytes| text(&bytes));
        let expected = content.get(&key).cloned().flatten();
        assert_eq!(found, expected, "{key} {what}");
    }
}

fn wipe(cluster: &Cluster, node: usize) {
    std::fs::remove_dir_all(cluster.home(node).join("data")).unwrap();
}

/// Restores a killed node to `moment` and starts it.
fn bring_to(cluster: &mut Cluster, from: &Path, moment: &str, shards: usize) -> serde_json::Value {
    wipe(cluster, 0);
    let restored = restore(cluster, 0, from, &["--at", moment, "--json"]);
    let told = report(&restored);
    start_restored(cluster, 0, shards);
    told
}

/// A node with a backup and some noted rounds behind it, killed.
fn history(cluster: &mut Cluster, to: &Path) -> Vec<(u64, Content)> {
    let endpoint = cluster.endpoint(0);
    let mut content = Content::new();
    round(&endpoint, &mut content, 0);
    report(&backup(cluster, 0, to, &[]).output().unwrap());
    let mut noted = Vec::new();
    for number in 1..=4 {
        round(&endpoint, &mut content, number);
        noted.push((note(), content.clone()));
        if number == 2 {
            // What is flushed and compacted is in the archive all the same.
            cluster.torc(&["compact"]);
        }
    }
    cluster.torc(&["backup", "log"]);
    put(&endpoint, "key-0", b"never archived");
    cluster.kill(0);
    noted
}

fn every_noted_moment(sets: &[&str]) {
    let mut cluster = archiving(1, 2, sets);
    let to = cluster.dir.path().join("backups");
    let noted = history(&mut cluster, &to);
    for (moment, content) in &noted {
        bring_to(&mut cluster, &to, &moment.to_string(), 2);
        check(&cluster.endpoint(0), content, &format!("at {moment}"));
        cluster.kill(0);
    }
    let told = bring_to(&mut cluster, &to, "latest", 2);
    assert!(told["at_us"].as_u64().unwrap() > noted[3].0);
    check(&cluster.endpoint(0), &noted[3].1, "at last");
    // Another number of shards goes on with it.
    cluster.kill(0);
    let path = cluster.home(0).join("torc.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replace("count = 2", "count = 3")).unwrap();
    bring_to(&mut cluster, &to, &noted[1].0.to_string(), 3);
    check(&cluster.endpoint(0), &noted[1].1, "over three shards");
}

#[test]
fn a_node_is_restored_as_it_was_at_each_noted_moment() {
    every_noted_moment(&[]);
}

#[test]
fn an_encrypted_node_is_restored_as_it_was_and_its_archive_shows_nothing() {
    let dir = crate::cluster::scratch();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, run(&["encryption", "new-key"]).stdout).unwrap();
    let set = format!("encryption.key_file={keys:?}");
    every_noted_moment(&[&set]);
}

#[test]
fn what_cannot_be_reached_is_refused_by_name() {
    let mut cluster = archiving(1, 1, &[]);
    let to = cluster.dir.path().join("backups");
    let archive = archive(&cluster);
    let before = note();
    let noted = history(&mut cluster, &to);
    wipe(&cluster, 0);
    let at = |cluster: &Cluster, moment: u64| {
        restore(cluster, 0, &to, &["--at", &moment.to_string(), "--dry-run"])
    };
    let early = refused(&at(&cluster, before));
    assert!(early.contains("never back"), "{early}");
    let late = refused(&at(&cluster, now_us()));
    assert!(late.contains("the archive ends at"), "{late}");
    let (moment, _) = noted[2];
    let possible = at(&cluster, moment);
    assert!(possible.status.success(), "{}", text(&possible.stderr));
    assert!(text(&possible.stdout).contains("every moment from"));
    assert!(!cluster.home(0).join("data").exists(), "a dry run");

    // More than one segment, so that one in the middle can be missing.
    let told = restore(&cluster, 0, &to, &["--at", "latest"]);
    assert!(told.status.success(), "{}", text(&told.stderr));
    start_restored(&mut cluster, 0, 1);
    // A start sets the hybrid clock ahead of civil time for a moment, and civil time is noted below.
    let keeps_time = || cluster.metrics(0).contains("\ntorc_clock_ahead_us 0\n");
    wait_until(|| cluster.metrics(0), keeps_time);
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    for number in 0..3 {
        put(&cluster.endpoint(0), "more", number.to_string().as_bytes());
        cluster.torc(&["backup", "log"]);
    }
    let moment = note();
    cluster.torc(&["backup", "log"]);
    cluster.kill(0);
    wipe(&cluster, 0);
    let possible = at(&cluster, moment);
    assert!(possible.status.success(), "{}", text(&possible.stderr));
    let all = segments(&archive);
    let gone = &all[all.len() - 3];
    let aside = cluster.dir.path().join("aside");
    std::fs::rename(gone, &aside).unwrap();
    let gap = refused(&at(&cluster, moment));
    assert!(
        gap.contains("frames") && gap.contains("are missing before"),
        "{gap}"
    );
    let (to_text, archive_text) = (to.to_str().unwrap(), archive.to_str().unwrap());
    let verify = ["backup", "verify", to_text, "--archive", archive_text];
    assert!(refused(&run(&verify)).contains("damaged or missing"));
    std::fs::rename(&aside, gone).unwrap();
    assert!(run(&verify).status.success());

    let mut bytes = std::fs::read(gone).unwrap();
    bytes[200] ^= 1;
    std::fs::write(gone, &bytes).unwrap();
    let damaged = run(&verify);
    assert!(!damaged.status.success());
    let name = gone.file_name().unwrap().to_str().unwrap();
    assert!(
        text(&damaged.stdout).contains(name),
        "{}",
        text(&damaged.stdout)
    );
    let stopped = restore(&cluster, 0, &to, &["--at", &moment.to_string()]);
    assert!(refused(&stopped).contains(name));
    bytes[200] ^= 1;
    std::fs::write(gone, &bytes).unwrap();
    // What the refused restore has left is no obstacle, and no node starts on it.
    let config = cluster.home(0).join("torc.toml");
    let started = run(&["server", "--config", config.to_str().unwrap()]);
    assert!(refused(&started).contains("restore that was broken off"));
    let again = restore(&cluster, 0, &to, &["--at", &moment.to_string()]);
    assert!(again.status.success(), "{}", text(&again.stderr));
}

#[test]
fn a_restore_that_was_killed_is_repeated_and_mints_under_another_name() {
    let mut cluster = archiving(1, 1, &[]);
    let endpoint = cluster.endpoint(0);
    let to = cluster.dir.path().join("backups");
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    let value = vec![b'v'; 60_000];
    for number in 0..400 {
        put(&endpoint, &format!("key-{number}"), &value);
    }
    let actors = |key: &str| {
        let mut answer = ureq::get(format!("{endpoint}/v1/keys/{key}"))
            .call()
            .unwrap();
        let body: serde_json::Value =
            serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap();
        let clock = body["version"]["clock"].as_object().unwrap().clone();
        clock.keys().cloned().collect::<Vec<_>>()
    };
    let earlier = actors("key-1");
    cluster.torc(&["backup", "log"]);
    let moment = note();
    cluster.torc(&["backup", "log"]);
    cluster.kill(0);
    wipe(&cluster, 0);
    let config = cluster.home(0).join("torc.toml");
    let mut killed = Command::new(TORC)
        .args(["restore", "--from", to.to_str().unwrap(), "--config"])
        .arg(&config)
        .args(["--at", &moment.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let data = cluster.home(0).join("data");
    wait_until(
        || "nothing is replayed".into(),
        || data.join("shard-00/wal").exists() || killed.try_wait().unwrap().is_some(),
    );
    killed.kill().unwrap();
    killed.wait().unwrap();
    let again = restore(&cluster, 0, &to, &["--at", &moment.to_string()]);
    if data.join("restoring").exists() {
        panic!("{}", text(&again.stderr));
    }
    // One that was done before it could be killed is not done again over it.
    assert!(again.status.success() || text(&again.stderr).contains("is not empty"));
    start_restored(&mut cluster, 0, 1);
    for number in 0..400 {
        let found = get(&endpoint, &format!("key-{number}"), "");
        assert_eq!(found.as_deref(), Some(&value[..]), "key-{number}");
    }
    assert_eq!(actors("key-1"), earlier);
    write(&endpoint, "key-1", "after");
    let later = actors("key-1");
    assert!(
        later.iter().any(|actor| !earlier.contains(actor)),
        "{later:?}"
    );
}

#[test]
fn keyspaces_are_those_of_the_moment() {
    let mut cluster = archiving(1, 2, &[]);
    let endpoint = cluster.endpoint(0);
    let to = cluster.dir.path().join("backups");
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    let without = note();
    cluster.torc(&["keyspace", "set", "late"]);
    let settled = || std::thread::sleep(Duration::from_millis(700));
    settled();
    let url = format!("{endpoint}/v1/keyspaces/late/keys/a");
    let put = ureq::put(&url).content_type("application/octet-stream");
    assert!(put.send(&b"x"[..]).unwrap().status().is_success());
    let with = note();
    cluster.torc(&["keyspace", "drop", "late"]);
    settled();
    let dropped = note();
    cluster.torc(&["backup", "log"]);
    let status = || {
        let answer = ureq::get(&url)
            .config()
            .http_status_as_error(false)
            .build()
            .call();
        answer.unwrap().status().as_u16()
    };
    for (moment, expected, knows) in [
        (without, 404, false),
        (with, 200, true),
        (dropped, 404, false),
    ] {
        cluster.kill(0);
        bring_to(&mut cluster, &to, &moment.to_string(), 2);
        assert_eq!(status(), expected, "at {moment}");
        let list = cluster.torc(&["keyspace", "list", "--json"]);
        assert_eq!(list.contains("\"late\""), knows, "{list}");
    }
}

#[test]
fn a_whole_cluster_goes_back_to_one_moment() {
    let mut cluster = archiving(3, 1, &[]);
    let endpoint = cluster.endpoint(0);
    let dirs: Vec<PathBuf> = (0..3)
        .map(|node| cluster.dir.path().join(format!("backups-{node}")))
        .collect();
    let mut content = Content::new();
    round(&endpoint, &mut content, 0);
    for (node, dir) in dirs.iter().enumerate() {
        report(&backup(&cluster, node, dir, &[]).output().unwrap());
    }
    round(&endpoint, &mut content, 1);
    let moment = note();
    round(&endpoint, &mut content.clone(), 2);
    for node in 0..3 {
        cluster.torc(&["backup", "log", "--endpoint", &cluster.endpoint(node)]);
    }
    for (node, dir) in dirs.iter().enumerate() {
        cluster.kill(node);
        wipe(&cluster, node);
        let at = ["--at", &moment.to_string(), "--all-nodes"];
        let restored = restore(&cluster, node, dir, &at);
        assert!(restored.status.success(), "{}", text(&restored.stderr));
    }
    for node in 0..3 {
        cluster.spawn(node);
    }
    cluster.wait_ready();
    for node in 0..3 {
        let is_whole = || cluster.log(node).contains("this shard has all its data");
        wait_until(|| cluster.log(node), is_whole);
    }
    for node in 0..3 {
        check(
            &cluster.endpoint(node),
            &content,
            &format!("on node {node}"),
        );
    }
}

#[test]
fn an_archive_that_is_not_there_keeps_a_node_from_starting_and_pruning_leaves_what_is_needed() {
    let mut cluster = archiving(1, 1, &[]);
    let to = cluster.dir.path().join("backups");
    let archive = archive(&cluster);
    let endpoint = cluster.endpoint(0);
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    for number in 0..4 {
        write(&endpoint, "key-1", &number.to_string());
        cluster.torc(&["backup", "log"]);
    }
    let first = std::fs::read_dir(to.join("backups"))
        .unwrap()
        .flatten()
        .next()
        .unwrap();
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    let (to_text, archive_text) = (to.to_str().unwrap(), archive.to_str().unwrap());
    let prune = [
        "backup",
        "prune",
        to_text,
        "--archive",
        archive_text,
        "--json",
    ];
    let all = segments(&archive).len();
    report(&run(&prune));
    assert_eq!(segments(&archive).len(), all, "the first backup needs them");
    std::fs::remove_dir_all(first.path()).unwrap();
    let foretold = report(&run(&[&prune[..], &["--dry-run"]].concat()));
    assert!(foretold["files"].as_u64().unwrap() >= 3, "{foretold}");
    assert_eq!(segments(&archive).len(), all);
    report(&run(&prune));
    assert!(segments(&archive).len() < all);
    write(&endpoint, "key-1", "last");
    let moment = note();
    let status = cluster.torc(&["backup", "log"]);
    assert!(status.contains("the log is archived up to 20"), "{status}");
    assert!(cluster.metrics(0).contains("torc_archive_gaps_total 0"));
    cluster.kill(0);
    let away = cluster.dir.path().join("away");
    std::fs::rename(&archive, &away).unwrap();
    let config = cluster.home(0).join("torc.toml");
    let started = run(&["server", "--config", config.to_str().unwrap()]);
    assert!(refused(&started).contains("mount it, or make it"));
    std::fs::rename(&away, &archive).unwrap();
    bring_to(&mut cluster, &to, &moment.to_string(), 1);
    assert_eq!(get(&endpoint, "key-1", "").as_deref(), Some(&b"last"[..]));
}
