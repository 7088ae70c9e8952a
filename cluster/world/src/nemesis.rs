//! The nemesis: breaks hosts, links and clocks by a plan, and mends everything in the end.
//!
//! The plan is data, drawn before the run starts, so it does not depend on what the cluster does.

use std::time::Duration;

use torc_sim::{DiskOptions, HostId, NetOptions, PowerCut, Rng, Simulation};

use crate::config::{Config, Faults};
use crate::rot;

/// One fault and how long it lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Cuts a host's power; it starts again when the fault ends.
    Crash {
        /// Whose.
        host: HostId,
        /// Which unsynced changes survive.
        variant: u32,
    },
    /// Cuts a host's power inside one of its next disk operations.
    CrashInSync {
        /// Whose.
        host: HostId,
        /// How many operations it still begins.
        operations: u64,
        /// Which unsynced changes survive.
        variant: u32,
    },
    /// Cuts every host's power.
    Blackout {
        /// Which unsynced changes survive.
        variant: u32,
    },
    /// Cuts these hosts off from all others.
    Partition {
        /// One side.
        side: Vec<HostId>,
    },
    /// Lets nothing pass from one host to another.
    OneWay {
        /// The sender.
        from: HostId,
        /// The receiver.
        to: HostId,
    },
    /// Breaks the connections between two hosts.
    BreakLink {
        /// One.
        a: HostId,
        /// The other.
        b: HostId,
    },
    /// Stops a host's process.
    Pause {
        /// Whose.
        host: HostId,
    },
    /// Sets a host's clock wrong, and leaves it so.
    Clock {
        /// Whose.
        host: HostId,
        /// By how much.
        skew_ms: i64,
        /// How much too fast it runs.
        drift_ppm: i64,
    },
    /// Starves a host's background jobs.
    Starve {
        /// Whose.
        host: HostId,
    },
    /// Makes the network slow and lossy.
    Storm {
        /// Messages lost, of a thousand.
        loss: u16,
        /// Messages that come much too late, of a thousand.
        late: u16,
    },
    /// Flushes and compacts a host's stores.
    Compact {
        /// Whose.
        host: HostId,
    },
    /// No fault: a node gets another master key and is compacted; in the end those that it does not need any more
    /// are taken away.
    Rekey {
        /// Whose.
        host: HostId,
        /// Whether new files are in the clear instead.
        plain: bool,
    },
    /// Lets a bit of a host's disk read wrong until its sector is written again. Never mended.
    Rot {
        /// Whose.
        host: HostId,
        /// Which follows from it.
        draw: u64,
    },
    /// No fault: a node is stopped, and comes back with another number of shards.
    Reshard {
        /// Its host.
        host: HostId,
        /// How.
        comeback: Comeback,
    },
    /// Cuts a host off until the idle hours are over.
    Absent {
        /// Which.
        host: HostId,
    },
    /// No fault: a node starts for the first time and joins.
    Join {
        /// Its host.
        host: HostId,
    },
    /// Lets some reads of the disks of these hosts fail.
    ReadErrors {
        /// Whose.
        hosts: Vec<HostId>,
        /// How many of a thousand.
        rate: u16,
    },
    /// Lets some writes and syncs of a host's disk fail. Ends with a crash: a store that has met
    /// one of them stays shut until it is opened again.
    WriteErrors {
        /// Whose.
        host: HostId,
        /// How many of a thousand.
        rate: u16,
        /// Which unsynced changes survive the crash.
        variant: u32,
    },
    /// Leaves a host's disk little room.
    FullDisk {
        /// Whose.
        host: HostId,
        /// Free space.
        free_bytes: u64,
    },
}

/// A fault at its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// When it begins, since the load began.
    pub at: Duration,
    /// How long it lasts.
    pub lasts: Duration,
    /// The fault.
    pub fault: Fault,
}

/// How a node stops, and comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comeback {
    /// The shards that it comes back with.
    pub shards: u16,
    /// Whether it closes its stores before its power is cut.
    pub is_clean: bool,
    /// After how many disk operations of its first start the power is cut again, if it is.
    pub cut_after: Option<u64>,
    /// Which unsynced changes survive.
    pub variant: u32,
}

