//! Nodes of the simulated world that run stores and the whole cluster half.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use torc_engine::compaction::Strategy;
use torc_engine::table::{Table, table_id};
use torc_engine::{Decision, Fsync, Keys, Record, ScanFrom, ScanLimits, Store};
use torc_env::{Class, Disk as _, Env, Instant, ShardId, Token, TreeId};
use torc_sim::{DiskOptions, HostId, Options, SimEnv, Simulation};

use crate::api::{
    DeleteRequest, Failure, GetAnswer, GetRequest, KEYSPACE_DEFAULT, Level, PutRequest, ScanEntry,
    ScanRequest, WriteOptions, Written,
};
use crate::detector::DetectorOptions;
use crate::gossip::GossipOptions;
use crate::keyspace::Keyspace;
use crate::membership::{MembershipConfig, Standing};
use crate::metrics::Gauges;
use crate::node::{Node, NodeConfig};
use crate::topology::Description;
use crate::version::BootIdentity;

const TIMEOUT: Duration = Duration::from_secs(2);

/// By host and shard.
type Nodes = BTreeMap<(usize, u16), Node<SimEnv>>;

pub(super) struct World {
    pub(super) sim: Simulation,
    pub(super) hosts: Vec<HostId>,
    shards: u16,
    boots: RefCell<Vec<u64>>,
    fsync: Cell<Fsync>,
    nodes: Rc<RefCell<Nodes>>,
    edit: fn(&mut NodeConfig),
    founders: usize,
}

impl World {
    /// Three nodes of one shard, ready.
    pub(super) fn three(seed: u64) -> Self {
        Self::new(seed, 3, 1)
    }

    pub(super) fn new(seed: u64, count: usize, shards: u16) -> Self {
        Self::with(seed, count, shards, |_| {})
    }

    pub(super) fn with(seed: u64, count: usize, shards: u16, edit: fn(&mut NodeConfig)) -> Self {
        Self::growing(seed, count, count, shards, edit)
    }

    /// `founders` nodes, ready, and room for more, up to `count`, to be booted later.
    pub(super) fn growing(
        seed: u64,
        founders: usize,
        count: usize,
        shards: u16,
        edit: fn(&mut NodeConfig),
    ) -> Self {
        let sim = Simulation::new(seed, Options::default());
        let hosts = (0..count).map(|_| sim.add_host(shards)).collect();
        let world = Self {
            sim,
            hosts,
            shards,
            boots: RefCell::new(vec![0; count]),
            fsync: Cell::new(Fsync::Group),
            nodes: Rc::default(),
            edit,
            founders,
        };
        for host in 0..founders {
            world.boot(host);
        }
        world.wait("all nodes are ready", || {
            (0..founders).all(|host| world.is_ready(host))
        });
        // Until every one has heard every other.
        world.sleep(Duration::from_secs(2));
        world
    }

    pub(super) fn boot(&self, host: usize) {
        let id = self.hosts[host];
        if !self.sim.is_up(id) {
            self.sim.restart(id, self.shards);
        }
        self.boots.borrow_mut()[host] += 1;
        for shard in (0..self.shards).map(ShardId) {
            let env = self.sim.env(id, shard);
            let config = self.config(host, &env);
            let (sim, nodes) = (self.sim.clone(), Rc::clone(&self.nodes));
            let fsync = self.fsync.get();
            env.clone().spawn(Class::Control, async move {
                let options = torc_engine::Options {
                    // The node says how.
                    strategy: None,
                    fsync,
                    ..torc_engine::Options::new(format!("shard-{:02}", shard.0))
                };
                let (store, recovery) = Store::open(env.clone(), options).await.unwrap();
                let mut config = config;
                config.amnesia = recovery.amnesia;
                let node = Node::start(env, config, store).await.unwrap();
                let serving = node.clone();
                sim.serve(
                    id,
                    shard,
                    Rc::new(move |origin, request| serving.serve(origin, request).boxed_local()),
                );
                nodes.borrow_mut().insert((host, shard.0), node);
            });
        }
    }

    /// How the nodes that boot from now on make durable what they have acknowledged.
    pub(super) fn set_fsync(&self, fsync: Fsync) {
        self.fsync.set(fsync);
    }

