//! Assembles a simulated cluster: every shard runs the real engine and the real cluster half.
//!
//! What `net/src/shard.rs` does in the real world: it opens the store, starts the node, and hands it
//! what arrives. The boot counter, which the real node keeps in its data directory, is kept here.

mod layouts;

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use torc_cluster::keyspace::Keyspace;
use torc_cluster::membership::{Health, Liveness, MembershipConfig, View};
use torc_cluster::node::{HintOptions, Node, NodeConfig, RepairOptions};
use torc_cluster::topology::Description;
use torc_cluster::version::{BootIdentity, StateRef};
use torc_engine::{Fsync, Keys, Layout, Options as StoreOptions, Store};
use torc_env::{Class, Env, ShardId, Token, TreeId};
use torc_sim::{EPOCH, HostId, Rng, SimEnv, Simulation};

use crate::config::Config;
use crate::history::{DotId, DotSeen, Holding, KeyId};
use crate::key_file::KeyFile;
use crate::run::STRAGGLERS;
use crate::value;

/// A shard's cluster half in the simulated world.
pub(crate) type SimNode = Node<SimEnv>;

/// Floors are thought about much more often than anybody would.
pub(crate) const FLOORS_INTERVAL: Duration = Duration::from_secs(2);

/// The class that requests of clients run in.
pub(crate) const NODE_CLASS: Class = Class::Foreground;

/// The variant of a crash that loses nothing: the process ends, the power stays.
const EVERYTHING_SURVIVES: u32 = 1;

/// A shard that runs.
#[derive(Clone)]
struct Running {
    env: SimEnv,
    node: SimNode,
    store: Store<SimEnv>,
}

/// Every node of a world.
pub(crate) struct Cluster {
    simulation: Simulation,
    config: Config,
    keyspace: Keyspace,
    hosts: Vec<HostId>,
    boots: RefCell<Vec<u64>>,
    /// By host: how its data is divided.
    layouts: RefCell<Vec<Layout>>,
    /// By host: the shards that it is to have from its next start on.
    wanted: RefCell<Vec<u16>>,
    /// By host: the boot that was told to stop.
    stopping: RefCell<Vec<Option<u64>>>,
    /// By host.
    key_files: RefCell<Vec<KeyFile>>,
    /// By host and shard; `None` until it has started.
    running: RefCell<Vec<Vec<Option<Running>>>>,
    troubles: RefCell<Vec<String>>,
}

/// Civil time since the epoch of all runs, by a clock that is right: the time of histories.
pub(crate) fn civil_ns(simulation: &Simulation) -> u64 {
    u64::try_from(simulation.civil().as_nanos()).expect("within centuries")
}

/// An expiry as the product says it, in the time of histories; `None` = never.
pub(crate) fn expires_ns(at_ms: u64) -> Option<u64> {
    let since_epoch_ms = at_ms.saturating_sub(EPOCH.millis());
    (at_ms != 0).then_some(since_epoch_ms * 1_000_000)
}

fn first_layout(shards: &u16) -> Layout {
    Layout {
        number: 0,
        shards: *shards,
    }
}

impl Cluster {
    /// Hosts of which none has started.
    pub(crate) fn new(simulation: &Simulation, config: &Config) -> Rc<Self> {
        let shards = config.shards.iter();
        let hosts: Vec<HostId> = shards.map(|shards| simulation.add_host(*shards)).collect();
        Rc::new(Self {
            simulation: simulation.clone(),
            config: config.clone(),
            keyspace: config.keyspace(),
            boots: RefCell::new(vec![0; hosts.len()]),
            layouts: RefCell::new(config.shards.iter().map(first_layout).collect()),
            wanted: RefCell::new(config.shards.clone()),
            stopping: RefCell::new(vec![None; hosts.len()]),
            key_files: RefCell::new(
                config
                    .encryption
                    .from_start
                    .iter()
                    .map(KeyFile::new)
                    .collect(),
            ),
            running: RefCell::new(vec![Vec::new(); hosts.len()]),
            troubles: RefCell::default(),
            hosts,
        })
    }

    pub(crate) fn simulation(&self) -> &Simulation {
        &self.simulation
    }

    pub(crate) fn hosts(&self) -> &[HostId] {
        &self.hosts
    }

    /// What went wrong at a start, for people. Nothing may.
    pub(crate) fn troubles(&self) -> Vec<String> {
        self.troubles.borrow().clone()
    }

    /// Name of the keyspace that clients use.
    pub(crate) fn keyspace(&self) -> Bytes {
        Bytes::copy_from_slice(self.keyspace.name.as_bytes())
    }

    /// Starts a host unless it was started before.
    pub(crate) fn start_first(self: &Rc<Self>, host: HostId) {
        if self.boots.borrow()[usize::from(host.0)] == 0 {
            self.start(host);
        }
    }