/// Clocks are within this of the true time when they are set, so that no node has to refuse work because of them.
const SKEW_MS_MAX: u64 = 200;
const DRIFT_PPM_MAX: u64 = 1_000;
/// Shards that a node comes back with.
const SHARDS_MAX: u64 = 3;
/// Disk operations of about as long as a redistribution takes, of three stores to three.
const CUT_AFTER_MAX: u64 = 200;
/// How far a clock may be off when it has drifted for as long as a run has faults, founding included.
pub(crate) const CLOCK_OFF_MAX: Duration = Duration::from_millis(SKEW_MS_MAX + 100);

/// Draws the faults of a run of this length, in order of time.
pub fn plan(config: &Config, length: Duration) -> Vec<Planned> {
    let rng = &mut Rng::stream(config.seed, "nemesis");
    let kinds = kinds(&config.faults);
    let mut planned = Vec::new();
    let absent = config.idle.and_then(|idle| idle.absent);
    if let Some(host) = absent {
        planned.push(Planned {
            at: length.mul_f64(0.9 + 0.1 * rng.fraction()),
            lasts: Duration::ZERO,
            fault: Fault::Absent { host },
        });
    }
    if config.joins {
        planned.push(Planned {
            at: length.mul_f64(0.6 * rng.fraction()),
            lasts: Duration::ZERO,
            fault: Fault::Join {
                host: HostId(config.founders()),
            },
        });
    }
    let mut at = Duration::ZERO;
    while !kinds.is_empty() {
        at += Duration::from_millis(rng.within(1..=2 * config.fault_every_ms));
        if at >= length {
            break;
        }
        let fault = rng.pick(&kinds)(config, rng);
        let lasts = Duration::from_millis(rng.log_within(20..=6_000));
        planned.push(Planned { at, lasts, fault });
    }
    planned.extend(rekeys(config, length));
    planned.extend(reshards(config, length));
    planned.extend(rots(config, length));
    planned.sort_by_key(|planned| planned.at);
    planned
}

/// Changes of master keys.
fn rekeys(config: &Config, length: Duration) -> Vec<Planned> {
    let every_ms = config.encryption.rekey_every_ms;
    now_and_then(config, length, "rekeys", every_ms, |config, rng| {
        Fault::Rekey {
            host: host(config, rng),
            plain: rng.chance(0.2),
        }
    })
}

/// Changes of numbers of shards.
fn reshards(config: &Config, length: Duration) -> Vec<Planned> {
    let every_ms = config.reshard_every_ms;
    now_and_then(config, length, "reshards", every_ms, |config, rng| {
        Fault::Reshard {
            host: host(config, rng),
            comeback: Comeback {
                shards: u16::try_from(rng.within(1..=SHARDS_MAX)).unwrap_or(1),
                is_clean: rng.chance(0.5),
                cut_after: rng.chance(0.4).then(|| rng.log_within(1..=CUT_AFTER_MAX)),
                variant: variant(rng),
            },
        }
    })
}

/// Bits that turn.
fn rots(config: &Config, length: Duration) -> Vec<Planned> {
    let Some(rot) = config.rot else {
        return Vec::new();
    };
    now_and_then(config, length, "rots", Some(rot.every_ms), |_, rng| {
        Fault::Rot {
            host: rot.host,
            draw: rng.number(),
        }
    })
}

/// What happens besides the faults. From a stream of its own, so that the faults are the same with and without.
fn now_and_then(
    config: &Config,
    length: Duration,
    stream: &str,
    every_ms: Option<u64>,
    draw: impl Fn(&Config, &mut Rng) -> Fault,
) -> Vec<Planned> {
    let rng = &mut Rng::stream(config.seed, stream);
    let mut planned = Vec::new();
    let mut at = Duration::ZERO;
    while let Some(every_ms) = every_ms {
        at += Duration::from_millis(rng.within(1..=2 * every_ms));
        if at >= length {
            break;
        }
        let fault = draw(config, rng);
        let lasts = Duration::from_millis(rng.log_within(20..=6_000));
        planned.push(Planned { at, lasts, fault });
    }
    planned
}

type Draw = fn(&Config, &mut Rng) -> Fault;

