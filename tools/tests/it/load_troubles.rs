//! `torc load` when something goes wrong around it: disks, traces, servers.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use crate::cluster::{TORC, run, scratch, serving, text};
use crate::load::{Listening, json, on_null_server, run_on_null_server};
use crate::pages::{self, Fault};

/// Runs a load whose `--out` is `place` with a file system of 128 KiB of its own there, which holds an old result of
/// `old_bytes` and is gone with the program. Returns what that was afterwards; `None` where it is not allowed.
fn on_a_small_disk(place: &str, old_bytes: usize, load: &[&str]) -> Option<(Output, String)> {
    // Seen by nobody else.
    let script = "mount -t tmpfs -o size=128k none \"$0\" || exit 77; cd \"$0\" || exit 77; \
                  head -c $1 /dev/zero | tr '\\0' x > run.json; shift; \"$@\"; status=$?; \
                  ls -A >&2; tr -d x < run.json >&2; wc -c < run.json >&2; exit $status";
    let output = Command::new("unshare")
        .args([
            "--mount",
            "sh",
            "-c",
            script,
            place,
            &old_bytes.to_string(),
            TORC,
        ])
        .args(load)
        .output();
    match output {
        Ok(output) if output.status.code() != Some(77) => {
            let words = text(&output.stderr);
            (!words.contains("unshare")).then_some((output, words))
        }
        _ => None,
    }
}

#[test]
fn a_full_disk_fails_by_name_after_the_report_is_printed_and_leaves_the_old_result() {
    let server = Listening::null_server();
    let dir = scratch();
    let place = dir.path().to_str().unwrap();
    let more = ["--duration", "200ms", "--out", place, "--live", "off"];
    let mut load = run_on_null_server(&server.address, &more);
    // On another disk, which has room.
    let elsewhere = scratch();
    let other = elsewhere.path().join("result.json");
    std::fs::write(&other, "old").unwrap();
    load.extend(["--json", other.to_str().unwrap()]);
    let old_bytes = 120_000;
    let Some((output, words)) = on_a_small_disk(place, old_bytes, &load) else {
        eprintln!("not available here: a disk of its own (needs root)");
        return;
    };
    let report = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{report}{words}");
    assert!(report.contains("latency, ms"), "{report}");
    let said = words
        .lines()
        .find(|line| line.contains("space"))
        .unwrap_or("");
    assert!(said.contains(&format!("{place}/run.json: ")), "{words}");
    assert!(said.ends_with("; the old file is untouched"), "{words}");
    let left: Vec<&str> = words.lines().rev().take(2).collect();
    assert_eq!(left, [&old_bytes.to_string()[..], "run.json"], "{words}");
    assert_eq!(std::fs::read_to_string(&other).unwrap(), "old");
}

#[test]
fn what_a_scan_returns_is_checked_as_if_it_had_been_read() {
    for (fault, words) in [
        (Fault::None, ""),
        (Fault::Old, "was acknowledged before"),
        (Fault::Exchanged, "the value of key"),
        (Fault::Damaged, "a wrong byte"),
        (Fault::Twice, "twice on a page of a scan"),
    ] {
        let address = pages::start(fault);
        let mut args = vec!["load", "--protocol", "http", "--address", &address];
        args.extend([
            "--keys",
            "50",
            "--mix",
            "write=90,scan=10",
            "--rate",
            "2000",
        ]);
        args.extend(["--duration", "500ms", "--warmup", "0s", "--no-settle"]);
        let output = run(&args);
        let (report, said) = (text(&output.stdout), text(&output.stderr));
        let status = if fault == Fault::None { 0 } else { 4 };
        assert_eq!(
            output.status.code(),
            Some(status),
            "{fault:?}: {report}{said}"
        );
        assert!(report.contains(words), "{fault:?}: {report}");
        let done = |name| !report.contains(&format!("{name:<9} done 0,"));
        assert!(report.contains("scan ") && done("scan"), "{report}");
    }
}

