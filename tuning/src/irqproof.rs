//! Whether each shard's interrupts and completions really land on its core: counters over an
//! interval, against the layout.
//!
//! A proof names what it saw: *as planned* (at least 95 % on the shard's CPU), *stray* (with where it
//! went instead), or *quiet* (nothing arrived, so nothing is shown). Sockets are the server's own to
//! ask (`SO_INCOMING_CPU`); without it that part is not available, and said so.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::host::{Host, Unavailable};
use crate::plan::Layout;

/// Share that has to arrive on the planned CPU.
pub const SHARE_WANTED: f64 = 0.95;

/// What was seen of one interrupt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// On the shard's CPU.
    AsPlanned {
        /// Arrivals.
        arrivals: u64,
    },
    /// Elsewhere.
    Stray {
        /// Share on the shard's CPU.
        share: f64,
        /// Arrivals by CPU.
        arrivals: BTreeMap<u32, u64>,
    },
    /// Nothing arrived.
    Quiet,
}

/// One interrupt of one shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Shard.
    pub shard: usize,
    /// Its CPU.
    pub cpu: u32,
    /// Device and queue, e.g. `nvme0n1 q3`.
    pub queue: String,
    /// Interrupt's name.
    pub interrupt: String,
    /// Other shards that the same queue serves: its arrivals may be theirs.
    pub shared_with: Vec<usize>,
    /// CPUs on which the kernel lets it arrive.
    pub effective: String,
    /// What was seen.
    pub seen: Seen,
}

/// All proofs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IrqProof {
    /// By shard and queue.
    pub proofs: Vec<Proof>,
    /// What could not be shown.
    pub unavailable: Vec<Unavailable>,
}

impl IrqProof {
    /// Whether something arrived where it should not.
    pub fn has_strays(&self) -> bool {
        self.proofs
            .iter()
            .any(|proof| matches!(proof.seen, Seen::Stray { .. }))
    }
}

/// Compares two readings of one host with its layout.
pub fn prove(before: &Host, after: &Host, layout: &Layout) -> IrqProof {
    let mut proofs = Vec::new();
    for (shard, place) in layout.shards.iter().enumerate() {
        for block in &after.blocks {
            let Some(queue) = block.queue_of(place.cpu) else {
                continue;
            };
            let sharers = layout.shards.iter().enumerate();
            let sharers = sharers
                .filter(|(_, other)| queue.cpus.contains(other.cpu) && other.cpu != place.cpu);
            let shared_with: Vec<usize> = sharers.map(|(other, _)| other).collect();
            let name = format!("{} q{}", block.name, queue.index);
            proofs.extend(one(
                before,
                after,
                (shard, place.cpu),
                queue.interrupt,
                name,
                shared_with,
            ));
        }
        for nic in &after.nics {
            let own = place.network.get(&nic.name);
            let queue = nic.receive.iter().find(|queue| Some(&queue.index) == own);
            if let Some(queue) = queue {
                let name = format!("{} rx{}", nic.name, queue.index);
                proofs.extend(one(
                    before,
                    after,
                    (shard, place.cpu),
                    queue.interrupt,
                    name,
                    Vec::new(),
                ));
            }
        }
    }
    let mut unavailable = vec![Unavailable {
        what: "the CPU on which each accepted socket's packets arrive".into(),
        reason: "only the process that holds the sockets can ask the kernel (SO_INCOMING_CPU)"
            .into(),
    }];
    if proofs.is_empty() {
        unavailable.push(Unavailable {
            what: "interrupts of the shards".into(),
            reason: "no device of this host has a queue with an interrupt of its own".into(),
        });
    }
    IrqProof {
        proofs,
        unavailable,
    }
}

fn one(
    before: &Host,
    after: &Host,
    (shard, cpu): (usize, u32),
    number: Option<u32>,
    queue: String,
    shared_with: Vec<usize>,
) -> Option<Proof> {
    let irq = after.interrupt(number?)?;
    let was = before
        .interrupts
        .iter()
        .find(|other| other.name == irq.name)?;
    let arrivals: BTreeMap<u32, u64> = irq
        .counts
        .iter()
        .map(|(cpu, count)| {
            (
                *cpu,
                count.saturating_sub(was.counts.get(cpu).copied().unwrap_or(0)),
            )
        })
        .filter(|(_, count)| *count > 0)
        .collect();
    let total: u64 = arrivals.values().sum();
    let share = arrivals.get(&cpu).copied().unwrap_or(0) as f64 / total.max(1) as f64;
    Some(Proof {
        shard,
        cpu,
        queue,
        interrupt: irq.name.clone(),
        shared_with,
        effective: irq.effective.as_ref().unwrap_or(&irq.affinity).to_string(),
        seen: if total == 0 {
            Seen::Quiet
        } else if share >= SHARE_WANTED {
            Seen::AsPlanned { arrivals: total }
        } else {
            Seen::Stray { share, arrivals }
        },
    })
}
