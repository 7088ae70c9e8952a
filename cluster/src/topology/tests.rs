use std::cell::Cell;
use std::net::SocketAddr;
use std::path::Path;

use bytes::Bytes;
use torc_env::{Env, NodeId};
use torc_sim::{HostId, Options, PowerCut, Simulation};

use super::change::{Change, Founder, Refusal, seeds_hash};
use super::paxos::{Acceptor, Ballot};
use super::store::{Store, StoreError, Vote};
use super::{ClusterId, DecodeError, Description, Epoch, MemberState, Removed, SlotId, Topology};
use crate::keyspace::{Compaction, Conflict, Keyspace};

fn address(last: u8) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, last], 7401))
}

fn description(last: u8) -> Description {
    Description {
        name: format!("n{last}"),
        internode: address(last),
        http: address(last),
        client: address(last),
        resp: address(last),
        datacenter: "d".to_owned(),
        zone: "z".to_owned(),
        rack: format!("r{last}"),
        shards: 2,
        vnodes: 4,
    }
}

/// Three seeds, the third absent.
fn founded() -> Topology {
    let founders = [1, 2].map(|last| Founder {
        node: NodeId(u128::from(last)),
        description: description(last),
    });
    let seeds = [address(3), address(1), address(2), address(1)];
    Topology::found(ClusterId(77), "demo", &seeds, &founders).unwrap()
}

fn apply(base: &Topology, change: Change) -> Topology {
    change.apply(base).unwrap().expect("something to change")
}

fn join(last: u8) -> Change {
    Change::Join {
        node: NodeId(u128::from(last)),
        description: description(last),
    }
}

#[test]
fn every_seed_is_a_member_of_the_first_epoch_present_or_not() {
    let topology = founded();
    assert_eq!(topology.epoch, Epoch::FIRST);
    assert_eq!(topology.ring_member_count(), 3);
    assert_eq!(topology.voters, [SlotId(0), SlotId(1), SlotId(2)]);
    assert_eq!(topology.members[2].node, None);
    assert_eq!(topology.members[2].vnodes.len(), 128);
    assert_eq!(topology.members[0].vnodes.len(), 4);
    assert_eq!(topology.keyspace("default").unwrap().n, 3);
    assert_eq!(Topology::decode(&topology.encode()), Ok(topology));
}

#[test]
fn founders_agree_on_a_seed_list_whatever_its_order() {
    let one = seeds_hash("demo", &[address(1), address(2)]);
    assert_eq!(
        one,
        seeds_hash("demo", &[address(2), address(1), address(2)])
    );
    assert_ne!(one, seeds_hash("demo", &[address(1)]));
    assert_ne!(one, seeds_hash("other", &[address(1), address(2)]));
}

#[test]
fn an_absent_seed_claims_its_slot_and_nothing_moves() {
    let base = founded();
    let next = apply(&base, join(3));
    assert_eq!(next.epoch, Epoch(2));
    assert_eq!(next.members.len(), 3);
    assert_eq!(next.members[2].node, Some(NodeId(3)));
    assert_eq!(next.members[2].state, MemberState::Up);
    assert_eq!(next.members[2].vnodes, base.members[2].vnodes);
    assert_eq!(join(3).apply(&next), Ok(None), "it is done already");
    let impostor = Change::Join {
        node: NodeId(9),
        description: description(3),
    };
    assert!(matches!(
        impostor.apply(&next),
        Err(Refusal::SlotTaken { .. })
    ));
}

#[test]
fn a_newcomer_is_outside_the_ring_until_it_serves() {
    let base = founded();
    let joining = apply(&base, join(4));
    let index = joining.index_of(NodeId(4)).unwrap();
    assert_eq!(joining.member(index).state, MemberState::Joining);
    assert_eq!(joining.ring().member_count(), 3);
    assert_eq!(joining.ring_with(index).member_count(), 4);
    let serve = Change::Serve {
        node: NodeId(4),
        pulled: joining.epoch,
    };
    let early = Change::Serve {
        node: NodeId(4),
        pulled: base.epoch,
    };
    assert!(matches!(
        early.apply(&joining),
        Err(Refusal::PulledEarlier { .. })
    ));
    let serving = apply(&joining, serve.clone());
    assert_eq!(serving.ring().member_count(), 4);
    assert_eq!(serve.apply(&serving), Ok(None));
    let stranger = Change::Serve {
        node: NodeId(5),
        pulled: serving.epoch,
    };
    assert!(matches!(
        stranger.apply(&serving),
        Err(Refusal::NotAMember { .. })
    ));
}

