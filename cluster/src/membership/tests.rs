//! Founding, joining and agreement in the simulated world.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use torc_env::{Class, Env, ShardId};
use torc_sim::{HostId, Options, PowerCut, Rng, SimEnv, Simulation};

use super::{Health, Membership, MembershipConfig, Standing};
use crate::detector::DetectorOptions;
use crate::gossip::GossipOptions;
use crate::keyspace::Keyspace;
use crate::topology::change::Change;
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
                resp: address,
                datacenter: String::new(),
                zone: String::new(),
                rack: String::new(),
                shards: self.shards,
                vnodes: 8,
            },
            generation: self.boots.borrow()[host],
            abstains: false,
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

#[test]
fn every_subset_of_seeds_founds_if_and_only_if_it_is_a_majority() {
    for up in 1..8_usize {
        let world = World::new(10 + up as u64, Options::default(), 3, 3, 1);
        let chosen: Vec<usize> = (0..3).filter(|host| up & 1 << host != 0).collect();
        chosen.iter().for_each(|host| world.boot(*host));
        if chosen.len() >= 2 {
            world.wait(MINUTE, "the majority is up", || world.all_up(&chosen));
            let view = world.node(chosen[0]).unwrap().view().unwrap();
            assert_eq!(
                view.topology.ring_member_count(),
                3,
                "absent seeds are members too"
            );
        } else {
            world.sleep(MINUTE);
            assert_eq!(world.standing(chosen[0]), Some(Standing::Outside));
        }
        // The others come late, claim their slots, and nothing moves for it.
        (0..3)
            .filter(|host| !chosen.contains(host))
            .for_each(|host| world.boot(host));
        world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
        world.assert_one_cluster();
        let view = world.node(0).unwrap().view().unwrap();
        let own: BTreeSet<_> = view
            .topology
            .members
            .iter()
            .filter_map(|m| m.node)
            .collect();
        assert_eq!(own.len(), 3, "every slot is claimed");
        assert_eq!(view.topology.members.len(), 3);
    }
}

#[test]
fn two_halves_of_four_seeds_found_nothing_and_together_one_cluster() {
    let world = World::new(30, Options::default(), 4, 4, 1);
    partition(&world, &[0, 1], &[2, 3], true);
    (0..4).for_each(|host| world.boot(host));
    world.sleep(MINUTE);
    assert!((0..4).all(|host| world.standing(host) == Some(Standing::Outside)));
    partition(&world, &[0, 1], &[2, 3], false);
    world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2, 3]));
    world.assert_one_cluster();
}

#[test]
fn a_minority_cut_off_at_the_founding_joins_the_majoritys_cluster() {
    let world = World::new(31, Options::default(), 5, 5, 1);
    partition(&world, &[0, 1], &[2, 3, 4], true);
    (0..5).for_each(|host| world.boot(host));
    world.wait(MINUTE, "the majority is up", || world.all_up(&[2, 3, 4]));
    world.sleep(MINUTE / 2);
    assert_eq!(world.standing(0), Some(Standing::Outside));
    partition(&world, &[0, 1], &[2, 3, 4], false);
    world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2, 3, 4]));
    world.assert_one_cluster();
}

fn partition(world: &World, left: &[usize], right: &[usize], blocked: bool) {
    for (a, b) in left
        .iter()
        .flat_map(|a| right.iter().map(move |b| (*a, *b)))
    {
        world
            .sim
            .set_blocked(world.hosts[a], world.hosts[b], blocked);
        world
            .sim
            .set_blocked(world.hosts[b], world.hosts[a], blocked);
    }
}

#[test]
fn a_crash_at_any_disk_operation_of_a_founder_never_makes_two_clusters() {
    let mut cuts = 0;
    for variant in 0..4 {
        for operation in 0.. {
            let world = World::new(40 + operation, Options::default(), 3, 3, 1);
            world
                .sim
                .cut_power(world.hosts[0], PowerCut { operation, variant });
            (0..3).for_each(|host| world.boot(host));
            world.wait(MINUTE, "two are up", || world.all_up(&[1, 2]));
            let cut = !world.sim.is_up(world.hosts[0]);
            if cut {
                cuts += 1;
                world.running.borrow_mut()[0].clear();
                world.boot(0);
            }
            world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
            world.assert_one_cluster();
            if !cut {
                break;
            }
        }
    }
    assert!(cuts > 20, "{cuts} cuts");
}

