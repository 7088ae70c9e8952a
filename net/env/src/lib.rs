//! The world as Torc's engine and cluster see it.
//!
//! Engine and cluster are generic over one type, [`Env`]: clock, disk, tasks, randomness, and calls
//! to other shards and nodes. Production implements it on io_uring (`torc-runtime`), the simulator
//! on virtual time (`torc-sim`); both run the same engine and cluster code.
//!
//! Invariants that the rest relies on:
//!
//! - Everything of one `Env` runs on one thread. Futures are not `Send`, state is `Rc`-shared, and
//!   nothing here takes a lock. Only a [`Job`] and its output cross threads.
//! - Buffers given to the disk are owned by the operation until it completes, so dropping a future
//!   midway is sound: the operation still finishes and its buffer is freed then.
//! - This crate decides nothing and holds no state beyond identifiers and buffers.

#![cfg_attr(not(test), warn(missing_docs))]

pub mod buffer;
pub mod call;
pub mod disk;
pub mod id;
pub mod job;
pub mod map;
pub mod mutation;
pub mod time;

use std::future::Future;
use std::time::Duration;

pub use buffer::{AlignedBuf, SECTOR_BYTES};
pub use bytes::Bytes;
pub use call::{Address, CallError, Origin};
pub use disk::{DirEntry, Disk, File, OpenMode};
pub use id::{NodeId, ShardId, Token, TokenRange, TreeId};
pub use job::{Job, JobClass};
pub use map::{Map, Set};
pub use time::{Instant, WallTime};

/// The scheduling class of a task: classes share a shard's time by weight, so that a burst of
/// repair or compaction work cannot push client requests aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Client requests and what answers them.
    Foreground,
    /// Writes and reads on behalf of another node's coordinator.
    Replication,
    /// Turning a memtable into tables, and merging tables.
    Flush,
    /// Anti-entropy, hint replay, streaming.
    Repair,
    /// Gossip, topology, admin commands.
    Control,
}

impl Class {
    /// Every class, in order of declaration; `Class::ALL[class.index()] == class`.
    pub const ALL: [Class; 5] = [
        Class::Foreground,
        Class::Replication,
        Class::Flush,
        Class::Repair,
        Class::Control,
    ];

    /// Position of this class in [`Class::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// One shard's view of the world. Cheap to clone (a reference count).
///
/// Implemented by the production runtime and by the simulator. Engine and cluster code is written
/// once, against this trait, and never asks which of the two it runs on.
pub trait Env: Clone + 'static {
    /// The disk that holds this node's data directory; every path is relative to that directory.
    type Disk: Disk;

    /// This node's disk.
    fn disk(&self) -> &Self::Disk;

    /// Monotonic time. Only differences mean something; it never goes backwards and does not
    /// continue over a restart.
    fn now(&self) -> Instant;

    /// The host's idea of civil time. It may jump either way; whoever needs monotonic stamps uses
    /// a hybrid logical clock on top.
    fn wall(&self) -> WallTime;

    /// A uniformly random number: from the operating system's seed in production, from the seed of
    /// the run in simulation.
    fn random(&self) -> u64;

    /// This node. Stored in the data directory, never reused by another node.
    fn node(&self) -> NodeId;

    /// The shard that this environment belongs to.
    fn shard(&self) -> ShardId;

    /// How many shards this node runs; `shard()` is below it.
    fn shard_count(&self) -> u16;

    /// Starts a task of this shard. It runs until it completes or the shard stops; a panic in it
    /// ends the process.
    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static);

    /// Completes at `at` or shortly after (the timer's resolution is a millisecond or better).
    fn sleep_until(&self, at: Instant) -> impl Future<Output = ()> + 'static;

    /// Completes after `delay`.
    fn sleep(&self, delay: Duration) -> impl Future<Output = ()> + 'static {
        self.sleep_until(self.now() + delay)
    }

    /// Lets other tasks run when this task has used up its quantum; free of cost otherwise. Loops
    /// over an unbounded number of items call it at each item.
    fn give_way(&self) -> impl Future<Output = ()> + 'static;

    /// Runs a job off this shard (on a background executor) and completes with its output here.
    /// Dropping the future does not stop the job.
    fn background<J: Job>(
        &self,
        class: JobClass,
        job: J,
    ) -> impl Future<Output = J::Output> + 'static;

    /// Sends `request` to a shard of this node (over the mesh) or of another one (over its peer
    /// link) and completes with the answer.
    ///
    /// The receiving shard gets the request at most once. What an error says about whether the
    /// request may have been handled is in [`CallError`]. The payload is not copied when it is sent
    /// to several addresses: clone the [`Bytes`].
    fn call(
        &self,
        to: Address,
        class: Class,
        request: Bytes,
        deadline: Instant,
    ) -> impl Future<Output = Result<Bytes, CallError>> + 'static;
}