#[test]
fn a_trace_that_is_none_is_refused_by_name_before_any_load() {
    let server = Listening::null_server();
    let dir = scratch();
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let rubbish = write("rubbish", b"\xff\xfe\x00\x01\n\xff\n");
    let prose = write("prose", b"It was a dark\nand stormy night\n");
    let empty = write("empty", b"");
    let missing = dir.path().join("missing").to_str().unwrap().to_owned();
    let directory = dir.path().to_str().unwrap().to_owned();
    for (trace, why) in [
        (&rubbish, "UTF-8"),
        (&prose, "no request"),
        (&empty, "no request"),
        (&missing, "No such file"),
        (&directory, "directory"),
    ] {
        let mut args = vec!["load", "replay", trace];
        args.extend(on_null_server(&server.address));
        let output = run(&args);
        let words = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{trace}: {words}");
        assert!(words.contains(trace) && words.contains(why), "{words}");
        assert_eq!(text(&output.stdout), "", "nothing was measured");
    }
}

#[test]
fn a_server_that_is_killed_in_the_middle_makes_the_run_invalid_and_the_report_says_why() {
    let mut server = Listening::null_server();
    let dir = scratch();
    let out = dir.path().join("out");
    let mut load = run_on_null_server(&server.address, &["--duration", "4s", "--rate", "2000"]);
    load.extend(["--timeout-ms", "1000", "--require-valid"]);
    load.extend(["--out", out.to_str().unwrap()]);
    // The first picture is drawn after the first second.
    let (child, mut view, mut words) = shown(&load, "of at most 4 s");
    server.child.kill().unwrap();
    view.read_to_string(&mut words).unwrap();
    let output = child.wait_with_output().unwrap();
    let report = text(&output.stdout);
    assert_eq!(output.status.code(), Some(5), "{report}{words}");
    assert!(
        report.contains("INVALID") && report.contains("connections broke or could not be made"),
        "{report}"
    );
    assert!(report.contains(&server.address), "{report}");
    let result = json(&out.join("run.json"));
    let done = result["operations_done"].as_u64().unwrap();
    assert!(done > 0, "before it was killed");
    // What was due after that is in the percentiles, as late as it is.
    let unsent = result["unsent"].as_u64().unwrap();
    assert!(unsent > 0 && done + unsent > 7_000, "{done} + {unsent}");
    assert!(report.contains(">="), "{report}");
}

