//! What a peer may send: no message makes a node panic, whatever is in it.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use bytes::Bytes;
use torc_env::{Env, Instant, NodeId, Origin, ShardId, Token, TreeId};
use torc_sim::fuzz::{Target, input, inputs};

use super::world::World;
use crate::api::{GetRequest, KEYSPACE_DEFAULT, Level, ScanRequest};
use crate::conflict::Conflict;
use crate::fuzz::parser;
use crate::membership::message as wire;
use crate::message::{
    Answer, ArchivedAnswer, Body, HashEntry, PageEntry, Request, Response, failure_of,
    level_to_wire,
};
use crate::run::Run;
use crate::target::Target as Place;
use crate::topology::{Epoch, SlotId, Topology};
use crate::version::{Actor, Context, Dot, Minter, State, StateRef, Write};

const TREE: u32 = 1;
const KEY: &[u8] = b"key";
const SEED: u64 = 91;
/// After so many messages the nodes are new ones: some messages take a node out of its cluster.
const MESSAGES_OF_A_WORLD: u64 = 200;

/// A state of one value.
fn state() -> State {
    state_at(1_700_000_000_000_001)
}

/// The same, with this stamp.
fn state_at(stamp: u64) -> State {
    let mut state = State::default();
    let write = Write {
        context: &Context::default(),
        dot: Dot {
            actor: Actor(7),
            counter: stamp,
        },
        minter: Minter::Replica,
        value: Some(Bytes::from_static(b"value")),
        expires_at_ms: 0,
        keyed: None,
        now_ms: 1_700_000_000_000,
        conflict: Conflict::Siblings,
        siblings_max: 10,
    };
    state.put(write).unwrap();
    state
}

fn bodies<'a>(state: &'a [u8], context: &'a [u8], run: &Run) -> Vec<Body<'a>> {
    let (first, last) = (run.range.first.0, run.range.last.0);
    vec![
        Body::Read {
            tree: TREE,
            key: KEY,
            known: Some(1),
            is_repair: false,
        },
        Body::Merge {
            tree: TREE,
            key: KEY,
            state,
        },
        Body::Hint {
            tree: TREE,
            key: KEY,
            state,
            target: 1,
        },
        Body::Get {
            tree: TREE,
            key: KEY,
            r: level_to_wire(Level::One),
            at_least: Some(context),
        },
        Body::Write {
            tree: TREE,
            key: KEY,
            value: Some(b"value"),
            ttl_seconds: 60,
            context: Some(context),
            if_match: None,
            flags: 0,
            w: level_to_wire(Level::One),
            idempotency: Some((9, 8)),
        },
        Body::Scan {
            tree: TREE,
            first,
            after: Some(KEY),
            last,
            prefix: b"k",
            records: 10,
        },
        Body::Sums {
            tree: TREE,
            first,
            last,
            floor_hour: 1,
            leaves: vec![(0, u32::MAX), (5, 9)],
        },
        Body::Hashes {
            tree: TREE,
            first,
            after: None,
            last,
            floor_hour: 1,
            records: 10,
        },
        Body::OldestHint,
    ]
}

/// Every request that one node sends another, as a node of `world` takes it.
fn requests(world: &World) -> Vec<Vec<u8>> {
    let view = world.node(0).0.view().unwrap();
    let place = Place::in_tree(view.clone(), TreeId(TREE), KEY).unwrap();
    let run = Run::at(&view, TreeId(TREE), 3, Token::of(TreeId(TREE), KEY));
    let (state, context) = (state(), Context::default().to_bytes());
    let encoded = state.encode();
    let bodies = bodies(&encoded, &context, &run);
    let requests = bodies.into_iter().map(|body| {
        let owners = match &body {
            Body::Scan { .. } | Body::Sums { .. } | Body::Hashes { .. } => run.owners,
            _ => place.owners(),
        };
        let request = Request {
            id: 1,
            remaining_ms: 500,
            epoch: view.topology.epoch.0,
            owners,
            body,
        };
        request.encode().to_vec()
    });
    requests.collect()
}

