//! The layout map as a picture, without scripts or outside files.

use super::line;
use super::map::{groups, role_name};
use crate::host::Host;
use crate::plan::{Layout, Role};

const CELL: usize = 44;
const GAP: usize = 6;
const CORES_A_LINE: usize = 16;
const WIDTH: usize = 2 * GAP + CORES_A_LINE * (CELL + GAP) + 140;

/// A queue's name and the CPU that it serves.
type Served = (String, Option<u32>);

fn colour(layout: Option<&Layout>, cpu: u32) -> &'static str {
    match layout.and_then(|layout| layout.role(cpu)) {
        Some(Role::Shard(_)) => "#3b7dd8",
        Some(Role::Housekeeping) => "#d88a3b",
        Some(Role::Spare) => "#b8c0c8",
        None => "#e6e9ec",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
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
                    let words = format!("{} {}", cpu.id, role_name(layout, cpu.id));
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
        // The shard that owns the queue, else any CPU of it.
        let cpu_of = |queue: &crate::host::HardwareQueue| {
            let shards = layout.map(Layout::shard_cpus).unwrap_or_default();
            shards.and(&queue.cpus).first().or(queue.cpus.first())
        };
        let queues = block.queues.iter();
        let queues = queues.map(|queue| (format!("q{}", queue.index), cpu_of(queue)));
        devices.push((block.name.clone(), queues.collect()));
    }
    for nic in &host.nics {
        let owner = |index: u32| {
            let mut places = layout?.shards.iter();
            let place = places.find(|place| place.network.get(&nic.name) == Some(&index));
            place
                .map(|place| place.cpu)
                .or(layout?.housekeeping.first())
        };
        let queues = nic.receive.iter();
        let queues = queues.map(|queue| (format!("rx{}", queue.index), owner(queue.index)));
        devices.push((nic.name.clone(), queues.collect()));
    }
    for (name, queues) in devices {
        text(&mut body, GAP, y + 12, &name);
        y += 18;
        for row in queues.chunks(CORES_A_LINE) {
            for (at, (queue, cpu)) in row.iter().enumerate() {
                let x = 2 * GAP + at * (CELL + GAP);
                let fill = cpu.map_or("#ffffff", |cpu| colour(layout, cpu));
                let words = cpu.map_or_else(|| queue.clone(), |cpu| format!("{queue} {cpu}"));
                cell(&mut body, x, y, 20, fill, &words);
            }
            y += 22 + GAP;
        }
    }
    text(
        &mut body,
        GAP,
        y + 12,
        "blue: shard, orange: housekeeping and its interrupts, grey: spare; a queue shows the CPU that it serves",
    );
    y += 24;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" font-family=\"monospace\" font-size=\"10\">\n<rect width=\"{WIDTH}\" height=\"{y}\" fill=\"#ffffff\"/>\n{body}</svg>\n"
    )
}