    /// The hosts of the nodes that found the cluster.
    pub(crate) fn founders(&self) -> &[HostId] {
        &self.hosts[..usize::from(self.config.founders())]
    }

    /// Starts a host that is down, or has never started.
    pub(crate) fn start(self: &Rc<Self>, host: HostId) {
        let index = usize::from(host.0);
        if self.is_to_be_divided(host) {
            return self.divide_and_start(host);
        }
        let shards = self.layout(host).shards;
        if !self.simulation.is_up(host) {
            self.simulation.restart(host, shards);
        }
        self.boots.borrow_mut()[index] += 1;
        self.running.borrow_mut()[index] = vec![None; usize::from(shards)];
        // One identity for all shards of a boot, as the real node's start syncs it.
        let boot = BootIdentity {
            node: self.simulation.node(host),
            boot: self.boots.borrow()[index],
            random: self.simulation.env(host, ShardId(0)).random(),
        };
        for shard in (0..shards).map(ShardId) {
            let env = self.simulation.env(host, shard);
            let cluster = self.clone();
            let sound = self.sound(host);
            env.clone().spawn(Class::Control, async move {
                let Err(trouble) = cluster.start_shard(host, env, boot).await else {
                    return;
                };
                let trouble = format!("host {} shard {shard}: {trouble}", host.0);
                cluster.end_after(host, sound, trouble);
            });
        }
    }

    /// Ends a process that cannot start; whoever watches over it starts it again. Where the disk did all the time
    /// what disks should, it is a finding.
    fn end_after(&self, host: HostId, sound: Option<u64>, trouble: String) {
        if sound.is_some() && self.sound(host) == sound {
            self.troubles.borrow_mut().push(trouble);
        } else {
            self.simulation.crash(host, EVERYTHING_SURVIVES);
        }
    }

    /// `None` while the host's disk does not do what disks should; else a number that is another after every time
    /// that it did not.
    fn sound(&self, host: HostId) -> Option<u64> {
        let is_sound = self.simulation.disk(host) == self.config.sim.disk;
        is_sound.then(|| self.simulation.disk_changes(host))
    }

    async fn start_shard(
        &self,
        host: HostId,
        env: SimEnv,
        boot: BootIdentity,
    ) -> Result<(), String> {
        let shard = env.shard();
        if shard == ShardId(0) {
            self.remove_other_layouts(host, &env).await?;
        }
        let options = self.store_options(host, self.layout(host), shard);
        let opened = Store::open(env.clone(), options).await;
        let (store, recovery) = opened.map_err(|error| format!("the store: {error}"))?;
        let rots = self.config.rot.is_some_and(|rot| rot.host == host);
        let has_lost_some = recovery.amnesia || !recovery.losses.is_empty();
        if has_lost_some && !rots {
            return Err("the store has forgotten something".to_owned());
        }
        let mut config = NodeConfig::new(boot, self.membership(host, boot.boot));
        config.amnesia = recovery.amnesia;
        let repair = &self.config.repair;
        config.repair = RepairOptions {
            target: Duration::from_millis(repair.target_ms),
            tick: Duration::from_millis(repair.tick_ms),
            retry: Duration::from_millis(repair.retry_ms),
            automatic: repair.automatic,
            floors_interval: FLOORS_INTERVAL,
            requests_over: STRAGGLERS,
            ..RepairOptions::default()
        };
        config.hints = HintOptions {
            interval: Duration::from_millis(repair.hint_interval_ms),
            bytes_max: repair.hint_bytes_max,
            ..HintOptions::default()
        };
        let node = Node::start(env.clone(), config, store.clone())
            .await
            .map_err(|error| format!("the node: {error}"))?;
        let serving = node.clone();
        self.simulation.serve(
            host,
            shard,
            Rc::new(move |origin, request| Box::pin(serving.serve(origin, request))),
        );
        // They may have changed while it started.
        store
            .set_keys(&self.keys(host))
            .map_err(|missing| format!("the master keys: {missing}"))?;
        let slot = Running { env, node, store };
        self.running.borrow_mut()[usize::from(host.0)][usize::from(shard.0)] = Some(slot);
        Ok(())
    }

    fn keys(&self, host: HostId) -> Keys {
        self.key_files.borrow()[usize::from(host.0)].read()
    }

    /// Gives a host's node another master key, or lets it write in the clear from now on; every shard that runs
    /// takes it.
    pub(crate) fn rekey(&self, host: HostId, plain: bool) {
        self.key_files.borrow_mut()[usize::from(host.0)].extend(plain);
        self.reload_keys(host);
    }