/// What the memberships of two nodes say to each other.
fn memberships(world: &World) -> Vec<Vec<u8>> {
    let topology = world.node(0).0.view().unwrap().topology.clone();
    let mut next = (*topology).clone();
    next.epoch = next.epoch.next();
    let ballot = wire::WireBallot { round: 9, node: 1 };
    let instance = wire::Instance {
        cluster: topology.cluster.0,
        seeds_hash: topology.seeds_hash,
        epoch: next.epoch.0,
        ballot,
    };
    let cluster = topology.cluster.0;
    let peer = topology.members[1].node.unwrap_or_default().0;
    let messages = [
        wire::Message::Prepare { instance },
        wire::Message::Accept {
            instance,
            value: next.encode(),
        },
        wire::Message::Learn {
            topology: next.encode(),
        },
        wire::Message::Fetch {
            name: topology.name.clone(),
            above: 0,
        },
        wire::Message::Gossip {
            cluster,
            epoch: topology.epoch.0,
            digests: vec![wire::WireDigest {
                node: peer,
                generation: 1,
                heartbeat: 1,
            }],
        },
        wire::Message::States {
            cluster,
            states: vec![wire::WireState {
                node: peer,
                generation: 1,
                heartbeat: 1 << 40,
                epoch: topology.epoch.0,
                disk_bytes: 1,
                disk_free_bytes: 2,
                requests: 3,
                backlog_bytes: 4,
            }],
        },
        wire::Message::Ping { cluster },
    ];
    messages.map(|message| message.encode().to_vec()).to_vec()
}

fn peer(world: &World) -> Origin {
    let view = world.node(0).0.view().unwrap();
    Origin {
        node: view.topology.members[1].node.unwrap_or(NodeId(1)),
        shard: ShardId(0),
    }
}

/// Gives a node of a small cluster messages made out of `valid` ones, one after the other.
fn send(name: &str, valid: impl Fn(&World) -> Vec<Vec<u8>>) {
    let world = RefCell::new((World::three(SEED), 0));
    let valid = valid(&world.borrow().0);
    let target = Target {
        name,
        valid: &valid,
        one_in: 20,
        within: None,
    };
    target.fuzz(|message| {
        let (world, sent) = &mut *world.borrow_mut();
        if *sent == MESSAGES_OF_A_WORLD {
            (*world, *sent) = (World::three(SEED), 0);
        }
        *sent += 1;
        let (origin, message) = (peer(world), Bytes::copy_from_slice(message));
        let answer = world.on(0, |node, _| node.serve(origin, message));
        // Nothing, for a message of no known family.
        let is_answer =
            Response::access(&answer).is_ok() || wire::Answer::decode(&answer).is_some();
        assert!(answer.is_empty() || is_answer);
    });
}

#[test]
fn no_request_makes_a_node_panic() {
    send("request to a node", requests);
}

#[test]
fn no_word_of_a_member_makes_a_node_panic() {
    send("word to a membership", memberships);
}

/// One course against a member two of whose three answers are changed: writes, reads, scans, a
/// repair, and gossip all along. Nothing may panic, and no value may be read that was not written: a
/// state carries checks of its own.
fn ask_a_liar(course: u64) {
    let world = World::three(SEED + course);
    let answered = Cell::new(course << 16);
    world.spoil_answers(1, move |answer| {
        let number = answered.replace(answered.get() + 1);
        if number.is_multiple_of(3) || answer.is_empty() {
            return answer;
        }
        input(number, &[answer.to_vec()]).into()
    });
    for number in 0..20 {
        let key = format!("key {}", number % 5);
        // Whether it succeeds depends on the third member.
        drop(world.put(0, &key, &format!("value of {key}")));
        let keyspace = KEYSPACE_DEFAULT.clone();
        let got = world.on(0, |node, deadline| {
            let request = GetRequest {
                keyspace,
                key: Bytes::from(key.clone()),
                r: Level::All,
                at_least: None,
                deadline,
            };
            async move { node.get(request).await }
        });
        for sibling in got.map(|got| got.siblings).unwrap_or_default() {
            assert_eq!(sibling.value, format!("value of {key}"));
        }
        world.sleep(Duration::from_millis(100));
    }
    let scan = ScanRequest {
        keyspace: KEYSPACE_DEFAULT.clone(),
        cursor: None,
        limit: 100,
        prefix: Bytes::new(),
        values: true,
        r: Level::Quorum,
        deadline: Instant(u64::MAX),
    };
    let scanned = world.on(0, |node, deadline| async move {
        node.scan(ScanRequest { deadline, ..scan }).await
    });
    drop(scanned);
    drop(world.on(0, |node, _| async move { node.repair().await }));
}

#[test]
fn no_answer_of_a_member_makes_a_node_panic() {
    for course in 0..inputs().div_ceil(2_000) {
        let asked = catch_unwind(AssertUnwindSafe(|| ask_a_liar(course)));
        if let Err(panic) = asked {
            println!("course {course}");
            resume_unwind(panic);
        }
    }
}

/// The answer of node 0 to a word of another member.
fn word(world: &World, message: &wire::Message) -> wire::Answer {
    let (origin, message) = (peer(world), message.encode());
    let answer = world.on(0, |node, _| node.serve(origin, message));
    wire::Answer::decode(&answer).unwrap()
}