#[test]
fn removed_nodes_and_stolen_names_are_refused() {
    let mut base = founded();
    base.removed.push(Removed {
        node: NodeId(4),
        slot: SlotId(2),
        name: "gone".to_owned(),
    });
    assert_eq!(
        join(4).apply(&base),
        Err(Refusal::Removed { node: NodeId(4) })
    );
    let thief = Change::Join {
        node: NodeId(5),
        description: Description {
            name: "n1".to_owned(),
            ..description(5)
        },
    };
    assert!(matches!(thief.apply(&base), Err(Refusal::Duplicate { .. })));
    let greedy = Change::Join {
        node: NodeId(5),
        description: Description {
            vnodes: 5000,
            ..description(5)
        },
    };
    assert!(matches!(
        greedy.apply(&base),
        Err(Refusal::Description { .. })
    ));
}

#[test]
fn a_restart_may_change_addresses_but_not_the_place() {
    let base = founded();
    let moved = Description {
        rack: "elsewhere".to_owned(),
        shards: 8,
        ..Description {
            name: "n1".to_owned(),
            ..description(9)
        }
    };
    let next = apply(
        &base,
        Change::Describe {
            node: NodeId(1),
            description: moved,
        },
    );
    let member = &next.members[0];
    assert_eq!(member.description.internode, address(9));
    assert_eq!(member.description.shards, 8);
    assert_eq!(member.description.rack, "r1");
}

#[test]
fn keyspaces_get_ids_that_are_never_reused() {
    let put = |name: &str| Change::PutKeyspace {
        keyspace: Keyspace {
            name: name.to_owned(),
            conflict: Conflict::Lww,
            ..Keyspace::default_keyspace()
        },
    };
    let drop = |name: &str| Change::DropKeyspace {
        name: name.to_owned(),
    };
    let first = apply(&founded(), put("k"));
    assert_eq!(put("k").apply(&first), Ok(None));
    let dropped = apply(&first, drop("k"));
    let again = apply(&dropped, put("k"));
    let id = |topology: &Topology| topology.keyspace("k").map(|keyspace| keyspace.id);
    assert!(id(&again) > id(&first));
    assert!(matches!(
        drop("k").apply(&dropped),
        Err(Refusal::UnknownKeyspace { .. })
    ));
    assert_eq!(
        drop("default").apply(&dropped),
        Err(Refusal::DefaultKeyspace)
    );
    let more_copies = Change::PutKeyspace {
        keyspace: Keyspace {
            n: 5,
            ..first.keyspace("k").unwrap().clone()
        },
    };
    assert_eq!(
        more_copies.apply(&first),
        Err(Refusal::Fixed { setting: "n" })
    );
}

#[test]
fn what_data_does_not_depend_on_can_be_altered_in_a_keyspace() {
    let base = founded();
    let wanted = Keyspace {
        ttl_default_seconds: 60,
        compaction: Compaction::TimeWindow { seconds: 3600 },
        tombstone_grace_seconds: 7,
        ..Keyspace::default_keyspace()
    };
    let alter = Change::PutKeyspace {
        keyspace: wanted.clone(),
    };
    let next = apply(&base, alter.clone());
    assert_eq!(next.keyspace("default"), Some(&wanted));
    assert_eq!(Topology::decode(&next.encode()), Ok(next.clone()));
    assert_eq!(alter.apply(&next), Ok(None), "once is enough");
    let conflict = Change::PutKeyspace {
        keyspace: Keyspace {
            conflict: Conflict::Lww,
            ..wanted
        },
    };
    let setting = "conflict policy";
    assert_eq!(conflict.apply(&next), Err(Refusal::Fixed { setting }));
}

#[test]
fn every_truncation_and_most_bit_flips_are_noticed_and_none_panics() {
    let good = apply(&founded(), join(4)).encode();
    for cut in 0..good.len() {
        assert!(Topology::decode(&good[..cut]).is_err(), "cut at {cut}");
    }
    let mut long = good.clone();
    long.push(0);
    assert!(matches!(
        Topology::decode(&long),
        Err(DecodeError::Length { .. })
    ));
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            // A flip may make another valid topology; it must then be exactly what was read.
            if let Ok(topology) = Topology::decode(&bad) {
                assert_eq!(topology.encode(), bad, "byte {at} bit {bit}");
            }
        }
    }
}

