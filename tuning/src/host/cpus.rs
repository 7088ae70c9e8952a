//! Processors: sockets, cores, hardware threads, caches, memory nodes.

use serde::{Deserialize, Serialize};

use super::Unavailable;
use crate::cpuset::CpuSet;
use crate::kernel::Kernel;

const CPU: &str = "/sys/devices/system/cpu";

/// Sort of a core in a hybrid processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CoreKind {
    /// The only sort, or the fast one.
    Performance,
    /// The slow one.
    Efficiency,
}

/// One hardware thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Number.
    pub id: u32,
    /// Socket, where the kernel says.
    pub package: Option<i64>,
    /// Memory node.
    pub node: Option<u32>,
    /// Hardware threads of the same core, itself included.
    pub siblings: CpuSet,
    /// CPUs that share its last-level cache, itself included.
    pub cache_mates: CpuSet,
    /// Sort of core.
    pub kind: CoreKind,
}

/// One cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// 1 to 4.
    pub level: u32,
    /// `Data`, `Instruction` or `Unified`.
    pub kind: String,
    /// Bytes.
    pub bytes: u64,
    /// CPUs that share it.
    pub cpus: CpuSet,
}

/// A memory node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaNode {
    /// Number.
    pub id: u32,
    /// CPUs near this memory.
    pub cpus: CpuSet,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Distance to each node, in order of their numbers; 10 is near.
    pub distances: Vec<u32>,
}

/// All processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus {
    /// Hardware threads that are online, by number.
    pub list: Vec<Cpu>,
    /// Distinct caches of level 2 and above.
    pub caches: Vec<Cache>,
    /// Memory nodes; empty when the kernel knows none.
    pub nodes: Vec<NumaNode>,
    /// CPUs that the machine has.
    pub present: CpuSet,
    /// CPUs in use.
    pub online: CpuSet,
    /// CPUs that this process may use.
    pub allowed: CpuSet,
    /// CPUs kept out of the scheduler's balancing (`isolcpus`).
    pub isolated: CpuSet,
    /// CPUs without a periodic tick (`nohz_full`).
    pub tickless: CpuSet,
    /// `on`, `off`, `notsupported`, …
    pub smt: Option<String>,
}

impl Cpus {
    /// The hardware thread `id`, when it is online.
    pub fn get(&self, id: u32) -> Option<&Cpu> {
        self.list.iter().find(|cpu| cpu.id == id)
    }

    /// Number of sockets.
    pub fn packages(&self) -> usize {
        let mut packages: Vec<_> = self.list.iter().map(|cpu| cpu.package).collect();
        packages.sort_unstable();
        packages.dedup();
        packages.len()
    }

    /// Physical cores as sets of hardware threads, by their lowest thread.
    pub fn cores(&self) -> Vec<CpuSet> {
        let mut cores: Vec<_> = self.list.iter().map(|cpu| cpu.siblings.clone()).collect();
        cores.sort();
        cores.dedup();
        cores
    }
}