#[test]
fn a_ballot_at_the_end_of_its_numbers_is_refused_and_outbids_nobody() {
    let world = World::three(SEED);
    let topology = world.node(0).0.view().unwrap().topology.clone();
    let ballot = wire::WireBallot {
        round: u64::MAX,
        node: 1,
    };
    let instance = wire::Instance {
        cluster: topology.cluster.0,
        seeds_hash: topology.seeds_hash,
        epoch: topology.epoch.next().0,
        ballot,
    };
    let mut next = (*topology).clone();
    next.epoch = next.epoch.next();
    let value = next.encode();
    for message in [
        wire::Message::Prepare { instance },
        wire::Message::Accept { instance, value },
    ] {
        let answer = word(&world, &message);
        assert!(matches!(answer, wire::Answer::Refused { .. }), "{answer:?}");
    }
    world.keyspace("after", |_| {});
}

#[test]
fn a_topology_whose_numbers_cannot_go_on_is_refused() {
    let world = World::three(SEED);
    let topology = world.node(0).0.view().unwrap().topology.clone();
    let numbers: [fn(&mut Topology); 3] = [
        |topology| topology.epoch = Epoch(u64::MAX),
        |topology| topology.next_slot = SlotId(u32::MAX),
        |topology| topology.next_keyspace = u32::MAX,
    ];
    for change in numbers {
        let mut last = (*topology).clone();
        last.epoch = last.epoch.next();
        change(&mut last);
        let learn = wire::Message::Learn {
            topology: last.encode(),
        };
        let answer = word(&world, &learn);
        assert!(matches!(answer, wire::Answer::Refused { .. }), "{answer:?}");
    }
    world.keyspace("after", |_| {});
}

#[test]
fn a_stamp_ahead_of_civil_time_keeps_nobody_from_writing_its_key() {
    let world = World::three(SEED);
    let view = world.node(0).0.view().unwrap();
    let place = Place::in_tree(view.clone(), TreeId(TREE), KEY).unwrap();
    let minute = 60_000_000;
    let ahead = state_at(world.node(0).0.env.wall().0 + minute).encode();
    let merge = Request {
        id: 1,
        remaining_ms: 500,
        epoch: view.topology.epoch.0,
        owners: place.owners(),
        body: Body::Merge {
            tree: TREE,
            key: KEY,
            state: &ahead,
        },
    };
    let (origin, merge) = (peer(&world), merge.encode());
    let answer = world.on(0, |node, _| node.serve(origin, merge));
    let answer = &Response::access(&answer).unwrap().answer;
    assert!(matches!(answer, ArchivedAnswer::Acked), "it exists already");
    let written = world.put_with(0, "key", "next", |write| write.read_context_first = true);
    assert!(written.is_ok(), "{written:?}");
    assert_eq!(world.values(0, "key"), ["next"]);
}

#[test]
fn no_bytes_make_an_answer_panic() {
    let (state, context) = (state().encode(), Context::default().to_bytes());
    let looked = || Some((7, KEY.to_vec()));
    let answers = [
        Answer::Acked,
        Answer::State { state: &state },
        Answer::Written {
            context: &context,
            replicas: 2,
            hints: 1,
        },
        Answer::Page {
            entries: vec![PageEntry {
                key: KEY,
                state: &state,
            }],
            looked: looked(),
        },
        Answer::Sums {
            floor_hour: 1,
            sums: vec![1, 2],
            is_whole: true,
        },
        Answer::Hashes {
            entries: vec![HashEntry { key: KEY, hash: 3 }],
            looked: looked(),
        },
        Answer::Lacks {
            ranges: vec![(1, 2)],
            is_catching_up: true,
        },
        Answer::Failed {
            code: 10,
            message: "busy",
            in_doubt: true,
            retry_after_ms: 5,
        },
    ];
    let valid = answers.map(|answer| Response { epoch: 1, answer }.encode().to_vec());
    parser("answer", &valid).fuzz(|bytes| {
        let Ok(response) = Response::access(bytes) else {
            return;
        };
        drop(failure_of(&response.answer));
        match &response.answer {
            ArchivedAnswer::State { state } => {
                let _unread = StateRef::parse(state);
            }
            ArchivedAnswer::Written { context, .. } => drop(Context::from_bytes(context)),
            ArchivedAnswer::Page { entries, .. } => {
                for entry in entries.iter() {
                    let _unread = StateRef::parse(&entry.state);
                }
            }
            _ => {}
        }
    });
}
