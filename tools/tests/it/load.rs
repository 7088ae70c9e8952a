//! `torc load` as its users run it, against real servers and agents.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, TORC, run, scratch, text};
use crate::memcached;

/// A child that says where it listens; killed in the end.
pub struct Listening {
    pub child: Child,
    pub address: String,
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

impl Listening {
    /// A server that does nothing, for loads that only look at the client.
    pub fn null_server() -> Self {
        Self::start(&["selftest", "--serve", "127.0.0.1:0"])
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

pub fn json(path: &std::path::Path) -> serde_json::Value {
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
        assert_all_done_and_verified(&report, mix);
    }
}

/// Every operation of the mix was done, none failed, and verification found nothing.
fn assert_all_done_and_verified(report: &str, mix: &str) {
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

#[test]
fn comparisons_and_knees_end_with_a_verdict_and_one_report() {
    let server = Listening::null_server();
    let dir = scratch();
    let out = dir.path().to_str().unwrap();
    let common = on_null_server(&server.address);
    let quick = ["--duration", "200ms", "--rate", "2000"];
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
    args.extend(common.iter().chain(&["--duration", "100ms"]));
    let output = run(&args);
    let words = text(&output.stdout);
    assert!(
        words.contains("none: no rate held"),
        "{words}{}",
        text(&output.stderr)
    );
}

/// A program of another project, e.g. memcached, on a free port of this machine; killed in the end.
struct Peer {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Peer {
    /// Starts `program` with the arguments that `args` makes of a port and a directory, and waits
    /// until it accepts. `None` where it is not installed.
    fn start(program: &str, args: impl Fn(u16, &str) -> Vec<String>) -> Option<Self> {
        let dir = scratch();
        let port = crate::cluster::port_base(1);
        let started = Command::new(program)
            .args(args(port, dir.path().to_str().unwrap()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                eprintln!("{program}: {error}; not measured here");
                return None;
            }
        };
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("{program} ended ({status})");
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "{program}");
            std::thread::yield_now();
        }
        Some(Self {
            child,
            port,
            _dir: dir,
        })
    }

    fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Fills, loads and checks all keys of a peer with every operation that its protocol has.
fn every_operation_is_verified_on(address: &str, protocol: &str, mix: &str) {
    let output = run(&[
        "load",
        "--protocol",
        protocol,
        "--address",
        address,
        "--keys",
        "300",
        "--rate",
        "300",
        "--duration",
        "2s",
        "--warmup",
        "0s",
        "--no-settle",
        "--value-bytes",
        "uniform:16-3000",
        "--mix",
        mix,
        "--check-all",
    ]);
    let report = text(&output.stdout);
    assert!(output.status.success(), "{report}{}", text(&output.stderr));
    assert_all_done_and_verified(&report, mix);
}

#[test]
fn memcached_is_filled_loaded_and_verified() {
    let started = Peer::start("memcached", |port, _| {
        let port = port.to_string();
        ["-u", "root", "-l", "127.0.0.1", "-U", "0", "-p", &port]
            .map(str::to_owned)
            .to_vec()
    });
    if let Some(peer) = started {
        every_operation_is_verified_on(
            &peer.address(),
            "memcached",
            "read=4,write=2,insert=1,modify=1,delete=1,batch=1",
        );
    }
}

#[test]
fn memcacheds_protocol_is_verified_where_no_memcached_is_installed() {
    let address = memcached::start(false);
    every_operation_is_verified_on(
        &address,
        "memcached",
        "read=4,write=2,insert=1,modify=1,delete=1,batch=1",
    );
}

#[test]
fn a_memcached_that_forgets_an_acknowledged_write_is_found_out() {
    let address = memcached::start(true);
    let mut args = vec!["load", "--protocol", "memcached", "--address", &address];
    args.extend(["--keys", "100", "--reads", "50", "--rate", "2000"]);
    args.extend(["--duration", "500ms", "--warmup", "0s", "--no-settle"]);
    let output = run(&args);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{words}");
    assert!(words.contains("acknowledged writes lost"), "{words}");
    // A cache may.
    args.push("--may-evict");
    let output = run(&args);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn redis_is_filled_loaded_and_verified() {
    let started = Peer::start("redis-server", |port, dir| {
        let port = port.to_string();
        ["--port", &port, "--save", "", "--dir", dir]
            .map(str::to_owned)
            .to_vec()
    });
    if let Some(peer) = started {
        every_operation_is_verified_on(
            &peer.address(),
            "resp",
            "read=4,write=2,insert=1,modify=1,delete=1,scan=1,batch=1",
        );
    }
}

#[test]
fn etcd_is_filled_loaded_and_verified() {
    let started = Peer::start("etcd", |port, dir| {
        let client = format!("http://127.0.0.1:{port}");
        let internal = format!("http://127.0.0.1:{}", port + 1);
        let cluster = format!("default={internal}");
        [
            "--data-dir",
            dir,
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
            "--listen-peer-urls",
            &internal,
            "--initial-advertise-peer-urls",
            &internal,
            "--initial-cluster",
            &cluster,
        ]
        .map(str::to_owned)
        .to_vec()
    });
    if let Some(peer) = started {
        every_operation_is_verified_on(
            &peer.address(),
            "etcd",
            "read=4,write=2,insert=1,modify=1,delete=1",
        );
    }
}

#[test]
fn a_sweep_measures_each_rate_and_writes_one_report() {
    let server = Listening::null_server();
    let dir = scratch();
    let out = dir.path().join("out");
    let mut args = vec![
        "load", "sweep", "--from", "500", "--to", "2000", "--steps", "3",
    ];
    args.extend(on_null_server(&server.address));
    args.extend(["--duration", "300ms", "--out", out.to_str().unwrap()]);
    let output = run(&args);
    let words = text(&output.stdout);
    assert!(output.status.success(), "{words}{}", text(&output.stderr));
    assert_eq!(words.lines().count(), 3, "{words}");
    let runs = json(&out.join("runs.json"));
    let offered: Vec<f64> = runs
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run["offered_per_s"].as_f64().unwrap().round())
        .collect();
    assert_eq!(offered, [500.0, 1000.0, 2000.0]);
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("1000/s"), "each rate is named");
}

#[test]
fn a_traces_requests_are_made_once_each_in_its_time_and_verified() {
    let cluster = Cluster::start(1, 1, &[]);
    let dir = scratch();
    let trace = dir.path().join("trace.csv");
    let mut lines = String::new();
    for number in 0..600 {
        let (second, key) = (number / 200, number % 50);
        let operation = ["set", "get", "get", "delete", "incr"][number % 5];
        lines += &format!("{second},k{key},2,{},1,{operation},0\n", 16 + number);
    }
    std::fs::write(&trace, lines).unwrap();
    let out = dir.path().join("out");
    let report = cluster.torc(&[
        "load",
        "replay",
        trace.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
    ]);
    assert!(
        report.contains(" 0 wrong, 0 acknowledged writes lost"),
        "{report}"
    );
    let result = json(&out.join("run.json"));
    let done = |operation: &str| result["operations"][operation]["done"].as_u64().unwrap();
    assert_eq!(
        (done("read"), done("write"), done("delete")),
        (240, 120, 120),
        "counters are left out: {report}"
    );
    let seconds = result["seconds"].as_f64().unwrap();
    assert!(seconds >= 2.0, "{seconds} s of three");
}

#[test]
fn a_traces_requests_that_find_no_connection_in_time_are_made_late() {
    let server = Listening::start(&["selftest", "--serve", "127.0.0.1:0", "--work", "5ms"]);
    let dir = scratch();
    let trace = dir.path().join("trace.csv");
    // Two seconds of work are due within one.
    let lines: String = (0..400)
        .map(|number| format!("0,k{number},2,16,1,get,0\n"))
        .collect();
    std::fs::write(&trace, lines).unwrap();
    let out = dir.path().join("out");
    let mut args = vec!["load", "replay", trace.to_str().unwrap()];
    args.extend(["--address", &server.address, "--protocol", "resp"]);
    args.extend(["--connections", "1", "--out", out.to_str().unwrap()]);
    let output = run(&args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let result = json(&out.join("run.json"));
    assert_eq!(result["operations"]["read"]["done"], 400);
}

/// Options for a null server.
pub fn on_null_server(address: &str) -> [&str; 8] {
    [
        "--address",
        address,
        "--protocol",
        "resp",
        "--no-fill",
        "--may-evict",
        "--warmup",
        "0s",
    ]
}

/// The words of a run on a null server.
pub fn run_on_null_server<'a>(address: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["load", "run"], on_null_server(address).as_slice(), more].concat()
}

/// Runs a load of a cluster whose only value was replaced by `value`.
fn a_replaced_value_ends_with(mode: &[&str], status: i32) {
    let cluster = Cluster::start(1, 1, &[]);
    cluster.torc(&["put", "key000000000000", "not ours, but long enough"]);
    let mut args = vec!["load"];
    args.extend(mode);
    args.extend([
        "--keys",
        "1",
        "--no-fill",
        "--reads",
        "100",
        "--duration",
        "200ms",
        "--warmup",
        "0s",
    ]);
    let output = cluster.command(&args).output().unwrap();
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{words}");
    assert!(words.contains("verification failed"), "{words}");
}

#[test]
fn a_wrong_value_has_an_exit_status_of_its_own() {
    a_replaced_value_ends_with(&["run", "--require-valid"], 4);
}

#[test]
fn a_wrong_value_fails_a_sweep_too() {
    a_replaced_value_ends_with(
        &["sweep", "--from", "500", "--to", "500", "--steps", "2"],
        4,
    );
}

#[test]
fn an_invalid_run_fails_only_when_validity_is_required() {
    let server = Listening::null_server();
    // More than one connection can carry: most operations are never sent.
    let load = [
        "--duration",
        "200ms",
        "--rate",
        "2000000",
        "--connections",
        "1",
    ];
    let mut args = run_on_null_server(&server.address, &load);
    let output = run(&args);
    let words = text(&output.stdout);
    assert!(output.status.success(), "{words}{}", text(&output.stderr));
    assert!(words.contains("INVALID"), "{words}");
    args.push("--require-valid");
    let output = run(&args);
    assert_eq!(output.status.code(), Some(5), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("never sent"));
}

#[test]
fn a_place_that_cannot_be_written_is_refused_before_the_run() {
    let server = Listening::null_server();
    let dir = scratch();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let below_a_file = file.join("out");
    let directory = dir.path().to_str().unwrap();
    for (option, place) in [
        ("--out", below_a_file.to_str().unwrap()),
        ("--json", below_a_file.to_str().unwrap()),
        ("--json", directory),
    ] {
        let args = run_on_null_server(&server.address, &["--duration", "200ms", option, place]);
        let output = run(&args);
        let words = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(words.contains(place), "{words}");
        assert_eq!(text(&output.stdout), "", "nothing was measured");
    }
}

#[test]
fn a_full_disk_is_named_and_the_report_is_printed_all_the_same() {
    let server = Listening::null_server();
    let args = run_on_null_server(
        &server.address,
        &["--duration", "200ms", "--json", "/dev/full"],
    );
    let output = run(&args);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(
        words.contains("/dev/full") && words.contains("space"),
        "{words}"
    );
    assert!(text(&output.stdout).contains("latency, ms"));
}

#[test]
fn a_report_that_cannot_be_printed_is_a_failure() {
    let server = Listening::null_server();
    let args = run_on_null_server(&server.address, &["--duration", "200ms"]);
    let full = std::fs::File::options().write(true).open("/dev/full");
    let output = Command::new(TORC)
        .args(&args)
        .stdout(full.unwrap())
        .output()
        .unwrap();
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(
        words.contains("standard output") && words.contains("space"),
        "{words}"
    );
}

#[test]
fn an_agent_that_is_gone_in_the_middle_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let agent = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        for line in BufReader::new(stream.try_clone().unwrap()).lines() {
            match line.unwrap() {
                line if line.contains("Ping") => stream.write_all(b"\"Pong\"\n").unwrap(),
                line if line.contains("Prepare") => stream.write_all(b"\"Ready\"\n").unwrap(),
                _ => break,
            }
        }
    });
    let mut args = vec!["load", "--agents", &address];
    args.extend(on_null_server("127.0.0.1:1"));
    let output = run(&args);
    agent.join().unwrap();
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(
        words.contains(&address) && words.contains("it ended before the run did"),
        "{words}"
    );
}

