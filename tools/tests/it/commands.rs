//! The client and admin commands against real nodes.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cluster::{Cluster, text, wait_until};

/// Runs a client command and returns what came, whatever its status.
fn outcome(cluster: &Cluster, args: &[&str]) -> Output {
    cluster.command(args).output().unwrap()
}

/// Writes a value that has seen nothing.
fn put_blindly(cluster: &Cluster, key: &str, value: &str) {
    let url = format!("{}/v1/keys/{key}", cluster.endpoint(0));
    let request = ureq::put(&url).header("Content-Type", "application/octet-stream");
    assert_eq!(request.send(value).unwrap().status(), 200);
}

#[test]
fn siblings_are_shown_and_the_next_write_replaces_them() {
    let cluster = Cluster::start(1, 1, &[]);
    let conflict = |key: &str| {
        put_blindly(&cluster, key, "one");
        put_blindly(&cluster, key, "two");
        let both = cluster.torc(&["get", key]);
        assert_eq!(both.lines().count(), 2, "{both}");
        assert!(both.contains("one") && both.contains("two"), "{both}");
    };
    conflict("a");
    let both: Value = serde_json::from_str(&cluster.torc(&["get", "a", "--json"])).unwrap();
    let context = both["version"]["context"].as_str().unwrap();
    cluster.torc(&["put", "a", "three", "--context", context]);
    assert_eq!(cluster.torc(&["get", "a"]), "three");
    conflict("b");
    cluster.torc(&["put", "b", "four"]);
    assert_eq!(cluster.torc(&["get", "b"]), "four");
    conflict("c");
    cluster.torc(&["delete", "c"]);
    assert_eq!(outcome(&cluster, &["get", "c"]).status.code(), Some(3));
}

#[test]
fn every_byte_every_page_and_every_failure_is_told() {
    let cluster = Cluster::start(1, 1, &[]);
    let odd = OsStr::from_bytes(b"\xff");
    let run = |args: &[&OsStr]| {
        let output = cluster.command(&[]).args(args).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        output.stdout
    };
    run(&[OsStr::new("put"), odd, OsStr::from_bytes(b"\xfe")]);
    assert_eq!(run(&[OsStr::new("get"), odd]), b"\xfe");
    cluster.torc(&["put", "AAH/", "nul", "--key-base64"]);
    assert_eq!(cluster.torc(&["get", "--key-base64", "AAH/"]), "nul");
    let listed = run(&[OsStr::new("scan"), OsStr::new("--prefix"), odd]);
    assert_eq!(
        text(&listed).trim(),
        r#"{"encoding":"base64","key":"/w=="}"#
    );

    let operations =
        (0..1100).map(|key| json!({"op": "put", "key": format!("k{key}"), "value": "v"}));
    let operations: Vec<_> = operations.collect();
    let file = cluster.dir.path().join("batch.json");
    let batch = |operations: &[Value], more: &[&str]| {
        std::fs::write(&file, json!({ "operations": operations }).to_string()).unwrap();
        outcome(
            &cluster,
            &[&["batch", file.to_str().unwrap()], more].concat(),
        )
    };
    for part in operations.chunks(100) {
        let output = batch(part, &["--r", "1", "--w", "1", "--sloppy"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    let output = batch(&operations[..2], &["--w", "9"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("results"), "{output:?}");
    assert!(text(&output.stderr).contains("2 of 2 operations failed"));

    let scan = |args: &[&str]| -> Value {
        let args = [&["scan", "--json"], args].concat();
        serde_json::from_str(&cluster.torc(&args)).unwrap()
    };
    let all = scan(&["--prefix", "k", "--r", "1"]);
    assert_eq!(all["keys"].as_array().unwrap().len(), 1100);
    assert!(all["cursor"].is_null());
    let first = scan(&["--prefix", "k", "--limit", "1050"]);
    assert_eq!(first["keys"].as_array().unwrap().len(), 1050);
    let cursor = first["cursor"].as_str().unwrap();
    let rest = scan(&["--prefix", "k", "--cursor", cursor]);
    assert_eq!(rest["keys"].as_array().unwrap().len(), 50);
    assert_eq!(
        scan(&["--prefix", "none"]),
        json!({"keys": [], "cursor": null})
    );

    // Nobody reads what comes.
    let mut listing = cluster
        .command(&["scan"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(listing.stdout.take());
    let mut said = String::new();
    let mut stderr = listing.stderr.take().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    let status = listing.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGPIPE), "{status}");
    assert_eq!(said, "");
}

#[test]
fn a_node_that_is_stopped_is_not_waited_for() {
    let cluster = Cluster::start(1, 1, &[]);
    let signal = |name: &str| {
        let pid = cluster.pid(0).to_string();
        let status = Command::new("kill").args([name, &pid]).status().unwrap();
        assert!(status.success());
    };
    signal("-STOP");
    let begun = Instant::now();
    let output = outcome(&cluster, &["get", "key", "--timeout-ms", "1000"]);
    let took = begun.elapsed();
    signal("-CONT");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("no answer within 3 s"),
        "{}",
        text(&output.stderr)
    );
    assert!(took < Duration::from_secs(20), "{took:?}");
}

#[test]
fn what_only_one_replica_can_do_is_done_and_what_it_cannot_is_told() {
    let mut cluster = Cluster::start(3, 1, &[]);
    cluster.torc(&["put", "key", "one", "--w", "all"]);
    // Peers may not know yet that they are up.
    let repaired = || outcome(&cluster, &["repair"]);
    wait_until(|| text(&repaired().stderr), || repaired().status.success());
    cluster.kill(1);
    cluster.kill(2);
    let strict = outcome(&cluster, &["put", "key", "two"]);
    assert_eq!(strict.status.code(), Some(1));
    cluster.torc(&["put", "key", "two", "--w", "1"]);
    assert_eq!(cluster.torc(&["get", "key", "--r", "1"]), "two");
    cluster.torc(&["put", "key", "three", "--w", "1", "--r", "1"]);
    assert_eq!(cluster.torc(&["get", "key", "--r", "1"]), "three");
    cluster.torc(&["delete", "key", "--w", "1"]);
    assert_eq!(
        outcome(&cluster, &["get", "key", "--r", "1"]).status.code(),
        Some(3)
    );
    let repaired = outcome(&cluster, &["repair"]);
    let message = text(&repaired.stderr);
    assert_eq!(repaired.status.code(), Some(1), "{message}");
    assert!(message.contains("ranges are not repaired"), "{message}");
}
