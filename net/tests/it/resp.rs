//! The Redis protocol, spoken as its clients speak it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use crate::support::{Node, PATIENCE, config};

struct Redis(BufReader<TcpStream>);

fn encoded(command: &[&[u8]]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", command.len()).into_bytes();
    for argument in command {
        bytes.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        bytes.extend_from_slice(argument);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

impl Redis {
    fn connect(node: &Node) -> Redis {
        let stream = TcpStream::connect(node.addresses.resp).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Redis(BufReader::new(stream))
    }

    fn send(&mut self, command: &[&[u8]]) {
        self.0.get_mut().write_all(&encoded(command)).unwrap();
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

#[test]
fn an_error_of_the_protocol_behind_a_command_under_way_ends_only_its_connection() {
    let node = Node::start();
    let mut other = Redis::connect(&node);
    for _ in 0..20 {
        let mut redis = Redis::connect(&node);
        redis
            .0
            .get_mut()
            .write_all(b"SET k v\r\n*1\r\nX\r\n")
            .unwrap();
        assert_eq!(redis.reply(), "+OK");
        assert!(redis.reply().starts_with("-ERR Protocol error"));
        assert_eq!(redis.0.read_to_end(&mut Vec::new()).unwrap(), 0);
    }
    assert_eq!(other.run("GET k"), "$v");
}

#[test]
fn of_many_who_set_if_absent_and_ask_for_the_old_value_one_is_told_that_there_was_none() {
    let node = Node::start();
    let mut clients: Vec<Redis> = (0..16).map(|_| Redis::connect(&node)).collect();
    for round in 0..50 {
        for (index, client) in clients.iter_mut().enumerate() {
            client.send(&[
                b"SET",
                format!("lock{round}").as_bytes(),
                index.to_string().as_bytes(),
                b"NX",
                b"GET",
            ]);
        }
        let replies: Vec<String> = clients.iter_mut().map(Redis::reply).collect();
        let winners: Vec<usize> = (0..16).filter(|index| replies[*index] == "nil").collect();
        let held = clients[0].run(&format!("GET lock{round}"));
        assert_eq!(winners.len(), 1, "{replies:?}");
        assert_eq!(held, format!("${}", winners[0]));
        for (index, reply) in replies.iter().enumerate() {
            assert!(index == winners[0] || *reply == held, "{replies:?}");
        }
    }
}

#[test]
fn a_browser_that_was_led_here_gets_no_further_than_its_first_line() {
    let node = Node::start();
    let mut redis = Redis::connect(&node);
    let request = b"POST / HTTP/1.1\r\nHost: x\r\n\r\nSET attacked yes\r\n";
    redis.0.get_mut().write_all(request).unwrap();
    assert!(redis.reply().starts_with("-ERR this is the Redis protocol"));
    assert_eq!(redis.0.read_to_end(&mut Vec::new()).unwrap(), 0);
    assert_eq!(Redis::connect(&node).run("GET attacked"), "nil");
}

#[test]
fn what_is_not_done_is_not_said_to_be() {
    let node = Node::start();
    let mut redis = Redis::connect(&node);
    assert_eq!(redis.run("CLIENT REPLY ON"), "+OK");
    assert!(redis.run("CLIENT REPLY OFF").starts_with("-ERR"));
    assert!(redis.run("CLIENT TRACKING on").starts_with("-ERR"));
}

/// A node of one shard that holds so many bytes for its clients.
fn holding_at_most(client_bytes: usize) -> Node {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = config(&dir);
    settings.shards.count = 1;
    settings.memory.client_bytes = client_bytes;
    Node::start_with(dir, settings)
}

/// What the node says that it holds for its clients.
fn held(node: &Node) -> u64 {
    let metrics = node.http("GET", "/metrics", &[], b"").body;
    let metrics = String::from_utf8(metrics).unwrap();
    let line = metrics
        .lines()
        .find(|line| line.starts_with("torc_client_bytes"));
    line.unwrap().split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_pipeline_that_is_always_in_a_request_costs_what_is_there_of_that_one() {
    let node = holding_at_most(4 << 20);
    let mut redis = Redis::connect(&node);
    let request = encoded(&[b"SET", b"key", &[7; 4000]]);
    let (first, rest) = request.split_at(request.len() / 2);
    redis.0.get_mut().write_all(first).unwrap();
    for _ in 0..2000 {
        redis
            .0
            .get_mut()
            .write_all(&[rest, first].concat())
            .unwrap();
        assert_eq!(redis.reply(), "+OK");
    }
    let held = held(&node);
    assert!(held < 1 << 20, "{held} bytes");
}

#[test]
fn clients_that_read_nothing_cost_a_bounded_amount() {
    let node = holding_at_most(24 << 20);
    let raw = [("Content-Type", "application/octet-stream")];
    assert_eq!(
        node.http("PUT", "/v1/keys/large", &raw, &vec![7; 1 << 20])
            .status,
        200
    );
    let held = || held(&node);
    let mut clients: Vec<Redis> = (0..40).map(|_| Redis::connect(&node)).collect();
    for client in &mut clients {
        for _ in 0..50 {
            client.send(&[b"GET", b"large"]);
        }
        client.send(&[b"PING"]);
    }
    // Whoever reads slowly is answered all the same: with what fits, and with an error beyond it.
    let (mut good, mut refused) = (0, 0);
    for client in &mut clients {
        for _ in 0..50 {
            assert!(held() <= (24 << 20) + (4 << 20));
            match client.reply() {
                reply if reply.starts_with("-TRYAGAIN overloaded") => refused += 1,
                reply => {
                    assert_eq!(reply.len(), (1 << 20) + 1);
                    good += 1;
                }
            }
        }
        assert_eq!(client.reply(), "+PONG");
    }
    assert!(good > 0 && refused > 0, "{good} good, {refused} refused");
    drop(clients);
    let until = std::time::Instant::now() + PATIENCE;
    while held() > 1 << 20 {
        assert!(std::time::Instant::now() < until, "{} bytes stay", held());
    }
    let many: Vec<&str> = std::iter::repeat_n("large", 40).collect();
    let mut redis = Redis::connect(&node);
    let reply = redis.run(&format!("MGET {}", many.join(" ")));
    assert!(reply.starts_with("-ERR too_large"), "{}", reply.len());
    let reply = redis.run(&format!("MGET {}", many[..8].join(" ")));
    assert!(reply.len() > 8 << 20);
}

#[test]
fn small_answers_that_nobody_reads_are_bounded_together() {
    let node = holding_at_most(16 << 20);
    let mut clients: Vec<Redis> = (0..40).map(|_| Redis::connect(&node)).collect();
    clients[0].send(&[b"SET", b"small", &[7; 60 << 10]]);
    assert_eq!(clients[0].reply(), "+OK");
    for client in &mut clients {
        for _ in 0..200 {
            client.send(&[b"GET", b"small"]);
        }
    }
    let until = std::time::Instant::now() + std::time::Duration::from_secs(2);
    while std::time::Instant::now() < until {
        // Each may have one more send under way than fits.
        let held = held(&node);
        assert!(held <= (16 << 20) + (8 << 20), "{held} bytes");
    }
    for client in &mut clients {
        for _ in 0..200 {
            assert_eq!(client.reply().len(), (60 << 10) + 1);
        }
    }
}

#[test]
fn a_lock_is_not_lost_to_a_client_whose_clock_is_behind() {
    let node = Node::start();
    let mut redis = Redis::connect(&node);
    assert_eq!(redis.run("SET lock a"), "+OK");
    assert_eq!(redis.run("SET lock b NX PXAT 1000"), "nil");
    assert_eq!(redis.run("GET lock"), "$a");
    assert_eq!(redis.run("SET lock b PXAT 1000"), "+OK");
    assert_eq!(redis.run("GET lock"), "nil");
    assert_eq!(redis.run("SET lock b NX PXAT 1000"), "+OK");
}

#[test]
fn a_name_is_short() {
    let node = Node::start();
    let mut redis = Redis::connect(&node);
    assert_eq!(redis.run("CLIENT SETNAME worker-1"), "+OK");
    for command in ["CLIENT SETNAME ", "HELLO 2 SETNAME "] {
        let refused = redis.run(&format!("{command}{}", "x".repeat(256)));
        assert!(refused.starts_with("-ERR Client names"), "{refused}");
    }
    redis.send(&[b"CLIENT", b"SETNAME", b"a b"]);
    assert!(redis.reply().starts_with("-ERR Client names"));
    assert_eq!(redis.run("CLIENT GETNAME"), "$worker-1");
}

#[test]
fn a_long_pipeline_is_answered_whole() {
    let node = Node::start();
    let mut redis = Redis::connect(&node);
    assert_eq!(redis.run("SET k v"), "+OK");
    let many = encoded(&[b"GET", b"k"]).repeat(600);
    redis.0.get_mut().write_all(&many).unwrap();
    for _ in 0..600 {
        assert_eq!(redis.reply(), "$v");
    }
}
