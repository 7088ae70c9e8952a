//! Torc's shard runtime: the real world behind [`torc_env::Env`].
//!
//! One shard is one thread with one io_uring and one executor. The net crate starts the runtime,
//! assembles a shard on each thread (store, cluster half, listeners) and serves; engine and cluster
//! see only [`RealEnv`] through `Env`.
//!
//! The way of a request: a completion of the ring (reactor) wakes the task of a
//! connection, which runs in its class's share of the tick (executor); what it sends to another
//! shard goes through the mesh, what it reads or writes through the disk, and everything leaves
//! with one system call at the end of the tick.
//!
//! Invariants:
//!
//! - The data path takes no lock and shares nothing between threads but single-producer queues.
//! - Memory that the kernel may touch belongs to a slot of the ring until the kernel is done, so
//!   dropping any future at any time is sound.
//! - This crate knows neither protocols nor keys.

mod background;
mod calls;
mod clock;
mod config;
mod disk;
mod doorbell;
mod env;
mod executor;
mod handle;
pub mod limits;
mod mesh;
pub mod net;
pub mod probe;
mod random;
mod reactor;
mod reclaim;
mod runtime;
mod shard;
mod spin;
mod sys;
mod timer;

pub use calls::PendingCall;
pub use config::{Background, DiskRates, RuntimeConfig};
pub use disk::{RingDisk, RingFile};
pub use env::{RealEnv, RemoteCaller};
pub use handle::{Refused, ShardHandle};
pub use net::{ListenOptions, TcpListener, TcpStream};
pub use runtime::{Runtime, RuntimeHandle, StartError};