#[test]
fn a_voter_that_crashed_right_after_the_decision_remembers_its_vote() {
    let mut told = 0;
    for seed in 0..20 {
        let world = World::new(seed, Options::default(), 3, 3, 1);
        world.boot(0);
        world.boot(1);
        while world.node(0).is_none_or(|node| node.view().is_none()) {
            assert!(world.sim.step());
        }
        if world.node(1).unwrap().view().is_some() {
            continue;
        }
        told += 1;
        world.crash(1, 0);
        partition(&world, &[0], &[1, 2], true);
        world.boot(1);
        world.boot(2);
        // These two are a majority of the seed list, and would found anew if the vote were gone.
        world.wait(MINUTE, "the others know the cluster", || {
            world.epoch(1).is_some() && world.epoch(2).is_some()
        });
        world.assert_one_cluster();
        partition(&world, &[0], &[1, 2], false);
        world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
        world.assert_one_cluster();
    }
    assert!(
        told >= 10,
        "{told} seeds crash the voter before it hears of the decision"
    );
}

#[test]
fn founding_under_random_trouble_never_makes_two_clusters() {
    for seed in 0..300 {
        let mut rng = Rng::stream(seed, "founding");
        let count = 2 + rng.index(4);
        let world = World::new(seed, Options::draw(&mut rng), count, count, 1);
        for host in 0..count {
            if rng.chance(0.8) {
                world.boot(host);
            } else {
                world.crash(host, 0);
            }
        }
        for _ in 0..12 {
            world.sleep(Duration::from_millis(rng.within(0..=1500)));
            let host = rng.index(count);
            let other = rng.index(count);
            match rng.below(4) {
                0 => world.crash(host, u32::try_from(rng.below(5)).unwrap()),
                1 if !world.sim.is_up(world.hosts[host]) => world.boot(host),
                2 if host != other => partition(&world, &[host], &[other], rng.chance(0.5)),
                3 => world.sim.pause(world.hosts[host], rng.chance(0.5)),
                _ => {}
            }
        }
        for host in 0..count {
            world.sim.pause(world.hosts[host], false);
            for other in (0..count).filter(|other| *other != host) {
                partition(&world, &[host], &[other], false);
            }
            if !world.sim.is_up(world.hosts[host]) {
                world.boot(host);
            }
        }
        let all: Vec<usize> = (0..count).collect();
        world.wait(2 * MINUTE, &format!("seed {seed}: all up"), || {
            world.all_up(&all)
        });
        world.assert_one_cluster();
    }
}

#[test]
fn a_lone_node_founds_alone_and_keeps_its_identity_over_restarts() {
    for seeds in [0, 1] {
        let world = World::new(50, Options::default(), 1, seeds, 1);
        world.boot(0);
        world.wait(MINUTE, "up", || world.all_up(&[0]));
        let before = world.node(0).unwrap().view().unwrap().topology.clone();
        world.crash(0, 0);
        world.boot(0);
        world.wait(MINUTE, "up again", || world.all_up(&[0]));
        assert_eq!(*world.node(0).unwrap().view().unwrap().topology, *before);
    }
}

#[test]
fn a_later_node_joins_and_enters_the_ring_once_its_shards_have_pulled() {
    let world = World::new(60, Options::default(), 2, 1, 2);
    world.boot(0);
    world.wait(MINUTE, "the first is up", || world.all_up(&[0]));
    world.boot(1);
    world.wait(MINUTE, "the second is joining", || {
        world.standing(1) == Some(Standing::Joining)
            && world
                .shard(1, 1)
                .is_some_and(|shard| shard.to_pull().is_some())
    });
    let ring_members = |host| {
        let view = world.node(host).unwrap().view().unwrap();
        view.topology.ring_member_count()
    };
    assert_eq!(ring_members(1), 1, "a joining node is not in the ring");
    for shard in 0..2 {
        let membership = world.shard(1, shard).unwrap();
        let pull = membership.to_pull().unwrap();
        assert_eq!(pull.then.member_count(), 2);
        assert_eq!(pull.now.member_count(), 1);
        assert_eq!(
            world.standing(1),
            Some(Standing::Joining),
            "one shard is not enough"
        );
        world
            .sim
            .run(async move { membership.pulled(pull.epoch).await })
            .unwrap();
    }
    world.wait(MINUTE, "both are in the ring", || {
        world.all_up(&[0, 1]) && (0..2).all(|host| ring_members(host) == 2)
    });
    let first = world.node(0).unwrap().view().unwrap();
    let second = world.shard(1, 1).unwrap().view().unwrap();
    assert_eq!(first.topology.cluster, second.topology.cluster);
    assert_eq!(
        first.topology.voters.len(),
        1,
        "two voters survive less than one"
    );
}