/// A load, its view, and what that has said when it shows this.
fn shown(load: &[&str], shows: &str) -> (Child, BufReader<ChildStderr>, String) {
    let mut child = Command::new(TORC)
        .args(load)
        .args(["--live", "on"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut view = BufReader::new(child.stderr.take().unwrap());
    let mut words = String::new();
    while !words.contains(shows) {
        assert!(view.read_line(&mut words).unwrap() > 0, "{words}");
    }
    (child, view, words)
}

/// Sends a signal to a load as soon as its view shows this; returns its end and all that it said.
fn signalled(load: &[&str], shows: &str, signal: &str) -> (Option<i32>, String, String) {
    let (child, mut view, mut words) = shown(load, shows);
    // Twice at once, as `timeout` does: to the program, and to its group.
    let pid = child.id().to_string();
    let sent = Command::new("sh")
        .args(["-c", &format!("kill {signal} {pid}; kill {signal} {pid}")])
        .status();
    assert!(sent.unwrap().success());
    view.read_to_string(&mut words).unwrap();
    let output = child.wait_with_output().unwrap();
    (output.status.code(), text(&output.stdout), words)
}

#[test]
fn a_run_that_is_interrupted_reports_what_it_has_measured() {
    let server = Listening::null_server();
    for (signal, status) in [("-INT", 130), ("-TERM", 143)] {
        let dir = scratch();
        let out = dir.path().to_str().unwrap();
        let more = ["--duration", "60s", "--rate", "1000", "--out", out];
        let load = run_on_null_server(&server.address, &more);
        let (code, report, words) = signalled(&load, "of at most 60 s", signal);
        assert_eq!(code, Some(status), "{report}{words}");
        assert!(
            report.contains("(interrupted)") && report.contains("latency, ms"),
            "{report}{words}"
        );
        let result = json(&dir.path().join("run.json"));
        assert_eq!(result["interrupted"], true);
        let (seconds, rate) = (&result["seconds"], &result["rate_per_s"]);
        assert!(seconds.as_f64().unwrap() < 30.0, "{seconds}");
        assert!(rate.as_f64().unwrap() > 500.0, "of 1000/s: {rate}");
        for file in ["intervals.csv", "latency.hlog", "report.html"] {
            assert!(dir.path().join(file).exists(), "{file}");
        }
    }
}

#[test]
fn what_was_swept_before_an_interrupt_is_written() {
    let server = Listening::null_server();
    let dir = scratch();
    let out = dir.path().to_str().unwrap();
    let mut load = vec!["load", "sweep", "--from", "100", "--to", "300"];
    load.extend(on_null_server(&server.address));
    load.extend(["--duration", "2s", "--out", out]);
    let (code, lines, words) = signalled(&load, "open loop at 117/s", "-INT");
    assert_eq!(code, Some(130), "{lines}{words}");
    let runs = json(&dir.path().join("runs.json"));
    let runs = runs.as_array().unwrap();
    assert_eq!((runs.len(), lines.lines().count()), (2, 2), "{lines}");
    assert_eq!(runs[0]["interrupted"], false);
    assert_eq!(runs[1]["interrupted"], true);
}

#[test]
fn a_check_that_is_given_up_does_not_take_the_report_with_it() {
    // Writes are done and reads refused, one short request at a time.
    let address = serving(|mut stream| {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            let read = bytes[..count].windows(3).any(|word| word == b"GET");
            let answer: &[u8] = if read { b"-ERR no\r\n" } else { b"+OK\r\n" };
            stream.write_all(answer).unwrap();
        }
    });
    let more = ["--duration", "500ms", "--rate", "100", "--connections", "2"];
    let mut load = run_on_null_server(&address, &more);
    load.extend(["--keys", "10", "--reads", "0", "--check-all"]);
    load.extend(["--give-up", "500ms", "--value-bytes", "16"]);
    let output = run(&load);
    let (report, words) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{report}{words}");
    assert!(
        words.contains("with 0 of 10 keys done") && words.contains("ERR no"),
        "{words}"
    );
    assert!(report.contains("write     done"), "{report}");
}

#[test]
fn a_server_that_never_answers_or_hangs_up_is_told_as_that() {
    for (hangs_up, why) in [
        (false, "none was answered"),
        (true, "the server closed the connection"),
    ] {
        let address = serving(move |mut stream| {
            let mut bytes = [0; 4096];
            stream.write_all(b"+PONG\r\n").unwrap();
            let mut greeted = false;
            while let Ok(1..) = stream.read(&mut bytes) {
                if greeted && hangs_up {
                    break;
                }
                greeted = true;
            }
        });
        let more = [
            "--duration",
            "300ms",
            "--timeout-ms",
            "100",
            "--reads",
            "100",
        ];
        let output = run(&run_on_null_server(&address, &more));
        let (report, words) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{report}{words}");
        assert!(words.contains(why), "{words}");
        assert!(report.contains("INVALID"), "{report}");
    }
}

#[test]
fn more_connections_than_open_files_are_refused_with_the_remedy() {
    let server = Listening::null_server();
    let with_limit = |limit: &str, connections: &str| {
        let more = ["--duration", "200ms", "--connections", connections];
        Command::new("sh")
            .args(["-c", &format!("ulimit {limit}; exec \"$@\""), "sh", TORC])
            .args(run_on_null_server(&server.address, &more))
            .output()
            .unwrap()
    };
    let output = with_limit("-n 200", "500");
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words}");
    assert!(
        words.contains("may have 200 open files") && words.contains("ulimit"),
        "{words}"
    );
    assert_eq!(text(&output.stdout), "", "nothing was measured");
    let output = with_limit("-Sn 200", "300");
    let (report, words) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{words}");
    assert!(!report.contains("Too many open files"), "{report}");
}