#[test]
fn threads_that_cannot_be_placed_are_refused_before_the_run() {
    let server = Listening::null_server();
    let args = run_on_null_server(&server.address, &["--cpus", "60000"]);
    let output = run(&args);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("--cpus 60000"), "{words}");
    assert_eq!(text(&output.stdout), "", "nothing was measured");
}

#[test]
fn more_connections_than_local_ports_are_refused_with_the_remedy() {
    let server = Listening::null_server();
    // No range of ports has so many.
    let args = run_on_null_server(&server.address, &["--connections", "70000"]);
    let output = run(&args);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words}");
    let remedies = ["--connections 70000", "ulimit -Hn", "ip_local_port_range"];
    assert!(words.contains(remedies[0]), "{words}");
    // Whichever this machine has fewer of.
    assert!(
        remedies[1..].iter().any(|remedy| words.contains(remedy)),
        "{words}"
    );
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let server = Listening::null_server();
    let args = run_on_null_server(&server.address, &["--duration", "200ms"]);
    let mut child = Command::new(TORC)
        .args(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
}

#[test]
fn a_rate_that_is_no_number_is_refused_in_every_mode() {
    for mode in [
        ["run", "--rate", "nan"].as_slice(),
        &["run", "--rate", "-5"],
        &["sweep", "--from", "nan", "--to", "500"],
        &["sweep", "--from", "500", "--to", "nan"],
        &["knee", "--from", "nan"],
        &["knee", "--from", "1e9"],
    ] {
        let output = run(&[&["load"], mode].concat());
        let words = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{mode:?}: {words}");
        assert!(
            words.contains("above zero and at most 100000000"),
            "{words}"
        );
    }
}

