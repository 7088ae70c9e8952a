//! What a layout wants of a network card: each shard's packets on the shard's own core, everyone
//! else's away from it.

use super::changes::{Wish, Wishes, move_interrupt};
use super::{Layout, Place, Profile};
use crate::change::{Risk, Syntax, Target};
use crate::cpuset::CpuSet;
use crate::host::{Host, Nic, Queue};
use crate::kernel::CALLS;

pub(super) fn wishes(
    wishes: &mut Wishes,
    host: &Host,
    nic: &Nic,
    profile: Profile,
    layout: &Layout,
) {
    receive(wishes, host, nic, layout);
    transmit(wishes, host, nic, layout);
    if profile == Profile::Latency
        && let Some(coalescing) = &nic.coalescing
    {
        let call = |name: &str, now: u64, want: u64, reason| Wish {
            knob: format!("{} {name}", nic.name),
            target: Target::File(format!("{CALLS}/ethtool/{}/{name}", nic.name)),
            syntax: Syntax::Number,
            now: Some(now.to_string()),
            want: want.to_string(),
            reason,
            risk: Risk::Power,
        };
        wishes.add(call(
            "adaptive-rx",
            u64::from(coalescing.adaptive),
            0,
            "adapting makes latency depend on the past",
        ));
        // Drivers round to their own steps: up to 8 µs is as good.
        if coalescing.receive_us > 8 {
            let change = wishes.add(call(
                "rx-usecs",
                coalescing.receive_us,
                4,
                "a packet waits this long before anybody is woken",
            ));
            if let Some(change) = change {
                change.at_most = Some(8);
            }
        }
    }
}

fn receive(wishes: &mut Wishes, host: &Host, nic: &Nic, layout: &Layout) {
    let has_own = nic.receive.len() >= layout.shards.len();
    let (want, reason) = if has_own {
        (
            CpuSet::new(),
            "every shard has a queue: steering again in software costs an interrupt between CPUs",
        )
    } else {
        (
            layout.shard_cpus(),
            "fewer queues than shards: software spreads packets over the shards",
        )
    };
    for (at, queue) in nic.receive.iter().enumerate() {
        let owner = layout.shards.get(at).filter(|_| has_own);
        let why_own = "packets of a shard wake it on its own core";
        queue_interrupt(wishes, host, (nic, queue), layout, owner, why_own);
        wishes.add(Wish {
            knob: format!("{} rx-{} steering", nic.name, queue.index),
            target: queue_file(nic, &format!("rx-{}/rps_cpus", queue.index)),
            syntax: Syntax::Mask,
            now: Some(queue.cpus.to_mask()),
            want: want.to_mask(),
            reason,
            risk: Risk::Low,
        });
    }
}

fn transmit(wishes: &mut Wishes, host: &Host, nic: &Nic, layout: &Layout) {
    // Who sends through which queue can be said only where there are several.
    let has_own = nic.transmit.len() >= layout.shards.len() && nic.transmit.len() > 1;
    let others = host.usable().minus(&layout.shard_cpus());
    for (at, queue) in nic.transmit.iter().enumerate() {
        let owner = layout.shards.get(at).filter(|_| has_own);
        let why_own = "a shard's sent packets complete on its own core";
        queue_interrupt(wishes, host, (nic, queue), layout, owner, why_own);
        let (want, reason) = match owner {
            Some(place) => (
                CpuSet::of(place.cpu),
                "a queue of its own needs no lock with other senders",
            ),
            None if has_own && !others.is_empty() => (
                others.clone(),
                "CPUs without a shard send here, and not through the shards' queues",
            ),
            None => continue,
        };
        wishes.add(Wish {
            knob: format!("{} tx-{} senders", nic.name, queue.index),
            target: queue_file(nic, &format!("tx-{}/xps_cpus", queue.index)),
            syntax: Syntax::Mask,
            now: Some(queue.cpus.to_mask()),
            want: want.to_mask(),
            reason,
            risk: Risk::Low,
        });
    }
}

/// To the shard that owns the queue; else, where CPUs are set aside for it, to those near the card.
fn queue_interrupt(
    wishes: &mut Wishes,
    host: &Host,
    (nic, queue): (&Nic, &Queue),
    layout: &Layout,
    owner: Option<&Place>,
    why_own: &'static str,
) {
    if let Some(place) = owner {
        let own = CpuSet::of(place.cpu);
        move_interrupt(wishes, host, queue.interrupt, &own, why_own);
    } else if layout.isolates {
        let housekeeping = near(host, &layout.housekeeping, nic.node);
        let why = "this queue is no shard's own: its interrupts keep house";
        move_interrupt(wishes, host, queue.interrupt, &housekeeping, why);
    }
}

fn queue_file(nic: &Nic, file: &str) -> Target {
    Target::File(format!("/sys/class/net/{}/queues/{file}", nic.name))
}

/// Those of `cpus` that are on the device's node; all of them where none is or the node is unknown.
pub(crate) fn near(host: &Host, cpus: &CpuSet, node: Option<u32>) -> CpuSet {
    let mut nodes = host.cpus.nodes.iter();
    let node = nodes.find(|known| Some(known.id) == node);
    let near = node.map_or_else(CpuSet::new, |node| cpus.and(&node.cpus));
    if near.is_empty() { cpus.clone() } else { near }
}

/// Packets go to any queue of the table that spreads them, so they miss the shards when it is wider.
pub(super) fn unowned_queues(nic: &Nic, layout: &Layout) -> Option<String> {
    let shards = layout.shards.len();
    let spread = nic.rss_queues.filter(|queues| *queues > shards)?;
    Some(format!(
        "{0}: packets are spread over {spread} queues and {shards} of them are the shards'; \
         `ethtool -X {0} equal {shards}` keeps them there (not done here: it moves connections from queue to queue)",
        nic.name
    ))
}