#[test]
fn a_load_begins_when_ten_thousand_connections_stand() {
    let server = Listening::null_server();
    let connections = "12000";
    let dir = scratch();
    let out = dir.path().to_str().unwrap();
    let more = ["--duration", "300ms", "--rate", "1000", "--out", out];
    let mut load = run_on_null_server(&server.address, &more);
    load.extend(["--connections", connections]);
    let output = run(&load);
    let (report, words) = (text(&output.stdout), text(&output.stderr));
    if words.contains("may have") {
        eprintln!("not available here: {words}");
        return;
    }
    assert!(output.status.success(), "{report}{words}");
    let result = json(&dir.path().join("run.json"));
    assert_eq!(result["errors"], serde_json::json!([]), "{report}");
    assert_eq!(result["unsent"], 0, "{report}");
    assert!(!words.contains("broke"), "{report}{words}");
}

#[test]
fn where_not_all_connections_stand_no_load_is_made_and_the_server_is_quoted() {
    let places = Arc::new(AtomicUsize::new(5));
    let address = serving(move |mut stream| {
        let taken = places.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1));
        let mut bytes = [0; 4096];
        if taken.is_err() {
            stream
                .write_all(b"-ERR max number of clients reached\r\n")
                .ok();
            return;
        }
        while let Ok(1..) = stream.read(&mut bytes) {
            stream.write_all(b"+OK\r\n").unwrap();
        }
    });
    let more = ["--duration", "300ms", "--connections", "8", "--reads", "0"];
    let output = run(&run_on_null_server(&address, &more));
    let (report, words) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{report}{words}");
    assert_eq!(report, "", "nothing was measured");
    assert!(
        words.contains(" of 8 connections stand after 5 s")
            && words.contains("max number of clients"),
        "{words}"
    );
    assert!(words.contains("fewer --connections"), "{words}");
}

#[test]
fn a_password_opens_each_connection_and_is_in_no_result() {
    let address = serving(|mut stream| {
        let mut bytes = [0; 4096];
        let Ok(count @ 1..) = stream.read(&mut bytes) else {
            return;
        };
        let login = b"*3\r\n$4\r\nAUTH\r\n$3\r\nann\r\n$6\r\ns3cret\r\n";
        if !bytes[..count].starts_with(login) {
            stream.write_all(b"-WRONGPASS invalid\r\n").ok();
            return;
        }
        stream.write_all(b"+OK\r\n").unwrap();
        while let Ok(1..) = stream.read(&mut bytes) {
            stream.write_all(b"+OK\r\n").unwrap();
        }
    });
    let dir = scratch();
    let (file, out) = (dir.path().join("password"), dir.path().join("out"));
    let (file, out) = (file.to_str().unwrap(), out.to_str().unwrap());
    std::fs::write(file, "s3cret\n").unwrap();
    let more = ["--duration", "300ms", "--rate", "100", "--reads", "0"];
    let mut load = run_on_null_server(&address, &more);
    load.extend(["--value-bytes", "16", "--connections", "4", "--user", "ann"]);
    let output = run(&load);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words}");
    assert!(words.contains("TORC_LOAD_PASSWORD"), "{words}");
    let with_file = [&load[..], &["--password-file", file, "--out", out]].concat();
    let output = run(&with_file);
    let (report, words) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{report}{words}");
    for name in ["run.json", "report.html"] {
        let result = std::fs::read_to_string(dir.path().join("out").join(name)).unwrap();
        assert!(!result.contains("s3cret") && result.contains("--password-file"));
    }
    let by_variable = |password: &str| {
        let mut command = Command::new(TORC);
        command.args(&load).env("TORC_LOAD_PASSWORD", password);
        command.output().unwrap()
    };
    assert!(by_variable("s3cret").status.success());
    let output = by_variable("other");
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(
        words.contains("0 of 4 connections stand") && words.contains("WRONGPASS"),
        "{words}"
    );
}