#[test]
fn an_address_where_nobody_listens_is_named_at_once() {
    let address = format!("127.0.0.1:{}", crate::cluster::port_base(1));
    let output = run(&["load", "--protocol", "resp", "--address", &address]);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains(&address) && words.contains("is a server running there?"));
}

#[test]
fn a_keyspace_that_is_not_there_is_refused_before_the_load() {
    let cluster = Cluster::start(1, 1, &[]);
    let endpoint = cluster.endpoint(0);
    let address = endpoint.trim_start_matches("http://");
    for server in [
        ["--endpoint", &endpoint, "--protocol", "binary"],
        ["--endpoint", &endpoint, "--protocol", "http"],
        ["--address", address, "--protocol", "http"],
    ] {
        let begun = Instant::now();
        let output = run(&[["load", "--keyspace", "nope"].as_slice(), &server].concat());
        let words = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{server:?}: {words}");
        assert_eq!(words.lines().count(), 1, "{words}");
        assert!(words.contains("--keyspace nope"), "{words}");
        assert!(begun.elapsed() < Duration::from_secs(5), "not at once");
    }
}

#[test]
fn a_server_that_speaks_something_else_gets_no_load() {
    let server = Listening::null_server();
    let output = run(&[
        "load",
        "fill",
        "--protocol",
        "binary",
        "--address",
        &server.address,
    ]);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(
        words.contains("0 of 64 connections stand") && words.contains("speak this --protocol"),
        "{words}"
    );
}

#[test]
fn connections_that_cannot_be_made_are_reported_as_such() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // The server is there when it is looked for, and gone when the load begins.
    let server = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let args = run_on_null_server(&address, &["--duration", "500ms"]);
    let output = run(&args);
    server.join().unwrap();
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert_eq!(text(&output.stdout), "", "nothing was measured");
    assert!(
        words.contains("0 of 64 connections stand") && words.contains(&address),
        "{words}"
    );
}
