//! Nothing acknowledged is lost, whatever is killed.

use std::process::{Child, Stdio};
use std::time::Duration;

use crate::cluster::{Cluster, text};

/// Starts a load in the background whose own checks fail it when anything acknowledged is missing
/// or any byte is wrong.
fn load(cluster: &Cluster, seconds: u32, protocol: &str) -> Child {
    cluster
        .command(&[
            "load",
            "--protocol",
            protocol,
            "--keys",
            "500",
            "--connections",
            "16",
            "--model",
            "closed",
            "--warmup",
            "0s",
        ])
        .args([
            "--duration",
            &format!("{seconds}s"),
            "--timeout-ms",
            "1000",
            "--check-all",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(load: Child) -> String {
    let output = load.wait_with_output().unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(
        output.status.success(),
        "the load found a fault:\n{out}\n{err}"
    );
    out
}

#[test]
fn killing_one_node_under_load_loses_nothing() {
    let mut cluster = Cluster::start(3, 2, &[]);
    let load = load(&cluster, 8, "binary");
    std::thread::sleep(Duration::from_secs(2));
    cluster.kill(1);
    std::thread::sleep(Duration::from_secs(2));
    cluster.spawn(1);
    cluster.wait_ready();
    let report = finish(load);
    assert!(
        report.contains(" 0 wrong, 0 acknowledged writes lost"),
        "{report}"
    );
}

/// Kills three nodes at once `times` times, under load.
fn kill_all(times: u32) {
    let mut cluster = Cluster::start(3, 1, &[]);
    let load = load(&cluster, times * 5 / 2, "http");
    for _ in 0..times {
        std::thread::sleep(Duration::from_secs(1));
        for node in 0..cluster.len() {
            cluster.kill(node);
        }
        for node in 0..cluster.len() {
            cluster.spawn(node);
        }
        cluster.wait_ready();
    }
    let report = finish(load);
    assert!(
        report.contains(" 0 wrong, 0 acknowledged writes lost"),
        "{report}"
    );
}

#[test]
fn killing_all_nodes_at_once_ten_times_under_load_loses_nothing() {
    kill_all(10);
}

#[test]
#[ignore = "takes minutes; part of .ci/night"]
fn two_hundred_kills_under_load_lose_nothing() {
    kill_all(70);
}

#[test]
#[ignore = "takes minutes; the same as above at the size that operators ask about"]
fn a_hundred_thousand_keys_outlive_a_killed_node() {
    let mut cluster = Cluster::start(3, 1, &[]);
    let load = cluster
        .command(&["load", "--protocol", "binary", "--keys", "100000"])
        .args(["--value-bytes", "1024", "--w", "2", "--r", "2"])
        .args(["--connections", "64", "--timeout-ms", "2000", "--check-all"])
        .args(["--model", "closed", "--warmup", "0s", "--duration", "40s"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    for node in [1, 2] {
        std::thread::sleep(Duration::from_secs(10));
        cluster.kill(node);
        std::thread::sleep(Duration::from_secs(5));
        cluster.spawn(node);
        cluster.wait_ready();
    }
    let report = finish(load);
    println!("{report}");
    assert!(
        report.contains(" 0 wrong, 0 acknowledged writes lost"),
        "{report}"
    );
}

#[test]
fn a_killed_node_starts_again_at_once() {
    let mut cluster = Cluster::start(1, 1, &[]);
    // The kernel takes the old process's ring, and with it its ports, down after the process.
    for _ in 0..15 {
        cluster.kill(0);
        cluster.spawn(0);
        cluster.wait_ready();
    }
    cluster.torc(&["put", "after", "all"]);
}

#[test]
fn a_node_that_was_down_is_made_whole_by_hints_or_by_repair() {
    for hints in [true, false] {
        let mut cluster = Cluster::start(3, 1, &[&format!("cluster.hints={hints}")]);
        cluster.kill(2);
        cluster.torc(&[
            "load",
            "fill",
            "--keys",
            "300",
            "--protocol",
            "http",
            "--w",
            "2",
        ]);
        cluster.spawn(2);
        cluster.wait_ready();
        if !hints {
            cluster.torc(&["repair"]);
        }
        // Only the returned node is left to answer: what it reads is what it holds.
        let returned = cluster.endpoint(2);
        let mut last = String::new();
        let whole = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(200));
            let output = cluster
                .command(&[
                    "load",
                    "verify",
                    "--keys",
                    "300",
                    "--protocol",
                    "http",
                    "--r",
                    "1",
                ])
                .args(["--address", returned.trim_start_matches("http://")])
                .args(["--endpoint", &returned])
                .output()
                .unwrap();
            last = text(&output.stdout) + &text(&output.stderr);
            output.status.success()
        });
        assert!(whole, "hints {hints}: {last}");
    }
}
