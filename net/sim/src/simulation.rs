//! The harness's handle: adds hosts, breaks and mends them, and moves the world along.

use std::cell::RefCell;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use torc_env::{Address, Instant, NodeId, ShardId};

use crate::disk::volume::Volume;
use crate::env::SimEnv;
use crate::host::{Handler, Host, HostId, Life, PowerCut};
use crate::log::Event;
use crate::oneshot;
use crate::options::{DiskOptions, NetOptions, Options};
use crate::rng::Rng;
use crate::tasks::{Kind, Owner};
use crate::timer::Sleep;
use crate::world::World;

/// The world stands still: nothing is ready and nothing is due, and the future that the harness
/// waits for is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stalled;

/// A simulated world. Clones share it.
#[derive(Clone)]
pub struct Simulation(Rc<Owned>);

/// Ends the world when the last handle goes; tasks only hold the `World` itself.
struct Owned(Rc<World>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.shut_down();
    }
}

impl Simulation {
    /// An empty world. Everything in it follows from `seed` and `options`.
    pub fn new(seed: u64, options: Options) -> Self {
        Self(Rc::new(Owned(World::new(seed, options))))
    }

    fn world(&self) -> &Rc<World> {
        &self.0.0
    }

    /// The stream of randomness called `name`: the same one each time, from its beginning.
    pub fn stream(&self, name: &str) -> Rng {
        Rng::stream(self.world().seed, name)
    }

    /// Adds a host with an empty disk; its process runs.
    pub fn add_host(&self, shards: u16) -> HostId {
        let world = self.world();
        let mut hosts = world.hosts.borrow_mut();
        let host = HostId(u16::try_from(hosts.len()).expect("fewer than 2^16 hosts"));
        let node = self.new_node(host, 0);
        hosts.push(Host::new(node, shards, world.options.disk.clone()));
        host
    }

    /// A shard of the host's present life.
    ///
    /// # Panics
    /// When the host is down.
    pub fn env(&self, host: HostId, shard: ShardId) -> SimEnv {
        assert!(self.is_up(host), "host {} is down", host.0);
        SimEnv::new(self.world(), host, shard)
    }

    /// Lets `handler` answer the calls that arrive at a shard, for the host's present life.
    pub fn serve(&self, host: HostId, shard: ShardId, handler: Handler) {
        let mut hosts = self.world().hosts.borrow_mut();
        hosts[host.index()].handlers[usize::from(shard.0)] = Some(handler);
    }

    /// The address of a shard.
    pub fn address(&self, host: HostId, shard: ShardId) -> Address {
        Address {
            node: self.node(host),
            host: host.address(),
            shard,
        }
    }

    /// The identity of the host's node.
    pub fn node(&self, host: HostId) -> NodeId {
        self.world().hosts.borrow()[host.index()].node
    }

    /// Whether the host's process runs.
    pub fn is_up(&self, host: HostId) -> bool {
        self.world().hosts.borrow()[host.index()].up
    }

    /// Kills the host's process with its power: all its tasks are gone, unsynced changes of its
    /// disk survive by `variant` (see [`PowerCut::variant`]).
    pub fn crash(&self, host: HostId, variant: u32) {
        self.world().crash(host, variant);
    }

    /// Cuts the host's power at a certain disk operation.
    pub fn cut_power(&self, host: HostId, cut: PowerCut) {
        self.world().hosts.borrow_mut()[host.index()].power_cut = Some(cut);
    }

    /// Takes back a power cut that has not struck.
    pub fn forget_power_cut(&self, host: HostId) {
        self.world().hosts.borrow_mut()[host.index()].power_cut = None;
    }

    /// How many changing operations the host's disk has begun, over all lives.
    pub fn disk_operations(&self, host: HostId) -> u64 {
        self.world().hosts.borrow()[host.index()].disk_operations
    }

