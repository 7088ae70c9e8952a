//! The layout map as a picture, without scripts or outside files.

use super::line;
use super::map::{device, groups, role_name};
use crate::cpuset::CpuSet;
use crate::host::{CoreKind, HardwareQueue, Host};
use crate::plan::{Layout, Role, near};

const CELL: usize = 88;
/// Letters that fit into a cell.
const LETTERS: usize = 12;
const GAP: usize = 6;
const CORES_A_LINE: usize = 16;
const WIDTH: usize = 3 * GAP + CORES_A_LINE * (CELL + GAP);

/// A queue's name and the CPUs that it serves.
type Served = (String, CpuSet);

fn colour(layout: Option<&Layout>, cpu: u32) -> &'static str {
    match layout.and_then(|layout| layout.role(cpu)) {
        Some(Role::Shard(_)) => "#9cc3f5",
        Some(Role::Housekeeping) => "#f2b36b",
        Some(Role::Spare) => "#cfd5da",
        None => "#ffffff",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Cuts what is too long for a cell.
fn fit(words: String) -> String {
    if words.chars().count() <= LETTERS {
        return words;
    }
    words.chars().take(LETTERS - 1).chain(['…']).collect()
}

/// Draws the host: a box for each socket, node and cache, a cell for each hardware thread, and a
/// row of queues for each device, coloured as the CPUs that they serve.
pub fn svg(host: &Host, layout: Option<&Layout>) -> String {
    let mut body = String::new();
    let mut y = GAP;
    let text = |body: &mut String, x: usize, y: usize, words: &str| {
        line(
            body,
            format_args!(r#"<text x="{x}" y="{y}">{}</text>"#, escape(words)),
        );
    };
    let cell = |body: &mut String, x: usize, y: usize, height: usize, fill: &str, words: &str| {
        line(
            body,
            format_args!(
                r##"<rect x="{x}" y="{y}" width="{CELL}" height="{height}" rx="4" fill="{fill}" stroke="#445"/>"##
            ),
        );
        line(
            body,
            format_args!(
                r#"<text x="{}" y="{}">{}</text>"#,
                x + 4,
                y + 14,
                escape(words)
            ),
        );
    };
    for group in groups(host) {
        text(&mut body, GAP, y + 12, &group.title);
        y += 18;
        for row in group.cores.chunks(CORES_A_LINE) {
            let depth = row.iter().map(Vec::len).max().unwrap_or(1);
            for (at, core) in row.iter().enumerate() {
                let x = 2 * GAP + at * (CELL + GAP);
                for (thread, cpu) in core.iter().enumerate() {
                    let slow = match cpu.kind {
                        CoreKind::Efficiency => " slow",
                        _ => "",
                    };
                    let words = format!("{} {}{slow}", cpu.id, role_name(layout, cpu.id));
                    cell(
                        &mut body,
                        x,
                        y + thread * 22,
                        20,
                        colour(layout, cpu.id),
                        &words,
                    );
                }
            }
            y += depth * 22 + GAP;
        }
    }
    let mut devices: Vec<(String, Vec<Served>)> = Vec::new();
    for block in &host.blocks {
        let mut title = String::new();
        let interrupts = block.queues.iter().map(|queue| queue.interrupt);
        device(&mut title, host, (&block.name, block.node), interrupts);
        // The shards that use it, else all CPUs that may.
        let served = |queue: &HardwareQueue| {
            let shards = layout.map(Layout::shard_cpus).unwrap_or_default();
            let shards = shards.and(&queue.cpus);
            if shards.is_empty() {
                queue.cpus.clone()
            } else {
                shards
            }
        };
        let queues = block.queues.iter();
        let queues = queues.map(|queue| (format!("q{}", queue.index), served(queue)));
        devices.push((title, queues.collect()));
    }
    for nic in &host.nics {
        let mut title = String::new();
        let interrupts = nic.receive.iter().map(|queue| queue.interrupt);
        device(&mut title, host, (&nic.name, nic.node), interrupts);
        let served = |index: u32| {
            let Some(layout) = layout else {
                return CpuSet::new();
            };
            let owners = layout.owners(&nic.name, index).into_iter();
            let owners: CpuSet = owners.map(|shard| layout.shards[shard].cpu).collect();
            if owners.is_empty() {
                near(host, &layout.housekeeping, nic.node)
            } else {
                owners
            }
        };
        let queues = nic.receive.iter();
        let queues = queues.map(|queue| (format!("rx{}", queue.index), served(queue.index)));
        devices.push((title, queues.collect()));
    }
    for (title, queues) in devices {
        text(&mut body, GAP, y + 12, title.trim_end());
        y += 18;
        for row in queues.chunks(CORES_A_LINE) {
            for (at, (queue, cpus)) in row.iter().enumerate() {
                let x = 2 * GAP + at * (CELL + GAP);
                let fill = cpus.first().map_or("#ffffff", |cpu| colour(layout, cpu));
                let words = if cpus.is_empty() {
                    queue.clone()
                } else {
                    fit(format!("{queue} → {cpus}"))
                };
                cell(&mut body, x, y, 20, fill, &words);
            }
            y += 22 + GAP;
        }
    }
    let legend = [
        ("#9cc3f5", "shard"),
        ("#f2b36b", "housekeeping"),
        ("#cfd5da", "spare"),
    ];
    for (at, (fill, words)) in legend.into_iter().enumerate() {
        let x = 2 * GAP + at * 3 * (CELL + GAP);
        cell(&mut body, x, y, 20, fill, "");
        text(&mut body, x + CELL + GAP, y + 14, words);
    }
    let x = 2 * GAP + 9 * (CELL + GAP);
    text(
        &mut body,
        x,
        y + 14,
        "q1 → 2: a queue and the CPUs that it serves",
    );
    y += 28;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" font-family=\"monospace\" font-size=\"11\">\n<title>Shards, interrupts and queues</title>\n<rect width=\"{WIDTH}\" height=\"{y}\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}
