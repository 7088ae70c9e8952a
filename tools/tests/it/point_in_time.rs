//! Restores of real nodes to a moment: a backup and the archived log give what was there at each noted time, or say why not.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
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
            let delete = ureq::delete(&url);
            // A deletion removes what it has seen.
            let delete = match version(&url) {
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

/// What a write must have seen to replace all that a key has.
fn version(url: &str) -> Option<ureq::http::HeaderValue> {
    let seen = ureq::get(url)
        .config()
        .http_status_as_error(false)
        .build()
        .call();
    seen.unwrap().headers().get("X-Torc-Version").cloned()
}

/// Overwrites whatever a key has.
fn write(endpoint: &str, key: &str, value: &str) {
    let url = format!("{endpoint}/v1/keys/{key}");
    let put = ureq::put(&url).content_type("application/octet-stream");
    let put = match version(&url) {
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

/// A file of the newest backup that only it has.
fn backup_file(dir: &Path) -> PathBuf {
    let store = dir.join("backups").join(only_backup(dir)).join("shard-00");
    let mut files: Vec<PathBuf> = std::fs::read_dir(store)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.swap_remove(0)
}

/// A file whose place a pipe has taken: whoever reads it waits there.
struct Held {
    path: PathBuf,
    aside: PathBuf,
}

impl Held {
    fn file(path: &Path) -> Self {
        let held = Self {
            path: path.to_owned(),
            aside: path.with_extension("aside"),
        };
        std::fs::rename(path, &held.aside).unwrap();
        let made = Command::new("mkfifo").arg(path).status();
        assert!(made.unwrap().success());
        held
    }

    /// Waits until `process` has opened the pipe; it then reads until what is returned is closed.
    fn reader(&self, process: &mut Child) -> File {
        let mut pipe = None;
        wait_until(
            || format!("nobody reads {}", self.path.display()),
            || {
                assert_eq!(process.try_wait().unwrap(), None, "it has ended");
                let mut options = File::options();
                options.write(true).custom_flags(libc::O_NONBLOCK);
                pipe = options.open(&self.path).ok();
                pipe.is_some()
            },
        );
        // With a reader there, this does not wait, and writing to it does.
        let blocking = File::options().write(true).open(&self.path);
        drop(pipe);
        blocking.unwrap()
    }

    /// Lets the reader have the content, and puts the file back.
    fn release(self, mut pipe: File) {
        let content = std::fs::read(&self.aside).unwrap();
        self.put_back();
        pipe.write_all(&content).unwrap();
    }

    fn put_back(self) {
        std::fs::rename(&self.aside, &self.path).unwrap();
    }
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

/// The id of the one backup that there is.
fn only_backup(dir: &Path) -> String {
    let entries = std::fs::read_dir(dir.join("backups")).unwrap();
    let names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 1, "{names:?}");
    names[0].clone()
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
    // It was restored meanwhile, so the backup has to be named.
    wipe(&cluster, 0);
    let id = only_backup(&to);
    let at = ["--at", "latest", "--backup", &id, "--json"];
    let told = report(&restore(&cluster, 0, &to, &at));
    start_restored(&mut cluster, 0, 2);
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
        if number % 150 == 149 {
            cluster.torc(&["backup", "log"]);
        }
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
    // The restore stops where it reads a pipe: at a file of the backup, by when it has planned the replay, and then at the
    // last segment of several.
    let copied = Held::file(&backup_file(&to));
    let mut killed = Command::new(TORC)
        .args(["restore", "--from", to.to_str().unwrap(), "--config"])
        .arg(cluster.home(0).join("torc.toml"))
        .args(["--at", &moment.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let at_copy = copied.reader(&mut killed);
    let all = segments(&archive(&cluster));
    assert!(all.len() > 1, "{all:?}");
    let replayed = Held::file(all.last().unwrap());
    copied.release(at_copy);
    let _at_replay = replayed.reader(&mut killed);
    killed.kill().unwrap();
    killed.wait().unwrap();
    replayed.put_back();
    let data = cluster.home(0).join("data");
    assert!(data.join("restoring").exists() && data.join("shard-00/wal").exists());
    let again = restore(&cluster, 0, &to, &["--at", &moment.to_string()]);
    assert!(again.status.success(), "{}", text(&again.stderr));
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

/// A start sets the hybrid clock ahead of civil time: what is stamped so is not left out.
#[test]
fn the_latest_moment_has_what_was_written_right_after_a_start() {
    let mut cluster = archiving(1, 1, &[]);
    let endpoint = cluster.endpoint(0);
    let to = cluster.dir.path().join("backups");
    write(&endpoint, "key", "before");
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    cluster.kill(0);
    cluster.spawn(0);
    cluster.wait_ready();
    write(&endpoint, "key", "after");
    cluster.torc(&["backup", "log"]);
    cluster.kill(0);
    bring_to(&mut cluster, &to, "latest", 1);
    assert_eq!(get(&endpoint, "key", "").as_deref(), Some(&b"after"[..]));
}

#[test]
fn a_life_after_a_restore_is_not_silently_passed_over() {
    let mut cluster = archiving(1, 1, &[]);
    let endpoint = cluster.endpoint(0);
    let to = cluster.dir.path().join("backups");
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    write(&endpoint, "key", "first");
    let moment = note();
    write(&endpoint, "key", "undone");
    cluster.torc(&["backup", "log"]);
    cluster.kill(0);
    bring_to(&mut cluster, &to, &moment.to_string(), 1);
    // The lineage is known to a second.
    std::thread::sleep(Duration::from_millis(1100));
    write(&endpoint, "key", "later");
    cluster.torc(&["backup", "log"]);
    let later = note();
    cluster.kill(0);
    wipe(&cluster, 0);
    let at = |moment: &str, more: &[&str]| {
        let args = [&["--at", moment, "--dry-run"], more].concat();
        restore(&cluster, 0, &to, &args)
    };
    let latest = refused(&at("latest", &[]));
    assert!(latest.contains("is from before the restore of"), "{latest}");
    let id = only_backup(&to);
    assert!(latest.contains(&format!("--backup {id}")), "{latest}");
    let between = refused(&at(&later.to_string(), &[]));
    assert!(between.contains("is after the restore of"), "{between}");
    assert!(between.contains("take one after each restore"), "{between}");
    for allowed in [
        at(&moment.to_string(), &[]),
        at("latest", &["--backup", &id]),
    ] {
        let words = text(&allowed.stderr);
        assert!(allowed.status.success(), "{words}");
        assert!(words.contains("life before the restore of"), "{words}");
    }
}

#[test]
fn moments_are_reached_over_changes_of_the_number_of_shards() {
    let mut cluster = archiving(1, 2, &[]);
    let endpoint = cluster.endpoint(0);
    let to = cluster.dir.path().join("backups");
    let path = cluster.home(0).join("torc.toml");
    let mut content = Content::new();
    round(&endpoint, &mut content, 0);
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    let mut noted = Vec::new();
    for (number, shards) in [(1, 1), (2, 3), (3, 1)] {
        round(&endpoint, &mut content, number);
        let archived = cluster.torc(&["backup", "log", "--json"]);
        let archived: serde_json::Value = serde_json::from_str(&archived).unwrap();
        // By the shards' clocks, which are ahead of civil time after a start, not all by as much.
        if number < 3 {
            noted.push((archived["reach_us"].as_u64().unwrap(), content.clone()));
        }
        // Killed: the end of the log is archived at the start that divides the data anew.
        let tail = format!("the end of {number}");
        write(&endpoint, "key-0", &tail);
        content.insert("key-0".into(), Some(tail));
        cluster.kill(0);
        let config = std::fs::read_to_string(&path).unwrap();
        let from = config.find("count = ").unwrap();
        let config = format!("{}count = {shards}{}", &config[..from], &config[from + 9..]);
        std::fs::write(&path, config).unwrap();
        cluster.spawn(0);
        cluster.wait_ready();
    }
    round(&endpoint, &mut content, 4);
    cluster.torc(&["backup", "log"]);
    cluster.kill(0);
    let (to_text, archive_text) = (
        to.to_str().unwrap().to_owned(),
        archive(&cluster).to_str().unwrap().to_owned(),
    );
    let verify = ["backup", "verify", &to_text, "--archive", &archive_text];
    assert!(run(&verify).status.success());
    wipe(&cluster, 0);

    // Without the end of a layout's log, nothing behind it can be reached, and the reason is said.
    let end = lineages(&cluster)[0].join("layouts/00001");
    let aside = end.with_extension("aside");
    std::fs::rename(&end, &aside).unwrap();
    let foretell = |cluster: &Cluster, moment: &str| {
        restore(cluster, 0, &to, &["--at", moment, "--dry-run", "--json"])
    };
    let foretold = report(&foretell(&cluster, "latest"));
    let beyond = foretold["at_us"].as_u64().unwrap() + 1;
    let beyond = refused(&foretell(&cluster, &beyond.to_string()));
    assert!(beyond.contains("shards.count was changed"), "{beyond}");
    assert!(beyond.contains("need a backup from after it"), "{beyond}");
    std::fs::rename(&aside, &end).unwrap();

    report(&restore(&cluster, 0, &to, &["--at", "latest", "--json"]));
    start_restored(&mut cluster, 0, 1);
    check(&endpoint, &content, "at last");
    cluster.kill(0);
    for (moment, content) in &noted {
        bring_to(&mut cluster, &to, &moment.to_string(), 1);
        check(&endpoint, content, &format!("at {moment}"));
        cluster.kill(0);
    }
}

/// The directories of the lives of node 0's data in the archive, oldest first.
fn lineages(cluster: &Cluster) -> Vec<PathBuf> {
    let below = |dir: &Path| {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths
    };
    below(&below(&archive(cluster))[0])
}

/// A file system in memory, until dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// `None`, said, where this machine does not allow it.
    fn new(kind: &str, options: &str, path: &Path) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", kind, "-o", options, "none"])
            .arg(path)
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(path.to_owned())),
            refused => {
                eprintln!("not available here: a {kind} of its own (needs root): {refused:?}");
                None
            }
        }
    }

    fn change(&self, options: &str) {
        let options = format!("remount,{options}");
        let mut mount = Command::new("mount");
        mount.args(["-o", &options]).arg(&self.0);
        assert!(mount.status().unwrap().success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let gone = Command::new("umount").arg("--lazy").arg(&self.0).status();
        if !gone.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.display());
        }
    }
}

/// A node whose archive is a file system of its own, and that file system: it is to be dropped first.
fn archiving_on(kind: &str, options: &str) -> Option<(Cluster, Mounted)> {
    let mut cluster = Cluster::configure(1, 1, &[]);
    let dir = archive(&cluster);
    let mounted = Mounted::new(kind, options, &dir)?;
    configure(&cluster, 0, &format!("[archive]\ndir = {dir:?}\n"));
    cluster.spawn(0);
    cluster.wait_ready();
    Some((cluster, mounted))
}

#[test]
fn a_full_archive_is_reported_and_catches_up_when_there_is_room_again() {
    let Some((mut cluster, mounted)) = archiving_on("tmpfs", "size=4m") else {
        return;
    };
    let endpoint = cluster.endpoint(0);
    let to = cluster.dir.path().join("backups");
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    cluster.torc(&["backup", "log"]);
    let value = |number: u8| vec![number; 1 << 20];
    for number in 0..12 {
        put(&endpoint, &format!("key-{number}"), &value(number));
    }
    let failed = refused(&cluster.command(&["backup", "log"]).output().unwrap());
    assert!(failed.contains("is not archived"), "{failed}");
    assert!(failed.contains("No space left"), "{failed}");
    let metrics = cluster.metrics(0);
    assert!(metrics.contains("\ntorc_archive_failing 1\n"), "{metrics}");
    let status = cluster.torc(&["backup", "log", "--status"]);
    assert!(status.contains("the last attempt FAILED"), "{status}");
    let log = cluster.log(0);
    assert!(log.contains("a log segment is not archived"), "{log}");
    // The node goes on, and has lost nothing to the archive yet.
    put(&endpoint, "key-12", &value(12));
    assert!(cluster.metrics(0).contains("\ntorc_archive_gaps_total 0\n"));
    mounted.change("size=64m");
    let works = || cluster.metrics(0).contains("\ntorc_archive_failing 0\n");
    wait_until(|| cluster.log(0), works);
    assert!(cluster.log(0).contains("the log archive works again"));
    let status = cluster.torc(&["backup", "log", "--status"]);
    assert!(!status.contains("FAILED"), "{status}");
    cluster.torc(&["backup", "log"]);
    cluster.kill(0);
    bring_to(&mut cluster, &to, "latest", 1);
    for number in 0..=12 {
        let key = format!("key-{number}");
        assert!(get(&endpoint, &key, "") == Some(value(number)), "{key}");
    }
}

#[test]
fn an_archive_may_be_on_a_file_system_that_does_not_take_direct_io() {
    let Some((mut cluster, _mounted)) = archiving_on("ramfs", "mode=755") else {
        return;
    };
    let endpoint = cluster.endpoint(0);
    let to = cluster.dir.path().join("backups");
    let mut content = Content::new();
    round(&endpoint, &mut content, 0);
    report(&backup(&cluster, 0, &to, &[]).output().unwrap());
    round(&endpoint, &mut content, 1);
    cluster.torc(&["backup", "log"]);
    cluster.kill(0);
    bring_to(&mut cluster, &to, "latest", 1);
    check(&endpoint, &content, "from a file system without direct I/O");
}