    /// Starts the host's next life, with the given number of shards, over what its disk holds.
    ///
    /// # Panics
    /// When the host runs.
    pub fn restart(&self, host: HostId, shards: u16) {
        let world = self.world();
        let mut hosts = world.hosts.borrow_mut();
        let state = &mut hosts[host.index()];
        assert!(!state.up, "host {} runs", host.0);
        state.up = true;
        state.life = Life(state.life.0 + 1);
        state.shards = shards;
        state.handlers = vec![None; usize::from(shards)];
        drop(hosts);
        world.record(Event::Restart, host.number(), u64::from(shards));
    }

    /// Gives a host that is down an empty disk and a new identity: the machine was replaced.
    pub fn replace(&self, host: HostId) {
        let node = self.new_node(host, self.world().next_sequence());
        let mut hosts = self.world().hosts.borrow_mut();
        let state = &mut hosts[host.index()];
        assert!(!state.up, "host {} runs", host.0);
        state.volume = Volume::new(state.disk.capacity_bytes);
        state.node = node;
    }

    /// Stops or resumes the host's process (as SIGSTOP and SIGCONT do): time, disk and messages
    /// go on, its tasks do not.
    pub fn pause(&self, host: HostId, paused: bool) {
        self.world().pause(host, paused);
    }

    /// Whether the host's background jobs, flushes excepted, hardly get to run.
    pub fn starve_background(&self, host: HostId, starved: bool) {
        self.world().hosts.borrow_mut()[host.index()].starved = starved;
    }

    /// Changes how the host's disk behaves from now on.
    pub fn set_disk(&self, host: HostId, disk: DiskOptions) {
        let mut hosts = self.world().hosts.borrow_mut();
        let state = &mut hosts[host.index()];
        state.volume.set_capacity(disk.capacity_bytes);
        state.disk = disk;
        state.disk_changes += 1;
    }

    /// How often it was changed how the host's disk behaves.
    pub fn disk_changes(&self, host: HostId) -> u64 {
        self.world().hosts.borrow()[host.index()].disk_changes
    }

    /// How the host's disk behaves now.
    pub fn disk(&self, host: HostId) -> DiskOptions {
        self.world().hosts.borrow()[host.index()].disk.clone()
    }

    /// Every file of the host with its length, in order of names.
    pub fn files(&self, host: HostId) -> Vec<(PathBuf, u64)> {
        self.world().hosts.borrow()[host.index()].volume.files()
    }

    /// What a read of a whole file would give now; `None` when there is no such file.
    pub fn content(&self, host: HostId, path: &Path) -> Option<Vec<u8>> {
        self.world().hosts.borrow()[host.index()]
            .volume
            .content(path)
    }

    /// Lets the bits of `mask` read inverted at `offset` of a file, until that sector is written
    /// again. False when there is no such byte.
    pub fn flip_bits(&self, host: HostId, path: &Path, offset: u64, mask: u8) -> bool {
        let mut hosts = self.world().hosts.borrow_mut();
        hosts[host.index()].volume.flip(path, offset, mask)
    }

    /// Cuts a file short at `len` bytes, for good. False when there is none that is longer, or what it
    /// holds could still be lost by a power cut.
    pub fn cut_short(&self, host: HostId, path: &Path, len: u64) -> bool {
        let mut hosts = self.world().hosts.borrow_mut();
        hosts[host.index()].volume.cut(path, len)
    }

    /// Whether the host's disk holds nothing that a power cut could lose.
    pub fn disk_is_settled(&self, host: HostId) -> bool {
        self.world().hosts.borrow()[host.index()]
            .volume
            .is_settled()
    }

    /// Sets the error of the host's clock: an offset, and how much faster it runs than the true
    /// one.
    pub fn set_clock(&self, host: HostId, skew_us: i64, drift_ppm: i64) {
        self.world()
            .record(Event::Clock, host.number(), skew_us.unsigned_abs());
        let mut hosts = self.world().hosts.borrow_mut();
        hosts[host.index()].skew_us = skew_us;
        hosts[host.index()].drift_ppm = drift_ppm;
    }

    /// How much of civil time has passed since [`EPOCH`](crate::EPOCH) by a clock that is right.
    pub fn civil(&self) -> Duration {
        let world = self.world();
        Duration::from_nanos(world.now_ns()) + Duration::from_micros(world.civil_us.get())
    }