#[test]
fn voters_grow_to_three_with_the_members() {
    let world = World::new(61, Options::default(), 4, 1, 1);
    world.boot(0);
    world.wait(MINUTE, "the first is up", || world.all_up(&[0]));
    for host in 1..4 {
        world.boot(host);
        join(&world, host);
    }
    let all = [0, 1, 2, 3];
    world.wait(MINUTE, "everyone knows", || {
        all.iter().all(|host| world.epoch(*host) == world.epoch(3)) && world.all_up(&all)
    });
    let view = world.node(0).unwrap().view().unwrap();
    assert_eq!(view.topology.voters.len(), 3);
    // One of three voters may be gone: the others still decide.
    world.crash(0, 0);
    put_keyspace(&world, 3, "later").unwrap();
}

/// Says for every shard of a joining host that it has pulled, until it is in the ring.
fn join(world: &World, host: usize) {
    world.wait(MINUTE, "in the ring", || {
        for shard in 0..world.shards {
            let membership = world.shard(host, usize::from(shard));
            let pull = membership.as_ref().and_then(Membership::to_pull);
            if let (Some(membership), Some(pull)) = (membership, pull) {
                world
                    .sim
                    .run(async move { membership.pulled(pull.epoch).await })
                    .unwrap();
            }
        }
        world.all_up(&[host])
    });
}

fn put_keyspace(world: &World, host: usize, name: &str) -> Result<Epoch, super::ChangeError> {
    let membership = world.node(host).unwrap();
    let keyspace = Keyspace {
        name: name.to_owned(),
        ..Keyspace::default_keyspace()
    };
    world
        .sim
        .run(async move { membership.put_keyspace(keyspace).await })
        .unwrap()
}

#[test]
fn keyspaces_made_at_once_on_every_node_all_exist_everywhere() {
    let world = World::new(70, Options::default(), 3, 3, 2);
    (0..3).for_each(|host| world.boot(host));
    world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
    world.wait(MINUTE, "second shards know", || {
        (0..3).all(|host| world.shard(host, 1).is_some_and(|shard| shard.ready()))
    });
    for host in 0..3 {
        // Through the second shard: it hands the change to the first.
        let membership = world.shard(host, 1).unwrap();
        let keyspace = Keyspace {
            name: format!("k{host}"),
            ..Keyspace::default_keyspace()
        };
        world.sim.spawn(async move {
            membership
                .put_keyspace(keyspace)
                .await
                .expect("nobody is missing");
        });
    }
    world.wait(MINUTE, "all keyspaces on all shards", || {
        (0..3).all(|host| {
            (0..2).all(|shard| {
                let view = world.shard(host, shard).unwrap().view().unwrap();
                (0..3).all(|name| view.topology.keyspace(&format!("k{name}")).is_some())
            })
        })
    });
    let view = world.node(0).unwrap().view().unwrap();
    let ids: BTreeSet<_> = view
        .topology
        .keyspaces
        .iter()
        .map(|keyspace| keyspace.id)
        .collect();
    assert_eq!(ids.len(), 4, "every keyspace has an id of its own");
}

#[test]
fn what_an_earlier_life_said_of_a_node_is_corrected_when_it_is_learned_late() {
    let world = World::new(74, Options::default(), 3, 3, 1);
    (0..3).for_each(|host| world.boot(host));
    world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
    world.crash(0, 0);
    // Stands for what the node said when it had two shards, and was not there to hear decided.
    let mut description = world.config(0).own;
    description.shards = 2;
    let (node, other) = (world.sim.node(world.hosts[0]), world.node(1).unwrap());
    let change = Change::Describe { node, description };
    let told = world.sim.run(async move { other.propose(&change).await });
    told.unwrap().unwrap();
    world.boot(0);
    world.wait(MINUTE, "all know of one shard", || {
        (0..3).all(|host| {
            let view = world.node(host).and_then(|node| node.view());
            view.is_some_and(|view| {
                let index = view.topology.index_of(node).unwrap();
                view.topology.member(index).description.shards == 1
            })
        })
    });
    world.sleep(Duration::from_secs(5));
    let epochs: Vec<_> = (0..3).map(|host| world.epoch(host)).collect();
    assert!(
        epochs.windows(2).all(|pair| pair[0] == pair[1]),
        "{epochs:?}"
    );
}

#[test]
fn without_a_majority_of_voters_nothing_changes_and_the_caller_is_told() {
    let world = World::new(71, Options::default(), 3, 3, 1);
    (0..3).for_each(|host| world.boot(host));
    world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
    world.crash(1, 0);
    world.crash(2, 0);
    assert_eq!(
        put_keyspace(&world, 0, "k"),
        Err(super::ChangeError::NoMajority { in_doubt: false })
    );
    world.boot(1);
    world.wait(MINUTE, "back", || world.all_up(&[0, 1]));
    put_keyspace(&world, 0, "k").unwrap();
    // The third learns of it by gossip alone.
    world.boot(2);
    world.wait(MINUTE, "the third knows", || {
        world.epoch(2) == world.epoch(0)
    });
}

