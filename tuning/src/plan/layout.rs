//! Which CPU does what.
//!
//! Rules, in order. (1) Up to four CPUs: one shard each, nothing is set aside. (2) Where the boot line
//! isolates CPUs, those carry the shards and the others keep house. (3) Else one core in sixteen, at
//! least one, keeps house: interrupts without a queue of their own, daemons, the kernel's work. Slow
//! cores of a hybrid processor do; else the core of the boot CPU, which the kernel keeps for time, then
//! cores of the network card's node. (4) The others carry shards, spread so that as many as possible have
//! a storage queue of their own; a queue's CPUs are the kernel's choice and are taken as they are. A
//! shared host gives half of them, those near the card first, then those near a disk. (5) Network queue
//! `i` is shard `i`'s when there are enough queues for all shards, core `i`'s when there are enough for
//! their cores; with fewer, and on a shared host, queues have no shard.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Profile;
use crate::cpuset::CpuSet;
use crate::host::{CoreKind, Host, Nic};
use crate::render::counted;

/// Largest host on which nothing is set aside.
const UNDIVIDED_MAX: usize = 4;
/// Cores for which one keeps house.
const CORES_A_HOUSEKEEPER: usize = 16;

/// What a CPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs this shard.
    Shard(usize),
    /// Interrupts, daemons, kernel threads.
    Housekeeping,
    /// Left idle or to others.
    Spare,
}

/// One shard's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Its CPU.
    pub cpu: u32,
    /// Its memory node.
    pub node: Option<u32>,
    /// Its queue of each block device, by name.
    pub storage: BTreeMap<String, u32>,
    /// Its receive queue of each network card, by name.
    pub network: BTreeMap<String, u32>,
}

/// Who runs where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Shards in order; index is the shard's number.
    pub shards: Vec<Place>,
    /// CPUs that keep house; on an undivided host these also carry shards.
    pub housekeeping: CpuSet,
    /// CPUs left idle or to others.
    pub spare: CpuSet,
    /// Whether shards have their CPUs to themselves.
    pub isolates: bool,
}

impl Layout {
    /// CPUs that carry shards.
    pub fn shard_cpus(&self) -> CpuSet {
        self.shards.iter().map(|place| place.cpu).collect()
    }

    /// Shards whose CPU is one of `cpus`.
    pub fn shards_on(&self, cpus: &CpuSet) -> Vec<usize> {
        let places = self.shards.iter().enumerate();
        let inside = places.filter(|(_, place)| cpus.contains(place.cpu));
        inside.map(|(shard, _)| shard).collect()
    }

    /// The shards that have this queue of a network card; its interrupts go to the first of them.
    pub fn owners(&self, nic: &str, queue: u32) -> Vec<usize> {
        let places = self.shards.iter().enumerate();
        let owners = places.filter(|(_, place)| place.network.get(nic) == Some(&queue));
        owners.map(|(shard, _)| shard).collect()
    }

    /// What `cpu` does.
    pub fn role(&self, cpu: u32) -> Option<Role> {
        if let Some(shard) = self.shards.iter().position(|place| place.cpu == cpu) {
            return Some(Role::Shard(shard));
        }
        if self.housekeeping.contains(cpu) {
            return Some(Role::Housekeeping);
        }
        self.spare.contains(cpu).then_some(Role::Spare)
    }
}

pub(super) fn lay_out(host: &Host, profile: Profile) -> Layout {
    let usable = host.usable();
    let cores: Vec<CpuSet> = host
        .cpus
        .cores()
        .into_iter()
        .map(|core| core.and(&usable))
        .filter(|core| !core.is_empty())
        .collect();
    let divided = usable.len() > UNDIVIDED_MAX;
    let kept = if divided {
        housekeepers(host, &usable, &cores)
    } else {
        CpuSet::new()
    };
    let mut candidates: Vec<u32> = Vec::new();
    for core in &cores {
        let core = core.minus(&kept);
        match profile {
            Profile::Throughput => candidates.extend(core.iter()),
            Profile::Latency | Profile::Shared => candidates.extend(core.first()),
        }
    }
    let mut wanted = candidates.len();
    if profile == Profile::Shared {
        wanted = wanted.div_ceil(2);
        let near = near(host);
        let is_far = |node: Option<u32>| near.is_some() && node != near;
        let has_disk = |node: Option<u32>| host.blocks.iter().any(|block| block.node == node);
        // Stable: the card's node first, then the disks', so that the others' half is whole nodes where
        // it can be.
        candidates.sort_by_key(|cpu| {
            let node = node_of(host, *cpu);
            (is_far(node), !has_disk(node))
        });
    }
    let chosen = spread_over_queues(host, candidates, wanted);
    let shard_cpus: CpuSet = chosen.iter().copied().collect();
    let housekeeping = if kept.is_empty() {
        usable.iter().take(1).collect()
    } else {
        kept
    };
    Layout {
        spare: usable.minus(&shard_cpus).minus(&housekeeping),
        shards: place(host, profile, chosen),
        housekeeping,
        isolates: divided && profile != Profile::Shared,
    }
}

fn node_of(host: &Host, cpu: u32) -> Option<u32> {
    host.cpus.get(cpu).and_then(|cpu| cpu.node)
}

/// The node to be near: the first network card's that has one.
fn near(host: &Host) -> Option<u32> {
    host.nics.iter().find_map(|nic| nic.node)
}

