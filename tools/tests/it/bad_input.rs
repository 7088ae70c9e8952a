//! Bad input gets one clear error that names cause and remedy.

use std::net::TcpListener;

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
