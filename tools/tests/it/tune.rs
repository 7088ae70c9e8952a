//! `torc tune` as its users run it, and what `torc server` takes from it. What needs root or a device
//! that this machine lacks says so and passes.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cluster::{Cluster, TORC, run, scratch, text};

/// Longest wait for the guard of an apply, on a machine that is busy with other tests.
const UNDONE_WITHIN: Duration = Duration::from_secs(60);

fn not_available(why: &str) {
    println!("not available here: {why}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Standard error of a command that fails, which has to be one line.
fn fails(output: &Output) -> String {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert_eq!(message.trim().lines().count(), 1, "{message}");
    message
}

#[test]
fn a_wrong_root_gives_one_clear_message() {
    let dir = scratch();
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "not an archive").unwrap();
    let odd = dir.path().join("odd/proc/sys/kernel");
    std::fs::create_dir_all(&odd).unwrap();
    std::fs::write(odd.join("osrelease"), "2.6.32\n").unwrap();
    for (root, word) in [
        (dir.path().join("missing"), "missing"),
        (empty, "does not hold a Linux host"),
        (file, "is no captured host"),
        (dir.path().join("odd"), "unknown to this tool"),
    ] {
        for command in ["inspect", "map", "check", "plan"] {
            let root = root.to_str().unwrap();
            let message = fails(&run(&["tune", command, "--root", root]));
            assert!(message.contains(word), "{command}: {message}");
        }
    }
    let message = fails(&run(&["tune", "apply", "--root", "/"]));
    assert!(message.contains("--root is for"), "{message}");
}

#[test]
fn a_captured_host_is_planned_for_as_the_host_itself() {
    let dir = scratch();
    let archive = dir.path().join("host.tar");
    let archive = archive.to_str().unwrap();
    let captured = run(&["tune", "capture", "--output", archive]);
    assert!(captured.status.success(), "{}", text(&captured.stderr));
    let layout = |words: &[&str]| -> Value {
        let output = run(words);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        plan["layout"].clone()
    };
    let here = layout(&["tune", "plan", "--json"]);
    let there = layout(&["tune", "plan", "--json", "--root", archive]);
    assert_eq!(here, there);
}

#[test]
fn without_root_nothing_is_changed() {
    if !is_root() {
        return not_available("giving rights up: this is not root");
    }
    let dir = scratch();
    let state = dir.path().join("state");
    let mut command = Command::new(TORC);
    command.args(["tune", "apply", "--state"]).arg(&state);
    let Ok(output) = command.uid(65_534).gid(65_534).output() else {
        return not_available("an unprivileged process: it may not run this program");
    };
    let message = fails(&output);
    assert!(
        message.contains("root's rights; nothing was changed"),
        "{message}"
    );
    assert!(!state.exists());
}

/// A loop device over a small file; both go away with it.
struct Loop {
    device: String,
    dir: tempfile::TempDir,
}

impl Loop {
    fn new() -> Option<Self> {
        let dir = scratch();
        let backing = dir.path().join("backing");
        std::fs::File::create(&backing)
            .unwrap()
            .set_len(8 << 20)
            .unwrap();
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&backing)
            .output();
        match made {
            Ok(made) if is_root() && made.status.success() => Some(Self {
                device: text(&made.stdout)
                    .trim()
                    .trim_start_matches("/dev/")
                    .to_owned(),
                dir,
            }),
            _ => {
                not_available("a loop device: losetup takes root and a free device");
                None
            }
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        format!("/sys/block/{}/queue/{name}", self.device).into()
    }

    /// What the files of the queue say.
    fn settings(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = std::fs::read_dir(self.file("")).unwrap().flatten();
        let mut files: Vec<_> = entries
            .filter_map(|entry| Some((entry.path(), std::fs::read(entry.path()).ok()?)))
            .collect();
        files.sort();
        files
    }

    /// A plan of this host that changes this device only.
    fn plan(&self) -> PathBuf {
        let output = run(&["tune", "plan", "--json"]);
        let mut plan: Value = serde_json::from_slice(&output.stdout).unwrap();
        let changes = plan["changes"].as_array_mut().unwrap();
        let own = format!("{} ", self.device);
        changes.retain(|change| change["knob"].as_str().unwrap().starts_with(&own));
        assert!(!changes.is_empty());
        let path = self.dir.path().join("plan.json");
        std::fs::write(&path, plan.to_string()).unwrap();
        path
    }

    fn tune(&self, words: &[&str]) -> Output {
        let mut command = Command::new(TORC);
        command.arg("tune").args(words);
        command.arg("--state").arg(self.dir.path().join("state"));
        command.output().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup")
            .arg("--detach")
            .arg(format!("/dev/{}", self.device))
            .output()
            .ok();
    }
}

#[test]
fn an_apply_that_nobody_confirms_is_undone_by_its_guard() {
    let Some(device) = Loop::new() else { return };
    let before = device.settings();
    let plan = device.plan();
    let applied = device.tune(&["apply", plan.to_str().unwrap(), "--confirm-within", "1s"]);
    assert!(applied.status.success(), "{}", text(&applied.stderr));
    let begun = Instant::now();
    while device.settings() != before {
        assert!(begun.elapsed() < UNDONE_WITHIN, "the guard did not undo it");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!device.dir.path().join("state/plan.json").exists());
    let message = fails(&device.tune(&["confirm"]));
    assert!(message.contains("nobody confirmed it in time"), "{message}");
}

#[test]
fn what_is_confirmed_stays_is_verified_and_rolled_back() {
    let Some(device) = Loop::new() else { return };
    let before = device.settings();
    let plan = device.plan();
    let succeeds = |words: &[&str]| {
        let output = device.tune(words);
        assert!(
            output.status.success(),
            "{words:?}: {}",
            text(&output.stderr)
        );
    };
    succeeds(&["apply", plan.to_str().unwrap(), "--confirm-within", "60s"]);
    assert_ne!(device.settings(), before);
    succeeds(&["confirm"]);
    succeeds(&["verify"]);
    let merges = device.file("nomerges");
    std::fs::write(&merges, "0").unwrap();
    let drift = device.tune(&["verify"]);
    assert!(text(&drift.stdout).contains("nomerges: wanted 2, shows 0"));
    assert!(fails(&drift).contains("no longer hold"));
    succeeds(&["rollback"]);
    assert_eq!(device.settings(), before);
}

fn affinity(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    line.unwrap().trim().to_owned()
}

#[test]
fn a_server_follows_the_plan_and_the_disks_properties() {
    let dir = scratch();
    let output = run(&["tune", "plan", "--json"]);
    let mut plan: Value = serde_json::from_slice(&output.stdout).unwrap();
    let shards = plan["layout"]["shards"].as_array_mut().unwrap();
    shards.drain(..shards.len() - 1);
    let cpu = shards[0]["cpu"].as_u64().unwrap();
    std::fs::write(dir.path().join("plan.json"), plan.to_string()).unwrap();
    let properties = dir.path().join("disk.toml");
    write_properties(&properties);
    let sets = [
        "shards.cpus=\"auto\"".to_owned(),
        format!("shards.plan_dir={:?}", dir.path()),
        format!("disk.properties={properties:?}"),
    ];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let cluster = Cluster::start(1, 0, &sets);
    assert_eq!(affinity(cluster.pid(0)), cpu.to_string());
    let log = cluster.log(0);
    for expected in [
        &*format!("shards run on CPUs {cpu}"),
        "reads 900 and writes 300 MiB/s",
        "sequential writes of 1 MiB were not stable",
        "another was measured",
        "shards=1",
    ] {
        assert!(log.contains(expected), "{expected:?} is not in {log}");
    }
    cluster.torc(&["put", "key", "value"]);
    cluster.torc(&["compact"]);
    let metrics = cluster.metrics(0);
    for expected in [
        "torc_background_disk_wait_us ",
        "torc_removed_pending_bytes ",
        "torc_socket_arrivals_total{shard=\"0\",cpu=",
    ] {
        assert!(
            metrics.contains(expected),
            "{expected:?} is not in {metrics}"
        );
    }
}

fn write_properties(path: &Path) {
    let figure = |work: &str, mebibytes: u32, unstable: &str| {
        format!(
            "[[figures]]\nwork = \"{work}\"\ndepth = 8\nper_second = 1.0\nbytes_per_second = \
             {}.0\np50_us = 1.0\np99_us = 1.0\n{unstable}\n",
            u64::from(mebibytes) << 20
        )
    };
    let text = format!(
        "schema = 1\ndevice = \"another\"\n{}{}",
        figure("sequential-read", 900, ""),
        figure(
            "sequential-write",
            300,
            "unstable = \"two passes differ by 9 %\""
        )
    );
    std::fs::write(path, text).unwrap();
}

#[test]
fn a_server_refuses_properties_that_are_none() {
    let dir = scratch();
    let path = dir.path().join("disk.toml");
    for (contents, word) in [
        (None, "No such file"),
        (Some("x = 1\n"), "no properties file"),
    ] {
        if let Some(contents) = contents {
            std::fs::write(&path, contents).unwrap();
        }
        let output = run(&[
            "server",
            "--set",
            &format!("node.data_dir={}", dir.path().join("data").display()),
            "--set",
            &format!("disk.properties={}", path.display()),
        ]);
        assert_eq!(output.status.code(), Some(1));
        let message = text(&output.stderr);
        assert!(
            message.contains("disk.properties") && message.contains(word),
            "{message}"
        );
    }
}

#[test]
fn a_server_warns_at_start_of_what_is_serious() {
    let dir = scratch();
    // Refused after the warnings, so that nothing keeps running.
    let path = dir.path().join("missing.toml");
    let script = format!(
        "ulimit -n 1000 && exec {TORC} server --set disk.properties={}",
        path.display()
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let message = text(&output.stderr);
    assert!(
        message.contains("nofile-low: 1000 open files allowed"),
        "{message}"
    );
    assert!(message.contains("LimitNOFILE"), "{message}");
}

#[test]
fn prove_measures_a_server_by_the_latencies_of_torc_load() {
    let cluster = Cluster::start(1, 1, &[]);
    let prove = |load: &str| {
        let words = [
            "tune",
            "prove",
            "--aa",
            "--measure",
            "load",
            "--run",
            "200ms",
        ];
        let mut command = cluster.command(&words);
        command.args(["--json", "--load", load]).output().unwrap()
    };
    let short = "--warmup 0s --keys 50 --rate 200 --connections 4 --no-settle";
    let output = prove(short);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let proofs: Value = serde_json::from_slice(&output.stdout).unwrap();
    let comparisons = proofs[0]["comparisons"].as_array().unwrap();
    for (comparison, name) in comparisons.iter().zip(["read p99 us", "write p99 us"]) {
        assert_eq!(comparison["name"], name);
        assert!(comparison["before"].as_f64().unwrap() > 0.0, "{comparison}");
        assert!(comparison["after"].as_f64().unwrap() > 0.0, "{comparison}");
    }
    assert_eq!(comparisons.len(), 2);
    let output = prove(&format!("{short} --mix scan=1"));
    let message = text(&output.stderr);
    assert!(message.contains("neither read nor wrote"), "{message}");
    assert!(!output.status.success());
}
