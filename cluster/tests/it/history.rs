//! A small world of replicas, clients and clocks that writes one key, and beside it a model that
//! remembers the causal history of every write as an exact set.
//!
//! The model knows one rule: a write stays unless somebody holds a write that has seen it. It knows
//! nothing of dots, floors, merging or bounds, so it can be wrong in none of the ways in which the
//! real thing can.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;
use torc_cluster::api::Idempotency;
use torc_cluster::conflict::Conflict;
use torc_cluster::hlc::{Hlc, SKEW_MAX_DEFAULT};
use torc_cluster::version::{
    Answered, BootIdentity, Context, Dot, EXACT_MAX, Keyed, Minter, State, Write,
};
use torc_env::{NodeId, WallTime};

pub const REPLICAS: usize = 3;
const CLIENTS: usize = 3;

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Step {
    /// A client writes through a replica; it forgets what it had seen first, if `blind`.
    Put {
        replica: usize,
        client: usize,
        blind: bool,
        delete: bool,
    },
    /// A client writes through a node that is no replica, which hands the write to one.
    GuestPut { replica: usize, client: usize },
    /// A client sends one request to two replicas that do not know of each other's attempt.
    Retried {
        first: usize,
        second: usize,
        client: usize,
    },
    /// A client reads from two replicas (or one).
    Read {
        one: usize,
        two: usize,
        client: usize,
    },
    /// One replica's whole state reaches another.
    Send { from: usize, to: usize },
    /// A replica starts again under a fresh actor.
    Restart { replica: usize },
    /// Time passes; the replica's clock may be slow.
    Tick { replica: usize, micros: u64 },
}

/// Sequences of steps.
pub fn steps(with_retries: bool) -> impl Strategy<Value = Vec<Step>> {
    let replica = || 0..REPLICAS;
    let client = || 0..CLIENTS;
    let put = (
        replica(),
        client(),
        any::<bool>(),
        prop::bool::weighted(0.2),
    )
        .prop_map(|(replica, client, blind, delete)| Step::Put {
            replica,
            client,
            blind,
            delete,
        });
    let guest =
        (replica(), client()).prop_map(|(replica, client)| Step::GuestPut { replica, client });
    let retried =
        (replica(), replica(), client()).prop_map(|(first, second, client)| Step::Retried {
            first,
            second,
            client,
        });
    let read = (replica(), replica(), client()).prop_map(|(one, two, client)| Step::Read {
        one,
        two,
        client,
    });
    let send = (replica(), replica()).prop_map(|(from, to)| Step::Send { from, to });
    let restart = replica().prop_map(|replica| Step::Restart { replica });
    let tick =
        (replica(), 0..2_000_u64).prop_map(|(replica, micros)| Step::Tick { replica, micros });
    let step = prop_oneof![
        6 => put,
        1 => guest,
        if with_retries { 3 } else { 0 } => retried,
        4 => read,
        5 => send,
        1 => restart,
        2 => tick,
    ];
    prop::collection::vec(step, 1..60)
}

/// What a client carries, and what it has really seen.
#[derive(Clone, Default)]
struct Client {
    context: Context,
    seen: BTreeSet<Dot>,
}

struct Replica {
    boot: BootIdentity,
    clock: Hlc,
    wall: WallTime,
    state: State,
    /// Every write that ever reached it.
    holds: BTreeSet<Dot>,
}

/// The world and its model.
pub struct World {
    conflict: Conflict,
    /// Whether actors are renewed before any bound on exact dots is reached.
    exact: bool,
    replicas: Vec<Replica>,
    clients: Vec<Client>,
    /// Everything that the writer of a write had seen.
    histories: BTreeMap<Dot, BTreeSet<Dot>>,
    minted: BTreeMap<u128, usize>,
    guest: BootIdentity,
    guest_clock: Hlc,
    requests: u128,
}

impl World {
    pub fn new(conflict: Conflict, exact: bool) -> Self {
        let replica = |index: usize| {
            let number = u64::try_from(index).unwrap();
            Replica {
                boot: BootIdentity::first(NodeId(u128::from(number) + 1), number),
                clock: Hlc::resume(0, SKEW_MAX_DEFAULT),
                wall: WallTime(1_700_000_000_000_000 + number * 1_000),
                state: State::default(),
                holds: BTreeSet::new(),
            }
        };
        Self {
            conflict,
            exact,
            replicas: (0..REPLICAS).map(replica).collect(),
            clients: vec![Client::default(); CLIENTS],
            histories: BTreeMap::new(),
            minted: BTreeMap::new(),
            guest: BootIdentity::first(NodeId(99), 0),
            guest_clock: Hlc::resume(0, SKEW_MAX_DEFAULT),
            requests: 0,
        }
    }

    pub fn state(&self, replica: usize) -> &State {
        &self.replicas[replica].state
    }

