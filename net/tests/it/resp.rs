//! The Redis protocol, spoken as its clients speak it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use crate::support::{Node, PATIENCE};

struct Redis(BufReader<TcpStream>);

impl Redis {
    fn connect(node: &Node) -> Redis {
        let stream = TcpStream::connect(node.addresses.resp).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Redis(BufReader::new(stream))
    }

    fn send(&mut self, command: &[&[u8]]) {
        let mut bytes = format!("*{}\r\n", command.len()).into_bytes();
        for argument in command {
            bytes.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
            bytes.extend_from_slice(argument);
            bytes.extend_from_slice(b"\r\n");
        }
        self.0.get_mut().write_all(&bytes).unwrap();
    }

    /// One reply, flat: `+OK`, `:1`, `$text`, `nil`, `[a b]`.
    fn reply(&mut self) -> String {
        let mut line = String::new();
        assert!(self.0.read_line(&mut line).unwrap() > 0, "closed");
        let line = line.trim_end();
        match (line.as_bytes()[0], &line[1..]) {
            (b'_', _) | (b'$' | b'*', "-1") => "nil".into(),
            (b'$', len) => {
                let mut bytes = vec![0; len.parse::<usize>().unwrap() + 2];
                self.0.read_exact(&mut bytes).unwrap();
                bytes.truncate(bytes.len() - 2);
                format!("${}", String::from_utf8_lossy(&bytes))
            }
            (b'*', count) => {
                let count: usize = count.parse().unwrap();
                let replies: Vec<_> = (0..count).map(|_| self.reply()).collect();
                format!("[{}]", replies.join(" "))
            }
            (b'%', count) => {
                let count: usize = count.parse().unwrap();
                let replies: Vec<_> = (0..count * 2).map(|_| self.reply()).collect();
                format!("{{{}}}", replies.join(" "))
            }
            _ => line.into(),
        }
    }

    fn run(&mut self, command: &str) -> String {
        let words: Vec<&[u8]> = command.split(' ').map(str::as_bytes).collect();
        self.send(&words);
        self.reply()
    }
}

#[test]
fn commands_do_what_redis_does() {
    let node = Node::start();
    let mut redis = Redis::connect(&node);
    for (command, expected) in [
        ("PING", "+PONG"),
        ("ECHO hi", "$hi"),
        ("GET k", "nil"),
        ("SET k v", "+OK"),
        ("GET k", "$v"),
        ("SET k w GET", "$v"),
        ("GET k", "$w"),
        ("SET k x NX", "nil"),
        ("SETNX k x", ":0"),
        ("SETNX n x", ":1"),
        ("SET k y XX", "+OK"),
        ("SET none y XX", "nil"),
        ("GET none", "nil"),
        ("STRLEN k", ":1"),
        ("TYPE k", "+string"),
        ("TTL k", ":-1"),
        ("TTL none", ":-2"),
        ("EXPIRE k 1000", ":1"),
        ("TTL k", ":1000"),
        ("GET k", "$y"),
        ("SET k z KEEPTTL", "+OK"),
        ("TTL k", ":1000"),
        ("PERSIST k", ":1"),
        ("TTL k", ":-1"),
        ("EXPIRE none 5", ":0"),
        ("SETEX e 1000 v", "+OK"),
        ("TTL e", ":1000"),
        ("EXPIRE e 0", ":1"),
        ("EXISTS e", ":0"),
        ("MSET a 1 b 2", "+OK"),
        ("MGET a none b", "[$1 nil $2]"),
        ("EXISTS a a none", ":2"),
        ("DEL a none", ":1"),
        ("UNLINK b", ":1"),
        ("GETDEL n", "$x"),
        ("GET n", "nil"),
        ("SELECT 0", "+OK"),
        ("CLIENT SETNAME me", "+OK"),
        ("CLIENT GETNAME", "$me"),
        ("CONFIG GET save", "[$save $]"),
    ] {
        assert_eq!(redis.run(command), expected, "{command}");
    }
    for command in [
        "FLUSHALL",
        "INCR k",
        "NOPE",
        "GET",
        "DBSIZE",
        "SET k v EX 0",
    ] {
        assert!(redis.run(command).starts_with("-ERR"), "{command}");
    }
    assert!(redis.run("INFO").contains("torc_version"));
    assert!(redis.run("HELLO 3").starts_with("{$server"));
    assert_eq!(redis.run("GET none"), "nil");
    assert_eq!(redis.run("QUIT"), "+OK");
}

#[test]
fn a_pipeline_sees_its_own_writes_and_leaves_no_siblings() {
    let node = Node::start();
    let mut redis = Redis::connect(&node);
    for index in 0..300 {
        let value = index.to_string();
        redis.send(&[b"SET", b"p", value.as_bytes()]);
        redis.send(&[b"GET", b"p"]);
        redis.send(&[b"GET", format!("other{index}").as_bytes()]);
    }
    for index in 0..300 {
        assert_eq!(redis.reply(), "+OK");
        assert_eq!(redis.reply(), format!("${index}"));
        assert_eq!(redis.reply(), "nil");
    }
    let read = node.http("GET", "/v1/keys/p", &[], b"");
    assert_eq!((read.status, &read.json()["value"]), (200, &"299".into()));
}

#[test]
fn many_clients_may_write_one_key_at_a_time() {
    let node = Node::start();
    let mut clients: Vec<Redis> = (0..20).map(|_| Redis::connect(&node)).collect();
    for round in 0..30 {
        for client in &mut clients {
            client.send(&[b"SET", b"same", round.to_string().as_bytes()]);
        }
        for client in &mut clients {
            assert_eq!(client.reply(), "+OK");
        }
    }
    assert_eq!(clients[0].run("GET same"), "$29");
    assert_eq!(clients[0].run("SET same done"), "+OK");
    let read = node.http("GET", "/v1/keys/same", &[], b"");
    assert_eq!((read.status, &read.json()["value"]), (200, &"done".into()));
}

#[test]
fn siblings_of_other_clients_are_read_by_the_newest_and_replaced_together() {
    let node = Node::start();
    let raw = [("Content-Type", "application/octet-stream")];
    node.http("PUT", "/v1/keys/s", &raw, b"one");
    node.http("PUT", "/v1/keys/s", &raw, b"two");
    let mut redis = Redis::connect(&node);
    assert_eq!(redis.run("GET s"), "$two");
    assert_eq!(redis.run("SET s three"), "+OK");
    assert_eq!(node.http("GET", "/v1/keys/s", &[], b"").status, 200);
}

#[test]
fn inline_commands_and_errors_of_the_protocol_are_answered() {
    let node = Node::start();
    let mut redis = Redis::connect(&node);
    redis
        .0
        .get_mut()
        .write_all(b"PING\r\nset k \"a b\"\r\nget k\r\n")
        .unwrap();
    assert_eq!(redis.reply(), "+PONG");
    assert_eq!(redis.reply(), "+OK");
    assert_eq!(redis.reply(), "$a b");
    redis.0.get_mut().write_all(b"*1\r\n:1\r\n").unwrap();
    assert!(redis.reply().starts_with("-ERR Protocol error"));
    let mut rest = Vec::new();
    redis.0.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}
