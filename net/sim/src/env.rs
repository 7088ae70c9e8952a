//! One shard's view of the simulated world.

use std::future::Future;
use std::rc::Rc;

use torc_env::{
    Address, Bytes, CallError, Class, Env, Instant, Job, JobClass, NodeId, ShardId, WallTime,
};

use crate::disk::SimDisk;
use crate::host::{HostId, Life};
use crate::oneshot;
use crate::rng::Rng;
use crate::tasks::{Kind, Owner};
use crate::timer::{GiveWay, Sleep};
use crate::world::World;

/// Civil time at the start of every run: 2026-01-01 00:00 UTC.
pub const EPOCH: WallTime = WallTime(1_767_225_600_000_000);

/// One shard of one life of a host. After a crash of the host it does nothing any more.
#[derive(Clone)]
pub struct SimEnv(Rc<Shard>);

struct Shard {
    world: Rc<World>,
    host: HostId,
    life: Life,
    shard: ShardId,
    node: NodeId,
    shards: u16,
    disk: SimDisk,
    /// What this life's monotonic clock shows more than the world's: instants of two hosts, or of
    /// two lives, must not be compared.
    ahead_ns: u64,
}

/// Longest time that a host seems to have been up before its process started.
const UPTIME_NS_MAX: u64 = 3_600_000_000_000;

impl SimEnv {
    pub(crate) fn new(world: &Rc<World>, host: HostId, shard: ShardId) -> Self {
        let hosts = world.hosts.borrow();
        let state = &hosts[host.index()];
        assert!(
            shard.0 < state.shards,
            "the host has {} shards",
            state.shards
        );
        Self(Rc::new(Shard {
            world: world.clone(),
            host,
            life: state.life,
            shard,
            node: state.node,
            shards: state.shards,
            disk: SimDisk::new(world.clone(), host, state.life),
            ahead_ns: Rng::stream(world.seed, &format!("uptime {} {}", host.0, state.life.0))
                .below(UPTIME_NS_MAX),
        }))
    }

    /// Whether the process that this belongs to still runs.
    pub fn is_alive(&self) -> bool {
        self.0.world.is_alive(self.0.host, self.0.life)
    }

    /// Runs `task` as one of this shard's and completes with its output, or with `None` when the
    /// process dies before: what a client of the process sees of a request.
    pub fn execute<T: 'static>(
        &self,
        class: Class,
        task: impl Future<Output = T> + 'static,
    ) -> impl Future<Output = Option<T>> + 'static {
        let (sender, receiver) = oneshot::channel();
        self.spawn(class, async move { sender.send(task.await) });
        receiver
    }

    fn owner(&self) -> Owner {
        Owner::Host(self.0.host, self.0.life)
    }

    fn true_ns(&self, at: Instant) -> u64 {
        at.0.saturating_sub(self.0.ahead_ns)
    }
}

impl Env for SimEnv {
    type Disk = SimDisk;

    fn disk(&self) -> &SimDisk {
        &self.0.disk
    }

    fn now(&self) -> Instant {
        Instant(self.0.world.now_ns() + self.0.ahead_ns)
    }

    fn wall(&self) -> WallTime {
        let hosts = self.0.world.hosts.borrow();
        let host = &hosts[self.0.host.index()];
        let true_us = self.0.world.now_ns() / 1000;
        let drift_us = i128::from(true_us) * i128::from(host.drift_ppm) / 1_000_000;
        let civil_us = EPOCH.0 + true_us + self.0.world.civil_us.get();
        let wall = i128::from(civil_us) + i128::from(host.skew_us) + drift_us;
        WallTime(u64::try_from(wall).unwrap_or(0))
    }

    fn random(&self) -> u64 {
        self.0.world.streams.borrow_mut().env.number()
    }

    fn node(&self) -> NodeId {
        self.0.node
    }

    fn shard(&self) -> ShardId {
        self.0.shard
    }

    fn shard_count(&self) -> u16 {
        self.0.shards
    }

    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) {
        self.0
            .world
            .spawn(self.owner(), Kind::Shard(class), Box::pin(task));
    }

    fn sleep_until(&self, at: Instant) -> impl Future<Output = ()> + 'static {
        Sleep::until(self.0.world.clone(), self.true_ns(at))
    }

    fn give_way(&self) -> impl Future<Output = ()> + 'static {
        GiveWay::drawn(&self.0.world)
    }

    fn background<J: Job>(
        &self,
        class: JobClass,
        job: J,
    ) -> impl Future<Output = J::Output> + 'static {
        let (sender, receiver) = oneshot::channel();
        let disk = self.0.disk.clone();
        let kind = Kind::Job {
            starved: class != JobClass::Flush,
        };
        let task = async move { sender.send(job.run(disk).await) };
        self.0.world.spawn(self.owner(), kind, Box::pin(task));
        async move {
            match receiver.await {
                Some(output) => output,
                // The process died, and whoever waits here with it.
                None => std::future::pending().await,
            }
        }
    }

    fn call(
        &self,
        to: Address,
        class: Class,
        request: Bytes,
        deadline: Instant,
    ) -> impl Future<Output = Result<Bytes, CallError>> + 'static {
        let from = (self.0.host, self.0.life, self.0.shard);
        let deadline = Instant(self.true_ns(deadline));
        self.0
            .world
            .clone()
            .call(from, to, class, request, deadline)
    }
}
