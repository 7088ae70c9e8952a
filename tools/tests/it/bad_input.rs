//! Bad input gets one clear error that names cause and remedy.

use std::net::TcpListener;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

use crate::cluster::{port_base, run, scratch, text};

fn fails_with(args: &[&str], status: i32, words: &[&str]) {
    let output = run(args);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {message}");
    for word in words {
        assert!(
            message.contains(word),
            "{args:?}: {word:?} is not in {message:?}"
        );
    }
}

#[test]
fn an_unknown_flag_or_command_is_a_usage_error() {
    fails_with(
        &["get", "key", "--frobnicate"],
        2,
        &["--frobnicate", "Usage"],
    );
    fails_with(&["frobnicate"], 2, &["frobnicate"]);
    fails_with(&["dev", "--nodes", "0"], 2, &["--nodes"]);
    fails_with(
        &["load", "--duration", "3"],
        2,
        &["--duration", "such as 3s"],
    );
    for (args, range) in [
        (["put", "k", "v", "--ttl", "-1"].as_slice(), "from 1 to"),
        (&["scan", "--limit", "-1"], "from 1 to"),
        (&["get", "k", "--timeout-ms", "60001"], "from 1 to 60000"),
        (&["sim", "--seed", "-1"], "from 0 to"),
        (&["backup", "--to", "d", "--rate", "0"], "from 1 to 1048576"),
    ] {
        fails_with(args, 2, &["expected a whole number", range]);
    }
}

#[test]
fn a_directory_that_is_not_there_holds_no_backups() {
    let dir = scratch();
    let here = dir.path().to_str().unwrap();
    let gone = dir.path().join("gone");
    let gone = gone.to_str().unwrap();
    for args in [
        ["backup", "list", gone].as_slice(),
        &["backup", "list", here, "--archive", gone],
        &["backup", "prune", here, "--archive", gone],
        &["backup", "prune", gone, "--archive", here],
    ] {
        fails_with(args, 1, &[gone, "no such directory"]);
    }
}

#[test]
fn an_unknown_configuration_key_is_refused_with_its_line() {
    let dir = scratch();
    let path = dir.path().join("torc.toml");
    std::fs::write(&path, "[node]\nname = \"n1\"\n[shards]\ncuont = 2\n").unwrap();
    fails_with(
        &["server", "--config", path.to_str().unwrap()],
        1,
        &["line 4", "cuont"],
    );
    fails_with(
        &["server", "--set", "shards.cuont=2"],
        1,
        &["no key shards.cuont"],
    );
    fails_with(
        &["server", "--config", "missing.toml"],
        1,
        &["missing.toml"],
    );
}

#[test]
fn a_busy_port_is_named() {
    let base = port_base(1);
    let _busy = TcpListener::bind(("127.0.0.1", base + 79)).unwrap();
    let port = (base + 79).to_string();
    fails_with(
        &["dev", "--nodes", "1", "--port-base", &base.to_string()],
        1,
        &[&port, "in use"],
    );
}

#[test]
fn an_endpoint_where_nobody_listens_is_named() {
    let url = format!("http://127.0.0.1:{}", port_base(1));
    fails_with(
        &["get", "key", "--endpoint", &url],
        1,
        &[&url, "is a node running there?"],
    );
    fails_with(
        &["status", "--endpoint", "localhost"],
        1,
        &["expected http://HOST:PORT"],
    );
}

/// Runs `torc server` where `io_uring_setup` fails with `errno`. The filter binds the thread that sets it
/// and the processes that it starts.
fn server_without_io_uring(errno: i32) -> std::process::Output {
    std::thread::spawn(move || {
        let filter = SeccompFilter::new(
            [(libc::SYS_io_uring_setup, Vec::new())]
                .into_iter()
                .collect(),
            SeccompAction::Allow,
            SeccompAction::Errno(errno.cast_unsigned()),
            std::env::consts::ARCH.try_into().unwrap(),
        );
        let program: BpfProgram = filter.unwrap().try_into().unwrap();
        seccompiler::apply_filter(&program).unwrap();
        let dir = scratch();
        let data_dir = format!("node.data_dir={}", dir.path().join("data").display());
        let base = port_base(1);
        let listen = |what, port: u16| format!("listen.{what}=127.0.0.1:{}", base + port);
        run(&[
            "server",
            "--set",
            &data_dir,
            "--set",
            &listen("client", 0),
            "--set",
            &listen("internode", 1),
            "--set",
            &listen("resp", 79),
            "--set",
            &listen("http", 80),
        ])
    })
    .join()
    .unwrap()
}

#[test]
fn a_host_without_io_uring_is_told_what_to_change() {
    let forbidden = ["io_uring is forbidden", "kernel.io_uring_disabled"];
    let missing = ["io_uring is missing", "Linux 6.1"];
    for (errno, words) in [(libc::EPERM, forbidden), (libc::ENOSYS, missing)] {
        let output = server_without_io_uring(errno);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        let last = message.lines().last().unwrap();
        for word in words {
            assert!(last.contains(word), "{word:?} is not in {last:?}");
        }
    }
}
