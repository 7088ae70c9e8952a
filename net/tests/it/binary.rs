//! The binary protocol, by the client library and by hand.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use torc_client::wire::message::{
    ArchivedAnswer, ArchivedOutcome, Condition, Delete, Get, Idempotency, Level, Operation, Put,
    Request, Single, Write as WriteOptions,
};
use torc_client::{Client, ClientError, Connection, Options, Outcome};
use torc_env::ShardId;

use crate::support::{Node, PATIENCE};

fn client(node: &Node) -> Client {
    Client::new(node.addresses.client, Options::default())
}

fn put<'a>(key: &'a [u8], value: &'a [u8]) -> Single<'a> {
    Single::Put(Put {
        key,
        value,
        ttl_seconds: None,
        write: WriteOptions::default(),
    })
}

fn get(key: &[u8]) -> Single<'_> {
    Single::Get(Get {
        key,
        r: Level::Quorum,
    })
}

fn request(operation: Operation<'_>) -> Request<'_> {
    Request {
        timeout_ms: 5000,
        keyspace: b"default",
        operation,
    }
}

#[test]
fn a_client_reads_what_it_writes_on_every_shard() {
    let node = Node::start();
    let mut client = client(&node);
    for index in 0..50 {
        let key = format!("k{index}");
        assert!(client.get(key.as_bytes()).unwrap().siblings.is_empty());
        let written = client.put(key.as_bytes(), b"one").unwrap();
        assert_eq!((written.replicas, written.hints), (1, 0));
        client.put(key.as_bytes(), b"two").unwrap();
        let got = client.get(key.as_bytes()).unwrap();
        assert_eq!(got.siblings.len(), 1, "a write reads the context first");
        assert_eq!(got.value().unwrap(), "two");
    }
    client.delete(b"k7").unwrap();
    assert_eq!(client.get(b"k7").unwrap().value(), None);
    let mut keys = 0;
    let mut cursor = None;
    loop {
        let page = client.scan(b"k", cursor.as_deref(), 20, true).unwrap();
        keys += page.entries.len();
        assert!(page.entries.iter().all(|entry| entry.siblings.len() == 1));
        cursor = page.cursor;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(keys, 49);
    let large = vec![7; 1 << 20];
    client.put(b"large", &large).unwrap();
    assert_eq!(client.get(b"large").unwrap().value().unwrap()[..], large);
}

#[test]
fn conditions_and_names_of_writes_mean_what_they_mean_over_http() {
    let node = Node::start();
    let mut client = client(&node);
    let absent = || WriteOptions {
        condition: Condition::Absent,
        ..WriteOptions::default()
    };
    let first = client.put_with(b"c", b"1", None, absent()).unwrap();
    let refused = client.put_with(b"c", b"2", None, absent()).unwrap_err();
    assert!(matches!(&refused, ClientError::Failed(failure) if failure.code == "condition_failed"));
    assert!(!refused.in_doubt());
    let matched = WriteOptions {
        condition: Condition::Match(&first.context),
        ..WriteOptions::default()
    };
    client.put_with(b"c", b"3", Some(60), matched).unwrap();
    let got = client.get(b"c").unwrap();
    assert_eq!(got.value().unwrap(), "3");
    assert!(got.siblings[0].expires_at_ms > 0);
    let named = || WriteOptions {
        idempotency: Some(Idempotency {
            client: 7,
            sequence: 1,
        }),
        ..WriteOptions::default()
    };
    let once = client.put_with(b"i", b"v", None, named()).unwrap();
    let again = client.put_with(b"i", b"v", None, named()).unwrap();
    assert_eq!(once.context, again.context);
    let other = client.put_with(b"i", b"w", None, named()).unwrap_err();
    assert!(
        matches!(other, ClientError::Failed(failure) if failure.code == "idempotency_mismatch")
    );
    let tampered = WriteOptions {
        context: Some(b"nonsense"),
        ..WriteOptions::default()
    };
    let refused = client.put_with(b"i", b"w", None, tampered).unwrap_err();
    assert!(matches!(refused, ClientError::Failed(failure) if failure.code == "bad_token"));
}

#[test]
fn a_batch_answers_each_operation_in_order() {
    let node = Node::start();
    let mut client = client(&node);
    let delete = Single::Delete(Delete {
        key: b"none",
        write: WriteOptions::default(),
    });
    let outcomes = client
        .batch(vec![put(b"a", b"1"), get(b"none"), delete])
        .unwrap();
    assert!(matches!(&outcomes[0], Outcome::Written(written) if written.replicas == 1));
    assert!(matches!(&outcomes[1], Outcome::Got(got) if got.siblings.is_empty()));
    assert!(matches!(&outcomes[2], Outcome::Written(_)));
    let outcomes = client.batch(vec![get(b"a"), get(b"")]);
    let refused = outcomes.unwrap_err();
    assert!(matches!(refused, ClientError::Failed(failure) if failure.code == "invalid_request"));
}

#[test]
fn the_wanted_shard_serves_the_connection() {
    let node = Node::start();
    for shard in [0, 1] {
        let connection = Connection::connect(
            node.addresses.client,
            Some(ShardId(shard)),
            Duration::from_secs(10),
        );
        let welcome = *connection.unwrap().welcome();
        assert_eq!(welcome.shard, ShardId(shard));
        assert_eq!(welcome.shard_count, 2);
        assert!(welcome.cluster != 0 && welcome.epoch > 0);
    }
    let far = Connection::connect(node.addresses.client, Some(ShardId(99)), PATIENCE).unwrap();
    assert!(
        far.welcome().shard.0 < 2,
        "a shard that does not exist is as good as none"
    );
}

#[test]
fn pipelined_requests_on_one_key_happen_in_order() {
    let node = Node::start();
    let connection = Connection::connect(node.addresses.client, None, PATIENCE).unwrap();
    let (mut sender, mut receiver) = connection.split();
    let values: Vec<String> = (0..500).map(|index| index.to_string()).collect();
    let mut expected = Vec::new();
    for value in &values {
        sender
            .submit(&request(Operation::Single(put(b"p", value.as_bytes()))))
            .unwrap();
        let id = sender
            .submit(&request(Operation::Single(get(b"p"))))
            .unwrap();
        expected.push((id, value));
    }
    sender.finish().unwrap();
    let mut seen = 0;
    for _ in 0..values.len() * 2 {
        let answered = receiver.receive().unwrap();
        match answered.answer().unwrap() {
            ArchivedAnswer::Single(ArchivedOutcome::Written(_)) => {}
            ArchivedAnswer::Single(ArchivedOutcome::Got(got)) => {
                let (_, value) = expected.iter().find(|(id, _)| *id == answered.id).unwrap();
                assert_eq!(got.siblings.len(), 1);
                assert_eq!(&got.siblings[0].value[..], value.as_bytes());
                seen += 1;
            }
            _ => panic!("another answer"),
        }
    }
    assert_eq!(seen, values.len());
    assert!(
        receiver.receive().is_err(),
        "the node closes behind the last answer"
    );
}

#[test]
fn a_client_connects_again_after_its_node_was_away() {
    let node = Node::start();
    let mut client = client(&node);
    client.put(b"k", b"v").unwrap();
    let address = node.addresses.client;
    let dir = node.stop();
    assert!(client.put(b"k", b"w").is_err());
    let mut settings = crate::support::config(&dir);
    settings.listen.client = address;
    let _node = Node::start_with(dir, settings);
    assert_eq!(client.get(b"k").unwrap().value().unwrap(), "v");
    client.put(b"k", b"w").unwrap();
}

#[test]
fn hostile_bytes_end_the_connection_and_nothing_else() {
    let node = Node::start();
    let hello = {
        let mut out = bytes::BytesMut::new();
        torc_client::wire::handshake::Hello::new(None).encode(&mut out);
        out.to_vec()
    };
    for bytes in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        [&hello[..], &[0xff; 64]].concat(),
        [&hello[..], &[16, 0, 0, 0], &[0; 16]].concat(),
        vec![0; 4096],
    ] {
        let mut stream = TcpStream::connect(node.addresses.client).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&bytes).unwrap();
        let mut rest = Vec::new();
        // Closed, or reset; not left open.
        match stream.read_to_end(&mut rest) {
            Ok(count) => assert!(count <= 64, "at most a welcome"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
    assert!(client(&node).put(b"k", b"v").is_ok());
}

#[test]
fn a_batch_whose_answer_is_too_large_does_not_say_that_nothing_was_written() {
    let node = Node::start();
    let mut client = client(&node);
    let large = vec![7; 1 << 20];
    client.put(b"large", &large).unwrap();
    let gets = || (0..9).map(|_| get(b"large"));
    let refused = client.batch(gets().chain([put(b"a", b"1")]).collect());
    let refused = refused.unwrap_err();
    assert!(
        matches!(&refused, ClientError::Failed(failure) if failure.code == "too_large" && failure.in_doubt),
        "{refused}"
    );
    assert_eq!(client.get(b"a").unwrap().value().unwrap(), "1");
    let refused = client.batch(gets().collect()).unwrap_err();
    assert!(matches!(refused, ClientError::Failed(failure) if !failure.in_doubt));
}

#[test]
fn a_scan_of_large_values_comes_in_short_pages() {
    let node = Node::start();
    let mut client = client(&node);
    let value = vec![7; 100_000];
    for index in 0..100 {
        let key = format!("k{index}");
        client.put(key.as_bytes(), &value).unwrap();
    }
    let (mut cursor, mut keys) = (None, 0);
    loop {
        let page = client.scan(b"k", cursor.as_deref(), 100, true).unwrap();
        keys += page.entries.len();
        cursor = page.cursor;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(keys, 100);
}