fn kinds(faults: &Faults) -> Vec<Draw> {
    let all: [(bool, Draw); 14] = [
        (faults.crash, |config, rng| Fault::Crash {
            host: host(config, rng),
            variant: variant(rng),
        }),
        (faults.crash_in_sync, |config, rng| Fault::CrashInSync {
            host: host(config, rng),
            operations: rng.log_within(0..=30),
            variant: variant(rng),
        }),
        (faults.blackout, |_, rng| Fault::Blackout {
            variant: variant(rng),
        }),
        (faults.partition, |config, rng| {
            let side = some_hosts(config, rng, usize::from(config.nodes()) - 1);
            Fault::Partition { side }
        }),
        (faults.one_way, |config, rng| {
            let (from, to) = two_hosts(config, rng);
            Fault::OneWay { from, to }
        }),
        (faults.break_link, |config, rng| {
            let (a, b) = two_hosts(config, rng);
            Fault::BreakLink { a, b }
        }),
        (faults.pause, |config, rng| Fault::Pause {
            host: host(config, rng),
        }),
        (faults.clock, |config, rng| Fault::Clock {
            host: host(config, rng),
            skew_ms: signed(rng, SKEW_MS_MAX),
            drift_ppm: signed(rng, DRIFT_PPM_MAX),
        }),
        (faults.starve, |config, rng| Fault::Starve {
            host: host(config, rng),
        }),
        (faults.storm, |_, rng| Fault::Storm {
            loss: per_mille(rng, 300),
            late: per_mille(rng, 300),
        }),
        (faults.compact, |config, rng| Fault::Compact {
            host: host(config, rng),
        }),
        (faults.read_errors, |config, rng| Fault::ReadErrors {
            hosts: some_hosts(config, rng, usize::from(config.nodes())),
            rate: per_mille(rng, 900),
        }),
        (faults.write_errors, |config, rng| Fault::WriteErrors {
            host: host(config, rng),
            rate: per_mille(rng, 100),
            variant: variant(rng),
        }),
        (faults.full_disk, |config, rng| Fault::FullDisk {
            host: host(config, rng),
            free_bytes: rng.log_within(256 << 10..=8 << 20),
        }),
    ];
    let on = all.into_iter().filter(|(on, _)| *on);
    on.map(|(_, draw)| draw).collect()
}

fn host(config: &Config, rng: &mut Rng) -> HostId {
    let index = rng.below(u64::from(config.nodes()));
    HostId(u16::try_from(index).expect("a handful of hosts"))
}

/// From one to `most` hosts.
fn some_hosts(config: &Config, rng: &mut Rng, most: usize) -> Vec<HostId> {
    let mut hosts: Vec<HostId> = (0..config.nodes()).map(HostId).collect();
    rng.shuffle(&mut hosts);
    hosts.truncate(1 + rng.index(most));
    hosts
}

fn two_hosts(config: &Config, rng: &mut Rng) -> (HostId, HostId) {
    let mut hosts: Vec<HostId> = (0..config.nodes()).map(HostId).collect();
    rng.shuffle(&mut hosts);
    (hosts[0], hosts[1])
}

fn variant(rng: &mut Rng) -> u32 {
    *rng.pick(&[0, 0, 1, 2, 3, 4, 5, 6])
}

fn per_mille(rng: &mut Rng, most: u64) -> u16 {
    u16::try_from(rng.log_within(5..=most)).unwrap_or(0)
}

fn signed(rng: &mut Rng, most: u64) -> i64 {
    let magnitude = i64::try_from(rng.log_within(0..=most)).unwrap_or(0);
    if rng.chance(0.5) {
        magnitude
    } else {
        -magnitude
    }
}

/// What the nemesis does to the world. Ends of overlapping faults are counted, so that the first
/// end does not end both.
pub(crate) struct Nemesis {
    simulation: Simulation,
    hosts: u16,
    calm: NetOptions,
    sound: DiskOptions,
    blocked: Vec<(HostId, HostId)>,
}

impl Nemesis {
    pub(crate) fn new(simulation: &Simulation, config: &Config) -> Self {
        Self {
            simulation: simulation.clone(),
            hosts: config.nodes(),
            calm: config.sim.net.clone(),
            sound: config.sim.disk.clone(),
            blocked: Vec::new(),
        }
    }

