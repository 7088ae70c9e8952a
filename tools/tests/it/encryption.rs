//! Encryption of a real node's files: turned on over plain ones, keys changed while it serves, a missing
//! key refused, backups without one.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::backup::start_restored;
use crate::cluster::{Cluster, TORC, run, text};

const MARKER: &str = "marker-of-plain-text";

fn key_file(cluster: &Cluster) -> PathBuf {
    cluster.dir.path().join("keys")
}

/// A new key file line, with its comment, and the key's id.
fn new_key() -> (String, String) {
    let line = text(&run(&["encryption", "new-key"]).stdout);
    let id = line.split_whitespace().nth(2).unwrap().to_owned();
    (line, id)
}

/// The paths below `dir` whose file shows the marker.
fn readable(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(readable(&path));
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        let marker = &MARKER.as_bytes()[..10];
        if bytes.windows(marker.len()).any(|window| window == marker) {
            found.push(path);
        }
    }
    found
}

fn put_all(cluster: &Cluster, round: usize) {
    for number in 0..20 {
        let key = format!("{MARKER}-{round}-{number}");
        cluster.torc(&["put", &key, &format!("{MARKER} {round} {number}")]);
    }
}

fn check_all(cluster: &Cluster, rounds: usize) {
    for round in 0..rounds {
        for number in 0..20 {
            let found = cluster.torc(&["get", &format!("{MARKER}-{round}-{number}")]);
            assert_eq!(found.trim(), format!("{MARKER} {round} {number}"));
        }
    }
}

fn restart(cluster: &mut Cluster) {
    cluster.kill(0);
    cluster.spawn(0);
    cluster.wait_ready();
}

/// Files by key, as `torc encryption status` tells them.
fn files(cluster: &Cluster, key: Option<&str>) -> Option<u64> {
    let status = cluster.torc(&["encryption", "status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let rows = status["keys"].as_array().unwrap();
    let row = rows.iter().find(|row| row["key"].as_str() == key)?;
    row["files"].as_u64()
}

#[test]
fn a_plain_node_becomes_an_encrypted_one_and_its_keys_change_while_it_serves() {
    let mut cluster = Cluster::start(1, 2, &[]);
    put_all(&cluster, 0);
    cluster.torc(&["compact"]);
    put_all(&cluster, 1);
    let data = cluster.home(0).join("data");
    assert!(!readable(&data).is_empty());
    let refused = cluster.command(&["encryption", "reload"]).output().unwrap();
    assert!(text(&refused.stderr).contains("encryption.key_file"));

    let (first_line, first) = new_key();
    std::fs::write(key_file(&cluster), &first_line).unwrap();
    let config = cluster.home(0).join("torc.toml");
    let before = std::fs::read_to_string(&config).unwrap();
    let section = format!("[encryption]\nkey_file = {:?}\n", key_file(&cluster));
    std::fs::write(&config, before.clone() + &section).unwrap();
    restart(&mut cluster);
    check_all(&cluster, 2);
    put_all(&cluster, 2);
    assert!(files(&cluster, None) > Some(0));
    cluster.torc(&["compact"]);
    assert_eq!(files(&cluster, None), None);
    assert!(files(&cluster, Some(&first)) > Some(0));
    assert_eq!(readable(&data), Vec::<PathBuf>::new());
    assert!(!cluster.log(0).contains(&first_line));

    let (second_line, second) = new_key();
    std::fs::write(key_file(&cluster), first_line.clone() + &second_line).unwrap();
    let reloaded = cluster.torc(&["encryption", "reload"]);
    assert!(reloaded.contains(&second), "{reloaded}");
    put_all(&cluster, 3);
    // The old one is still needed.
    std::fs::write(key_file(&cluster), &second_line).unwrap();
    let refused = cluster.command(&["encryption", "reload"]).output().unwrap();
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains(&first));
    cluster.torc(&["compact"]);
    let metrics = cluster.metrics(0);
    assert!(metrics.contains(&format!("torc_store_files{{key=\"{second}\"}}")));
    assert_eq!(files(&cluster, Some(&first)), Some(0));
    cluster.torc(&["encryption", "reload"]);
    assert_eq!(files(&cluster, Some(&first)), None);
    restart(&mut cluster);
    check_all(&cluster, 4);
    let scrubbed = cluster.torc(&["scrub"]);
    assert!(scrubbed.contains("damaged: 0"), "{scrubbed}");

    // Without the key, and with another: refused by name, and nothing is harmed.
    cluster.kill(0);
    std::fs::write(key_file(&cluster), new_key().0).unwrap();
    for text_of_config in [before.clone() + &section, before] {
        std::fs::write(&config, text_of_config).unwrap();
        let server = Command::new(TORC)
            .arg("server")
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(!server.status.success());
        let told = text(&server.stderr);
        assert!(told.contains(&second), "{told}");
        assert!(told.contains("encryption.key_file"), "{told}");
    }
    let command = format!("cat '{}'", key_file(&cluster).display());
    std::fs::write(key_file(&cluster), &second_line).unwrap();
    let section = format!("\n[encryption]\nkey_command = {command:?}\n");
    let text_of_config = std::fs::read_to_string(&config).unwrap() + &section;
    std::fs::write(&config, text_of_config).unwrap();
    cluster.spawn(0);
    cluster.wait_ready();
    check_all(&cluster, 4);
}

#[test]
fn backups_and_inspection_of_an_encrypted_node_need_no_key_and_say_what_they_miss() {
    let keys = crate::cluster::scratch();
    let path = keys.path().join("keys");
    let (line, id) = new_key();
    std::fs::write(&path, &line).unwrap();
    let mut cluster = Cluster::start(1, 1, &[&format!("encryption.key_file={path:?}")]);
    put_all(&cluster, 0);
    let to = cluster.dir.path().join("backups");
    let (to, path) = (to.to_str().unwrap(), path.to_str().unwrap());
    cluster.torc(&["backup", "--to", to]);
    assert!(run(&["backup", "verify", to]).status.success());
    assert_eq!(readable(Path::new(to)), Vec::<PathBuf>::new());

    let tables = cluster.home(0).join("data/shard-00/tables");
    let tables = std::fs::read_dir(tables).unwrap().flatten();
    let tables: Vec<String> = tables
        .map(|table| table.path().to_str().unwrap().to_owned())
        .collect();
    let tables: Vec<&str> = tables.iter().map(String::as_str).collect();
    let without = run(&[&["inspect", "--records"], &tables[..]].concat());
    assert!(without.status.success());
    let told = text(&without.stdout);
    assert!(
        told.contains(&id) && told.contains("nothing was decrypted"),
        "{told}"
    );
    assert!(!told.contains(MARKER), "{told}");
    let with = run(&[&["inspect", "--records", "--key-file", path], &tables[..]].concat());
    assert!(text(&with.stdout).contains(MARKER));

    cluster.kill(0);
    std::fs::remove_dir_all(cluster.home(0).join("data")).unwrap();
    let config = cluster.home(0).join("torc.toml");
    let config = config.to_str().unwrap();
    let restored = run(&["restore", "--from", to, "--config", config]);
    assert!(restored.status.success(), "{}", text(&restored.stderr));
    start_restored(&mut cluster, 0, 1);
    check_all(&cluster, 1);
}