#[test]
fn a_wiped_seed_is_not_let_in_under_its_old_slot() {
    let world = World::new(72, Options::default(), 3, 3, 1);
    (0..3).for_each(|host| world.boot(host));
    world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
    world.crash(2, 0);
    world.sim.replace(world.hosts[2]);
    world.boot(2);
    world.sleep(MINUTE);
    assert_eq!(world.standing(2), Some(Standing::Outside));
    let trouble = world.node(2).unwrap().trouble().unwrap();
    assert!(trouble.contains("replaced explicitly"), "{trouble}");
    world.assert_one_cluster();
}

#[test]
fn founders_with_different_seed_lists_found_nothing_together() {
    let world = World::new(73, Options::default(), 3, 3, 1);
    world.boot(0);
    world.boot_with(1, |config| config.cluster_name = "another".to_owned());
    world.sleep(MINUTE);
    assert_eq!(world.standing(0), Some(Standing::Outside));
    assert!(
        world
            .node(0)
            .unwrap()
            .trouble()
            .unwrap()
            .contains("seed list")
    );
    world.boot(2);
    world.wait(MINUTE, "the two of one mind are up", || {
        world.all_up(&[0, 2])
    });
    world.sleep(MINUTE);
    assert_eq!(world.standing(1), Some(Standing::Outside));
    world.assert_one_cluster();
}

#[test]
fn a_silent_node_is_down_for_all_and_up_again_after_its_return() {
    let world = World::new(80, Options::default(), 3, 3, 2);
    (0..3).for_each(|host| world.boot(host));
    let sees = |host: usize, shard: usize, other: usize, up: bool| {
        let node = world.sim.node(world.hosts[other]);
        let view = world.shard(host, shard).and_then(|shard| shard.view());
        view.is_some_and(|view| view.is_up(view.find(node).unwrap()) == up)
    };
    let all_see = |up| (0..2).all(|host| (0..2).all(|shard| sees(host, shard, 2, up)));
    world.wait(MINUTE, "all hear the third", || {
        world.all_up(&[0, 1, 2]) && all_see(true)
    });
    world.crash(2, 0);
    world.wait(MINUTE / 6, "the third is down for all", || all_see(false));
    world.boot(2);
    world.wait(MINUTE / 6, "the third is up for all", || all_see(true));
}

#[test]
fn a_refused_connection_makes_a_suspect_at_once_and_an_answer_clears_it() {
    let world = World::new(82, Options::default(), 2, 2, 2);
    (0..2).for_each(|host| world.boot(host));
    let other = world.sim.node(world.hosts[1]);
    let health = |shard| {
        let view = world.shard(0, shard)?.view()?;
        Some(view.health(view.find(other)?))
    };
    let all = |wanted| (0..2).all(|shard| health(shard) == Some(wanted));
    world.wait(MINUTE, "up for both shards", || all(Health::Up));
    let shard = world.shard(0, 1).unwrap();
    let view = shard.view().unwrap();
    shard.unreachable(view.find(other).unwrap());
    assert_eq!(health(1), Some(Health::Suspect));
    world.wait(MINUTE, "cleared by a probe", || all(Health::Up));
}

#[test]
fn a_node_that_was_paused_blames_nobody_else() {
    let world = World::new(81, Options::default(), 3, 3, 1);
    (0..3).for_each(|host| world.boot(host));
    world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
    world.sleep(MINUTE / 4);
    world.sim.pause(world.hosts[0], true);
    world.sleep(MINUTE / 2);
    world.sim.pause(world.hosts[0], false);
    for _ in 0..100 {
        world.sleep(Duration::from_millis(20));
        let view = world.node(0).unwrap().view().unwrap();
        let accused = view
            .topology
            .indexed()
            .find(|(member, _)| !view.is_up(*member));
        assert!(accused.is_none(), "{accused:?}");
    }
}

#[test]
fn one_seed_is_one_course_of_events() {
    let run = || {
        let world = World::new(90, Options::default(), 3, 3, 2);
        (0..3).for_each(|host| world.boot(host));
        world.wait(MINUTE, "all up", || world.all_up(&[0, 1, 2]));
        world.sleep(MINUTE / 10);
        world.sim.hash()
    };
    assert_eq!(run(), run());
}