    fn config(&self, host: usize, env: &SimEnv) -> NodeConfig {
        let address = self.hosts[host].address();
        let boot = self.boots.borrow()[host];
        let membership = MembershipConfig {
            cluster_name: "test".to_owned(),
            seeds: self.hosts[..self.founders]
                .iter()
                .map(|host| host.address())
                .collect(),
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
            generation: boot,
            abstains: false,
            gossip: GossipOptions::default(),
            detector: DetectorOptions::default(),
        };
        let identity = BootIdentity {
            node: env.node(),
            boot,
            random: env.random(),
        };
        let mut config = NodeConfig::new(identity, membership);
        (self.edit)(&mut config);
        config
    }

    pub(super) fn crash(&self, host: usize) {
        self.sim.crash(self.hosts[host], 0);
        self.nodes
            .borrow_mut()
            .retain(|(other, _), _| *other != host);
    }

    /// Stops a node as an operator does: nothing is on its way any more.
    pub(super) fn stop(&self, host: usize) {
        self.end_minting(host);
        self.close(host);
    }

    /// The first half of a stop.
    pub(super) fn end_minting(&self, host: usize) {
        for shard in 0..self.shards {
            let node = self.shard(host, shard);
            node.end_minting();
            let leave = |_| async move { node.leave_clock_mark().await };
            let left = self.sim.run_on(self.hosts[host], ShardId(shard), leave);
            left.expect("the node lives").unwrap();
        }
    }

    /// The second half.
    pub(super) fn close(&self, host: usize) {
        for shard in 0..self.shards {
            let node = self.shard(host, shard);
            let close = |_| async move { node.0.store.close().await };
            let closed = self.sim.run_on(self.hosts[host], ShardId(shard), close);
            closed.expect("the node lives").unwrap();
        }
        self.crash(host);
    }

    /// Sets a node's clock so far from what is right, in seconds.
    pub(super) fn set_clock(&self, host: usize, skew_s: i64) {
        self.set_clock_ms(host, skew_s * 1_000);
    }

    pub(super) fn set_clock_ms(&self, host: usize, skew_ms: i64) {
        self.sim.set_clock(self.hosts[host], skew_ms * 1_000, 0);
    }

