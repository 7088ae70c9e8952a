//! Network cards: queues, steering, coalescing.

use serde::{Deserialize, Serialize};

use super::blocks::node_of;
use super::{Interrupt, Unavailable};
use crate::cpuset::CpuSet;
use crate::kernel::{CALLS, Kernel};

/// A receive or transmit queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// Number.
    pub index: u32,
    /// Receive: CPUs to which software steers packets (RPS). Transmit: CPUs that send through it (XPS).
    pub cpus: CpuSet,
    /// Receive: connections whose reader the kernel follows (RFS).
    pub flows: Option<u64>,
    /// Its interrupt, where the driver's names tell.
    pub interrupt: Option<u32>,
}

/// How long a card gathers packets before it interrupts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coalescing {
    /// Whether the driver adapts it.
    pub adaptive: bool,
    /// Microseconds after a received packet.
    pub receive_us: u64,
    /// Microseconds after a sent packet.
    pub transmit_us: u64,
}

/// A network card that has a device behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Interface name.
    pub name: String,
    /// Driver.
    pub driver: Option<String>,
    /// Memory node of the device.
    pub node: Option<u32>,
    /// `up`, `down`, …
    pub state: Option<String>,
    /// Megabits a second.
    pub speed_mbps: Option<u64>,
    /// Receive queues.
    pub receive: Vec<Queue>,
    /// Transmit queues.
    pub transmit: Vec<Queue>,
    /// Coalescing, where the driver tells.
    pub coalescing: Option<Coalescing>,
    /// Queues in use and at most, in the driver's words.
    pub channels: Option<String>,
    /// Distinct queues in the RSS indirection table.
    pub rss_queues: Option<usize>,
    /// Interrupts deferred in favour of polling.
    pub napi_defer_hard_irqs: Option<u64>,
    /// Nanoseconds before gathered packets are handed up.
    pub gro_flush_timeout_ns: Option<u64>,
}

pub(super) fn read(
    kernel: &impl Kernel,
    interrupts: &[Interrupt],
    unavailable: &mut Vec<Unavailable>,
) -> Vec<Nic> {
    let mut nics = Vec::new();
    for name in kernel.list("/sys/class/net").unwrap_or_default() {
        let directory = format!("/sys/class/net/{name}");
        // Bridges, tunnels, loopback have no device; `veth` pairs have queues and are shown too.
        let has_queues = kernel
            .list(&format!("{directory}/queues"))
            .is_ok_and(|q| q.len() > 2);
        if kernel.resolve(&format!("{directory}/device")).is_err() && !has_queues {
            continue;
        }
        let nic = read_one(kernel, &name, interrupts);
        if nic.coalescing.is_none() {
            unavailable.push(Unavailable {
                what: format!("coalescing of {name}"),
                reason: "its driver does not tell, or this host was captured without it".into(),
            });
        }
        nics.push(nic);
    }
    nics
}

fn read_one(kernel: &impl Kernel, name: &str, interrupts: &[Interrupt]) -> Nic {
    let directory = format!("/sys/class/net/{name}");
    let number = |file: &str| kernel.number::<u64>(&format!("{directory}/{file}"));
    let calls = |file: &str| kernel.text(&format!("{CALLS}/ethtool/{name}/{file}"));
    let own = own_interrupts(kernel, name, interrupts);
    let mut receive = Vec::new();
    let mut transmit = Vec::new();
    for queue in kernel
        .list(&format!("{directory}/queues"))
        .unwrap_or_default()
    {
        let (sort, file, list) = if queue.starts_with("rx-") {
            ("rx", "rps_cpus", &mut receive)
        } else {
            ("tx", "xps_cpus", &mut transmit)
        };
        let Some(index) = queue[queue.find('-').map_or(0, |at| at + 1)..].parse().ok() else {
            continue;
        };
        let cpus = kernel.text(&format!("{directory}/queues/{queue}/{file}"));
        list.push(Queue {
            index,
            cpus: cpus
                .and_then(|mask| CpuSet::parse_mask(&mask).ok())
                .unwrap_or_default(),
            flows: number(&format!("queues/{queue}/rps_flow_cnt")),
            interrupt: own
                .iter()
                .find(|irq| serves(irq, sort, index))
                .map(|irq| irq.number),
        });
    }
    let usecs = |file: &str| calls(file)?.parse::<u64>().ok();
    Nic {
        name: name.to_owned(),
        driver: kernel
            .resolve(&format!("{directory}/device/driver"))
            .ok()
            .and_then(|path| path.rsplit('/').next().map(str::to_owned)),
        node: node_of(kernel, &format!("{directory}/device")),
        state: kernel.text(&format!("{directory}/operstate")),
        speed_mbps: number("speed"),
        receive,
        transmit,
        coalescing: usecs("rx-usecs").map(|receive_us| Coalescing {
            adaptive: usecs("adaptive-rx").unwrap_or(0) != 0,
            receive_us,
            transmit_us: usecs("tx-usecs").unwrap_or(0),
        }),
        channels: calls("channels"),
        rss_queues: calls("rss").map(|table| {
            let queues: std::collections::BTreeSet<&str> = table.split_whitespace().collect();
            queues.len()
        }),
        napi_defer_hard_irqs: number("napi_defer_hard_irqs"),
        gro_flush_timeout_ns: number("gro_flush_timeout"),
    }
}

/// Interrupts of the card's device: those listed at it or its bus parent, else those that bear its
/// name.
fn own_interrupts<'a>(
    kernel: &impl Kernel,
    name: &str,
    interrupts: &'a [Interrupt],
) -> Vec<&'a Interrupt> {
    let device = format!("/sys/class/net/{name}/device");
    let listed: Vec<u32> = [
        format!("{device}/msi_irqs"),
        format!("{device}/../msi_irqs"),
    ]
    .iter()
    .find_map(|path| kernel.list(path).ok())
    .unwrap_or_default()
    .iter()
    .filter_map(|number| number.parse().ok())
    .collect();
    let named = |irq: &&Interrupt| {
        let mut pieces = irq.name.split(['-', '@', ':']);
        pieces.any(|piece| piece == name)
    };
    let is_listed = |irq: &&Interrupt| listed.contains(&irq.number);
    if listed.is_empty() {
        interrupts.iter().filter(named).collect()
    } else {
        interrupts.iter().filter(is_listed).collect()
    }
}

/// Whether an interrupt serves queue `index` of sort `rx` or `tx`: drivers name one vector a queue
/// (`…-input.0`, `eth0-rx-0`) or one a pair (`eth0-TxRx-0`, `mlx5_comp0@…`).
fn serves(irq: &Interrupt, sort: &str, index: u32) -> bool {
    if irq.trailing_number() != Some(index) {
        return false;
    }
    let name = irq.name.to_ascii_lowercase();
    if name.contains("config") || name.contains("async") || name.contains("mgmnt") {
        return false;
    }
    let pair = ["txrx", "tx-rx", "rxtx", "comp"]
        .iter()
        .any(|word| name.contains(word));
    let receive = name.contains("input") || name.contains("-rx");
    let transmit = name.contains("output") || name.contains("-tx");
    pair || (!receive && !transmit) || (sort == "rx" && receive) || (sort == "tx" && transmit)
}