    /// Takes those of a host's master keys away that its node, while all of its shards run, does not need any
    /// more.
    pub(crate) fn retire_keys(&self, host: HostId) {
        let index = usize::from(host.0);
        let Some(rest) = self.key_files.borrow()[index].newest() else {
            return;
        };
        let shards = self.shards(host);
        let running: Option<Vec<Running>> = shards.map(|shard| self.shard(host, shard)).collect();
        let keys = rest.read();
        let is_enough = |running: &Running| running.store.missing_key(&keys).is_none();
        if running.is_some_and(|running| running.iter().all(is_enough)) {
            self.key_files.borrow_mut()[index] = rest;
            self.reload_keys(host);
        }
    }

    fn reload_keys(&self, host: HostId) {
        let keys = self.keys(host);
        self.simulation
            .note(format_args!("host {} has keys {keys:?}", host.0));
        for shard in self.shards(host) {
            let Some(running) = self.shard(host, shard) else {
                continue;
            };
            if let Err(missing) = running.store.set_keys(&keys) {
                let text = format!("host {} shard {shard}: the master keys: {missing}", host.0);
                self.troubles.borrow_mut().push(text);
            }
        }
    }

    fn store_options(&self, host: HostId, layout: Layout, shard: ShardId) -> StoreOptions {
        let stores = &self.config.stores;
        StoreOptions {
            keys: self.keys(host),
            fsync: if stores.always_sync {
                Fsync::Always
            } else {
                Fsync::Group
            },
            memtable_bytes: stores.memtable_bytes,
            cache_bytes: stores.cache_bytes,
            wal_segment_bytes: stores.wal_segment_bytes,
            block_bytes: stores.block_bytes,
            separate_from: stores.blobs.separate_from,
            blob_dead_percent: stores.blobs.dead_percent,
            // The node says how.
            strategy: None,
            file_id_first: layout.file_id_first(shard),
            ..StoreOptions::new(layout.dir(shard))
        }
    }

    fn membership(&self, host: HostId, generation: u64) -> MembershipConfig {
        let address = host.address();
        MembershipConfig {
            cluster_name: "world".to_owned(),
            seeds: self.founders().iter().map(|host| host.address()).collect(),
            own: Description {
                name: format!("n{}", host.0),
                internode: address,
                http: address,
                client: address,
                resp: address,
                datacenter: String::new(),
                zone: String::new(),
                rack: String::new(),
                shards: self.layout(host).shards,
                vnodes: self.config.vnodes,
            },
            generation,
            abstains: false,
            gossip: Default::default(),
            detector: Default::default(),
        }
    }

    /// Any shard of any node that runs.
    pub(crate) fn any_node(&self, rng: &mut Rng) -> Option<(SimEnv, SimNode)> {
        let running = self.living();
        if running.is_empty() {
            return None;
        }
        let chosen = rng.pick(&running);
        Some((chosen.env.clone(), chosen.node.clone()))
    }

    /// What keeps the nodes of these hosts from being ready; empty when nothing does. Every shard of these hosts,
    /// and of no other, is to serve, all are to know the clients' keyspace and how many shards each host has, and each
    /// is to have heard every other.
    pub(crate) fn not_ready(&self, hosts: &[HostId]) -> Vec<String> {
        let mut missing = Vec::new();
        for host in &self.hosts {
            let is_expected = hosts.contains(host);
            for shard in self.shards(*host) {
                let what = match self.shard(*host, shard) {
                    None if is_expected => "does not run",
                    Some(_) if !is_expected => "should not run",
                    Some(running) => match self.is_unready(&running, hosts.len()) {
                        Some(what) => what,
                        None => continue,
                    },
                    None => continue,
                };
                missing.push(format!("n{} shard {shard} {what}", host.0));
            }
        }
        missing
    }