#[test]
fn no_bytes_make_a_topology_panic() {
    let mut later = apply(&founded(), join(4));
    later.removed.push(Removed {
        node: NodeId(9),
        slot: SlotId(8),
        name: "gone".to_owned(),
    });
    let valid = [founded().encode(), later.encode(), description(5).encode()];
    crate::fuzz::parser("topology", &valid).fuzz(|bytes| {
        drop(Description::decode(bytes));
        let Ok(topology) = Topology::decode(bytes) else {
            return;
        };
        assert_eq!(topology.encode(), bytes, "one topology, one form");
        topology.ring();
        for keyspace in &topology.keyspaces {
            topology.effective_n(keyspace);
        }
        for change in [join(3), join(6)] {
            drop(change.apply(&topology));
        }
    });
}

#[test]
fn impossible_topologies_are_refused() {
    let refused = |edit: fn(&mut Topology)| {
        let mut topology = founded();
        edit(&mut topology);
        Topology::decode(&topology.encode()).is_err()
    };
    assert!(!refused(|_| {}));
    assert!(refused(|t| t.epoch = Epoch(0)));
    assert!(refused(|t| t.voters.clear()));
    assert!(refused(|t| t.voters[2] = SlotId(9)));
    assert!(refused(|t| t.members.swap(0, 1)));
    assert!(refused(
        |t| t.members[1].vnodes = t.members[0].vnodes.clone()
    ));
    assert!(refused(|t| t.members[1].node = t.members[0].node));
    assert!(refused(|t| t.members[1].description.name = "n1".to_owned()));
    assert!(refused(|t| t.members[0].description.shards = 0));
    assert!(refused(|t| t.next_slot = SlotId(1)));
    assert!(refused(|t| t.next_keyspace = 1));
    assert!(refused(|t| t.keyspaces[0].n = 0));
}

fn vote() -> Vote {
    let ballot = |round| Ballot {
        round,
        node: NodeId(5),
    };
    let value = Bytes::from(apply(&founded(), join(3)).encode());
    Vote {
        instance: Epoch(2),
        acceptor: Acceptor::restore(ballot(9), Some((ballot(8), value))).unwrap(),
    }
}

const DECIDED: &str = "node/topology";
const VOTE: &str = "node/topology.vote";

/// A host whose disk holds a decided topology and a vote.
fn written() -> (Simulation, HostId) {
    let sim = Simulation::new(1, Options::default());
    let host = sim.add_host(1);
    let scenario = |env: torc_sim::SimEnv| async move {
        let (mut store, found) = Store::open(env.disk().clone()).await.unwrap();
        assert!(found.decided.is_none() && found.vote.is_none());
        store.save_decided(&founded().encode()).await.unwrap();
        store.save_vote(&vote()).await.unwrap();
    };
    sim.run_on(host, torc_env::ShardId(0), scenario).unwrap();
    (sim, host)
}

fn reopened(sim: &Simulation, host: HostId) -> Result<super::store::Found, StoreError> {
    let scenario = |env: torc_sim::SimEnv| async move {
        let opened = Store::open(env.disk().clone()).await;
        opened.map(|(_, found)| found)
    };
    sim.run_on(host, torc_env::ShardId(0), scenario).unwrap()
}

#[test]
fn decided_and_vote_survive_a_power_cut() {
    let (sim, host) = written();
    sim.crash(host, 0);
    sim.restart(host, 1);
    let found = reopened(&sim, host).unwrap();
    assert_eq!(found.decided, Some(founded()));
    assert_eq!(found.vote, Some(vote()));
}

#[test]
fn a_vote_about_a_decided_epoch_is_forgotten() {
    let (sim, host) = written();
    let scenario = |env: torc_sim::SimEnv| async move {
        let (mut store, _) = Store::open(env.disk().clone()).await.unwrap();
        let next = apply(&founded(), join(3));
        store.save_decided(&next.encode()).await.unwrap();
    };
    sim.run_on(host, torc_env::ShardId(0), scenario).unwrap();
    let found = reopened(&sim, host).unwrap();
    assert_eq!(found.decided.unwrap().epoch, Epoch(2));
    assert_eq!(found.vote, None);
}

#[test]
fn every_flipped_bit_in_either_file_is_an_error_and_never_a_fresh_start() {
    let (sim, host) = written();
    for path in [DECIDED, VOTE] {
        let files = sim.files(host);
        let (_, len) = files
            .iter()
            .find(|(name, _)| name == Path::new(path))
            .unwrap();
        assert_eq!(len % 4096, 0);
        // Every byte of the content, then samples of the padding.
        for offset in (0..1500).chain((1500..*len).step_by(97)) {
            let mask = 1 << (offset % 8);
            assert!(sim.flip_bits(host, Path::new(path), offset, mask));
            assert!(reopened(&sim, host).is_err(), "{path} byte {offset}");
            assert!(sim.flip_bits(host, Path::new(path), offset, mask));
        }
    }
    assert!(reopened(&sim, host).is_ok());
}

