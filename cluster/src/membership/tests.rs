//! Founding, joining and agreement in the simulated world.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use torc_env::{Class, Env, ShardId};
use torc_sim::{HostId, Options, PowerCut, Rng, SimEnv, Simulation};

use super::{Membership, MembershipConfig, Standing};
use crate::detector::DetectorOptions;
use crate::gossip::GossipOptions;
use crate::keyspace::Keyspace;
use crate::topology::{ClusterId, Description, Epoch};

type Shards = Vec<Option<Membership<SimEnv>>>;

/// Hosts that run membership and nothing else.
struct World {
    sim: Simulation,
    hosts: Vec<HostId>,
    seeds: Vec<HostId>,
    shards: u16,
    boots: RefCell<Vec<u64>>,
    /// By host and shard.
    running: Rc<RefCell<Vec<Shards>>>,
    /// Every cluster id that any node ever used.
    clusters: Rc<RefCell<BTreeSet<ClusterId>>>,
}

impl World {
    /// `count` hosts, of which the first `seeds` are seeds. None runs membership yet.
    fn new(seed: u64, options: Options, count: usize, seeds: usize, shards: u16) -> World {
        let sim = Simulation::new(seed, options);
        let hosts: Vec<HostId> = (0..count).map(|_| sim.add_host(shards)).collect();
        World {
            seeds: hosts[..seeds].to_vec(),
            boots: RefCell::new(vec![0; count]),
            running: Rc::new(RefCell::new(vec![Vec::new(); count])),
            clusters: Rc::default(),
            hosts,
            sim,
            shards,
        }
    }

    fn config(&self, host: usize) -> MembershipConfig {
        let address = self.hosts[host].address();
        MembershipConfig {
            cluster_name: "test".to_owned(),
            seeds: self.seeds.iter().map(|seed| seed.address()).collect(),
            own: Description {
                name: format!("n{host}"),
                internode: address,
                http: address,
                client: address,
                datacenter: String::new(),
                zone: String::new(),
                rack: String::new(),
                shards: self.shards,
                vnodes: 8,
            },
            generation: self.boots.borrow()[host],
            gossip: GossipOptions::default(),
            detector: DetectorOptions::default(),
        }
    }

    fn boot(&self, host: usize) {
        self.boot_with(host, |_| {});
    }

    /// Starts membership on every shard of a host; a host that is down is started first.
    fn boot_with(&self, host: usize, edit: impl Fn(&mut MembershipConfig)) {
        if !self.sim.is_up(self.hosts[host]) {
            self.sim.restart(self.hosts[host], self.shards);
        }
        self.boots.borrow_mut()[host] += 1;
        self.running.borrow_mut()[host] = vec![None; usize::from(self.shards)];
        for shard in (0..self.shards).map(ShardId) {
            let mut config = self.config(host);
            edit(&mut config);
            let env = self.sim.env(self.hosts[host], shard);
            let (sim, id) = (self.sim.clone(), self.hosts[host]);
            let running = self.running.clone();
            let clusters = self.clusters.clone();
            env.clone().spawn(Class::Control, async move {
                let started = Membership::start(env, config).await;
                let membership = started.expect("the stored topology is readable");
                let serving = membership.clone();
                sim.serve(
                    id,
                    shard,
                    Rc::new(move |origin, request| {
                        let serving = serving.clone();
                        if let Some(view) = serving.view() {
                            clusters.borrow_mut().insert(view.topology.cluster);
                        }
                        async move { serving.serve(origin, request).await }.boxed_local()
                    }),
                );
                running.borrow_mut()[host][usize::from(shard.0)] = Some(membership);
            });
        }
    }

    fn crash(&self, host: usize, variant: u32) {
        self.sim.crash(self.hosts[host], variant);
        self.running.borrow_mut()[host].clear();
    }

    fn node(&self, host: usize) -> Option<Membership<SimEnv>> {
        self.shard(host, 0)
    }

    fn shard(&self, host: usize, shard: usize) -> Option<Membership<SimEnv>> {
        if !self.sim.is_up(self.hosts[host]) {
            return None;
        }
        self.running.borrow()[host].get(shard).cloned().flatten()
    }

    fn standing(&self, host: usize) -> Option<Standing> {
        self.node(host).map(|node| node.standing())
    }

    fn epoch(&self, host: usize) -> Option<Epoch> {
        let view = self.node(host)?.view()?;
        Some(view.topology.epoch)
    }

    fn sleep(&self, delay: Duration) {
        self.sim.run(self.sim.sleep(delay)).expect("time goes on");
        self.note_clusters();
    }

    fn note_clusters(&self) {
        for host in 0..self.hosts.len() {
            if let Some(view) = self.node(host).and_then(|node| node.view()) {
                self.clusters.borrow_mut().insert(view.topology.cluster);
            }
        }
    }

    /// Waits until `done`, at most `limit`.
    fn wait(&self, limit: Duration, what: &str, done: impl Fn() -> bool) {
        let end = self.sim.now() + limit;
        while !done() {
            assert!(
                self.sim.now() < end,
                "not within {limit:?}: {what}{}",
                self.picture()
            );
            self.sleep(Duration::from_millis(50));
        }
    }

    /// What every node believes, for the message of a failed assertion.
    fn picture(&self) -> String {
        let mut text = String::new();
        for host in 0..self.hosts.len() {
            let trouble = self.node(host).and_then(|node| node.trouble());
            text += &format!(
                "\n  n{host}: {:?} epoch {:?} {trouble:?}",
                self.standing(host),
                self.epoch(host)
            );
        }
        text
    }

    fn all_up(&self, hosts: &[usize]) -> bool {
        hosts
            .iter()
            .all(|host| self.standing(*host) == Some(Standing::Up))
    }

    /// At most one cluster was ever seen by anyone.
    fn assert_one_cluster(&self) {
        self.note_clusters();
        let clusters = self.clusters.borrow();
        assert!(
            clusters.len() <= 1,
            "clusters {clusters:?}{}",
            self.picture()
        );
    }
}

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn three_seeds_found_one_cluster() {
    let world = World::new(1, Options::default(), 3, 3, 1);
    (0..3).for_each(|host| world.boot(host));
    world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
    world.assert_one_cluster();
    let view = world.node(0).unwrap().view().unwrap();
    assert_eq!(
        view.topology.epoch,
        Epoch::FIRST,
        "nobody had to claim a slot"
    );
    assert_eq!(view.topology.members.len(), 3);
    world.wait(MINUTE, "everyone hears everyone", || {
        (0..3).all(|host| {
            let view = world.node(host).unwrap().view().unwrap();
            view.topology
                .indexed()
                .all(|(member, _)| view.is_up(member))
        })
    });
}
