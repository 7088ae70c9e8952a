//! `torc dev`.

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
