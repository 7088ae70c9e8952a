//! What a layout wants of a network card: each shard's packets on the shard's own core, everyone
//! else's away from it.

use super::changes::{Wish, Wishes, move_interrupt};
use super::{Layout, Profile};
use crate::change::{Risk, Syntax, Target};
use crate::cpuset::CpuSet;
use crate::host::{Host, Nic, Queue};
use crate::kernel::CALLS;

/// Connections of a card whose readers the kernel follows: what its documentation advises for a busy
/// server.
const FLOWS: u64 = 32_768;

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
    let (want, reason) = if owned_queues(nic, layout) > 0 {
        (
            CpuSet::new(),
            "the card spreads packets over the shards: doing it once more costs an interrupt between CPUs",
        )
    } else {
        (
            layout.shard_cpus(),
            "fewer queues than shards: software spreads packets over the shards",
        )
    };
    for queue in &nic.receive {
        let why_own = "packets are handled by the shards, each core its part";
        queue_interrupt(wishes, host, (nic, queue), layout, why_own);
        wishes.add(Wish {
            knob: format!("{} rx-{} steering", nic.name, queue.index),
            target: queue_file(nic, &format!("rx-{}/rps_cpus", queue.index)),
            syntax: Syntax::Mask,
            now: Some(queue.cpus.to_mask()),
            want: want.to_mask(),
            reason,
            risk: Risk::Low,
        });
        if layout.shards.len() == 1 {
            continue;
        }
        follow(
            wishes,
            format!("{} rx-{} flows", nic.name, queue.index),
            queue_file(nic, &format!("rx-{}/rps_flow_cnt", queue.index)),
            queue.flows,
            (FLOWS / nic.receive.len() as u64).next_power_of_two(),
        );
    }
}

/// Lets packets follow the thread that reads their connection (RFS): neither the card's hash nor the
/// software's knows which shard that is.
fn follow(wishes: &mut Wishes, knob: String, target: Target, now: Option<u64>, want: u64) {
    wishes.add(Wish {
        knob,
        target,
        syntax: Syntax::Number,
        // More than that is as good.
        now: now.filter(|now| *now < want).map(|now| now.to_string()),
        want: want.to_string(),
        reason: "packets go on to the shard that reads their connection: no hash knows which that is",
        risk: Risk::Low,
    });
}

/// The kernel's table of who reads which connection: all cards need it. Returns what to do where it is
/// out of reach.
pub(super) fn followed(wishes: &mut Wishes, now: Option<u64>) -> Option<String> {
    let file = "net/core/rps_sock_flow_entries";
    let name = file.replace('/', ".");
    let target = Target::File(format!("/proc/sys/{file}"));
    follow(wishes, name.clone(), target, now, FLOWS);
    now.is_none().then(|| {
        format!(
            "{name} is not seen from this network namespace: without {FLOWS} there, set on the host, \
             packets follow nobody"
        )
    })
}

fn transmit(wishes: &mut Wishes, host: &Host, nic: &Nic, layout: &Layout) {
    // Who sends through which queue can be said only where there are several.
    let owned = owned_queues(nic, layout);
    let has_own = owned > 0 && nic.transmit.len() >= owned && nic.transmit.len() > 1;
    let others = host.usable().minus(&layout.shard_cpus());
    for queue in &nic.transmit {
        let why_own = "a shard's sent packets complete on its own core";
        queue_interrupt(wishes, host, (nic, queue), layout, why_own);
        let owners = cpus(layout, &layout.owners(&nic.name, queue.index));
        let (want, reason) = if has_own && !owners.is_empty() {
            let reason = "a queue of its own needs no lock with other senders";
            (owners, reason)
        } else if has_own && !others.is_empty() {
            let reason = "CPUs without a shard send here, and not through the shards' queues";
            (others.clone(), reason)
        } else {
            continue;
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

fn cpus(layout: &Layout, shards: &[usize]) -> CpuSet {
    shards
        .iter()
        .map(|shard| layout.shards[*shard].cpu)
        .collect()
}

fn owned_queues(nic: &Nic, layout: &Layout) -> usize {
    let queues = nic.receive.iter();
    queues
        .filter(|queue| !layout.owners(&nic.name, queue.index).is_empty())
        .count()
}

/// To the shard that owns the queue; else, where CPUs are set aside for it, to those near the card.
fn queue_interrupt(
    wishes: &mut Wishes,
    host: &Host,
    (nic, queue): (&Nic, &Queue),
    layout: &Layout,
    why_own: &'static str,
) {
    let Some(place) = interrupted(host, layout, nic, queue) else {
        return;
    };
    let why = if layout.owners(&nic.name, queue.index).is_empty() {
        "this queue is no shard's own: its interrupts keep house"
    } else {
        why_own
    };
    move_interrupt(wishes, host, queue.interrupt, &place, why);
}

/// Where a queue of a card is to interrupt; `None` for anywhere.
pub(crate) fn interrupted(
    host: &Host,
    layout: &Layout,
    nic: &Nic,
    queue: &Queue,
) -> Option<CpuSet> {
    match layout.owners(&nic.name, queue.index).first() {
        Some(shard) => Some(CpuSet::of(layout.shards[*shard].cpu)),
        None => layout
            .isolates
            .then(|| near(host, &layout.housekeeping, nic.node)),
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

/// Packets go to any queue that the card spreads them over, so they miss the shards where it has more.
pub(super) fn unowned_queues(nic: &Nic, layout: &Layout) -> Option<String> {
    let owned = owned_queues(nic, layout);
    let spread = nic.rss_queues.unwrap_or(nic.receive.len());
    if owned == 0 || spread <= owned {
        return None;
    }
    let what = if nic.driver.as_deref() == Some("virtio_net") {
        "the hypervisor answers on the queue pair through which a connection sent last, so that it \
         comes to its shard"
            .into()
    } else if nic.rss_queues.is_some() {
        format!(
            "`ethtool -X {} equal {owned}` keeps them there (not done here: it moves connections from \
             queue to queue)",
            nic.name
        )
    } else {
        format!(
            "`ethtool -L {} combined {owned}` leaves these (not done here: the link goes down for it)",
            nic.name
        )
    };
    Some(format!(
        "{}: packets are spread over {spread} queues and {owned} of them are the shards'; {what}",
        nic.name
    ))
}