    /// Cuts a node off from all others, or ends that.
    pub(super) fn isolate(&self, host: usize, is_cut: bool) {
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            self.sim
                .set_blocked(self.hosts[host], self.hosts[other], is_cut);
            self.sim
                .set_blocked(self.hosts[other], self.hosts[host], is_cut);
        }
    }

    /// The node's shard that a client happened to connect to.
    pub(super) fn node(&self, host: usize) -> Node<SimEnv> {
        self.shard(host, 0)
    }

    pub(super) fn shard(&self, host: usize, shard: u16) -> Node<SimEnv> {
        self.nodes.borrow()[&(host, shard)].clone()
    }

    pub(super) fn is_ready(&self, host: usize) -> bool {
        (0..self.shards).all(|shard| {
            self.nodes
                .borrow()
                .get(&(host, shard))
                .is_some_and(|node| node.0.membership.standing() == Standing::Up)
        })
    }

    pub(super) fn sleep(&self, delay: Duration) {
        self.sim.run(self.sim.sleep(delay)).unwrap();
    }

    pub(super) fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let end = self.sim.now() + Duration::from_secs(120);
        while !done() {
            assert!(self.sim.now() < end, "not within two minutes: {what}");
            self.sleep(Duration::from_millis(20));
        }
    }

    pub(super) fn wait_until_down(&self, observer: usize, host: usize) {
        let dead = self.sim.node(self.hosts[host]);
        self.wait("the detector notices", || {
            let view = self.node(observer).0.view().unwrap();
            let member = view.find(dead).unwrap();
            !view.is_up(member)
        });
    }

    pub(super) fn pause(&self, host: usize, is_paused: bool) {
        self.sim.pause(self.hosts[host], is_paused);
    }

    pub(super) fn slow_down_disk(&self, host: usize) {
        let slow = DiskOptions {
            sync_us: 20_000..=50_000,
            ..DiskOptions::default()
        };
        self.sim.set_disk(self.hosts[host], slow);
    }

    /// Lets a node's disk be by far the slowest to say what it has.
    pub(super) fn slow_down_reads(&self, host: usize) {
        let slow = DiskOptions {
            read_us: 200_000..=200_000,
            ..DiskOptions::default()
        };
        self.sim.set_disk(self.hosts[host], slow);
    }

    /// Fills a node's disk up to the last byte, or makes room again.
    pub(super) fn fill_disk(&self, host: usize, is_full: bool) {
        let mut disk = DiskOptions::default();
        if is_full {
            disk.capacity_bytes = 1;
        }
        self.sim.set_disk(self.hosts[host], disk);
    }

    pub(super) fn flush(&self, host: usize) {
        self.on(host, |node, _| async move { node.0.store.flush().await })
            .unwrap();
    }

    pub(super) fn compact(&self, host: usize) {
        self.on(host, |node, _| async move { node.0.store.compact().await })
            .unwrap();
    }

    /// Changes what a node answers others, on its way.
    pub(super) fn spoil_answers(&self, host: usize, spoil: impl Fn(Bytes) -> Bytes + 'static) {
        let (serving, spoil) = (self.node(host), Rc::new(spoil));
        let handler = move |origin, request| {
            let (answer, spoil) = (serving.serve(origin, request), Rc::clone(&spoil));
            async move { spoil(answer.await) }.boxed_local()
        };
        let (id, shard) = (self.hosts[host], ShardId(0));
        self.sim.serve(id, shard, Rc::new(handler));
    }

    /// Flips a bit in every block of every table of a node that is down.
    pub(super) fn spoil_tables(&self, host: usize) {
        let mut spoiled = 0;
        for (path, len) in self.sim.files(self.hosts[host]) {
            if path
                .extension()
                .is_some_and(|extension| extension == "table")
            {
                // The first block: what opens the table lies at its end.
                spoiled += usize::from(len > 4096);
                self.sim.flip_bits(self.hosts[host], &path, 100, 1);
            }
        }
        assert!(spoiled > 0, "no table to spoil");
    }

    /// Flushes a running node, and flips a bit in the first block of every table of one of its trees.
    pub(super) fn spoil_tables_of(&self, host: usize, tree: TreeId) {
        // Within the head of the block: what comes later may be padding.
        self.spoil_tables_at(host, tree, |_| 20);
    }

    /// Flushes a running node, and flips a bit of every table of one of its trees, where `offset` says by its length.
    pub(super) fn spoil_tables_at(&self, host: usize, tree: TreeId, offset: impl Fn(u64) -> u64) {
        let id = self.hosts[host];
        let mut spoiled = 0;
        for shard in (0..self.shards).map(ShardId) {
            let store = self.shard(host, shard.0).0.store.clone();
            let find = |env: SimEnv| async move {
                store.flush().await.unwrap();
                let dir = PathBuf::from(format!("shard-{:02}/tables", shard.0));
                let mut found = Vec::new();
                for entry in env.disk().list(&dir).await.unwrap() {
                    let Some(file_id) = table_id(&entry.name) else {
                        continue;
                    };
                    let table = Table::open(env.disk(), &dir, file_id, &Keys::default()).await;
                    if table.unwrap().info().tree == tree {
                        found.push((dir.join(&entry.name), entry.len));
                    }
                }
                found
            };
            let found = self.sim.run_on(id, shard, find);
            for (path, len) in found.expect("the node lives") {
                assert!(self.sim.flip_bits(id, &path, offset(len), 1));
                spoiled += 1;
            }
        }
        assert!(spoiled > 0, "no table to spoil");
    }

    pub(super) fn scrub(&self, host: usize) {
        let scrub = |node: Node<SimEnv>, _| async move { node.0.store.scrub(1 << 30).await };
        self.on(host, scrub).unwrap();
    }

    /// Whether a node knows of damage that is not cut out yet.
    pub(super) fn is_damaged(&self, host: usize) -> bool {
        (0..self.shards).any(|shard| self.shard(host, shard).0.store.is_damaged())
    }

    /// Changes what a node's first shard has stored for a key of keyspace `default`, behind its back.
    pub(super) fn spoil_record(
        &self,
        host: usize,
        key: &str,
        spoil: impl FnOnce(&Record) -> Bytes + 'static,
    ) {
        let (tree, key) = (TreeId(1), Bytes::from(key.to_owned()));
        let spoiled = self.on(host, |node, _| async move {
            let token = Token::of(tree, &key);
            let decide = |stored: Option<&Record>| {
                let stored = stored.expect("the node has the key");
                let value = spoil(stored);
                Decision::Write(
                    Record {
                        value,
                        ..stored.clone()
                    },
                    (),
                )
            };
            let ((), ticket) = node.0.store.update(tree, token, &key, decide).await?;
            ticket.wait().await
        });
        spoiled.unwrap();
    }

    /// What a node's first shard has stored for a key of keyspace `default`.
    pub(super) fn stored(&self, host: usize, key: &str) -> Bytes {
        self.stored_in(host, TreeId(1), key)
    }

    pub(super) fn stored_in(&self, host: usize, tree: TreeId, key: &str) -> Bytes {
        let key = Bytes::from(key.to_owned());
        let stored = self.on(host, |node, _| async move {
            let token = Token::of(tree, &key);
            node.0.store.get(tree, token, &key).await
        });
        stored
            .unwrap()
            .map_or_else(Bytes::new, |record| record.value)
    }

    /// Records of keyspace `default` on a node's first shard, dead ones included.
    pub(super) fn records(&self, host: usize) -> usize {
        let page = self.on(host, |node, _| async move {
            let limits = ScanLimits {
                records: 10_000,
                bytes: 1 << 30,
            };
            let from = ScanFrom::Token(Token(0));
            node.0.store.scan(TreeId(1), from, Token::MAX, limits).await
        });
        page.unwrap().entries.len()
    }

    /// Whether a node believes all others to answer.
    pub(super) fn sees_all_up(&self, host: usize) -> bool {
        let Ok(view) = self.node(host).0.view() else {
            return false;
        };
        view.topology
            .indexed()
            .all(|(member, _)| view.is_up(member) && view.topology.members.len() >= self.founders)
    }

    pub(super) fn is_whole(&self, host: usize) -> bool {
        (0..self.shards).all(|shard| {
            let nodes = self.nodes.borrow();
            let node = nodes.get(&(host, shard));
            node.is_some_and(|node| node.0.lacking.is_whole())
        })
    }

    /// How each shard of a node compacts the default keyspace.
    pub(super) fn compactions(&self, host: usize) -> Vec<Option<Strategy>> {
        let nodes = self.nodes.borrow();
        let shards = (0..self.shards).filter_map(|shard| nodes.get(&(host, shard)));
        shards
            .map(|node| node.0.store.strategy(TreeId(1)))
            .collect()
    }

    pub(super) fn is_replica(&self, host: usize, key: &str) -> bool {
        let view = self.node(host).0.view().unwrap();
        let token = Token::of(TreeId(1), key.as_bytes());
        view.ring.is_replica(token, 3, view.me.unwrap())
    }

    /// Creates a keyspace and waits until every shard knows it.
    pub(super) fn keyspace(&self, name: &str, edit: impl FnOnce(&mut Keyspace)) {
        let mut keyspace = Keyspace {
            name: name.to_owned(),
            ..Keyspace::default_keyspace()
        };
        edit(&mut keyspace);
        let put = |node: Node<SimEnv>, _| async move { node.keyspace_put(keyspace).await };
        self.on(0, put).unwrap();
        self.wait("all shards know the keyspace", || {
            self.nodes.borrow().values().all(|node| {
                let keyspaces = node.keyspaces().unwrap();
                keyspaces.iter().any(|known| known.name == name)
            })
        });
    }

    pub(super) fn put_in(
        &self,
        host: usize,
        keyspace: &str,
        key: &str,
        value: &str,
    ) -> Result<Written, Failure> {
        self.put_in_with(host, keyspace, key, value, |_| {})
    }

    pub(super) fn put_in_with(
        &self,
        host: usize,
        keyspace: &str,
        key: &str,
        value: &str,
        edit: impl FnOnce(&mut WriteOptions),
    ) -> Result<Written, Failure> {
        let texts = [keyspace, key, value];
        let [keyspace, key, value] = texts.map(|text| Bytes::from(text.to_owned()));
        self.on(host, |node, deadline| {
            let mut write = WriteOptions::until(deadline);
            edit(&mut write);
            let request = PutRequest {
                keyspace,
                key,
                value,
                ttl_seconds: None,
                write,
            };
            async move { node.put(request).await }
        })
    }

    pub(super) fn get_in(
        &self,
        host: usize,
        keyspace: &str,
        key: &str,
        r: Level,
    ) -> Result<GetAnswer, Failure> {
        let [keyspace, key] = [keyspace, key].map(|text| Bytes::from(text.to_owned()));
        self.on(host, |node, deadline| async move {
            node.get(GetRequest {
                keyspace,
                key,
                r,
                at_least: None,
                deadline,
            })
            .await
        })
    }

    pub(super) fn values_in(&self, host: usize, keyspace: &str, key: &str) -> Vec<Bytes> {
        let answer = self.get_in(host, keyspace, key, Level::Quorum);
        let siblings = answer.unwrap().siblings;
        siblings.into_iter().map(|sibling| sibling.value).collect()
    }

    /// A key whose replicas are exactly these nodes.
    pub(super) fn key_with_replicas(&self, hosts: &[usize]) -> String {
        let view = self.node(hosts[0]).0.view().unwrap();
        let mut wanted: Vec<_> = hosts
            .iter()
            .map(|host| view.find(self.sim.node(self.hosts[*host])).unwrap())
            .collect();
        wanted.sort_unstable();
        (0..10_000)
            .map(|index| format!("key {index}"))
            .find(|key| {
                let token = Token::of(TreeId(1), key.as_bytes());
                let mut replicas = view.ring.replicas(token, 3).to_vec();
                replicas.sort_unstable();
                replicas == wanted
            })
            .expect("some key of ten thousand")
    }

    /// Runs work as a client of the node would: it ends with its deadline at the latest.
    pub(super) fn on<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        host: usize,
        work: impl FnOnce(Node<SimEnv>, Instant) -> F,
    ) -> T {
        let node = self.node(host);
        self.sim
            .run_on(self.hosts[host], ShardId(0), |env| {
                work(node, env.now() + TIMEOUT)
            })
            .expect("the node lives")
    }

    pub(super) fn put(&self, host: usize, key: &str, value: &str) -> Result<Written, Failure> {
        self.put_with(host, key, value, |_| {})
    }

    /// A key of the replicas 0, 1 and 2, of which 1 and 2 have crashed before it was written by node 0,
    /// the fourth node keeping a hint that counted.
    pub(super) fn key_with_counted_hint(&self) -> String {
        let key = self.key_with_replicas(&[0, 1, 2]);
        for node in [1, 2] {
            self.crash(node);
            self.wait_until_down(0, node);
        }
        let written = self
            .put_with(0, &key, "v", |write| write.sloppy = true)
            .unwrap();
        assert_eq!(written.hints, 1);
        key
    }

    pub(super) fn put_with(
        &self,
        host: usize,
        key: &str,
        value: &str,
        edit: impl FnOnce(&mut WriteOptions),
    ) -> Result<Written, Failure> {
        self.put_in_with(host, "default", key, value, edit)
    }

    pub(super) fn delete_with(
        &self,
        host: usize,
        key: &str,
        edit: impl FnOnce(&mut WriteOptions),
    ) -> Result<Written, Failure> {
        let key = Bytes::from(key.to_owned());
        self.on(host, |node, deadline| {
            let mut write = WriteOptions::until(deadline);
            edit(&mut write);
            let request = DeleteRequest {
                keyspace: KEYSPACE_DEFAULT.clone(),
                key,
                write,
            };
            async move { node.delete(request).await }
        })
    }

    pub(super) fn get(&self, host: usize, key: &str, r: Level) -> Result<GetAnswer, Failure> {
        self.get_in(host, "default", key, r)
    }

    /// Every key that a scan in pages of `limit` lists, each page asked of another node.
    pub(super) fn scan(&self, limit: u32, prefix: &str, values: bool) -> Vec<ScanEntry> {
        let mut entries = Vec::new();
        let mut cursor = None;
        for page in 0.. {
            let host = page % self.founders;
            let prefix = Bytes::from(prefix.to_owned());
            let answer = self
                .on(host, |node, deadline| async move {
                    node.scan(ScanRequest {
                        keyspace: KEYSPACE_DEFAULT.clone(),
                        cursor,
                        limit,
                        prefix,
                        values,
                        r: Level::Quorum,
                        deadline,
                    })
                    .await
                })
                .unwrap();
            assert!(answer.entries.len() <= usize::try_from(limit).unwrap());
            entries.extend(answer.entries);
            cursor = answer.cursor;
            if cursor.is_none() {
                break;
            }
        }
        entries
    }

    /// The values that a quorum read sees.
    pub(super) fn values(&self, host: usize, key: &str) -> Vec<Bytes> {
        let answer = self.get(host, key, Level::Quorum).unwrap();
        answer
            .siblings
            .into_iter()
            .map(|sibling| sibling.value)
            .collect()
    }

    pub(super) fn counts(&self, host: usize) -> BTreeMap<&'static str, u64> {
        let mut sums = BTreeMap::new();
        for shard in 0..self.shards {
            for (name, count) in self.shard(host, shard).counts() {
                *sums.entry(name).or_default() += count;
            }
        }
        sums
    }

    pub(super) fn gauges(&self, host: usize) -> Gauges {
        self.node(host).gauges()
    }
}