/// CPUs that carry no shard.
fn housekeepers(host: &Host, usable: &CpuSet, cores: &[CpuSet]) -> CpuSet {
    let isolated = usable.and(&host.cpus.isolated);
    if !isolated.is_empty() && isolated != *usable {
        return usable.minus(&isolated);
    }
    let is_slow = |cpu: &u32| {
        let cpu = host.cpus.get(*cpu);
        cpu.is_some_and(|cpu| cpu.kind == CoreKind::Efficiency)
    };
    let slow: CpuSet = usable.iter().filter(is_slow).collect();
    if !slow.is_empty() && slow != *usable {
        return slow;
    }
    let near = near(host);
    let mut order: Vec<&CpuSet> = cores.iter().collect();
    let cpu = |core: &CpuSet| core.first().unwrap_or(0);
    order.sort_by_key(|core| {
        let is_boot = cpu(core) == host.cpus.online.first().unwrap_or(0);
        let is_far = near.is_some() && node_of(host, cpu(core)) != near;
        (!is_boot, is_far)
    });
    let wanted = cores.len().div_ceil(CORES_A_HOUSEKEEPER);
    let chosen = order.into_iter().take(wanted.min(cores.len() - 1));
    chosen.fold(CpuSet::new(), |all, core| all.or(core))
}

/// Takes `wanted` CPUs, those first whose storage queue nobody has taken yet.
fn spread_over_queues(host: &Host, candidates: Vec<u32>, wanted: usize) -> Vec<u32> {
    if wanted >= candidates.len() {
        return candidates;
    }
    let queue = |cpu: u32| -> Vec<Option<u32>> {
        let queues = host.blocks.iter().map(|block| block.queue_of(cpu));
        queues.map(|queue| queue.map(|queue| queue.index)).collect()
    };
    let mut taken: BTreeMap<Vec<Option<u32>>, usize> = BTreeMap::new();
    let mut rest = candidates;
    let mut chosen = Vec::new();
    while chosen.len() < wanted && !rest.is_empty() {
        let load = |cpu: &u32| taken.get(&queue(*cpu)).copied().unwrap_or(0);
        let at = rest
            .iter()
            .enumerate()
            .min_by_key(|(at, cpu)| (load(cpu), *at))
            .map_or(0, |(at, _)| at);
        let cpu = rest.remove(at);
        *taken.entry(queue(cpu)).or_default() += 1;
        chosen.push(cpu);
    }
    chosen.sort_unstable();
    chosen
}

fn place(host: &Host, profile: Profile, chosen: Vec<u32>) -> Vec<Place> {
    let shards = chosen.len();
    let carries = |core: &CpuSet| chosen.iter().any(|cpu| core.contains(*cpu));
    let mut cores = host.cpus.cores();
    cores.retain(carries);
    let core_of = |cpu: u32| cores.iter().position(|core| core.contains(cpu));
    // A queue for each shard, or one for each core.
    let queue_of = |nic: &Nic, shard: usize, cpu: u32| {
        let at = match nic.receive.len() {
            _ if profile == Profile::Shared => None,
            queues if queues >= shards => Some(shard),
            queues if queues >= cores.len() => core_of(cpu),
            _ => None,
        };
        Some(nic.receive.get(at?)?.index)
    };
    let places = chosen.iter().copied().enumerate();
    places
        .map(|(shard, cpu)| Place {
            cpu,
            node: host.cpus.get(cpu).and_then(|cpu| cpu.node),
            storage: host
                .blocks
                .iter()
                .filter_map(|block| Some((block.name.clone(), block.queue_of(cpu)?.index)))
                .collect(),
            network: host
                .nics
                .iter()
                .filter_map(|nic| Some((nic.name.clone(), queue_of(nic, shard, cpu)?)))
                .collect(),
        })
        .collect()
}

pub(super) fn notes(host: &Host, layout: &Layout) -> Vec<String> {
    let mut notes = Vec::new();
    if !layout.isolates {
        notes.push(format!(
            "no CPU is set aside: {}",
            if host.usable().len() <= UNDIVIDED_MAX {
                "there are only a few, and an idle one would cost more than it saves"
            } else {
                "this host is shared"
            }
        ));
    }
    let boot = host.cpus.online.first();
    let on_boot = layout
        .shards
        .iter()
        .position(|place| Some(place.cpu) == boot);
    if let (true, Some(shard)) = (layout.isolates, on_boot) {
        notes.push(format!(
            "s{shard} is on the boot CPU, which keeps the time: its tick stays, and an idle fast core would cost more"
        ));
    }
    for block in &host.blocks {
        let mut users: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (shard, place) in layout.shards.iter().enumerate() {
            if let Some(queue) = place.storage.get(&block.name) {
                users.entry(*queue).or_default().push(shard);
            }
        }
        let crowded = users.values().filter(|shards| shards.len() > 1).count();
        if crowded > 0 {
            let most = users.values().map(Vec::len).max().unwrap_or(0);
            notes.push(format!(
                "{}: {} for {}; {} shared, by up to {most} shards",
                block.name,
                counted(block.queues.len(), "queue"),
                counted(layout.shards.len(), "shard"),
                counted(crowded, "queue") + if crowded == 1 { " is" } else { " are" },
            ));
        }
        let kept = block
            .queues
            .iter()
            .filter_map(|queue| host.interrupt(queue.interrupt?));
        let kept = kept.filter(|irq| irq.is_kept_by_kernel()).count();
        if kept > 0 {
            notes.push(format!(
                "{}: {} cannot be moved; the shards were placed on the CPUs of the queues instead",
                block.name,
                counted(kept, "managed interrupt"),
            ));
        }
    }
    notes
}
