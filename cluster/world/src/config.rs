//! What a seed draws: the size of the cluster, the load, and which faults are on.
//!
//! Swarm testing: each feature and each kind of fault is absent in about half of the runs, because a
//! world with everything in it hides what only shows alone. Keys are few so that they collide; stores
//! are tiny so that they flush and compact.

use std::time::Duration;

use torc_cluster::keyspace::{Conflict, Keyspace};
use torc_sim::{HostId, Options as SimOptions, Rng};

use crate::nemesis::CLOCK_OFF_MAX;

/// Which faults the nemesis may choose from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Power cuts at any time.
    pub crash: bool,
    /// Power cuts aimed at the next few disk operations: inside a write or a sync.
    pub crash_in_sync: bool,
    /// Every host loses its power at once.
    pub blackout: bool,
    /// Hosts cut off from each other, both ways.
    pub partition: bool,
    /// Hosts cut off in one direction.
    pub one_way: bool,
    /// Connections that break while requests are under way.
    pub break_link: bool,
    /// Processes that stand still and go on.
    pub pause: bool,
    /// Clocks that are wrong, jump and drift.
    pub clock: bool,
    /// Background jobs that hardly get to run.
    pub starve: bool,
    /// A network that is slow and lossy for a while.
    pub storm: bool,
    /// No fault: an operator flushes and compacts a node at a bad moment.
    pub compact: bool,
    /// Disks of which some reads fail for a while.
    pub read_errors: bool,
    /// Disks of which some writes and syncs fail for a while; then the process is started again.
    pub write_errors: bool,
    /// Disks that are nearly full for a while.
    pub full_disk: bool,
}

impl Faults {
    /// Whether any is on.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }

    fn draw(rng: &mut Rng) -> Self {
        Self {
            crash: rng.chance(0.5),
            crash_in_sync: rng.chance(0.5),
            blackout: rng.chance(0.2),
            partition: rng.chance(0.5),
            one_way: rng.chance(0.3),
            break_link: rng.chance(0.4),
            pause: rng.chance(0.4),
            clock: rng.chance(0.4),
            starve: rng.chance(0.3),
            storm: rng.chance(0.4),
            compact: rng.chance(0.5),
            read_errors: rng.chance(0.4),
            write_errors: rng.chance(0.3),
            full_disk: rng.chance(0.2),
        }
    }
}

/// Operations on a key, about, in a world whose writes have names.
const NAMED_WRITES_MAX: u16 = 40;

/// What the clients do.
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    /// Clients.
    pub clients: u16,
    /// Operations of each.
    pub operations: u16,
    /// Different keys.
    pub keys: u16,
    /// Longest pause between two operations of a client, in milliseconds.
    pub think_ms: u64,
    /// Longest time that a client waits for an answer, in milliseconds.
    pub patience_ms: u64,
    /// Bytes that a value has at most.
    pub value_bytes: u64,
    /// Share of writes among the operations.
    pub writes: f64,
    /// Share of deletes among the writes.
    pub deletes: f64,
    /// Share of writes that come without a context.
    pub blind: f64,
    /// Share of writes that carry a condition.
    pub conditional: f64,
    /// Share of writes that have a name of their own and are retried until they are answered.
    pub keyed: f64,
    /// Share of reads that ask for what their session has seen.
    pub sessions: f64,
    /// Share of writes for which hints count.
    pub sloppy: f64,
    /// Whether levels are drawn for each operation; else all are quorums.
    pub mixed_levels: bool,
}

impl Load {
    fn draw(rng: &mut Rng) -> Self {
        let mut share = |p: f64, most: f64| {
            let on = rng.chance(p);
            let share = rng.fraction() * most;
            if on { share } else { 0.0 }
        };
        let (deletes, blind) = (share(0.6, 0.5), share(0.6, 0.7));
        let (conditional, sessions) = (share(0.3, 0.4), share(0.6, 1.0));
        let (sloppy, keyed) = (share(0.4, 1.0), share(0.4, 1.0));
        let clients = draw_u16(rng, 1..=6);
        let mut operations = draw_u16(rng, 20..=100);
        let keys = u16::try_from(rng.log_within(1..=12)).unwrap_or(1);
        if keyed > 0.0 {
            // A key remembers its newest 64 named writes; beyond that a retry may count twice.
            operations = operations.min(NAMED_WRITES_MAX * keys / clients);
        }
        Self {
            clients,
            operations,
            keys,
            think_ms: rng.log_within(5..=500),
            patience_ms: rng.log_within(50..=3_000),
            value_bytes: rng.log_within(16..=10_000),
            writes: 0.2 + 0.6 * rng.fraction(),
            deletes,
            blind,
            conditional,
            keyed,
            sessions,
            sloppy,
            mixed_levels: rng.chance(0.4),
        }
    }
}

