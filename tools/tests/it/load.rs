//! `torc load` as its users run it, against real servers and agents.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::cluster::{Cluster, TORC, run, scratch, text};

/// A child that says where it listens; killed in the end.
struct Listening {
    child: Child,
    address: String,
}

impl Listening {
    /// Starts `torc load …`, which prints its address as the last word of its first line.
    fn start(args: &[&str]) -> Self {
        let mut child = Command::new(TORC)
            .arg("load")
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line.split_whitespace().last().unwrap().to_owned();
        Self { child, address }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn json(path: &std::path::Path) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn two_agents_fill_load_and_verify_as_one_machine_does() {
    let cluster = Cluster::start(1, 2, &[]);
    let agents = [(); 2].map(|()| Listening::start(&["agent", "--listen", "127.0.0.1:0"]));
    let dir = scratch();
    let out = dir.path().join("out");
    let report = cluster.torc(&[
        "load",
        "--agents",
        &agents[0].address,
        "--agents",
        &agents[1].address,
        "--keys",
        "2000",
        "--rate",
        "1000",
        "--duration",
        "2s",
        "--warmup",
        "0s",
        "--mix",
        "read=50,write=30,insert=10,modify=10",
        "--check-all",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert!(report.contains("2 agents"), "{report}");
    assert!(
        report.contains(" 0 wrong, 0 acknowledged writes lost"),
        "{report}"
    );
    let result = json(&out.join("run.json"));
    let done = result["operations_done"].as_f64().unwrap();
    assert!(
        (1_700.0..2_300.0).contains(&done),
        "{done} of 1000/s in 2 s"
    );
    assert_eq!(
        result["client"]["threads_busy"].as_array().unwrap().len(),
        2
    );
    // Shards of the node are told apart.
    assert_eq!(result["targets"], serde_json::json!(["n1/0", "n1/1"]));
    let hlog = std::fs::read_to_string(out.join("latency.hlog")).unwrap();
    assert!(hlog.contains("Tag=read.intended,0.000,1.000,"), "{hlog}");
    assert!(out.join("report.html").exists() && out.join("intervals.csv").exists());
}

#[test]
fn every_operation_is_verified_over_every_protocol_that_has_it() {
    let cluster = Cluster::start(3, 1, &[]);
    for (protocol, mix) in [
        (
            "binary",
            "read=4,write=2,insert=1,modify=1,delete=1,scan=1,batch=1",
        ),
        ("http", "read=4,write=2,insert=1,modify=1,delete=1,scan=1"),
    ] {
        let report = cluster.torc(&[
            "load",
            "--protocol",
            protocol,
            "--keys",
            "500",
            "--rate",
            "500",
            "--duration",
            "2s",
            "--warmup",
            "0s",
            "--value-bytes",
            "uniform:16-3000",
            "--distribution",
            "zipf",
            "--mix",
            mix,
            "--check-all",
        ]);
        assert!(
            report.contains(" 0 wrong, 0 acknowledged writes lost"),
            "{report}"
        );
        assert!(report.contains("refused 0, in doubt 0"), "{report}");
        for operation in mix.split(',').map(|part| part.split_once('=').unwrap().0) {
            assert!(
                report.contains(&format!("\n{operation} ")),
                "{operation}: {report}"
            );
        }
    }
}

#[test]
fn comparisons_and_knees_end_with_a_verdict_and_one_report() {
    let server = Listening::start(&["selftest", "--serve", "127.0.0.1:0"]);
    let dir = scratch();
    let out = dir.path().to_str().unwrap();
    let common = [
        "--address",
        &server.address,
        "--protocol",
        "resp",
        "--no-fill",
        "--may-evict",
    ];
    let quick = ["--duration", "200ms", "--warmup", "0s", "--rate", "2000"];
    let mut args = vec![
        "load",
        "compare",
        "--run",
        "a=--keys 100",
        "--run",
        "b=--keys 100",
    ];
    args.extend(
        ["--repeats", "2", "--out", out, "--"]
            .iter()
            .chain(&common)
            .chain(&quick),
    );
    let output = run(&args);
    let words = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(words.contains("cannot tell: 2 + 2 runs"), "{words}");
    assert!(dir.path().join("report.html").exists());
    // What was recorded can be judged and reported again.
    let recorded = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (a, b) = (recorded("a-1.json"), recorded("b-1.json"));
    let again = run(&["load", "compare", "--before", &a, "--after", &b]);
    assert!(again.status.success(), "{}", text(&again.stderr));
    let page = recorded("page.html");
    assert!(
        run(&["load", "report", &a, &b, "-o", &page])
            .status
            .success()
    );
    let mut args = vec![
        "load",
        "knee",
        "--slo",
        "p50<1us",
        "--from",
        "64",
        "--repeats",
        "1",
    ];
    args.extend(
        common
            .iter()
            .chain(&["--duration", "100ms", "--warmup", "0s"]),
    );
    let output = run(&args);
    let words = text(&output.stdout);
    assert!(
        words.contains("none: no rate held"),
        "{words}{}",
        text(&output.stderr)
    );
}