    pub(crate) fn begin(&mut self, fault: &Fault) {
        let simulation = &self.simulation;
        simulation.note(format_args!("fault begins: {fault:?}"));
        match *fault {
            Fault::Crash { host, variant } => simulation.crash(host, variant),
            Fault::CrashInSync {
                host,
                operations,
                variant,
            } => {
                let operation = simulation.disk_operations(host) + operations;
                simulation.cut_power(host, PowerCut { operation, variant });
            }
            Fault::Blackout { variant } => {
                for host in self.hosts() {
                    simulation.crash(host, variant);
                }
            }
            Fault::Partition { .. } | Fault::OneWay { .. } | Fault::Absent { .. } => {
                self.blocked.extend(self.links(fault));
                self.block();
            }
            Fault::BreakLink { a, b } => simulation.break_link(a, b),
            Fault::Pause { host } => simulation.pause(host, true),
            Fault::Clock {
                host,
                skew_ms,
                drift_ppm,
            } => simulation.set_clock(host, skew_ms * 1_000, drift_ppm),
            Fault::Starve { host } => simulation.starve_background(host, true),
            Fault::Storm { loss, late } => simulation.set_net(NetOptions {
                loss: f64::from(loss) / 1000.0,
                late: f64::from(late) / 1000.0,
                ..self.calm.clone()
            }),
            Fault::ReadErrors { ref hosts, rate } => {
                for host in hosts {
                    self.change_disk(*host, |disk| disk.read_error = f64::from(rate) / 1000.0);
                }
            }
            Fault::WriteErrors { host, rate, .. } => self.change_disk(host, |disk| {
                disk.write_error = f64::from(rate) / 1000.0;
                disk.sync_error = disk.write_error;
            }),
            Fault::FullDisk { host, free_bytes } => {
                let files = simulation.files(host);
                let used: u64 = files.iter().map(|(_, bytes)| bytes).sum();
                self.change_disk(host, |disk| disk.capacity_bytes = used + free_bytes);
            }
            Fault::Rot { host, draw } => rot::strike(simulation, host, draw),
            // The cluster's to do.
            Fault::Compact { .. }
            | Fault::Join { .. }
            | Fault::Rekey { .. }
            | Fault::Reshard { .. } => {}
        }
    }

    fn change_disk(&self, host: HostId, change: impl FnOnce(&mut DiskOptions)) {
        let mut disk = self.simulation.disk(host);
        change(&mut disk);
        self.simulation.set_disk(host, disk);
    }

    /// Ends a fault. Hosts that are down are started by the caller.
    pub(crate) fn end(&mut self, fault: &Fault) {
        let simulation = &self.simulation;
        simulation.note(format_args!("fault ends: {fault:?}"));
        match *fault {
            Fault::Partition { .. } | Fault::OneWay { .. } => {
                for link in self.links(fault) {
                    if let Some(at) = self.blocked.iter().position(|other| *other == link) {
                        self.blocked.swap_remove(at);
                        if !self.blocked.contains(&link) {
                            self.simulation.set_blocked(link.0, link.1, false);
                        }
                    }
                }
            }
            Fault::Pause { host } => simulation.pause(host, false),
            Fault::Starve { host } => simulation.starve_background(host, false),
            Fault::Storm { .. } => simulation.set_net(self.calm.clone()),
            Fault::ReadErrors { ref hosts, .. } => {
                for host in hosts {
                    self.change_disk(*host, |disk| disk.read_error = self.sound.read_error);
                }
            }
            Fault::WriteErrors { host, variant, .. } => {
                simulation.crash(host, variant);
                self.change_disk(host, |disk| {
                    disk.write_error = self.sound.write_error;
                    disk.sync_error = self.sound.sync_error;
                });
            }
            Fault::FullDisk { host, .. } => {
                self.change_disk(host, |disk| disk.capacity_bytes = self.sound.capacity_bytes);
            }
            Fault::Absent { .. }
            | Fault::Crash { .. }
            | Fault::CrashInSync { .. }
            | Fault::Blackout { .. }
            | Fault::BreakLink { .. }
            | Fault::Clock { .. }
            | Fault::Compact { .. }
            | Fault::Join { .. }
            | Fault::Rekey { .. }
            | Fault::Reshard { .. }
            | Fault::Rot { .. } => {}
        }
    }

