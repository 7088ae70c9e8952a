//! The layout map for a terminal: CPUs by socket, memory node and last-level cache, then queues.

use std::collections::BTreeMap;

use super::plan::series;
use super::{Table, line, shard_names, words};
use crate::cpuset::CpuSet;
use crate::host::{CoreKind, Cpu, Host, Interrupt, Managed};
use crate::plan::{Layout, Role};

const CELLS_A_LINE: usize = 8;

/// CPUs that share socket, node and last-level cache.
pub(super) struct Group<'a> {
    /// `socket 0 node 0 cache 0-7`.
    pub title: String,
    /// Physical cores, each with its hardware threads.
    pub cores: Vec<Vec<&'a Cpu>>,
}

pub(super) fn groups(host: &Host) -> Vec<Group<'_>> {
    type Place = (Option<i64>, Option<u32>, CpuSet);
    let mut groups: BTreeMap<Place, BTreeMap<CpuSet, Vec<&Cpu>>> = BTreeMap::new();
    for cpu in &host.cpus.list {
        groups
            .entry((cpu.package, cpu.node, cpu.cache_mates.clone()))
            .or_default()
            .entry(cpu.siblings.clone())
            .or_default()
            .push(cpu);
    }
    let named =
        |number: Option<i64>| number.map_or_else(|| "?".into(), |number| number.to_string());
    groups
        .into_iter()
        .map(|((package, node, mates), cores)| Group {
            title: format!(
                "socket {} node {} cache {mates}",
                named(package),
                named(node.map(i64::from))
            ),
            cores: cores.into_values().collect(),
        })
        .collect()
}

/// What a CPU does, in at most four letters.
pub(super) fn role_name(layout: Option<&Layout>, cpu: u32) -> String {
    match layout.and_then(|layout| layout.role(cpu)) {
        Some(Role::Shard(shard)) => format!("s{shard}"),
        Some(Role::Housekeeping) => "hk".into(),
        Some(Role::Spare) => "--".into(),
        None => "..".into(),
    }
}

/// Draws the host, with the layout's roles when there is one.
pub fn map(host: &Host, layout: Option<&Layout>) -> String {
    let mut out = String::new();
    for group in groups(host) {
        line(&mut out, format_args!("{}", group.title));
        for row in group.cores.chunks(CELLS_A_LINE) {
            let depth = row.iter().map(Vec::len).max().unwrap_or(0);
            for thread in 0..depth {
                let mut cells = String::from("  ");
                for core in row {
                    match core.get(thread) {
                        Some(cpu) => {
                            let slow = if cpu.kind == CoreKind::Efficiency {
                                "e"
                            } else {
                                " "
                            };
                            words(
                                &mut cells,
                                format_args!("{:>4}{slow}{:<4}", cpu.id, role_name(layout, cpu.id)),
                            );
                        }
                        None => cells.push_str("         "),
                    }
                }
                line(&mut out, format_args!("{}", cells.trim_end()));
            }
        }
    }
    for block in &host.blocks {
        let interrupts = block.queues.iter().map(|queue| queue.interrupt);
        device(&mut out, host, (&block.name, block.node), interrupts);
        let cells = block.queues.iter().map(|queue| {
            let shards = layout.map(|layout| layout.shards_on(&queue.cpus));
            let shards = shard_names(&shards.unwrap_or_default());
            let irq = queue.interrupt.and_then(|number| host.interrupt(number));
            let one = irq
                .map(Interrupt::lands_on)
                .filter(|cpus| **cpus != queue.cpus);
            let now = one.map_or_else(String::new, |cpus| format!(">{cpus}"));
            format!("q{}:{}{now} {shards}", queue.index, queue.cpus)
        });
        grid(&mut out, cells.collect());
    }
    for nic in &host.nics {
        let interrupts = nic.receive.iter().map(|queue| queue.interrupt);
        device(&mut out, host, (&nic.name, nic.node), interrupts);
        let cells = nic.receive.iter().map(|queue| {
            let irq = queue.interrupt.and_then(|number| host.interrupt(number));
            let cpus = irq.map_or_else(|| "?".into(), |irq| irq.lands_on().to_string());
            let owners = layout.map(|layout| layout.owners(&nic.name, queue.index));
            let owners = shard_names(&owners.unwrap_or_default());
            format!("rx{}:{cpus} {owners}", queue.index)
        });
        grid(&mut out, cells.collect());
    }
    if layout.is_some() {
        out.push_str("sN shard, hk housekeeping, -- spare, e slow core\n");
    }
    out.push_str(
        "q0:1-2>1 a queue, its CPUs and the one that it interrupts now; rx0:1 a queue and that CPU\n",
    );
    out
}

/// Name and node of a device, and how its queues interrupt.
pub(super) fn device(
    out: &mut String,
    host: &Host,
    (name, node): (&str, Option<u32>),
    interrupts: impl Iterator<Item = Option<u32>>,
) {
    let interrupts: Vec<&Interrupt> = interrupts
        .filter_map(|number| host.interrupt(number?))
        .collect();
    let names = match (interrupts.first(), interrupts.last()) {
        (Some(first), Some(last)) => {
            let kept = match first.managed {
                Managed::Yes => ", managed by the kernel",
                Managed::Likely => ", likely managed by the kernel",
                Managed::No => "",
            };
            format!(" irq {}{kept}", series(&first.name, &last.name))
        }
        _ => String::new(),
    };
    line(out, format_args!("{name}{}{names}", at_node(node)));
}

fn grid(out: &mut String, cells: Vec<String>) {
    let mut table = Table::new(2, &[]);
    for row in cells.chunks(CELLS_A_LINE) {
        table.row(row.iter().map(|cell| cell.trim_end()));
    }
    table.draw(out);
}

fn at_node(node: Option<u32>) -> String {
    node.map_or_else(String::new, |node| format!(" (node {node})"))
}