/// Values that expire.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expiry {
    /// Share of puts that say when their value expires.
    pub share: f64,
    /// Longest time of those that expire during the run, in seconds; all others live for [`LONG_SECONDS`].
    pub seconds_max: u64,
    /// The keyspace's own, for puts that do not say; 0 = never.
    pub default_seconds: u64,
}

/// Longer than any run: what is to live so long is there in the end.
pub const LONG_SECONDS: u64 = 86_400;
/// Shorter than the time that passes between the last write and the last look at the replicas: what is to
/// live no longer is gone by then.
const SHORT_SECONDS_MAX: u64 = 8;

impl Expiry {
    /// Nothing does.
    const NONE: Expiry = Expiry {
        share: 0.0,
        seconds_max: 1,
        default_seconds: 0,
    };

    fn draw(rng: &mut Rng) -> Self {
        let on = rng.chance(0.3);
        let share = 0.1 + 0.9 * rng.fraction();
        let seconds_max = rng.within(1..=SHORT_SECONDS_MAX);
        let default_seconds = *rng.pick(&[0, 0, 0, seconds_max, LONG_SECONDS]);
        Self {
            share: if on { share } else { 0.0 },
            seconds_max,
            default_seconds: if on { default_seconds } else { 0 },
        }
    }

    /// How long the value of a put is to live, as it says itself.
    pub fn draw_seconds(&self, rng: &mut Rng) -> Option<u64> {
        let is_long = rng.chance(0.2);
        let short = rng.within(1..=self.seconds_max);
        let seconds = if is_long { LONG_SECONDS } else { short };
        rng.chance(self.share).then_some(seconds)
    }
}

/// How the stores are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stores {
    /// Whether each acknowledgement has a frame of its own; else commits are grouped.
    pub always_sync: bool,
    /// Memory of the memtables.
    pub memtable_bytes: usize,
    /// What a block is filled towards.
    pub block_bytes: usize,
    /// Memory of the caches; may be nothing.
    pub cache_bytes: usize,
    /// Size of a WAL segment.
    pub wal_segment_bytes: u64,
    /// How large values are kept.
    pub blobs: Blobs,
}

/// What goes to blobs, and when it leaves them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blobs {
    /// From which size on values go to blobs.
    pub separate_from: Option<usize>,
    /// How many percent of a blob are dead when it is emptied.
    pub dead_percent: u8,
}

impl Blobs {
    fn draw(rng: &mut Rng) -> Self {
        let size = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        Self {
            separate_from: rng.chance(0.7).then(|| size(rng.log_within(16..=8 << 10))),
            dead_percent: *rng.pick(&[1, 20, 50, 100]),
        }
    }
}

impl Stores {
    fn draw(rng: &mut Rng, blobs: Blobs) -> Self {
        let size = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        Self {
            blobs,
            always_sync: rng.chance(0.3),
            memtable_bytes: size(rng.log_within(16 << 10..=1 << 20)),
            block_bytes: size(rng.log_within(512..=16 << 10)),
            cache_bytes: if rng.chance(0.3) {
                0
            } else {
                size(rng.log_within(4 << 10..=1 << 20))
            },
            wal_segment_bytes: *rng.pick(&[1 << 20, 2 << 20]),
        }
    }
}

/// Encryption at rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encryption {
    /// Whether each node has a master key from its first start on.
    pub from_start: Vec<bool>,
    /// Mean time between two changes of the nodes' master keys, in milliseconds; `None`: there are none.
    pub rekey_every_ms: Option<u64>,
}

impl Encryption {
    fn draw(rng: &mut Rng, nodes: usize) -> Self {
        let share = *rng.pick(&[0.0, 0.5, 1.0, 1.0]);
        Self {
            from_start: (0..nodes).map(|_| rng.chance(share)).collect(),
            rekey_every_ms: rng.chance(0.3).then(|| rng.log_within(500..=5_000)),
        }
    }
}

/// How nodes repair: much more often than anybody would.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repair {
    /// Within this time every range is repaired, in milliseconds.
    pub target_ms: u64,
    /// How often it is looked for a range that is due, in milliseconds.
    pub tick_ms: u64,
    /// When a failed repair is tried again, in milliseconds.
    pub retry_ms: u64,
    /// How often it is looked whether a hint's target is back, in milliseconds.
    pub hint_interval_ms: u64,
    /// Most bytes of hints that a shard keeps.
    pub hint_bytes_max: u64,
    /// Whether ranges are repaired at all. Without, only hints and reads bring replicas what they
    /// missed, and what those alone promise shows.
    pub automatic: bool,
}