    /// Mends everything but hosts that are down: a calm, lossless network, right clocks. A host that
    /// is `absent` is, or stays, cut off.
    pub(crate) fn heal(&mut self, absent: Option<HostId>) {
        let simulation = &self.simulation;
        simulation.note(format_args!("all faults end"));
        for from in self.hosts() {
            simulation.pause(from, false);
            simulation.starve_background(from, false);
            simulation.set_clock(from, 0, 0);
            simulation.forget_power_cut(from);
            simulation.set_disk(from, self.sound.clone());
            for to in self.hosts().filter(|to| *to != from) {
                if absent != Some(from) && absent != Some(to) {
                    simulation.set_blocked(from, to, false);
                }
            }
        }
        self.blocked.clear();
        self.simulation.set_net(NetOptions {
            loss: 0.0,
            late: 0.0,
            overload: 0.0,
            ..self.calm.clone()
        });
    }

    fn block(&self) {
        for (from, to) in &self.blocked {
            self.simulation.set_blocked(*from, *to, true);
        }
    }

    fn links(&self, fault: &Fault) -> Vec<(HostId, HostId)> {
        match fault {
            Fault::Partition { side } => {
                let others = self.hosts().filter(|host| !side.contains(host));
                others
                    .flat_map(|other| {
                        side.iter()
                            .flat_map(move |host| [(*host, other), (other, *host)])
                    })
                    .collect()
            }
            Fault::OneWay { from, to } => vec![(*from, *to)],
            Fault::Absent { host } => {
                let others = self.hosts().filter(|other| other != host);
                others
                    .flat_map(|other| [(*host, other), (other, *host)])
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    fn hosts(&self) -> impl Iterator<Item = HostId> + use<> {
        (0..self.hosts).map(HostId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_holds_only_what_is_on_and_follows_from_the_seed() {
        let length = Duration::from_secs(20);
        for seed in 0..100 {
            let config = Config::draw(seed);
            let planned = plan(&config, length);
            assert_eq!(planned, plan(&config, length));
            let is_absent = config.idle.is_some_and(|idle| idle.absent.is_some());
            let is_calm = !config.faults.any() && !is_absent && !config.joins;
            let count = |matches: fn(&Fault) -> bool| {
                let matching = planned.iter().filter(|planned| matches(&planned.fault));
                matching.count()
            };
            let rekeys = count(|fault| matches!(fault, Fault::Rekey { .. }));
            let reshards = count(|fault| matches!(fault, Fault::Reshard { .. }));
            let rots = count(|fault| matches!(fault, Fault::Rot { .. }));
            let besides = rekeys + reshards + rots;
            assert_eq!(planned.len() == besides, is_calm, "seed {seed}");
            assert!(rots == 0 || config.rot.is_some());
            assert!(rekeys == 0 || config.encryption.rekey_every_ms.is_some());
            assert!(reshards == 0 || config.reshard_every_ms.is_some());
            for entry in &planned {
                assert!(entry.at < length);
                if let Fault::Partition { side } = &entry.fault {
                    assert!(config.faults.partition);
                    assert!(!side.is_empty() && side.len() < config.shards.len());
                }
            }
        }
    }

    #[test]
    fn overlapping_partitions_end_one_by_one() {
        let config = Config::draw(1);
        let simulation = Simulation::new(1, config.sim.clone());
        let mut nemesis = Nemesis::new(&simulation, &config);
        for _ in 0..config.nodes() {
            simulation.add_host(1);
        }
        let side = |hosts: &[u16]| Fault::Partition {
            side: hosts.iter().copied().map(HostId).collect(),
        };
        nemesis.begin(&side(&[0]));
        nemesis.begin(&side(&[0, 1]));
        nemesis.end(&side(&[0]));
        assert!(nemesis.blocked.contains(&(HostId(0), HostId(2))));
        assert!(!nemesis.blocked.contains(&(HostId(0), HostId(1))));
        nemesis.end(&side(&[0, 1]));
        assert!(nemesis.blocked.is_empty());
    }
}
