//! The simulated world: virtual time, a seeded scheduler, disks that lose what was not synced, a
//! network that delays, loses and breaks.
//!
//! [`SimEnv`] implements [`torc_env::Env`], so engine and cluster run here unchanged; a [`Simulation`]
//! holds any number of hosts, each with a disk that outlives its process. One run is one thread and
//! follows from its seed alone: [`Simulation::hash`] of two runs is the same.
//!
//! What it does not do: it knows nothing of stores, rings or clients (the world crate does), and it
//! never reads the real clock.

#![forbid(unsafe_code)]

mod disk;
mod env;
pub mod fuzz;
mod host;
mod log;
mod net;
mod oneshot;
mod options;
mod power;
mod rng;
mod simulation;
mod tasks;
mod timer;
mod world;

use std::future::Future;

pub use disk::{SimDisk, SimFile};
pub use env::{EPOCH, SimEnv};
pub use host::{Handler, HostId, PowerCut};
pub use options::{DiskOptions, NetOptions, Options, Schedule};
pub use power::{Cuts, at_every_power_cut};
pub use rng::Rng;
pub use simulation::{Simulation, Stalled};
pub use timer::{GiveWay, Sleep};

use torc_env::ShardId;

/// Runs `scenario` on the only shard of the only host of a calm world, and returns its output.
///
/// # Panics
/// When the scenario waits for what never comes.
pub fn run<T: 'static, F: Future<Output = T> + 'static>(
    seed: u64,
    scenario: impl FnOnce(SimEnv) -> F,
) -> T {
    let simulation = Simulation::new(seed, Options::default());
    let host = simulation.add_host(1);
    simulation
        .run_on(host, ShardId(0), scenario)
        .expect("nobody cuts the power")
}