impl Repair {
    fn draw(rng: &mut Rng) -> Self {
        Self {
            target_ms: rng.log_within(2_000..=60_000),
            tick_ms: rng.log_within(50..=1_000),
            retry_ms: rng.log_within(200..=10_000),
            hint_interval_ms: rng.log_within(100..=5_000),
            hint_bytes_max: *rng.pick(&[0, 4 << 10, 1 << 20, 256 << 20]),
            automatic: rng.chance(0.85),
        }
    }
}

/// A disk on which bits turn while nobody writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rot {
    /// Whose. Of one host only: what one replica has lost, the others have.
    pub host: HostId,
    /// Mean time between two bits, in milliseconds.
    pub every_ms: u64,
}

/// Hours without clients after the load, in which deletions become old enough to be purged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Idle {
    /// A host that is cut off all the time, and some time before.
    pub absent: Option<HostId>,
}

impl Idle {
    fn draw(rng: &mut Rng, nodes: usize) -> Self {
        let absent = rng.index(nodes);
        let absent = HostId(u16::try_from(absent).expect("a handful of hosts"));
        Self {
            absent: rng.chance(0.7).then_some(absent),
        }
    }
}

/// Everything that a run is made of. Follows from the seed.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The seed.
    pub seed: u64,
    /// Shards of each node; as many nodes as entries.
    pub shards: Vec<u16>,
    /// Copies of a key that the keyspace asks for.
    pub n: u8,
    /// What becomes of concurrent writes.
    pub conflict: Conflict,
    /// What expires.
    pub expiry: Expiry,
    /// Virtual nodes of each node.
    pub vnodes: u16,
    /// What the clients do.
    pub load: Load,
    /// How the stores are set.
    pub stores: Stores,
    /// What is encrypted.
    pub encryption: Encryption,
    /// Mean time between two nodes that come back with another number of shards, in milliseconds; `None`: none do.
    pub reshard_every_ms: Option<u64>,
    /// A disk that rots.
    pub rot: Option<Rot>,
    /// How nodes repair.
    pub repair: Repair,
    /// Which faults there are.
    pub faults: Faults,
    /// Mean time between two faults, in milliseconds.
    pub fault_every_ms: u64,
    /// Whether hours pass after the load.
    pub idle: Option<Idle>,
    /// Whether the last node is no founder and joins during the load.
    pub joins: bool,
    /// The world below.
    pub sim: SimOptions,
}

impl Config {
    /// Draws the run of a seed.
    pub fn draw(seed: u64) -> Self {
        let rng = &mut Rng::stream(seed, "config");
        let nodes = usize::from(draw_u16(rng, 3..=5));
        let two_shards = rng.chance(0.4);
        let shards = (0..nodes)
            .map(|_| if two_shards { draw_u16(rng, 1..=2) } else { 1 })
            .collect();
        // Five copies are what a doubled ack needs to do harm; one is what a lost disk needs.
        let n = *rng.pick(&[1, 2, 3, 3, 3, 3, 4, 5, 5]);
        let mut faults = Faults::draw(rng);
        if rng.chance(0.1) {
            faults = Faults::default();
        }
        let mut sim = SimOptions::draw(&mut Rng::stream(seed, "world"));
        // What storms are for: between them, a network on which a cluster can live.
        sim.net.loss /= 10.0;
        sim.net.late /= 10.0;
        let mut config = Self {
            seed,
            shards,
            n,
            conflict: Conflict::Siblings,
            expiry: Expiry::draw(&mut Rng::stream(seed, "expiry")),
            vnodes: *rng.pick(&[4, 8, 16]),
            load: Load::draw(rng),
            stores: Stores::draw(rng, Blobs::draw(&mut Rng::stream(seed, "blobs"))),
            encryption: Encryption::draw(&mut Rng::stream(seed, "encryption"), nodes),
            reshard_every_ms: None,
            rot: None,
            repair: Repair::draw(rng),
            faults,
            fault_every_ms: rng.log_within(50..=2_000),
            idle: rng.chance(0.25).then(|| Idle::draw(rng, nodes)),
            joins: false,
            sim,
        };
        config.aim(rng);
        config.draw_reshards(&mut Rng::stream(seed, "reshards"));
        // While owners change, only what a majority of them acknowledged is promised to stay.
        config.joins = nodes > 3 && config.idle.is_none() && rng.chance(0.3);
        if config.joins {
            config.n = config.n.min(u8::try_from(nodes - 1).unwrap_or(3));
            config.load.mixed_levels = false;
            config.load.sloppy = 0.0;
            config.repair.automatic = true;
            config.aim_join(&mut Rng::stream(seed, "join"));
            config.expiry = Expiry::NONE;
        } else {
            config.draw_conflict(&mut Rng::stream(seed, "conflict"));
            config.draw_rot(&mut Rng::stream(seed, "rot"));
        }
        config
    }