pub(super) fn read(kernel: &impl Kernel, unavailable: &mut Vec<Unavailable>) -> Option<Cpus> {
    let list = |path: &str| CpuSet::parse_list(&kernel.text(path)?).ok();
    let online = list(&format!("{CPU}/online"))?;
    let present = list(&format!("{CPU}/present")).unwrap_or_else(|| online.clone());
    let isolated = list(&format!("{CPU}/isolated")).unwrap_or_default();
    // Nobody runs on isolated CPUs who does not ask for them, and shards ask.
    let reachable = list("/torc/process/reachable").unwrap_or_default();
    let allowed = list("/torc/process/allowed").unwrap_or_else(|| online.clone());
    let allowed = allowed.or(&isolated.and(&reachable));
    let nodes = read_nodes(kernel);
    if nodes.is_empty() {
        unavailable.push(Unavailable {
            what: "memory nodes".into(),
            reason: "the kernel lists none; all memory counts as one node".into(),
        });
    }
    let slow = efficiency_cpus(kernel, &online);
    let mut caches = Vec::new();
    let mut cpus = Vec::new();
    for id in online.iter() {
        let topology = format!("{CPU}/cpu{id}/topology");
        let siblings = list(&format!("{topology}/core_cpus_list"))
            .or_else(|| list(&format!("{topology}/thread_siblings_list")))
            .map_or_else(|| CpuSet::of(id), |cpus| cpus.and(&online));
        let mut last_level: Option<(u32, CpuSet)> = None;
        for index in kernel
            .list(&format!("{CPU}/cpu{id}/cache"))
            .unwrap_or_default()
        {
            if let Some(cache) = read_cache(kernel, &format!("{CPU}/cpu{id}/cache/{index}")) {
                if last_level
                    .as_ref()
                    .is_none_or(|(level, _)| *level < cache.level)
                {
                    last_level = Some((cache.level, cache.cpus.and(&online)));
                }
                if cache.level >= 2 && !caches.contains(&cache) {
                    caches.push(cache);
                }
            }
        }
        cpus.push(Cpu {
            id,
            // -1 is how the kernel spells "unknown".
            package: kernel
                .number(&format!("{topology}/physical_package_id"))
                .filter(|package| *package >= 0),
            node: nodes
                .iter()
                .find(|node| node.cpus.contains(id))
                .map(|node| node.id),
            cache_mates: last_level.map_or_else(|| siblings.clone(), |(_, cpus)| cpus),
            siblings,
            kind: if slow.contains(id) {
                CoreKind::Efficiency
            } else {
                CoreKind::Performance
            },
        });
    }
    Some(Cpus {
        list: cpus,
        caches,
        nodes,
        present,
        allowed,
        isolated,
        tickless: list(&format!("{CPU}/nohz_full")).unwrap_or_default(),
        smt: kernel.text(&format!("{CPU}/smt/control")),
        online,
    })
}

fn read_nodes(kernel: &impl Kernel) -> Vec<NumaNode> {
    const NODE: &str = "/sys/devices/system/node";
    let mut nodes = Vec::new();
    for name in kernel.list(NODE).unwrap_or_default() {
        let Some(id) = name.strip_prefix("node").and_then(|id| id.parse().ok()) else {
            continue;
        };
        let text = |file: &str| kernel.text(&format!("{NODE}/{name}/{file}"));
        let Some(cpus) = text("cpulist").and_then(|cpus| CpuSet::parse_list(&cpus).ok()) else {
            continue;
        };
        let kibibytes = text("meminfo").and_then(|info| {
            let line = info.lines().find(|line| line.contains("MemTotal:"))?;
            line.split_whitespace().rev().nth(1)?.parse::<u64>().ok()
        });
        nodes.push(NumaNode {
            id,
            cpus,
            memory_bytes: kibibytes.unwrap_or(0).saturating_mul(1024),
            distances: text("distance")
                .map(|line| line.split_whitespace().flat_map(str::parse).collect())
                .unwrap_or_default(),
        });
    }
    nodes
}

fn read_cache(kernel: &impl Kernel, path: &str) -> Option<Cache> {
    let size = kernel.text(&format!("{path}/size"))?;
    let (digits, unit) = size.split_at(
        size.len()
            - size
                .bytes()
                .rev()
                .take_while(u8::is_ascii_alphabetic)
                .count(),
    );
    let scale = match unit {
        "K" => 1024,
        "M" => 1024 * 1024,
        _ => 1,
    };
    Some(Cache {
        level: kernel.number(&format!("{path}/level"))?,
        kind: kernel.text(&format!("{path}/type"))?,
        bytes: digits.parse::<u64>().ok()?.saturating_mul(scale),
        cpus: CpuSet::parse_list(&kernel.text(&format!("{path}/shared_cpu_list"))?).ok()?,
    })
}

/// Intel names the sorts of cores; Arm gives each core a capacity of 1024 at most.
fn efficiency_cpus(kernel: &impl Kernel, online: &CpuSet) -> CpuSet {
    if let Some(atoms) = kernel.text("/sys/devices/cpu_atom/cpus") {
        return CpuSet::parse_list(&atoms).unwrap_or_default();
    }
    let capacity = |id| kernel.number::<u64>(&format!("{CPU}/cpu{id}/cpu_capacity"));
    let highest = online.iter().filter_map(capacity).max().unwrap_or(0);
    // A core of another stepping differs by a few percent; a slow sort by a third and more.
    let slow = |id: &u32| capacity(*id).is_some_and(|capacity| capacity * 4 < highest * 3);
    online.iter().filter(slow).collect()
}
