//! The knobs of a simulated world: speeds and fault rates.
//!
//! Probabilities are `0.0..=1.0` for each operation or message; times are in microseconds, as a
//! range that is drawn from uniformly.

use std::ops::RangeInclusive;

use crate::Rng;

/// Which of the ready tasks runs next.
#[derive(Clone, Debug, PartialEq)]
pub enum Schedule {
    /// Any of them, with equal probability.
    Random,
    /// A class first, by the weights in order of [`torc_env::Class::ALL`]; then any of its tasks.
    Weighted([u32; 5]),
}

/// Everything that is fixed for a run. The default is a calm, quick world.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Order of ready tasks.
    pub schedule: Schedule,
    /// Virtual time that one poll of a task takes, in nanoseconds.
    pub poll_ns: u64,
    /// Probability that `give_way` yields.
    pub give_way: f64,
    /// How long a background job (compaction, scrub) waits for its executor at every step.
    pub background_us: RangeInclusive<u64>,
    /// The disks.
    pub disk: DiskOptions,
    /// The links between hosts and the mesh between shards of one host.
    pub net: NetOptions,
}

/// Speeds and faults of a host's disk.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskOptions {
    /// Size of the file system in bytes.
    pub capacity_bytes: u64,
    /// Time of a read.
    pub read_us: RangeInclusive<u64>,
    /// Time of a write; a durable one takes the time of a sync besides.
    pub write_us: RangeInclusive<u64>,
    /// Time of a sync.
    pub sync_us: RangeInclusive<u64>,
    /// Probability that an operation takes a hundred times as long.
    pub slow: f64,
    /// Probability that a read fails with EIO.
    pub read_error: f64,
    /// Probability that a write fails with EIO, after a part of it was written.
    pub write_error: f64,
    /// Probability that a sync fails with EIO; the writes that it should have covered are lost in
    /// part, and the next sync succeeds.
    pub sync_error: f64,
    /// A directory that stands for another volume, which is full: what is written below it fails with
    /// ENOSPC, after a part of it was written.
    pub full_dir: Option<&'static str>,
}

/// Speeds and faults of the network.
#[derive(Clone, Debug, PartialEq)]
pub struct NetOptions {
    /// Delay of a message between hosts. Each message draws its own, so messages overtake each
    /// other.
    pub delay_us: RangeInclusive<u64>,
    /// Probability that a message is delayed by `late_us` instead: usually past its deadline.
    pub late: f64,
    /// Delay of a late message.
    pub late_us: RangeInclusive<u64>,
    /// Probability that a request, or an answer, vanishes.
    pub loss: f64,
    /// Probability that the handler gets a request twice (the second answer goes nowhere). Beyond
    /// the contract of `Env::call`, so never of [`Class::Foreground`]: what clients ask is passed on
    /// once, and doing it twice may be wrong.
    ///
    /// [`Class::Foreground`]: torc_env::Class::Foreground
    pub duplicate: f64,
    /// Probability that a call is refused as `Overloaded` before it is sent.
    pub overload: f64,
    /// How long a blocked or broken link is believed to be up: calls before that are lost, later
    /// ones unreachable.
    pub detect_us: RangeInclusive<u64>,
    /// Delay of a message between two shards of one host.
    pub mesh_us: RangeInclusive<u64>,
    /// Calls in flight between two shards of one host; more are refused as `Overloaded`.
    pub mesh_calls_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            schedule: Schedule::Random,
            poll_ns: 500,
            give_way: 0.25,
            background_us: 0..=50,
            disk: DiskOptions::default(),
            net: NetOptions::default(),
        }
    }
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self {
            capacity_bytes: 1 << 40,
            read_us: 20..=200,
            write_us: 10..=200,
            sync_us: 50..=1000,
            slow: 0.0,
            read_error: 0.0,
            write_error: 0.0,
            sync_error: 0.0,
            full_dir: None,
        }
    }
}

impl Default for NetOptions {
    fn default() -> Self {
        Self {
            delay_us: 50..=1000,
            late: 0.0,
            late_us: 1_000_000..=10_000_000,
            loss: 0.0,
            duplicate: 0.0,
            overload: 0.0,
            detect_us: 0..=2_000_000,
            mesh_us: 1..=20,
            mesh_calls_max: 4096,
        }
    }
}

impl Options {
    /// Draws a world: each kind of trouble is present with probability one half, its rate is
    /// drawn over orders of magnitude. Faults of the disk that a store answers by stopping (EIO)
    /// are left out; add them where the scenario bears them.
    pub fn draw(rng: &mut Rng) -> Self {
        let mut options = Self::default();
        if rng.chance(0.5) {
            let mut weights = [1; 5];
            for weight in &mut weights {
                *weight = u32::try_from(rng.log_within(1..=64)).unwrap_or(1);
            }
            options.schedule = Schedule::Weighted(weights);
        }
        options.poll_ns = rng.log_within(50..=5_000);
        options.give_way = rng.fraction();
        if rng.chance(0.3) {
            options.background_us = 0..=rng.log_within(100..=100_000);
        }
        let disk = &mut options.disk;
        disk.write_us = 1..=rng.log_within(10..=2_000);
        disk.sync_us = 1..=rng.log_within(10..=20_000);
        disk.read_us = 1..=rng.log_within(10..=2_000);
        if rng.chance(0.3) {
            disk.slow = rate(rng, 20);
        }
        let net = &mut options.net;
        net.delay_us = 10..=rng.log_within(50..=50_000);
        if rng.chance(0.5) {
            net.loss = rate(rng, 200);
        }
        if rng.chance(0.5) {
            net.late = rate(rng, 100);
        }
        if rng.chance(0.2) {
            net.overload = rate(rng, 50);
        }
        if rng.chance(0.5) {
            net.duplicate = rate(rng, 200);
        }
        net.mesh_us = 0..=rng.log_within(1..=500);
        options
    }
}

/// A probability between a thousandth and `most` thousandths, spread over orders of magnitude.
fn rate(rng: &mut Rng, most: u64) -> f64 {
    rng.log_within(1..=most) as f64 / 1000.0
}
