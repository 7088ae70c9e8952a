//! `torc load` when something goes wrong around it: disks, traces, servers.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use crate::cluster::{TORC, run, scratch, text};
use crate::load::{Listening, json, on_null_server, run_on_null_server};

#[test]
fn a_directory_on_a_full_disk_fails_by_name_after_the_report_is_printed() {
    let server = Listening::null_server();
    let dir = scratch();
    let place = dir.path().to_str().unwrap();
    let load = run_on_null_server(
        &server.address,
        &["--duration", "200ms", "--out", place, "--live", "off"],
    );
    // A disk of its own, seen by nobody else, which is gone with the program.
    let script = "mount -t tmpfs -o size=4k none \"$0\" || exit 77; exec \"$@\"";
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, place, TORC])
        .args(&load)
        .output();
    let output = match output {
        Ok(output) if output.status.code() != Some(77) => output,
        refused => {
            eprintln!("not available here: a disk of its own (needs root): {refused:?}");
            return;
        }
    };
    let (report, words) = (text(&output.stdout), text(&output.stderr));
    if words.contains("unshare") {
        eprintln!("not available here: a disk of its own (needs root): {words}");
        return;
    }
    assert_eq!(output.status.code(), Some(1), "{report}{words}");
    assert!(words.contains(place) && words.contains("space"), "{words}");
    assert!(report.contains("latency, ms"), "{report}");
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
    load.extend(["--live", "on", "--timeout-ms", "1000", "--require-valid"]);
    load.extend(["--out", out.to_str().unwrap()]);
    let mut child = Command::new(TORC)
        .args(&load)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut view = BufReader::new(child.stderr.take().unwrap());
    let mut words = String::new();
    // The first picture is drawn after the first second.
    while !words.contains("of at most 4 s") {
        assert!(view.read_line(&mut words).unwrap() > 0, "{words}");
    }
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