#[test]
fn options_that_a_mode_would_ignore_are_refused() {
    let dir = scratch();
    let trace = dir.path().join("trace");
    std::fs::write(&trace, "0,a,1,16,1,set,0\n").unwrap();
    let trace = trace.to_str().unwrap();
    for (load, option) in [
        (["sweep", "--rate", "5"].as_slice(), "--rate"),
        (&["knee", "--model", "closed"], "--model"),
        (&["fill", "--rate", "5"], "--rate"),
        (&["replay", trace, "--mix", "read=1"], "--mix"),
        (&["replay", trace, "--agents", "127.0.0.1:1"], "--agents"),
        (&["selftest", "--protocol", "http"], "--protocol"),
        (&["run", "--churn", "0.5"], "--churn"),
        (&["run", "--churn", "1.5"], "--churn"),
        (&["run", "--think", "1s"], "--think"),
        (
            &["run", "--protocol", "resp", "--keyspace", "k"],
            "--keyspace",
        ),
        (&["run", "--protocol", "etcd", "--ttl", "9"], "--ttl"),
        (&["run", "--user", "ann"], "--user"),
        (&["run", "--duration", "0s"], "--duration"),
        (&["compare", "--run", "a=", "--run", "a="], "--run"),
        (&["compare", "--run", "a/b=", "--run", "c="], "--run"),
        (&["compare", "--run", "a=--out x", "--run", "c="], "--run a"),
        (&["compare", "--run", "a=--frob", "--run", "c="], "--run a"),
    ] {
        let output = run(&[&["load"], load].concat());
        let words = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{load:?}: {words}");
        assert!(words.contains(option), "{load:?}: {words}");
    }
}

#[test]
fn results_of_several_rates_are_written_as_json_and_reported_again() {
    let server = Listening::null_server();
    let dir = scratch();
    let place = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (json_file, page) = (place("sweep.json"), place("page.html"));
    let mut load = vec!["load", "sweep", "--from", "100", "--to", "200"];
    load.extend(on_null_server(&server.address));
    load.extend(["--steps", "2", "--duration", "200ms"]);
    load.extend(["--json", &json_file, "--check-all"]);
    let output = run(&load);
    let words = text(&output.stderr);
    assert!(output.status.success(), "{words}");
    assert!(words.contains("checked"), "{words}");
    assert_eq!(json(json_file.as_ref()).as_array().unwrap().len(), 2);
    let output = run(&["load", "report", &json_file, "-o", &page]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    std::fs::write(place("run.json"), r#"{"schema": 1}"#).unwrap();
    let directory = dir.path().to_str().unwrap();
    let output = run(&["load", "report", directory, "-o", &page]);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(
        words.contains("schema 1") && words.contains("reads 2"),
        "{words}"
    );
}

#[test]
fn the_seed_of_a_replay_repeats_the_moments_of_its_requests() {
    let server = Listening::null_server();
    let dir = scratch();
    let trace = dir.path().join("trace");
    std::fs::write(&trace, "0,a,1,16,1,get,0\n".repeat(50)).unwrap();
    let seeds = [(); 2].map(|()| {
        let out = dir.path().join("out");
        let mut load = vec!["load", "replay", trace.to_str().unwrap()];
        load.extend(["--address", &server.address, "--protocol", "resp"]);
        load.extend(["--speed", "20", "--out", out.to_str().unwrap()]);
        assert!(run(&load).status.success());
        let result = json(&out.join("run.json"));
        (result["seed"].clone(), result["offered_per_s"].clone())
    });
    assert_ne!(seeds[0].0, seeds[1].0);
    // The moment of the last request says how long the trace is.
    assert_ne!(seeds[0].1, seeds[1].1, "{seeds:?}");
}

#[test]
fn json_on_standard_output_stands_there_alone() {
    let server = Listening::null_server();
    for mode in [
        ["run"].as_slice(),
        &["sweep", "--from", "100", "--to", "200", "--steps", "2"],
    ] {
        let mut load = [&["load"], mode].concat();
        load.extend(on_null_server(&server.address));
        load.extend(["--duration", "200ms", "--json", "-"]);
        let output = run(&load);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(result.is_object() == (mode.len() == 1), "{result}");
        assert!(text(&output.stderr).contains("p99"), "people see it too");
    }
}