    /// Lets civil time pass on every host, and nothing else: hours in which a cluster idles.
    pub fn pass_civil_time(&self, passed: Duration) {
        let world = self.world();
        let passed_us = u64::try_from(passed.as_micros()).expect("within centuries");
        world.record(Event::Clock, u64::MAX, passed_us);
        world.civil_us.set(world.civil_us.get() + passed_us);
    }

    /// Lets messages from one host to another pass, or not. Both directions are separate.
    pub fn set_blocked(&self, from: HostId, to: HostId, blocked: bool) {
        self.world().set_blocked(from, to, blocked);
    }

    /// Breaks the connections between two hosts: calls that are open on them are lost.
    pub fn break_link(&self, a: HostId, b: HostId) {
        self.world().break_link(a, b);
    }

    /// Changes how the network behaves from now on.
    pub fn set_net(&self, net: NetOptions) {
        self.world().network.borrow_mut().options = net;
    }

    /// True time since the beginning.
    pub fn now(&self) -> Instant {
        Instant(self.world().now_ns())
    }

    /// Completes after `delay` of true time.
    pub fn sleep(&self, delay: Duration) -> impl Future<Output = ()> + 'static {
        Sleep::until(self.world().clone(), (self.now() + delay).0)
    }

    /// Starts a task of the harness: a client, a nemesis. It belongs to no host.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.world()
            .spawn(Owner::Harness, Kind::Harness, Box::pin(task));
    }

    /// Moves the world until `future`, run as a task of the harness, is done.
    ///
    /// # Errors
    /// When nothing is left to do before it is.
    pub fn run<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Result<T, Stalled> {
        let (sender, receiver) = oneshot::channel();
        self.spawn(async move { sender.send(future.await) });
        self.drive(receiver)
            .and_then(|output| output.ok_or(Stalled))
    }

    /// Moves the world until `scenario`, run as a task of a shard, is done; `None` when its host
    /// died before.
    ///
    /// # Panics
    /// When nothing is left to do before either: the scenario waits for what never comes.
    pub fn run_on<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        host: HostId,
        shard: ShardId,
        scenario: impl FnOnce(SimEnv) -> F,
    ) -> Option<T> {
        let env = self.env(host, shard);
        let done = env.execute(torc_env::Class::Foreground, scenario(env.clone()));
        match self.drive(done) {
            Ok(output) => output,
            Err(Stalled) => panic!("seed {}: the scenario waits for ever", self.world().seed),
        }
    }

    /// Moves the world by one event. False when nothing is left to do.
    pub fn step(&self) -> bool {
        self.world().step()
    }

    /// Writes a line into the log; it counts in the hash.
    pub fn note(&self, text: std::fmt::Arguments<'_>) {
        let world = self.world();
        world.log.borrow_mut().note(world.now_ns(), text);
    }

    /// Keeps the text of every event from now on, for [`Simulation::lines`].
    pub fn keep_lines(&self) {
        self.world().log.borrow_mut().keep_lines();
    }

    /// The text of the events since [`Simulation::keep_lines`].
    pub fn lines(&self) -> Vec<String> {
        self.world().log.borrow().lines().to_vec()
    }

    /// The hash over everything that has happened. Equal for two runs of one seed, or the world is
    /// not deterministic.
    pub fn hash(&self) -> u128 {
        self.world().log.borrow().hash()
    }

    /// How many events there were.
    pub fn event_count(&self) -> u64 {
        self.world().log.borrow().count()
    }

    fn drive<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Result<T, Stalled> {
        let result = Rc::new(RefCell::new(None));
        let slot = result.clone();
        self.spawn(async move {
            let output = future.await;
            slot.borrow_mut().replace(output);
        });
        loop {
            if let Some(output) = result.borrow_mut().take() {
                return Ok(output);
            }
            if !self.step() {
                return Err(Stalled);
            }
        }
    }

    fn new_node(&self, host: HostId, salt: u64) -> NodeId {
        let mut rng = self.stream(&format!("node {} {salt}", host.0));
        NodeId(u128::from(rng.number()) << 64 | u128::from(rng.number()))
    }
}