    fn is_unready(&self, running: &Running, members: usize) -> Option<&'static str> {
        let Some(view) = running.node.membership().view() else {
            return Some("knows no cluster");
        };
        let is_up = |seen: &Liveness| seen.health == Health::Up;
        if !running.node.ready() {
            Some("does not serve")
        } else if !view.liveness.iter().all(is_up) {
            Some("has not heard all others")
        } else if view.topology.ring_member_count() != members {
            Some("knows another number of members")
        } else if view.topology.keyspace(&self.keyspace.name).is_none() {
            Some("does not know the keyspace")
        } else if !self
            .hosts
            .iter()
            .all(|host| self.is_described(&view, *host))
        {
            Some("knows another number of shards")
        } else {
            None
        }
    }

    /// Whether a view says how many shards a host has, if it knows the host.
    fn is_described(&self, view: &View, host: HostId) -> bool {
        let node = self.simulation.node(host);
        let known = view.topology.index_of(node);
        known.is_none_or(|index| {
            view.topology.member(index).description.shards == self.layout(host).shards
        })
    }

    /// Creates the clients' keyspace, once the cluster is founded.
    pub(crate) async fn create_keyspace(&self) -> Result<(), String> {
        let mut last = "no node runs".to_owned();
        for _ in 0..50 {
            let founder = self
                .living()
                .into_iter()
                .find(|running| running.node.ready());
            if let Some(running) = founder {
                let (node, keyspace) = (running.node.clone(), self.keyspace.clone());
                let put = running.env.execute(Class::Control, async move {
                    node.membership().put_keyspace(keyspace).await
                });
                match put.await {
                    Some(Ok(_)) => return Ok(()),
                    Some(Err(error)) => last = error.to_string(),
                    None => last = "the node died".to_owned(),
                }
            }
            self.simulation.sleep(Duration::from_millis(200)).await;
        }
        Err(last)
    }

    /// Flushes and compacts every shard of a host that runs, in the background.
    pub(crate) fn compact(&self, host: HostId) {
        let living = self.living();
        let node = self.simulation.node(host);
        for running in living
            .into_iter()
            .filter(|running| running.env.node() == node)
        {
            let store = running.store.clone();
            running.env.spawn(Class::Control, async move {
                // A store that is overloaded or dying refuses; there is nothing to check then.
                if store.flush().await.is_ok() {
                    drop(store.compact().await);
                }
            });
        }
    }

    /// What each replica of a key holds; `None` when one of them is not running or cannot be read.
    pub(crate) async fn holdings(&self, key: KeyId) -> Option<Vec<Holding>> {
        let mut holdings = Vec::new();
        for (host, running, tree, token) in self.replicas(key)? {
            let bytes = value::key(key);
            let store = running.store.clone();
            let read = running.env.execute(Class::Control, async move {
                store.get(tree, token, &bytes).await
            });
            let mut holding = Holding {
                node: format!("n{}", host.0),
                values: Vec::new(),
                digest: 0,
            };
            if let Some(record) = read.await?.ok()? {
                let state = StateRef::parse(&record.value).ok()?;
                let live = state.live(running.env.wall().millis());
                let values = live.filter_map(|sibling| sibling.value);
                holding.values = values.map(|bytes| value::parse(key, bytes)).collect();
                holding.values.sort();
                holding.digest = state.leaf_hash(&value::key(key));
            }
            if self.config.idle.is_some() && holding.values.is_empty() {
                // Some replicas may have purged what others still remember as deleted.
                holding.digest = 0;
            }
            holdings.push(holding);
        }
        Some(holdings)
    }

    /// Hints that wait for delivery anywhere.
    pub(crate) fn hints(&self) -> u64 {
        let living = self.living();
        living
            .iter()
            .map(|running| running.node.gauges().hints)
            .sum()
    }

    /// Every dot that the replicas of a key that run hold now.
    pub(crate) async fn dots(&self, key: KeyId) -> Vec<DotSeen> {
        let mut dots = Vec::new();
        for (_, running, tree, token) in self.replicas(key).into_iter().flatten() {
            let bytes = value::key(key);
            let store = running.store.clone();
            let read = running.env.execute(Class::Control, async move {
                store.get(tree, token, &bytes).await
            });
            let Some(Ok(Some(record))) = read.await else {
                continue;
            };
            let Ok(state) = StateRef::parse(&record.value) else {
                continue;
            };
            dots.extend(state.siblings().map(|sibling| DotSeen {
                key,
                dot: DotId {
                    actor: sibling.dot.actor.0,
                    counter: sibling.dot.counter,
                },
                value: sibling.value.map(|bytes| value::parse(key, bytes)),
                expires_ns: expires_ns(sibling.expires_at_ms),
            }));
        }
        dots
    }

    /// The shards that hold a key, by the topology that the first node knows; `None` when one of
    /// them is not running.
    fn replicas(&self, key: KeyId) -> Option<Vec<(HostId, Running, TreeId, Token)>> {
        let view = self.living().first()?.node.membership().view()?;
        let keyspace = view.topology.keyspace(&self.keyspace.name)?;
        let token = Token::of(keyspace.id, &value::key(key));
        let n = usize::from(view.topology.effective_n(keyspace));
        let mut replicas = Vec::new();
        for member in view.ring.replicas(token, n) {
            let node = view.topology.member(*member).node?;
            let host = *self
                .hosts
                .iter()
                .find(|host| self.simulation.node(**host) == node)?;
            let running = self.shard(host, token.shard(self.layout(host).shards))?;
            replicas.push((host, running, keyspace.id, token));
        }
        Some(replicas)
    }

    fn shard(&self, host: HostId, shard: ShardId) -> Option<Running> {
        let running = self.running.borrow();
        let found = running[usize::from(host.0)].get(usize::from(shard.0))?;
        found.clone().filter(|running| running.env.is_alive())
    }

    fn living(&self) -> Vec<Running> {
        let running = self.running.borrow();
        let all = running.iter().flatten().flatten();
        all.filter(|running| running.env.is_alive())
            .cloned()
            .collect()
    }
}
