//! `torc dev`.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use crate::cluster::{TORC, port_base, scratch, text};

#[test]
fn dev_runs_a_command_against_three_nodes_and_leaves_nothing() {
    let temporary = scratch();
    let base = port_base(3).to_string();
    let script = format!(
        "{TORC} put greeting hello >/dev/null && {TORC} get greeting && echo && {TORC} status --json; exit 7"
    );
    let output = Command::new(TORC)
        .args([
            "dev",
            "--nodes",
            "3",
            "--port-base",
            &base,
            "--run",
            "sh",
            "-c",
            &script,
        ])
        .env("TMPDIR", temporary.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(
        output.status.code(),
        Some(7),
        "the command's status is dev's\n{out}\n{err}"
    );
    assert!(out.contains("hello"), "{out}\n{err}");
    for expected in [
        "3 nodes are ready",
        "pid ",
        "torc.log",
        "http http://127.0.0.1:",
    ] {
        assert!(out.contains(expected), "{expected} is missing in {out}");
    }
    let status = out
        .lines()
        .find(|line| line.starts_with('{'))
        .expect("a line of JSON");
    let status: serde_json::Value = serde_json::from_str(status).unwrap();
    let nodes = status["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 3);
    assert!(nodes.iter().all(|node| node["state"] == "up"), "{nodes:?}");
    let left: Vec<_> = std::fs::read_dir(temporary.path()).unwrap().collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    let pids = out.lines().filter_map(|line| line.split("pid ").nth(1));
    for pid in pids.filter_map(|rest| rest.split_whitespace().next()) {
        assert!(
            !std::path::Path::new("/proc").join(pid).exists(),
            "process {pid} still runs"
        );
    }
}

#[test]
fn a_cluster_with_a_directory_keeps_its_data() {
    let dir = scratch();
    let home = dir.path().to_str().unwrap();
    for (command, expected) in [("put kept here", ""), ("get kept", "here")] {
        let base = port_base(1).to_string();
        let script = format!("{TORC} {command}");
        let output = Command::new(TORC)
            .args(["dev", "--nodes", "1", "--dir", home, "--port-base", &base])
            .args(["--run", "sh", "-c", &script])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stdout).contains(expected));
    }
}

#[test]
fn a_cluster_whose_last_node_ends_has_failed_and_can_be_started_as_it_was() {
    let dir = scratch();
    let base = port_base(1).to_string();
    let mut dev = Command::new(TORC)
        .args(["dev", "--nodes", "1", "--port-base", &base])
        .args(["--set", "durability.fsync=always"])
        .args(["--dir", dir.path().to_str().unwrap()])
        .env("TORC_MEMORY_CACHE_MB", "7")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(dev.stdout.take().unwrap());
    let mut lines = out.lines().map(Result::unwrap);
    let first = lines.next().unwrap();
    assert!(first.contains("1 node is ready"), "{first}");
    let node = lines.next().unwrap();
    let pid = node.split("pid ").nth(1).unwrap();
    let pid = pid.split_whitespace().next().unwrap();
    // Nobody reads the rest of the report.
    drop(lines);
    let killed = Command::new("kill").args(["-KILL", pid]).status().unwrap();
    assert!(killed.success());
    let status = dev.wait().unwrap();
    let mut said = String::new();
    let mut err = dev.stderr.take().unwrap();
    err.read_to_string(&mut said).unwrap();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("every node has ended"), "{said}");
    let file = std::fs::read_to_string(dir.path().join("n1/torc.toml")).unwrap();
    for line in ["fsync = \"always\"", "cache_mb = 7"] {
        assert!(file.contains(line), "{file}");
    }
}
