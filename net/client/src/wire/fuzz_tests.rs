//! No bytes from the peer make the readers of the binary protocol panic or hold much memory, also
//! behind a checksum that fits.

use bytes::{Bytes, BytesMut};
use torc_env::{NodeId, ShardId};
use torc_sim::fuzz::Target;

use super::frame::{self, FRAME_BYTES_MAX};
use super::handshake::{Hello, Status, Welcome};
use super::message::{
    self, Answer, ArchivedAnswer, Delete, Entry, Failure, Get, Got, Level, Operation, Outcome,
    Page, Put, Request, Route, RouteNode, RouteRange, Scan, Sibling, Single, Write, Written,
};
use crate::answer::{self, unexpected};

fn parser<'a>(name: &'a str, valid: &'a [Vec<u8>]) -> Target<'a> {
    Target {
        name,
        valid,
        one_in: 1,
        within: Some(|run| allocation_counter::measure(run).bytes_max),
    }
}

/// `bytes` with a CRC-32C of what lies behind `at + 4` (or before `at`, if `at` is near the end) at
/// `at`.
fn with_checksum(bytes: &[u8], at: usize, covered: std::ops::Range<usize>) -> Option<Vec<u8>> {
    let checksum = crc_fast::crc32_iscsi(bytes.get(covered)?);
    let mut fitting = bytes.to_vec();
    fitting
        .get_mut(at..at + 4)?
        .copy_from_slice(&checksum.to_le_bytes());
    Some(fitting)
}

fn put(key: &[u8]) -> Single<'_> {
    Single::Put(Put {
        key,
        value: b"value",
        ttl_seconds: Some(60),
        write: Write {
            context: Some(b"context"),
            ..Write::default()
        },
    })
}

fn requests() -> Vec<Vec<u8>> {
    let get = || {
        Single::Get(Get {
            key: b"key",
            r: Level::Count(2),
        })
    };
    let delete = Single::Delete(Delete {
        key: b"key",
        write: Write::default(),
    });
    let scan = Scan {
        cursor: Some("cursor"),
        limit: 100,
        prefix: b"prefix",
        values: true,
        r: Level::Quorum,
    };
    let operations = [
        Operation::Ping,
        Operation::Route,
        Operation::Single(get()),
        Operation::Single(put(b"key")),
        Operation::Batch(vec![get(), put(b"other"), delete]),
        Operation::Scan(scan),
    ];
    let frames = operations.map(|operation| {
        let mut out = BytesMut::new();
        let request = Request {
            timeout_ms: 5000,
            keyspace: b"default",
            operation,
        };
        message::encode_request(&mut out, 7, &request);
        out.to_vec()
    });
    frames.to_vec()
}

fn answers() -> Vec<Vec<u8>> {
    let sibling = || Sibling {
        value: b"value",
        expires_at_ms: 9,
    };
    let got = || Got {
        siblings: vec![sibling(), sibling()],
        context: b"context",
    };
    let failure = Failure {
        code: "overloaded",
        message: "busy",
        retryable: true,
        in_doubt: false,
        retry_after_ms: 100,
    };
    let written = Written {
        context: b"context",
        replicas: 2,
        hints: 1,
    };
    let page = Page {
        entries: vec![Entry {
            key: b"key",
            siblings: vec![sibling()],
            context: b"context",
        }],
        cursor: Some("cursor"),
    };
    let route = Route {
        epoch: 1,
        keyspace: 1,
        shard_count: 2,
        nodes: vec![RouteNode {
            node: 3,
            name: "n1",
            client: "127.0.0.1:7400",
            shard_count: 2,
            up: true,
        }],
        ranges: vec![RouteRange {
            last: u128::MAX,
            replicas: vec![0],
        }],
    };
    let answers = [
        Answer::Pong,
        Answer::Route(route),
        Answer::Single(Outcome::Got(got())),
        Answer::Batch(vec![Outcome::Got(got()), Outcome::Written(written)]),
        Answer::Page(page),
        Answer::Failure(failure),
    ];
    let frames = answers.map(|answer| {
        let mut out = BytesMut::new();
        message::encode_answer(&mut out, 7, &answer);
        out.to_vec()
    });
    frames.to_vec()
}

#[test]
fn no_bytes_make_a_frame_panic() {
    let valid = [requests(), answers()].concat();
    parser("frame", &valid).fuzz(|input| {
        let length = input.len().saturating_sub(4);
        let mut whole = input.to_vec();
        if let (Some(first), Ok(length)) = (whole.get_mut(..4), u32::try_from(length)) {
            first.copy_from_slice(&length.to_le_bytes());
        }
        let fitting = with_checksum(&whole, 4, 8..whole.len());
        for bytes in [Some(input.to_vec()), fitting].into_iter().flatten() {
            let mut input = BytesMut::from(&bytes[..]);
            while let Ok(Some(frame)) = frame::decode(&mut input, FRAME_BYTES_MAX) {
                assert!(frame.payload.len() < bytes.len());
            }
        }
    });
}

#[test]
fn no_bytes_make_a_handshake_panic() {
    let mut hello = BytesMut::new();
    Hello::new(Some(ShardId(1))).encode(&mut hello);
    let mut welcome = BytesMut::new();
    let ready = Welcome {
        version: 1,
        status: Status::Ready,
        shard_count: 2,
        shard: ShardId(1),
        node: NodeId(3),
        cluster: 4,
        epoch: 5,
        frame_bytes_max: 6,
    };
    ready.encode(&mut welcome);
    let valid = [hello.to_vec(), welcome.to_vec()];
    parser("handshake", &valid).fuzz(|input| {
        let end = input.len().saturating_sub(4);
        let fitting = with_checksum(input, end, 0..end);
        for bytes in [Some(input.to_vec()), fitting].into_iter().flatten() {
            if let Ok(Some(hello)) = Hello::decode(&mut BytesMut::from(&bytes[..])) {
                hello.common_version();
            }
            let _unread = Welcome::decode(&mut BytesMut::from(&bytes[..]));
        }
    });
}

#[test]
fn no_bytes_make_a_message_panic() {
    let frames = [requests(), answers()].concat();
    let payload = |frame: &Vec<u8>| frame[frame::HEADER_BYTES..].to_vec();
    let valid: Vec<Vec<u8>> = frames.iter().map(payload).collect();
    parser("message", &valid).fuzz(|input| {
        let _unread = message::request(input);
        let payload = Bytes::copy_from_slice(input);
        let Ok(answer) = message::answer(&payload) else {
            return;
        };
        match answer {
            ArchivedAnswer::Single(outcome) => drop(answer::Outcome::of(&payload, outcome)),
            ArchivedAnswer::Batch(outcomes) => {
                for outcome in outcomes.iter() {
                    drop(answer::Outcome::of(&payload, outcome));
                }
            }
            ArchivedAnswer::Page(page) => drop(answer::Page::of(&payload, page)),
            other => drop(unexpected("get", other)),
        }
    });
}