#[test]
fn a_power_cut_at_any_operation_leaves_the_old_or_the_new() {
    let reached = Cell::new(0);
    for variant in 0..5 {
        for operation in 0.. {
            let (sim, host) = written();
            let operation = sim.disk_operations(host) + operation;
            sim.cut_power(host, PowerCut { operation, variant });
            let scenario = |env: torc_sim::SimEnv| async move {
                let (mut store, _) = Store::open(env.disk().clone()).await.unwrap();
                let next = apply(&founded(), join(3));
                store.save_decided(&next.encode()).await.unwrap();
            };
            let finished = sim.run_on(host, torc_env::ShardId(0), scenario).is_some();
            // Also when it was not cut: what was reported as stored must not need luck.
            sim.crash(host, 0);
            sim.restart(host, 1);
            let epoch = reopened(&sim, host).unwrap().decided.unwrap().epoch;
            if finished {
                assert_eq!(epoch, Epoch(2));
                break;
            }
            reached.set(reached.get() + 1);
            assert!(epoch == Epoch(1) || epoch == Epoch(2));
        }
    }
    assert!(reached.get() >= 20, "{} cuts", reached.get());
}

#[test]
fn after_a_failed_write_nothing_is_stored_until_the_restart() {
    let (sim, host) = written();
    let failing = torc_sim::DiskOptions {
        sync_error: 1.0,
        ..torc_sim::DiskOptions::default()
    };
    sim.set_disk(host, failing);
    let good = sim.clone();
    let scenario = move |env: torc_sim::SimEnv| async move {
        let disk = env.disk().clone();
        let (mut store, _) = Store::open(disk).await.unwrap();
        let next = apply(&founded(), join(3)).encode();
        let first = store.save_decided(&next).await;
        assert!(matches!(first, Err(StoreError::Io { .. })), "{first:?}");
        good.set_disk(host, torc_sim::DiskOptions::default());
        let second = store.save_decided(&next).await;
        assert!(matches!(second, Err(StoreError::Poisoned)), "{second:?}");
    };
    sim.run_on(host, torc_env::ShardId(0), scenario).unwrap();
    assert_eq!(
        reopened(&sim, host).unwrap().decided.unwrap().epoch,
        Epoch(1)
    );
}

/// The bytes of docs/formats/topology.md. A change here is a change of the format.
#[test]
fn the_layout_is_pinned_by_the_page() {
    let mut topology = founded();
    topology.members.truncate(1);
    topology.members[0].vnodes.truncate(2);
    topology.voters.truncate(1);
    let bytes = topology.encode();
    let mut dump = String::new();
    for (line, chunk) in bytes.chunks(16).enumerate() {
        let hex: Vec<String> = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String = chunk
            .iter()
            .map(|byte| {
                if byte.is_ascii_graphic() {
                    char::from(*byte)
                } else {
                    '.'
                }
            })
            .collect();
        dump += &format!("{:04x}  {:<47}  {text}\n", line * 16, hex.join(" "));
    }
    let page = include_str!("../../../docs/formats/topology.md");
    assert!(page.contains(&dump), "the page must show:\n{dump}");
}

#[test]
fn a_full_disk_keeps_nothing_from_being_stored_once_there_is_room() {
    let (sim, host) = written();
    let used: u64 = sim.files(host).iter().map(|(_, bytes)| bytes).sum();
    sim.set_disk(
        host,
        torc_sim::DiskOptions {
            capacity_bytes: used,
            ..torc_sim::DiskOptions::default()
        },
    );
    let roomy = sim.clone();
    let scenario = move |env: torc_sim::SimEnv| async move {
        let (mut store, _) = Store::open(env.disk().clone()).await.unwrap();
        let next = apply(&founded(), join(3)).encode();
        for _ in 0..2 {
            let full = store.save_decided(&next).await;
            assert!(matches!(full, Err(StoreError::Io { .. })), "{full:?}");
        }
        roomy.set_disk(host, torc_sim::DiskOptions::default());
        store.save_decided(&next).await.unwrap();
    };
    sim.run_on(host, torc_env::ShardId(0), scenario).unwrap();
    assert_eq!(
        reopened(&sim, host).unwrap().decided.unwrap().epoch,
        Epoch(2)
    );
}
