//! Whether each shard's interrupts, completions and packets really land on its core: counted over an
//! interval, against the layout.
//!
//! Three independent sources: `/proc/interrupts` for the queues' interrupts; the kernel's events for
//! the disk requests that a shard's CPU issued ([`Watch`]); and the server's own counts of where its
//! sockets' packets arrived. A proof names what it saw: *as planned* (at least 95 % on the planned
//! CPUs), *stray* (with where it went instead), or *quiet* (nothing arrived, so nothing is shown).

mod completions;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::host::{Host, Unavailable};
use crate::plan::{Layout, Place, interrupted};

pub use completions::{Completions, Watch};

/// Share that has to arrive on the planned CPUs.
pub const SHARE_WANTED: f64 = 0.95;

/// Arrivals by CPU.
pub type Arrivals = BTreeMap<u32, u64>;

/// What was seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// On the planned CPUs.
    AsPlanned {
        /// Arrivals.
        arrivals: u64,
    },
    /// Elsewhere.
    Stray {
        /// Share on the planned CPUs.
        share: f64,
        /// Arrivals by CPU.
        arrivals: Arrivals,
    },
    /// Nothing arrived.
    Quiet,
}

impl Seen {
    fn judge(planned: &CpuSet, mut arrivals: Arrivals) -> Self {
        arrivals.retain(|_, count| *count > 0);
        let total: u64 = arrivals.values().sum();
        let here = arrivals.iter().filter(|(cpu, _)| planned.contains(**cpu));
        let here: u64 = here.map(|(_, count)| count).sum();
        let share = here as f64 / total.max(1) as f64;
        if total == 0 {
            Seen::Quiet
        } else if share >= SHARE_WANTED {
            Seen::AsPlanned { arrivals: total }
        } else {
            Seen::Stray { share, arrivals }
        }
    }
}

/// One source of arrivals, for one shard or for those that share it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Shards that it serves; none when it keeps house.
    pub shards: Vec<usize>,
    /// Where it is planned to arrive.
    pub planned: CpuSet,
    /// Device and queue with the interrupt's name, `completions of nvme0n1`, `packets of the sockets`.
    pub what: String,
    /// CPUs on which the kernel lets an interrupt arrive.
    pub allowed: Option<CpuSet>,
    /// What was seen.
    pub seen: Seen,
}

/// All proofs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IrqProof {
    /// Interrupts by device and queue, then completions, then sockets.
    pub proofs: Vec<Proof>,
    /// What could not be shown.
    pub unavailable: Vec<Unavailable>,
}

impl IrqProof {
    /// Whether something arrived where it should not.
    pub fn has_strays(&self) -> bool {
        let mut seen = self.proofs.iter().map(|proof| &proof.seen);
        seen.any(|seen| matches!(seen, Seen::Stray { .. }))
    }
}

/// What was counted besides interrupts, or why not.
#[derive(Clone, Debug)]
pub struct Landed {
    /// See [`Watch`].
    pub completions: Result<Completions, String>,
    /// Packets of the sockets of each shard, by CPU, as the server counts them.
    pub sockets: Result<BTreeMap<usize, Arrivals>, String>,
}

/// Compares two readings of one host, and what landed between them, with its layout.
pub fn prove(before: &Host, after: &Host, layout: &Layout, landed: &Landed) -> IrqProof {
    let mut proofs = interrupts(before, after, layout);
    let mut unavailable = Vec::new();
    if proofs.is_empty() {
        unavailable.push(Unavailable {
            what: "interrupts of the shards".into(),
            reason: "no device of this host has a queue with an interrupt of its own".into(),
        });
    }
    match &landed.completions {
        Ok(completions) => proofs.extend(completed(after, layout, completions)),
        Err(reason) => unavailable.push(Unavailable {
            what: "the CPU on which each shard's disk requests complete".into(),
            reason: reason.clone(),
        }),
    }
    match &landed.sockets {
        Ok(sockets) => {
            let places = layout.shards.iter().enumerate();
            proofs.extend(places.map(|(shard, place)| {
                of_shard(shard, place, "packets of the sockets", sockets.get(&shard))
            }));
        }
        Err(reason) => unavailable.push(Unavailable {
            what: "the CPU on which the packets of each shard's sockets arrive".into(),
            reason: reason.clone(),
        }),
    }
    IrqProof {
        proofs,
        unavailable,
    }
}

fn interrupts(before: &Host, after: &Host, layout: &Layout) -> Vec<Proof> {
    let mut proofs = Vec::new();
    for block in &after.blocks {
        for queue in &block.queues {
            let shards = layout.shards_on(&queue.cpus);
            if shards.is_empty() {
                continue;
            }
            // A managed interrupt arrives on whichever of its queue's CPUs the kernel chose. Whether the
            // asking shard gets its answer on its own CPU, the completions tell.
            let interrupt_of = queue.interrupt.and_then(|number| after.interrupt(number));
            let planned = match interrupt_of {
                Some(irq) if irq.is_kept_by_kernel() => queue.cpus.clone(),
                _ => queue.cpus.and(&layout.shard_cpus()),
            };
            let what = format!("{} q{}", block.name, queue.index);
            proofs.extend(interrupt(
                before,
                after,
                queue.interrupt,
                (shards, planned, what),
            ));
        }
    }
    for nic in &after.nics {
        for queue in &nic.receive {
            let shards = layout.owners(&nic.name, queue.index);
            let planned = interrupted(after, layout, nic, queue).unwrap_or_else(|| after.usable());
            let what = format!("{} rx{}", nic.name, queue.index);
            proofs.extend(interrupt(
                before,
                after,
                queue.interrupt,
                (shards, planned, what),
            ));
        }
    }
    proofs
}

fn interrupt(
    before: &Host,
    after: &Host,
    number: Option<u32>,
    (shards, planned, queue): (Vec<usize>, CpuSet, String),
) -> Option<Proof> {
    let irq = after.interrupt(number?)?;
    let was = before.interrupts.iter().find(|was| was.name == irq.name)?;
    let grown = |(cpu, count): (&u32, &u64)| {
        let was = was.counts.get(cpu).copied().unwrap_or(0);
        (*cpu, count.saturating_sub(was))
    };
    Some(Proof {
        shards,
        what: format!("{queue} ({})", irq.name),
        allowed: Some(irq.lands_on().clone()),
        seen: Seen::judge(&planned, irq.counts.iter().map(grown).collect()),
        planned,
    })
}

fn completed(after: &Host, layout: &Layout, completions: &Completions) -> Vec<Proof> {
    let mut proofs = Vec::new();
    for block in after.blocks.iter().filter(|block| !block.queues.is_empty()) {
        let what = format!("completions of {}", block.name);
        for (shard, place) in layout.shards.iter().enumerate() {
            let arrivals = completions.get(&(block.name.clone(), place.cpu));
            proofs.push(of_shard(shard, place, &what, arrivals));
        }
    }
    proofs
}

/// What no interrupt brings, held to the shard's own CPU.
fn of_shard(shard: usize, place: &Place, what: &str, arrivals: Option<&Arrivals>) -> Proof {
    let planned = CpuSet::of(place.cpu);
    Proof {
        shards: vec![shard],
        seen: Seen::judge(&planned, arrivals.cloned().unwrap_or_default()),
        planned,
        what: what.to_owned(),
        allowed: None,
    }
}