    /// Where writes are ordered by time, clocks matter.
    fn draw_conflict(&mut self, rng: &mut Rng) {
        if rng.chance(0.15) {
            self.conflict = Conflict::Lww;
            self.faults.clock |= self.faults.any() && rng.chance(0.5);
            if rng.chance(0.7) && self.repair.automatic && self.idle.is_none() {
                self.aim_at_clocks();
            }
        }
    }

    /// What a write has seen only matters to its stamp where its node does not have it yet, and has a clock that is behind:
    /// clients write a key again, through another node, before that one has got what they wrote before.
    fn aim_at_clocks(&mut self) {
        self.faults.clock |= self.faults.any();
        self.fault_every_ms = self.fault_every_ms.min(500);
        self.sim.net.delay_us = 10..=(*self.sim.net.delay_us.end()).max(30_000);
        self.n = self.n.max(3);
        let load = &mut self.load;
        load.think_ms = load.think_ms.min(5);
        load.keys = load.keys.min(3);
        load.blind = load.blind.min(0.2);
        // So many on so few keys would be more than a key remembers.
        load.keyed = 0.0;
        load.mixed_levels = false;
    }

    /// More often where nothing but hints brings replicas what they missed: those are carried over one by one.
    fn draw_reshards(&mut self, rng: &mut Rng) {
        let share = if self.repair.automatic { 0.15 } else { 0.5 };
        self.reshard_every_ms = rng.chance(share).then(|| rng.log_within(500..=5_000));
    }

    /// One disk rots, and reads reach it. What its replica cannot read any more has to be somewhere else: no key has one
    /// copy only, every ack is one of a quorum, and replicas repair each other.
    fn draw_rot(&mut self, rng: &mut Rng) {
        if !rng.chance(0.2) || !self.repair.automatic {
            return;
        }
        self.rot = Some(Rot {
            host: HostId(draw_u16(rng, 0..=u64::from(self.nodes()) - 1)),
            every_ms: rng.log_within(200..=5_000),
        });
        self.n = self.n.max(2);
        self.load.mixed_levels = false;
        self.faults.compact = true;
        self.stores.cache_bytes = 0;
        self.stores.memtable_bytes = self.stores.memtable_bytes.min(64 << 10);
    }

    /// What a joining node has missed shows where nobody else has it any more, and nothing excuses that, on keys that are written meanwhile.
    fn aim_join(&mut self, rng: &mut Rng) {
        if rng.chance(0.5) {
            self.n = 1;
        }
        self.load.keys = self.load.keys.max(draw_u16(rng, 4..=24));
        self.load.writes = self.load.writes.max(0.5);
    }

    /// What some promises need to be tried at all: tables that are read; hints on nodes that are no replicas, while
    /// nothing else brings replicas what they missed; and deletions that wait for such a hint of a
    /// node that is away, and for nothing else.
    fn aim(&mut self, rng: &mut Rng) {
        if self.faults.read_errors {
            // Reads that reach the disk.
            self.faults.compact = true;
            self.stores.cache_bytes = 0;
            self.stores.memtable_bytes = self.stores.memtable_bytes.min(64 << 10);
        }
        let is_absent = self.idle.is_some_and(|idle| idle.absent.is_some());
        if self.repair.automatic && !is_absent {
            return;
        }
        self.n = self.n.clamp(2, u8::try_from(self.nodes() - 1).unwrap_or(2));
        self.load.keys = self.load.keys.max(draw_u16(rng, 4..=24));
        self.load.sloppy = self.load.sloppy.max(0.7);
        self.repair.hint_bytes_max = 256 << 20;
        if is_absent {
            self.load.sloppy = 0.8;
            self.load.deletes = self.load.deletes.min(0.1);
            self.repair.hint_interval_ms = 10_000;
            self.repair.automatic = true;
        }
    }

    /// The clients' keyspace.
    pub fn keyspace(&self) -> Keyspace {
        let default = Keyspace {
            n: self.n,
            conflict: self.conflict,
            ttl_default_seconds: self.expiry.default_seconds,
            ..Keyspace::default_keyspace()
        };
        if default == Keyspace::default_keyspace() {
            return default;
        }
        Keyspace {
            name: "world".to_owned(),
            ..default
        }
    }