    pub fn take(&mut self, step: &Step) {
        match *step {
            Step::Put {
                replica,
                client,
                blind,
                delete,
            } => {
                if blind {
                    self.clients[client] = Client::default();
                }
                let value = (!delete).then(|| Bytes::from(self.histories.len().to_string()));
                let writer = self.clients[client].clone();
                let (dot, version) = self.put(replica, &writer, value, None);
                self.clients[client].context = version;
                self.clients[client].seen.insert(dot);
            }
            Step::GuestPut { replica, client } => self.guest_put(replica, client),
            Step::Retried {
                first,
                second,
                client,
            } => self.retried(first, second, client),
            Step::Read { one, two, client } => {
                let read = self.replicas[one]
                    .state
                    .merge(&self.replicas[two].state, self.conflict)
                    .unwrap();
                self.clients[client].context = read.context().clone();
                let holds: Vec<Dot> = [one, two]
                    .iter()
                    .flat_map(|replica| self.replicas[*replica].holds.iter().copied())
                    .collect();
                let mut seen = BTreeSet::new();
                for dot in holds {
                    seen.extend(&self.histories[&dot]);
                    seen.insert(dot);
                }
                self.clients[client].seen = seen;
            }
            Step::Send { from, to } => self.send(from, to),
            Step::Restart { replica } => self.restart(replica),
            Step::Tick { replica, micros } => self.replicas[replica].wall.0 += micros,
        }
    }

    pub fn send(&mut self, from: usize, to: usize) {
        let sent = self.replicas[from].state.clone();
        let held = self.replicas[from].holds.clone();
        self.receive(to, &sent, held);
    }

    /// The writes that the model says a replica must show, tombstones included.
    pub fn expected(&self, replica: usize) -> BTreeSet<Dot> {
        let holds = &self.replicas[replica].holds;
        let is_covered = |dot: &Dot| {
            holds
                .iter()
                .any(|other| self.histories[other].contains(dot))
        };
        holds
            .iter()
            .copied()
            .filter(|dot| !is_covered(dot))
            .collect()
    }

    pub fn shown(&self, replica: usize) -> BTreeSet<Dot> {
        let siblings = self.replicas[replica].state.siblings();
        siblings.iter().map(|sibling| sibling.dot).collect()
    }

    fn receive(&mut self, to: usize, sent: &State, held: BTreeSet<Dot>) {
        let replica = &mut self.replicas[to];
        replica
            .clock
            .observe(replica.wall, sent.newest_stamp())
            .unwrap();
        replica.state = replica.state.merge(sent, self.conflict).unwrap();
        replica.holds.extend(held);
    }

    fn restart(&mut self, replica: usize) {
        let replica = &mut self.replicas[replica];
        replica.boot = replica.boot.next(replica.boot.random);
        let mark = replica.clock.last();
        replica.clock = Hlc::resume(mark, SKEW_MAX_DEFAULT);
    }

    fn put(
        &mut self,
        replica: usize,
        writer: &Client,
        value: Option<Bytes>,
        keyed: Option<Keyed>,
    ) -> (Dot, Context) {
        let actor = self.replicas[replica].boot.actor();
        if self.exact && self.minted.get(&actor.0) == Some(&EXACT_MAX) {
            self.restart(replica);
        }
        let target = &mut self.replicas[replica];
        let actor = target.boot.actor();
        let newest = target
            .state
            .newest_stamp()
            .max(writer.context.newest_stamp());
        let dot = Dot {
            actor,
            counter: target.clock.mint(target.wall, newest),
        };
        let version = target
            .state
            .put(Write {
                context: &writer.context,
                dot,
                minter: Minter::Replica,
                value,
                expires_at_ms: 0,
                keyed,
                now_ms: target.wall.millis(),
                conflict: self.conflict,
                siblings_max: 1_000,
            })
            .unwrap();
        target.holds.insert(dot);
        *self.minted.entry(actor.0).or_default() += 1;
        self.histories.insert(dot, writer.seen.clone());
        (dot, version)
    }

    fn guest_put(&mut self, replica: usize, client: usize) {
        if self.exact && self.minted.get(&self.guest.actor().0) == Some(&EXACT_MAX) {
            self.guest = self.guest.next(0);
        }
        let actor = self.guest.actor();
        *self.minted.entry(actor.0).or_default() += 1;
        let writer = self.clients[client].clone();
        let wall = self.replicas[replica].wall;
        let counter = self.guest_clock.mint(wall, writer.context.newest_stamp());
        let dot = Dot { actor, counter };
        let mut state = State::default();
        let version = state
            .put(Write {
                context: &writer.context,
                dot,
                minter: Minter::Guest,
                value: Some(Bytes::from_static(b"guest")),
                expires_at_ms: 0,
                keyed: None,
                now_ms: wall.millis(),
                conflict: self.conflict,
                siblings_max: 1_000,
            })
            .unwrap();
        self.histories.insert(dot, writer.seen);
        self.receive(replica, &state, BTreeSet::from([dot]));
        self.clients[client].context = version;
        self.clients[client].seen.insert(dot);
    }

    fn retried(&mut self, first: usize, second: usize, client: usize) {
        self.requests += 1;
        let request = Idempotency {
            id: self.requests,
            body_hash: 1,
        };
        let writer = self.clients[client].clone();
        for replica in [first, second] {
            let target = &self.replicas[replica];
            let keyed = Keyed {
                request,
                until_ms: target.wall.millis() + 900_000,
            };
            match target.state.answered(request.id, request.body_hash) {
                Answered::No => {
                    let value = Some(Bytes::from_static(b"retried"));
                    let (dot, version) = self.put(replica, &writer, value, Some(keyed));
                    self.clients[client].context = version;
                    self.clients[client].seen.insert(dot);
                }
                Answered::With(version) => self.clients[client].context = version,
                Answered::OtherBody => panic!("the body is the same"),
            }
        }
    }
}
