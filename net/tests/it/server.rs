//! A node's life: ports, restarts, drain.

use std::io::{Read, Write};
use std::net::TcpStream;

use torc_net::{Server, ServerError};

use crate::support::{Http, Node, PATIENCE, config};

const RAW: (&str, &str) = ("Content-Type", "application/octet-stream");

#[test]
fn what_was_acknowledged_is_there_after_a_restart() {
    let node = Node::start();
    let mut connection = Http::connect(node.addresses.http);
    for index in 0..100 {
        let path = format!("/v1/keys/r{index}");
        let value = format!("value {index}");
        let written = connection.request("PUT", &path, &[RAW], value.as_bytes());
        assert_eq!(written.status, 200);
    }
    assert!(node.is_running());
    drop(connection);
    let node = Node::start_in(node.stop());
    let mut connection = Http::connect(node.addresses.http);
    for index in 0..100 {
        let path = format!("/v1/keys/r{index}");
        let read = connection.request("GET", &path, &[], b"");
        assert_eq!(read.status, 200, "{}", read.json());
        assert_eq!(read.json()["value"], format!("value {index}"));
    }
}

#[test]
fn a_node_that_was_stopped_orders_last_writes_as_soon_as_it_is_back() {
    let node = Node::start();
    let body = br#"{"conflict":"lww"}"#;
    let json = ("Content-Type", "application/json");
    let made = node.http("PUT", "/admin/keyspaces/last", &[json], body);
    assert_eq!(made.status, 200, "{}", made.json());
    let write = |node: &Node| {
        let mut connection = Http::connect(node.addresses.http);
        // Some of them on each shard.
        for index in 0..20 {
            let path = format!("/v1/keyspaces/last/keys/r{index}");
            let written = connection.request("PUT", &path, &[RAW], b"value");
            assert_eq!(written.status, 200, "{}", written.json());
        }
    };
    write(&node);
    let node = Node::start_in(node.stop());
    write(&node);
}

#[test]
fn a_port_that_is_taken_is_named_with_its_remedy() {
    let node = Node::start();
    let dir = tempfile::tempdir().unwrap();
    let mut other = config(&dir);
    other.listen.http = node.addresses.http;
    let refused = Server::start(other).err().unwrap();
    assert!(matches!(refused, ServerError::Listen { what: "http", .. }));
    let text = refused.to_string();
    assert!(text.contains(&node.addresses.http.to_string()) && text.contains("listen.http"));
}

#[test]
fn a_directory_in_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let used = config(&dir);
    let _node = Node::start_in(dir);
    assert!(matches!(Server::start(used), Err(ServerError::Boot(_))));
}

#[test]
fn a_stop_ends_idle_connections_and_refuses_new_ones() {
    let node = Node::start();
    let address = node.addresses.http;
    let mut idle = Http::connect(address);
    assert_eq!(idle.request("GET", "/health", &[], b"").status, 200);
    let mut silent = TcpStream::connect(node.addresses.resp).unwrap();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    node.stop();
    assert!(idle.is_closed());
    assert_eq!(silent.read(&mut [0; 1]).unwrap_or(0), 0);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn connections_above_the_limit_are_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = config(&dir);
    small.shards.count = 1;
    small.connections_max = 1;
    let server = Server::start(small).unwrap();
    let address = server.addresses().http;
    let mut first = Http::connect(address);
    assert_eq!(first.request("GET", "/health", &[], b"").status, 200);
    let mut second = Http::connect(address);
    let refused = second.answer(false);
    assert_eq!(refused.status, 503);
    assert!(refused.header("Retry-After").is_some());
    let mut redis = TcpStream::connect(server.addresses().resp).unwrap();
    let mut text = String::new();
    redis.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("-ERR max number of clients"));
    drop(first);
    assert!(server.stop());
}

#[test]
fn a_client_that_leaves_in_the_middle_harms_nobody() {
    let node = Node::start();
    for bytes in [
        &b"PUT /v1/keys/a HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf"[..],
        b"GET /v1/ke",
        b"",
    ] {
        let mut stream = TcpStream::connect(node.addresses.http).unwrap();
        stream.write_all(bytes).unwrap();
    }
    assert_eq!(node.http("GET", "/health", &[], b"").status, 200);
    assert_eq!(node.http("GET", "/v1/keys/a", &[], b"").status, 404);
}