    /// How far a host's clock may be off at any time, as those see it who ask it for milliseconds.
    pub fn clock_off_max(&self) -> Duration {
        let skew = if self.faults.clock {
            CLOCK_OFF_MAX
        } else {
            Duration::ZERO
        };
        skew + Duration::from_millis(1)
    }

    /// How many nodes found the cluster.
    pub fn founders(&self) -> u16 {
        self.nodes() - u16::from(self.joins)
    }

    /// How many nodes there are.
    pub fn nodes(&self) -> u16 {
        u16::try_from(self.shards.len()).expect("a handful of nodes")
    }

    /// Copies that a key has.
    pub fn effective_n(&self) -> u8 {
        u8::try_from(self.nodes()).map_or(self.n, |nodes| self.n.min(nodes))
    }
}

fn draw_u16(rng: &mut Rng, range: std::ops::RangeInclusive<u64>) -> u16 {
    u16::try_from(rng.within(range)).expect("a small range")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_draws_the_same() {
        assert_eq!(Config::draw(5), Config::draw(5));
        assert_ne!(Config::draw(5), Config::draw(6));
    }

    #[test]
    fn every_size_and_every_fault_occurs_and_is_absent() {
        let drawn: Vec<Config> = (0..300).map(Config::draw).collect();
        for nodes in 3..=5 {
            assert!(drawn.iter().any(|config| config.nodes() == nodes));
        }
        for n in 1..=5 {
            assert!(drawn.iter().any(|config| config.effective_n() == n));
        }
        let faults: [fn(&Faults) -> bool; 5] = [
            |faults| faults.crash,
            |faults| faults.crash_in_sync,
            |faults| faults.partition,
            |faults| faults.pause,
            Faults::any,
        ];
        for fault in faults {
            let with = drawn.iter().filter(|config| fault(&config.faults)).count();
            assert!(with > 0 && with < drawn.len());
        }
    }

    #[test]
    fn in_some_worlds_values_expire_and_in_some_the_last_write_wins() {
        let drawn: Vec<Config> = (0..300).map(Config::draw).collect();
        let count = |matches: fn(&Config) -> bool| drawn.iter().filter(|one| matches(one)).count();
        let expires = |config: &Config| config.expiry.share > 0.0;
        let is_lww = |config: &Config| config.conflict == Conflict::Lww;
        assert!((60..120).contains(&count(expires)));
        assert!((25..70).contains(&count(is_lww)));
        assert!(count(|config| config.expiry.share > 0.0 && config.conflict == Conflict::Lww) > 5);
        assert!(count(|config| config.expiry.default_seconds > 0) > 10);
        assert!(count(|config| config.faults.clock && config.conflict == Conflict::Lww) > 10);
    }

    #[test]
    fn in_some_worlds_nodes_come_back_with_other_shards_and_in_some_a_disk_rots_that_is_not_needed()
    {
        let drawn: Vec<Config> = (0..300).map(Config::draw).collect();
        let count = |matches: fn(&Config) -> bool| drawn.iter().filter(|one| matches(one)).count();
        assert!((30..90).contains(&count(|config| config.reshard_every_ms.is_some())));
        assert!((25..70).contains(&count(|config| config.rot.is_some())));
        assert!(count(|config| config.rot.is_some() && config.reshard_every_ms.is_some()) > 2);
        for config in drawn.iter().filter(|config| config.rot.is_some()) {
            assert!(config.effective_n() > 1 && config.repair.automatic);
            assert!(!config.load.mixed_levels && !config.joins);
            assert!(config.rot.is_some_and(|rot| rot.host.0 < config.nodes()));
        }
    }

    #[test]
    fn nodes_are_encrypted_all_or_some_or_none_with_and_without_changes_of_keys() {
        let drawn: Vec<Encryption> = (0..300).map(|seed| Config::draw(seed).encryption).collect();
        for changes in [false, true] {
            let like = |matches: fn(&[bool]) -> bool| {
                let alike = drawn.iter().filter(|drawn| {
                    drawn.rekey_every_ms.is_some() == changes && matches(&drawn.from_start)
                });
                alike.count()
            };
            assert!(like(|nodes| nodes.iter().all(|on| *on)) > 20);
            assert!(like(|nodes| nodes.iter().all(|on| !*on)) > 10);
            assert!(like(|nodes| nodes.contains(&true) && nodes.contains(&false)) > 10);
        }
    }
}
